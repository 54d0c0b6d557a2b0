//! The caller's deadline, from the `grpc-timeout` header.
//!
//! *Source:* gRPC over HTTP/2, `Timeout → TimeoutValue TimeoutUnit`: up to 8 digits and one of `H M S m u n`.

use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;
use vaccel_proto::Error;
use vaccel_proto::limits::DEADLINE_MAX;

const HEADER: &str = "grpc-timeout";

/// When the caller stops waiting; none when it does not say.
///
/// # Errors
/// `BAD_ARGUMENT` for a header that is not a timeout.
pub(super) fn of(headers: &HeaderMap) -> Result<Option<Instant>, Error> {
    let Some(value) = headers.get(HEADER) else { return Ok(None) };
    let timeout = value.to_str().ok().and_then(parse);
    let timeout = timeout.ok_or_else(|| {
        let got = vaccel_proto::error::shown(&String::from_utf8_lossy(value.as_bytes()));
        Error::field(HEADER, "up to 8 digits and one of H, M, S, m, u, n", got)
    })?;
    Ok(Some(Instant::now() + timeout.min(DEADLINE_MAX)))
}

fn parse(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.get(..text.len() - unit.len_utf8())?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(value * 3600),
        'M' => Duration::from_secs(value * 60),
        'S' => Duration::from_secs(value),
        'm' => Duration::from_millis(value),
        'u' => Duration::from_micros(value),
        'n' => Duration::from_nanos(value),
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
            assert_eq!(parse(text), timeout, "{text:?}");
        }
    }
}
