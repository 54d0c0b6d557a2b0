//! The client against a scripted agent, over real sockets.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod calls;
mod command;
mod connections;
mod fake;
mod recovery;
mod tls;
mod upload;
