//! Networks: the same numbers on every engine and device, and what the way to the agent costs.

use std::time::Instant;

use bytes::Bytes;
use tokio::task::JoinSet;
use vaccel_client::{Client, Resource, Session, named};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::measure::{Amounts, by_turns, fails, in_shared_memory, open};
use super::{Batching, Model, Record, SelfTestError};
use crate::config::EngineConfig;
use crate::networks::SIDE;
use crate::{Config, Network};

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
        // What the first engine says of each batch.
        let mut expected = Vec::new();
        for (engine, device) in &places {
            let config =
                EngineConfig { engine: engine.clone(), device: device.clone(), ..config.engines.clone() };
            let session = open(client, engine, device).await?;
            let at = Place { network, config: &config, client, session: &session };
            let ran = at.measure(record, &file, amounts, &mut expected).await;
            if let Err(error) = ran {
                fails(record, format!("{} on {engine} {device}", network.name), device, error)?;
            }
            session.close().await?;
        }
        // Where the network is fastest is where batches matter.
        let of_this = record.models.iter().filter(|model| model.network == network.name);
        let fastest = of_this.max_by(|one, other| one.images_per_s.total_cmp(&other.images_per_s));
        if let Some(fastest) = fastest {
            let (engine, device) = (fastest.engine.clone(), fastest.device.clone());
            let on_calls_per_s = calls_per_s(client, &engine, &device, network.name, amounts).await?;
            let off_calls_per_s = calls_per_s(client, &engine, &device, &network.alone(), amounts).await?;
            let (network, callers) = (network.name, CALLERS);
            record.batching.push(Batching {
                network,
                engine,
                device,
                callers,
                on_calls_per_s,
                off_calls_per_s,
            });
        }
    }
    Ok(())
}

/// A network on one engine and device.
struct Place<'a> {
    network: &'a Measured,
    config: &'a EngineConfig,
    client: &'a Client,
    session: &'a Session,
}

impl Place<'_> {
    async fn measure(
        &self,
        record: &mut Record,
        file: &Bytes,
        amounts: &Amounts,
        expected: &mut Vec<Vec<f32>>,
    ) -> Result<(), SelfTestError> {
        let direct = Network::load(self.config, file.clone())?;
        for (index, batch) in amounts.batches.iter().enumerate() {
            let images = images(*batch)?;
            let found = self.call(&images).await?.elements::<f32>()?.to_vec();
            let max_error = expected.get(index).map(|expected| difference(&found, expected));
            if max_error.is_none() {
                expected.push(found);
            }
            // Twice, so that nothing is done for the first time afterwards.
            self.call(&images).await?;
            let run = || direct.run(images.clone()).map(drop);
            let [alone, unix] = by_turns(amounts, run, async || self.call(&images).await.map(drop)).await?;
            let data = in_shared_memory(self.client, &images.elements::<f32>()?).await;
            let produced = Tensor::from_bytes(DType::F32, &images.shape, data);
            self.call(&produced).await?;
            let [alone_again, shared] =
                by_turns(amounts, run, async || self.call(&produced).await.map(drop)).await?;
            record.models.push(Model {
                network: self.network.name,
                engine: self.config.engine.clone(),
                device: self.config.device.clone(),
                batch: *batch,
                direct_ms: alone * 1e3,
                images_per_s: *batch as f64 / alone,
                unix_ms: unix * 1e3,
                unix_added_us: (unix - alone) * 1e6,
                unix_to_direct: unix / alone,
                shared_ms: shared * 1e3,
                shared_added_us: (shared - alone_again) * 1e6,
                shared_to_direct: shared / alone_again,
                max_error,
            });
        }
        Ok(())
    }

    async fn call(&self, images: &Tensor) -> Result<Tensor, Error> {
        let model = Resource::of_repository(self.network.name);
        let ran = self.session.run(&model, vec![named("image", images.clone())], &[]).await?;
        let output = ran.outputs.into_iter().next().and_then(|output| output.tensor);
        output.ok_or_else(|| Error::new(Reason::BackendFailed, "a network without outputs"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_or_missing_is_as_wrong_as_can_be() {
        assert_eq!(difference(&[1.0, 2.0], &[1.0, 4.0]), 0.5);
        assert_eq!(difference(&[f32::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
    }
}
