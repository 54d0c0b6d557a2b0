//! Where models are loaded and run: the engines, and the lanes they compute on.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use vaccel_proto::{Error, Reason};

use super::{Asked, Choice, Engines, LoadedModels, Model, ModelFile, Origin};
use crate::scheduler::{Asker, Cancel, Scheduler};

/// Engines and lanes.
#[derive(Debug)]
pub(crate) struct Workshop {
    pub(crate) engines: Engines,
    pub(crate) scheduler: Scheduler,
    load_deadline: Duration,
    /// What was made of the agent's own model.
    pub(crate) embedded: LoadedModels,
}

/// A file of a model, read when it is loaded.
pub(crate) type Reader = Box<dyn FnOnce(&Cancel) -> Result<Bytes, Error> + Send>;

/// What is known of a model's runs beside its file.
#[derive(Clone, Debug, Default)]
pub(crate) struct RunRules {
    /// Runs that may go on at the same time, where the engine can do more.
    pub(crate) parallel: Option<usize>,
    /// Rows of one run; 0 for a model without. Where it is not said, the file says whether there are any.
    pub(crate) rows_max: Option<usize>,
    /// Whether rows of several tenants may share a run.
    pub(crate) mixes_tenants: bool,
    /// How long an incomplete batch gives way to other work.
    pub(crate) delay: Duration,
}

/// A model to load.
pub(crate) struct Load {
    pub(crate) choice: Choice,
    pub(crate) origin: Origin,
    pub(crate) rules: RunRules,
    pub(crate) files: Vec<(String, Reader)>,
}

impl Workshop {
    pub(crate) fn new(engines: Engines, scheduler: Scheduler, load_deadline: Duration) -> Self {
        Self { engines, scheduler, load_deadline, embedded: LoadedModels::default() }
    }

    /// Loads a model on a lane.
    ///
    /// # Errors
    /// `MODEL_REJECTED` from the scan or the engine, `DISABLED` when the engine cannot be loaded, `DEADLINE`, and what
    /// reading a file ends in.
    pub(crate) async fn load(self: &Arc<Self>, asker: &Asker, load: Load) -> Result<Arc<Model>, Error> {
        let asker =
            Asker { deadline: asker.deadline.min(Instant::now() + self.load_deadline), ..asker.clone() };
        let workshop = Arc::clone(self);
        let account = (load.origin == Origin::Guest).then(|| Arc::clone(&asker.account));
        let loaded = self.scheduler.run(&asker, move |cancel| {
            let Load { choice, origin, rules, files } = load;
            let read = |(name, read): (String, Reader)| Ok((name, read(cancel)?));
            let files = files.into_iter().map(read).collect::<Result<Vec<_>, Error>>()?;
            let files: Vec<(&str, Bytes)> =
                files.iter().map(|(name, data)| (name.as_str(), data.clone())).collect();
            let file = ModelFile::scan(&files, origin)?;
            let asked = Asked { rules: &rules, account: account.as_ref() };
            workshop.engines.load(&choice, file, &asked, cancel)
        });
        let model = loaded.await.map_err(|error| match error.reason() {
            Reason::Deadline => Error::new(Reason::Deadline, format!("loading the model: {error}")),
            _ => error,
        })?;
        Ok(Arc::new(model.value))
    }
}
