//! The entrance: listeners to connections, within caps and deadlines.
//!
//! The accept loop is the agent's own, because a server library's keeps peers that never speak, and spins when the
//! process is out of file descriptors. A connection has [`OPENING_DEADLINE`] for its TLS handshake and HTTP/2 preface
//! together. **Invariant:** knows no messages.

mod listener;
mod memory;
mod preface;
mod stream;
mod tls;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use vaccel_proto::{Endpoint, Error, Reason};

use crate::dispatch::Dispatch;
use crate::http2;
use crate::identity::{self, Peer, Tenant};
use crate::onward;
use crate::pool::Pool;
use crate::quota::{Hold, Unit};
use crate::service::{Connection, ConnectionService, Gate};
use crate::session::ConnectionId;
use preface::Speech;
use stream::Stream;

pub(crate) use listener::Listener;
pub(crate) use memory::Annex;
pub(crate) use tls::Acceptor;

/// From accept to the end of the HTTP/2 preface, TLS handshake included. A live client is through in a few round trips.
const OPENING_DEADLINE: Duration = Duration::from_secs(5);

/// From the end of one request of HTTP/1 to that of the next one's headers: a connection that is kept says nothing in
/// between, and cannot be asked whether its peer is there.
const IDLE_DEADLINE: Duration = Duration::from_secs(60);

/// After the last thing that is said on a connection, how long the peer may take to read it before it is cut.
const LINGER: Duration = Duration::from_millis(500);

/// Pause of an accept loop that cannot accept, for example for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// All request headers of a call over HTTP/1, in bytes, and what is read ahead.
const HEADER_BYTES_MAX: usize = 16 << 10;

/// What every connection needs.
pub(crate) struct Entrance {
    pub(crate) gate: Gate,
    pub(crate) dispatch: Arc<Dispatch>,
    pub(crate) acceptor: Option<Acceptor>,
    /// Where callers over TCP get shared memory.
    annex: Option<Arc<Annex>>,
    slots: Arc<Semaphore>,
    connections_max: usize,
    pool: Pool,
    next: AtomicU64,
    /// Becomes true when connections should finish what they are doing and close.
    closing: watch::Receiver<bool>,
}

impl Entrance {
    pub(crate) fn new(
        gate: Gate,
        dispatch: Arc<Dispatch>,
        acceptor: Option<Acceptor>,
        annex: Option<Arc<Annex>>,
        pool: Pool,
        connections_max: usize,
        closing: watch::Receiver<bool>,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(connections_max));
        Self {
            gate,
            dispatch,
            acceptor,
            annex,
            slots,
            connections_max,
            pool,
            next: AtomicU64::new(1),
            closing,
        }
    }

    /// Serves a listener until closing; returns when its last connection is gone.
    pub(crate) async fn serve(self: Arc<Self>, listener: Listener) {
        let mut closing = self.closing.clone();
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => self.admit(&listener, stream, peer, &mut connections),
                    Err(error) => {
                        tracing::warn!(listener = %listener.endpoint(), %error, "cannot accept");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
                () = closed(&mut closing) => break,
            }
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }

    fn admit(
        self: &Arc<Self>,
        listener: &Listener,
        stream: Box<dyn Stream>,
        peer: Peer,
        connections: &mut JoinSet<()>,
    ) {
        let endpoint = listener.endpoint().clone();
        // A TLS peer has no certificate yet; until its handshake it counts by its address.
        let tenant = identity::of_connection(&endpoint, &peer);
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            tracing::warn!(%tenant, ?peer, "connection refused: the agent has as many as it may have");
            return;
        };
        let counted = match self.dispatch.accounts().of(&tenant).hold(Unit::Connections, 1) {
            Ok(counted) => counted,
            Err(refusal) => {
                tracing::warn!(%tenant, ?peer, %refusal, "connection refused");
                return;
            }
        };
        let entrance = Arc::clone(self);
        connections.spawn(onward::task(async move {
            let _slot = slot;
            let _counted: Hold = counted;
            if let Err(error) = entrance.converse(&endpoint, stream, peer, tenant).await {
                tracing::debug!(listener = %endpoint, %error, "connection ended");
            }
        }));
    }

    async fn converse(
        &self,
        endpoint: &Endpoint,
        stream: Box<dyn Stream>,
        peer: Peer,
        tenant: Tenant,
    ) -> io::Result<()> {
        let opening = async {
            let (stream, peer, tenant) = match (&self.acceptor, endpoint, &peer) {
                (Some(acceptor), Endpoint::Tls(_), Peer::Tcp { ip }) => {
                    // Boxed, as HTTP/1 is below: only connections that need its state have room for it.
                    let (stream, certificate) = Box::pin(secure(acceptor, stream)).await?;
                    let peer = Peer::Tls { ip: *ip, certificate };
                    let tenant = identity::of_connection(endpoint, &peer);
                    (stream, peer, tenant)
                }
                _ => (stream, peer, tenant),
            };
            let (speech, stream) = preface::expect(stream).await?;
            Ok::<_, io::Error>((speech, stream, peer, tenant))
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the peer did not open HTTP in time");
        let (speech, stream, peer, tenant) =
            tokio::time::timeout(OPENING_DEADLINE, opening).await.map_err(late)??;
        if let Some(annex) = self.annex.as_ref().filter(|annex| annex.is(endpoint)) {
            return Box::pin(redeem(annex, stream, speech)).await;
        }
        if speech == Speech::Memory {
            return Box::pin(self.lend_memory(stream, &peer, &tenant)).await;
        }

        let id = ConnectionId(self.next.fetch_add(1, Ordering::Relaxed));
        tracing::debug!(connection = id.0, listener = %endpoint, %tenant, ?peer, "connected");
        let _present = Present::new(&self.dispatch, id);
        let account = self.dispatch.accounts().of(&tenant);
        let connection = Arc::new(Connection { id, peer, tenant, account, calls: AtomicU64::new(0) });
        let service = self.gate.of(connection);
        match speech {
            Speech::Http2 => self.speak_two(stream, service).await,
            _ => Box::pin(self.speak_one(stream, service)).await.map_err(io::Error::other),
        }
    }

    /// Gives the peer a region of shared memory for as long as it is there.
    async fn lend_memory(&self, mut stream: Box<dyn Stream>, peer: &Peer, tenant: &Tenant) -> io::Result<()> {
        let annex = self.annex.as_ref().filter(|_| matches!(peer, Peer::Tcp { .. }) && peer.is_near());
        let opening = async {
            let wanted = memory::wanted(&mut stream).await?;
            let region = wanted.and_then(|(bytes, token)| {
                if annex.is_none() && !matches!(peer, Peer::Unix { .. }) {
                    return Err(memory::none_for_others());
                }
                // Calls go without memory, and nothing goes without a connection: half of them are for calls.
                self.dispatch.accounts().of(tenant).leaves_half(Unit::Connections)?;
                if self.slots.available_permits() < self.connections_max / 2 {
                    return Err(Error::new(
                        Reason::Overloaded,
                        "the agent has too many connections for this one",
                    ));
                }
                let tenant = self.gate.owner(tenant, peer, token.as_deref())?;
                let account = self.dispatch.accounts().of(&tenant);
                self.dispatch.shared().make(&tenant, &account, bytes).map(Arc::new)
            });
            let ticket = match (&region, annex) {
                (Ok(region), Some(annex)) => Some(annex.offer(&mut stream, region).await?),
                (Ok(region), None) => memory::give(&mut stream, region).await.map(|()| None)?,
                (Err(error), _) => memory::refuse(&mut stream, error).await.map(|()| None)?,
            };
            Ok::<_, io::Error>((region, ticket))
        };
        let (region, _ticket) = tokio::time::timeout(OPENING_DEADLINE, opening).await.map_err(silent)??;
        if region.is_ok() {
            let mut closing = self.closing.clone();
            tokio::select! {
                () = memory::gone(&mut stream) => {}
                () = closed(&mut closing) => {}
            }
        }
        Ok(())
    }

    async fn speak_one(&self, stream: Box<dyn Stream>, service: ConnectionService) -> hyper::Result<()> {
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(IDLE_DEADLINE).max_buf_size(HEADER_BYTES_MAX);
        let mut connection = http.serve_connection(TokioIo::new(stream), service);
        let mut closing = self.closing.clone();
        let is_closing = tokio::select! {
            ended = std::future::poll_fn(|context| connection.poll_without_shutdown(context)) => {
                ended?;
                false
            }
            () = closed(&mut closing) => true,
        };
        if is_closing {
            std::pin::Pin::new(&mut connection).graceful_shutdown();
            std::future::poll_fn(|context| connection.poll_without_shutdown(context)).await?;
        }
        // Where a request was refused before it was whole, the peer is still sending.
        linger(&mut connection.into_parts().io.into_inner()).await;
        Ok(())
    }

    async fn speak_two(&self, stream: Box<dyn Stream>, service: ConnectionService) -> io::Result<()> {
        let mut connection = http2::Connection::new(stream, service, self.pool.clone());
        let mut closing = self.closing.clone();
        let ended = tokio::select! {
            biased;
            ended = connection.run() => ended,
            () = closed(&mut closing) => {
                connection.close();
                connection.run().await
            }
        };
        let mut stream = connection.into_io();
        if ended.is_err() {
            // The last word says what the peer did wrong.
            linger(&mut stream).await;
        } else {
            let _ = tokio::time::timeout(LINGER, stream.shutdown()).await;
        }
        ended
    }
}

/// Gives a peer that has a ticket its memory.
async fn redeem(annex: &Annex, mut stream: Box<dyn Stream>, speech: Speech) -> io::Result<()> {
    if speech != Speech::Memory {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer does not speak of memory"));
    }
    tokio::time::timeout(OPENING_DEADLINE, annex.redeem(&mut stream)).await.map_err(silent)?
}

/// That a peer did not say in time what it wants of memory.
fn silent(_: tokio::time::error::Elapsed) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the peer did not say what memory it wants")
}

/// Waits for the signal to close.
async fn closed(closing: &mut watch::Receiver<bool>) {
    // An agent that was dropped without draining closes too.
    let _ = closing.wait_for(|closing| *closing).await;
}

async fn secure(
    acceptor: &Acceptor,
    stream: Box<dyn Stream>,
) -> io::Result<(Box<dyn Stream>, Option<identity::CertificateName>)> {
    match acceptor.accept(stream).await {
        Ok(accepted) => Ok(accepted),
        Err((error, mut stream)) => {
            // The alert that says why is on its way.
            linger(&mut stream).await;
            Err(error)
        }
    }
}

/// Says that no more comes, and reads until the peer is done: closing with bytes of the peer unread would reset the
/// connection, and could destroy the last thing that was said.
async fn linger(stream: &mut Box<dyn Stream>) {
    let parting = async {
        let _ = stream.shutdown().await;
        let _ = tokio::io::copy(stream, &mut tokio::io::sink()).await;
    };
    let _ = tokio::time::timeout(LINGER, parting).await;
}

/// Tells the sessions that a connection is there, for as long as it is.
struct Present<'a> {
    dispatch: &'a Dispatch,
    id: ConnectionId,
}

impl<'a> Present<'a> {
    fn new(dispatch: &'a Dispatch, id: ConnectionId) -> Self {
        dispatch.sessions().connected(id);
        Self { dispatch, id }
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.dispatch.sessions().disconnected(self.id);
    }
}
