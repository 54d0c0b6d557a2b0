//! Resources: immutable sets of files named by their content, uploaded in chunks, shared by a tenant's sessions.
//!
//! A file is stored once per tenant under its SHA-256, a resource under the SHA-256 of its kind and files. Sessions
//! hold both; when the last one lets go, the bytes are freed. Nothing is shared between tenants, so that no answer
//! tells one tenant what another has.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use vaccel_proto::error::{Detail, shown};
use vaccel_proto::limits::{FILES_PER_RESOURCE_MAX, NAME_BYTES_MAX};
use vaccel_proto::v1::{File, MissingFile, ResourceKind};
use vaccel_proto::{Error, Reason};

use crate::backend::LoadedModels;
use crate::identity::{Tenant, hex};
use crate::quota::{Account, Hold, Unit};

/// When a second upload of a file should look whether the first one is done.
const UPLOAD_RETRY_AFTER: Duration = Duration::from_millis(50);

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

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0[..6]))
    }
}

/// One complete file.
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) data: Bytes,
    _counted: [Hold; 2],
}

/// One registered resource.
#[derive(Debug)]
pub(crate) struct Resource {
    /// 64 hexadecimal digits.
    pub(crate) id: String,
    pub(crate) kind: ResourceKind,
    pub(crate) files: Vec<(File, Arc<Blob>)>,
    /// What engines made of it.
    pub(crate) loaded: LoadedModels,
    _counted: Hold,
}

/// A file on its way.
#[derive(Debug)]
pub(crate) struct Upload {
    size: u64,
    received: Vec<u8>,
    hasher: Sha256,
    /// Its declared size, and itself.
    counted: [Hold; 2],
}

/// What one session holds.
#[derive(Debug, Default)]
pub(crate) struct Holdings(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    resources: HashMap<String, Arc<Resource>>,
    /// Complete files that no resource of the session names yet.
    files: HashMap<Hash, Arc<Blob>>,
    uploads: HashMap<Hash, Arc<tokio::sync::Mutex<Option<Upload>>>>,
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
        self.held().resources.get(id).cloned().ok_or_else(|| Error::not_found("resource", id))
    }

    /// Lets go of a resource.
    ///
    /// # Errors
    /// `NOT_FOUND`, also for another session's or tenant's.
    pub(crate) fn unregister(&self, id: &str) -> Result<(), Error> {
        let removed = self.held().resources.remove(id);
        removed.map(drop).ok_or_else(|| Error::not_found("resource", id))
    }

    /// Resources, by name.
    pub(crate) fn list(&self) -> Vec<Arc<Resource>> {
        let mut resources: Vec<_> = self.held().resources.values().cloned().collect();
        resources.sort_by(|a, b| a.id.cmp(&b.id));
        resources
    }

    pub(crate) fn count(&self) -> usize {
        self.held().resources.len()
    }
}

/// What all tenants store, by name. It owns nothing: sessions do.
#[derive(Debug, Default)]
pub(crate) struct Store(Mutex<HashMap<Tenant, Shelf>>);

#[derive(Debug, Default)]
struct Shelf {
    files: HashMap<Hash, Weak<Blob>>,
    resources: HashMap<String, Weak<Resource>>,
}

/// The answer to a wish to hold a resource.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) id: String,
    pub(crate) missing: Vec<MissingFile>,
}

impl Store {
    fn with_shelf<T>(&self, tenant: &Tenant, work: impl FnOnce(&mut Shelf) -> T) -> T {
        let mut shelves = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        work(shelves.entry(tenant.clone()).or_default())
    }

    fn file(&self, tenant: &Tenant, hash: Hash) -> Option<Arc<Blob>> {
        self.with_shelf(tenant, |shelf| shelf.files.get(&hash).and_then(Weak::upgrade))
    }

    /// Forgets names whose content is gone.
    pub(crate) fn sweep(&self) {
        let mut shelves = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shelves.retain(|_, shelf| {
            shelf.files.retain(|_, file| file.strong_count() > 0);
            shelf.resources.retain(|_, resource| resource.strong_count() > 0);
            !shelf.files.is_empty() || !shelf.resources.is_empty()
        });
    }

    /// Lets a session hold a resource, or says which files must come first.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a kind, count, name, size or hash that cannot be, `QUOTA_EXCEEDED` for too many resources.
    pub(crate) fn register(
        &self,
        tenant: &Tenant,
        holdings: &Holdings,
        account: &Arc<Account>,
        kind: i32,
        files: Vec<File>,
    ) -> Result<Registered, Error> {
        let kind = check_manifest(kind, &files)?;
        let id = resource_id(kind, &files);
        let mut present = Vec::with_capacity(files.len());
        let mut missing = Vec::new();
        for (index, file) in files.into_iter().enumerate() {
            let hash = Hash::new("files.sha256", &file.sha256)?;
            match self.file(tenant, hash) {
                Some(blob) if blob.data.len() as u64 == file.size => present.push((file, blob)),
                Some(blob) => {
                    let expected = format!("the {} bytes this file has", blob.data.len());
                    return Err(Error::field(format!("files[{index}].size"), expected, file.size));
                }
                None => {
                    let offset = received(holdings, hash);
                    missing.push(MissingFile { sha256: file.sha256, offset });
                }
            }
        }
        if missing.is_empty() {
            let resource = self.with_shelf(tenant, |shelf| {
                if let Some(resource) = shelf.resources.get(&id).and_then(Weak::upgrade) {
                    return Ok(resource);
                }
                let _counted = account.hold(Unit::Objects, 1)?;
                let loaded = LoadedModels::default();
                let resource = Arc::new(Resource { id: id.clone(), kind, files: present, loaded, _counted });
                shelf.resources.insert(id.clone(), Arc::downgrade(&resource));
                Ok::<_, Error>(resource)
            })?;
            let mut held = holdings.held();
            for (file, _) in &resource.files {
                held.files.remove(&Hash::new("files.sha256", &file.sha256)?);
            }
            held.resources.insert(id.clone(), resource);
        }
        Ok(Registered { id, missing })
    }

    /// Begins an upload or goes on with one, at the offset the session has reached.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for another offset, `QUOTA_EXCEEDED` when the file does not fit, `OVERLOADED` while another call
    /// of the session uploads it.
    pub(crate) fn upload(
        &self,
        tenant: &Tenant,
        holdings: &Holdings,
        account: &Arc<Account>,
        begin: UploadBegin,
    ) -> Result<Uploading, Error> {
        // Complete already: the session keeps it, and nothing more is read.
        if let Some(blob) = self.file(tenant, begin.hash) {
            let mut held = holdings.held();
            held.uploads.remove(&begin.hash);
            held.files.insert(begin.hash, blob);
            return Ok(Uploading { begin, upload: None });
        }
        let mut held = holdings.held();
        let known = held.uploads.get(&begin.hash).cloned();
        let busy = || {
            let message = "another call of this session is uploading this file; try again shortly";
            Error::new(Reason::Overloaded, message).with(Detail::RetryAfter(UPLOAD_RETRY_AFTER))
        };
        let known = known.map(|slot| slot.try_lock_owned().map_err(|_| busy())).transpose()?;
        let (reached, size) = known
            .as_ref()
            .and_then(|slot| slot.as_ref())
            .map_or((0, begin.size), |upload| (upload.received.len() as u64, upload.size));
        if begin.offset != reached {
            return Err(Error::field("offset", reached, begin.offset));
        }
        if begin.size != size {
            return Err(Error::field("size", size, begin.size));
        }
        let upload = match known {
            Some(slot) if slot.is_some() => slot,
            _ => {
                let counted =
                    [account.hold(Unit::ResourceBytes, begin.size)?, account.hold(Unit::Objects, 1)?];
                let upload = Upload { size, received: Vec::new(), hasher: Sha256::new(), counted };
                let slot = Arc::new(tokio::sync::Mutex::new(Some(upload)));
                held.uploads.insert(begin.hash, Arc::clone(&slot));
                slot.try_lock_owned().map_err(|_| busy())?
            }
        };
        Ok(Uploading { begin, upload: Some(upload) })
    }

    /// Keeps a finished upload.
    fn keep(&self, tenant: &Tenant, holdings: &Holdings, hash: Hash, upload: Upload) {
        let blob = Arc::new(Blob { data: Bytes::from(upload.received), _counted: upload.counted });
        self.with_shelf(tenant, |shelf| shelf.files.insert(hash, Arc::downgrade(&blob)));
        holdings.held().files.insert(hash, blob);
    }
}

/// What the first message of an upload says.
#[derive(Debug)]
pub(crate) struct UploadBegin {
    pub(crate) hash: Hash,
    pub(crate) size: u64,
    pub(crate) offset: u64,
}

/// An upload that this call has to itself.
pub(crate) struct Uploading {
    begin: UploadBegin,
    /// None when the file is complete.
    upload: Option<tokio::sync::OwnedMutexGuard<Option<Upload>>>,
}

impl Uploading {
    /// Adds a chunk.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when more comes than the file's size.
    pub(crate) fn append(&mut self, chunk: &[u8]) -> Result<(), Error> {
        let Some(upload) = self.upload.as_mut().and_then(|slot| slot.as_mut()) else { return Ok(()) };
        let total = upload.received.len() as u64 + chunk.len() as u64;
        if total > upload.size {
            return Err(Error::field(
                "data",
                format!("at most the {} bytes of the file", upload.size),
                total,
            ));
        }
        upload.hasher.update(chunk);
        upload.received.extend_from_slice(chunk);
        Ok(())
    }

    /// Ends the call: bytes the agent has now. A file whose last byte came is checked against its name and kept.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when the content is not what its name says; the upload begins anew then.
    pub(crate) fn finish(
        mut self,
        store: &Store,
        tenant: &Tenant,
        holdings: &Holdings,
    ) -> Result<u64, Error> {
        let Some(slot) = self.upload.as_mut() else { return Ok(self.begin.size) };
        let reached = slot.as_ref().map_or(0, |upload| upload.received.len() as u64);
        if slot.as_ref().is_some_and(|upload| reached < upload.size) {
            return Ok(reached);
        }
        let Some(upload) = slot.take() else { return Ok(reached) };
        holdings.held().uploads.remove(&self.begin.hash);
        let found: [u8; 32] = upload.hasher.clone().finalize().into();
        if found != self.begin.hash.0 {
            return Err(Error::new(
                Reason::BadArgument,
                format!(
                    "sha256: expected {}, the uploaded bytes have {}",
                    hex(&self.begin.hash.0),
                    hex(&found)
                ),
            )
            .with(Detail::Field("sha256".into())));
        }
        store.keep(tenant, holdings, self.begin.hash, upload);
        Ok(reached)
    }
}

fn received(holdings: &Holdings, hash: Hash) -> u64 {
    let slot = holdings.held().uploads.get(&hash).cloned();
    // An upload that is running now is asked for again from its beginning; its own stream moves the offset on.
    let reached =
        slot.as_ref().and_then(|slot| slot.try_lock().ok()?.as_ref().map(|upload| upload.received.len()));
    reached.unwrap_or(0) as u64
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TenantLimits;
    use crate::quota::Accounts;

    const CONTENT: &[u8] = b"the content of a file";

    struct Setting {
        store: Store,
        tenant: Tenant,
        account: Arc<Account>,
    }

    impl Setting {
        fn new() -> Self {
            let limits = TenantLimits {
                connections: 1,
                sessions: 9,
                calls: 1,
                resource_bytes: 64,
                in_flight_bytes: 1,
            };
            let tenant = Tenant::new("a");
            let account = Accounts::new(limits).of(&tenant);
            Self { store: Store::default(), tenant, account }
        }

        async fn put(&self, holdings: &Holdings, offset: u64, data: &[u8]) -> Result<u64, Error> {
            let hash = Hash(Sha256::digest(CONTENT).into());
            let begin = UploadBegin { hash, size: CONTENT.len() as u64, offset };
            let mut uploading = self.store.upload(&self.tenant, holdings, &self.account, begin)?;
            uploading.append(data)?;
            uploading.finish(&self.store, &self.tenant, holdings)
        }

        fn register(&self, holdings: &Holdings) -> Registered {
            self.store
                .register(&self.tenant, holdings, &self.account, ResourceKind::Data.into(), vec![file("f")])
                .expect("valid")
        }
    }

    fn file(name: &str) -> File {
        let sha256 = Bytes::copy_from_slice(&Sha256::digest(CONTENT));
        File { name: name.into(), size: CONTENT.len() as u64, sha256 }
    }

    #[tokio::test]
    async fn an_upload_goes_on_where_it_stopped_and_is_shared() {
        let setting = Setting::new();
        let (first, second) = (Holdings::default(), Holdings::default());
        assert_eq!(setting.register(&first).missing[0].offset, 0);
        assert_eq!(setting.put(&first, 0, &CONTENT[..4]).await.expect("part"), 4);
        assert_eq!(setting.register(&first).missing[0].offset, 4);
        assert!(setting.put(&first, 0, CONTENT).await.is_err(), "the offset is 4 now");
        assert_eq!(setting.put(&first, 4, &CONTENT[4..]).await.expect("rest"), CONTENT.len() as u64);
        let registered = setting.register(&first);
        assert!(registered.missing.is_empty());
        assert!(setting.register(&second).missing.is_empty(), "a second session needs no upload");
        first.unregister(&registered.id).expect("held");
        second.resource(&registered.id).expect("the second session still holds it");
        assert_eq!(setting.account.used(Unit::ResourceBytes), CONTENT.len() as u64);
        drop((first, second));
        assert_eq!(setting.account.used(Unit::ResourceBytes), 0);
        setting.store.sweep();
        assert!(setting.store.0.lock().expect("not poisoned").is_empty());
    }

    #[tokio::test]
    async fn wrong_content_is_refused_and_begins_anew() {
        let setting = Setting::new();
        let holdings = Holdings::default();
        let wrong = vec![b'x'; CONTENT.len()];
        assert_eq!(
            setting.put(&holdings, 0, &wrong).await.expect_err("not its hash").reason(),
            Reason::BadArgument
        );
        assert_eq!(setting.account.used(Unit::ResourceBytes), 0);
        let long = [CONTENT, b"!"].concat();
        assert!(setting.put(&holdings, 0, &long).await.is_err());
        setting.put(&holdings, 0, CONTENT).await.expect("right content");
    }

    #[tokio::test]
    async fn quota_is_taken_from_the_declared_size() {
        let setting = Setting::new();
        let holdings = Holdings::default();
        for (size, offset, reason) in [(65, 0, Reason::QuotaExceeded), (9, 1, Reason::BadArgument)] {
            let begin = UploadBegin { hash: Hash([0; 32]), size, offset };
            let refusal = setting.store.upload(&setting.tenant, &holdings, &setting.account, begin);
            assert_eq!(refusal.err().expect("refused").reason(), reason);
        }
        assert!(holdings.held().uploads.is_empty(), "a refusal leaves nothing behind");
        assert_eq!(setting.account.used(Unit::ResourceBytes) + setting.account.used(Unit::Objects), 0);
    }

    #[tokio::test]
    async fn resources_over_the_same_bytes_are_counted() {
        let setting = Setting::new();
        let holdings = Holdings::default();
        setting.put(&holdings, 0, CONTENT).await.expect("fits");
        let register = |name: String| {
            let kind = ResourceKind::Data.into();
            setting.store.register(&setting.tenant, &holdings, &setting.account, kind, vec![file(&name)])
        };
        // Each name makes another resource of the one file.
        let refused = (0..).map(|n| register(format!("f{n}"))).find_map(Result::err).expect("bounded");
        assert_eq!(refused.reason(), Reason::QuotaExceeded);
        let held = holdings.list();
        holdings.unregister(&held[0].id).expect("held");
        drop(held);
        register("another".into()).expect("one was given back");
    }

    #[test]
    fn names_are_labels_and_never_paths() {
        for name in ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/", "a\\b", "a\0b", "a\nb"] {
            assert!(!is_label(name), "{name:?}");
        }
        assert!(is_label("model.onnx") && is_label("weights/part-1.bin"));
        let setting = Setting::new();
        let twice = vec![file("f"), file("f")];
        let kind = ResourceKind::Model.into();
        assert!(
            setting
                .store
                .register(&setting.tenant, &Holdings::default(), &setting.account, kind, twice)
                .is_err()
        );
    }
}
