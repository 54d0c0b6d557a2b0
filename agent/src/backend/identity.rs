//! No engine at all: outputs are the inputs, after a time that can be chosen. For tests of clients, and to see what
//! batching does for a device with a known cost per launch and per row.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use vaccel_proto::v1::Tensor;
use vaccel_proto::{Error, Reason};

use super::file::{Format, ModelFile, Port};
use super::{Model, Program, RunRules};
use crate::scheduler::{Cancel, Runner};

/// What a run costs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) run: Duration,
    /// For each row, or for the call where there are none.
    pub(crate) row: Duration,
}

struct Identity {
    /// For each output its input.
    sources: Vec<usize>,
    cost: Cost,
}

/// A model that gives back what it gets: each output is the input of the same place.
///
/// # Errors
/// `MODEL_REJECTED` for an output without an input of its type.
pub(crate) fn identity(
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    cost: Cost,
    rules: &RunRules,
) -> Result<Arc<Model>, Error> {
    for (index, output) in outputs.iter().enumerate() {
        if inputs.get(index).is_none_or(|input| input.dtype != output.dtype) {
            let message = format!("output {}: expected an input of the same place and type", output.name);
            return Err(Error::new(Reason::ModelRejected, message));
        }
    }
    let program = Identity { sources: (0..outputs.len()).collect(), cost };
    Ok(Arc::new(Model::new(ModelFile::without(inputs, outputs), Arc::new(program), rules)))
}

impl ModelFile {
    /// The description of a model that has no file.
    fn without(inputs: Vec<Port>, outputs: Vec<Port>) -> Self {
        Self {
            format: Format::None,
            bytes: bytes::Bytes::new(),
            has_rows: false,
            inputs,
            outputs,
            metadata: std::collections::HashMap::new(),
            operators: std::collections::BTreeSet::new(),
            companions: std::collections::HashMap::new(),
        }
    }
}

impl Runner for Identity {
    fn run(
        &self,
        inputs: Vec<Tensor>,
        outputs: &[usize],
        reply_bytes_max: u64,
        cancel: &Cancel,
    ) -> Result<Vec<Tensor>, Error> {
        let rows = inputs.first().and_then(|input| input.shape.first()).map_or(1, |rows| *rows);
        let cost = self.cost.run + self.cost.row * u32::try_from(rows).unwrap_or(1);
        if !cost.is_zero() && !take(cost, cancel) {
            return Err(Error::new(Reason::Cancelled, "nobody waits for the result"));
        }
        let wanted: Vec<Tensor> = outputs.iter().map(|index| inputs[self.sources[*index]].clone()).collect();
        super::check_reply(wanted.iter().map(|tensor| tensor.data.len()), reply_bytes_max)?;
        Ok(wanted)
    }
}

/// How much later than they wanted to sleepers are woken by a system that is idle. A device that costs a millisecond
/// must not cost a tenth more: so long before its time is over, it is waited for awake.
const WOKEN_LATE: Duration = Duration::from_micros(150);

/// Takes so much time; returns whether somebody still waits for it.
fn take(time: Duration, cancel: &Cancel) -> bool {
    let begun = Instant::now();
    let (stop, stopped) = mpsc::channel();
    let interrupt = move || {
        let _ = stop.send(());
    };
    let asleep = time.saturating_sub(WOKEN_LATE);
    if !asleep.is_zero() && cancel.interruptible(interrupt, || stopped.recv_timeout(asleep)).is_ok() {
        return false;
    }
    while begun.elapsed() < time && !cancel.is_set() {
        // Whoever has something to do goes first.
        std::thread::yield_now();
    }
    !cancel.is_set()
}

impl Program for Identity {
    fn parallel_runs(&self) -> usize {
        usize::MAX
    }

    fn prepares_shapes(&self) -> bool {
        false
    }
}
