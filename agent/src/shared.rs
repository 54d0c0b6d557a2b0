//! Memory that callers on this machine share with the agent, for tensors that would take longer through a socket.
//!
//! The agent makes it, so that it is what it says: sealed against getting shorter, and named by nothing but a number
//! that nobody can guess. A tenant's regions are counted against its limit and found by nobody else.
//!
//! What lies in a region can change while it is read. Where operations do nothing but arithmetic on it, any numbers are
//! as good as others, and they read it there. An engine of models is foreign code that may check a number and then read
//! it again (an index, a size, the order in a sort): it gets a copy, for which the tenant is charged. One that makes
//! its own copy before it looks takes it straight from the region: tract, and whatever runs on a device. Text, and
//! numbers that are relied on, are copied for everybody.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
pub(crate) use vaccel_client::shared::Mapping;
use vaccel_client::shared::REGION;
use vaccel_proto::carrier::{Aligned, Carrier, Content};
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::{Place, RunReply, RunRequest, Shared, Tensor};
use vaccel_proto::{Error, Reason};

use crate::identity::Tenant;
use crate::pool::Pool;
use crate::quota::{Account, Hold, Unit};

/// Tensors of a reply that are put in the room, in bytes: shorter ones are as fast in the message.
const PLACED_BYTES_MIN: usize = 16 << 10;

/// Random bytes of a name.
const NAME_BYTES: usize = 16;

/// All regions.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedMemory {
    regions: Arc<Mutex<Regions>>,
    /// For copies.
    pool: Pool,
}

/// Whether whoever runs an operation can be trusted with numbers that change: those that compute with them, whatever
/// they are, by their own requests or as generic ones, and runs of models, for which the caller of [`Room::own`]
/// answers.
fn is_in_place(request: &RunRequest) -> bool {
    use Op::{FpgaArraycopy, FpgaMmult, FpgaParallel, FpgaVectoradd, Genop, Minmax, Sgemm, TorchSgemm};
    use Op::{ModelRun, TfModelRun, TfliteModelRun, TorchModelRun};
    let op = request.op.as_ref();
    op.is_some_and(|op| {
        let computes = matches!(
            op,
            Sgemm(_)
                | TorchSgemm(_)
                | Minmax(_)
                | FpgaArraycopy(_)
                | FpgaMmult(_)
                | FpgaParallel(_)
                | FpgaVectoradd(_)
                | Genop(_)
        );
        computes || matches!(op, ModelRun(_) | TfModelRun(_) | TfliteModelRun(_) | TorchModelRun(_))
    })
}

type Regions = HashMap<Tenant, HashMap<String, Arc<Mapping>>>;

/// A region as its owner's connection has it: gone when that is.
#[derive(Debug)]
pub(crate) struct Region {
    memory: SharedMemory,
    tenant: Tenant,
    name: String,
    file: File,
    _counted: Hold,
}

impl Region {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let mut all = self.memory.all();
        let Some(regions) = all.get_mut(&self.tenant) else { return };
        let gone = regions.remove(&self.name);
        if regions.is_empty() {
            all.remove(&self.tenant);
        }
        // Others have theirs meanwhile: to unpin a large one takes a tenth of a second.
        drop(all);
        drop(gone);
    }
}

impl SharedMemory {
    /// No regions; what has to be copied goes to buffers of the pool.
    pub(crate) fn new(pool: Pool) -> Self {
        Self { regions: Arc::default(), pool }
    }

    fn all(&self) -> MutexGuard<'_, Regions> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a region of a tenant's.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`; `BAD_ARGUMENT` for no bytes; `UNUSABLE` when the system has none.
    pub(crate) fn make(&self, tenant: &Tenant, account: &Arc<Account>, bytes: u64) -> Result<Region, Error> {
        if bytes == 0 {
            return Err(Error::field("bytes", "a number of 1 or more", bytes));
        }
        let counted = account.hold(Unit::SharedBytes, bytes)?;
        let unusable =
            |error: std::io::Error| Error::new(Reason::Unusable, "no memory to share").caused_by(error);
        let file = sealed(bytes).map_err(unusable)?;
        let length =
            usize::try_from(bytes).map_err(|_| Error::field("bytes", "less than all memory", bytes))?;
        let mapping = Mapping::new(&file, length).map_err(unusable)?;
        let name = random_name()?;
        self.all().entry(tenant.clone()).or_default().insert(name.clone(), mapping);
        Ok(Region { memory: self.clone(), tenant: tenant.clone(), name, file, _counted: counted })
    }

    /// Gives the tensors of a request their data, or its arguments theirs: views of the region for arithmetic, for runs
    /// of models, and where `is_unread` says that nobody looks at it, else copies. Returns where those of the reply go.
    ///
    /// # Errors
    /// `NOT_FOUND` for a region that is none of the tenant's, `BAD_ARGUMENT` for places outside of it,
    /// `QUOTA_EXCEEDED`.
    pub(crate) fn fill(
        &self,
        tenant: &Tenant,
        account: &Arc<Account>,
        request: &mut RunRequest,
        is_unread: bool,
    ) -> Result<Option<Arc<Room>>, Error> {
        let Some(Shared { region, places, room }) = request.shared.take() else { return Ok(None) };
        let is_in_place = is_unread || is_in_place(request);
        let mut counted = account.hold(Unit::InFlightBytes, 0)?;
        let mapping = self.all().get(tenant).and_then(|regions| regions.get(&region)).cloned();
        let mapping = mapping.ok_or_else(|| Error::not_found(REGION, &region))?;
        let range = |path: &dyn Fn() -> String, place: &Place| {
            let begin = usize::try_from(place.offset).ok();
            let end = begin.and_then(|begin| begin.checked_add(usize::try_from(place.bytes).ok()?));
            let range =
                begin.zip(end).map(|(begin, end)| begin..end).filter(|range| range.end <= mapping.bytes());
            range.ok_or_else(|| {
                let got = format!("{} bytes at {}", place.bytes, place.offset);
                Error::field(path(), format!("a place in the region's {} bytes", mapping.bytes()), got)
            })
        };
        let carriers = request.lendable_mut();
        if !places.is_empty() && places.len() != carriers.len() {
            let expected = format!("as many as the {} tensors or arguments, or none", carriers.len());
            return Err(Error::field("shared.places", expected, places.len()));
        }
        let named = places.iter().zip(carriers).enumerate().filter(|(_, (place, _))| place.bytes > 0);
        for (index, (place, carrier)) in named {
            let path = || format!("shared.places[{index}]");
            let is_in_place = match carrier.content() {
                Content::Numbers => is_in_place,
                Content::Bytes => is_unread,
                Content::Checked => false,
            };
            let Some(data) = carrier.data_mut() else { continue };
            if !data.is_empty() {
                return Err(Error::field(path(), "no place for what has data", place.bytes));
            }
            let range = range(&path, place)?;
            let view = mapping.view(range).unwrap_or_default();
            *data = if is_in_place { view } else { copy(&self.pool, &mut counted, &view)? };
        }
        let room = room
            .filter(|room| room.bytes > 0)
            .map(|room| range(&|| "shared.room".into(), &room))
            .transpose()?;
        let (counted, rest) = (Mutex::new(counted), Mutex::new(room.unwrap_or(0..0)));
        Ok(Some(Arc::new(Room { mapping: Arc::clone(&mapping), pool: self.pool.clone(), rest, counted })))
    }
}

/// A name that nobody guesses.
///
/// # Errors
/// `UNUSABLE`: the system has no random numbers.
pub(crate) fn random_name() -> Result<String, Error> {
    let mut name = [0; NAME_BYTES];
    getrandom::fill(&mut name)
        .map_err(|error| Error::new(Reason::Unusable, "no random numbers").caused_by(error.to_string()))?;
    Ok(format!("{:032x}", u128::from_be_bytes(name)))
}

/// A copy of what lies in a region, which is counted.
fn copy(pool: &Pool, counted: &mut Hold, view: &[u8]) -> Result<Bytes, Error> {
    counted.grow(view.len() as u64)?;
    let mut copy = pool.take(view.len());
    copy.put(view);
    Ok(copy.freeze())
}

/// A file in memory that nobody can make shorter.
fn sealed(bytes: u64) -> std::io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let file: OwnedFd = memfd_create("vaccel", flags)
        // Kernels before 6.3 do not know the last one.
        .or_else(|_| memfd_create("vaccel", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING))?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// The region that a call's tensors lie in, and where those of its reply go.
#[derive(Debug)]
pub(crate) struct Room {
    mapping: Arc<Mapping>,
    pool: Pool,
    rest: Mutex<Range<usize>>,
    /// Copies of what came.
    counted: Mutex<Hold>,
}

impl Room {
    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    fn rest(&self) -> MutexGuard<'_, Range<usize>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.rest().len() as u64
    }

    /// Copies what of these tensors lies in the region, for whoever may look twice.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`.
    pub(crate) fn own(&self, tensors: &mut [Tensor]) -> Result<(), Error> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        for tensor in tensors.iter_mut().filter(|tensor| self.mapping.place(&tensor.data).is_some()) {
            tensor.data = copy(&self.pool, &mut counted, &tensor.data)?;
        }
        Ok(())
    }

    /// A part of the room for a tensor of so many bytes, which nobody else gets; none if there is not so much.
    pub(crate) fn take(&self, bytes: usize) -> Option<Range<usize>> {
        /// Where tensors begin, in bytes: a cache line.
        const ALIGNMENT: usize = 64;
        let mut rest = self.rest();
        let begin = rest.start.next_multiple_of(ALIGNMENT);
        let end = begin.checked_add(bytes).filter(|end| *end <= rest.end)?;
        rest.start = end;
        Some(begin..end)
    }

    /// Puts the tensors of a reply there, or its arguments, as far as they fit.
    pub(crate) fn place(&self, reply: &mut RunReply) {
        let carriers = reply.lendable_mut();
        let places: Vec<Place> = carriers.into_iter().map(|carrier| self.place_one(carrier)).collect();
        if places.iter().any(|place| place.bytes > 0) {
            reply.places = places;
        }
    }

    fn place_one(&self, carrier: &mut dyn Carrier) -> Place {
        let long = carrier.data_mut().filter(|data| data.len() >= PLACED_BYTES_MIN);
        let Some(data) = long else { return Place::default() };
        let length = data.len();
        let there = self.mapping.place(data).or_else(|| {
            let part = self.take(length)?;
            self.mapping.write(part.start, data);
            Some(part)
        });
        // An input that is passed on is there already, and so is what a device wrote there.
        let Some(there) = there else { return Place::default() };
        *data = Bytes::new();
        Place { offset: there.start as u64, bytes: length as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Settings};
    use crate::quota::Accounts;
    use vaccel_proto::v1::{
        Arg, ArgType, DType, GenopRequest, ModelRunRequest, NamedTensor, SgemmRequest, Tensor,
    };

    type Make = fn(Vec<NamedTensor>) -> Op;

    fn genop(kind: ArgType) -> Op {
        let write = vec![Arg { kind: kind.into(), ..Arg::default() }];
        Op::Genop(GenopRequest { write, ..Default::default() })
    }

    #[test]
    fn only_arithmetic_sees_what_its_caller_can_still_change() {
        let limits = Config::new(Settings::default()).expect("valid").tenant;
        let tenant = Tenant::new("a");
        let account = Accounts::new(limits, |_| 1).of(&tenant);
        let memory = SharedMemory::default();
        let region = memory.make(&tenant, &account, 1 << 20).expect("memory");
        let filled = |op: Make, dtype: DType, is_unread| {
            let tensor = Tensor { dtype: dtype.into(), shape: vec![16], ..Tensor::default() };
            let tensors = vec![NamedTensor { name: String::new(), tensor: Some(tensor.clone()) }];
            let places = vec![Place { offset: 4096, bytes: 64 }];
            let shared = Some(Shared { region: region.name().into(), places, room: None });
            let mut request = RunRequest { shared, op: Some(op(tensors)), ..RunRequest::default() };
            let room =
                memory.fill(&tenant, &account, &mut request, is_unread).expect("fits").expect("shared");
            let mut tensor =
                Tensor { data: request.lendable_mut()[0].data_mut().expect("there").clone(), ..tensor };
            if matches!(request.op, Some(Op::ModelRun(_))) && !is_unread {
                room.own(std::slice::from_mut(&mut tensor)).expect("within the limit");
            }
            let data = tensor.data;
            assert_eq!(data, [0; 64][..]);
            let is_copied = room.mapping.place(&data).is_none();
            assert_eq!(account.used(Unit::InFlightBytes), if is_copied { 64 } else { 0 });
            is_copied
        };
        let model = |inputs| Op::ModelRun(ModelRunRequest { inputs, ..Default::default() });
        let sgemm = |matrices| Op::Sgemm(SgemmRequest { matrices, ..Default::default() });
        assert!(filled(model, DType::F32, false) && filled(model, DType::I64, false));
        assert!(!filled(model, DType::F32, true) && filled(model, DType::Bytes, true));
        assert!(!filled(sgemm, DType::F32, false) && filled(sgemm, DType::Bytes, false));
        let array: Make = |_| genop(ArgType::Float32Array);
        let (buffer, text): (Make, Make) = (|_| genop(ArgType::Buffer), |_| genop(ArgType::CharArray));
        assert!(!filled(array, DType::F32, false) && filled(buffer, DType::F32, false));
        assert!(!filled(buffer, DType::F32, true) && filled(text, DType::F32, true));
        assert_eq!(account.used(Unit::InFlightBytes), 0);
        drop(region);
        assert_eq!(account.used(Unit::SharedBytes), 0);
    }
}
