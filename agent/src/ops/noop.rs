//! Nothing, done for a session: the cost of a call and nothing else.
//!
//! *Errors:* none of its own. *Source:* vAccel's `noop`.

use vaccel_proto::Error;
use vaccel_proto::v1::{NoopReply, NoopRequest};

use super::{Context, Operation};
use crate::scheduler::Timed;

impl Operation for NoopRequest {
    const NAME: &'static str = "noop";
    const SUMMARY: &'static str = "nothing: the cost of a call";
    type Reply = NoopReply;

    fn validate(&self) -> Result<(), Error> {
        Ok(())
    }

    fn dummy(self, _: &Context<'_>) -> Result<NoopReply, Error> {
        Ok(NoopReply {})
    }

    async fn execute(self, _: &Context<'_>) -> Result<Timed<NoopReply>, Error> {
        Ok(Timed::instant(NoopReply {}))
    }
}
