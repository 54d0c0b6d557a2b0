//! Who has which part of a region.

use std::collections::BTreeMap;
use std::ops::Range;

/// Parts begin on boundaries of cache lines, which are those of the widest registers, too.
const ALIGNMENT: usize = 64;

/// The free parts, by where they begin.
#[derive(Debug)]
pub(super) struct Slots {
    free: BTreeMap<usize, usize>,
}

impl Slots {
    pub(super) fn new(bytes: usize) -> Self {
        Self { free: BTreeMap::from([(0, bytes)]) }
    }

    /// The first part that is long enough: pages that were used before are there already.
    pub(super) fn take(&mut self, bytes: usize) -> Option<Range<usize>> {
        let bytes = bytes.checked_next_multiple_of(ALIGNMENT)?;
        let (&begin, &length) = self.free.iter().find(|(_, length)| **length >= bytes)?;
        self.free.remove(&begin);
        if length > bytes {
            self.free.insert(begin + bytes, length - bytes);
        }
        Some(begin..begin + bytes)
    }

    /// Gives a part back.
    pub(super) fn give(&mut self, mut part: Range<usize>) {
        if let Some((&begin, &length)) = self.free.range(..part.start).next_back()
            && begin + length == part.start
        {
            self.free.remove(&begin);
            part.start = begin;
        }
        if let Some(length) = self.free.remove(&part.end) {
            part.end += length;
        }
        self.free.insert(part.start, part.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_all_come_back() {
        let mut slots = Slots::new(1 << 16);
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]] {
            let parts: Vec<_> = [1, 64, 1000, 30_000].map(|bytes| slots.take(bytes).unwrap()).to_vec();
            for pair in parts.windows(2) {
                assert!(pair[0].end <= pair[1].start && pair[1].start.is_multiple_of(ALIGNMENT), "{parts:?}");
            }
            assert!(slots.take(40_000).is_none());
            for index in order {
                slots.give(parts[index].clone());
            }
            assert_eq!(slots.free, BTreeMap::from([(0, 1 << 16)]), "{order:?}");
        }
        assert_eq!(slots.take(1 << 16), Some(0..1 << 16));
        assert_eq!((slots.take(1), slots.take(usize::MAX)), (None, None));
    }
}
