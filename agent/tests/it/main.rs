//! The agent and its guests, in processes of their own, over real sockets.

#![allow(missing_docs, missing_debug_implementations, unreachable_pub, clippy::unwrap_used, reason = "tests")]

mod support;

mod choices;
mod classify;
mod engines;
mod guest;
mod guest_programs;
mod hostile;
mod life;
mod lifecycle;
mod readme;
mod tenants;
mod tidy;
mod tls;
#[cfg(target_arch = "x86_64")]
mod vm;
