//! Loaded models: what engines made of a resource, and who asked for it to be kept.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::OnceCell;
use vaccel_proto::Error;

use super::{Choice, ModelFile, Program, RunRules};
use crate::scheduler::{Batcher, Batching, Runner};

/// Rows that calls of a model may run together of which nothing is known but that it has rows. How many do is measured;
/// beyond this a batch gains little anywhere, and one call would wait for many.
const ROWS_MAX: usize = 64;

/// A loaded model and what is known about it.
pub(crate) struct Model {
    pub(crate) file: ModelFile,
    pub(crate) program: Arc<dyn Program>,
    /// How its calls run together.
    pub(crate) batcher: Batcher,
    /// What the operations that use this model worked out about it, one of each type.
    notes: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("inputs", &self.file.inputs)
            .field("outputs", &self.file.outputs)
            .finish()
    }
}

impl Model {
    pub(super) fn new(file: ModelFile, program: Arc<dyn Program>, rules: &RunRules) -> Self {
        let batching = Batching {
            parallel: rules.parallel.unwrap_or(usize::MAX).min(program.parallel_runs()),
            rows_max: rules.rows_max.unwrap_or(if file.has_rows { ROWS_MAX } else { 0 }),
            sizes_are_dear: program.prepares_shapes(),
            mixes_tenants: rules.mixes_tenants,
            delay: rules.delay,
        };
        let batcher = Batcher::new(Arc::clone(&program) as Arc<dyn Runner>, batching);
        Self { file, program, batcher, notes: Mutex::default() }
    }

    /// What an operation needs to know about the model, worked out on its first use.
    ///
    /// # Errors
    /// What `read` returns.
    pub(crate) fn note<T: Any + Send + Sync>(
        &self,
        read: impl FnOnce(&Self) -> Result<T, Error>,
    ) -> Result<Arc<T>, Error> {
        let notes = || self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let known = notes().iter().find_map(|note| Arc::clone(note).downcast().ok());
        if let Some(note) = known {
            return Ok(note);
        }
        let note = Arc::new(read(self)?);
        let mut notes = notes();
        // Two first calls can both have read it.
        if !notes.iter().any(|other| other.is::<T>()) {
            notes.push(Arc::clone(&note) as Arc<dyn Any + Send + Sync>);
        }
        Ok(note)
    }
}

/// A family of operations through which sessions load and unload models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Tf,
    Tflite,
    Torch,
}

/// Who loads models: a session, of which nothing is known here but whether it is still there.
pub(crate) type Holder = Arc<dyn Any + Send + Sync>;

/// What engines made of one resource; concurrent first uses share one load.
#[derive(Debug, Default)]
pub(crate) struct LoadedModels(Mutex<HashMap<Choice, Slot>>);

/// The model for one engine and device, and who loaded it.
#[derive(Debug, Default)]
struct Slot {
    model: Arc<OnceCell<Arc<Model>>>,
    holders: Vec<(Family, Weak<dyn Any + Send + Sync>)>,
}

impl Slot {
    /// Where a holder stands in the list, from which those are gone that are gone themselves.
    fn find(&mut self, family: Family, holder: &Holder) -> Option<usize> {
        self.holders.retain(|(_, held)| held.strong_count() > 0);
        let same = |held: &Weak<dyn Any + Send + Sync>| std::ptr::addr_eq(held.as_ptr(), Arc::as_ptr(holder));
        self.holders.iter().position(|(by, held)| *by == family && same(held))
    }
}

impl LoadedModels {
    fn slots(&self) -> MutexGuard<'_, HashMap<Choice, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of the model for an engine and device.
    pub(crate) fn slot(&self, choice: &Choice) -> Arc<OnceCell<Arc<Model>>> {
        Arc::clone(&self.slots().entry(choice.clone()).or_default().model)
    }

    /// Notes that a holder loaded the model through a family; again is the same.
    pub(crate) fn hold(&self, choice: &Choice, family: Family, holder: &Holder) {
        let mut slots = self.slots();
        let slot = slots.entry(choice.clone()).or_default();
        if slot.find(family, holder).is_none() {
            slot.holders.push((family, Arc::downgrade(holder)));
        }
    }

    /// Whether the holder loaded the model through the family.
    pub(crate) fn holds(&self, choice: &Choice, family: Family, holder: &Holder) -> bool {
        self.slots().get_mut(choice).is_some_and(|slot| slot.find(family, holder).is_some())
    }

    /// Lets the model go for a holder; the last one's going frees it, once running calls have ended. Operations that
    /// load on first use load it again. Returns whether the holder had it.
    pub(crate) fn release(&self, choice: &Choice, family: Family, holder: &Holder) -> bool {
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(choice) else { return false };
        let Some(index) = slot.find(family, holder) else { return false };
        slot.holders.swap_remove(index);
        // Dropped outside of the lock: a large model takes its time.
        let last = if slot.holders.is_empty() { slots.remove(choice) } else { None };
        drop(slots);
        drop(last);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_kept_until_its_last_holder_lets_go() {
        let models = LoadedModels::default();
        let choice = Choice::default();
        let (one, other): (Holder, Holder) = (Arc::new(1), Arc::new(2));
        let slot = models.slot(&choice);
        models.hold(&choice, Family::Tf, &one);
        models.hold(&choice, Family::Tf, &one);
        models.hold(&choice, Family::Torch, &other);
        assert!(models.holds(&choice, Family::Tf, &one));
        assert!(!models.holds(&choice, Family::Torch, &one), "another family");
        assert!(!models.holds(&choice, Family::Tf, &other), "another session");
        assert!(!models.release(&choice, Family::Torch, &one));
        assert!(models.release(&choice, Family::Tf, &one));
        assert!(!models.release(&choice, Family::Tf, &one), "only once");
        assert!(Arc::ptr_eq(&slot, &models.slot(&choice)), "the other still has it");
        assert!(models.release(&choice, Family::Torch, &other));
        assert!(!Arc::ptr_eq(&slot, &models.slot(&choice)), "loaded anew when somebody asks");
    }

    #[test]
    fn a_holder_that_is_gone_is_forgotten() {
        let models = LoadedModels::default();
        let choice = Choice::default();
        let (gone, here): (Holder, Holder) = (Arc::new(1), Arc::new(2));
        models.hold(&choice, Family::Tf, &gone);
        drop(gone);
        models.hold(&choice, Family::Tf, &here);
        assert_eq!(models.slots()[&choice].holders.len(), 1);
    }
}
