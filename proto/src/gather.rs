//! Messages as they are sent: what is large stays where it is.
//!
//! Encoding a message copies every tensor into one buffer, fresh for each message. Here the encoder's own bytes go into
//! a small buffer, and each large `bytes` field becomes a piece of its own, which is the field's own memory.

#![allow(unsafe_code, reason = "the trait that prost writes to is unsafe to implement")]

use bytes::buf::UninitSlice;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::error::{Error, Reason};
use crate::limits::MESSAGE_BYTES_MAX;
use crate::tensor::GRPC_HEADER_BYTES;

/// Shorter fields are copied: a piece of its own costs as much.
const SHARED_BYTES_MIN: usize = 8 << 10;

/// A message in gRPC's framing, as pieces to be sent one after the other.
///
/// # Errors
/// `MESSAGE_TOO_LARGE` for one longer than [`MESSAGE_BYTES_MAX`].
pub fn framed(message: &impl Message) -> Result<Vec<Bytes>, Error> {
    let length = message.encoded_len();
    if length > MESSAGE_BYTES_MAX {
        let limit = MESSAGE_BYTES_MAX as u64;
        return Err(Error::limit(Reason::MessageTooLarge, "message", limit, length as u64, "bytes"));
    }
    // What is short as a whole is one piece.
    let own_bytes = if length < SHARED_BYTES_MIN { GRPC_HEADER_BYTES + length } else { OWN_BYTES };
    let mut pieces = Pieces { whole: Vec::new(), own: BytesMut::with_capacity(own_bytes) };
    pieces.put_u8(0);
    // Within the limit, so within 32 bits.
    pieces.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    let full = |error| Error::new(Reason::BackendFailed, "a message cannot be encoded").caused_by(error);
    message.encode(&mut pieces).map_err(full)?;
    Ok(pieces.finish())
}

/// Room for what usually is beside long tensors, in bytes.
const OWN_BYTES: usize = 512;

/// What an encoder writes.
struct Pieces {
    whole: Vec<Bytes>,
    own: BytesMut,
}

impl Pieces {
    fn finish(mut self) -> Vec<Bytes> {
        self.cut();
        self.whole
    }

    fn cut(&mut self) {
        if !self.own.is_empty() {
            self.whole.push(self.own.split().freeze());
        }
    }
}

// SAFETY: what is written and where it may be written is `BytesMut`'s, whose implementation of the same trait both
// methods call with what they were given; `put` and `put_slice` use safe methods only.
unsafe impl BufMut for Pieces {
    fn remaining_mut(&self) -> usize {
        self.own.remaining_mut()
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller has written so many bytes to what `chunk_mut` gave, which was `own`'s.
        unsafe { self.own.advance_mut(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        self.own.chunk_mut()
    }

    fn put<T: Buf>(&mut self, mut from: T) {
        if from.remaining() < SHARED_BYTES_MIN {
            return self.own.put(from);
        }
        self.cut();
        // For `Bytes` this is a new handle to the same memory.
        self.whole.push(from.copy_to_bytes(from.remaining()));
    }

    fn put_slice(&mut self, from: &[u8]) {
        self.own.extend_from_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{DType, NamedTensor, RunReply, Tensor, Timings};
    use crate::v1::{ModelRunReply, run_reply::Outcome};

    fn reply(sizes: &[usize]) -> RunReply {
        let output = |(index, size): (usize, &usize)| NamedTensor {
            name: format!("output {index}"),
            tensor: Some(Tensor::from_bytes(DType::U8, &[*size as i64], vec![7; *size].into())),
        };
        let outputs = sizes.iter().enumerate().map(output).collect();
        let outcome = Some(Outcome::ModelRun(ModelRunReply { outputs }));
        RunReply {
            timings: Some(Timings { queue_us: 1, run_us: 2, batch_size: 3 }),
            outcome,
            ..RunReply::default()
        }
    }

    #[test]
    fn pieces_are_the_message() {
        for sizes in [&[][..], &[0], &[4096], &[SHARED_BYTES_MIN], &[602_112, 3, 100_000, 70_000], &[4 << 20]]
        {
            let reply = reply(sizes);
            let message = reply.encode_to_vec();
            let prefix = [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes()].concat();
            let pieces = framed(&reply).expect("fits");
            assert!(pieces.concat() == [prefix, message].concat(), "{sizes:?}");
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
        }
    }

    #[test]
    fn large_fields_are_not_copied() {
        let reply = reply(&[602_112, 70_000]);
        let Some(Outcome::ModelRun(run)) = &reply.outcome else { unreachable!("made above") };
        let pieces = framed(&reply).expect("fits");
        for output in &run.outputs {
            let data = &output.tensor.as_ref().expect("made above").data;
            assert!(pieces.iter().any(|piece| piece.as_ptr() == data.as_ptr() && piece.len() == data.len()));
        }
        assert!(
            pieces.iter().map(Bytes::len).filter(|length| *length < SHARED_BYTES_MIN).sum::<usize>() < 200
        );
    }

    #[test]
    fn what_is_too_long_is_not_encoded() {
        let refusal = framed(&reply(&[MESSAGE_BYTES_MAX])).expect_err("too long");
        assert_eq!(refusal.reason(), Reason::MessageTooLarge);
    }
}
