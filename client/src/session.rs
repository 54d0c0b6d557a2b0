//! A session: what a guest holds on the agent, and the operations it runs there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tonic::Status;
use vaccel_proto::carrier::Aligned;
use vaccel_proto::error::Detail;
use vaccel_proto::limits::{IMAGES_PER_CALL_MAX, MESSAGE_BYTES_MAX};
use vaccel_proto::tensor::check_named;
use vaccel_proto::v1::resources_client::ResourcesClient;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::sessions_client::SessionsClient;
use vaccel_proto::v1::{
    CloseSessionRequest, DType, ImageClassificationRequest, Label, ListResourcesRequest, ModelRunRequest,
    NamedTensor, NoopRequest, OpenSessionRequest, OperationProfile, ProfileRequest, RenewSessionRequest,
    ResourceInfo, ResourceKind, RunReply, RunRequest, Tensor, Timings, UnregisterResourceRequest,
};
use vaccel_proto::{Error, Reason};

use crate::client::{Client, timed};
use crate::files::{Content, ResourceFiles};
use crate::large::Encoded;
use crate::models::Family;
use crate::read::ResourceReader;
use crate::retry::Deadline;
use crate::unary::{self, Awake};
use crate::upload::{self, Meter};
use crate::wire::Wire;

/// Where a session computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionOptions {
    /// A device the agent names; empty for its choice.
    pub device: String,
    /// An engine the agent names; empty for its choice.
    pub engine: String,
    /// Kinds of engines wished for, of [`hints`](vaccel_proto::hints), any of which will do; 0 for no wish.
    pub hints: u32,
}

/// How a call is made; see [`Session::with`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallOptions {
    /// How long the call may take, repetitions included; the client's own deadline if not said. For
    /// [`Session::register`] it is the longest time without progress.
    pub deadline: Option<Duration>,
    /// Whether the call may run twice: then it is repeated also when the connection broke under it.
    pub repeatable: bool,
    /// [`DType::F16`] or [`DType::Bf16`] for half the bytes: what a model gives as `f32` is rounded to that.
    pub reply_type: DType,
    /// When the thread that waits for the reply is awake. Calls over a connection of the tensors' own heed it: those to
    /// an agent nearby, without compression.
    pub awake: Awake,
}

impl Default for CallOptions {
    fn default() -> Self {
        Self { deadline: None, repeatable: true, reply_type: DType::Unspecified, awake: Awake::Foreseen }
    }
}

/// What to classify images with.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClassifyOptions<'a> {
    /// A model of the session; the agent's embedded digit classifier if not said.
    pub model: Option<&'a Resource>,
    /// Labels per image; 0 for 1.
    pub top_k: u32,
}

/// A resource that a session holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Resource {
    id: String,
    kind: ResourceKind,
}

impl Resource {
    /// A model of the agent's repository, as one that sessions need not register: `run` and the like take it by its
    /// name.
    pub fn of_repository(name: impl Into<String>) -> Self {
        Self::of_session(name, ResourceKind::Model)
    }

    /// A resource that the agent made for the session, by the name that it gave: a picture of a generic operation.
    pub fn of_session(name: impl Into<String>, kind: ResourceKind) -> Self {
        Self { id: name.into(), kind }
    }

    /// Its name, made from its content: the same files have the same name on every agent.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it is.
    pub fn kind(&self) -> ResourceKind {
        self.kind
    }
}

/// What a model run gave.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelRun {
    /// The outputs asked for, in that order, or all in the model's order.
    pub outputs: Vec<NamedTensor>,
    /// Where the time went on the agent's side.
    pub timings: Timings,
}

/// A tensor with the name of an input; an empty name means its place in the list.
pub fn named(name: impl Into<String>, tensor: Tensor) -> NamedTensor {
    NamedTensor { name: name.into(), tensor: Some(tensor) }
}

/// An open session. Clones are the same session.
///
/// Dropping it tells the agent nothing: the session then ends by its lease, after the client's connection is
/// gone. [`Session::close`] frees what it holds at once.
#[derive(Clone)]
pub struct Session {
    inner: Arc<Inner>,
    options: CallOptions,
}

struct Inner {
    client: Client,
    options: SessionOptions,
    state: Mutex<State>,
    /// Held while a lost session is opened again, so that calls that lost it together open one.
    recovery: tokio::sync::Mutex<()>,
}

struct State {
    id: String,
    /// How many times the session was opened again.
    epoch: u64,
    closed: bool,
    held: BTreeMap<String, Held>,
    /// Resources loaded through a family of model calls.
    loaded: BTreeSet<(Family, String)>,
}

/// A resource of the session, kept for an agent that was restarted.
struct Held {
    content: Arc<Content>,
    /// How often it was registered.
    times: u64,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("endpoint", self.inner.client.endpoint())
            .field("id", &self.id())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) async fn open(client: Client, options: SessionOptions) -> Result<Self, Error> {
        let id = open(&client, &options, client.deadline(None)).await?;
        let state =
            Mutex::new(State { id, epoch: 0, closed: false, held: BTreeMap::new(), loaded: BTreeSet::new() });
        let inner = Inner { client, options, state, recovery: tokio::sync::Mutex::default() };
        Ok(Self { inner: Arc::new(inner), options: CallOptions::default() })
    }

    /// The same session with other options for the calls made through the returned handle.
    #[must_use]
    pub fn with(&self, options: CallOptions) -> Self {
        Self { inner: Arc::clone(&self.inner), options }
    }

    /// The client that it was opened by.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// Its present id on the agent, as in [`Client::list_sessions`]. It changes when an agent that was
    /// restarted made the client open the session again.
    pub fn id(&self) -> String {
        self.state().id.clone()
    }

    /// Starts the session's lease anew; every other call does so too. Returns its length.
    ///
    /// # Errors
    /// Those of [`Client::info`].
    pub async fn renew(&self) -> Result<Duration, Error> {
        let reply = self.call(|wire, time, session| async move {
            SessionsClient::new(wire).renew(timed(RenewSessionRequest { session }, time)).await
        });
        Ok(Duration::from_millis(reply.await?.lease_ms))
    }

    /// Ends the session and frees what it holds. Later calls fail, and nothing opens it again.
    ///
    /// # Errors
    /// Those of [`Client::info`]; the session then ends by its lease.
    pub async fn close(&self) -> Result<(), Error> {
        let deadline = self.deadline();
        let id = deadline
            .bound("the session was opened again", async {
                let _turn = self.inner.recovery.lock().await;
                let mut state = self.state();
                state.closed = true;
                state.held.clear();
                state.loaded.clear();
                state.id.clone()
            })
            .await?;
        match close(&self.inner.client, &id, deadline).await {
            // It is gone already, which is what was wanted.
            Err(error) if is_lost_session(&error) => Ok(()),
            outcome => outcome,
        }
    }

    /// Classifies PNG or JPEG files; for each one its labels, best first.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a file that is no image or too many of them, `MESSAGE_TOO_LARGE`, `NOT_FOUND` for
    /// the model, `MODEL_REJECTED`, `BACKEND_FAILED`, `OVERLOADED`, and those of [`Client::info`].
    pub async fn classify(
        &self,
        images: impl IntoIterator<Item = Bytes>,
        options: ClassifyOptions<'_>,
    ) -> Result<Vec<Vec<Label>>, Error> {
        let images: Vec<Bytes> = images.into_iter().collect();
        let count = images.len();
        if count > IMAGES_PER_CALL_MAX {
            return Err(Error::field("images", format!("at most {IMAGES_PER_CALL_MAX} images"), count));
        }
        let model = options.model.map(|model| model.id.clone()).unwrap_or_default();
        let op = Op::ImageClassification(ImageClassificationRequest { model, top_k: options.top_k, images });
        match self.operate(op).await?.outcome {
            Some(Outcome::ImageClassification(reply)) if reply.classifications.len() == count => {
                Ok(reply.classifications.into_iter().map(|classification| classification.labels).collect())
            }
            _ => Err(malformed("image_classification")),
        }
    }

    /// Runs a model on `inputs`, by name or by place. `outputs` are those wanted, by name or as `#0`, `#1` and so on;
    /// empty for all.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for tensors that are not what the model takes, and those of [`Session::classify`].
    pub async fn run(
        &self,
        model: &Resource,
        inputs: Vec<NamedTensor>,
        outputs: &[&str],
    ) -> Result<ModelRun, Error> {
        check_named("inputs", &inputs)?;
        let outputs = outputs.iter().map(|&name| name.to_owned()).collect();
        let reply =
            self.operate(Op::ModelRun(ModelRunRequest { model: model.id.clone(), outputs, inputs })).await?;
        match reply.outcome {
            Some(Outcome::ModelRun(run)) if check_named("outputs", &run.outputs).is_ok() => {
                Ok(ModelRun { outputs: run.outputs, timings: reply.timings.unwrap_or_default() })
            }
            _ => Err(malformed("model_run")),
        }
    }

    /// Does nothing, all the way to the agent's scheduler and back.
    ///
    /// # Errors
    /// `OVERLOADED`, and those of [`Client::info`].
    pub async fn noop(&self) -> Result<Timings, Error> {
        let reply = self.operate(Op::Noop(NoopRequest {})).await?;
        Ok(reply.timings.unwrap_or_default())
    }

    /// What the session's operations took so far, by operation.
    ///
    /// # Errors
    /// Those of [`Client::info`].
    pub async fn profile(&self) -> Result<Vec<OperationProfile>, Error> {
        let reply = self.call(|wire, time, session| async move {
            SessionsClient::new(wire).profile(timed(ProfileRequest { session }, time)).await
        });
        Ok(reply.await?.operations)
    }

    /// Makes the session hold a resource; only what the agent lacks goes over the wire. Files in memory stay
    /// there as long as the session holds them, for an agent that was restarted; files on disk are read again.
    /// What was registered twice is held until it was unregistered twice.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a list of files that cannot be, `QUOTA_EXCEEDED`, `MODEL_REJECTED`, `DEADLINE` when
    /// the agent takes nothing more for that long, and those of [`Client::info`].
    pub async fn register(&self, files: ResourceFiles) -> Result<Resource, Error> {
        let kind = files.kind;
        let (content, progress) = files.hash().await?;
        let meter = &Meter::new(&content, progress);
        let content = Arc::new(content);
        loop {
            let (content, link) = (&content, self.inner.client.link());
            let register = |session: String| async move {
                upload::register(link, &session, content, meter, self.deadline().remaining()).await
            };
            let (id, epoch) = self.on_session(|| self.deadline(), register).await?;
            let mut state = self.state();
            // A session that was opened again meanwhile did not get it.
            if state.epoch == epoch {
                let new = || Held { content: Arc::clone(content), times: 0 };
                state.held.entry(id.clone()).or_insert_with(new).times += 1;
                return Ok(Resource { id, kind });
            }
        }
    }

    /// Lets a resource go.
    ///
    /// # Errors
    /// `NOT_FOUND` when the session does not hold it, and those of [`Client::info`].
    pub async fn unregister(&self, resource: &Resource) -> Result<(), Error> {
        let name = &resource.id;
        let is_held = {
            let mut state = self.state();
            let held = state.held.get_mut(name);
            if let Some(held) = held.filter(|held| held.times > 1) {
                held.times -= 1;
                return Ok(());
            }
            state.held.contains_key(name)
        };
        // A call that was repeated may have been counted twice; here is who knows.
        let gone = self.call(|wire, time, session| {
            let request = UnregisterResourceRequest { session, resource: name.clone(), all: is_held };
            async move { ResourcesClient::new(wire).unregister(timed(request, time)).await }
        });
        gone.await?;
        let mut state = self.state();
        state.held.remove(name);
        state.loaded.retain(|(_, loaded)| loaded != name);
        Ok(())
    }

    /// Reads a file of a resource back, by its name, which may be empty when there is only one: `length` bytes
    /// from `offset` on, or with 0 all of them.
    ///
    /// # Errors
    /// `NOT_FOUND` when the session does not hold the resource, `BAD_ARGUMENT` for a file or an offset that it
    /// does not have, and those of [`Client::info`].
    pub async fn read_resource(
        &self,
        resource: &Resource,
        file: &str,
        offset: u64,
        length: u64,
    ) -> Result<ResourceReader, Error> {
        ResourceReader::open(self.clone(), resource, file, offset, length).await
    }

    /// What the session holds.
    ///
    /// # Errors
    /// Those of [`Client::info`].
    pub async fn list_resources(&self) -> Result<Vec<ResourceInfo>, Error> {
        let reply = self.call(|wire, time, session| async move {
            ResourcesClient::new(wire).list(timed(ListResourcesRequest { session }, time)).await
        });
        Ok(reply.await?.resources)
    }
}

// === calls and recovery ===

impl Session {
    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn deadline(&self) -> Deadline {
        self.inner.client.deadline(self.options.deadline)
    }

    pub(crate) fn note_loaded(&self, family: Family, model: &str) {
        self.state().loaded.insert((family, model.to_owned()));
    }

    pub(crate) fn forget_loaded(&self, family: Family, model: &str) {
        self.state().loaded.remove(&(family, model.to_owned()));
    }

    pub(crate) fn has_loaded(&self, family: Family, model: &str) -> bool {
        self.state().loaded.contains(&(family, model.to_owned()))
    }

    pub(crate) async fn operate(&self, op: Op) -> Result<RunReply, Error> {
        let reply_type = self.options.reply_type.into();
        let model = if let Op::ModelRun(run) = &op { run.model.as_str() } else { "" };
        let kind = unary::kind((std::mem::discriminant(&op), model, op.encoded_len()));
        let mut request =
            RunRequest { session: self.id(), reply_type, op: Some(op), ..RunRequest::default() };
        let link = self.inner.client.link();
        if let Some(lent) = link.memory().lend(&request, || link.alert()) {
            let reply = self.operate_whole(|| lent.request(), kind).await;
            match lent.finish(reply) {
                Some(Err(error)) if error.reason() == Reason::MessageTooLarge && self.options.repeatable => {}
                Some(reply) => return reply,
                None => {}
            }
        }
        request.align();
        if request.encoded_len() > MESSAGE_BYTES_MAX {
            return self.operate_in_pieces(&request).await;
        }
        let reply = self.operate_whole(|| request.clone(), kind).await;
        match reply {
            // It has run nothing yet, or computed what was too long to be sent.
            Err(error) if error.reason() == Reason::MessageTooLarge && self.options.repeatable => {
                self.operate_in_pieces(&request).await
            }
            reply => reply,
        }
    }

    async fn operate_in_pieces(&self, request: &RunRequest) -> Result<RunReply, Error> {
        let encoded = |session: String| Encoded::new(&RunRequest { session, ..request.clone() });
        self.call(|wire, time, session| {
            let encoded = encoded(session);
            async move { encoded.run(wire, time).await }
        })
        .await
    }

    /// Makes the call with what `request` gives for each attempt.
    async fn operate_whole(&self, request: impl Fn() -> RunRequest, kind: u64) -> Result<RunReply, Error> {
        let awake = self.options.awake;
        self.call(|wire, time, session| {
            // Ids have one length, so the tensors stay where they were aligned.
            let request = RunRequest { session, ..request() };
            let options = unary::Options { time, awake, kind };
            async move { unary::call(wire, "/vaccel.v1.Operations/Run", &request, options).await }
        })
        .await
    }

    pub(crate) async fn call<R, F, Fut>(&self, call: F) -> Result<R, Error>
    where
        F: Fn(Wire, Duration, String) -> Fut,
        Fut: Future<Output = Result<tonic::Response<R>, Status>>,
    {
        let (deadline, call) = (self.deadline(), &call);
        let run = |session: String| async move {
            let link = self.inner.client.link();
            link.repeat(deadline, self.options.repeatable, |wire, time| call(wire, time, session.clone()))
                .await
        };
        Ok(self.on_session(|| deadline, run).await?.0)
    }

    /// Runs `body` with the session's id. If the agent does not know the session, or finds a file damaged, it did
    /// not run anything: the session is opened again, or the file goes up again, and the body runs once more.
    /// Returns also the epoch in which it succeeded. `deadline` bounds each wait for the session.
    async fn on_session<R, D, F, Fut>(&self, deadline: D, body: F) -> Result<(R, u64), Error>
    where
        D: Fn() -> Deadline,
        F: Fn(String) -> Fut,
        Fut: Future<Output = Result<R, Error>>,
    {
        const DOING: &str = "the session was opened again";
        let mut recovered = false;
        loop {
            let (id, epoch) = deadline().bound(DOING, self.current()).await??;
            match body(id.clone()).await {
                Ok(reply) => return Ok((reply, epoch)),
                Err(error) if !recovered && is_damaged_file(&error) => {
                    self.restore(&id).await?;
                    recovered = true;
                }
                Err(error) if !recovered && is_lost_session(&error) => {
                    let deadline = deadline();
                    deadline.bound(DOING, self.recover_apart(epoch, deadline)).await??;
                    recovered = true;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Registers again what the session holds, after the agent found a file of it damaged: that file goes up anew.
    async fn restore(&self, id: &str) -> Result<(), Error> {
        let held: Vec<_> = self.state().held.values().map(|held| Arc::clone(&held.content)).collect();
        for content in held {
            let meter = Meter::new(&content, None);
            let patience = self.deadline().remaining();
            upload::register(self.inner.client.link(), id, &content, &meter, patience).await?;
        }
        Ok(())
    }

    /// The session's id and epoch, after a recovery that is under way.
    async fn current(&self) -> Result<(String, u64), Error> {
        let _turn = self.inner.recovery.lock().await;
        let state = self.state();
        if state.closed {
            return Err(Error::new(Reason::NotFound, "this session was closed"));
        }
        Ok((state.id.clone(), state.epoch))
    }

    /// Recovers also if nobody waits for it any more: a session that was opened is there for the next call then, and
    /// not left to the agent.
    async fn recover_apart(&self, epoch: u64, deadline: Deadline) -> Result<(), Error> {
        let session = self.clone();
        let recovery = tokio::spawn(async move { session.recover(epoch, deadline).await });
        let ended = |_| Error::new(Reason::Cancelled, "the client's runtime ended");
        recovery.await.map_err(ended)?
    }

    /// Opens the session again and registers what it holds, unless another call did so since `epoch`.
    async fn recover(&self, epoch: u64, deadline: Deadline) -> Result<(), Error> {
        let _turn = self.inner.recovery.lock().await;
        let held: Vec<_> = {
            let state = self.state();
            if state.closed || state.epoch != epoch {
                return Ok(());
            }
            state.held.values().map(|held| Arc::clone(&held.content)).collect()
        };
        let client = &self.inner.client;
        let failed = |error: Error| {
            let message = format!("the agent lost this session, and it could not be opened again: {error}");
            Error::new(error.reason(), message).with(error.detail().clone())
        };
        let id = open(client, &self.inner.options, deadline).await.map_err(failed)?;
        for content in held {
            let meter = Meter::new(&content, None);
            if let Err(error) =
                upload::register(client.link(), &id, &content, &meter, deadline.remaining()).await
            {
                // The next call opens another one; this one need not wait for its lease, nor end with the call's time.
                let _ = close(client, &id, self.deadline()).await;
                return Err(failed(error));
            }
        }
        let mut state = self.state();
        state.id = id;
        state.epoch += 1;
        Ok(())
    }
}

async fn open(client: &Client, options: &SessionOptions, deadline: Deadline) -> Result<String, Error> {
    let SessionOptions { device, engine, hints } = options.clone();
    let asked = OpenSessionRequest { device, engine, hints };
    let reply = client
        .link()
        // A session that was opened without our hearing of it ends by its lease.
        .repeat(deadline, true, |wire, time| {
            let request = timed(asked.clone(), time);
            async move { SessionsClient::new(wire).open(request).await }
        })
        .await?;
    Ok(reply.session)
}

async fn close(client: &Client, id: &str, deadline: Deadline) -> Result<(), Error> {
    client
        .link()
        .repeat(deadline, true, |wire, time| {
            let request = timed(CloseSessionRequest { session: id.into() }, time);
            async move { SessionsClient::new(wire).close(request).await }
        })
        .await?;
    Ok(())
}

fn is_lost_session(error: &Error) -> bool {
    error.reason() == Reason::NotFound
        && matches!(error.detail(), Detail::Resource { kind, .. } if kind == "session")
}

fn is_damaged_file(error: &Error) -> bool {
    error.reason() == Reason::NotFound
        && matches!(error.detail(), Detail::Resource { kind, .. } if kind == "file")
}

pub(crate) fn malformed(operation: &str) -> Error {
    Error::new(Reason::BackendFailed, format!("the agent's answer is not one to {operation}"))
}
