//! The connection to the agent: dialed when it is needed, shared by all calls, dialed again when it broke.
//!
//! It is owned here, rather than left to a ready-made channel, for what only the connection knows: whether a
//! failed request was never sent, and may be repeated, or may have run.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prost::Message;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Status;
use tonic::body::Body;
use tower_service::Service;
use vaccel_proto::inference::{ModelInferRequest, ModelInferResponse};
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::{Endpoint, Error, Reason};

use crate::backoff::Backoff;
use crate::dial::Dialer;
use crate::error::{Failure, chain, of_status};
use crate::http2::{FRAME_BYTES_MAX, KEEP_ALIVE, Pool};
use crate::shared::Memory;
use crate::unary::{self, Awake};
use crate::wire::{Head, Wire};

/// Bytes of one reply that may be under way before the client reads on: the longest there is, so that none waits for
/// the client to say so, however far away the agent is.
const STREAM_WINDOW_BYTES: u32 = 32 << 20;
const _: () = assert!(STREAM_WINDOW_BYTES as usize == MESSAGE_BYTES_MAX);
/// The same for all replies of the connection together.
const CONNECTION_WINDOW_BYTES: u32 = 2 * STREAM_WINDOW_BYTES;
/// A dial that took less is to an agent nearby, where what a call costs is work and not waiting: there it pays to have
/// connections beside this one. With TLS it takes some milliseconds on the same machine.
const NEAR: Duration = Duration::from_millis(20);

/// The connection to the agent, as a `tower` service: a generated client of any gRPC service runs over it. A
/// request is sent once; what may be repeated is repeated by the methods of [`Client`](crate::Client) and
/// [`Session`](crate::Session).
#[derive(Clone, Debug)]
pub struct Link {
    shared: Arc<Shared>,
}

/// How a client goes about its connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// How long a dial may take.
    pub(crate) connect_timeout: Duration,
    /// Connections at most.
    pub(crate) connections: usize,
    /// Bytes to share with the agent, if it is on this machine.
    pub(crate) shared_bytes: usize,
    /// Whether messages of runs are sent and taken in gzip.
    pub(crate) compresses: bool,
}

#[derive(Debug)]
struct Shared {
    dialer: Arc<Dialer>,
    head: Arc<Head>,
    connect_timeout: Duration,
    /// Connections at most.
    connections: usize,
    memory: Arc<Memory>,
    /// Dials that failed.
    failures: AtomicU64,
    slot: Mutex<Slot>,
}

/// The current connection, or how the last dial went.
#[derive(Debug, Default)]
struct Slot {
    wire: Option<Wire>,
    failure: Option<Failure>,
    backoff: Backoff,
    not_before: Option<Instant>,
}

impl Link {
    /// A link that is not dialed yet.
    pub(crate) fn new(dialer: Dialer, token: Option<&str>, options: &Options) -> Result<Self, Error> {
        let Options { connect_timeout, connections, shared_bytes, compresses } = *options;
        let head = Arc::new(Head::new(dialer.endpoint(), token, compresses)?);
        let memory = Memory::new(dialer.endpoint(), token, shared_bytes, connect_timeout);
        let (dialer, failures, slot) = (Arc::new(dialer), Default::default(), Default::default());
        Ok(Self {
            shared: Arc::new(Shared { dialer, head, connect_timeout, connections, memory, failures, slot }),
        })
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        self.shared.dialer.endpoint()
    }

    /// Tells the agent that a call is about to come, if that can be done at once.
    pub(crate) fn alert(&self) {
        if let Ok(slot) = self.shared.slot.try_lock()
            && let Some(wire) = &slot.wire
        {
            wire.alert();
        }
    }

    /// The memory that is shared with the agent.
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.shared.memory
    }

    /// The current connection; if there is none, the outcome of one dial.
    ///
    /// Callers that come while another one dials wait for it and share what it gets. After a failed dial the
    /// next one starts no earlier than the backoff says.
    pub(crate) async fn wire(&self) -> Result<Wire, Failure> {
        let shared = &*self.shared;
        let failures = shared.failures.load(Ordering::Acquire);
        let mut slot = shared.slot.lock().await;
        if let Some(wire) = slot.wire.as_ref().filter(|wire| wire.is_usable()) {
            return Ok(wire.clone());
        }
        if let Some(failure) = &slot.failure
            && shared.failures.load(Ordering::Acquire) != failures
        {
            return Err(failure.clone());
        }
        if let Some(at) = slot.not_before {
            sleep_until(at).await;
        }
        let opened = timeout(shared.connect_timeout, shared.open()).await.unwrap_or_else(|_| {
            let (endpoint, limit) = (shared.dialer.endpoint(), shared.connect_timeout);
            Err(Failure::unreachable(format!("cannot reach {endpoint}: no answer within {limit:?}")))
        });
        match opened {
            Ok(wire) => {
                *slot = Slot { wire: Some(wire.clone()), ..Slot::default() };
                Ok(wire)
            }
            Err(failure) => {
                slot.wire = None;
                slot.not_before = Some(Instant::now() + slot.backoff.pause());
                slot.failure = Some(failure.clone());
                shared.failures.fetch_add(1, Ordering::Release);
                Err(failure)
            }
        }
    }
}

impl Link {
    /// A run of a model by the Open Inference Protocol, sent once: as a generated client does it, but that tensors are
    /// sent from where they are.
    ///
    /// # Errors
    /// The agent's, and `DEADLINE` when there is no reply within `time`.
    pub async fn infer(
        &self,
        request: &ModelInferRequest,
        time: Duration,
    ) -> Result<ModelInferResponse, Error> {
        let call = async {
            let wire = self.wire().await?;
            let kind = unary::kind((&request.model_name, request.encoded_len()));
            let options = unary::Options { time, awake: Awake::Foreseen, kind };
            let reply = unary::call(wire, "/inference.GRPCInferenceService/ModelInfer", request, options);
            reply.await.map(tonic::Response::into_inner).map_err(|status| of_status(&status))
        };
        timeout(time, call).await.unwrap_or_else(|_| {
            Err(Error::new(Reason::Deadline, format!("{} did not answer within {time:?}", self.endpoint())))
        })
    }
}

impl Shared {
    /// A connection on which the agent has spoken.
    async fn open(&self) -> Result<Wire, Failure> {
        let began = Instant::now();
        let (stream, opened) = self.dialer.dial().await?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| {
                Failure::unreachable(format!("cannot reach {}: {}", self.dialer.endpoint(), chain(&error)))
            })?;
        tokio::spawn(async move {
            // How the connection ends is told to the calls that are on it.
            let _ = connection.await;
        });
        match opened.await {
            Ok(Ok(())) => {
                let (dialer, head) = (Arc::clone(&self.dialer), Arc::clone(&self.head));
                let beside = self.connections.saturating_sub(1);
                let pool = || Pool::new(beside, dialer, Arc::clone(&head), self.connect_timeout);
                let pool = (beside > 0 && began.elapsed() < NEAR).then(pool);
                Ok(Wire::new(sender, head, pool))
            }
            Ok(Err(error)) => Err(self.dialer.failure(&error)),
            Err(_dropped) => Err(self.dialer.failure(&std::io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

impl Service<http::Request<Body>> for Link {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        // Waiting for a connection is part of the call, where the call's own deadline bounds it.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let link = self.clone();
        Box::pin(async move {
            let status = |failure| Error::from(failure).to_status();
            let mut wire = link.wire().await.map_err(status)?;
            wire.call(request).await.map_err(status)
        })
    }
}
