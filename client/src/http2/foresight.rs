//! When a call's answer comes, by how long those like it took.
//!
//! To wake a thread that has slept for milliseconds takes some 30 µs, on a virtual machine 60 and more: a waste where
//! an accelerator's run always takes the same. So who waits for such a run has itself woken shortly before the answer
//! and stays awake until it is there; a system does so for disks (Linux calls it hybrid polling). Where calls
//! take now this and now that long, nothing is foreseen, and the answer wakes its reader as ever.

use std::io;
use std::ops::Range;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::runtime::Handle;

/// How late a thread is woken, until it is known: as on a virtual machine.
const LATE: Duration = Duration::from_micros(50);

/// Whoever is woken later than this was held up by something else.
const LATE_MAX: Duration = Duration::from_micros(100);

/// A thread is to wake so many times as long before the answer as it was late before.
const LEAD: u32 = 2;

/// Wakings that what is known of their lateness is made of.
const WAKINGS: u32 = 8;

/// After about so many calls it is forgotten, unless there were wakings: where a thread was once late, calls might not
/// be foreseen any more, and it would never be known better.
const FORGETTING: u32 = 256;

/// A thread stays awake for at most this part of what a call takes, or it sleeps until the answer wakes it.
const AWAKE_PART: u32 = 8;

/// And no longer than this: several times what it takes to wake it. The processor may be one that computes the answer.
const AWAKE_MAX: Duration = Duration::from_micros(300);

/// Calls of a kind that are remembered. The shortest and the longest of them do not count: one in so many may be
/// disturbed by anything.
const CALLS: usize = 8;

/// Kinds of calls that are remembered; programs call few models in turn.
const KINDS: usize = 16;

/// What is remembered of calls.
#[derive(Debug)]
pub(super) struct Foresight {
    kinds: [Kind; KINDS],
    late: Duration,
}

impl Default for Foresight {
    fn default() -> Self {
        Self { kinds: Default::default(), late: LATE }
    }
}

/// Calls that are alike: the same model, and tensors of the same size.
#[derive(Clone, Copy, Debug, Default)]
struct Kind {
    name: u64,
    /// What the last ones took, and how many there were.
    took: [Duration; CALLS],
    count: usize,
}

impl Foresight {
    /// A call of a kind has been answered after so long.
    pub(super) fn learn(&mut self, name: u64, took: Duration) {
        let kind = &mut self.kinds[place(name)];
        if kind.name != name {
            *kind = Kind { name, ..Kind::default() };
        }
        kind.took[kind.count % CALLS] = took;
        kind.count += 1;
        self.late = mean(self.late, FORGETTING - 1, LATE);
    }

    /// How long after its beginning a call's thread wakes for the answer, and until when it stays awake; none where
    /// that would often be for nothing.
    pub(super) fn awake(&self, name: u64) -> Option<Range<Duration>> {
        let kind = self.kinds.get(place(name)).filter(|kind| kind.name == name && kind.count >= CALLS)?;
        let mut took = kind.took;
        took.sort_unstable();
        let (soonest, latest) = (took[1], took[CALLS - 2]);
        let awake = (soonest / AWAKE_PART).min(AWAKE_MAX);
        let from = soonest.checked_sub(self.late * LEAD)?;
        (latest - from <= awake).then_some(from..from + awake)
    }

    /// A thread that wanted to wake did so with this delay.
    pub(super) fn woken(&mut self, late: Duration) {
        self.late = mean(self.late, WAKINGS - 1, late.min(LATE_MAX));
    }
}

/// Of something that counts for several, and of one more.
fn mean(known: Duration, count: u32, one: Duration) -> Duration {
    (known * count + one) / (count + 1)
}

fn place(name: u64) -> usize {
    usize::try_from(name % KINDS as u64).unwrap_or(0)
}

/// Wakes a task at a time that is exact to what the system can do; the runtime's own clock goes by milliseconds.
#[derive(Debug)]
pub(super) struct Alarm {
    /// Is read as a pipe is: there is something once it rings.
    timer: Receiver,
}

impl Alarm {
    /// One that a runtime looks after.
    ///
    /// # Errors
    /// The system's, and the runtime's when it is being shut down.
    pub(super) fn new(runtime: &Handle) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let _inside = runtime.enter();
        Ok(Self { timer: Receiver::from_owned_fd_unchecked(timer)? })
    }

    /// Returns after so long. If it is dropped before, the alarm rings still, unless it is stopped.
    ///
    /// # Errors
    /// The system's, and the runtime's when it is being shut down.
    pub(super) async fn rings(&mut self, after: Duration) -> io::Result<()> {
        self.set(after)?;
        self.timer.read_u64().await.map(drop)
    }

    /// It does not ring.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn stop(&self) -> io::Result<()> {
        self.set(Duration::ZERO)
    }

    fn set(&self, after: Duration) -> io::Result<()> {
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = after.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: u64 = 7;

    fn learned(microseconds: &[u64]) -> Foresight {
        let mut foresight = Foresight::default();
        microseconds.iter().for_each(|took| foresight.learn(KIND, Duration::from_micros(*took)));
        foresight
    }

    fn awake(foresight: &Foresight, kind: u64) -> Option<Range<u128>> {
        foresight.awake(kind).map(|awake| awake.start.as_micros()..awake.end.as_micros())
    }

    #[test]
    fn calls_that_always_take_the_same_are_foreseen() {
        for few in [&[][..], &[2400; CALLS - 1]] {
            assert_eq!(awake(&learned(few), KIND), None, "{few:?}");
        }
        let foresight = learned(&[2400; CALLS]);
        assert_eq!(awake(&foresight, KIND), Some(2300..2600));
        assert_eq!(awake(&foresight, KIND + 1), None);
        // One that was disturbed, and one that did not run at all.
        let foresight = learned(&[2400, 2410, 2420, 90_000, 2400, 50, 2410, 2400]);
        assert_eq!(awake(&foresight, KIND), Some(2300..2600));
    }

    #[test]
    fn nobody_stays_awake_for_calls_that_are_short_or_not_alike() {
        // A hundred microseconds are more than an eighth of these.
        assert_eq!(awake(&learned(&[790; CALLS]), KIND), None);
        assert_eq!(awake(&learned(&[0; CALLS]), KIND), None);
        assert_eq!(awake(&learned(&[2400, 2400, 2400, 2400, 2700, 2700, 2700, 2700]), KIND), None);
        // What was once so is forgotten.
        let mut foresight = learned(&[9000, 1000, 5000, 3000, 7000, 4000, 2000, 8000]);
        assert_eq!(awake(&foresight, KIND), None);
        (0..CALLS).for_each(|_| foresight.learn(KIND, Duration::from_millis(8)));
        assert_eq!(awake(&foresight, KIND), Some(7900..8200));
        // A kind that comes to the same place takes it.
        foresight.learn(KIND + KINDS as u64, Duration::from_millis(8));
        assert_eq!(awake(&foresight, KIND), None);
    }

    #[test]
    fn who_is_woken_late_wakes_earlier() {
        let mut foresight = learned(&[8000; CALLS]);
        for (late, from) in [(10, 7979..7981), (70, 7859..7861), (1_000_000, 7799..7801)] {
            (0..50).for_each(|_| foresight.woken(Duration::from_micros(late)));
            let found = awake(&foresight, KIND).map(|awake| awake.start);
            assert!(found.is_some_and(|found| from.contains(&found)), "{late}: {found:?}");
        }
        // Too late for calls of a kind that is short, until it is forgotten.
        let mut after = |calls| {
            (0..calls).for_each(|_| foresight.learn(KIND, Duration::from_micros(1500)));
            awake(&foresight, KIND)
        };
        assert_eq!(after(CALLS), None);
        assert!(after(1000).is_some());
    }

    #[tokio::test]
    async fn an_alarm_rings_when_it_is_time_and_again() {
        let mut alarm = Alarm::new(&Handle::current()).unwrap();
        for milliseconds in [3, 1, 2] {
            let (begun, after) = (std::time::Instant::now(), Duration::from_millis(milliseconds));
            alarm.rings(after).await.unwrap();
            assert!(begun.elapsed() >= after);
        }
        // One that nobody heard is not taken for the next.
        drop(tokio::time::timeout(Duration::ZERO, alarm.rings(Duration::from_nanos(1))).await);
        let (begun, after) = (std::time::Instant::now(), Duration::from_millis(5));
        alarm.rings(after).await.unwrap();
        assert!(begun.elapsed() >= after);
    }
}
