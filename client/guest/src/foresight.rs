//! When a call's answer comes, by how long those like it took; for the async client, too.
//!
//! To wake a thread that has slept for milliseconds takes some 30 µs, on a virtual machine 60 and more: a waste where
//! an accelerator's run always takes the same. So who waits for such a run has itself woken shortly before the answer
//! and stays awake until it is there, as systems do for quick disks (Linux calls it hybrid polling). Where calls take
//! now this and now that long, nothing is foreseen, and the answer wakes its reader as ever.
//!
//! All times are in microseconds, all spans count from the beginning of a call.

use core::ops::Range;

/// How late a thread is woken, until it is known: as on a virtual machine.
const LATE: u32 = 50;

/// Whoever is woken later than this was held up by something else.
const LATE_MAX: u32 = 100;

/// A thread is to wake so many times as long before the answer as it was late before.
const LEAD: u32 = 2;

/// Wakings that what is known of their lateness is made of.
const WAKINGS: u32 = 8;

/// After about so many calls it is forgotten, unless there were wakings: where a thread was once late, calls might not
/// be foreseen any more, and it would never be known better.
const FORGETTING: u32 = 256;

/// A thread stays awake for at most this part of what a call takes, or it sleeps until the answer wakes it. Mostly it
/// is a small part of this: runs of an accelerator that take 2.5 ms are within a tenth of a millisecond of each other.
/// But one in five takes longer than that where others use the machine, too.
const AWAKE_PART: u32 = 4;

/// And no longer than this: ten times what it takes to wake it. The processor may be one that computes the answer.
const AWAKE_MAX: u32 = 600;

/// Calls of a kind that are remembered. The shortest and the longest of them do not count: one in so many may be
/// disturbed by anything.
const CALLS: usize = 8;

/// Kinds of calls that are remembered; programs call few models in turn.
const KINDS: usize = 16;

/// Fractions of a microsecond in which lateness is counted, so that a mean of many can be told.
const FINE: u32 = 1 << 10;

/// What is remembered of calls.
#[derive(Debug)]
pub struct Foresight {
    kinds: [Kind; KINDS],
    /// In parts of [`FINE`].
    late: u32,
}

/// Calls that are alike: the same model, and tensors of the same size.
#[derive(Clone, Copy, Debug)]
struct Kind {
    name: u64,
    /// What the last ones took, in the order of a ring, and how many of them are there.
    took: [u32; CALLS],
    next: usize,
    count: usize,
}

impl Kind {
    const fn new(name: u64) -> Self {
        Self { name, took: [0; CALLS], next: 0, count: 0 }
    }
}

impl Foresight {
    /// Nothing is known yet.
    pub const fn new() -> Self {
        Self { kinds: [Kind::new(0); KINDS], late: LATE * FINE }
    }

    /// A call of a kind has been answered after so long.
    pub fn learn(&mut self, name: u64, took: u64) {
        let Some(kind) = self.kinds.get_mut(place(name)) else { return };
        if kind.name != name {
            *kind = Kind::new(name);
        }
        if let Some(place) = kind.took.get_mut(kind.next) {
            *place = u32::try_from(took).unwrap_or(u32::MAX);
        }
        kind.next = (kind.next + 1) % CALLS;
        kind.count = CALLS.min(kind.count + 1);
        self.late = mean(self.late, FORGETTING - 1, LATE * FINE);
    }

    /// When a call's thread wakes for the answer, and until when it stays awake; none where that would often be for
    /// nothing.
    pub fn awake(&self, name: u64) -> Option<Range<u64>> {
        let kind = self.kinds.get(place(name)).filter(|kind| kind.name == name && kind.count == CALLS)?;
        let [soonest, latest] = but_for_one(&kind.took);
        let awake = (soonest / AWAKE_PART).min(AWAKE_MAX);
        let from = soonest.checked_sub(self.late * LEAD / FINE)?;
        (latest - from <= awake).then(|| u64::from(from)..u64::from(from) + u64::from(awake))
    }

    /// A thread that wanted to wake did so with this delay.
    pub fn woken(&mut self, late: u64) {
        let late = u32::try_from(late).unwrap_or(u32::MAX).min(LATE_MAX);
        self.late = mean(self.late, WAKINGS - 1, late * FINE);
    }
}

impl Default for Foresight {
    fn default() -> Self {
        Self::new()
    }
}

/// Names a kind by bytes that its calls have in common.
pub fn name(bytes: &[u8]) -> u64 {
    /// Spreads bits upwards; any large odd number does.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut name = bytes.len() as u64;
    for word in bytes.chunks(8) {
        let mut padded = [0; 8];
        padded.iter_mut().zip(word).for_each(|(place, byte)| *place = *byte);
        name = (name.rotate_left(5) ^ u64::from_le_bytes(padded)).wrapping_mul(SPREAD);
    }
    name ^ (name >> 32)
}

fn place(name: u64) -> usize {
    (name % KINDS as u64) as usize
}

/// The second of them all, and the last but one.
fn but_for_one(took: &[u32; CALLS]) -> [u32; 2] {
    let (mut first, mut second, mut last_but_one, mut last) = (u32::MAX, u32::MAX, 0, 0);
    for &one in took {
        (first, second) = (first.min(one), second.min(first.max(one)));
        (last, last_but_one) = (last.max(one), last_but_one.max(last.min(one)));
    }
    [second, last_but_one]
}

/// Of something that counts for several, and of one more.
fn mean(known: u32, count: u32, one: u32) -> u32 {
    (known * count + one) / (count + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: u64 = 7;

    fn learned(took: &[u64]) -> Foresight {
        let mut foresight = Foresight::new();
        took.iter().for_each(|took| foresight.learn(KIND, *took));
        foresight
    }

    #[test]
    fn calls_that_always_take_the_same_are_foreseen() {
        for few in [&[][..], &[2400; CALLS - 1]] {
            assert_eq!(learned(few).awake(KIND), None, "{few:?}");
        }
        let foresight = learned(&[2400; CALLS]);
        assert_eq!(foresight.awake(KIND), Some(2300..2900));
        assert_eq!(foresight.awake(KIND + 1), None);
        // One that was disturbed, and one that did not run at all.
        let foresight = learned(&[2400, 2410, 2420, u64::MAX, 2400, 50, 2410, 2400]);
        assert_eq!(foresight.awake(KIND), Some(2300..2900));
    }

    #[test]
    fn nobody_stays_awake_for_calls_that_are_short_or_not_alike() {
        // A hundred microseconds are more than a quarter of these.
        assert_eq!(learned(&[390; CALLS]).awake(KIND), None);
        assert_eq!(learned(&[0; CALLS]).awake(KIND), None);
        assert_eq!(learned(&[2400, 2400, 2400, 2400, 3000, 3000, 3000, 3000]).awake(KIND), None);
        // What was once so is forgotten.
        let mut foresight = learned(&[9000, 1000, 5000, 3000, 7000, 4000, 2000, 8000]);
        assert_eq!(foresight.awake(KIND), None);
        (0..CALLS).for_each(|_| foresight.learn(KIND, 8000));
        assert_eq!(foresight.awake(KIND), Some(7900..8500));
        // A kind that comes to the same place takes it.
        foresight.learn(KIND + KINDS as u64, 8000);
        assert_eq!(foresight.awake(KIND), None);
    }

    #[test]
    fn who_is_woken_late_wakes_earlier() {
        let mut foresight = learned(&[8000; CALLS]);
        for (late, from) in [(10, 7980), (70, 7860), (u64::MAX, 7800)] {
            (0..80).for_each(|_| foresight.woken(late));
            let found = foresight.awake(KIND).map(|awake| awake.start);
            assert!(found.is_some_and(|found| found.abs_diff(from) <= 1), "{late}: {found:?}");
        }
        // Too late for calls of a kind that is short, until it is forgotten.
        let mut after = |calls| {
            (0..calls).for_each(|_| foresight.learn(KIND, 750));
            foresight.awake(KIND)
        };
        assert_eq!(after(CALLS), None);
        assert!(after(1000).is_some());
    }

    #[test]
    fn kinds_have_names_of_their_own() {
        let bytes: Vec<u8> = (0..100).collect();
        let mut names: Vec<u64> = (0..bytes.len()).map(|length| name(&bytes[..length])).collect();
        names.extend((1..bytes.len()).map(|begin| name(&bytes[begin..])));
        let places = names.iter().map(|name| place(*name)).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(places.len(), KINDS);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 199);
    }

    #[test]
    fn the_second_and_the_last_but_one_are_found_in_any_order() {
        for turn in 0..CALLS {
            let mut took = [5, 1, 9, 3, 3, 8, 9, 2];
            took.rotate_left(turn);
            assert_eq!(but_for_one(&took), [2, 9]);
            took.reverse();
            assert_eq!(but_for_one(&took), [2, 9]);
        }
        assert_eq!(but_for_one(&[4; CALLS]), [4, 4]);
    }
}
