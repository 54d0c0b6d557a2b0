//! The CUDA driver: devices, memory, streams and events, with owners that give back.
//!
//! *Why not a binding of all of CUDA:* some thirty functions are used. Declared here they cost no build time, come from
//! the folder that the configuration names and from no list of guesses, and a library that lacks one is an error with
//! the function's name and not a panic; so that tests can put a driver of their own in that folder.
//!
//! *Source:* CUDA driver API, `cuda.h`; the versions of functions that it gives their plain names.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use vaccel_proto::{Error, Reason};

use super::library::{Library, Sought, Wanted, functions};

const DRIVER: Wanted = Wanted { purpose: "the CUDA driver", names: &["libcuda.so.1"] };

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: c_int = 2;
/// Errors after which nothing works any more in the context, or on the device: of its memory
/// (`CUDA_ERROR_ECC_UNCORRECTABLE`, `_NVLINK_UNCORRECTABLE`), of what a kernel did (`_ILLEGAL_ADDRESS`,
/// `_LAUNCH_TIMEOUT`, `_CONTEXT_IS_DESTROYED`, `_ASSERT`, `_HARDWARE_STACK_ERROR` to `_LAUNCH_FAILED`), and of what
/// nobody knows, as when it has fallen off the bus (`_UNKNOWN`).
const LASTING: &[c_int] = &[214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999];
/// `CU_MEMHOSTALLOC_PORTABLE` and `CU_MEMHOSTREGISTER_PORTABLE`: pinned for all contexts.
const HOST_PORTABLE: c_uint = 1;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const CAPTURE_RELAXED: c_int = 2;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY: [c_int; 2] = [75, 76];

pub(super) type Raw = *mut c_void;

functions! {
    /// Entries of the driver.
    Functions {
        init = "cuInit": (c_uint);
        version = "cuDriverGetVersion": (*mut c_int);
        error_name = "cuGetErrorName": (c_int, *mut *const c_char);
        device_count = "cuDeviceGetCount": (*mut c_int);
        device_get = "cuDeviceGet": (*mut c_int, c_int);
        device_name = "cuDeviceGetName": (*mut c_char, c_int, c_int);
        device_bytes = "cuDeviceTotalMem_v2": (*mut usize, c_int);
        device_attribute = "cuDeviceGetAttribute": (*mut c_int, c_int, c_int);
        context_retain = "cuDevicePrimaryCtxRetain": (*mut Raw, c_int);
        context_release = "cuDevicePrimaryCtxRelease_v2": (c_int);
        context_enter = "cuCtxSetCurrent": (Raw);
        capture_mode = "cuThreadExchangeStreamCaptureMode": (*mut c_int);
        memory_alloc = "cuMemAlloc_v2": (*mut u64, usize);
        memory_free = "cuMemFree_v2": (u64);
        memory_info = "cuMemGetInfo_v2": (*mut usize, *mut usize);
        host_alloc = "cuMemHostAlloc": (*mut Raw, usize, c_uint);
        host_free = "cuMemFreeHost": (Raw);
        host_register = "cuMemHostRegister_v2": (Raw, usize, c_uint);
        host_unregister = "cuMemHostUnregister": (Raw);
        copy_up = "cuMemcpyHtoDAsync_v2": (u64, *const c_void, usize, Raw);
        copy_down = "cuMemcpyDtoHAsync_v2": (Raw, u64, usize, Raw);
        stream_create = "cuStreamCreate": (*mut Raw, c_uint);
        stream_destroy = "cuStreamDestroy_v2": (Raw);
        stream_wait = "cuStreamSynchronize": (Raw);
        stream_after = "cuStreamWaitEvent": (Raw, Raw, c_uint);
        event_create = "cuEventCreate": (*mut Raw, c_uint);
        event_destroy = "cuEventDestroy_v2": (Raw);
        event_record = "cuEventRecord": (Raw, Raw);
    }
}

/// The loaded driver.
pub(super) struct Driver {
    functions: Functions,
    /// As in 13.0.
    pub(super) version: String,
}

/// What a device is.
#[derive(Clone, Debug)]
pub(crate) struct Description {
    /// As sessions name it.
    pub(crate) name: String,
    /// As its maker names it.
    pub(crate) product: String,
    pub(crate) bytes: u64,
    /// Compute capability.
    pub(crate) capability: (c_int, c_int),
}

/// The driver, and the devices it knows.
type Started = (Arc<Driver>, Vec<Description>);

/// A call of a library that did not succeed.
#[derive(Debug)]
pub(super) struct Failure {
    call: &'static str,
    status: c_int,
    name: String,
}

impl Failure {
    pub(super) fn new(call: &'static str, status: c_int, name: impl Into<String>) -> Self {
        Self { call, status, name: name.into() }
    }

    pub(super) fn out_of_memory(call: &'static str) -> Self {
        Self::new(call, OUT_OF_MEMORY, "out of memory")
    }

    pub(super) fn is_out_of_memory(&self) -> bool {
        self.status == OUT_OF_MEMORY
    }

    pub(super) fn is_lasting(&self) -> bool {
        LASTING.contains(&self.status)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} answered {} ({})", self.call, self.name, self.status)
    }
}

impl Driver {
    /// Loads the driver and asks it for its devices.
    pub(super) fn load(folders: &[PathBuf]) -> (Result<Started, String>, Sought) {
        let (library, sought) = Library::look(DRIVER, folders);
        let loaded = library.ok_or_else(|| sought.told()).and_then(|library| {
            let driver = Functions::of(library).and_then(Self::start);
            driver.map_err(|why| format!("{}: {why}", sought.told()))
        });
        (loaded, sought)
    }

    #[allow(unsafe_code, reason = "calls of the driver")]
    fn start(functions: Functions) -> Result<Started, String> {
        let mut driver = Self { functions, version: String::new() };
        let (mut version, mut count) = (0, 0);
        // SAFETY: no flags are defined for `cuInit`; the others fill the integer they are given.
        unsafe {
            let functions = &driver.functions;
            driver.check("cuInit", (functions.init)(0))?;
            driver.check("cuDriverGetVersion", (functions.version)(&raw mut version))?;
            driver.check("cuDeviceGetCount", (functions.device_count)(&raw mut count))?;
        }
        driver.version = format!("{}.{}", version / 1000, version % 1000 / 10);
        let devices = (0..count).map(|index| driver.describe(index)).collect::<Result<Vec<_>, _>>()?;
        if devices.is_empty() {
            return Err("it knows no device".into());
        }
        Ok((Arc::new(driver), devices))
    }

    #[allow(unsafe_code, reason = "calls of the driver")]
    fn describe(&self, index: c_int) -> Result<Description, Failure> {
        /// Longer than any name so far.
        const NAME_BYTES: c_int = 256;
        let (mut device, mut bytes, mut capability) = (0, 0, [0; 2]);
        let mut name: [c_char; NAME_BYTES as usize] = [0; NAME_BYTES as usize];
        // SAFETY: each call fills what it is given: integers, and of the name at most the bytes it is told of, with a
        // zero among them; the array was all zeros, so that it ends in any case.
        let product = unsafe {
            let functions = &self.functions;
            self.check("cuDeviceGet", (functions.device_get)(&raw mut device, index))?;
            let named = (functions.device_name)(name.as_mut_ptr(), NAME_BYTES - 1, device);
            self.check("cuDeviceGetName", named)?;
            self.check("cuDeviceTotalMem", (functions.device_bytes)(&raw mut bytes, device))?;
            for (value, attribute) in capability.iter_mut().zip(CAPABILITY) {
                let asked = (functions.device_attribute)(value, attribute, device);
                self.check("cuDeviceGetAttribute", asked)?;
            }
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let capability = (capability[0], capability[1]);
        Ok(Description { name: format!("cuda:{index}"), product, bytes: bytes as u64, capability })
    }

    #[allow(unsafe_code, reason = "a call of the driver")]
    fn check(&self, call: &'static str, status: c_int) -> Result<(), Failure> {
        if status == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the call fills the pointer with a text that lives as long as the library, or leaves it null.
        let name = unsafe {
            let found = (self.functions.error_name)(status, &raw mut name) == 0 && !name.is_null();
            found.then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
        };
        Err(Failure { call, status, name: name.unwrap_or_else(|| "an unknown error".into()) })
    }
}

impl From<Failure> for String {
    fn from(failure: Failure) -> Self {
        failure.to_string()
    }
}

/// A device that is in use: its primary context, which it shares with other libraries of the process.
pub(super) struct Context {
    driver: Arc<Driver>,
    pub(super) description: Description,
    index: c_int,
    raw: Raw,
    /// Why nothing works there any more.
    broken: OnceLock<String>,
}

// SAFETY: the context is a handle that the driver lets any thread make its current one.
#[allow(unsafe_code, reason = "a handle of the driver")]
unsafe impl Send for Context {}
// SAFETY: as above; the driver's calls may be made by several threads at a time.
#[allow(unsafe_code, reason = "a handle of the driver")]
unsafe impl Sync for Context {}

impl Context {
    /// Begins to use a device.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(super) fn new(
        driver: &Arc<Driver>,
        index: usize,
        description: Description,
    ) -> Result<Arc<Self>, Failure> {
        let index = c_int::try_from(index).expect("an index of what the driver counted");
        let mut raw = std::ptr::null_mut();
        // SAFETY: the device is one that the driver counted; the call fills the handle.
        let retained = unsafe { (driver.functions.context_retain)(&raw mut raw, index) };
        driver.check("cuDevicePrimaryCtxRetain", retained)?;
        let broken = OnceLock::new();
        Ok(Arc::new(Self { driver: Arc::clone(driver), description, index, raw, broken }))
    }

    /// Makes this the thread's device, which every call below needs.
    #[allow(unsafe_code, reason = "a call of the driver")]
    pub(super) fn enter(&self) -> Result<&Functions, Failure> {
        let functions = &self.driver.functions;
        // While ONNX Runtime captures a graph, memory may be taken only by threads that say that they have no part in
        // it; others would spoil the capture and be refused themselves.
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: the context is retained until this is dropped; the second call takes the mode and puts the one that
        // was before in its place.
        let (entered, relaxed) =
            unsafe { ((functions.context_enter)(self.raw), (functions.capture_mode)(&raw mut mode)) };
        self.driver.check("cuCtxSetCurrent", entered)?;
        self.driver.check("cuThreadExchangeStreamCaptureMode", relaxed)?;
        Ok(functions)
    }

    pub(super) fn check(&self, call: &'static str, status: c_int) -> Result<(), Failure> {
        self.driver.check(call, status)
    }

    /// Bytes that nobody has, in this process or another one.
    #[allow(unsafe_code, reason = "a call of the driver")]
    pub(super) fn free_bytes(&self) -> Result<u64, Failure> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the call fills both integers.
        let told = unsafe { (self.enter()?.memory_info)(&raw mut free, &raw mut total) };
        self.check("cuMemGetInfo", told)?;
        Ok(free as u64)
    }

    /// # Errors
    /// `BACKEND_FAILED` once the device has failed for good.
    pub(super) fn is_sound(&self) -> Result<(), Error> {
        match self.broken.get() {
            Some(why) => Err(unusable(&self.description.name, why)),
            None => Ok(()),
        }
    }

    /// The error of a call that failed; one after which nothing works there any more is remembered.
    pub(super) fn error(&self, failure: &Failure) -> Error {
        let (name, why) = (&self.description.name, failure.to_string());
        if !failure.is_lasting() {
            return failed(name, &why);
        }
        tracing::error!(device = name, why, "the device is not used any more");
        let _ = self.broken.set(why.clone());
        unusable(name, &why)
    }
}

/// That a device failed once.
pub(super) fn failed(name: &str, why: &str) -> Error {
    Error::new(Reason::BackendFailed, format!("device {name} failed")).caused_by(why.to_owned())
}

/// That a device failed for good.
pub(super) fn unusable(name: &str, why: &str) -> Error {
    let message =
        format!("device {name} failed and is not used until the agent starts again; device cpu is there");
    Error::new(Reason::BackendFailed, message).caused_by(why.to_owned())
}

impl Drop for Context {
    #[allow(unsafe_code, reason = "a call of the driver")]
    fn drop(&mut self) {
        // SAFETY: retained once in `new`; whatever is of the context holds it.
        unsafe { (self.driver.functions.context_release)(self.index) };
    }
}

/// Memory of a device.
pub(super) struct Memory {
    context: Arc<Context>,
    pub(super) address: u64,
    pub(super) bytes: usize,
}

impl Memory {
    /// At least a byte, so that there is an address.
    #[allow(unsafe_code, reason = "a call of the driver")]
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Failure> {
        let (mut address, bytes) = (0, bytes.max(1));
        // SAFETY: the call fills the address.
        let made = unsafe { (context.enter()?.memory_alloc)(&raw mut address, bytes) };
        context.check("cuMemAlloc", made)?;
        Ok(Self { context: Arc::clone(context), address, bytes })
    }
}

impl Drop for Memory {
    #[allow(unsafe_code, reason = "a call of the driver")]
    fn drop(&mut self) {
        if let Ok(functions) = self.context.enter() {
            // SAFETY: allocated in `new`, freed here alone. Whoever lets a stream use it waits for the stream before it
            // drops this.
            unsafe { (functions.memory_free)(self.address) };
        }
    }
}

/// Memory of the host that the device copies from and to by itself.
pub(super) struct Pinned {
    context: Arc<Context>,
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: memory that nobody else has; borrows of it follow those of this owner.
#[allow(unsafe_code, reason = "memory with one owner")]
unsafe impl Send for Pinned {}
// SAFETY: as above; who shares it can only read it.
#[allow(unsafe_code, reason = "memory with one owner")]
unsafe impl Sync for Pinned {}

impl Pinned {
    #[allow(unsafe_code, reason = "a call of the driver")]
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Failure> {
        let mut address: Raw = std::ptr::null_mut();
        // SAFETY: the call fills the address.
        let made = unsafe { (context.enter()?.host_alloc)(&raw mut address, bytes, HOST_PORTABLE) };
        context.check("cuMemHostAlloc", made)?;
        let address = NonNull::new(address.cast::<u8>());
        let address = address.ok_or_else(|| Failure::new("cuMemHostAlloc", 0, "no address"))?;
        // SAFETY: the memory is that long and nobody's yet; what the driver leaves in it is nothing to rely on.
        unsafe { address.as_ptr().write_bytes(0, bytes) };
        Ok(Self { context: Arc::clone(context), address, bytes })
    }

    /// Where it is.
    pub(super) fn place(&self) -> NonNull<[u8]> {
        NonNull::slice_from_raw_parts(self.address, self.bytes)
    }

    #[allow(unsafe_code, reason = "memory with one owner")]
    pub(super) fn slice(&self) -> &[u8] {
        // SAFETY: the memory is that long, was initialised in `new`, and is written only through `slice_mut` or by a
        // copy that `Stream` has started and waited for before anybody can call this.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }

    #[allow(unsafe_code, reason = "memory with one owner")]
    pub(super) fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    #[allow(unsafe_code, reason = "a call of the driver")]
    fn drop(&mut self) {
        if let Ok(functions) = self.context.enter() {
            // SAFETY: allocated in `new`, freed here alone, after the stream that used it was waited for.
            unsafe { (functions.host_free)(self.address.as_ptr().cast()) };
        }
    }
}

/// Memory of somebody else's in this process that the device copies from and to by itself, for as long as this is.
pub(super) struct Registered {
    context: Arc<Context>,
    address: NonNull<u8>,
}

// SAFETY: an address that is only given to the driver.
#[allow(unsafe_code, reason = "an address for the driver")]
unsafe impl Send for Registered {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "an address for the driver")]
unsafe impl Sync for Registered {}

impl Registered {
    /// Memory that stays mapped for as long as this is.
    #[allow(unsafe_code, reason = "a call of the driver")]
    pub(super) fn new(context: &Arc<Context>, memory: NonNull<[u8]>) -> Result<Self, Failure> {
        let address = memory.cast::<u8>();
        // SAFETY: the driver looks up the pages at these addresses and answers with an error where there are none.
        let made =
            unsafe { (context.enter()?.host_register)(address.as_ptr().cast(), memory.len(), HOST_PORTABLE) };
        context.check("cuMemHostRegister", made)?;
        Ok(Self { context: Arc::clone(context), address })
    }
}

impl Drop for Registered {
    #[allow(unsafe_code, reason = "a call of the driver")]
    fn drop(&mut self) {
        if let Ok(functions) = self.context.enter() {
            // SAFETY: registered in `new`, and ended here alone, when no stream copies from or to it any more.
            unsafe { (functions.host_unregister)(self.address.as_ptr().cast()) };
        }
    }
}
