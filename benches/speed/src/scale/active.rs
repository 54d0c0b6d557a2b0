//! Guests that call every now and then.

use std::time::{Duration, Instant};

use crate::Failure;
use crate::peers::{self, Caller};
use crate::process::Pair;
use crate::shape::{Shape, Socket};

/// Threads that make the guests' calls.
const DRIVERS: usize = 4;

/// Between two calls of a guest. The guests' calls are spread over it evenly.
const PERIOD: Duration = Duration::from_secs(1);

/// What the calls took.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Of calls that worked, in microseconds.
    pub(crate) times: Vec<f64>,
    /// What went wrong.
    pub(crate) errors: Vec<String>,
    /// Calls per second, errors among them.
    pub(crate) rate: f64,
}

/// Guests with a session and a connection each, half of them over TCP, half of them on the unix socket.
pub(super) struct Guests(Vec<Box<dyn Caller>>);

impl Guests {
    /// Connects, and makes a first call of each kind.
    pub(super) fn open(pair: &Pair, count: usize) -> Result<Self, Failure> {
        let open = |number: usize| {
            let mut caller = peers::caller("guest", pair.address(Socket::ALL[number % Socket::ALL.len()]))?;
            Shape::SHORT.into_iter().try_for_each(|shape| caller.call(shape))?;
            Ok(caller)
        };
        (0..count).map(open).collect::<Result<_, Failure>>().map(Self)
    }

    /// Lets each guest call once in a period, an empty call and one of 64 KiB in turn, for so long.
    pub(super) fn work(self, time: Duration) -> Result<Outcome, Failure> {
        let step = PERIOD / u32::try_from(self.0.len())?;
        let mut shares: Vec<Vec<(Duration, Box<dyn Caller>)>> = (0..DRIVERS).map(|_| Vec::new()).collect();
        let mut first = Duration::ZERO;
        for (number, guest) in self.0.into_iter().enumerate() {
            shares[number % DRIVERS].push((first, guest));
            first += step;
        }
        let begun = Instant::now();
        let drive = |share| std::thread::spawn(move || drive(share, begun, time));
        let drivers: Vec<_> = shares.into_iter().map(drive).collect();
        let mut all = Outcome::default();
        for driver in drivers {
            let Outcome { times, errors, .. } = driver.join().map_err(|_| "a driver panicked")?;
            all.times.extend(times);
            all.errors.extend(errors);
        }
        all.rate = (all.times.len() + all.errors.len()) as f64 / begun.elapsed().as_secs_f64();
        all.times.sort_by(f64::total_cmp);
        Ok(all)
    }
}

/// Makes the calls of some guests, each from its first time on. The times are given: a call that takes long makes no
/// later one fall away.
fn drive(mut guests: Vec<(Duration, Box<dyn Caller>)>, begun: Instant, time: Duration) -> Outcome {
    let mut outcome = Outcome::default();
    let mut round = Duration::ZERO;
    for shape in Shape::SHORT.into_iter().cycle() {
        if round >= time {
            break;
        }
        for (first, guest) in &mut guests {
            let due = begun + round + *first;
            while let Some(rest) = due.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero()) {
                std::thread::park_timeout(rest);
            }
            let called = Instant::now();
            match guest.call(shape) {
                Ok(()) => outcome.times.push(called.elapsed().as_nanos() as f64 / 1e3),
                Err(failure) => outcome.errors.push(failure.to_string()),
            }
        }
        round += PERIOD;
    }
    outcome
}
