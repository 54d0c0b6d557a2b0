//! Calls that belong together: those of one correlation id run one after the other, and what the model gives as state
//! comes back in with the next one.
//!
//! A model has sequences where its configuration has `sequence_batching`. Its `control_input`s are tensors that say
//! where a sequence is, its `state`s pairs of an output and the input that it becomes. Neither is a tensor of the
//! callers'. *Followed:* `max_sequence_idle_microseconds` up to an hour, controls of all kinds, states that begin as
//! zeros or without anything said (zeros, too). Calls do not share runs with those of other sequences.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use vaccel_proto::inference::ModelSequenceBatching;
use vaccel_proto::inference::infer_parameter::ParameterChoice;
use vaccel_proto::inference::model_config::SchedulingChoice;
use vaccel_proto::inference::model_sequence_batching::control::Kind;
use vaccel_proto::inference::model_sequence_batching::{Control, State};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::regions::Made;
use super::tensors::{Parameters, Subject, plain};
use crate::identity::Tenant;
use crate::quota::{Account, Hold, Unit};
use crate::repository::{Served, dtype_of};

/// How long a sequence lives without a call, where the configuration does not say: as in the protocol's other servers.
const IDLE_DEFAULT: Duration = Duration::from_secs(1);

/// And at most: what a caller keeps for longer without a call is not a state of the agent's.
const IDLE_MAX: Duration = Duration::from_secs(60 * 60);

/// Sequences of one tenant that are open.
const OPEN_MAX: usize = 1024;

/// Bytes of the states of one sequence.
const STATE_BYTES_MAX: usize = 16 << 20;

/// What a caller named a sequence.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Correlation {
    Number(u64),
    Text(String),
}

/// Where in its sequence a call is.
#[derive(Clone, Debug)]
pub(super) struct Step {
    correlation: Correlation,
    starts: bool,
    ends: bool,
}

fn truth(parameters: &Parameters, name: &str) -> Result<bool, Error> {
    match parameters.get(name).map(|parameter| &parameter.parameter_choice) {
        None => Ok(false),
        Some(Some(ParameterChoice::BoolParam(value))) => Ok(*value),
        Some(_) => {
            Err(Error::new(Reason::BadArgument, format!("parameter '{name}': expected true or false")))
        }
    }
}

impl Step {
    /// What a call's parameters say; none for a call outside of sequences.
    ///
    /// # Errors
    /// Parameters of another type.
    pub(super) fn of(parameters: &Parameters) -> Result<Option<Self>, Error> {
        let correlation = match parameters.get("sequence_id").map(|parameter| &parameter.parameter_choice) {
            None => return Ok(None),
            Some(Some(ParameterChoice::Int64Param(0) | ParameterChoice::Uint64Param(0))) => return Ok(None),
            Some(Some(ParameterChoice::Int64Param(id))) if *id > 0 => Correlation::Number(id.unsigned_abs()),
            Some(Some(ParameterChoice::Uint64Param(id))) => Correlation::Number(*id),
            Some(Some(ParameterChoice::StringParam(id))) if id.is_empty() => return Ok(None),
            Some(Some(ParameterChoice::StringParam(id))) => Correlation::Text(id.clone()),
            Some(_) => {
                let message = "parameter 'sequence_id': expected a number above 0, or a string";
                return Err(Error::new(Reason::BadArgument, message));
            }
        };
        let (starts, ends) = (truth(parameters, "sequence_start")?, truth(parameters, "sequence_end")?);
        Ok(Some(Self { correlation, starts, ends }))
    }
}

/// What is kept of a sequence between two of its calls, by the name of the output it came from. It counts as bytes that
/// the tenant has in flight.
#[derive(Debug, Default)]
pub(super) struct States {
    tensors: HashMap<String, Tensor>,
    counted: Option<Hold>,
}

#[derive(Debug)]
struct Open {
    states: Arc<tokio::sync::Mutex<States>>,
    used: Instant,
    idle_max: Duration,
    /// It ends with the model that was loaded when it began.
    served: Weak<Served>,
}

impl Open {
    /// Whether it goes on: one that is in use is somebody's turn.
    fn goes_on(&self, now: Instant) -> bool {
        let is_alive = self.served.strong_count() > 0 && now - self.used < self.idle_max;
        is_alive || Arc::strong_count(&self.states) > 1
    }
}

type Key = (u64, Correlation);

/// All open sequences.
#[derive(Debug, Default)]
pub(super) struct Sequences(Mutex<HashMap<Tenant, HashMap<Key, Open>>>);

/// The sequences of a loaded model; none for one without.
pub(super) fn rules(served: &Served) -> Option<&ModelSequenceBatching> {
    match &served.config.scheduling_choice {
        Some(SchedulingChoice::SequenceBatching(rules)) => Some(rules),
        _ => None,
    }
}

impl Sequences {
    fn all(&self) -> MutexGuard<'_, HashMap<Tenant, HashMap<Key, Open>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frees what is kept for sequences that are over: those of models that are not loaded any more, and those without
    /// a call for too long, also of tenants that do not come again.
    pub(super) fn sweep(&self) {
        let now = Instant::now();
        self.all().retain(|_, own| {
            own.retain(|_, open| open.goes_on(now));
            !own.is_empty()
        });
    }

    /// The states of a call's sequence, when it is the call's turn.
    ///
    /// # Errors
    /// A call outside of a sequence, one that goes on with a sequence that is not open, or too many that are.
    pub(super) async fn enter(
        &self,
        tenant: &Tenant,
        served: &Arc<Served>,
        subject: &Subject<'_>,
        step: Option<&Step>,
    ) -> Result<OwnedMutexGuard<States>, Error> {
        let model = subject.model;
        let step = step.ok_or_else(|| {
            let what = "must specify a non-zero or non-empty correlation ID";
            subject.wrong(format!("inference request to model '{model}' {what}"))
        })?;
        let idle = rules(served).map_or(0, |rules| rules.max_sequence_idle_microseconds);
        let idle_max = if idle == 0 { IDLE_DEFAULT } else { Duration::from_micros(idle).min(IDLE_MAX) };
        let states = {
            let mut all = self.all();
            let own = all.entry(tenant.clone()).or_default();
            let now = Instant::now();
            own.retain(|_, open| open.goes_on(now));
            let key = (served.id, step.correlation.clone());
            if !step.starts && !own.contains_key(&key) {
                let id = match &step.correlation {
                    Correlation::Number(id) => id.to_string(),
                    Correlation::Text(id) => plain(id),
                };
                let what = format!(
                    "inference request for sequence {id} to model '{model}' must specify the START flag on the first \
                     request of the sequence"
                );
                return Err(subject.wrong(what));
            }
            if own.len() >= OPEN_MAX && !own.contains_key(&key) {
                let (limit, need) = (OPEN_MAX as u64, own.len() as u64 + 1);
                return Err(Error::limit(
                    Reason::QuotaExceeded,
                    "sequences of this tenant",
                    limit,
                    need,
                    "sequences",
                ));
            }
            let open = own.entry(key).or_insert_with(|| {
                let (states, served) = (Arc::default(), Arc::downgrade(served));
                Open { states, used: now, idle_max, served }
            });
            open.used = now;
            Arc::clone(&open.states)
        };
        let mut states = states.lock_owned().await;
        if step.starts {
            *states = States::default();
        }
        Ok(states)
    }

    /// The end of a call: what the sequence keeps, or that it is over.
    pub(super) fn leave(&self, tenant: &Tenant, served: &Served, step: Option<&Step>) {
        let Some(step) = step else { return };
        let mut all = self.all();
        let Some(own) = all.get_mut(tenant) else { return };
        let key = (served.id, step.correlation.clone());
        if step.ends {
            own.remove(&key);
        } else if let Some(open) = own.get_mut(&key) {
            open.used = Instant::now();
        }
        if own.is_empty() {
            all.remove(tenant);
        }
    }
}

impl States {
    /// The tensors of a model that are not the callers', for a call of so many rows.
    ///
    /// # Errors
    /// A configuration that the model does not fit.
    pub(super) fn inputs(
        &self,
        served: &Served,
        step: Option<&Step>,
        rows: usize,
        made: &mut Made<'_>,
    ) -> Result<Vec<(usize, Tensor)>, Error> {
        let (Some(rules), Some(step)) = (rules(served), step) else { return Ok(Vec::new()) };
        let mut inputs = Vec::new();
        for input in &rules.control_input {
            for control in &input.control {
                let count = if served.rows_max > 0 { rows } else { 1 };
                let what = "control tensor for the rows of this call";
                made.claim(what, count.checked_mul(control_bytes(control, step)))?;
                inputs.push((place(served, &input.name)?, control_tensor(served, control, step, rows)?));
            }
        }
        for state in &rules.state {
            let tensor = match self.tensors.get(&state.output_name) {
                Some(kept) => kept.clone(),
                None => zeros(served, state, rows, made)?,
            };
            inputs.push((place(served, &state.input_name)?, tensor));
        }
        Ok(inputs)
    }

    /// Keeps an output for the next call.
    ///
    /// # Errors
    /// States that are larger than they may be, or than the tenant's limit leaves room for.
    pub(super) fn keep(&mut self, account: &Arc<Account>, output: &str, tensor: Tensor) -> Result<(), Error> {
        let others = self.tensors.iter().filter(|(name, _)| *name != output);
        let bytes: usize = others.map(|(_, kept)| kept.data.len()).sum::<usize>() + tensor.data.len();
        if bytes > STATE_BYTES_MAX {
            let (limit, need) = (STATE_BYTES_MAX as u64, bytes as u64);
            return Err(Error::limit(Reason::QuotaExceeded, "states of a sequence", limit, need, "bytes"));
        }
        self.counted = None;
        self.counted = Some(account.hold(Unit::InFlightBytes, bytes as u64)?);
        // A copy: the whole of a batch's output must not stay because of one row of it.
        let data = bytes::Bytes::copy_from_slice(&tensor.data);
        self.tensors.insert(output.into(), Tensor { data, ..tensor });
        Ok(())
    }
}

/// The places of the outputs that a model keeps.
///
/// # Errors
/// One that the model does not have.
pub(super) fn outputs(served: &Served, rules: &ModelSequenceBatching) -> Result<Vec<usize>, Error> {
    let place = |state: &State| {
        let found = served.model.file.outputs.iter().position(|port| port.name == state.output_name);
        found.ok_or_else(|| {
            let name = &state.output_name;
            let message =
                format!("sequence_batching names the output '{name}', which the model does not have");
            Error::new(Reason::BadArgument, message)
        })
    };
    rules.state.iter().map(place).collect()
}

fn place(served: &Served, name: &str) -> Result<usize, Error> {
    let found = served.model.file.inputs.iter().position(|port| port.name == name);
    found.ok_or_else(|| {
        let message = format!("sequence_batching names the input '{name}', which the model does not have");
        Error::new(Reason::BadArgument, message)
    })
}

/// A shape with the batch before it where there is one.
fn with_rows(served: &Served, rows: usize, dims: impl IntoIterator<Item = i64>) -> Vec<i64> {
    let batch = (served.rows_max > 0).then(|| i64::try_from(rows).unwrap_or(i64::MAX));
    batch.into_iter().chain(dims).collect()
}

/// Bytes that [`control_tensor`] makes for a row, at most.
fn control_bytes(control: &Control, step: &Step) -> usize {
    match (control.kind(), &step.correlation) {
        (Kind::ControlSequenceCorrid, Correlation::Text(id)) => size_of::<u32>() + id.len(),
        _ => size_of::<u64>(),
    }
}

/// What a model is told of where its sequence is.
fn control_tensor(served: &Served, control: &Control, step: &Step, rows: usize) -> Result<Tensor, Error> {
    let shape = with_rows(served, rows, [1]);
    let count = if served.rows_max > 0 { rows } else { 1 };
    let is_set = match control.kind() {
        Kind::ControlSequenceStart => step.starts,
        Kind::ControlSequenceEnd => step.ends,
        Kind::ControlSequenceReady => true,
        Kind::ControlSequenceCorrid => return correlation_tensor(control, step, &shape, count),
    };
    let which = usize::from(is_set);
    if let Some(value) = control.fp32_false_true.get(which) {
        return Tensor::new(&shape, &vec![*value; count]);
    }
    if let Some(value) = control.int32_false_true.get(which) {
        return Tensor::new(&shape, &vec![*value; count]);
    }
    let value = control.bool_false_true.get(which).copied().unwrap_or(is_set);
    Ok(Tensor::from_bytes(DType::Bool, &shape, vec![u8::from(value); count].into()))
}

fn correlation_tensor(control: &Control, step: &Step, shape: &[i64], count: usize) -> Result<Tensor, Error> {
    let wrong = |expected: &str| {
        let message = format!("this model's sequences have {expected} as their id");
        Error::new(Reason::BadArgument, message)
    };
    let dtype = dtype_of(control.data_type);
    match (&step.correlation, dtype) {
        (Correlation::Text(id), DType::Bytes) => {
            let data = vaccel_proto::tensor::with_lengths(std::iter::repeat_n(id.as_bytes(), count));
            Ok(Tensor::from_bytes(DType::Bytes, shape, data))
        }
        (Correlation::Number(id), DType::U64) => Tensor::new(shape, &vec![*id; count]),
        (Correlation::Number(id), DType::I64) => {
            let id = i64::try_from(*id).map_err(|_| wrong("a number below 2^63"))?;
            Tensor::new(shape, &vec![id; count])
        }
        (Correlation::Number(id), DType::U32) => {
            let id = u32::try_from(*id).map_err(|_| wrong("a number below 2^32"))?;
            Tensor::new(shape, &vec![id; count])
        }
        (Correlation::Number(id), DType::I32) => {
            let id = i32::try_from(*id).map_err(|_| wrong("a number below 2^31"))?;
            Tensor::new(shape, &vec![id; count])
        }
        (_, DType::Bytes) => Err(wrong("a string")),
        _ => Err(wrong("a number")),
    }
}

/// The state of a sequence that begins.
fn zeros(served: &Served, state: &State, rows: usize, made: &mut Made<'_>) -> Result<Tensor, Error> {
    let initial = state.initial_state.first();
    let dims = initial.map_or(&state.dims, |initial| &initial.dims);
    // A size that is open begins with nothing in it.
    let shape = with_rows(served, rows, dims.iter().map(|dim| (*dim).max(0)));
    let dtype = dtype_of(state.data_type);
    let count = vaccel_proto::tensor::element_count("state", &shape)?;
    let bytes =
        count.checked_mul(dtype.size()).filter(|bytes| *bytes <= STATE_BYTES_MAX && dtype != DType::Bytes);
    let bytes = bytes.ok_or_else(|| {
        let message =
            format!("state '{}': expected numbers of at most {STATE_BYTES_MAX} bytes", state.input_name);
        Error::new(Reason::BadArgument, message)
    })?;
    made.claim("state of a sequence", Some(bytes))?;
    Ok(Tensor::from_bytes(dtype, &shape, vec![0; bytes].into()))
}
