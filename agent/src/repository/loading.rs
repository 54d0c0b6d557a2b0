//! What a tenant loads, brings and unloads.

use std::collections::BTreeMap;
use std::sync::Arc;

use vaccel_proto::inference::ModelConfig;
use vaccel_proto::{Error, Reason};

use super::entry::Entry;
use super::version::{self, Files, Version};
use super::{Repository, config};
use crate::backend::{Choice, Origin};
use crate::identity::Tenant;
use crate::resource::Resource;
use crate::scheduler::Asker;

/// Models that a tenant may have brought at the same time.
const OWN_MODELS_MAX: usize = 64;

/// Why a model cannot be loaded whose folder is not there.
fn not_polled(name: &str) -> Error {
    let name = vaccel_proto::error::shown(name);
    let name = name.trim_matches('"');
    Error::new(Reason::Unusable, format!("failed to load '{name}', failed to poll from model repository"))
}

/// Why a model cannot be loaded as it is.
fn load_failed(name: &str, why: &str) -> Error {
    Error::new(Reason::BadArgument, format!("load failed for model '{name}': {why}"))
}

impl Repository {
    /// Loads a model of the host for a tenant, or loads it again: what changed on the disk is loaded before it takes
    /// the old one's place.
    ///
    /// # Errors
    /// `UNUSABLE` for a name that is in no folder, and why it cannot be loaded.
    pub(crate) async fn load(
        self: &Arc<Self>,
        tenant: &Tenant,
        name: &str,
        choice: impl Fn(&Version) -> Result<Choice, Error>,
        asker: &Asker,
    ) -> Result<(), Error> {
        self.refresh().await;
        let found = self.table().host.get(name).filter(|_| (self.may)(tenant, name)).cloned();
        let Some(entry) = found else {
            let is_own = self.table().own.get(tenant).is_some_and(|own| own.contains_key(name));
            return if is_own { Ok(()) } else { Err(not_polled(name)) };
        };
        if let Some(why) = &entry.failed {
            return Err(load_failed(name, why));
        }
        for version in entry.newest().values() {
            version::touch(version, &self.clock);
            self.served(tenant, version, &choice(version)?, asker).await?;
        }
        // Let go of without the lock: engines may take their time.
        let mut _replaced = [None, None];
        let mut table = self.table();
        if !entry.next.is_empty() {
            _replaced[0] = table.host.insert(name.into(), Arc::new(Entry::of(entry.next.clone())));
        }
        if let Some(own) = table.own.get_mut(tenant)
            && own.get(name).is_some_and(|own| own.is_on_disk())
        {
            // It was the same with another configuration.
            _replaced[1] = own.remove(name);
        }
        if let Some(names) = table.unloaded.get_mut(tenant) {
            names.remove(name);
        }
        drop(table);
        self.changed();
        Ok(())
    }

    /// Loads a model with another configuration than the one in its folder, for its tenant alone.
    ///
    /// # Errors
    /// As [`load`](Self::load), and `BAD_ARGUMENT` for a configuration that cannot be.
    pub(crate) async fn load_configured(
        self: &Arc<Self>,
        tenant: &Tenant,
        name: &str,
        config_json: &str,
        choice: impl Fn(&Version) -> Result<Choice, Error>,
        asker: &Asker,
    ) -> Result<(), Error> {
        let config = self.configuration(name, config_json)?;
        let brought = self.table().own.get(tenant).and_then(|own| own.get(name)).cloned();
        let entry = if let Some(brought) = brought.filter(|own| !own.is_on_disk()) {
            let again = |(number, version): (&u64, &Arc<Version>)| {
                let (files, config) = (version.files.clone(), Some(config.clone()));
                let version = Version::new(name, *number, Origin::Guest, files, config, BTreeMap::new());
                (*number, Arc::new(version))
            };
            Entry::of(brought.versions.iter().map(again).collect())
        } else if (self.may)(tenant, name) {
            let (repository, own_name) = (Arc::clone(self), name.to_owned());
            let read = move || {
                let path = repository.on_disk().0.remove(&own_name).ok_or_else(|| not_polled(&own_name))?;
                let read = repository.read(&own_name, &path, None, Some(&config));
                read.map_err(|why| load_failed(&own_name, &why))
            };
            let read = tokio::task::spawn_blocking(read).await;
            read.map_err(|error| not_polled(name).caused_by(error))??
        } else {
            return Err(not_polled(name));
        };
        self.keep_own(tenant, name, entry, choice, asker).await
    }

    /// A configuration that a call brings.
    fn configuration(&self, name: &str, json: &str) -> Result<ModelConfig, Error> {
        let refuse = |why: String| load_failed(name, &why);
        let config = config::read_json(json).map_err(refuse)?;
        config::check(name, &config).map_err(refuse)?;
        Ok(config)
    }

    /// Makes a resource a model of its tenant, under a name and in versions.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`, `BAD_ARGUMENT` for a configuration that cannot be, and why it cannot be loaded.
    pub(crate) async fn bring(
        &self,
        tenant: &Tenant,
        name: &str,
        config_json: &str,
        versions: BTreeMap<u64, Arc<Resource>>,
        choice: impl Fn(&Version) -> Result<Choice, Error>,
        asker: &Asker,
    ) -> Result<(), Error> {
        let config = self.configuration(name, config_json)?;
        let entry = versions.into_iter().map(|(number, resource)| {
            let config = Some(config.clone());
            let version =
                Version::new(name, number, Origin::Guest, Files::Held(resource), config, BTreeMap::new());
            (number, Arc::new(version))
        });
        self.keep_own(tenant, name, Entry::of(entry.collect()), choice, asker).await
    }

    /// Loads a model that is its tenant's own, and puts it into the tenant's namespace.
    async fn keep_own(
        &self,
        tenant: &Tenant,
        name: &str,
        entry: Entry,
        choice: impl Fn(&Version) -> Result<Choice, Error>,
        asker: &Asker,
    ) -> Result<(), Error> {
        if let Some(why) = self.absent_device(entry.versions.values()) {
            return Err(load_failed(name, &why));
        }
        for version in entry.versions.values() {
            version::touch(version, &self.clock);
            self.served(tenant, version, &choice(version)?, asker).await?;
        }
        let mut table = self.table();
        let own = table.own.entry(tenant.clone()).or_default();
        if own.len() >= OWN_MODELS_MAX && !own.contains_key(name) {
            let (limit, used) = (OWN_MODELS_MAX as u64, own.len() as u64 + 1);
            return Err(Error::limit(Reason::QuotaExceeded, "models of this tenant", limit, used, "models"));
        }
        own.insert(name.into(), Arc::new(entry));
        drop(table);
        self.changed();
        Ok(())
    }

    /// Takes a model out of a tenant's namespace. One that is not there is out of it already.
    pub(crate) fn unload(&self, tenant: &Tenant, name: &str) {
        self.take_out(tenant, name);
        self.changed();
    }

    fn take_out(&self, tenant: &Tenant, name: &str) {
        let mut table = self.table();
        if let Some(own) = table.own.get_mut(tenant).and_then(|own| own.remove(name)) {
            // Names that a guest makes up must not add up.
            if let Some(stats) = table.stats.get_mut(tenant) {
                stats.retain(|(model, _), _| model != name);
            }
            // What was the host's with another configuration is not there without it either.
            if !own.is_on_disk() {
                return;
            }
        }
        let Some(entry) = table.host.get(name).filter(|_| (self.may)(tenant, name)).cloned() else { return };
        table.unloaded.entry(tenant.clone()).or_default().insert(name.into());
        let users = table.users.entry(name.into()).or_default();
        users.remove(tenant);
        if users.is_empty() {
            drop(table);
            entry.versions.values().for_each(|version| version.unload());
        }
    }
}
