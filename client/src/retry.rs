//! One call until it succeeds, cannot succeed, or its time is over.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tonic::Status;
use vaccel_proto::error::Detail;
use vaccel_proto::limits::DEADLINE_MAX;
use vaccel_proto::{Endpoint, Error, Reason};

use crate::backoff::Backoff;
use crate::error::{Failure, Reach};
use crate::link::Link;
use crate::wire::Wire;

/// When a call's time is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Instant,
    length: Duration,
}

impl Deadline {
    /// A deadline that runs from now, at most [`DEADLINE_MAX`].
    pub(crate) fn after(length: Duration) -> Self {
        let length = length.min(DEADLINE_MAX);
        Self { at: Instant::now() + length, length }
    }

    pub(crate) fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// The future's output, or `DEADLINE` with what it was doing.
    pub(crate) async fn bound<T>(&self, doing: &str, future: impl Future<Output = T>) -> Result<T, Error> {
        timeout_at(self.at, future).await.map_err(|_| self.passed(doing))
    }

    fn passed(&self, doing: &str) -> Error {
        Error::new(Reason::Deadline, format!("the deadline of {:?} passed while {doing}", self.length))
    }

    /// The last attempt's error, when there is no time for another.
    pub(crate) fn gave_up(&self, error: &Error) -> Error {
        let message = format!("{error}; gave up, the call's deadline was {:?}", self.length);
        Error::new(error.reason(), message).with(error.detail().clone())
    }
}

/// Why one attempt did not bring a reply.
enum Miss {
    /// Time is over; there was no connection yet.
    LateConnecting,
    /// Time is over; the agent had the request.
    LateAnswering,
    /// The transport failed.
    Transport(Failure),
    /// The agent said no.
    Answer(Error),
}

impl Link {
    /// Runs `attempt`, which sends one request over the connection and the time it is given. It is called
    /// again as long as that can help:
    ///
    /// * always, when the agent was not reached or did not take the request;
    /// * for a `repeatable` call also when the connection broke under it, and when the agent is overloaded or
    ///   stopping.
    ///
    /// # Errors
    /// The last attempt's; `DEADLINE` when there was no earlier one to tell more.
    pub(crate) async fn repeat<R, F, Fut>(
        &self,
        deadline: Deadline,
        repeatable: bool,
        attempt: F,
    ) -> Result<R, Error>
    where
        F: Fn(Wire, Duration) -> Fut,
        Fut: Future<Output = Result<tonic::Response<R>, Status>>,
    {
        let mut backoff = Backoff::default();
        let mut last = None;
        loop {
            let miss = match self.once(deadline, &attempt).await {
                Ok(reply) => return Ok(reply.into_inner()),
                Err(miss) => miss,
            };
            let (error, pause) = match miss {
                Miss::LateConnecting => {
                    let doing = format!("connecting to {}", self.endpoint());
                    return Err(
                        last.map_or_else(|| deadline.passed(&doing), |error| deadline.gave_up(&error))
                    );
                }
                Miss::LateAnswering => {
                    let doing =
                        format!("waiting for the answer of {}; the call may have run", self.endpoint());
                    return Err(deadline.passed(&doing));
                }
                Miss::Transport(failure) => after_failure(failure, repeatable, &mut backoff)?,
                Miss::Answer(error) => after_answer(error, repeatable, &mut backoff, self.endpoint())?,
            };
            if pause >= deadline.remaining() {
                return Err(deadline.gave_up(&error));
            }
            sleep(pause).await;
            last = Some(error);
        }
    }

    async fn once<R, F, Fut>(&self, deadline: Deadline, attempt: &F) -> Result<tonic::Response<R>, Miss>
    where
        F: Fn(Wire, Duration) -> Fut,
        Fut: Future<Output = Result<tonic::Response<R>, Status>>,
    {
        let wire = timeout_at(deadline.at, self.wire())
            .await
            .map_err(|_| Miss::LateConnecting)?
            .map_err(Miss::Transport)?;
        timeout_at(deadline.at, attempt(wire, deadline.remaining()))
            .await
            .map_err(|_| Miss::LateAnswering)?
            .map_err(|status| match Failure::behind(&status) {
                Some(failure) => Miss::Transport(failure.clone()),
                None => Miss::Answer(Error::from_status(&status)),
            })
    }
}

/// The error, and the pause before the next attempt; or the error as the call's end.
fn after_failure(
    failure: Failure,
    repeatable: bool,
    backoff: &mut Backoff,
) -> Result<(Error, Duration), Error> {
    match failure.reach {
        _ if failure.reason != Reason::Unreachable => Err(failure.into()),
        // The link paces dials for all calls together.
        Reach::NoConnection => Ok((failure.into(), Duration::ZERO)),
        Reach::Unsent => Ok((failure.into(), backoff.pause())),
        Reach::Sent if repeatable => Ok((failure.into(), backoff.pause())),
        Reach::Sent => Err(may_have_run(&failure.into())),
    }
}

/// The same for what the agent, or something before it, answered.
fn after_answer(
    error: Error,
    repeatable: bool,
    backoff: &mut Backoff,
    endpoint: &Endpoint,
) -> Result<(Error, Duration), Error> {
    match error.reason() {
        Reason::Overloaded | Reason::ShuttingDown | Reason::Unreachable if repeatable => {
            let pause = pause_after(&error, backoff);
            Ok((error, pause))
        }
        Reason::Unreachable => Err(may_have_run(&Error::new(
            Reason::Unreachable,
            format!("{endpoint} is not available: {error}"),
        ))),
        _ => Err(error),
    }
}

/// The backoff's pause, or the longer one that the agent asked for.
pub(crate) fn pause_after(error: &Error, backoff: &mut Backoff) -> Duration {
    match error.detail() {
        Detail::RetryAfter(wanted) => backoff.pause().max(*wanted),
        _ => backoff.pause(),
    }
}

fn may_have_run(error: &Error) -> Error {
    Error::new(error.reason(), format!("{error}; the call may have run, so it was not repeated"))
}
