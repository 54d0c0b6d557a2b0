//! Memory for what is large: buffers that are used again.
//!
//! A fresh buffer costs a page fault for every 4 KiB, which for a tensor takes longer than to receive it. So buffers go
//! back here when the last one who looks at them is done, and the next message of about that size finds its pages
//! there. What nobody wanted for [`IDLE`] is given to the system. **Invariant:** a buffer shows only what was written
//! to it since it was taken, as long as its taker fills it from its beginning: callers get to see [`Buffer::filled`].

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

/// Where buffers begin, in bytes: a cache line, and the widest registers there are.
const ALIGNMENT: usize = 64;

/// Smaller ones are left to the allocator, which has them at hand.
const BYTES_MIN: usize = 4 << 10;

/// Free buffers together, in bytes: eight images of 16 MiB.
const FREE_BYTES_MAX: usize = 128 << 20;

/// Free buffers, at most: each is found by looking at them one by one.
const FREE_MAX: usize = 64;

/// How long a buffer stays that nobody takes.
const IDLE: Duration = Duration::from_secs(10);

/// What a read may bring beyond a buffer's end, in bytes; the memory has room for it, so that buffers can be aligned.
const BEYOND_BYTES: usize = 16;
const _: () = assert!(BEYOND_BYTES < ALIGNMENT);

/// The free ones. Cloning it gives the same pool.
#[derive(Clone, Default)]
pub(crate) struct Pool(Arc<Mutex<Free>>);

/// In the order in which they were given back.
#[derive(Default)]
struct Free {
    /// Each with the sweep before it was given back.
    buffers: VecDeque<(Vec<u8>, u64)>,
    bytes: usize,
    /// How often it was swept: a clock that costs nothing to look at.
    sweeps: u64,
}

impl Free {
    fn remove(&mut self, index: usize) -> Option<Vec<u8>> {
        let (memory, _) = self.buffers.remove(index)?;
        self.bytes -= memory.len();
        Some(memory)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_struct("Pool").field("free", &free.buffers.len()).field("bytes", &free.bytes).finish()
    }
}

impl Pool {
    /// A buffer for so many bytes that begins on the boundary, or ends there.
    pub(crate) fn take_for(&self, capacity: usize, ends_aligned: bool) -> Buffer {
        let mut buffer = self.take(capacity);
        if ends_aligned {
            buffer.begin += capacity.next_multiple_of(ALIGNMENT) - capacity;
        }
        buffer
    }

    /// A buffer for so many bytes.
    pub(crate) fn take(&self, capacity: usize) -> Buffer {
        let size = size(capacity);
        let memory = if capacity < BYTES_MIN { None } else { self.find(size) };
        let memory = memory.unwrap_or_else(|| vec![0; size]);
        let begin = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Buffer { memory, begin, capacity, filled: 0, pool: self.clone() }
    }

    fn find(&self, size: usize) -> Option<Vec<u8>> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The last one is the warmest.
        let index = free.buffers.iter().rposition(|(memory, _)| memory.len() == size)?;
        free.remove(index)
    }

    fn give_back(&self, memory: Vec<u8>) {
        let mut gone = Vec::new();
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.bytes += memory.len();
        let now = free.sweeps;
        free.buffers.push_back((memory, now));
        while free.buffers.len() > FREE_MAX || free.bytes > FREE_BYTES_MAX {
            gone.extend(free.remove(0));
        }
        // What takes time happens without the lock.
        drop(free);
    }

    /// Gives to the system what nobody took for [`IDLE`], for ever.
    pub(crate) async fn housekeep(self) {
        let mut tick = tokio::time::interval(IDLE);
        loop {
            tick.tick().await;
            self.sweep();
        }
    }

    fn sweep(&self) {
        let mut gone = Vec::new();
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.sweeps += 1;
        // Those that were there at the last sweep.
        let last = free.sweeps - 1;
        while free.buffers.front().is_some_and(|(_, since)| *since < last) {
            gone.extend(free.remove(0));
        }
        drop(free);
    }
}

/// Bytes of the memory of a buffer: rounded up by at most an eighth, so that messages of about one size share buffers,
/// and two boundaries for where it begins and ends.
fn size(capacity: usize) -> usize {
    let step = (capacity.next_power_of_two() / 8).max(ALIGNMENT);
    capacity.div_ceil(step) * step + 2 * ALIGNMENT
}

/// A buffer, which goes back to its pool.
pub(crate) struct Buffer {
    memory: Vec<u8>,
    begin: usize,
    capacity: usize,
    filled: usize,
    pool: Pool,
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("capacity", &self.capacity).field("filled", &self.filled).finish()
    }
}

impl Buffer {
    /// What was written.
    pub(crate) fn filled(&self) -> &[u8] {
        &self.memory[self.begin..self.begin + self.filled]
    }

    /// Where the rest goes. What stands there is nobody's business.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.memory[self.begin + self.filled..self.begin + self.capacity]
    }

    /// The room for so many bytes, and where they are the last ones a few bytes beyond it, which are nobody's: a read
    /// that does not fill its place says that nothing more has come.
    pub(crate) fn room_for(&mut self, count: usize) -> &mut [u8] {
        let rest = self.capacity - self.filled;
        let beyond = if count >= rest { BEYOND_BYTES } else { 0 };
        let begin = self.begin + self.filled;
        let end = (begin + count.min(rest) + beyond).min(self.memory.len());
        &mut self.memory[begin..end]
    }

    /// So many bytes were written to the beginning of the room.
    pub(crate) fn advance(&mut self, count: usize) {
        self.filled = (self.filled + count).min(self.capacity);
    }

    /// Writes as much as there is room for; returns how much that is.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> usize {
        let room = self.room();
        let count = bytes.len().min(room.len());
        room[..count].copy_from_slice(&bytes[..count]);
        self.advance(count);
        count
    }

    /// Bytes it is for.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn is_full(&self) -> bool {
        self.filled == self.capacity
    }

    /// Forgets the first bytes, and moves the others there.
    pub(crate) fn consume(&mut self, count: usize) {
        let filled = self.begin..self.begin + self.filled;
        self.memory.copy_within(filled.start + count..filled.end, filled.start);
        self.filled -= count;
    }

    /// What was written, to be shared.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.filled()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.capacity >= BYTES_MIN {
            self.pool.give_back(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_hold_what_they_say() {
        let pool = Pool::default();
        for capacity in [0, 1, 63, 64, 4096, BYTES_MIN, 602_117, (32 << 20) + 5] {
            let mut buffer = pool.take(capacity);
            assert_eq!((buffer.room().len(), buffer.filled().len()), (capacity, 0));
            assert_eq!(buffer.room().as_ptr().align_offset(ALIGNMENT), 0);
            assert_eq!(buffer.put(&vec![7; capacity + 1]), capacity);
            assert!(buffer.is_full() && buffer.memory.len() <= capacity + capacity / 4 + 3 * ALIGNMENT);
            assert_eq!(buffer.freeze(), vec![7; capacity]);
            let mut buffer = pool.take_for(capacity, true);
            assert_eq!(buffer.put(&vec![8; capacity + 1]), capacity);
            assert_eq!(buffer.filled().as_ptr_range().end.align_offset(ALIGNMENT), 0);
            assert_eq!(buffer.freeze(), vec![8; capacity]);
        }
    }

    #[test]
    fn large_ones_are_used_again_and_show_nothing_of_before() {
        let pool = Pool::default();
        let mut buffer = pool.take(100_000);
        buffer.put(&[1; 100_000]);
        let place = buffer.filled().as_ptr();
        let shared = buffer.freeze();
        let part = shared.slice(5..10);
        drop(shared);
        assert_ne!(pool.take(100_000).room().as_ptr(), place, "somebody still looks at it");
        drop(part);
        let again = pool.take(99_000);
        assert_eq!(
            again.memory.as_ptr().align_offset(ALIGNMENT) + again.memory.as_ptr() as usize,
            place as usize
        );
        assert!(again.filled().is_empty());
    }

    #[test]
    fn only_so_much_is_kept() {
        let pool = Pool::default();
        let many: Vec<Buffer> = (0..3 * FREE_MAX).map(|_| pool.take(BYTES_MIN)).collect();
        drop(many);
        let large: Vec<Buffer> = (0..6).map(|_| pool.take(FREE_BYTES_MAX / 4)).collect();
        drop(large);
        let free = pool.0.lock().expect("not poisoned");
        assert!(free.buffers.len() <= FREE_MAX && free.bytes <= FREE_BYTES_MAX);
        assert_eq!(free.bytes, free.buffers.iter().map(|(memory, _)| memory.len()).sum::<usize>());
    }

    #[test]
    fn what_nobody_takes_is_given_to_the_system() {
        let pool = Pool::default();
        let taken_again = || pool.find(size(BYTES_MIN)).map(|memory| pool.give_back(memory)).is_some();
        drop(pool.take(BYTES_MIN));
        pool.sweep();
        assert!(taken_again(), "it was there for less than the time");
        pool.sweep();
        assert!(taken_again(), "it was taken meanwhile");
        pool.sweep();
        pool.sweep();
        assert!(!taken_again());
        assert_eq!(pool.0.lock().expect("not poisoned").bytes, 0);
    }

    #[test]
    fn only_what_ends_a_buffer_has_a_little_more_room() {
        let pool = Pool::default();
        for capacity in [1, 63, 64, 4096, 602_117] {
            for mut buffer in [pool.take(capacity), pool.take_for(capacity, true)] {
                assert_eq!(buffer.room_for(capacity - 1).len(), capacity - 1);
                assert_eq!(buffer.room_for(usize::MAX).len(), capacity + BEYOND_BYTES);
                buffer.room_for(capacity).fill(7);
                buffer.advance(capacity);
                assert_eq!(buffer.freeze(), vec![7; capacity]);
            }
        }
    }

    #[test]
    fn what_is_consumed_makes_room() {
        let mut buffer = Pool::default().take(4);
        buffer.put(b"abcd");
        buffer.consume(3);
        assert_eq!(buffer.room().len(), 3);
        assert_eq!(buffer.filled(), b"d");
        buffer.consume(1);
        assert_eq!(buffer.put(b"efghi"), 4);
        assert_eq!(buffer.filled(), b"efgh");
    }
}
