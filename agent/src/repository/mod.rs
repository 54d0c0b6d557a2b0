//! Models by name: those in the host's folders, and those that a tenant brought.
//!
//! Every tenant has a namespace of its own: the host's models that it may use, over them those it brought, and by their
//! ids the resources that its sessions hold. Unloading a model takes it out of the tenant's namespace and of nobody
//! else's. What no tenant uses any more, and what was not used for longest when memory is short, is unloaded from
//! memory; the next call loads it again.
//!
//! `folder` is the disk, `config` what a person wrote, `version` what was made of both, `stats` what its runs took,
//! `entry` which versions are served, `loading` what tenants load, bring and unload, `room` what gives way.
//!
//! **Invariant:** a look-up takes a tenant; another tenant's model answers exactly as an absent one.

mod config;
mod entry;
mod folder;
mod loading;
mod room;
mod stats;
mod version;
mod warmup;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use vaccel_proto::inference::ModelConfig;
use vaccel_proto::inference::repository_index_response::ModelIndex;
use vaccel_proto::v1::ResourceKind;
use vaccel_proto::{Error, Reason};

use crate::backend::{Choice, Cuda, Origin, Workshop};
use crate::config::{ConfigError, RepositoryConfig};
use crate::identity::Tenant;
use crate::resource::Resource;
use crate::scheduler::Asker;
use entry::{Entry, Versions};
use version::Files;

pub(crate) use config::{dtype_of, to_json, type_name, type_named};
pub(crate) use stats::{Counts, Failure, Measured, Stats};
pub(crate) use version::{Served, Tensors, Version};

/// How often a name that is not there lets the folders be looked through.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Table {
    host: BTreeMap<String, Arc<Entry>>,
    own: HashMap<Tenant, BTreeMap<String, Arc<Entry>>>,
    /// Names of the host's models that a tenant has unloaded.
    unloaded: HashMap<Tenant, HashSet<String>>,
    /// Who has used a version since it was loaded, by name.
    users: HashMap<String, HashSet<Tenant>>,
    /// Versions that may be in memory.
    loaded: Vec<Weak<Version>>,
    stats: HashMap<Tenant, BTreeMap<(String, u64), Arc<Stats>>>,
    looked: Option<Instant>,
}

impl Table {
    /// What is counted for a model on devices: for a tenant what it brought, for an operator also the host's, which
    /// others may have had loaded.
    fn device_bytes(&self, tenant: Option<&Tenant>, model: &str, version: u64) -> u64 {
        let own = self.own.iter().filter(|(own, _)| tenant.is_none_or(|tenant| tenant == *own));
        let own = own.filter_map(|(_, models)| models.get(model));
        let host = self.host.get(model).filter(|_| tenant.is_none());
        own.chain(host).filter_map(|entry| entry.versions.get(&version)).map(|one| one.device_bytes()).sum()
    }

    /// Makes `entry` the host's model of this name, if that is still as it was `before`.
    fn replace(&mut self, name: &str, before: Option<&Arc<Entry>>, entry: Entry) {
        if self.host.get(name).map(Arc::as_ptr) == before.map(Arc::as_ptr) {
            self.host.insert(name.into(), Arc::new(entry));
        }
    }
}

/// Whether a tenant may use a model of the host's.
type May = Box<dyn Fn(&Tenant, &str) -> bool + Send + Sync>;

/// What a tenant's sessions hold under an id.
type HeldBy = Box<dyn Fn(&Tenant, &str) -> Option<Arc<Resource>> + Send + Sync>;

/// All models by name.
pub(crate) struct Repository {
    /// Names and folders of the host's models, or of folders that have them.
    folders: Vec<PathBuf>,
    /// The name of a model that is a folder by itself.
    single: String,
    bytes_max: u64,
    workshop: Arc<Workshop>,
    /// Which of the host's models a tenant may use.
    may: May,
    held: HeldBy,
    table: Mutex<Table>,
    clock: AtomicU64,
    changes: watch::Sender<u64>,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository").field("folders", &self.folders).finish_non_exhaustive()
    }
}

/// The number of a version that a call means; none for whichever is newest.
///
/// # Errors
/// `BAD_ARGUMENT` for one that is no number.
fn number(version: &str) -> Result<Option<u64>, Error> {
    if version.is_empty() {
        return Ok(None);
    }
    let number = version.parse::<u64>().ok().filter(|number| *number > 0);
    number.map(Some).ok_or_else(|| {
        let version = vaccel_proto::error::shown(version);
        let version = version.trim_matches('"');
        Error::new(Reason::BadArgument, format!(
            "failed to get model version from specified version string '{version}' (details: stol), version should be \
             an integral value > 0"
        ))
    })
}

fn unknown(name: &str) -> Error {
    let name = vaccel_proto::error::shown(name);
    let name = name.trim_matches('"');
    Error::new(Reason::NotFound, format!("Request for unknown model: '{name}' is not found"))
}

impl Repository {
    /// Looks through the host's folders.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub(crate) fn open(
        config: &RepositoryConfig,
        workshop: Arc<Workshop>,
        may: impl Fn(&Tenant, &str) -> bool + Send + Sync + 'static,
        held: impl Fn(&Tenant, &str) -> Option<Arc<Resource>> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, ConfigError> {
        let repository = Self {
            folders: config.folders.clone(),
            single: config.single.clone(),
            bytes_max: config.bytes_max,
            workshop,
            may: Box::new(may),
            held: Box::new(held),
            table: Mutex::default(),
            clock: AtomicU64::new(0),
            changes: watch::Sender::new(0),
        };
        for folder in &repository.folders {
            if let Err(error) = folder::names(folder) {
                let message = format!("--model-repository {}: {error}", folder.display());
                return Err(ConfigError::new(message));
            }
        }
        repository.look();
        Ok(Arc::new(repository))
    }

    /// Wakes whoever watches the health of models.
    pub(crate) fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Tells of changes.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names and folders of the host's models as they are on the disk, and whether all of them could be looked for.
    fn on_disk(&self) -> (BTreeMap<String, PathBuf>, bool) {
        let (mut found, mut are_all) = (BTreeMap::new(), true);
        for folder in &self.folders {
            if folder::is_model(folder) {
                found.entry(self.single.clone()).or_insert_with(|| folder.clone());
                continue;
            }
            let names = folder::names(folder).inspect_err(|error| {
                tracing::warn!(folder = %folder.display(), %error, "a model repository cannot be read");
            });
            are_all &= names.is_ok();
            for name in names.unwrap_or_default() {
                let path = folder.join(&name);
                found.entry(name).or_insert(path);
            }
        }
        (found, are_all)
    }

    /// Takes up what has changed on the disk. What is loaded stays so, and is served until something else is loaded.
    fn look(&self) {
        self.table().looked = Some(Instant::now());
        let (on_disk, are_all) = self.on_disk();
        for (name, path) in &on_disk {
            let before = self.table().host.get(name).cloned();
            let found = self.read(name, path, before.as_deref(), None).unwrap_or_else(Entry::failed);
            let entry = Entry::after(found, before.as_deref());
            // Once, and not at every look.
            let is_known = before.as_ref().is_some_and(|before| before.failed == entry.failed);
            if let Some(why) = entry.failed.as_ref().filter(|_| !is_known) {
                tracing::warn!(model = name, why, "a model of the repository cannot be served as it is now");
            }
            self.table().replace(name, before.as_ref(), entry);
        }
        if are_all {
            let mut table = self.table();
            let gone: Vec<_> = table.host.extract_if(.., |name, _| !on_disk.contains_key(name)).collect();
            drop(table);
            // Without the lock: engines may take their time to let go.
            drop(gone);
        }
        self.changed();
    }

    /// A model as it is on the disk.
    ///
    /// # Errors
    /// Why it cannot be served, in words for the host's people and for guests.
    fn read(
        &self,
        name: &str,
        path: &Path,
        before: Option<&Entry>,
        given: Option<&ModelConfig>,
    ) -> Result<Entry, String> {
        let found = entry::read(name, path, before, given)?;
        self.absent_device(found.versions.values()).map_or(Ok(found), Err)
    }

    /// Why versions cannot be served on the device that their configuration asks for.
    fn absent_device<'a>(&self, mut versions: impl Iterator<Item = &'a Arc<Version>>) -> Option<String> {
        let wish = versions.next()?.wish();
        let wish = Some(wish).filter(|wish| !wish.device.is_empty())?;
        let error = self.workshop.engines.choose(wish, 0).err()?;
        Some(format!("instance_group.kind: KIND_GPU: {error}"))
    }

    /// The version of a model that a call means.
    ///
    /// # Errors
    /// `NOT_FOUND`, `BAD_ARGUMENT` for a version that is no number.
    pub(crate) async fn find(
        self: &Arc<Self>,
        tenant: &Tenant,
        name: &str,
        version: &str,
    ) -> Result<Arc<Version>, Error> {
        let number = number(version)?;
        let look_up = || self.in_session(tenant, name).map_or_else(|| self.entry(tenant, name), Ok);
        let mut entry = look_up();
        let is_there = entry.as_ref().is_ok_and(|entry| match number {
            Some(number) if !entry.versions.is_empty() => entry.version(number).is_some(),
            _ => !entry.versions.is_empty() || entry.failed.is_none(),
        });
        let is_stale = || self.table().looked.is_none_or(|looked| looked.elapsed() > LOOK_AGAIN_AFTER);
        if !is_there && is_stale() {
            // It may have come since the folders were looked through.
            self.refresh().await;
            entry = look_up();
        }
        let entry = entry?;
        let found = match number {
            None => entry.versions.last_key_value().map(|(_, version)| version),
            Some(number) => entry.version(number),
        };
        let version = found.ok_or_else(|| {
            let message = match number.filter(|_| !entry.versions.is_empty()) {
                Some(number) => format!("Request for unknown model: '{name}' version {number} is not found"),
                None => format!("Request for unknown model: '{name}' has no available versions"),
            };
            Error::new(Reason::NotFound, message)
        })?;
        version::touch(version, &self.clock);
        Ok(Arc::clone(version))
    }

    /// What a resource of a session is as a model: one version, which the resource has and frees.
    fn in_session(&self, tenant: &Tenant, id: &str) -> Option<Arc<Entry>> {
        if !vaccel_proto::is_resource_id(id) {
            return None;
        }
        let resource = (self.held)(tenant, id).filter(|resource| resource.kind == ResourceKind::Model)?;
        let version = resource.named.get_or_init(|| {
            let files = Files::InSession(Arc::downgrade(&resource));
            Arc::new(Version::new(id, 1, Origin::Guest, files, None, BTreeMap::new()))
        });
        let version = Arc::clone(version).downcast::<Version>().ok()?;
        Some(Arc::new(Entry::of(Versions::from([(1, version)]))))
    }

    fn entry(&self, tenant: &Tenant, name: &str) -> Result<Arc<Entry>, Error> {
        let table = self.table();
        if let Some(entry) = table.own.get(tenant).and_then(|own| own.get(name)) {
            return Ok(Arc::clone(entry));
        }
        let entry = table.host.get(name).filter(|_| (self.may)(tenant, name));
        let entry = entry.ok_or_else(|| unknown(name))?;
        if table.unloaded.get(tenant).is_some_and(|names| names.contains(name)) {
            return Ok(Arc::default());
        }
        Ok(Arc::clone(entry))
    }

    /// Looks through the folders, where waiting for the disk holds nobody up.
    async fn refresh(self: &Arc<Self>) {
        let repository = Arc::clone(self);
        if let Err(error) = tokio::task::spawn_blocking(move || repository.look()).await {
            tracing::error!(%error, "the model repository was not looked through");
        }
    }

    /// All served versions of a model, oldest first.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub(crate) fn versions(&self, tenant: &Tenant, name: &str) -> Result<Vec<u64>, Error> {
        let entry = self.in_session(tenant, name).map_or_else(|| self.entry(tenant, name), Ok)?;
        Ok(entry.versions.keys().copied().collect())
    }

    /// A version, loaded. The first call loads it.
    ///
    /// # Errors
    /// Why it cannot be.
    pub(crate) async fn served(
        &self,
        tenant: &Tenant,
        version: &Arc<Version>,
        choice: &Choice,
        asker: &Asker,
    ) -> Result<Arc<Served>, Error> {
        let was_loaded = version.is_loaded();
        let mut served = version.served(&self.workshop, asker, choice).await;
        while served.as_ref().is_err_and(|error| self.give_way(tenant, version, choice, error)) {
            // A runtime that ends needs no memory.
            let _ = tokio::task::spawn_blocking(Cuda::await_ends).await;
            served = version.served(&self.workshop, asker, choice).await;
        }
        if served.is_err() {
            self.changed();
        }
        let served = served.map_err(|error| match error.reason() {
            Reason::ModelRejected => {
                let (name, number, why) = (&version.name, version.number, error.message());
                let message = format!(
                    "load failed for model '{name}': version {number} is at UNAVAILABLE state: {why}"
                );
                Error::new(Reason::BadArgument, message)
            }
            _ => error,
        })?;
        if version.origin == Origin::Host {
            // Let go of without the lock.
            let mut _replaced = None;
            let mut table = self.table();
            let users = table.users.entry(version.name.clone()).or_default();
            if !users.contains(tenant) {
                users.insert(tenant.clone());
            }
            let entry = table.host.get(&version.name).filter(|_| !was_loaded);
            if let Some(entry) = entry.and_then(|entry| entry.with_loaded(version)) {
                _replaced = table.host.insert(version.name.clone(), Arc::new(entry));
            }
        }
        // What a session holds is limited with the session.
        if !was_loaded && !version.is_in_session() {
            self.make_room(version);
        }
        Ok(served)
    }

    /// The host's versions that are to be loaded before anybody asks.
    pub(crate) fn to_warm(&self) -> Vec<Arc<Version>> {
        let table = self.table();
        let all = table.host.values().flat_map(|entry| entry.versions.values());
        all.filter(|version| version.has_warmup()).cloned().collect()
    }

    /// The models of a tenant's namespace, by name.
    pub(crate) async fn index(self: &Arc<Self>, tenant: &Tenant) -> Vec<ModelIndex> {
        self.refresh().await;
        let table = self.table();
        let own = table.own.get(tenant);
        let unloaded = table.unloaded.get(tenant);
        let is_visible =
            |name: &str| (self.may)(tenant, name) && own.is_none_or(|own| !own.contains_key(name));
        let owns = own.into_iter().flatten().map(|(name, entry)| (name, entry, false));
        let hosts = table.host.iter().filter(|(name, _)| is_visible(name)).map(|(name, entry)| {
            let is_unloaded = unloaded.is_some_and(|names| names.contains(name));
            (name, entry, is_unloaded)
        });
        let rows = owns.chain(hosts).flat_map(|(name, entry, is_unloaded)| entry.index(name, is_unloaded));
        let mut index: Vec<ModelIndex> = rows.collect();
        index.sort_by(|one, other| (&one.name, &one.version).cmp(&(&other.name, &other.version)));
        index
    }

    /// Whether a version can be run, as far as is known.
    pub(crate) async fn is_ready(
        self: &Arc<Self>,
        tenant: &Tenant,
        name: &str,
        version: &str,
    ) -> Result<bool, Error> {
        match self.find(tenant, name, version).await {
            Ok(version) => Ok(version.failed().is_none()),
            Err(error) if error.reason() == Reason::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Where a tenant's runs of a version are counted.
    pub(crate) fn stats(&self, tenant: &Tenant, version: &Version) -> Arc<Stats> {
        if version.is_in_session() {
            return Arc::clone(&version.stats);
        }
        let mut table = self.table();
        let own = table.stats.entry(tenant.clone()).or_default();
        let key = (version.name.clone(), version.number);
        Arc::clone(own.entry(key).or_default())
    }

    /// What was counted for a tenant, or for all together.
    pub(crate) fn measured(&self, tenant: Option<&Tenant>) -> Vec<Measured> {
        let table = self.table();
        let rows = table.stats.iter().filter(|(own, _)| tenant.is_none_or(|tenant| tenant == *own));
        let mut all: BTreeMap<&(String, u64), Counts> = BTreeMap::new();
        for (key, stats) in rows.flat_map(|(_, stats)| stats) {
            all.entry(key).or_default().add(&stats.read());
        }
        let measured = |((model, version), counts): (&(String, u64), Counts)| Measured {
            device_bytes: table.device_bytes(tenant, model, *version),
            model: model.clone(),
            version: *version,
            counts,
        };
        all.into_iter().map(measured).collect()
    }

    /// All that was counted for a tenant.
    pub(crate) fn all_stats(&self, tenant: &Tenant) -> Vec<(String, u64, Arc<Stats>)> {
        let table = self.table();
        let own = table.stats.get(tenant).into_iter().flatten();
        own.map(|((name, version), stats)| (name.clone(), *version, Arc::clone(stats))).collect()
    }
}
