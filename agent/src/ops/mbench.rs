//! A processor kept busy, to see how an agent and its host behave under load.
//!
//! *Units:* milliseconds of wall time on a lane, 0 to 300,000. *Errors:* `BAD_ARGUMENT` for more, `DEADLINE`; the
//! caller's deadline or leaving ends it at once. *Source:* vAccel's mbench plugin, which takes from 1.

use std::time::{Duration, Instant};

use vaccel_proto::Error;
use vaccel_proto::v1::{MbenchReply, MbenchRequest};

use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

impl Operation for MbenchRequest {
    const NAME: &'static str = "mbench";
    const SUMMARY: &'static str = "keep a processor busy for some milliseconds";
    type Reply = MbenchReply;

    fn validate(&self) -> Result<(), Error> {
        self.check()
    }

    fn dummy(self, _: &Context<'_>) -> Result<MbenchReply, Error> {
        Ok(MbenchReply {})
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<MbenchReply>, Error> {
        let time = Duration::from_millis(self.milliseconds.into());
        let work = move |cancel: &Cancel| burn(time, cancel).map(|()| MbenchReply {});
        context.workshop.scheduler.run(&context.asker(), work).await
    }
}

/// Computes until the time is over: the reading of the clock is the work.
fn burn(time: Duration, cancel: &Cancel) -> Result<(), Error> {
    let begun = Instant::now();
    while begun.elapsed() < time {
        cancel.check()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_proto::Reason;

    #[test]
    fn it_takes_its_time_and_stops_when_told() {
        let (time, begun) = (Duration::from_millis(3), Instant::now());
        burn(time, &Cancel::default()).expect("nobody cancels");
        assert!(begun.elapsed() >= time);
        let cancel = Cancel::default();
        cancel.set();
        let stopped = burn(Duration::from_secs(300), &cancel).expect_err("cancelled");
        assert_eq!(stopped.reason(), Reason::Cancelled);
    }
}
