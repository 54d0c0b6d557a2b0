//! vAccel's generic operation: any operation by its number, with arguments instead of a request of its own.

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::{Arg, ArgType, GenopRequest, Timings};

use crate::session::{Session, malformed};

/// An argument that goes in, little-endian; a string with its NUL.
pub fn arg(kind: ArgType, data: impl Into<Bytes>) -> Arg {
    Arg { kind: kind.into(), data: data.into(), ..Arg::default() }
}

/// Room for an argument that comes out.
pub fn room(kind: ArgType, bytes: u64) -> Arg {
    Arg { kind: kind.into(), size: bytes, ..Arg::default() }
}

impl Session {
    /// Runs an operation by vAccel's number, the first argument of `read`. `write` has room for each argument that
    /// comes out, or what it is before where that counts; what came out is returned in this order.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` naming an argument that is not the operation's, `UNKNOWN_OPERATION` for a number there is none
    /// of, and those of the operation.
    pub async fn genop(&self, read: Vec<Arg>, write: Vec<Arg>) -> Result<(Vec<Arg>, Timings), Error> {
        let count = write.len();
        let reply = self.operate(Op::Genop(GenopRequest { legacy: false, read, write })).await?;
        match reply.outcome {
            Some(Outcome::Genop(genop)) if genop.write.len() == count => {
                Ok((genop.write, reply.timings.unwrap_or_default()))
            }
            _ => Err(malformed("genop")),
        }
    }
}
