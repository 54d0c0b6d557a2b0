//! Networks: the same numbers on every engine and device, and what the way to the agent costs.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use vaccel_client::{Client, Resource, Session, Timings, named};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::measure::{Amounts, CPU, by_turns, fails, in_shared_memory, median, open, stays_awake};
use super::{Batching, Model, Record, SelfTestError, Way};
use crate::config::EngineConfig;
use crate::networks::SIDE;
use crate::{Config, Network};

/// How often a rate is measured before it is believed to stay, and before it is taken as it is.
const ROUNDS_MIN: usize = 3;
const ROUNDS_MAX: usize = 8;

/// Callers at the same time, one image each.
const CALLERS: usize = 16;

/// A network that is measured.
pub(super) struct Measured {
    pub(super) name: &'static str,
    pub(super) make: fn() -> Bytes,
}

impl Measured {
    /// The model of the repository whose calls do not run together.
    pub(super) fn alone(&self) -> String {
        format!("{}-alone", self.name)
    }
}

/// An image for each row, all different.
fn images(batch: usize) -> Result<Tensor, Error> {
    let pixels: Vec<f32> =
        (0..batch * 3 * SIDE * SIDE).map(|index| (index % 251) as f32 / 125.0 - 1.0).collect();
    let [rows, side] = [batch, SIDE].map(|size| i64::try_from(size).expect("a constant"));
    Tensor::new(&[rows, 3, side, side], &pixels)
}

/// All networks on all engines and devices.
pub(super) async fn models(
    record: &mut Record,
    config: &Config,
    client: &Client,
    amounts: &Amounts,
) -> Result<(), SelfTestError> {
    let computing =
        record.engines.iter().filter(|engine| engine.absent_because.is_empty() && engine.name != "noop");
    let places = computing
        .flat_map(|engine| engine.devices.iter().map(|device| (engine.name.clone(), device.clone())));
    let places: Vec<(String, String)> = places.collect();
    for network in amounts.networks {
        let file = (network.make)();
        let mut judge = None;
        for (engine, device) in &places {
            let config =
                EngineConfig { engine: engine.clone(), device: device.clone(), ..config.engines.clone() };
            let session = open(client, engine, device).await?;
            let timings = RefCell::default();
            let at = Place { network, config: &config, client, session: &session, timings };
            let ran = at.measure(record, &file, amounts, &mut judge).await;
            if let Err(error) = ran {
                fails(record, format!("{} on {engine} {device}", network.name), device, error)?;
            }
            session.close().await?;
        }
        // Where the network is fastest is where batches matter.
        let of_this = record.models.iter().filter(|model| model.network == network.name);
        let fastest = of_this.max_by(|one, other| one.images_per_s.total_cmp(&other.images_per_s));
        let fastest = fastest.map(|model| (model.engine.clone(), model.device.clone()));
        if let Some((engine, device)) = fastest {
            match batching(client, network, &engine, &device, amounts).await {
                Ok(batching) => record.batching.push(batching),
                Err(error) => {
                    let what = format!("{} on {engine} {device}, {CALLERS} callers", network.name);
                    fails(record, what, &device, error)?;
                }
            }
        }
    }
    Ok(())
}

async fn batching(
    client: &Client,
    network: &Measured,
    engine: &str,
    device: &str,
    amounts: &Amounts,
) -> Result<Batching, SelfTestError> {
    Ok(Batching {
        network: network.name,
        engine: engine.into(),
        device: device.into(),
        callers: CALLERS,
        on_calls_per_s: calls_per_s(client, engine, device, network.name, amounts).await?,
        off_calls_per_s: calls_per_s(client, engine, device, &network.alone(), amounts).await?,
    })
}

/// A network on one engine and device.
struct Place<'a> {
    network: &'a Measured,
    config: &'a EngineConfig,
    client: &'a Client,
    session: &'a Session,
    /// What the agent said of where the time went.
    timings: RefCell<Vec<Timings>>,
}

impl Place<'_> {
    async fn measure(
        &self,
        record: &mut Record,
        file: &Bytes,
        amounts: &Amounts,
        judge: &mut Option<Judge>,
    ) -> Result<(), SelfTestError> {
        let direct = Network::load(self.config, file.clone())?;
        let (is_device, is_first) = (self.config.device != CPU, judge.is_none());
        for &batch in if is_device { amounts.device_batches } else { amounts.cpu_batches } {
            let images = images(batch)?;
            let first = self.call(&images).await?;
            if is_first {
                *judge = Some(Judge { batch, numbers: first.elements::<f32>()?.to_vec() });
            }
            let run = || direct.run(images.clone()).map(drop);
            if is_device {
                // Until they have graphs.
                by_turns(amounts, run, async || self.call(&images).await.map(drop)).await?;
            }
            self.timings.take();
            let [alone, unix] = by_turns(amounts, run, async || self.call(&images).await.map(drop)).await?;
            let [queue_us, run_us] = self.stages();
            let ways = if is_device { Some(self.other_ways(&images, amounts, run).await?) } else { None };
            let [awake, shared] = ways.map_or([None, None], |ways| ways.map(Some));
            // Once more, in whatever way it runs by now.
            let last = self.call(&images).await?;
            let max_error = match judge {
                Some(judge) if !is_first => {
                    Some(judge.error_of(&first, batch)?.max(judge.error_of(&last, batch)?))
                }
                _ => None,
            };
            let model = Model {
                network: self.network.name,
                engine: self.config.engine.clone(),
                device: self.config.device.clone(),
                batch,
                direct_ms: alone * 1e3,
                images_per_s: batch as f64 / alone,
                unix_ms: unix * 1e3,
                unix_added_us: (unix - alone) * 1e6,
                unix_to_direct: unix / alone,
                queue_us,
                run_us,
                awake,
                shared,
                max_error,
            };
            tracing::info!(?model, "measured");
            record.models.push(model);
        }
        Ok(())
    }

    /// The same by a caller that stays awake, and with images that were produced in memory that the agent shares.
    async fn other_ways(
        &self,
        images: &Tensor,
        amounts: &Amounts,
        direct: impl Fn() -> Result<(), Error>,
    ) -> Result<[Way; 2], SelfTestError> {
        let awake = Place { session: &stays_awake(self.session), timings: RefCell::default(), ..*self };
        let data = in_shared_memory(self.client, &images.elements::<f32>()?).await;
        let produced = Tensor::from_bytes(DType::F32, &images.shape, data);
        let awake = by_turns(amounts, &direct, async || awake.call(images).await.map(drop)).await?;
        let shared = by_turns(amounts, &direct, async || self.call(&produced).await.map(drop)).await?;
        Ok([awake, shared].map(Way::of))
    }

    /// Medians of how long calls waited for their turn, and ran.
    fn stages(&self) -> [f64; 2] {
        let timings = self.timings.borrow();
        let of = |stage: fn(&Timings) -> u64| {
            median(
                timings.iter().map(|timings| Duration::from_micros(stage(timings)).as_secs_f64()).collect(),
            )
        };
        [of(|timings| timings.queue_us) * 1e6, of(|timings| timings.run_us) * 1e6]
    }

    async fn call(&self, images: &Tensor) -> Result<Tensor, Error> {
        let model = Resource::of_repository(self.network.name);
        let ran = self.session.run(&model, vec![named("image", images.clone())], &[]).await?;
        self.timings.borrow_mut().push(ran.timings);
        let output = ran.outputs.into_iter().next().and_then(|output| output.tensor);
        output.ok_or_else(|| Error::new(Reason::BackendFailed, "a network without outputs"))
    }
}

impl Way {
    fn of([alone, called]: [f64; 2]) -> Self {
        Self { ms: called * 1e3, added_us: (called - alone) * 1e6, to_direct: called / alone }
    }
}

/// What the first engine says of its largest batch, which the others are compared with.
struct Judge {
    batch: usize,
    numbers: Vec<f32>,
}

impl Judge {
    /// The largest difference of a network's numbers. Rows are the same in all batches.
    fn error_of(&self, found: &Tensor, batch: usize) -> Result<f64, Error> {
        let found = found.elements::<f32>()?;
        let row = self.numbers.len() / self.batch;
        if found.len() != row * batch {
            return Ok(f64::INFINITY);
        }
        let numbers = row * batch.min(self.batch);
        Ok(difference(&found[..numbers], &self.numbers[..numbers]))
    }
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

async fn calls_per_s(
    client: &Client,
    engine: &str,
    device: &str,
    model: &str,
    amounts: &Amounts,
) -> Result<f64, SelfTestError> {
    let session = open(client, engine, device).await?;
    let model = Resource::of_repository(model);
    // Until it is no faster than it was: shapes get their sessions while calls go on.
    let mut rate = 0.0_f64;
    for round in 0..ROUNDS_MAX {
        let now = callers(&session, &model, amounts).await?;
        let is_steady = now < rate * 1.05;
        rate = rate.max(now);
        if is_steady && round >= ROUNDS_MIN {
            break;
        }
    }
    session.close().await?;
    Ok(rate)
}

/// Calls a second of several callers together.
async fn callers(session: &Session, model: &Resource, amounts: &Amounts) -> Result<f64, SelfTestError> {
    let (image, mut callers) = (images(1)?, JoinSet::new());
    let (begun, time) = (Instant::now(), amounts.time);
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
    Ok(f64::from(calls) / begun.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_or_missing_is_as_wrong_as_can_be() {
        assert_eq!(difference(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert_eq!(difference(&[f32::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        let judge = Judge { batch: 2, numbers: vec![1.0, 2.0, 3.0, 4.0] };
        let error = |numbers: &[f32], batch| {
            let size = i64::try_from(numbers.len()).expect("short");
            judge.error_of(&Tensor::new(&[size], numbers).expect("valid"), batch).expect("numbers")
        };
        assert_eq!(error(&[1.0, 2.0], 1), 0.0);
        assert_eq!(error(&[1.0, 2.0, 3.0, 5.0, 9.0, 9.0], 3), 0.25);
        assert_eq!((error(&[1.0], 1), error(&[], 2)), (f64::INFINITY, f64::INFINITY));
    }
}
