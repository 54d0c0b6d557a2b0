//! The connections that calls choose among.
//!
//! Short calls share one connection, where one system call serves many of them. A long message keeps a connection
//! busy, and others waiting: as long as all are, another one is opened.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::connection::Connection;
use crate::dial::Dialer;
use crate::wire::Head;

/// A message that is worth a connection for itself, in bytes: it takes several reads and writes.
const LONG_BYTES: usize = 64 << 10;

/// Pause after a dial that failed. Until there is a connection calls take another way, so there is no hurry.
const PAUSE: Duration = Duration::from_secs(1);

/// The connections, opened as they are needed and kept.
#[derive(Clone)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    most: usize,
    dialer: Arc<Dialer>,
    head: Arc<Head>,
    patience: Duration,
    connections: Mutex<Vec<Connection>>,
    /// Calls on all of them.
    calls: Arc<AtomicUsize>,
    is_dialing: AtomicBool,
    not_before: Mutex<Option<Instant>>,
}

impl Pool {
    /// None yet, and `most` at most. A dial may take as long as `patience`.
    pub(crate) fn new(most: usize, dialer: Arc<Dialer>, head: Arc<Head>, patience: Duration) -> Self {
        let (connections, calls, is_dialing, not_before) = Default::default();
        let shared = Shared { most, dialer, head, patience, connections, calls, is_dialing, not_before };
        Self { shared: Arc::new(shared) }
    }

    /// A connection for a request of so many bytes, if there is one. Those that are missing are dialed meanwhile.
    pub(crate) fn choose(&self, bytes: usize) -> Option<Connection> {
        let mut connections = self.shared.connections();
        connections.retain(|connection| !connection.is_closed());
        let least = connections.iter().min_by_key(|connection| connection.load()).cloned();
        let is_wanting = match &least {
            None => true,
            Some(least) => bytes >= LONG_BYTES && least.load().0 >= LONG_BYTES,
        };
        if is_wanting && connections.len() < self.shared.most {
            drop(connections);
            self.dial();
        }
        least
    }

    /// Tells the agent that a call is about to come.
    pub(crate) fn alert(&self) {
        let least = self.shared.connections().iter().min_by_key(|connection| connection.load()).cloned();
        if let Some(least) = least {
            least.alert();
        }
    }

    /// Opens another connection, one at a time.
    fn dial(&self) {
        let is_early = self.shared.not_before().is_some_and(|at| Instant::now() < at);
        if is_early || self.shared.is_dialing.swap(true, Ordering::Relaxed) {
            return;
        }
        let dialing = Dialing(Arc::clone(&self.shared));
        tokio::spawn(async move {
            let shared = &dialing.0;
            match timeout(shared.patience, shared.open()).await {
                Ok(Some(connection)) => shared.connections().push(connection),
                // Why is told by the way that calls take instead.
                _ => *shared.not_before() = Some(Instant::now() + PAUSE),
            }
        });
    }
}

/// A dial that is under way. It ends also with its runtime, after which another one may go on with the pool.
struct Dialing(Arc<Shared>);

impl Drop for Dialing {
    fn drop(&mut self) {
        self.0.is_dialing.store(false, Ordering::Relaxed);
    }
}

impl Shared {
    async fn open(&self) -> Option<Connection> {
        let (socket, _) = self.dialer.dial().await.ok()?;
        Connection::open(Box::new(socket), Arc::clone(&self.head), Arc::clone(&self.calls)).await.ok()
    }

    fn connections(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn not_before(&self) -> MutexGuard<'_, Option<Instant>> {
        self.not_before.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pool").field(&self.shared.connections()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dial::Protocol;
    use crate::tls::Tls;

    #[test]
    fn a_runtime_that_ends_while_it_dials_is_not_waited_for() {
        let endpoint: vaccel_proto::Endpoint = "unix://@nobody".parse().unwrap();
        let head = Arc::new(Head::new(&endpoint, None, false).unwrap());
        let dialer = Arc::new(Dialer::new(endpoint, &Tls::default(), Protocol::HTTP2).unwrap());
        let pool = Pool::new(1, dialer, head, PAUSE);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        {
            let _entered = runtime.enter();
            assert!(pool.choose(1).is_none());
        }
        assert!(pool.shared.is_dialing.load(Ordering::Relaxed));
        drop(runtime);
        assert!(!pool.shared.is_dialing.load(Ordering::Relaxed));
    }
}
