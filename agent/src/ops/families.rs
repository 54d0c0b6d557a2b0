//! The families of vAccel's model calls: `tf`, `tflite` and `torch`, each with load, run and unload.
//!
//! A family is a way to speak of a model's inputs and outputs, and does not say what the model is: each takes all
//! formats that the agent reads. `tf` names nodes (`{name, id}`, what TensorFlow writes `name:id`; without a name, `id`
//! is the place) and may ask for some outputs; `tflite` and `torch` go by place and get all outputs, `torch` of the
//! types that vAccel has for it.
//!
//! *Load* makes the model ready for the session and says what goes in and out; again is the same. *Run* needs a load
//! before, by the same session and family, as vAccel's plugins do. *Unload* lets the model go; its memory is freed when
//! nobody else has it loaded, and also with the resource itself.
//!
//! *Shapes:* what the model declares; -1 along an axis that takes any size. *Units:* none. *Errors:* `NOT_FOUND` for a
//! resource the session does not hold and for run and unload without a load, `BAD_ARGUMENT` with the field for a node
//! that is not there (naming those that are) or a tensor that does not fit, `MODEL_REJECTED` when it cannot be loaded,
//! `DEADLINE`. A call that fails has an error and no status: the status of a reply is always 0, as TensorFlow's is when
//! all went well. *Source:* vAccel 0.8's `tf_model_*`, `tflite_model_*` and `torch_model_*`.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use vaccel_proto::error::{Detail, shown};
use vaccel_proto::limits::{NAME_BYTES_MAX, RUN_OPTIONS_BYTES_MAX, TENSORS_PER_CALL_MAX};
use vaccel_proto::tensor::check_named;
use vaccel_proto::v1::{
    DType, ModelDescription, NamedTensor, ResourceKind, Tensor, TfInput, TfModelLoadReply,
    TfModelLoadRequest, TfModelRunReply, TfModelRunRequest, TfModelUnloadReply, TfModelUnloadRequest, TfNode,
    TfStatus, TfliteModelLoadReply, TfliteModelLoadRequest, TfliteModelRunReply, TfliteModelRunRequest,
    TfliteModelUnloadReply, TfliteModelUnloadRequest, TorchModelLoadReply, TorchModelLoadRequest,
    TorchModelRunReply, TorchModelRunRequest, TorchModelUnloadReply, TorchModelUnloadRequest,
};
use vaccel_proto::{Error, Reason};

use super::ports::{arrange_named, arrange_nodes, choose_nodes};
use super::{Context, Operation};
use crate::backend::{Family, Holder, Model};
use crate::resource::Resource;
use crate::scheduler::Timed;

/// Bytes of what a load says of a model: 256 inputs and outputs with names of 256 bytes take a tenth of it.
const DESCRIPTION_BYTES_MAX: usize = 1 << 20;

/// What vAccel's noop plugin says in a status of TensorFlow.
const DUMMY_STATUS: &str = "Operation handled by noop plugin";

/// The types of vAccel's `torch` tensors.
const TORCH_TYPES: &[DType] =
    &[DType::U8, DType::I8, DType::I16, DType::I32, DType::I64, DType::F16, DType::F32];

impl Family {
    fn name(self) -> &'static str {
        match self {
            Self::Tf => "tf",
            Self::Tflite => "tflite",
            Self::Torch => "torch",
        }
    }
}

/// A status of TensorFlow's for a call that went well.
fn status(message: &str) -> Option<TfStatus> {
    Some(TfStatus { code: 0, message: message.into() })
}

/// Load and unload of a family: the requests are the same in all, the replies nearly.
macro_rules! load_and_unload {
    ($family:expr, $prefix:literal, $load:ty => $loaded:ty: $make_loaded:expr,
     $unload:ty => $unloaded:ty: $make_unloaded:expr) => {
        impl Operation for $load {
            const NAME: &'static str = concat!($prefix, "_model_load");
            const SUMMARY: &'static str =
                concat!("make a model of the session ready for `", $prefix, "_model_run`");
            type Reply = $loaded;

            fn validate(&self) -> Result<(), Error> {
                check_model(&self.model)
            }

            fn dummy(self, context: &Context<'_>) -> Result<Self::Reply, Error> {
                context.resource("model", &self.model, ResourceKind::Model)?;
                Ok($make_loaded(ModelDescription::default(), DUMMY_STATUS))
            }

            async fn execute(self, context: &Context<'_>) -> Result<Timed<Self::Reply>, Error> {
                let loaded = load(context, $family, &self.model).await?;
                Ok(loaded.map(|description| $make_loaded(description, "")))
            }
        }

        impl Operation for $unload {
            const NAME: &'static str = concat!($prefix, "_model_unload");
            const SUMMARY: &'static str = concat!("let go of what `", $prefix, "_model_load` made");
            type Reply = $unloaded;

            fn validate(&self) -> Result<(), Error> {
                check_model(&self.model)
            }

            fn dummy(self, context: &Context<'_>) -> Result<Self::Reply, Error> {
                context.resource("model", &self.model, ResourceKind::Model)?;
                Ok($make_unloaded(DUMMY_STATUS))
            }

            async fn execute(self, context: &Context<'_>) -> Result<Timed<Self::Reply>, Error> {
                unload(context, $family, &self.model)?;
                Ok(Timed::instant($make_unloaded("")))
            }
        }
    };
}

load_and_unload!(
    Family::Tf,
    "tf",
    TfModelLoadRequest => TfModelLoadReply: |description, text| TfModelLoadReply {
        status: status(text),
        description: Some(description),
    },
    TfModelUnloadRequest => TfModelUnloadReply: |text| TfModelUnloadReply { status: status(text) }
);

load_and_unload!(
    Family::Tflite,
    "tflite",
    TfliteModelLoadRequest => TfliteModelLoadReply: |description, _| TfliteModelLoadReply {
        description: Some(description),
    },
    TfliteModelUnloadRequest => TfliteModelUnloadReply: |_| TfliteModelUnloadReply {}
);

load_and_unload!(
    Family::Torch,
    "torch",
    TorchModelLoadRequest => TorchModelLoadReply: |description, _| TorchModelLoadReply {
        description: Some(description),
    },
    TorchModelUnloadRequest => TorchModelUnloadReply: |_| TorchModelUnloadReply {}
);

impl Operation for TfModelRunRequest {
    const NAME: &'static str = "tf_model_run";
    const SUMMARY: &'static str = "run a loaded model on tensors of named nodes";
    type Reply = TfModelRunReply;

    fn validate(&self) -> Result<(), Error> {
        check_run(&self.model, &self.run_options)?;
        for (path, count) in [("inputs", self.inputs.len()), ("outputs", self.outputs.len())] {
            if count > TENSORS_PER_CALL_MAX {
                return Err(Error::field(path, format!("at most {TENSORS_PER_CALL_MAX} of them"), count));
            }
        }
        for (index, TfInput { name, tensor, .. }) in self.inputs.iter().enumerate() {
            let path = format!("inputs[{index}]");
            check_name(&path, name)?;
            match tensor {
                Some(tensor) => tensor.check(&path)?,
                None => return Err(Error::field(format!("{path}.tensor"), "a tensor", "none")),
            };
        }
        for (index, TfNode { name, .. }) in self.outputs.iter().enumerate() {
            check_name(&format!("outputs[{index}]"), name)?;
        }
        Ok(())
    }

    fn dummy(self, context: &Context<'_>) -> Result<TfModelRunReply, Error> {
        context.resource("model", &self.model, ResourceKind::Model)?;
        let wanted = if self.outputs.is_empty() { self.inputs.len() } else { self.outputs.len() };
        let copy = |(index, input): (usize, TfInput)| {
            let name = self.outputs.get(index).map_or(input.name, |output| output.name.clone());
            NamedTensor { name, tensor: input.tensor }
        };
        let outputs = self.inputs.into_iter().take(wanted).enumerate().map(copy).collect();
        Ok(TfModelRunReply { status: status(DUMMY_STATUS), outputs })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<TfModelRunReply>, Error> {
        let ran = run(context, Family::Tf, &self.model, |model| {
            let inputs = arrange_nodes(&model.file.inputs, self.inputs)?;
            Ok((inputs, choose_nodes(&model.file.outputs, &self.outputs)?))
        });
        Ok(ran.await?.map(|outputs| TfModelRunReply { status: status(""), outputs }))
    }
}

impl Operation for TfliteModelRunRequest {
    const NAME: &'static str = "tflite_model_run";
    const SUMMARY: &'static str = "run a loaded model on tensors by place";
    type Reply = TfliteModelRunReply;

    fn validate(&self) -> Result<(), Error> {
        check_run(&self.model, &self.run_options)?;
        check_placed(&self.inputs)
    }

    fn dummy(self, context: &Context<'_>) -> Result<TfliteModelRunReply, Error> {
        context.resource("model", &self.model, ResourceKind::Model)?;
        Ok(TfliteModelRunReply { outputs: self.inputs })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<TfliteModelRunReply>, Error> {
        let ran = run(context, Family::Tflite, &self.model, |model| by_place(model, self.inputs));
        Ok(ran.await?.map(|outputs| TfliteModelRunReply { outputs }))
    }
}

impl Operation for TorchModelRunRequest {
    const NAME: &'static str = "torch_model_run";
    const SUMMARY: &'static str = "run a loaded model on tensors by place, of the types of torch";
    type Reply = TorchModelRunReply;

    fn validate(&self) -> Result<(), Error> {
        check_run(&self.model, &self.run_options)?;
        check_placed(&self.inputs)?;
        for (index, input) in self.inputs.iter().enumerate() {
            let dtype = input.tensor.as_ref().map(Tensor::dtype).unwrap_or_default();
            if !TORCH_TYPES.contains(&dtype) {
                return Err(Error::field(format!("inputs[{index}].dtype"), torch_types(), dtype.name()));
            }
        }
        Ok(())
    }

    fn dummy(self, context: &Context<'_>) -> Result<TorchModelRunReply, Error> {
        context.resource("model", &self.model, ResourceKind::Model)?;
        Ok(TorchModelRunReply { outputs: self.inputs })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<TorchModelRunReply>, Error> {
        let ran = run(context, Family::Torch, &self.model, |model| by_place(model, self.inputs)).await?;
        // Known for certain only now: not every format says what comes out.
        for output in ran.value.iter().filter_map(|output| output.tensor.as_ref()) {
            if !TORCH_TYPES.contains(&output.dtype()) {
                let (types, given) = (torch_types(), output.signature());
                let message = format!("torch gives {types}, this model gives {given}; run it with model_run");
                return Err(Error::new(Reason::ModelRejected, message));
            }
        }
        Ok(ran.map(|outputs| TorchModelRunReply { outputs }))
    }
}

fn torch_types() -> String {
    TORCH_TYPES.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(", ")
}

fn check_model(model: &str) -> Result<(), Error> {
    if model.is_empty() { Err(Error::field("model", "a resource of the session", "none")) } else { Ok(()) }
}

fn check_run(model: &str, options: &Bytes) -> Result<(), Error> {
    check_model(model)?;
    if options.len() <= RUN_OPTIONS_BYTES_MAX {
        return Ok(());
    }
    Err(Error::field("run_options", format!("at most {RUN_OPTIONS_BYTES_MAX} bytes"), options.len()))
}

fn check_name(path: &str, name: &str) -> Result<(), Error> {
    if name.len() <= NAME_BYTES_MAX {
        return Ok(());
    }
    Err(Error::field(format!("{path}.name"), format!("at most {NAME_BYTES_MAX} bytes"), name.len()))
}

fn check_placed(inputs: &[NamedTensor]) -> Result<(), Error> {
    check_named("inputs", inputs)?;
    match inputs.iter().position(|input| !input.name.is_empty()) {
        Some(index) => {
            let path = format!("inputs[{index}].name");
            Err(Error::field(path, "no name: inputs go by place", shown(&inputs[index].name)))
        }
        None => Ok(()),
    }
}

/// All inputs by place, and all outputs.
fn by_place(model: &Model, inputs: Vec<NamedTensor>) -> Result<(Vec<Tensor>, Vec<usize>), Error> {
    let inputs = arrange_named(&model.file.inputs, inputs)?;
    Ok((inputs, (0..model.file.outputs.len()).collect()))
}

async fn load(context: &Context<'_>, family: Family, id: &str) -> Result<Timed<ModelDescription>, Error> {
    let resource = context.resource("model", id, ResourceKind::Model)?;
    let (model, loading) = context.model(id).await?;
    let description = model.file.describe();
    let (limit, bytes) = (DESCRIPTION_BYTES_MAX as u64, description.encoded_len() as u64);
    if bytes > limit {
        let message =
            format!("its inputs and outputs take {bytes} bytes to describe, at most {limit} are sent");
        return Err(Error::new(Reason::ModelRejected, message));
    }
    resource.loaded.hold(&context.session.choice, family, &holder(context));
    let mut loaded = Timed::instant(description);
    loaded.spans.run = loading;
    Ok(loaded)
}

fn unload(context: &Context<'_>, family: Family, id: &str) -> Result<(), Error> {
    let resource = context.resource("model", id, ResourceKind::Model)?;
    let had = resource.loaded.release(&context.session.choice, family, &holder(context));
    if had { Ok(()) } else { Err(not_loaded(family, &resource)) }
}

async fn run(
    context: &Context<'_>,
    family: Family,
    id: &str,
    arrange: impl FnOnce(&Model) -> Result<(Vec<Tensor>, Vec<usize>), Error>,
) -> Result<Timed<Vec<NamedTensor>>, Error> {
    let resource = context.resource("model", id, ResourceKind::Model)?;
    if !resource.loaded.holds(&context.session.choice, family, &holder(context)) {
        return Err(not_loaded(family, &resource));
    }
    let (model, loading) = context.model(id).await?;
    let (inputs, outputs) = arrange(&model)?;
    let mut ran = context.run_model(&model, inputs, outputs).await?;
    ran.spans.run += loading;
    Ok(ran)
}

/// Who loads, for the resource's list of those.
fn holder(context: &Context<'_>) -> Holder {
    Arc::clone(context.session) as Holder
}

fn not_loaded(family: Family, resource: &Resource) -> Error {
    let (family, id) = (family.name(), shown(&resource.id));
    let message =
        format!("model {id} is not loaded by this session with {family}_model_load; call that first");
    let detail = Detail::Resource { kind: "loaded model".into(), name: id };
    Error::new(Reason::NotFound, message).with(detail)
}
