//! Calls of the Open Inference Protocol, on the way of every call.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;
use vaccel_proto::inference::model_repository_parameter::ParameterChoice;
use vaccel_proto::inference::repository_index_response::ModelIndex;
use vaccel_proto::inference::system_shared_memory_status_response::RegionStatus;
use vaccel_proto::inference::{
    ModelConfig, ModelInferRequest, ModelInferResponse, ModelMetadataResponse, ModelRepositoryParameter,
    ModelStatistics, SystemSharedMemoryRegisterRequest,
};
use vaccel_proto::limits::{DEADLINE_MAX, MESSAGE_BYTES_MAX};
use vaccel_proto::v1::ResourceKind;
use vaccel_proto::{Error, Reason};

use super::{Caller, Dispatch, Figures, Measured};
use crate::identity::Tenant;
use crate::infer::{Who, check_name};
use crate::quota::{Account, Unit};
use crate::resource::{Holdings, Resource};
use crate::scheduler::Asker;

/// The operation that the host's rules mean when they speak of runs of models.
const RULED_AS: &str = "model_run";

/// Whose account the agent's own runs are on.
const HOST: &str = ":host";

/// Before the name of a file, in the parameters of a call that brings a model.
const FILE: &str = "file:";

impl Dispatch {
    fn who<'a>(&self, caller: &'a Caller, account: &'a Arc<Account>, deadline: Instant) -> Who<'a> {
        Who { tenant: &caller.tenant, account, deadline, reply_bytes_max: MESSAGE_BYTES_MAX as u64 }
    }

    /// Whether this agent takes work, and is not stopping.
    pub(crate) fn is_ready(&self) -> bool {
        !self.in_flight.are_last.load(Ordering::SeqCst) && self.cold.load(Ordering::SeqCst) == 0
    }

    /// Loads the models that want to be warm, one after the other. One that cannot be loaded holds nobody up.
    pub(super) async fn warm_up(&self) {
        let host = Tenant::new(HOST);
        let account = self.accounts.of(&host);
        for version in self.inference.repository.to_warm() {
            let asker = Asker::new(&account, Instant::now() + DEADLINE_MAX);
            let warmed = match self.inference.choice(&host, &version) {
                Ok(choice) => {
                    self.inference.repository.served(&host, &version, &choice, &asker).await.map(drop)
                }
                Err(error) => Err(error),
            };
            if let Err(error) = warmed {
                tracing::warn!(model = version.name, version = version.number, %error, "not warm");
            }
            self.cold.fetch_sub(1, Ordering::SeqCst);
            self.inference.repository.changed();
        }
        self.cold.store(0, Ordering::SeqCst);
    }

    /// Tells that the health of something may have changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.inference.repository.changes()
    }

    /// Whether a model can be run; none for one that the caller does not see.
    pub(crate) async fn model_health(&self, caller: &Caller, name: &str) -> Option<bool> {
        let repository = &self.inference.repository;
        repository.versions(&caller.tenant, name).ok()?;
        repository.is_ready(&caller.tenant, name, "").await.ok()
    }

    /// Runs a model.
    pub(crate) async fn infer(
        &self,
        caller: &Caller,
        request: ModelInferRequest,
    ) -> Result<ModelInferResponse, Error> {
        self.call(caller, "infer", self.call_deadline, async |account, deadline| {
            self.policies.check(&caller.tenant, RULED_AS)?;
            self.inference.infer(&self.who(caller, account, deadline), request).await
        })
        .await
    }

    /// Inputs and outputs of a model.
    pub(crate) async fn model_metadata(
        &self,
        caller: &Caller,
        name: &str,
        version: &str,
    ) -> Result<ModelMetadataResponse, Error> {
        self.call(caller, "model_metadata", self.call_deadline, async |account, deadline| {
            self.inference.metadata(&self.who(caller, account, deadline), name, version).await
        })
        .await
    }

    /// The whole configuration of a model.
    pub(crate) async fn model_config(
        &self,
        caller: &Caller,
        name: &str,
        version: &str,
    ) -> Result<ModelConfig, Error> {
        self.call(caller, "model_config", self.call_deadline, async |account, deadline| {
            let (_, served) =
                self.inference.served(&self.who(caller, account, deadline), name, version).await?;
            Ok(served.config.clone())
        })
        .await
    }

    /// Whether a model can be run.
    pub(crate) async fn model_ready(
        &self,
        caller: &Caller,
        name: &str,
        version: &str,
    ) -> Result<bool, Error> {
        self.call(caller, "model_ready", self.call_deadline, async |_, _| {
            self.inference.repository.is_ready(&caller.tenant, name, version).await
        })
        .await
    }

    /// What the caller's runs took: of one model, or of all.
    pub(crate) async fn model_statistics(
        &self,
        caller: &Caller,
        name: &str,
        version: &str,
    ) -> Result<Vec<ModelStatistics>, Error> {
        self.call(caller, "model_statistics", self.call_deadline, async |_, _| {
            let repository = &self.inference.repository;
            if name.is_empty() {
                let all = repository.all_stats(&caller.tenant);
                return Ok(all.iter().map(|(name, version, stats)| stats.shown(name, *version)).collect());
            }
            let found = repository.find(&caller.tenant, name, version).await.map_err(|error| match error
                .reason()
            {
                Reason::NotFound => {
                    let name = vaccel_proto::error::shown(name);
                    let message = format!("requested model '{}' is not available", name.trim_matches('"'));
                    Error::new(Reason::BadArgument, message)
                }
                _ => error,
            })?;
            let stats = repository.stats(&caller.tenant, &found);
            Ok(vec![stats.shown(&found.name, found.number)])
        })
        .await
    }

    /// What was counted: for the caller, or where it is an operator for everybody, with what the devices are doing.
    pub(crate) async fn metrics(&self, caller: &Caller) -> Result<Metrics, Error> {
        self.call(caller, "metrics", self.call_deadline, async |account, _| {
            let whose = Some(&caller.tenant).filter(|tenant| !self.policies.is_operator(tenant));
            let models = self.inference.repository.measured(whose);
            let device_bytes = account.used(Unit::DeviceBytes);
            if whose.is_some() {
                return Ok(Metrics { models, device_bytes, ..Metrics::default() });
            }
            // The driver takes its time, and its own when a device is in trouble.
            let cuda = Arc::clone(&self.workshop.engines.cuda);
            let counted = cuda.devices().iter();
            let counted = counted.map(|one| (one.description.name.clone(), one.ledger.used())).collect();
            let devices = tokio::task::spawn_blocking(move || cuda.figures()).await.unwrap_or_default();
            Ok(Metrics { models, device_bytes, counted, devices })
        })
        .await
    }

    /// The models that the caller can use.
    pub(crate) async fn repository_index(&self, caller: &Caller) -> Result<Vec<ModelIndex>, Error> {
        self.call(caller, "repository_index", self.call_deadline, async |_, _| {
            Ok(self.inference.repository.index(&caller.tenant).await)
        })
        .await
    }

    /// Loads a model of the host's, as it is or with the configuration in the parameters, or one whose files are there.
    pub(crate) async fn repository_load(
        &self,
        caller: &Caller,
        name: &str,
        parameters: HashMap<String, ModelRepositoryParameter>,
    ) -> Result<(), Error> {
        self.call(caller, "repository_load", self.call_deadline, async |account, deadline| {
            check_name(name)?;
            let who = self.who(caller, account, deadline);
            let choice = |version: &_| self.inference.choice(&caller.tenant, version);
            let (config, versions) = brought(parameters)?;
            let (repository, asker) = (&self.inference.repository, who.asker());
            if versions.is_empty() {
                return match config {
                    None => repository.load(&caller.tenant, name, choice, &asker).await,
                    Some(config) => {
                        repository.load_configured(&caller.tenant, name, &config, choice, &asker).await
                    }
                };
            }
            let config = config.ok_or_else(|| {
                Error::new(
                    Reason::BadArgument,
                    "'config' is missing: files come with a configuration in JSON",
                )
            })?;
            let mut resources = BTreeMap::new();
            for (number, files) in versions {
                resources.insert(number, self.keep(caller, account, files).await?);
            }
            repository.bring(&caller.tenant, name, &config, resources, choice, &asker).await
        })
        .await
    }

    /// Takes a model out of what the caller can use.
    pub(crate) async fn repository_unload(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        self.call(caller, "repository_unload", self.call_deadline, async |_, _| {
            self.inference.unload(&caller.tenant, name);
            Ok(())
        })
        .await
    }

    /// Stores files as a resource that no session holds.
    async fn keep(
        &self,
        caller: &Caller,
        account: &Arc<Account>,
        files: Vec<(String, Bytes)>,
    ) -> Result<Arc<Resource>, Error> {
        let holdings = Arc::new(Holdings::default());
        self.store.add(&caller.tenant, &holdings, account, ResourceKind::Model, files).await
    }

    /// Registers shared memory of the caller's.
    pub(crate) async fn register_region(
        &self,
        caller: &Caller,
        asked: SystemSharedMemoryRegisterRequest,
    ) -> Result<(), Error> {
        self.call(caller, "register_region", self.call_deadline, async |_, _| {
            let SystemSharedMemoryRegisterRequest { name, key, offset, byte_size } = asked;
            self.inference.regions.register(&caller.tenant, caller.uid, &name, &key, offset, byte_size)
        })
        .await
    }

    /// Lets go of shared memory: one region, or with an empty name all of the caller's.
    pub(crate) async fn unregister_region(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        self.call(caller, "unregister_region", self.call_deadline, async |_, _| {
            self.inference.regions.unregister(&caller.tenant, name);
            Ok(())
        })
        .await
    }

    /// The caller's shared memory.
    pub(crate) async fn regions(
        &self,
        caller: &Caller,
        name: &str,
    ) -> Result<HashMap<String, RegionStatus>, Error> {
        self.call(caller, "regions", self.call_deadline, async |_, _| {
            self.inference.regions.status(&caller.tenant, name)
        })
        .await
    }
}

/// What metrics are made of.
#[derive(Default)]
pub(crate) struct Metrics {
    pub(crate) models: Vec<Measured>,
    /// Bytes of devices that the caller has.
    pub(crate) device_bytes: u64,
    /// For operators: bytes of each device that the agent and all its tenants have.
    pub(crate) counted: Vec<(String, u64)>,
    /// For operators: what one tenant does would show in another's figures.
    pub(crate) devices: Vec<Figures>,
}

/// Files by version.
type Brought = BTreeMap<u64, Vec<(String, Bytes)>>;

/// The configuration and the files in the parameters of a call.
fn brought(
    parameters: HashMap<String, ModelRepositoryParameter>,
) -> Result<(Option<String>, Brought), Error> {
    let (mut config, mut versions) = (None, Brought::new());
    for (name, parameter) in parameters {
        let shown = vaccel_proto::error::shown(&name);
        let wrong = |expected: &str| {
            let message = format!("attempt to load with parameter {shown}: expected {expected}");
            Error::new(Reason::BadArgument, message)
        };
        match (name.as_str(), parameter.parameter_choice) {
            ("config", Some(ParameterChoice::StringParam(text))) => config = Some(text),
            ("config", _) => return Err(wrong("a string, a ModelConfig in JSON")),
            (path, Some(ParameterChoice::BytesParam(content))) if path.starts_with(FILE) => {
                let parts = path[FILE.len()..].split_once('/');
                let parts = parts.and_then(|(version, file)| Some((version.parse::<u64>().ok()?, file)));
                let parts = parts.filter(|(version, file)| *version > 0 && !file.is_empty());
                let (version, file) = parts.ok_or_else(|| wrong("file:VERSION/NAME"))?;
                versions.entry(version).or_default().push((file.to_owned(), content));
            }
            _ => return Err(wrong("config, or file:VERSION/NAME with its bytes")),
        }
    }
    for files in versions.values_mut() {
        files.sort_by(|one, other| one.0.cmp(&other.0));
    }
    Ok((config, versions))
}
