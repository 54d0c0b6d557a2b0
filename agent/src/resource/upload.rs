//! Uploads: pieces of a file go to the disk as they come, hashed on the way; the whole appears among the complete files
//! by one rename, after its hash was found to be its name.
//!
//! A part belongs to the tenant. Sessions that want the same file share it, one call at a time adds to it, and what has
//! come stays when the call, the session or the agent ends; then its next upload hashes what is there and goes on.
//! Files are read and written on threads that may wait; while one piece is written the next one arrives.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::JoinHandle;
use vaccel_proto::error::Detail;
use vaccel_proto::{Error, Reason};

use super::disk::{self, PartName, failed, now};
use super::read::Object;
use super::shelf::Shelf;
use super::threads::ended;
use super::{Hash, Holdings, Store, wrong_size};
use crate::identity::{Tenant, hex};
use crate::quota::{Account, Hold};

/// How long a second upload of a file waits for the first one: small files are there by then.
const TURN_WAIT: Duration = Duration::from_millis(250);

/// When a second upload of a file should look whether the first one is done. Meanwhile it takes up none of its tenant's
/// calls.
const UPLOAD_RETRY_AFTER: Duration = Duration::from_millis(500);

/// A file on its way.
#[derive(Debug)]
pub(crate) struct Part {
    name: PartName,
    /// Bytes that are there; the shelf's index has it too.
    reached: Arc<AtomicU64>,
    used: Arc<AtomicU64>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    /// Of the bytes that are there; none until they were read.
    hasher: Option<Sha256>,
    /// Whether bytes of it were read from the disk and not from a guest.
    was_kept: bool,
    /// Its declared size, and itself; none when the part is no more.
    counted: Option<[Hold; 2]>,
}

impl Part {
    pub(super) fn new(
        name: PartName,
        reached: Arc<AtomicU64>,
        used: Arc<AtomicU64>,
        counted: [Hold; 2],
    ) -> Self {
        let state = State { hasher: None, was_kept: false, counted: Some(counted) };
        Self { name, reached, used, state: Arc::new(Mutex::new(state)) }
    }

    pub(super) fn name(&self) -> PartName {
        self.name
    }

    /// Whether it became a complete file or was given up.
    pub(super) fn has_ended(&self) -> bool {
        self.state.try_lock().is_ok_and(|state| state.counted.is_none())
    }
}

/// What the first message of an upload says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UploadBegin {
    pub(crate) hash: Hash,
    pub(crate) size: u64,
    pub(crate) offset: u64,
}

/// How an upload starts.
enum Start {
    Complete,
    Part(Arc<Part>),
}

/// An upload that this call has to itself.
pub(crate) struct Uploading {
    begin: UploadBegin,
    /// Where in the file the next piece of the guest is.
    position: u64,
    /// None when the file is complete.
    writing: Option<Writing>,
}

/// The one writer of a part.
struct Writing {
    store: Store,
    shelf: Arc<Shelf>,
    holdings: Arc<Holdings>,
    part: Arc<Part>,
    /// None while a piece is written.
    idle: Option<Writer>,
    busy: Option<JoinHandle<(Writer, Result<(), Error>)>>,
}

/// What a thread needs to write.
struct Writer {
    state: OwnedMutexGuard<State>,
    part: Arc<Part>,
    file: File,
}

/// Stops the reading of a file when nobody waits for it any more.
pub(super) struct Stop(pub(super) Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn busy() -> Error {
    let message = "another call is uploading this file; register it again shortly";
    Error::new(Reason::Overloaded, message).with(Detail::RetryAfter(UPLOAD_RETRY_AFTER))
}

impl Store {
    /// Begins an upload or goes on with one.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for an offset beyond what is there, `QUOTA_EXCEEDED` when the file does not fit, `OVERLOADED`
    /// while another call uploads it.
    pub(crate) async fn upload(
        &self,
        tenant: &Tenant,
        holdings: &Arc<Holdings>,
        account: &Arc<Account>,
        begin: UploadBegin,
    ) -> Result<Uploading, Error> {
        let position = begin.offset;
        // Once more when the part that it waited for has ended.
        for _ in 0..2 {
            let shelf = self.shelf(tenant);
            let started = {
                let (store, shelf) = (self.clone(), Arc::clone(&shelf));
                let (holdings, account) = (Arc::clone(holdings), Arc::clone(account));
                self.0.threads.run(move || store.start(&shelf, &holdings, &account, begin)).await?
            };
            let Start::Part(part) = started else {
                return Ok(Uploading { begin, position, writing: None });
            };
            let turn = Arc::clone(&part.state).lock_owned();
            let state = tokio::time::timeout(TURN_WAIT, turn).await.map_err(|_| busy())?;
            if state.counted.is_none() {
                continue;
            }
            let stopped = Arc::new(AtomicBool::new(false));
            let _stop = Stop(Arc::clone(&stopped));
            let writer = {
                let (shelf, part) = (Arc::clone(&shelf), Arc::clone(&part));
                self.0.threads.run(move || Writer::open(&shelf, part, state, &stopped)).await?
            };
            if begin.offset > part.reached.load(Ordering::Relaxed) {
                // Less is there than the index said: part of it was lost.
                return Err(busy());
            }
            let (store, holdings) = (self.clone(), Arc::clone(holdings));
            let writing = Writing { store, shelf, holdings, part, idle: Some(writer), busy: None };
            return Ok(Uploading { begin, position, writing: Some(writing) });
        }
        Err(busy())
    }

    fn start(
        &self,
        shelf: &Arc<Shelf>,
        holdings: &Holdings,
        account: &Arc<Account>,
        begin: UploadBegin,
    ) -> Result<Start, Error> {
        let name = PartName { hash: begin.hash, size: begin.size };
        let part = shelf.with(|index| {
            if let Some(size) = shelf.size_of(index, begin.hash, begin.size) {
                if size != begin.size {
                    return Err(wrong_size("size", size, begin.size));
                }
                // Complete already: the session keeps it, and nothing more is read.
                let object = shelf.hold(index, begin.hash, account)?;
                object.into_iter().for_each(|object| holdings.keep(object));
                return Ok(None);
            }
            let reached = index.reached(name);
            if begin.offset > reached {
                return Err(Error::field("offset", reached, begin.offset));
            }
            let part = index.part(name);
            part.map_or_else(|| shelf.begin(index, name, account), Ok).map(Some)
        })?;
        let Some(part) = part else { return Ok(Start::Complete) };
        if !self.make_room(shelf) {
            drop(part);
            shelf.with(|index| index.forget_unbegun(name));
            return Err(disk::no_room());
        }
        holdings.upload(&part);
        Ok(Start::Part(part))
    }
}

impl Writer {
    /// Opens the part at its end, after reading what no hasher of this process has seen.
    fn open(
        shelf: &Shelf,
        part: Arc<Part>,
        mut state: OwnedMutexGuard<State>,
        stopped: &AtomicBool,
    ) -> Result<Self, Error> {
        let opening = |error| failed("opening a part", error);
        let mut file = shelf.room.open_partial(part.name).map_err(opening)?;
        let there = file.metadata().map_err(opening)?.len();
        let reached = part.reached.load(Ordering::Relaxed);
        if state.hasher.is_none() || there < reached {
            // More than the whole is nothing of it.
            let wanted = if there > part.name.size { 0 } else { there };
            let stop = || stopped.load(Ordering::Relaxed);
            let (hasher, found) = disk::hash(&mut file, wanted, stop)
                .map_err(|error| failed("reading what is there of a part", error))?;
            part.reached.store(found, Ordering::Relaxed);
            (state.hasher, state.was_kept) = (Some(hasher), found > 0);
        }
        let reached = part.reached.load(Ordering::Relaxed);
        // A piece that was not written whole is not there.
        file.set_len(reached).map_err(opening)?;
        file.seek(SeekFrom::Start(reached)).map_err(opening)?;
        Ok(Self { state, part, file })
    }

    fn write(&mut self, data: &[u8], store: &Store, shelf: &Arc<Shelf>) -> Result<(), Error> {
        let mut rest = data;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // What nobody holds gives way.
                Err(error) if disk::lacks_room(&error) && store.free_some(shelf) => {}
                Err(error) => {
                    let taken = &data[..data.len() - rest.len()];
                    self.wrote(taken);
                    return Err(failed("writing a piece of a file", error));
                }
            }
        }
        self.wrote(data);
        Ok(())
    }

    fn wrote(&mut self, data: &[u8]) {
        if let Some(hasher) = &mut self.state.hasher {
            hasher.update(data);
        }
        self.part.reached.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.part.used.store(now(), Ordering::Relaxed);
    }

    /// Checks the whole file and makes it complete, or removes it.
    fn complete(mut self, shelf: &Arc<Shelf>) -> Result<Arc<Object>, Error> {
        let name = self.part.name;
        let Some(hasher) = self.state.hasher.take() else { return Err(busy()) };
        let found: [u8; 32] = hasher.finalize().into();
        if found != name.hash.0 {
            shelf.with(|index| index.discard(name, &shelf.room));
            self.state.counted = None;
            return Err(mismatch(name.hash, found, self.state.was_kept));
        }
        let keeping = |error| failed("keeping a file", error);
        shelf.room.settle(&self.file).map_err(keeping)?;
        let object = shelf.with(|index| {
            shelf.room.rename_partial(name, &self.file).map_err(keeping)?;
            // It was here since the part began, and only this call can take it.
            let counted = self.state.counted.take().ok_or_else(busy)?;
            Ok::<_, Error>(shelf.complete(index, name, counted))
        })?;
        shelf.room.settle_names().map_err(keeping)?;
        Ok(object)
    }
}

fn mismatch(expected: Hash, found: [u8; 32], was_kept: bool) -> Error {
    if was_kept {
        // Either side may have brought the wrong bytes; the guest gets a second chance with its own alone.
        let message =
            "what was kept of this file was damaged and is removed; register it again to begin anew";
        return Error::new(Reason::Overloaded, message).with(Detail::RetryAfter(UPLOAD_RETRY_AFTER));
    }
    let message = format!("sha256: expected {expected}, the uploaded bytes have {}", hex(&found));
    Error::new(Reason::BadArgument, message).with(Detail::Field("sha256".into()))
}

impl Writing {
    /// The writer, when it has written what it was given.
    async fn writer(&mut self) -> Result<Writer, Error> {
        if let Some(writing) = self.busy.take() {
            let (writer, outcome) = ended(writing.await)?;
            outcome?;
            return Ok(writer);
        }
        self.idle.take().ok_or_else(busy)
    }
}

impl Uploading {
    /// Adds a piece; what is there already is skipped.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when more comes than the file's size, `QUOTA_EXCEEDED` when the disk is full.
    pub(crate) async fn append(&mut self, piece: Bytes) -> Result<(), Error> {
        let Some(writing) = &mut self.writing else { return Ok(()) };
        let (from, size) = (self.position, self.begin.size);
        let to = from + piece.len() as u64;
        if to > size {
            return Err(Error::field("data", format!("at most the {size} bytes of the file"), to));
        }
        self.position = to;
        let mut writer = writing.writer().await?;
        let reached = writing.part.reached.load(Ordering::Relaxed);
        // No more than the piece, which is in memory.
        let known = usize::try_from(reached.saturating_sub(from)).unwrap_or(usize::MAX).min(piece.len());
        let new = piece.slice(known..);
        if new.is_empty() {
            writing.idle = Some(writer);
            return Ok(());
        }
        let (store, shelf) = (writing.store.clone(), Arc::clone(&writing.shelf));
        let threads = &writing.shelf.threads;
        writing.busy = Some(threads.start(move || {
            let outcome = writer.write(&new, &store, &shelf);
            (writer, outcome)
        })?);
        Ok(())
    }

    /// Ends the call: bytes the agent has now. A file whose last byte came is checked against its name and kept.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when the content is not what its name says; the upload begins anew then.
    pub(crate) async fn finish(mut self) -> Result<u64, Error> {
        let size = self.begin.size;
        let Some(mut writing) = self.writing.take() else { return Ok(size) };
        let writer = writing.writer().await?;
        let reached = writing.part.reached.load(Ordering::Relaxed);
        if reached < size {
            return Ok(reached);
        }
        let Writing { shelf, holdings, part, .. } = writing;
        let threads = shelf.threads.clone();
        let keep = move || {
            let object = writer.complete(&shelf)?;
            holdings.keep(object);
            holdings.uploaded(part.name());
            Ok(())
        };
        threads.run(keep).await?;
        Ok(size)
    }
}
