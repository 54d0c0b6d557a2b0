//! The product of two square matrices.
//!
//! *Shapes:* `a` and `b` are `f32[n, n]`, or both `f32[n * n]` row by row; `c` has the shape of `a`. *Errors:*
//! `BAD_ARGUMENT` with the field for other shapes, `DEADLINE`. *Source:* vAccel's `vaccel_fpga_mmult`, deprecated
//! there, in software; that call has one length for all three arrays, which only square matrices have.

use std::sync::Arc;

use vaccel_proto::Error;
use vaccel_proto::v1::{FpgaMmultReply, FpgaMmultRequest};

use super::sgemm::{floats, named};
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

/// What vAccel's noop plugin fills the product with.
const DUMMY: f32 = 9.1;

impl Operation for FpgaMmultRequest {
    const NAME: &'static str = "fpga_mmult";
    const SUMMARY: &'static str = "multiply square matrices: c = a b";
    type Reply = FpgaMmultReply;

    /// Whether the matrices are square is for [`Self::execute`]: the noop plugin answers for arrays of any length.
    fn validate(&self) -> Result<(), Error> {
        self.arrays().map(drop)
    }

    fn dummy(self, _: &Context<'_>) -> Result<FpgaMmultReply, Error> {
        let [a, _] = self.arrays()?;
        Ok(FpgaMmultReply { tensors: vec![floats("c", &a.shape, vec![DUMMY; a.check("tensors")?])] })
    }

    fn reply_bytes(&self) -> u64 {
        self.product().map_or(0, |product| product.result_bytes())
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<FpgaMmultReply>, Error> {
        self.product()?;
        let (workshop, place) = (Arc::clone(context.workshop), context.place());
        let work = move |cancel: &Cancel| {
            let c = workshop.engines.blas.multiply(&self.product()?, &place, cancel)?;
            Ok(FpgaMmultReply { tensors: vec![named("c", &self.arrays()?[0].shape, c)] })
        };
        context.workshop.scheduler.run(&context.asker(), work).await
    }
}
