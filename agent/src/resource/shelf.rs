//! What one tenant has in the store: complete files, parts, and who holds them.
//!
//! The folder is the truth, the index its copy in memory: read when the tenant is first heard of, so that an agent with
//! a large store starts at once. Nothing is held that is not in the index, and what sessions do not hold is a cache: it
//! gives way, the longest unused first, when the tenant's quota, the store's limit or time asks for it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use vaccel_proto::{Error, Reason};

use super::Hash;
use super::Resource;
use super::disk::{Found, PartName, Room, now};
use super::read::Object;
use super::threads::Threads;
use super::upload::Part;
use crate::quota::{Account, Hold, OBJECTS_MAX, Unit};

/// Complete files that nobody used for so long are removed: a model that is in use at all is used every month.
const CACHED_FOR: Duration = Duration::from_secs(30 * 24 * 3600);

/// Parts that nobody added to for so long are removed: a guest that lost its connection is back the next day, or its
/// file was given up.
const PARTIAL_FOR: Duration = Duration::from_secs(24 * 3600);

/// How far the folder's times of use may be behind: an agent that is killed forgets no more than this, and a file in
/// use costs one system call an hour.
const TOUCH_AFTER: Duration = Duration::from_secs(3600);

/// What a file takes of a disk at least, in bytes: so the store's limit bounds also the number of files.
const BLOCK_BYTES: u64 = 4096;

/// A complete file.
#[derive(Debug)]
struct Stored {
    bytes: u64,
    /// When it was last held, in milliseconds since 1970; kept up to date by the object.
    used: Arc<AtomicU64>,
    /// The time of use that the folder has.
    touched: u64,
    /// Whether this process has seen the whole of its content.
    checked: bool,
    object: Weak<Object>,
}

/// A file that has not come whole.
#[derive(Debug)]
struct Unfinished {
    /// Bytes that are there.
    reached: Arc<AtomicU64>,
    /// When it last grew.
    used: Arc<AtomicU64>,
    part: Weak<Part>,
}

impl Unfinished {
    /// A part in a session's hands counts as what it will be.
    fn bytes(&self, name: PartName) -> u64 {
        if self.part.strong_count() > 0 { name.size } else { self.reached.load(Ordering::Relaxed) }
    }
}

/// The index of a tenant's folder.
#[derive(Debug, Default)]
pub(super) struct Index {
    stored: HashMap<Hash, Stored>,
    unfinished: HashMap<PartName, Unfinished>,
    pub(super) resources: HashMap<String, Weak<Resource>>,
}

/// Something that nobody holds.
#[derive(Clone, Copy, Debug)]
enum Idle {
    Complete(Hash),
    Partial(PartName),
}

impl Index {
    fn read(room: &Room) -> Self {
        let stored = |Found { name, bytes, used }| {
            let object = Weak::new();
            let stored = Stored { bytes, used: Arc::new(used.into()), touched: used, checked: false, object };
            (name, stored)
        };
        let unfinished = |Found { name, bytes, used }| {
            let (reached, used) = (Arc::new(bytes.into()), Arc::new(used.into()));
            (name, Unfinished { reached, used, part: Weak::new() })
        };
        Self {
            stored: room.list_complete().into_iter().map(stored).collect(),
            unfinished: room.list_partial().into_iter().map(unfinished).collect(),
            resources: HashMap::new(),
        }
    }

    /// Size of each file, and whether it is idle.
    fn sizes(&self) -> impl Iterator<Item = (u64, bool)> {
        let stored = self.stored.values().map(|file| (file.bytes, file.object.strong_count() == 0));
        let unfinished = self.unfinished.iter();
        stored.chain(unfinished.map(|(name, file)| (file.bytes(*name), file.part.strong_count() == 0)))
    }

    fn bytes(&self) -> u64 {
        self.sizes().map(|(bytes, _)| bytes).fold(0, u64::saturating_add)
    }

    /// Bytes that nobody holds.
    pub(super) fn idle_bytes(&self) -> u64 {
        self.sizes().filter(|(_, idle)| *idle).map(|(bytes, _)| bytes).fold(0, u64::saturating_add)
    }

    fn idle(&self) -> impl Iterator<Item = (Idle, u64)> {
        let stored = self.stored.iter().filter(|(_, file)| file.object.strong_count() == 0);
        let unfinished = self.unfinished.iter().filter(|(_, file)| file.part.strong_count() == 0);
        let stored = stored.map(|(hash, file)| (Idle::Complete(*hash), file.used.load(Ordering::Relaxed)));
        stored.chain(unfinished.map(|(name, file)| (Idle::Partial(*name), file.used.load(Ordering::Relaxed))))
    }

    fn remove(&mut self, idle: Idle, room: &Room) {
        match idle {
            Idle::Complete(hash) => {
                self.stored.remove(&hash);
                room.remove_complete(hash);
            }
            Idle::Partial(name) => self.discard(name, room),
        }
    }

    /// Removes what has been idle longest; false when everything is held.
    fn evict(&mut self, room: &Room) -> bool {
        let oldest = self.idle().min_by_key(|(_, used)| *used);
        if let Some((idle, _)) = oldest {
            tracing::debug!(store = %room.shown(), file = ?idle, "removed to make room");
            self.remove(idle, room);
        }
        oldest.is_some()
    }

    /// Removes idle files until the rest fits the tenant's quota.
    fn trim(&mut self, room: &Room, bytes_max: u64) -> bool {
        let fits = |index: &Self| {
            let files = (index.stored.len() + index.unfinished.len()) as u64;
            index.bytes() <= bytes_max && files <= OBJECTS_MAX
        };
        while !fits(self) {
            if !self.evict(room) {
                return false;
            }
        }
        true
    }

    /// Size of a complete file, and whether this process has seen its content.
    pub(super) fn complete(&self, hash: Hash) -> Option<(u64, bool)> {
        self.stored.get(&hash).map(|file| (file.bytes, file.checked))
    }

    /// Notes that a complete file's content was read and is what its name says.
    pub(super) fn checked(&mut self, hash: Hash) {
        if let Some(file) = self.stored.get_mut(&hash) {
            file.checked = true;
        }
    }

    /// Bytes that are there of a file that is not complete.
    pub(super) fn reached(&self, name: PartName) -> u64 {
        self.unfinished.get(&name).map_or(0, |file| file.reached.load(Ordering::Relaxed))
    }

    /// A part in a session's hands.
    pub(super) fn part(&self, name: PartName) -> Option<Arc<Part>> {
        self.unfinished.get(&name).and_then(|file| file.part.upgrade())
    }

    /// Forgets a complete file whose content is not what its name says, unless another one has its place.
    pub(super) fn lose(&mut self, hash: Hash, object: Option<&Object>, room: &Room) {
        let is_other = |file: &Stored| object.is_some_and(|lost| !std::ptr::eq(lost, file.object.as_ptr()));
        if self.stored.get(&hash).is_some_and(|file| !is_other(file)) {
            self.remove(Idle::Complete(hash), room);
        }
    }

    /// Forgets a part that was refused before anything of it came.
    pub(super) fn forget_unbegun(&mut self, name: PartName) {
        if self
            .unfinished
            .get(&name)
            .is_some_and(|file| file.bytes(name) == 0 && file.part.strong_count() == 0)
        {
            self.unfinished.remove(&name);
        }
    }

    /// Forgets a part.
    pub(super) fn discard(&mut self, name: PartName, room: &Room) {
        self.unfinished.remove(&name);
        room.remove_partial(name);
    }
}

/// What a tenant has in the store.
#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) room: Room,
    pub(super) threads: Threads,
    bytes_max: u64,
    /// None until it is asked for.
    index: Mutex<Option<Index>>,
    /// What the files take of the disk, as of the last look.
    weight: AtomicU64,
    /// The part of it that nobody holds.
    idle: AtomicU64,
}

impl Shelf {
    pub(super) fn new(room: Room, bytes_max: u64, threads: Threads) -> Self {
        let (index, weight, idle) = Default::default();
        Self { room, threads, bytes_max, index, weight, idle }
    }

    /// Works on the index. It may read and change the folder: for threads that may wait.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Index) -> T) -> T {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let index = index.get_or_insert_with(|| {
            let mut index = Index::read(&self.room);
            // The quota may be smaller than it was; nothing is held yet.
            index.trim(&self.room, self.bytes_max);
            index
        });
        let result = work(index);
        self.weigh(index);
        result
    }

    fn weigh(&self, index: &Index) {
        let (mut weight, mut idle) = (0_u64, 0_u64);
        for (bytes, is_idle) in index.sizes() {
            let takes = bytes.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX).max(BLOCK_BYTES);
            weight = weight.saturating_add(takes);
            idle = idle.saturating_add(if is_idle { takes } else { 0 });
        }
        self.weight.store(weight, Ordering::Relaxed);
        self.idle.store(idle, Ordering::Relaxed);
    }

    pub(super) fn weight(&self) -> u64 {
        self.weight.load(Ordering::Relaxed)
    }

    pub(super) fn idle(&self) -> u64 {
        self.idle.load(Ordering::Relaxed)
    }

    /// A handle that keeps a complete file.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` when the tenant holds too much.
    pub(super) fn hold(
        self: &Arc<Self>,
        index: &mut Index,
        hash: Hash,
        account: &Arc<Account>,
    ) -> Result<Option<Arc<Object>>, Error> {
        let Some(file) = index.stored.get_mut(&hash) else { return Ok(None) };
        if let Some(object) = file.object.upgrade() {
            return Ok(Some(object));
        }
        let counted = count(account, file.bytes)?;
        let object =
            Arc::new(Object::new(Arc::clone(self), hash, file.bytes, Arc::clone(&file.used), counted));
        file.object = Arc::downgrade(&object);
        Ok(Some(object))
    }

    /// A handle that keeps a part; what nobody holds gives way to it.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` when the tenant holds too much.
    pub(super) fn begin(
        &self,
        index: &mut Index,
        name: PartName,
        account: &Arc<Account>,
    ) -> Result<Arc<Part>, Error> {
        let counted = count(account, name.size)?;
        let file = index.unfinished.entry(name).or_insert_with(|| {
            let (reached, used) = (Arc::default(), Arc::new(now().into()));
            Unfinished { reached, used, part: Weak::new() }
        });
        let part = Part::new(name, Arc::clone(&file.reached), Arc::clone(&file.used), counted);
        let part = Arc::new(part);
        file.part = Arc::downgrade(&part);
        if index.trim(&self.room, self.bytes_max) {
            return Ok(part);
        }
        // Something is counted in the folder that no account counts: an object on its way out.
        let bytes = index.bytes();
        drop(part);
        index.forget_unbegun(name);
        let subject = "stored files of this tenant";
        Err(Error::limit(Reason::QuotaExceeded, subject, self.bytes_max, bytes, "bytes"))
    }

    /// Puts a part that came whole among the complete files.
    pub(super) fn complete(
        self: &Arc<Self>,
        index: &mut Index,
        name: PartName,
        counted: [Hold; 2],
    ) -> Arc<Object> {
        index.unfinished.remove(&name);
        let used = Arc::new(AtomicU64::new(now()));
        let object =
            Arc::new(Object::new(Arc::clone(self), name.hash, name.size, Arc::clone(&used), counted));
        let touched = used.load(Ordering::Relaxed);
        let file = Stored { bytes: name.size, used, touched, checked: true, object: Arc::downgrade(&object) };
        index.stored.insert(name.hash, file);
        object
    }

    /// Removes idle files, the oldest first, as long as `more` says so. Returns whether it removed any.
    pub(super) fn evict_while(&self, more: impl Fn() -> bool) -> bool {
        let mut removed = false;
        self.with(|index| {
            while more() && index.evict(&self.room) {
                removed = true;
                self.weigh(index);
            }
        });
        removed
    }

    /// Removes what is too old, and writes down what was used. Returns whether nothing is left.
    pub(super) fn sweep(&self) -> bool {
        let now = now();
        let is_past = |since: u64, time: Duration| u128::from(now.saturating_sub(since)) > time.as_millis();
        self.with(|index| {
            let old = |idle: &Idle, used: u64| match idle {
                Idle::Complete(_) => is_past(used, CACHED_FOR),
                Idle::Partial(_) => is_past(used, PARTIAL_FOR),
            };
            let idle: Vec<_> = index.idle().filter(|(idle, used)| old(idle, *used)).collect();
            for (idle, _) in idle {
                index.remove(idle, &self.room);
            }
            for (hash, file) in &mut index.stored {
                let is_held = file.object.strong_count() > 0;
                let used = if is_held { now } else { file.used.load(Ordering::Relaxed) };
                if u128::from(used.saturating_sub(file.touched)) > TOUCH_AFTER.as_millis() {
                    self.room.touch(*hash, used);
                    file.touched = used;
                }
            }
            index.resources.retain(|_, resource| resource.strong_count() > 0);
            let is_empty = index.stored.is_empty() && index.unfinished.is_empty();
            if is_empty {
                self.room.remove_if_empty();
            }
            is_empty
        })
    }
}

/// A file, counted by its bytes and as one.
fn count(account: &Arc<Account>, bytes: u64) -> Result<[Hold; 2], Error> {
    Ok([account.hold(Unit::ResourceBytes, bytes)?, account.hold(Unit::Objects, 1)?])
}
