//! Sessions: what a guest holds on the agent. A session belongs to the tenant that opened it and lives by its lease: it
//! stays while a connection that used it is there, and for the lease after the last one is lost; then everything it
//! held is freed.
//!
//! **Invariant:** there is no look-up without a tenant, and another tenant's session answers exactly as an absent one.

use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use vaccel_proto::Error;
use vaccel_proto::limits::SESSION_ID_BYTES;

use crate::backend::Choice;
use crate::backend::exec::Libraries;
use crate::identity::{Tenant, hex};
use crate::profile::Profile;
use crate::quota::Hold;
use crate::resource::{Holdings, Resource};

/// Unguessable name of a session: random bits in hexadecimal.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct SessionId(Arc<str>);

impl SessionId {
    fn random() -> Result<Self, Error> {
        let mut bytes = [0; SESSION_ID_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| {
            Error::new(vaccel_proto::Reason::BackendFailed, "no randomness for a session id").caused_by(error)
        })?;
        Ok(Self(hex(&bytes).into()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for SessionId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Shown in logs by its first digits: the whole is a secret between guest and agent.
impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}…", &self.0[..6])
    }
}

/// One connection of the transport, for the time the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ConnectionId(pub(crate) u64);

/// One session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    /// Engine and device its models run on.
    pub(crate) choice: Choice,
    /// Resources and unfinished uploads.
    pub(crate) holdings: Arc<Holdings>,
    /// What its calls took.
    pub(crate) profile: Profile,
    /// Libraries of it that are loaded.
    pub(crate) libraries: Libraries,
    pub(crate) opened: Instant,
    _counted: Hold,
}

#[derive(Debug)]
struct Entry {
    tenant: Tenant,
    session: Arc<Session>,
    /// Living connections that used it: one, as a rule.
    connections: BTreeSet<ConnectionId>,
    /// When it ends; none while a connection is there.
    ends: Option<Instant>,
}

#[derive(Debug, Default)]
struct Table {
    sessions: HashMap<SessionId, Entry>,
    connections: HashSet<ConnectionId>,
}

/// All sessions.
#[derive(Debug)]
pub(crate) struct Sessions {
    lease: Duration,
    table: Mutex<Table>,
    /// Wakes [`Sessions::reap`] when a countdown began.
    countdown: Notify,
}

impl Sessions {
    pub(crate) fn new(lease: Duration) -> Self {
        Self { lease, table: Mutex::default(), countdown: Notify::new() }
    }

    /// How long a session outlives its last connection.
    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session for a tenant, used by this connection.
    pub(crate) fn open(
        &self,
        tenant: &Tenant,
        connection: ConnectionId,
        choice: Choice,
        counted: Hold,
    ) -> Result<Arc<Session>, Error> {
        let id = SessionId::random()?;
        let opened = Instant::now();
        let (holdings, profile, libraries) = Default::default();
        let session =
            Session { id: id.clone(), choice, holdings, profile, libraries, opened, _counted: counted };
        let session = Arc::new(session);
        let mut entry = Entry {
            tenant: tenant.clone(),
            session: Arc::clone(&session),
            connections: BTreeSet::new(),
            ends: None,
        };
        let mut table = self.table();
        self.renew(&mut entry, connection, &table.connections);
        table.sessions.insert(id, entry);
        Ok(session)
    }

    /// The tenant's session, renewed.
    ///
    /// # Errors
    /// `NOT_FOUND`, also for another tenant's.
    pub(crate) fn get(
        &self,
        id: &str,
        tenant: &Tenant,
        connection: ConnectionId,
    ) -> Result<Arc<Session>, Error> {
        let mut table = self.table();
        let Table { sessions, connections } = &mut *table;
        let entry = sessions
            .get_mut(id)
            .filter(|entry| entry.tenant == *tenant)
            .ok_or_else(|| Error::not_found("session", id))?;
        self.renew(entry, connection, connections);
        Ok(Arc::clone(&entry.session))
    }

    fn renew(&self, entry: &mut Entry, connection: ConnectionId, living: &HashSet<ConnectionId>) {
        // One that is not there any more is in nobody's set.
        if entry.connections.contains(&connection) {
            return;
        }
        // The connection may have been lost while its call was on the way here.
        if living.contains(&connection) {
            entry.connections.insert(connection);
            entry.ends = None;
        } else if entry.connections.is_empty() {
            entry.ends = Some(Instant::now() + self.lease);
            self.countdown.notify_one();
        }
    }

    /// Ends the tenant's session. What it held is freed when its last running call ends.
    ///
    /// # Errors
    /// `NOT_FOUND`, also for another tenant's.
    pub(crate) fn close(&self, id: &str, tenant: &Tenant) -> Result<(), Error> {
        let mut table = self.table();
        match table.sessions.get(id) {
            Some(entry) if entry.tenant == *tenant => {
                let entry = table.sessions.remove(id);
                drop(table);
                drop(entry);
                Ok(())
            }
            _ => Err(Error::not_found("session", id)),
        }
    }

    /// The tenant's sessions, oldest first.
    pub(crate) fn list(&self, tenant: &Tenant) -> Vec<Arc<Session>> {
        let table = self.table();
        let own = table.sessions.values().filter(|entry| entry.tenant == *tenant);
        let mut sessions: Vec<_> = own.map(|entry| Arc::clone(&entry.session)).collect();
        sessions.sort_by_key(|session| session.opened);
        sessions
    }

    /// A resource that a session of the tenant's holds.
    pub(crate) fn holding(&self, tenant: &Tenant, resource: &str) -> Option<Arc<Resource>> {
        self.list(tenant).iter().find_map(|session| session.holdings.resource(resource).ok())
    }

    /// A connection is there.
    pub(crate) fn connected(&self, connection: ConnectionId) {
        self.table().connections.insert(connection);
    }

    /// A connection is gone: sessions that nobody else uses begin their countdown.
    pub(crate) fn disconnected(&self, connection: ConnectionId) {
        let mut table = self.table();
        table.connections.remove(&connection);
        let ends = Instant::now() + self.lease;
        for entry in table.sessions.values_mut() {
            if entry.connections.remove(&connection) && entry.connections.is_empty() {
                entry.ends = Some(ends);
            }
        }
        drop(table);
        self.countdown.notify_one();
    }

    /// Ends sessions whose lease is over, for ever.
    pub(crate) async fn reap(&self) {
        loop {
            let next = self.end_due(Instant::now());
            let woken = self.countdown.notified();
            match next {
                Some(next) => {
                    let _ = tokio::time::timeout_at(next, woken).await;
                }
                None => woken.await,
            }
        }
    }

    /// Ends what is due and says when the next one will be.
    fn end_due(&self, now: Instant) -> Option<Instant> {
        let mut table = self.table();
        let ended: Vec<Entry> = table
            .sessions
            .extract_if(|_, entry| entry.ends.is_some_and(|ends| ends <= now))
            .map(|(_, e)| e)
            .collect();
        let next = table.sessions.values().filter_map(|entry| entry.ends).min();
        // Freeing a large resource takes time that nobody else should wait for.
        drop(table);
        for entry in &ended {
            tracing::info!(session = ?entry.session.id, tenant = %entry.tenant, "session ended: its lease is over");
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TenantLimits;
    use crate::quota::{Accounts, Unit};
    use vaccel_proto::Reason;

    const LEASE: Duration = Duration::from_secs(30);
    const FIRST: ConnectionId = ConnectionId(1);
    const SECOND: ConnectionId = ConnectionId(2);

    fn open(sessions: &Sessions, tenant: &Tenant) -> String {
        let limits = TenantLimits {
            connections: 1,
            sessions: 9,
            calls: 1,
            resource_bytes: 1,
            in_flight_bytes: 1,
            shared_bytes: 1,
            device_bytes: 0,
        };
        let counted = Accounts::new(limits, |_| 1).of(tenant).hold(Unit::Sessions, 1).expect("fits");
        let session = sessions.open(tenant, FIRST, Choice::default(), counted).expect("opens");
        session.id.as_str().to_owned()
    }

    /// What is due this long from now.
    fn end_due_in(sessions: &Sessions, time: Duration) {
        sessions.end_due(Instant::now() + time);
    }

    #[tokio::test]
    async fn a_lost_connection_starts_the_countdown_and_a_call_stops_it() {
        let sessions = Sessions::new(LEASE);
        let tenant = Tenant::new("a");
        sessions.connected(FIRST);
        let id = open(&sessions, &tenant);
        end_due_in(&sessions, LEASE * 100);
        sessions.get(&id, &tenant, FIRST).expect("held by its connection");

        sessions.disconnected(FIRST);
        end_due_in(&sessions, LEASE / 2);
        sessions.connected(SECOND);
        sessions.get(&id, &tenant, SECOND).expect("within its lease");
        end_due_in(&sessions, LEASE * 100);
        sessions.get(&id, &tenant, SECOND).expect("held by the second connection");

        sessions.disconnected(SECOND);
        end_due_in(&sessions, LEASE);
        let refusal = sessions.get(&id, &tenant, SECOND).expect_err("ended");
        assert_eq!(refusal.reason(), Reason::NotFound);
    }

    #[tokio::test]
    async fn a_call_that_outran_its_lost_connection_does_not_keep_the_session_for_ever() {
        let sessions = Sessions::new(LEASE);
        let tenant = Tenant::new("a");
        let id = open(&sessions, &tenant);
        sessions.get(&id, &tenant, FIRST).expect("there");
        end_due_in(&sessions, LEASE);
        assert!(sessions.get(&id, &tenant, FIRST).is_err());
    }

    #[tokio::test]
    async fn another_tenants_session_answers_as_an_absent_one() {
        let sessions = Sessions::new(LEASE);
        let (owner, other) = (Tenant::new("a"), Tenant::new("b"));
        sessions.connected(FIRST);
        let id = open(&sessions, &owner);
        let absent = "0".repeat(SESSION_ID_BYTES * 2);
        let texts = [&id, &absent].map(|id| {
            let refusal = sessions.get(id, &other, FIRST).expect_err("not theirs");
            assert!(sessions.close(id, &other).is_err());
            refusal.message().replace(id.as_str(), "ID")
        });
        assert_eq!(texts[0], texts[1]);
        assert!(sessions.list(&other).is_empty());
        assert_eq!(sessions.list(&owner).len(), 1);
        sessions.close(&id, &owner).expect("the owner's");
        assert!(sessions.close(&id, &owner).is_err());
    }
}
