//! NVIDIA devices: found when the agent runs, and used when somebody asks for one.
//!
//! `library` looks for files and tells where it looked, `driver`, `cublas` and `nvml` are what each of them does,
//! `stream` copies, `pins` lets devices reach shared memory, `product` multiplies, `lane` carries tensors of models,
//! `toolkit` is what ONNX Runtime needs, `turns` says who is alone with the devices, `memory` counts, `made` tries
//! again what could not be had.
//! Nothing of CUDA is needed to build the agent, and a host without it has the agent it always had. A device that was
//! asked for and cannot be had is an error: to guests it says which library is missing, to the host's operator also
//! where it was looked for (`vaccel-agent self-test --gpu`).

mod cublas;
mod driver;
mod ends;
mod lane;
mod library;
mod made;
mod memory;
mod nvml;
mod pins;
mod product;
mod stream;
#[cfg(test)]
mod tests;
mod toolkit;
mod turns;

use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use vaccel_proto::compute::Layout;
use vaccel_proto::{Error, Reason};

use crate::backend::blas::Factor;
use crate::config::DeviceConfig;
use crate::scheduler::Cancel;
use crate::shared::Mapping;

pub(crate) use driver::Description;
pub(crate) use ends::Alive;
pub(crate) use lane::Buffer;
pub(crate) use library::Sought;
pub(crate) use memory::{Charge, Ledger};
pub(crate) use nvml::Figures;
pub(crate) use product::{Alone, Asked, Factors, ROW_NUMBERS_MAX, Sum};
pub(crate) use stream::Held;

use cublas::Cublas;
use driver::{Context, Driver, Failure, Memory};
use ends::Ends;
use made::{Made, Refusal};
use pins::Pins;
use product::Bench;
use stream::Stream;
use toolkit::Toolkit;
use turns::{Turn, Turns};

/// Products at the same time on one device: one computes while another's first rows are on their way. Each has
/// [`Bench::BYTES`] of the device and 64 MiB of pinned memory for good.
const BENCHES: usize = 2;

/// What a context takes of a device, about: the driver does not say.
const CONTEXT_BYTES: u64 = 512 << 20;

/// Why there is no device, for guests: paths of the host are for its operator.
const ABSENT: &str = "the CUDA driver (libcuda.so.1) is not in the host's library folders, or has no device";

/// What was found of CUDA on this host.
pub(crate) struct Cuda {
    folders: Vec<PathBuf>,
    driver: Result<Arc<Driver>, String>,
    driver_sought: Sought,
    devices: Vec<Device>,
    cublas: OnceLock<(Result<Arc<Cublas>, String>, Sought)>,
    nvml: Arc<nvml::Watch>,
    toolkit: OnceLock<Toolkit>,
    pins: Pins,
    _last: Last,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda").field("devices", &self.names()).finish_non_exhaustive()
    }
}

/// A device. Nothing is done with it before it is used.
pub(crate) struct Device {
    pub(crate) description: Description,
    index: usize,
    /// Its memory, as far as the agent lets it be used.
    pub(crate) ledger: Arc<Ledger>,
    context: Made<Arc<Context>>,
    opened: Made<Opened>,
    lanes: [Mutex<Option<Stream>>; lane::LANES],
    turn: AtomicUsize,
}

/// Of all devices, and of whoever uses them in this process.
static TURNS: Turns = Turns::new();
static ENDS: Ends = Ends::new();

/// How long whoever needs a device's memory waits for threads that have it and were let go: they end in some tenths of
/// a second, unless they wait for whoever waits for them.
const ENDS_MAX: Duration = Duration::from_secs(2);

impl Device {
    fn new(index: usize, description: Description, config: &DeviceConfig) -> Self {
        // What is left is for the context, for other libraries' own needs, and for whoever else uses the device.
        let limit = config.bytes_max.unwrap_or(description.bytes / 10 * 9).min(description.bytes);
        let ledger = Ledger::new(&description.name, limit);
        let (context, opened) = Default::default();
        let (lanes, turn) = (Default::default(), AtomicUsize::new(0));
        Self { description, index, ledger, context, opened, lanes, turn }
    }
}

impl Device {
    /// Its number among the devices.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Lets an engine run.
    pub(crate) fn running() -> Turn {
        TURNS.run()
    }

    /// Lets an engine do what takes long: load a model, and let it go.
    pub(crate) fn loading() -> Turn {
        TURNS.load()
    }

    /// For a thread that has something of a device.
    pub(crate) fn alive() -> Arc<Alive> {
        ENDS.alive()
    }

    /// Such a thread is not needed any more, and ends by itself.
    pub(crate) fn let_go(thread: &Weak<Alive>) {
        ENDS.expect(thread);
    }

    /// Lets no engine do anything else; none where that would take long.
    pub(crate) fn alone() -> Option<Turn> {
        TURNS.alone()
    }
}

/// One that nobody has, else the next by turns.
fn turn<'a, T>(all: &'a [Mutex<T>], next: &AtomicUsize) -> MutexGuard<'a, T> {
    all.iter().find_map(|one| one.try_lock().ok()).unwrap_or_else(|| {
        let next = next.fetch_add(1, Ordering::Relaxed) % all.len();
        all[next].lock().unwrap_or_else(PoisonError::into_inner)
    })
}

/// A device whose products have been compared with the processor's.
struct Opened {
    context: Arc<Context>,
    cublas: Arc<Cublas>,
    cublas_version: String,
    benches: [Mutex<Option<Bench>>; BENCHES],
}

/// Waits for threads that were let go: the process may be about to end, and with it the libraries that they use.
struct Last;

impl Drop for Last {
    fn drop(&mut self) {
        Cuda::await_ends();
    }
}

impl Cuda {
    /// Waits for threads that were [let go](Device::let_go), whose memory is needed, for a while.
    pub(crate) fn await_ends() {
        ENDS.wait(ENDS_MAX);
    }

    /// Loads the driver, where there is one, and asks it for its devices.
    pub(crate) fn find(config: &DeviceConfig) -> Self {
        let (driver, driver_sought) = Driver::load(&config.libraries);
        let (driver, descriptions) = match driver {
            Ok((driver, descriptions)) => {
                for device in &descriptions {
                    let mib = device.bytes >> 20;
                    tracing::info!(device = device.name, product = device.product, mib, "found a device");
                }
                (Ok(driver), descriptions)
            }
            Err(why) => {
                tracing::debug!(why, "no device");
                (Err(why), Vec::new())
            }
        };
        let devices = descriptions.into_iter().enumerate();
        let devices = devices.map(|(index, description)| Device::new(index, description, config));
        Self {
            folders: config.libraries.clone(),
            driver,
            driver_sought,
            devices: devices.collect(),
            cublas: OnceLock::new(),
            nvml: nvml::Watch::new(&config.libraries),
            toolkit: OnceLock::new(),
            pins: Pins::default(),
            _last: Last,
        }
    }

    /// Lets devices reach memory that the agent shares.
    pub(crate) fn offer(&self, memory: &Arc<Mapping>) {
        self.pins.offer(memory);
    }

    /// A place of the host's memory, if a device reaches it by itself: if it was [offered](Self::offer).
    pub(crate) fn held(&self, device: &Device, place: NonNull<[u8]>) -> Option<Held> {
        self.pins.held(self.context(device).ok()?, place)
    }

    /// All devices, the first is what `cuda` means.
    pub(crate) fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// Names of the devices.
    pub(crate) fn names(&self) -> Vec<String> {
        self.devices.iter().map(|device| device.description.name.clone()).collect()
    }

    /// The device of a name.
    ///
    /// # Errors
    /// `DISABLED` with what is missing and what is there.
    pub(crate) fn device(&self, name: &str) -> Result<&Device, Error> {
        let found = self.devices.iter().find(|device| device.description.name == name);
        found.ok_or_else(|| {
            let there = self.names().join(", ");
            let why = if self.devices.is_empty() { ABSENT.into() } else { format!("devices are {there}") };
            let message = format!(
                "device {} was asked for and is absent: {why}; device cpu is there",
                vaccel_proto::error::shown(name)
            );
            let error = Error::new(Reason::Disabled, message);
            match &self.driver {
                Ok(_) => error,
                Err(why) => error.caused_by(why.clone()),
            }
        })
    }

    /// What was looked for, where, and why it was not loaded. Loads what has not been needed yet.
    pub(crate) fn record(&self) -> Vec<Sought> {
        let (cublas, nvml) = (&self.cublas().1, self.nvml.sought());
        let first = [self.driver_sought.clone(), cublas.clone(), nvml.clone()];
        first.into_iter().chain(self.toolkit().iter().cloned()).collect()
    }

    /// What ONNX Runtime needs to use a device, loaded as far as it is there.
    pub(crate) fn toolkit(&self) -> &[Sought] {
        &self.toolkit.get_or_init(|| Toolkit::load(&self.folders)).sought
    }

    /// The error of an engine that a device failed under for good, which is not used any more then. The driver is
    /// asked, which tells it with every call from then on: engines' texts have names in them that guests chose.
    pub(crate) fn failure(&self, device: &Device) -> Option<Error> {
        let context = self.context(device).ok()?;
        let failure = Memory::new(context, 1).err().filter(Failure::is_lasting)?;
        Some(context.error(&failure))
    }

    /// That a device can be used, before an engine takes it.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` where it has no memory, `BACKEND_FAILED`.
    pub(crate) fn is_sound(&self, device: &Device) -> Result<(), Error> {
        self.context(device)?.is_sound()
    }

    /// The error of an engine that lacked memory where it was to have so much, if the device has no more of it: others
    /// may have some that nobody here counted. The driver is asked, as for a [failure](Self::failure).
    pub(crate) fn full(&self, device: &Device, bytes: u64) -> Option<Error> {
        let free = self.context(device).ok()?.free_bytes().ok()?;
        (free < bytes).then(|| device.ledger.full(bytes))
    }

    /// Why no product can be computed on any device, with all that was looked for; none when one can.
    pub(crate) fn missing(&self) -> Vec<String> {
        let driver = self.driver.as_ref().err().cloned();
        let cublas = self.cublas().0.as_ref().err().cloned();
        let devices = self.devices.iter();
        let why = devices.filter_map(|device| Some((&device.description.name, self.refusal(device)?)));
        let mut why: Vec<String> = why.map(|(name, why)| format!("{name}: {why}")).collect();
        // One that works is enough.
        if why.len() < self.devices.len() {
            why.clear();
        }
        driver.into_iter().chain(cublas).chain(why).collect()
    }

    /// Why a device cannot be used although the libraries are there.
    pub(crate) fn refusal(&self, device: &Device) -> Option<String> {
        self.cublas().0.as_ref().ok()?;
        self.open(device).err().map(|why| told(&why))
    }

    /// The driver's version, as in 13.0.
    pub(crate) fn driver_version(&self) -> Option<&str> {
        self.driver.as_ref().ok().map(|driver| driver.version.as_str())
    }

    /// cuBLAS's version, once a device has been used.
    pub(crate) fn cublas_version(&self) -> Option<&str> {
        let opened = self.devices.iter().find_map(|device| device.opened.get());
        opened.map(|opened| opened.cublas_version.as_str())
    }

    fn cublas(&self) -> &(Result<Arc<Cublas>, String>, Sought) {
        self.cublas.get_or_init(|| Cublas::load(&self.folders))
    }

    /// What the devices are doing, or did when they told the last time; nothing where that cannot be told. Takes a
    /// moment.
    pub(crate) fn figures(&self) -> Vec<Figures> {
        if self.devices.is_empty() { Vec::new() } else { self.nvml.figures() }
    }

    /// What everything else of a device hangs on.
    fn context<'a>(&self, device: &'a Device) -> Result<&'a Arc<Context>, Error> {
        device.context.get_or_make(|| {
            let absent = |why: &String| Refusal::Lasting(driver::unusable(&device.description.name, why));
            let driver = self.driver.as_ref().map_err(absent)?;
            let made = Context::new(driver, device.index, device.description.clone());
            made.map_err(|failure| device.without_context(&failure))
        })
    }

    /// A device on which products are computed.
    fn open<'a>(&self, device: &'a Device) -> Result<&'a Opened, Error> {
        device.opened.get_or_make(|| {
            let cublas = self.cublas().0.as_ref().map_err(|why| device.cannot_multiply(why))?;
            let context = self.context(device).map_err(Refusal::ForNow)?;
            context.is_sound().map_err(Refusal::ForNow)?;
            Opened::new(context, cublas, device)
        })
    }

    /// What a product of square matrices takes on a device without the agent.
    ///
    /// # Errors
    /// `DISABLED` for a device that cannot multiply, `QUOTA_EXCEEDED`, `BACKEND_FAILED`.
    pub(crate) fn alone(&self, device: &Device, side: usize) -> Result<Alone, Error> {
        let opened = self.open(device)?;
        opened.with_bench(device, |bench| bench.alone(side, &device.ledger))
    }

    /// Adds a product to `beta` times the sum, on a device.
    ///
    /// # Errors
    /// `DISABLED` for a device that cannot multiply, `BAD_ARGUMENT` for rows that are too long for it, `CANCELLED`,
    /// `QUOTA_EXCEEDED` where it has not the memory, `BACKEND_FAILED`.
    pub(crate) fn multiply(
        &self,
        device: &Device,
        sum: Sum<'_>,
        factors: &Factors<'_>,
        asked: &Asked<'_>,
    ) -> Result<(), Error> {
        let name = &device.description.name;
        let longest = factors.b.layout.columns.max(factors.a.layout.columns);
        if longest > ROW_NUMBERS_MAX {
            let expected = format!("at most {ROW_NUMBERS_MAX} for device {name}; device cpu takes more");
            return Err(Error::field("k, n", expected, longest));
        }
        let opened = self.open(device)?;
        opened.with_bench(device, |bench| {
            asked.cancel.check()?;
            bench.multiply(sum, factors, asked, &device.ledger, &self.pins)
        })
    }
}

impl Device {
    /// Why there is no context.
    fn without_context(&self, failure: &Failure) -> Refusal {
        let (name, why) = (&self.description.name, failure.to_string());
        if failure.is_lasting() {
            tracing::error!(device = name, why, "the device is not used");
            return Refusal::Lasting(driver::unusable(name, &why));
        }
        Refusal::ForNow(match failure.is_out_of_memory() {
            true => self.ledger.full(CONTEXT_BYTES).caused_by(why),
            false => driver::failed(name, &why),
        })
    }

    /// That there will be no products.
    fn cannot_multiply(&self, why: &str) -> Refusal {
        let name = &self.description.name;
        tracing::warn!(device = name, why, "the device cannot be used for products");
        let message = format!(
            "device {name} was asked for and cannot multiply matrices: cuBLAS is not in the host's library folders \
             or does not work; device cpu is there"
        );
        Refusal::Lasting(Error::new(Reason::Disabled, message).caused_by(why.to_owned()))
    }
}

impl Opened {
    fn new(context: &Arc<Context>, cublas: &Arc<Cublas>, device: &Device) -> Result<Self, Refusal> {
        let failed = |failure: Failure| Refusal::ForNow(device.failed(context, &failure, Bench::BYTES));
        let charge = device.ledger.charge(None, Bench::BYTES).map_err(Refusal::ForNow)?;
        let mut bench = Bench::new(context, cublas, charge).map_err(failed)?;
        let cublas_version = bench.version().map_err(failed)?;
        if let Some(why) = differs(&mut bench, &device.ledger).map_err(Refusal::ForNow)? {
            return Err(device.cannot_multiply(&why));
        }
        let benches = [Mutex::new(Some(bench)), Mutex::default()];
        Ok(Self { context: Arc::clone(context), cublas: Arc::clone(cublas), cublas_version, benches })
    }

    fn with_bench<T>(
        &self,
        device: &Device,
        work: impl FnOnce(&mut Bench) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.context.is_sound()?;
        let mut bench = turn(&self.benches, &device.turn);
        if bench.is_none() {
            let charge = device.ledger.charge(None, Bench::BYTES)?;
            let made = Bench::new(&self.context, &self.cublas, charge);
            *bench = Some(made.map_err(|failure| device.failed(&self.context, &failure, Bench::BYTES))?);
        }
        work(bench.as_mut().expect("made just now"))
    }
}

/// An error with its cause, for the host's operator.
fn told(error: &Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Where a product differs from the processor's: a device or library that computes something else must not be used. The
/// numbers are small integers, for which all orders of adding give the same.
fn differs(bench: &mut Bench, ledger: &Arc<Ledger>) -> Result<Option<String>, Error> {
    const SIDE: usize = 48;
    let numbers = |factor: usize| -> Vec<f32> {
        (0..SIDE * SIDE)
            .map(|index| f32::from(u8::try_from(index * factor % 17).unwrap_or(0)) - 8.0)
            .collect()
    };
    let (a, b) = (numbers(7), numbers(5));
    let layout = Layout::dense(SIDE, SIDE);
    let factors = Factors {
        a: Factor { numbers: &a, layout },
        b: Factor { numbers: &b, layout },
        alpha: 1.0,
        beta: 0.0,
    };
    let mut found = vec![f32::NAN; SIDE * SIDE];
    let gather = |part: Factor<'_>, stage: &mut [f32]| stage.copy_from_slice(&part.numbers[..stage.len()]);
    let asked = Asked { account: None, gather: &gather, cancel: &Cancel::default() };
    bench.multiply(Sum::Here(&mut found), &factors, &asked, ledger, &Pins::default())?;
    for (index, found) in found.iter().enumerate() {
        let (row, column) = (index / SIDE, index % SIDE);
        let terms = (0..SIDE).map(|depth| a[row * SIDE + depth] * b[depth * SIDE + column]);
        let expected: f32 = terms.sum();
        if *found != expected {
            let why = format!("its product of known matrices has {found} where the processor has {expected}");
            return Ok(Some(why));
        }
    }
    Ok(None)
}
