//! What one session holds: resources, as often as it registered them, and files on their way to one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vaccel_proto::Error;

use super::disk::PartName;
use super::upload::Part;
use super::{Hash, Object, Resource};

/// Resources of the agent's own making that a session holds: whoever wants one of them reads it before the next ones.
const MADE_MAX: usize = 16;

/// What one session holds.
#[derive(Debug, Default)]
pub(crate) struct Holdings(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    resources: HashMap<String, Registration>,
    /// Complete files that no resource of the session names yet.
    files: HashMap<Hash, Arc<Object>>,
    uploads: HashMap<PartName, Arc<Part>>,
    /// Resources that the agent made, the latest last.
    made: VecDeque<String>,
}

#[derive(Debug)]
struct Registration {
    resource: Arc<Resource>,
    /// How often it was registered.
    times: u64,
}

impl Holdings {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A resource of this session.
    ///
    /// # Errors
    /// `NOT_FOUND`, also for another session's or tenant's.
    pub(crate) fn resource(&self, id: &str) -> Result<Arc<Resource>, Error> {
        let held = self.held();
        let found = held.resources.get(id).map(|registration| Arc::clone(&registration.resource));
        found.ok_or_else(|| Error::not_found("resource", id))
    }

    /// Lets go of a resource once, or however often it was registered.
    ///
    /// # Errors
    /// `NOT_FOUND`, also for another session's or tenant's.
    pub(crate) fn unregister(&self, id: &str, all: bool) -> Result<(), Error> {
        let mut held = self.held();
        let Some(registration) = held.resources.get_mut(id) else {
            return Err(Error::not_found("resource", id));
        };
        registration.times -= 1;
        if all || registration.times == 0 {
            let gone = held.resources.remove(id);
            held.made.retain(|made| made != id);
            // Freeing a model takes time.
            drop(held);
            drop(gone);
        }
        Ok(())
    }

    /// A resource that it holds was made by the agent: the first of too many is let go of.
    pub(crate) fn made(&self, id: String) {
        let mut held = self.held();
        held.made.push_back(id);
        let first = if held.made.len() > MADE_MAX { held.made.pop_front() } else { None };
        drop(held);
        if let Some(first) = first {
            // The guest may have let go of it.
            let _ = self.unregister(&first, false);
        }
    }

    /// Resources, by name.
    pub(crate) fn list(&self) -> Vec<Arc<Resource>> {
        let held = self.held();
        let mut resources: Vec<_> =
            held.resources.values().map(|registration| Arc::clone(&registration.resource)).collect();
        resources.sort_by(|a, b| a.id.cmp(&b.id));
        resources
    }

    pub(crate) fn count(&self) -> usize {
        self.held().resources.len()
    }

    /// Holds a resource once more.
    pub(super) fn register(&self, resource: Arc<Resource>) {
        let mut held = self.held();
        for (_, object) in &resource.files {
            held.files.remove(&object.hash());
        }
        let times = held.resources.get(&resource.id).map_or(0, |registration| registration.times);
        held.resources.insert(resource.id.clone(), Registration { resource, times: times + 1 });
    }

    /// Holds a complete file until a resource does.
    pub(super) fn keep(&self, object: Arc<Object>) {
        self.held().files.insert(object.hash(), object);
    }

    /// Holds a part until it is complete.
    pub(super) fn upload(&self, part: &Arc<Part>) {
        let mut held = self.held();
        // Parts that another session completed.
        held.uploads.retain(|_, part| !part.has_ended());
        held.uploads.insert(part.name(), Arc::clone(part));
    }

    /// A part of the session is complete.
    pub(super) fn uploaded(&self, name: PartName) {
        self.held().uploads.remove(&name);
    }

    #[cfg(test)]
    pub(super) fn uploads(&self) -> usize {
        self.held().uploads.len()
    }
}
