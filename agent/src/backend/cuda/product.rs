//! One product on a device: rows of `a` go up, are multiplied and come down as rows of the result, on two streams by
//! turns, so that one copies while the other computes.
//!
//! ```text
//! stream 0   b, even parts │ a0 up │ a0 b │ c0 down          │ a2 up │ a2 b │ c2 down
//! stream 1   b, odd parts  │       │ a1 up│ a1 b  │ c1 down          │ a3 up ...
//! ```
//!
//! Memory of the host that is pinned (which a device copies from and to by itself, several times as fast) is dear to
//! make: it is made once, and what a call brought passes through it. Between two panels a product looks whether it is
//! still wanted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vaccel_proto::{Error, Reason};

use super::cublas::{Cublas, Multiplier, WORKSPACE_BYTES};
use super::driver::{Context, Failure, Memory, Stream};
use super::memory::{Charge, Ledger};
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

    /// Adds the product to `beta` times the sum, which is dense.
    ///
    /// # Errors
    /// `CANCELLED`, `QUOTA_EXCEEDED` where the device has not the memory, `BACKEND_FAILED`.
    pub(super) fn multiply(
        &mut self,
        sum: &mut [f32],
        factors: &Factors<'_>,
        asked: &Asked<'_>,
        ledger: &Arc<Ledger>,
    ) -> Result<(), Error> {
        let (m, n, k) = (factors.a.layout.rows, factors.b.layout.columns, factors.a.layout.columns);
        assert!(n.max(k) <= ROW_NUMBERS_MAX, "rows fit in a stage");
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
        let multiplied = self.on_device(sum, factors, &b, panel_rows, asked, &failed);
        // Whatever came in between, nothing may use `b` any more when it goes.
        let waited = self.multipliers.iter_mut().try_for_each(|one| one.stream.wait()).map_err(failed);
        multiplied.and(waited)
    }

    /// How long a product of square matrices takes that stay on the device.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` where the device has not the memory, `BACKEND_FAILED`.
    pub(super) fn resident(&mut self, side: usize, ledger: &Arc<Ledger>) -> Result<Duration, Error> {
        /// Products that are timed together, so that starting them does not count.
        const ROUNDS: u32 = 8;
        let context = Arc::clone(self.multipliers[0].stream.context());
        let bytes = side * side * 4;
        let _charge = ledger.charge(None, 3 * bytes as u64)?;
        let failed = |failure: Failure| match failure.is_out_of_memory() {
            true => ledger.full(3 * bytes as u64).caused_by(failure.to_string()),
            false => context.error(&failure),
        };
        let matrix = || Memory::new(&context, bytes);
        let mut multiply = || {
            let (a, b, c) = (matrix()?, matrix()?, matrix()?);
            let numbers: Vec<f32> = (0..side).map(|index| (index % 7) as f32 - 3.0).collect();
            for row in 0..side {
                for to in [&a, &b] {
                    self.multipliers[0].stream.upload(to, row * side * 4, |stage| fill(&numbers, stage))?;
                }
            }
            let sizes = [side; 3];
            let timed = |bench: &mut Self, rounds: u32| {
                let begun = Instant::now();
                let multiplier = &mut bench.multipliers[0];
                for _ in 0..rounds {
                    multiplier.start(sizes, (1.0, 0.0), [&a, &b, &c])?;
                }
                multiplier.stream.wait().map(|()| begun.elapsed())
            };
            // The first product of a size lets the library choose its kernel.
            timed(self, 1)?;
            let took = timed(self, ROUNDS);
            self.multipliers[0].stream.wait()?;
            took.map(|took| took / ROUNDS)
        };
        multiply().map_err(failed)
    }

    fn on_device(
        &mut self,
        sum: &mut [f32],
        factors: &Factors<'_>,
        b: &Memory,
        panel_rows: usize,
        asked: &Asked<'_>,
        failed: &dyn Fn(Failure) -> Error,
    ) -> Result<(), Error> {
        let (n, k) = (factors.b.layout.columns, factors.a.layout.columns);
        self.upload_all(factors.b, b, asked).map_err(failed)?;
        let mut panels: Vec<(usize, &mut [f32])> = sum.chunks_mut(panel_rows * n).enumerate().collect();
        // Panels whose result has not been taken yet: at most one on each stream.
        let mut started: [Option<usize>; 2] = [None, None];
        for index in 0..panels.len() + 2 {
            let turn = index % 2;
            let multiplier = &mut self.multipliers[turn];
            if let Some(done) = started[turn].take() {
                let result = &mut *panels[done].1;
                let down = multiplier.stream.downloaded().map_err(failed)?;
                result.copy_from_slice(bytemuck::cast_slice(&down[..size_of_val(result)]));
            }
            if asked.cancel.is_set() {
                return Err(Error::new(Reason::Cancelled, "nobody waits for the product"));
            }
            let Some((_, result)) = panels.get(index) else { continue };
            let (a_panel, c_panel) = &self.panels[turn];
            let rows = result.len() / n;
            let part = factors.a.part(index * panel_rows, 0, rows, k);
            let mut start = || {
                multiplier.stream.upload(a_panel, 0, |stage| gather(part, stage, asked))?;
                if factors.beta != 0.0 {
                    multiplier.stream.upload_result(c_panel, |stage| fill(result, stage))?;
                }
                multiplier.start([rows, n, k], (factors.alpha, factors.beta), [a_panel, b, c_panel])?;
                multiplier.stream.download(c_panel, 0, rows * n * 4)
            };
            start().map_err(failed)?;
            started[turn] = Some(index);
        }
        Ok(())
    }

    /// Brings a matrix up in parts, on both streams by turns; what either does next comes after all of it.
    fn upload_all(&mut self, matrix: Factor<'_>, to: &Memory, asked: &Asked<'_>) -> Result<(), Failure> {
        let (rows, columns) = (matrix.layout.rows, matrix.layout.columns);
        let rows_of_stage = ROW_NUMBERS_MAX / columns;
        for (turn, from) in (0..rows).step_by(rows_of_stage).enumerate() {
            let part = matrix.part(from, 0, rows_of_stage.min(rows - from), columns);
            let stream = &mut self.multipliers[turn % 2].stream;
            stream.upload(to, from * columns * 4, |stage| gather(part, stage, asked))?;
        }
        let [even, odd] = &mut self.multipliers;
        even.stream.follow(&mut odd.stream)?;
        odd.stream.follow(&mut even.stream)
    }
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
