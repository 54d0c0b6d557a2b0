//! cuBLAS: products of matrices that are on a device.
//!
//! *Source:* `cublas_api.h`; versions 12 and 13 have these functions in the same form.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::Arc;

use super::driver::{Context, Failure, Memory};
use super::library::{Library, Sought, Wanted, functions};
use super::stream::Stream;

const CUBLAS: Wanted = Wanted { purpose: "cuBLAS", names: &["libcublas.so.13", "libcublas.so.12"] };

/// `CUBLAS_OP_N`: matrices as they are.
const AS_IT_IS: c_int = 0;
/// `CUBLAS_STATUS_ALLOC_FAILED`.
const ALLOC_FAILED: c_int = 3;

/// What the library may use while it multiplies; NVIDIA recommends so much for the newest devices. It is given, so
/// that the library takes nothing that is not counted.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

type Handle = *mut c_void;

functions! {
    /// Entries of the library.
    Functions {
        create = "cublasCreate_v2": (*mut Handle);
        destroy = "cublasDestroy_v2": (Handle);
        version = "cublasGetVersion_v2": (Handle, *mut c_int);
        set_stream = "cublasSetStream_v2": (Handle, *mut c_void);
        set_workspace = "cublasSetWorkspace_v2": (Handle, *mut c_void, usize);
        sgemm = "cublasSgemm_v2": (
            Handle, c_int, c_int, c_int, c_int, c_int, *const f32, *const f32, c_int, *const f32, c_int, *const f32,
            *mut f32, c_int
        );
    }
}

/// The loaded library.
pub(super) struct Cublas(Functions);

impl Cublas {
    /// # Errors
    /// What was looked for, where, and why it is not loaded.
    pub(super) fn load(folders: &[PathBuf]) -> (Result<Arc<Self>, String>, Sought) {
        let (library, sought) = Library::look(CUBLAS, folders);
        let loaded = library.ok_or_else(|| sought.told()).and_then(|library| {
            Functions::of(library).map(Self).map_err(|why| format!("{}: {why}", sought.told()))
        });
        (loaded.map(Arc::new), sought)
    }
}

fn check(call: &'static str, status: c_int) -> Result<(), Failure> {
    match status {
        0 => Ok(()),
        ALLOC_FAILED => Err(Failure::out_of_memory(call)),
        status => Err(Failure::new(call, status, "a status of cuBLAS")),
    }
}

/// A stream on which products are computed.
pub(super) struct Multiplier {
    library: Arc<Cublas>,
    handle: Handle,
    // After the handle: the library may use its workspace until it has gone.
    pub(super) stream: Stream,
    _workspace: Memory,
}

// SAFETY: the library lets any thread use a handle, one at a time; the rest is memory and a stream that are its own.
#[allow(unsafe_code, reason = "a handle of the library")]
unsafe impl Send for Multiplier {}

impl Multiplier {
    #[allow(unsafe_code, reason = "calls of the library")]
    pub(super) fn new(library: &Arc<Cublas>, stream: Stream) -> Result<Self, Failure> {
        let context: &Arc<Context> = stream.context();
        let workspace = Memory::new(context, WORKSPACE_BYTES)?;
        context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the call fills the handle, which is of the thread's current device: the stream's.
        check("cublasCreate", unsafe { (library.0.create)(&raw mut handle) })?;
        // From here on dropping it destroys the handle.
        let made = Self { library: Arc::clone(library), handle, stream, _workspace: workspace };
        // SAFETY: handle, stream and workspace live as long as what was just made. The stream comes first: setting it
        // takes the workspace away.
        unsafe {
            check("cublasSetStream", (library.0.set_stream)(handle, made.stream.raw))?;
            let address = made._workspace.address as *mut c_void;
            check("cublasSetWorkspace", (library.0.set_workspace)(handle, address, WORKSPACE_BYTES))?;
        }
        Ok(made)
    }

    /// The library's version, as in 13.1.0.
    #[allow(unsafe_code, reason = "a call of the library")]
    pub(super) fn version(&self) -> Result<String, Failure> {
        let mut version = 0;
        // SAFETY: the call fills the integer.
        check("cublasGetVersion", unsafe { (self.library.0.version)(self.handle, &raw mut version) })?;
        Ok(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
    }

    /// Starts `c = alpha a b + beta c`, all dense and row by row, behind what the stream does already.
    #[allow(unsafe_code, reason = "a call of the library")]
    pub(super) fn start(
        &mut self,
        [m, n, k]: [usize; 3],
        scales: (f32, f32),
        [a, b, c]: [&Memory; 3],
    ) -> Result<(), Failure> {
        let whole = |memory: &Memory, numbers: usize| {
            numbers.checked_mul(4).is_some_and(|bytes| bytes <= memory.bytes)
        };
        assert!(
            m * n * k > 0 && whole(a, m * k) && whole(b, k * n) && whole(c, m * n),
            "the matrices are there"
        );
        let int = |size: usize| c_int::try_from(size).expect("no longer than a row may be");
        let (m, n, k) = (int(m), int(n), int(k));
        let at = |memory: &Memory| memory.address as *const f32;
        let (alpha, beta) = scales;
        self.stream.context().enter()?;
        self.stream.started();
        // The library goes by columns: what is a matrix by rows is its transpose there, and (a b)^T = b^T a^T.
        // SAFETY: the three matrices are inside their memories by the assertion, with leading dimensions of whole rows;
        // their owner keeps them until it has waited for the stream. The scales are read before the call returns.
        let started = unsafe {
            (self.library.0.sgemm)(
                self.handle,
                AS_IT_IS,
                AS_IT_IS,
                n,
                m,
                k,
                &raw const alpha,
                at(b),
                n,
                at(a),
                k,
                &raw const beta,
                at(c).cast_mut(),
                n,
            )
        };
        check("cublasSgemm", started)
    }
}

impl Drop for Multiplier {
    #[allow(unsafe_code, reason = "a call of the library")]
    fn drop(&mut self) {
        let _ = self.stream.wait();
        if self.stream.context().enter().is_ok() {
            // SAFETY: made in `new`, destroyed here alone.
            unsafe { (self.library.0.destroy)(self.handle) };
        }
    }
}
