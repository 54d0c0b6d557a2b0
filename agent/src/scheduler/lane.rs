//! The lanes: threads that take from the queue, and the tickets of those who wait.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use vaccel_proto::v1::Tensor;
use vaccel_proto::{Error, Reason};

use super::batch::{Call, Core, Home, check_reply, join, part};
use super::queue::{Batch, FairQueue, Job, Picked, Place};
use super::{Cancel, QUEUE_MAX, Spans, Timed, WAIT_SHARE_MAX, overloaded};
use crate::onward::{self, Listener};
use crate::quota::{Account, Hold};

type Answer<T> = oneshot::Sender<Result<Timed<T>, Error>>;

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
    /// Lanes that something runs on.
    taken: usize,
    /// Threads that wait for something to do. Whoever came last is the next to work: it is the soonest awake, and has
    /// the most of what it needs in its processor's memory.
    idle: Vec<Thread>,
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
    /// Who computes.
    by: By,
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
struct Waiting {
    stage: Arc<Stage>,
    work: Work,
}

/// Where a call is, for its ticket. Written with the state locked.
#[derive(Debug)]
struct Stage(AtomicU64);

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

    /// Lets whoever is likely to be next wake.
    pub(super) fn expect(&self, task: Listener) {
        let state = self.state();
        let (home, next) = (state.last_home.as_ref().and_then(Weak::upgrade), state.idle.last().cloned());
        drop(state);
        match (home, next) {
            (Some(home), _) => home.expect(task),
            (None, Some(next)) => next.unpark(),
            (None, None) => {}
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
                state = self.wait(state);
                continue;
            };
            state.last_home = None;
            // Somebody else can take what is left.
            self.rouse(state);
            drop(late);
            let (done, woken) = onward::after(|| perform(batch, &cancel));
            state = self.state();
            if state.end(number, &done) {
                return;
            }
            if state.queue.waiting() == 0 {
                drop(state);
                LOOKS_NEXT.set(self);
                woken.here();
                LOOKS_NEXT.set(std::ptr::null());
                state = self.state();
            }
        }
    }

    /// Wakes a thread for what waits, if it may work on it.
    fn rouse(&self, mut state: MutexGuard<'_, State>) {
        let can_more = state.queue.waiting() > 0 && state.taken < self.count;
        let next = if can_more { state.idle.pop() } else { None };
        drop(state);
        if let Some(next) = next {
            next.unpark();
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
                home.give(Box::new(|| ()));
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

    /// What the lanes do elsewhere, on a thread of a model's.
    fn run_at_home(&self, batch: Batch<Waiting>, number: u64, cancel: &Cancel) {
        let (done, woken) = onward::after(|| perform(batch, cancel));
        let mut state = self.state();
        let is_left = state.end(number, &done);
        self.rouse(state);
        if !is_left {
            woken.here();
        }
    }

    /// Waits until somebody takes this thread out of those that are idle.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let this = std::thread::current();
        state.idle.push(this.clone());
        while state.idle.iter().any(|idle| idle.id() == this.id()) {
            drop(state);
            std::thread::park();
            state = self.state();
        }
        state
    }
}

impl State {
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
        let batch = self.queue.pick(Instant::now(), late)?;
        self.taken += 1;
        self.started += 1;
        let (number, cancel) = (self.started, Cancel::default());
        for (_, waiting) in &batch {
            waiting.stage.0.store(number, Ordering::Relaxed);
        }
        if let Some(bucket) = &batch[0].0.bucket {
            bucket.core.begin();
        }
        let (callers, abandoned) = (batch.len(), None);
        self.runs.insert(number, Run { cancel: cancel.clone(), callers, abandoned, by });
        Some((batch, number, cancel))
    }

    /// Whether the run's callers had left, so that somebody else has the lane.
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
        let is_left = self.runs.remove(&number).is_some_and(|run| run.abandoned.is_some());
        if !is_left {
            self.taken -= 1;
        }
        is_left
    }

    /// One caller of a run leaves. If it was the last, the lane is free; returns what tells the run to stop, and who
    /// computes it.
    fn leave(&mut self, number: u64, account: &Arc<Account>) -> Option<(Cancel, By)> {
        let run = self.runs.get_mut(&number)?;
        run.callers -= 1;
        if run.callers > 0 {
            return None;
        }
        run.abandoned = Some(account.abandoned());
        self.taken -= 1;
        Some((run.cancel.clone(), run.by))
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
                let stopped = state.leave(number, &self.account);
                let is_closing = state.closing;
                self.lanes.rouse(state);
                if let Some((cancel, by)) = stopped {
                    cancel.set();
                    if by == By::Lane
                        && !is_closing
                        && let Err(error) = self.lanes.add()
                    {
                        tracing::error!(%error, "a lane could not be started: less is computed at the same time");
                    }
                }
            }
        }
    }
}

/// What a run came to.
struct Done {
    calls: Vec<DoneCall>,
    /// What all rows together took, where that says something about runs of this size.
    whole: Option<Duration>,
}

struct DoneCall {
    picked: Picked,
    /// What the call's tenant is charged.
    took: Duration,
    /// Whether the batch failed because of it.
    spoilt: bool,
}

/// Runs what was picked and answers its callers.
fn perform(batch: Batch<Waiting>, cancel: &Cancel) -> Done {
    let began = Instant::now();
    let mut together = Vec::with_capacity(batch.len());
    for (picked, waiting) in batch {
        match waiting.work {
            Work::Model { call, reply, .. } => together.push(Member { picked, call, reply }),
            Work::Alone(work) => {
                // A panic drops the way to answer, which the caller notices.
                let _ = catch_unwind(AssertUnwindSafe(|| work(cancel)));
                let took = began.elapsed();
                return Done { calls: vec![DoneCall { picked, took, spoilt: false }], whole: Some(took) };
            }
        }
    }
    let Some(bucket) = together[0].picked.bucket.clone() else {
        return Done { calls: Vec::new(), whole: None };
    };
    run_model(&bucket.core, together, began, cancel)
}

/// A call in a batch.
struct Member {
    picked: Picked,
    call: Call,
    reply: Answer<Vec<Tensor>>,
}

fn run_model(core: &Core, members: Vec<Member>, began: Instant, cancel: &Cancel) -> Done {
    let rows: Vec<usize> = members.iter().map(|member| member.picked.rows).collect();
    let total = rows.iter().sum::<usize>();
    let mut spans = Spans { calls: members.len(), rows: total, ..Spans::default() };
    let (results, is_usual) = if let [one] = &members[..] {
        let is_usual = core.runner.is_prepared(&one.call.inputs);
        (vec![run_once(core, &one.call, cancel)], is_usual)
    } else {
        match run_together(core, &members, &rows, &mut spans, cancel) {
            Some(done) => done,
            None => return run_apart(core, members, began, cancel),
        }
    };
    let took = began.elapsed();
    spans.run = took;
    let is_whole = results.iter().all(Result::is_ok);
    let calls = members.into_iter().zip(results).enumerate().map(|(index, (member, result))| {
        let spans = Spans { leads: index == 0, ..spans };
        let share = took.mul_f64(share(member.picked.rows, total));
        answer(member, result, spans, began, share, false)
    });
    Done { calls: calls.collect(), whole: Some(took).filter(|_| is_whole && is_usual) }
}

fn answer(
    member: Member,
    result: Result<Vec<Tensor>, Error>,
    spans: Spans,
    began: Instant,
    took: Duration,
    spoilt: bool,
) -> DoneCall {
    let spans = Spans { queue: began.saturating_duration_since(member.picked.arrived), ..spans };
    // Whoever does not listen has left.
    let _ = member.reply.send(result.map(|value| Timed { value, spans }));
    DoneCall { picked: member.picked, took, spoilt }
}

fn run_once(core: &Core, call: &Call, cancel: &Cancel) -> Result<Vec<Tensor>, Error> {
    run_caught(core, call.inputs.clone(), &call.outputs, call.reply_bytes_max, cancel)
}

fn run_caught(
    core: &Core,
    inputs: Vec<Tensor>,
    outputs: &[usize],
    reply_bytes_max: u64,
    cancel: &Cancel,
) -> Result<Vec<Tensor>, Error> {
    let run = || core.runner.run(inputs, outputs, reply_bytes_max, cancel);
    let panicked = |_| Err(Error::new(Reason::BackendFailed, "the backend failed").caused_by("it panicked"));
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(panicked)
}

/// What each of a run's calls gets.
type Results = Vec<Result<Vec<Tensor>, Error>>;

/// One run for all, and whether it took what such runs take; none when each has to run by itself, because the run
/// failed or its outputs are not made of rows.
fn run_together(
    core: &Core,
    members: &[Member],
    rows: &[usize],
    spans: &mut Spans,
    cancel: &Cancel,
) -> Option<(Results, bool)> {
    let began = Instant::now();
    let calls: Vec<&Call> = members.iter().map(|member| &member.call).collect();
    let inputs = join(&calls);
    spans.join = began.elapsed();
    let is_usual = core.runner.is_prepared(&inputs);
    let limit = calls.iter().map(|call| call.reply_bytes_max).fold(0, u64::saturating_add);
    let outputs = run_caught(core, inputs, &calls[0].outputs, limit, cancel).ok()?;
    let ran = Instant::now();
    let Some(parts) = part(&outputs, rows) else {
        core.has_no_rows();
        return None;
    };
    let checked = parts.into_iter().zip(&calls).map(|(part, call)| {
        check_reply(&part, call.reply_bytes_max)?;
        Ok(part)
    });
    let checked = checked.collect();
    spans.part = ran.elapsed();
    Some((checked, is_usual))
}

/// Every call by itself, so that one that fails does not take the others with it. Who spoilt the batch pays for it.
fn run_apart(core: &Core, members: Vec<Member>, began: Instant, cancel: &Cancel) -> Done {
    let wasted = began.elapsed();
    let mut done = Vec::with_capacity(members.len());
    for member in members {
        let begun = Instant::now();
        let result = if cancel.is_set() {
            Err(Error::new(Reason::Cancelled, "nobody waits any more"))
        } else {
            run_once(core, &member.call, cancel)
        };
        done.push((member, result, begun.elapsed()));
    }
    let failed = done.iter().filter(|(_, result, _)| result.is_err()).count();
    let calls = done.into_iter().map(|(member, result, run)| {
        let spoilt = result.is_err();
        let fine = if spoilt { wasted.div_f64(failed.max(1) as f64) } else { Duration::ZERO };
        let spans = Spans { run, calls: 1, rows: member.picked.rows, leads: true, ..Spans::default() };
        answer(member, result, spans, began, run + fine, spoilt)
    });
    Done { calls: calls.collect(), whole: None }
}

#[allow(clippy::cast_precision_loss, reason = "a share of lane time")]
fn share(rows: usize, total: usize) -> f64 {
    rows as f64 / total.max(1) as f64
}
