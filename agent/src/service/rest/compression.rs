//! Bodies in gzip or deflate: what comes is expanded within the limit of a message, and counted before; what goes is
//! compressed for callers that ask for it.

use std::io::{Read, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::read::{GzDecoder, ZlibDecoder};
use flate2::write::{GzEncoder, ZlibEncoder};
use http::HeaderMap;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::{Error, Reason};

use crate::dispatch::Caller;
use crate::quota::{Hold, Unit};

const GZIP: &str = "gzip";
const DEFLATE: &str = "deflate";

/// Shorter answers get no shorter.
const WORTH_IT_BYTES: usize = 1024;

/// A body as it was before it was compressed, and what its size is counted as.
///
/// # Errors
/// `BAD_ARGUMENT` for another coding, or bytes that are not in it, `MESSAGE_TOO_LARGE`, `QUOTA_EXCEEDED`.
pub(super) async fn expand(
    caller: &Caller,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<(Bytes, Option<Hold>), Error> {
    let Some(coding) = headers.get(CONTENT_ENCODING) else { return Ok((body, None)) };
    let coding = match coding.as_bytes() {
        b"gzip" => GZIP,
        b"deflate" => DEFLATE,
        b"identity" => return Ok((body, None)),
        other => {
            let other = vaccel_proto::error::shown(&String::from_utf8_lossy(other));
            let message = format!("content-encoding: expected {GZIP} or {DEFLATE}, got {other}");
            return Err(Error::new(Reason::BadArgument, message));
        }
    };
    // As much as it can become, until it is known.
    let most = caller.account().hold(Unit::InFlightBytes, MESSAGE_BYTES_MAX as u64)?;
    let expanded = on_a_thread(move || {
        let reader: Box<dyn Read> = match coding {
            GZIP => Box::new(GzDecoder::new(&body[..])),
            _ => Box::new(ZlibDecoder::new(&body[..])),
        };
        let mut expanded = Vec::new();
        let read = reader.take(MESSAGE_BYTES_MAX as u64 + 1).read_to_end(&mut expanded);
        read.map_err(|error| {
            Error::new(
                Reason::BadArgument,
                format!("the body is not in {coding}, as its content-encoding says"),
            )
            .caused_by(error)
        })?;
        Ok(expanded)
    });
    let expanded = expanded.await?;
    let (limit, length) = (MESSAGE_BYTES_MAX as u64, expanded.len() as u64);
    if length > limit {
        return Err(Error::limit(Reason::MessageTooLarge, "body", limit, length, "bytes"));
    }
    drop(most);
    Ok((expanded.into(), Some(caller.account().hold(Unit::InFlightBytes, length)?)))
}

/// An answer in the coding that its caller asks for, if there is one, and the coding's name.
///
/// # Errors
/// Nothing that depends on the answer.
pub(super) async fn shrink(headers: &HeaderMap, body: Bytes) -> Result<(Bytes, Option<&'static str>), Error> {
    let asked = headers.get(ACCEPT_ENCODING).and_then(|asked| asked.to_str().ok()).unwrap_or_default();
    let names = |coding: &str| {
        asked.split(',').any(|one| one.split(';').next().is_some_and(|one| one.trim() == coding))
    };
    let coding = [GZIP, DEFLATE].into_iter().find(|coding| names(coding));
    let Some(coding) = coding.filter(|_| body.len() >= WORTH_IT_BYTES) else { return Ok((body, None)) };
    let shrunk = on_a_thread(move || {
        let failed =
            |error| Error::new(Reason::BackendFailed, "the answer cannot be compressed").caused_by(error);
        // Tensors get little shorter with more effort.
        let effort = Compression::fast();
        match coding {
            GZIP => {
                let mut writer = GzEncoder::new(Vec::new(), effort);
                writer.write_all(&body).and_then(|()| writer.finish()).map_err(failed)
            }
            _ => {
                let mut writer = ZlibEncoder::new(Vec::new(), effort);
                writer.write_all(&body).and_then(|()| writer.finish()).map_err(failed)
            }
        }
    });
    Ok((shrunk.await?.into(), Some(coding)))
}

/// Work that takes its time, where it holds nobody up.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let failed = |error| Error::new(Reason::BackendFailed, "the body was not read").caused_by(error);
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}
