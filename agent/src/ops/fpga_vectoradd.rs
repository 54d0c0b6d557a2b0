//! The sum of two arrays, element by element.
//!
//! *Shapes:* `a` and `b` are f32 of one shape, which `c` has, too. *Errors:* `BAD_ARGUMENT` with the field for other
//! tensors, `DEADLINE`. *Source:* vAccel's `vaccel_fpga_vadd`, deprecated there, in software; its two lengths must be
//! equal here.

use vaccel_proto::Error;
use vaccel_proto::v1::{FpgaVectoraddReply, FpgaVectoraddRequest, Tensor};

use super::sgemm::floats;
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

impl Operation for FpgaVectoraddRequest {
    const NAME: &'static str = "fpga_vectoradd";
    const SUMMARY: &'static str = "add arrays: c = a + b";
    type Reply = FpgaVectoraddReply;

    fn validate(&self) -> Result<(), Error> {
        self.arrays().map(drop)
    }

    /// The noop plugin adds, too.
    fn dummy(self, _: &Context<'_>) -> Result<FpgaVectoraddReply, Error> {
        add(&self)
    }

    fn reply_bytes(&self) -> u64 {
        self.arrays().map_or(0, |[a, _]| a.data.len() as u64)
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<FpgaVectoraddReply>, Error> {
        let work = move |_: &Cancel| add(&self);
        context.workshop.scheduler.run(&context.asker(), work).await
    }
}

fn add(request: &FpgaVectoraddRequest) -> Result<FpgaVectoraddReply, Error> {
    let [a, b] = request.arrays()?;
    Ok(FpgaVectoraddReply { tensors: vec![floats("c", &a.shape, paired([a, b], |a, b| a + b)?)] })
}

/// A function of the elements of two arrays of one shape.
pub(super) fn paired([a, b]: [&Tensor; 2], each: impl Fn(f32, f32) -> f32) -> Result<Vec<f32>, Error> {
    let (a, b) = (a.elements::<f32>()?, b.elements::<f32>()?);
    Ok(a.iter().zip(b.iter()).map(|(a, b)| each(*a, *b)).collect())
}
