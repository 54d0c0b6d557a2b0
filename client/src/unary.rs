//! The call that is made most, without what others need: one message there, one back.
//!
//! tonic copies a message into a buffer to send it, and another time to read it. Here a request's tensors are sent from
//! where they are, and a reply is gathered once, in a buffer of its length. Such calls have connections of their own
//! ([`http2`](crate::http2)) where the agent is near; elsewhere, and until there is one, they take the shared one.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use prost::Message;
use tonic::body::Body;
use tonic::{Code, Response, Status};
use tower_service::Service;
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::tensor::GRPC_HEADER_BYTES;
use vaccel_proto::{Error, Reason, gather};

use crate::client::timed;
use crate::error::{Failure, Reach};
use crate::gzip;
use crate::wire::Wire;

/// When the thread that waits for a reply is awake. One that sleeps is late by some 30 µs, on a virtual machine by 60;
/// one that does not costs a processor meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Awake {
    /// From shortly before a reply that is foreseen, as calls like it always took the same time; if it is the client's
    /// only call at that time.
    #[default]
    Foreseen,
    /// From the beginning of the call on, and so long at most.
    For(Duration),
    /// Not before it is there.
    Never,
}

/// How a call is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// How long it may take.
    pub(crate) time: Duration,
    /// When its thread is awake for the reply, where there is a connection beside the one of all calls.
    pub(crate) awake: Awake,
    /// Its [`kind`]: such calls may always take the same time.
    pub(crate) kind: u64,
}

/// Names calls by what those of a kind have in common.
pub(crate) fn kind(common: impl Hash) -> u64 {
    let mut kind = DefaultHasher::new();
    common.hash(&mut kind);
    kind.finish()
}

/// Makes a call.
///
/// # Errors
/// The agent's status; what failed below it is its source.
pub(crate) async fn call<R: Message + Default>(
    mut wire: Wire,
    path: &'static str,
    message: &impl Message,
    options: Options,
) -> Result<Response<R>, Status> {
    let time = options.time;
    let pieces = gather::framed(message)?;
    let length = pieces.iter().map(Bytes::len).sum();
    let beside = wire.beside(length).filter(|_| !wire.compresses());
    let message = match beside {
        Some(connection) => match connection.call(path, options, pieces.clone()).await {
            // It has just been closed, perhaps because nobody wanted it.
            Err(status) if is_unsent(&status) => over(&mut wire, path, time, pieces).await?,
            answered => answered?,
        },
        None => over(&mut wire, path, time, pieces).await?,
    };
    Ok(Response::new(R::decode(message).map_err(|_| broken("is no message of the contract"))?))
}

fn is_unsent(status: &Status) -> bool {
    Failure::behind(status).is_some_and(|failure| failure.reach == Reach::Unsent)
}

/// Makes it over the connection that all calls share.
async fn over(
    wire: &mut Wire,
    path: &'static str,
    time: Duration,
    pieces: Vec<Bytes>,
) -> Result<Bytes, Status> {
    let compresses = wire.compresses();
    let pieces = if compresses { gzip::shrink(pieces).await? } else { pieces };
    let mut request = http::Request::new(Body::new(Pieces(pieces.into())));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = http::Uri::from_static(path);
    *request.headers_mut() = timed((), time).into_parts().0.into_headers();
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    if compresses {
        for name in ["grpc-encoding", "grpc-accept-encoding"] {
            request.headers_mut().insert(name, HeaderValue::from_static(gzip::NAME));
        }
    }
    let below = |failure| Status::from_error(Box::new(failure));
    let (head, body) = wire.call(request).await.map_err(below)?.into_parts();
    if let Some(status) = Status::from_header_map(&head.headers) {
        return answered(status).and(Err(broken("has no message")));
    }
    if head.status != http::StatusCode::OK {
        return Err(by_http(head.status.as_u16()));
    }
    let (message, trailers) = receive(body, compresses).await?;
    let status = trailers.and_then(|trailers| Status::from_header_map(&trailers));
    answered(status.ok_or_else(|| broken("ends without a status"))?)?;
    message.ok_or_else(|| broken("has no message"))
}

fn answered(status: Status) -> Result<(), Status> {
    if status.code() == Code::Ok { Ok(()) } else { Err(status) }
}

/// A reply that is none.
pub(crate) fn broken(how: &str) -> Status {
    Error::new(Reason::BackendFailed, format!("the agent's reply {how}")).to_status()
}

/// What stands between client and agent answers by HTTP alone.
///
/// *Source:* gRPC's "HTTP to gRPC Status Code Mapping".
pub(crate) fn by_http(status: u16) -> Status {
    let code = match status {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502..=504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    Status::new(code, format!("the answer is HTTP status {status}"))
}

/// The message of a reply, and the trailers.
async fn receive(
    mut body: Body,
    may_be_compressed: bool,
) -> Result<(Option<Bytes>, Option<HeaderMap>), Status> {
    let mut message = Gathered::default();
    let mut trailers = None;
    while let Some(frame) = body.frame().await.transpose()? {
        match frame.into_data() {
            Ok(data) => message.add(&data)?,
            Err(frame) => {
                trailers = frame.into_trailers().ok();
                break;
            }
        }
    }
    let Some(framed) = message.finish()? else { return Ok((None, trailers)) };
    let is_compressed = framed.first() != Some(&0);
    let message =
        if is_compressed && may_be_compressed { gzip::expand(framed).await? } else { plain(&framed)? };
    Ok((Some(message), trailers))
}

/// A message as far as it has come, with gRPC's framing before it.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    pub(crate) bytes: BytesMut,
    /// Bytes to come, once the length is known.
    pub(crate) missing: Option<usize>,
}

impl Gathered {
    pub(crate) fn add(&mut self, mut bytes: &[u8]) -> Result<(), Status> {
        if self.missing.is_none() {
            let wanted = GRPC_HEADER_BYTES - self.bytes.len();
            let (now, later) = bytes.split_at(wanted.min(bytes.len()));
            self.bytes.extend_from_slice(now);
            bytes = later;
            let Some(length) = framed_length(&self.bytes)? else { return Ok(()) };
            self.missing = Some(length - GRPC_HEADER_BYTES);
            self.bytes.reserve(length - GRPC_HEADER_BYTES);
        }
        let missing = self.missing.unwrap_or(0);
        if bytes.len() > missing {
            return Err(broken("is more than one message"));
        }
        self.bytes.extend_from_slice(bytes);
        self.missing = Some(missing - bytes.len());
        Ok(())
    }

    /// The message with its framing; none when nothing came.
    pub(crate) fn finish(self) -> Result<Option<Bytes>, Status> {
        match self.missing {
            Some(0) => Ok(Some(self.bytes.freeze())),
            None if self.bytes.is_empty() => Ok(None),
            _ => Err(broken("ends in the middle of a message")),
        }
    }
}

/// The message behind its framing, if it is not compressed.
pub(crate) fn plain(framed: &Bytes) -> Result<Bytes, Status> {
    match framed.first() {
        Some(0) => Ok(framed.slice(GRPC_HEADER_BYTES..)),
        _ => Err(broken("is compressed, which was not asked for")),
    }
}

/// Bytes of a message and its framing, once its beginning is there.
fn framed_length(bytes: &[u8]) -> Result<Option<usize>, Status> {
    let Some(&[_, length @ ..]) = bytes.first_chunk::<GRPC_HEADER_BYTES>() else {
        return Ok(None);
    };
    let (length, limit) = (u32::from_be_bytes(length) as usize, MESSAGE_BYTES_MAX);
    if length > limit {
        let (length, limit) = (length as u64, limit as u64);
        return Err(Error::limit(Reason::MessageTooLarge, "the reply", limit, length, "bytes").to_status());
    }
    Ok(Some(GRPC_HEADER_BYTES + length))
}

/// The body of a request.
struct Pieces(VecDeque<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(content: &[u8]) -> Vec<u8> {
        [&[0][..], &u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
    }

    fn gathered(bytes: &[u8], piece: usize) -> Result<Option<Bytes>, Status> {
        let mut message = Gathered::default();
        for part in bytes.chunks(piece) {
            message.add(part)?;
        }
        message.finish()
    }

    #[test]
    fn a_message_is_gathered_however_it_is_cut() {
        for length in [0, 1, 100, 5000] {
            let content = vec![7; length];
            for piece in [1, 4, 5, 6, 64, 5005] {
                let message = gathered(&framed(&content), piece).unwrap();
                assert_eq!(message.unwrap()[GRPC_HEADER_BYTES..], content, "{length} in {piece}");
            }
        }
        assert_eq!(gathered(&[], 1).unwrap(), None);
    }

    #[test]
    fn replies_that_are_none_say_so() {
        let two = [framed(b"one"), framed(b"two")].concat();
        for (bytes, why) in [
            (&framed(b"cut")[..7], "ends in the middle"),
            (&[0, 0], "ends in the middle"),
            (&two, "more than one"),
            (&[0, 0xff, 0, 0, 0], "at most"),
        ] {
            for piece in [1, 8, 100] {
                let refusal = gathered(bytes, piece).expect_err(why);
                assert!(refusal.message().contains(why), "{piece}: {refusal}");
            }
        }
    }
}
