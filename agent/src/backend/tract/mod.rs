//! The built-in engine: tract, pure Rust, always there.
//!
//! A model is parsed once; a plan is made for every combination of input shapes it is run with, because tract optimises
//! best when it knows them. Planning ([`guard`]) and running ([`steps`]) stop between two nodes when nobody waits for
//! them any more, and where a tensor would be beyond reason: a few bytes of model can ask for any size.
//!
//! ONNX and TensorFlow graphs become the same kind of model in tract, whose shapes are worked out for each plan;
//! TensorFlow Lite files have all shapes inside ([`lite`]), and are read again for each.

mod guard;
mod lite;
mod steps;
mod tensors;

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, TValue, TVec,
    TractError, TractResult, TypedModel, TypedSimplePlan,
};
use tract_onnx::tract_core::internal::{OutletId, TDim, format_err};
use tract_onnx::tract_hir::infer::{DimFact, Factoid};
use vaccel_proto::v1::{EngineInfo, Tensor};
use vaccel_proto::{Error, Reason};

use super::file::{Format, Port, refuse};
use super::{CPU, Engine, ModelFile, Program, TRACT, check_reply, rejected};
use crate::scheduler::{Cancel, Runner};
use crate::shared::Mapping;
use guard::{TooLarge, check_facts, check_run, guard, stop_if};
use tensors::{from_tract, to_tract, wire_type};

/// Plans kept for one model. A plan repeats the optimised weights, so each costs about a model's size.
const PLANS_MAX: usize = 8;

/// Bytes of names that an error lists: with the rest of its text it must fit on the wire.
const NAMES_BYTES_MAX: usize = 1500;

/// The engine; it keeps nothing between models.
pub(super) struct Tract;

impl Engine for Tract {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            name: TRACT.into(),
            version: "0.23 (built in)".into(),
            devices: vec![CPU.into()],
            absent_because: String::new(),
            hints: super::MODEL_KINDS,
        }
    }

    fn load(&self, model: &mut ModelFile, cancel: &Cancel) -> Result<Arc<dyn Program>, Error> {
        let refuse = |error: TractError| rejected("tract", format!("{error:#}"));
        check_operators(model)?;
        let source = caught(|| Source::read(model)).map_err(refuse)?;
        let program = TractProgram { source, plans: Mutex::default() };
        let fixed = model.inputs.iter().map(|port| {
            port.shape.as_ref()?.iter().map(|dim| dim.and_then(|dim| usize::try_from(dim).ok())).collect()
        });
        // A model whose shapes are all known is planned now, so that what is wrong with it is said at loading; so is
        // one that is read for each plan, of one item. Other open sizes may not go as small as that.
        let shapes = match &program.source {
            Source::Inferred(_) => fixed.collect::<Option<Vec<Shape>>>(),
            Source::Lite(_) => model.inputs.iter().map(of_one_item).collect(),
        };
        if let Some(shapes) = shapes {
            program.plan(&shapes, cancel).map_err(refuse)?;
        }
        if let (Source::Inferred(parsed), Format::Tensorflow) = (&program.source, model.format) {
            caught(|| describe_outputs(parsed.clone(), &mut model.outputs, cancel)).map_err(refuse)?;
        }
        Ok(Arc::new(program))
    }
}

/// Refuses a model with operators that tract does not have, naming all of them.
fn check_operators(model: &ModelFile) -> Result<(), Error> {
    let missing: BTreeSet<&str> = {
        let operators = model.operators.iter().map(String::as_str);
        match model.format {
            Format::Onnx => {
                let known = tract_onnx::onnx().op_register.0;
                operators.filter(|name| !known.contains_key(*name)).collect()
            }
            Format::Tensorflow => {
                let known = tract_tensorflow::tensorflow().op_register.0;
                operators.filter(|name| !known.contains_key(*name)).collect()
            }
            Format::Tflite => operators.filter(|name| !lite::OPERATORS.contains(name)).collect(),
            Format::None => BTreeSet::new(),
        }
    };
    if missing.is_empty() {
        return Ok(());
    }
    let mut names = String::new();
    for (count, name) in missing.iter().enumerate() {
        if names.len() + name.len() > NAMES_BYTES_MAX {
            names.push_str(&format!(", and {} more", missing.len() - count));
            break;
        }
        if count > 0 {
            names.push_str(", ");
        }
        names.push_str(name);
    }
    let advice = match model.format {
        Format::Onnx => "engine onnxruntime may have them",
        Format::Tflite | Format::Tensorflow | Format::None => "export the model to ONNX",
    };
    let names = names.replace(char::is_control, "\u{fffd}");
    Err(refuse(format!(
        "tract cannot load this model: it lacks {} of its operators: {names}; {advice}",
        missing.len()
    )))
}

/// Runs what reads a guest's model: a panic in there is an error of this model.
fn caught<T>(work: impl FnOnce() -> TractResult<T>) -> TractResult<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = |panic: &(dyn Any + Send)| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
        };
        Err(format_err!("its reader failed on it ({})", text(&*panic)))
    })
}

/// The shape with 1 along the first axis if that is open, and none if another is.
fn of_one_item(port: &Port) -> Option<Shape> {
    let size = |(axis, dim): (usize, &Option<i64>)| match dim {
        None if axis == 0 => Some(1),
        dim => usize::try_from((*dim)?).ok(),
    };
    port.shape.as_ref()?.iter().enumerate().map(size).collect()
}

/// Fills in what a graph does not say of its outputs, as far as it follows from what it says of its inputs.
fn describe_outputs(mut model: InferenceModel, outputs: &mut [Port], cancel: &Cancel) -> TractResult<()> {
    for input in 0..model.inputs.len() {
        let fact = model.input_fact(input)?.clone();
        if fact.shape.rank().concretize().is_some() {
            // An open axis gets a name, by which it is known again in what comes out.
            let symbols = &model.symbols;
            let dim = |dim: DimFact| dim.concretize().unwrap_or_else(|| symbols.new_with_prefix("n").into());
            let shape: TVec<TDim> = fact.shape.dims().cloned().map(dim).collect();
            model.set_input_fact(input, fact.with_shape(shape))?;
        }
    }
    guard(&mut model, cancel);
    model.analyse(false)?;
    for (index, port) in outputs.iter_mut().enumerate() {
        let fact = model.output_fact(index)?;
        if let Some(dtype) = fact.datum_type.concretize().and_then(wire_type) {
            port.dtype = dtype;
        }
        if fact.shape.rank().concretize().is_some() {
            let dims = fact.shape.dims();
            let known =
                dims.map(|dim| dim.concretize().and_then(|dim| dim.to_i64().ok()).filter(|dim| *dim >= 0));
            port.shape = Some(known.collect());
        }
    }
    Ok(())
}

type Shape = TVec<usize>;
type Plan = Arc<TypedSimplePlan>;

/// What plans are made from.
enum Source {
    Inferred(InferenceModel),
    /// The file itself.
    Lite(Bytes),
}

impl Source {
    fn read(model: &ModelFile) -> TractResult<Self> {
        let mut parsed = match model.format {
            Format::Onnx => tract_onnx::onnx().model_for_read(&mut model.bytes.as_ref())?,
            Format::Tensorflow => {
                let mut parsed = tract_tensorflow::tensorflow().model_for_read(&mut model.bytes.as_ref())?;
                let outputs = model.outputs.iter().map(|port| Ok(parsed.node_id_by_name(&port.name)?.into()));
                let outputs: Vec<OutletId> = outputs.collect::<TractResult<_>>()?;
                parsed.select_output_outlets(&outputs)?;
                parsed
            }
            Format::Tflite | Format::None => return Ok(Self::Lite(model.bytes.clone())),
        };
        // Order the inputs as the scan does: tract has them in file order too, without initialised ones.
        let names: Vec<&str> = model.inputs.iter().map(|port| port.name.as_str()).collect();
        parsed.set_input_names(&names)?;
        Ok(Self::Inferred(parsed))
    }
}

struct TractProgram {
    source: Source,
    /// Most recently used last.
    plans: Mutex<Vec<(Vec<Shape>, Plan)>>,
}

impl TractProgram {
    fn plan(&self, shapes: &[Shape], cancel: &Cancel) -> TractResult<Plan> {
        let plans = || self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let known = {
            let mut plans = plans();
            plans.iter().position(|(key, _)| key == shapes).map(|at| {
                let entry = plans.remove(at);
                plans.push(entry);
                Arc::clone(&plans[plans.len() - 1].1)
            })
        };
        if let Some(plan) = known {
            return Ok(plan);
        }
        let plan = caught(|| self.make_plan(shapes, cancel))?;
        let mut plans = plans();
        if plans.len() >= PLANS_MAX {
            plans.remove(0);
        }
        plans.push((shapes.to_vec(), Arc::clone(&plan)));
        Ok(plan)
    }

    fn make_plan(&self, shapes: &[Shape], cancel: &Cancel) -> TractResult<Plan> {
        let typed = match &self.source {
            Source::Inferred(parsed) => infer(parsed.clone(), shapes, cancel)?,
            Source::Lite(file) => {
                let typed = lite::read(file, shapes)?;
                check_facts(&typed)?;
                typed
            }
        };
        stop_if(cancel)?;
        let decluttered = typed.into_decluttered()?;
        stop_if(cancel)?;
        let mut optimized = decluttered.into_optimized()?;
        check_run(&optimized)?;
        steps::watch(&mut optimized)?;
        optimized.into_runnable()
    }
}

/// The model with all types and shapes worked out from those of its inputs.
fn infer(mut model: InferenceModel, shapes: &[Shape], cancel: &Cancel) -> TractResult<TypedModel> {
    for (input, shape) in shapes.iter().enumerate() {
        let declared = model.input_fact(input)?;
        let dtype = declared.datum_type.concretize().unwrap_or(DatumType::F32);
        model.set_input_fact(input, InferenceFact::dt_shape(dtype, shape.as_slice()))?;
    }
    guard(&mut model, cancel);
    model.analyse(false)?;
    model.into_typed()
}

impl Runner for TractProgram {
    fn run(
        &self,
        inputs: Vec<Tensor>,
        outputs: &[usize],
        reply_bytes_max: u64,
        cancel: &Cancel,
    ) -> Result<Vec<Tensor>, Error> {
        let shapes: Vec<Shape> = inputs
            .iter()
            .map(|input| input.shape.iter().map(|dim| usize::try_from(*dim).unwrap_or(0)).collect())
            .collect();
        let misfit = |error: TractError| {
            let rejection = rejected("tract", format!("{error:#}"));
            let signatures: Vec<String> = inputs.iter().map(Tensor::signature).collect();
            let message =
                format!("inputs: {} do not fit this model: {}", signatures.join(", "), rejection.message());
            Error::new(Reason::BadArgument, message)
        };
        let plan = self.plan(&shapes, cancel).map_err(misfit)?;
        // Each input is let go of when it was copied: it may be as large as all that is computed.
        let values = inputs.into_iter().enumerate().map(|(index, input)| {
            let planned = plan.model().input_fact(index).map(|fact| fact.datum_type);
            to_tract(&input, planned.ok().filter(DatumType::is_quantized))
        });
        let values = values.collect::<Result<TVec<TValue>, Error>>()?;
        let failed = |error: TractError| match error.root_cause().downcast_ref::<TooLarge>() {
            Some(too_large) => {
                Error::new(Reason::BadArgument, format!("inputs: the model refuses these: {too_large}"))
            }
            None => Error::new(Reason::BackendFailed, "tract failed while running the model")
                .caused_by(format!("{error:#}")),
        };
        let results = steps::run(&plan, values, cancel).map_err(failed)?;
        check_reply(outputs.iter().map(|&index| results[index].as_bytes().len()), reply_bytes_max)?;
        outputs.iter().map(|&index| from_tract(&results[index]).map_err(failed)?).collect()
    }
}

impl Program for TractProgram {
    fn parallel_runs(&self) -> usize {
        usize::MAX
    }

    fn prepares_shapes(&self) -> bool {
        true
    }

    fn takes_from(&self, _memory: &Arc<Mapping>) -> bool {
        // Its own tensors are copies, and it has no strings, whose lengths would be looked at.
        true
    }
}
