//! Shared memory of callers on this machine: tensors that are read from, and written to, a region they made.
//!
//! A region is a file of POSIX shared memory whose owner is the caller's own user, so that nobody can name another
//! user's. Names of regions are the tenant's own. The file is read and written, not mapped: a caller that makes it
//! shorter meanwhile gets an error, and the agent no signal.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use vaccel_proto::inference::system_shared_memory_status_response::RegionStatus;
use vaccel_proto::limits::{MESSAGE_BYTES_MAX, NAME_BYTES_MAX};
use vaccel_proto::{Error, Reason};

use super::tensors::{Parameters, number, plain, text};
use crate::aside::aside;
use crate::identity::Tenant;
use crate::quota::{Account, Hold, Unit};

/// Where the C library keeps POSIX shared memory.
const FOLDER: &str = "/dev/shm";

/// Regions of one tenant: each is an open file.
const REGIONS_MAX: usize = 64;

/// The parameter that names a region.
pub(super) const REGION: &str = "shared_memory_region";

/// A place in a region.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) region: String,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Place {
    /// The place that a tensor's parameters name.
    ///
    /// # Errors
    /// Parameters of another type, or a region without a size.
    pub(super) fn of(parameters: &Parameters) -> Result<Option<Self>, Error> {
        let Some(region) = text(parameters, REGION)? else { return Ok(None) };
        let bytes = number(parameters, "shared_memory_byte_size")?.ok_or_else(|| {
            Error::new(
                Reason::BadArgument,
                "'shared_memory_byte_size' is missing beside 'shared_memory_region'",
            )
        })?;
        let offset = number(parameters, "shared_memory_offset")?.unwrap_or(0);
        Ok(Some(Self { region: region.into(), offset, bytes }))
    }
}

#[derive(Clone, Debug)]
struct Region {
    key: String,
    file: Arc<File>,
    offset: u64,
    bytes: u64,
}

/// What a call makes beside its message and its reply: counted before it is there, until the call is over.
#[derive(Debug)]
pub(super) struct Made<'a> {
    account: &'a Arc<Account>,
    held: Vec<Hold>,
}

impl<'a> Made<'a> {
    pub(super) fn new(account: &'a Arc<Account>) -> Self {
        Self { account, held: Vec::new() }
    }

    /// Counts a tensor of so many bytes that is about to be made.
    ///
    /// # Errors
    /// `MESSAGE_TOO_LARGE` for one that no message could bring, `QUOTA_EXCEEDED`.
    pub(super) fn claim(&mut self, what: &str, bytes: Option<usize>) -> Result<(), Error> {
        let (bytes, limit) = (bytes.map_or(u64::MAX, |bytes| bytes as u64), MESSAGE_BYTES_MAX as u64);
        if bytes > limit {
            return Err(Error::limit(Reason::MessageTooLarge, what, limit, bytes, "bytes"));
        }
        self.held.push(self.account.hold(Unit::InFlightBytes, bytes)?);
        Ok(())
    }

    /// Bytes that a run may answer with: what a message may have, and more where outputs go into so many bytes of
    /// shared memory, if the tenant may have as much in flight.
    pub(super) fn room(&mut self, message_bytes_max: u64, elsewhere: u64) -> u64 {
        if elsewhere <= message_bytes_max {
            return message_bytes_max;
        }
        let hold = self.account.hold(Unit::InFlightBytes, elsewhere);
        let room = if hold.is_ok() { elsewhere.saturating_add(message_bytes_max) } else { message_bytes_max };
        self.held.extend(hold);
        room
    }
}

/// Where the tensors of a call are that its message does not have.
#[derive(Debug)]
pub(super) struct Elsewhere<'a, 'b> {
    pub(super) regions: &'a Regions,
    pub(super) tenant: &'a Tenant,
    pub(super) made: &'a mut Made<'b>,
}

impl Elsewhere<'_, '_> {
    /// The bytes of a place.
    ///
    /// # Errors
    /// As [`Regions::read`].
    pub(super) async fn read(&mut self, place: &Place) -> Result<Bytes, Error> {
        self.regions.read(self.tenant, place, self.made).await
    }
}

/// All regions.
#[derive(Debug, Default)]
pub(crate) struct Regions(Mutex<HashMap<Tenant, HashMap<String, Region>>>);

/// Opens the memory that a key names.
fn open(key: &str) -> io::Result<File> {
    let name = key.strip_prefix('/').unwrap_or(key);
    let is_name = !name.is_empty() && !name.contains(['/', '\0']) && ![".", ".."].contains(&name);
    if !is_name || name.len() > NAME_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK);
    options.open(Path::new(FOLDER).join(name))
}

impl Regions {
    fn all(&self) -> MutexGuard<'_, HashMap<Tenant, HashMap<String, Region>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a region of the caller's own user.
    ///
    /// # Errors
    /// `DENIED` for callers that are not on this machine, `UNUSABLE` for
    /// memory that cannot be opened or is another user's, `ALREADY_EXISTS` for a name that is taken, `BAD_ARGUMENT`
    /// for a place outside of it.
    pub(crate) fn register(
        &self,
        tenant: &Tenant,
        uid: Option<u32>,
        name: &str,
        key: &str,
        offset: u64,
        bytes: u64,
    ) -> Result<(), Error> {
        let uid = uid.ok_or_else(|| {
            Error::new(Reason::Denied, "shared memory is for callers of a unix socket, on the same machine")
        })?;
        let shown = plain(name);
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            let message =
                format!("expected a name of 1 to {NAME_BYTES_MAX} bytes for the region, got {}", name.len());
            return Err(Error::new(Reason::BadArgument, message));
        }
        let unable = || {
            let message = format!("Unable to open shared memory region: '{}'", plain(key));
            Error::new(Reason::Unusable, message)
        };
        let file = open(key).map_err(|error| unable().caused_by(error))?;
        let meta = file.metadata().map_err(|error| unable().caused_by(error))?;
        if !meta.is_file() || meta.uid() != uid {
            return Err(unable().caused_by("not the caller's own"));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > meta.len()) || bytes == 0 {
            let message = format!("Invalid offset + byte size for shared memory region: '{shown}'");
            return Err(Error::new(Reason::BadArgument, message));
        }
        let mut all = self.all();
        let own = all.entry(tenant.clone()).or_default();
        if own.contains_key(name) {
            let message = format!("shared memory region '{shown}' already in manager");
            return Err(Error::new(Reason::AlreadyExists, message));
        }
        if own.len() >= REGIONS_MAX {
            let (limit, need) = (REGIONS_MAX as u64, own.len() as u64 + 1);
            return Err(Error::limit(
                Reason::QuotaExceeded,
                "shared memory of this tenant",
                limit,
                need,
                "regions",
            ));
        }
        let region = Region { key: key.into(), file: Arc::new(file), offset, bytes };
        own.insert(name.into(), region);
        Ok(())
    }

    /// Lets go of a region, or with an empty name of all the tenant's. One that is not there is gone already.
    pub(crate) fn unregister(&self, tenant: &Tenant, name: &str) {
        let mut all = self.all();
        if name.is_empty() {
            all.remove(tenant);
        } else if let Some(own) = all.get_mut(tenant) {
            own.remove(name);
        }
    }

    /// The tenant's regions, or the one with a name.
    ///
    /// # Errors
    /// `NOT_FOUND`.
    pub(crate) fn status(&self, tenant: &Tenant, name: &str) -> Result<HashMap<String, RegionStatus>, Error> {
        let all = self.all();
        let own = all.get(tenant).into_iter().flatten();
        let found: HashMap<String, RegionStatus> = own
            .filter(|(own, _)| name.is_empty() || *own == name)
            .map(|(name, region)| {
                let Region { key, offset, bytes, .. } = region.clone();
                (name.clone(), RegionStatus { name: name.clone(), key, offset, byte_size: bytes })
            })
            .collect();
        if !name.is_empty() && found.is_empty() {
            return Err(missing(name));
        }
        Ok(found)
    }

    fn find(&self, tenant: &Tenant, place: &Place) -> Result<Region, Error> {
        let found = self.all().get(tenant).and_then(|own| own.get(&place.region)).cloned();
        let region = found.ok_or_else(|| missing(&place.region))?;
        if place.offset.checked_add(place.bytes).is_none_or(|end| end > region.bytes) {
            let message =
                format!("Invalid offset + byte size for shared memory region: '{}'", plain(&place.region));
            return Err(Error::new(Reason::BadArgument, message));
        }
        Ok(region)
    }

    /// The bytes of a place.
    ///
    /// # Errors
    /// `NOT_FOUND`, `BAD_ARGUMENT` for a place outside of the region, `QUOTA_EXCEEDED`.
    async fn read(&self, tenant: &Tenant, place: &Place, made: &mut Made<'_>) -> Result<Bytes, Error> {
        let region = self.find(tenant, place)?;
        // It counts against its tenant, and not against what a message may have.
        let length = usize::try_from(place.bytes).map_err(|error| shorter(&place.region).caused_by(error))?;
        let hold = made.account.hold(Unit::InFlightBytes, place.bytes)?;
        let (file, at, name) = (region.file, region.offset + place.offset, place.region.clone());
        let read = move || {
            let mut data = vec![0; length];
            file.read_exact_at(&mut data, at).map_err(|error| shorter(&name).caused_by(error))?;
            Ok((data.into(), hold))
        };
        let (data, hold) = aside(length, read).await?;
        made.held.push(hold);
        Ok(data)
    }

    /// Puts an output in its place.
    ///
    /// # Errors
    /// As [`read`](Self::read), and for a place that is too small.
    pub(super) async fn write(
        &self,
        tenant: &Tenant,
        place: &Place,
        output: &str,
        data: Bytes,
    ) -> Result<(), Error> {
        let region = self.find(tenant, place)?;
        if (data.len() as u64) > place.bytes {
            let message = format!(
                "shared memory size specified with the request for output '{output}' ({} bytes) should be at least \
                 {} bytes to hold the results",
                place.bytes,
                data.len()
            );
            return Err(Error::new(Reason::Unusable, message));
        }
        // What was made shorter stays so.
        let there = region.file.metadata().map(|meta| meta.len()).unwrap_or(0);
        let (begin, length) = (region.offset + place.offset, data.len());
        if begin + length as u64 > there {
            return Err(shorter(&place.region));
        }
        let name = place.region.clone();
        let written =
            move || region.file.write_all_at(&data, begin).map_err(|error| shorter(&name).caused_by(error));
        aside(length, written).await
    }
}

fn missing(name: &str) -> Error {
    Error::new(Reason::NotFound, format!("Unable to find shared memory region: '{}'", plain(name)))
}

fn shorter(name: &str) -> Error {
    let message = format!("shared memory region '{}' is shorter than when it was registered", plain(name));
    Error::new(Reason::BadArgument, message)
}
