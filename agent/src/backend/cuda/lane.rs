//! Tensors of models on their way to a device and back, through pinned memory that all models of the device share, or
//! from where their callers produced them, if that is memory that the device reaches.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vaccel_proto::Error;

use super::driver::{Context, Failure, Memory};
use super::memory::Charge;
use super::product::STAGE_BYTES;
use super::stream::Stream;
use super::{Cuda, Device, turn};
use crate::quota::Account;

/// Streams of one device for tensors of models: one goes up and one comes down while a third model's are being put
/// together. Each has 32 MiB of pinned memory for good.
pub(super) const LANES: usize = 4;

/// Memory of a device that a model reads from or writes to.
pub(crate) struct Buffer {
    memory: Memory,
    /// What was asked for; the memory is at least that.
    bytes: usize,
    charge: Charge,
}

impl Buffer {
    /// For an engine that is told where its tensors are.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Counts it among what a model has.
    pub(crate) fn of(self, model: &Arc<AtomicU64>) -> Self {
        Self { charge: self.charge.of(model), ..self }
    }
}

impl Cuda {
    /// Memory of a device, counted for a tenant, or without an account for a model of the host's.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` where there is not so much, `BACKEND_FAILED`.
    pub(crate) fn buffer(
        &self,
        device: &Device,
        account: Option<&Arc<Account>>,
        bytes: usize,
    ) -> Result<Buffer, Error> {
        let context = self.context(device)?;
        let charge = device.ledger.charge(account, bytes as u64)?;
        let memory =
            Memory::new(context, bytes).map_err(|failure| device.failed(context, &failure, bytes as u64))?;
        Ok(Buffer { memory, bytes, charge })
    }

    /// Copies bytes to the device, each to the beginning of its buffer, and waits until they are there.
    ///
    /// # Errors
    /// `BACKEND_FAILED`.
    pub(crate) fn upload(&self, device: &Device, parts: &[(&[u8], &Buffer)]) -> Result<(), Error> {
        self.with_lane(device, |lane| {
            for (bytes, to) in parts {
                assert!(bytes.len() <= to.bytes, "it fits");
                if let Some(held) = self.held(device, NonNull::from(*bytes)) {
                    lane.upload_from(&to.memory, 0, held)?;
                    continue;
                }
                for (index, part) in bytes.chunks(STAGE_BYTES).enumerate() {
                    lane.upload(&to.memory, index * STAGE_BYTES, |stage| {
                        stage[..part.len()].copy_from_slice(part);
                        part.len()
                    })?;
                }
            }
            lane.wait()
        })
    }

    /// Copies the whole of buffers from the device.
    ///
    /// # Errors
    /// `BACKEND_FAILED`.
    pub(crate) fn download(&self, device: &Device, from: &[&Buffer]) -> Result<Vec<Vec<u8>>, Error> {
        self.with_lane(device, |lane| {
            let one = |from: &&Buffer| {
                let mut bytes = Vec::with_capacity(from.bytes);
                while bytes.len() < from.bytes {
                    let part = STAGE_BYTES.min(from.bytes - bytes.len());
                    lane.download(&from.memory, bytes.len(), part)?;
                    bytes.extend_from_slice(&lane.downloaded()?[..part]);
                }
                Ok(bytes)
            };
            from.iter().map(one).collect()
        })
    }

    fn with_lane<T>(
        &self,
        device: &Device,
        work: impl FnOnce(&mut Stream) -> Result<T, Failure>,
    ) -> Result<T, Error> {
        let context = self.context(device)?;
        context.is_sound()?;
        let mut lane = turn(&device.lanes, &device.turn);
        let failed = |failure: Failure| device.failed(context, &failure, 2 * STAGE_BYTES as u64);
        if lane.is_none() {
            *lane = Some(Stream::new(context, STAGE_BYTES).map_err(failed)?);
        }
        let stream = lane.as_mut().expect("made just now");
        let done = work(stream);
        // Whatever came in between, the buffers are their owners' again.
        let waited = stream.wait();
        done.and_then(|done| waited.map(|()| done)).map_err(failed)
    }

    /// Bytes a second that cross the bus, up and down, between pinned memory and the device.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED`, `BACKEND_FAILED`.
    pub(crate) fn bandwidths(&self, device: &Device) -> Result<[f64; 2], Error> {
        /// Copies of a stage in each direction: 1 GiB, some 20 ms at the speed of a good bus.
        const COPIES: u32 = 64;
        let buffer = self.buffer(device, None, STAGE_BYTES)?;
        self.with_lane(device, |lane| {
            lane.wait()?;
            let begun = std::time::Instant::now();
            for _ in 0..COPIES {
                lane.upload(&buffer.memory, 0, |stage| stage.len())?;
            }
            lane.wait()?;
            let up = begun.elapsed();
            let begun = std::time::Instant::now();
            for _ in 0..COPIES {
                lane.download(&buffer.memory, 0, STAGE_BYTES)?;
            }
            lane.wait()?;
            let bytes = f64::from(COPIES) * STAGE_BYTES as f64;
            Ok([bytes / up.as_secs_f64(), bytes / begun.elapsed().as_secs_f64()])
        })
    }
}

impl Device {
    /// The error of a call that failed while so much was wanted.
    pub(super) fn failed(&self, context: &Arc<Context>, failure: &Failure, bytes: u64) -> Error {
        match failure.is_out_of_memory() {
            true => self.ledger.full(bytes).caused_by(failure.to_string()),
            false => context.error(failure),
        }
    }
}
