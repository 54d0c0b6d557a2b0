//! What the first that needs it makes for all. Once it is there it stays; what could not be had for now, as when a
//! device's memory was used up, is tried again.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vaccel_proto::Error;

/// How long nobody tries again, as a multiple of what a try took: a twentieth of the time is lost at most to what
/// cannot be had.
const PAUSE: u32 = 20;

/// And at most: whoever asked for it should have it soon after it can be had.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why something was not made.
pub(super) enum Refusal {
    /// Another try would end the same.
    Lasting(Error),
    ForNow(Error),
}

pub(super) struct Made<T> {
    there: OnceLock<T>,
    /// Locked by who makes it: others wait, and have what comes of that.
    refused: Mutex<Option<Refused>>,
}

struct Refused {
    why: Error,
    /// None for good.
    until: Option<Instant>,
}

impl<T> Default for Made<T> {
    fn default() -> Self {
        Self { there: OnceLock::new(), refused: Mutex::default() }
    }
}

impl<T> Made<T> {
    /// If it was made.
    pub(super) fn get(&self) -> Option<&T> {
        self.there.get()
    }

    /// # Errors
    /// What `make` is refused with, now or shortly before.
    pub(super) fn get_or_make(&self, make: impl FnOnce() -> Result<T, Refusal>) -> Result<&T, Error> {
        if let Some(there) = self.there.get() {
            return Ok(there);
        }
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = self.there.get() {
            return Ok(there);
        }
        let begun = Instant::now();
        if let Some(refused) = refused.as_ref().filter(|refused| refused.until.is_none_or(|at| begun < at)) {
            return Err(again(&refused.why));
        }
        let (why, until) = match make() {
            Ok(made) => return Ok(self.there.get_or_init(|| made)),
            Err(Refusal::Lasting(why)) => (why, None),
            Err(Refusal::ForNow(why)) => {
                let pause = begun.elapsed().saturating_mul(PAUSE).min(PAUSE_MAX);
                (why, Some(Instant::now() + pause))
            }
        };
        let error = again(&why);
        *refused = Some(Refused { why, until });
        Err(error)
    }
}

/// The same error once more.
fn again(error: &Error) -> Error {
    let same = Error::new(error.reason(), error.message()).with(error.detail().clone());
    match std::error::Error::source(error) {
        Some(source) => same.caused_by(source.to_string()),
        None => same,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_proto::Reason;

    fn error(text: &str) -> Error {
        Error::new(Reason::BackendFailed, text).caused_by("why")
    }

    #[test]
    fn what_cannot_be_had_is_tried_again_after_a_pause_unless_it_never_will() {
        let made = Made::<u8>::default();
        let slow = || {
            let begun = Instant::now();
            while begun.elapsed() < PAUSE_MAX / PAUSE / 100 {
                std::hint::spin_loop();
            }
            Err(Refusal::ForNow(error("not now")))
        };
        for _ in 0..2 {
            let refusal = made.get_or_make(slow).expect_err("not there");
            assert_eq!((refusal.message(), refusal.reason()), ("not now", Reason::BackendFailed));
            assert_eq!(std::error::Error::source(&refusal).map(ToString::to_string).as_deref(), Some("why"));
        }
        assert!(made.get_or_make(|| Ok(1)).is_err(), "it was tried just now");
        while made.get_or_make(|| Ok(2)).is_err() {
            std::thread::yield_now();
        }
        assert_eq!(made.get_or_make(|| unreachable!("it is there")).ok(), Some(&2));
        assert_eq!(made.get(), Some(&2));

        let never = Made::<u8>::default();
        assert!(never.get_or_make(|| Err(Refusal::Lasting(error("never")))).is_err());
        assert!(never.get_or_make(|| unreachable!("nobody tries")).is_err());
    }
}
