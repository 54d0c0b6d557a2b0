//! The built-in engine: tract, pure Rust, always there.
//!
//! A model is parsed once; a plan is made for every combination of input shapes it is run with, because tract optimises
//! best when it knows them. A run stops between two nodes when nobody waits for it any more.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, IntoTValue, TValue,
    TVec, Tensor as TractTensor, TractError, TractResult, TypedSimplePlan,
};
use tract_onnx::tract_core::internal::format_err;
use tract_onnx::tract_core::plan::eval;
use tract_onnx::tract_hir::infer::Factoid;
use vaccel_proto::tensor::Element;
use vaccel_proto::v1::{DType, EngineInfo, Tensor};
use vaccel_proto::{Error, Reason};

use super::{CPU, Engine, OnnxModel, Program, TRACT, rejected};
use crate::scheduler::Cancel;

/// Plans kept for one model. A plan repeats the optimised weights, so each costs about a model's size.
const PLANS_MAX: usize = 8;

/// Bytes of one tensor inside a run whose shape is known beforehand. A few bytes of model can ask for any size.
const TENSOR_BYTES_MAX: usize = 1 << 30;

/// The engine; it keeps nothing between models.
pub(super) struct Tract;

impl Engine for Tract {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            name: TRACT.into(),
            version: "0.23 (built in)".into(),
            devices: vec![CPU.into()],
            absent_because: String::new(),
        }
    }

    fn load(&self, model: &OnnxModel, cancel: &Cancel) -> Result<Box<dyn Program>, Error> {
        let refuse = |error: TractError| rejected("tract", format!("{error:#}"));
        let mut parsed = tract_onnx::onnx().model_for_read(&mut model.bytes.as_ref()).map_err(refuse)?;
        // Order the inputs as the scan does: tract has them in file order too, without initialised ones.
        let names: Vec<&str> = model.inputs.iter().map(|port| port.name.as_str()).collect();
        parsed.set_input_names(&names).map_err(refuse)?;
        let program = TractProgram { parsed, plans: Mutex::default() };
        let fixed = model.inputs.iter().map(|port| {
            port.shape.as_ref()?.iter().map(|dim| dim.and_then(|dim| usize::try_from(dim).ok())).collect()
        });
        // A model whose shapes are all known is planned now, so that what is wrong with it is said at loading.
        if let Some(shapes) = fixed.collect::<Option<Vec<Shape>>>() {
            program.plan(&shapes, cancel).map_err(refuse)?;
        }
        Ok(Box::new(program))
    }
}

type Shape = TVec<usize>;
type Plan = Arc<TypedSimplePlan>;

struct TractProgram {
    parsed: InferenceModel,
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
        let plan = self.make_plan(shapes, cancel)?;
        let mut plans = plans();
        if plans.len() >= PLANS_MAX {
            plans.remove(0);
        }
        plans.push((shapes.to_vec(), Arc::clone(&plan)));
        Ok(plan)
    }

    fn make_plan(&self, shapes: &[Shape], cancel: &Cancel) -> TractResult<Plan> {
        let mut model = self.parsed.clone();
        for (input, shape) in shapes.iter().enumerate() {
            let declared = model.input_fact(input)?;
            let dtype = declared.datum_type.concretize().unwrap_or(DatumType::F32);
            model.set_input_fact(input, InferenceFact::dt_shape(dtype, shape.as_slice()))?;
        }
        model.analyse(false)?;
        check_sizes(&model)?;
        stop_if(cancel)?;
        let typed = model.into_typed()?;
        stop_if(cancel)?;
        let decluttered = typed.into_decluttered()?;
        stop_if(cancel)?;
        decluttered.into_optimized()?.into_runnable()
    }
}

fn stop_if(cancel: &Cancel) -> TractResult<()> {
    if cancel.is_set() { Err(format_err!("nobody waits for the result")) } else { Ok(()) }
}

/// Refuses a model that would compute a tensor beyond reason, before anything is allocated for it.
fn check_sizes(model: &InferenceModel) -> TractResult<()> {
    for node in model.nodes() {
        for output in &node.outputs {
            let Some(shape) = output.fact.shape.as_concrete_finite()? else { continue };
            let element = output.fact.datum_type.concretize().map_or(1, |dtype| dtype.size_of());
            let bytes = shape.iter().try_fold(element, |bytes, dim| bytes.checked_mul(*dim));
            if bytes.is_none_or(|bytes| bytes > TENSOR_BYTES_MAX) {
                return Err(format_err!(
                    "node {} makes a tensor of shape {shape:?}, more than 1 GiB",
                    node.name
                ));
            }
        }
    }
    Ok(())
}

impl Program for TractProgram {
    fn run(&self, inputs: Vec<Tensor>, outputs: &[usize], cancel: &Cancel) -> Result<Vec<Tensor>, Error> {
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
        let values = inputs.iter().map(to_tract).collect::<Result<TVec<TValue>, Error>>()?;
        let failed = |error: TractError| {
            Error::new(Reason::BackendFailed, "tract failed while running the model")
                .caused_by(format!("{error:#}"))
        };
        let mut state = plan.spawn().map_err(failed)?;
        let results = state.run_plan_with_eval(values, |context, state, node, inputs| {
            stop_if(cancel)?;
            eval(context, state, node, inputs)
        });
        let results = results.map_err(failed)?;
        outputs.iter().map(|&index| from_tract(&results[index]).map_err(failed)?).collect()
    }

    fn parallel_runs(&self) -> usize {
        usize::MAX
    }
}

/// Calls a generic function with the Rust type of a wire type that tract has too.
macro_rules! with_element {
    ($dtype:expr, $call:ident($($argument:expr),*), $otherwise:expr) => {
        match $dtype {
            DType::U8 => $call::<u8>($($argument),*),
            DType::I8 => $call::<i8>($($argument),*),
            DType::U16 => $call::<u16>($($argument),*),
            DType::I16 => $call::<i16>($($argument),*),
            DType::U32 => $call::<u32>($($argument),*),
            DType::I32 => $call::<i32>($($argument),*),
            DType::U64 => $call::<u64>($($argument),*),
            DType::I64 => $call::<i64>($($argument),*),
            DType::F16 => $call::<half::f16>($($argument),*),
            DType::F32 => $call::<f32>($($argument),*),
            DType::F64 => $call::<f64>($($argument),*),
            _ => $otherwise,
        }
    };
}

fn to_tract(tensor: &Tensor) -> Result<TValue, Error> {
    fn numbers<T: Element + tract_onnx::prelude::Datum>(
        tensor: &Tensor,
        shape: &[usize],
    ) -> Result<TValue, Error> {
        let elements = tensor.elements::<T>()?;
        let made = TractTensor::from_shape(shape, &elements);
        made.map(IntoTValue::into_tvalue).map_err(|error| Error::new(Reason::BadArgument, error.to_string()))
    }
    let shape: TVec<usize> = tensor.shape.iter().map(|dim| usize::try_from(*dim).unwrap_or(0)).collect();
    if tensor.dtype() == DType::Bool {
        let truths: Vec<bool> = tensor.data.iter().map(|byte| *byte != 0).collect();
        let made = TractTensor::from_shape(&shape, &truths);
        return made
            .map(IntoTValue::into_tvalue)
            .map_err(|error| Error::new(Reason::BadArgument, error.to_string()));
    }
    let unsupported = || Error::field("inputs.dtype", "a type tract computes with", tensor.dtype().name());
    with_element!(tensor.dtype(), numbers(tensor, &shape), Err(unsupported()))
}

fn from_tract(tensor: &TractTensor) -> TractResult<Result<Tensor, Error>> {
    let shape: Vec<i64> = tensor.shape().iter().map(|dim| i64::try_from(*dim).unwrap_or(i64::MAX)).collect();
    let (dtype, dense) = match tensor.datum_type().unquantized() {
        DatumType::Bool => (DType::Bool, None),
        DatumType::U8 => (DType::U8, None),
        DatumType::I8 => (DType::I8, None),
        DatumType::U16 => (DType::U16, None),
        DatumType::I16 => (DType::I16, None),
        DatumType::U32 => (DType::U32, None),
        DatumType::I32 => (DType::I32, None),
        DatumType::U64 => (DType::U64, None),
        DatumType::I64 => (DType::I64, None),
        DatumType::F16 => (DType::F16, None),
        DatumType::F32 => (DType::F32, None),
        DatumType::F64 => (DType::F64, None),
        // tract's own type for shapes that depend on symbols; here they are known.
        DatumType::TDim => (DType::I64, Some(tensor.cast_to::<i64>()?.into_owned())),
        other => {
            let message = format!("this model gives {other:?}, which has no type on the wire");
            return Ok(Err(Error::new(Reason::ModelRejected, message)));
        }
    };
    let data = Bytes::copy_from_slice(dense.as_ref().unwrap_or(tensor).as_bytes());
    Ok(Ok(Tensor::from_bytes(dtype, &shape, data)))
}
