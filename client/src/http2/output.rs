//! What is to be written: frame headers and small things in a buffer of its own, contents where they are.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;
use vaccel_guest::frame::{self, Header};

/// Slices of one system call.
const SLICES: usize = 64;

/// Shorter contents are copied behind their frame's header: a slice of its own costs more.
const COPIED_BYTES_MAX: usize = 1024;

/// What a connection that has nothing to write keeps: bytes, and parts.
const IDLE_BYTES: usize = 512;
const IDLE_PARTS: usize = 4;

#[derive(Debug)]
enum Part {
    /// The next so many bytes of the buffer.
    Own(usize),
    Shared(Bytes),
}

/// The queue.
#[derive(Debug, Default)]
pub struct Output {
    parts: VecDeque<Part>,
    own: Vec<u8>,
    /// Bytes of `own` that were written.
    own_begin: usize,
    bytes: usize,
}

impl Output {
    /// Bytes that are not written yet.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Those of them that are not contents.
    pub fn own_bytes(&self) -> usize {
        self.own.len() - self.own_begin
    }

    /// Bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.own.extend_from_slice(bytes);
        self.wrote(bytes.len());
    }

    /// A frame with what `content` writes.
    pub fn frame(&mut self, kind: u8, flags: u8, stream: u32, content: impl FnOnce(&mut Vec<u8>)) {
        let begin = self.own.len();
        self.own.extend([0; frame::HEADER_BYTES]);
        content(&mut self.own);
        let length = self.own.len() - begin - frame::HEADER_BYTES;
        let header = Header { length, kind, flags, stream }.encode();
        self.own[begin..begin + frame::HEADER_BYTES].copy_from_slice(&header);
        self.wrote(length + frame::HEADER_BYTES);
    }

    /// A DATA frame whose content has `length` bytes, in pieces.
    pub fn data(&mut self, stream: u32, length: usize, content: impl Iterator<Item = Bytes>, is_last: bool) {
        let flags = if is_last { frame::END_STREAM } else { 0 };
        self.raw(&Header { length, kind: frame::DATA, flags, stream }.encode());
        for piece in content {
            if piece.len() <= COPIED_BYTES_MAX {
                self.raw(&piece);
            } else {
                self.bytes += piece.len();
                self.parts.push_back(Part::Shared(piece));
            }
        }
    }

    fn wrote(&mut self, count: usize) {
        self.bytes += count;
        match self.parts.back_mut() {
            Some(Part::Own(length)) => *length += count,
            _ => self.parts.push_back(Part::Own(count)),
        }
    }

    /// Writes everything.
    pub fn poll_flush(
        &mut self,
        context: &mut Context<'_>,
        stream: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<()>> {
        while self.bytes > 0 {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut own = &self.own[self.own_begin..];
            let count = self.parts.len().min(SLICES);
            for (slice, part) in slices.iter_mut().zip(&self.parts) {
                *slice = IoSlice::new(match part {
                    Part::Own(length) => {
                        let (these, rest) = own.split_at(*length);
                        own = rest;
                        these
                    }
                    Part::Shared(bytes) => bytes,
                });
            }
            let written = ready!(Pin::new(&mut *stream).poll_write_vectored(context, &slices[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written(written);
        }
        Poll::Ready(Ok(()))
    }

    fn written(&mut self, mut count: usize) {
        self.bytes -= count;
        while count > 0
            && let Some(part) = self.parts.front_mut()
        {
            let (length, part_of) = match part {
                Part::Own(length) => {
                    let now = count.min(*length);
                    self.own_begin += now;
                    *length -= now;
                    (*length, now)
                }
                Part::Shared(bytes) => {
                    let now = count.min(bytes.len());
                    bytes.advance(now);
                    (bytes.len(), now)
                }
            };
            count -= part_of;
            if length == 0 {
                self.parts.pop_front();
            }
        }
        if self.own_begin == self.own.len() {
            self.own.clear();
            self.own_begin = 0;
            if self.parts.is_empty() {
                self.own.shrink_to(IDLE_BYTES);
                self.parts.shrink_to(IDLE_PARTS);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn everything_is_written_in_order_however_little_fits() {
        let (large, small) = (Bytes::from(vec![3; 5000]), Bytes::from_static(b"small"));
        for room in [1, 7, 64, 100_000] {
            let mut output = Output::default();
            let mut expected = Vec::new();
            for stream in 1..=SLICES as u32 {
                output.frame(frame::PING, 0, stream, |into| into.extend(b"12345678"));
                expected.extend(Header { length: 8, kind: frame::PING, flags: 0, stream }.encode());
                expected.extend(b"12345678");
                for (content, is_last) in [([&large, &small], false), ([&small, &large], true)] {
                    let length = large.len() + small.len();
                    output.data(stream, length, content.into_iter().cloned(), is_last);
                    let flags = u8::from(is_last);
                    expected.extend(Header { length, kind: frame::DATA, flags, stream }.encode());
                    expected.extend(content.into_iter().flatten());
                }
            }
            assert_eq!(output.bytes(), expected.len());
            let (mut near, mut far) = tokio::io::duplex(room);
            let writing = async move {
                std::future::poll_fn(|context| output.poll_flush(context, &mut near))
                    .await
                    .expect("it is read");
                assert_eq!((output.bytes(), output.own_bytes(), output.parts.len()), (0, 0, 0));
                assert!(output.own.capacity() <= IDLE_BYTES);
            };
            let mut read = Vec::new();
            let (_, came) = tokio::join!(writing, far.read_to_end(&mut read));
            came.expect("no error");
            assert!(read == expected, "{room}");
        }
    }
}
