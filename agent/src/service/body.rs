//! A request's body, counted against its tenant while it arrives and until the call is over.
//!
//! tonic gathers a message before any method sees it. This body reads gRPC's own framing on the way past, so that a
//! claim beyond the limit is refused on its first five bytes, and a tenant cannot have more bytes in flight than its
//! limit however many calls it spreads them over.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tonic::Status;
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::{Error, Reason};

use crate::dispatch::Caller;
use crate::quota::Hold;

/// One byte that says whether the message is compressed, four of length.
const HEADER_BYTES: usize = 5;

/// The count, shared by the body and the call.
pub(super) type HeldBytes = Arc<Mutex<Hold>>;

/// The body.
pub(super) struct CountedBody {
    inner: Incoming,
    framing: Framing,
    held: HeldBytes,
}

impl CountedBody {
    /// A body of gRPC's messages, or of one message without any framing.
    pub(super) fn new(inner: Incoming, is_grpc: bool, counted: Hold) -> (Self, HeldBytes) {
        let held = Arc::new(Mutex::new(counted));
        let framing = if is_grpc { Framing::default() } else { Framing::none() };
        (Self { inner, framing, held: Arc::clone(&held) }, held)
    }
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let frame = match ready!(Pin::new(&mut this.inner).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(lost(error).into()))),
            None => return Poll::Ready(None),
        };
        if let Some(data) = frame.data_ref() {
            let mut held = this.held.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = this.framing.count(data.clone(), &mut held) {
                return Poll::Ready(Some(Err(error.into())));
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

fn lost(error: hyper::Error) -> Error {
    Error::new(Reason::Cancelled, "the request ended before it was whole").caused_by(error)
}

/// What a call holds until its reply is sent: a guest that does not read its replies must not gather any number.
pub(super) struct Kept {
    pub(super) _caller: Caller,
    pub(super) _bytes: HeldBytes,
}

/// A reply's body, which keeps what the call holds.
pub(super) struct KeptBody {
    inner: tonic::body::Body,
    kept: Option<Kept>,
}

impl KeptBody {
    pub(super) fn new(inner: tonic::body::Body, kept: Option<Kept>) -> Self {
        Self { inner, kept }
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
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(context));
        let is_last = frame.as_ref().is_none_or(|frame| frame.as_ref().is_ok_and(Frame::is_trailers));
        if is_last {
            // Before the caller can know that the call is over: its next one must find the place free.
            this.kept = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Where in gRPC's framing the body is.
#[derive(Default)]
struct Framing {
    header: [u8; HEADER_BYTES],
    header_length: usize,
    /// Bytes of the message still to come.
    remaining: usize,
    /// Bytes that may come where there is no framing.
    unframed: Option<usize>,
}

impl Framing {
    fn none() -> Self {
        Self { unframed: Some(MESSAGE_BYTES_MAX), ..Self::default() }
    }

    fn count(&mut self, mut data: Bytes, held: &mut Hold) -> Result<(), Error> {
        if let Some(left) = self.unframed {
            let (limit, rest) = (MESSAGE_BYTES_MAX as u64, left.checked_sub(data.len()));
            let came = limit + data.len() as u64 - left as u64;
            let too_long = || Error::limit(Reason::MessageTooLarge, "body", limit, came, "bytes");
            self.unframed = Some(rest.ok_or_else(too_long)?);
            return held.grow(data.len() as u64);
        }
        while data.has_remaining() {
            if self.remaining > 0 {
                let part = data.len().min(self.remaining);
                held.grow(part as u64)?;
                self.remaining -= part;
                data.advance(part);
                continue;
            }
            self.header[self.header_length] = data.get_u8();
            self.header_length += 1;
            if self.header_length == HEADER_BYTES {
                self.header_length = 0;
                let [_, length @ ..] = self.header;
                let length = u32::from_be_bytes(length) as usize;
                if length > MESSAGE_BYTES_MAX {
                    let limit = MESSAGE_BYTES_MAX as u64;
                    return Err(Error::limit(
                        Reason::MessageTooLarge,
                        "message",
                        limit,
                        length as u64,
                        "bytes",
                    ));
                }
                // The message before this one, in a stream, has been taken by its method.
                held.release();
                self.remaining = length;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TenantLimits;
    use crate::identity::Tenant;
    use crate::quota::{Accounts, Unit};

    fn hold() -> (Arc<crate::quota::Account>, Hold) {
        let limits =
            TenantLimits { connections: 1, sessions: 1, calls: 1, resource_bytes: 1, in_flight_bytes: 100 };
        let account = Accounts::new(limits, |_| 1).of(&Tenant::new("a"));
        let hold = account.hold(Unit::InFlightBytes, 0).expect("fits");
        (account, hold)
    }

    fn message(length: u32, sent: usize) -> Vec<u8> {
        [&[0][..], &length.to_be_bytes(), &vec![7; sent]].concat()
    }

    #[test]
    fn messages_are_counted_one_by_one_however_they_are_cut() {
        let stream = [message(60, 60), message(0, 0), message(70, 70)].concat();
        for cut in [1, 3, 5, 64, stream.len()] {
            let (account, mut hold) = hold();
            let mut framing = Framing::default();
            for piece in stream.chunks(cut) {
                framing.count(Bytes::copy_from_slice(piece), &mut hold).expect("each fits by itself");
            }
            assert_eq!(account.used(Unit::InFlightBytes), 70, "cut into {cut}");
        }
    }

    #[test]
    fn a_claim_beyond_the_limit_is_refused_by_its_header() {
        let (_, mut hold) = hold();
        let refusal = Framing::default().count(message(u32::MAX, 0).into(), &mut hold).expect_err("4 GiB");
        assert_eq!(refusal.reason(), Reason::MessageTooLarge);
    }

    #[test]
    fn bytes_beyond_the_tenants_limit_are_refused_when_they_come() {
        let (_, mut hold) = hold();
        let mut framing = Framing::default();
        framing.count(message(200, 100).into(), &mut hold).expect("100 of them fit");
        let refusal = framing.count(Bytes::from_static(&[1]), &mut hold).expect_err("one more does not");
        assert_eq!(refusal.reason(), Reason::QuotaExceeded);
    }
}
