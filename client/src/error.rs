//! How an attempt failed below gRPC, and how far it got: that decides whether it may be repeated.

use std::error::Error as StdError;
use std::fmt;

use tonic::Status;
use vaccel_proto::{Error, Reason};

/// How far a failed attempt got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// There is no connection.
    NoConnection,
    /// There was one, and the agent did not take the request.
    Unsent,
    /// The agent may have run the call.
    Sent,
}

/// A failure of the transport. Clonable, because calls that wait for one dial share its outcome.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) reason: Reason,
    pub(crate) message: String,
    pub(crate) reach: Reach,
}

impl Failure {
    /// No connection to the agent.
    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self { reason: Reason::Unreachable, message: message.into(), reach: Reach::NoConnection }
    }

    /// The two sides do not accept each other's credentials.
    pub(crate) fn unauthenticated(message: impl Into<String>) -> Self {
        Self { reason: Reason::Unauthenticated, message: message.into(), reach: Reach::NoConnection }
    }

    /// The transport failure behind a status; none when the status is the agent's own answer.
    pub(crate) fn behind(status: &Status) -> Option<&Self> {
        let mut cause = status.source();
        while let Some(error) = cause {
            if let Some(failure) = error.downcast_ref() {
                return Some(failure);
            }
            cause = error.source();
        }
        None
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Failure {}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::new(failure.reason, failure.message)
    }
}

/// What a status means: the transport failure behind it, or the agent's answer.
pub(crate) fn of_status(status: &Status) -> Error {
    match Failure::behind(status) {
        Some(failure) => failure.clone().into(),
        None => Error::from_status(status),
    }
}

/// An error and what caused it, on one line.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Many errors repeat their cause.
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
