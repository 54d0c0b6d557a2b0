//! The first bytes of a connection: an HTTP/2 client must say so before anything is built for it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::Stream;

/// *Source:* RFC 9113, section 3.4.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Reads the preface and gives back the stream as if nobody had.
///
/// # Errors
/// The stream ended, or its first bytes are something else.
pub(super) async fn expect(mut stream: Box<dyn Stream>) -> io::Result<Box<dyn Stream>> {
    let mut read = [0; PREFACE.len()];
    let mut length = 0;
    while length < read.len() {
        let more = stream.read(&mut read[length..]).await?;
        if more == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        length += more;
        if read[..length] != PREFACE[..length] {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer does not speak HTTP/2"));
        }
    }
    Ok(Box::new(Rewound { read: Bytes::from_static(PREFACE), stream }))
}

/// A stream whose first bytes have been read already.
struct Rewound {
    read: Bytes,
    stream: Box<dyn Stream>,
}

impl AsyncRead for Rewound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.has_remaining() {
            let part = self.read.len().min(into.remaining());
            into.put_slice(&self.read.split_to(part));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Rewound {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    async fn after_sending(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let (mut peer, stream) = tokio::io::duplex(64);
        peer.write_all(bytes).await?;
        drop(peer);
        let mut read = Vec::new();
        expect(Box::new(stream)).await?.read_to_end(&mut read).await?;
        Ok(read)
    }

    #[tokio::test]
    async fn the_preface_is_seen_again_with_what_follows() {
        let sent = [&PREFACE[..], b"frames"].concat();
        assert_eq!(after_sending(&sent).await.expect("HTTP/2"), sent);
    }

    #[tokio::test]
    async fn anything_else_is_refused_at_its_first_wrong_byte() {
        for other in [&b"G"[..], b"PRI * HTTP/1.1", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n"] {
            assert!(after_sending(other).await.is_err(), "{other:?}");
        }
    }
}
