//! What the program has of the agent: one client, what runs it, and the sessions that libvaccel opened.

use std::collections::HashMap;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};
use vaccel_client::{Client, Error, Reason, Resource, Session, SessionOptions};

use crate::abi;

/// From this length on data is written where the agent may have it, too; shorter ones travel in messages in any case.
const SHARED_BYTES_MIN: usize = 16 << 10;

static HOST: Mutex<Option<Arc<Host>>> = Mutex::new(None);

/// A session that libvaccel opened, and what is registered in it, by what libvaccel knows it.
pub(crate) struct Opened {
    host: Arc<Host>,
    pub(crate) session: Session,
    pub(crate) resources: Mutex<HashMap<i64, Resource>>,
    /// Files of this machine that the program names where libvaccel has a library's.
    pub(crate) libraries: Mutex<HashMap<PathBuf, Resource>>,
}

pub(crate) struct Host {
    process: u32,
    runtime: Runtime,
    client: Client,
    sessions: Mutex<HashMap<i64, Arc<Opened>>>,
    /// Numbers of sessions and resources, which are above 0.
    named: AtomicI64,
}

impl Host {
    /// The process's, if there is one. A child that a program forked has none of its parent's threads and sessions.
    fn present(host: &Option<Arc<Self>>) -> Option<Arc<Self>> {
        host.clone().filter(|host| host.process == std::process::id())
    }

    /// The process's; connects when there is none yet.
    fn get() -> Result<Arc<Self>, Error> {
        let mut host = lock(&HOST);
        if let Some(present) = Self::present(&host) {
            return Ok(present);
        }
        // One thread looks after connections while the program does something else.
        let runtime =
            Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(|error| {
                Error::new(Reason::BackendFailed, format!("no threads for the client of the agent: {error}"))
            })?;
        let client = runtime.block_on(Client::from_env())?;
        let (process, sessions, named) = (std::process::id(), Mutex::default(), AtomicI64::new(1));
        let made = Arc::new(Self { process, runtime, client, sessions, named });
        // A parent's is not let go of: its threads are not here to be waited for.
        std::mem::forget(host.replace(Arc::clone(&made)));
        Ok(made)
    }

    fn name(&self) -> i64 {
        self.named.fetch_add(1, Ordering::Relaxed)
    }
}

impl Opened {
    /// Opens a session; returns its number.
    pub(crate) fn open(hints: u32) -> Result<i64, Error> {
        let host = Host::get()?;
        let options = SessionOptions { hints, ..SessionOptions::default() };
        let session = host.runtime.block_on(host.client.open_session(options))?;
        let number = host.name();
        let (resources, libraries) = Default::default();
        let opened = Self { host: Arc::clone(&host), session, resources, libraries };
        lock(&host.sessions).insert(number, Arc::new(opened));
        Ok(number)
    }

    /// Closes a session, which is gone whatever comes of it.
    pub(crate) fn close(number: i64) -> Result<(), Error> {
        let host = Host::present(&lock(&HOST));
        let opened = host.and_then(|host| lock(&host.sessions).remove(&number)).ok_or_else(no_session)?;
        opened.wait(opened.session.close())
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
        let host = Host::present(&lock(&HOST));
        host.and_then(|host| lock(&host.sessions).get(&session.remote_id).cloned()).ok_or_else(no_session)
    }

    /// A number for something of this session.
    pub(crate) fn name(&self) -> i64 {
        self.host.name()
    }

    pub(crate) fn wait<F: Future>(&self, future: F) -> F::Output {
        self.host.runtime.block_on(future)
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

fn no_session() -> Error {
    Error::new(Reason::NotFound, "expected an open session of this process, and got none")
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of the client; nobody waits for its threads.
pub(crate) fn end() {
    let Some(host) = lock(&HOST).take() else { return };
    lock(&host.sessions).clear();
    if host.process != std::process::id() {
        std::mem::forget(host);
    } else if let Some(host) = Arc::into_inner(host) {
        host.runtime.shutdown_background();
    }
}

/// Does what libvaccel asks for, and says what it is to return: 0, or vAccel's code of the error, which is an `errno`.
/// What went wrong goes where libvaccel's own errors go by default.
pub(crate) fn answer(operation: &str, work: impl FnOnce() -> Result<(), Error>) -> c_int {
    let failed = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => error,
        Err(_) => Error::new(Reason::BackendFailed, "the plugin failed"),
    };
    report(operation, &failed);
    failed.reason().errno()
}

/// Set to 0, errors are not told.
const LOG_LEVEL: &str = "VACCEL_LOG_LEVEL";

#[allow(clippy::print_stderr, reason = "libvaccel's own errors go there")]
fn report(operation: &str, error: &Error) {
    if std::env::var(LOG_LEVEL).is_ok_and(|level| level == "0") {
        return;
    }
    eprintln!("[sockets] {operation}: {}: {}", error.reason().name(), error.message());
}
