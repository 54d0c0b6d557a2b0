//! Operations: one file each (or one for a family of them), one row each.
//!
//! To add one: a message pair and an arm in each `oneof` of `ops.proto`, a file here, a row in [`ops!`]. Without the
//! row the match in `run` does not cover the new arm and the crate does not compile.

mod arguments;
mod exec;
mod families;
mod fpga_arraycopy;
mod fpga_mmult;
mod fpga_parallel;
mod fpga_vectoradd;
mod genop;
mod image_classification;
mod image_depth;
mod image_detection;
mod image_pose;
mod image_segmentation;
mod mbench;
mod minmax;
mod model_run;
mod noop;
mod opencv;
mod pixels;
mod ports;
mod sgemm;
mod torch_sgemm;
mod vision;
pub(crate) mod widths;

pub(crate) use image_classification::Classifier;
pub(crate) use sgemm::compute as sgemm;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use vaccel_proto::v1::{
    NamedTensor, OperationInfo, ResourceKind, Tensor, run_reply::Outcome, run_request::Op,
};
use vaccel_proto::{Error, Reason, v1};

use crate::backend::{Choice, Load, Model, NOOP, Origin, Place, Reader, RunRules, Workshop};
use crate::identity::Tenant;
use crate::quota::{Account, Unit};
use crate::repository::Repository;
use crate::resource::{Resource, Store};
use crate::scheduler::{Asker, Call, Cancel, Timed};
use crate::session::Session;
use crate::shared::Room;

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

    /// Bytes of the tensors that the reply will have, as far as a valid request tells: too many are refused before they
    /// are computed.
    fn reply_bytes(&self) -> u64 {
        0
    }

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

        /// Name of a request's operation; of a generic one, of what it means.
        pub(crate) fn name(op: &Op) -> &'static str {
            if let Op::Genop(request) = op
                && let Some(meant) = genop::meant(request)
            {
                return meant;
            }
            match op { $(Op::$variant(_) => <v1::$request as Operation>::NAME,)* }
        }

        /// What the `noop` engine answers to a request.
        fn dummy(op: Op, context: &Context<'_>) -> Result<Outcome, Error> {
            match op { $(Op::$variant(request) => {
                request.validate()?;
                context.check_reply(request.reply_bytes())?;
                request.dummy(context).map(Outcome::$variant)
            })* }
        }

        /// Checks and runs a request.
        pub(crate) async fn run(op: Op, context: &Context<'_>) -> Result<Timed<Outcome>, Error> {
            if context.session.choice.engine == NOOP {
                return dummy(op, context).map(Timed::instant);
            }
            match op { $(Op::$variant(request) => {
                request.validate()?;
                context.check_reply(request.reply_bytes())?;
                // In a place of its own: what calls carry with them has not the size of the largest of all.
                Ok(Box::pin(request.execute(context)).await?.map(Outcome::$variant))
            })* }
        }
    };
}

ops! {
    Noop: NoopRequest,
    ImageClassification: ImageClassificationRequest,
    ModelRun: ModelRunRequest,
    Sgemm: SgemmRequest,
    TorchSgemm: TorchSgemmRequest,
    Minmax: MinmaxRequest,
    FpgaArraycopy: FpgaArraycopyRequest,
    FpgaMmult: FpgaMmultRequest,
    FpgaParallel: FpgaParallelRequest,
    FpgaVectoradd: FpgaVectoraddRequest,
    Opencv: OpencvRequest,
    Mbench: MbenchRequest,
    TfModelLoad: TfModelLoadRequest,
    TfModelUnload: TfModelUnloadRequest,
    TfModelRun: TfModelRunRequest,
    TfliteModelLoad: TfliteModelLoadRequest,
    TfliteModelUnload: TfliteModelUnloadRequest,
    TfliteModelRun: TfliteModelRunRequest,
    TorchModelLoad: TorchModelLoadRequest,
    TorchModelRun: TorchModelRunRequest,
    TorchModelUnload: TorchModelUnloadRequest,
    Genop: GenopRequest,
    ImageDetection: ImageDetectionRequest,
    ImageSegmentation: ImageSegmentationRequest,
    ImagePose: ImagePoseRequest,
    ImageDepth: ImageDepthRequest,
    Exec: ExecRequest,
    ExecWithResource: ExecWithResourceRequest,
}

/// Whether an operation, by its name, runs code that the guest brings.
pub(crate) fn brings_code(name: &str) -> bool {
    [v1::ExecRequest::NAME, v1::ExecWithResourceRequest::NAME].contains(&name)
}

/// One call, as its operation sees it.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) workshop: &'a Arc<Workshop>,
    pub(crate) repository: &'a Arc<Repository>,
    pub(crate) store: &'a Store,
    pub(crate) tenant: &'a Tenant,
    pub(crate) session: &'a Arc<Session>,
    pub(crate) account: &'a Arc<Account>,
    pub(crate) deadline: Instant,
    /// Bytes of the longest reply that can be sent.
    pub(crate) reply_bytes_max: u64,
    /// The memory that the caller shares, if the call's tensors lie there.
    pub(crate) room: Option<&'a Arc<Room>>,
    /// Whether libraries of the tenant's may run.
    pub(crate) may_bring_code: bool,
}

impl Context<'_> {
    /// Who asks the scheduler.
    pub(crate) fn asker(&self) -> Asker {
        Asker::new(self.account, self.deadline)
    }

    /// Where its products are computed.
    fn place(&self) -> Place {
        let (device, account) = (self.session.choice.device.clone(), Arc::clone(self.account));
        Place { device, account, room: self.room.cloned() }
    }

    /// Runs work on a loaded model, when it is the call's turn there.
    pub(crate) async fn compute_on<T: Send + 'static>(
        &self,
        model: &Model,
        work: impl FnOnce(&Cancel) -> Result<T, Error> + Send + 'static,
    ) -> Result<Timed<T>, Error> {
        self.workshop.scheduler.run_with(&self.asker(), &model.batcher, work).await
    }

    /// Runs a model; the outputs with these indices, in this order, with their names.
    async fn run_model(
        &self,
        model: &Model,
        mut inputs: Vec<Tensor>,
        outputs: Vec<usize>,
    ) -> Result<Timed<Vec<NamedTensor>>, Error> {
        let mut counted = self.account.hold(Unit::InFlightBytes, 0)?;
        for (input, port) in inputs.iter_mut().zip(&model.file.inputs) {
            if widths::widens(input.dtype(), port.dtype) {
                *input = widths::widen(input, &mut counted).await?;
            }
        }
        if let Some(room) = self.room
            && !model.program.takes_from(room.mapping())
        {
            room.own(&mut inputs)?;
        }
        let names = outputs.iter().map(|&index| model.file.outputs[index].name.clone()).collect::<Vec<_>>();
        let call = Call { inputs, outputs, reply_bytes_max: self.reply_bytes_max };
        let ran = self.workshop.scheduler.run_model(&self.asker(), &model.batcher, call).await?;
        Ok(ran.map(|tensors| {
            let named = names.into_iter().zip(tensors);
            named.map(|(name, tensor)| NamedTensor { name, tensor: Some(tensor) }).collect()
        }))
    }

    /// # Errors
    /// `MESSAGE_TOO_LARGE` for tensors that no reply to this call can carry.
    fn check_reply(&self, bytes: u64) -> Result<(), Error> {
        let limit = self.reply_bytes_max;
        if bytes <= limit {
            return Ok(());
        }
        Err(Error::limit(Reason::MessageTooLarge, "the reply", limit, bytes, "bytes"))
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

    /// The loaded model of a resource of the session, or of a name in the tenant's repository, or with an empty name
    /// the embedded one. The first use loads it; how long that took is in the result.
    pub(crate) async fn model(&self, id: &str) -> Result<(Arc<Model>, Duration), Error> {
        let choice = &self.session.choice;
        let (slot, origin, files) = if id.is_empty() {
            let read: Reader = Box::new(|_| Ok(Bytes::from_static(EMBEDDED_MODEL)));
            (self.workshop.embedded.slot(choice), Origin::Host, vec![(EMBEDDED_NAME.to_owned(), read)])
        } else {
            let resource = match self.resource("model", id, ResourceKind::Model) {
                // Another session's stays its own.
                Err(error) if error.reason() == Reason::NotFound && !vaccel_proto::is_resource_id(id) => {
                    return self.named_model(id, error).await;
                }
                found => found?,
            };
            (resource.loaded.slot(choice), Origin::Guest, resource.readers())
        };
        if let Some(model) = slot.get() {
            return Ok((Arc::clone(model), Duration::ZERO));
        }
        let begun = Instant::now();
        let load = || {
            let load = Load { choice: choice.clone(), origin, rules: RunRules::default(), files };
            async { self.workshop.load(&self.asker(), load).await }
        };
        let model = slot.get_or_try_init(load).await?;
        Ok((Arc::clone(model), begun.elapsed()))
    }

    /// The loaded model of a name in the tenant's repository; one that is not there is `absent`.
    async fn named_model(&self, name: &str, absent: Error) -> Result<(Arc<Model>, Duration), Error> {
        let version = match self.repository.find(self.tenant, name, "").await {
            Err(error) if error.reason() == Reason::NotFound => return Err(absent),
            found => found?,
        };
        // What the model's configuration says of engines goes before what the session wishes.
        let wish = version.wish();
        let own = &self.session.choice.device;
        if !wish.device.is_empty() && !own.is_empty() && wish.device != *own {
            let message = format!("model {name} is for device {}, this session's is {own}", wish.device);
            return Err(Error::new(Reason::Disabled, message));
        }
        let choice = if wish == Choice::default() {
            self.session.choice.clone()
        } else {
            let device = if wish.device.is_empty() { own.clone() } else { wish.device };
            self.workshop.engines.choose(Choice { device, ..wish }, 0)?
        };
        let begun = Instant::now();
        let served = self.repository.served(self.tenant, &version, &choice, &self.asker()).await?;
        if !served.runs_alone() {
            let expected = "a model without sequences and without a device of its own";
            return Err(Error::field("model", expected, vaccel_proto::error::shown(name)));
        }
        Ok((Arc::clone(&served.model), begun.elapsed()))
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
