//! The lanes: threads that take from the queue, and the tickets of those who wait.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use vaccel_proto::Error;
use vaccel_proto::v1::Tensor;

use super::batch::{Call, Home};
use super::queue::{Batch, FairQueue, Job, Place, TenantKey};
use super::run::{Done, perform};
use super::{BESIDE_MAX, Cancel, LANE_TIME_MAX, QUEUE_MAX, Timed, WAIT_SHARE_MAX, overloaded};
use crate::onward::{self, Listener, Pace};
use crate::quota::{Account, Hold};

pub(super) type Answer<T> = oneshot::Sender<Result<Timed<T>, Error>>;

/// What a call is to a lane. Each answers its caller itself.
pub(super) enum Work {
    Alone(Box<dyn FnOnce(&Cancel) + Send>),
    Model { call: Call, reply: Answer<Vec<Tensor>>, home: Option<Arc<dyn Home>> },
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Alone(_) => "Alone",
            Self::Model { .. } => "Model",
        })
    }
}

/// A queue and the threads that empty it.
pub(super) struct Lanes {
    count: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    queue: FairQueue<Waiting>,
    runs: HashMap<u64, Run>,
    started: u64,
    /// Lanes that something runs on, and runs beside them that were on one.
    taken: usize,
    beside: usize,
    /// Threads that wait for something to do. Whoever came last is the next to work: it is the soonest awake, and has
    /// the most of what it needs in its processor's memory.
    idle: Vec<Thread>,
    /// What the last of them is to read.
    news: Option<Listener>,
    /// Where the last run is, or was, if that is a model's own thread.
    last_home: Option<Weak<dyn Home>>,
    closing: bool,
}

thread_local! {
    /// Whose queue this thread looks into before it waits: nobody needs to be woken for what it puts there.
    static LOOKS_NEXT: Cell<*const Lanes> = const { Cell::new(std::ptr::null()) };
}

/// What a lane works on.
struct Run {
    cancel: Cancel,
    /// Callers that wait for it.
    callers: usize,
    /// When the last one left: it is counted until it ends, and somebody else has its lane.
    abandoned: Option<Hold>,
    began: Instant,
    /// The first caller's.
    tenant: TenantKey,
    /// What the tenant was charged when the run had had its lane for so long that somebody else got it.
    beside: Option<Duration>,
    /// Who computes.
    by: By,
}

impl Run {
    fn has_lane(&self) -> bool {
        self.abandoned.is_none() && self.beside.is_none()
    }
}

/// Threads that compute.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Lane,
    /// One of a model's own.
    Home,
}

/// A call in the queue.
#[derive(Debug)]
pub(super) struct Waiting {
    stage: Arc<Stage>,
    pub(super) work: Work,
}

/// Where a call is, for its ticket. Written with the state locked.
#[derive(Debug)]
pub(super) struct Stage(AtomicU64);

/// Waiting, thrown out of a full queue, or the number of its run.
const QUEUED: u64 = 0;
const PUSHED_OUT: u64 = u64::MAX;

impl Lanes {
    /// # Errors
    /// A thread that cannot be started; those that were end.
    pub(super) fn start(count: usize) -> io::Result<Arc<Self>> {
        let lanes = Arc::new(Self { count, state: Mutex::default() });
        let started = (0..count).try_for_each(|_| lanes.add());
        started.inspect_err(|_| lanes.close()).map(|()| lanes)
    }

    /// Lets the threads end when they have done what waits.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closing = true;
        let idle = std::mem::take(&mut state.idle);
        drop(state);
        idle.iter().for_each(Thread::unpark);
    }

    /// Lets whoever is likely to be next wake, and read of the work that comes.
    pub(super) fn expect(&self, task: Listener) {
        let mut state = self.state();
        if let Some(home) = state.last_home.as_ref().and_then(Weak::upgrade) {
            drop(state);
            return home.expect(task);
        }
        if let Some(next) = state.idle.last().cloned() {
            state.news = Some(task);
            drop(state);
            next.unpark();
        }
    }

    /// Calls that wait, and runs that go on.
    #[cfg(test)]
    pub(super) fn at_work(&self) -> (usize, usize) {
        let state = self.state();
        (state.queue.waiting(), state.runs.len())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(self: &Arc<Self>) -> io::Result<()> {
        let lanes = Arc::clone(self);
        std::thread::Builder::new().name("lane".into()).spawn(move || lanes.work()).map(drop)
    }

    fn work(&self) {
        let mut state = self.state();
        let (mut pace, mut task) = (Pace::default(), None);
        loop {
            let mut late = Vec::new();
            let Some((batch, number, cancel)) = state.begin(self.count, By::Lane, &mut late) else {
                if !late.is_empty() {
                    // Requests are large: they are freed with the queue open.
                    drop(state);
                    drop(late);
                    state = self.state();
                    continue;
                }
                if state.closing {
                    return;
                }
                state = self.wait(state, task.take());
                continue;
            };
            (state.last_home, state.news) = (None, None);
            // Somebody else can take what is left.
            self.rouse(state);
            drop(late);
            pace.begin();
            let (done, woken) = onward::after(|| perform(batch, &cancel));
            state = self.state();
            if state.end(number, &done) {
                // Its tenant may have waited for that.
                return self.rouse(state);
            }
            task = None;
            if state.queue.waiting() == 0 {
                drop(state);
                LOOKS_NEXT.set(self);
                task = woken.here();
                LOOKS_NEXT.set(std::ptr::null());
                state = self.state();
            }
            task = pace.end(task);
        }
    }

    /// Wakes a thread for what waits, if it may work on it.
    fn rouse(&self, mut state: MutexGuard<'_, State>) {
        let can_more = state.queue.waiting() > 0 && state.taken < self.count;
        let next = if can_more { state.idle.pop() } else { None };
        if next.is_some() {
            state.news = None;
        }
        drop(state);
        if let Some(next) = next {
            next.unpark();
        }
    }

    /// Lets somebody else have the lane of a run that goes on, on a thread that was the lane's or none.
    fn replace(self: &Arc<Self>, state: MutexGuard<'_, State>, by: Option<By>) {
        let is_closing = state.closing;
        self.rouse(state);
        if by == Some(By::Lane)
            && !is_closing
            && let Err(error) = self.add()
        {
            tracing::error!(%error, "a lane could not be started: less is computed at the same time");
        }
    }

    /// Lets somebody work on what was just put into the queue: the thread that it needs in any case, if there is one
    /// and nothing else waits.
    fn invite(self: &Arc<Self>, mut state: MutexGuard<'_, State>, home: Option<Arc<dyn Home>>) {
        if let Some(home) = home
            && state.queue.waiting() == 1
            && home.reserve()
        {
            let mut late = Vec::new();
            let begun = state.begin(self.count, By::Home, &mut late);
            let Some((batch, number, cancel)) = begun else {
                home.give(Box::new(|| None));
                return self.rouse(state);
            };
            state.last_home = Some(Arc::downgrade(&home));
            drop(state);
            let lanes = Arc::clone(self);
            return home.give(Box::new(move || lanes.run_at_home(batch, number, &cancel)));
        }
        // A thread that looks into the queue next does not need to be woken for that.
        if LOOKS_NEXT.replace(std::ptr::null()) != Arc::as_ptr(self) {
            self.rouse(state);
        }
    }

    /// What the lanes do elsewhere, on a thread of a model's. Returns the task that went on then.
    fn run_at_home(&self, batch: Batch<Waiting>, number: u64, cancel: &Cancel) -> Option<Listener> {
        let (done, woken) = onward::after(|| perform(batch, cancel));
        let mut state = self.state();
        let is_left = state.end(number, &done);
        self.rouse(state);
        if is_left { None } else { woken.here() }
    }

    /// Waits until somebody takes this thread out of those that are idle; first awake, if there is a task to listen to.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        first: Option<Listener>,
    ) -> MutexGuard<'a, State> {
        let this = std::thread::current();
        state.idle.push(this.clone());
        let mut task = first;
        while state.has_idle(&this) {
            task = task.or_else(|| state.news.take());
            drop(state);
            match task.take() {
                Some(task) => self.listen(&this, &task),
                None => std::thread::park(),
            }
            state = self.state();
        }
        state
    }

    /// Goes on with a task until there is work, which is this thread's if the task brought it.
    fn listen(&self, this: &Thread, task: &Listener) {
        LOOKS_NEXT.set(self);
        task.listen(|| LOOKS_NEXT.get().is_null() || !self.state().has_idle(this));
        if LOOKS_NEXT.replace(std::ptr::null()).is_null() {
            self.state().idle.retain(|idle| idle.id() != this.id());
        }
    }
}

impl State {
    fn has_idle(&self, thread: &Thread) -> bool {
        self.idle.iter().any(|idle| idle.id() == thread.id())
    }

    /// Takes what is next out of the queue, if a lane is free for it. Those that come too late are given to `late`.
    fn begin(
        &mut self,
        lanes: usize,
        by: By,
        late: &mut Vec<Job<Waiting>>,
    ) -> Option<(Batch<Waiting>, u64, Cancel)> {
        if self.taken == lanes {
            return None;
        }
        let now = Instant::now();
        let batch = self.queue.pick(now, &self.barred(lanes), late)?;
        self.taken += 1;
        self.started += 1;
        let (number, cancel) = (self.started, Cancel::default());
        for (_, waiting) in &batch {
            waiting.stage.0.store(number, Ordering::Relaxed);
        }
        if let Some(bucket) = &batch[0].0.bucket {
            bucket.core.begin();
        }
        let (callers, tenant) = (batch.len(), batch[0].0.tenant);
        let (cancels, abandoned, beside) = (cancel.clone(), None, None);
        self.runs.insert(number, Run { cancel: cancels, callers, abandoned, began: now, tenant, beside, by });
        Some((batch, number, cancel))
    }

    /// Tenants that compute so much beside the lanes that they have no part in those that are left.
    fn barred(&self, lanes: usize) -> Vec<TenantKey> {
        if self.beside == 0 || self.closing {
            return Vec::new();
        }
        let runs =
            |tenant| self.runs.values().filter(move |run| run.tenant == tenant && run.abandoned.is_none());
        let beside = self.runs.values().filter(|run| run.beside.is_some()).map(|run| run.tenant);
        beside.filter(|tenant| runs(*tenant).count() >= lanes).collect()
    }

    /// Frees a lane that one run has had for long, which goes on without; returns who computes it.
    fn displace(&mut self) -> Option<By> {
        let longest = self.runs.values_mut().filter(|run| run.has_lane()).min_by_key(|run| run.began)?;
        let time = longest.began.elapsed();
        if time < LANE_TIME_MAX || self.beside == BESIDE_MAX {
            return None;
        }
        longest.beside = Some(time);
        self.queue.charge(longest.tenant, time);
        self.beside += 1;
        self.taken -= 1;
        Some(longest.by)
    }

    /// Whether somebody else has the run's lane.
    fn end(&mut self, number: u64, done: &Done) -> bool {
        if let Some(bucket) = &done.calls[0].picked.bucket {
            bucket.core.end();
            if let Some(took) = done.whole {
                let rows = done.calls.iter().map(|call| call.picked.rows).sum();
                bucket.ran(rows, took, Instant::now());
            }
        }
        for call in &done.calls {
            self.queue.finished(&call.picked, call.took, call.spoilt);
        }
        let Some(run) = self.runs.remove(&number) else { return false };
        if let Some(charged) = run.beside {
            self.queue.settle(run.tenant, charged);
            self.beside -= 1;
        }
        if run.has_lane() {
            self.taken -= 1;
        }
        !run.has_lane()
    }

    /// One caller of a run leaves. If it was the last, the lane is free; returns what tells the run to stop, and who
    /// had the lane.
    fn leave(&mut self, number: u64, account: &Arc<Account>) -> Option<(Cancel, Option<By>)> {
        let run = self.runs.get_mut(&number)?;
        run.callers -= 1;
        if run.callers > 0 {
            return None;
        }
        let by = run.has_lane().then_some(run.by);
        run.abandoned = Some(account.abandoned());
        if by.is_some() {
            self.taken -= 1;
        }
        Some((run.cancel.clone(), by))
    }
}

/// A call on its way: in the queue, on a lane, or answered. Dropped before it was answered, it leaves.
pub(super) struct Ticket {
    lanes: Arc<Lanes>,
    account: Arc<Account>,
    place: Place,
    stage: Arc<Stage>,
    answered: bool,
}

impl Ticket {
    /// Lets a call in.
    ///
    /// # Errors
    /// `OVERLOADED` when it would wait for too much of its time, or too many wait.
    pub(super) fn new(lanes: &Arc<Lanes>, account: &Arc<Account>, job: Job<Work>) -> Result<Self, Error> {
        let stage = Arc::new(Stage(AtomicU64::new(QUEUED)));
        let (now, time) = (job.arrived, job.deadline.saturating_duration_since(job.arrived));
        let mut state = lanes.state();
        let wait = state.queue.wait(account, lanes.count).max(state.queue.head_wait(account, now));
        if wait > time.mul_f64(WAIT_SHARE_MAX) {
            drop(state);
            let why = format!("a lane would be free in {} ms, too late for this call", wait.as_millis());
            return Err(overloaded(&why, wait - time.mul_f64(WAIT_SHARE_MAX)));
        }
        let mut pushed_out = None;
        if state.queue.waiting() >= QUEUE_MAX {
            pushed_out = state.queue.push_out(account);
            match &pushed_out {
                Some(job) => job.work.stage.0.store(PUSHED_OUT, Ordering::Relaxed),
                None => {
                    drop(state);
                    return Err(overloaded(&format!("{QUEUE_MAX} calls wait for a lane"), wait));
                }
            }
        }
        let home = match &job.work {
            Work::Model { home, .. } => home.clone(),
            Work::Alone(_) => None,
        };
        let place = state.queue.push(account, job.map(|work| Waiting { stage: Arc::clone(&stage), work }));
        lanes.invite(state, home);
        drop(pushed_out);
        Ok(Self { lanes: Arc::clone(lanes), account: Arc::clone(account), place, stage, answered: false })
    }

    pub(super) fn answered(mut self) {
        self.answered = true;
    }

    pub(super) fn was_pushed_out(&self) -> bool {
        self.stage.0.load(Ordering::Relaxed) == PUSHED_OUT
    }

    /// Lets the call run beside others that have had their lanes for long, if its tenant has none.
    pub(super) fn make_room(&self) {
        let mut state = self.lanes.state();
        if !self.is_running() && state.taken == self.lanes.count && state.queue.is_kept_out(self.place) {
            let by = state.displace();
            self.lanes.replace(state, by);
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.stage.0.load(Ordering::Relaxed) != QUEUED
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let mut state = self.lanes.state();
        match self.stage.0.load(Ordering::Relaxed) {
            QUEUED => {
                let job = state.queue.remove(self.place);
                drop(state);
                drop(job);
            }
            PUSHED_OUT => {}
            number => {
                let Some((cancel, by)) = state.leave(number, &self.account) else { return };
                cancel.set();
                self.lanes.replace(state, by);
            }
        }
    }
}
