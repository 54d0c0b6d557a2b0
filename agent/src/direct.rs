//! The engine without the agent: what a remote call is compared with, in `demo`, tests and benches.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use vaccel_proto::limits::DEADLINE_MAX;
use vaccel_proto::v1::{Classification, DType, SgemmReply, SgemmRequest, Tensor};
use vaccel_proto::{Error, Reason};

use crate::backend::{Choice, Cost, Engines, Model, ModelFile, Origin, Port, RunRules, identity};
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
        let limits = Config::new(Settings::default()).map(|config| config.tenant);
        let limits = limits.map_err(|error| Error::new(Reason::BackendFailed, error.to_string()))?;
        let account = Accounts::new(limits, |_| 1).of(&Tenant::new(":direct"));
        Ok(Self { lanes: Scheduler::new(1), model, account })
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

/// The embedded classifier and matrix products, called in this process.
#[derive(Debug)]
pub struct Direct {
    classifier: Classifier,
    engines: Engines,
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
        Ok(Self { classifier, engines })
    }

    /// Labels images as `image_classification` does.
    ///
    /// # Errors
    /// As the operation.
    pub fn classify(&self, images: &[Bytes], top_k: usize) -> Result<Vec<Classification>, Error> {
        self.classifier.classify(images, top_k, &Cancel::default())
    }

    /// Multiplies matrices as `sgemm` does, of sizes that no call could carry, too.
    ///
    /// # Errors
    /// As the operation.
    pub fn sgemm(&self, request: &SgemmRequest) -> Result<SgemmReply, Error> {
        ops::sgemm(request, &self.engines.blas, &Cancel::default())
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
        engines.load(&choice, file, &RunRules::default(), &Cancel::default()).map(Self)
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
