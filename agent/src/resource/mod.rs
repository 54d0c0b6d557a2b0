//! Resources: immutable sets of files named by their content, uploaded in chunks, shared by a tenant's sessions.
//!
//! A file is stored once per tenant under its SHA-256, a resource under the SHA-256 of its kind and files. Sessions
//! hold resources, resources their files; what nobody holds stays on the disk as a cache. Nothing is shared between
//! tenants, so that no answer tells one tenant what another has.
//!
//! `disk` is the folder, `shelf` what one tenant has in it, `upload` and `read` the ways in and out, `holdings` what
//! one session has. All work on files is done by threads that may wait.

mod disk;
mod holdings;
mod read;
mod shelf;
#[cfg(test)]
mod tests;
mod threads;
mod upload;

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use vaccel_proto::Error;
use vaccel_proto::error::shown;
use vaccel_proto::limits::{CHUNK_BYTES_MAX, FILES_PER_RESOURCE_MAX, NAME_BYTES_MAX};
use vaccel_proto::v1::{File, MissingFile, ResourceKind};

use crate::backend::{LoadedModels, Reader};
use crate::config::{ConfigError, StoreConfig};
use crate::identity::{Tenant, hex};
use crate::quota::{Account, Hold, OBJECTS_MAX, Unit};
use disk::{Disk, PartName};
use shelf::{Index, Shelf};
use threads::Threads;

pub(crate) use holdings::Holdings;
pub(crate) use read::{Object, ReadBegin, Reading};
pub(crate) use upload::UploadBegin;

/// Room that is made at once when the disk turns out to be full: enough for the pieces under way, and little of what is
/// cached.
const FREED_BYTES: u64 = 64 << 20;

/// SHA-256 of a file's content.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Hash([u8; 32]);

impl Hash {
    /// # Errors
    /// `BAD_ARGUMENT` at `path` when it is not 32 bytes.
    pub(crate) fn new(path: &str, bytes: &[u8]) -> Result<Self, Error> {
        let wrong = |_| Error::field(path, "the 32 bytes of a SHA-256", format!("{} bytes", bytes.len()));
        bytes.try_into().map(Self).map_err(wrong)
    }
}

/// 64 hexadecimal digits.
impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0[..6]))
    }
}

/// One registered resource.
#[derive(Debug)]
pub(crate) struct Resource {
    /// 64 hexadecimal digits.
    pub(crate) id: String,
    pub(crate) kind: ResourceKind,
    pub(crate) files: Vec<(File, Arc<Object>)>,
    /// What engines made of it.
    pub(crate) loaded: LoadedModels,
    /// What it is to those who call models by name; it lasts as long as the resource.
    pub(crate) named: OnceLock<Arc<dyn Any + Send + Sync>>,
    _counted: Hold,
}

impl Resource {
    /// Its files, read and checked when a model is made of them.
    pub(crate) fn readers(&self) -> Vec<(String, Reader)> {
        let reader = |(file, object): &(File, Arc<Object>)| {
            let object = Arc::clone(object);
            let read: Reader = Box::new(move |cancel| object.load(cancel));
            (file.name.clone(), read)
        };
        self.files.iter().map(reader).collect()
    }
}

/// The answer to a wish to hold a resource.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) id: String,
    pub(crate) missing: Vec<MissingFile>,
}

/// What all tenants store. Clones are the same store.
#[derive(Clone, Debug)]
pub(crate) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    threads: Threads,
    disk: Disk,
    /// By the name of their folder.
    shelves: Mutex<HashMap<String, Arc<Shelf>>>,
    /// What all files may take together.
    bytes_max: u64,
    tenant_bytes_max: u64,
}

fn wrong_size(field: impl Into<String>, size: u64, claimed: u64) -> Error {
    Error::field(field, format!("the {size} bytes this file has"), claimed)
}

impl Store {
    /// Takes the store's folder for this process.
    ///
    /// # Errors
    /// It cannot be written, is not this user's, or another agent has it.
    pub(crate) fn open(config: &StoreConfig, tenant_bytes_max: u64) -> Result<Self, ConfigError> {
        let (disk, shelves, bytes_max) = (Disk::open(config)?, Mutex::default(), config.bytes_max);
        let threads = Threads::new();
        let threads = threads.map_err(|error| ConfigError::new(format!("the store's threads: {error}")))?;
        Ok(Self(Arc::new(Inner { threads, disk, shelves, bytes_max, tenant_bytes_max })))
    }

    fn shelves(&self) -> MutexGuard<'_, HashMap<String, Arc<Shelf>>> {
        self.0.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Shelf>> {
        self.shelves().values().cloned().collect()
    }

    fn shelf(&self, tenant: &Tenant) -> Arc<Shelf> {
        self.shelf_named(Disk::name(tenant))
    }

    fn shelf_named(&self, name: String) -> Arc<Shelf> {
        let mut shelves = self.shelves();
        let new = |name: &String| {
            let shelf = Shelf::new(self.0.disk.room(name), self.0.tenant_bytes_max, self.0.threads.clone());
            Arc::new(shelf)
        };
        Arc::clone(shelves.entry(name).or_insert_with_key(new))
    }

    /// Looks at what earlier agents left, so that it counts; meanwhile this one serves.
    pub(crate) async fn survey(&self) {
        let store = self.clone();
        let looking = self.0.threads.run(move || {
            store.0.disk.remove_emptied();
            for name in store.0.disk.tenants() {
                store.shelf_named(name).with(|_| ());
            }
            let is_over = || store.weight() > store.0.bytes_max;
            if is_over() {
                store.evict_while(None, is_over);
            }
            Ok(())
        });
        if let Err(error) = looking.await {
            tracing::error!(?error, "the store was not looked through");
        }
    }

    /// Removes what is too old, and forgets tenants that have nothing.
    pub(crate) async fn sweep(&self) {
        let store = self.clone();
        let sweeping = self.0.threads.run(move || {
            for shelf in store.all() {
                shelf.sweep();
            }
            store.shelves().retain(|_, shelf| {
                // What only the map has, nobody can be adding to.
                Arc::strong_count(shelf) > 1 || shelf.weight() > 0
            });
            Ok(())
        });
        if let Err(error) = sweeping.await {
            tracing::error!(?error, "the store was not swept");
        }
    }

    /// Bytes of a tenant that no session holds.
    pub(crate) async fn cached_bytes(&self, tenant: &Tenant) -> Result<u64, Error> {
        let shelf = self.shelf(tenant);
        self.0.threads.run(move || Ok(shelf.with(|index| index.idle_bytes()))).await
    }

    /// What all files take of the disk.
    fn weight(&self) -> u64 {
        self.shelves().values().map(|shelf| shelf.weight()).fold(0, u64::saturating_add)
    }

    /// Removes what nobody holds until the store's limit holds; false when that is not enough.
    fn make_room(&self, own: &Arc<Shelf>) -> bool {
        let is_over = || self.weight() > self.0.bytes_max;
        if is_over() {
            self.evict_while(Some(own), is_over);
        }
        !is_over()
    }

    /// Removes some of what nobody holds, because the disk is full. Returns whether there was any.
    fn free_some(&self, own: &Arc<Shelf>) -> bool {
        let before = self.weight();
        self.evict_while(Some(own), || self.weight().saturating_add(FREED_BYTES) > before)
    }

    /// Removes idle files as long as `more` says so: first those of the tenant that needs the room, so that nobody can
    /// empty the caches of others while it has one, then those of whoever has most.
    fn evict_while(&self, own: Option<&Arc<Shelf>>, more: impl Fn() -> bool) -> bool {
        let mut removed = own.is_some_and(|own| own.evict_while(&more));
        let mut others = self.all();
        // What was let go of since the last look is idle too.
        others.iter().for_each(|shelf| shelf.with(|_| ()));
        others.sort_by_key(|shelf| std::cmp::Reverse(shelf.idle()));
        for shelf in others {
            if !more() {
                break;
            }
            removed |= shelf.evict_while(&more);
        }
        removed
    }

    /// Lets a session hold a resource, or says which files must come first. Those that are there already are kept for
    /// the session meanwhile.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a kind, count, name, size or hash that cannot be, `QUOTA_EXCEEDED` for too many resources.
    pub(crate) async fn register(
        &self,
        tenant: &Tenant,
        holdings: &Arc<Holdings>,
        account: &Arc<Account>,
        kind: i32,
        files: Vec<File>,
    ) -> Result<Registered, Error> {
        let kind = check_manifest(kind, &files)?;
        let shelf = self.shelf(tenant);
        let (holdings, account) = (Arc::clone(holdings), Arc::clone(account));
        let register = move || {
            let id = resource_id(kind, &files);
            shelf.with(|index| {
                let (present, missing) = find(&shelf, index, &account, files)?;
                if missing.is_empty() {
                    holdings.register(index.resource(&id, kind, present, &account)?);
                } else {
                    present.into_iter().for_each(|(_, object)| holdings.keep(object));
                }
                Ok(Registered { id, missing })
            })
        };
        self.0.threads.run(register).await
    }

    /// Stores files that are here already as a resource that a session holds.
    ///
    /// # Errors
    /// Those of [`Store::register`] and [`Store::upload`].
    pub(crate) async fn add(
        &self,
        tenant: &Tenant,
        holdings: &Arc<Holdings>,
        account: &Arc<Account>,
        kind: ResourceKind,
        files: Vec<(String, Bytes)>,
    ) -> Result<Arc<Resource>, Error> {
        let described = files.iter().map(|(name, content)| File {
            name: name.clone(),
            sha256: Sha256::digest(content).to_vec().into(),
            size: content.len() as u64,
        });
        let described: Vec<File> = described.collect();
        let register = || self.register(tenant, holdings, account, kind.into(), described.clone());
        let registered = register().await?;
        if registered.missing.is_empty() {
            return holdings.resource(&registered.id);
        }
        for missing in registered.missing {
            let of_missing = |(file, _): &(&File, _)| file.sha256 == missing.sha256;
            let Some((_, (_, content))) = described.iter().zip(&files).find(of_missing) else { continue };
            let hash = Hash::new("file", &missing.sha256)?;
            let begin = UploadBegin { hash, size: content.len() as u64, offset: missing.offset };
            let mut uploading = self.upload(tenant, holdings, account, begin).await?;
            let begin = usize::try_from(missing.offset).unwrap_or(content.len()).min(content.len());
            let rest = content.slice(begin..);
            for at in (0..rest.len()).step_by(CHUNK_BYTES_MAX) {
                uploading.append(rest.slice(at..rest.len().min(at + CHUNK_BYTES_MAX))).await?;
            }
            uploading.finish().await?;
        }
        holdings.resource(&register().await?.id)
    }
}

type Present = Vec<(File, Arc<Object>)>;

/// The files of a resource that are there, and what is missing of the others.
fn find(
    shelf: &Arc<Shelf>,
    index: &mut Index,
    account: &Arc<Account>,
    files: Vec<File>,
) -> Result<(Present, Vec<MissingFile>), Error> {
    let mut present = Vec::with_capacity(files.len());
    let mut missing = Vec::new();
    for (number, file) in files.into_iter().enumerate() {
        let hash = Hash::new("files.sha256", &file.sha256)?;
        if let Some(size) = shelf.size_of(index, hash, file.size)
            && size != file.size
        {
            return Err(wrong_size(format!("files[{number}].size"), size, file.size));
        }
        match shelf.hold(index, hash, account)? {
            Some(object) => present.push((file, object)),
            None => {
                let offset = index.reached(PartName { hash, size: file.size }).min(file.size);
                missing.push(MissingFile { sha256: file.sha256, offset });
            }
        }
    }
    Ok((present, missing))
}

impl Index {
    /// The resource of these files; sessions share it.
    fn resource(
        &mut self,
        id: &str,
        kind: ResourceKind,
        files: Present,
        account: &Arc<Account>,
    ) -> Result<Arc<Resource>, Error> {
        let known = self.resources.get(id).and_then(std::sync::Weak::upgrade);
        // One with a file that was damaged since is no longer given out.
        if let Some(resource) = known.filter(|known| known.files.iter().all(|(_, file)| !file.is_lost())) {
            return Ok(resource);
        }
        let _counted = account.hold(Unit::Objects, 1)?;
        // Names of resources that are gone must not gather until the next sweep.
        if self.resources.len() as u64 > 2 * OBJECTS_MAX {
            self.resources.retain(|_, resource| resource.strong_count() > 0);
        }
        let (loaded, named) = (LoadedModels::default(), OnceLock::new());
        let resource = Arc::new(Resource { id: id.to_owned(), kind, files, loaded, named, _counted });
        self.resources.insert(id.to_owned(), Arc::downgrade(&resource));
        Ok(resource)
    }
}

fn check_manifest(kind: i32, files: &[File]) -> Result<ResourceKind, Error> {
    let kind = ResourceKind::try_from(kind).unwrap_or_default();
    if kind == ResourceKind::Unspecified {
        return Err(Error::field("kind", "MODEL, DATA or LIBRARY", "none of them"));
    }
    if files.is_empty() || files.len() > FILES_PER_RESOURCE_MAX {
        return Err(Error::field("files", format!("1 to {FILES_PER_RESOURCE_MAX} files"), files.len()));
    }
    for (index, file) in files.iter().enumerate() {
        let field = |name: &str| format!("files[{index}].{name}");
        if !is_label(&file.name) {
            let expected = format!("a relative name of 1 to {NAME_BYTES_MAX} bytes without `..`");
            return Err(Error::field(field("name"), expected, shown(&file.name)));
        }
        if files[..index].iter().any(|other| other.name == file.name) {
            return Err(Error::field(field("name"), "each name once", shown(&file.name)));
        }
        Hash::new(&field("sha256"), &file.sha256)?;
    }
    Ok(kind)
}

/// Whether a guest's file name can be a label: it is compared and shown, and never opened.
fn is_label(name: &str) -> bool {
    let parts_are_plain = name.split('/').all(|part| !matches!(part, "" | "." | ".."));
    parts_are_plain && name.len() <= NAME_BYTES_MAX && !name.contains(|c: char| c.is_control() || c == '\\')
}

fn resource_id(kind: ResourceKind, files: &[File]) -> String {
    let mut hasher = Sha256::new();
    hasher.update((kind as i32).to_le_bytes());
    for file in files {
        hasher.update((file.name.len() as u64).to_le_bytes());
        hasher.update(file.name.as_bytes());
        hasher.update(file.size.to_le_bytes());
        hasher.update(&file.sha256);
    }
    hex(&hasher.finalize())
}
