//! Shared memory as both sides have it in their address spaces.
//!
//! The agent makes the memory and seals it, so that nobody can make it shorter and an access to it cannot fail. What
//! cannot be prevented is that the other side writes while this one reads. So what lies in it is only ever copied, or
//! looked at as numbers, of which any bits are some: no length, offset or structure is read from it.

#![allow(unsafe_code, reason = "memory that is mapped is a pointer and a length")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{MmapOptions, MmapRaw};

/// A mapping. What looks into it keeps it.
pub struct Mapping {
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
        Ok(Arc::new(Self { raw }))
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
        // SAFETY: the range is within the mapping, which lives as long as `self` and which no reference in Rust is
        // to be written through: views are of bytes that their owner has not given away, and the copy may overlap
        // with nothing, because `bytes` is either outside or, where it is a view, another range of an allocator's.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.raw.as_mut_ptr().add(offset), bytes.len()) };
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
