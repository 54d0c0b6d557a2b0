//! The word that nobody waits for a result any more.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vaccel_proto::{Error, Reason};

/// Tells a computation to stop, and whoever interrupts engines that nobody waits any more.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel(Arc<State>);

#[derive(Default)]
struct State {
    set: AtomicBool,
    interrupt: Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.set)
    }
}

impl Cancel {
    /// Whether the result is no longer wanted.
    pub(crate) fn is_set(&self) -> bool {
        self.0.set.load(Ordering::Relaxed)
    }

    /// # Errors
    /// `CANCELLED` when the result is no longer wanted.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.is_set() { Err(Error::new(Reason::Cancelled, "nobody waits for the result")) } else { Ok(()) }
    }

    pub(crate) fn set(&self) {
        self.0.set.store(true, Ordering::Relaxed);
        if let Some(interrupt) = &*self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt();
        }
    }

    /// Runs `work` with a way to interrupt it from another thread: `interrupt` is called at most until `work` returns.
    pub(crate) fn interruptible<T>(
        &self,
        interrupt: impl Fn() + Send + 'static,
        work: impl FnOnce() -> T,
    ) -> T {
        let slot = |value| {
            *self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = value;
        };
        slot(Some(Box::new(interrupt)));
        if self.is_set() {
            // It was set before the slot was filled.
            self.set();
        }
        let result = work();
        slot(None);
        result
    }
}
