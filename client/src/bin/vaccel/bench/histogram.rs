//! Durations in a histogram of fixed size: percentiles of any number of calls, to 0.05 %.

use std::time::Duration;

/// Buckets of each power of two, as a power of two: a bucket is at most 1/1024 as wide as what is in it, and its middle
/// is told, so that a percentile is wrong by half of that at most.
const FINE_BITS: u32 = 10;
const FINE: usize = 1 << FINE_BITS;
/// As many as every count of nanoseconds in 64 bits needs.
const BUCKETS: usize = (u64::BITS - FINE_BITS + 1) as usize * FINE;

/// How often which duration came, in nanoseconds.
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: u128,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], count: 0, sum: 0, max: 0 }
    }
}

impl Histogram {
    pub(crate) fn record(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)] += 1;
        self.count += 1;
        self.sum += u128::from(ns);
        self.max = self.max.max(ns);
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Microseconds, exact; 0 when there was nothing.
    pub(crate) fn mean(&self) -> f64 {
        self.sum as f64 / self.count.max(1) as f64 / 1e3
    }

    /// Microseconds, exact.
    pub(crate) fn max(&self) -> f64 {
        self.max as f64 / 1e3
    }

    /// Microseconds that `percent` of all durations do not exceed, the fewest; 0 when there was nothing.
    pub(crate) fn percentile(&self, percent: u64) -> f64 {
        let rank = (u128::from(self.count) * u128::from(percent)).div_ceil(100).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= rank {
                return middle(index).min(self.max as f64) / 1e3;
            }
        }
        0.0
    }
}

/// Up to 2048 ns every nanosecond has its own bucket, from there each power of two has 1024.
fn bucket(ns: u64) -> usize {
    let shift = (ns | 1).ilog2().saturating_sub(FINE_BITS);
    // What is left of the shift is below 2048.
    (shift as usize) * FINE + usize::try_from(ns >> shift).unwrap_or(0)
}

fn middle(index: usize) -> f64 {
    let shift = (index / FINE).saturating_sub(1);
    let low = ((index - shift * FINE) as u64) << shift;
    low as f64 + ((1_u64 << shift) - 1) as f64 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_in_the_bucket_that_tells_it() {
        for ns in (0..5000).chain((0..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 12345])) {
            let told = middle(bucket(ns));
            assert!((told - ns as f64).abs() <= ns as f64 * 0.0005, "{ns} told as {told}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_those_of_the_sorted_samples() {
        let mut histogram = Histogram::default();
        // From 1 µs to 10 s, in no order.
        let mut samples: Vec<u64> =
            (0..9973).map(|n: u64| 1000 + (n * 7919 % 9973).pow(4) / 989_000).collect();
        for ns in &samples {
            histogram.record(Duration::from_nanos(*ns));
        }
        samples.sort_unstable();
        for percent in [1, 50, 90, 95, 99, 100] {
            let rank = (samples.len() * percent).div_ceil(100);
            let exact = samples[rank - 1] as f64 / 1e3;
            let told = histogram.percentile(percent as u64);
            assert!((told - exact).abs() <= exact * 0.0005, "p{percent}: {told}, in truth {exact}");
        }
        assert_eq!(histogram.max(), samples[samples.len() - 1] as f64 / 1e3);
        let mean = samples.iter().sum::<u64>() as f64 / samples.len() as f64 / 1e3;
        assert!((histogram.mean() - mean).abs() < 1e-6 * mean);
    }

    #[test]
    fn few_samples_have_percentiles_too() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.percentile(99), histogram.mean(), histogram.max()), (0.0, 0.0, 0.0));
        histogram.record(Duration::from_nanos(1500));
        assert_eq!((histogram.percentile(50), histogram.percentile(99)), (1.5, 1.5));
        histogram.record(Duration::from_nanos(7));
        assert_eq!((histogram.percentile(50), histogram.percentile(51), histogram.max()), (0.007, 1.5, 1.5));
    }
}
