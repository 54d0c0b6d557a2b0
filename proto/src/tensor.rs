//! Tensors on the wire: sizes checked once, data viewed in place, and the pad that makes the view possible.
//!
//! *Copies.* A `bytes` field is a slice of the receive buffer. Its data can be viewed as `&[f32]` only where it is
//! aligned, so the sender puts `pad` bytes before it ([`crate::carrier::Aligned::align`]). Nothing depends on the pad:
//! an unaligned tensor is copied once ([`Tensor::elements`]).

use std::borrow::Cow;

use bytemuck::{AnyBitPattern, NoUninit};
use bytes::Bytes;

use crate::error::Error;
use crate::limits::{NAME_BYTES_MAX, TENSOR_RANK_MAX, TENSORS_PER_CALL_MAX};
use crate::v1::{DType, NamedTensor, Tensor};

/// Bytes of gRPC framing before a message; the receiver's buffer begins with them.
pub const GRPC_HEADER_BYTES: usize = 5;

impl DType {
    /// Bytes of one element; 0 for the unspecified type, and for strings, which have their length with them.
    pub fn size(self) -> usize {
        match self {
            Self::Unspecified | Self::Bytes => 0,
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// Lower-case name, as in `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Bool => "bool",
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bytes => "bytes",
        }
    }
}

/// A Rust type that is the element of a tensor.
pub trait Element: AnyBitPattern + NoUninit {
    /// Its type on the wire.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty = $dtype:ident),*) => { $(impl Element for $rust { const DTYPE: DType = DType::$dtype; })* };
}
elements!(
    u8 = U8,
    i8 = I8,
    u16 = U16,
    i16 = I16,
    u32 = U32,
    i32 = I32,
    u64 = U64,
    i64 = I64,
    half::f16 = F16,
    half::bf16 = Bf16,
    f32 = F32,
    f64 = F64
);

/// Elements of a shape.
///
/// # Errors
/// `BAD_ARGUMENT` at `path` for more than [`TENSOR_RANK_MAX`] axes, a negative dimension, or a product beyond `usize`.
pub fn element_count(path: &str, shape: &[i64]) -> Result<usize, Error> {
    let refuse = |expected: &str| Error::field(format!("{path}.shape"), expected, format!("{shape:?}"));
    if shape.len() > TENSOR_RANK_MAX {
        return Err(Error::field(
            format!("{path}.shape"),
            format!("at most {TENSOR_RANK_MAX} dimensions"),
            shape.len(),
        ));
    }
    shape.iter().try_fold(1_usize, |count, &dimension| {
        let dimension = usize::try_from(dimension).map_err(|_| refuse("dimensions of 0 or more"))?;
        count.checked_mul(dimension).ok_or_else(|| refuse("a shape whose size can be counted"))
    })
}

impl Tensor {
    /// A tensor over elements the sender has.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when the shape does not have as many elements as `elements`.
    pub fn new<T: Element>(shape: &[i64], elements: &[T]) -> Result<Self, Error> {
        let tensor =
            Self::from_bytes(T::DTYPE, shape, Bytes::copy_from_slice(bytemuck::cast_slice(elements)));
        tensor.check("tensor").map(|_| tensor)
    }

    /// A tensor over bytes the sender has, little-endian, unchecked.
    pub fn from_bytes(dtype: DType, shape: &[i64], data: Bytes) -> Self {
        Self { dtype: dtype.into(), shape: shape.to_vec(), pad: Bytes::new(), data }
    }

    /// The same numbers in half the bytes, for slow links: `f32` as `f16`, each rounded to the nearest. The agent takes
    /// them for an input of `f32`.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for other types and for data of another size.
    pub fn to_f16(&self) -> Result<Self, Error> {
        self.check("tensor")?;
        if self.dtype() != DType::F32 {
            return Err(Error::field("tensor.dtype", DType::F32.name(), self.dtype().name()));
        }
        let mut halves = vec![0; self.data.len() / 2];
        for (half, number) in halves.chunks_exact_mut(2).zip(self.data.chunks_exact(4)) {
            let number = number.try_into().map_or(0.0, f32::from_le_bytes);
            half.copy_from_slice(&half::f16::from_f32(number).to_le_bytes());
        }
        Ok(Self::from_bytes(DType::F16, &self.shape, halves.into()))
    }

    /// Checks type, shape and size against each other and returns the number of elements.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` naming the field under `path`.
    pub fn check(&self, path: &str) -> Result<usize, Error> {
        let dtype = DType::try_from(self.dtype).unwrap_or_default();
        if dtype == DType::Unspecified {
            return Err(Error::field(format!("{path}.dtype"), "a known type", self.dtype));
        }
        let count = element_count(path, &self.shape)?;
        if dtype == DType::Bytes {
            return self.check_strings(path, count);
        }
        let expected = count.checked_mul(dtype.size());
        if expected != Some(self.data.len()) {
            let expected =
                expected.map_or("a size that can be counted".to_owned(), |bytes| format!("{bytes} bytes"));
            let shape = &self.shape;
            return Err(Error::field(
                format!("{path}.data"),
                format!("{expected} for {}{shape:?}", dtype.name()),
                format!("{} bytes", self.data.len()),
            ));
        }
        Ok(count)
    }

    fn check_strings(&self, path: &str, count: usize) -> Result<usize, Error> {
        let whole = strings(&self.data).try_fold(0_usize, |found, string| string.map(|_| found + 1));
        if whole == Some(count) {
            return Ok(count);
        }
        let got = whole.map_or("bytes that end inside of one".into(), |found| format!("{found}"));
        let shape = &self.shape;
        Err(Error::field(
            format!("{path}.data"),
            format!("{count} strings with their lengths for bytes{shape:?}"),
            got,
        ))
    }

    /// The elements: in place where the data is aligned, else one copy.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` when the type is another or the size is not a whole number of elements.
    pub fn elements<T: Element>(&self) -> Result<Cow<'_, [T]>, Error> {
        if self.dtype() != T::DTYPE {
            return Err(Error::field("tensor.dtype", T::DTYPE.name(), self.dtype().name()));
        }
        if !self.data.len().is_multiple_of(size_of::<T>()) {
            let whole = format!("a multiple of {} bytes", size_of::<T>());
            return Err(Error::field("tensor.data", whole, self.data.len()));
        }
        Ok(match bytemuck::try_cast_slice(&self.data) {
            Ok(view) => Cow::Borrowed(view),
            Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(&self.data)),
        })
    }

    /// Type and shape as people write them, as in `f32[1, 8, 8]`.
    pub fn signature(&self) -> String {
        format!("{}{:?}", self.dtype().name(), self.shape)
    }
}

/// Bytes of the length before each string.
const STRING_LENGTH_BYTES: usize = 4;

/// The strings of a tensor of that type, without their lengths; none, and the end, for one that is cut off.
pub fn strings(data: &Bytes) -> impl Iterator<Item = Option<Bytes>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == data.len() {
            return None;
        }
        let string = data.get(at..at + STRING_LENGTH_BYTES).and_then(|length| {
            let begin = at + STRING_LENGTH_BYTES;
            let length = u32::from_le_bytes(length.try_into().ok()?);
            let end = begin.checked_add(usize::try_from(length).ok()?)?;
            (end <= data.len()).then(|| (end, data.slice(begin..end)))
        });
        at = string.as_ref().map_or(data.len(), |(end, _)| *end);
        Some(string.map(|(_, string)| string))
    })
}

/// Strings as the data of a tensor, each with its length before it. One beyond 4 GiB ends there.
pub fn with_lengths<'a>(strings: impl IntoIterator<Item = &'a [u8]>) -> Bytes {
    let mut data = Vec::new();
    for string in strings {
        let length = u32::try_from(string.len()).unwrap_or(u32::MAX);
        data.extend_from_slice(&length.to_le_bytes());
        data.extend_from_slice(&string[..length as usize]);
    }
    data.into()
}

/// Checks a list of tensors: how many, their names, and each one's sizes.
///
/// # Errors
/// `BAD_ARGUMENT` naming the field under `path`.
pub fn check_named(path: &str, tensors: &[NamedTensor]) -> Result<(), Error> {
    if tensors.len() > TENSORS_PER_CALL_MAX {
        return Err(Error::field(path, format!("at most {TENSORS_PER_CALL_MAX} tensors"), tensors.len()));
    }
    for (index, named) in tensors.iter().enumerate() {
        if named.name.len() > NAME_BYTES_MAX {
            let expected = format!("at most {NAME_BYTES_MAX} bytes");
            return Err(Error::field(format!("{path}[{index}].name"), expected, named.name.len()));
        }
        match &named.tensor {
            Some(tensor) => tensor.check(&format!("{path}[{index}]"))?,
            None => return Err(Error::field(format!("{path}[{index}].tensor"), "a tensor", "none")),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unaligned_data_is_copied_and_right() {
        let values = [1.5_f32, -2.0, 3.25];
        let mut buffer = vec![0_u8; 1];
        buffer.extend_from_slice(bytemuck::cast_slice(&values));
        for start in [0, 1] {
            let padded = [vec![0; start], buffer[1..].to_vec()].concat();
            let tensor = Tensor::from_bytes(DType::F32, &[3], Bytes::from(padded).slice(start..));
            assert_eq!(tensor.elements::<f32>().unwrap().as_ref(), values);
        }
    }

    #[test]
    fn hostile_shapes_are_refused_with_the_field() {
        let tensor = |dtype: DType, shape: &[i64], bytes: usize| {
            Tensor::from_bytes(dtype, shape, Bytes::from(vec![0; bytes]))
        };
        for (tensor, field) in [
            (tensor(DType::Unspecified, &[1], 4), "t.dtype"),
            (tensor(DType::F32, &[-1], 4), "t.shape"),
            (tensor(DType::F32, &[i64::MIN], 4), "t.shape"),
            (tensor(DType::F32, &[i64::MAX, i64::MAX], 4), "t.shape"),
            (tensor(DType::F32, &[1 << 32, 1 << 32, 0], 4), "t.shape"),
            (tensor(DType::F64, &[i64::MAX], 8), "t.data"),
            (tensor(DType::F32, &[1; 9], 4), "t.shape"),
            (tensor(DType::F32, &[2], 4), "t.data"),
            (tensor(DType::F32, &[0], 4), "t.data"),
            (tensor(DType::F32, &[], 0), "t.data"),
        ] {
            let refusal = tensor.check("t").unwrap_err();
            assert_eq!(
                refusal.detail(),
                &crate::error::Detail::Field(field.into()),
                "{}",
                tensor.signature()
            );
        }
        assert_eq!(tensor(DType::F32, &[], 4).check("t").unwrap(), 1);
        assert_eq!(tensor(DType::F16, &[0, 7], 0).check("t").unwrap(), 0);
    }

    #[test]
    fn halves_are_the_nearest() {
        let whole = Tensor::new(&[2, 2], &[0.1_f32, -2.5, 1e9, 0.0]).unwrap();
        let half = whole.to_f16().unwrap();
        assert_eq!((half.dtype(), &half.shape, half.data.len()), (DType::F16, &whole.shape, 8));
        let numbers = half.elements::<half::f16>().unwrap().iter().map(|n| n.to_f32()).collect::<Vec<_>>();
        assert_eq!(numbers, [0.099_975_586, -2.5, f32::INFINITY, 0.0]);
        assert!(half.to_f16().is_err());
    }

    #[test]
    fn the_wrong_type_is_not_viewed() {
        let tensor = Tensor::new(&[2], &[1_i32, 2]).unwrap();
        assert!(tensor.elements::<f32>().is_err());
        assert_eq!(tensor.elements::<i32>().unwrap().as_ref(), [1, 2]);
    }
}
