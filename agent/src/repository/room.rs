//! What gives way where memory is used up: the host's, or a device's.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use vaccel_proto::Error;

use super::Repository;
use super::version::Version;
use crate::backend::{Choice, Origin};

impl Repository {
    /// Where a device was full: unloads what was not used there for longest. Whether there was anything.
    pub(super) fn give_way(&self, newest: &Arc<Version>, choice: &Choice, error: &Error) -> bool {
        let is_full = |device: &str| {
            self.workshop.engines.cuda.device(device).is_ok_and(|one| one.ledger.is_full(error))
        };
        if !is_full(&choice.device) {
            return false;
        }
        let loaded: Vec<Arc<Version>> = self.table().loaded.iter().filter_map(Weak::upgrade).collect();
        let others = loaded.iter().filter(|one| one.is_on(&choice.device) && !Arc::ptr_eq(one, newest));
        let Some(oldest) = others.min_by_key(|one| turn(one)) else { return false };
        let (model, version) = (&oldest.name, oldest.number);
        tracing::info!(model, version, device = choice.device, "unloaded: the device's memory is used up");
        oldest.unload();
        true
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
    use std::time::Duration;

    use vaccel_proto::Reason;

    use super::super::version::{Files, touch};
    use super::*;
    use crate::backend::{Engines, Workshop, fake_cuda};
    use crate::config::{DeviceConfig, EngineConfig, RepositoryConfig};
    use crate::scheduler::Scheduler;

    #[test]
    fn what_was_not_used_for_longest_on_a_full_device_gives_way_guests_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let libraries = vec![fake_cuda::build(folder.path(), &[])];
        let devices = DeviceConfig { libraries, ..DeviceConfig::default() };
        let engines =
            Engines::new(&EngineConfig { devices, ..EngineConfig::default() }).expect("tract is there");
        let workshop =
            Arc::new(Workshop::new(engines, Scheduler::new(1).expect("threads"), Duration::from_secs(1)));
        let config = RepositoryConfig { folders: Vec::new(), single: String::new(), bytes_max: u64::MAX };
        let repository =
            Repository::open(&config, Arc::clone(&workshop), |_, _| true, |_, _| None).expect("opened");
        let version = |name: &str, origin, device: &str| {
            let files = Files::OnDisk(Vec::new());
            let version = Arc::new(Version::new(name, 1, origin, files, None, BTreeMap::new()));
            touch(&version, &repository.clock);
            version.load_on(device);
            repository.table().loaded.push(Arc::downgrade(&version));
            version
        };
        let all = [
            version("old", Origin::Host, "cuda:0"),
            version("elsewhere", Origin::Guest, "cpu"),
            version("new", Origin::Host, "cuda:0"),
            version("guest", Origin::Guest, "cuda:0"),
            version("newest", Origin::Guest, "cuda:0"),
        ];
        let newest = &all[4];
        let choice = Choice { engine: String::new(), device: "cuda:0".into() };
        let ledger = &workshop.engines.cuda.devices()[0].ledger;
        let full = ledger.charge(None, u64::MAX).expect_err("more than there is");
        let other = Error::limit(Reason::QuotaExceeded, "devices' memory of this tenant", 1, 2, "bytes");
        assert!(!repository.give_way(newest, &choice, &other), "what others have is no help to this tenant");
        for gone in ["guest", "old", "new"] {
            assert!(repository.give_way(newest, &choice, &full), "{gone}");
            let version = all.iter().find(|one| one.name == gone).expect("one of them");
            assert!(!version.is_loaded(), "{gone}");
        }
        assert!(!repository.give_way(newest, &choice, &full), "nothing is left there");
        assert!(all[1].is_loaded() && newest.is_loaded());
    }
}
