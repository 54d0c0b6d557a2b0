//! The sum and the product of two arrays, element by element.
//!
//! *Shapes:* `a` and `b` are f32 of one shape, which `add` and `mult` have, too. *Errors:* `BAD_ARGUMENT` with the
//! field for other tensors, `MESSAGE_TOO_LARGE`, `DEADLINE`. *Source:* vAccel's `vaccel_fpga_parallel`, deprecated
//! there, in software.

use vaccel_proto::Error;
use vaccel_proto::v1::{FpgaParallelReply, FpgaParallelRequest};

use super::fpga_vectoradd::paired;
use super::sgemm::floats;
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

impl Operation for FpgaParallelRequest {
    const NAME: &'static str = "fpga_parallel";
    const SUMMARY: &'static str = "add and multiply arrays: a + b and a b by element";
    type Reply = FpgaParallelReply;

    fn validate(&self) -> Result<(), Error> {
        self.arrays().map(drop)
    }

    /// The noop plugin adds, and has 1 for every product.
    fn dummy(self, _: &Context<'_>) -> Result<FpgaParallelReply, Error> {
        both(&self, |_, _| 1.0)
    }

    fn reply_bytes(&self) -> u64 {
        self.arrays().map_or(0, |[a, b]| (a.data.len() + b.data.len()) as u64)
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<FpgaParallelReply>, Error> {
        let work = move |_: &Cancel| both(&self, |a, b| a * b);
        context.workshop.scheduler.run(&context.asker(), work).await
    }
}

fn both(request: &FpgaParallelRequest, mult: impl Fn(f32, f32) -> f32) -> Result<FpgaParallelReply, Error> {
    let arrays = request.arrays()?;
    let shape = &arrays[0].shape;
    let add = floats("add", shape, paired(arrays, |a, b| a + b)?);
    let mult = floats("mult", shape, paired(arrays, mult)?);
    Ok(FpgaParallelReply { tensors: vec![add, mult] })
}
