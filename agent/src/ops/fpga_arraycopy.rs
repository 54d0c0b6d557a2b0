//! A copy of an array.
//!
//! *Shapes:* `a` is i32 of any shape, `out` the same. *Errors:* `BAD_ARGUMENT` with the field for a wrong tensor,
//! `MESSAGE_TOO_LARGE`. *Source:* vAccel's `vaccel_fpga_arraycopy`, deprecated there; here it is done in software.

use vaccel_proto::Error;
use vaccel_proto::v1::{DType, FpgaArraycopyReply, FpgaArraycopyRequest, NamedTensor, Tensor};

use super::{Context, Operation};
use crate::scheduler::Timed;

impl Operation for FpgaArraycopyRequest {
    const NAME: &'static str = "fpga_arraycopy";
    const SUMMARY: &'static str = "copy an array of integers";
    type Reply = FpgaArraycopyReply;

    fn validate(&self) -> Result<(), Error> {
        self.array().map(drop)
    }

    fn dummy(self, _: &Context<'_>) -> Result<FpgaArraycopyReply, Error> {
        copy(&self)
    }

    /// Without a lane: the way back to the guest makes the copy.
    fn reply_bytes(&self) -> u64 {
        self.array().map_or(0, |a| a.data.len() as u64)
    }

    async fn execute(self, _: &Context<'_>) -> Result<Timed<FpgaArraycopyReply>, Error> {
        copy(&self).map(Timed::instant)
    }
}

fn copy(request: &FpgaArraycopyRequest) -> Result<FpgaArraycopyReply, Error> {
    let a = request.array()?;
    let tensor = Tensor::from_bytes(DType::I32, &a.shape, a.data.clone());
    Ok(FpgaArraycopyReply { tensors: vec![NamedTensor { name: "out".into(), tensor: Some(tensor) }] })
}
