//! The vAccel agent: one GPU server, every guest.
//!
//! [`Agent::start`] binds every address of a [`Config`] and serves; [`Agent::drain`] stops it without losing a call.
//! `ARCHITECTURE.md` is the map of the rooms.

mod aside;
mod backend;
pub mod config;
pub mod demo;
mod direct;
mod dispatch;
mod http2;
mod identity;
mod infer;
pub mod networks;
mod onward;
mod ops;
mod policy;
mod pool;
mod profile;
mod quota;
mod repository;
mod resource;
mod scheduler;
pub mod self_test;
mod service;
mod session;
mod shared;
mod transport;

#[doc(hidden)]
pub use backend::exec::{COMMAND as EXEC_WORKER, worker as exec_worker};

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use vaccel_proto::Endpoint;
use vaccel_proto::v1::OperationInfo;

use crate::backend::Workshop;
pub use crate::config::{Config, ConfigError, Settings};
pub use crate::direct::{Accelerator, Accelerators, Device, Direct, Library, Network};
use crate::dispatch::Dispatch;
use crate::identity::{Identity, Tokens};
use crate::policy::Policies;
use crate::pool::Pool;
use crate::resource::Store;
use crate::scheduler::Scheduler;
use crate::service::Gate;
use crate::transport::{Acceptor, Annex, Entrance, Listener};

/// After the calls are done, how long connections may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// Why an agent did not start.
#[derive(Debug)]
pub enum StartError {
    /// The configuration names something that cannot be used.
    Config(ConfigError),
    /// An address could not be bound.
    Bind(Endpoint, std::io::Error),
    /// An engine or device that was asked for is not there.
    Engine(vaccel_proto::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(error) => error.fmt(f),
            Self::Bind(endpoint, error) => write!(f, "cannot listen on {endpoint}: {error}"),
            // Where something was looked for is for whoever starts the agent, and for nobody else.
            Self::Engine(error) => match std::error::Error::source(error) {
                Some(source) => write!(f, "{error}: {source}"),
                None => error.fmt(f),
            },
        }
    }
}

impl std::error::Error for StartError {}

impl From<ConfigError> for StartError {
    fn from(error: ConfigError) -> Self {
        Self::Config(error)
    }
}

/// The operations an agent knows.
pub fn operations() -> Vec<OperationInfo> {
    ops::list()
}

/// Checks what a configuration cannot know by itself: names of operations.
///
/// # Errors
/// The name that there is none of.
pub fn check(config: &Config) -> Result<(), ConfigError> {
    policies(config).map(drop)
}

fn policies(config: &Config) -> Result<Policies, ConfigError> {
    let known: Vec<String> = ops::list().into_iter().map(|operation| operation.name).collect();
    Policies::new(config.policy.clone(), &known)
}

/// Where callers over TCP from this machine get shared memory, if there may be any.
async fn annex(config: &Config) -> Option<(Arc<Annex>, Listener)> {
    let is_tcp = |endpoint: &Endpoint| matches!(endpoint, Endpoint::Tcp(_));
    if config.tenant.shared_bytes == 0 || !config.addresses.iter().any(is_tcp) {
        return None;
    }
    let none = |error: &std::io::Error| tracing::warn!(%error, "callers over TCP get no shared memory");
    Annex::open().await.inspect_err(none).ok()
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    endpoints: Vec<Endpoint>,
    dispatch: Arc<Dispatch>,
    closing: watch::Sender<bool>,
    listeners: JoinSet<()>,
    housekeeping: JoinSet<()>,
    grace: Duration,
}

impl Agent {
    /// Finds the engines, binds every address and serves. On return every address accepts.
    ///
    /// # Errors
    /// Anything the configuration asked for that cannot be had.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let engines = backend::Engines::new(&config.engines).map_err(StartError::Engine)?;
        let policies = policies(&config)?;
        let tokens = config.token_file.as_deref().map(Tokens::from_file).transpose()?;
        let acceptor = config.tls.as_ref().map(Acceptor::new).transpose()?;
        let store = Store::open(&config.store, config.tenant.resource_bytes)?;
        let mut bound = Vec::new();
        for endpoint in &config.addresses {
            let listener = Listener::bind(endpoint, config.unix_mode).await;
            bound.push(listener.map_err(|error| StartError::Bind(endpoint.clone(), error))?);
        }

        let (annex, annexed) = annex(&config).await.unzip();

        let lanes = Scheduler::new(config.lanes).map_err(StartError::Engine)?;
        let workshop = Workshop::new(engines, lanes, config.load_deadline);
        let pool = Pool::default();
        let dispatch = Arc::new(Dispatch::new(&config, workshop, policies, store, pool.clone())?);
        let gate = Gate::new(Arc::clone(&dispatch), Identity::new(tokens));
        let gate = gate.map_err(|error| ConfigError::new(error.to_string()))?;
        let (closing, is_closing) = watch::channel(false);
        let entrance = Arc::new(Entrance::new(
            gate,
            Arc::clone(&dispatch),
            acceptor,
            annex,
            pool.clone(),
            config.connections_max,
            is_closing,
        ));

        let endpoints = bound.iter().map(|listener| listener.endpoint().clone()).collect();
        let mut listeners = JoinSet::new();
        for listener in bound.into_iter().chain(annexed) {
            listeners.spawn(Arc::clone(&entrance).serve(listener));
        }
        let mut housekeeping = JoinSet::new();
        let housed = Arc::clone(&dispatch);
        housekeeping.spawn(async move { housed.housekeep().await });
        housekeeping.spawn(pool.housekeep());
        Ok(Self { endpoints, dispatch, closing, listeners, housekeeping, grace: config.grace })
    }

    /// What it listens on, with the ports the kernel chose, in the order of the configuration.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// Stops: health says so, refuses new calls, lets running ones finish within the grace, closes connections and
    /// removes its sockets. Returns whether every call finished.
    pub async fn drain(mut self) -> bool {
        self.dispatch.begin_drain();
        let finished = tokio::time::timeout(self.grace, self.dispatch.drained()).await.is_ok();
        self.closing.send_replace(true);
        let goodbye = async { while self.listeners.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(GOODBYE, goodbye).await;
        self.listeners.shutdown().await;
        self.housekeeping.shutdown().await;
        finished
    }
}
