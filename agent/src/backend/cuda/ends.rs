//! Threads that end by themselves, and give back what they have of a device when they do.
//!
//! Whoever lets one go may be waited for, in turn, by somebody that it waits for: a model's thread by a capture on a
//! lane, while it closes a session of another model, whose thread waits until the capture is over. So nobody waits for
//! such a thread but those who need its memory, and they not for long.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

/// What a thread has as long as it has something of a device.
pub(crate) struct Alive(&'static Ends);

/// Threads of this process that were let go.
pub(super) struct Ends {
    threads: Mutex<Vec<Weak<Alive>>>,
    changed: Condvar,
}

impl Drop for Alive {
    fn drop(&mut self) {
        // Whoever is about to wait has seen it, or sees that it is gone.
        drop(self.0.threads.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.changed.notify_all();
    }
}

impl Ends {
    pub(super) const fn new() -> Self {
        Self { threads: Mutex::new(Vec::new()), changed: Condvar::new() }
    }

    /// For a thread that begins.
    pub(super) fn alive(&'static self) -> Arc<Alive> {
        Arc::new(Alive(self))
    }

    /// Nobody needs a thread any more, which ends by itself.
    pub(super) fn expect(&self, thread: &Weak<Alive>) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| thread.strong_count() > 0);
        threads.push(Weak::clone(thread));
    }

    /// Waits until those have ended that were let go, if it takes no longer than this.
    pub(super) fn wait(&self, most: Duration) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let are_left = |threads: &mut Vec<Weak<Alive>>| {
            threads.retain(|thread| thread.strong_count() > 0);
            !threads.is_empty()
        };
        drop(self.changed.wait_timeout_while(threads, most, are_left));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    #[test]
    fn who_needs_what_a_thread_has_waits_for_its_end_and_not_for_long() {
        static ENDS: Ends = Ends::new();
        let long = Duration::from_secs(60);
        ENDS.wait(long);
        let ((leave, left), alive) = (channel::<()>(), ENDS.alive());
        let ending = Arc::downgrade(&alive);
        let thread = std::thread::spawn(move || {
            let _ = left.recv();
            drop(alive);
        });
        let begun = Instant::now();
        ENDS.wait(long);
        assert!(begun.elapsed() < long, "nobody has let it go");
        ENDS.expect(&ending);
        ENDS.wait(Duration::from_millis(1));
        assert_eq!(ending.strong_count(), 1, "it goes on");
        drop(leave);
        ENDS.wait(long);
        assert!(begun.elapsed() < long && ending.strong_count() == 0);
        thread.join().expect("it ended");
        // One that ended before is not waited for.
        ENDS.expect(&ending);
        ENDS.wait(long);
        assert!(begun.elapsed() < long);
    }
}
