//! Who of a connection's streams has something to do.
//!
//! All streams of a connection are worked on by its one task, which would have to ask every one of them whenever it
//! wakes. Instead each has a place on a board, which lights up when it is woken.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

const BITS: usize = u64::BITS as usize;

/// Places on a board.
pub(super) const PLACES: usize = 2 * BITS;

/// The board of a connection.
#[derive(Debug, Default)]
pub(super) struct Bell {
    lit: [AtomicU64; PLACES / BITS],
    listener: Mutex<Option<Waker>>,
}

/// One place: woken, it lights up and wakes the task.
#[derive(Debug)]
pub(super) struct Place {
    bell: Arc<Bell>,
    number: usize,
}

impl Place {
    /// Lights up, when the task itself is at it; returns whether it was dark.
    pub(super) fn light(&self) -> bool {
        let bit = 1 << (self.number % BITS);
        self.bell.lit[self.number / BITS].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }
}

impl Bell {
    /// A place.
    pub(super) fn place(self: &Arc<Self>, number: usize) -> Arc<Place> {
        Arc::new(Place { bell: Arc::clone(self), number })
    }

    /// Whom to wake.
    pub(super) fn listen(&self, task: &Waker) {
        let mut known = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.as_ref().is_some_and(|known| known.will_wake(task)) {
            *known = Some(task.clone());
        }
    }

    /// What wakes it, once it has been at work.
    pub(super) fn task(&self) -> Option<Waker> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn is_lit(&self) -> bool {
        self.lit.iter().any(|lit| lit.load(Ordering::Acquire) != 0)
    }

    /// The places that are lit, which get dark: one that lights up again is not among them again, or would have the
    /// task for itself.
    pub(super) fn take(&self) -> impl Iterator<Item = usize> + use<> {
        let lit = self.lit.each_ref().map(|lit| match lit.load(Ordering::Acquire) {
            0 => 0,
            _ => lit.swap(0, Ordering::AcqRel),
        });
        lit.into_iter().enumerate().flat_map(|(index, mut lit)| {
            std::iter::from_fn(move || {
                let bit = (lit != 0).then(|| lit.trailing_zeros() as usize)?;
                lit &= lit - 1;
                Some(index * BITS + bit)
            })
        })
    }
}

impl Wake for Place {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.light()
            && let Some(task) = self.bell.task()
        {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_place_that_is_woken_twice_wakes_the_task_once() {
        let bell = Arc::new(Bell::default());
        let task = Arc::new(Counted(AtomicUsize::new(0)));
        bell.listen(&Waker::from(Arc::clone(&task)));
        let wakers = [0, 63, 64, PLACES - 1].map(|number| Waker::from(bell.place(number)));
        for waker in &wakers {
            waker.wake_by_ref();
            waker.wake_by_ref();
        }
        assert_eq!(task.0.load(Ordering::Relaxed), wakers.len());
        let mut lit = bell.take();
        assert_eq!(lit.next(), Some(0));
        wakers[0].wake_by_ref();
        assert_eq!(lit.collect::<Vec<_>>(), [63, 64, PLACES - 1]);
        assert_eq!(bell.take().collect::<Vec<_>>(), [0]);
        let place = bell.place(5);
        assert!(place.light() && !place.light());
        Waker::from(place).wake();
        assert_eq!(task.0.load(Ordering::Relaxed), wakers.len() + 1, "the task lit it itself");
    }
}
