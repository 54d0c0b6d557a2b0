//! What keeps a run inside its bounds, in a model and in the models inside it: before each step it is looked whether
//! somebody waits for the result, and whether an output is beyond reason whose size depends on numbers; after it, how
//! much there is of such outputs together.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use tract_onnx::prelude::{IntoRunnable, TValue, TVec, TractResult, TypedFact, TypedModel};
use tract_onnx::tract_core::internal::{
    EvalContext, EvalOp, LaneId, Op, OpState, SessionId, StaticName, Symbol, TurnState, TypedOp, as_op,
};
use tract_onnx::tract_core::ops::array::Range;
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_core::ops::logic::IfThenElse;
use tract_onnx::tract_core::ops::scan::OptScan;
use tract_onnx::tract_core::ops::source::TypedSource;

use super::Plan;
use super::guard::{RUN_BYTES_MAX, TooLarge, check_range, check_tensor, stop_if};
use crate::scheduler::Cancel;

thread_local! {
    /// The run that this thread is at: engines hand nothing down to the models inside a model.
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

/// What a run has come to.
struct Run {
    cancel: Cancel,
    /// Outputs whose size was not known before, by the step that made them, until the last step that needs them.
    held: HashMap<StepId, Held>,
    bytes: usize,
}

/// The number of a model, of those inside a plan, and that of a node.
type StepId = (usize, usize);

struct Held {
    bytes: usize,
    /// Steps that have not had it yet.
    uses: usize,
}

impl Run {
    /// Counts outputs of a step, instead of those that it made when its model ran before.
    fn hold(&mut self, step: StepId, held: Held) -> TractResult<()> {
        self.release(step);
        self.bytes = self.bytes.saturating_add(held.bytes);
        self.held.insert(step, held);
        if self.bytes <= RUN_BYTES_MAX {
            return Ok(());
        }
        Err(TooLarge::together().into())
    }

    fn used(&mut self, step: StepId) {
        if let Some(held) = self.held.get_mut(&step) {
            held.uses = held.uses.saturating_sub(1);
            if held.uses == 0 {
                self.release(step);
            }
        }
    }

    fn release(&mut self, step: StepId) {
        self.bytes -= self.held.remove(&step).map_or(0, |held| held.bytes);
    }
}

/// Runs a plan of watched steps.
///
/// # Errors
/// [`TooLarge`], that nobody waits, and those of the engine.
pub(super) fn run(plan: &Plan, inputs: TVec<TValue>, cancel: &Cancel) -> TractResult<TVec<TValue>> {
    let run = Run { cancel: cancel.clone(), held: HashMap::new(), bytes: 0 };
    RUN.set(Some(run));
    let results = plan.run(inputs);
    RUN.set(None);
    results
}

/// Lets every step of an optimised model be watched, and of the models inside it.
pub(super) fn watch(model: &mut TypedModel) -> TractResult<()> {
    watch_all(model, &mut 0)
}

fn watch_all(model: &mut TypedModel, models: &mut usize) -> TractResult<()> {
    let number = *models;
    *models += 1;
    let is_open = |model: &TypedModel, node: usize| {
        model.node(node).outputs.iter().any(|output| !output.fact.shape.is_concrete())
    };
    for node in 0..model.nodes().len() {
        let takes = model.node(node).inputs.iter().map(|input| input.node);
        let takes = takes.filter(|from| is_open(model, *from)).map(|from| (number, from)).collect();
        let outputs = model.node(node).outputs.iter();
        let uses = outputs.clone().map(|output| output.successors.len()).sum();
        let open = outputs.filter(|output| !output.fact.shape.is_concrete());
        let open = open.map(|output| output.fact.clone()).collect();
        let node_mut = &mut model.nodes_mut()[node];
        if node_mut.op_is::<TypedSource>() || node_mut.op_is::<Const>() {
            continue;
        }
        if let Some(scan) = node_mut.op_as::<OptScan>() {
            let mut inner = scan.plan.model().clone();
            watch_all(&mut inner, models)?;
            let mut parameters = (**scan).clone();
            parameters.plan = inner.into_runnable()?;
            node_mut.op = Box::new(OptScan::new(Arc::new(parameters)));
        }
        if let Some(choice) = node_mut.op_as_mut::<IfThenElse>() {
            watch_all(&mut choice.then_body, models)?;
            watch_all(&mut choice.else_body, models)?;
        }
        let op = node_mut.op.clone();
        node_mut.op = Box::new(Watched { op, step: (number, node), open, uses, takes });
    }
    Ok(())
}

/// A step that is looked at before it is done.
#[derive(Clone, Debug)]
struct Watched {
    op: Box<dyn TypedOp>,
    step: StepId,
    /// Outputs whose size depends on numbers, and how many steps need them.
    open: TVec<TypedFact>,
    uses: usize,
    /// Whose such outputs this one needs.
    takes: TVec<StepId>,
}

impl Watched {
    /// Does the step, if it may be done.
    fn step(
        &self,
        context: &EvalContext<'_>,
        inputs: TVec<TValue>,
        eval: impl FnOnce(TVec<TValue>) -> TractResult<TVec<TValue>>,
    ) -> TractResult<TVec<TValue>> {
        let with_run = |look: &mut dyn FnMut(&mut Run) -> TractResult<()>| {
            RUN.with_borrow_mut(|run| run.as_mut().map_or(Ok(()), look))
        };
        with_run(&mut |run| stop_if(&run.cancel))?;
        if self.op.is::<Range>() {
            check_range(&inputs)?;
        }
        for fact in &self.open {
            if let Ok(shape) = fact.shape.eval_to_usize(context.symbols) {
                check_tensor(Some(fact.datum_type), &shape)?;
            }
        }
        let outputs = eval(inputs)?;
        if !self.open.is_empty() {
            // Some say how much it is only when it is there.
            let bytes = outputs.iter().map(|output| output.as_bytes().len()).sum();
            with_run(&mut |run| run.hold(self.step, Held { bytes, uses: self.uses }))?;
        }
        if !self.takes.is_empty() {
            with_run(&mut |run| {
                self.takes.iter().for_each(|step| run.used(*step));
                Ok(())
            })?;
        }
        Ok(outputs)
    }
}

impl Op for Watched {
    fn name(&self) -> StaticName {
        self.op.name()
    }

    fn mints_runtime_symbols(&self) -> bool {
        self.op.mints_runtime_symbols()
    }

    fn required_bound_symbols(&self, inputs: &[&TypedFact]) -> TVec<Symbol> {
        self.op.required_bound_symbols(inputs)
    }

    fn as_typed(&self) -> Option<&dyn TypedOp> {
        Some(self)
    }
}

impl EvalOp for Watched {
    fn eval(&self, context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        self.step(context, inputs, |inputs| self.op.eval(context, inputs))
    }

    fn forwards_input(&self) -> Option<usize> {
        self.op.forwards_input()
    }

    fn eval_out_of_plan(&self, inputs: TVec<TValue>) -> TractResult<Option<TVec<TValue>>> {
        self.op.eval_out_of_plan(inputs)
    }

    fn state(&self, context: &EvalContext<'_>) -> TractResult<Option<Box<dyn OpState>>> {
        let state = self.op.state(context)?;
        Ok(state.map(|state| Box::new(WatchedState(state)) as Box<dyn OpState>))
    }

    fn drop_session(&self, session: SessionId, node: usize) {
        self.op.drop_session(session, node);
    }
}

impl TypedOp for Watched {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        self.op.output_facts(inputs)
    }
}

impl PartialEq for Watched {
    fn eq(&self, _: &Self) -> bool {
        false
    }
}

impl Eq for Watched {}

/// What a step keeps from one time to the next.
#[derive(Clone, Debug)]
struct WatchedState(Box<dyn OpState>);

impl OpState for WatchedState {
    fn load_from(
        &mut self,
        turn: &mut TurnState,
        values: &mut dyn Iterator<Item = TValue>,
    ) -> TractResult<()> {
        self.0.load_from(turn, values)
    }

    fn save_to(&self, values: &mut Vec<TValue>) -> TractResult<()> {
        self.0.save_to(values)
    }

    fn init_tensor_fact(&self) -> Option<(String, TypedFact)> {
        self.0.init_tensor_fact()
    }

    fn has_init_tensor_fact(&self) -> bool {
        self.0.has_init_tensor_fact()
    }

    fn resolve_symbols(&mut self, turn: &mut TurnState) -> TractResult<()> {
        self.0.resolve_symbols(turn)
    }

    fn eval(
        &mut self,
        context: &EvalContext<'_>,
        op: &dyn Op,
        inputs: TVec<TValue>,
    ) -> TractResult<TVec<TValue>> {
        match op.downcast_ref::<Watched>() {
            Some(watched) => {
                watched.step(context, inputs, |inputs| self.0.eval(context, watched.op.as_op(), inputs))
            }
            None => self.0.eval(context, op, inputs),
        }
    }

    fn reset_lanes(&mut self, lanes: &[LaneId]) -> TractResult<()> {
        self.0.reset_lanes(lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        Run { cancel: Cancel::default(), held: HashMap::new(), bytes: 0 }
    }

    #[test]
    fn what_is_held_is_counted_until_the_last_step_that_needs_it() {
        let mut run = run();
        let (first, second) = ((0, 1), (1, 1));
        run.hold(first, Held { bytes: 100, uses: 2 }).expect("little");
        run.hold(second, Held { bytes: 10, uses: 1 }).expect("little");
        run.used(first);
        assert_eq!(run.bytes, 110);
        run.used(first);
        run.used(first);
        assert_eq!(run.bytes, 10);
        run.hold(second, Held { bytes: 30, uses: 1 }).expect("a loop's next time");
        assert_eq!(run.bytes, 30);
    }

    #[test]
    fn small_tensors_together_are_too_large() {
        let mut run = run();
        let part = RUN_BYTES_MAX / 4;
        for step in 0..4 {
            run.hold((0, step), Held { bytes: part, uses: 1 }).expect("just enough");
        }
        let refusal = run.hold((0, 4), Held { bytes: 1, uses: 1 }).expect_err("one more");
        assert!(refusal.downcast_ref::<TooLarge>().is_some(), "{refusal}");
    }
}
