//! Flags to configuration, configuration to a running agent, signals to its end, all of it to an exit code.

mod logs;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use vaccel_agent::config::LogFormat;
use vaccel_agent::self_test::{self, SelfTestError, Verdict};
use vaccel_agent::{Agent, Config, ConfigError, Settings, StartError, demo};

use crate::logs::Bounded;

/// Serves vAccel operations to guests over vsock, unix sockets, TCP and TLS.
#[derive(Debug, Parser)]
#[command(name = "vaccel-agent", version, args_conflicts_with_subcommands = false)]
struct Flags {
    #[command(subcommand)]
    command: Option<Command>,

    /// TOML file with any of these settings
    #[arg(long, env = "VACCEL_AGENT_CONFIG", value_name = "FILE", global = true)]
    config: Option<PathBuf>,

    #[command(flatten)]
    settings: Settings,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM (what happens without a command)
    Serve,
    /// Agent and guest in one process: classify bundled images over real sockets, with latencies
    Demo,
    /// What this host has to compute on, whether all of it computes the same, and how fast
    SelfTest {
        /// A GPU is required: where none can be used, say what is missing and end with exit code 69
        #[arg(long)]
        gpu: bool,
        /// Small sizes, to see that it works
        #[arg(long)]
        quick: bool,
        /// One JSON document instead of text
        #[arg(long)]
        json: bool,
    },
    /// List the operations
    Ops,
    /// Check the configuration and say what it comes to
    CheckConfig,
}

/// Something failed while running.
const EXIT_FAILED: u8 = 1;
/// A device is required and absent; `EX_UNAVAILABLE` of sysexits.h.
const EXIT_ABSENT: u8 = 69;
/// The configuration cannot be used; `EX_CONFIG` of sysexits.h. (2, wrong usage, comes from the flag parser.)
const EXIT_CONFIG: u8 = 78;

fn main() -> ExitCode {
    // The agent runs itself so, for libraries of guests; before there is a second thread.
    if std::env::args_os().nth(1).is_some_and(|first| first == vaccel_agent::EXEC_WORKER) {
        return vaccel_agent::exec_worker();
    }
    match run() {
        Ok(code) => code,
        Err(Failure { exit, message }) => {
            let _ = writeln!(std::io::stderr(), "vaccel-agent: {message}");
            ExitCode::from(exit)
        }
    }
}

struct Failure {
    exit: u8,
    message: String,
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self { exit: EXIT_CONFIG, message: error.to_string() }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let exit = if matches!(error, StartError::Bind(..)) { EXIT_FAILED } else { EXIT_CONFIG };
        Self { exit, message: error.to_string() }
    }
}

impl From<SelfTestError> for Failure {
    fn from(error: SelfTestError) -> Self {
        match error {
            SelfTestError::Start(error) => error.into(),
            error => failed(error),
        }
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure { exit: EXIT_FAILED, message: error.to_string() }
}

fn run() -> Result<ExitCode, Failure> {
    let Flags { command, config, settings } = Flags::parse();
    let settings = match &config {
        Some(path) => settings.over(Settings::from_file(path)?),
        None => settings,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(failed)?;
    match command.unwrap_or(Command::Serve) {
        Command::Serve => {
            let ended = runtime.block_on(serve(Config::new(settings)?));
            // A run that does not stop must not keep the agent from ending.
            runtime.shutdown_background();
            ended
        }
        Command::Demo => {
            let settings = Settings { log: settings.log.or_else(|| Some("warn".into())), ..settings };
            start_logs(&Config::new(settings.clone())?, Bounded::all())?;
            runtime.block_on(demo::run(settings, &mut std::io::stdout())).map_err(failed)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::SelfTest { gpu, quick, json } => {
            let settings = Settings { log: settings.log.or_else(|| Some("error".into())), ..settings };
            start_logs(&Config::new(settings.clone())?, Bounded::all())?;
            let options = self_test::Options { gpu, quick, json };
            let verdict = runtime.block_on(self_test::run(settings, options, &mut std::io::stdout()))?;
            Ok(match verdict {
                Verdict::Passed => ExitCode::SUCCESS,
                Verdict::Failed => EXIT_FAILED.into(),
                Verdict::Absent => EXIT_ABSENT.into(),
            })
        }
        Command::Ops => {
            let lines =
                vaccel_agent::operations().into_iter().map(|op| format!("{:<24} {}\n", op.name, op.summary));
            print(&lines.collect::<String>())
        }
        Command::CheckConfig => {
            let config = Config::new(settings)?;
            vaccel_agent::check(&config)?;
            print(&format!("{config:#?}\n"))
        }
    }
}

fn print(text: &str) -> Result<ExitCode, Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        written => written.map(|()| ExitCode::SUCCESS).map_err(failed),
    }
}

fn start_logs(config: &Config, bounded: Bounded) -> Result<(), ConfigError> {
    let filter: Targets =
        config.log.parse().map_err(|error| ConfigError::new(format!("--log {:?}: {error}", config.log)))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match config.log_format {
        LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(filter.and(bounded))).init();
    logs::take_panics();
    Ok(())
}

async fn serve(config: Config) -> Result<ExitCode, Failure> {
    let bounded = Bounded::new();
    start_logs(&config, bounded.clone())?;
    tokio::spawn(bounded.tell());
    // From here on a signal is not lost, however early it comes.
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let ready_file = config.ready_file.clone();
    let grace = config.grace;
    let agent = Agent::start(config).await?;
    let addresses: Vec<String> = agent.endpoints().iter().map(ToString::to_string).collect();
    for address in &addresses {
        print(&format!("listening on {address}\n"))?;
    }
    if let Some(path) = &ready_file {
        write_ready(path, &addresses)
            .map_err(|error| failed(format!("--ready-file {}: {error}", path.display())))?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!(?grace, "stopping: no new calls, running ones may finish");
    if let Some(path) = &ready_file {
        let _ = std::fs::remove_file(path);
    }
    tokio::select! {
        finished = agent.drain() => if !finished {
            tracing::warn!("the grace is over; calls that were still running are cut off");
        },
        // Whoever asks twice does not want to wait.
        _ = terminate.recv() => tracing::warn!("asked again to stop: running calls are cut off"),
        _ = interrupt.recv() => tracing::warn!("asked again to stop: running calls are cut off"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Whole or not at all: whoever waits for the file never reads half of it.
fn write_ready(path: &Path, addresses: &[String]) -> std::io::Result<()> {
    let ready = serde_json::json!({ "pid": std::process::id(), "addresses": addresses });
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    std::fs::write(&name, format!("{ready}\n"))?;
    std::fs::rename(&name, path)
}
