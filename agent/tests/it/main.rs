//! The agent and its guests, in processes of their own, over real sockets.

#![allow(missing_docs, missing_debug_implementations, unreachable_pub, clippy::unwrap_used, reason = "tests")]

mod support;

mod choices;
mod classify;
mod compute;
mod conformance;
mod engines;
mod exec;
mod families;
mod formats;
mod genop;
mod gpu;
mod guest;
mod guest_programs;
mod hostile;
mod images;
mod inference;
mod instructions;
mod large;
mod life;
mod lifecycle;
mod readme;
mod shared;
mod store;
mod tenants;
mod tidy;
mod tls;
#[cfg(target_arch = "x86_64")]
mod vm;
