//! Libraries that guests bring, run where they can do nothing but compute.
//!
//! A library is machine code of somebody who may be hostile. It runs in a process of its own ([`inside`]), which has no
//! files, no sockets, no other processes and a bounded memory ([`confine`]), and which the agent believes nothing: it
//! sends arguments, and reads as many bytes back as there was room for. The process stays for the session's next call,
//! as programs of vAccel expect of a library that is loaded, and does not run in between. Of a tenant's processes that
//! wait so, the one that has waited longest gives way where another one is needed.

mod confine;
mod inside;

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use prost::Message;
use rustix::process::{Pid, Signal, kill_process};
use vaccel_proto::error::shown;
use vaccel_proto::v1::{Arg, ExecRequest};
use vaccel_proto::{Error, Reason};

use super::Reader;
use crate::quota::{Account, Hold, Unit};
use crate::scheduler::Cancel;

pub use inside::run as worker;

/// What the agent's own program is told to be a worker: a program that is an agent begins by looking for it.
pub const COMMAND: &str = "exec-worker";

/// What keeps libvaccel from doing anything when it is loaded: a library may bring it along for its arguments.
const LIBVACCEL_IDLE: [(&str, &str); 2] =
    [("VACCEL_BOOTSTRAP_ENABLED", "0"), ("VACCEL_CLEANUP_ENABLED", "0")];

/// A worker's memory, which the agent's program, the library and its data have room in.
const WORKER_BYTES_MAX: u64 = 1 << 30;

/// Arguments of one call: a worker has each twice, as it came and where the function has it.
pub(crate) const ARGUMENT_BYTES_MAX: u64 = WORKER_BYTES_MAX / 4;

/// Files of one library together, in bytes.
pub(crate) const LIBRARY_BYTES_MAX: u64 = 64 << 20;

/// What a worker says first in each answer.
mod answer {
    pub(super) const DONE: u8 = 0;
    /// Said before anything of the guest's runs, or not at all.
    pub(super) const NOT_CONFINED: u8 = 1;
    pub(super) const NOT_LOADED: u8 = 2;
    pub(super) const NO_FUNCTION: u8 = 3;
}

/// Longest text in an answer.
const TEXT_BYTES_MAX: usize = 512;

/// A worker that waits for its session's next call.
struct Idle {
    session: u64,
    resource: String,
    worker: Worker,
}

/// All that wait, the longest first. Where there are as many as a tenant may have, another one needs one of them.
static IDLE: Mutex<Vec<Idle>> = Mutex::new(Vec::new());

fn idle() -> MutexGuard<'static, Vec<Idle>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The libraries of one session. Dropped, their workers end.
#[derive(Debug)]
pub(crate) struct Libraries(u64);

impl Default for Libraries {
    fn default() -> Self {
        static NUMBERED: AtomicU64 = AtomicU64::new(0);
        Self(NUMBERED.fetch_add(1, Ordering::Relaxed))
    }
}

impl Libraries {
    /// Calls a function of a library, whose name is the request's; for a thread that may wait. Its process stays if the
    /// session then still holds it.
    ///
    /// # Errors
    /// `MODEL_REJECTED` for a library that cannot be loaded, `BAD_ARGUMENT` for a function it has not, `DISABLED`
    /// where it cannot be confined, `QUOTA_EXCEEDED` for too many workers of the tenant, `CANCELLED`, and
    /// `BACKEND_FAILED` for a function that ended otherwise than with 0, or with its process.
    pub(crate) fn call(
        &self,
        request: &ExecRequest,
        files: Vec<(String, Reader)>,
        account: &Arc<Account>,
        is_held: impl Fn() -> bool,
        cancel: &Cancel,
    ) -> Result<Vec<Arg>, Error> {
        let waiting = self.take(|waiting| waiting.resource == request.library);
        let mut worker = match waiting {
            Some(worker) => worker,
            None => Worker::start(files, account, cancel)?,
        };
        let written = worker.call(request, cancel)?;
        worker.rest();
        // It may have been killed after its last word.
        if cancel.is_set() {
            return Err(not_wanted());
        }
        let mut all = idle();
        // Whoever lets go of the library does so before it looks for those that wait.
        if is_held() {
            all.push(Idle { session: self.0, resource: request.library.clone(), worker });
        }
        written
    }

    /// The one of the session's that was used last.
    fn take(&self, is_meant: impl Fn(&Idle) -> bool) -> Option<Worker> {
        let mut all = idle();
        let place = all.iter().rposition(|waiting| waiting.session == self.0 && is_meant(waiting))?;
        Some(all.remove(place).worker)
    }

    /// Ends the workers of a resource that the session does not hold any more.
    pub(crate) fn forget(&self, resource: &str) {
        while let Some(worker) = self.take(|waiting| waiting.resource == resource) {
            drop(worker);
        }
    }
}

impl Drop for Libraries {
    fn drop(&mut self) {
        while let Some(worker) = self.take(|_| true) {
            drop(worker);
        }
    }
}

/// Counts one more worker of a tenant; the one of its own that has waited longest ends where there are too many.
fn room_for_one(account: &Arc<Account>) -> Result<Hold, Error> {
    loop {
        let refused = match account.hold(Unit::Workers, 1) {
            Ok(counted) => return Ok(counted),
            Err(refused) => refused,
        };
        let longest = {
            let mut all = idle();
            let is_own = |waiting: &Idle| Arc::ptr_eq(&waiting.worker.account, account);
            let place = all.iter().position(is_own);
            place.map(|place| all.remove(place))
        };
        longest.ok_or(refused)?.worker.end();
    }
}

/// A process with one library. Dropped, it is killed.
struct Worker {
    process: Arc<Mutex<Child>>,
    line: UnixStream,
    account: Arc<Account>,
    /// None once the process is gone.
    counted: Option<Hold>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("process", &self.child().id()).finish_non_exhaustive()
    }
}

impl Worker {
    fn start(files: Vec<(String, Reader)>, account: &Arc<Account>, cancel: &Cancel) -> Result<Self, Error> {
        let counted = Some(room_for_one(account)?);
        let (names, readers): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let contents = readers.into_iter().map(|read| read(cancel)).collect::<Result<Vec<_>, _>>()?;
        let (line, theirs) = UnixStream::pair().map_err(not_started)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).env_clear().envs(LIBVACCEL_IDLE).current_dir("/");
        // What a terminal or a shell sends to the agent's group is for the agent; and a group with a process that
        // stands still is ended with its shell.
        command.process_group(0);
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        let process = Arc::new(Mutex::new(started(command).map_err(not_started)?));
        let mut worker = Self { process, line, account: Arc::clone(account), counted };
        worker.while_wanted(cancel, |line| {
            send(line, &(contents.len() as u64).to_le_bytes())?;
            contents.iter().try_for_each(|content| send(line, content))
        })?;
        match worker.answer(cancel)? {
            answer::DONE => {}
            answer::NOT_CONFINED => {
                let why = worker.text(cancel)?;
                tracing::warn!(why, "libraries of guests do not run: they cannot be confined on this host");
                let message =
                    format!("libraries of guests cannot be confined on this host, and do not run: {why}");
                return Err(Error::new(Reason::Disabled, message));
            }
            other => return Err(worker.failed(&format!("its answer was {other}"))),
        }
        // From here on a library may say anything.
        let index = match worker.answer(cancel)? {
            answer::DONE => return Ok(worker),
            answer::NOT_LOADED => worker.answer(cancel)?,
            other => return Err(worker.failed(&format!("its answer was {other}"))),
        };
        let (name, why) = (names.get(usize::from(index)).cloned().unwrap_or_default(), worker.text(cancel)?);
        let message = format!("library {} cannot be loaded: {}", shown(&name), shown(&why));
        Err(Error::new(Reason::ModelRejected, message))
    }

    /// Calls a function. What is wrong inside is wrong with the worker, which is not used any more.
    fn call(&mut self, request: &ExecRequest, cancel: &Cancel) -> Result<Result<Vec<Arg>, Error>, Error> {
        self.signal(Signal::CONT);
        self.while_wanted(cancel, |line| send(line, &request.encode_to_vec()))?;
        match self.answer(cancel)? {
            answer::DONE => {}
            answer::NO_FUNCTION => {
                let expected = "a function that the library has";
                return Ok(Err(Error::field("symbol", expected, shown(&request.symbol))));
            }
            other => return Err(self.failed(&format!("its answer was {other}"))),
        }
        let mut returned = [0; 4];
        let written = self.while_wanted(cancel, |line| {
            line.read_exact(&mut returned)?;
            request
                .write
                .iter()
                .map(|place| {
                    let mut data = vec![0; usize::try_from(place.room()).unwrap_or(usize::MAX)];
                    line.read_exact(&mut data)?;
                    Ok(Arg { data: data.into(), size: 0, ..place.clone() })
                })
                .collect::<io::Result<Vec<Arg>>>()
        })?;
        Ok(match i32::from_le_bytes(returned) {
            0 => Ok(written),
            code => {
                let message =
                    format!("the function {} returned {code}, which is not 0", shown(&request.symbol));
                Err(Error::new(Reason::BackendFailed, message))
            }
        })
    }

    /// Keeps it from running, whatever the library would do, until the next call.
    fn rest(&self) {
        self.signal(Signal::STOP);
    }

    fn answer(&mut self, cancel: &Cancel) -> Result<u8, Error> {
        let mut answer = [0];
        self.while_wanted(cancel, |line| line.read_exact(&mut answer))?;
        Ok(answer[0])
    }

    fn text(&mut self, cancel: &Cancel) -> Result<String, Error> {
        let mut text = [0; TEXT_BYTES_MAX];
        self.while_wanted(cancel, |line| line.read_exact(&mut text))?;
        let text = String::from_utf8_lossy(&text);
        Ok(text.trim_end_matches('\0').to_owned())
    }

    /// Talks with it, as long as somebody wants what comes of it.
    fn while_wanted<T>(
        &mut self,
        cancel: &Cancel,
        talk: impl FnOnce(&mut UnixStream) -> io::Result<T>,
    ) -> Result<T, Error> {
        let process = Arc::clone(&self.process);
        let kill = move || {
            let _ = process.lock().unwrap_or_else(PoisonError::into_inner).kill();
        };
        let talked = cancel.interruptible(kill, || talk(&mut self.line));
        talked.map_err(|error| match cancel.is_set() {
            true => not_wanted(),
            false => self.failed(&error.to_string()),
        })
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, signal: Signal) {
        // Not waited for yet, so the number is still its.
        if let Some(process) = Pid::from_raw(self.child().id().cast_signed()) {
            let _ = kill_process(process, signal);
        }
    }

    /// What became of a process that says nothing sensible.
    fn failed(&self, what: &str) -> Error {
        let mut child = self.child();
        let _ = child.kill();
        let ended = child.wait().map_or_else(|error| error.to_string(), ending);
        Error::new(Reason::BackendFailed, format!("the library's process failed: {ended}"))
            .caused_by(what.to_owned())
    }
}

impl Worker {
    /// Ends it, and waits until it is gone.
    fn end(mut self) {
        let _ = self.child().kill();
        let _ = self.child().wait();
        self.counted = None;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let Some(counted) = self.counted.take() else { return };
        let _ = self.child().kill();
        // A large memory takes a while to be given back. It is counted as long, and nobody waits for that here.
        let process = Arc::clone(&self.process);
        let reap = move || {
            let _ = process.lock().unwrap_or_else(PoisonError::into_inner).wait();
            drop(counted);
        };
        if std::thread::Builder::new().name("exec-end".into()).spawn(reap).is_err() {
            let _ = self.child().wait();
        }
    }
}

fn not_wanted() -> Error {
    Error::new(Reason::Cancelled, "nobody waits for the library")
}

fn ending(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(9), _) => "it was killed, or went on without an answer".into(),
        (Some(signal), _) => format!("signal {signal}"),
        (None, code) => format!("it ended by itself, with code {}", code.unwrap_or_default()),
    }
}

/// Starts a process from a thread that stays: the system ends a worker with the thread that started it, which is to
/// mean with the agent, and lanes come and go.
fn started(command: Command) -> io::Result<Child> {
    type Order = (Command, SyncSender<io::Result<Child>>);
    static STARTER: OnceLock<Option<SyncSender<Order>>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (orders, queue) = sync_channel::<Order>(1);
        let start = move || {
            for (mut command, reply) in queue {
                let child = command.spawn();
                // Its end of the line is the process's alone before anybody knows of it, so that its end is seen.
                drop(command);
                let _ = reply.send(child);
            }
        };
        std::thread::Builder::new().name("exec-start".into()).spawn(start).ok().map(|_| orders)
    });
    let gone = || io::Error::other("no thread to start it from");
    let (reply, child) = sync_channel(1);
    starter.as_ref().ok_or_else(gone)?.send((command, reply)).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

fn not_started(error: io::Error) -> Error {
    Error::new(Reason::BackendFailed, "no process for a library").caused_by(error)
}

/// Sends bytes behind their number.
fn send(line: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    line.write_all(&(bytes.len() as u64).to_le_bytes())?;
    line.write_all(bytes)
}
