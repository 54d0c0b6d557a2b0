//! The client against a scripted agent, over real sockets.

mod calls;
mod fake;
mod recovery;
mod tls;
mod upload;
