//! What the runs of a model took, counted for each tenant by itself.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vaccel_proto::inference::{InferBatchStatistics, InferStatistics, ModelStatistics, StatisticDuration};

use crate::scheduler::Spans;

/// Sizes of runs that are counted each by itself. A model may take any number of rows; what runs of further sizes took
/// is counted together, as [`OTHER_SIZES`].
const SIZES_MAX: usize = 256;

/// The size that stands for all beyond [`SIZES_MAX`]: no run has no rows.
const OTHER_SIZES: usize = 0;

/// How often, and how long together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    pub(crate) count: u64,
    pub(crate) time: Duration,
}

impl Sum {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.time += time;
    }

    fn plus(self, other: Self) -> Self {
        Self { count: self.count + other.count, time: self.time + other.time }
    }

    fn shown(self) -> Option<StatisticDuration> {
        let ns = u64::try_from(self.time.as_nanos()).unwrap_or(u64::MAX);
        Some(StatisticDuration { count: self.count, ns })
    }
}

/// Why a call failed, as metrics name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    Rejected,
    Canceled,
    Backend,
    Other,
}

impl Failure {
    pub(crate) const ALL: [Self; 4] = [Self::Rejected, Self::Canceled, Self::Backend, Self::Other];

    /// Its name in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rejected => "REJECTED",
            Self::Canceled => "CANCELED",
            Self::Backend => "BACKEND",
            Self::Other => "OTHER",
        }
    }
}

/// All that is counted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) success: Sum,
    pub(crate) failures: BTreeMap<Failure, Sum>,
    pub(crate) queue: Sum,
    pub(crate) join: Sum,
    pub(crate) infer: Sum,
    pub(crate) part: Sum,
    pub(crate) hits: Sum,
    pub(crate) misses: Sum,
    pub(crate) rows: u64,
    pub(crate) executions: u64,
    /// Calls that are not over.
    pub(crate) pending: u64,
    /// Milliseconds since 1970.
    last: u64,
    /// By rows of a run.
    batches: BTreeMap<usize, [Sum; 3]>,
}

/// The counts of one version of a model.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) model: String,
    pub(crate) version: u64,
    pub(crate) counts: Counts,
    /// Bytes of devices that are counted for it.
    pub(crate) device_bytes: u64,
}

impl Counts {
    /// Adds what another tenant's are.
    pub(super) fn add(&mut self, other: &Self) {
        let sums = [
            (&mut self.success, other.success),
            (&mut self.queue, other.queue),
            (&mut self.join, other.join),
            (&mut self.infer, other.infer),
            (&mut self.part, other.part),
            (&mut self.hits, other.hits),
            (&mut self.misses, other.misses),
        ];
        for (own, other) in sums {
            *own = own.plus(other);
        }
        for (why, sum) in &other.failures {
            let own = self.failures.entry(*why).or_default();
            *own = own.plus(*sum);
        }
        self.rows += other.rows;
        self.executions += other.executions;
        self.pending += other.pending;
    }

    /// Calls that failed.
    pub(crate) fn failed(&self) -> Sum {
        self.failures.values().fold(Sum::default(), |sum, one| sum.plus(*one))
    }
}

/// The counts of one version of a model and one tenant.
#[derive(Debug, Default)]
pub(crate) struct Stats(Mutex<Counts>);

impl Stats {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call that begins, until [`ended`](Self::ended).
    pub(crate) fn begun(&self) {
        self.counts().pending += 1;
    }

    /// A call is over.
    pub(crate) fn ended(&self) {
        self.counts().pending -= 1;
    }

    /// A call that went well, of so many rows, and took so long in all.
    pub(crate) fn succeeded(&self, rows: usize, spans: &Spans, took: Duration) {
        let infer = spans.run.saturating_sub(spans.join + spans.part);
        let mut counts = self.counts();
        counts.success.add(took);
        counts.queue.add(spans.queue);
        counts.join.add(spans.join);
        counts.infer.add(infer);
        counts.part.add(spans.part);
        counts.rows += rows as u64;
        counts.last = now();
        if spans.leads {
            counts.executions += 1;
            let is_known = counts.batches.len() < SIZES_MAX || counts.batches.contains_key(&spans.rows);
            let size = if is_known { spans.rows } else { OTHER_SIZES };
            let [join, run, part] = counts.batches.entry(size).or_default();
            join.add(spans.join);
            run.add(infer);
            part.add(spans.part);
        }
    }

    /// A call that was answered from the cache.
    pub(crate) fn hit(&self, took: Duration) {
        let mut counts = self.counts();
        counts.success.add(took);
        counts.hits.add(took);
        counts.last = now();
    }

    /// A call that was not in the cache; how long it took to look and to put it there.
    pub(crate) fn missed(&self, took: Duration) {
        self.counts().misses.add(took);
    }

    /// A call that failed.
    pub(crate) fn failed(&self, why: Failure, took: Duration) {
        self.counts().failures.entry(why).or_default().add(took);
    }

    /// The counts as they are now.
    pub(crate) fn read(&self) -> Counts {
        self.counts().clone()
    }

    /// The counts as the protocol has them.
    pub(crate) fn shown(&self, name: &str, version: u64) -> ModelStatistics {
        let counts = self.read();
        let batches = counts.batches.iter().map(|(rows, [join, run, part])| InferBatchStatistics {
            batch_size: *rows as u64,
            compute_input: join.shown(),
            compute_infer: run.shown(),
            compute_output: part.shown(),
        });
        ModelStatistics {
            name: name.into(),
            version: version.to_string(),
            last_inference: counts.last,
            inference_count: counts.rows,
            execution_count: counts.executions,
            inference_stats: Some(InferStatistics {
                success: counts.success.shown(),
                fail: counts.failed().shown(),
                queue: counts.queue.shown(),
                compute_input: counts.join.shown(),
                compute_infer: counts.infer.shown(),
                compute_output: counts.part.shown(),
                cache_hit: counts.hits.shown(),
                cache_miss: counts.misses.shown(),
            }),
            batch_stats: batches.collect(),
            ..ModelStatistics::default()
        }
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_add_up() {
        let stats = Stats::default();
        let ms = Duration::from_millis;
        let spans =
            Spans { queue: ms(1), run: ms(10), join: ms(2), part: ms(3), calls: 2, rows: 3, leads: true };
        stats.succeeded(1, &spans, ms(12));
        stats.succeeded(2, &Spans { leads: false, ..spans }, ms(13));
        stats.failed(Failure::Rejected, ms(1));
        let shown = stats.shown("m", 7);
        assert_eq!((shown.inference_count, shown.execution_count), (3, 1));
        let all = shown.inference_stats.expect("there");
        let figures =
            |sum: Option<StatisticDuration>| sum.map(|sum| (sum.count, sum.ns / 1_000_000)).expect("there");
        assert_eq!(figures(all.success), (2, 25));
        assert_eq!(figures(all.fail), (1, 1));
        assert_eq!(figures(all.queue), (2, 2));
        assert_eq!(figures(all.compute_infer), (2, 10));
        assert_eq!(shown.batch_stats.len(), 1);
        assert_eq!(shown.batch_stats[0].batch_size, 3);
    }

    #[test]
    fn sizes_without_end_are_counted_together() {
        let stats = Stats::default();
        let spans = Spans { run: Duration::from_millis(1), calls: 1, leads: true, ..Spans::default() };
        for rows in (1..=1000).chain(1..=1000) {
            stats.succeeded(rows, &Spans { rows, ..spans }, Duration::ZERO);
        }
        let sizes = stats.shown("m", 1).batch_stats;
        let of = |one: &InferBatchStatistics| (one.batch_size, one.compute_infer.map_or(0, |sum| sum.count));
        assert_eq!(sizes.len(), SIZES_MAX + 1);
        assert_eq!((of(&sizes[0]), of(&sizes[1]), of(&sizes[256])), ((0, 1488), (1, 2), (256, 2)));
        assert_eq!(sizes.iter().map(|one| of(one).1).sum::<u64>(), 2000, "no run is lost");
    }
}
