//! What was read ahead of the place it is for.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vaccel_guest::frame::{self, Header};

use super::AHEAD_BYTES;
use crate::pool::{Buffer, Pool};

/// The first read of what comes at once, in bytes: heads, small messages, and the beginning of a large one, whose rest
/// is better read to its place. When there is more and no such place, it is read by whole buffers.
const FIRST_BYTES: usize = 4096;

/// What carries a connection's bytes.
pub(crate) trait Wire: AsyncRead + AsyncWrite + Unpin {
    /// Ready when a read is worth a try: no memory is taken for one that finds nothing.
    fn poll_readable(&mut self, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Reads into a place. Returns how much came, 0 at the end.
    fn poll_read_one(&mut self, context: &mut Context<'_>, place: &mut [u8]) -> Poll<io::Result<usize>> {
        poll_read(context, self, place)
    }

    /// Whether one read can bring something to two places.
    fn reads_two(&self) -> bool {
        false
    }

    /// Reads to two places, to the second one when the first is full; returns how much came, 0 at the end. Neither is
    /// empty. Where that is no one read, to the first alone.
    fn poll_read_two(
        &mut self,
        context: &mut Context<'_>,
        first: &mut [u8],
        _second: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_read_one(context, first)
    }
}

/// Bytes in the order in which they came. Holds memory only while there are some, or a read is going on.
#[derive(Default)]
pub(super) struct Input {
    buffer: Option<Buffer>,
    begin: usize,
    /// More came than was asked for.
    is_more: bool,
    /// Bytes that were taken since [`Self::mark`].
    passed: usize,
}

impl Input {
    /// What is there.
    pub(super) fn ahead(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer.filled()[self.begin..])
    }

    /// What came was read to its place: what comes after it may have one, too.
    pub(super) fn passed_by(&mut self) {
        self.is_more = false;
    }

    /// Keeps bytes that were read with something else; there were none ahead.
    pub(super) fn keep(&mut self, bytes: &[u8], pool: &Pool) {
        if !bytes.is_empty() {
            let mut buffer = pool.take(AHEAD_BYTES);
            buffer.put(bytes);
            (self.buffer, self.begin) = (Some(buffer), 0);
        }
    }

    /// Adds bytes that were taken for something else, behind those that are there.
    pub(super) fn append(&mut self, parts: [&[u8]; 2], pool: &Pool) {
        let parts = [self.ahead(), parts[0], parts[1]];
        let mut buffer = pool.take(parts.map(<[u8]>::len).iter().sum::<usize>().max(AHEAD_BYTES));
        for part in parts {
            buffer.put(part);
        }
        (self.buffer, self.begin) = (Some(buffer), 0);
    }

    /// Forgets the first bytes.
    pub(super) fn consume(&mut self, count: usize) {
        self.begin += count;
        self.passed += count;
    }

    /// Counts from here what is taken.
    pub(super) fn mark(&mut self) {
        self.passed = 0;
    }

    /// Bytes that were taken since then.
    pub(super) fn passed(&self) -> usize {
        self.passed
    }

    /// Takes a frame's header.
    pub(super) fn header(&mut self) -> Option<Header> {
        let header = Header::decode(self.ahead().first_chunk()?);
        self.consume(frame::HEADER_BYTES);
        Some(header)
    }

    /// Ready when a read is worth a try. Meanwhile a connection holds a buffer of the usual size for what was not taken
    /// yet, or nothing.
    pub(super) fn poll_readable(
        &mut self,
        context: &mut Context<'_>,
        wire: &mut impl Wire,
        pool: &Pool,
    ) -> Poll<io::Result<()>> {
        let rest = self.ahead();
        if rest.is_empty() {
            (self.buffer, self.begin) = (None, 0);
        } else if self.buffer.as_ref().is_some_and(|buffer| buffer.capacity() != AHEAD_BYTES) {
            // It was for a head, or for what was appended, of which little is left.
            let mut buffer = pool.take(AHEAD_BYTES);
            buffer.put(rest);
            (self.buffer, self.begin) = (Some(buffer), 0);
        }
        wire.poll_readable(context)
    }

    /// Reads more. Returns how much came, 0 at the end.
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        stream: &mut impl Wire,
        pool: &Pool,
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_readable(context, stream, pool))?;
        let mut buffer = self.buffer.take().unwrap_or_else(|| pool.take(AHEAD_BYTES));
        buffer.consume(std::mem::take(&mut self.begin));
        let room = buffer.room();
        let room = if self.is_more { room } else { room.split_at_mut(FIRST_BYTES.min(room.len())).0 };
        let length = room.len();
        let read = stream.poll_read_one(context, room);
        if let Poll::Ready(Ok(count)) = read {
            buffer.advance(count);
        }
        self.is_more = matches!(read, Poll::Ready(Ok(count)) if count == length);
        if !buffer.filled().is_empty() {
            self.buffer = Some(buffer);
        }
        read
    }

    /// Reads so many bytes, before which nothing is there, and what comes behind them to another place. Returns how
    /// much came together, 0 at the end.
    pub(super) fn poll_read_two(
        &mut self,
        context: &mut Context<'_>,
        wire: &mut impl Wire,
        pool: &Pool,
        count: usize,
        behind: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut buffer = pool.take(count);
        let came = ready!(wire.poll_read_two(context, buffer.room(), behind))?;
        buffer.advance(came);
        (self.buffer, self.begin, self.is_more) = (Some(buffer), 0, false);
        Poll::Ready(Ok(came))
    }
}

/// Reads into a place. Returns how much came, 0 at the end.
pub(crate) fn poll_read(
    context: &mut Context<'_>,
    stream: &mut (impl AsyncRead + Unpin + ?Sized),
    place: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut place = ReadBuf::new(place);
    ready!(Pin::new(stream).poll_read(context, &mut place))?;
    Poll::Ready(Ok(place.filled().len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;
    use tokio::io::DuplexStream;

    /// Knows before a read that there is nothing.
    struct Silent(DuplexStream);

    impl AsyncRead for Silent {
        fn poll_read(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            into: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(context, into)
        }
    }

    impl AsyncWrite for Silent {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    impl Wire for Silent {
        fn poll_readable(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    #[test]
    fn who_waits_holds_no_more_than_there_is() {
        let (near, _far) = tokio::io::duplex(64);
        let (mut wire, pool) = (Silent(near), Pool::default());
        let mut context = Context::from_waker(Waker::noop());
        let mut input = Input::default();
        input.keep(b"two", &pool);
        input.consume(1);
        assert!(input.poll_read(&mut context, &mut wire, &pool).is_pending());
        assert_eq!(input.ahead(), b"wo");
        input.consume(2);
        assert!(input.poll_read(&mut context, &mut wire, &pool).is_pending());
        assert!(input.buffer.is_none());
        input.append([&[7; 2 * AHEAD_BYTES], b"rest"], &pool);
        input.consume(2 * AHEAD_BYTES);
        assert!(input.poll_read(&mut context, &mut wire, &pool).is_pending());
        assert_eq!(input.ahead(), b"rest");
        assert_eq!(input.buffer.map(|buffer| buffer.capacity()), Some(AHEAD_BYTES));
    }
}
