//! What the program has of the agent: one client, what runs it, and the sessions that libvaccel opened.

use std::collections::HashMap;
use std::ffi::c_int;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::{Builder, Handle, Runtime};
use vaccel_client::{CallOptions, Client, Error, Reason, Resource, Session, SessionOptions};

use crate::abi;
use crate::pictures::Pictures;
use crate::signals;

/// From this length on data is written where the agent may have it, too; shorter ones travel in messages in any case.
const SHARED_BYTES_MIN: usize = 16 << 10;

/// How long letting go of something may take: an agent that is gone lets go by itself.
const LETTING_GO: Duration = Duration::from_secs(5);

static HOST: Mutex<Option<Arc<Host>>> = Mutex::new(None);

/// The process that has it. In a child of that, which may have been forked while it was locked, nobody looks at it.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// Numbers of sessions and resources, which are above 0; a child's are not its parent's.
static NAMED: AtomicI64 = AtomicI64::new(1);

/// A number for a session or a resource.
pub(crate) fn name() -> i64 {
    NAMED.fetch_add(1, Ordering::Relaxed)
}

/// A session that libvaccel opened, and what is registered in it, by what libvaccel knows it.
pub(crate) struct Opened {
    host: Arc<Host>,
    pub(crate) session: Session,
    pub(crate) resources: Mutex<HashMap<i64, Resource>>,
    /// Files of this machine that the program names where libvaccel has a library's.
    pub(crate) libraries: Mutex<HashMap<PathBuf, Resource>>,
    pub(crate) pictures: Mutex<Pictures>,
    /// The agent did not answer when something was let go of.
    is_left: AtomicBool,
}

pub(crate) struct Host {
    runtime: Runtime,
    client: Client,
    sessions: Mutex<HashMap<i64, Arc<Opened>>>,
}

impl Host {
    /// The process's, if there is one.
    fn present() -> Option<Arc<Self>> {
        let is_own = OWNER.load(Ordering::Acquire) == std::process::id();
        if is_own { lock(&HOST).clone() } else { None }
    }

    /// The process's; connects when there is none yet.
    fn get() -> Result<Arc<Self>, Error> {
        if let Some(present) = Self::present() {
            return Ok(present);
        }
        // One thread looks after connections while the program does something else.
        let mut builder = Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().on_thread_start(signals::block_all).build();
        let runtime = runtime.map_err(|error| {
            Error::new(Reason::BackendFailed, format!("no threads for the client of the agent: {error}"))
        })?;
        // It may take its time, and nobody waits for the lock meanwhile.
        let client = wait(&runtime, Client::from_env())?;
        let mut host = lock(&HOST);
        let is_own = OWNER.load(Ordering::Acquire) == std::process::id();
        if let Some(first) = host.as_ref().filter(|_| is_own) {
            runtime.shutdown_background();
            return Ok(Arc::clone(first));
        }
        let made = Arc::new(Self { runtime, client, sessions: Mutex::default() });
        // A parent's is not let go of: its threads are not here to be waited for.
        std::mem::forget(host.replace(Arc::clone(&made)));
        OWNER.store(std::process::id(), Ordering::Release);
        Ok(made)
    }

    /// # Errors
    /// Those of opening a session. What libvaccel takes for a preference is one here, too: where there is nothing of
    /// the wished kind, that is told, and the session gets what there is.
    fn open(&self, hints: u32) -> Result<Session, Error> {
        let open = |hints| {
            let options = SessionOptions { hints, ..SessionOptions::default() };
            wait(&self.runtime, self.client.open_session(options))
        };
        match open(hints) {
            Err(error) if error.reason() == Reason::Disabled && hints != 0 => {
                report("session_init", &error);
                open(0)
            }
            opened => opened,
        }
    }
}

impl Opened {
    /// Opens a session; returns its number.
    pub(crate) fn open(hints: u32) -> Result<i64, Error> {
        let host = Host::get()?;
        let session = host.open(hints)?;
        let number = name();
        let (resources, libraries, pictures, is_left) = Default::default();
        let opened = Self { host: Arc::clone(&host), session, resources, libraries, pictures, is_left };
        lock(&host.sessions).insert(number, Arc::new(opened));
        Ok(number)
    }

    /// Closes a session, which is gone whatever comes of it.
    pub(crate) fn close(number: i64) -> Result<(), Error> {
        let host = Host::present();
        let opened = host.and_then(|host| lock(&host.sessions).remove(&number)).ok_or_else(no_session)?;
        lock(&opened.pictures).remove_all();
        opened.let_go(|session| async move { session.close().await })
    }

    /// The session that a program means.
    ///
    /// # Safety
    /// Null, or a session of libvaccel.
    pub(crate) unsafe fn of(session: *const abi::Session) -> Result<Arc<Self>, Error> {
        // SAFETY: as this function's.
        let session = unsafe { session.as_ref() }.ok_or_else(no_session)?;
        if session.is_remote == 0 {
            let message =
                "this session is a local one, and the agent is remote: open it with VACCEL_PLUGIN_REMOTE";
            return Err(Error::new(Reason::BadArgument, message));
        }
        let host = Host::present();
        host.and_then(|host| lock(&host.sessions).get(&session.remote_id).cloned()).ok_or_else(no_session)
    }

    pub(crate) fn wait<F: Future<Output: Send> + Send>(&self, future: F) -> F::Output {
        wait(&self.host.runtime, future)
    }

    /// Lets the agent go of something. One that does not answer is not asked again: it lets go by itself, and libvaccel
    /// would leave undone what is behind an error.
    pub(crate) fn let_go<F: Future<Output = Result<(), Error>> + Send>(
        &self,
        work: impl FnOnce(Session) -> F,
    ) -> Result<(), Error> {
        if self.is_left.load(Ordering::Relaxed) {
            return Ok(());
        }
        let options = CallOptions { deadline: Some(LETTING_GO), ..CallOptions::default() };
        match self.wait(work(self.session.with(options))) {
            Err(error)
                if matches!(error.reason(), Reason::Unreachable | Reason::Deadline | Reason::NotFound) =>
            {
                self.is_left.store(error.reason() != Reason::NotFound, Ordering::Relaxed);
                report("letting go", &error);
                Ok(())
            }
            done => done,
        }
    }

    /// A copy of the program's data, which is the program's again when a call is over.
    pub(crate) fn copy(&self, data: &[u8]) -> Bytes {
        if data.len() < SHARED_BYTES_MIN {
            return Bytes::copy_from_slice(data);
        }
        let mut buffer = self.wait(self.host.client.buffer(data.len()));
        buffer.copy_from_slice(data);
        buffer.freeze()
    }
}

/// Waits for a future. When a program ends, libvaccel lets go of what it left open, on a thread that the runtime does
/// not take any more; then another one waits.
fn wait<F: Future<Output: Send> + Send>(runtime: &Runtime, future: F) -> F::Output {
    let is_over = Handle::try_current().is_err_and(|error| error.is_thread_local_destroyed());
    if !is_over {
        return signals::without_pipes(|| runtime.block_on(future));
    }
    let elsewhere = || {
        signals::block_all();
        runtime.block_on(future)
    };
    let waited = std::thread::scope(|scope| scope.spawn(elsewhere).join());
    waited.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn no_session() -> Error {
    Error::new(Reason::NotFound, "expected an open session of this process, and got none")
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of the client; nobody waits for its threads.
pub(crate) fn end() {
    if OWNER.load(Ordering::Acquire) != std::process::id() {
        return;
    }
    let Some(host) = lock(&HOST).take() else { return };
    lock(&host.sessions).clear();
    if let Some(host) = Arc::into_inner(host) {
        host.runtime.shutdown_background();
    }
}

/// Does what libvaccel asks for, and says what it is to return: 0, or vAccel's code of the error, which is an `errno`.
/// What went wrong goes where libvaccel's own errors go by default.
pub(crate) fn answer(operation: &str, work: impl FnOnce() -> Result<(), Error>) -> c_int {
    let done = catch_unwind(AssertUnwindSafe(|| {
        let Err(error) = work() else { return 0 };
        report(operation, &error);
        error.reason().errno()
    }));
    done.unwrap_or_else(|_| Reason::BackendFailed.errno())
}

/// Set to 0, errors are not told.
const LOG_LEVEL: &str = "VACCEL_LOG_LEVEL";

fn report(operation: &str, error: &Error) {
    if std::env::var(LOG_LEVEL).is_ok_and(|level| level == "0") {
        return;
    }
    // Nobody may be there to read it.
    let _ =
        writeln!(std::io::stderr(), "[sockets] {operation}: {}: {}", error.reason().name(), error.message());
}
