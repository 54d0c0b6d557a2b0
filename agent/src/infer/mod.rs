//! Runs of models by name, as the Open Inference Protocol has them, for every door that speaks it.
//!
//! A request names a model, its version and its tensors; `tensors` checks them against the model and puts them in its
//! order, `regions` finds those in shared memory. What runs is the scheduler's matter, with all other work. Codes and
//! messages are those that clients of the protocol know; where other servers let nonsense pass (sizes below 0, more raw
//! contents than inputs), it is refused.

mod cache;
mod regions;
mod sequences;
mod tensors;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use vaccel_proto::inference::model_config::SchedulingChoice;
use vaccel_proto::inference::model_infer_response::InferOutputTensor;
use vaccel_proto::inference::model_metadata_response::TensorMetadata;
use vaccel_proto::inference::{
    InferParameter, ModelConfig, ModelInferRequest, ModelInferResponse, ModelMetadataResponse,
    ModelQueuePolicy, infer_parameter::ParameterChoice,
};
use vaccel_proto::limits::NAME_BYTES_MAX;
use vaccel_proto::{Error, Reason};

use crate::aside::aside;
use crate::backend::{Choice, Workshop};
use crate::identity::Tenant;
use crate::policy::Policies;
use crate::quota::Account;
use crate::repository::{Failure, Repository, Served, Stats, Tensors, Version, type_name};
use crate::scheduler::{Asker, Call, PRIORITY_DEFAULT};
use cache::Cache;
use regions::{Elsewhere, Made};
use sequences::{Sequences, Step};
use tensors::{Parameters, Subject, Wanted, number, plain};

pub(crate) use regions::Regions;

/// Who calls.
#[derive(Debug)]
pub(crate) struct Who<'a> {
    pub(crate) tenant: &'a Tenant,
    pub(crate) account: &'a Arc<Account>,
    pub(crate) deadline: Instant,
    /// Bytes of the longest response that can be sent.
    pub(crate) reply_bytes_max: u64,
}

impl Who<'_> {
    pub(crate) fn asker(&self) -> Asker {
        Asker::new(self.account, self.deadline)
    }
}

/// Everything that runs of models by name need.
#[derive(Debug)]
pub(crate) struct Inference {
    pub(crate) repository: Arc<Repository>,
    pub(crate) regions: Regions,
    cache: Cache,
    sequences: Sequences,
    workshop: Arc<Workshop>,
    policies: Arc<Policies>,
}

impl Inference {
    pub(crate) fn new(repository: Arc<Repository>, workshop: Arc<Workshop>, policies: Arc<Policies>) -> Self {
        Self {
            repository,
            regions: Regions::default(),
            cache: Cache::default(),
            sequences: Sequences::default(),
            workshop,
            policies,
        }
    }

    /// Engine and device that a tenant's runs of a version get.
    ///
    /// # Errors
    /// `DISABLED` when the configuration names what is absent, or the host's policy gives the tenant another.
    pub(crate) fn choice(&self, tenant: &Tenant, version: &Version) -> Result<Choice, Error> {
        self.workshop.engines.choose(self.policies.wish(tenant, version.wish())?, 0)
    }

    /// A version, loaded.
    ///
    /// # Errors
    /// `NOT_FOUND`, and why it cannot be loaded.
    pub(crate) async fn served(
        &self,
        who: &Who<'_>,
        name: &str,
        version: &str,
    ) -> Result<(Arc<Version>, Arc<Served>), Error> {
        let version = self.repository.find(who.tenant, name, version).await?;
        let choice = self.choice(who.tenant, &version)?;
        let served = self.repository.served(who.tenant, &version, &choice, &who.asker()).await?;
        Ok((version, served))
    }

    /// One run.
    ///
    /// # Errors
    /// What does not fit the model, in the protocol's words; `OVERLOADED`, `DEADLINE`, and what the run ends in.
    pub(crate) async fn infer(
        &self,
        who: &Who<'_>,
        request: ModelInferRequest,
    ) -> Result<ModelInferResponse, Error> {
        let begun = Instant::now();
        let version = self.repository.find(who.tenant, &request.model_name, &request.model_version).await?;
        let counting = Counting::new(self.repository.stats(who.tenant, &version), begun);
        match self.run(who, &version, request, begun, &counting.stats).await {
            Ok(response) => {
                counting.counted();
                Ok(response)
            }
            Err(error) => {
                counting.failed(error.reason());
                Err(error)
            }
        }
    }

    async fn run(
        &self,
        who: &Who<'_>,
        version: &Arc<Version>,
        request: ModelInferRequest,
        begun: Instant,
        stats: &Stats,
    ) -> Result<ModelInferResponse, Error> {
        let ModelInferRequest { model_name, id, parameters, inputs, outputs, raw_input_contents, .. } =
            request;
        check_parameters(&parameters)?;
        let choice = self.choice(who.tenant, version)?;
        let served = self.repository.served(who.tenant, version, &choice, &who.asker()).await?;
        let subject = Subject { id: &id, model: &model_name };
        let mut made = Made::new(who.account);
        let elsewhere = Elsewhere { regions: &self.regions, tenant: who.tenant, made: &mut made };
        let (mut inputs, rows) =
            tensors::inputs(&subject, &served, inputs, raw_input_contents, elsewhere).await?;
        let wanted = tensors::outputs(&subject, &served, &outputs)?;
        let mut places: Vec<usize> = wanted.iter().map(|one| served.outputs[one.index].place).collect();
        let step = Step::of(&parameters)?;
        let mut sequence = None;
        if let Some(rules) = sequences::rules(&served) {
            let states = self.sequences.enter(who.tenant, &served, &subject, step.as_ref()).await?;
            for (place, tensor) in states.inputs(&served, step.as_ref(), rows, &mut made)? {
                inputs[place] = Some(tensor);
            }
            places.extend(sequences::outputs(&served, rules)?);
            sequence = Some((rules, states));
        }
        let inputs = inputs.into_iter().flatten().collect();
        let elsewhere = wanted.iter().filter_map(|one| one.place.as_ref()).map(|place| place.bytes);
        let elsewhere = elsewhere.fold(0, u64::saturating_add);
        let reply_bytes_max = made.room(who.reply_bytes_max, elsewhere);
        let call = Call { inputs, outputs: places, reply_bytes_max };
        let key = (served.is_cached() && sequence.is_none()).then(|| cache::key(who.tenant, &served, &call));
        if let Some(answer) = key.as_ref().and_then(|key| self.cache.get(key)) {
            let response = self.respond(who, &served, version.number, &wanted, answer).await?;
            stats.hit(begun.elapsed());
            return Ok(ModelInferResponse { id, model_name, ..response });
        }
        let asker = asker(who, &served.config, &parameters, begun)?;
        let lanes = served.lanes.as_ref().unwrap_or(&self.workshop.scheduler);
        let done = lanes.run_model(&asker, &served.model.batcher, call).await;
        let done = done.map_err(|error| subject.overloaded(error))?;
        if let Some(key) = key {
            let begun = Instant::now();
            self.cache.put(key, &done.value);
            stats.missed(begun.elapsed());
        }
        let mut values = done.value;
        if let Some((rules, mut states)) = sequence {
            let kept = values.split_off(wanted.len());
            for (state, tensor) in rules.state.iter().zip(kept) {
                states.keep(who.account, &state.output_name, tensor)?;
            }
            drop(states);
            self.sequences.leave(who.tenant, &served, step.as_ref());
        }
        let response = self.respond(who, &served, version.number, &wanted, values).await?;
        let mut spans = done.spans;
        if spans.calls == 1 {
            spans.rows = rows;
        }
        stats.succeeded(rows, &spans, begun.elapsed());
        Ok(ModelInferResponse { id, model_name, ..response })
    }

    async fn respond(
        &self,
        who: &Who<'_>,
        served: &Arc<Served>,
        version: u64,
        wanted: &[Wanted],
        values: Vec<vaccel_proto::v1::Tensor>,
    ) -> Result<ModelInferResponse, Error> {
        let mut outputs = Vec::with_capacity(wanted.len());
        let mut raw = Vec::with_capacity(wanted.len());
        for (wanted, mut value) in wanted.iter().zip(values) {
            let (spec, bytes) = (&served.outputs[wanted.index], value.data.len());
            if let Some(classes) = wanted.classes {
                let (served, index) = (Arc::clone(served), wanted.index);
                let classify = move || {
                    let labels = &served.outputs[index].labels;
                    tensors::classify(&value, labels, classes, served.rows_max > 0)
                };
                value = aside(bytes, classify).await?;
            }
            let mut parameters = Parameters::new();
            let datatype = type_name(value.dtype()).to_owned();
            let data = match &wanted.place {
                None => value.data,
                Some(place) => {
                    let bytes = value.data.len() as u64;
                    self.regions.write(who.tenant, place, &spec.name, value.data).await?;
                    parameters = where_it_is(&place.region, place.offset, bytes);
                    Bytes::new()
                }
            };
            raw.push(data);
            outputs.push(InferOutputTensor {
                name: spec.name.clone(),
                datatype,
                shape: value.shape,
                parameters,
                contents: None,
            });
        }
        let model_version = version.to_string();
        Ok(ModelInferResponse {
            model_version,
            outputs,
            raw_output_contents: raw,
            ..ModelInferResponse::default()
        })
    }

    /// Takes a model out of what a tenant can use, with the sequences that it has there.
    pub(crate) fn unload(&self, tenant: &Tenant, name: &str) {
        self.repository.unload(tenant, name);
        self.sequences.sweep();
    }

    /// Frees what sequences keep that are over.
    pub(crate) fn sweep(&self) {
        self.sequences.sweep();
    }

    /// A model's inputs and outputs.
    ///
    /// # Errors
    /// As [`served`](Self::served).
    pub(crate) async fn metadata(
        &self,
        who: &Who<'_>,
        name: &str,
        version: &str,
    ) -> Result<ModelMetadataResponse, Error> {
        let (_, served) = self.served(who, name, version).await?;
        let versions = self.repository.versions(who.tenant, name)?;
        let tensors = |tensors: &[Tensors]| {
            let row = |one: &Tensors| TensorMetadata {
                name: one.name.clone(),
                datatype: type_name(one.dtype).into(),
                shape: one.dims.clone(),
            };
            tensors.iter().map(row).collect()
        };
        let platform =
            if served.config.platform.is_empty() { &served.config.backend } else { &served.config.platform };
        Ok(ModelMetadataResponse {
            name: name.into(),
            versions: versions.iter().map(ToString::to_string).collect(),
            platform: platform.clone(),
            inputs: tensors(&served.inputs),
            outputs: tensors(&served.outputs),
            properties: served.model.file.metadata.clone().into_iter().collect(),
        })
    }
}

/// Counts a call's end, also when its caller leaves.
struct Counting {
    stats: Arc<Stats>,
    begun: Instant,
    is_counted: bool,
}

impl Counting {
    fn new(stats: Arc<Stats>, begun: Instant) -> Self {
        stats.begun();
        Self { stats, begun, is_counted: false }
    }

    fn counted(mut self) {
        self.is_counted = true;
    }

    fn failed(mut self, reason: Reason) {
        self.is_counted = true;
        let why = match reason {
            Reason::Overloaded | Reason::QuotaExceeded | Reason::ShuttingDown => Failure::Rejected,
            Reason::Cancelled | Reason::Deadline => Failure::Canceled,
            Reason::BackendFailed => Failure::Backend,
            _ => Failure::Other,
        };
        self.stats.failed(why, self.begun.elapsed());
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.stats.ended();
        if !self.is_counted {
            self.stats.failed(Failure::Canceled, self.begun.elapsed());
        }
    }
}

/// Parameters that this protocol keeps for servers are refused where they are not known: they would change the result.
fn check_parameters(parameters: &Parameters) -> Result<(), Error> {
    const KNOWN: [&str; 1] = ["triton_enable_empty_final_response"];
    let reserved =
        parameters.keys().find(|name| name.starts_with("triton_") && !KNOWN.contains(&name.as_str()));
    match reserved {
        None => Ok(()),
        Some(name) => {
            let message = format!(
                "parameter keys starting with 'triton_' are reserved; '{}' is not known",
                plain(name)
            );
            Err(Error::new(Reason::BadArgument, message))
        }
    }
}

/// How a call waits, by its parameters and the model's configuration.
fn asker(
    who: &Who<'_>,
    config: &ModelConfig,
    parameters: &Parameters,
    begun: Instant,
) -> Result<Asker, Error> {
    let asked = number(parameters, "priority")?.filter(|priority| *priority > 0);
    let mut timeout = number(parameters, "timeout")?.filter(|micros| *micros > 0);
    let (mut standard, mut policy) = (None, ModelQueuePolicy::default());
    if let Some(SchedulingChoice::DynamicBatching(dynamic)) = &config.scheduling_choice {
        standard = Some(dynamic.default_priority_level).filter(|level| *level > 0);
        let level = asked.or(standard).unwrap_or(0);
        let own = dynamic.priority_queue_policy.get(&level).or(dynamic.default_queue_policy.as_ref());
        policy = own.copied().unwrap_or_default();
    }
    let given = Some(policy.default_timeout_microseconds).filter(|micros| *micros > 0);
    timeout = match timeout.filter(|_| policy.allow_timeout_override) {
        // A caller can only make it shorter.
        Some(asked) => Some(given.map_or(asked, |given| given.min(asked))),
        None => given,
    };
    Ok(Asker {
        priority: asked.or(standard).unwrap_or(PRIORITY_DEFAULT),
        start_by: timeout.map(|micros| begun + Duration::from_micros(micros)),
        queue_max: usize::try_from(policy.max_queue_size).ok().filter(|size| *size > 0),
        ..who.asker()
    })
}

/// Where an output is, for its caller.
fn where_it_is(region: &str, offset: u64, bytes: u64) -> Parameters {
    let number = |value: u64| ParameterChoice::Int64Param(i64::try_from(value).unwrap_or(i64::MAX));
    let mut named = vec![
        (regions::REGION, ParameterChoice::StringParam(region.into())),
        ("shared_memory_byte_size", number(bytes)),
    ];
    if offset > 0 {
        named.push(("shared_memory_offset", number(offset)));
    }
    let parameter =
        |(name, choice): (&str, _)| (name.to_owned(), InferParameter { parameter_choice: Some(choice) });
    named.into_iter().map(parameter).collect()
}

/// Names that callers give to models.
///
/// # Errors
/// `BAD_ARGUMENT` for one that cannot be.
pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    let is_name = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with('.')
        && !name.contains(['/', '\\', '\0']);
    if is_name {
        return Ok(());
    }
    let message = format!(
        "expected a model's name of 1 to {NAME_BYTES_MAX} bytes without slashes, got '{}'",
        plain(name)
    );
    Err(Error::new(Reason::BadArgument, message))
}
