//! What runs together: calls of one model and one shape, and how many of them are worth it.
//!
//! A [`Batcher`] belongs to a loaded model. Its calls fall into [`Bucket`]s, one for each shape of a row and choice of
//! outputs; only calls of one bucket share a run. How many rows are worth running together is measured, not configured:
//! a device with a cost per launch gains from every row, a processor that is busy with one row gains nothing, and would
//! make callers wait for each other.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use vaccel_proto::tensor::strings;
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::Cancel;
use crate::onward::Listener;

/// Buckets of one model that are told apart; a model that is called with more shapes runs the others by themselves.
const BUCKETS_MAX: usize = 64;

/// How cheap a row must get, compared with before, for twice as many of them to run together. A smaller gain is within
/// what runs differ by on a busy machine, and not worth that callers wait for each other.
const GAIN_MIN: f64 = 0.8;

/// How much a new figure counts that is larger than what is known. One that is smaller counts as it is: whatever else
/// the machine does can only make a run look dearer than it is.
const FRESH: f64 = 0.05;

/// Runs of a size before it is judged.
const RUNS_MIN: u32 = 3;

/// After which time a size that was not worth it is tried again, and after how many runs: it may have been measured in
/// a bad moment, and what else the machine does changes.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_AFTER_RUNS: f64 = 50.0;

/// What computes: a loaded model.
pub(crate) trait Runner: Send + Sync {
    /// Runs once. `inputs` are checked against the model's ports and in their order; the result has the outputs with
    /// the given indices, in the given order, which are together at most `reply_bytes_max` bytes.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when shapes do not fit together, `BACKEND_FAILED` otherwise.
    fn run(
        &self,
        inputs: Vec<Tensor>,
        outputs: &[usize],
        reply_bytes_max: u64,
        cancel: &Cancel,
    ) -> Result<Vec<Tensor>, Error>;

    /// Whether runs with these inputs will take no less time than one does now.
    fn is_prepared(&self, inputs: &[Tensor]) -> bool {
        let _ = inputs;
        true
    }

    /// The thread that a run with these inputs needs in any case, if there is one.
    fn home(&self, inputs: &[Tensor]) -> Option<Arc<dyn Home>> {
        let _ = inputs;
        None
    }
}

/// What such a thread does; it may listen for more to a task that went on then.
pub(crate) type Errand = Box<dyn FnOnce() -> Option<Listener> + Send>;

/// A thread of a model's own, which can be a lane as well: then no other one needs to wake and to wait for it.
pub(crate) trait Home: Send + Sync {
    /// Whether it has nothing to do, and is the caller's until that has [given](Self::give) it something.
    fn reserve(&self) -> bool;

    fn give(&self, work: Errand);

    /// Somebody is about to do so when a task goes on that waits for its socket: the thread may wake, and wait with it.
    fn expect(&self, task: Listener);
}

/// How the calls of a model may run together.
#[derive(Clone, Debug)]
pub(crate) struct Batching {
    /// Runs that may go on at the same time.
    pub(crate) parallel: usize,
    /// Rows of one run, where the first dimension of all inputs and outputs is the batch; 0 where it is not.
    pub(crate) rows_max: usize,
    /// Only powers of two: the engine prepares itself for each size.
    pub(crate) sizes_are_dear: bool,
    /// Whether rows of several tenants may share a run.
    pub(crate) mixes_tenants: bool,
    /// How long an incomplete batch gives way to other work.
    pub(crate) delay: Duration,
}

/// The calls of one model.
#[derive(Debug)]
pub(crate) struct Batcher {
    core: Arc<Core>,
    /// Work that uses the model in its own way.
    pub(super) apart: Arc<Bucket>,
    buckets: Mutex<Vec<Arc<Bucket>>>,
}

/// What all buckets of a model have in common.
pub(super) struct Core {
    batching: Batching,
    pub(super) runner: Arc<dyn Runner>,
    running: AtomicUsize,
    /// Calls that wait.
    waiting: AtomicUsize,
    /// Set when outputs turned out not to be made of rows.
    alone: AtomicBool,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("batching", &self.batching).finish_non_exhaustive()
    }
}

impl Core {
    /// A run begins, or ends.
    pub(super) fn begin(&self) {
        self.running.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.running.fetch_sub(1, Ordering::Relaxed);
    }

    /// The model's outputs are not made of rows, whatever its file or configuration says: its calls run alone.
    pub(super) fn has_no_rows(&self) {
        self.alone.store(true, Ordering::Relaxed);
    }

    fn is_alone(&self) -> bool {
        self.batching.rows_max == 0 || self.alone.load(Ordering::Relaxed)
    }
}

/// What a call asks of a model.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) inputs: Vec<Tensor>,
    pub(crate) outputs: Vec<usize>,
    pub(crate) reply_bytes_max: u64,
}

/// What calls must have in common to share a run: types and shapes of a row of each input, and the outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Signature {
    is_shared: bool,
    inputs: Vec<(i32, Vec<i64>)>,
    outputs: Vec<usize>,
}

impl Batcher {
    pub(crate) fn new(runner: Arc<dyn Runner>, batching: Batching) -> Self {
        let [running, waiting] = [0, 0].map(AtomicUsize::new);
        let core = Arc::new(Core { batching, runner, running, waiting, alone: AtomicBool::new(false) });
        let apart = Signature { is_shared: false, inputs: Vec::new(), outputs: Vec::new() };
        let apart = Arc::new(Bucket::new(Arc::clone(&core), apart, 1));
        Self { core, apart, buckets: Mutex::default() }
    }

    /// Calls of the model that wait.
    pub(super) fn waiting(&self) -> usize {
        self.core.waiting.load(Ordering::Relaxed)
    }

    /// Where a call belongs, and how many rows it has.
    pub(super) fn bucket(&self, call: &Call) -> (Arc<Bucket>, usize) {
        let rows = self.rows(call);
        let rows_max = self.core.batching.rows_max;
        // A call without rows, or with more than a run may have, is a run of its own, whatever the model makes of it.
        let is_shared = (1..=rows_max).contains(&rows);
        let rest = usize::from(is_shared);
        let signature = Signature {
            is_shared,
            inputs: call.inputs.iter().map(|input| (input.dtype, input.shape[rest..].to_vec())).collect(),
            outputs: call.outputs.clone(),
        };
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let found = buckets.iter().find(|bucket| bucket.signature == signature);
        let bucket = found.cloned().unwrap_or_else(|| {
            let is_kept = buckets.len() < BUCKETS_MAX;
            let rows_max = if is_shared && is_kept { rows_max } else { 1 };
            let bucket = Arc::new(Bucket::new(Arc::clone(&self.core), signature, rows_max));
            if is_kept {
                buckets.push(Arc::clone(&bucket));
            }
            bucket
        });
        (bucket, rows.max(1))
    }

    /// The thread that a call's run needs in any case.
    pub(super) fn home(&self, call: &Call) -> Option<Arc<dyn Home>> {
        self.core.runner.home(&call.inputs)
    }

    /// Rows that all inputs of a call have; 0 where there is no batch.
    fn rows(&self, call: &Call) -> usize {
        let mut counts = call.inputs.iter().map(|input| input.shape.first().copied());
        let Some(Some(first)) = counts.next() else { return 0 };
        let has_rows = !self.core.is_alone() && counts.all(|count| count == Some(first));
        if has_rows { usize::try_from(first).unwrap_or(0) } else { 0 }
    }
}

/// Calls that may share a run.
#[derive(Debug)]
pub(crate) struct Bucket {
    pub(super) core: Arc<Core>,
    signature: Signature,
    rows_max: usize,
    /// Rows of the calls that wait.
    waiting: AtomicUsize,
    costs: Mutex<Costs>,
}

impl Bucket {
    fn new(core: Arc<Core>, signature: Signature, rows_max: usize) -> Self {
        let costs = Mutex::new(Costs::new(rows_max));
        Self { core, signature, rows_max, waiting: AtomicUsize::new(0), costs }
    }

    fn costs(&self) -> MutexGuard<'_, Costs> {
        self.costs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn joined(&self, rows: usize) {
        self.core.waiting.fetch_add(1, Ordering::Relaxed);
        self.waiting.fetch_add(rows, Ordering::Relaxed);
    }

    pub(super) fn left(&self, rows: usize) {
        self.core.waiting.fetch_sub(1, Ordering::Relaxed);
        self.waiting.fetch_sub(rows, Ordering::Relaxed);
    }

    pub(super) fn waiting_rows(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Whether the model can take another run.
    pub(super) fn may_run(&self) -> bool {
        self.core.running.load(Ordering::Relaxed) < self.core.batching.parallel
    }

    pub(super) fn mixes_tenants(&self) -> bool {
        self.core.batching.mixes_tenants
    }

    /// Whether a call that waited so long needs not give way any more.
    pub(super) fn is_due(&self, waited: Duration) -> bool {
        waited >= self.core.batching.delay || self.waiting_rows() >= self.rows_max
    }

    /// Rows that are worth running together now, beginning with a call of so many.
    pub(super) fn limit(&self, rows: usize, now: Instant) -> usize {
        if self.core.is_alone() { rows } else { self.costs().limit(rows, now) }
    }

    /// Nanoseconds that a row took lately; none before the first.
    pub(super) fn row_cost(&self) -> Option<u64> {
        self.costs().row
    }

    /// Takes from the end of `chosen` until the batch has a size that the engine is prepared for.
    pub(super) fn settle<T>(&self, first: usize, chosen: &mut Vec<T>, rows: impl Fn(&T) -> usize) {
        if !self.core.batching.sizes_are_dear {
            return;
        }
        let mut total = first + chosen.iter().map(&rows).sum::<usize>();
        while !total.is_power_of_two() {
            match chosen.pop() {
                Some(last) => total -= rows(&last),
                None => return,
            }
        }
    }

    /// Notes what a run took.
    pub(super) fn ran(&self, rows: usize, took: Duration, now: Instant) {
        self.costs().note(rows, took, now);
    }
}

/// What runs of one bucket take, by size: 1, 2, up to 4, up to 8 rows and so on.
#[derive(Debug)]
struct Costs {
    sizes: Vec<Size>,
    rows_max: usize,
    /// Nanoseconds of a row, over all sizes.
    row: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Size {
    /// Nanoseconds of a row.
    row: f64,
    runs: u32,
    last: Option<Instant>,
}

impl Size {
    fn is_older(&self, age: Duration, now: Instant) -> bool {
        self.last.is_none_or(|last| now.saturating_duration_since(last) > age)
    }
}

/// The place of a size in the list.
fn size(rows: usize) -> usize {
    rows.max(1).next_power_of_two().trailing_zeros() as usize
}

impl Costs {
    fn new(rows_max: usize) -> Self {
        Self { sizes: vec![Size::default(); size(rows_max) + 1], rows_max, row: None }
    }

    fn note(&mut self, rows: usize, took: Duration, now: Instant) {
        #[allow(clippy::cast_precision_loss, reason = "a measured time")]
        let row = took.as_nanos() as f64 / rows.max(1) as f64;
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a measured time, not negative"
        )]
        let nanos = row as u64;
        // What calls wait for is what runs take, in good moments and bad ones.
        self.row = Some(self.row.map_or(nanos, |old| old - old / 8 + nanos / 8));
        let place = size(rows);
        let Some(size) = self.sizes.get_mut(place) else { return };
        if rows * 4 < (1 << place) * 3 {
            // Far from full, it says little about the size.
            return;
        }
        // The first run of a size prepares what the others use.
        let is_first = size.runs <= 1;
        size.row = if is_first || row < size.row { row } else { size.row + FRESH * (row - size.row) };
        size.runs = size.runs.saturating_add(1);
        size.last = Some(now);
    }

    /// Goes up through the sizes as long as each makes a row cheaper; one that is not known is tried.
    fn limit(&self, rows: usize, now: Instant) -> usize {
        let mut best = size(rows);
        while let (Some(known), Some(next)) = (self.sizes.get(best), self.sizes.get(best + 1)) {
            #[allow(clippy::cast_precision_loss, reason = "a time to wait")]
            let some_runs =
                Duration::from_secs_f64(RETRY_AFTER_RUNS * known.row * (1_u64 << best) as f64 / 1e9);
            let is_tried = next.runs < RUNS_MIN || next.is_older(RETRY_AFTER.max(some_runs), now);
            if known.runs < RUNS_MIN || !is_tried && next.row >= known.row * GAIN_MIN {
                break;
            }
            best += 1;
            // One step into the unknown at a time.
            if is_tried {
                break;
            }
        }
        (1 << best).min(self.rows_max)
    }
}

/// The inputs of several calls as those of one, rows one after the other.
pub(super) fn join(calls: &[&Call]) -> Vec<Tensor> {
    let count = calls.first().map_or(0, |call| call.inputs.len());
    let joined = (0..count).map(|index| {
        let parts: Vec<&Tensor> = calls.iter().map(|call| &call.inputs[index]).collect();
        let mut data = Vec::with_capacity(parts.iter().map(|part| part.data.len()).sum());
        for part in &parts {
            data.extend_from_slice(&part.data);
        }
        let mut shape = parts[0].shape.clone();
        shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        Tensor { shape, data: data.into(), ..Tensor { dtype: parts[0].dtype, ..Tensor::default() } }
    });
    joined.collect()
}

/// The outputs of a run, to each of the calls its rows. None when the model's outputs are not made of rows.
pub(super) fn part(outputs: &[Tensor], rows: &[usize]) -> Option<Vec<Vec<Tensor>>> {
    let total: usize = rows.iter().sum();
    let has_rows = |output: &Tensor| {
        output.shape.first().is_some_and(|first| usize::try_from(*first) == Ok(total)) && total > 0
    };
    if !outputs.iter().all(has_rows) {
        return None;
    }
    let ends: Vec<Vec<usize>> =
        outputs.iter().map(|output| row_ends(output, total)).collect::<Option<_>>()?;
    let mut at = 0;
    let parts = rows.iter().map(|&count| {
        let part = outputs.iter().zip(&ends).map(|(output, ends)| {
            let mut shape = output.shape.clone();
            shape[0] = i64::try_from(count).unwrap_or(i64::MAX);
            Tensor { shape, data: output.data.slice(ends[at]..ends[at + count]), ..output.clone() }
        });
        let part = part.collect();
        at += count;
        part
    });
    Some(parts.collect())
}

/// Where the rows of a tensor end, from the beginning of the first one on.
fn row_ends(tensor: &Tensor, rows: usize) -> Option<Vec<usize>> {
    if tensor.dtype() != DType::Bytes {
        let row = tensor.data.len() / rows;
        return Some((0..=rows).map(|index| index * row).collect());
    }
    let each = usize::try_from(tensor.shape[1..].iter().product::<i64>()).ok()?;
    let begin = tensor.data.as_ptr() as usize;
    let mut ends = vec![0];
    let mut row = 0_usize;
    for string in strings(&tensor.data) {
        let string = string?;
        row += 1;
        if row == each {
            ends.push(string.as_ptr() as usize - begin + string.len());
            row = 0;
        }
    }
    // Rows without elements.
    ends.resize(rows + 1, *ends.last()?);
    Some(ends)
}

/// Refuses what one reply cannot carry.
pub(super) fn check_reply(outputs: &[Tensor], limit: u64) -> Result<(), Error> {
    let bytes = outputs.iter().map(|output| output.data.len() as u64).sum();
    if bytes <= limit {
        return Ok(());
    }
    Err(Error::limit(Reason::MessageTooLarge, "outputs of the model", limit, bytes, "bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// What a device says that takes so long for a launch and so long for a row, while more wait than it takes.
    fn learn(
        costs: &mut Costs,
        launch: Duration,
        row: Duration,
        runs: usize,
        mut now: Instant,
    ) -> Vec<usize> {
        let runs = (0..runs).map(|_| {
            let rows = costs.limit(1, now);
            let took = launch + row * u32::try_from(rows).expect("small");
            now += took;
            costs.note(rows, took, now);
            rows
        });
        runs.collect()
    }

    #[test]
    fn a_cost_per_launch_is_shared_by_as_many_rows_as_may_be() {
        let mut costs = Costs::new(48);
        let sizes = learn(&mut costs, MS, MS / 100, 40, Instant::now());
        assert_eq!(sizes[..6], [1, 1, 1, 2, 2, 2]);
        assert_eq!(sizes[39], 48, "{sizes:?}");
    }

    #[test]
    fn rows_that_get_no_cheaper_run_by_themselves() {
        let mut costs = Costs::new(64);
        let sizes = learn(&mut costs, MS / 50, MS, 10_000, Instant::now());
        let tries = sizes.iter().filter(|rows| **rows > 1).count();
        assert!((3..=15).contains(&tries), "three times at first, then once in a second: {tries}");
        assert_eq!(sizes[9999], 1);
    }

    #[test]
    fn a_size_that_was_not_worth_it_is_tried_again_after_some_time() {
        let (mut costs, begin) = (Costs::new(64), Instant::now());
        learn(&mut costs, Duration::ZERO, MS, 100, begin);
        let later = begin + RETRY_AFTER * 2;
        // Another engine has the processor now: launches are what costs.
        let sizes = learn(&mut costs, MS * 10, MS, 1000, later);
        assert!(sizes[999] > 8, "{sizes:?}");
    }

    #[test]
    fn a_bad_moment_is_soon_forgotten() {
        let (mut costs, begin) = (Costs::new(64), Instant::now());
        for _ in 0..RUNS_MIN {
            costs.note(1, MS, begin);
            // Something else had the processor.
            costs.note(2, MS * 20, begin);
        }
        assert_eq!(costs.limit(1, begin), 1);
        let sizes = learn(&mut costs, MS, MS / 100, 1200, begin);
        let first = sizes.iter().position(|rows| *rows == 64).expect("they are worth it");
        assert!(first < 1100, "after a second: {first}");
    }

    #[test]
    fn calls_that_come_with_rows_begin_at_their_own_size() {
        let (mut costs, now) = (Costs::new(64), Instant::now());
        assert_eq!(costs.limit(8, now), 8);
        for _ in 0..RUNS_MIN {
            costs.note(8, MS, now);
        }
        assert_eq!(costs.limit(8, now), 16);
        assert_eq!(costs.limit(200, now), 64, "which is less than it has: it runs by itself");
    }
}
