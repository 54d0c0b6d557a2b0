//! The product of two tensors plus a third: `out = a * b + c`, in single precision.
//!
//! *Shapes:* `a` is `f32[m, k]`, `b` `f32[k, n]`, `c` and `out` are `f32[m, n]`; sizes of 0 are allowed. *Errors:*
//! `BAD_ARGUMENT` with the field for shapes that do not fit together, `MESSAGE_TOO_LARGE` for a product that no reply
//! could carry, `DEADLINE`. *Source:* vAccel's `vaccel_torch_sgemm`, deprecated there: its header and manual give the
//! sizes of the three tensors and no factors, which makes both 1.

use std::sync::Arc;

use vaccel_proto::Error;
use vaccel_proto::v1::{TorchSgemmReply, TorchSgemmRequest};

use super::sgemm::{multiplied, untouched};
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

impl Operation for TorchSgemmRequest {
    const NAME: &'static str = "torch_sgemm";
    const SUMMARY: &'static str = "multiply tensors: out = a b + c";
    type Reply = TorchSgemmReply;

    fn validate(&self) -> Result<(), Error> {
        self.product().map(drop)
    }

    fn dummy(self, _: &Context<'_>) -> Result<TorchSgemmReply, Error> {
        Ok(TorchSgemmReply { tensors: vec![untouched("out", &self.product()?)?] })
    }

    fn reply_bytes(&self) -> u64 {
        self.product().map_or(0, |product| product.result_bytes())
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<TorchSgemmReply>, Error> {
        let (workshop, place) = (Arc::clone(context.workshop), context.place());
        let work = move |cancel: &Cancel| {
            let out = multiplied("out", &self.product()?, &workshop.engines.blas, &place, cancel)?;
            Ok(TorchSgemmReply { tensors: vec![out] })
        };
        context.workshop.scheduler.run(&context.asker(), work).await
    }
}
