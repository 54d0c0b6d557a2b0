//! The store's folder: who may use it, where things lie in it, how they are opened, and what a failure means.
//!
//! ```text
//! STORE/lock                              held by the agent that uses the store
//! STORE/v1/TENANT/complete/SHA256         0400, the content has this hash
//! STORE/v1/TENANT/partial/SHA256.SIZE     0600, what has come of a file of this size
//! ```
//!
//! TENANT is the SHA-256 of the tenant's name. No part of a path comes from a guest: hashes are made into digits here,
//! and names of files are labels. A complete file appears by a rename and never changes.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};
use vaccel_proto::{Error, Reason};

use super::Hash;
use crate::config::{ConfigError, StoreConfig, StoreSync};
use crate::identity::{Tenant, hex};

/// The layout above. Another one gets another folder, so that an older agent never reads what it does not know.
const LAYOUT: &str = "v1";
const LOCK: &str = "lock";
/// What an emptied store held is moved aside under names that begin so, and removed while the agent serves.
const EMPTIED: &str = "emptied";

const COMPLETE: &str = "complete";
const PARTIAL: &str = "partial";

/// Only the agent's own user reads what guests stored.
const FOLDER_MODE: u32 = 0o700;
const PARTIAL_MODE: u32 = 0o600;
const COMPLETE_MODE: u32 = 0o400;

/// Bytes read at once: large enough that system calls cost nothing.
pub(super) const READ_BYTES: usize = 1 << 20;

/// A folder that this agent has to itself.
#[derive(Debug)]
pub(super) struct Disk {
    folder: PathBuf,
    root: PathBuf,
    sync: StoreSync,
    /// Locked until the process ends, however it ends.
    _lock: File,
}

impl Disk {
    /// Takes the folder, and makes it if there is none.
    pub(super) fn open(config: &StoreConfig) -> Result<Self, ConfigError> {
        let folder = config.folder.clone();
        let refuse = |what: &str| ConfigError::new(format!("--store {}: {what}", folder.display()));
        let failed = |error: io::Error| refuse(&format!("{error}; name a folder this agent may write"));
        make_folder(&folder).map_err(failed)?;
        let lock = lock(&folder, &refuse)?;
        let root = folder.join(LAYOUT);
        let disk = Self { folder: folder.clone(), root, sync: config.sync, _lock: lock };
        if config.sync == StoreSync::Never {
            disk.empty().map_err(failed)?;
        }
        make_folder(&disk.root).map_err(failed)?;
        if !is_private(&disk.root).map_err(failed)? {
            let root = disk.root.display();
            return Err(refuse(&format!("{root} is not a folder of this agent's user; remove or rename it")));
        }
        Ok(disk)
    }

    /// Moves what is there aside: that takes no time, however much it is.
    fn empty(&self) -> io::Result<()> {
        let aside = (0..u32::MAX).map(|n| self.folder.join(format!("{EMPTIED}.{n}")));
        let Some(aside) = aside.into_iter().find(|path| fs::symlink_metadata(path).is_err()) else {
            return Ok(());
        };
        match fs::rename(&self.root, aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes what [`Self::empty`] moved aside, now or in an earlier life.
    pub(super) fn remove_emptied(&self) {
        for name in names(&self.folder).into_iter().filter(|name| name.starts_with(EMPTIED)) {
            if let Err(error) = fs::remove_dir_all(self.folder.join(&name)) {
                tracing::warn!(%error, name, "the store's old content cannot be removed");
            }
        }
    }

    /// Names of the folders of all tenants.
    pub(super) fn tenants(&self) -> Vec<String> {
        names(&self.root).into_iter().filter(|name| parse_hash(name).is_some()).collect()
    }

    /// The folder's name of a tenant.
    pub(super) fn name(tenant: &Tenant) -> String {
        hex(&Sha256::digest(tenant.to_string()))
    }

    pub(super) fn room(&self, name: &str) -> Room {
        Room { folder: self.root.join(name), sync: self.sync }
    }
}

/// The lock says who has the store, for whoever comes second.
fn lock(folder: &Path, refuse: &impl Fn(&str) -> ConfigError) -> Result<File, ConfigError> {
    let path = folder.join(LOCK);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(PARTIAL_MODE);
    let mut file =
        options.custom_flags(libc::O_NOFOLLOW).open(&path).map_err(|error| refuse(&error.to_string()))?;
    match file.try_lock() {
        Ok(()) => {
            let written = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
            written.map_err(|error| refuse(&error.to_string()))?;
            Ok(file)
        }
        Err(fs::TryLockError::WouldBlock) => {
            let mut owner = String::new();
            // Written just before, or never: the message does without.
            let _ = (&mut file).take(20).read_to_string(&mut owner);
            let owner = owner.parse::<u32>().map_or(String::new(), |pid| format!(" (process {pid})"));
            Err(refuse(&format!("another agent{owner} uses it; give this one a folder of its own")))
        }
        Err(fs::TryLockError::Error(error)) => Err(refuse(&format!("cannot be locked: {error}"))),
    }
}

/// Whether a folder is one, and our user's, and nobody else's: in a folder that all may write to, anybody can have put
/// it there before.
fn is_private(folder: &Path) -> io::Result<bool> {
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() {
        return Ok(false);
    }
    let probe = folder.join("probe");
    let _ = fs::remove_file(&probe);
    let made = OpenOptions::new().write(true).create_new(true).mode(PARTIAL_MODE).open(&probe)?;
    fs::remove_file(&probe)?;
    if made.metadata()?.uid() != found.uid() {
        return Ok(false);
    }
    fs::set_permissions(folder, Permissions::from_mode(FOLDER_MODE))?;
    Ok(true)
}

/// Whether a path is a folder, and no link to one.
fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
}

fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// What is stored of a file, and of which size it will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PartName {
    pub(super) hash: Hash,
    pub(super) size: u64,
}

/// One file as the folder shows it.
#[derive(Debug)]
pub(super) struct Found<N> {
    pub(super) name: N,
    pub(super) bytes: u64,
    /// Milliseconds since 1970 when it was last used.
    pub(super) used: u64,
}

/// The folder of one tenant.
#[derive(Debug)]
pub(super) struct Room {
    folder: PathBuf,
    sync: StoreSync,
}

impl Room {
    fn complete(&self, hash: Hash) -> PathBuf {
        self.folder.join(COMPLETE).join(hash.to_string())
    }

    fn partial(&self, part: PartName) -> PathBuf {
        self.folder.join(PARTIAL).join(format!("{}.{}", part.hash, part.size))
    }

    /// For the log.
    pub(super) fn shown(&self) -> std::path::Display<'_> {
        self.folder.display()
    }

    pub(super) fn list_complete(&self) -> Vec<Found<Hash>> {
        if !is_folder(&self.folder) {
            return Vec::new();
        }
        list(&self.folder.join(COMPLETE), parse_hash)
    }

    pub(super) fn list_partial(&self) -> Vec<Found<PartName>> {
        if !is_folder(&self.folder) {
            return Vec::new();
        }
        list(&self.folder.join(PARTIAL), |name| {
            let (hash, size) = name.split_once('.')?;
            let part = PartName { hash: parse_hash(hash)?, size: size.parse().ok()? };
            (part.size.to_string() == size).then_some(part)
        })
    }

    pub(super) fn open_complete(&self, hash: Hash) -> io::Result<File> {
        open(&self.complete(hash), false)
    }

    /// What has come of a file, or an empty beginning of it.
    pub(super) fn open_partial(&self, part: PartName) -> io::Result<File> {
        let path = self.partial(part);
        match open(&path, true) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if is_foreign(&error) => fs::remove_file(&path)?,
            Err(error) => return Err(error),
        }
        for folder in [self.folder.clone(), self.folder.join(COMPLETE), self.folder.join(PARTIAL)] {
            make_folder(&folder)?;
            if !is_folder(&folder) {
                return Err(io::Error::new(
                    io::ErrorKind::NotADirectory,
                    "a link stands for a folder of the store",
                ));
            }
            if self.sync == StoreSync::Always {
                sync_folder(folder.parent().unwrap_or(&folder))?;
            }
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(PARTIAL_MODE).open(path)
    }

    /// Makes sure that the machine has a file's bytes, where that is asked for.
    pub(super) fn settle(&self, file: &File) -> io::Result<()> {
        if self.sync == StoreSync::Always { file.sync_all() } else { Ok(()) }
    }

    /// Makes a part complete: on return it is there under its hash, whatever happens to this process.
    pub(super) fn rename_partial(&self, part: PartName, file: &File) -> io::Result<()> {
        fs::rename(self.partial(part), self.complete(part.hash))?;
        // The mode keeps people from mistakes; a file whose mode is another one is as good.
        let _ = file.set_permissions(Permissions::from_mode(COMPLETE_MODE));
        Ok(())
    }

    /// Makes sure that the machine has the names of the complete files, where that is asked for.
    pub(super) fn settle_names(&self) -> io::Result<()> {
        if self.sync == StoreSync::Always { sync_folder(&self.folder.join(COMPLETE)) } else { Ok(()) }
    }

    pub(super) fn remove_complete(&self, hash: Hash) {
        self.remove(&self.complete(hash));
    }

    pub(super) fn remove_partial(&self, part: PartName) {
        self.remove(&self.partial(part));
    }

    fn remove(&self, path: &Path) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(%error, path = %path.display(), "a file of the store cannot be removed");
            }
            _ => {}
        }
    }

    /// Remembers beyond this process when a complete file was used.
    pub(super) fn touch(&self, hash: Hash, used: u64) {
        let time = UNIX_EPOCH + Duration::from_millis(used);
        let touched = self.open_complete(hash).and_then(|file| file.set_modified(time));
        if let Err(error) = touched {
            tracing::warn!(%error, store = %self.shown(), "the time of a file's use cannot be kept");
        }
    }

    /// Removes the folders when nothing is in them.
    pub(super) fn remove_if_empty(&self) {
        for folder in [self.folder.join(COMPLETE), self.folder.join(PARTIAL), self.folder.clone()] {
            // One that is not empty stays.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// The regular files of a folder whose names `parse`. What else has such a name was not made by an agent.
fn list<N>(folder: &Path, parse: impl Fn(&str) -> Option<N>) -> Vec<Found<N>> {
    let mut found = Vec::new();
    let names = if is_folder(folder) { names(folder) } else { Vec::new() };
    for name in names {
        let path = folder.join(&name);
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        match parse(&name) {
            Some(name) if metadata.is_file() => {
                found.push(Found { name, bytes: metadata.len(), used: millis(metadata.modified().ok()) });
            }
            _ => tracing::warn!(path = %path.display(), "not a file of the store; it is left alone"),
        }
    }
    found
}

/// Milliseconds since 1970; 0 for a time that is not known or earlier.
fn millis(time: Option<SystemTime>) -> u64 {
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn now() -> u64 {
    millis(Some(SystemTime::now()))
}

fn parse_hash(digits: &str) -> Option<Hash> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if digits.len() != 64 || !digits.bytes().all(is_digit) {
        return None;
    }
    let mut hash = [0; 32];
    for (index, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(Hash(hash))
}

/// Opens a regular file that has no second name: never what a link leads to, and never something that waits.
fn open(path: &Path, write: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = options.read(true).write(write).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.nlink() == 1 {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file with one name"))
}

/// Whether [`open`] met something that no agent made.
pub(super) fn is_foreign(error: &io::Error) -> bool {
    let foreign = [libc::ELOOP, libc::ENXIO, libc::EISDIR];
    error.kind() == io::ErrorKind::InvalidData || error.raw_os_error().is_some_and(|e| foreign.contains(&e))
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// The hash of the next `bytes` of a file, or of those there are, with their number; `stop` ends it early.
pub(super) fn hash(
    file: &mut impl Read,
    bytes: u64,
    stop: impl Fn() -> bool,
) -> Result<(Sha256, u64), io::Error> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut reached = 0;
    while reached < bytes {
        if stop() {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "nobody waits for it"));
        }
        let wanted = usize::try_from(bytes - reached).map_or(READ_BYTES, |left| left.min(READ_BYTES));
        match file.read(&mut buffer[..wanted]) {
            Ok(0) => break,
            Ok(count) => {
                hasher.update(&buffer[..count]);
                reached += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok((hasher, reached))
}

/// Whether a failure would pass if something else were removed.
pub(super) fn lacks_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What a guest is told of a failure; the cause, which may name paths, is for the log.
pub(super) fn failed(doing: &str, error: io::Error) -> Error {
    match error.kind() {
        _ if lacks_room(&error) => no_room().caused_by(error),
        // A limit on the size of files: the file system's or the process's.
        io::ErrorKind::FileTooLarge => no_room().caused_by(error),
        io::ErrorKind::Interrupted => Error::new(Reason::Cancelled, format!("nobody waited for {doing}")),
        _ => {
            Error::new(Reason::BackendFailed, format!("the agent's store failed at {doing}")).caused_by(error)
        }
    }
}

/// The agent's own limit, or its disk's. It has no figures: what others store is nobody's business.
pub(super) fn no_room() -> Error {
    let message = "the agent's store is full; what came so far is kept: try again when others stored less, or ask \
                   the agent's operator for room";
    Error::new(Reason::QuotaExceeded, message)
}
