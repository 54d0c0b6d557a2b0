//! How long a caller waits, from the `grpc-timeout` header.
//!
//! *Source:* gRPC over HTTP/2, `Timeout → TimeoutValue TimeoutUnit`: up to 8 digits and one of `H M S m u n`.

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use vaccel_proto::Error;
use vaccel_proto::limits::DEADLINE_MAX;

const HEADER: HeaderName = HeaderName::from_static("grpc-timeout");

/// How long the caller waits; none when it does not say.
///
/// # Errors
/// `BAD_ARGUMENT` for a header that is not a timeout.
pub(super) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get(HEADER) else { return Ok(None) };
    let timeout = parse(value.as_bytes()).ok_or_else(|| {
        let got = vaccel_proto::error::shown(&String::from_utf8_lossy(value.as_bytes()));
        Error::field(HEADER.as_str(), "up to 8 digits and one of H, M, S, m, u, n", got)
    })?;
    Ok(Some(timeout.min(DEADLINE_MAX)))
}

fn parse(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits.iter().fold(0, |value, digit| value * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(value * 3600),
        b'M' => Duration::from_secs(value * 60),
        b'S' => Duration::from_secs(value),
        b'm' => Duration::from_millis(value),
        b'u' => Duration::from_micros(value),
        b'n' => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_parse_as_the_protocol_says() {
        for (text, timeout) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("99999999m", Some(Duration::from_millis(99_999_999))),
            ("5u", Some(Duration::from_micros(5))),
            ("0n", Some(Duration::ZERO)),
            ("999999999m", None),
            ("m", None),
            ("", None),
            ("1", None),
            ("-1S", None),
            ("+1S", None),
            ("1é", None),
        ] {
            assert_eq!(parse(text.as_bytes()), timeout, "{text:?}");
        }
    }
}
