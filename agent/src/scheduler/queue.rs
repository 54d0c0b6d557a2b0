//! Who is next: a fair queue over tenants.
//!
//! Each tenant has a clock that its lane time moves on, the slower the greater its weight; the tenant whose clock is
//! furthest behind is next. A tenant that comes back after a pause begins where the others are, so that nobody saves
//! up; one that is back at once keeps its place, so that a tenant with one call at a time gets its whole share beside
//! one with hundreds. Lane time is charged by estimate when a call begins, and corrected when it ends.
//!
//! Within a tenant calls go by priority, then by arrival. Calls of one [`Bucket`] leave together, also those of other
//! tenants, where the model's owner said that rows do not depend on each other.
//!
//! **Invariant:** no threads, no clocks, no I/O: what happens is decided by the arguments alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::batch::Bucket;
use crate::quota::Account;

/// Runs that a tenant's typical cost remembers, about.
const MEMORY: u64 = 8;

/// After a call of a tenant spoilt a batch, how many of its calls run by themselves.
const ALONE_RUNS: u32 = 64;

/// A call that waits.
#[derive(Debug)]
pub(super) struct Job<W> {
    pub(super) work: W,
    /// With which calls it may run; none runs alone.
    pub(super) bucket: Option<Arc<Bucket>>,
    pub(super) rows: usize,
    /// Lower goes first, within its tenant.
    pub(super) priority: u64,
    pub(super) arrived: Instant,
    /// When nobody waits for its result any more.
    pub(super) deadline: Instant,
    /// Nanoseconds of lane time it will probably take; the queue fills it in.
    pub(super) estimate: u64,
}

impl<W> Job<W> {
    pub(super) fn map<V>(self, map: impl FnOnce(W) -> V) -> Job<V> {
        let Self { work, bucket, rows, priority, arrived, deadline, estimate } = self;
        Job { work: map(work), bucket, rows, priority, arrived, deadline, estimate }
    }
}

/// Where a call stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    tenant: TenantKey,
    order: Order,
}

/// The address of the tenant's account, which lives as long as its entry here.
pub(super) type TenantKey = usize;
/// Priority, then number of arrival.
type Order = (u64, u64);

/// A call that was picked, with what its tenant was charged for it.
#[derive(Debug)]
pub(super) struct Picked {
    pub(super) bucket: Option<Arc<Bucket>>,
    pub(super) rows: usize,
    pub(super) arrived: Instant,
    pub(super) tenant: TenantKey,
    charged: u64,
}

/// What a lane does next: one call, or several of one bucket.
pub(super) type Batch<W> = Vec<(Picked, W)>;

#[derive(Debug)]
struct Tenant<W> {
    account: Arc<Account>,
    /// Nanoseconds of lane time over weight.
    clock: u64,
    /// Nanoseconds that a call of its own usually takes.
    typical: u64,
    /// The estimates of those that wait.
    backlog: u64,
    jobs: BTreeMap<Order, Job<W>>,
    running: usize,
    /// Calls that do not run with others'.
    alone: u32,
}

impl<W> Tenant<W> {
    /// What a call will probably take, in nanoseconds.
    fn estimate(&self, job: &Job<W>) -> u64 {
        job.bucket
            .as_ref()
            .and_then(|bucket| bucket.row_cost())
            .map_or(self.typical, |row| row.saturating_mul(job.rows as u64))
    }

    fn weight(&self) -> u64 {
        u64::from(self.account.weight())
    }
}

/// The queue. `W` is what a call is to whoever runs it.
#[derive(Debug)]
pub(super) struct FairQueue<W> {
    tenants: HashMap<TenantKey, Tenant<W>>,
    /// Those with waiting calls, the next one first.
    ready: BTreeSet<(u64, TenantKey)>,
    /// Where the tenant was that was last picked.
    clock: u64,
    arrivals: u64,
    waiting: usize,
}

impl<W> Default for FairQueue<W> {
    fn default() -> Self {
        Self { tenants: HashMap::new(), ready: BTreeSet::new(), clock: 0, arrivals: 0, waiting: 0 }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl<W> FairQueue<W> {
    /// Calls that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Adds a call.
    pub(super) fn push(&mut self, account: &Arc<Account>, mut job: Job<W>) -> Place {
        let key = Arc::as_ptr(account) as TenantKey;
        let clock = self.clock;
        let tenant = self.tenants.entry(key).or_insert_with(|| Tenant {
            account: Arc::clone(account),
            clock,
            typical: 0,
            backlog: 0,
            jobs: BTreeMap::new(),
            running: 0,
            alone: 0,
        });
        if tenant.jobs.is_empty() {
            tenant.clock = tenant.clock.max(clock);
            self.ready.insert((tenant.clock, key));
        }
        if let Some(bucket) = &job.bucket {
            bucket.joined(job.rows);
        }
        job.estimate = tenant.estimate(&job);
        tenant.backlog = tenant.backlog.saturating_add(job.estimate);
        self.arrivals += 1;
        let order = (job.priority, self.arrivals);
        tenant.jobs.insert(order, job);
        self.waiting += 1;
        Place { tenant: key, order }
    }

    /// Takes a call out that does not wait any more; none when it was picked.
    pub(super) fn remove(&mut self, place: Place) -> Option<Job<W>> {
        let tenant = self.tenants.get_mut(&place.tenant)?;
        let job = tenant.jobs.remove(&place.order)?;
        tenant.backlog = tenant.backlog.saturating_sub(job.estimate);
        if tenant.jobs.is_empty() {
            self.ready.remove(&(tenant.clock, place.tenant));
        }
        self.left(&job);
        self.forget(place.tenant);
        Some(job)
    }

    fn left(&mut self, job: &Job<W>) {
        self.waiting -= 1;
        if let Some(bucket) = &job.bucket {
            bucket.left(job.rows);
        }
    }

    /// A tenant that has nothing here and owes nothing begins anew when it comes back.
    fn forget(&mut self, key: TenantKey) {
        let is_idle = |tenant: &Tenant<W>| tenant.jobs.is_empty() && tenant.running == 0;
        if self.tenants.get(&key).is_some_and(|tenant| is_idle(tenant) && tenant.clock <= self.clock) {
            self.tenants.remove(&key);
        }
        // Those that owed lane time when they left, and do not any more.
        if self.tenants.len() > 2 * self.ready.len() + 64 {
            let clock = self.clock;
            self.tenants.retain(|_, tenant| !is_idle(tenant) || tenant.clock > clock);
        }
    }

    /// What a lane that is free at `now` should do, for a tenant that is not `barred`. Calls whose deadline has passed
    /// are taken out and given to `late`.
    pub(super) fn pick(
        &mut self,
        now: Instant,
        barred: &[TenantKey],
        late: &mut Vec<Job<W>>,
    ) -> Option<Batch<W>> {
        // An incomplete batch gives way while it may; when nothing else is due, a free lane does not wait for it.
        let first = self.first(now, true, barred, late);
        let (key, order) = first.or_else(|| self.first(now, false, barred, late))?;
        self.clock = self.clock.max(self.tenants[&key].clock);
        let mut batch = vec![self.take(key, order)?];
        self.fill(key, now, &mut batch);
        Some(batch)
    }

    /// The first call that can run, and is due where that is asked for.
    fn first(
        &mut self,
        now: Instant,
        due: bool,
        barred: &[TenantKey],
        late: &mut Vec<Job<W>>,
    ) -> Option<(TenantKey, Order)> {
        let mut found = None;
        let mut gone = Vec::new();
        for (_, key) in self.ready.iter().filter(|(_, key)| !barred.contains(key)) {
            for (order, job) in &self.tenants[key].jobs {
                if job.deadline <= now {
                    gone.push(Place { tenant: *key, order: *order });
                    continue;
                }
                let fits = job.bucket.as_ref().is_none_or(|bucket| {
                    bucket.may_run() && (!due || bucket.is_due(now.saturating_duration_since(job.arrived)))
                });
                if fits {
                    found = Some((*key, *order));
                    break;
                }
            }
            if found.is_some() {
                break;
            }
        }
        late.extend(gone.into_iter().filter_map(|place| self.remove(place)));
        found
    }

    fn take(&mut self, key: TenantKey, order: Order) -> Option<(Picked, W)> {
        let tenant = self.tenants.get_mut(&key)?;
        let job = tenant.jobs.remove(&order)?;
        tenant.backlog = tenant.backlog.saturating_sub(job.estimate);
        let charged = tenant.estimate(&job);
        self.ready.remove(&(tenant.clock, key));
        tenant.clock += charged / tenant.weight();
        tenant.running += 1;
        tenant.alone = tenant.alone.saturating_sub(1);
        if !tenant.jobs.is_empty() {
            self.ready.insert((tenant.clock, key));
        }
        self.left(&job);
        let Job { work, bucket, rows, arrived, .. } = job;
        Some((Picked { bucket, rows, arrived, tenant: key, charged }, work))
    }

    /// Adds calls to a batch that may run with its first one.
    fn fill(&mut self, first: TenantKey, now: Instant, batch: &mut Batch<W>) {
        let begun = batch[0].0.rows;
        let Some(bucket) = batch[0].0.bucket.clone() else { return };
        let limit = bucket.limit(begun, now);
        if begun >= limit || bucket.waiting_rows() == 0 {
            return;
        }
        let is_alone = |tenant: &Tenant<W>| tenant.alone > 0;
        let others: Vec<TenantKey> = if bucket.mixes_tenants() && !is_alone(&self.tenants[&first]) {
            let ready = self.ready.iter().map(|(_, key)| *key);
            ready.filter(|key| *key != first && !is_alone(&self.tenants[key])).collect()
        } else {
            Vec::new()
        };
        let mut chosen = Vec::new();
        let mut rows = begun;
        for key in std::iter::once(first).chain(others) {
            for (order, job) in &self.tenants[&key].jobs {
                let same = job.bucket.as_ref().is_some_and(|other| Arc::ptr_eq(other, &bucket));
                if same && job.deadline > now && rows + job.rows <= limit {
                    rows += job.rows;
                    chosen.push((key, *order, job.rows));
                }
            }
            if rows == limit {
                break;
            }
        }
        bucket.settle(begun, &mut chosen, |(_, _, rows)| *rows);
        batch.extend(chosen.into_iter().filter_map(|(key, order, _)| self.take(key, order)));
    }

    /// Corrects what a call's tenant was charged by what it took: its part of the batch's lane time. A call that spoilt
    /// its batch runs by itself for some time.
    pub(super) fn finished(&mut self, picked: &Picked, took: Duration, spoilt: bool) {
        let (took, key) = (nanos(took), picked.tenant);
        let Some(tenant) = self.tenants.get_mut(&key) else { return };
        tenant.running -= 1;
        if spoilt {
            tenant.alone = ALONE_RUNS;
        }
        if picked.bucket.is_none() {
            tenant.typical = if tenant.typical == 0 {
                took
            } else {
                tenant.typical - tenant.typical / MEMORY + took / MEMORY
            };
        }
        self.shift(key, took, picked.charged);
        self.forget(key);
    }

    /// Charges a tenant for a run that goes on, until that is settled.
    pub(super) fn charge(&mut self, key: TenantKey, time: Duration) {
        self.shift(key, nanos(time), 0);
    }

    /// Takes that back, as the run is over and its calls are charged.
    pub(super) fn settle(&mut self, key: TenantKey, time: Duration) {
        self.shift(key, 0, nanos(time));
    }

    /// Moves a tenant's clock on, by lane time that it had, and back.
    fn shift(&mut self, key: TenantKey, on: u64, back: u64) {
        let Some(tenant) = self.tenants.get_mut(&key) else { return };
        let clock = (tenant.clock + on / tenant.weight()).saturating_sub(back / tenant.weight());
        if !tenant.jobs.is_empty() {
            self.ready.remove(&(tenant.clock, key));
            self.ready.insert((clock, key));
        }
        tenant.clock = clock;
    }

    /// Whether a call waits for nothing but a lane, and its tenant has none.
    pub(super) fn is_kept_out(&self, place: Place) -> bool {
        let tenant = self.tenants.get(&place.tenant).filter(|tenant| tenant.running == 0);
        let job = tenant.and_then(|tenant| tenant.jobs.get(&place.order));
        job.is_some_and(|job| job.bucket.as_ref().is_none_or(|bucket| bucket.may_run()))
    }

    /// About how long a new call of a tenant waits for a lane: behind its own calls, while the others get their shares.
    pub(super) fn wait(&self, account: &Arc<Account>, lanes: usize) -> Duration {
        let Some(own) = self.tenants.get(&(Arc::as_ptr(account) as TenantKey)) else { return Duration::ZERO };
        let mine = own.backlog;
        if mine == 0 {
            return Duration::ZERO;
        }
        // While mine is worked off, another gets at most its share beside it, and no more than it has.
        let others = self.ready.iter().filter_map(|(_, key)| self.tenants.get(key));
        let others = others.filter(|other| !Arc::ptr_eq(&other.account, account));
        let others = others.map(|other| other.backlog.min(mine / own.weight() * other.weight()));
        Duration::from_nanos(others.fold(mine, u64::saturating_add) / lanes.max(1) as u64)
    }

    /// How long the first call of a tenant has waited for a lane, and for nothing else.
    pub(super) fn head_wait(&self, account: &Arc<Account>, now: Instant) -> Duration {
        let tenant = self.tenants.get(&(Arc::as_ptr(account) as TenantKey));
        let first = tenant.and_then(|tenant| tenant.jobs.values().next());
        let first = first.filter(|job| job.bucket.as_ref().is_none_or(|bucket| bucket.may_run()));
        first.map_or(Duration::ZERO, |job| now.saturating_duration_since(job.arrived))
    }

    /// The youngest call of whoever has most waiting, when that is more than `account` has: what gives way when the
    /// queue is full.
    pub(super) fn push_out(&mut self, account: &Arc<Account>) -> Option<Job<W>> {
        let own =
            self.tenants.get(&(Arc::as_ptr(account) as TenantKey)).map_or(0, |tenant| tenant.jobs.len());
        let (key, most) = self.tenants.iter().max_by_key(|(_, tenant)| tenant.jobs.len())?;
        if most.jobs.len() <= own {
            return None;
        }
        let place = Place { tenant: *key, order: *most.jobs.last_key_value()?.0 };
        self.remove(place)
    }
}
