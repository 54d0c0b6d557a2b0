//! Load on a model for a time: callers that call again when they have their answer, or calls at fixed times.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use vaccel_client::{Error, Reason};

use super::caller::Caller;
use super::histogram::Histogram;
use super::schedule::Schedule;
use crate::args::Load;

/// Calls of an open loop that may be in flight; what is due beyond it waits here, and its latency says so. As many
/// connections of HTTP an agent takes from a tenant if not told otherwise.
const OPEN_LOOP_CALLERS: usize = 256;
/// How long a caller waits after a failed call: a refusal is quick, and those who ask again at once would have the
/// server do nothing else.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(10);
/// Different messages of errors that are kept.
const MESSAGES_MAX: usize = 5;

/// How the calls of a step went.
#[derive(Default)]
pub(crate) struct Tally {
    /// Of those that succeeded.
    pub(crate) latency: Histogram,
    pub(crate) errors: u64,
    /// The first few different ones.
    pub(crate) messages: Vec<Complaint>,
    /// Calls a second that succeeded.
    pub(crate) rate: f64,
    /// Of an open loop: how long after they were due calls were sent.
    pub(crate) late: Histogram,
}

/// Failed calls with the same message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Complaint {
    pub(crate) reason: Reason,
    pub(crate) message: String,
    pub(crate) count: u64,
}

impl Tally {
    fn failed(&mut self, error: &Error) {
        self.errors += 1;
        let index = self.messages.iter().position(|known| known.message == error.message());
        match index {
            Some(index) => self.messages[index].count += 1,
            None if self.messages.len() < MESSAGES_MAX => {
                let message = error.message().to_owned();
                self.messages.push(Complaint { reason: error.reason(), message, count: 1 });
            }
            None => {}
        }
    }
}

/// How many callers a load needs.
pub(crate) fn callers(load: Load) -> usize {
    match load {
        Load::Concurrency(count) => count as usize,
        Load::Rate(_) => OPEN_LOOP_CALLERS,
    }
}

/// Lets these callers call for a time, and returns when their last call is over, with the callers and their connections
/// for the next time. `deadline` bounds each call; in an open loop from when it was due.
///
/// # Errors
/// A caller that ended before its time.
pub(crate) async fn run(
    load: Load,
    callers: Vec<Caller>,
    time: Duration,
    deadline: Duration,
) -> Result<(Vec<Caller>, Tally), Error> {
    match load {
        Load::Concurrency(_) => closed_loop(callers, time, deadline).await,
        Load::Rate(rate) => open_loop(callers, rate, time, deadline).await,
    }
}

async fn closed_loop(
    callers: Vec<Caller>,
    time: Duration,
    deadline: Duration,
) -> Result<(Vec<Caller>, Tally), Error> {
    let tally = Arc::new(Mutex::new(Tally::default()));
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for mut caller in callers {
        let tally = Arc::clone(&tally);
        tasks.spawn(async move {
            let mut succeeded = 0_u32;
            while start.elapsed() < time {
                let begun = Instant::now();
                let outcome = call(&mut caller, begun, deadline).await;
                let took = begun.elapsed();
                match outcome {
                    Ok(()) => {
                        succeeded += 1;
                        lock(&tally).latency.record(took);
                    }
                    Err(error) => {
                        lock(&tally).failed(&error);
                        tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
                    }
                }
            }
            (caller, f64::from(succeeded) / start.elapsed().as_secs_f64())
        });
    }
    let mut callers = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        let (caller, rate) = ended.map_err(|error| broke_off(&error))?;
        // Each caller was busy up to its own last answer: added up, their rates lose nothing at the end of the step.
        lock(&tally).rate += rate;
        callers.push(caller);
    }
    let tally = std::mem::take(&mut *lock(&tally));
    Ok((callers, tally))
}

/// What the callers of an open loop share.
struct OpenLoop {
    schedule: Schedule,
    /// One for each call that is due.
    permits: Semaphore,
    next: AtomicU64,
    /// Those that are not calling; the one that called last is taken first, so that few calls need few connections.
    idle: Mutex<VecDeque<Caller>>,
    tally: Mutex<Tally>,
    until: Instant,
    in_time: AtomicU64,
    deadline: Duration,
}

async fn open_loop(
    callers: Vec<Caller>,
    rate: f64,
    time: Duration,
    deadline: Duration,
) -> Result<(Vec<Caller>, Tally), Error> {
    let (count, start) = (callers.len(), Instant::now());
    let shared = Arc::new(OpenLoop {
        schedule: Schedule::new(start, rate, time),
        permits: Semaphore::new(0),
        next: AtomicU64::new(0),
        idle: Mutex::new(callers.into()),
        tally: Mutex::default(),
        until: start + time,
        in_time: AtomicU64::new(0),
        deadline,
    });
    let clock = Arc::clone(&shared);
    let clock = tokio::task::spawn_blocking(move || clock.schedule.keep(&clock.permits, count));
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        tasks.spawn(Arc::clone(&shared).take_turns());
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|error| broke_off(&error))?;
    }
    clock.await.map_err(|error| broke_off(&error))?;
    let mut tally = std::mem::take(&mut *lock(&shared.tally));
    // Later answers are of a load that was already taken away.
    tally.rate = shared.in_time.load(Ordering::Relaxed) as f64 / time.as_secs_f64();
    let callers = std::mem::take(&mut *lock(&shared.idle));
    Ok((callers.into(), tally))
}

impl OpenLoop {
    /// Makes calls that are due until there are no more.
    async fn take_turns(self: Arc<Self>) {
        while let Ok(permit) = self.permits.acquire().await {
            permit.forget();
            let Some(due) = self.schedule.due(self.next.fetch_add(1, Ordering::Relaxed)) else { return };
            // There are as many callers as tasks that take turns.
            let Some(mut caller) = lock(&self.idle).pop_front() else { return };
            let late = due.elapsed();
            let outcome = call(&mut caller, due, self.deadline).await;
            let ended = Instant::now();
            lock(&self.idle).push_front(caller);
            let mut tally = lock(&self.tally);
            tally.late.record(late);
            match outcome {
                Ok(()) => {
                    self.in_time.fetch_add(u64::from(ended <= self.until), Ordering::Relaxed);
                    tally.latency.record(ended - due);
                }
                Err(error) => tally.failed(&error),
            }
        }
    }
}

/// One call, whose deadline runs from a moment that may have been some time ago.
async fn call(caller: &mut Caller, from: Instant, deadline: Duration) -> Result<(), Error> {
    let passed =
        |doing| Error::new(Reason::Deadline, format!("the deadline of {deadline:?} passed while {doing}"));
    let left = deadline.saturating_sub(from.elapsed());
    if left.is_zero() {
        return Err(passed("the call waited for others to end"));
    }
    timeout(left, caller.infer(left)).await.unwrap_or_else(|_| Err(passed("waiting for the answer")))
}

fn broke_off(error: &tokio::task::JoinError) -> Error {
    Error::new(Reason::BackendFailed, format!("a caller broke off: {error}"))
}

/// What a caller that panicked left is whole: nothing here ends between two of its parts.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Protocol;
    use crate::bench::caller::Door;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};
    use tokio::sync::watch;
    use vaccel_client::Client;

    const SECOND: Duration = Duration::from_secs(1);

    /// A server that answers every call alike; the first one not before so many have come.
    struct Server {
        calls: watch::Sender<u64>,
        wait_for: u64,
        answer: &'static [u8],
    }

    impl Server {
        async fn listen(self: Arc<Self>, listener: UnixListener) {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Arc::clone(&self).serve(stream));
            }
        }

        async fn serve(self: Arc<Self>, mut stream: UnixStream) -> std::io::Result<()> {
            let mut heard = Vec::new();
            while stream.read_buf(&mut heard).await? > 0 {
                // The end of a call without inputs.
                if !heard.ends_with(b"true}}") {
                    continue;
                }
                heard.clear();
                let mut is_first = false;
                self.calls.send_modify(|calls| {
                    is_first = *calls == 0;
                    *calls += 1;
                });
                if is_first {
                    let _ = self.calls.subscribe().wait_for(|calls| *calls >= self.wait_for).await;
                }
                stream.write_all(self.answer).await?;
            }
            Ok(())
        }
    }

    async fn measured(load: Load, time: Duration, deadline: Duration, wait_for: u64, status: &str) -> Tally {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server");
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").leak().as_bytes();
        let server = Arc::new(Server { calls: watch::Sender::new(0), wait_for, answer });
        let listening = tokio::spawn(server.listen(UnixListener::bind(&path).unwrap()));
        let builder = Client::builder(format!("unix://{}", path.display()).parse().unwrap());
        let door = Door::open(&builder, Protocol::Http).await.unwrap();
        let callers = door.caller("m", &[]).unwrap().many(&builder, callers(load)).unwrap();
        let count = callers.len();
        let (callers, tally) = run(load, callers, time, deadline).await.unwrap();
        assert_eq!(callers.len(), count, "all callers come back");
        listening.abort();
        tally
    }

    #[tokio::test]
    async fn an_open_loop_goes_on_while_an_answer_is_late_and_counts_from_when_it_was_due() {
        let load = Load::Rate(1000.0);
        let tally = measured(load, Duration::from_millis(30), 60 * SECOND, 11, "200 OK").await;
        assert_eq!((tally.latency.count(), tally.late.count(), tally.errors), (30, 30, 0));
        // The eleventh call was due 10 ms after the first.
        assert!(tally.latency.max() >= 10_000.0, "{}", tally.latency.max());
        assert!(tally.rate <= 1000.0);
    }

    #[tokio::test]
    async fn a_closed_loop_waits_for_its_answers() {
        let load = Load::Concurrency(3);
        let tally = measured(load, Duration::from_millis(20), 60 * SECOND, 1, "200 OK").await;
        assert_eq!((tally.late.count(), tally.errors), (0, 0));
        assert!(tally.latency.count() >= 3 && tally.rate > 0.0);
        // Each caller called for as long as that, or longer.
        assert!(tally.rate <= tally.latency.count() as f64 / 0.02, "{}", tally.rate);
    }

    #[tokio::test]
    async fn refusals_and_silence_are_errors() {
        let load = Load::Concurrency(2);
        let tally = measured(load, Duration::from_millis(1), 60 * SECOND, 1, "429 Too Many Requests").await;
        assert_eq!((tally.latency.count(), tally.messages[0].reason), (0, Reason::QuotaExceeded));
        let load = Load::Concurrency(1);
        let time = Duration::from_millis(1);
        let tally = measured(load, time, time, u64::MAX, "200 OK").await;
        assert_eq!((tally.latency.count(), tally.messages[0].reason), (0, Reason::Deadline));
        let load = Load::Rate(1000.0);
        let tally = measured(load, time, Duration::ZERO, 1, "200 OK").await;
        assert!(tally.messages[0].message.ends_with("the call waited for others to end"));
    }

    #[test]
    fn the_first_few_messages_are_kept_and_all_errors_counted() {
        let mut tally = Tally::default();
        for number in [0, 1, 0, 2, 3, 4, 5, 6, 0, 5] {
            tally.failed(&Error::new(Reason::Overloaded, format!("message {number}")));
        }
        assert_eq!(tally.errors, 10);
        let counts: Vec<u64> = tally.messages.iter().map(|complaint| complaint.count).collect();
        assert_eq!(counts, [3, 1, 1, 1, 1]);
        assert_eq!(tally.messages[0].message, "message 0");
    }
}
