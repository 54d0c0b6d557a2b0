//! Numbers that came in fewer bytes than a model takes: an edge with a slow link halves or quarters what it sends.
//!
//! Only where nothing is lost: each number of the one type is one of the other. What they mean stays the caller's
//! business; a model that takes quantized numbers has their scale in itself.

use bytes::Bytes;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use vaccel_proto::Error;
use vaccel_proto::tensor::Element;
use vaccel_proto::v1::{DType, Tensor};

use crate::quota::Hold;

/// Numbers that are widened before other calls have their turn: some ten microseconds.
const PART: usize = 32 << 10;

/// Whether numbers of one type can stand for those of another.
pub(super) fn widens(from: DType, to: DType) -> bool {
    let narrow = [DType::F16, DType::Bf16, DType::U8, DType::I8, DType::U16, DType::I16];
    to == DType::F32 && narrow.contains(&from)
}

/// Widens a tensor whose size was checked. The numbers are counted while `counted` is held.
///
/// # Errors
/// `QUOTA_EXCEEDED`.
pub(super) async fn widen(tensor: &Tensor, counted: &mut Hold) -> Result<Tensor, Error> {
    let count = tensor.data.len() / tensor.dtype().size().max(1);
    counted.grow((count * size_of::<f32>()) as u64)?;
    let data = &tensor.data;
    let numbers = match tensor.dtype() {
        DType::F16 => convert(data, |from: &[f16], to| from.convert_to_f32_slice(to)).await,
        DType::Bf16 => convert(data, |from: &[bf16], to| from.convert_to_f32_slice(to)).await,
        DType::I8 => convert(data, each::<i8>).await,
        DType::U16 => convert(data, each::<u16>).await,
        DType::I16 => convert(data, each::<i16>).await,
        _ => convert(data, each::<u8>).await,
    };
    Ok(Tensor::from_bytes(DType::F32, &tensor.shape, Bytes::from_owner(Numbers(numbers))))
}

struct Numbers(Vec<f32>);

impl AsRef<[u8]> for Numbers {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn each<T: Copy + Into<f32>>(from: &[T], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = (*from).into());
}

/// Numbers from bytes that need not be aligned, part by part.
async fn convert<T: Element + Default>(bytes: &[u8], part: impl Fn(&[T], &mut [f32])) -> Vec<f32> {
    let mut numbers = vec![0.0; bytes.len() / size_of::<T>()];
    let mut from = vec![T::default(); PART.min(numbers.len())];
    for (to, bytes) in numbers.chunks_mut(PART).zip(bytes.chunks(PART * size_of::<T>())) {
        let from = &mut from[..to.len()];
        bytemuck::cast_slice_mut(from).copy_from_slice(bytes);
        part(from, to);
        tokio::task::yield_now().await;
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Settings};
    use crate::identity::Tenant;
    use crate::quota::{Accounts, Unit};
    use vaccel_proto::Reason;

    fn counted() -> Hold {
        let mut limits = Config::new(Settings::default()).expect("valid").tenant;
        limits.in_flight_bytes = 4 << 20;
        let account = Accounts::new(limits, |_| 1).of(&Tenant::new("a"));
        account.hold(Unit::InFlightBytes, 0).expect("nothing")
    }

    async fn widened<T: Element>(numbers: &[T]) -> Vec<f32> {
        let mut tensor = Tensor::new(&[numbers.len() as i64], numbers).expect("valid");
        // As it may come: at any place of its message.
        tensor.data = Bytes::from([&[0][..], &tensor.data].concat()).slice(1..);
        let wide = widen(&tensor, &mut counted()).await.expect("fits");
        assert!(widens(T::DTYPE, DType::F32) && !widens(T::DTYPE, T::DTYPE));
        assert_eq!((wide.dtype(), &wide.shape), (DType::F32, &tensor.shape));
        wide.elements::<f32>().expect("as many").into_owned()
    }

    #[tokio::test]
    async fn every_number_is_what_it_was() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        assert_eq!(widened(&all).await, all.iter().map(|n| f32::from(*n)).collect::<Vec<_>>());
        let signed: Vec<i16> = all.iter().map(|n| n.cast_signed()).collect();
        assert_eq!(widened(&signed).await, signed.iter().map(|n| f32::from(*n)).collect::<Vec<_>>());
        let bytes: Vec<u8> = (0..=u8::MAX).collect();
        assert_eq!(widened(&bytes).await, bytes.iter().map(|n| f32::from(*n)).collect::<Vec<_>>());
        let signed: Vec<i8> = bytes.iter().map(|n| n.cast_signed()).collect();
        assert_eq!(widened(&signed).await, signed.iter().map(|n| f32::from(*n)).collect::<Vec<_>>());
        let same = |found: Vec<f32>, expected: Vec<f32>| {
            let alike = |(a, b): (&f32, &f32)| a == b || a.is_nan() && b.is_nan();
            assert!(found.len() == expected.len() && found.iter().zip(&expected).all(alike));
        };
        let halves: Vec<f16> = all.iter().map(|bits| f16::from_bits(*bits)).collect();
        same(widened(&halves).await, halves.iter().map(|n| n.to_f32()).collect());
        let halves: Vec<bf16> = all.iter().map(|bits| bf16::from_bits(*bits)).collect();
        same(widened(&halves).await, halves.iter().map(|n| n.to_f32()).collect());
        assert_eq!(widened::<u8>(&[]).await, [0.0_f32; 0]);
    }

    #[tokio::test]
    async fn what_it_becomes_is_counted() {
        let tensor = Tensor::new(&[2 << 20], &vec![1_u8; 2 << 20]).expect("valid");
        let refusal = widen(&tensor, &mut counted()).await.expect_err("8 MiB of 4");
        assert_eq!(refusal.reason(), Reason::QuotaExceeded);
    }

    #[test]
    fn what_would_lose_something_is_no_way() {
        for from in [DType::I32, DType::U32, DType::I64, DType::F64, DType::Bool, DType::Bytes] {
            assert!(!widens(from, DType::F32), "{from:?}");
        }
        assert!(!widens(DType::U8, DType::I64) && !widens(DType::F16, DType::F64));
    }
}
