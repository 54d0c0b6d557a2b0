//! The waiting room: who computes, when, and for how long.
//!
//! Work waits for one of a fixed number of lanes and runs on a blocking thread. A caller that leaves, or whose deadline
//! passes, is answered at once; its computation is told to stop through [`Cancel`] and gives its lane back meanwhile.
//! What does not stop (an engine inside one long kernel) is counted against its tenant until it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use vaccel_proto::error::Detail;
use vaccel_proto::{Error, Reason};

use crate::quota::{Account, Hold};

/// Calls that wait for a lane, of all tenants. Each holds its request; beyond it a caller is told to come back.
const QUEUE_MAX: usize = 512;

/// When a refused caller should try again: about one small run later.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Tells a computation to stop, and whoever interrupts engines that nobody waits any more.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel(Arc<CancelState>);

#[derive(Default)]
struct CancelState {
    set: AtomicBool,
    interrupt: std::sync::Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl std::fmt::Debug for CancelState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.set)
    }
}

impl Cancel {
    /// Whether the result is no longer wanted.
    pub(crate) fn is_set(&self) -> bool {
        self.0.set.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self) {
        self.0.set.store(true, Ordering::Relaxed);
        if let Some(interrupt) = &*self.0.interrupt.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        {
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
            *self.0.interrupt.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = value;
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

/// A result with how long it took.
#[derive(Debug)]
pub(crate) struct Timed<T> {
    pub(crate) value: T,
    pub(crate) queue: Duration,
    pub(crate) run: Duration,
}

impl<T> Timed<T> {
    /// Something that needed no lane.
    pub(crate) fn instant(value: T) -> Self {
        Self { value, queue: Duration::ZERO, run: Duration::ZERO }
    }

    pub(crate) fn map<U>(self, map: impl FnOnce(T) -> U) -> Timed<U> {
        Timed { value: map(self.value), queue: self.queue, run: self.run }
    }
}

/// The lanes.
#[derive(Debug)]
pub(crate) struct Scheduler {
    lanes: Arc<Semaphore>,
    waiting: AtomicUsize,
}

/// Counts a waiting call for as long as it waits.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sets the cancellation and counts the run as abandoned when its caller stops waiting.
struct Abandon {
    cancel: Cancel,
    account: Arc<Account>,
    /// Where the running thread finds what to give back when it ends.
    left_behind: Arc<std::sync::Mutex<Progress>>,
}

#[derive(Debug, Default)]
enum Progress {
    #[default]
    Running,
    Finished,
    Abandoned {
        _counted: Hold,
    },
}

impl Drop for Abandon {
    fn drop(&mut self) {
        let mut progress = self.left_behind.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if matches!(*progress, Progress::Running) {
            *progress = Progress::Abandoned { _counted: self.account.abandoned() };
            drop(progress);
            self.cancel.set();
        }
    }
}

impl Scheduler {
    pub(crate) fn new(lanes: usize) -> Self {
        Self { lanes: Arc::new(Semaphore::new(lanes)), waiting: AtomicUsize::new(0) }
    }

    /// Runs `work` on a lane, before `deadline`.
    ///
    /// # Errors
    /// `OVERLOADED` when too many wait, `QUOTA_EXCEEDED` when the tenant left too many runs behind, `DEADLINE` while
    /// queued or running, `BACKEND_FAILED` when `work` panics, and what `work` returns.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        account: &Arc<Account>,
        deadline: Instant,
        work: impl FnOnce(&Cancel) -> Result<T, Error> + Send + 'static,
    ) -> Result<Timed<T>, Error> {
        account.may_compute()?;
        let arrived = Instant::now();
        let lane = {
            let waiting = self.waiting.fetch_add(1, Ordering::Relaxed);
            let _waiting = Waiting(&self.waiting);
            if waiting >= QUEUE_MAX {
                let message = format!("{QUEUE_MAX} calls are waiting for a lane; try again shortly");
                return Err(Error::new(Reason::Overloaded, message).with(Detail::RetryAfter(RETRY_AFTER)));
            }
            let lane = Arc::clone(&self.lanes).acquire_owned();
            match tokio::time::timeout_at(deadline, lane).await {
                Ok(Ok(lane)) => lane,
                Ok(Err(_)) => return Err(Error::new(Reason::ShuttingDown, "the agent is stopping")),
                Err(_) => return Err(past_deadline("queued", arrived)),
            }
        };
        let started = Instant::now();
        let cancel = Cancel::default();
        let left_behind = Arc::new(std::sync::Mutex::new(Progress::Running));
        let abandon = Abandon {
            cancel: cancel.clone(),
            account: Arc::clone(account),
            left_behind: Arc::clone(&left_behind),
        };
        let thread = tokio::task::spawn_blocking(move || {
            let result = work(&cancel);
            *left_behind.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Progress::Finished;
            result
        });
        let result = match tokio::time::timeout_at(deadline, thread).await {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(Error::new(Reason::BackendFailed, "the backend failed").caused_by(panic)),
            Err(_) => Err(past_deadline("running", arrived)),
        };
        drop(lane);
        drop(abandon);
        let (queue, run) = (started - arrived, started.elapsed());
        result.map(|value| Timed { value, queue, run })
    }
}

/// `DEADLINE`, saying whether the call was queued or running.
pub(crate) fn past_deadline(stage: &str, since: Instant) -> Error {
    let waited = since.elapsed().as_millis();
    Error::new(Reason::Deadline, format!("the deadline passed after {waited} ms while the call was {stage}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TenantLimits;
    use crate::identity::Tenant;
    use crate::quota::{ABANDONED_RUNS_MAX, Accounts, Unit};
    use std::sync::mpsc;

    fn account() -> Arc<Account> {
        let limits =
            TenantLimits { connections: 1, sessions: 1, calls: 9, resource_bytes: 1, in_flight_bytes: 1 };
        Accounts::new(limits).of(&Tenant::new("a"))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test]
    async fn a_panic_is_one_calls_error() {
        let scheduler = Scheduler::new(1);
        let account = account();
        let failed = scheduler.run::<()>(&account, soon(), |_| panic!("broken kernel")).await;
        assert_eq!(failed.expect_err("panicked").reason(), Reason::BackendFailed);
        let next = scheduler.run(&account, soon(), |_| Ok(1)).await;
        assert_eq!(next.expect("the lane is there").value, 1);
        assert_eq!(account.used(Unit::AbandonedRuns), 0);
    }

    #[tokio::test]
    async fn a_deadline_stops_the_run_and_frees_the_lane() {
        let scheduler = Scheduler::new(1);
        let account = account();
        let (stopped, was_stopped) = mpsc::channel();
        let deadline = Instant::now() + Duration::from_millis(20);
        let late = scheduler.run(&account, deadline, move |cancel| {
            while !cancel.is_set() {
                std::thread::yield_now();
            }
            stopped.send(()).expect("the test waits");
            Ok(())
        });
        let refusal = late.await.expect_err("too late");
        assert_eq!(refusal.reason(), Reason::Deadline);
        assert!(refusal.message().contains("running"), "{refusal}");
        was_stopped.recv().expect("it was told to stop");
        scheduler.run(&account, soon(), |_| Ok(())).await.expect("the lane is free");
    }

    #[tokio::test]
    async fn a_queued_call_past_its_deadline_never_runs() {
        let scheduler = Arc::new(Scheduler::new(1));
        let account = account();
        let (release, released) = mpsc::channel::<()>();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let busy = tokio::spawn({
            let (scheduler, account) = (Arc::clone(&scheduler), Arc::clone(&account));
            async move {
                let work = move |_: &Cancel| {
                    begun.send(()).expect("the test waits");
                    released.recv().expect("the test releases");
                    Ok(())
                };
                scheduler.run(&account, soon(), work).await
            }
        });
        has_begun.await.expect("the lane is taken");
        let deadline = Instant::now() + Duration::from_millis(10);
        let late = scheduler.run::<()>(&account, deadline, |_| unreachable!("it was queued")).await;
        assert!(late.expect_err("queued").message().contains("queued"));
        release.send(()).expect("still running");
        busy.await.expect("no panic").expect("served");
    }

    #[tokio::test]
    async fn runs_that_do_not_stop_are_counted_and_bounded() {
        let scheduler = Scheduler::new(1);
        let account = account();
        let mut releases = Vec::new();
        for _ in 0..ABANDONED_RUNS_MAX {
            let (release, released) = mpsc::channel::<()>();
            releases.push(release);
            let deadline = Instant::now() + Duration::from_millis(5);
            let stubborn = scheduler.run(&account, deadline, move |_| {
                let _ = released.recv();
                Ok(())
            });
            assert_eq!(stubborn.await.expect_err("late").reason(), Reason::Deadline);
        }
        let refusal = scheduler.run(&account, soon(), |_| Ok(())).await.expect_err("too many left behind");
        assert_eq!(refusal.reason(), Reason::QuotaExceeded);
        drop(releases);
        while account.used(Unit::AbandonedRuns) > 0 {
            tokio::task::yield_now().await;
        }
        scheduler.run(&account, soon(), |_| Ok(())).await.expect("they ended");
    }
}
