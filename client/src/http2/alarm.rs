//! A clock that is exact to what the system can do; the runtime's own goes by milliseconds.

use std::io;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::runtime::Handle;

/// Wakes a task.
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
