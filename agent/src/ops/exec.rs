//! Functions of libraries that guests bring, in processes that can do nothing but compute.
//!
//! A function is `int f(struct vaccel_arg *read, size_t read_count, struct vaccel_arg *write, size_t write_count)`,
//! with vAccel 0.8's arguments; it writes into the room that there is. A library is a resource of the session with one
//! file, or with those it needs before it; it stays loaded while the session holds it and no other needs its place.
//! `exec` finds it by its file's name.
//! *Errors:* `DISABLED` unless the host's policy lets the tenant bring code, `NOT_FOUND` for a library the session does
//! not hold, `MODEL_REJECTED` for one that cannot be loaded, `BAD_ARGUMENT` for a function it has not,
//! `MESSAGE_TOO_LARGE`, `BACKEND_FAILED` for a function that returns something else than 0 or ends its process,
//! `DEADLINE`. *Source:* vAccel's `exec` and `exec_with_resource`, which run in the agent's own process there.

use std::sync::Arc;

use vaccel_proto::error::shown;
use vaccel_proto::v1::{
    Arg, ExecReply, ExecRequest, ExecWithResourceReply, ExecWithResourceRequest, ResourceKind,
};
use vaccel_proto::{Error, Reason};

use super::{Context, Operation};
use crate::backend::exec::{ARGUMENT_BYTES_MAX, LIBRARY_BYTES_MAX};
use crate::resource::Resource;
use crate::scheduler::{Cancel, Timed};

/// What vAccel's noop plugin writes: the first argument read, where it is the only one and as long as the first
/// written.
fn copied(read: &[Arg], mut write: Vec<Arg>) -> Vec<Arg> {
    if let ([written], Some(first)) = (&mut write[..], read.first())
        && written.room() == first.data.len() as u64
        && first.data.len().is_multiple_of(size_of::<i32>())
    {
        written.data = first.data.clone();
    }
    write
}

/// That a worker has room for the arguments.
fn check(read: &[Arg], write: &[Arg]) -> Result<(), Error> {
    let bytes = read.iter().chain(write).fold(0_u64, |sum, arg| sum.saturating_add(arg.room()));
    if bytes > ARGUMENT_BYTES_MAX {
        let subject = "arguments of a library's function";
        return Err(Error::limit(Reason::MessageTooLarge, subject, ARGUMENT_BYTES_MAX, bytes, "bytes"));
    }
    Ok(())
}

fn rooms(write: &[Arg]) -> u64 {
    write.iter().fold(0, |sum, arg| sum.saturating_add(arg.room()))
}

/// That the host lets the tenant bring code.
fn allowed(context: &Context<'_>) -> Result<(), Error> {
    if context.may_bring_code {
        return Ok(());
    }
    let message = "libraries of guests do not run for this tenant; the host allows them by `exec = true` in a \
                   [[policy]] of its configuration";
    Err(Error::new(Reason::Disabled, message))
}

/// Calls a function of a library that the session holds; the request names the library by its id.
async fn called(
    library: Arc<Resource>,
    request: ExecRequest,
    context: &Context<'_>,
) -> Result<Timed<Vec<Arg>>, Error> {
    let bytes = library.files.iter().fold(0_u64, |sum, (file, _)| sum.saturating_add(file.size));
    if bytes > LIBRARY_BYTES_MAX {
        let subject = "files of a library that is to run";
        return Err(Error::limit(Reason::MessageTooLarge, subject, LIBRARY_BYTES_MAX, bytes, "bytes"));
    }
    let (session, account) = (Arc::clone(context.session), Arc::clone(context.account));
    let work = move |cancel: &Cancel| {
        let is_held = || session.holdings.resource(&request.library).is_ok();
        session.libraries.call(&request, library.readers(), &account, is_held, cancel)
    };
    context.workshop.scheduler.run(&context.asker(), work).await
}

/// A library of the session by the name of its main file, or by its id. Programs give a path of the machine that they
/// were once written for: its last part counts.
fn by_name(name: &str, context: &Context<'_>) -> Result<Arc<Resource>, Error> {
    let file = name.rsplit('/').next().unwrap_or(name);
    let is_meant = |held: &Arc<Resource>| {
        held.kind == ResourceKind::Library
            && (held.id == name || held.files.last().is_some_and(|(described, _)| described.name == file))
    };
    let mut meant = context.session.holdings.list().into_iter().filter(is_meant);
    match (meant.next(), meant.count()) {
        (Some(library), 0) => Ok(library),
        (Some(_), more) => {
            let got = format!("{}, of which the session holds {}", shown(file), more + 1);
            Err(Error::field("library", "the name of one library, or an id", got))
        }
        (None, _) => Err(Error::not_found("library", name)),
    }
}

impl Operation for ExecRequest {
    const NAME: &'static str = "exec";
    const SUMMARY: &'static str = "call a function of a library of the session, by its file's name";
    type Reply = ExecReply;

    fn validate(&self) -> Result<(), Error> {
        check(&self.read, &self.write)
    }

    fn dummy(self, _: &Context<'_>) -> Result<ExecReply, Error> {
        Ok(ExecReply { write: copied(&self.read, self.write) })
    }

    fn reply_bytes(&self) -> u64 {
        rooms(&self.write)
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<ExecReply>, Error> {
        allowed(context)?;
        let library = by_name(&self.library, context)?;
        let request = Self { library: library.id.clone(), ..self };
        Ok(called(library, request, context).await?.map(|write| ExecReply { write }))
    }
}

impl Operation for ExecWithResourceRequest {
    const NAME: &'static str = "exec_with_resource";
    const SUMMARY: &'static str = "call a function of a library of the session";
    type Reply = ExecWithResourceReply;

    fn validate(&self) -> Result<(), Error> {
        check(&self.read, &self.write)
    }

    fn dummy(self, context: &Context<'_>) -> Result<ExecWithResourceReply, Error> {
        context.resource("resource", &self.resource, ResourceKind::Library)?;
        Ok(ExecWithResourceReply { write: copied(&self.read, self.write) })
    }

    fn reply_bytes(&self) -> u64 {
        rooms(&self.write)
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<ExecWithResourceReply>, Error> {
        allowed(context)?;
        let library = context.resource("resource", &self.resource, ResourceKind::Library)?;
        let Self { resource, symbol, read, write } = self;
        let request = ExecRequest { library: resource, symbol, read, write };
        Ok(called(library, request, context).await?.map(|write| ExecWithResourceReply { write }))
    }
}
