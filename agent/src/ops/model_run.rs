//! One run of a model: tensors in, tensors out.
//!
//! *Shapes:* what the model declares; a dimension it leaves open takes any size. Inputs come all by name or all by
//! position. *Errors:* `BAD_ARGUMENT` with the field for a tensor that does not fit, `NOT_FOUND` for a resource the
//! session does not hold, `MODEL_REJECTED` when it cannot be loaded, `DEADLINE`. *Source:* ONNX 1.20 operator
//! semantics.

use std::sync::Arc;

use vaccel_proto::Error;
use vaccel_proto::error::shown;
use vaccel_proto::limits::{NAME_BYTES_MAX, TENSORS_PER_CALL_MAX};
use vaccel_proto::tensor::check_named;
use vaccel_proto::v1::{ModelRunReply, ModelRunRequest, NamedTensor, ResourceKind, Tensor};

use super::{Context, Operation};
use crate::backend::Port;
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
        let inputs = arrange(&model.file.inputs, self.inputs)?;
        let wanted = choose(&model.file.outputs, &self.outputs)?;
        let indices = wanted.clone();
        let program = Arc::clone(&model);
        let ran = context.compute_on(&model, move |cancel| program.program.run(inputs, &indices, cancel));
        let mut ran = ran.await?;
        ran.run += loading;
        Ok(ran.map(|tensors| {
            let names = wanted.iter().map(|&index| model.file.outputs[index].name.clone());
            let outputs = names.zip(tensors).map(|(name, tensor)| NamedTensor { name, tensor: Some(tensor) });
            ModelRunReply { outputs: outputs.collect() }
        }))
    }
}

/// The tensors in the order of the model's inputs, each checked against its own.
fn arrange(ports: &[Port], inputs: Vec<NamedTensor>) -> Result<Vec<Tensor>, Error> {
    let names = || ports.iter().map(describe).collect::<Vec<_>>().join(", ");
    if inputs.len() != ports.len() {
        return Err(Error::field("inputs", format!("{} tensors ({})", ports.len(), names()), inputs.len()));
    }
    let by_position = inputs.iter().all(|input| input.name.is_empty());
    let mut arranged: Vec<Option<Tensor>> = vec![None; ports.len()];
    for (index, input) in inputs.into_iter().enumerate() {
        let place =
            if by_position { Some(index) } else { ports.iter().position(|port| port.name == input.name) };
        let path = format!("inputs[{index}]");
        let Some(place) = place else {
            return Err(Error::field(
                format!("{path}.name"),
                format!("one of {}", names()),
                shown(&input.name),
            ));
        };
        let Some(tensor) = input.tensor else { return Err(Error::field(path, "a tensor", "none")) };
        check_port(&path, &ports[place], &tensor)?;
        if arranged[place].replace(tensor).is_some() {
            return Err(Error::field(format!("{path}.name"), "each input once", shown(&input.name)));
        }
    }
    // As many tensors as ports and none twice: every place is filled.
    Ok(arranged.into_iter().flatten().collect())
}

fn check_port(path: &str, port: &Port, tensor: &Tensor) -> Result<(), Error> {
    if tensor.dtype() != port.dtype {
        return Err(Error::field(format!("{path}.dtype"), describe(port), tensor.signature()));
    }
    let Some(shape) = &port.shape else { return Ok(()) };
    let fits = shape.len() == tensor.shape.len()
        && shape
            .iter()
            .zip(&tensor.shape)
            .all(|(declared, given)| declared.is_none_or(|declared| declared == *given));
    if fits { Ok(()) } else { Err(Error::field(format!("{path}.shape"), describe(port), tensor.signature())) }
}

/// An input as people write it, as in `"image" f32[?, 1, 8, 8]`.
fn describe(port: &Port) -> String {
    let dimension = |dim: &Option<i64>| dim.map_or("?".to_owned(), |dim| dim.to_string());
    let shape = port
        .shape
        .as_ref()
        .map_or("…".to_owned(), |shape| shape.iter().map(dimension).collect::<Vec<_>>().join(", "));
    format!("{} {}[{shape}]", shown(&port.name), port.dtype.name())
}

fn choose(ports: &[Port], wanted: &[String]) -> Result<Vec<usize>, Error> {
    if wanted.is_empty() {
        return Ok((0..ports.len()).collect());
    }
    let mut chosen = Vec::with_capacity(wanted.len());
    for name in wanted {
        let Some(index) = ports.iter().position(|port| port.name == *name) else {
            let names = ports.iter().map(describe).collect::<Vec<_>>().join(", ");
            return Err(Error::field("outputs", format!("names of {names}"), shown(name)));
        };
        // Each occurrence would be a copy.
        if chosen.contains(&index) {
            return Err(Error::field("outputs", "each output once", shown(name)));
        }
        chosen.push(index);
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_proto::error::Detail;
    use vaccel_proto::v1::DType;

    fn ports() -> Vec<Port> {
        let port = |name: &str, dtype, shape| Port { name: name.into(), dtype, shape };
        vec![port("a", DType::F32, Some(vec![None, Some(2)])), port("b", DType::I64, None)]
    }

    fn named(name: &str, tensor: Tensor) -> NamedTensor {
        NamedTensor { name: name.into(), tensor: Some(tensor) }
    }

    fn pair(first: &str, second: &str) -> Vec<NamedTensor> {
        let a = Tensor::new(&[1, 2], &[1.0_f32, 2.0]).expect("valid");
        let b = Tensor::new(&[1], &[7_i64]).expect("valid");
        vec![named(first, a), named(second, b)]
    }

    #[test]
    fn inputs_come_by_name_in_any_order_or_by_position() {
        let mut swapped = pair("a", "b");
        swapped.reverse();
        for inputs in [pair("", ""), pair("a", "b"), swapped] {
            let arranged = arrange(&ports(), inputs).expect("fits");
            assert_eq!([arranged[0].dtype(), arranged[1].dtype()], [DType::F32, DType::I64]);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let wide = named("a", Tensor::new(&[1, 3], &[0.0_f32; 3]).expect("valid"));
        let flat = named("a", Tensor::new(&[2], &[0.0_f32; 2]).expect("valid"));
        let typed = named("a", Tensor::new(&[1, 2], &[0_i32; 2]).expect("valid"));
        let other = || pair("a", "b").remove(1);
        for (inputs, field) in [
            (vec![], "inputs"),
            (pair("a", "c"), "inputs[1].name"),
            (pair("a", ""), "inputs[1].name"),
            (vec![wide, other()], "inputs[0].shape"),
            (vec![flat, other()], "inputs[0].shape"),
            (vec![typed, other()], "inputs[0].dtype"),
        ] {
            let refusal = arrange(&ports(), inputs).expect_err(field);
            assert_eq!(refusal.detail(), &Detail::Field(field.into()), "{refusal}");
        }
        let twice = vec![pair("a", "b").remove(0), pair("a", "b").remove(0)];
        assert!(arrange(&ports(), twice).is_err());
    }

    #[test]
    fn outputs_are_chosen_by_name() {
        assert_eq!(choose(&ports(), &[]).expect("all"), [0, 1]);
        assert_eq!(choose(&ports(), &["b".into()]).expect("one"), [1]);
        assert!(choose(&ports(), &["c".into()]).is_err());
        assert!(choose(&ports(), &["b".into(), "b".into()]).is_err());
    }
}
