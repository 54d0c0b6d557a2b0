//! A byte stream that tells when its peer first spoke, and if it never did, why.
//!
//! With TLS 1.3 the agent judges a client's certificate after the client thinks that the handshake is over.
//! The refusal arrives as the first thing read; writes may have failed before it was. So until the peer has
//! spoken, failed writes are kept back and the read decides.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use crate::dial::Protocol;

/// Reports the peer's first bytes, or what came instead of them.
#[derive(Debug)]
pub(crate) struct Opening<S> {
    stream: S,
    /// Taken when the peer has spoken or failed.
    report: Option<oneshot::Sender<io::Result<()>>>,
    failed_write: Option<io::Error>,
    /// What the peer's first byte should be, and the protocol that begins so.
    expected: (u8, &'static str),
}

/// Where the opening of a stream is reported.
pub(crate) type Opened = oneshot::Receiver<io::Result<()>>;

impl<S> Opening<S> {
    /// The stream, and where its opening is reported.
    pub(crate) fn new(stream: S, protocol: &Protocol) -> (Self, Opened) {
        let (report, opened) = oneshot::channel();
        let expected = (protocol.first, protocol.name);
        (Self { stream, report: Some(report), failed_write: None, expected }, opened)
    }

    /// The stream, once its peer has spoken.
    pub(crate) fn opened(&self) -> Option<&S> {
        self.report.is_none().then_some(&self.stream)
    }

    /// Keeps a failed write back while the peer has not spoken; `claimed` is what the writer is told instead.
    fn hold_back<T>(&mut self, written: io::Result<T>, claimed: T) -> io::Result<T> {
        match written {
            Err(error) if self.report.is_some() => {
                self.failed_write.get_or_insert(error);
                Ok(claimed)
            }
            written => written,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Opening<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if let Some(report) = self.report.take() {
            let outcome = match &read {
                Ok(()) if buf.filled().len() > before => speaks(buf.filled()[before], self.expected),
                Ok(()) => {
                    Err(self.failed_write.take().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into()))
                }
                // The same error goes to the connection; an `io::Error` cannot be cloned, its content can be
                // told.
                Err(error) => Err(retold(error)),
            };
            // Nobody waits any more when the dial's time is over.
            let _ = report.send(outcome);
        }
        Poll::Ready(read)
    }
}

/// Judges a peer by its first byte.
fn speaks(first: u8, (expected, protocol): (u8, &str)) -> io::Result<()> {
    const TLS_ALERT: u8 = 0x15;
    let what = match first {
        _ if first == expected => return Ok(()),
        TLS_ALERT => "the agent speaks TLS there: dial it as tls://".to_owned(),
        _ => format!("something other than an agent answers there: it does not speak {protocol}"),
    };
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// The error once more, with the TLS error in it if that is its cause.
fn retold(error: &io::Error) -> io::Error {
    match error.get_ref().and_then(|cause| cause.downcast_ref::<tokio_rustls::rustls::Error>()) {
        Some(tls) => io::Error::new(error.kind(), tls.clone()),
        None => error
            .raw_os_error()
            .map_or_else(|| io::Error::new(error.kind(), error.to_string()), io::Error::from_raw_os_error),
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Opening<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        Poll::Ready(self.hold_back(written, buf.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs));
        Poll::Ready(self.hold_back(written, bufs.iter().map(|buf| buf.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.stream).poll_flush(cx));
        Poll::Ready(self.hold_back(flushed, ()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A peer that takes no writes and gives these reads.
    struct Broken(VecDeque<io::Result<&'static [u8]>>);

    impl AsyncRead for Broken {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Ready(self.0.pop_front().unwrap_or(Ok(b"")).map(|bytes| buf.put_slice(bytes)))
        }
    }

    impl AsyncWrite for Broken {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    async fn opening(reads: Vec<io::Result<&'static [u8]>>) -> (io::Result<()>, io::Result<()>) {
        let (mut stream, opened) = Opening::new(Broken(reads.into()), &Protocol::HTTP2);
        stream.write_all(b"preface").await.unwrap();
        let _ = stream.read(&mut [0; 8]).await;
        (opened.await.unwrap(), stream.write_all(b"more").await)
    }

    #[tokio::test]
    async fn the_read_after_a_failed_write_says_why() {
        let alert = tokio_rustls::rustls::Error::General("alert".into());
        let (opened, later) = opening(vec![Err(io::Error::new(io::ErrorKind::InvalidData, alert))]).await;
        let cause = opened.unwrap_err();
        assert!(cause.get_ref().unwrap().is::<tokio_rustls::rustls::Error>(), "{cause:?}");
        assert!(later.is_err(), "once the peer has failed, writes fail too");
    }

    #[tokio::test]
    async fn a_silent_end_reports_the_failed_write() {
        let (opened, _) = opening(vec![]).await;
        assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn the_first_bytes_open_the_stream() {
        let (opened, later) = opening(vec![Ok(b"\0\0\x12\x04")]).await;
        opened.unwrap();
        assert!(later.is_err());
    }

    #[tokio::test]
    async fn a_peer_that_speaks_something_else_is_told_apart() {
        for (first, what) in [(&b"\x15\x03\x03"[..], "tls://"), (b"HTTP/1.1", "HTTP/2")] {
            let (opened, _) = opening(vec![Ok(first)]).await;
            assert!(opened.unwrap_err().to_string().contains(what));
        }
    }
}
