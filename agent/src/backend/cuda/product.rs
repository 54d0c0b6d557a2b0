//! One product on a device: rows of `a` go up, are multiplied and come down as rows of the result, on two streams by
//! turns, so that one copies while the other computes.
//!
//! ```text
//! stream 0   b, even parts │ a0 up │ a0 b │ c0 down          │ a2 up │ a2 b │ c2 down
//! stream 1   b, odd parts  │       │ a1 up│ a1 b  │ c1 down          │ a3 up ...
//! ```
//!
//! Memory of the host that is pinned (which a device copies from and to by itself, several times as fast) is dear to
//! make: it is made once, and what a call brought passes through it. Matrices that lie in memory that the device
//! reaches, without gaps, and results that are wanted there do not pass through anything. Between two panels a product
//! looks whether it is still wanted.

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vaccel_proto::Error;
use vaccel_proto::compute::Layout;

use super::cublas::{Cublas, Multiplier, WORKSPACE_BYTES};
use super::driver::{Context, Failure, Memory, Pinned};
use super::memory::{Charge, Ledger};
use super::pins::Pins;
use super::stream::{Held, Stream};
use crate::backend::blas::Factor;
use crate::quota::Account;
use crate::scheduler::Cancel;

/// Bytes of each pinned memory: copies of this size reach the full speed of the bus, and a panel is computed in a
/// millisecond or two.
pub(super) const STAGE_BYTES: usize = 16 << 20;

/// Longest row of a matrix, in numbers: it fits in a stage.
pub(crate) const ROW_NUMBERS_MAX: usize = STAGE_BYTES / 4;

/// What products need beside their matrices: one at a time.
pub(super) struct Bench {
    multipliers: [Multiplier; 2],
    /// Panels of `a` and of the result, for each stream.
    panels: [(Memory, Memory); 2],
    _charge: Charge,
}

/// What a product is made of.
pub(crate) struct Factors<'a> {
    pub(crate) a: Factor<'a>,
    pub(crate) b: Factor<'a>,
    pub(crate) alpha: f32,
    /// Of what the result held before; when it is 0 nothing of that is read.
    pub(crate) beta: f32,
}

/// Where a product goes, which is dense.
pub(crate) enum Sum<'a> {
    Here(&'a mut [f32]),
    /// What was there before is not read: `beta` is 0.
    There(Held),
}

impl Sum<'_> {
    fn numbers(&self) -> usize {
        match self {
            Self::Here(numbers) => numbers.len(),
            Self::There(held) => held.bytes() / size_of::<f32>(),
        }
    }
}

/// What a product of square matrices takes without the agent, in medians.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alone {
    /// Where the matrices are on the device and stay there.
    pub(crate) resident: Duration,
    /// With the way there and back, in one piece each, from and to pinned memory.
    pub(crate) pinned: Duration,
}

/// Copies rows of a matrix without what is between them, as fast as the host's threads can.
pub(crate) type Gather<'a> = &'a dyn Fn(Factor<'_>, &mut [f32]);

/// Who multiplies, and for whom.
pub(crate) struct Asked<'a> {
    /// None for the agent itself.
    pub(crate) account: Option<&'a Arc<Account>>,
    pub(crate) gather: Gather<'a>,
    pub(crate) cancel: &'a Cancel,
}

impl Bench {
    /// Bytes of the device that a bench has for good.
    pub(super) const BYTES: u64 = 2 * (2 * STAGE_BYTES as u64 + WORKSPACE_BYTES as u64);

    pub(super) fn new(
        context: &Arc<Context>,
        library: &Arc<Cublas>,
        charge: Charge,
    ) -> Result<Self, Failure> {
        let multiplier = || Multiplier::new(library, Stream::new(context, STAGE_BYTES)?);
        let panel =
            || Ok::<_, Failure>((Memory::new(context, STAGE_BYTES)?, Memory::new(context, STAGE_BYTES)?));
        Ok(Self {
            multipliers: [multiplier()?, multiplier()?],
            panels: [panel()?, panel()?],
            _charge: charge,
        })
    }

    pub(super) fn version(&self) -> Result<String, Failure> {
        self.multipliers[0].version()
    }

    /// Adds the product to `beta` times the sum.
    ///
    /// # Errors
    /// `CANCELLED`, `QUOTA_EXCEEDED` where the device has not the memory, `BACKEND_FAILED`.
    pub(super) fn multiply(
        &mut self,
        sum: Sum<'_>,
        factors: &Factors<'_>,
        asked: &Asked<'_>,
        ledger: &Arc<Ledger>,
        pins: &Pins,
    ) -> Result<(), Error> {
        let (m, n, k) = (factors.a.layout.rows, factors.b.layout.columns, factors.a.layout.columns);
        assert!(n.max(k) <= ROW_NUMBERS_MAX, "rows fit in a stage");
        assert!(sum.numbers() == m * n && (factors.beta == 0.0 || matches!(sum, Sum::Here(_))), "a sum");
        let context = Arc::clone(self.multipliers[0].stream.context());
        let b_bytes = factors.b.layout.rows * n * 4;
        let panel_rows = (ROW_NUMBERS_MAX / n.max(k)).clamp(1, m);
        // The panels are the bench's, and counted with it.
        let _charge = ledger.charge(asked.account, b_bytes as u64)?;
        let failed = |failure: Failure| match failure.is_out_of_memory() {
            true => ledger.full(b_bytes as u64).caused_by(failure.to_string()),
            false => context.error(&failure),
        };
        let b = Memory::new(&context, b_bytes).map_err(failed)?;
        let way = Way { asked, pins, failed: &failed };
        let multiplied = self.on_device(sum, factors, &b, panel_rows, &way);
        // Whatever came in between, nothing may use `b` any more when it goes.
        let waited = self.multipliers.iter_mut().try_for_each(|one| one.stream.wait()).map_err(failed);
        multiplied.and(waited)
    }

    /// What a product of square matrices takes without the agent: what products with it are compared with.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` where the device has not the memory, `BACKEND_FAILED`.
    pub(super) fn alone(&mut self, side: usize, ledger: &Arc<Ledger>) -> Result<Alone, Error> {
        let context = Arc::clone(self.multipliers[0].stream.context());
        let bytes = side * side * size_of::<f32>();
        let _charge = ledger.charge(None, 3 * bytes as u64)?;
        let failed = |failure: Failure| match failure.is_out_of_memory() {
            true => ledger.full(3 * bytes as u64).caused_by(failure.to_string()),
            false => context.error(&failure),
        };
        let mut measure = || {
            let [a, b, c] = [(); 3].map(|()| Memory::new(&context, bytes));
            let [a, b, c] = [a?, b?, c?];
            let numbers: Vec<f32> =
                (0..side * side).map(|index| (index % 1013) as f32 / 506.0 - 1.0).collect();
            let host = || {
                let mut memory = Pinned::new(&context, bytes)?;
                fill(&numbers, memory.slice_mut());
                Ok::<_, Failure>(Held::pinned(memory))
            };
            let [from_a, from_b, to_c] = [host()?, host()?, host()?];
            let multiplier = &mut self.multipliers[0];
            let whole = |held: &Held| held.part(0, bytes);
            let measured = (|| {
                let pinned = timed(|| {
                    multiplier.stream.upload_from(&a, 0, whole(&from_a))?;
                    multiplier.stream.upload_from(&b, 0, whole(&from_b))?;
                    multiplier.start([side; 3], (1.0, 0.0), [&a, &b, &c])?;
                    multiplier.stream.download_to(&c, 0, whole(&to_c))?;
                    multiplier.stream.wait()
                })?;
                let resident = timed(|| {
                    multiplier.start([side; 3], (1.0, 0.0), [&a, &b, &c])?;
                    multiplier.stream.wait()
                })?;
                Ok(Alone { resident, pinned })
            })();
            // Whatever came in between, nothing may use the matrices any more when they go.
            multiplier.stream.wait()?;
            measured
        };
        measure().map_err(failed)
    }

    fn on_device(
        &mut self,
        mut sum: Sum<'_>,
        factors: &Factors<'_>,
        b: &Memory,
        panel_rows: usize,
        way: &Way<'_>,
    ) -> Result<(), Error> {
        let (m, n, k) = (factors.a.layout.rows, factors.b.layout.columns, factors.a.layout.columns);
        let failed = way.failed;
        self.upload_all(factors.b, b, way).map_err(failed)?;
        let panels = m.div_ceil(panel_rows);
        let rows_of = |panel: usize| panel_rows.min(m - panel * panel_rows);
        // Panels whose result has not been taken yet: at most one on each stream.
        let mut started: [Option<usize>; 2] = [None, None];
        for index in 0..panels + 2 {
            let turn = index % 2;
            let multiplier = &mut self.multipliers[turn];
            if let Some(done) = started[turn].take() {
                let down = multiplier.stream.downloaded().map_err(failed)?;
                if let Sum::Here(sum) = &mut sum {
                    let layout = Layout::dense(rows_of(done), n);
                    let result = Factor { numbers: bytemuck::cast_slice(down), layout };
                    let from = done * panel_rows * n;
                    (way.asked.gather)(result, &mut sum[from..from + layout.rows * n]);
                }
            }
            way.asked.cancel.check()?;
            if index >= panels {
                continue;
            }
            let (a_panel, c_panel) = &self.panels[turn];
            let (rows, from) = (rows_of(index), index * panel_rows * n);
            let part = factors.a.part(index * panel_rows, 0, rows, k);
            let mut start = || {
                bring(&mut multiplier.stream, a_panel, 0, part, way)?;
                if let Sum::Here(sum) = &sum
                    && factors.beta != 0.0
                {
                    let before = &sum[from..from + rows * n];
                    multiplier.stream.upload_result(c_panel, |stage| fill(before, stage))?;
                }
                multiplier.start([rows, n, k], (factors.alpha, factors.beta), [a_panel, b, c_panel])?;
                let bytes = rows * n * size_of::<f32>();
                match &sum {
                    Sum::Here(_) => multiplier.stream.download(c_panel, 0, bytes),
                    Sum::There(held) => {
                        let to = held.part(from * size_of::<f32>(), bytes);
                        multiplier.stream.download_to(c_panel, 0, to)
                    }
                }
            };
            start().map_err(failed)?;
            started[turn] = Some(index);
        }
        Ok(())
    }

    /// Brings a matrix up in parts, on both streams by turns; what either does next comes after all of it.
    fn upload_all(&mut self, matrix: Factor<'_>, to: &Memory, way: &Way<'_>) -> Result<(), Failure> {
        let (rows, columns) = (matrix.layout.rows, matrix.layout.columns);
        let rows_of_stage = ROW_NUMBERS_MAX / columns;
        for (turn, from) in (0..rows).step_by(rows_of_stage).enumerate() {
            let part = matrix.part(from, 0, rows_of_stage.min(rows - from), columns);
            let stream = &mut self.multipliers[turn % 2].stream;
            bring(stream, to, from * columns * size_of::<f32>(), part, way)?;
        }
        let [even, odd] = &mut self.multipliers;
        even.stream.follow(&mut odd.stream)?;
        odd.stream.follow(&mut even.stream)
    }
}

/// How matrices get to a device.
struct Way<'a> {
    asked: &'a Asked<'a>,
    pins: &'a Pins,
    failed: &'a dyn Fn(Failure) -> Error,
}

/// Starts to bring rows up: from where they are, if the device reaches them there, else through a stage.
fn bring(
    stream: &mut Stream,
    to: &Memory,
    offset: usize,
    part: Factor<'_>,
    way: &Way<'_>,
) -> Result<(), Failure> {
    let Layout { rows, columns, stride } = part.layout;
    let is_dense = rows == 1 || stride == columns;
    let held = is_dense.then(|| {
        let bytes: &[u8] = bytemuck::cast_slice(&part.numbers[..rows * columns]);
        way.pins.held(stream.context(), NonNull::from(bytes))
    });
    match held.flatten() {
        Some(held) => stream.upload_from(to, offset, held),
        None => stream.upload(to, offset, |stage| gather(part, stage, way.asked)),
    }
}

/// The median of what something takes, after a first time: in that a library chooses its kernels.
fn timed(mut work: impl FnMut() -> Result<(), Failure>) -> Result<Duration, Failure> {
    const ROUNDS: usize = 9;
    work()?;
    let mut took = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        work()?;
        took.push(begun.elapsed());
    }
    took.sort();
    Ok(took[ROUNDS / 2])
}

/// Fills a stage with rows; how many bytes they are.
fn gather(part: Factor<'_>, stage: &mut [u8], asked: &Asked<'_>) -> usize {
    let numbers = part.layout.rows * part.layout.columns;
    (asked.gather)(part, &mut bytemuck::cast_slice_mut(stage)[..numbers]);
    numbers * 4
}

/// Fills a stage with numbers that follow each other; how many bytes they are.
fn fill(numbers: &[f32], stage: &mut [u8]) -> usize {
    let bytes: &[u8] = bytemuck::cast_slice(numbers);
    stage[..bytes.len()].copy_from_slice(bytes);
    bytes.len()
}
