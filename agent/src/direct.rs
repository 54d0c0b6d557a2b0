//! The engine without the agent: what a remote call is compared with, in `demo`, tests and benches.

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::v1::{Classification, SgemmReply, SgemmRequest};

use crate::backend::{Choice, Engines};
use crate::config::EngineConfig;
use crate::ops::{self, Classifier};
use crate::scheduler::Cancel;

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
