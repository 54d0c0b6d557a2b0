//! A connection for calls of one message there and one back, as almost all are.
//!
//! A client library gives every connection a task and hands each request and reply through it. Here a call that is
//! alone on its connection reads and writes the socket itself: its task is the only one to wake, and the reply's bytes
//! go from the socket to their place. As soon as calls share the connection, its attendant works for all of them, so
//! that none depends on whether another one's task is polled.
//!
//! `connection` is who may work and when, `state` the connection itself, `stream` one call's part of it, `output` what
//! is to be written (the agent's, too), `pool` which of several connections a call takes, `alarm` what wakes it
//! for an answer that is foreseen.
//!
//! *Source:* RFC 9113 (HTTP/2), gRPC over HTTP/2.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "lengths are bounded by the frames they are of, and constants by what they are"
)]

mod alarm;
mod connection;
mod output;
mod pool;
mod receive;
mod state;
mod stream;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(crate) use connection::Connection;
pub use output::Output;
pub(crate) use pool::Pool;

/// Pause between looks at an agent that is silent: at the first it is sent a PING, at the second it is given up.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Longest frame the agent may send, in bytes: the usual 16 KiB cost many times the system calls.
pub(crate) const FRAME_BYTES_MAX: u32 = 1 << 20;
