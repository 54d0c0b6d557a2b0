//! The hall: every call of every door passes here exactly once and leaves with exactly one outcome. Here, and only
//! here, calls are authorised, bounded in time and number, timed and counted.
//!
//! **Invariant:** nothing below knows gRPC; nothing above decides.

mod inference;
mod pieces;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tokio::sync::Notify;
use tokio::time::Instant;
use vaccel_proto::codec;
use vaccel_proto::error::Detail;
use vaccel_proto::limits::{CHUNK_BYTES_MAX, DEADLINE_MAX, MESSAGE_BYTES_MAX};
use vaccel_proto::v1::{
    File, InfoReply, Limits, OpenSessionRequest, OperationProfile, ResourceInfo, RunReply, RunRequest,
    SessionInfo, Timings, Usage,
};
use vaccel_proto::{Error, Reason};

pub(crate) use self::pieces::Pieces;
use self::pieces::{check_piece, gather, next_piece};
pub(crate) use crate::backend::Figures;
use crate::backend::{Choice, NOOP, Workshop};
use crate::config::{Config, ConfigError};
use crate::identity::Tenant;
use crate::infer::Inference;
use crate::onward::Listener;
use crate::ops::{self, Context, widths};
use crate::policy::Policies;
use crate::pool::Pool;
use crate::quota::{Account, Accounts, Hold, Unit};
use crate::repository::Repository;
pub(crate) use crate::repository::{Counts, Failure, Measured, to_json, type_name, type_named};
use crate::resource::{ReadBegin, Reading, Registered, Store, UploadBegin};
use crate::scheduler::past_deadline;
use crate::session::{ConnectionId, Session, Sessions};
use crate::shared::{Room, SharedMemory};
pub(crate) use inference::Metrics;

/// When a caller should try again while the agent stops: its successor is usually up by then.
const SHUTDOWN_RETRY_AFTER: Duration = Duration::from_millis(500);

/// Who calls, from where, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) tenant: Tenant,
    pub(crate) connection: ConnectionId,
    /// Number of the call on its connection; with it, what is logged and shown as the request's id.
    pub(crate) number: u64,
    /// When the caller stops waiting.
    pub(crate) deadline: Option<Instant>,
    /// The user of the calling process, when it is on this machine.
    uid: Option<u32>,
    account: Arc<Account>,
    /// Whether it came before the agent began to stop.
    in_time: bool,
    /// Counts the call from its headers until its last handle is gone.
    _counted: Option<Arc<(Hold, InFlight)>>,
}

impl Caller {
    /// The tenant's account.
    pub(crate) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// The same, called by a process of this user.
    pub(crate) fn of_user(self, uid: Option<u32>) -> Self {
        Self { uid, ..self }
    }

    /// The same, for what goes on after its call and holds nobody up.
    pub(crate) fn uncounted(self) -> Self {
        Self { _counted: None, ..self }
    }

    fn request_id(&self) -> String {
        format!("{:x}-{:x}", self.connection.0, self.number)
    }
}

/// Everything the agent holds.
pub(crate) struct Dispatch {
    limits: Limits,
    call_deadline: Duration,
    accounts: Accounts,
    sessions: Arc<Sessions>,
    store: Store,
    workshop: Arc<Workshop>,
    inference: Inference,
    policies: Arc<Policies>,
    shared: SharedMemory,
    /// Models that are to be loaded before this agent takes work.
    cold: AtomicUsize,
    in_flight: Arc<Calls>,
}

impl fmt::Debug for Dispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatch").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

/// All calls that are there.
#[derive(Debug, Default)]
struct Calls {
    count: AtomicUsize,
    /// The agent stops: no new ones are taken.
    are_last: AtomicBool,
    none_left: Notify,
}

/// Counts a call for as long as it is there.
#[derive(Debug)]
struct InFlight(Arc<Calls>);

impl InFlight {
    fn new(calls: &Arc<Calls>) -> Self {
        calls.count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(calls))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let was_only_one = self.0.count.fetch_sub(1, Ordering::SeqCst) == 1;
        if was_only_one && self.0.are_last.load(Ordering::SeqCst) {
            self.0.none_left.notify_waiters();
        }
    }
}

impl Dispatch {
    /// # Errors
    /// A folder of models that cannot be read.
    pub(crate) fn new(
        config: &Config,
        workshop: Workshop,
        policies: Policies,
        store: Store,
        pool: Pool,
    ) -> Result<Self, ConfigError> {
        let (workshop, policies) = (Arc::new(workshop), Arc::new(policies));
        let (weights, models) = (Arc::clone(&policies), Arc::clone(&policies));
        let may = move |tenant: &Tenant, name: &str| models.allows_model(tenant, name);
        let sessions = Arc::new(Sessions::new(config.session_lease));
        let holders = Arc::clone(&sessions);
        let held = move |tenant: &Tenant, id: &str| holders.holding(tenant, id);
        let repository = Repository::open(&config.repository, Arc::clone(&workshop), may, held)?;
        let cold = AtomicUsize::new(repository.to_warm().len());
        let inference = Inference::new(repository, Arc::clone(&workshop), Arc::clone(&policies));
        let limits = Limits {
            message_bytes_max: MESSAGE_BYTES_MAX as u64,
            chunk_bytes_max: CHUNK_BYTES_MAX as u64,
            session_lease_ms: millis(config.session_lease),
            sessions_max: config.tenant.sessions,
            calls_in_flight_max: config.tenant.calls,
            resource_bytes_max: config.tenant.resource_bytes,
            in_flight_bytes_max: config.tenant.in_flight_bytes,
            shared_bytes_max: config.tenant.shared_bytes,
        };
        Ok(Self {
            limits,
            call_deadline: config.call_deadline,
            accounts: Accounts::new(config.tenant.clone(), move |tenant| weights.weight(tenant)),
            sessions,
            store,
            workshop,
            inference,
            policies,
            shared: SharedMemory::new(pool),
            cold,
            in_flight: Arc::default(),
        })
    }

    pub(crate) fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    pub(crate) fn shared(&self) -> &SharedMemory {
        &self.shared
    }

    pub(crate) fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// A call is about to come to a connection's task, which has to be computed.
    pub(crate) fn expect(&self, task: Listener) {
        self.workshop.scheduler.expect(task);
    }

    /// Admits a call by its headers: it counts from here on, however slowly its message comes, until its reply is sent.
    /// One that comes while the agent stops is let through to be told so; health has another answer.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` when the tenant has too many calls in flight.
    pub(crate) fn arrive(
        &self,
        tenant: Tenant,
        account: Arc<Account>,
        connection: ConnectionId,
        number: u64,
        deadline: Option<Instant>,
    ) -> Result<Caller, Error> {
        // Counted before the look: a drain that begins now waits for this call, or this call sees the drain.
        let counted = (account.hold(Unit::Calls, 1)?, InFlight::new(&self.in_flight));
        let in_time = !self.in_flight.are_last.load(Ordering::SeqCst);
        Ok(Caller {
            tenant,
            connection,
            number,
            deadline,
            uid: None,
            account,
            in_time,
            _counted: Some(Arc::new(counted)),
        })
    }

    /// Refuses new work from now on.
    pub(crate) fn begin_drain(&self) {
        self.in_flight.are_last.store(true, Ordering::SeqCst);
        self.inference.repository.changed();
    }

    /// Waits until no call is in flight.
    pub(crate) async fn drained(&self) {
        loop {
            let mut none_left = std::pin::pin!(self.in_flight.none_left.notified());
            none_left.as_mut().enable();
            if self.in_flight.count.load(Ordering::SeqCst) == 0 {
                return;
            }
            none_left.await;
        }
    }

    /// Frees what ended sessions left behind, for ever.
    pub(crate) async fn housekeep(&self) {
        tokio::join!(self.sessions.reap(), self.warm_up(), async {
            self.store.survey().await;
            let mut every_minute = tokio::time::interval(Duration::from_secs(60));
            loop {
                every_minute.tick().await;
                self.inference.sweep();
                self.store.sweep().await;
            }
        });
    }

    /// The way of every call: admitted, timed, answered, logged.
    async fn call<T>(
        &self,
        caller: &Caller,
        name: &'static str,
        time_max: Duration,
        work: impl AsyncFnOnce(&Arc<Account>, Instant) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let begun = Instant::now();
        let outcome = self.admitted(caller, begun, time_max, work).await;
        let outcome = outcome.map_err(|error| match error.reason() {
            // What the guest can say to whoever reads the log. Models that guests bring can make engines fail.
            Reason::BackendFailed => {
                let id = caller.request_id();
                tracing::warn!(request = %id, tenant = %caller.tenant, call = name, ?error, "call failed");
                error.with(Detail::Request(id))
            }
            _ => error,
        });
        let took = begun.elapsed();
        match &outcome {
            Ok(_) => {
                tracing::debug!(request = %caller.request_id(), tenant = %caller.tenant, call = name, ?took, "served");
            }
            Err(error) => {
                let id = caller.request_id();
                tracing::debug!(request = %id, tenant = %caller.tenant, call = name, ?took, ?error, "refused");
            }
        }
        outcome
    }

    async fn admitted<T>(
        &self,
        caller: &Caller,
        begun: Instant,
        time_max: Duration,
        work: impl AsyncFnOnce(&Arc<Account>, Instant) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if !caller.in_time {
            return Err(Error::new(Reason::ShuttingDown, "this agent is stopping; try again shortly")
                .with(Detail::RetryAfter(SHUTDOWN_RETRY_AFTER)));
        }
        let account = &caller.account;
        let limit = begun + time_max;
        let deadline = caller.deadline.map_or(limit, |deadline| deadline.min(begun + DEADLINE_MAX));
        if deadline <= begun {
            return Err(past_deadline("queued", begun));
        }
        match tokio::time::timeout_at(deadline, work(account, deadline)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(past_deadline("running", begun)),
        }
    }

    fn session(&self, caller: &Caller, id: &str) -> Result<Arc<Session>, Error> {
        self.sessions.get(id, &caller.tenant, caller.connection)
    }

    /// What this agent is and what the caller's tenant holds.
    pub(crate) async fn info(&self, caller: &Caller) -> Result<InfoReply, Error> {
        self.call(caller, "info", self.call_deadline, async |account, _| {
            Ok(InfoReply {
                version: env!("CARGO_PKG_VERSION").into(),
                tenant: caller.tenant.public(),
                operations: ops::list()
                    .into_iter()
                    .filter(|operation| self.policies.allows(&caller.tenant, &operation.name))
                    .collect(),
                engines: self.workshop.engines.info(),
                limits: Some(self.limits),
                usage: Some(Usage {
                    sessions: account.used(Unit::Sessions),
                    calls_in_flight: account.used(Unit::Calls),
                    resource_bytes: account.used(Unit::ResourceBytes),
                    cached_bytes: self.store.cached_bytes(&caller.tenant).await?,
                }),
            })
        })
        .await
    }

    /// Opens a session; returns its id and lease.
    pub(crate) async fn open_session(
        &self,
        caller: &Caller,
        asked: OpenSessionRequest,
    ) -> Result<(String, Duration), Error> {
        self.call(caller, "open_session", self.call_deadline, async |account, _| {
            let wish = Choice { engine: asked.engine, device: asked.device };
            let wish = self.policies.wish(&caller.tenant, wish)?;
            let choice = self.workshop.engines.choose(wish, asked.hints)?;
            let counted = account.hold(Unit::Sessions, 1)?;
            let session = self.sessions.open(&caller.tenant, caller.connection, choice, counted)?;
            Ok((session.id.as_str().to_owned(), self.sessions.lease()))
        })
        .await
    }

    /// Renews a session; returns its lease.
    pub(crate) async fn renew_session(&self, caller: &Caller, id: &str) -> Result<Duration, Error> {
        self.call(caller, "renew_session", self.call_deadline, async |_, _| {
            self.session(caller, id).map(|_| self.sessions.lease())
        })
        .await
    }

    /// What the calls of a session took, by operation.
    pub(crate) async fn profile(&self, caller: &Caller, id: &str) -> Result<Vec<OperationProfile>, Error> {
        self.call(caller, "profile", self.call_deadline, async |_, _| {
            self.session(caller, id).map(|session| session.profile.shown())
        })
        .await
    }

    /// Ends a session.
    pub(crate) async fn close_session(&self, caller: &Caller, id: &str) -> Result<(), Error> {
        self.call(caller, "close_session", self.call_deadline, async |_, _| {
            self.sessions.close(id, &caller.tenant)
        })
        .await
    }

    /// The tenant's sessions, oldest first.
    pub(crate) async fn list_sessions(&self, caller: &Caller) -> Result<Vec<SessionInfo>, Error> {
        self.call(caller, "list_sessions", self.call_deadline, async |_, _| {
            let sessions = self.sessions.list(&caller.tenant);
            Ok(sessions
                .iter()
                .map(|session| SessionInfo {
                    session: session.id.as_str().into(),
                    resources: session.holdings.count() as u64,
                    age_ms: millis(session.opened.elapsed()),
                })
                .collect())
        })
        .await
    }

    /// Lets a session hold a resource, or says what is missing.
    pub(crate) async fn register(
        &self,
        caller: &Caller,
        session: &str,
        kind: i32,
        files: Vec<File>,
    ) -> Result<Registered, Error> {
        self.call(caller, "register_resource", self.call_deadline, async |account, _| {
            let session = self.session(caller, session)?;
            self.store.register(&caller.tenant, &session.holdings, account, kind, files).await
        })
        .await
    }

    /// Receives a file; returns how many of its bytes are there.
    pub(crate) async fn upload(
        &self,
        caller: &Caller,
        session: &str,
        begin: UploadBegin,
        first: Bytes,
        pieces: &mut impl Pieces,
    ) -> Result<u64, Error> {
        self.call(caller, "upload", DEADLINE_MAX, async |account, _| {
            let session = self.session(caller, session)?;
            let mut uploading = self.store.upload(&caller.tenant, &session.holdings, account, begin).await?;
            let mut piece = Some(first);
            while let Some(data) = piece {
                check_piece(&data)?;
                uploading.append(data).await?;
                piece = next_piece(pieces, "the file", "; go on where it stopped").await?;
            }
            uploading.finish().await
        })
        .await
    }

    /// Lets go of a resource once, or for good.
    pub(crate) async fn unregister(
        &self,
        caller: &Caller,
        session: &str,
        resource: &str,
        all: bool,
    ) -> Result<(), Error> {
        self.call(caller, "unregister_resource", self.call_deadline, async |_, _| {
            let session = self.session(caller, session)?;
            session.holdings.unregister(resource, all)?;
            if session.holdings.resource(resource).is_err() {
                session.libraries.forget(resource);
            }
            Ok(())
        })
        .await
    }

    /// Begins to read a file of a resource. The whole may take [`DEADLINE_MAX`]; its pieces leave as the guest takes
    /// them.
    pub(crate) async fn read(
        &self,
        caller: &Caller,
        session: &str,
        resource: &str,
        begin: ReadBegin,
    ) -> Result<(Reading, Instant), Error> {
        self.call(caller, "read_resource", DEADLINE_MAX, async |_, deadline| {
            let resource = self.session(caller, session)?.holdings.resource(resource)?;
            Ok((resource.read(begin).await?, deadline))
        })
        .await
    }

    /// What a session holds.
    pub(crate) async fn list_resources(
        &self,
        caller: &Caller,
        session: &str,
    ) -> Result<Vec<ResourceInfo>, Error> {
        self.call(caller, "list_resources", self.call_deadline, async |_, _| {
            let resources = self.session(caller, session)?.holdings.list();
            Ok(resources
                .iter()
                .map(|resource| ResourceInfo {
                    resource: resource.id.clone(),
                    kind: resource.kind.into(),
                    files: resource.files.iter().map(|(file, _)| file.clone()).collect(),
                })
                .collect())
        })
        .await
    }

    /// Runs an operation.
    pub(crate) async fn run(&self, caller: &Caller, request: RunRequest) -> Result<RunReply, Error> {
        let name = request.op.as_ref().map_or("run", ops::name);
        self.call(caller, name, self.call_deadline, async |account, deadline| {
            self.operate(caller, request, account, deadline, MESSAGE_BYTES_MAX as u64).await
        })
        .await
    }

    /// Runs an operation whose request comes in pieces of `total` bytes together. What is returned beside the reply
    /// counts them, until the reply is sent.
    pub(crate) async fn run_large(
        &self,
        caller: &Caller,
        total: u64,
        first: Bytes,
        pieces: &mut impl Pieces,
    ) -> Result<(RunReply, Hold), Error> {
        self.call(caller, "run_large", DEADLINE_MAX, async |account, deadline| {
            let counted = account.hold(Unit::InFlightBytes, total)?;
            let whole = gather(total, first, pieces).await?;
            codec::check::<RunRequest>(&whole)?;
            let request = RunRequest::decode(whole).map_err(|error| {
                Error::field("data", "a RunRequest in pieces", "no message of the contract").caused_by(error)
            })?;
            // The operation has as long as any other one has.
            let deadline = caller.deadline.map_or_else(|| Instant::now() + self.call_deadline, |_| deadline);
            let limit = self.limits.in_flight_bytes_max;
            Ok((self.operate(caller, request, account, deadline, limit).await?, counted))
        })
        .await
    }

    async fn operate(
        &self,
        caller: &Caller,
        mut request: RunRequest,
        account: &Arc<Account>,
        deadline: Instant,
        reply_bytes_max: u64,
    ) -> Result<RunReply, Error> {
        let session = self.session(caller, &request.session)?;
        let is_unread = session.choice.engine == NOOP;
        let room = self.shared.fill(&caller.tenant, account, &mut request, is_unread)?;
        let reply_bytes_max = reply_bytes_max.max(room.as_deref().map_or(0, Room::bytes));
        let narrow = widths::wanted(request.reply_type)?;
        let op = request.op.ok_or_else(|| {
            let known: Vec<String> = ops::list().into_iter().map(|operation| operation.name).collect();
            let message = format!("no operation this agent knows; it knows: {}", known.join(", "));
            Error::new(Reason::UnknownOperation, message)
        })?;
        let name = ops::name(&op);
        self.policies.check(&caller.tenant, name)?;
        let (workshop, store) = (&self.workshop, &self.store);
        let (tenant, repository) = (&caller.tenant, &self.inference.repository);
        let (session, room) = (&session, room.as_ref());
        let may_bring_code = ops::brings_code(name) && self.policies.allows_libraries(tenant);
        let context = Context {
            workshop,
            repository,
            store,
            tenant,
            session,
            account,
            deadline,
            reply_bytes_max,
            room,
            may_bring_code,
        };
        let begun = Instant::now();
        let done = ops::run(op, &context).await;
        let stages = done.as_ref().ok().map(|done| [done.spans.queue, done.spans.run]);
        session.profile.record(name, begun.elapsed(), stages);
        let done = done?;
        let timings = Timings {
            queue_us: micros(done.spans.queue),
            run_us: micros(done.spans.run),
            batch_size: u32::try_from(done.spans.calls.max(1)).unwrap_or(u32::MAX),
        };
        let mut reply = RunReply { timings: Some(timings), outcome: Some(done.value), ..RunReply::default() };
        if let Some(to) = narrow {
            widths::narrow(&mut reply, to).await;
        }
        if let Some(room) = room {
            room.place(&mut reply);
        }
        Ok(reply)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
