//! What was read ahead of the place it is for.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};
use vaccel_guest::frame::{self, Header};

use super::AHEAD_BYTES;
use crate::pool::{Buffer, Pool};

/// The first read of what comes at once, in bytes: heads, small messages, and the beginning of a large one, whose rest
/// is better read to its place. When there is more and no such place, it is read by whole buffers.
const FIRST_BYTES: usize = 4096;

/// Bytes in the order in which they came. Holds memory only while there are some, or a read is going on.
#[derive(Default)]
pub(super) struct Input {
    buffer: Option<Buffer>,
    begin: usize,
    /// More came than was asked for.
    is_more: bool,
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

    /// Forgets the first bytes.
    pub(super) fn consume(&mut self, count: usize) {
        self.begin += count;
    }

    /// Takes a frame's header.
    pub(super) fn header(&mut self) -> Option<Header> {
        let header = Header::decode(self.ahead().first_chunk()?);
        self.consume(frame::HEADER_BYTES);
        Some(header)
    }

    /// Reads more. Returns how much came, 0 at the end.
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        stream: &mut (impl AsyncRead + Unpin),
        pool: &Pool,
    ) -> Poll<io::Result<usize>> {
        let mut buffer = self.buffer.take().unwrap_or_else(|| pool.take(AHEAD_BYTES));
        buffer.consume(std::mem::take(&mut self.begin));
        let room = buffer.room();
        let room = if self.is_more { room } else { room.split_at_mut(FIRST_BYTES.min(room.len())).0 };
        let length = room.len();
        let read = poll_read(context, stream, room);
        if let Poll::Ready(Ok(count)) = read {
            buffer.advance(count);
        }
        self.is_more = matches!(read, Poll::Ready(Ok(count)) if count == length);
        if !buffer.filled().is_empty() {
            self.buffer = Some(buffer);
        }
        read
    }
}

/// Reads into a place. Returns how much came, 0 at the end.
pub(super) fn poll_read(
    context: &mut Context<'_>,
    stream: &mut (impl AsyncRead + Unpin),
    place: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut place = ReadBuf::new(place);
    ready!(Pin::new(stream).poll_read(context, &mut place))?;
    Poll::Ready(Ok(place.filled().len()))
}
