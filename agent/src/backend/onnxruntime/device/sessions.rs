//! The sessions of a model on a device: one that takes all shapes, and others that take one combination of shapes each,
//! for those that come again and again.
//!
//! A captured graph holds what its run used: not only memory, which stays, but kernels that the library of convolutions
//! chose, and may have compiled, for these shapes. A session that then runs other shapes lets go of them, and to launch
//! the graph again is an access to memory that is nobody's any more. So a session with graphs sees the same shapes for
//! ever. It is loaded, and run once on zeros, while calls go on without, and counted as the first one is.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::ThreadId;

use bytes::Bytes;
use ort::session::{RunOptions, Session};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::super::super::cuda::{Alive, Charge, Device};
use super::super::{failed, to_ort};
use super::{GRAPH, NO_GRAPH, PARALLEL_RUNS, SHAPES_MAX, Signature};
use crate::onward::{Listener, Pace};
use crate::scheduler::{Cancel, Errand, Home};

/// Runs of the same shapes after which they get a session. They come again, and the session for all shapes would spend
/// a tenth of a second whenever others come in between.
pub(in super::super) const RUNS_MIN: u32 = 3;

/// Combinations of shapes whose runs are counted; when there are more, counting begins anew.
const COUNTED_MAX: usize = 64;

/// A session, and what it has of the device, which is given back when that is free.
pub(in super::super) struct Loaded {
    pub(in super::super) session: Session,
    pub(in super::super) charge: Charge,
}

/// Loads a model again, for graphs.
pub(in super::super) type Load = Arc<dyn Fn(&Cancel) -> Result<Loaded, Error> + Send + Sync>;

pub(super) struct Sessions {
    any: Arc<SessionThread>,
    load: Option<Load>,
    inputs: Arc<[String]>,
    own: Arc<Mutex<HashMap<Signature, Own>>>,
    /// The thread that loads one, if one is being loaded.
    loader: Mutex<Weak<Alive>>,
    cancel: Arc<Cancel>,
}

/// The session of one combination of shapes.
enum Own {
    NotYet {
        runs: u32,
    },
    /// Or there was no memory for it.
    Loading,
    There(Arc<SessionThread>),
}

impl Sessions {
    /// # Errors
    /// `BACKEND_FAILED` when there can be no threads.
    pub(super) fn new(session: Loaded, load: Option<Load>, inputs: &[String]) -> Result<Self, Error> {
        let any = Arc::new(SessionThread::start(session)?);
        let (own, loader, cancel) = Default::default();
        Ok(Self { any, load, inputs: inputs.into(), own, loader, cancel })
    }

    fn own(&self) -> MutexGuard<'_, HashMap<Signature, Own>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session for these shapes, and whether it is theirs alone.
    pub(super) fn of(&self, signature: &Signature) -> (Arc<SessionThread>, bool) {
        match self.own().get(signature) {
            Some(Own::There(session)) => (Arc::clone(session), true),
            _ => (Arc::clone(&self.any), false),
        }
    }

    /// Whether these shapes have what they will have for now.
    pub(super) fn are_known(&self, signature: &Signature) -> bool {
        let loads = || self.loader().strong_count() > 0;
        match self.own().get(signature) {
            Some(Own::There(_)) => true,
            Some(Own::Loading) => !loads(),
            Some(Own::NotYet { runs }) => *runs >= RUNS_MIN,
            None => self.load.is_none(),
        }
    }

    /// Takes note of a run, and gives its shapes a session when they have come often enough.
    pub(super) fn ran(&self, signature: &Signature) {
        let Some(load) = &self.load else { return };
        let mut own = self.own();
        let sessions = own.values().filter(|own| !matches!(own, Own::NotYet { .. })).count();
        if own.len() >= COUNTED_MAX {
            own.retain(|_, own| !matches!(own, Own::NotYet { .. }));
        }
        let state = own.entry(signature.clone()).or_insert(Own::NotYet { runs: 0 });
        let Own::NotYet { runs } = state else { return };
        *runs = runs.saturating_add(1);
        if *runs < RUNS_MIN || sessions >= SHAPES_MAX {
            return;
        }
        let mut loader = self.loader();
        // One at a time.
        if loader.strong_count() > 0 {
            return;
        }
        *state = Own::Loading;
        let (load, cancel, all) = (Arc::clone(load), Arc::clone(&self.cancel), Arc::clone(&self.own));
        let (signature, inputs) = (signature.clone(), Arc::clone(&self.inputs));
        let alive = Device::alive();
        *loader = Arc::downgrade(&alive);
        let make = move || match load(&cancel).and_then(SessionThread::start) {
            Ok(session) => {
                if let Err(error) = warm_up(&session, &inputs, &signature, &cancel) {
                    // The first call will tell whether that is for zeros alone.
                    tracing::debug!(%error, "a model does not run on zeros");
                }
                let mut own = all.lock().unwrap_or_else(PoisonError::into_inner);
                own.insert(signature, Own::There(Arc::new(session)));
            }
            Err(error) => {
                tracing::debug!(%error, "no session for graphs of a model");
                if error.reason() == Reason::QuotaExceeded {
                    // There may be room when they have come as often again.
                    all.lock().unwrap_or_else(PoisonError::into_inner).remove(&signature);
                }
            }
        };
        let work = move || {
            make();
            drop(alive);
        };
        // Without a thread there is none for now, and calls go on as they did.
        let _ = std::thread::Builder::new().name("device-load".into()).spawn(work);
    }

    fn loader(&self) -> MutexGuard<'_, Weak<Alive>> {
        self.loader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets sessions of single combinations of shapes go, whose memory is needed: it is free when their threads end.
    pub(super) fn let_go(&self) {
        self.own().clear();
    }
}

/// Has the library choose its kernels for these shapes, and take the memory that it needs.
fn warm_up(
    session: &SessionThread,
    inputs: &Arc<[String]>,
    signature: &Signature,
    cancel: &Cancel,
) -> Result<(), Error> {
    let zeros = |(dtype, shape): &(DType, Vec<i64>)| {
        let count: usize = shape.iter().map(|&size| usize::try_from(size).unwrap_or(0)).product();
        Tensor::from_bytes(*dtype, shape, Bytes::from(vec![0; count * dtype.size()]))
    };
    let (tensors, names): (Vec<Tensor>, _) = (signature.iter().map(zeros).collect(), Arc::clone(inputs));
    let mut options = RunOptions::new().map_err(failed)?;
    options.set(GRAPH, NO_GRAPH).map_err(failed)?;
    let options = Arc::new(options);
    let terminator = Arc::clone(&options);
    let interrupt = move || {
        let _ = terminator.terminate();
    };
    let work = move |session: &mut Session| {
        let values = names.iter().zip(&tensors);
        let values = values.map(|(name, tensor)| Ok((Cow::Borrowed(name.as_str()), to_ort(tensor)?)));
        let values: Vec<_> = values.collect::<Result<_, Error>>()?;
        session.run_with_options(values, &options).map(drop).map_err(failed)
    };
    let _loading = Device::loading();
    cancel.interruptible(interrupt, || session.run(work))?
}

#[cfg(test)]
impl Sessions {
    /// Waits until a session that is being loaded is there.
    pub(super) fn settle(&self) {
        while self.loader().strong_count() > 0 {
            std::thread::yield_now();
        }
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.cancel.set();
        Device::let_go(&self.loader());
    }
}

thread_local! {
    /// The session of this thread.
    static SESSION: RefCell<Option<Session>> = const { RefCell::new(None) };
}

/// The thread that a session runs on, and ends on. It can be a lane, too.
pub(super) struct SessionThread {
    /// None once it is to end.
    works: Option<SyncSender<Given>>,
    /// Works that it has, or that somebody is about to give it.
    pending: Arc<AtomicUsize>,
    thread: ThreadId,
    alive: Weak<Alive>,
}

/// What a thread is given.
enum Given {
    Work(Errand),
    /// The news that there will be some, once a task has read of it.
    News(Listener),
}

/// What waits for a thread: works of the model's runs, a lane's, that of the loader, and news.
const GIVEN_MAX: usize = PARALLEL_RUNS + 3;

impl SessionThread {
    fn start(Loaded { session, charge }: Loaded) -> Result<Self, Error> {
        let (works, queue) = sync_channel::<Given>(GIVEN_MAX);
        let pending = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&pending);
        let here = Device::alive();
        let alive = Arc::downgrade(&here);
        let run = move || {
            SESSION.set(Some(session));
            let mut pace = Pace::default();
            for given in queue {
                let task = match given {
                    Given::Work(work) => {
                        pace.begin();
                        // Whoever waits sees that no answer comes.
                        let task = catch_unwind(AssertUnwindSafe(work)).ok().flatten();
                        counted.fetch_sub(1, Ordering::AcqRel);
                        pace.end(task)
                    }
                    Given::News(task) => Some(task),
                };
                if let Some(task) = task {
                    task.listen(|| counted.load(Ordering::Acquire) > 0);
                }
            }
            {
                let _loading = Device::loading();
                drop(SESSION.take());
            }
            drop(charge);
            drop(here);
        };
        let spawned = std::thread::Builder::new().name("device-model".into()).spawn(run);
        let thread = spawned.map_err(|error| {
            Error::new(Reason::BackendFailed, "no thread for a model on a device")
                .caused_by(error.to_string())
        })?;
        Ok(Self { works: Some(works), pending, thread: thread.thread().id(), alive })
    }

    /// Whether this is the thread.
    fn is_here(&self) -> bool {
        self.thread == std::thread::current().id()
    }

    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Session) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let gone = || Error::new(Reason::BackendFailed, "ONNX Runtime failed while running the model");
        let here = move || SESSION.with_borrow_mut(|session| session.as_mut().map(work));
        if self.is_here() {
            return here().ok_or_else(gone);
        }
        let (reply, answer) = sync_channel(1);
        self.pending.fetch_add(1, Ordering::AcqRel);
        let work = Given::Work(Box::new(move || {
            let _ = reply.send(here());
            None
        }));
        self.works.as_ref().ok_or_else(gone)?.send(work).map_err(|_| gone())?;
        answer.recv().ok().flatten().ok_or_else(gone)
    }
}

impl Home for SessionThread {
    fn reserve(&self) -> bool {
        self.pending.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn give(&self, work: Errand) {
        if let Some(works) = &self.works {
            // The thread is there as long as this is.
            let _ = works.send(Given::Work(work));
        }
    }

    fn expect(&self, task: Listener) {
        if let Some(works) = self.works.as_ref().filter(|_| self.pending.load(Ordering::Acquire) == 0) {
            let _ = works.try_send(Given::News(task));
        }
    }
}

impl Drop for SessionThread {
    fn drop(&mut self) {
        Device::let_go(&self.alive);
        drop(self.works.take());
    }
}
