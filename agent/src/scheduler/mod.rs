//! The waiting room: who computes, when, and for how long.
//!
//! Work waits in a fair [`queue`] for one of a fixed number of lanes. A lane is a thread that takes what is next,
//! alone or as a [`batch`], until nothing waits; or a thread that a model has in any case ([`Home`]), while the
//! model's calls come one at a time. Who has computed an answer also sends it, if nothing else waits
//! ([`onward`](crate::onward)). What cannot be done in time is refused when it comes, so that the lanes work on what
//! somebody still waits for. A caller that leaves, or whose deadline passes, is answered at once: what waited is
//! gone, what runs is told to stop through [`Cancel`], and somebody else takes its lane. What does not stop (an
//! engine inside one long kernel) is counted against its tenant until it does.

mod batch;
mod cancel;
mod lane;
mod queue;
mod run;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use vaccel_proto::error::Detail;
use vaccel_proto::v1::Tensor;
use vaccel_proto::{Error, Reason};

use crate::onward::Listener;
use crate::quota::Account;
use lane::{Lanes, Ticket, Work};
use queue::Job;

pub(crate) use batch::{Batcher, Batching, Call, Errand, Home, Runner};
pub(crate) use cancel::Cancel;

/// Calls that wait for a lane, of all tenants. Each holds its request. Beyond it, whoever has most waiting gives way.
const QUEUE_MAX: usize = 4096;

/// Part of its time that a call may spend waiting, as far as can be foreseen: what is refused at once can go elsewhere,
/// and what is let in and comes too late was computed for nobody.
const WAIT_SHARE_MAX: f64 = 0.7;

/// How long a run has its lane, however long it takes, while a tenant waits that has none: that one's calls then run
/// beside it. Few runs take so long, unless a guest wants all lanes for itself.
const LANE_TIME_MAX: Duration = Duration::from_millis(500);

/// Runs that go on beside the lanes in that way, of all tenants. Each is a thread; a tenant has no more of them than
/// there are lanes.
const BESIDE_MAX: usize = 64;

/// When a refused caller should try again, at least and at most.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(10);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);

/// Who asks, and how it waits.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    pub(crate) account: Arc<Account>,
    /// When nobody waits for the result any more.
    pub(crate) deadline: Instant,
    /// Among the tenant's own calls: lower goes first.
    pub(crate) priority: u64,
    /// When it must be on a lane, if it may not wait as long as its deadline.
    pub(crate) start_by: Option<Instant>,
    /// Calls of the same model that may wait before it.
    pub(crate) queue_max: Option<usize>,
}

/// Priority of calls that name none.
pub(crate) const PRIORITY_DEFAULT: u64 = 1 << 32;

impl Asker {
    pub(crate) fn new(account: &Arc<Account>, deadline: Instant) -> Self {
        Self {
            account: Arc::clone(account),
            deadline,
            priority: PRIORITY_DEFAULT,
            start_by: None,
            queue_max: None,
        }
    }
}

/// How long the stages of a call took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spans {
    /// Waiting for a lane.
    pub(crate) queue: Duration,
    /// On the lane, in all.
    pub(crate) run: Duration,
    /// Of that, putting inputs of several calls together.
    pub(crate) join: Duration,
    /// Of that, taking outputs apart.
    pub(crate) part: Duration,
    /// Calls that ran together, and their rows; 0 for what needed no lane.
    pub(crate) calls: usize,
    pub(crate) rows: usize,
    /// Whether this is the call that a run is counted with.
    pub(crate) leads: bool,
}

/// A result with how long it took.
#[derive(Debug)]
pub(crate) struct Timed<T> {
    pub(crate) value: T,
    pub(crate) spans: Spans,
}

impl<T> Timed<T> {
    /// Something that needed no lane.
    pub(crate) fn instant(value: T) -> Self {
        Self { value, spans: Spans::default() }
    }

    pub(crate) fn map<U>(self, map: impl FnOnce(T) -> U) -> Timed<U> {
        Timed { value: map(self.value), spans: self.spans }
    }
}

/// The queue and its lanes.
pub(crate) struct Scheduler {
    lanes: Arc<Lanes>,
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler").finish_non_exhaustive()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.lanes.close();
    }
}

impl Scheduler {
    /// Lanes of one device, so many as can work at the same time.
    ///
    /// # Errors
    /// `BACKEND_FAILED` when their threads cannot all be started.
    pub(crate) fn new(lanes: usize) -> Result<Self, Error> {
        let failed = |error| {
            let message = format!("the threads of {lanes} lanes cannot be started");
            Error::new(Reason::BackendFailed, message).caused_by(error)
        };
        Ok(Self { lanes: Lanes::start(lanes).map_err(failed)? })
    }

    /// Something is about to come: a lane that waits may wake, which takes longer than to find nothing.
    pub(crate) fn expect(&self, task: Listener) {
        self.lanes.expect(task);
    }

    /// Runs `work` on a lane, before the asker's deadline.
    ///
    /// # Errors
    /// `OVERLOADED` when it would wait too long or too many wait, `QUOTA_EXCEEDED` when the tenant left too many runs
    /// behind, `DEADLINE` while queued or running, `BACKEND_FAILED` when `work` panics, and what `work` returns.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        asker: &Asker,
        work: impl FnOnce(&Cancel) -> Result<T, Error> + Send + 'static,
    ) -> Result<Timed<T>, Error> {
        self.run_alone(asker, None, work).await
    }

    /// Runs `work` that uses a model, when the model can take another run.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) async fn run_with<T: Send + 'static>(
        &self,
        asker: &Asker,
        batcher: &Batcher,
        work: impl FnOnce(&Cancel) -> Result<T, Error> + Send + 'static,
    ) -> Result<Timed<T>, Error> {
        self.run_alone(asker, Some(Arc::clone(&batcher.apart)), work).await
    }

    async fn run_alone<T: Send + 'static>(
        &self,
        asker: &Asker,
        bucket: Option<Arc<batch::Bucket>>,
        work: impl FnOnce(&Cancel) -> Result<T, Error> + Send + 'static,
    ) -> Result<Timed<T>, Error> {
        let (reply, result) = oneshot::channel();
        let arrived = Instant::now();
        let work = Work::Alone(Box::new(move |cancel| {
            let started = Instant::now();
            let value = work(cancel);
            let spans = Spans {
                queue: started - arrived,
                run: started.elapsed(),
                calls: 1,
                rows: 1,
                leads: true,
                ..Spans::default()
            };
            // Whoever does not listen has left.
            let _ = reply.send(value.map(|value| Timed { value, spans }));
        }));
        self.enter(asker, arrived, bucket, 1, work, result).await
    }

    /// Runs a model, together with other calls where that is worth it.
    ///
    /// # Errors
    /// As [`run`](Self::run), and what the model returns for this call.
    pub(crate) async fn run_model(
        &self,
        asker: &Asker,
        batcher: &Batcher,
        call: Call,
    ) -> Result<Timed<Vec<Tensor>>, Error> {
        let (reply, result) = oneshot::channel();
        if asker.queue_max.is_some_and(|max| batcher.waiting() >= max) {
            return Err(overloaded("Exceeds maximum queue size", RETRY_AFTER_MIN));
        }
        let (bucket, rows) = batcher.bucket(&call);
        let home = batcher.home(&call);
        self.enter(asker, Instant::now(), Some(bucket), rows, Work::Model { call, reply, home }, result).await
    }

    async fn enter<T>(
        &self,
        asker: &Asker,
        arrived: Instant,
        bucket: Option<Arc<batch::Bucket>>,
        rows: usize,
        work: Work,
        mut result: oneshot::Receiver<Result<Timed<T>, Error>>,
    ) -> Result<Timed<T>, Error> {
        asker.account.may_compute()?;
        let (priority, deadline) = (asker.priority, asker.deadline);
        let job = Job { work, bucket, rows, priority, arrived, deadline, estimate: 0 };
        let ticket = Ticket::new(&self.lanes, &asker.account, job)?;
        let until = asker.start_by.map_or(deadline, |start_by| start_by.min(deadline));
        let mut patience = arrived + LANE_TIME_MAX;
        let in_time = loop {
            let answer = tokio::time::timeout_at(patience.min(until), &mut result).await;
            if answer.is_ok() || patience >= until {
                break answer;
            }
            patience = if ticket.is_running() { until } else { patience + LANE_TIME_MAX };
            ticket.make_room();
        };
        let answer = match in_time {
            Err(_) if asker.start_by.is_some() && Instant::now() < deadline => {
                if !ticket.is_running() {
                    return Err(overloaded("Request timeout expired", RETRY_AFTER_MIN));
                }
                tokio::time::timeout_at(deadline, &mut result).await
            }
            answer => answer,
        };
        match answer {
            Ok(Ok(result)) => {
                ticket.answered();
                result
            }
            Ok(Err(_)) if ticket.was_pushed_out() => Err(overloaded("too many calls wait", RETRY_AFTER_MIN)),
            Ok(Err(_)) if deadline <= Instant::now() => Err(past_deadline("queued", arrived)),
            Ok(Err(_)) => {
                // It panicked, and is over: nobody has left a run that goes on.
                ticket.answered();
                Err(Error::new(Reason::BackendFailed, "the backend failed"))
            }
            Err(_) => {
                let stage = if ticket.is_running() { "running" } else { "queued" };
                Err(past_deadline(stage, arrived))
            }
        }
    }
}

/// `OVERLOADED`, with when to try again.
fn overloaded(why: &str, wait: Duration) -> Error {
    let wait = wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX);
    let message = format!("{why}; try again in {} ms", wait.as_millis());
    Error::new(Reason::Overloaded, message).with(Detail::RetryAfter(wait))
}

/// `DEADLINE`, saying whether the call was queued or running.
pub(crate) fn past_deadline(stage: &str, since: Instant) -> Error {
    let waited = since.elapsed().as_millis();
    Error::new(Reason::Deadline, format!("the deadline passed after {waited} ms while the call was {stage}"))
}
