//! Runs before a version is served, as its configuration asks: engines prepare themselves in their first ones.

use bytes::Bytes;
use vaccel_proto::inference::ModelWarmup;
use vaccel_proto::inference::model_warmup::input::InputDataType;
use vaccel_proto::tensor::{element_count, with_lengths};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::config::dtype_of;
use super::version::{Served, Tensors};
use crate::backend::Workshop;
use crate::scheduler::{Asker, Call};

/// Runs of one warm-up, at most: beyond some, nothing gets warmer.
const RUNS_MAX: u32 = 1000;

/// Bytes of one input of a warm-up: what a call may bring.
const BYTES_MAX: usize = vaccel_proto::limits::MESSAGE_BYTES_MAX;

/// Runs all warm-ups of a version.
///
/// # Errors
/// `MODEL_REJECTED` for inputs that the model does not have, and what a run ends in.
pub(super) async fn run(served: &Served, workshop: &Workshop, asker: &Asker) -> Result<(), Error> {
    for warmup in &served.config.model_warmup {
        for _ in 0..warmup.count.clamp(1, RUNS_MAX) {
            let tensors = served.inputs.iter().map(|spec| tensor(served, warmup, spec));
            let inputs = tensors.collect::<Result<_, Error>>()?;
            let outputs = (0..served.model.file.outputs.len()).collect();
            let call = Call { inputs, outputs, reply_bytes_max: u64::MAX };
            let lanes = served.lanes.as_ref().unwrap_or(&workshop.scheduler);
            lanes.run_model(asker, &served.model.batcher, call).await.map_err(|error| {
                match error.reason() {
                    Reason::BadArgument => refuse(warmup, error.message()),
                    _ => error,
                }
            })?;
        }
    }
    Ok(())
}

fn refuse(warmup: &ModelWarmup, why: &str) -> Error {
    Error::new(Reason::ModelRejected, format!("model_warmup '{}': {why}", warmup.name))
}

fn tensor(served: &Served, warmup: &ModelWarmup, spec: &Tensors) -> Result<Tensor, Error> {
    let given = warmup.inputs.get(&spec.name);
    let given = given.ok_or_else(|| refuse(warmup, &format!("expected an input '{}'", spec.name)))?;
    if dtype_of(given.data_type) != spec.dtype {
        return Err(refuse(warmup, &format!("input '{}' has another data_type than the model's", spec.name)));
    }
    let batch = (served.rows_max > 0).then_some(i64::from(warmup.batch_size.max(1)));
    let shape: Vec<i64> = batch.into_iter().chain(given.dims.iter().copied()).collect();
    let count = element_count(&spec.name, &shape).map_err(|error| refuse(warmup, error.message()))?;
    let bytes = count.checked_mul(spec.dtype.size().max(1)).filter(|bytes| *bytes <= BYTES_MAX);
    let bytes =
        bytes.ok_or_else(|| refuse(warmup, &format!("expected inputs of at most {BYTES_MAX} bytes")))?;
    let data = match (spec.dtype, &given.input_data_type) {
        (DType::Bytes, _) => with_lengths(std::iter::repeat_n(&b""[..], count)),
        // Small numbers in every type: patterns of bytes could be no number at all.
        (DType::U8 | DType::I8 | DType::Bool, Some(InputDataType::RandomData(true))) => {
            (0..count).map(|index| u8::from(index * 7 % 3 == 0)).collect()
        }
        _ => Bytes::from(vec![0; bytes]),
    };
    Ok(Tensor::from_bytes(spec.dtype, &shape, data))
}
