//! ttrpc, both of its servers and clients as its own generated code uses them: messages are encoded into the payload of
//! a request and decoded out of it.

pub(super) mod blocking;
pub(super) mod tasks;

use prost::Message;
use ttrpc::proto::{Request, Response};

use super::Source;
use crate::Failure;
use crate::contract::Payload;
use crate::shape::{DOWN_BYTES_MAX, Shape};

/// Longest message, with all that is around the payload, and what people are told about it.
pub(super) const MESSAGE_BYTES_MAX: usize = ttrpc::proto::MESSAGE_LENGTH_MAX;
pub(super) const LIMIT: &str = "ttrpc's messages are at most 4 MiB with all that is around the payload";

/// Makes TCP sockets send at once.
pub(crate) const NODELAY: &str = "TTRPC_TCP_NODELAY_ENABLED";

const SERVICE: &str = "speed.Speed";
const CUT: &str = "Cut";
const ECHO: &str = "Echo";

fn request(shape: Shape, source: &mut Source) -> Request {
    let payload = Payload { data: source.bytes(shape.up) }.encode_to_vec();
    let method = if shape.echo { ECHO } else { CUT };
    Request { service: SERVICE.into(), method: method.into(), payload, ..Request::default() }
}

/// What a method makes of a request's payload.
fn answer(is_echo: bool, payload: &[u8]) -> ttrpc::Result<Response> {
    let decoded = Payload::decode(payload);
    let Payload { data } = decoded.map_err(|error| ttrpc::Error::Others(error.to_string()))?;
    let length = if is_echo { data.len() } else { data.len().min(DOWN_BYTES_MAX) };
    let payload = Payload { data: data.slice(..length) }.encode_to_vec();
    Ok(Response { payload, ..Response::default() })
}

fn check(response: &Response, shape: Shape) -> Result<(), Failure> {
    super::check(Payload::decode(&response.payload[..])?.data.len(), shape)
}
