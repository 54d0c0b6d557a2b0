//! What both ends of a vsock connection must do alike.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest write to the host or to this machine over vsock, in bytes. Since Linux 6.17 a longer one reaches
/// the VMM as several descriptors, on which some VMMs break.
const VSOCK_WRITE_BYTES_MAX: usize = 32 << 10;

/// Longest write to another guest over vsock, in bytes. A device that forwards between guests may lose what
/// does not fit the receiver's 4 KiB buffers.
const SIBLING_WRITE_BYTES_MAX: usize = 3 << 10;

/// A stream that takes at most so many bytes at once.
pub struct ShortWrites<S> {
    stream: S,
    write_bytes_max: usize,
}

impl<S> ShortWrites<S> {
    /// Cuts writes to what the path to the peer carries whole; `sibling` says that both ends are guests.
    pub fn new(stream: S, sibling: bool) -> Self {
        Self {
            stream,
            write_bytes_max: if sibling { SIBLING_WRITE_BYTES_MAX } else { VSOCK_WRITE_BYTES_MAX },
        }
    }
}

impl<S> fmt::Debug for ShortWrites<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShortWrites").field("write_bytes_max", &self.write_bytes_max).finish_non_exhaustive()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ShortWrites<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ShortWrites<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let length = buf.len().min(self.write_bytes_max);
        Pin::new(&mut self.stream).poll_write(cx, &buf[..length])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn writes_are_cut() {
        let (stream, mut peer) = tokio::io::duplex(1 << 20);
        let mut stream = ShortWrites::new(stream, true);
        let sent = vec![7; 10_000];
        assert_eq!(stream.write(&sent).await.unwrap(), SIBLING_WRITE_BYTES_MAX);
        stream.write_all(&sent[SIBLING_WRITE_BYTES_MAX..]).await.unwrap();
        drop(stream);
        let mut received = Vec::new();
        peer.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, sent);
        assert!(!ShortWrites::new(tokio::io::empty(), false).is_write_vectored());
    }
}
