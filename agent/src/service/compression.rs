//! Bodies and messages in gzip or deflate: what comes is expanded within the limit of a message, and counted before;
//! what goes is compressed for callers that ask for it.

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use flate2::Compression;
use flate2::read::{GzDecoder, ZlibDecoder};
use flate2::write::{GzEncoder, ZlibEncoder};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};
use http::{HeaderMap, HeaderName};
use http_body::{Body, Frame};
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::tensor::GRPC_HEADER_BYTES;
use vaccel_proto::{Error, Reason};

use super::body::HeldBytes;
use crate::aside::on_a_thread;
use crate::http2::{Incoming, Meter};
use crate::quota::{Account, Hold, Unit};

/// The coding of a call's compressed messages, and what a caller takes.
pub(super) const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// Shorter answers get no shorter.
const WORTH_IT_BYTES: usize = 1024;

/// A way to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Gzip,
    Deflate,
}

impl Coding {
    const ALL: [Self; 2] = [Self::Gzip, Self::Deflate];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        }
    }

    fn named(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|coding| coding.name().as_bytes() == name)
    }

    /// The first of these that a header's list names.
    fn listed(headers: &HeaderMap, list: HeaderName) -> Option<Self> {
        let asked = headers.get(list).and_then(|asked| asked.to_str().ok()).unwrap_or_default();
        let names = |coding: &Self| {
            asked.split(',').any(|one| one.split(';').next().is_some_and(|one| one.trim() == coding.name()))
        };
        Self::ALL.into_iter().find(names)
    }

    /// That of a call's messages; none for those that are not compressed, or in a way that nobody here knows.
    pub(super) fn of_messages(headers: &HeaderMap) -> Option<Self> {
        Self::named(headers.get(GRPC_ENCODING)?.as_bytes())
    }

    /// That of a call's reply: the request's own, if the caller takes it. Most callers take every coding whatever they
    /// think of it, so that this alone is no wish.
    pub(super) fn of_reply(headers: &HeaderMap) -> Option<Self> {
        let own = Self::of_messages(headers)?;
        let taken = headers.get(GRPC_ACCEPT_ENCODING)?.to_str().ok()?;
        taken.split(',').any(|one| one.trim() == own.name()).then_some(own)
    }

    /// What bytes were before they were compressed, behind so many bytes of nothing, unless nobody waits for it.
    fn expand(self, bytes: &[u8], before: usize, waiting: &Weak<()>) -> Result<Vec<u8>, Error> {
        let reader: Box<dyn Read + '_> = match self {
            Self::Gzip => Box::new(GzDecoder::new(bytes)),
            Self::Deflate => Box::new(ZlibDecoder::new(bytes)),
        };
        let mut expanded = vec![0; before];
        let reader = Awaited { reader, waiting };
        let read = reader.take(MESSAGE_BYTES_MAX as u64 + 1).read_to_end(&mut expanded);
        read.map_err(|error| {
            let message = format!("what came is not in {}, as its header says", self.name());
            Error::new(Reason::BadArgument, message).caused_by(error)
        })?;
        let (limit, length) = (MESSAGE_BYTES_MAX as u64, (expanded.len() - before) as u64);
        if length > limit {
            return Err(Error::limit(Reason::MessageTooLarge, "body", limit, length, "bytes"));
        }
        Ok(expanded)
    }

    /// The pieces as one that is compressed.
    fn shrink(self, pieces: &[Bytes]) -> Result<Vec<u8>, Error> {
        // Tensors get little shorter with more effort.
        let effort = Compression::fast();
        let shrunk = match self {
            Self::Gzip => {
                let mut writer = GzEncoder::new(Vec::new(), effort);
                pieces.iter().try_for_each(|piece| writer.write_all(piece)).and_then(|()| writer.finish())
            }
            Self::Deflate => {
                let mut writer = ZlibEncoder::new(Vec::new(), effort);
                pieces.iter().try_for_each(|piece| writer.write_all(piece)).and_then(|()| writer.finish())
            }
        };
        shrunk.map_err(|error| {
            Error::new(Reason::BackendFailed, "the answer cannot be compressed").caused_by(error)
        })
    }
}

/// Ends when nobody waits for what is read.
struct Awaited<'a, R> {
    reader: R,
    waiting: &'a Weak<()>,
}

impl<R: Read> Read for Awaited<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.waiting.strong_count() == 0 {
            return Err(io::Error::other("nobody waits for it"));
        }
        self.reader.read(into)
    }
}

/// Expands on a thread. A caller that leaves does not stop a thread at once: until it has ended, what it holds counts,
/// as much as it can become with what the call held when it began.
async fn expanded(
    coding: Coding,
    account: &Arc<Account>,
    held: &Arc<HeldBytes>,
    compressed: Bytes,
    before: usize,
) -> Result<Vec<u8>, Error> {
    let most = account.hold(Unit::InFlightBytes, MESSAGE_BYTES_MAX as u64)?;
    let counted = (most, Arc::clone(held));
    let waiting = Arc::new(());
    let waits = Arc::downgrade(&waiting);
    on_a_thread(move || {
        let expanded = coding.expand(&compressed, before, &waits);
        drop(compressed);
        drop(counted);
        expanded
    })
    .await
}

/// A body as it was before it was compressed, and what its size is counted as.
///
/// # Errors
/// `BAD_ARGUMENT` for another coding, or bytes that are not in it, `MESSAGE_TOO_LARGE`, `QUOTA_EXCEEDED`.
pub(super) async fn expand(
    account: &Arc<Account>,
    headers: &HeaderMap,
    body: Bytes,
    held: &Arc<HeldBytes>,
) -> Result<(Bytes, Option<Hold>), Error> {
    let coding = match headers.get(CONTENT_ENCODING).map(http::HeaderValue::as_bytes) {
        None | Some(b"identity") => return Ok((body, None)),
        Some(name) => Coding::named(name).ok_or_else(|| {
            let other = vaccel_proto::error::shown(&String::from_utf8_lossy(name));
            Error::new(
                Reason::BadArgument,
                format!("content-encoding: expected gzip or deflate, got {other}"),
            )
        })?,
    };
    let expanded = expanded(coding, account, held, body, 0).await?;
    let counted = account.hold(Unit::InFlightBytes, expanded.len() as u64)?;
    Ok((expanded.into(), Some(counted)))
}

/// Compresses on a thread, until whose end what the call holds counts, whoever waits for it.
async fn shrunk(coding: Coding, pieces: Vec<Bytes>, held: &Arc<HeldBytes>) -> Result<Vec<u8>, Error> {
    let counted = Arc::clone(held);
    on_a_thread(move || {
        let shrunk = coding.shrink(&pieces);
        drop(pieces);
        drop(counted);
        shrunk
    })
    .await
}

/// An answer in the coding that its caller asks for, if there is one, and the coding's name.
///
/// # Errors
/// Nothing that depends on the answer.
pub(super) async fn shrink(
    headers: &HeaderMap,
    body: Bytes,
    held: &Arc<HeldBytes>,
) -> Result<(Bytes, Option<&'static str>), Error> {
    let coding = Coding::listed(headers, ACCEPT_ENCODING).filter(|_| body.len() >= WORTH_IT_BYTES);
    let Some(coding) = coding else { return Ok((body, None)) };
    let shrunk = shrunk(coding, vec![body], held).await?;
    Ok((shrunk.into(), Some(coding.name())))
}

/// A message in gRPC's framing, compressed if that is worth it.
///
/// # Errors
/// Nothing that depends on the message.
pub(super) async fn shrink_message(
    coding: Coding,
    mut pieces: Vec<Bytes>,
    held: &Arc<HeldBytes>,
) -> Result<Vec<Bytes>, Error> {
    let length: usize = pieces.iter().map(Bytes::len).sum();
    if length < GRPC_HEADER_BYTES + WORTH_IT_BYTES {
        return Ok(pieces);
    }
    // The framing is in the first piece, with what is no tensor.
    if let Some(first) = pieces.first_mut() {
        *first = first.slice(GRPC_HEADER_BYTES.min(first.len())..);
    }
    let shrunk = shrunk(coding, pieces, held).await?;
    let length = u32::try_from(shrunk.len()).unwrap_or(u32::MAX);
    let framing = [&[1][..], &length.to_be_bytes()].concat();
    Ok(vec![framing.into(), shrunk.into()])
}

type Expansion = Pin<Box<dyn Future<Output = Result<Vec<u8>, Error>> + Send>>;

/// A body of messages some of which are compressed, as one of which none are.
pub(super) struct Expanded {
    inner: Incoming,
    coding: Coding,
    account: Arc<Account>,
    held: Arc<HeldBytes>,
    /// The message that is being expanded.
    current: Option<Expansion>,
    /// Bytes of the message that was taken last.
    taken: Option<usize>,
}

impl Expanded {
    pub(super) fn new(inner: Incoming, coding: Coding, account: Arc<Account>, held: Arc<HeldBytes>) -> Self {
        Self { inner, coding, account, held, current: None, taken: None }
    }

    fn expansion(&self, mut framed: Bytes) -> Expansion {
        let (coding, account, held) = (self.coding, Arc::clone(&self.account), Arc::clone(&self.held));
        let compressed = framed.split_off(GRPC_HEADER_BYTES.min(framed.len()));
        Box::pin(async move {
            let mut message = expanded(coding, &account, &held, compressed, GRPC_HEADER_BYTES).await?;
            // Within the limit, so within 32 bits.
            let length = u32::try_from(message.len() - GRPC_HEADER_BYTES).unwrap_or(u32::MAX);
            message[1..GRPC_HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
            Ok(message)
        })
    }
}

impl Body for Expanded {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Some(taken) = self.taken.take() {
            self.held.give_back(taken);
        }
        loop {
            if let Some(expansion) = &mut self.current {
                let message = ready!(expansion.as_mut().poll(context));
                self.current = None;
                return Poll::Ready(Some(message.and_then(|message| {
                    self.held.claim(message.len())?;
                    self.taken = Some(message.len());
                    Ok(Frame::data(message.into()))
                })));
            }
            let frame = ready!(Pin::new(&mut self.inner).poll_frame(context)).transpose()?;
            let Some(frame) = frame else { return Poll::Ready(None) };
            match frame.into_data() {
                Ok(framed) if framed.first() == Some(&1) => self.current = Some(self.expansion(framed)),
                Ok(framed) => return Poll::Ready(Some(Ok(Frame::data(framed)))),
                Err(other) => return Poll::Ready(Some(Ok(other))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TenantLimits;
    use crate::identity::Tenant;
    use crate::quota::Accounts;

    fn account() -> Arc<Account> {
        let limits = TenantLimits {
            connections: 0,
            sessions: 0,
            calls: 0,
            resource_bytes: 0,
            in_flight_bytes: u64::MAX,
            shared_bytes: 0,
            device_bytes: 0,
        };
        Accounts::new(limits, |_| 1).of(&Tenant::new("a"))
    }

    fn zeros(count: usize) -> Bytes {
        Coding::Gzip.shrink(&[vec![0; count].into()]).expect("compressed").into()
    }

    #[test]
    fn nothing_is_expanded_that_nobody_waits_for() {
        let waiting = Arc::new(());
        let here = Coding::Gzip.expand(&zeros(1000), 5, &Arc::downgrade(&waiting)).expect("expanded");
        assert_eq!(here, vec![0; 1005]);
        assert!(Coding::Gzip.expand(&zeros(1000), 5, &Weak::new()).is_err());
    }

    /// A thread that has not ended holds what its caller gave it, whether that is there or not.
    #[test]
    fn what_is_expanded_counts_until_its_thread_has_ended() {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build();
        runtime.expect("a runtime").block_on(async {
            let account = account();
            let used = || account.used(Unit::InFlightBytes);
            let (let_on, wait) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || wait.recv());
            let held = HeldBytes::new(account.hold(Unit::InFlightBytes, 7).expect("room"), true);
            let mut call = Box::pin(expanded(Coding::Gzip, &account, &held, zeros(1 << 20), 0));
            let polled = std::future::poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await;
            assert!(polled.is_pending());
            drop(call);
            drop(held);
            assert_eq!(used(), 7 + MESSAGE_BYTES_MAX as u64);
            drop(let_on);
            let _ = busy.await;
            tokio::task::spawn_blocking(|| ()).await.expect("all before it have ended");
            assert_eq!(used(), 0);
        });
    }
}
