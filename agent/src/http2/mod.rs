//! The agent's end of HTTP/2: one task for a connection and all its streams.
//!
//! A server library reads frames into buffers, gathers messages from them into others, and hands every call to a task
//! of its own. Here the bytes of a message go from the socket to where the operation reads them, a call that needs no
//! waiting is answered where it was read, and head, tensors and trailers of a reply leave in one system call.
//!
//! `connection` is the task, `receive` what it does about a peer's frames, `send` what becomes of answers; `input` is
//! what was read, `foreseen` what is read before it is known what it is, `incoming` a request's body, `fields` header
//! blocks, `bell` who is to be looked at. **Invariant:** it knows no service; whatever a peer can make it
//! hold is bounded here or charged by [`Meter`].
//!
//! *Source:* RFC 9113 (HTTP/2), gRPC over HTTP/2 (how messages lie in bodies).

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "windows have 31 bits, lengths are bounded by FRAME_BYTES_MAX before they become smaller numbers"
)]

mod bell;
mod connection;
mod fields;
mod foreseen;
mod incoming;
mod input;
mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use vaccel_proto::limits::{DEADLINE_MAX, MESSAGE_BYTES_MAX};
use vaccel_proto::{Error, Reason};

use crate::onward::Listener;

pub(crate) use connection::Connection;
pub(crate) use incoming::{BESIDE_MESSAGE_BYTES, Incoming, Meter};
pub(crate) use input::{Wire, poll_read};

/// Pause between looks at a peer that is silent: at the first it is sent a PING, at the second it is given up. vsock
/// has no keep-alive of its own, and a VM that vanished says nothing.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// How long a peer may take to answer that it knows that the agent is closing.
const FAREWELL: Duration = Duration::from_millis(500);

/// How long a request may take to arrive: the longest deadline and some time to answer that it passed.
pub(crate) const REQUEST_DURATION_MAX: Duration = Duration::from_secs(DEADLINE_MAX.as_secs() + 30);

/// Streams of one connection: more than a tenant's calls by default, which are refused in words.
const STREAMS_MAX: usize = bell::PLACES;

/// What a peer may send on a stream before it is told to go on, in bytes: at first, and at most. It grows with longer
/// messages, so that the next one need not wait for the agent to say so, and where the peer is far away and the service
/// waits for it. A peer whose service does not keep up is held up there and not here: what has come of an upload and is
/// not on disk may be lost with the connection.
const STREAM_WINDOW: u32 = 512 << 10;
const STREAM_WINDOW_MAX: u32 = MESSAGE_BYTES_MAX as u32;

/// The same for all streams, in bytes. It is given back as bytes come: what holds them is charged, each stream has its
/// own window, and two of the largest messages can be under way.
const CONNECTION_WINDOW: u32 = 2 * STREAM_WINDOW_MAX;

/// What part of a window has arrived when the peer is told to go on: three quarters are on their way meanwhile, which
/// is a gigabit per second over 100 ms.
const WINDOW_PART: u32 = 4;

/// What a window that grows with a message is a multiple of, in bytes.
const WINDOW_STEP: u32 = 64 << 10;

/// How long a part of a window takes to come where a larger one would help: then the peer is 20 ms away, or slow, and
/// nothing gathers here.
const FAR: Duration = Duration::from_millis(5);

/// Largest frame a peer may send, in bytes. Its contents go where they belong as they come; 16 KiB, the protocol's
/// default, costs many times the system calls.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// All headers of a request, in bytes, counted as the protocol does.
const HEADER_BYTES_MAX: usize = 16 << 10;

/// A header block on the wire, in bytes and in frames: one that is too large to be taken is still read, because what
/// comes after it may refer to it.
const BLOCK_BYTES_MAX: usize = 2 * HEADER_BYTES_MAX;
const BLOCK_FRAMES_MAX: usize = 16;

/// Settings in one frame: there are seven.
const SETTINGS_MAX: usize = 64;

/// Read of a connection before its thread does something else, in bytes and in calls: others wait for that, and what is
/// to compute those calls may.
const TURN_BYTES: usize = 1 << 20;
const TURN_CALLS: u32 = 64;

/// How often it goes on in a turn because calls of it have something to do by then: they may wake each other, or
/// themselves, for ever.
const TURN_ROUNDS: usize = 64;

/// Read ahead of the place it is for, in bytes.
const AHEAD_BYTES: usize = 64 << 10;

/// Messages that are foreseen, in bytes: what they save is a system call, which is nothing beside longer ones.
const FORESEEN_BYTES_MAX: usize = 128 << 10;

/// Written to the queue before the socket takes some of it, in bytes. More would make one stream's reply wait for
/// another's.
const QUEUE_BYTES_MAX: usize = 1 << 20;

/// Answers to a peer's PINGs and the like that it does not read, in bytes; before it does, nothing more is read of it.
const OWED_BYTES_MAX: usize = 64 << 10;

/// Whether a request's body is gRPC's messages.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Why the body of one that did not arrive in time ends.
pub(crate) fn too_late() -> Error {
    Error::new(Reason::Deadline, "the request was not whole in time")
}

/// Whom requests are for.
pub(crate) trait Service {
    /// What is made of a request's head, once for all calls of a connection that have the same.
    type Head;
    type Body: Reply;
    type Answer: Future<Output = Response<Self::Body>> + Unpin;

    fn understand(&self, request: Request<()>) -> Self::Head;

    /// Whether the request's body is gRPC's messages.
    fn has_messages(head: &Self::Head) -> bool;

    fn call(&self, head: &Arc<Self::Head>, body: Incoming) -> Self::Answer;

    /// A call is about to come to a connection's task, which waits for it.
    fn expect(&self, task: Listener);
}

/// A reply's body.
pub(crate) trait Reply: Body<Data = Bytes> + Unpin {
    /// The header blocks before and behind it, where they are the same for all replies of its kind; else they are those
    /// of the response and of the body's trailers.
    fn blocks(&self) -> Option<&'static Blocks> {
        None
    }
}

/// Header blocks, as they are sent.
#[derive(Debug)]
pub(crate) struct Blocks {
    head: Vec<u8>,
    trailers: Vec<u8>,
}

impl Blocks {
    pub(crate) fn new(head: &HeaderMap, trailers: &HeaderMap) -> Self {
        let mut blocks = Self { head: Vec::new(), trailers: Vec::new() };
        fields::write_head(http::StatusCode::OK, head, &mut blocks.head);
        fields::write(trailers, &mut blocks.trailers);
        blocks
    }
}
