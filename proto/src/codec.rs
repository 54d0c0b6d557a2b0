//! The codec of all services: as prost's, but a request has only so many parts.
//!
//! Two bytes of a request can become a structure of two hundred: a message of 32 MiB that is nothing but empty parts
//! would take gigabytes before anything could look at it. So its parts are counted before it is decoded, by the
//! contract's own descriptions: contents of `bytes` fields, which may look like anything, are passed over.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::LazyLock;

use bytes::Buf;
use prost::{Message, Name};
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FileDescriptorSet};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::error::{Error, Reason};
use crate::limits::{PACKED_BYTES_MAX, PARTS_MAX};

/// As deep as prost follows messages in messages.
const DEPTH_MAX: usize = 100;

/// A message of so many bytes has no more parts than it may have, for each takes two.
const FEW_PARTS_BYTES: usize = 2 * PARTS_MAX;
const _: () = assert!(FEW_PARTS_BYTES <= PACKED_BYTES_MAX);

/// The codec.
#[derive(Debug)]
pub struct Bounded<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Bounded<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for Bounded<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Name + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::default())
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder { inner: ProstCodec::<T, U>::raw_decoder(BufferSettings::default()) }
    }
}

/// Counts the parts of an encoded message.
///
/// # Errors
/// `MESSAGE_TOO_LARGE` for more than [`PARTS_MAX`] fields, or [`PACKED_BYTES_MAX`] of lists of numbers.
pub fn check<M: Name>(bytes: &[u8]) -> Result<(), Error> {
    if bytes.len() <= FEW_PARTS_BYTES {
        return Ok(());
    }
    match MESSAGES.named.get(&(M::PACKAGE, M::NAME)) {
        Some(fields) => Count::default().message(bytes, &MESSAGES.fields[*fields], DEPTH_MAX),
        None => Ok(()),
    }
}

/// A request, whose parts are counted before it is decoded. It is in one piece.
///
/// # Errors
/// `BAD_ARGUMENT` for bytes that are no such message, and those of [`check`].
pub fn decode<M: Message + Name + Default>(bytes: impl Buf) -> Result<M, Error> {
    check::<M>(bytes.chunk())?;
    M::decode(bytes).map_err(|error| {
        Error::field("message", format!("a {}", M::NAME), format!("no message of the contract: {error}"))
    })
}

/// Counts, then decodes.
#[derive(Debug)]
pub struct BoundedDecoder<U> {
    inner: ProstDecoder<U>,
}

impl<U: Message + Default + Name> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // What an agent answers, its guest has asked for.
        if ["Reply", "Response"].iter().any(|end| U::NAME.ends_with(end)) {
            return self.inner.decode(buffer);
        }
        Ok(Some(decode(buffer)?))
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.inner.buffer_settings()
    }
}

/// What a field is, as far as it matters for what it takes when it is decoded.
#[derive(Clone, Copy, Debug)]
enum Field {
    /// A message, by its place among all.
    Message(usize),
    /// Numbers that take more room than they have on the wire, when there are many in one field.
    Numbers,
    Other,
}

/// By number.
type Fields = Vec<Field>;

/// All messages of the contract.
#[derive(Debug, Default)]
struct Messages {
    /// Where those of packages are, by package and name.
    named: HashMap<(&'static str, &'static str), usize>,
    fields: Vec<Fields>,
}

static FILES: LazyLock<FileDescriptorSet> =
    LazyLock::new(|| FileDescriptorSet::decode(crate::DESCRIPTORS).unwrap_or_default());

static MESSAGES: LazyLock<Messages> = LazyLock::new(|| {
    let mut all = Vec::new();
    for file in &FILES.file {
        for message in &file.message_type {
            describe(file.package(), message, &mut all);
        }
    }
    let places: HashMap<&str, usize> = all.iter().enumerate().map(|(at, (name, _))| (&**name, at)).collect();
    let fields = all.iter().map(|(_, message)| fields(message, &places)).collect();
    let in_packages = FILES.file.iter().flat_map(|file| {
        let package = file.package();
        file.message_type.iter().map(move |message| (package, message.name()))
    });
    let named = in_packages.map(|(package, name)| ((package, name), places[&*format!("{package}.{name}")]));
    Messages { named: named.collect(), fields }
});

/// A message and those in it, by their full names.
fn describe(
    scope: &str,
    message: &'static DescriptorProto,
    all: &mut Vec<(String, &'static DescriptorProto)>,
) {
    let name = format!("{scope}.{}", message.name());
    for nested in &message.nested_type {
        describe(&name, nested, all);
    }
    all.push((name, message));
}

fn fields(message: &DescriptorProto, places: &HashMap<&str, usize>) -> Fields {
    let mut fields = Fields::new();
    for field in &message.field {
        let kind = match field.r#type() {
            Type::Message => {
                let place = places.get(field.type_name().trim_start_matches('.'));
                place.map_or(Field::Other, |place| Field::Message(*place))
            }
            Type::String | Type::Bytes => Field::Other,
            _ => Field::Numbers,
        };
        let number = field.number().unsigned_abs() as usize;
        if fields.len() <= number {
            fields.resize(number + 1, Field::Other);
        }
        fields[number] = kind;
    }
    fields
}

/// What was counted so far.
#[derive(Debug, Default)]
struct Count {
    parts: usize,
    packed: usize,
}

impl Count {
    /// Counts a message. What is not as it should be is left to the decoder.
    fn message(&mut self, mut bytes: &[u8], fields: &Fields, depth: usize) -> Result<(), Error> {
        const VARINT: u64 = 0;
        const LENGTH: u64 = 2;
        while let Some(tag) = varint(&mut bytes) {
            self.parts += 1;
            if self.parts > PARTS_MAX {
                let (limit, parts) = (PARTS_MAX as u64, self.parts as u64);
                return Err(Error::limit(
                    Reason::MessageTooLarge,
                    "fields of a message",
                    limit,
                    parts,
                    "fields",
                ));
            }
            let rest = match tag & 7 {
                VARINT => varint(&mut bytes).map(|_| bytes),
                LENGTH => match part(&mut bytes) {
                    Some(content) => {
                        self.content(content, number(tag).and_then(|number| fields.get(number)), depth)?;
                        Some(bytes)
                    }
                    None => None,
                },
                1 => bytes.get(8..),
                5 => bytes.get(4..),
                _ => None,
            };
            let Some(rest) = rest else { return Ok(()) };
            bytes = rest;
        }
        Ok(())
    }

    fn content(&mut self, content: &[u8], field: Option<&Field>, depth: usize) -> Result<(), Error> {
        match field {
            Some(Field::Message(place)) if depth > 0 => {
                self.message(content, &MESSAGES.fields[*place], depth - 1)
            }
            Some(Field::Numbers) => {
                self.packed += content.len();
                if self.packed <= PACKED_BYTES_MAX {
                    return Ok(());
                }
                let (limit, packed) = (PACKED_BYTES_MAX as u64, self.packed as u64);
                Err(Error::limit(Reason::MessageTooLarge, "lists of numbers", limit, packed, "bytes"))
            }
            _ => Ok(()),
        }
    }
}

fn number(tag: u64) -> Option<usize> {
    usize::try_from(tag >> 3).ok()
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    if bytes.is_empty() {
        return None;
    }
    prost::encoding::decode_varint(bytes).ok()
}

fn part<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(varint(bytes)?).ok()?;
    let (content, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::ModelInferRequest;
    use crate::inference::model_infer_request::InferInputTensor;
    use crate::v1::{NamedTensor, RunRequest, Tensor, run_request::Op};

    fn count<M: Message + Name>(message: &M) -> Result<Count, Error> {
        let mut count = Count::default();
        let bytes = message.encode_to_vec();
        let fields = &MESSAGES.fields[MESSAGES.named[&(M::PACKAGE, M::NAME)]];
        count.message(&bytes, fields, DEPTH_MAX).map(|()| count)
    }

    #[test]
    fn parts_are_counted_at_every_depth() {
        let tensor = NamedTensor {
            name: "x".into(),
            tensor: Some(Tensor::new(&[1, 2], &[0.5_f32; 2]).expect("valid")),
        };
        let run = crate::v1::ModelRunRequest { inputs: vec![tensor.clone(), tensor], ..Default::default() };
        let request =
            RunRequest { session: "s".into(), op: Some(Op::ModelRun(run)), ..RunRequest::default() };
        // session, op; two inputs of name and tensor; each tensor of dtype, shape and data.
        assert_eq!(count(&request).expect("few").parts, 2 + 2 + 2 * 2 + 2 * 3);
    }

    #[test]
    fn a_message_of_empty_parts_is_refused_before_it_is_decoded() {
        let inputs = vec![InferInputTensor::default(); PARTS_MAX];
        let request = ModelInferRequest { model_name: "m".into(), inputs, ..Default::default() };
        let refusal = count(&request).expect_err("too many");
        assert_eq!(refusal.reason(), Reason::MessageTooLarge);
    }

    #[test]
    fn what_looks_like_parts_and_is_data_is_not_counted() {
        let data = [0x0a, 0x00].repeat(PARTS_MAX);
        let request = ModelInferRequest { raw_input_contents: vec![data.into()], ..Default::default() };
        assert_eq!(count(&request).expect("one").parts, 1);
    }

    #[test]
    fn lists_of_numbers_are_bounded() {
        let input = InferInputTensor { shape: vec![0; PACKED_BYTES_MAX + 1], ..Default::default() };
        let request = ModelInferRequest { inputs: vec![input], ..Default::default() };
        assert_eq!(count(&request).expect_err("too long").reason(), Reason::MessageTooLarge);
    }

    #[test]
    fn what_is_no_message_is_left_to_the_decoder() {
        let fields = &MESSAGES.fields[MESSAGES.named[&("vaccel.v1", "RunRequest")]];
        for bytes in [&[0x0a][..], &[0x0a, 0x7f, 0], &[0xff; 12], &[0x0b], &[0x09, 1, 2]] {
            assert!(Count::default().message(bytes, fields, DEPTH_MAX).is_ok());
        }
    }
}
