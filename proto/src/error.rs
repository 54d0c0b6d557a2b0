//! One error and one table, for the agent, its clients and their users.
//!
//! An [`Error`] has a [`Reason`], a public text that says what was expected, what came and what to do, a [`Detail`] for
//! programs, and in the agent a source that only the log sees. On the wire it is a gRPC status with `google.rpc`
//! details; a client gets the same [`Error`] back.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Domain of the `google.rpc.ErrorInfo` that carries the reason.
pub const ERROR_DOMAIN: &str = "vaccel.v1";

/// Longest text of an error on the wire, in bytes. It travels in headers, percent-encoded and once more in the details;
/// peers accept some 16 KiB of them and end the whole connection for more.
const TEXT_BYTES_MAX: usize = 2048;

/// Longest text of an error in a log, in bytes, with its causes: those may have a guest's text in them, of any length.
const LOGGED_BYTES_MAX: usize = 4096;

/// What a caller may do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same call fails again.
    No,
    /// After something was freed.
    Later,
    /// After the time in the detail.
    Yes,
    /// It depends on the caller's own deadline.
    Caller,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $code:ident, $errno:literal, $retry:ident;)*) => {
        /// Why a call failed. The table fixes each reason's gRPC code, its `errno` for vAccel programs, and whether
        /// trying again helps.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// All reasons, in the table's order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Name on the wire and in documents.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// gRPC status code.
            pub fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code,)* }
            }

            /// Linux `errno`, which is what vAccel's own codes are.
            pub fn errno(self) -> i32 {
                match self { $(Self::$variant => $errno,)* }
            }

            /// Whether trying again helps.
            pub fn retry(self) -> Retry {
                match self { $(Self::$variant => Retry::$retry,)* }
            }
        }
    };
}

reasons! {
    /// The request is wrong: a size, a shape, a name, bytes that are not what they should be.
    BadArgument = "BAD_ARGUMENT", InvalidArgument, 22, No;
    /// More bytes than the limit in the detail.
    MessageTooLarge = "MESSAGE_TOO_LARGE", ResourceExhausted, 7, No;
    /// This agent has no such operation.
    UnknownOperation = "UNKNOWN_OPERATION", Unimplemented, 95, No;
    /// It exists and is not available here; the text says how to enable it.
    Disabled = "DISABLED", FailedPrecondition, 1, No;
    /// No valid credentials.
    Unauthenticated = "UNAUTHENTICATED", Unauthenticated, 13, No;
    /// Known, and not allowed.
    Denied = "DENIED", PermissionDenied, 13, No;
    /// Absent, or somebody else's: the two cannot be told apart.
    NotFound = "NOT_FOUND", NotFound, 2, No;
    /// Something of that name is there.
    AlreadyExists = "ALREADY_EXISTS", AlreadyExists, 17, No;
    /// The engine or the scan before it refused the model.
    ModelRejected = "MODEL_REJECTED", FailedPrecondition, 8, No;
    /// The tenant's limit in the detail is used up.
    QuotaExceeded = "QUOTA_EXCEEDED", ResourceExhausted, 122, Later;
    /// The agent cannot take the call now.
    Overloaded = "OVERLOADED", Unavailable, 11, Yes;
    /// The agent is about to stop.
    ShuttingDown = "SHUTTING_DOWN", Unavailable, 11, Yes;
    /// No connection, or it broke.
    Unreachable = "UNREACHABLE", Unavailable, 111, Yes;
    /// The call's time is over; the text says whether it was queued or running.
    Deadline = "DEADLINE", DeadlineExceeded, 110, Caller;
    /// The caller left.
    Cancelled = "CANCELLED", Cancelled, 125, Caller;
    /// The backend failed; the request id leads to the agent's log.
    BackendFailed = "BACKEND_FAILED", Internal, 5, No;
    /// What the call refers to outside of it cannot be used: memory that cannot be opened, a folder that is not there.
    Unusable = "UNUSABLE", Internal, 5, No;
}

impl Reason {
    /// The reason with this name on the wire.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.name() == name)
    }

    /// The nearest reason for a status that carries none: from the transport, or from a server that is not ours.
    fn from_code(code: Code) -> Self {
        match code {
            Code::OutOfRange => Self::MessageTooLarge,
            Code::Unavailable => Self::Unreachable,
            Code::ResourceExhausted => Self::QuotaExceeded,
            Code::FailedPrecondition => Self::Disabled,
            code => {
                Self::ALL.iter().copied().find(|reason| reason.code() == code).unwrap_or(Self::BackendFailed)
            }
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a program needs beyond the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// Nothing.
    #[default]
    None,
    /// The field of the request that is wrong, as a path such as `inputs[0].shape`.
    Field(String),
    /// A limit and its unit.
    Limit {
        /// What is limited, for example `message` or `sessions`.
        subject: String,
        /// The limit.
        limit: u64,
        /// What the call would have used, 0 when unknown.
        used: u64,
        /// `bytes`, `calls`, `sessions` and so on.
        unit: String,
    },
    /// What was not found.
    Resource {
        /// `session` or `resource`.
        kind: String,
        /// The name the caller gave.
        name: String,
    },
    /// When to try again.
    RetryAfter(Duration),
    /// What to look for in the agent's log.
    Request(String),
}

/// Source chain of an [`Error`], for logs.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// A failed call. `Display` is the public text.
pub struct Error {
    reason: Reason,
    message: String,
    detail: Detail,
    source: Option<Source>,
}

impl Error {
    /// An error with a public text.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), detail: Detail::None, source: None }
    }

    /// `BAD_ARGUMENT` for one field: what was expected and what came.
    pub fn field(path: impl Into<String>, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        let path = path.into();
        Self::new(Reason::BadArgument, format!("{path}: expected {expected}, got {got}"))
            .with(Detail::Field(path))
    }

    /// `NOT_FOUND` for a session or a resource, whether it is absent or another tenant's.
    pub fn not_found(kind: &str, name: &str) -> Self {
        let shown = shown(name);
        Self::new(
            Reason::NotFound,
            format!("no {kind} {shown}; it was never opened here, was closed, or its lease ended"),
        )
        .with(Detail::Resource { kind: kind.into(), name: shown })
    }

    /// `QUOTA_EXCEEDED` or `MESSAGE_TOO_LARGE` with its figures.
    pub fn limit(reason: Reason, subject: &str, limit: u64, used: u64, unit: &str) -> Self {
        let message = format!("{subject}: at most {limit} {unit}, this call needs {used}");
        Self::new(reason, message).with(Detail::Limit {
            subject: subject.into(),
            limit,
            used,
            unit: unit.into(),
        })
    }

    /// Adds what a program needs.
    #[must_use]
    pub fn with(mut self, detail: Detail) -> Self {
        self.detail = detail;
        self
    }

    /// Adds the cause for the log; it never crosses the wire.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The public text.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What a program needs.
    pub fn detail(&self) -> &Detail {
        &self.detail
    }

    /// The status that carries this error.
    pub fn to_status(&self) -> Status {
        let message = clipped(&self.message, TEXT_BYTES_MAX);
        let mut details = ErrorDetails::with_error_info(self.reason.name(), ERROR_DOMAIN, []);
        match &self.detail {
            Detail::None => {}
            Detail::Field(path) => {
                details.add_bad_request_violation(path.as_str(), &*message);
            }
            Detail::Limit { subject, limit, used, unit } => {
                let figures =
                    [("limit", limit.to_string()), ("used", used.to_string()), ("unit", unit.clone())];
                let metadata = figures.map(|(key, value)| (key.to_owned(), value));
                details.set_error_info(self.reason.name(), ERROR_DOMAIN, metadata);
                details.add_quota_failure_violation(subject.as_str(), &*message);
            }
            Detail::Resource { kind, name } => {
                details.set_resource_info(kind.as_str(), name.as_str(), "", &*message);
            }
            Detail::RetryAfter(delay) => {
                details.set_retry_info(Some(*delay));
            }
            Detail::Request(id) => {
                details.set_request_info(id.as_str(), "");
            }
        }
        Status::with_error_details(self.reason.code(), message, details)
    }

    /// The error a status carries.
    pub fn from_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == ERROR_DOMAIN);
        let reason = info
            .and_then(|info| Reason::from_name(&info.reason))
            .unwrap_or_else(|| Reason::from_code(status.code()));
        Self::new(reason, status.message()).with(detail_of(&details))
    }
}

fn detail_of(details: &ErrorDetails) -> Detail {
    if let Some(violation) = details.bad_request().and_then(|bad| bad.field_violations.first()) {
        return Detail::Field(violation.field.clone());
    }
    if let Some(violation) = details.quota_failure().and_then(|quota| quota.violations.first()) {
        let metadata = details.error_info().map(|info| info.metadata.clone()).unwrap_or_default();
        let figure = |key| metadata.get(key).and_then(|value| value.parse().ok()).unwrap_or(0);
        return Detail::Limit {
            subject: violation.subject.clone(),
            limit: figure("limit"),
            used: figure("used"),
            unit: metadata.get("unit").cloned().unwrap_or_default(),
        };
    }
    if let Some(resource) = details.resource_info() {
        return Detail::Resource {
            kind: resource.resource_type.clone(),
            name: resource.resource_name.clone(),
        };
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        return Detail::RetryAfter(delay);
    }
    if let Some(request) = details.request_info() {
        return Detail::Request(request.request_id.clone());
    }
    Detail::None
}

/// The beginning of a text that is too long.
fn clipped(text: &str, bytes_max: usize) -> Cow<'_, str> {
    if text.len() <= bytes_max {
        return text.into();
    }
    format!("{}…", &text[..text.floor_char_boundary(bytes_max)]).into()
}

/// A guest's text as it may be repeated to it and written to a log: without control characters and not longer than
/// [`crate::limits::NAME_BYTES_MAX`].
pub fn shown(text: &str) -> String {
    let mut out: String = text
        .chars()
        .take(crate::limits::NAME_BYTES_MAX)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if out.len() < text.len() && text.chars().count() > crate::limits::NAME_BYTES_MAX {
        out.push('…');
    }
    format!("{out:?}")
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// As a log has it: in one line, with all causes.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{}: {}", self.reason, self.message);
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        f.write_str(&clipped(&text, LOGGED_BYTES_MAX).replace(char::is_control, " "))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        error.to_status()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_wire() {
        for error in [
            Error::field("inputs[0].shape", "[1, 8, 8]", "[1, -8, 8]"),
            Error::not_found("session", "ab\ncd"),
            Error::limit(Reason::QuotaExceeded, "sessions", 64, 65, "sessions"),
            Error::limit(Reason::MessageTooLarge, "message", 32, 4 << 30, "bytes"),
            Error::new(Reason::Overloaded, "queue is full")
                .with(Detail::RetryAfter(Duration::from_millis(50))),
            Error::new(Reason::BackendFailed, "failed").with(Detail::Request("r-1".into())),
            Error::new(Reason::Disabled, "exec is off"),
        ] {
            let back = Error::from_status(&error.to_status());
            assert_eq!(back.reason(), error.reason());
            assert_eq!(back.message(), error.message());
            assert_eq!(back.detail(), error.detail());
        }
    }

    #[test]
    fn a_long_text_is_clipped_between_two_characters() {
        let back = Error::from_status(&Error::field("f", "é".repeat(5000), "x").to_status());
        assert!(back.message().len() <= TEXT_BYTES_MAX + '…'.len_utf8());
        assert!(back.message().ends_with("é…"), "{back}");
        assert_eq!(back.detail(), &Detail::Field("f".into()));
    }

    #[test]
    fn what_is_logged_is_one_line_of_bounded_length() {
        let error = Error::new(Reason::BackendFailed, "failed").caused_by("node\nERROR é".repeat(1 << 16));
        let logged = format!("{error:?}");
        assert!(logged.starts_with("BACKEND_FAILED: failed: node ERROR é"), "{logged}");
        assert!(logged.len() <= LOGGED_BYTES_MAX + '…'.len_utf8() && !logged.contains('\n'));
    }

    #[test]
    fn the_source_stays_at_home() {
        let error = Error::new(Reason::ModelRejected, "not a model").caused_by("/secret/path");
        let status = error.to_status();
        assert!(!format!("{status:?}").contains("secret"));
        assert!(format!("{error:?}").contains("secret"));
    }

    #[test]
    fn a_foreign_status_gets_the_nearest_reason() {
        for (code, reason) in [
            (Code::OutOfRange, Reason::MessageTooLarge),
            (Code::Unavailable, Reason::Unreachable),
            (Code::Unimplemented, Reason::UnknownOperation),
            (Code::DeadlineExceeded, Reason::Deadline),
            (Code::Unknown, Reason::BackendFailed),
        ] {
            assert_eq!(Error::from_status(&Status::new(code, "x")).reason(), reason);
        }
    }

    #[test]
    fn names_are_unique_and_found() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_name(reason.name()), Some(*reason));
        }
    }
}
