//! One call's part of a connection: what is left of its request, and what has come of its reply.

use std::collections::VecDeque;
use std::task::Waker;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use tonic::{Code, Status};
use vaccel_guest::hpack::{Broken, Headers};

use crate::unary::{self, Gathered, broken};

/// A call.
#[derive(Debug, Default)]
pub(super) struct Stream {
    /// What of the request is in no frame yet.
    pub(super) pieces: VecDeque<Bytes>,
    pub(super) unframed: usize,
    /// What the agent takes of it.
    pub(super) window: i64,
    /// Bytes that go before its first one.
    pub(super) begins_at: u64,
    /// The beginning of the answer came.
    pub(super) is_answered: bool,
    reply: Gathered,
    pub(super) outcome: Option<Result<Bytes, Status>>,
    /// Who waits for it.
    pub(super) waker: Option<Waker>,
}

impl Stream {
    pub(super) fn new(pieces: Vec<Bytes>, window: i64, begins_at: u64) -> Self {
        let unframed = pieces.iter().map(Bytes::len).sum();
        Self { pieces: pieces.into(), unframed, window, begins_at, ..Self::default() }
    }

    /// The next so many bytes of its request, which are there, in pieces.
    pub(super) fn next(&mut self, mut bytes: usize) -> impl Iterator<Item = Bytes> {
        self.unframed -= bytes;
        std::iter::from_fn(move || {
            let piece = self.pieces.front_mut().filter(|_| bytes > 0)?;
            let part = piece.split_to(piece.len().min(bytes));
            if piece.is_empty() {
                self.pieces.pop_front();
            }
            bytes -= part.len();
            Some(part)
        })
    }

    /// Takes in a header block: the beginning of the answer, or its end. Returns the outcome, if this decides it.
    pub(super) fn headers(&mut self, block: &[u8], is_last: bool) -> Result<Option<Outcome>, Broken> {
        let head = Head::read(block)?;
        if !self.is_answered {
            match head.http {
                Some(100..200) if !is_last => return Ok(None),
                Some(200) | None => {}
                Some(_) if head.grpc.is_some() => {}
                Some(status) => return Ok(Some(Err(unary::by_http(status)))),
            }
        }
        self.is_answered = true;
        match head.grpc {
            None if is_last => Ok(Some(Err(broken("ends without a status")))),
            None => Ok(None),
            Some(0) => {
                let message = std::mem::take(&mut self.reply).finish();
                let framed = message.and_then(|framed| framed.ok_or_else(|| broken("has no message")));
                Ok(Some(framed.and_then(|framed| unary::plain(&framed))))
            }
            Some(_) => head.status(block).map(|status| Some(Err(status))),
        }
    }

    /// Takes in content of the answer.
    pub(super) fn data(&mut self, bytes: &[u8]) -> Result<(), Status> {
        if self.is_answered { self.reply.add(bytes) } else { Err(broken("has no beginning")) }
    }

    /// Where the next so many bytes of content go, when that is known.
    pub(super) fn place(&mut self, most: usize) -> Option<bytes::buf::Limit<&mut BytesMut>> {
        let missing = self.reply.missing?;
        (missing > 0 && self.outcome.is_none())
            .then(|| bytes::BufMut::limit(&mut self.reply.bytes, most.min(missing)))
    }

    /// So many bytes came to that place.
    pub(super) fn placed(&mut self, count: usize) {
        self.reply.missing = self.reply.missing.map(|missing| missing.saturating_sub(count));
    }
}

pub(super) type Outcome = Result<Bytes, Status>;

/// What a header block says about a call.
struct Head {
    http: Option<u16>,
    grpc: Option<u32>,
}

impl Head {
    fn read(block: &[u8]) -> Result<Self, Broken> {
        let mut headers = Headers::new(block);
        let mut head = Self { http: None, grpc: None };
        while let Some((name, value)) = headers.next()? {
            if name.is(b":status") {
                head.http = Some(value.number().and_then(|number| number.try_into().ok()).unwrap_or(0));
            } else if name.is(b"grpc-status") {
                // What is no number is no success.
                head.grpc = Some(value.number().unwrap_or(Code::Unknown as u32));
            }
        }
        Ok(head)
    }

    /// The agent's error with all it says about it.
    fn status(&self, block: &[u8]) -> Result<Status, Broken> {
        let mut headers = Headers::new(block);
        let mut fields = HeaderMap::new();
        while let Some((name, value)) = headers.next()? {
            let (name, value): (Vec<u8>, Vec<u8>) = (name.bytes().collect(), value.bytes().collect());
            // Names of HTTP/2 itself are none for the map.
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&name), HeaderValue::from_bytes(&value)) {
                fields.append(name, value);
            }
        }
        Ok(Status::from_header_map(&fields).unwrap_or_else(|| broken("ends without a status")))
    }
}
