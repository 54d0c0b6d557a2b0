//! A call like the last one: its head and the beginning of its message come with one system call, each to its place.
//!
//! Without, the first read brings the head and whatever else there is, which has to be copied to the message's buffer
//! once it is known how large that is; so it brings little, and a second read the rest. Nothing depends on what was
//! foreseen but time: what came otherwise is appended to what was read ahead, and taken from there.

use std::io;
use std::task::{Context, Poll, ready};

use super::connection::Connection;
use super::incoming::Delivery;
use super::receive::{Data, Expect};
use super::{FORESEEN_BYTES_MAX, Service, Wire};
use crate::pool::{Buffer, Pool};

/// A call like the one before it: most callers make the same one again and again.
#[derive(Clone, Copy)]
pub(super) struct Foreseen {
    /// Bytes before its message, and of the message.
    head: usize,
    whole: usize,
    ends_aligned: bool,
}

impl Foreseen {
    /// The call whose message begins, all of it in one frame.
    pub(super) fn after(head: usize, data: Data, delivery: &Delivery) -> Option<Self> {
        let (_, whole) = delivery.missing();
        let is_like_most = (1..=FORESEEN_BYTES_MAX).contains(&whole) && data.header.length == whole;
        is_like_most.then(|| Self { head, whole, ends_aligned: delivery.ends_aligned() })
    }

    fn buffer(self, pool: &Pool) -> Buffer {
        pool.take_for(self.whole, self.ends_aligned)
    }
}

/// What was read to where the message of the foreseen call goes.
pub(super) struct Early {
    message: Buffer,
    foreseen: Foreseen,
    /// A few bytes more.
    beyond: Vec<u8>,
}

impl<I: Wire, S: Service> Connection<I, S> {
    /// Reads what has no place yet; where it is likely to be a call like the last one, what is likely to be its message
    /// to a buffer for that.
    pub(super) fn poll_ahead(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Self { io, input, pool, .. } = self;
        let is_begin =
            matches!(self.expect, Expect::Header) && input.passed() == 0 && input.ahead().is_empty();
        // A read for the head alone would be one more.
        let Some(foreseen) = self.foreseen.filter(|_| is_begin && io.reads_two()) else {
            return input.poll_read(context, io, pool);
        };
        ready!(input.poll_readable(context, io, pool))?;
        let mut message = foreseen.buffer(pool);
        let place = message.room_for(foreseen.whole);
        let count = ready!(input.poll_read_two(context, io, pool, foreseen.head, place))?;
        self.foreseen = None;
        let behind = count.saturating_sub(foreseen.head);
        let beyond = place.get(foreseen.whole..behind).unwrap_or_default().to_vec();
        message.advance(behind);
        if behind > 0 {
            self.early = Some(Early { message, foreseen, beyond });
        }
        Poll::Ready(Ok(count))
    }

    /// What was foreseen did not come.
    pub(super) fn mistaken(&mut self, early: &Early) {
        self.input.append([early.message.filled(), &early.beyond], &self.pool);
    }

    /// What is in a DATA frame was read to a buffer for a message, which it is the beginning of, or not.
    pub(super) fn adopt(&mut self, data: Data, early: Early) {
        let Early { message, foreseen, beyond } = early;
        let count = message.filled().len();
        let adopted = match data.place.and_then(|place| self.streams[place].as_mut()) {
            Some(stream) if count <= data.rest => stream.delivery.adopt(message, foreseen.ends_aligned),
            _ => Err(message),
        };
        match adopted {
            Ok(()) => {
                self.foreseen = Some(foreseen);
                self.input.keep(&beyond, &self.pool);
                self.took(data, count);
            }
            Err(message) => self.mistaken(&Early { message, foreseen, beyond }),
        }
    }
}
