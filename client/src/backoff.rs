//! The pause between one attempt and the next: doubling, capped, and never the same for two clients.

use std::time::Duration;

/// Longest first pause.
pub(crate) const PAUSE_FIRST: Duration = Duration::from_millis(50);
/// Longest pause of all: an agent that comes back is found again within it.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Pauses of 50 ms to 5 s.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: PAUSE_FIRST }
    }
}

impl Backoff {
    /// The next pause: between half of the step and all of it, so that clients that lost the same agent at
    /// the same moment do not come back together.
    pub(crate) fn pause(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(PAUSE_MAX);
        // Without randomness the longest pause is still a right one.
        let share = getrandom::u32().map_or(1.0, |random| f64::from(random) / f64::from(u32::MAX));
        step.mul_f64(0.5 + share / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_cap_and_stay_within_their_step() {
        let mut backoff = Backoff::default();
        let mut step = PAUSE_FIRST;
        for _ in 0..20 {
            let pause = backoff.pause();
            assert!(pause >= step / 2 && pause <= step, "{pause:?} for a step of {step:?}");
            step = (step * 2).min(PAUSE_MAX);
        }
        assert_eq!(step, PAUSE_MAX);
    }

    #[test]
    fn two_clients_do_not_pause_alike() {
        let pauses = |mut backoff: Backoff| (0..8).map(|_| backoff.pause()).collect::<Vec<_>>();
        assert_ne!(pauses(Backoff::default()), pauses(Backoff::default()));
    }
}
