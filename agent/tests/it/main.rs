//! The agent and its guests, in processes of their own, over real sockets.

#![allow(missing_docs, unreachable_pub, reason = "tests")]

mod support;

mod classify;
mod engines;
mod hostile;
mod life;
mod readme;
mod tenants;
mod tidy;
mod tls;
