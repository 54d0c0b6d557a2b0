//! What a lane does with what it took: a run of one call or of several, and an answer for each.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tokio::time::Instant;
use vaccel_proto::v1::Tensor;
use vaccel_proto::{Error, Reason};

use super::batch::{Call, Core, check_reply, join, part};
use super::lane::{Answer, Waiting, Work};
use super::queue::{Batch, Picked};
use super::{Cancel, Spans, Timed};

/// What a run came to.
pub(super) struct Done {
    pub(super) calls: Vec<DoneCall>,
    /// What all rows together took, where that says something about runs of this size.
    pub(super) whole: Option<Duration>,
}

pub(super) struct DoneCall {
    pub(super) picked: Picked,
    /// What the call's tenant is charged.
    pub(super) took: Duration,
    /// Whether the batch failed because of it.
    pub(super) spoilt: bool,
}

/// Runs what was picked and answers its callers.
pub(super) fn perform(batch: Batch<Waiting>, cancel: &Cancel) -> Done {
    let began = Instant::now();
    let mut together = Vec::with_capacity(batch.len());
    for (picked, waiting) in batch {
        match waiting.work {
            Work::Model { call, reply, .. } => together.push(Member { picked, call, reply }),
            Work::Alone(work) => {
                // A panic drops the way to answer, which the caller notices.
                let _ = catch_unwind(AssertUnwindSafe(|| work(cancel)));
                let took = began.elapsed();
                return Done { calls: vec![DoneCall { picked, took, spoilt: false }], whole: Some(took) };
            }
        }
    }
    let Some(bucket) = together[0].picked.bucket.clone() else {
        return Done { calls: Vec::new(), whole: None };
    };
    run_model(&bucket.core, together, began, cancel)
}

/// A call in a batch.
struct Member {
    picked: Picked,
    call: Call,
    reply: Answer<Vec<Tensor>>,
}

fn run_model(core: &Core, members: Vec<Member>, began: Instant, cancel: &Cancel) -> Done {
    let rows: Vec<usize> = members.iter().map(|member| member.picked.rows).collect();
    let total = rows.iter().sum::<usize>();
    let mut spans = Spans { calls: members.len(), rows: total, ..Spans::default() };
    let (results, is_usual) = if let [one] = &members[..] {
        let is_usual = core.runner.is_prepared(&one.call.inputs);
        (vec![run_once(core, &one.call, cancel)], is_usual)
    } else {
        match run_together(core, &members, &rows, &mut spans, cancel) {
            Some(done) => done,
            None => return run_apart(core, members, began, cancel),
        }
    };
    let took = began.elapsed();
    spans.run = took;
    let is_whole = results.iter().all(Result::is_ok);
    let calls = members.into_iter().zip(results).enumerate().map(|(index, (member, result))| {
        let spans = Spans { leads: index == 0, ..spans };
        let share = took.mul_f64(share(member.picked.rows, total));
        answer(member, result, spans, began, share, false)
    });
    Done { calls: calls.collect(), whole: Some(took).filter(|_| is_whole && is_usual) }
}

fn answer(
    member: Member,
    result: Result<Vec<Tensor>, Error>,
    spans: Spans,
    began: Instant,
    took: Duration,
    spoilt: bool,
) -> DoneCall {
    let spans = Spans { queue: began.saturating_duration_since(member.picked.arrived), ..spans };
    // Whoever does not listen has left.
    let _ = member.reply.send(result.map(|value| Timed { value, spans }));
    DoneCall { picked: member.picked, took, spoilt }
}

fn run_once(core: &Core, call: &Call, cancel: &Cancel) -> Result<Vec<Tensor>, Error> {
    run_caught(core, call.inputs.clone(), &call.outputs, call.reply_bytes_max, cancel)
}

fn run_caught(
    core: &Core,
    inputs: Vec<Tensor>,
    outputs: &[usize],
    reply_bytes_max: u64,
    cancel: &Cancel,
) -> Result<Vec<Tensor>, Error> {
    let run = || core.runner.run(inputs, outputs, reply_bytes_max, cancel);
    let panicked = |_| Err(Error::new(Reason::BackendFailed, "the backend failed").caused_by("it panicked"));
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(panicked)
}

/// What each of a run's calls gets.
type Results = Vec<Result<Vec<Tensor>, Error>>;

/// One run for all, and whether it took what such runs take; none when each has to run by itself, because the run
/// failed or its outputs are not made of rows.
fn run_together(
    core: &Core,
    members: &[Member],
    rows: &[usize],
    spans: &mut Spans,
    cancel: &Cancel,
) -> Option<(Results, bool)> {
    let began = Instant::now();
    let calls: Vec<&Call> = members.iter().map(|member| &member.call).collect();
    let inputs = join(&calls);
    spans.join = began.elapsed();
    let is_usual = core.runner.is_prepared(&inputs);
    let limit = calls.iter().map(|call| call.reply_bytes_max).fold(0, u64::saturating_add);
    let outputs = run_caught(core, inputs, &calls[0].outputs, limit, cancel).ok()?;
    let ran = Instant::now();
    let Some(parts) = part(&outputs, rows) else {
        core.has_no_rows();
        return None;
    };
    let checked = parts.into_iter().zip(&calls).map(|(part, call)| {
        check_reply(&part, call.reply_bytes_max)?;
        Ok(part)
    });
    let checked = checked.collect();
    spans.part = ran.elapsed();
    Some((checked, is_usual))
}

/// Every call by itself, so that one that fails does not take the others with it. Who spoilt the batch pays for it.
fn run_apart(core: &Core, members: Vec<Member>, began: Instant, cancel: &Cancel) -> Done {
    let wasted = began.elapsed();
    let mut done = Vec::with_capacity(members.len());
    for member in members {
        let begun = Instant::now();
        let result = if cancel.is_set() {
            Err(Error::new(Reason::Cancelled, "nobody waits any more"))
        } else {
            run_once(core, &member.call, cancel)
        };
        done.push((member, result, begun.elapsed()));
    }
    let failed = done.iter().filter(|(_, result, _)| result.is_err()).count();
    let calls = done.into_iter().map(|(member, result, run)| {
        let spoilt = result.is_err();
        let fine = if spoilt { wasted.div_f64(failed.max(1) as f64) } else { Duration::ZERO };
        let spans = Spans { run, calls: 1, rows: member.picked.rows, leads: true, ..Spans::default() };
        answer(member, result, spans, began, run + fine, spoilt)
    });
    Done { calls: calls.collect(), whole: None }
}

#[allow(clippy::cast_precision_loss, reason = "a share of lane time")]
fn share(rows: usize, total: usize) -> f64 {
    rows as f64 / total.max(1) as f64
}
