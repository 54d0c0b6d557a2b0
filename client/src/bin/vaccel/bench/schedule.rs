//! When the calls of an open loop are due, and waiting for that: the clock decides, not the answers.

use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

/// Calls at a fixed distance in time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    start: Instant,
    rate: f64,
    count: u64,
}

impl Schedule {
    /// As many calls as begin in `time`; at least one.
    pub(crate) fn new(start: Instant, rate: f64, time: Duration) -> Self {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the limits of rate and time keep it far below 2^64"
        )]
        let count = (rate * time.as_secs_f64()).ceil() as u64;
        Self { start, rate, count: count.max(1) }
    }

    /// When a call is due, the first one being 0; none after the last one. It is reckoned from the start, so that
    /// nothing adds up over time.
    pub(crate) fn due(&self, call: u64) -> Option<Instant> {
        (call < self.count).then(|| self.start + Duration::from_secs_f64(call as f64 / self.rate))
    }

    /// Gives a permit for each call when it is due, and at the end one to each of the callers to see that there are no
    /// more. It blocks its thread: the runtime's clock goes by milliseconds.
    pub(crate) fn keep(&self, permits: &Semaphore, callers: usize) {
        wake_up_in_time();
        for due in (0..).map_while(|call| self.due(call)) {
            wait_until(due);
            permits.add_permits(1);
        }
        permits.add_permits(callers);
    }
}

/// Asks Linux not to let this thread's sleeps last 50 µs longer than they should, as it does to save wake-ups. Where
/// that is not to be had, calls are sent as much later, which the report says.
fn wake_up_in_time() {
    if let Ok(link) = std::fs::read_link("/proc/thread-self")
        && let Some(thread) = link.file_name()
    {
        let _ = std::fs::write(Path::new("/proc").join(thread).join("timerslack_ns"), "1");
    }
}

fn wait_until(due: Instant) {
    loop {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_due_at_fixed_times_and_nothing_adds_up() {
        let start = Instant::now();
        let schedule = Schedule::new(start, 3000.0, Duration::from_secs(600));
        assert_eq!(schedule.due(0), Some(start));
        assert_eq!(schedule.due(3), Some(start + Duration::from_millis(1)));
        assert_eq!(schedule.due(1_500_000), Some(start + Duration::from_secs(500)));
        assert!(schedule.due(1_799_999).is_some_and(|due| due < start + Duration::from_secs(600)));
        assert_eq!(schedule.due(1_800_000), None);
    }

    #[test]
    fn a_part_of_a_call_is_a_call() {
        let count = |rate, ms| {
            let schedule = Schedule::new(Instant::now(), rate, Duration::from_millis(ms));
            (0..).map_while(|call| schedule.due(call)).count()
        };
        assert_eq!(
            [count(10.0, 1000), count(10.0, 1001), count(0.1, 1000), count(1000.0, 0)],
            [10, 11, 1, 1]
        );
    }

    #[test]
    fn permits_come_no_earlier_than_their_calls_are_due() {
        let start = Instant::now();
        let schedule = Schedule::new(start, 2000.0, Duration::from_millis(20));
        let permits = Semaphore::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| schedule.keep(&permits, 5));
            let mut seen = 0;
            while seen < 45 {
                seen = permits.available_permits();
                let last = schedule.due((seen.min(40) as u64).saturating_sub(1));
                assert!(seen == 0 || last.is_some_and(|due| due <= Instant::now()), "{seen} too early");
                std::thread::yield_now();
            }
        });
        assert_eq!(permits.available_permits(), 45);
    }
}
