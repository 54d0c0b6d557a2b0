//! The engine without the agent: what a remote call is compared with, in `demo`, tests and benches.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::time::Instant;
use vaccel_proto::limits::DEADLINE_MAX;
use vaccel_proto::v1::{Classification, DType, EngineInfo, SgemmReply, SgemmRequest, Tensor};
use vaccel_proto::{Error, Reason};

use crate::backend::{
    Asked, Choice, Cost, Engines, Model, ModelFile, Origin, Place, Port, RunRules, Sought, identity,
};
use crate::config::{Config, EngineConfig, Settings};
use crate::identity::Tenant;
use crate::ops::{self, Classifier};
use crate::quota::{Account, Accounts};
use crate::scheduler::{Asker, Call, Cancel, Scheduler};

/// A device with a known cost behind the scheduler: what batches come to without sockets and messages.
#[derive(Debug)]
pub struct Device {
    lanes: Scheduler,
    model: Arc<Model>,
    account: Arc<Account>,
}

impl Device {
    /// A device with one lane, whose runs of at most so many rows take so long, and so much longer for each row.
    ///
    /// # Errors
    /// Nothing that depends on the arguments.
    pub fn new(rows_max: usize, run: Duration, row: Duration) -> Result<Self, Error> {
        let port = || Port { name: "x".into(), dtype: DType::F32, shape: Some(vec![None, Some(1)]) };
        let rules = RunRules { rows_max: Some(rows_max), ..RunRules::default() };
        let model = identity(vec![port()], vec![port()], Cost { run, row }, &rules)?;
        let account = account()?;
        Ok(Self { lanes: Scheduler::new(1)?, model, account })
    }

    /// One call of one row; how many calls shared its run.
    ///
    /// # Errors
    /// As any call's.
    pub async fn call(&self) -> Result<usize, Error> {
        let asker = Asker::new(&self.account, Instant::now() + DEADLINE_MAX);
        let inputs = vec![Tensor::from_bytes(DType::F32, &[1, 1], Bytes::from_static(&[0; 4]))];
        let call = Call { inputs, outputs: vec![0], reply_bytes_max: u64::MAX };
        Ok(self.lanes.run_model(&asker, &self.model.batcher, call).await?.spans.calls)
    }
}

/// The account of whoever calls in this process.
fn account() -> Result<Arc<Account>, Error> {
    let limits = Config::new(Settings::default()).map(|config| config.tenant);
    let limits = limits.map_err(|error| Error::new(Reason::BackendFailed, error.to_string()))?;
    Ok(Accounts::new(limits, |_| 1).of(&Tenant::new(":direct")))
}

/// A library that was looked for.
#[derive(Clone, Debug, Serialize)]
pub struct Library {
    /// What it is for.
    pub purpose: &'static str,
    /// Names that serve, best first.
    pub names: &'static [&'static str],
    /// Where it was loaded from.
    pub loaded: Option<String>,
    /// Places where it was not, each with the reason.
    pub refusals: Vec<(String, String)>,
}

impl From<Sought> for Library {
    fn from(sought: Sought) -> Self {
        let Sought { purpose, names, refusals, loaded } = sought;
        Self { purpose, names, loaded, refusals }
    }
}

/// A device beside the processor.
#[derive(Clone, Debug, Serialize)]
pub struct Accelerator {
    /// As sessions name it.
    pub name: String,
    /// As its maker names it.
    pub product: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// What it can do, as CUDA numbers it.
    pub compute_capability: String,
    /// Why it is not used; empty where it can be.
    pub unusable_because: String,
}

/// What was found beside the processor, and what was not.
#[derive(Clone, Debug, Serialize)]
pub struct Accelerators {
    /// Version of the CUDA driver.
    pub driver: Option<String>,
    /// Version of cuBLAS.
    pub cublas: Option<String>,
    /// What was looked for.
    pub libraries: Vec<Library>,
    /// What can be asked for.
    pub devices: Vec<Accelerator>,
    /// Why products or models cannot run on one, with all that was looked for; empty when both can.
    pub missing: Vec<String>,
}

/// The embedded classifier and matrix products, called in this process.
#[derive(Debug)]
pub struct Direct {
    classifier: Classifier,
    engines: Engines,
    place: Place,
}

impl Direct {
    /// Loads the embedded model with the configured engine.
    ///
    /// # Errors
    /// The engine or device the configuration names is absent.
    pub fn new(config: &EngineConfig) -> Result<Self, Error> {
        let engines = Engines::new(config)?;
        let choice = engines.choose(Choice::default(), 0)?;
        let classifier = Classifier::embedded(&engines, &choice)?;
        let place = Place { device: choice.device, account: account()?, room: None };
        Ok(Self { classifier, engines, place })
    }

    /// Labels images as `image_classification` does.
    ///
    /// # Errors
    /// As the operation.
    pub fn classify(&self, images: &[Bytes], top_k: usize) -> Result<Vec<Classification>, Error> {
        self.classifier.classify(images, top_k, &Cancel::default())
    }

    /// What there is to compute on beside the processor, and what is missing. Loads the libraries.
    pub fn accelerators(&self) -> Accelerators {
        let cuda = &self.engines.cuda;
        let mut missing = cuda.missing();
        missing.extend(self.engines.missing_for_models());
        let libraries = cuda.record().into_iter().map(Library::from);
        let devices = cuda.devices().iter().map(|device| {
            let of = &device.description;
            Accelerator {
                name: of.name.clone(),
                product: of.product.clone(),
                memory_bytes: of.bytes,
                compute_capability: format!("{}.{}", of.capability.0, of.capability.1),
                unusable_because: cuda.refusal(device).unwrap_or_default(),
            }
        });
        Accelerators {
            driver: cuda.driver_version().map(str::to_owned),
            cublas: cuda.cublas_version().map(str::to_owned),
            libraries: libraries.collect(),
            devices: devices.collect(),
            missing,
        }
    }

    /// The engines for models, and what they compute on.
    pub fn engines(&self) -> Vec<EngineInfo> {
        self.engines.info()
    }

    /// Multiplies matrices on a device.
    ///
    /// # Errors
    /// As the operation in a session on this device.
    pub fn sgemm_on(&self, device: &str, request: &SgemmRequest) -> Result<SgemmReply, Error> {
        let place = Place { device: device.into(), ..self.place.clone() };
        ops::sgemm(request, &self.engines.blas, &place, &Cancel::default())
    }

    /// Bytes a second between pinned memory and a device, up and down.
    ///
    /// # Errors
    /// `DISABLED` for a device that is absent, `QUOTA_EXCEEDED`, `BACKEND_FAILED`.
    pub fn bandwidths(&self, device: &str) -> Result<[f64; 2], Error> {
        let cuda = &self.engines.cuda;
        cuda.bandwidths(cuda.device(device)?)
    }

    /// How long a product of square matrices takes without the agent: of matrices that are on the device and stay
    /// there, and with the way there and back, from and to pinned memory.
    ///
    /// # Errors
    /// As [`bandwidths`](Self::bandwidths).
    pub fn sgemm_alone(&self, device: &str, side: usize) -> Result<[Duration; 2], Error> {
        let cuda = &self.engines.cuda;
        let alone = cuda.alone(cuda.device(device)?, side)?;
        Ok([alone.resident, alone.pinned])
    }

    /// Multiplies matrices as `sgemm` does, of sizes that no call could carry, too.
    ///
    /// # Errors
    /// As the operation.
    pub fn sgemm(&self, request: &SgemmRequest) -> Result<SgemmReply, Error> {
        ops::sgemm(request, &self.engines.blas, &self.place, &Cancel::default())
    }
}

/// A network in this process, on the engine that an agent would take.
#[derive(Debug)]
pub struct Network(Model);

impl Network {
    /// Loads an ONNX model.
    ///
    /// # Errors
    /// The engine that the configuration names is absent, or refuses the model.
    pub fn load(config: &EngineConfig, model: Bytes) -> Result<Self, Error> {
        let engines = Engines::new(config)?;
        let choice = engines.choose(Choice::default(), 0)?;
        let file = ModelFile::scan(&[("model.onnx", model)], Origin::Host)?;
        let asked = Asked { rules: &RunRules::default(), account: None };
        engines.load(&choice, file, &asked, &Cancel::default()).map(Self)
    }

    /// Its first output for its only input.
    ///
    /// # Errors
    /// What the run ends in.
    pub fn run(&self, input: Tensor) -> Result<Tensor, Error> {
        let mut outputs = self.0.program.run(vec![input], &[0], u64::MAX, &Cancel::default())?;
        Ok(outputs.remove(0))
    }
}
