//! What Prometheus reads: runs of models under the names that dashboards of inference servers know.
//!
//! A tenant sees its own runs, and the host's operators (`operator` in a rule) those of all.

use std::fmt::Write;
use std::time::Duration;

use crate::dispatch::{Counts, Failure, Measured};

type Figure = fn(&Counts) -> u64;

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Name, kind, what it is, and the figure of one model.
const FIGURES: [(&str, &str, &str, Figure); 11] = [
    ("nv_inference_request_success", "counter", "requests that went well", |counts| counts.success.count),
    ("nv_inference_count", "counter", "rows of all requests that ran", |counts| counts.rows),
    ("nv_inference_exec_count", "counter", "runs of the model", |counts| counts.executions),
    ("nv_inference_request_duration_us", "counter", "microseconds of requests that went well", |counts| {
        micros(counts.success.time)
    }),
    ("nv_inference_queue_duration_us", "counter", "microseconds of waiting", |counts| {
        micros(counts.queue.time)
    }),
    ("nv_inference_compute_input_duration_us", "counter", "microseconds of joining inputs", |counts| {
        micros(counts.join.time)
    }),
    ("nv_inference_compute_infer_duration_us", "counter", "microseconds of computing", |counts| {
        micros(counts.infer.time)
    }),
    ("nv_inference_compute_output_duration_us", "counter", "microseconds of parting outputs", |counts| {
        micros(counts.part.time)
    }),
    ("nv_inference_pending_request_count", "gauge", "requests that are not over", |counts| counts.pending),
    ("nv_cache_num_hits_per_model", "counter", "requests answered from the cache", |counts| {
        counts.hits.count
    }),
    ("nv_cache_num_misses_per_model", "counter", "requests not in the cache", |counts| counts.misses.count),
];

/// The text of all figures.
pub(super) fn text(measured: &[Measured]) -> String {
    let mut out = String::new();
    let labels = |one: &Measured| format!("model=\"{}\",version=\"{}\"", quoted(&one.model), one.version);
    for (name, kind, help, figure) in FIGURES {
        head(&mut out, name, kind, help);
        for one in measured {
            let _ = writeln!(out, "{name}{{{}}} {}", labels(one), figure(&one.counts));
        }
    }
    let name = "nv_inference_request_failure";
    head(&mut out, name, "counter", "requests that failed");
    for one in measured {
        for why in Failure::ALL {
            let count = one.counts.failures.get(&why).map_or(0, |sum| sum.count);
            let _ = writeln!(out, "{name}{{{},reason=\"{}\"}} {count}", labels(one), why.name());
        }
    }
    out
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A label's value as the format wants it.
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
