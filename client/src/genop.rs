//! What is called with arguments instead of tensors: vAccel's generic operation, which is any operation by its number,
//! and functions of libraries that guests bring.

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::{Arg, ArgType, ExecWithResourceRequest, GenopRequest, Timings};

use crate::session::{Resource, Session, malformed};

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

    /// Calls a function of a library that the session holds, where the host lets this tenant bring code. `write` has
    /// room for each argument that comes out, or what it is before; what the function made of it is returned in this
    /// order.
    ///
    /// # Errors
    /// `DISABLED` by the host's policy, `NOT_FOUND` for a library the session does not hold, `MODEL_REJECTED` for one
    /// that cannot be loaded, `BAD_ARGUMENT` for a function it has not, `BACKEND_FAILED` for one that returns something
    /// else than 0 or ends its process, and those of [`Client::info`](crate::Client::info).
    pub async fn exec_with_resource(
        &self,
        library: &Resource,
        function: &str,
        read: Vec<Arg>,
        write: Vec<Arg>,
    ) -> Result<(Vec<Arg>, Timings), Error> {
        let (resource, symbol, count) = (library.id().to_owned(), function.to_owned(), write.len());
        let op = Op::ExecWithResource(ExecWithResourceRequest { resource, symbol, read, write });
        let reply = self.operate(op).await?;
        match reply.outcome {
            Some(Outcome::ExecWithResource(exec)) if exec.write.len() == count => {
                Ok((exec.write, reply.timings.unwrap_or_default()))
            }
            _ => Err(malformed("exec_with_resource")),
        }
    }
}
