//! Who works on a connection, and when.
//!
//! A call that is alone works on it itself. With two or more the attendant does, a task that also answers the agent
//! when there is no call, and notices an agent that has vanished. Whoever works has the socket wake it; so when a call
//! takes over, the attendant need not be told, and is not: it looks after a connection that is in use once a second.

use std::fmt;
use std::future::poll_fn;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::time::{Instant, Sleep, sleep};
use tonic::Status;
use vaccel_guest::foresight::Foresight;
use vaccel_guest::frame;

use super::KEEP_ALIVE;
use super::alarm::Alarm;
use super::state::{State, failed};
use super::stream::Outcome;
use crate::dial::Stream as Socket;
use crate::error::Reach;
use crate::unary::{Awake, Options};
use crate::wire::Head;

/// Pause between the attendant's looks at a connection on which calls are made.
const LOOK: Duration = Duration::from_secs(1);

/// Since a call came to it so long ago, an agent's threads may have fallen asleep: to wake them takes longer then.
const ASLEEP: Duration = Duration::from_micros(500);

/// A connection that nobody has used for so long is closed: an agent allows a tenant only so many.
const IDLE: Duration = Duration::from_secs(60);

/// A connection, closed when it is dropped and no call is on it.
#[derive(Clone)]
pub(crate) struct Connection {
    shared: Arc<Shared>,
}

struct Shared {
    work: Mutex<Work>,
    /// Bytes of the requests of calls that are on it, and how many calls: what one among several is chosen by.
    bytes: AtomicUsize,
    calls: AtomicUsize,
    is_closed: AtomicBool,
    /// Calls on this connection and on its client's others.
    all_calls: Arc<AtomicUsize>,
    /// What looks after the socket, and after the alarm.
    runtime: Handle,
}

struct Work {
    state: State,
    foresight: Foresight,
    /// The one of a call that was alone, for the next such.
    alarm: Option<Alarm>,
    worker: Worker,
    attendant: Option<Waker>,
    /// The attendant sleeps for long: it has to be told that calls are made.
    is_asleep: bool,
    /// Calls were made since the attendant looked.
    in_use: bool,
    /// When the last one began.
    begun: Option<Instant>,
    used: Instant,
}

/// Whom the socket wakes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Worker {
    /// Nobody, between two calls.
    None,
    Attendant,
    Call(u32),
}

impl Connection {
    /// Says and hears over a socket what comes before calls, which are counted with those on other connections.
    ///
    /// # Errors
    /// What ended it before it began.
    pub(super) async fn open(
        socket: Box<dyn Socket>,
        head: Arc<Head>,
        all_calls: Arc<AtomicUsize>,
    ) -> Result<Self, String> {
        let mut state = State::new(socket, head);
        poll_fn(|context| {
            state.drive(context, None, false);
            match state.end() {
                Some(why) => Poll::Ready(Err(why.to_owned())),
                None if state.is_settled => Poll::Ready(Ok(())),
                None => Poll::Pending,
            }
        })
        .await?;
        let work = Work {
            state,
            foresight: Foresight::default(),
            alarm: None,
            worker: Worker::None,
            attendant: None,
            is_asleep: false,
            in_use: true,
            begun: None,
            used: Instant::now(),
        };
        let shared = Arc::new(Shared {
            work: Mutex::new(work),
            bytes: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
            all_calls,
            runtime: Handle::current(),
        });
        let attended = Arc::downgrade(&shared);
        tokio::spawn(attend(attended));
        Ok(Self { shared })
    }

    /// Whether it is over, or about to be.
    pub(super) fn is_closed(&self) -> bool {
        self.shared.is_closed.load(Ordering::Relaxed)
    }

    /// How busy it is: bytes of requests, then calls.
    pub(super) fn load(&self) -> (usize, usize) {
        (self.shared.bytes.load(Ordering::Relaxed), self.shared.calls.load(Ordering::Relaxed))
    }

    /// Makes a call: a message in gRPC's framing, for one with gRPC's framing before it cut off.
    ///
    /// # Errors
    /// The agent's status; a [`Failure`](crate::error::Failure) is its source.
    pub(crate) async fn call(&self, path: &str, options: Options, pieces: Vec<Bytes>) -> Outcome {
        let bytes = pieces.iter().map(Bytes::len).sum();
        let (begun, kind) = (Instant::now(), options.kind);
        let mut call = Call { connection: self, bytes, begun, kind, id: None };
        self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.shared.calls.fetch_add(1, Ordering::Relaxed);
        self.shared.all_calls.fetch_add(1, Ordering::Relaxed);
        let (id, awake) = self.shared.begin(path, &options, begun, pieces)?;
        call.id = Some(id);
        call.outcome(awake).await
    }

    /// Says that a call is about to come, if none is there or has come just now.
    pub(super) fn alert(&self) {
        let mut work = self.shared.work();
        let is_awake = work.begun.is_some_and(|begun| begun.elapsed() < ASLEEP);
        let is_free = work.state.streams.is_empty() && work.state.output.bytes() == 0;
        if !is_awake && is_free && work.state.takes_calls() {
            work.state.output.frame(frame::ALERT, 0, 0, |_| {});
            // What cannot be written now is written with the call.
            work.state.flush(&mut Context::from_waker(Waker::noop()));
        }
        self.shared.leave(work);
    }
}

#[cfg(test)]
impl Connection {
    /// Learns that calls of a kind always take so long.
    pub(super) fn foresee(&self, kind: u64, took: Duration) {
        let mut work = self.shared.work();
        (0..100).for_each(|_| work.foresight.learn(kind, microseconds(took)));
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("load", &self.load()).finish_non_exhaustive()
    }
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a call on its way; its first poll sends it, or the attendant does. Returns its number, and when its thread
    /// is awake for the answer.
    fn begin(
        &self,
        path: &str,
        options: &Options,
        begun: Instant,
        pieces: Vec<Bytes>,
    ) -> Result<(u32, Range<Duration>), Status> {
        let mut work = self.work();
        let work = &mut *work;
        if !work.state.takes_calls() {
            let why = work.state.end().unwrap_or("it takes no more calls").to_owned();
            return Err(failed(&work.state.head, Reach::Unsent, &why));
        }
        let id = work.state.begin(path, options.time, pieces);
        (work.in_use, work.begun) = (true, Some(begun));
        let is_alone = work.state.streams.len() == 1;
        if !is_alone {
            work.worker = Worker::Attendant;
        }
        if !is_alone || std::mem::take(&mut work.is_asleep) {
            work.attendant.as_ref().inspect(|attendant| attendant.wake_by_ref());
        }
        let time = Duration::from_micros;
        let awake = match options.awake {
            Awake::Foreseen if self.is_alone() => {
                work.foresight.awake(options.kind).map(|awake| time(awake.start)..time(awake.end))
            }
            Awake::For(time) => Some(Duration::ZERO..time),
            _ => None,
        };
        Ok((id, awake.unwrap_or_default()))
    }

    /// Whether the client makes no other call now: of several some other reply wakes the thread, and what counts is how
    /// much processor time is left for them.
    fn is_alone(&self) -> bool {
        self.all_calls.load(Ordering::Relaxed) == 1
    }

    /// After whatever may have ended the connection or other calls.
    fn leave(&self, mut work: MutexGuard<'_, Work>) {
        let woken = std::mem::take(&mut work.state.woken);
        let is_closed = work.state.end().is_some() || work.state.is_leaving;
        drop(work);
        self.is_closed.fetch_or(is_closed, Ordering::Relaxed);
        woken.into_iter().for_each(Waker::wake);
    }

    /// The attendant's turn. Ready when the connection has ended.
    fn attend(&self, context: &mut Context<'_>, mut alarm: Pin<&mut Sleep>) -> Poll<()> {
        let mut work = self.work();
        let work_now = &mut *work;
        if !work_now.attendant.as_ref().is_some_and(|known| known.will_wake(context.waker())) {
            work_now.attendant = Some(context.waker().clone());
        }
        let now = Instant::now();
        let rings = alarm.as_mut().poll(context).is_ready();
        if rings {
            work_now.state.look(now);
            if std::mem::take(&mut work_now.in_use) {
                work_now.used = now;
            } else {
                // Nobody, or a call that waits for long or is not polled: the agent wants answers all the same.
                work_now.worker = Worker::Attendant;
                if work_now.state.streams.is_empty() && now - work_now.used >= IDLE {
                    work_now.state.finish("nobody used it".to_owned());
                }
            }
        }
        match work_now.worker {
            Worker::Attendant => work_now.state.drive(context, None, false),
            _ => work_now.state.flush(context),
        }
        work_now.is_asleep = !work_now.in_use && work_now.worker == Worker::Attendant;
        let pause = if work_now.is_asleep { KEEP_ALIVE } else { LOOK };
        if rings || alarm.deadline() > now + pause {
            alarm.as_mut().reset(now + pause);
            // Registers the new time, which is not over.
            let _ = alarm.poll(context);
        }
        let is_over = work_now.state.end().is_some();
        self.leave(work);
        if is_over { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let work = self.work.get_mut().unwrap_or_else(PoisonError::into_inner);
        work.attendant.take().into_iter().for_each(Waker::wake);
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Works on a connection until nobody has it any more.
async fn attend(shared: Weak<Shared>) {
    let mut alarm = pin!(sleep(LOOK));
    poll_fn(move |context| match shared.upgrade() {
        Some(shared) => shared.attend(context, alarm.as_mut()),
        None => Poll::Ready(()),
    })
    .await;
}

/// A call that is on a connection until this is dropped.
struct Call<'a> {
    connection: &'a Connection,
    bytes: usize,
    begun: Instant,
    kind: u64,
    id: Option<u32>,
}

impl Call<'_> {
    /// Works on the connection, if it is this call's turn. `is_awake`: it does so without pause.
    fn poll(&mut self, context: &mut Context<'_>, is_awake: bool) -> Poll<Outcome> {
        let shared = &self.connection.shared;
        let Some(id) = self.id else { return Poll::Pending };
        let mut work = shared.work();
        let work_now = &mut *work;
        if work_now.state.streams.len() == 1 {
            work_now.worker = Worker::Call(id);
        }
        if work_now.worker == Worker::Call(id) {
            work_now.in_use = true;
            work_now.state.drive(context, Some(id), is_awake);
        }
        let outcome = work_now.state.take_outcome(id);
        match &outcome {
            Some(outcome) => {
                if outcome.is_ok() {
                    work_now.foresight.learn(self.kind, microseconds(self.begun.elapsed()));
                }
                self.leave(work_now);
            }
            None => work_now.state.wait(id, context.waker()),
        }
        shared.leave(work);
        outcome.map_or(Poll::Pending, Poll::Ready)
    }

    /// Waits for it, awake at that time after its beginning.
    async fn outcome(&mut self, awake: Range<Duration>) -> Outcome {
        if let Some(outcome) = self.sleep(awake.start).await {
            return outcome;
        }
        let is_wanted = awake.start.is_zero() || self.connection.shared.is_alone();
        // Where there was no alarm, it is too early.
        while is_wanted && awake.contains(&self.begun.elapsed()) {
            let once = poll_fn(|context| Poll::Ready(self.poll(context, true))).await;
            if let Poll::Ready(outcome) = once {
                return outcome;
            }
            // Whoever waits for this processor goes first: it may be the agent, which computes the answer.
            std::thread::yield_now();
            // The runtime looks at its sockets, and does not wait for them.
            tokio::task::yield_now().await;
        }
        poll_fn(|context| self.poll(context, false)).await
    }

    /// Waits until so long after its beginning; returns the outcome if it comes before.
    async fn sleep(&mut self, until: Duration) -> Option<Outcome> {
        let after = until.checked_sub(self.begun.elapsed()).filter(|after| !after.is_zero())?;
        let shared = &self.connection.shared;
        let known = shared.work().alarm.take();
        let mut alarm = known.map_or_else(|| Alarm::new(&shared.runtime), Ok).ok()?;
        let outcome = {
            let mut rings = pin!(alarm.rings(after));
            poll_fn(|context| match self.poll(context, false) {
                Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
                Poll::Pending => rings.as_mut().poll(context).map(|_| None),
            })
            .await
        };
        let mut work = shared.work();
        if outcome.is_none() {
            work.foresight.woken(microseconds(self.begun.elapsed().saturating_sub(until)));
        }
        if outcome.is_none() || alarm.stop().is_ok() {
            work.alarm = Some(alarm);
        }
        outcome
    }

    /// Is on the connection no more.
    fn leave(&mut self, work: &mut Work) {
        if self.id.take().map(Worker::Call) == Some(work.worker) {
            work.worker = Worker::None;
        }
        if work.state.output.bytes() > 0 && work.worker != Worker::Attendant {
            // What is left to write is written when the attendant has its turn.
            work.attendant.as_ref().inspect(|attendant| attendant.wake_by_ref());
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let shared = &self.connection.shared;
        shared.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        shared.calls.fetch_sub(1, Ordering::Relaxed);
        shared.all_calls.fetch_sub(1, Ordering::Relaxed);
        if let Some(id) = self.id {
            let mut work = shared.work();
            work.state.give_up(id);
            self.leave(&mut work);
            shared.leave(work);
        }
    }
}
