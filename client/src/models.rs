//! The families of vAccel's model calls: `tf` with named nodes, `tflite` and `torch` by place.
//!
//! A model is loaded through a family before it is run through it. An agent that was restarted has nothing loaded; what
//! this session had loaded is loaded again when it is run.

use vaccel_proto::error::Detail;
use vaccel_proto::tensor::check_named;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::{
    ModelDescription, NamedTensor, RunReply, Tensor, TfInput, TfModelLoadRequest, TfModelRunRequest,
    TfModelUnloadRequest, TfNode, TfStatus, TfliteModelLoadRequest, TfliteModelRunRequest,
    TfliteModelUnloadRequest, Timings, TorchModelLoadRequest, TorchModelRunRequest, TorchModelUnloadRequest,
};
use vaccel_proto::{Error, Reason};

use crate::session::{ModelRun, Resource, Session, malformed, named};

/// A family of model calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    Tf,
    Tflite,
    Torch,
}

/// What a model run of the `tf` family gave.
#[derive(Clone, Debug, PartialEq)]
pub struct TfRun {
    /// TensorFlow's own word on the call; its code is 0.
    pub status: TfStatus,
    /// The outputs asked for, in that order, or all in the model's order.
    pub outputs: Vec<NamedTensor>,
    /// Where the time went on the agent's side.
    pub timings: Timings,
}

/// Output `id` of a node, what TensorFlow writes `name:id`.
pub fn tf_node(name: impl Into<String>, id: u32) -> TfNode {
    TfNode { name: name.into(), id }
}

/// A tensor for output `id` of a node.
pub fn tf_input(name: impl Into<String>, id: u32, tensor: Tensor) -> TfInput {
    TfInput { name: name.into(), id, tensor: Some(tensor) }
}

impl Session {
    /// Loads a model for [`Session::tf_model_run`] and says what goes in and out.
    ///
    /// # Errors
    /// `NOT_FOUND` for a resource the session does not hold, `MODEL_REJECTED` with what would load it, `DEADLINE`, and
    /// those of [`Client::info`](crate::Client::info).
    pub async fn tf_model_load(&self, model: &Resource) -> Result<ModelDescription, Error> {
        self.load(Family::Tf, model).await
    }

    /// Lets go of what [`Session::tf_model_load`] made.
    ///
    /// # Errors
    /// `NOT_FOUND` when the session has not loaded it, and those of [`Client::info`](crate::Client::info).
    pub async fn tf_model_unload(&self, model: &Resource) -> Result<(), Error> {
        self.unload(Family::Tf, model).await
    }

    /// Runs a loaded model on nodes. `outputs` are those wanted; empty for all.
    ///
    /// # Errors
    /// `NOT_FOUND` for a model that is not loaded, `BAD_ARGUMENT` for nodes or tensors that are not what the model
    /// takes, and those of [`Session::run`].
    pub async fn tf_model_run(
        &self,
        model: &Resource,
        inputs: Vec<TfInput>,
        outputs: &[TfNode],
    ) -> Result<TfRun, Error> {
        for (index, input) in inputs.iter().enumerate() {
            let path = format!("inputs[{index}]");
            match &input.tensor {
                Some(tensor) => tensor.check(&path)?,
                None => return Err(Error::field(format!("{path}.tensor"), "a tensor", "none")),
            };
        }
        let (id, outputs) = (model.id().to_owned(), outputs.to_vec());
        let op = TfModelRunRequest { model: id, run_options: Default::default(), outputs, inputs };
        let reply = self.run_loaded(Family::Tf, model, Op::TfModelRun(op)).await?;
        match reply.outcome {
            Some(Outcome::TfModelRun(run)) if check_named("outputs", &run.outputs).is_ok() => Ok(TfRun {
                status: run.status.unwrap_or_default(),
                outputs: run.outputs,
                timings: reply.timings.unwrap_or_default(),
            }),
            _ => Err(malformed("tf_model_run")),
        }
    }

    /// Loads a model for [`Session::tflite_model_run`] and says what goes in and out.
    ///
    /// # Errors
    /// Those of [`Session::tf_model_load`].
    pub async fn tflite_model_load(&self, model: &Resource) -> Result<ModelDescription, Error> {
        self.load(Family::Tflite, model).await
    }

    /// Lets go of what [`Session::tflite_model_load`] made.
    ///
    /// # Errors
    /// Those of [`Session::tf_model_unload`].
    pub async fn tflite_model_unload(&self, model: &Resource) -> Result<(), Error> {
        self.unload(Family::Tflite, model).await
    }

    /// Runs a loaded model on tensors in the order of its inputs; gives all outputs.
    ///
    /// # Errors
    /// Those of [`Session::tf_model_run`].
    pub async fn tflite_model_run(&self, model: &Resource, inputs: Vec<Tensor>) -> Result<ModelRun, Error> {
        let (id, inputs) = (model.id().to_owned(), placed(inputs)?);
        let op = TfliteModelRunRequest { model: id, run_options: Default::default(), inputs };
        let reply = self.run_loaded(Family::Tflite, model, Op::TfliteModelRun(op)).await?;
        match reply.outcome {
            Some(Outcome::TfliteModelRun(run)) => gave("tflite_model_run", run.outputs, reply.timings),
            _ => Err(malformed("tflite_model_run")),
        }
    }

    /// Loads a model for [`Session::torch_model_run`] and says what goes in and out.
    ///
    /// # Errors
    /// Those of [`Session::tf_model_load`].
    pub async fn torch_model_load(&self, model: &Resource) -> Result<ModelDescription, Error> {
        self.load(Family::Torch, model).await
    }

    /// Lets go of what [`Session::torch_model_load`] made.
    ///
    /// # Errors
    /// Those of [`Session::tf_model_unload`].
    pub async fn torch_model_unload(&self, model: &Resource) -> Result<(), Error> {
        self.unload(Family::Torch, model).await
    }

    /// Runs a loaded model on tensors in the order of its inputs; gives all outputs. Both are of the types that vAccel
    /// has for torch: u8, i8, i16, i32, i64, f16 and f32.
    ///
    /// # Errors
    /// Those of [`Session::tf_model_run`].
    pub async fn torch_model_run(&self, model: &Resource, inputs: Vec<Tensor>) -> Result<ModelRun, Error> {
        let (id, inputs) = (model.id().to_owned(), placed(inputs)?);
        let op = TorchModelRunRequest { model: id, run_options: Default::default(), inputs };
        let reply = self.run_loaded(Family::Torch, model, Op::TorchModelRun(op)).await?;
        match reply.outcome {
            Some(Outcome::TorchModelRun(run)) => gave("torch_model_run", run.outputs, reply.timings),
            _ => Err(malformed("torch_model_run")),
        }
    }

    async fn load(&self, family: Family, resource: &Resource) -> Result<ModelDescription, Error> {
        let model = resource.id().to_owned();
        let op = match family {
            Family::Tf => Op::TfModelLoad(TfModelLoadRequest { model }),
            Family::Tflite => Op::TfliteModelLoad(TfliteModelLoadRequest { model }),
            Family::Torch => Op::TorchModelLoad(TorchModelLoadRequest { model }),
        };
        let description = match self.operate(op).await?.outcome {
            Some(Outcome::TfModelLoad(reply)) => reply.description,
            Some(Outcome::TfliteModelLoad(reply)) => reply.description,
            Some(Outcome::TorchModelLoad(reply)) => reply.description,
            _ => None,
        };
        let description = description.ok_or_else(|| malformed("a load of a model"))?;
        self.note_loaded(family, resource.id());
        Ok(description)
    }

    async fn unload(&self, family: Family, resource: &Resource) -> Result<(), Error> {
        let model = resource.id().to_owned();
        self.forget_loaded(family, &model);
        let op = match family {
            Family::Tf => Op::TfModelUnload(TfModelUnloadRequest { model }),
            Family::Tflite => Op::TfliteModelUnload(TfliteModelUnloadRequest { model }),
            Family::Torch => Op::TorchModelUnload(TorchModelUnloadRequest { model }),
        };
        self.operate(op).await.map(drop)
    }

    /// Runs a model; one that only an agent that was restarted does not have loaded is loaded again first.
    async fn run_loaded(&self, family: Family, model: &Resource, op: Op) -> Result<RunReply, Error> {
        match self.operate(op.clone()).await {
            Err(error) if is_not_loaded(&error) && self.has_loaded(family, model.id()) => {
                self.load(family, model).await?;
                self.operate(op).await
            }
            outcome => outcome,
        }
    }
}

fn is_not_loaded(error: &Error) -> bool {
    error.reason() == Reason::NotFound
        && matches!(error.detail(), Detail::Resource { kind, .. } if kind == "loaded model")
}

/// Tensors without names, checked.
fn placed(tensors: Vec<Tensor>) -> Result<Vec<NamedTensor>, Error> {
    let inputs: Vec<NamedTensor> = tensors.into_iter().map(|tensor| named("", tensor)).collect();
    check_named("inputs", &inputs)?;
    Ok(inputs)
}

fn gave(operation: &str, outputs: Vec<NamedTensor>, timings: Option<Timings>) -> Result<ModelRun, Error> {
    check_named("outputs", &outputs).map_err(|_| malformed(operation))?;
    Ok(ModelRun { outputs, timings: timings.unwrap_or_default() })
}
