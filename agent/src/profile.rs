//! What the calls of a session took: per operation and stage a count, a sum and a histogram, in memory of bounded size.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vaccel_proto::v1::{OperationProfile, StageProfile};

/// Steps within each power of two: a quantile is at most a sixteenth too high.
const STEP_BITS: u32 = 4;
const STEPS: usize = 1 << STEP_BITS;

/// Powers of two of microseconds that are told apart: the last one holds the longest call there can be, of 600 s.
const OCTAVES: usize = 30;

/// Single microseconds come first, then steps that double in width with every octave.
const BUCKETS: usize = STEPS + (OCTAVES - STEP_BITS as usize) * STEPS;

/// How often something took how long.
#[derive(Debug, Default)]
struct Histogram {
    /// As far as times have come: most calls are far from the longest there can be, and a session that is idle is to
    /// take next to nothing.
    buckets: Vec<u32>,
    count: u64,
    total_us: u64,
    max_us: u64,
}

fn bucket(micros: u64) -> usize {
    match micros.checked_ilog2() {
        Some(octave @ STEP_BITS..) => {
            let step = usize::try_from(micros >> (octave - STEP_BITS)).unwrap_or(usize::MAX) % STEPS;
            (STEPS + (octave - STEP_BITS) as usize * STEPS + step).min(BUCKETS - 1)
        }
        _ => usize::try_from(micros).unwrap_or(0),
    }
}

/// The longest time that a bucket holds.
fn highest(bucket: usize) -> u64 {
    let (octave, step) = (bucket / STEPS, (bucket % STEPS) as u64);
    if octave == 0 { step } else { ((STEPS as u64 + step + 1) << (octave - 1)) - 1 }
}

impl Histogram {
    fn add(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = bucket(micros);
        if bucket >= self.buckets.len() {
            let length = (bucket + 1).next_multiple_of(STEPS);
            self.buckets.reserve_exact(length - self.buckets.len());
            self.buckets.resize(length, 0);
        }
        self.buckets[bucket] = self.buckets[bucket].saturating_add(1);
        self.count += 1;
        self.total_us = self.total_us.saturating_add(micros);
        self.max_us = self.max_us.max(micros);
    }

    /// The time that `percent` of the calls did not exceed.
    fn quantile(&self, percent: u64) -> u64 {
        let rank = (self.count * percent).div_ceil(100);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= rank {
                return highest(index).min(self.max_us);
            }
        }
        self.max_us
    }

    fn shown(&self) -> StageProfile {
        StageProfile {
            count: self.count,
            total_us: self.total_us,
            p50_us: self.quantile(50),
            p99_us: self.quantile(99),
            max_us: self.max_us,
        }
    }
}

/// The calls of one operation.
#[derive(Debug, Default)]
struct Calls {
    failed: u64,
    call: Histogram,
    queue: Histogram,
    run: Histogram,
}

/// The calls of one session. They are boxed, because the map has room for eleven as soon as it has one.
#[derive(Debug, Default)]
pub(crate) struct Profile(Mutex<BTreeMap<&'static str, Box<Calls>>>);

impl Profile {
    /// A call of an operation is over. One that failed has no stages.
    pub(crate) fn record(&self, operation: &'static str, took: Duration, stages: Option<[Duration; 2]>) {
        let mut operations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let calls = operations.entry(operation).or_default();
        calls.call.add(took);
        match stages {
            Some([queue, run]) => {
                calls.queue.add(queue);
                calls.run.add(run);
            }
            None => calls.failed += 1,
        }
    }

    /// All of it, by operation.
    pub(crate) fn shown(&self) -> Vec<OperationProfile> {
        let operations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = operations.iter().map(|(name, calls)| OperationProfile {
            name: (*name).into(),
            failed: calls.failed,
            call: Some(calls.call.shown()),
            queue: Some(calls.queue.shown()),
            run: Some(calls.run.shown()),
        });
        shown.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_gap_and_are_narrow() {
        let mut next = 0;
        for index in 0..BUCKETS {
            let highest = highest(index);
            assert_eq!((bucket(next), bucket(highest)), (index, index), "{next} to {highest}");
            assert!((highest - next) * STEPS as u64 <= next, "{next} to {highest}");
            next = highest + 1;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert!(next > 600_000_000);
    }

    #[test]
    fn quantiles_are_at_most_a_sixteenth_too_high() {
        let mut histogram = Histogram::default();
        (1..=10_000).for_each(|micros| histogram.add(Duration::from_micros(micros)));
        for (percent, exact) in [(50, 5000), (99, 9900)] {
            let found = histogram.quantile(percent);
            assert!((exact..=exact + exact / 16).contains(&found), "p{percent}: {found}");
        }
        let shown = histogram.shown();
        assert_eq!((shown.count, shown.total_us, shown.max_us), (10_000, 50_005_000, 10_000));
        assert_eq!(Histogram::default().shown(), StageProfile::default());
        assert!(histogram.buckets.len() < BUCKETS / 2);
        histogram.add(Duration::MAX);
        assert_eq!((histogram.buckets.len(), histogram.quantile(100)), (BUCKETS, highest(BUCKETS - 1)));
    }

    #[test]
    fn failed_calls_have_no_stages() {
        let profile = Profile::default();
        let [long, short] = [40, 10].map(Duration::from_micros);
        profile.record("noop", long, Some([short, short]));
        profile.record("noop", long, None);
        let [noop] = &profile.shown()[..] else { panic!("one operation") };
        assert_eq!((noop.name.as_str(), noop.failed), ("noop", 1));
        let counts = [noop.call, noop.queue, noop.run].map(|stage| stage.map(|stage| stage.count));
        assert_eq!(counts, [Some(2), Some(1), Some(1)]);
    }
}
