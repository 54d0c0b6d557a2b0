//! The product of two matrices: `c = alpha * a * b + beta * c`, in single precision.
//!
//! *Shapes:* row-major; `a` is m by k, `b` k by n, `c` m by n, each with its own distance between rows in elements (0
//! for the length of a row). The tensors' own shapes do not matter, only that they have enough elements. `c` has to
//! come when `beta` is not 0, and goes out dense, as `f32[m, n]`. A size of 0 is allowed: with k = 0 the result is
//! `beta * c`. With `beta` 0 `c` is not read, with `alpha` 0 `a` and `b` are not, so that what is no number in them
//! does not spread. *Errors:* `BAD_ARGUMENT` with the field for sizes that are negative or do not fit the data,
//! `MESSAGE_TOO_LARGE` for a product that no reply could carry, `DEADLINE`. *Source:* BLAS `sgemm`, row-major and
//! without transposition, as vAccel has it.

use std::sync::Arc;

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::compute::Product;
use vaccel_proto::v1::{DType, NamedTensor, SgemmReply, SgemmRequest, Tensor};

use super::{Context, Operation};
use crate::backend::{Blas, Place, bytes, dense};
use crate::scheduler::{Cancel, Timed};

impl Operation for SgemmRequest {
    const NAME: &'static str = "sgemm";
    const SUMMARY: &'static str = "multiply matrices: c = alpha a b + beta c";
    type Reply = SgemmReply;

    fn validate(&self) -> Result<(), Error> {
        self.product().map(drop)
    }

    fn dummy(self, _: &Context<'_>) -> Result<SgemmReply, Error> {
        Ok(SgemmReply { matrices: vec![untouched("c", &self.product()?)?] })
    }

    fn reply_bytes(&self) -> u64 {
        self.product().map_or(0, |product| product.result_bytes())
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<SgemmReply>, Error> {
        let (workshop, place) = (Arc::clone(context.workshop), context.place());
        let work = move |cancel: &Cancel| compute(&self, &workshop.engines.blas, &place, cancel);
        context.workshop.scheduler.run(&context.asker(), work).await
    }
}

/// The operation itself, for a lane.
pub(crate) fn compute(
    request: &SgemmRequest,
    blas: &Blas,
    place: &Place,
    cancel: &Cancel,
) -> Result<SgemmReply, Error> {
    Ok(SgemmReply { matrices: vec![multiplied("c", &request.product()?, blas, place, cancel)?] })
}

/// A product as the tensor of a reply.
pub(super) fn multiplied(
    name: &str,
    product: &Product<'_>,
    blas: &Blas,
    place: &Place,
    cancel: &Cancel,
) -> Result<NamedTensor, Error> {
    Ok(named(name, &shape(product)?, blas.multiply(product, place, cancel)?))
}

/// What vAccel's noop plugin makes of a product: `c` as it came, or zeros where none did.
pub(super) fn untouched(name: &str, product: &Product<'_>) -> Result<NamedTensor, Error> {
    let (rows, columns) = product.shape();
    let c = match &product.c {
        Some(c) => dense(&c.tensor.elements::<f32>()?, c.layout),
        None => vec![0.0; rows * columns],
    };
    Ok(floats(name, &shape(product)?, c))
}

fn shape(product: &Product<'_>) -> Result<[i64; 2], Error> {
    let (rows, columns) = product.shape();
    let size =
        |size: usize| i64::try_from(size).map_err(|_| Error::field("m", "sizes that can be counted", size));
    Ok([size(rows)?, size(columns)?])
}

/// Numbers as the tensor of a reply.
pub(super) fn floats(name: &str, shape: &[i64], numbers: Vec<f32>) -> NamedTensor {
    named(name, shape, bytes(numbers))
}

/// The tensor of a reply.
pub(super) fn named(name: &str, shape: &[i64], numbers: Bytes) -> NamedTensor {
    NamedTensor { name: name.into(), tensor: Some(Tensor::from_bytes(DType::F32, shape, numbers)) }
}
