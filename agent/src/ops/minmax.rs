//! The least and the greatest of many numbers, and the numbers limited to bounds.
//!
//! *Shapes:* `data` is f64 of any shape, `out` has the same. *Values:* `out` is `data` with everything below
//! `low_threshold` raised to it and everything above `high_threshold` lowered to it; NaN stays NaN. `min` and `max`
//! are those of `data` itself, before the bounds; NaN is left out, -0 is less than +0, and where there is no number
//! they are +inf and -inf. *Errors:* `BAD_ARGUMENT` with the field for bounds in the wrong order or a wrong tensor,
//! `MESSAGE_TOO_LARGE`, `DEADLINE`. *Source:* vAccel's `vaccel_minmax`, deprecated there: its manual makes `min` and
//! `max` those of the input and gives `out` the input's length and the thresholds to the algorithm; no public plugin
//! says how they are applied, and this file does.

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::v1::{DType, MinmaxReply, MinmaxRequest, NamedTensor, Tensor};

use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

/// What vAccel's noop plugin finds in all data.
const DUMMY_MIN: f64 = -1.0;
const DUMMY_MAX: f64 = 10000.0;

impl Operation for MinmaxRequest {
    const NAME: &'static str = "minmax";
    const SUMMARY: &'static str = "find the least and greatest number, limit all to bounds";
    type Reply = MinmaxReply;

    fn validate(&self) -> Result<(), Error> {
        self.data().map(drop)
    }

    fn dummy(self, _: &Context<'_>) -> Result<MinmaxReply, Error> {
        let data = self.data()?;
        Ok(MinmaxReply { min: DUMMY_MIN, max: DUMMY_MAX, tensors: vec![out(data, data.data.clone())] })
    }

    fn reply_bytes(&self) -> u64 {
        self.data().map_or(0, |data| data.data.len() as u64)
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<MinmaxReply>, Error> {
        let work = move |_: &Cancel| {
            let data = self.data()?;
            let numbers = data.elements::<f64>()?;
            let (min, max) = range(&numbers);
            let limited = limited(&numbers, f64::from(self.low_threshold), f64::from(self.high_threshold));
            Ok(MinmaxReply { min, max, tensors: vec![out(data, limited.into())] })
        };
        context.workshop.scheduler.run(&context.asker(), work).await
    }
}

fn out(data: &Tensor, bytes: Bytes) -> NamedTensor {
    let tensor = Tensor::from_bytes(DType::F64, &data.shape, bytes);
    NamedTensor { name: "out".into(), tensor: Some(tensor) }
}

/// The least and the greatest number.
fn range(numbers: &[f64]) -> (f64, f64) {
    let numbers = numbers.iter().copied().filter(|number| !number.is_nan());
    numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), number| {
        let less = number.total_cmp(&min).is_lt();
        let greater = number.total_cmp(&max).is_gt();
        (if less { number } else { min }, if greater { number } else { max })
    })
}

/// The numbers within the bounds, as bytes.
fn limited(numbers: &[f64], low: f64, high: f64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(numbers));
    // `clamp` leaves NaN as it is.
    numbers.iter().for_each(|number| bytes.extend_from_slice(&number.clamp(low, high).to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_left_out() {
        assert_eq!(range(&[f64::NAN, 3.0, -2.5, f64::NAN]), (-2.5, 3.0));
        assert_eq!(range(&[f64::NAN]), (f64::INFINITY, f64::NEG_INFINITY));
        assert_eq!(range(&[]), (f64::INFINITY, f64::NEG_INFINITY));
        assert_eq!(range(&[f64::INFINITY]), (f64::INFINITY, f64::INFINITY));
        let (min, max) = range(&[0.0, -0.0]);
        assert!(min.is_sign_negative() && max.is_sign_positive());
    }

    #[test]
    fn the_bounds_hold_for_infinities_and_not_for_what_is_no_number() {
        let bytes = limited(&[f64::NEG_INFINITY, -3.5, 0.25, 7.0, f64::INFINITY, f64::NAN], -3.0, 6.0);
        let numbers: Vec<f64> = bytemuck::pod_collect_to_vec(&bytes);
        assert_eq!(numbers[..5], [-3.0, -3.0, 0.25, 6.0, 6.0]);
        assert!(numbers[5].is_nan());
    }
}
