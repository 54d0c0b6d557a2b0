//! What each tenant holds, counted in one place for every door.
//!
//! A [`Account`] counts connections, sessions, calls and bytes of one tenant against its limits. Whatever is counted
//! is a [`Hold`] that gives back when dropped, so that nothing stays counted after a call, a connection or a session
//! ends.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vaccel_proto::{Error, Reason};

use crate::config::TenantLimits;
use crate::identity::Tenant;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Connections,
    Sessions,
    Calls,
    /// Model runs and loads that went on after their caller was answered or had left.
    AbandonedRuns,
    /// Files, uploads and resources.
    Objects,
    ResourceBytes,
    InFlightBytes,
    /// Memory that callers share with the agent.
    SharedBytes,
    /// Memory of devices, for products and for models that the tenant brought.
    DeviceBytes,
    /// Lanes that models have which the tenant brought.
    Lanes,
    /// Streams that tell of changes of health.
    Watches,
    /// Processes with libraries that the tenant brought.
    Workers,
}

/// Computations of one tenant that nobody waits for and that have not stopped yet. An engine cannot be interrupted
/// inside one kernel; beyond these the tenant waits, so that it cannot fill the machine with runs it gave up.
pub(crate) const ABANDONED_RUNS_MAX: u64 = 4;

/// Files, uploads and resources that one tenant holds, and its files on disk. A resource names up to 64 files, so that
/// these descriptions alone take at most some 30 MiB.
pub(crate) const OBJECTS_MAX: u64 = 1000;

/// Lanes of all models that one tenant brought: each is a thread, which other tenants' work shares the processors with.
pub(crate) const LANES_MAX: u64 = 64;

/// Processes with libraries of one tenant, each with a memory of its own: as many functions run at a time, and as many
/// libraries stay loaded.
pub(crate) const WORKERS_MAX: u64 = 8;

/// Watches of one tenant: one for each connection that it may have, as clients have that look at the health of all they
/// are connected to, and at least so many.
pub(crate) const WATCHES_MIN: u64 = 64;

/// The use of one tenant.
#[derive(Debug)]
pub(crate) struct Account {
    limits: TenantLimits,
    /// Its share of the lanes beside others', as a multiple.
    weight: u32,
    connections: AtomicU64,
    sessions: AtomicU64,
    calls: AtomicU64,
    abandoned_runs: AtomicU64,
    objects: AtomicU64,
    resource_bytes: AtomicU64,
    in_flight_bytes: AtomicU64,
    shared_bytes: AtomicU64,
    device_bytes: AtomicU64,
    lanes: AtomicU64,
    watches: AtomicU64,
    workers: AtomicU64,
}

impl Account {
    fn new(limits: TenantLimits, weight: u32) -> Self {
        Self {
            limits,
            weight: weight.max(1),
            connections: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            abandoned_runs: AtomicU64::new(0),
            objects: AtomicU64::new(0),
            resource_bytes: AtomicU64::new(0),
            in_flight_bytes: AtomicU64::new(0),
            shared_bytes: AtomicU64::new(0),
            device_bytes: AtomicU64::new(0),
            lanes: AtomicU64::new(0),
            watches: AtomicU64::new(0),
            workers: AtomicU64::new(0),
        }
    }

    /// Counter, limit, subject and unit as they are shown.
    fn row(&self, unit: Unit) -> (&AtomicU64, u64, &'static str, &'static str) {
        match unit {
            Unit::Connections => {
                (&self.connections, self.limits.connections, "connections of this tenant", "connections")
            }
            Unit::Sessions => (&self.sessions, self.limits.sessions, "sessions of this tenant", "sessions"),
            Unit::Calls => (&self.calls, self.limits.calls, "calls of this tenant in flight", "calls"),
            Unit::AbandonedRuns => (
                &self.abandoned_runs,
                ABANDONED_RUNS_MAX,
                "runs of this tenant that nobody waits for",
                "runs",
            ),
            Unit::Objects => (&self.objects, OBJECTS_MAX, "files and resources of this tenant", "objects"),
            Unit::ResourceBytes => {
                (&self.resource_bytes, self.limits.resource_bytes, "stored files of this tenant", "bytes")
            }
            Unit::InFlightBytes => (
                &self.in_flight_bytes,
                self.limits.in_flight_bytes,
                "requests of this tenant in flight",
                "bytes",
            ),
            Unit::SharedBytes => {
                (&self.shared_bytes, self.limits.shared_bytes, "shared memory of this tenant", "bytes")
            }
            Unit::DeviceBytes => {
                (&self.device_bytes, self.limits.device_bytes, "devices' memory of this tenant", "bytes")
            }
            Unit::Lanes => (&self.lanes, LANES_MAX, "lanes of models that this tenant brought", "lanes"),
            Unit::Watches => {
                let limit = self.limits.connections.max(WATCHES_MIN);
                (&self.watches, limit, "watches of this tenant", "watches")
            }
            Unit::Workers => {
                (&self.workers, WORKERS_MAX, "processes with libraries of this tenant", "processes")
            }
        }
    }

    /// The tenant's share of the lanes, as a multiple of another's; at least 1.
    pub(crate) fn weight(&self) -> u32 {
        self.weight
    }

    /// What is in use now.
    pub(crate) fn used(&self, unit: Unit) -> u64 {
        self.row(unit).0.load(Ordering::Relaxed)
    }

    /// That what is in use leaves half of the limit to others who need it more.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`.
    pub(crate) fn leaves_half(&self, unit: Unit) -> Result<(), Error> {
        let (counter, limit, subject, unit) = self.row(unit);
        let (used, half) = (counter.load(Ordering::Relaxed), limit / 2);
        if used <= half {
            return Ok(());
        }
        let subject = format!("{subject}, for what can be done without");
        Err(Error::limit(Reason::QuotaExceeded, &subject, half, used, unit))
    }

    /// Takes `amount`, or says by how much the limit would be passed.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` with limit, need and unit.
    pub(crate) fn hold(self: &Arc<Self>, unit: Unit, amount: u64) -> Result<Hold, Error> {
        let mut hold = Hold { account: Arc::clone(self), unit, amount: 0 };
        hold.grow(amount)?;
        Ok(hold)
    }

    /// Counts a run that nobody waits for; it is there already, so it is counted even above the limit.
    pub(crate) fn abandoned(self: &Arc<Self>) -> Hold {
        self.abandoned_runs.fetch_add(1, Ordering::Relaxed);
        Hold { account: Arc::clone(self), unit: Unit::AbandonedRuns, amount: 1 }
    }

    /// Whether the tenant may start another computation.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` while too many it gave up are still running.
    pub(crate) fn may_compute(&self) -> Result<(), Error> {
        let used = self.used(Unit::AbandonedRuns);
        if used < ABANDONED_RUNS_MAX {
            return Ok(());
        }
        let (_, limit, subject, unit) = self.row(Unit::AbandonedRuns);
        Err(Error::limit(Reason::QuotaExceeded, subject, limit, used + 1, unit))
    }
}

/// Something counted; dropping it gives back.
#[derive(Debug)]
pub(crate) struct Hold {
    account: Arc<Account>,
    unit: Unit,
    amount: u64,
}

impl Hold {
    /// Takes more.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`; what was held stays held.
    pub(crate) fn grow(&mut self, amount: u64) -> Result<(), Error> {
        let (counter, limit, subject, unit) = self.account.row(self.unit);
        let fits = |used: u64| used.checked_add(amount).filter(|total| *total <= limit);
        match counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => {
                self.amount += amount;
                Ok(())
            }
            Err(used) => {
                Err(Error::limit(Reason::QuotaExceeded, subject, limit, used.saturating_add(amount), unit))
            }
        }
    }

    /// Gives so much back.
    pub(crate) fn shrink(&mut self, amount: u64) {
        let amount = amount.min(self.amount);
        self.account.row(self.unit).0.fetch_sub(amount, Ordering::Relaxed);
        self.amount -= amount;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shrink(self.amount);
    }
}

/// Accounts of all tenants that hold something.
pub(crate) struct Accounts {
    limits: TenantLimits,
    weight: Box<dyn Fn(&Tenant) -> u32 + Send + Sync>,
    open: Mutex<HashMap<Tenant, Weak<Account>>>,
}

impl fmt::Debug for Accounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accounts").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Accounts {
    /// Accounts with these limits, and with the share of the lanes that `weight` says.
    pub(crate) fn new(limits: TenantLimits, weight: impl Fn(&Tenant) -> u32 + Send + Sync + 'static) -> Self {
        Self { limits, weight: Box::new(weight), open: Mutex::default() }
    }

    /// The tenant's account; it lasts as long as anything holds it.
    pub(crate) fn of(&self, tenant: &Tenant) -> Arc<Account> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = open.get(tenant).and_then(Weak::upgrade) {
            return account;
        }
        open.retain(|_, account| account.strong_count() > 0);
        let account = Arc::new(Account::new(self.limits.clone(), (self.weight)(tenant)));
        open.insert(tenant.clone(), Arc::downgrade(&account));
        account
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        let limits = TenantLimits {
            connections: 1,
            sessions: 2,
            calls: 1,
            resource_bytes: 10,
            in_flight_bytes: u64::MAX,
            shared_bytes: 1,
            device_bytes: 0,
        };
        Accounts::new(limits, |_| 1)
    }

    #[test]
    fn holds_are_given_back_and_limits_hold() {
        let accounts = accounts();
        let account = accounts.of(&Tenant::new("a"));
        let mut hold = account.hold(Unit::ResourceBytes, 6).expect("fits");
        let refusal = account.hold(Unit::ResourceBytes, 5).expect_err("6 + 5 > 10");
        assert_eq!(refusal.reason(), Reason::QuotaExceeded);
        assert!(hold.grow(u64::MAX).is_err(), "a sum that overflows is refused");
        hold.grow(4).expect("fits exactly");
        drop(hold);
        assert_eq!(account.used(Unit::ResourceBytes), 0);
    }

    #[test]
    fn tenants_do_not_share_an_account_and_idle_ones_are_forgotten() {
        let accounts = accounts();
        let first = accounts.of(&Tenant::new("a"));
        let _call = first.hold(Unit::Calls, 1).expect("fits");
        assert!(accounts.of(&Tenant::new("b")).hold(Unit::Calls, 1).is_ok());
        assert!(accounts.of(&Tenant::new("a")).hold(Unit::Calls, 1).is_err());
        drop(accounts.of(&Tenant::new("c")));
        assert!(accounts.open.lock().expect("not poisoned").len() <= 3);
    }
}
