//! NVML: what the devices of the host are doing, for metrics.
//!
//! The library takes its time, and does not answer at all where a device is in trouble. So a thread of its own asks it,
//! one at a time, and nobody waits for long.
//!
//! *Source:* `nvml.h`.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::library::{Library, Sought, Wanted, functions};

/// How long whoever wants figures waits for them: they take some milliseconds. After that they are the last there are.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(1);

const NVML: Wanted = Wanted { purpose: "NVML, for metrics", names: &["libnvidia-ml.so.1"] };

type Handle = *mut c_void;

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Default)]
pub(super) struct MemoryInfo {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// `nvmlUtilization_t`, in percent.
#[repr(C)]
#[derive(Default)]
pub(super) struct Rates {
    gpu: c_uint,
    memory: c_uint,
}

functions! {
    /// Entries of the library.
    Functions {
        init = "nvmlInit_v2": ();
        count = "nvmlDeviceGetCount_v2": (*mut c_uint);
        handle = "nvmlDeviceGetHandleByIndex_v2": (c_uint, *mut Handle);
        uuid = "nvmlDeviceGetUUID": (Handle, *mut c_char, c_uint);
        memory = "nvmlDeviceGetMemoryInfo": (Handle, *mut MemoryInfo);
        rates = "nvmlDeviceGetUtilizationRates": (Handle, *mut Rates);
        power = "nvmlDeviceGetPowerUsage": (Handle, *mut c_uint);
        power_limit = "nvmlDeviceGetEnforcedPowerLimit": (Handle, *mut c_uint);
        energy = "nvmlDeviceGetTotalEnergyConsumption": (Handle, *mut c_ulonglong);
    }
}

/// What one device is doing. What it does not tell is not there.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) uuid: String,
    pub(crate) memory_total_bytes: Option<u64>,
    pub(crate) memory_used_bytes: Option<u64>,
    /// Part of the last sample period in which something ran, 0 to 1.
    pub(crate) utilization: Option<f64>,
    pub(crate) power_watts: Option<f64>,
    pub(crate) power_limit_watts: Option<f64>,
    /// Since the driver was loaded.
    pub(crate) energy_joules: Option<f64>,
}

/// Who asks the library, which is loaded when somebody does.
pub(super) struct Watch {
    folders: Vec<PathBuf>,
    nvml: OnceLock<(Result<Nvml, String>, Sought)>,
    seen: Mutex<Seen>,
    changed: Condvar,
}

#[derive(Default)]
struct Seen {
    last: Vec<Figures>,
    /// Since when a thread asks, if one does.
    asking: Option<Instant>,
}

impl Watch {
    pub(super) fn new(folders: &[PathBuf]) -> Arc<Self> {
        let (nvml, seen, changed) = Default::default();
        Arc::new(Self { folders: folders.to_vec(), nvml, seen, changed })
    }

    fn nvml(&self) -> &(Result<Nvml, String>, Sought) {
        self.nvml.get_or_init(|| Nvml::load(&self.folders))
    }

    /// What was looked for.
    pub(super) fn sought(&self) -> &Sought {
        &self.nvml().1
    }

    /// What the devices are doing, or did when they told the last time; nothing where that cannot be told.
    pub(super) fn figures(self: &Arc<Self>) -> Vec<Figures> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.asking.is_none() {
            let watch = Arc::clone(self);
            let thread = std::thread::Builder::new().name("nvml".into()).spawn(move || watch.ask());
            // Without a thread nobody asks now, and the figures stay as they are.
            seen.asking = thread.is_ok().then(Instant::now);
        }
        let Some(since) = seen.asking else { return seen.last.clone() };
        let wait = WAIT_MAX.saturating_sub(since.elapsed());
        let waited = self.changed.wait_timeout_while(seen, wait, |seen| seen.asking == Some(since));
        seen = waited.unwrap_or_else(PoisonError::into_inner).0;
        seen.last.clone()
    }

    fn ask(&self) {
        let told = self.nvml().0.as_ref().map(Nvml::figures).unwrap_or_default();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = Seen { last: told, asking: None };
        drop(seen);
        self.changed.notify_all();
    }
}

/// The loaded library.
struct Nvml(Functions);

impl Nvml {
    /// # Errors
    /// What was looked for, where, and why it is not loaded.
    fn load(folders: &[PathBuf]) -> (Result<Self, String>, Sought) {
        let (library, sought) = Library::look(NVML, folders);
        let loaded = library.ok_or_else(|| sought.told()).and_then(|library| {
            Functions::of(library).and_then(Self::start).map_err(|why| format!("{}: {why}", sought.told()))
        });
        (loaded, sought)
    }

    #[allow(unsafe_code, reason = "a call of the library")]
    fn start(functions: Functions) -> Result<Self, String> {
        // SAFETY: it takes nothing; it is called once for each time the library is loaded.
        match unsafe { (functions.init)() } {
            0 => Ok(Self(functions)),
            status => Err(format!("nvmlInit answered {status}")),
        }
    }

    /// All devices of the host, in the order of their buses.
    #[allow(unsafe_code, reason = "calls of the library")]
    fn figures(&self) -> Vec<Figures> {
        let mut count = 0;
        // SAFETY: the call fills the integer.
        let counted = unsafe { (self.0.count)(&raw mut count) } == 0;
        (0..if counted { count } else { 0 }).filter_map(|index| self.device(index)).collect()
    }

    #[allow(unsafe_code, reason = "calls of the library")]
    fn device(&self, index: c_uint) -> Option<Figures> {
        /// `NVML_DEVICE_UUID_V2_BUFFER_SIZE`.
        const UUID_BYTES: c_uint = 96;
        let mut handle = std::ptr::null_mut();
        let mut uuid: [c_char; UUID_BYTES as usize] = [0; UUID_BYTES as usize];
        let (mut memory, mut rates) = (MemoryInfo::default(), Rates::default());
        let (mut power, mut limit, mut energy) = (0, 0, 0);
        let told = |status: c_int| (status == 0).then_some(());
        // SAFETY: the handle is the library's for as long as it is loaded. Each call fills what it is given, of the
        // type that the header says; of the text at most the bytes it is told of, in an array of zeros that is longer.
        unsafe {
            let of = &self.0;
            told((of.handle)(index, &raw mut handle))?;
            told((of.uuid)(handle, uuid.as_mut_ptr(), UUID_BYTES - 1))?;
            let memory = told((of.memory)(handle, &raw mut memory)).map(|()| memory);
            let rates = told((of.rates)(handle, &raw mut rates)).map(|()| rates);
            Some(Figures {
                uuid: CStr::from_ptr(uuid.as_ptr()).to_string_lossy().into_owned(),
                memory_total_bytes: memory.as_ref().map(|memory| memory.total),
                memory_used_bytes: memory.as_ref().map(|memory| memory.used),
                utilization: rates.map(|rates| f64::from(rates.gpu) / 100.0),
                power_watts: told((of.power)(handle, &raw mut power)).map(|()| f64::from(power) / 1e3),
                power_limit_watts: told((of.power_limit)(handle, &raw mut limit))
                    .map(|()| f64::from(limit) / 1e3),
                energy_joules: told((of.energy)(handle, &raw mut energy)).map(|()| joules(energy)),
            })
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "a figure of 15 digits")]
fn joules(millijoules: c_ulonglong) -> f64 {
    millijoules as f64 / 1e3
}
