//! What gives way where memory is used up: the host's, or a device's.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use vaccel_proto::Error;

use super::Repository;
use super::version::Version;
use crate::backend::{Choice, Origin};
use crate::identity::Tenant;

impl Repository {
    /// Where a device was full: unloads what was not used there for longest, of what others use only what stayed for
    /// its time. Whether there was anything.
    pub(super) fn give_way(
        &self,
        tenant: &Tenant,
        newest: &Arc<Version>,
        choice: &Choice,
        error: &Error,
    ) -> bool {
        let is_full = |device: &str| {
            self.workshop.engines.cuda.device(device).is_ok_and(|one| one.ledger.is_full(error))
        };
        if !is_full(&choice.device) {
            return false;
        }
        let loaded: Vec<Arc<Version>> = self.table().loaded.iter().filter_map(Weak::upgrade).collect();
        let others = loaded.iter().filter(|one| one.is_on(&choice.device) && !Arc::ptr_eq(one, newest));
        let may_go = |one: &&Arc<Version>| one.has_stayed(&choice.device) || !self.has_others(tenant, one);
        let Some(oldest) = others.filter(may_go).min_by_key(|one| turn(one)) else { return false };
        let (model, version) = (&oldest.name, oldest.number);
        tracing::info!(model, version, device = choice.device, "unloaded: the device's memory is used up");
        oldest.unload();
        true
    }

    /// Whether a version may be in use by other tenants.
    fn has_others(&self, tenant: &Tenant, version: &Version) -> bool {
        let table = self.table();
        match version.origin {
            Origin::Host => {
                table.users.get(&version.name).is_some_and(|users| users.iter().any(|user| user != tenant))
            }
            Origin::Guest => {
                let own = table.own.get(tenant).and_then(|own| own.get(&version.name));
                let own = own.and_then(|entry| entry.versions.get(&version.number));
                own.is_none_or(|own| !std::ptr::eq(&raw const **own, version))
            }
        }
    }

    /// Unloads what was not used for longest until what is loaded fits.
    pub(super) fn make_room(&self, newest: &Arc<Version>) {
        let mut table = self.table();
        table
            .loaded
            .retain(|one| one.upgrade().is_some_and(|one| one.is_loaded() && !Arc::ptr_eq(&one, newest)));
        table.loaded.push(Arc::downgrade(newest));
        let mut loaded: Vec<Arc<Version>> = table.loaded.iter().filter_map(Weak::upgrade).collect();
        drop(table);
        loaded.sort_by_key(|version| turn(version));
        let mut bytes: u64 = loaded.iter().map(|version| version.bytes()).sum();
        for version in loaded.iter().filter(|version| !Arc::ptr_eq(version, newest)) {
            if bytes <= self.bytes_max {
                break;
            }
            tracing::info!(
                model = version.name,
                version = version.number,
                "unloaded: memory for models is used up"
            );
            bytes -= version.bytes();
            version.unload();
        }
    }
}

/// When a version gives way: what guests brought before what all of them use, then what was not used for longest.
fn turn(version: &Version) -> (bool, u64) {
    (version.origin == Origin::Host, version.used.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::time::Duration;

    use vaccel_proto::Reason;

    use super::super::version::{Files, touch};
    use super::*;
    use crate::backend::{Engines, Workshop, fake_cuda};
    use crate::config::{DeviceConfig, EngineConfig, RepositoryConfig};
    use crate::scheduler::Scheduler;

    /// On a device of the tests' own, in a folder.
    fn repository(folder: &Path) -> Arc<Repository> {
        let libraries = vec![fake_cuda::build(folder, &[])];
        let devices = DeviceConfig { libraries, ..DeviceConfig::default() };
        let engines =
            Engines::new(&EngineConfig { devices, ..EngineConfig::default() }).expect("tract is there");
        let scheduler = Scheduler::new(1).expect("threads");
        let workshop = Arc::new(Workshop::new(engines, scheduler, Duration::from_secs(1)));
        let config = RepositoryConfig { folders: Vec::new(), single: String::new(), bytes_max: u64::MAX };
        Repository::open(&config, workshop, |_, _| true, |_, _| None).expect("opened")
    }

    fn version(repository: &Repository, name: &str, origin: Origin) -> Arc<Version> {
        let version = Version::new(name, 1, origin, Files::OnDisk(Vec::new()), None, BTreeMap::new());
        let version = Arc::new(version);
        touch(&version, &repository.clock);
        repository.table().loaded.push(Arc::downgrade(&version));
        version
    }

    fn on(device: &str) -> Choice {
        Choice { engine: String::new(), device: device.into() }
    }

    /// That a device is full.
    fn full(repository: &Repository) -> Error {
        let ledger = &repository.workshop.engines.cuda.devices()[0].ledger;
        ledger.charge(None, u64::MAX).expect_err("more than there is")
    }

    #[test]
    fn what_was_not_used_for_longest_on_a_full_device_gives_way_guests_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let repository = repository(folder.path());
        let loaded = |name: &str, origin, device: &str| {
            let version = version(&repository, name, origin);
            version.load_on(device, Duration::from_secs(60));
            version
        };
        let all = [
            loaded("old", Origin::Host, "cuda:0"),
            loaded("elsewhere", Origin::Guest, "cpu"),
            loaded("new", Origin::Host, "cuda:0"),
            loaded("guest", Origin::Guest, "cuda:0"),
            loaded("newest", Origin::Guest, "cuda:0"),
        ];
        let (newest, tenant, choice) = (&all[4], Tenant::new("a"), on("cuda:0"));
        let give_way = |error: &Error| repository.give_way(&tenant, newest, &choice, error);
        let other = Error::limit(Reason::QuotaExceeded, "devices' memory of this tenant", 1, 2, "bytes");
        assert!(!give_way(&other), "what others have is no help to this tenant");
        for gone in ["guest", "old", "new"] {
            assert!(give_way(&full(&repository)), "{gone}");
            let version = all.iter().find(|one| one.name == gone).expect("one of them");
            assert!(!version.is_loaded(), "{gone}");
        }
        assert!(!give_way(&full(&repository)), "nothing is left there");
        assert!(all[1].is_loaded() && newest.is_loaded());
    }

    #[test]
    fn what_others_use_and_was_loaded_again_stays_for_a_while() {
        let folder = tempfile::tempdir().expect("a folder");
        let repository = repository(folder.path());
        let (one, other, choice) = (Tenant::new("one"), Tenant::new("other"), on("cuda:0"));
        let versions = ["theirs", "mine"].map(|name| version(&repository, name, Origin::Host));
        let [theirs, mine] = &versions;
        let use_by = |tenant: &Tenant, version: &Version| {
            let mut table = repository.table();
            table.users.entry(version.name.clone()).or_default().insert(tenant.clone());
        };
        use_by(&other, theirs);
        use_by(&one, mine);
        let give_way = |tenant: &Tenant| {
            let newest = if *tenant == one { mine } else { theirs };
            repository.give_way(tenant, newest, &choice, &full(&repository))
        };
        theirs.load_on("cuda:0", Duration::from_secs(60));
        assert!(give_way(&one), "it is there for the first time");
        theirs.load_on("cuda:0", Duration::from_secs(60));
        assert!(!give_way(&one) && theirs.is_loaded(), "it had to give way before");
        // What only the tenant itself uses gives way to it at any time.
        mine.load_on("cuda:0", Duration::from_secs(60));
        mine.load_on("cuda:0", Duration::from_secs(60));
        assert!(!give_way(&other) && mine.is_loaded());
        assert!(repository.give_way(&one, theirs, &choice, &full(&repository)) && !mine.is_loaded());
        // And what stayed for its time, which is none here, to everybody.
        theirs.unload();
        theirs.load_on("cuda:0", Duration::ZERO);
        assert!(give_way(&one) && !theirs.is_loaded());
    }
}
