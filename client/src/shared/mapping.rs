//! Shared memory as both sides have it in their address spaces.
//!
//! The agent makes the memory and seals it, so that nobody can make it shorter and an access to it cannot fail. What
//! cannot be prevented is that the other side writes while this one reads. So what lies in it is only ever copied, or
//! computed with as numbers, of which any bits are some: no length, offset, index or structure is read from it.

#![allow(unsafe_code, reason = "memory that is mapped is a pointer and a length")]

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use memmap2::{MmapOptions, MmapRaw};
use vaccel_guest::copy::{PAST_CACHES_BYTES_MIN, past_caches};

/// A mapping. What looks into it keeps it.
pub struct Mapping {
    // Before the memory: what others made of it ends first.
    companion: OnceLock<Box<dyn Any + Send + Sync>>,
    raw: MmapRaw,
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping").field("bytes", &self.raw.len()).finish()
    }
}

/// A part of a mapping.
struct View {
    mapping: Arc<Mapping>,
    range: Range<usize>,
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        self.mapping.slice(self.range.clone())
    }
}

impl Mapping {
    /// Maps the first bytes of a file, which must be sealed against getting shorter.
    ///
    /// # Errors
    /// The system's.
    pub fn new(file: &impl AsRawFd, bytes: usize) -> io::Result<Arc<Self>> {
        let raw = MmapOptions::new().len(bytes).map_raw(file)?;
        Ok(Arc::new(Self { companion: OnceLock::new(), raw }))
    }

    /// Lets somebody make something of the memory, once: it is dropped before the memory is unmapped.
    pub fn attach(&self, make: impl FnOnce(NonNull<[u8]>) -> Box<dyn Any + Send + Sync>) {
        self.companion.get_or_init(|| make(self.pointer(&(0..self.bytes())).expect("all of it")));
    }

    /// Where a part of it is; none outside of the mapping.
    pub fn pointer(&self, range: &Range<usize>) -> Option<NonNull<[u8]>> {
        self.check(range)?;
        // SAFETY: the range is within the mapping.
        let begin = NonNull::new(unsafe { self.raw.as_mut_ptr().add(range.start) })?;
        Some(NonNull::slice_from_raw_parts(begin, range.len()))
    }

    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.raw.len()
    }

    /// A part that is looked at where it is; none outside of the mapping.
    pub fn view(self: &Arc<Self>, range: Range<usize>) -> Option<Bytes> {
        self.check(&range)?;
        Some(Bytes::from_owner(View { mapping: Arc::clone(self), range }))
    }

    /// Where bytes lie that are a part of the mapping.
    pub fn place(&self, bytes: &[u8]) -> Option<Range<usize>> {
        let begin = bytes.as_ptr().addr().checked_sub(self.raw.as_ptr().addr())?;
        let range = begin..begin.checked_add(bytes.len())?;
        self.check(&range)?;
        Some(range)
    }

    /// Copies bytes into it. Returns whether they lie in the mapping then.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        let range = offset..offset.saturating_add(bytes.len());
        if self.check(&range).is_none() {
            return false;
        }
        // SAFETY: the range is within the mapping, which lives as long as `self`. Views of this process that look at it
        // are views of places that the peer gave away twice, and read what happens to be there, as if the peer itself
        // had written; a copy that overlaps with its source copies as `memmove` does.
        unsafe { copy(bytes, Target(self.raw.as_mut_ptr().add(offset))) };
        true
    }

    /// A part to be written, by its only owner.
    ///
    /// # Safety
    /// Nobody in this process looks at that part while it can be written.
    #[allow(clippy::mut_from_ref, reason = "the mapping is memory that its parts' owners share out")]
    pub(super) unsafe fn part_mut(&self, range: Range<usize>) -> &mut [u8] {
        if self.check(&range).is_none() {
            return &mut [];
        }
        // SAFETY: the range is within the mapping; the caller answers for nobody else looking at it.
        unsafe { std::slice::from_raw_parts_mut(self.raw.as_mut_ptr().add(range.start), range.len()) }
    }

    /// A part to be read.
    pub(super) fn slice(&self, range: Range<usize>) -> &[u8] {
        if self.check(&range).is_none() {
            return &[];
        }
        // SAFETY: the range is within the mapping, which lives as long as `self`. The file is sealed, so that its pages
        // stay. The other process may write there: what is read are numbers, of which any bits are some.
        unsafe { std::slice::from_raw_parts(self.raw.as_ptr().add(range.start), range.len()) }
    }

    fn check(&self, range: &Range<usize>) -> Option<()> {
        (range.start <= range.end && range.end <= self.raw.len()).then_some(())
    }
}

/// What one core copies while another is woken to help.
const PART_BYTES_MIN: usize = 1 << 20;

/// Cores that copy together: more find the memory busy.
const COPIERS_MAX: usize = 4;

/// Where a copy goes.
#[derive(Clone, Copy)]
struct Target(*mut u8);

// SAFETY: an address; whoever writes there answers for it.
unsafe impl Send for Target {}

/// Copies bytes to a place, with the help of other cores where there are many of them and it is worth it.
///
/// # Safety
/// So many bytes may be written there.
unsafe fn copy(from: &[u8], to: Target) {
    let is_apart = !from.as_ptr_range().contains(&to.0.cast_const());
    if from.len() < PAST_CACHES_BYTES_MIN || !is_apart {
        // SAFETY: the caller's.
        return unsafe { std::ptr::copy(from.as_ptr(), to.0, from.len()) };
    }
    // A quarter of the machine: others have work, too.
    let cores = std::thread::available_parallelism().map_or(1, usize::from) / 4;
    let copiers = cores.min(from.len() / PART_BYTES_MIN).clamp(1, COPIERS_MAX);
    // SAFETY: the caller's; the place does not begin inside of what is copied.
    unsafe { copy_together(from, to, copiers) }
}

/// Copies with so many threads, this one among them.
///
/// # Safety
/// So many bytes may be written at the place, which does not begin inside of what is copied.
unsafe fn copy_together(from: &[u8], to: Target, copiers: usize) {
    let (first, rest) = from.split_at(from.len() / copiers);
    let part_bytes = from.len().div_ceil(copiers);
    std::thread::scope(|scope| {
        for (index, part) in rest.chunks(part_bytes).enumerate() {
            let offset = first.len() + index * part_bytes;
            // SAFETY: the parts follow each other within the place.
            let work = move |to: Target| unsafe { past_caches(part, to.0.add(offset)) };
            if std::thread::Builder::new().spawn_scoped(scope, move || work(to)).is_err() {
                work(to);
            }
        }
        // SAFETY: as above.
        unsafe { past_caches(first, to.0) }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_there_wherever_it_begins_and_ends() {
        let file = tempfile::tempfile().unwrap();
        let bytes = PAST_CACHES_BYTES_MIN + 4096;
        file.set_len(bytes as u64).unwrap();
        let mapping = Mapping::new(&file, bytes).unwrap();
        for length in [0, 1, 63, 5000, PAST_CACHES_BYTES_MIN, PAST_CACHES_BYTES_MIN + 77] {
            for offset in [0, 1, 15, 64, 3000] {
                let given: Vec<u8> = (0..length + 3).map(|at| u8::try_from(at % 251).unwrap()).collect();
                for source in [&given[..length], &given[3..]] {
                    mapping.write(0, &vec![0xff; bytes]);
                    assert!(mapping.write(offset, source));
                    let all = mapping.view(0..bytes).unwrap();
                    assert!(all[offset..offset + length] == *source, "{length} at {offset}");
                    let others = all[..offset].iter().chain(&all[offset + length..]);
                    assert!(others.copied().all(|byte| byte == 0xff), "{length} at {offset}");
                }
            }
        }
        assert!(!mapping.write(bytes, &[1]) && !mapping.write(usize::MAX, &[1]));
        assert!(mapping.view(1..bytes + 1).is_none() && mapping.place(&[1]).is_none());
        let part = mapping.view(10..20).unwrap();
        assert_eq!(mapping.place(&part), Some(10..20));
        assert!(mapping.pointer(&(1..bytes + 1)).is_none());
        assert_eq!(mapping.pointer(&(10..20)).unwrap().cast::<u8>().as_ptr().cast_const(), part.as_ptr());
    }

    #[test]
    fn several_copiers_copy_all_of_it() {
        for length in [1, 7, 4096, 100_003] {
            let given: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
            for copiers in 1..=COPIERS_MAX {
                let mut copied = vec![0xff; length + 1];
                // SAFETY: there is a byte more than is copied.
                unsafe { copy_together(&given, Target(copied.as_mut_ptr()), copiers) };
                assert!(copied[..length] == given, "{length} by {copiers}");
                assert_eq!(copied[length], 0xff);
            }
        }
    }

    #[test]
    fn what_is_made_of_it_is_made_once_and_ends_with_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mapping = Mapping::new(&file, 4096).unwrap();
        let (made, other) = (Arc::new(()), Arc::new(()));
        mapping.attach(|memory| {
            assert_eq!(memory.len(), 4096);
            Box::new(Arc::clone(&made))
        });
        mapping.attach(|_| Box::new(Arc::clone(&other)));
        assert_eq!((Arc::strong_count(&made), Arc::strong_count(&other)), (2, 1));
        drop(mapping);
        assert_eq!(Arc::strong_count(&made), 1);
    }
}
