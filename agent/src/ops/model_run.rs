//! One run of a model: tensors in, tensors out.
//!
//! *Shapes:* what the model declares; a dimension it leaves open takes any size. *Types:* those of the model; what it
//! takes as `f32` may come as `f16`, `bf16`, `u8`, `i8`, `u16` or `i16`, and is widened here. Inputs come all by name
//! or all by position; outputs are asked for by name, or by position as `#0`, `#1` and so on. *Errors:* `BAD_ARGUMENT`
//! with the field for a tensor that does not fit, `NOT_FOUND` for a resource the session does not hold,
//! `MODEL_REJECTED` when it cannot be loaded, `DEADLINE`. *Source:* the operator semantics of the model's format: ONNX
//! 1.20, TensorFlow Lite, TensorFlow 2.

use vaccel_proto::Error;
use vaccel_proto::limits::{NAME_BYTES_MAX, TENSORS_PER_CALL_MAX};
use vaccel_proto::tensor::check_named;
use vaccel_proto::v1::{ModelRunReply, ModelRunRequest, ResourceKind};

use super::ports::{arrange_named, choose_named};
use super::{Context, Operation};
use crate::scheduler::Timed;

impl Operation for ModelRunRequest {
    const NAME: &'static str = "model_run";
    const SUMMARY: &'static str = "run a model of the session on tensors";
    type Reply = ModelRunReply;

    fn validate(&self) -> Result<(), Error> {
        if self.model.is_empty() {
            return Err(Error::field("model", "a resource of the session", "none"));
        }
        if self.outputs.len() > TENSORS_PER_CALL_MAX {
            let expected = format!("at most {TENSORS_PER_CALL_MAX} names");
            return Err(Error::field("outputs", expected, self.outputs.len()));
        }
        if let Some(long) = self.outputs.iter().find(|name| name.len() > NAME_BYTES_MAX) {
            return Err(Error::field(
                "outputs",
                format!("names of at most {NAME_BYTES_MAX} bytes"),
                long.len(),
            ));
        }
        check_named("inputs", &self.inputs)
    }

    fn dummy(self, context: &Context<'_>) -> Result<ModelRunReply, Error> {
        context.resource("model", &self.model, ResourceKind::Model)?;
        Ok(ModelRunReply { outputs: self.inputs })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<ModelRunReply>, Error> {
        let (model, loading) = context.model(&self.model).await?;
        let inputs = arrange_named(&model.file.inputs, self.inputs)?;
        let wanted = choose_named(&model.file.outputs, &self.outputs)?;
        let mut ran = context.run_model(&model, inputs, wanted).await?;
        ran.spans.run += loading;
        Ok(ran.map(|outputs| ModelRunReply { outputs }))
    }
}
