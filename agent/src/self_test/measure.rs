//! The figures.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use vaccel_client::{CallOptions, Client, Resource, Session, SessionOptions, Sgemm, named};
use vaccel_proto::v1::{SgemmRequest, Tensor};
use vaccel_proto::{Error, Reason};

use super::{
    Batching, Check, EmptyCall, Engine, Goal, Model, Options, Product, Record, SelfTestError, Transfer,
};
use crate::config::{DeviceConfig, EngineConfig};
use crate::networks::{SIDE, mobilenet, resnet};
use crate::{Agent, Config, Direct, Network};

/// The processor, as a device.
const CPU: &str = "cpu";

/// Largest difference of two devices' numbers, to the largest of them.
const ERROR_MAX: f64 = 1e-3;

/// What one call may take: the largest product on a slow processor.
const CALL_DEADLINE: Duration = Duration::from_secs(300);

/// Callers at the same time, one image each.
const CALLERS: usize = 16;

/// How much is measured.
struct Amounts {
    /// How long each figure is measured; one call that takes longer is enough.
    time: Duration,
    cpu_sides: &'static [usize],
    device_sides: &'static [usize],
    batches: &'static [usize],
    network: fn() -> Bytes,
}

const WHOLE: Amounts = Amounts {
    time: Duration::from_secs(2),
    cpu_sides: &[1024, 2048],
    device_sides: &[2048, 8192],
    batches: &[1, 8, 32],
    network: resnet,
};

const QUICK: Amounts = Amounts {
    time: Duration::from_millis(100),
    cpu_sides: &[256],
    device_sides: &[256],
    batches: &[1, 2],
    network: mobilenet,
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
    let network = (amounts.network)();
    write_models(&folder.join("models"), &network)?;
    let agent = Agent::start(config.clone()).await?;
    let measured = with_agent(record, &agent, config, direct, &amounts, &network).await;
    agent.drain().await;
    measured?;
    judge(record);
    Ok(())
}

async fn with_agent(
    record: &mut Record,
    agent: &Agent,
    config: &Config,
    direct: &Direct,
    amounts: &Amounts,
    network: &Bytes,
) -> Result<(), SelfTestError> {
    let mut clients = Vec::new();
    for endpoint in agent.endpoints() {
        clients.push(Client::builder(endpoint.clone()).connect().await?);
    }
    record.engines = engines(direct);
    for client in &clients {
        record.empty_calls.push(empty_call(client, amounts).await?);
    }
    record.transfers.push(in_memory(amounts));
    let mut devices = vec![CPU.to_owned()];
    if record.accelerators.cublas.is_some() {
        devices.extend(record.accelerators.devices.iter().map(|device| device.name.clone()));
    }
    for device in &devices {
        if let Err(error) = on_device(record, config, direct, &clients[0], device, amounts).await {
            fails(record, format!("products on {device}"), device, error)?;
        }
    }
    models(record, config, &clients[0], amounts, network).await
}

/// What a device cannot do is a check that failed, and the rest is measured; without the processor nothing is.
fn fails(record: &mut Record, what: String, device: &str, error: SelfTestError) -> Result<(), SelfTestError> {
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
        record.sgemm.push(product(direct, &session, device, *side, amounts).await?);
    }
    if device != CPU {
        record.checks.push(containment(&config.engines, device)?);
    }
    Ok(())
}

/// The network by two names: one whose calls run together, and one whose calls do not.
fn write_models(folder: &Path, network: &Bytes) -> std::io::Result<()> {
    for name in ["network", "alone"] {
        let version = folder.join(name).join("1");
        std::fs::create_dir_all(&version)?;
        std::fs::write(version.join("model.onnx"), network)?;
    }
    std::fs::write(folder.join("alone/config.pbtxt"), "max_batch_size: 64\n")
}

/// The engines as this process sees them, in which finding out what is missing has loaded them.
fn engines(direct: &Direct) -> Vec<Engine> {
    let engines = direct.engines().into_iter().map(|engine| Engine {
        name: engine.name,
        version: engine.version,
        devices: engine.devices,
        absent_because: engine.absent_because,
    });
    engines.collect()
}

async fn open(client: &Client, engine: &str, device: &str) -> Result<Session, Error> {
    let options = SessionOptions { engine: engine.into(), device: device.into(), hints: 0 };
    let session = client.open_session(options).await?;
    Ok(session.with(CallOptions { deadline: Some(CALL_DEADLINE), ..CallOptions::default() }))
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

async fn empty_call(client: &Client, amounts: &Amounts) -> Result<EmptyCall, Error> {
    let session = open(client, "", "").await?;
    session.noop().await?;
    let (begun, mut took) = (Instant::now(), Vec::new());
    while took.is_empty() || begun.elapsed() < amounts.time {
        let begun = Instant::now();
        session.noop().await?;
        took.push(begun.elapsed().as_secs_f64());
    }
    session.close().await?;
    let transport = client.endpoint().to_string().split("://").next().unwrap_or_default().to_owned();
    Ok(EmptyCall { transport, us: median(took) * 1e6 })
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

/// A square matrix of numbers between -1 and 1 that look random.
fn matrix(side: usize, seed: usize) -> Vec<f32> {
    (0..side * side).map(|index| ((index * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
}

async fn product(
    direct: &Direct,
    session: &Session,
    device: &str,
    side: usize,
    amounts: &Amounts,
) -> Result<Product, SelfTestError> {
    let (a, b) = (matrix(side, 1), matrix(side, 2));
    let size = i64::try_from(side).expect("a constant");
    let [left, right] = [Tensor::new(&[size, size], &a)?, Tensor::new(&[size, size], &b)?];
    let matrices = vec![named("a", left.clone()), named("b", right.clone())];
    let request = SgemmRequest { m: size, n: size, k: size, alpha: 1.0, matrices, ..SgemmRequest::default() };
    let call = || {
        let product = Sgemm::new(left.clone(), right.clone());
        async { session.sgemm(product?).await }
    };
    let found = call().await?;
    let max_error = error_of(&found.elements::<f32>()?, [&a, &b], side);
    direct.sgemm_on(device, &request)?;
    let (begun, mut alone, mut unix) = (Instant::now(), Vec::new(), Vec::new());
    while alone.is_empty() || begun.elapsed() < amounts.time {
        let begun = Instant::now();
        direct.sgemm_on(device, &request)?;
        alone.push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        call().await?;
        unix.push(begun.elapsed().as_secs_f64());
    }
    let tflops = |seconds: f64| 2.0 * (side as f64).powi(3) / seconds / 1e12;
    let resident = (device != CPU).then(|| direct.sgemm_resident(device, side)).transpose()?;
    session.close().await?;
    Ok(Product {
        device: device.into(),
        side,
        direct_tflops: tflops(median(alone)),
        resident_tflops: resident.map(|took| tflops(took.as_secs_f64())),
        unix_tflops: tflops(median(unix)),
        max_error,
    })
}

/// The largest difference of some rows and columns to sums in f64, to the largest of these or 1.
fn error_of(found: &[f32], [a, b]: [&[f32]; 2], side: usize) -> f64 {
    /// Cells that are looked at in each direction, from one corner to the other.
    const CELLS: usize = 16;
    let places = || (0..CELLS).map(|cell| cell * (side - 1) / (CELLS - 1));
    let cells = places().flat_map(|row| places().map(move |column| (row, column)));
    let (mut difference, mut largest) = (0.0_f64, 1.0_f64);
    for (row, column) in cells {
        let terms =
            (0..side).map(|depth| f64::from(a[row * side + depth]) * f64::from(b[depth * side + column]));
        let expected: f64 = terms.sum();
        largest = largest.max(expected.abs());
        let off = (f64::from(found[row * side + column]) - expected).abs();
        // What is no number is as wrong as can be.
        difference = if off.is_nan() { f64::INFINITY } else { difference.max(off) };
    }
    difference / largest
}

/// That what a device has no room for is an error with figures, and that the next call goes on.
fn containment(config: &EngineConfig, device: &str) -> Result<Check, SelfTestError> {
    /// Room for what products need for good, and for no large matrix.
    const BYTES_MAX: u64 = 160 << 20;
    const SIDE: i64 = 4096;
    let devices = DeviceConfig { bytes_max: Some(BYTES_MAX), ..config.devices.clone() };
    let small = Direct::new(&EngineConfig { devices, ..config.clone() })?;
    let zeros = |rows: i64, columns: i64| {
        let count = usize::try_from(rows * columns).expect("a constant");
        Tensor::new(&[rows, columns], &vec![0.0_f32; count])
    };
    let request = |k: i64| {
        let matrices = vec![named("a", zeros(1, k)?), named("b", zeros(k, SIDE)?)];
        Ok::<_, Error>(SgemmRequest { m: 1, n: SIDE, k, alpha: 1.0, matrices, ..SgemmRequest::default() })
    };
    let refusal = small.sgemm_on(device, &request(SIDE)?).map(drop);
    let next = small.sgemm_on(device, &request(1)?).map(drop);
    let is_refused = refusal.as_ref().is_err_and(|error| error.reason() == Reason::QuotaExceeded);
    let told =
        |outcome: Result<(), Error>| outcome.map_or_else(|error| error.to_string(), |()| "computed".into());
    Ok(Check {
        what: format!("{device} without room"),
        passed: is_refused && next.is_ok(),
        found: format!("{}; then: {}", told(refusal), told(next)),
        expected: "QUOTA_EXCEEDED with figures; then: computed".into(),
    })
}

/// An image for each row, all different.
fn images(batch: usize) -> Result<Tensor, Error> {
    let pixels: Vec<f32> =
        (0..batch * 3 * SIDE * SIDE).map(|index| (index % 251) as f32 / 125.0 - 1.0).collect();
    let [rows, side] = [batch, SIDE].map(|size| i64::try_from(size).expect("a constant"));
    Tensor::new(&[rows, 3, side, side], &pixels)
}

async fn models(
    record: &mut Record,
    config: &Config,
    client: &Client,
    amounts: &Amounts,
    network: &Bytes,
) -> Result<(), SelfTestError> {
    let computing =
        record.engines.iter().filter(|engine| engine.absent_because.is_empty() && engine.name != "noop");
    let places = computing
        .flat_map(|engine| engine.devices.iter().map(|device| (engine.name.clone(), device.clone())));
    let places: Vec<(String, String)> = places.collect();
    // What the first engine says of each batch.
    let mut expected = Vec::new();
    for (engine, device) in &places {
        let config =
            EngineConfig { engine: engine.clone(), device: device.clone(), ..config.engines.clone() };
        let ran = model(record, &config, client, amounts, network, &mut expected).await;
        if let Err(error) = ran {
            fails(record, format!("{} on {engine} {device}", record.network), device, error)?;
        }
    }
    // Where the network is fastest is where batches matter.
    let fastest = record.models.iter().max_by(|one, other| one.images_per_s.total_cmp(&other.images_per_s));
    if let Some(fastest) = fastest {
        let (engine, device) = (fastest.engine.clone(), fastest.device.clone());
        let on_calls_per_s = calls_per_s(client, &engine, &device, "network", amounts).await?;
        let off_calls_per_s = calls_per_s(client, &engine, &device, "alone", amounts).await?;
        record.batching =
            Some(Batching { engine, device, callers: CALLERS, on_calls_per_s, off_calls_per_s });
    }
    Ok(())
}

/// The network on one engine and device.
async fn model(
    record: &mut Record,
    config: &EngineConfig,
    client: &Client,
    amounts: &Amounts,
    network: &Bytes,
    expected: &mut Vec<Vec<f32>>,
) -> Result<(), SelfTestError> {
    let (engine, device) = (&config.engine, &config.device);
    let direct = Network::load(config, network.clone())?;
    let session = open(client, engine, device).await?;
    for (index, batch) in amounts.batches.iter().enumerate() {
        let images = images(*batch)?;
        let first = direct.run(images.clone())?;
        let first = first.elements::<f32>()?.to_vec();
        let max_error = expected.get(index).map(|expected| difference(&first, expected));
        if max_error.is_none() {
            expected.push(first);
        }
        let (alone, unix) = model_times(&direct, &session, &images, amounts).await?;
        record.models.push(Model {
            engine: engine.clone(),
            device: device.clone(),
            batch: *batch,
            direct_ms: alone * 1e3,
            images_per_s: *batch as f64 / alone,
            unix_ms: unix * 1e3,
            added_us: (unix - alone) * 1e6,
            unix_to_direct: unix / alone,
            max_error,
        });
    }
    session.close().await?;
    Ok(())
}

/// The largest difference of two lists, to the largest number of the second.
fn difference(found: &[f32], expected: &[f32]) -> f64 {
    let pairs =
        || found.iter().zip(expected).map(|(found, expected)| (f64::from(*found), f64::from(*expected)));
    let largest = pairs().map(|(_, expected)| expected.abs()).fold(f64::MIN_POSITIVE, f64::max);
    let worse = |worst: f64, (found, expected): (f64, f64)| {
        let off = (found - expected).abs();
        if off.is_nan() { f64::INFINITY } else { worst.max(off) }
    };
    if found.len() == expected.len() { pairs().fold(0.0, worse) / largest } else { f64::INFINITY }
}

/// Medians in seconds, in this process and over the socket, by turns.
async fn model_times(
    direct: &Network,
    session: &Session,
    images: &Tensor,
    amounts: &Amounts,
) -> Result<(f64, f64), Error> {
    let model = Resource::of_repository("network");
    session.run(&model, vec![named("image", images.clone())], &[]).await?;
    let (begun, mut alone, mut unix) = (Instant::now(), Vec::new(), Vec::new());
    while alone.is_empty() || begun.elapsed() < amounts.time {
        let begun = Instant::now();
        direct.run(images.clone())?;
        alone.push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        session.run(&model, vec![named("image", images.clone())], &[]).await?;
        unix.push(begun.elapsed().as_secs_f64());
    }
    Ok((median(alone), median(unix)))
}

async fn calls_per_s(
    client: &Client,
    engine: &str,
    device: &str,
    model: &str,
    amounts: &Amounts,
) -> Result<f64, SelfTestError> {
    let session = open(client, engine, device).await?;
    let (model, image) = (Resource::of_repository(model), images(1)?);
    let warm_up = session.run(&model, vec![named("image", image.clone())], &[]).await;
    warm_up?;
    let (begun, time, mut callers) = (Instant::now(), amounts.time, JoinSet::new());
    for _ in 0..CALLERS {
        let (session, model, image) = (session.clone(), model.clone(), image.clone());
        callers.spawn(async move {
            let mut calls = 0_u32;
            while calls == 0 || begun.elapsed() < time {
                session.run(&model, vec![named("image", image.clone())], &[]).await?;
                calls += 1;
            }
            Ok::<_, Error>(calls)
        });
    }
    let mut calls = 0;
    while let Some(caller) = callers.join_next().await {
        calls += caller.map_err(|error| Error::new(Reason::BackendFailed, error.to_string()))??;
    }
    let rate = f64::from(calls) / begun.elapsed().as_secs_f64();
    session.close().await?;
    Ok(rate)
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
            format!("{} on {} {}, batch {}: max error", record.network, one.engine, one.device, one.batch);
        record.checks.push(check(what, error));
    }
    let copied = record.transfers.first().map_or(f64::INFINITY, |memory| memory.up_gb_s);
    for one in record.sgemm.iter().filter(|one| one.device != CPU && one.side >= 8192) {
        let (found, goal) = (one.unix_tflops / one.direct_tflops, 0.8);
        let what = format!("sgemm {} on {}, unix to direct, at least", one.side, one.device);
        record.goals.push(Goal { what, found, goal, met: found >= goal });
    }
    for one in record.models.iter().filter(|one| one.device != CPU) {
        let what =
            |figure: &str| format!("{} on {}, batch {}: {figure}", record.network, one.device, one.batch);
        let goal = match one.batch {
            // A copy out of the socket and one into a stage.
            1 => {
                let copies = 2.0 * (3 * SIDE * SIDE * 4) as f64 / (copied * 1e9) * 1e6;
                let (found, goal) = (one.added_us, 30.0 + copies);
                Goal { what: what("added microseconds, at most"), found, goal, met: found <= goal }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_found_wherever_they_are() {
        let side = 40;
        let (a, b) = (matrix(side, 1), matrix(side, 2));
        let cell = |row: usize, column: usize| {
            (0..side).map(|depth| a[row * side + depth] * b[depth * side + column]).sum::<f32>()
        };
        let mut found: Vec<f32> = (0..side * side).map(|index| cell(index / side, index % side)).collect();
        assert!(error_of(&found, [&a, &b], side) < 1e-6);
        found[side * side - 1] += 0.1;
        assert!(error_of(&found, [&a, &b], side) > ERROR_MAX);
        found[side * side - 1] = f32::NAN;
        assert_eq!(error_of(&found, [&a, &b], side), f64::INFINITY);
        assert_eq!(difference(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert_eq!(difference(&[f32::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
    }
}
