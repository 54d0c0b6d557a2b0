//! Protobuf as it lies in a file: fields one by one, before anything is decoded, and messages with few of their fields.

use bytes::Buf;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint};
use vaccel_proto::Error;

use super::file::refuse;

/// Nodes, attributes, tensors, dimensions and so on of a model. One takes 2 bytes in a file and some 500 in an engine;
/// the largest models in use have 100,000 or so.
pub(super) const PARTS_MAX: usize = 1 << 20;

/// Messages inside messages, the limit of the library that decodes them.
pub(super) const DEPTH_MAX: usize = 100;

/// One field of an encoded message.
pub(super) struct Field<'a> {
    /// Key and value as they stand.
    pub(super) whole: &'a [u8],
    /// The value of a length-delimited field.
    pub(super) content: Option<&'a [u8]>,
}

/// Gives every field of a message in order.
///
/// # Errors
/// `MODEL_REJECTED` for bytes that are no fields, and what `each` returns.
pub(super) fn for_each_field<'a>(
    message: &'a [u8],
    each: &mut dyn FnMut(u32, Field<'a>) -> Result<(), Error>,
) -> Result<(), Error> {
    let broken = |error: prost::DecodeError| refuse(format!("its encoding is broken ({error})"));
    let mut rest = message;
    while rest.has_remaining() {
        let start = rest;
        let (tag, wire_type) = decode_key(&mut rest).map_err(broken)?;
        let mut content = None;
        if wire_type == WireType::LengthDelimited {
            let length = usize::try_from(decode_varint(&mut rest).map_err(broken)?).unwrap_or(usize::MAX);
            let Some((value, after)) = rest.split_at_checked(length) else {
                return Err(refuse("its encoding is broken (a field is longer than its message)"));
            };
            content = Some(value);
            rest = after;
        } else {
            prost::encoding::skip_field(wire_type, tag, &mut rest, DecodeContext::default())
                .map_err(broken)?;
        }
        let whole = &start[..start.len() - rest.len()];
        each(tag, Field { whole, content })?;
    }
    Ok(())
}

/// What a kind of message has inside.
pub(super) trait Parts: Copy {
    /// What a field is, if it is a message or text itself; and whether that has nothing inside.
    fn inside(self, tag: u32) -> Option<(Self, bool)>;
}

/// Counts the parts of a message before they are decoded.
///
/// # Errors
/// `MODEL_REJECTED` for too many of them, or too deep inside each other.
pub(super) fn count_parts<P: Parts>(
    message: &[u8],
    part: P,
    parts: &mut usize,
    depth_left: usize,
) -> Result<(), Error> {
    let depth_left = depth_left.checked_sub(1).ok_or_else(|| refuse("its graphs are nested too deep"))?;
    for_each_field(message, &mut |tag, field| {
        let (Some(content), Some((inner, leaf))) = (field.content, part.inside(tag)) else { return Ok(()) };
        *parts += 1;
        if *parts > PARTS_MAX {
            return Err(refuse(format!("expected a model of at most {PARTS_MAX} nodes, tensors and so on")));
        }
        if leaf { Ok(()) } else { count_parts(content, inner, parts, depth_left) }
    })
}

/// Declares messages with the fields that are read.
macro_rules! messages {
    ($($name:ident { $($field:ident: $type:ty = #[$($attribute:tt)*];)* })*) => { $(
        #[derive(Clone, PartialEq, Message)]
        pub(crate) struct $name { $(#[$($attribute)*] pub(crate) $field: $type,)* }
    )* };
}
pub(super) use messages;
