//! Numbers in fewer bytes than they are computed with: an edge with a slow link halves or quarters what it sends, and
//! halves what it gets.
//!
//! What comes is widened where nothing is lost: each number of the one type is one of the other. What they mean stays
//! the caller's business; a model that takes quantized numbers has their scale in itself. What goes is narrowed where
//! the caller asks for it, to the nearest number.

use bytes::Bytes;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use vaccel_proto::Error;
use vaccel_proto::carrier::Aligned as _;
use vaccel_proto::tensor::Element;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::{DType, RunReply, Tensor};

use crate::quota::Hold;

/// Numbers that are converted before other calls have their turn: some ten microseconds.
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
    Ok(made(DType::F32, tensor, numbers))
}

/// The type that a caller wants numbers of `f32` in; none where they are to stay.
///
/// # Errors
/// `BAD_ARGUMENT` for other types than `F16` and `BF16`.
pub(crate) fn wanted(reply_type: i32) -> Result<Option<DType>, Error> {
    match DType::try_from(reply_type) {
        Ok(DType::Unspecified) => Ok(None),
        Ok(half @ (DType::F16 | DType::Bf16)) => Ok(Some(half)),
        _ => Err(Error::field("reply_type", "F16 (10), BF16 (11), or none (0)", reply_type)),
    }
}

/// Rounds what a model gave as `f32` to numbers of this type, which [`wanted`] gave.
pub(crate) async fn narrow(reply: &mut RunReply, to: DType) {
    use Outcome::{ModelRun, TfModelRun, TfliteModelRun, TorchModelRun};
    if matches!(reply.outcome, Some(ModelRun(_) | TfModelRun(_) | TfliteModelRun(_) | TorchModelRun(_))) {
        let tensors = reply.carriers_mut().into_iter().filter_map(|carrier| carrier.tensor_mut());
        round(tensors.filter(|tensor| tensor.dtype() == DType::F32).collect(), to).await;
    }
}

async fn round(tensors: Vec<&mut Tensor>, to: DType) {
    for tensor in tensors {
        let data = &tensor.data;
        *tensor = if to == DType::F16 {
            made(
                to,
                tensor,
                convert(data, |from: &[f32], to: &mut [f16]| to.convert_from_f32_slice(from)).await,
            )
        } else {
            made(
                to,
                tensor,
                convert(data, |from: &[f32], to: &mut [bf16]| to.convert_from_f32_slice(from)).await,
            )
        };
    }
}

/// A tensor of the same shape with these numbers.
fn made<T: Element + Send + Sync>(dtype: DType, tensor: &Tensor, numbers: Vec<T>) -> Tensor {
    Tensor::from_bytes(dtype, &tensor.shape, Bytes::from_owner(Numbers(numbers)))
}

struct Numbers<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for Numbers<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn each<T: Copy + Into<f32>>(from: &[T], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = (*from).into());
}

/// Numbers from bytes that need not be aligned, part by part.
async fn convert<T: Element + Default, N: Element + Default>(
    bytes: &[u8],
    part: impl Fn(&[T], &mut [N]),
) -> Vec<N> {
    let mut numbers = vec![N::default(); bytes.len() / size_of::<T>()];
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
    use vaccel_proto::v1::{ModelRunReply, NamedTensor};

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
    async fn what_is_wanted_narrow_is_rounded_to_the_nearest() {
        let numbers: Vec<f32> =
            (0..100_000_u32).map(|at| f32::from_bits(at.wrapping_mul(0x9e37_79b9))).collect();
        let given = Tensor::new(&[numbers.len() as i64], &numbers).expect("valid");
        let whole = Tensor::new(&[2], &[1_i32, 2]).expect("valid");
        for to in [DType::F16, DType::Bf16] {
            let outputs =
                [&given, &whole].map(|tensor| NamedTensor { name: "t".into(), tensor: Some(tensor.clone()) });
            let outcome = Some(Outcome::ModelRun(ModelRunReply { outputs: outputs.into() }));
            let mut reply = RunReply { outcome, ..RunReply::default() };
            narrow(&mut reply, to).await;
            let [got, other] = &mut reply.carriers_mut()[..] else { panic!("two tensors") };
            assert_eq!(other.tensor_mut(), Some(&mut whole.clone()));
            let got = got.tensor_mut().expect("there").clone();
            assert_eq!((got.dtype(), &got.shape[..]), (to, &[numbers.len() as i64][..]));
            let back = widen(&got, &mut counted()).await.expect("fits");
            for (back, number) in back.elements::<f32>().expect("as many").iter().zip(&numbers) {
                let nearest = match to {
                    DType::F16 => f16::from_f32(*number).to_f32(),
                    _ => bf16::from_f32(*number).to_f32(),
                };
                assert!(*back == nearest || back.is_nan() && number.is_nan(), "{number} became {back}");
            }
        }
        assert_eq!(wanted(0).expect("as it is"), None);
        assert_eq!(wanted(DType::Bf16.into()).expect("a half"), Some(DType::Bf16));
        assert!([DType::F32.into(), 2, 99, -1].into_iter().all(|number| wanted(number).is_err()));
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
