//! The built-in engine: tract, pure Rust, always there.
//!
//! A model is parsed once; a plan is made for every combination of input shapes it is run with, because tract optimises
//! best when it knows them. Planning and running stop between two nodes when nobody waits for them any more, and where
//! a tensor would be beyond reason: a few bytes of model can ask for any size.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tract_onnx::ops::logic::If;
use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, IntoTValue, TValue,
    TVec, Tensor as TractTensor, TractError, TractResult, TypedModel, TypedSimplePlan,
};
use tract_onnx::tract_core::internal::{
    DimLike, EvalContext, EvalOp, Op, OpState, OutletId, StaticName, TypedNode, TypedOp, format_err,
};
use tract_onnx::tract_core::ops::array::Range;
use tract_onnx::tract_core::plan::eval;
use tract_onnx::tract_hir::infer::{Factoid, InferenceModelPatch, InferenceNode, InferenceOp};
use tract_onnx::tract_hir::ops::dummy::Dummy;
use tract_onnx::tract_hir::ops::scan::InferenceScan;
use vaccel_proto::tensor::Element;
use vaccel_proto::v1::{DType, EngineInfo, Tensor};
use vaccel_proto::{Error, Reason};

use super::{CPU, Engine, OnnxModel, Program, TRACT, check_reply, rejected};
use crate::scheduler::Cancel;

/// Plans kept for one model. A plan repeats the optimised weights, so each costs about a model's size.
const PLANS_MAX: usize = 8;

/// Bytes of one tensor inside a run.
const TENSOR_BYTES_MAX: usize = 1 << 30;

/// Bytes of all tensors that a run holds at the same time, its model's weights aside.
const RUN_BYTES_MAX: usize = 2 << 30;

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
        guard(&mut model, cancel);
        model.analyse(false)?;
        let typed = model.into_typed()?;
        stop_if(cancel)?;
        let decluttered = typed.into_decluttered()?;
        stop_if(cancel)?;
        let optimized = decluttered.into_optimized()?;
        check_run(&optimized)?;
        optimized.into_runnable()
    }
}

fn stop_if(cancel: &Cancel) -> TractResult<()> {
    if cancel.is_set() { Err(format_err!("nobody waits for the result")) } else { Ok(()) }
}

/// A size that no guest gets; told apart from what fails inside the engine.
#[derive(Debug)]
struct TooLarge(String);

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TooLarge {}

/// Refuses a tensor beyond reason.
fn check_tensor(dtype: Option<DatumType>, shape: &[usize]) -> TractResult<()> {
    let element = dtype.map_or(1, |dtype| dtype.size_of());
    let bytes = shape.iter().try_fold(element, |bytes, dim| bytes.checked_mul(*dim));
    if bytes.is_some_and(|bytes| bytes <= TENSOR_BYTES_MAX) {
        return Ok(());
    }
    let limit = TENSOR_BYTES_MAX >> 20;
    Err(TooLarge(format!("it would make a tensor of shape {shape:?}, more than {limit} MiB")).into())
}

/// Refuses a plan whose tensors are too much together, however small each is.
fn check_run(model: &TypedModel) -> TractResult<()> {
    let order = model.eval_order()?;
    let bytes = |node: usize| -> usize {
        let facts = model.node(node).outputs.iter().map(|output| &output.fact);
        // Weights are there already; sizes that depend on the numbers are checked when those are.
        let computed = facts.filter(|fact| fact.konst.is_none()).map(|fact| fact.mem_size().to_usize());
        computed.map(|size| size.unwrap_or(0)).fold(0, usize::saturating_add)
    };
    let steps = order.iter().enumerate();
    let uses =
        steps.flat_map(|(step, node)| model.node(*node).inputs.iter().map(move |input| (input.node, step)));
    let mut last_use: HashMap<usize, usize> = uses.collect();
    let mut held = 0_usize;
    for (step, node) in order.iter().enumerate() {
        held = held.saturating_add(bytes(*node));
        if held > RUN_BYTES_MAX {
            let limit = RUN_BYTES_MAX >> 20;
            return Err(TooLarge(format!("it would hold tensors of more than {limit} MiB together")).into());
        }
        for input in &model.node(*node).inputs {
            if last_use.get(&input.node) == Some(&step) {
                last_use.remove(&input.node);
                held -= bytes(input.node);
            }
        }
    }
    Ok(())
}

/// Refuses what is too large and depends on the numbers in a run.
fn check_step(context: &EvalContext<'_>, node: &TypedNode, inputs: &[TValue]) -> TractResult<()> {
    if node.op_is::<Range>() {
        check_range(inputs)?;
    }
    for output in node.outputs.iter().filter(|output| !output.fact.shape.is_concrete()) {
        if let Ok(shape) = output.fact.shape.eval_to_usize(context.symbols) {
            check_tensor(Some(output.fact.datum_type), &shape)?;
        }
    }
    Ok(())
}

/// Refuses a range from the numbers that say how long it is: shapes are planned with smaller integers.
fn check_range(inputs: &[TValue]) -> TractResult<()> {
    let number = |index: usize| inputs[index].cast_to_scalar::<f64>();
    let count = ((number(1)? - number(0)?) / number(2)?).abs().ceil();
    // What is not a number is not below the limit either.
    if count <= (TENSOR_BYTES_MAX / size_of::<f64>()) as f64 {
        return Ok(());
    }
    Err(TooLarge(format!("it would make a list of {count} numbers")).into())
}

/// Wraps every operator of a model, and of the models inside it, in [`Guarded`].
fn guard(model: &mut InferenceModel, cancel: &Cancel) {
    for node in model.nodes_mut() {
        if let Some(choice) = node.op_as_mut::<If>() {
            guard(&mut choice.then_body, cancel);
            guard(&mut choice.else_body, cancel);
        }
        if let Some(scan) = node.op_as_mut::<InferenceScan>() {
            guard(&mut scan.body, cancel);
        }
        let op = std::mem::replace(&mut node.op, Box::new(Dummy::new()));
        node.op = Box::new(Guarded { op, cancel: cancel.clone() });
    }
}

/// An operator that says how large its outputs are before it computes them. Engines compute what is constant while they
/// plan, so that checking a planned model would be too late.
#[derive(Clone, Debug)]
struct Guarded {
    op: Box<dyn InferenceOp>,
    cancel: Cancel,
}

type Facts = TVec<InferenceFact>;

impl InferenceOp for Guarded {
    fn infer_facts(
        &mut self,
        inputs: TVec<&InferenceFact>,
        outputs: TVec<&InferenceFact>,
        observed: TVec<&InferenceFact>,
    ) -> TractResult<(Facts, Facts, Facts)> {
        stop_if(&self.cancel)?;
        let facts = self.op.infer_facts(inputs, outputs, observed)?;
        for output in &facts.1 {
            if let Some(shape) = output.shape.as_concrete_finite()? {
                check_tensor(output.datum_type.concretize(), &shape)?;
            }
        }
        Ok(facts)
    }

    fn observe_outlets(&self, model: &InferenceModel, node: &InferenceNode) -> TractResult<Vec<OutletId>> {
        self.op.observe_outlets(model, node)
    }

    fn incorporate(
        &self,
        model: &InferenceModel,
        node: &InferenceNode,
    ) -> TractResult<Option<InferenceModelPatch>> {
        self.op.incorporate(model, node)
    }

    fn nboutputs(&self) -> TractResult<usize> {
        self.op.nboutputs()
    }

    fn as_op(&self) -> &dyn Op {
        self.op.as_op()
    }

    fn as_op_mut(&mut self) -> &mut dyn Op {
        self.op.as_op_mut()
    }

    fn to_typed(
        &self,
        source: &InferenceModel,
        node: &InferenceNode,
        target: &mut TypedModel,
        mapping: &HashMap<OutletId, OutletId>,
    ) -> TractResult<TVec<OutletId>> {
        self.op.to_typed(source, node, target, mapping)
    }
}

impl Op for Guarded {
    fn name(&self) -> StaticName {
        self.op.name()
    }

    fn as_typed(&self) -> Option<&dyn TypedOp> {
        self.op.as_typed()
    }
}

impl EvalOp for Guarded {
    fn eval(&self, context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        self.op.eval(context, inputs)
    }

    fn eval_out_of_plan(&self, inputs: TVec<TValue>) -> TractResult<Option<TVec<TValue>>> {
        if self.op.name() == "Range" {
            check_range(&inputs)?;
        }
        self.op.eval_out_of_plan(inputs)
    }

    fn state(&self, context: &EvalContext<'_>) -> TractResult<Option<Box<dyn OpState>>> {
        self.op.state(context)
    }
}

impl PartialEq for Guarded {
    fn eq(&self, _: &Self) -> bool {
        false
    }
}

impl Eq for Guarded {}

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
        let failed = |error: TractError| match error.root_cause().downcast_ref::<TooLarge>() {
            Some(too_large) => {
                Error::new(Reason::BadArgument, format!("inputs: the model refuses these: {too_large}"))
            }
            None => Error::new(Reason::BackendFailed, "tract failed while running the model")
                .caused_by(format!("{error:#}")),
        };
        let mut state = plan.spawn().map_err(failed)?;
        let results = state.run_plan_with_eval(values, |context, state, node, inputs| {
            stop_if(cancel)?;
            check_step(context, node, &inputs)?;
            eval(context, state, node, inputs)
        });
        let results = results.map_err(failed)?;
        check_reply(outputs.iter().map(|&index| results[index].as_bytes().len()))?;
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
