//! Configuration: one struct, from defaults < TOML file < environment `VACCEL_AGENT_*` < flags.
//!
//! [`Settings`] is what a person writes, every field optional, the same names in all three places. [`Config`] is what
//! the agent runs on, checked and complete.

mod addresses;
mod device;
mod limits;
mod log;
mod repository;
mod rule;
mod store;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use vaccel_proto::Endpoint;

pub use device::DeviceConfig;
pub use limits::TenantLimits;
pub use log::LogFormat;
pub use repository::RepositoryConfig;
pub use rule::Rule;
pub use store::{StoreConfig, StoreSync};

/// What a person sets. Flags, environment variables and file keys carry the same names.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Address to listen on; repeat for several [default: unix://$XDG_RUNTIME_DIR/vaccel.sock tcp://127.0.0.1:65500]
    #[arg(
        long,
        short,
        global = true,
        env = "VACCEL_AGENT_ADDRESS",
        value_delimiter = ',',
        value_name = "URL"
    )]
    #[serde(default)]
    pub address: Vec<String>,

    /// Also listen on vsock://any:2048
    #[arg(long, global = true, env = "VACCEL_AGENT_VSOCK", num_args = 0..=1, default_missing_value = "true")]
    pub vsock: Option<bool>,

    /// Write the bound addresses to FILE as JSON once every one accepts
    #[arg(long, global = true, env = "VACCEL_AGENT_READY_FILE", value_name = "FILE")]
    pub ready_file: Option<PathBuf>,

    /// Permit plain TCP on addresses other than loopback
    #[arg(long, global = true, env = "VACCEL_AGENT_INSECURE", num_args = 0..=1, default_missing_value = "true")]
    pub insecure: Option<bool>,

    /// Mode of unix sockets, octal [default: 660]
    #[arg(long, global = true, env = "VACCEL_AGENT_UNIX_MODE", value_name = "MODE")]
    pub unix_mode: Option<String>,

    /// PEM certificate chain of tls:// listeners
    #[arg(long, global = true, env = "VACCEL_AGENT_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// PEM private key of tls:// listeners
    #[arg(long, global = true, env = "VACCEL_AGENT_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// PEM authorities; when given, tls:// clients must show a certificate one of them signed
    #[arg(long, global = true, env = "VACCEL_AGENT_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,

    /// Lines `NAME TOKEN`; when given, tcp:// and tls:// calls must carry one of the tokens
    #[arg(long, global = true, env = "VACCEL_AGENT_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Folder for files that guests upload; one agent each [default: vaccel-agent in $XDG_STATE_HOME or
    /// ~/.local/state; $STATE_DIRECTORY under systemd]
    #[arg(long, global = true, env = "VACCEL_AGENT_STORE", value_name = "DIR")]
    pub store: Option<PathBuf>,

    /// What a stored file survives: `always` also power cuts, `rename` the agent's end, `never` neither
    /// [default: rename]
    #[arg(long, global = true, env = "VACCEL_AGENT_STORE_SYNC", value_name = "WHEN")]
    pub store_sync: Option<StoreSync>,

    /// MiB that all tenants may store together [default: 16384]
    #[arg(long, global = true, env = "VACCEL_AGENT_STORE_MIB", value_name = "MIB")]
    pub store_mib: Option<u64>,

    /// Folder of models, `NAME/VERSION/model.onnx` with an optional `NAME/config.pbtxt`, or of one model's files, as
    /// KServe mounts them; repeat for several
    #[arg(
        long,
        global = true,
        env = "VACCEL_AGENT_MODEL_REPOSITORY",
        value_delimiter = ',',
        value_name = "DIR"
    )]
    #[serde(default)]
    pub model_repository: Vec<PathBuf>,

    /// Name of a model whose files are in --model-repository itself [default: model]
    #[arg(long, global = true, env = "VACCEL_AGENT_MODEL_NAME", value_name = "NAME")]
    pub model_name: Option<String>,

    /// MiB of model files that are loaded at the same time [default: half of the machine's memory]
    #[arg(long, global = true, env = "VACCEL_AGENT_MODELS_MIB", value_name = "MIB")]
    pub models_mib: Option<u64>,

    /// ONNX Runtime library [default: $ORT_DYLIB_PATH, then the usual library folders]
    #[arg(long, global = true, env = "VACCEL_AGENT_ONNXRUNTIME", value_name = "PATH")]
    pub onnxruntime: Option<PathBuf>,

    /// MiB that all runs in ONNX Runtime may take together [default: half of the machine's memory]
    #[arg(long, global = true, env = "VACCEL_AGENT_ONNXRUNTIME_MIB", value_name = "MIB")]
    pub onnxruntime_mib: Option<u64>,

    /// Engine for models: auto, tract, onnxruntime or noop [default: auto]
    #[arg(long, global = true, env = "VACCEL_AGENT_ENGINE", value_name = "NAME")]
    pub engine: Option<String>,

    /// Device for sessions that name none: cpu or cuda:0 [default: cpu for models, by their size for products of
    /// matrices]
    #[arg(long, global = true, env = "VACCEL_AGENT_DEVICE", value_name = "NAME")]
    pub device: Option<String>,

    /// Folder of the CUDA libraries, which are then looked for in no other; repeat for several [default: where drivers
    /// and packages put them]
    #[arg(
        long,
        global = true,
        env = "VACCEL_AGENT_CUDA_LIBRARIES",
        value_delimiter = ',',
        value_name = "DIR"
    )]
    #[serde(default)]
    pub cuda_libraries: Vec<PathBuf>,

    /// MiB of each device that the agent may take [default: nine tenths of it]
    #[arg(long, global = true, env = "VACCEL_AGENT_DEVICE_MIB", value_name = "MIB")]
    pub device_mib: Option<u64>,

    /// MiB of a device that runs of one model may take beside its weights [default: 1024]
    #[arg(long, global = true, env = "VACCEL_AGENT_DEVICE_WORKSPACE_MIB", value_name = "MIB")]
    pub device_workspace_mib: Option<u64>,

    /// Threads that compute at the same time [default: number of cores]
    #[arg(long, global = true, env = "VACCEL_AGENT_LANES", value_name = "N")]
    pub lanes: Option<usize>,

    /// Seconds a session outlives its last connection [default: 30]
    #[arg(long, global = true, env = "VACCEL_AGENT_SESSION_LEASE", value_name = "SECONDS")]
    pub session_lease: Option<f64>,

    /// Seconds a call may take when it names no deadline [default: 60]
    #[arg(long, global = true, env = "VACCEL_AGENT_CALL_DEADLINE", value_name = "SECONDS")]
    pub call_deadline: Option<f64>,

    /// Seconds a model may take to load [default: 30]
    #[arg(long, global = true, env = "VACCEL_AGENT_LOAD_DEADLINE", value_name = "SECONDS")]
    pub load_deadline: Option<f64>,

    /// Seconds that calls may go on after SIGTERM [default: 30]
    #[arg(long, global = true, env = "VACCEL_AGENT_GRACE", value_name = "SECONDS")]
    pub grace: Option<f64>,

    /// Connections in all [default: 1024]
    #[arg(long, global = true, env = "VACCEL_AGENT_CONNECTIONS_MAX", value_name = "N")]
    pub connections_max: Option<usize>,

    /// Connections of one tenant [default: 256]
    #[arg(long, global = true, env = "VACCEL_AGENT_TENANT_CONNECTIONS_MAX", value_name = "N")]
    pub tenant_connections_max: Option<u64>,

    /// Sessions of one tenant [default: 64]
    #[arg(long, global = true, env = "VACCEL_AGENT_TENANT_SESSIONS_MAX", value_name = "N")]
    pub tenant_sessions_max: Option<u64>,

    /// Calls in flight of one tenant [default: 64]
    #[arg(long, global = true, env = "VACCEL_AGENT_TENANT_CALLS_MAX", value_name = "N")]
    pub tenant_calls_max: Option<u64>,

    /// MiB of files one tenant may keep on disk [default: 1024]
    #[arg(long, global = true, env = "VACCEL_AGENT_TENANT_RESOURCE_MIB", value_name = "MIB")]
    pub tenant_resource_mib: Option<u64>,

    /// MiB of requests one tenant may have in flight [default: 256]
    #[arg(long, global = true, env = "VACCEL_AGENT_TENANT_IN_FLIGHT_MIB", value_name = "MIB")]
    pub tenant_in_flight_mib: Option<u64>,

    /// MiB of memory one tenant may share with the agent, from the same machine; 0 for none [default: 1024]
    #[arg(long, global = true, env = "VACCEL_AGENT_TENANT_SHARED_MIB", value_name = "MIB")]
    pub tenant_shared_mib: Option<u64>,

    /// MiB of devices' memory one tenant may have [default: 16384]
    #[arg(long, global = true, env = "VACCEL_AGENT_TENANT_DEVICE_MIB", value_name = "MIB")]
    pub tenant_device_mib: Option<u64>,

    /// error, warn, info, debug or trace, or per module as in `info,vaccel_agent::transport=debug` [default: info]
    #[arg(long, global = true, env = "VACCEL_AGENT_LOG", value_name = "FILTER")]
    pub log: Option<String>,

    /// How log lines are written, to standard error [default: text]
    #[arg(long, global = true, env = "VACCEL_AGENT_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// What tenants may use, in the file only.
    #[arg(skip)]
    #[serde(default)]
    pub policy: Vec<Rule>,
}

/// Why a configuration cannot be used: which setting, what was expected, what came.
#[derive(Debug)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    /// An error with its whole text.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

macro_rules! prefer {
    ($above:ident, $below:ident, $($field:ident),*) => { $($above.$field = $above.$field.or($below.$field);)* };
}

impl Settings {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or has a key that does not exist.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError(format!("configuration file {}: {error}", path.display())))?;
        toml::from_str(&text)
            .map_err(|error| ConfigError(format!("configuration file {}: {error}", path.display())))
    }

    /// These settings, with those of `below` where these say nothing.
    #[must_use]
    pub fn over(mut self, below: Self) -> Self {
        if self.address.is_empty() {
            self.address = below.address;
        }
        if self.model_repository.is_empty() {
            self.model_repository = below.model_repository;
        }
        if self.cuda_libraries.is_empty() {
            self.cuda_libraries = below.cuda_libraries;
        }
        if self.policy.is_empty() {
            self.policy = below.policy;
        }
        prefer!(
            self,
            below,
            vsock,
            ready_file,
            insecure,
            unix_mode,
            tls_cert,
            tls_key,
            tls_client_ca,
            token_file,
            store,
            store_sync,
            store_mib,
            model_name,
            models_mib,
            onnxruntime,
            onnxruntime_mib,
            engine,
            device,
            device_mib,
            device_workspace_mib,
            lanes,
            session_lease,
            call_deadline,
            load_deadline,
            grace,
            connections_max,
            tenant_connections_max,
            tenant_sessions_max,
            tenant_calls_max,
            tenant_resource_mib,
            tenant_in_flight_mib,
            tenant_shared_mib,
            tenant_device_mib,
            log,
            log_format
        );
        self
    }
}

/// What the agent runs on.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen; never empty.
    pub addresses: Vec<Endpoint>,
    /// Where to announce the bound addresses.
    pub ready_file: Option<PathBuf>,
    /// Whether plain TCP may leave loopback.
    pub insecure: bool,
    /// Mode of unix sockets.
    pub unix_mode: u32,
    /// Files of `tls://` listeners.
    pub tls: Option<TlsFiles>,
    /// Bearer tokens of `tcp://` and `tls://` listeners.
    pub token_file: Option<PathBuf>,
    /// Where uploaded files are.
    pub store: StoreConfig,
    /// Models by name.
    pub repository: RepositoryConfig,
    /// Engines and devices.
    pub engines: EngineConfig,
    /// Threads that compute at the same time.
    pub lanes: usize,
    /// How long a session outlives its last connection.
    pub session_lease: Duration,
    /// Deadline of a call that names none.
    pub call_deadline: Duration,
    /// How long a model may take to load.
    pub load_deadline: Duration,
    /// How long calls may go on after the signal to stop.
    pub grace: Duration,
    /// Connections in all.
    pub connections_max: usize,
    /// Bounds of one tenant.
    pub tenant: TenantLimits,
    /// What tenants may use; the first rule that fits one counts.
    pub policy: Vec<Rule>,
    /// Filter of log lines.
    pub log: String,
    /// How log lines are written.
    pub log_format: LogFormat,
}

/// PEM files of `tls://` listeners.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain.
    pub cert: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// Authorities of client certificates; when set, a client must show one.
    pub client_ca: Option<PathBuf>,
}

/// Which engines and devices to use.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// ONNX Runtime library a person named; it must load.
    pub onnxruntime: Option<PathBuf>,
    /// Bytes that all runs in ONNX Runtime may take together.
    pub onnxruntime_bytes: u64,
    /// Engine for sessions that name none; empty for the best present.
    pub engine: String,
    /// Device for sessions that name none; empty for the engine's best.
    pub device: String,
    /// Threads one model run may use.
    pub threads: usize,
    /// Accelerators.
    pub devices: DeviceConfig,
}

impl Default for EngineConfig {
    /// The best engine and device present, on all cores, with half of the memory.
    fn default() -> Self {
        Self {
            onnxruntime: None,
            onnxruntime_bytes: machine_memory() / 2,
            engine: String::new(),
            device: String::new(),
            threads: cores(),
            devices: DeviceConfig::default(),
        }
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl Config {
    /// Checks settings and fills in defaults.
    ///
    /// # Errors
    /// A setting that does not parse, or addresses that need another setting.
    pub fn new(settings: Settings) -> Result<Self, ConfigError> {
        let lanes = limits::lanes(settings.lanes)?;
        let tenant = TenantLimits::new(&settings)?;
        let engines = EngineConfig::default();
        let config = Self {
            addresses: addresses::addresses(&settings)?,
            ready_file: settings.ready_file,
            insecure: settings.insecure.unwrap_or(false),
            unix_mode: unix_mode(settings.unix_mode.as_deref().unwrap_or("660"))?,
            tls: tls_files(settings.tls_cert, settings.tls_key, settings.tls_client_ca)?,
            token_file: settings.token_file,
            store: StoreConfig::new(settings.store, settings.store_sync, settings.store_mib)?,
            repository: RepositoryConfig::new(
                settings.model_repository,
                settings.model_name,
                settings.models_mib,
            )?,
            engines: EngineConfig {
                onnxruntime: settings.onnxruntime,
                onnxruntime_bytes: match settings.onnxruntime_mib {
                    Some(mib) => mebibytes(at_least_one("onnxruntime-mib", mib)?),
                    None => engines.onnxruntime_bytes,
                },
                engine: settings.engine.filter(|name| name != "auto").unwrap_or_default(),
                device: settings.device.unwrap_or_default(),
                devices: DeviceConfig::new(
                    settings.cuda_libraries,
                    settings.device_mib,
                    settings.device_workspace_mib,
                )?,
                ..engines
            },
            lanes,
            session_lease: seconds("session-lease", settings.session_lease, 30.0)?,
            call_deadline: seconds("call-deadline", settings.call_deadline, 60.0)?,
            load_deadline: seconds("load-deadline", settings.load_deadline, 30.0)?,
            grace: seconds("grace", settings.grace, 30.0)?,
            connections_max: limits::connections(settings.connections_max)?,
            tenant,
            policy: settings.policy,
            log: log::filter(settings.log)?,
            log_format: settings.log_format.unwrap_or_default(),
        };
        addresses::check(&config.addresses, config.tls.is_some(), config.insecure)?;
        Ok(config)
    }
}

fn tls_files(
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
) -> Result<Option<TlsFiles>, ConfigError> {
    match (cert, key, client_ca) {
        (Some(cert), Some(key), client_ca) => Ok(Some(TlsFiles { cert, key, client_ca })),
        (None, None, None) => Ok(None),
        _ => Err(ConfigError("TLS needs both --tls-cert FILE and --tls-key FILE".into())),
    }
}

fn unix_mode(text: &str) -> Result<u32, ConfigError> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err(ConfigError(format!("--unix-mode: expected an octal mode such as 660, got {text:?}"))),
    }
}

fn seconds(name: &str, value: Option<f64>, default: f64) -> Result<Duration, ConfigError> {
    /// Thirty years: what is added to the clock must not be past its end.
    const SECONDS_MAX: f64 = 1e9;
    let value = value.unwrap_or(default);
    let duration = Duration::try_from_secs_f64(value).ok().filter(|_| value <= SECONDS_MAX);
    duration.filter(|duration| *duration > Duration::ZERO).ok_or_else(|| {
        ConfigError(format!("--{name}: expected seconds above 0 and at most {SECONDS_MAX:e}, got {value}"))
    })
}

fn at_least_one<N: Default + PartialEq>(name: &str, value: N) -> Result<N, ConfigError> {
    if value == N::default() {
        Err(ConfigError(format!("--{name}: expected 1 or more, got 0")))
    } else {
        Ok(value)
    }
}

fn mebibytes(value: u64) -> u64 {
    value.saturating_mul(1 << 20)
}

/// Memory this process can have, in bytes: the machine's, or less where a control group (a container, a service with
/// `MemoryMax`) says so.
pub(crate) fn machine_memory() -> u64 {
    /// Where neither file tells, for example without `/proc`.
    const UNKNOWN: u64 = 4 << 30;
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let kibibytes =
            text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.split_whitespace().next()?;
        kibibytes.parse::<u64>().ok()?.checked_mul(1 << 10)
    });
    let group =
        std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    machine.into_iter().chain(group).min().unwrap_or(UNKNOWN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(toml: &str) -> Result<Config, ConfigError> {
        Config::new(toml::from_str(toml).map_err(|error| ConfigError::new(error.to_string()))?)
    }

    #[test]
    fn defaults_are_local_only() {
        let config = config("").expect("defaults are valid");
        assert!(
            config
                .addresses
                .iter()
                .all(|address| !matches!(address, Endpoint::Vsock { .. } | Endpoint::Tls(_)))
        );
        assert_eq!(config.session_lease, Duration::from_secs(30));
        assert_eq!(config.unix_mode, 0o660);
    }

    #[test]
    fn the_upper_layer_wins_field_by_field() {
        let file: Settings = toml::from_str("lanes = 3\ngrace = 5\naddress = ['unix://@a']").expect("valid");
        let flags = Settings { lanes: Some(7), ..Settings::default() };
        let config = Config::new(flags.over(file)).expect("valid");
        assert_eq!(config.lanes, 7);
        assert_eq!(config.grace, Duration::from_secs(5));
        assert_eq!(config.addresses, [Endpoint::UnixAbstract("a".into())]);
    }

    #[test]
    fn every_refusal_names_the_setting() {
        for (toml, named) in [
            ("adress = []", "adress"),
            ("address = ['tcp://0.0.0.0:1']", "--insecure"),
            ("address = ['tcp://example.org:1']", "--insecure"),
            ("address = ['tls://127.0.0.1:1']", "--tls-cert"),
            ("address = ['unix://a', 'unix://a']", "twice"),
            ("address = ['vsock://any:0']", "port 0"),
            ("tls-cert = 'a'", "--tls-key"),
            ("unix-mode = '999'", "--unix-mode"),
            ("grace = -1", "--grace"),
            ("session-lease = nan", "--session-lease"),
            ("grace = 1e30", "--grace"),
            ("lanes = 0", "--lanes: expected 1 or more, got 0"),
            ("lanes = 100000", "--lanes: expected at most 4096, got 100000"),
            ("connections-max = 0", "--connections-max"),
            ("connections-max = 9000000000000000000", "--connections-max"),
            ("tenant-connections-max = 0", "--tenant-connections-max"),
            ("tenant-sessions-max = 0", "--tenant-sessions-max"),
            ("tenant-calls-max = 0", "--tenant-calls-max"),
            ("tenant-in-flight-mib = 0", "--tenant-in-flight-mib"),
            ("log = 'inof'", "--log: expected error, warn, info, debug, trace or off"),
            ("log = 'info,vaccel_agent=loud'", "got \"vaccel_agent=loud\""),
            ("log = ''", "--log"),
            ("store-mib = 0", "--store-mib"),
            ("store-sync = 'sometimes'", "store-sync"),
            ("device-mib = 0", "--device-mib"),
            ("device-workspace-mib = 0", "--device-workspace-mib"),
        ] {
            let refusal = config(toml).expect_err(toml).to_string();
            assert!(refusal.contains(named), "{toml}: {refusal}");
        }
    }

    #[test]
    fn filters_of_log_lines_are_levels_of_all_or_of_a_module() {
        for log in ["debug", "OFF", "3", "warn,vaccel_agent=debug", "info, vaccel_agent::transport=trace"] {
            config(&format!("log = '{log}'")).expect(log);
        }
    }

    #[test]
    fn vsock_and_insecure_are_switches() {
        let config = config("vsock = true\ninsecure = true\naddress = ['tcp://0.0.0.0:1']").expect("valid");
        assert_eq!(config.addresses[1].to_string(), "vsock://any:2048");
    }
}
