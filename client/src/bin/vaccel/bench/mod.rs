//! `vaccel bench`: how fast a model of the Open Inference Protocol answers, under one load after another.
//!
//! A step warms up, reads the server's counters, measures, waits for the last answer and reads the counters again: they
//! are about the measured calls and no others. Percentiles are those of all calls of the step that succeeded, from a
//! histogram that is exact to 0.05 %.

mod caller;
mod counters;
mod grpc;
mod histogram;
mod http;
mod inputs;
mod load;
mod plot;
mod report;
mod schedule;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use vaccel_client::{Builder, Endpoint, Error, Reason};

use self::caller::{Caller, Door};
use self::counters::Split;
use self::inputs::Input;
use self::report::{Step, amount, unit};
use crate::args::{BenchArgs, Load, Protocol};
use crate::output::{Failure, Output, plain, unwritable};

/// A runtime on half of the cores: a single one would soon be what is measured, and the server may be on the same
/// machine.
pub(crate) fn runtime() -> tokio::runtime::Builder {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(cores.div_ceil(2));
    runtime
}

pub(crate) async fn bench(
    builder: &Builder,
    args: &BenchArgs,
    deadline: Duration,
    output: &mut Output,
) -> Result<(), Failure> {
    let mut door = Door::open(builder, args.protocol).await?;
    let model = door.describe(&args.model, deadline).await?;
    let inputs = inputs::make(&model, args.batch, &args.shapes).map_err(Failure::Usage)?;
    let caller = door.caller(&args.model, &inputs)?;
    let title = title(args, builder.endpoint(), &inputs);
    let loads = args.loads();
    let legend = loads.first().map_or("", |load| report::legend(*load));
    output.text(&format!("{title}\n{legend}\n"))?;

    let (mut steps, mut refusal) = (Vec::new(), None);
    for (index, load) in loads.iter().enumerate() {
        progress(&format!("step {} of {}: {} {}", index + 1, loads.len(), unit(*load), amount(*load)));
        let measured = measure(builder, &mut door, &caller, args, *load, deadline).await;
        progress("");
        let step = measured?;
        refusal = nothing_succeeded(&step);
        steps.push(step);
        // More load on a server that takes none tells nothing.
        if refusal.is_some() {
            break;
        }
    }
    output.text(&report::text(&steps))?;
    output.document(document(args, builder.endpoint(), &inputs, &steps));
    // What was measured is told in any case.
    output.finish()?;
    if let Some(path) = &args.plot {
        write(path, &plot::svg(&title, &steps))?;
    }
    refusal.map_or(Ok(()), |error| Err(error.into()))
}

/// One step of the sweep, with callers and connections of its own.
async fn measure(
    builder: &Builder,
    door: &mut Door,
    caller: &Caller,
    args: &BenchArgs,
    load: Load,
    deadline: Duration,
) -> Result<Step, Error> {
    let mut callers = caller.many(builder, load::callers(load))?;
    if !args.warm_up.is_zero() {
        (callers, _) = load::run(load, callers, args.warm_up, deadline).await?;
    }
    // A server that is gone by now has nothing to tell; the calls say what became of it.
    let before = door.counters(&args.model, deadline).await.unwrap_or_default();
    let (_callers, tally) = load::run(load, callers, args.duration, deadline).await?;
    let after = door.counters(&args.model, deadline).await.unwrap_or_default();
    Ok(Step { load, tally, server: Split::between(before, after), batch: args.batch })
}

fn nothing_succeeded(step: &Step) -> Option<Error> {
    if step.tally.latency.count() > 0 {
        return None;
    }
    let why = step.tally.messages.first();
    let (reason, message) = why.map_or((Reason::BackendFailed, "there were none"), |complaint| {
        (complaint.reason, &complaint.message)
    });
    let (unit, amount) = (unit(step.load), amount(step.load));
    let message = format!("no call succeeded at {unit} {amount} of {}: {}", step.calls(), plain(message));
    Some(Error::new(reason, message))
}

fn protocol(args: &BenchArgs) -> &'static str {
    match args.protocol {
        Protocol::Grpc => "grpc",
        Protocol::Http => "http",
    }
}

/// What is measured, on a line.
fn title(args: &BenchArgs, endpoint: &Endpoint, inputs: &[Input]) -> String {
    let tensors: Vec<String> =
        inputs.iter().map(|input| format!("{} {}{:?}", input.name, input.datatype, input.shape)).collect();
    plain(&format!("{} at {endpoint} by {}: {}", args.model, protocol(args), tensors.join(", ")))
}

fn document(args: &BenchArgs, endpoint: &Endpoint, inputs: &[Input], steps: &[Step]) -> Value {
    let input = |input: &Input| json!({"name": input.name, "datatype": input.datatype, "shape": input.shape});
    json!({
        "model": args.model,
        "address": endpoint.to_string(),
        "protocol": protocol(args),
        "inputs": inputs.iter().map(input).collect::<Vec<_>>(),
        "batch": args.batch,
        "duration_s": args.duration.as_secs_f64(),
        "warm_up_s": args.warm_up.as_secs_f64(),
        "steps": steps.iter().map(report::document).collect::<Vec<_>>(),
    })
}

/// A line on a terminal that the next one replaces.
fn progress(text: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = write!(stderr, "\r{text}\x1b[K");
    }
}

fn write(path: &Path, svg: &str) -> Result<(), Error> {
    std::fs::write(path, svg).map_err(|error| unwritable(path, &error))
}
