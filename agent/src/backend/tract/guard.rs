//! What keeps the making of a plan inside its bounds: sizes are known before anything is computed, and work stops
//! between two nodes.

use std::collections::HashMap;

use tract_onnx::ops::logic::If;
use tract_onnx::prelude::{
    DatumType, InferenceFact, InferenceModel, TValue, TVec, Tensor as TractTensor, TractResult, TypedModel,
};
use tract_onnx::tract_core::internal::{
    DimLike, EvalContext, EvalOp, Op, OpState, OutletId, StaticName, TypedNode, TypedOp, format_err,
};
use tract_onnx::tract_core::ops::cnn::{MaxPool, SumPool};
use tract_onnx::tract_core::ops::logic::IfThenElse;
use tract_onnx::tract_core::ops::scan::OptScan;
use tract_onnx::tract_hir::infer::{Factoid, InferenceModelPatch, InferenceNode, InferenceOp};
use tract_onnx::tract_hir::ops::dummy::Dummy;
use tract_onnx::tract_hir::ops::scan::InferenceScan;

use super::super::file::is_order;
use crate::scheduler::Cancel;

/// Bytes of one tensor inside a run.
const TENSOR_BYTES_MAX: usize = 1 << 30;

/// Bytes of all tensors that a run holds at the same time, its model's weights aside.
pub(super) const RUN_BYTES_MAX: usize = 2 << 30;

/// Ends the work when nobody waits for it.
pub(super) fn stop_if(cancel: &Cancel) -> TractResult<()> {
    if cancel.is_set() { Err(format_err!("nobody waits for the result")) } else { Ok(()) }
}

/// A size that no guest gets; told apart from what fails inside the engine.
#[derive(Debug)]
pub(super) struct TooLarge(String);

impl TooLarge {
    /// That tensors are too large together.
    pub(super) fn together() -> Self {
        let limit = RUN_BYTES_MAX >> 20;
        Self(format!("it would hold tensors of more than {limit} MiB together"))
    }
}

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TooLarge {}

/// How many bytes a tensor has, if it is not beyond reason.
pub(super) fn check_tensor(dtype: Option<DatumType>, shape: &[usize]) -> TractResult<usize> {
    let element = dtype.map_or(1, |dtype| dtype.size_of());
    let bytes = shape.iter().try_fold(element, |bytes, dim| bytes.checked_mul(*dim));
    if let Some(bytes) = bytes.filter(|bytes| *bytes <= TENSOR_BYTES_MAX) {
        return Ok(bytes);
    }
    let limit = TENSOR_BYTES_MAX >> 20;
    Err(TooLarge(format!("it would make a tensor of shape {shape:?}, more than {limit} MiB")).into())
}

/// Refuses a model that was read without [`Guarded`] for a tensor beyond reason or of a size that is not known, and for
/// windows over more channels than there are: tract takes their number from what the file says comes out.
pub(super) fn check_facts(model: &TypedModel) -> TractResult<()> {
    for node in model.nodes() {
        let pool = node.op_as::<MaxPool>().map(|pool| &pool.pool_spec);
        if let Some(pool) = pool.or_else(|| Some(&node.op_as::<SumPool>()?.pool_spec)) {
            let input = model.outlet_fact(node.inputs[0])?;
            let channels = pool.data_format.shape(&*input.shape)?.c().to_usize()?;
            if [pool.input_channels, pool.output_channels] != [channels; 2] {
                return Err(format_err!("{} gives other channels than it gets", node.name));
            }
        }
    }
    for output in model.nodes().iter().flat_map(|node| &node.outputs) {
        let shape = output.fact.shape.as_concrete();
        let shape = shape.ok_or_else(|| format_err!("it has a tensor whose size depends on numbers"))?;
        check_tensor(Some(output.fact.datum_type), shape)?;
    }
    check_run(model)
}

/// Refuses a plan whose tensors are too much together, however small each is.
pub(super) fn check_run(model: &TypedModel) -> TractResult<()> {
    if peak(model)? <= RUN_BYTES_MAX {
        return Ok(());
    }
    Err(TooLarge::together().into())
}

/// Bytes of all tensors that a run holds at most at the same time. Weights are there already; sizes that depend on the
/// numbers are checked when those are there.
fn peak(model: &TypedModel) -> TractResult<usize> {
    let order = model.eval_order()?;
    let bytes = |node: usize| -> usize {
        let facts = model.node(node).outputs.iter().map(|output| &output.fact);
        let computed = facts.filter(|fact| fact.konst.is_none()).map(|fact| fact.mem_size().to_usize());
        computed.map(|size| size.unwrap_or(0)).fold(0, usize::saturating_add)
    };
    let steps = order.iter().enumerate();
    let uses =
        steps.flat_map(|(step, node)| model.node(*node).inputs.iter().map(move |input| (input.node, step)));
    let mut last_use: HashMap<usize, usize> = uses.collect();
    let (mut held, mut most) = (0_usize, 0);
    for (step, node) in order.iter().enumerate() {
        held = held.saturating_add(bytes(*node));
        let mut inside = 0;
        for model in models_inside(model.node(*node)) {
            inside = inside.max(peak(model)?);
        }
        most = most.max(held.saturating_add(inside));
        for input in &model.node(*node).inputs {
            if last_use.get(&input.node) == Some(&step) {
                last_use.remove(&input.node);
                held -= bytes(input.node);
            }
        }
    }
    Ok(most)
}

/// The models that a node runs.
fn models_inside(node: &TypedNode) -> Vec<&TypedModel> {
    if let Some(scan) = node.op_as::<OptScan>() {
        return vec![scan.plan.model()];
    }
    node.op_as::<IfThenElse>().map_or(Vec::new(), |choice| vec![&choice.then_body, &choice.else_body])
}

/// Refuses a range from the numbers that say how long it is: shapes are planned with smaller integers.
pub(super) fn check_range(inputs: &[TValue]) -> TractResult<()> {
    let number = |index: usize| inputs[index].cast_to_scalar::<f64>();
    let count = ((number(1)? - number(0)?) / number(2)?).abs().ceil();
    // What is not a number is not below the limit either.
    if count <= (TENSOR_BYTES_MAX / size_of::<f64>()) as f64 {
        return Ok(());
    }
    Err(TooLarge(format!("it would make a list of {count} numbers")).into())
}

/// Refuses an order of axes that is none: moving axes until they are in such an order would never end.
fn check_order(order: &TractTensor) -> TractResult<()> {
    let order = order.cast_to::<i64>()?;
    if is_order(order.try_as_plain_ram()?.as_slice::<i64>()?) {
        return Ok(());
    }
    Err(format_err!("Transpose: expected an order of the axes, each once"))
}

/// Wraps every operator of a model, and of the models inside it, in [`Guarded`].
pub(super) fn guard(model: &mut InferenceModel, cancel: &Cancel) {
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
        if let ("Transpose", Some(order)) = (&*self.op.name(), node.inputs.get(1)) {
            let order = mapping.get(order).and_then(|order| target.outlet_fact(*order).ok()?.konst.clone());
            order.map_or(Ok(()), |order| check_order(&order))?;
        }
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
        match (&*self.op.name(), inputs.get(1)) {
            ("Range", _) => check_range(&inputs)?,
            ("Transpose", Some(order)) => check_order(order)?,
            _ => {}
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
