//! The engine without the agent: what a remote call is compared with, in `demo`, tests and benches.

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::v1::Classification;

use crate::backend::{Choice, Engines};
use crate::config::EngineConfig;
use crate::ops::Classifier;
use crate::scheduler::Cancel;

/// The embedded classifier, called in this process.
#[derive(Debug)]
pub struct Direct(Classifier);

impl Direct {
    /// Loads the embedded model with the configured engine.
    ///
    /// # Errors
    /// The engine or device the configuration names is absent.
    pub fn new(config: &EngineConfig) -> Result<Self, Error> {
        let engines = Engines::new(config)?;
        let choice = engines.choose(Choice::default(), 0)?;
        Classifier::embedded(&engines, &choice).map(Self)
    }

    /// Labels images as `image_classification` does.
    ///
    /// # Errors
    /// As the operation.
    pub fn classify(&self, images: &[Bytes], top_k: usize) -> Result<Vec<Classification>, Error> {
        self.0.classify(images, top_k, &Cancel::default())
    }
}
