//! The first bytes of a connection: a client must speak HTTP, or want memory, before anything is built for it. Which,
//! they tell.

use std::io;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use vaccel_client::shared::PREFACE as MEMORY;
use vaccel_guest::frame::PREFACE;

use super::Stream;
use crate::http2::Wire;

/// What a peer speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speech {
    Http1,
    Http2,
    Memory,
}

/// Reads the first bytes and tells what they are. Gives back the stream after the preface of HTTP/2 or of a connection
/// for memory, or as if nobody had read of it.
///
/// # Errors
/// The stream ended, or its first bytes are something else.
pub(super) async fn expect(mut stream: Box<dyn Stream>) -> io::Result<(Speech, Box<dyn Stream>)> {
    let mut read = [0; PREFACE.len()];
    let mut length = 0;
    while length < read.len() {
        let more = stream.read(&mut read[length..]).await?;
        if more == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        length += more;
        let came = &read[..length];
        if let Some(more) = came.strip_prefix(MEMORY) {
            return Ok((Speech::Memory, Box::new(Rewound { read: Bytes::copy_from_slice(more), stream })));
        }
        if came != &PREFACE[..length] && !MEMORY.starts_with(came) {
            return match method(came) {
                Some(true) => {
                    Ok((Speech::Http1, Box::new(Rewound { read: Bytes::copy_from_slice(came), stream })))
                }
                Some(false) => continue,
                None => Err(io::Error::new(io::ErrorKind::InvalidData, "the peer does not speak HTTP")),
            };
        }
    }
    Ok((Speech::Http2, stream))
}

/// Whether these bytes begin a request of HTTP/1: a method that is served, and a space. None when they cannot.
fn method(read: &[u8]) -> Option<bool> {
    const METHODS: [&[u8]; 6] = [b"GET ", b"POST ", b"HEAD ", b"PUT ", b"DELETE ", b"OPTIONS "];
    if METHODS.iter().any(|method| read.starts_with(method)) {
        return Some(true);
    }
    METHODS.iter().any(|method| method.starts_with(read)).then_some(false)
}

/// A stream whose first bytes have been read already.
struct Rewound {
    read: Bytes,
    stream: Box<dyn Stream>,
}

impl Wire for Rewound {
    fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.read.has_remaining() { Poll::Ready(Ok(())) } else { self.stream.poll_readable(context) }
    }

    fn poll_read_one(&mut self, context: &mut Context<'_>, place: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.read.has_remaining() {
            let part = self.read.len().min(place.len());
            place[..part].copy_from_slice(&self.read.split_to(part));
            return Poll::Ready(Ok(part));
        }
        self.stream.poll_read_one(context, place)
    }

    fn reads_two(&self) -> bool {
        self.stream.reads_two()
    }

    fn poll_read_two(
        &mut self,
        context: &mut Context<'_>,
        first: &mut [u8],
        second: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.read.has_remaining() {
            return self.poll_read_one(context, first);
        }
        self.stream.poll_read_two(context, first, second)
    }
}

impl Stream for Rewound {
    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        file: Option<BorrowedFd<'_>>,
    ) -> Poll<io::Result<usize>> {
        self.stream.poll_send(context, bytes, file)
    }
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

    async fn after_sending(bytes: &[u8]) -> io::Result<(Speech, Vec<u8>)> {
        let (mut peer, stream) = tokio::io::duplex(64);
        peer.write_all(bytes).await?;
        drop(peer);
        let mut read = Vec::new();
        let (http, mut stream) = expect(Box::new(stream)).await?;
        stream.read_to_end(&mut read).await?;
        Ok((http, read))
    }

    #[tokio::test]
    async fn what_follows_is_read_and_what_was_read_of_requests() {
        let sent = [&PREFACE[..], b"frames"].concat();
        assert_eq!(after_sending(&sent).await.expect("HTTP/2"), (Speech::Http2, b"frames".to_vec()));
        let sent = b"POST /v2 HTTP/1.1\r\nhost: a\r\n\r\n".to_vec();
        assert_eq!(after_sending(&sent).await.expect("HTTP/1"), (Speech::Http1, sent));
        let sent = b"VACCEL-MEMORY/1 4096\n";
        assert_eq!(after_sending(sent).await.expect("memory"), (Speech::Memory, b"4096\n".to_vec()));
        assert_eq!(after_sending(b"GET ").await.expect("HTTP/1"), (Speech::Http1, b"GET ".to_vec()));
    }

    #[tokio::test]
    async fn anything_else_is_refused_at_its_first_wrong_byte() {
        for other in [
            &b"G"[..],
            b"GETS",
            b"get ",
            b"PRI * HTTP/1.1",
            b"\x16\x03\x01",
            b"PRI * HTTP/2.0\r\n",
            b"VACCEL-MEMORY/2 ",
        ] {
            assert!(after_sending(other).await.is_err(), "{other:?}");
        }
    }
}
