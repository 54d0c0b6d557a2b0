//! The end of a call: HTTP and gRPC status, the text, and from the details what a program needs.
//!
//! The details are `google.rpc` messages in base64 in a Huffman string. They are read as they are decoded, so that
//! they need no memory: `grpc-status-details-bin` → bytes → `Status{3: Any{1: type, 2: ErrorInfo | RetryInfo |
//! ResourceInfo}}`.
//!
//! *Source:* gRPC over HTTP/2; google/rpc/status.proto and error_details.proto.

use crate::error::{Error, Reason};
use crate::hpack::Value;
use crate::text::Text;

/// Bytes of an error's text that are kept; the agent cuts its own at 2 KiB, most are one line.
pub(crate) const TEXT_BYTES: usize = 512;

/// What the headers and trailers of a reply said.
#[derive(Clone, Debug, Default)]
pub(crate) struct Status {
    http: Option<u32>,
    is_grpc: bool,
    grpc: Option<u32>,
    details: Details,
    /// For people.
    pub(crate) text: Text<TEXT_BYTES>,
}

#[derive(Clone, Debug, Default)]
struct Details {
    reason: Option<Reason>,
    retry_after_ms: u32,
    session_lost: bool,
    region_lost: bool,
}

impl Status {
    /// Takes in one header.
    pub(crate) fn header(&mut self, name: Value<'_>, value: Value<'_>) {
        if name.is(b":status") {
            self.http = value.number();
        } else if name.is(b"content-type") {
            self.is_grpc = value.starts_with(b"application/grpc");
        } else if name.is(b"grpc-status") {
            self.grpc = value.number().or(Some(2));
        } else if name.is(b"grpc-message") {
            self.text.clear();
            percent(value.bytes(), &mut self.text);
        } else if name.is(b"grpc-status-details-bin") {
            self.details.read(&mut Base64::new(value.bytes()));
        }
    }

    /// A header block that only says to wait for another.
    pub(crate) fn is_informational(&self) -> bool {
        self.http.is_some_and(|status| (100..200).contains(&status))
    }

    /// How the call went.
    ///
    /// # Errors
    /// The agent's, or what something else on the way meant; the text says more.
    pub(crate) fn outcome(&mut self) -> Result<(), Error> {
        let text = &mut self.text;
        if self.grpc == Some(0) {
            return Ok(());
        }
        if let Some(code) = self.grpc {
            let reason = self.details.reason.unwrap_or(Reason::from_code(u8::try_from(code).unwrap_or(2)));
            if text.is_empty() {
                text.push("the call ended with gRPC status ").push_number(u64::from(code));
            }
            let Details { retry_after_ms, session_lost, region_lost, .. } = self.details;
            let is_absent = reason == Reason::NotFound;
            let (session_lost, region_lost) = (session_lost && is_absent, region_lost && is_absent);
            return Err(Error { retry_after_ms, session_lost, region_lost, ..Error::new(reason) });
        }
        text.clear();
        // What HTTP's codes mean to gRPC: "HTTP to gRPC Status Code Mapping".
        let reason = match self.http {
            Some(401) => Reason::Unauthenticated,
            Some(403) => Reason::Denied,
            Some(404) => Reason::UnknownOperation,
            Some(429 | 502 | 503 | 504) => Reason::Unreachable,
            _ => Reason::BackendFailed,
        };
        match (self.http, self.is_grpc) {
            (Some(200), true) => text.push("the reply ended without a status"),
            (Some(http), _) => {
                text.push("what answers is no vaccel agent; its HTTP status is ").push_number(u64::from(http))
            }
            (None, _) => text.push("what answers is no vaccel agent"),
        };
        Err(Error::new(reason))
    }

    /// Whether a message may follow: a reply of gRPC has begun.
    pub(crate) fn may_carry_message(&self) -> bool {
        self.http == Some(200) && self.is_grpc && self.grpc.is_none()
    }
}

/// The text of `grpc-message`, where `%` and two digits stand for a byte.
fn percent(mut bytes: impl Iterator<Item = u8>, text: &mut Text<TEXT_BYTES>) {
    let digit = |byte: Option<u8>| {
        char::from(byte.unwrap_or(0)).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
    };
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            text.push_byte(byte);
        } else if let (Some(high), Some(low)) = (digit(bytes.next()), digit(bytes.next())) {
            text.push_byte(high << 4 | low);
        }
    }
}

/// Bytes out of base64 digits, with or without padding; ends at the first character that is no digit.
struct Base64<I> {
    digits: I,
    bits: u32,
    count: u32,
}

impl<I: Iterator<Item = u8>> Base64<I> {
    fn new(digits: I) -> Self {
        Self { digits, bits: 0, count: 0 }
    }
}

impl<I: Iterator<Item = u8>> Iterator for Base64<I> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        while self.count < 8 {
            let value = match self.digits.next()? {
                digit @ b'A'..=b'Z' => digit - b'A',
                digit @ b'a'..=b'z' => digit - b'a' + 26,
                digit @ b'0'..=b'9' => digit - b'0' + 52,
                b'+' | b'-' => 62,
                b'/' | b'_' => 63,
                _ => return None,
            };
            self.bits = self.bits << 6 | u32::from(value);
            self.count += 6;
        }
        self.count -= 8;
        Some((self.bits >> self.count & 0xff) as u8)
    }
}

/// A message that is read field by field from bytes as they are decoded; it ends early where they do.
struct Fields<'a, I> {
    bytes: &'a mut I,
    left: u64,
}

impl<'a, I: Iterator<Item = u8>> Fields<'a, I> {
    fn byte(&mut self) -> Option<u8> {
        self.left = self.left.checked_sub(1)?;
        self.bytes.next()
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// The next field's number and its value or length.
    fn next(&mut self) -> Option<(u64, u64, bool)> {
        let tag = self.varint()?;
        let (value, is_length) = match tag & 7 {
            0 => (self.varint()?, false),
            1 => (0, self.skip(8)?),
            2 => (self.varint()?, true),
            5 => (0, self.skip(4)?),
            _ => return None,
        };
        Some((tag >> 3, value, is_length))
    }

    fn skip(&mut self, count: u64) -> Option<bool> {
        (0..count).try_for_each(|_| self.byte().map(drop)).map(|()| false)
    }

    /// The content of a field as a message.
    fn inside(&mut self, length: u64) -> Option<Fields<'_, I>> {
        self.left = self.left.checked_sub(length)?;
        Some(Fields { bytes: self.bytes, left: length })
    }

    fn text<const N: usize>(&mut self, length: u64) -> Option<Text<N>> {
        let mut text = Text::new();
        for _ in 0..length {
            text.push_byte(self.byte()?);
        }
        Some(text)
    }

    /// Passes over what is left.
    fn finish(mut self) {
        while self.left > 0 && self.byte().is_some() {}
    }
}

impl Details {
    fn read<I: Iterator<Item = u8>>(&mut self, bytes: &mut I) {
        let mut status = Fields { bytes, left: u64::MAX };
        while let Some((field, length, is_length)) = status.next() {
            match (field, is_length) {
                (3, true) => {
                    let Some(mut any) = status.inside(length) else { return };
                    self.any(&mut any);
                    any.finish();
                }
                (_, true) if status.skip(length).is_none() => return,
                _ => {}
            }
        }
    }

    fn any<I: Iterator<Item = u8>>(&mut self, any: &mut Fields<'_, I>) -> Option<()> {
        let mut kind = Text::<64>::new();
        while let Some((field, length, is_length)) = any.next() {
            match (field, is_length) {
                (1, true) => kind = any.text(length)?,
                (2, true) => {
                    let mut message = any.inside(length)?;
                    match kind.as_str() {
                        "type.googleapis.com/google.rpc.ErrorInfo" => self.error_info(&mut message),
                        "type.googleapis.com/google.rpc.RetryInfo" => self.retry_info(&mut message),
                        "type.googleapis.com/google.rpc.ResourceInfo" => self.resource_info(&mut message),
                        _ => None,
                    };
                    message.finish();
                }
                (_, true) => drop(any.skip(length)?),
                _ => {}
            }
        }
        Some(())
    }

    /// `ErrorInfo{1: reason, 2: domain}`.
    fn error_info<I: Iterator<Item = u8>>(&mut self, info: &mut Fields<'_, I>) -> Option<()> {
        let (mut reason, mut domain) = (Text::<32>::new(), Text::<32>::new());
        while let Some((field, length, is_length)) = info.next() {
            match (field, is_length) {
                (1, true) => reason = info.text(length)?,
                (2, true) => domain = info.text(length)?,
                (_, true) => drop(info.skip(length)?),
                _ => {}
            }
        }
        if domain.as_str() == "vaccel.v1" {
            self.reason = Reason::ALL.iter().copied().find(|known| known.name() == reason.as_str());
        }
        Some(())
    }

    /// `RetryInfo{1: Duration{1: seconds, 2: nanoseconds}}`.
    fn retry_info<I: Iterator<Item = u8>>(&mut self, info: &mut Fields<'_, I>) -> Option<()> {
        let (1, length, true) = info.next()? else { return None };
        let mut duration = info.inside(length)?;
        let mut ms = 0_u64;
        while let Some((field, value, false)) = duration.next() {
            ms = ms.saturating_add(if field == 1 { value.saturating_mul(1000) } else { value / 1_000_000 });
        }
        self.retry_after_ms = u32::try_from(ms).unwrap_or(u32::MAX);
        Some(())
    }

    /// `ResourceInfo{1: kind, 2: name}`.
    fn resource_info<I: Iterator<Item = u8>>(&mut self, info: &mut Fields<'_, I>) -> Option<()> {
        let (1, length, true) = info.next()? else { return None };
        let kind = info.text::<16>(length)?;
        (self.session_lost, self.region_lost) = (kind.as_str() == "session", kind.as_str() == "region");
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use vaccel_proto::error::Detail;

    /// The headers that carry an error of the contract, as the agent sends them.
    fn read(error: &vaccel_proto::Error) -> Status {
        let headers = error.to_status().into_http::<()>().into_parts().0.headers;
        let mut status = Status::default();
        status.header(Value::Plain(b":status"), Value::Plain(b"200"));
        for (name, value) in &headers {
            status.header(Value::Plain(name.as_str().as_bytes()), Value::Plain(value.as_bytes()));
        }
        status
    }

    #[test]
    fn every_reason_arrives_with_its_text_and_details() {
        for reason in vaccel_proto::Reason::ALL {
            let details =
                [Detail::None, Detail::Field("a".into()), Detail::RetryAfter(Duration::from_millis(1250))];
            for detail in details {
                let retry = if matches!(detail, Detail::RetryAfter(_)) { 1250 } else { 0 };
                let mut status = read(&vaccel_proto::Error::new(*reason, "wrong 100 % é").with(detail));
                let error = status.outcome().unwrap_err();
                assert_eq!(error.reason.name(), reason.name());
                assert_eq!(error.retry_after_ms, retry, "{reason}");
                assert_eq!(status.text.as_str(), "wrong 100 % é");
                assert!(!error.session_lost);
            }
        }
    }

    #[test]
    fn a_lost_session_is_told_from_a_lost_resource() {
        for (kind, lost) in [("session", true), ("resource", false)] {
            let mut status = read(&vaccel_proto::Error::not_found(kind, "x"));
            assert_eq!(status.outcome().unwrap_err().session_lost, lost);
        }
    }

    #[test]
    fn the_table_of_reasons_is_that_of_the_contract() {
        assert_eq!(Reason::ALL.len(), vaccel_proto::Reason::ALL.len());
        for (own, theirs) in Reason::ALL.iter().zip(vaccel_proto::Reason::ALL) {
            assert_eq!(own.name(), theirs.name());
            assert_eq!(i32::from(own.code()), theirs.code() as i32, "{own:?}");
            assert_eq!(own.errno(), theirs.errno(), "{own:?}");
        }
        for code in 1..=16 {
            let foreign = vaccel_proto::Error::from_status(&tonic::Status::new(tonic::Code::from(code), ""));
            let own = Reason::from_code(u8::try_from(code).unwrap());
            assert_eq!(own.name(), foreign.reason().name(), "{code}");
        }
    }

    #[test]
    fn what_others_say_gets_the_nearest_reason() {
        for (headers, reason, says) in [
            (&[(":status", "404")][..], Reason::UnknownOperation, "HTTP status is 404"),
            (&[(":status", "503"), ("content-type", "text/html")], Reason::Unreachable, "no vaccel agent"),
            (
                &[(":status", "200"), ("content-type", "application/grpc")],
                Reason::BackendFailed,
                "without a status",
            ),
            (&[(":status", "200"), ("grpc-status", "x")], Reason::BackendFailed, "gRPC status 2"),
            (&[(":status", "200"), ("grpc-status", "14")], Reason::Unreachable, "gRPC status 14"),
            (
                &[(":status", "200"), ("grpc-status", "5"), ("grpc-status-details-bin", "!!")],
                Reason::NotFound,
                "5",
            ),
        ] {
            let mut status = Status::default();
            for (name, value) in headers {
                status.header(Value::Plain(name.as_bytes()), Value::Plain(value.as_bytes()));
            }
            assert_eq!(status.outcome().unwrap_err().reason, reason, "{headers:?}");
            assert!(status.text.as_str().contains(says), "{headers:?}: {}", status.text.as_str());
        }
    }
}
