//! Operations: one file each, one row each.
//!
//! To add one: a message pair and an arm in each `oneof` of `ops.proto`, a file here, a row in [`ops!`]. Without the
//! row the match in `run` does not cover the new arm and the crate does not compile.

mod image_classification;
mod image_input;
mod model_run;
mod noop;

pub(crate) use image_classification::Classifier;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use vaccel_proto::v1::{OperationInfo, ResourceKind, run_reply::Outcome, run_request::Op};
use vaccel_proto::{Error, Reason, v1};

use crate::backend::{Engines, LoadedModels, Model, NOOP};
use crate::quota::Account;
use crate::resource::Resource;
use crate::scheduler::{Cancel, Scheduler, Timed};
use crate::session::Session;

/// The digit classifier of the agent itself: 40 KB, made by `agent/models/train_digits.py`.
static EMBEDDED_MODEL: &[u8] = include_bytes!("../../models/digits.onnx");
const EMBEDDED_NAME: &str = "digits.onnx";

/// What an operation is: its request knows how to check and run itself.
pub(crate) trait Operation: Sized {
    /// Name in policies, logs and documents.
    const NAME: &'static str;
    /// One line for people.
    const SUMMARY: &'static str;
    /// What comes back.
    type Reply;

    /// Checks everything that needs nothing but the request.
    fn validate(&self) -> Result<(), Error>;

    /// What the `noop` engine answers, which computes nothing: the outputs of vAccel's noop plugin.
    fn dummy(self, context: &Context<'_>) -> Result<Self::Reply, Error>;

    /// Runs it.
    fn execute(self, context: &Context<'_>)
    -> impl Future<Output = Result<Timed<Self::Reply>, Error>> + Send;
}

/// The list that everything about operations is made from.
macro_rules! ops {
    ($($variant:ident: $request:ident,)*) => {
        /// All operations.
        pub(crate) fn list() -> Vec<OperationInfo> {
            vec![$(OperationInfo {
                name: <v1::$request as Operation>::NAME.into(),
                summary: <v1::$request as Operation>::SUMMARY.into(),
            },)*]
        }

        /// Name of a request's operation.
        pub(crate) fn name(op: &Op) -> &'static str {
            match op { $(Op::$variant(_) => <v1::$request as Operation>::NAME,)* }
        }

        /// Checks and runs a request.
        pub(crate) async fn run(op: Op, context: &Context<'_>) -> Result<Timed<Outcome>, Error> {
            match op { $(Op::$variant(request) => {
                request.validate()?;
                let reply = if context.session.choice.engine == NOOP {
                    Timed::instant(request.dummy(context)?)
                } else {
                    request.execute(context).await?
                };
                Ok(reply.map(Outcome::$variant))
            })* }
        }
    };
}

ops! {
    Noop: NoopRequest,
    ImageClassification: ImageClassificationRequest,
    ModelRun: ModelRunRequest,
}

/// What operations work with.
#[derive(Debug)]
pub(crate) struct Workshop {
    pub(crate) engines: Engines,
    pub(crate) scheduler: Scheduler,
    pub(crate) load_deadline: Duration,
    embedded: LoadedModels,
}

impl Workshop {
    pub(crate) fn new(engines: Engines, scheduler: Scheduler, load_deadline: Duration) -> Self {
        Self { engines, scheduler, load_deadline, embedded: LoadedModels::default() }
    }
}

/// One call, as its operation sees it.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) workshop: &'a Arc<Workshop>,
    pub(crate) session: &'a Session,
    pub(crate) account: &'a Arc<Account>,
    pub(crate) deadline: Instant,
}

impl Context<'_> {
    /// Runs work on a loaded model, when it is the call's turn there.
    pub(crate) async fn compute_on<T: Send + 'static>(
        &self,
        model: &Arc<Model>,
        work: impl FnOnce(&Cancel) -> Result<T, Error> + Send + 'static,
    ) -> Result<Timed<T>, Error> {
        let arrived = Instant::now();
        let _turn = model.turn().await?;
        let waited = arrived.elapsed();
        let mut done = self.workshop.scheduler.run(self.account, self.deadline, work).await?;
        done.queue += waited;
        Ok(done)
    }

    /// A resource of the session that is of a kind.
    pub(crate) fn resource(&self, path: &str, id: &str, kind: ResourceKind) -> Result<Arc<Resource>, Error> {
        let resource = self.session.holdings.resource(id)?;
        if resource.kind == kind {
            return Ok(resource);
        }
        let name = |kind: ResourceKind| kind.as_str_name().trim_start_matches("RESOURCE_KIND_");
        Err(Error::field(path, format!("a resource of kind {}", name(kind)), name(resource.kind)))
    }

    /// The loaded model of a resource of the session, or with an empty name the embedded one. The first use loads it;
    /// how long that took is in the result.
    pub(crate) async fn model(&self, resource: &str) -> Result<(Arc<Model>, Duration), Error> {
        let choice = &self.session.choice;
        let (slot, files) = if resource.is_empty() {
            let files = vec![(EMBEDDED_NAME.to_owned(), Bytes::from_static(EMBEDDED_MODEL))];
            (self.workshop.embedded.slot(choice), files)
        } else {
            let resource = self.resource("model", resource, ResourceKind::Model)?;
            let files =
                resource.files.iter().map(|(file, blob)| (file.name.clone(), blob.data.clone())).collect();
            (resource.loaded.slot(choice), files)
        };
        if let Some(model) = slot.get() {
            return Ok((Arc::clone(model), Duration::ZERO));
        }
        let begun = Instant::now();
        let model = slot.get_or_try_init(|| self.load(files)).await?;
        Ok((Arc::clone(model), begun.elapsed()))
    }

    async fn load(&self, files: Vec<(String, Bytes)>) -> Result<Arc<Model>, Error> {
        let deadline = self.deadline.min(Instant::now() + self.workshop.load_deadline);
        let (workshop, choice) = (Arc::clone(self.workshop), self.session.choice.clone());
        let loaded = self.workshop.scheduler.run(self.account, deadline, move |cancel| {
            let files: Vec<(&str, Bytes)> =
                files.iter().map(|(name, data)| (name.as_str(), data.clone())).collect();
            workshop.engines.load(&choice, &files, cancel)
        });
        let model = loaded.await.map_err(|error| match error.reason() {
            Reason::Deadline => Error::new(Reason::Deadline, format!("loading the model: {error}")),
            _ => error,
        })?;
        Ok(Arc::new(model.value))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_unique_and_described() {
        let operations = super::list();
        for (index, operation) in operations.iter().enumerate() {
            assert!(!operation.summary.is_empty(), "{}", operation.name);
            assert!(
                operations[..index].iter().all(|other| other.name != operation.name),
                "{}",
                operation.name
            );
        }
    }
}
