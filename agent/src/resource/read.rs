//! Complete files as sessions hold them: read to be loaded, and read back by guests. Whatever leaves here has the hash
//! that is its name; a file that has not is removed, and its guest told to upload it again.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use vaccel_proto::error::{Detail, shown};
use vaccel_proto::limits::CHUNK_BYTES_MAX;
use vaccel_proto::{Error, Reason};

use super::disk::{self, READ_BYTES, failed, is_foreign, now};
use super::shelf::{Index, Shelf};
use super::{Hash, Resource};
use crate::quota::Hold;
use crate::scheduler::Cancel;

/// A complete file that somebody holds.
#[derive(Debug)]
pub(crate) struct Object {
    shelf: Arc<Shelf>,
    hash: Hash,
    size: u64,
    used: Arc<AtomicU64>,
    /// Its content was found to be something else: whoever registers it now gets another object.
    lost: AtomicBool,
    /// The file as it was when all of it was last read and right.
    checked: Mutex<Option<Stamp>>,
    _counted: [Hold; 2],
}

/// What changes when a file is written to.
type Stamp = (u64, u64, i64, i64);

fn stamp(file: &File) -> io::Result<Stamp> {
    let metadata = file.metadata()?;
    Ok((metadata.ino(), metadata.len(), metadata.ctime(), metadata.ctime_nsec()))
}

impl Drop for Object {
    fn drop(&mut self) {
        self.used.store(now(), Ordering::Relaxed);
    }
}

impl Object {
    pub(super) fn new(
        shelf: Arc<Shelf>,
        hash: Hash,
        size: u64,
        used: Arc<AtomicU64>,
        counted: [Hold; 2],
    ) -> Self {
        used.store(now(), Ordering::Relaxed);
        let (lost, checked) = Default::default();
        Self { shelf, hash, size, used, lost, checked, _counted: counted }
    }

    pub(super) fn hash(&self) -> Hash {
        self.hash
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// The content, for a thread that may wait.
    ///
    /// # Errors
    /// `NOT_FOUND` when the file was damaged, `BACKEND_FAILED` when it cannot be read, `CANCELLED`.
    pub(crate) fn load(&self, cancel: &Cancel) -> Result<Bytes, Error> {
        let mut file = self.open()?;
        let mut content = Vec::new();
        let no_memory = |error| {
            Error::new(Reason::BackendFailed, "no memory for a file of the resource").caused_by(error)
        };
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        content.try_reserve_exact(size).map_err(no_memory)?;
        let mut hasher = Sha256::new();
        while content.len() < size {
            cancel.check()?;
            let begin = content.len();
            let wanted = (size - begin).min(READ_BYTES) as u64;
            let count = (&mut file).take(wanted).read_to_end(&mut content);
            if count.map_err(|error| failed("reading a file", error))? == 0 {
                break;
            }
            hasher.update(&content[begin..]);
        }
        if hasher.finalize()[..] != self.hash.0 {
            return Err(self.lose("its content has another hash"));
        }
        tracing::debug!(store = %self.shelf.room.shown(), file = %self.hash, "file read to be loaded");
        Ok(content.into())
    }

    fn open(&self) -> Result<File, Error> {
        if self.is_lost() {
            return Err(self.was_lost());
        }
        let opened = self.shelf.room.open_complete(self.hash);
        let opened = opened.and_then(|file| Ok((file.metadata()?.len(), file)));
        match opened {
            Ok((size, file)) if size == self.size => Ok(file),
            Ok(_) => Err(self.lose("it has another size")),
            Err(error) if is_foreign(&error) || error.kind() == io::ErrorKind::NotFound => {
                Err(self.lose(&error.to_string()))
            }
            Err(error) => Err(failed("opening a file", error)),
        }
    }

    /// The file, all of which was found to be right since it last changed.
    fn open_checked(&self, stop: impl Fn() -> bool) -> Result<File, Error> {
        let mut file = self.open()?;
        let reading = |error| failed("reading a file", error);
        // Who comes second waits for the first one's finding.
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&file).map_err(reading)?;
        if *checked != Some(now) {
            let (hasher, _) = disk::hash(&mut file, self.size, stop).map_err(reading)?;
            if hasher.finalize()[..] != self.hash.0 {
                drop(checked);
                return Err(self.lose("its content has another hash"));
            }
            *checked = Some(now);
        }
        Ok(file)
    }

    fn lose(&self, why: &str) -> Error {
        let store = self.shelf.room.shown();
        tracing::error!(%store, file = %self.hash, why, "a stored file was damaged and is removed");
        self.lost.store(true, Ordering::Relaxed);
        self.shelf.with(|index| index.lose(self.hash, Some(self), &self.shelf.room));
        self.was_lost()
    }

    fn was_lost(&self) -> Error {
        let message = format!(
            "the file {} of this resource was damaged on the agent's disk; register the resource again and upload it",
            self.hash
        );
        let detail = Detail::Resource { kind: "file".into(), name: self.hash.to_string() };
        Error::new(Reason::NotFound, message).with(detail)
    }
}

impl Shelf {
    /// Size of a complete file. One that is not of the `claimed` size, and that this process has not read, is read
    /// first: the guest may be wrong or the disk, and what is not right is as absent.
    pub(super) fn size_of(&self, index: &mut Index, hash: Hash, claimed: u64) -> Option<u64> {
        let (size, is_checked) = index.complete(hash)?;
        if size == claimed || is_checked {
            return Some(size);
        }
        let content =
            self.room.open_complete(hash).and_then(|mut file| disk::hash(&mut file, size, || false));
        if content.is_ok_and(|(hasher, _)| hasher.finalize()[..] == hash.0) {
            index.checked(hash);
            return Some(size);
        }
        tracing::error!(store = %self.room.shown(), file = %hash, "a stored file was damaged and is removed");
        index.lose(hash, None, &self.room);
        None
    }
}

/// Which bytes of a resource are asked for.
#[derive(Debug)]
pub(crate) struct ReadBegin {
    /// Name of the file; may be empty when there is one.
    pub(crate) file: String,
    pub(crate) offset: u64,
    /// 0 for all that follow.
    pub(crate) length: u64,
}

/// A file on its way to a guest.
#[derive(Debug)]
pub(crate) struct Reading {
    /// Kept from being removed.
    object: Arc<Object>,
    file: Arc<File>,
    offset: u64,
    end: u64,
}

impl Resource {
    /// Begins to read a file, after all of it was found to be right.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a name or an offset that the resource does not have, and those of [`Object::load`].
    pub(crate) async fn read(&self, begin: ReadBegin) -> Result<Reading, Error> {
        let found = match (&*self.files, begin.file.as_str()) {
            ([only], "") => Some(only),
            (files, name) => files.iter().find(|(file, _)| file.name == name),
        };
        let Some((_, object)) = found else {
            return Err(Error::field("file", "the name of a file of the resource", shown(&begin.file)));
        };
        let (offset, size) = (begin.offset, object.size);
        if offset > size {
            return Err(Error::field("offset", format!("at most the {size} bytes of the file"), offset));
        }
        let end = if begin.length == 0 { size } else { offset.saturating_add(begin.length).min(size) };
        let stopped = Arc::new(AtomicBool::new(false));
        let _stop = super::upload::Stop(Arc::clone(&stopped));
        let opened = Arc::clone(object);
        let open = move || opened.open_checked(|| stopped.load(Ordering::Relaxed));
        let file = object.shelf.threads.run(open).await?;
        Ok(Reading { object: Arc::clone(object), file: Arc::new(file), offset, end })
    }
}

impl Reading {
    /// The next piece; none at the end.
    ///
    /// # Errors
    /// Those of [`Object::load`].
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let left = self.end - self.offset;
        if left == 0 {
            return Ok(None);
        }
        let length = usize::try_from(left).map_or(CHUNK_BYTES_MAX, |left| left.min(CHUNK_BYTES_MAX));
        let (object, file, offset) = (Arc::clone(&self.object), Arc::clone(&self.file), self.offset);
        let read = move || {
            let mut piece = vec![0; length];
            match file.read_exact_at(&mut piece, offset) {
                Ok(()) => Ok(Bytes::from(piece)),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    Err(object.lose("it became shorter while it was read"))
                }
                Err(error) => Err(failed("reading a file", error)),
            }
        };
        let piece = self.object.shelf.threads.run(read).await?;
        self.offset += piece.len() as u64;
        Ok(Some(piece))
    }
}
