//! A model with its versions: those that are served, and those on the disk that are to take their place.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use vaccel_proto::inference::ModelConfig;
use vaccel_proto::inference::repository_index_response::ModelIndex;

use super::folder;
use super::version::{Files, Version};
use crate::backend::Origin;

/// Versions by number.
pub(super) type Versions = BTreeMap<u64, Arc<Version>>;

/// A model with the versions that are served.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) versions: Versions,
    /// All that the disk has now, where that is not what is served: somebody has to load it first, so that what works
    /// goes on until something else does.
    pub(super) next: Versions,
    /// Why there are none, or why what the disk has now cannot take the place of those that there are.
    pub(super) failed: Option<String>,
}

impl Entry {
    pub(super) fn of(versions: Versions) -> Self {
        Self { versions, ..Self::default() }
    }

    pub(super) fn failed(why: String) -> Self {
        Self { failed: Some(why), ..Self::default() }
    }

    /// The version with a number; a new one is there for whoever asks for it.
    pub(super) fn version(&self, number: u64) -> Option<&Arc<Version>> {
        self.versions.get(&number).or_else(|| self.next.get(&number))
    }

    /// What a load of the model loads.
    pub(super) fn newest(&self) -> &Versions {
        if self.next.is_empty() { &self.versions } else { &self.next }
    }

    fn has(&self, version: &Arc<Version>) -> bool {
        self.versions.get(&version.number).is_some_and(|own| Arc::ptr_eq(own, version))
    }

    /// What is served after the disk was looked at and has `found`: what is loaded stays until something else is.
    pub(super) fn after(found: Self, before: Option<&Self>) -> Self {
        let Some(before) = before.filter(|before| !before.versions.is_empty()) else { return found };
        if found.failed.is_some() {
            let (versions, next) = (before.versions.clone(), before.next.clone());
            return Self { versions, next, ..found };
        }
        let is_loaded = before.versions.values().any(|version| version.is_loaded());
        if is_loaded && !found.versions.values().all(|version| before.has(version)) {
            return Self { versions: before.versions.clone(), next: found.versions, failed: None };
        }
        found
    }

    /// The same with a new version that somebody has loaded; none where it is no new one.
    pub(super) fn with_loaded(&self, version: &Arc<Version>) -> Option<Self> {
        let is_new = !self.versions.contains_key(&version.number)
            && self.next.get(&version.number).is_some_and(|next| Arc::ptr_eq(next, version));
        if !is_new {
            return None;
        }
        let mut versions = self.versions.clone();
        versions.insert(version.number, Arc::clone(version));
        let entry = Self { versions, next: self.next.clone(), failed: self.failed.clone() };
        if entry.next.values().all(|version| entry.has(version)) {
            // Nothing else is waited for: what is not among them is not on the disk, or not to be served.
            return Some(Self { versions: entry.next, next: Versions::new(), failed: entry.failed });
        }
        Some(entry)
    }

    /// Its rows in the index: what can be called, and why what came later cannot take its place.
    pub(super) fn index(&self, name: &str, is_unloaded: bool) -> Vec<ModelIndex> {
        let row = |version: &str, state: &str, reason: String| ModelIndex {
            name: name.into(),
            version: version.into(),
            state: state.into(),
            reason,
        };
        if self.versions.is_empty() {
            return self.failed.iter().map(|why| row("", "UNAVAILABLE", why.clone())).collect();
        }
        let new = self.next.iter().filter(|(number, _)| !self.versions.contains_key(number));
        let rows = self.versions.iter().chain(new).map(|(number, version)| {
            let next = self.next.get(number).and_then(|next| next.failed());
            let number = number.to_string();
            match (is_unloaded, version.failed()) {
                (true, _) => row(&number, "UNAVAILABLE", "unloaded".into()),
                (false, Some(why)) => row(&number, "UNAVAILABLE", why),
                (false, None) => row(&number, "READY", self.failed.clone().or(next).unwrap_or_default()),
            }
        });
        rows.collect()
    }

    /// Whether it is made of files of the host's.
    pub(super) fn is_on_disk(&self) -> bool {
        self.versions.values().any(|version| matches!(version.files, Files::OnDisk(_)))
    }
}

/// A model as it is on the disk, with another configuration than the one there if one is `given`; versions that are as
/// they were `before` stay what they are.
pub(super) fn read(
    name: &str,
    path: &Path,
    before: Option<&Entry>,
    given: Option<&ModelConfig>,
) -> Result<Entry, String> {
    let found = folder::look(path, name, given)?;
    let origin = if given.is_some() { Origin::Guest } else { Origin::Host };
    let versions = found.versions.into_iter().map(|(number, files)| {
        let known = before.into_iter().flat_map(|before| [&before.versions, &before.next]);
        let mut known = known.filter_map(|versions| versions.get(&number));
        let same = known.find(|known| known.is_same(&files, found.config.as_ref()));
        let version = same.cloned().unwrap_or_else(|| {
            let (files, labels) = (Files::OnDisk(files), found.labels.clone());
            Arc::new(Version::new(name, number, origin, files, found.config.clone(), labels))
        });
        (number, version)
    });
    Ok(Entry::of(versions.collect()))
}
