//! Who may use devices together, and who is alone.
//!
//! An engine takes memory when it wants, which a capture of a graph anywhere in the process does not bear. So whoever
//! captures is alone. It waits for the runs that are going on while no others begin, but not for long, and not for what
//! takes long by nature: a graph saves a millisecond, and may be captured another time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long runs are held up for a capture that waits for others: they take a few milliseconds.
const PATIENCE: Duration = Duration::from_millis(50);

/// After which time it is tried again, when one of them took longer: a twentieth of the time is lost at most.
const PAUSE: Duration = Duration::from_secs(1);

/// The turns of one process.
#[derive(Default)]
pub(super) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    runs: usize,
    loads: usize,
    /// Somebody is alone, or waits to be.
    is_taken: bool,
    not_before: Option<Instant>,
}

/// A turn, which ends when it is dropped.
pub(crate) struct Turn {
    turns: &'static Turns,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Run,
    Load,
    Alone,
}

impl Turns {
    pub(super) const fn new() -> Self {
        let state = State { runs: 0, loads: 0, is_taken: false, not_before: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a run, together with others.
    pub(super) fn run(&'static self) -> Turn {
        self.together().runs += 1;
        Turn { turns: self, kind: Kind::Run }
    }

    /// For what takes long, together with others.
    pub(super) fn load(&'static self) -> Turn {
        self.together().loads += 1;
        Turn { turns: self, kind: Kind::Load }
    }

    fn together(&self) -> MutexGuard<'_, State> {
        let waited = self.changed.wait_while(self.state(), |state| state.is_taken);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// For whoever must be alone; none where that would take long.
    pub(super) fn alone(&'static self) -> Option<Turn> {
        let mut state = self.state();
        if state.is_taken || state.loads > 0 || state.not_before.is_some_and(|at| Instant::now() < at) {
            return None;
        }
        state.is_taken = true;
        let waited = self.changed.wait_timeout_while(state, PATIENCE, |state| state.runs > 0);
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            (state.is_taken, state.not_before) = (false, Some(Instant::now() + PAUSE));
            drop(state);
            self.changed.notify_all();
            return None;
        }
        Some(Turn { turns: self, kind: Kind::Alone })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.turns.state();
        match self.kind {
            Kind::Run => state.runs -= 1,
            Kind::Load => state.loads -= 1,
            Kind::Alone => state.is_taken = false,
        }
        drop(state);
        self.turns.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;

    #[test]
    fn who_is_alone_waits_for_runs_that_are_short_and_for_nothing_else() {
        static TURNS: Turns = Turns::new();
        let load = TURNS.load();
        assert!(TURNS.alone().is_none(), "it takes long");
        drop(load);
        let (began, begin) = channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let other = std::thread::spawn(move || {
            let _run = TURNS.run();
            began.send(()).expect("somebody waits");
            over.store(true, Ordering::Relaxed);
        });
        begin.recv().expect("it runs");
        let alone = TURNS.alone();
        assert!(alone.is_some() && is_over.load(Ordering::Relaxed));
        assert!(TURNS.alone().is_none(), "one at a time");
        other.join().expect("over");

        let (began, begin) = channel();
        let other = std::thread::spawn(move || {
            let _run = TURNS.run();
            began.send(()).expect("somebody waits");
        });
        assert!(begin.try_recv().is_err(), "a run waits for who is alone");
        drop(alone);
        begin.recv().expect("it runs");
        other.join().expect("over");
    }

    #[test]
    fn a_run_that_takes_long_holds_up_nobody_for_long() {
        static TURNS: Turns = Turns::new();
        let long = TURNS.run();
        let begun = Instant::now();
        assert!(TURNS.alone().is_none());
        assert!(begun.elapsed() >= PATIENCE);
        drop(TURNS.run());
        drop(long);
        assert!(TURNS.alone().is_none(), "not again at once");
        TURNS.state().not_before = None;
        assert!(TURNS.alone().is_some());
    }
}
