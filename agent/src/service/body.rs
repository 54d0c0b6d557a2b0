//! Bodies, counted: a request's against its tenant while it arrives and until the call is over, and what the call holds
//! until its reply has left.
//!
//! A claim beyond the limit is refused on the first five bytes of its message, and a tenant cannot have more bytes in
//! flight than its limit however many calls it spreads them over.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tonic::Status;
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::tensor::GRPC_HEADER_BYTES;
use vaccel_proto::{Error, Reason};

use crate::dispatch::Caller;
use crate::http2::{BESIDE_MESSAGE_BYTES, Blocks, Meter, Reply};
use crate::quota::Hold;

/// The count, shared by the body and the call.
pub(super) struct HeldBytes {
    counted: Mutex<Counted>,
    is_messages: bool,
}

struct Counted {
    hold: Hold,
    /// Bytes that have come of a body of anything.
    came: u64,
}

impl HeldBytes {
    /// A count for a body of gRPC's messages, each of which may be as long as one may be, or for one of anything, which
    /// may be so long as a whole.
    pub(super) fn new(hold: Hold, is_messages: bool) -> Arc<Self> {
        Arc::new(Self { counted: Mutex::new(Counted { hold, came: 0 }), is_messages })
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is counted for a message, or a piece, of so many bytes.
    fn whole(&self, bytes: usize) -> u64 {
        bytes as u64 + if self.is_messages { BESIDE_MESSAGE_BYTES } else { 0 }
    }

    /// Counts so many more.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`.
    pub(super) fn grow(&self, bytes: u64) -> Result<(), Error> {
        self.counted().hold.grow(bytes)
    }
}

impl Meter for HeldBytes {
    fn claim(&self, bytes: usize) -> Result<(), Error> {
        let mut counted = self.counted();
        let (what, length) = if self.is_messages {
            ("message", bytes.saturating_sub(GRPC_HEADER_BYTES) as u64)
        } else {
            ("body", counted.came + bytes as u64)
        };
        let limit = MESSAGE_BYTES_MAX as u64;
        if length > limit {
            return Err(Error::limit(Reason::MessageTooLarge, what, limit, length, "bytes"));
        }
        counted.hold.grow(self.whole(bytes))?;
        counted.came += bytes as u64;
        Ok(())
    }

    fn give_back(&self, bytes: usize) {
        self.counted().hold.shrink(self.whole(bytes));
    }
}

/// What a buffer begins with, in bytes: most need no more.
const FIRST_BYTES: usize = 1024;

/// A buffer that counts against its call before it grows.
pub(super) struct CountedBuffer<'a> {
    pub(super) bytes: Vec<u8>,
    held: &'a HeldBytes,
    /// Why a write failed.
    pub(super) refusal: Option<Error>,
}

impl<'a> CountedBuffer<'a> {
    pub(super) fn new(held: &'a HeldBytes) -> Self {
        Self { bytes: Vec::new(), held, refusal: None }
    }

    /// Makes room for so many more.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`.
    pub(super) fn reserve(&mut self, more: usize) -> Result<(), Error> {
        let (need, capacity) = (self.bytes.len() + more, self.bytes.capacity());
        if need <= capacity {
            return Ok(());
        }
        let grown = need.max(capacity + capacity / 4).max(FIRST_BYTES);
        self.held.grow((grown - capacity) as u64)?;
        self.bytes.reserve_exact(grown - self.bytes.len());
        Ok(())
    }
}

impl Write for CountedBuffer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(refusal) = self.reserve(bytes.len()) {
            self.refusal = Some(refusal);
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The body of a request over HTTP/1.
pub(super) struct CountedBody {
    inner: hyper::body::Incoming,
    held: Arc<HeldBytes>,
}

impl CountedBody {
    pub(super) fn new(inner: hyper::body::Incoming, held: Arc<HeldBytes>) -> Self {
        Self { inner, held }
    }
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = match ready!(Pin::new(&mut self.inner).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(lost(error).into()))),
            None => return Poll::Ready(None),
        };
        let claimed = frame.data_ref().map_or(Ok(()), |data| self.held.claim(data.len()));
        Poll::Ready(Some(claimed.map(|()| frame).map_err(Status::from)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// That a message is what it says before its length: one that is not compressed.
///
/// # Errors
/// `BAD_ARGUMENT`.
pub(super) fn check_flag(framed: &[u8]) -> Result<(), Error> {
    if framed.first() == Some(&0) {
        return Ok(());
    }
    Err(Error::field("message", "one that is not compressed, as the call says", "another"))
}

/// A body of messages for the routes, which know errors as statuses and have other words for a flag that is none.
pub(super) struct Messages<B>(pub(super) B);

impl<B: Body<Data = Bytes, Error = Error> + Unpin> Body for Messages<B> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.0).poll_frame(context));
        Poll::Ready(frame.map(|frame| {
            let frame = frame?;
            frame.data_ref().map_or(Ok(()), |framed| check_flag(framed))?;
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

fn lost(error: hyper::Error) -> Error {
    Error::new(Reason::Cancelled, "the request ended before it was whole").caused_by(error)
}

/// What a call holds until its reply is sent: a guest that does not read its replies must not gather any number.
pub(super) struct Kept {
    pub(super) _caller: Caller,
    pub(super) _bytes: Arc<HeldBytes>,
}

/// A reply's body, which keeps what the call holds.
pub(crate) struct KeptBody {
    content: Content,
    kept: Option<Kept>,
}

enum Content {
    Routed(tonic::body::Body),
    /// One message of gRPC's, and the trailers behind it.
    Message {
        pieces: VecDeque<Bytes>,
        trailers: Option<HeaderMap>,
        blocks: Option<&'static Blocks>,
    },
}

impl KeptBody {
    pub(super) fn new(inner: tonic::body::Body, kept: Option<Kept>) -> Self {
        Self { content: Content::Routed(inner), kept }
    }

    /// A message in pieces, and trailers.
    pub(super) fn message(pieces: Vec<Bytes>, trailers: HeaderMap, kept: Kept) -> Self {
        let content = Content::Message { pieces: pieces.into(), trailers: Some(trailers), blocks: None };
        Self { content, kept: Some(kept) }
    }

    /// A message in pieces, with header blocks that are always the same.
    pub(super) fn message_between(blocks: &'static Blocks, pieces: Vec<Bytes>, kept: Kept) -> Self {
        let (pieces, trailers) = (pieces.into(), Some(HeaderMap::new()));
        Self { content: Content::Message { pieces, trailers, blocks: Some(blocks) }, kept: Some(kept) }
    }
}

impl Reply for KeptBody {
    fn blocks(&self) -> Option<&'static Blocks> {
        match &self.content {
            Content::Routed(_) => None,
            Content::Message { blocks, .. } => *blocks,
        }
    }
}

impl Body for KeptBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let frame = match &mut this.content {
            Content::Routed(body) => ready!(Pin::new(body).poll_frame(context)),
            Content::Message { pieces, trailers, .. } => match pieces.pop_front() {
                Some(piece) => Some(Ok(Frame::data(piece))),
                None => trailers.take().map(|trailers| Ok(Frame::trailers(trailers))),
            },
        };
        let is_last = frame.as_ref().is_none_or(|frame| frame.as_ref().is_ok_and(Frame::is_trailers));
        if is_last {
            // Before the caller can know that the call is over: its next one must find the place free.
            this.kept = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Routed(body) => body.is_end_stream(),
            Content::Message { pieces, trailers, .. } => pieces.is_empty() && trailers.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Routed(body) => body.size_hint(),
            Content::Message { pieces, .. } => {
                SizeHint::with_exact(pieces.iter().map(|piece| piece.len() as u64).sum())
            }
        }
    }
}
