//! The figures.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use vaccel_client::{Awake, CallOptions, Client, Session, SessionOptions};
use vaccel_proto::Error;

use super::models::{Measured, models};
use super::products::{containment, product};
use super::{Check, EmptyCall, Engine, Goal, Options, Record, SelfTestError, Transfer};
use crate::direct::Accelerators;
use crate::networks::{SIDE, mobilenet, resnet};
use crate::{Agent, Config, Direct};

/// The processor, as a device.
pub(super) const CPU: &str = "cpu";

/// Largest difference of two devices' numbers, to the largest of them.
pub(super) const ERROR_MAX: f64 = 1e-3;

/// What one call may take: the largest product on a slow processor.
const CALL_DEADLINE: Duration = Duration::from_secs(300);

/// Memory to share with the agent: three matrices of the largest product, and more.
const SHARED_BYTES: usize = 1 << 30;

/// A pause of the caller as long as a short run on a device, after which the agent's threads take their time to wake.
const PAUSE: Duration = Duration::from_millis(2);

/// How long a turn is, in which at least one call is made.
const TURN: Duration = Duration::from_millis(20);

/// How much is measured.
pub(super) struct Amounts {
    /// How long each figure is measured; one call that takes longer is enough.
    pub(super) time: Duration,
    cpu_sides: &'static [usize],
    device_sides: &'static [usize],
    pub(super) cpu_batches: &'static [usize],
    pub(super) device_batches: &'static [usize],
    pub(super) networks: &'static [Measured],
}

const MOBILENET: Measured = Measured { name: "MobileNetV2", make: mobilenet };
const RESNET: Measured = Measured { name: "ResNet-50", make: resnet };

const WHOLE: Amounts = Amounts {
    time: Duration::from_secs(2),
    cpu_sides: &[1024, 2048],
    device_sides: &[2048, 8192],
    cpu_batches: &[1, 8],
    device_batches: &[1, 8, 32],
    networks: &[MOBILENET, RESNET],
};

const QUICK: Amounts = Amounts {
    time: Duration::from_millis(100),
    cpu_sides: &[256],
    device_sides: &[256],
    cpu_batches: &[1, 2],
    device_batches: &[1, 2],
    networks: &[MOBILENET],
};

/// Fills the record.
pub(super) async fn all(
    record: &mut Record,
    config: &Config,
    direct: &Direct,
    folder: &Path,
    options: Options,
) -> Result<(), SelfTestError> {
    let amounts = if options.quick { QUICK } else { WHOLE };
    for network in amounts.networks {
        write_models(&folder.join("models"), network)?;
    }
    let agent = Agent::start(config.clone()).await?;
    // This thread has nothing else to do: the agent is on those of the runtime.
    let measured = as_a_program_of_its_own(|| with_agent(record, &agent, config, direct, &amounts));
    agent.drain().await;
    measured?;
    judge(record);
    Ok(())
}

/// Does what callers do on a thread and a runtime that the agent has no part in.
fn as_a_program_of_its_own<Work>(work: impl FnOnce() -> Work + Send) -> Result<(), SelfTestError>
where
    Work: Future<Output = Result<(), SelfTestError>>,
{
    std::thread::scope(|scope| {
        let run = || tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work());
        let thread = std::thread::Builder::new().name("callers".into()).spawn_scoped(scope, run)?;
        thread.join().unwrap_or_else(|_| Err(std::io::Error::other("measuring failed").into()))
    })
}

async fn with_agent(
    record: &mut Record,
    agent: &Agent,
    config: &Config,
    direct: &Direct,
    amounts: &Amounts,
) -> Result<(), SelfTestError> {
    let mut clients = Vec::new();
    for endpoint in agent.endpoints() {
        clients.push(Client::builder(endpoint.clone()).shared_bytes(SHARED_BYTES).connect().await?);
    }
    record.engines = engines(direct, &record.accelerators);
    for client in &clients {
        let call = empty_call(client, amounts).await?;
        tracing::info!(?call, "measured");
        record.empty_calls.push(call);
    }
    record.transfers.push(in_memory(amounts));
    let mut devices = vec![CPU.to_owned()];
    if record.accelerators.cublas.is_some() {
        let usable = record.accelerators.devices.iter().filter(|device| device.unusable_because.is_empty());
        devices.extend(usable.map(|device| device.name.clone()));
    }
    for device in &devices {
        if let Err(error) = on_device(record, config, direct, &clients[0], device, amounts).await {
            fails(record, format!("products on {device}"), device, error)?;
        }
    }
    models(record, config, &clients[0], amounts).await
}

/// What a device cannot do is a check that failed, and the rest is measured; without the processor nothing is.
pub(super) fn fails(
    record: &mut Record,
    what: String,
    device: &str,
    error: SelfTestError,
) -> Result<(), SelfTestError> {
    if device == CPU {
        return Err(error);
    }
    let cause = match &error {
        SelfTestError::Call(error) => std::error::Error::source(error).map(ToString::to_string),
        _ => None,
    };
    let found = cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
    // Libraries end their lines.
    let found = found.split_whitespace().collect::<Vec<_>>().join(" ");
    record.checks.push(Check { what, found, expected: "no error".into(), passed: false });
    Ok(())
}

async fn on_device(
    record: &mut Record,
    config: &Config,
    direct: &Direct,
    client: &Client,
    device: &str,
    amounts: &Amounts,
) -> Result<(), SelfTestError> {
    if device != CPU {
        let [up, down] = direct.bandwidths(device)?;
        let (device, up_gb_s, down_gb_s) = (device.to_owned(), up / 1e9, down / 1e9);
        record.transfers.push(Transfer { device, up_gb_s, down_gb_s });
    }
    for side in if device == CPU { amounts.cpu_sides } else { amounts.device_sides } {
        let session = open(client, "", device).await?;
        let product = product(direct, client, &session, device, *side, amounts).await?;
        session.close().await?;
        tracing::info!(?product, "measured");
        record.sgemm.push(product);
    }
    if device != CPU {
        record.checks.push(containment(&config.engines, device)?);
    }
    Ok(())
}

/// A network by two names: one whose calls run together, and one whose calls do not.
fn write_models(folder: &Path, network: &Measured) -> std::io::Result<()> {
    let file = (network.make)();
    for name in [network.name, &network.alone()] {
        let version = folder.join(name).join("1");
        std::fs::create_dir_all(&version)?;
        std::fs::write(version.join("model.onnx"), &file)?;
    }
    std::fs::write(folder.join(network.alone()).join("config.pbtxt"), "max_batch_size: 64\n")
}

/// The engines as this process sees them, in which finding out what is missing has loaded them, and what they can
/// compute on.
fn engines(direct: &Direct, accelerators: &Accelerators) -> Vec<Engine> {
    let is_usable = |name: &String| {
        let mut devices = accelerators.devices.iter();
        devices.all(|device| device.name != *name || device.unusable_because.is_empty())
    };
    let engines = direct.engines().into_iter().map(|engine| Engine {
        name: engine.name,
        version: engine.version,
        devices: engine.devices.into_iter().filter(is_usable).collect(),
        absent_because: engine.absent_because,
    });
    engines.collect()
}

pub(super) async fn open(client: &Client, engine: &str, device: &str) -> Result<Session, Error> {
    let options = SessionOptions { engine: engine.into(), device: device.into(), hints: 0 };
    let session = client.open_session(options).await?;
    Ok(session.with(CallOptions { deadline: Some(CALL_DEADLINE), ..CallOptions::default() }))
}

/// Calls of a session whose thread sleeps in none of them.
pub(super) fn stays_awake(session: &Session) -> Session {
    session.with(CallOptions {
        deadline: Some(CALL_DEADLINE),
        awake: Awake::For(CALL_DEADLINE),
        ..CallOptions::default()
    })
}

pub(super) fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Medians in seconds, of something in this process and over the socket, by turns of some calls each: whoever calls all
/// the time finds threads and memory as the last call left them.
pub(super) async fn by_turns(
    amounts: &Amounts,
    mut direct: impl FnMut() -> Result<(), Error>,
    mut remote: impl AsyncFnMut() -> Result<(), Error>,
) -> Result<[f64; 2], Error> {
    direct()?;
    remote().await?;
    let (begun, mut alone, mut called) = (Instant::now(), Vec::new(), Vec::new());
    while alone.is_empty() || begun.elapsed() < amounts.time {
        let turn = Instant::now();
        while turn.elapsed() < TURN {
            let begun = Instant::now();
            direct()?;
            alone.push(begun.elapsed().as_secs_f64());
        }
        let turn = Instant::now();
        while turn.elapsed() < TURN {
            let begun = Instant::now();
            remote().await?;
            called.push(begun.elapsed().as_secs_f64());
        }
    }
    Ok([median(alone), median(called)])
}

/// Numbers in memory that the agent shares, if it does.
pub(super) async fn in_shared_memory(client: &Client, numbers: &[f32]) -> Bytes {
    let mut buffer = client.buffer(size_of_val(numbers)).await;
    buffer.copy_from_slice(bytemuck::cast_slice(numbers));
    buffer.freeze()
}

async fn empty_call(client: &Client, amounts: &Amounts) -> Result<EmptyCall, Error> {
    let session = open(client, "", "").await?;
    session.noop().await?;
    let mut medians = [Duration::ZERO, PAUSE].map(|pause| (pause, 0.0));
    for (pause, us) in &mut medians {
        let (begun, mut took) = (Instant::now(), Vec::new());
        while took.is_empty() || begun.elapsed() < amounts.time {
            let paused = Instant::now();
            while paused.elapsed() < *pause {
                std::hint::spin_loop();
            }
            let begun = Instant::now();
            session.noop().await?;
            took.push(begun.elapsed().as_secs_f64());
        }
        *us = median(took) * 1e6;
    }
    session.close().await?;
    let transport = client.endpoint().to_string().split("://").next().unwrap_or_default().to_owned();
    let [(_, us), (_, after_pause_us)] = medians;
    Ok(EmptyCall { transport, us, after_pause_us })
}

/// What one core copies: below what a stage takes to be filled nothing can be uploaded.
fn in_memory(amounts: &Amounts) -> Transfer {
    const BYTES: usize = 64 << 20;
    let (from, mut to) = (vec![1_u8; BYTES], vec![0_u8; BYTES]);
    let (begun, mut took) = (Instant::now(), Vec::new());
    while took.is_empty() || begun.elapsed() < amounts.time {
        let begun = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        took.push(begun.elapsed().as_secs_f64());
    }
    let gb_s = BYTES as f64 / median(took) / 1e9;
    Transfer { device: CPU.into(), up_gb_s: gb_s, down_gb_s: gb_s }
}

/// What must hold, and what a host with a device should reach.
fn judge(record: &mut Record) {
    let check = |what: String, error: f64| Check {
        what,
        found: format!("{error:.2e}"),
        expected: format!("at most {ERROR_MAX:.0e}"),
        passed: error <= ERROR_MAX,
    };
    for one in &record.sgemm {
        record.checks.push(check(format!("sgemm {} on {}: max error", one.side, one.device), one.max_error));
    }
    for one in &record.models {
        let Some(error) = one.max_error else { continue };
        let what =
            format!("{} on {} {}, batch {}: max error", one.network, one.engine, one.device, one.batch);
        record.checks.push(check(what, error));
    }
    let copied = record.transfers.first().map_or(f64::INFINITY, |memory| memory.up_gb_s);
    for one in record.sgemm.iter().filter(|one| one.side >= 8192) {
        let Some(pinned) = one.pinned_tflops else { continue };
        let (found, goal) = (one.shared_tflops / pinned, 0.8);
        let what = format!(
            "sgemm {} on {}, unix in shared to cuBLAS in pinned memory, at least",
            one.side, one.device
        );
        record.goals.push(Goal { what, found, goal, met: found >= goal });
    }
    for one in record.models.iter().filter(|one| one.device != CPU && one.network == RESNET.name) {
        let what = |figure: &str| format!("{} on {}, batch {}: {figure}", one.network, one.device, one.batch);
        let goal = match one.batch {
            // The client copies once, into the memory that it shares.
            1 => {
                let goal = 30.0 + (3 * SIDE * SIDE * 4) as f64 / (copied * 1e9) * 1e6;
                let awake = one.awake.as_ref().map_or(f64::INFINITY, |awake| awake.added_us);
                let what_awake = what("microseconds added for who stays awake, at most");
                record.goals.push(Goal { what: what_awake, found: awake, goal, met: awake <= goal });
                let (what, found) = (what("added microseconds, at most"), one.unix_added_us);
                Goal { what, found, goal, met: found <= goal }
            }
            8 => {
                let (found, goal) = (one.unix_to_direct, 1.05);
                Goal { what: what("unix to direct, at most"), found, goal, met: found <= goal }
            }
            _ => continue,
        };
        record.goals.push(goal);
    }
}
