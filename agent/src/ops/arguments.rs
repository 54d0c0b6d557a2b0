//! Arguments of generic operations as typed values, each checked against what is expected at its place.

use std::fmt;

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::error::shown;
use vaccel_proto::limits::NAME_BYTES_MAX;
use vaccel_proto::v1::{Arg, ArgType, DType, NamedTensor, Tensor};

/// Arguments that are taken one after the other.
#[derive(Debug)]
pub(super) struct Reads<'a> {
    args: &'a [Arg],
    at: usize,
}

/// Where an argument is, in the request.
fn path(at: usize) -> String {
    format!("read[{at}]")
}

/// As an argument is shown to whoever sent another one.
fn describe(arg: &Arg) -> String {
    let kind = ArgType::try_from(arg.kind).map_or("an unknown type", |kind| kind.as_str_name());
    format!("{} of {} bytes", kind.trim_start_matches("ARG_TYPE_"), arg.data.len())
}

impl<'a> Reads<'a> {
    /// The arguments from one on.
    pub(super) fn new(args: &'a [Arg], at: usize) -> Self {
        Self { args, at }
    }

    pub(super) fn left(&self) -> usize {
        self.args.len().saturating_sub(self.at)
    }

    /// All that are left, as they are.
    pub(super) fn rest(self) -> Vec<Arg> {
        self.args.get(self.at..).unwrap_or_default().to_vec()
    }

    /// # Errors
    /// `BAD_ARGUMENT` when arguments are left.
    pub(super) fn end(&self) -> Result<(), Error> {
        if self.left() == 0 {
            return Ok(());
        }
        Err(Error::field("read", format!("{} arguments", self.at), self.args.len()))
    }

    /// The next argument, of one of these types or of none, as before vAccel 0.6.
    fn next(&mut self, name: &str, kinds: &[ArgType]) -> Result<&'a Arg, Error> {
        let arg = self.args.get(self.at);
        let kind = arg.and_then(|arg| ArgType::try_from(arg.kind).ok());
        match arg.filter(|_| kind.is_some_and(|kind| kind == ArgType::Raw || kinds.contains(&kind))) {
            Some(fits) => {
                self.at += 1;
                Ok(fits)
            }
            None => {
                let first = kinds.first().map_or("", |kind| kind.as_str_name());
                let expected = format!("{name}, {}", first.trim_start_matches("ARG_TYPE_"));
                let got = arg.map_or_else(|| "no argument".to_owned(), describe);
                Err(Error::field(path(self.at), expected, got))
            }
        }
    }

    /// That the argument taken last is not what it should be.
    fn wrong(&self, expected: String, got: impl fmt::Display) -> Error {
        Error::field(path(self.at.saturating_sub(1)), expected, got)
    }

    fn number<const N: usize>(&mut self, name: &str, kind: ArgType) -> Result<[u8; N], Error> {
        let arg = self.next(name, &[kind])?;
        arg.data[..].try_into().map_err(|_| self.wrong(format!("{name}, {N} bytes"), describe(arg)))
    }

    pub(super) fn i64(&mut self, name: &str) -> Result<i64, Error> {
        self.number(name, ArgType::Int64).map(i64::from_le_bytes)
    }

    pub(super) fn i32(&mut self, name: &str) -> Result<i32, Error> {
        self.number(name, ArgType::Int32).map(i32::from_le_bytes)
    }

    pub(super) fn f32(&mut self, name: &str) -> Result<f32, Error> {
        self.number(name, ArgType::Float32).map(f32::from_le_bytes)
    }

    pub(super) fn f64(&mut self, name: &str) -> Result<f64, Error> {
        self.number(name, ArgType::Float64).map(f64::from_le_bytes)
    }

    /// A text, with its NUL or, as before vAccel 0.6, without.
    pub(super) fn text(&mut self, name: &str) -> Result<String, Error> {
        let arg = self.next(name, &[ArgType::String, ArgType::CharArray, ArgType::UcharArray])?;
        let text = arg.data.split(|byte| *byte == 0).next().unwrap_or_default();
        match str::from_utf8(text) {
            Ok(text) if text.len() <= NAME_BYTES_MAX => Ok(text.to_owned()),
            _ => {
                let expected = format!("{name}, UTF-8 of at most {NAME_BYTES_MAX} bytes");
                Err(self.wrong(expected, shown(&String::from_utf8_lossy(text))))
            }
        }
    }

    pub(super) fn bytes(&mut self, name: &str) -> Result<Bytes, Error> {
        let kinds = [ArgType::Buffer, ArgType::UcharArray, ArgType::Uint8Array, ArgType::CharArray];
        self.next(name, &kinds).map(|arg| arg.data.clone())
    }

    /// An array as a tensor of one axis.
    pub(super) fn array(&mut self, name: &str, dtype: DType) -> Result<NamedTensor, Error> {
        let kind = match dtype {
            DType::F64 => ArgType::Float64Array,
            DType::I32 => ArgType::Int32Array,
            _ => ArgType::Float32Array,
        };
        let arg = self.next(name, &[kind])?;
        let size = dtype.size();
        if !arg.data.len().is_multiple_of(size) {
            return Err(self.wrong(format!("{name}, numbers of {size} bytes"), describe(arg)));
        }
        let count = i64::try_from(arg.data.len() / size).unwrap_or(i64::MAX);
        let tensor = Tensor::from_bytes(dtype, &[count], arg.data.clone());
        Ok(NamedTensor { name: String::new(), tensor: Some(tensor) })
    }
}
