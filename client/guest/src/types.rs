//! What goes in and comes out of calls.

use crate::text::Text;

/// Images of one classification, and tensors that go into or come out of one run.
pub const ITEMS_MAX: usize = 16;

/// Axes of a tensor.
pub const RANK_MAX: usize = 8;

/// Hexadecimal digits of a session's id and of a resource's.
pub(crate) const SESSION_BYTES: usize = 32;
pub(crate) const RESOURCE_BYTES: usize = 64;

/// Element types, with their numbers on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names say it")]
pub enum DType {
    #[default]
    Unspecified = 0,
    Bool = 1,
    U8 = 2,
    I8 = 3,
    U16 = 4,
    I16 = 5,
    U32 = 6,
    I32 = 7,
    U64 = 8,
    I64 = 9,
    F16 = 10,
    Bf16 = 11,
    F32 = 12,
    F64 = 13,
    /// Strings of bytes: each element is its length in 4 bytes, little-endian, and the bytes.
    Bytes = 14,
}

impl DType {
    /// The type with this number.
    pub fn from_number(number: u64) -> Self {
        match number {
            1 => Self::Bool,
            2 => Self::U8,
            3 => Self::I8,
            4 => Self::U16,
            5 => Self::I16,
            6 => Self::U32,
            7 => Self::I32,
            8 => Self::U64,
            9 => Self::I64,
            10 => Self::F16,
            11 => Self::Bf16,
            12 => Self::F32,
            13 => Self::F64,
            14 => Self::Bytes,
            _ => Self::Unspecified,
        }
    }

    /// Bytes of one element; 0 for strings, which have their length with them.
    pub fn size(self) -> usize {
        match self {
            Self::Unspecified | Self::Bytes => 0,
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }
}

/// A tensor that goes in: dense, row-major, little-endian.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input<'a> {
    /// Name of the model's input; empty for its place in the list.
    pub name: &'a str,
    /// Type of the elements.
    pub dtype: DType,
    /// Elements along each axis, at most [`RANK_MAX`] of them.
    pub shape: &'a [i64],
    /// The elements.
    pub data: &'a [u8],
}

/// A tensor that comes out, and where its elements go.
#[derive(Debug)]
pub struct Output<'a> {
    /// Where they go; of the output's size or larger.
    pub data: &'a mut [u8],
    /// Bytes that came; more than there is place for, where that was the error.
    pub length: usize,
    /// Type of the elements.
    pub dtype: DType,
    /// Elements along each axis; the first `rank` of them count.
    pub shape: [i64; RANK_MAX],
    /// Number of axes.
    pub rank: usize,
}

impl<'a> Output<'a> {
    /// An output whose elements go to `data`.
    pub fn new(data: &'a mut [u8]) -> Self {
        Self { data, length: 0, dtype: DType::Unspecified, shape: [0; RANK_MAX], rank: 0 }
    }

    /// Elements along each axis.
    pub fn shape(&self) -> &[i64] {
        self.shape.get(..self.rank).unwrap_or_default()
    }
}

/// What an argument of a generic operation is: vAccel's number of its type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArgType(pub u32);

#[allow(missing_docs, reason = "the names say it")]
impl ArgType {
    pub const RAW: Self = Self(0);
    pub const INT8: Self = Self(1);
    pub const INT8_ARRAY: Self = Self(2);
    pub const INT16: Self = Self(3);
    pub const INT16_ARRAY: Self = Self(4);
    pub const INT32: Self = Self(5);
    pub const INT32_ARRAY: Self = Self(6);
    pub const INT64: Self = Self(7);
    pub const INT64_ARRAY: Self = Self(8);
    pub const UINT8: Self = Self(9);
    pub const UINT8_ARRAY: Self = Self(10);
    pub const UINT16: Self = Self(11);
    pub const UINT16_ARRAY: Self = Self(12);
    pub const UINT32: Self = Self(13);
    pub const UINT32_ARRAY: Self = Self(14);
    pub const UINT64: Self = Self(15);
    pub const UINT64_ARRAY: Self = Self(16);
    pub const FLOAT32: Self = Self(17);
    pub const FLOAT32_ARRAY: Self = Self(18);
    pub const FLOAT64: Self = Self(19);
    pub const FLOAT64_ARRAY: Self = Self(20);
    pub const BOOL: Self = Self(21);
    pub const BOOL_ARRAY: Self = Self(22);
    pub const CHAR: Self = Self(23);
    pub const CHAR_ARRAY: Self = Self(24);
    pub const UCHAR: Self = Self(25);
    pub const UCHAR_ARRAY: Self = Self(26);
    pub const STRING: Self = Self(27);
    pub const BUFFER: Self = Self(28);
    pub const CUSTOM: Self = Self(29);
}

/// An argument that goes in.
#[derive(Clone, Copy, Debug)]
pub struct Arg<'a> {
    /// What it is.
    pub kind: ArgType,
    /// Its bytes, little-endian.
    pub data: &'a [u8],
}

/// An argument that comes out, and where it goes.
#[derive(Debug)]
pub struct ArgOut<'a> {
    /// What it is.
    pub kind: ArgType,
    /// What it is before the operation, where that counts; else empty.
    pub before: &'a [u8],
    /// Where it goes; of its size.
    pub data: &'a mut [u8],
    /// Bytes that came; more than there is place for, where that was the error.
    pub length: usize,
}

impl<'a> ArgOut<'a> {
    /// An argument that is only written.
    pub fn new(kind: ArgType, data: &'a mut [u8]) -> Self {
        Self { kind, before: &[], data, length: 0 }
    }
}

/// A product of matrices, row-major: `c = alpha * a * b + beta * c`.
#[derive(Clone, Copy, Debug)]
pub struct Sgemm<'a> {
    /// Rows of `a` and `c`, columns of `b` and `c`, columns of `a` and rows of `b`.
    pub sizes: [i64; 3],
    /// Factor of the product.
    pub alpha: f32,
    /// `f32[m, k]`, little-endian.
    pub a: &'a [u8],
    /// Elements from one row of `a` to the next; 0 for the length of a row, as for the others.
    pub lda: i64,
    /// `f32[k, n]`, little-endian.
    pub b: &'a [u8],
    /// Elements from one row of `b` to the next.
    pub ldb: i64,
    /// Factor of what `c` was.
    pub beta: f32,
    /// What `c` was; empty when `beta` is 0.
    pub c: &'a [u8],
    /// Elements from one row of `c` to the next, before and after.
    pub ldc: i64,
}

/// A class an image may show.
#[derive(Clone, Copy, Debug, Default)]
pub struct Label {
    /// Which of the images, from 0.
    pub image: u32,
    /// Which class.
    pub index: u32,
    /// From 0 to 1; those of all classes sum to 1.
    pub probability: f32,
    /// Name of the class, cut off where it is longer.
    pub name: Text<64>,
}

/// A thing in an image, and where it is: in pixels of the image, from its upper left corner.
#[derive(Clone, Copy, Debug, Default)]
pub struct Detection {
    /// What it is. The probabilities of all things have nothing to do with each other.
    pub label: Label,
    /// Its left side.
    pub left: f32,
    /// Its upper side.
    pub top: f32,
    /// Its right side.
    pub right: f32,
    /// Its lower side.
    pub bottom: f32,
}

/// Where the agent spent its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Waiting for a place to compute, in microseconds.
    pub queue_us: u64,
    /// Computing, in microseconds.
    pub run_us: u64,
    /// Calls that were computed together.
    pub batch_size: u32,
}

/// What the agent is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Info {
    /// Its version.
    pub version: Text<32>,
    /// Who it takes this guest for.
    pub tenant: Text<128>,
    /// Names of its operations, with spaces between.
    pub operations: Text<1024>,
    /// Names of the engines it has, with spaces between.
    pub engines: Text<128>,
    /// Longest message, in bytes.
    pub message_bytes_max: u64,
    /// How long a session outlives its last connection, in milliseconds.
    pub session_lease_ms: u64,
}

/// A session's id. It is a secret.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionId(pub(crate) [u8; SESSION_BYTES]);

impl core::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("SessionId")
    }
}

/// A resource's name: made from its content, or the one by which the host has a model.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ResourceId([u8; RESOURCE_BYTES]);

impl ResourceId {
    /// A model of the host's repository, which no session needs to hold; none for a name that is empty, has a NUL or is
    /// longer than 64 bytes.
    pub fn of_repository(name: &str) -> Option<Self> {
        let mut bytes = [0; RESOURCE_BYTES];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        (!name.is_empty() && !name.contains('\0')).then_some(Self(bytes))
    }

    /// Of bytes that are the name, with NULs behind it.
    pub(crate) fn of_bytes(bytes: [u8; RESOURCE_BYTES]) -> Self {
        Self(bytes)
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// The name: of what a session holds, 64 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

impl core::fmt::Debug for ResourceId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a resource is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ResourceKind {
    Model = 1,
    Data = 2,
    Library = 3,
}

/// Bytes of a name.
pub(crate) const NAME_BYTES_MAX: usize = 256;

/// A file of a resource.
#[derive(Clone, Copy, Debug)]
pub struct File<'a> {
    /// A label such as `model.onnx`.
    pub name: &'a str,
    /// What is in it.
    pub content: &'a [u8],
}
