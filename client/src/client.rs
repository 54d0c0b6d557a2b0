//! A client: one agent, the connections to it, and what can be asked without a session.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tonic::Request;
use vaccel_proto::v1::agent_client::AgentClient;
use vaccel_proto::v1::sessions_client::SessionsClient;
use vaccel_proto::v1::{InfoReply, InfoRequest, ListSessionsRequest, SessionInfo};
use vaccel_proto::{Endpoint, Error, Reason};

use crate::dial::{Dialer, Protocol};
use crate::env;
#[cfg(feature = "cli")]
use crate::http1::Http1;
use crate::link::{Link, Options};
use crate::retry::Deadline;
use crate::session::{Session, SessionOptions};
use crate::shared::{Buffer, SHARED_BYTES_DEFAULT};
use crate::tls::Tls;

/// How long a dial may take.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// Connections of a client when nobody says: the one that everything can take, and more for long messages at the same
/// time. More would keep no processor busier, and an agent allows a tenant only so many.
const CONNECTIONS_DEFAULT: usize = 9;
/// How long a call may take, repetitions included, when nobody says.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(60);

/// A client of one agent. Clones share its connections.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    link: Link,
    deadline: Duration,
}

/// How to reach an agent; see [`Client::builder`].
#[derive(Clone)]
pub struct Builder {
    endpoint: Endpoint,
    tls: Tls,
    token: Option<String>,
    options: Options,
    deadline: Duration,
}

/// Connects to the agent at an address such as `unix:///run/vaccel.sock`.
///
/// # Errors
/// Those of [`Builder::connect`].
pub async fn connect(address: &str) -> Result<Client, Error> {
    let endpoint = address.parse().map_err(|e| Error::new(Reason::BadArgument, format!("{e}")))?;
    Client::builder(endpoint).connect().await
}

impl Client {
    /// Begins to describe a client of the agent at `endpoint`.
    pub fn builder(endpoint: Endpoint) -> Builder {
        Builder {
            endpoint,
            tls: Tls::default(),
            token: None,
            options: Options {
                connect_timeout: CONNECT_TIMEOUT_DEFAULT,
                connections: CONNECTIONS_DEFAULT,
                shared_bytes: SHARED_BYTES_DEFAULT,
                compresses: false,
            },
            deadline: DEADLINE_DEFAULT,
        }
    }

    /// Connects as the variables in [`env`](mod@crate::env) say.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a variable that cannot be used, and those of [`Builder::connect`].
    pub async fn from_env() -> Result<Self, Error> {
        let mut builder = Self::builder(env::address()?).tls(env::tls()?);
        builder.token = env::token()?;
        builder.connect().await
    }

    /// What the agent is and can do, and who it takes this client for.
    ///
    /// # Errors
    /// `UNREACHABLE`, `UNAUTHENTICATED`, `DENIED`, `DEADLINE`.
    pub async fn info(&self) -> Result<InfoReply, Error> {
        self.link()
            .repeat(self.deadline(None), true, |wire, time| async move {
                AgentClient::new(wire).info(timed(InfoRequest {}, time)).await
            })
            .await
    }

    /// Opens a session.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` or `DISABLED` for a device or an engine that is not there, `QUOTA_EXCEEDED`, and those
    /// of [`Client::info`].
    pub async fn open_session(&self, options: SessionOptions) -> Result<Session, Error> {
        Session::open(self.clone(), options).await
    }

    /// The caller's own sessions, oldest first.
    ///
    /// # Errors
    /// Those of [`Client::info`].
    pub async fn list_sessions(&self) -> Result<Vec<SessionInfo>, Error> {
        self.link()
            .repeat(self.deadline(None), true, |wire, time| async move {
                SessionsClient::new(wire).list(timed(ListSessionsRequest {}, time)).await
            })
            .await
            .map(|reply| reply.sessions)
    }

    /// Memory to produce the data of a tensor in, of so many bytes, all 0 or what calls before left there. Where agent
    /// and client share memory it lies there, and calls with it need not copy it.
    pub async fn buffer(&self, bytes: usize) -> Buffer {
        self.link().memory().buffer(bytes).await
    }

    /// The agent's address.
    pub fn endpoint(&self) -> &Endpoint {
        self.link().endpoint()
    }

    /// The connection itself, for generated clients of other services or with other options.
    pub fn link(&self) -> &Link {
        &self.shared.link
    }

    pub(crate) fn deadline(&self, own: Option<Duration>) -> Deadline {
        Deadline::after(own.unwrap_or(self.shared.deadline))
    }
}

/// A request that tells the agent how long the caller waits.
pub(crate) fn timed<M>(message: M, time: Duration) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(time);
    request
}

impl Builder {
    /// The agent's address.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// How to speak TLS; other addresses than `tls://` ignore it.
    #[must_use]
    pub fn tls(mut self, tls: Tls) -> Self {
        self.tls = tls;
        self
    }

    /// Token that every request carries. Only TLS, vsock and unix sockets keep it from others on the way.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// How long a dial may take, the handshakes included; 5 seconds if not said.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.options.connect_timeout = timeout;
        self
    }

    /// How many connections the client may have at most; 9 if not said. The first one serves for everything. Where the
    /// agent is near, runs take others beside it, which cost them less; these are dialed when there are runs.
    #[must_use]
    pub fn connections(mut self, most: usize) -> Self {
        self.options.connections = most;
        self
    }

    /// Bytes of memory to share with an agent on this machine, behind a unix socket or TCP, if it has so much to give;
    /// 128 MiB if not said, 0 for none. Long tensors go through it, as far as they fit there together, and it makes no
    /// other difference than that of time. Pages take memory once they were written; all of them do once one of the
    /// agent's devices computes with something there.
    #[must_use]
    pub fn shared_bytes(mut self, bytes: usize) -> Self {
        self.options.shared_bytes = bytes;
        self
    }

    /// Whether requests and replies of runs are compressed, with gzip; they are not if not said. It is for slow lines
    /// and for tensors that compress: it costs some 20 ms of processor for a MB.
    #[must_use]
    pub fn compresses(mut self, yes: bool) -> Self {
        self.options.compresses = yes;
        self
    }

    /// How long a call may take, repetitions included; 60 seconds if not said, at most
    /// [`DEADLINE_MAX`](vaccel_proto::limits::DEADLINE_MAX).
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Dials once. Later, calls dial again by themselves whenever the connection is gone.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for an address, a token or TLS files that cannot be used; `UNREACHABLE`;
    /// `UNAUTHENTICATED` when one side does not accept the other's certificate.
    pub async fn connect(self) -> Result<Client, Error> {
        let client = self.build()?;
        client.link().wire().await?;
        Ok(client)
    }

    /// The client without a connection: its first call dials, and keeps trying until that call's deadline.
    ///
    /// # Errors
    /// `BAD_ARGUMENT`, as in [`Builder::connect`].
    pub fn build(self) -> Result<Client, Error> {
        let dialer = Dialer::new(self.endpoint, &self.tls, Protocol::HTTP2)?;
        let link = Link::new(dialer, self.token.as_deref(), &self.options)?;
        Ok(Client { shared: Arc::new(Shared { link, deadline: self.deadline }) })
    }

    /// A connection for HTTP/1.1, not dialed yet.
    ///
    /// # Errors
    /// `BAD_ARGUMENT`, as in [`Builder::connect`].
    #[cfg(feature = "cli")]
    pub fn http1(self) -> Result<Http1, Error> {
        let dialer = Dialer::new(self.endpoint, &self.tls, Protocol::HTTP1)?;
        Http1::new(dialer, self.token.as_deref(), self.options.connect_timeout)
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("endpoint", &self.endpoint)
            .field("tls", &self.tls)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("options", &self.options)
            .field("deadline", &self.deadline)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeout_header_has_at_most_eight_digits() {
        for (time, header) in [
            (Duration::from_nanos(1), "1n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (Duration::from_nanos(100_000_000), "100000u"),
            (Duration::from_millis(1500), "1500000u"),
            (Duration::from_secs(60), "60000000u"),
            (Duration::from_secs(100), "100000m"),
            (Duration::from_secs(600), "600000m"),
        ] {
            let request = timed((), time);
            assert_eq!(request.metadata().get("grpc-timeout").unwrap(), header, "{time:?}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let builder = Client::builder("tcp://127.0.0.1:1".parse().unwrap()).token("secret");
        assert!(!format!("{builder:?}").contains("secret"));
        let client = builder.build().unwrap();
        assert!(!format!("{client:?}").contains("secret"), "{client:?}");
    }

    #[test]
    fn a_token_that_no_header_carries_is_refused() {
        let refusal =
            Client::builder("tcp://127.0.0.1:1".parse().unwrap()).token("a\nb").build().unwrap_err();
        assert_eq!(refusal.reason(), Reason::BadArgument);
    }
}
