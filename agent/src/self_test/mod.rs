//! `vaccel-agent self-test`: what this host has to compute on, whether it computes the same everywhere, and how fast.
//! One command, one record, on any host.
//!
//! Every figure is measured here and now, by an agent of its own over a real socket and by the engines without one.
//! What must hold whatever the host (that all devices compute the same, that a full device is an error and no more) are
//! checks, and decide the exit code; what is only hoped for are goals.

mod measure;
mod models;
mod products;
mod text;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;
use vaccel_proto::Error;

use crate::config::ConfigError;
use crate::direct::Accelerators;
use crate::{Config, Direct, Settings, StartError};

/// What is to be tested.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// A device is required: where none can be used, what is missing is all that is told.
    pub gpu: bool,
    /// Small sizes: seconds instead of minutes, and figures that say little.
    pub quick: bool,
    /// One JSON document instead of text.
    pub json: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All checks passed.
    Passed,
    /// A check did not.
    Failed,
    /// A device was required and is absent.
    Absent,
}

/// Why there is no record.
#[derive(Debug)]
pub enum SelfTestError {
    /// The agent did not start.
    Start(StartError),
    /// A call failed that should not.
    Call(Error),
    /// The record cannot be written, or the folder of the agent not made.
    Io(io::Error),
}

impl fmt::Display for SelfTestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(error) => error.fmt(f),
            Self::Call(error) => error.fmt(f),
            Self::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for SelfTestError {}

impl From<StartError> for SelfTestError {
    fn from(error: StartError) -> Self {
        Self::Start(error)
    }
}

impl From<Error> for SelfTestError {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

impl From<io::Error> for SelfTestError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Everything that was found. Times are medians.
#[derive(Debug, Serialize)]
struct Record {
    version: &'static str,
    unix_time: u64,
    quick: bool,
    machine: Machine,
    accelerators: Accelerators,
    engines: Vec<Engine>,
    transfers: Vec<Transfer>,
    sgemm: Vec<Product>,
    empty_calls: Vec<EmptyCall>,
    models: Vec<Model>,
    batching: Vec<Batching>,
    checks: Vec<Check>,
    goals: Vec<Goal>,
}

#[derive(Debug, Serialize)]
struct Machine {
    processor: String,
    cores: usize,
    memory_bytes: u64,
    kernel: String,
}

#[derive(Debug, Serialize)]
struct Engine {
    name: String,
    version: String,
    devices: Vec<String>,
    absent_because: String,
}

/// Bytes a second that reach a device and come back; on `cpu`, that one core copies in memory.
#[derive(Debug, Serialize)]
struct Transfer {
    device: String,
    up_gb_s: f64,
    down_gb_s: f64,
}

#[derive(Debug, Serialize)]
struct Product {
    device: String,
    side: usize,
    /// In this process, from and to ordinary memory.
    direct_tflops: f64,
    /// A whole call over a unix socket, from and to ordinary memory.
    unix_tflops: f64,
    /// The same with matrices that lie in memory that client and agent share, and a result that comes there.
    shared_tflops: f64,
    /// cuBLAS without the agent, of matrices that are on the device and stay there.
    resident_tflops: Option<f64>,
    /// The same with the way there and back, from and to pinned memory.
    pinned_tflops: Option<f64>,
    /// The largest difference to a product in f64, to the largest number or 1.
    max_error: f64,
}

#[derive(Debug, Serialize)]
struct EmptyCall {
    transport: String,
    us: f64,
    /// After 2 ms without any.
    after_pause_us: f64,
}

#[derive(Debug, Serialize)]
struct Model {
    network: &'static str,
    engine: String,
    device: String,
    batch: usize,
    /// In this process.
    direct_ms: f64,
    images_per_s: f64,
    /// A whole call over a unix socket.
    unix_ms: f64,
    unix_added_us: f64,
    unix_to_direct: f64,
    /// Of that, by the agent's clock, while the call waited for its turn, and while it ran.
    queue_us: f64,
    run_us: f64,
    /// The same by a caller whose thread stays awake for the reply, on devices.
    awake: Option<Way>,
    /// The same with images that lie in memory that client and agent share, on devices.
    shared: Option<Way>,
    /// The largest difference to the first engine's numbers, to the largest of them; none for that engine.
    max_error: Option<f64>,
}

/// A whole call in another way.
#[derive(Debug, Serialize)]
struct Way {
    ms: f64,
    added_us: f64,
    to_direct: f64,
}

/// Calls of one image by several callers at a time.
#[derive(Debug, Serialize)]
struct Batching {
    network: &'static str,
    engine: String,
    device: String,
    callers: usize,
    on_calls_per_s: f64,
    off_calls_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Check {
    what: String,
    found: String,
    expected: String,
    passed: bool,
}

#[derive(Debug, Serialize)]
struct Goal {
    what: String,
    found: f64,
    goal: f64,
    met: bool,
}

/// Measures, and writes the record.
///
/// # Errors
/// What keeps it from measuring. What it found out is no error.
pub async fn run(
    settings: Settings,
    options: Options,
    out: &mut (impl Write + Send),
) -> Result<Verdict, SelfTestError> {
    let folder = Folder::new()?;
    let settings = Settings {
        address: vec![format!("unix://{}/s", folder.0.display()), "tcp://127.0.0.1:0".into()],
        vsock: None,
        token_file: None,
        ready_file: None,
        policy: Vec::new(),
        store: Some(folder.0.join("store")),
        model_repository: vec![folder.0.join("models")],
        model_name: None,
        // The largest product has 768 MiB, on both ends.
        tenant_in_flight_mib: Some(2048),
        tenant_shared_mib: Some(2048),
        // All are measured, each by its name.
        device: None,
        ..settings
    };
    let config = Config::new(settings).map_err(StartError::Config)?;
    let direct = Direct::new(&config.engines)?;
    let mut record = Record::new(direct.accelerators(), options);
    let is_absent = options.gpu && !record.accelerators.missing.is_empty();
    if !is_absent {
        measure::all(&mut record, &config, &direct, &folder.0, options).await?;
    }
    let verdict = match () {
        () if is_absent => Verdict::Absent,
        () if record.checks.iter().all(|check| check.passed) => Verdict::Passed,
        () => Verdict::Failed,
    };
    if options.json {
        let document = serde_json::to_string_pretty(&record).map_err(io::Error::from)?;
        writeln!(out, "{document}")?;
    } else {
        out.write_all(text::of(&record, verdict).as_bytes())?;
    }
    Ok(verdict)
}

/// A folder of the test's own, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, SelfTestError> {
        let folder = std::env::temp_dir().join(format!("vaccel-self-test-{}", std::process::id()));
        // One that is there already is somebody else's.
        std::fs::create_dir(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Record {
    fn new(accelerators: Accelerators, options: Options) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            unix_time: now.map_or(0, |now| now.as_secs()),
            quick: options.quick,
            machine: Machine::this(),
            accelerators,
            engines: Vec::new(),
            transfers: Vec::new(),
            sgemm: Vec::new(),
            empty_calls: Vec::new(),
            models: Vec::new(),
            batching: Vec::new(),
            checks: Vec::new(),
            goals: Vec::new(),
        }
    }
}

impl Machine {
    fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let named = |line: &str| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned());
        Self {
            processor: cpuinfo.lines().find_map(named).unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: crate::config::machine_memory(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}

impl From<ConfigError> for SelfTestError {
    fn from(error: ConfigError) -> Self {
        Self::Start(StartError::Config(error))
    }
}
