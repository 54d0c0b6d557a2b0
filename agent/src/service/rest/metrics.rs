//! What Prometheus reads: runs of models under the names that dashboards of inference servers know.
//!
//! A tenant sees its own runs, and the host's operators (`operator` in a rule) those of all.

use std::fmt::Write;
use std::time::Duration;

use crate::dispatch::{Counts, Failure, Figures, Measured, Metrics};

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

type DeviceFigure = fn(&Figures) -> Option<f64>;

#[allow(clippy::cast_precision_loss, reason = "bytes of a device are below 2^53")]
fn bytes(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| bytes as f64)
}

/// The same of devices; what one does not tell is left out.
const DEVICE_FIGURES: [(&str, &str, &str, DeviceFigure); 6] = [
    ("nv_gpu_utilization", "gauge", "part of the time in which something ran", |device| device.utilization),
    ("nv_gpu_memory_total_bytes", "gauge", "bytes of memory", |device| bytes(device.memory_total_bytes)),
    ("nv_gpu_memory_used_bytes", "gauge", "bytes in use, of all processes", |device| {
        bytes(device.memory_used_bytes)
    }),
    ("nv_gpu_power_usage", "gauge", "watts", |device| device.power_watts),
    ("nv_gpu_power_limit", "gauge", "watts that are allowed", |device| device.power_limit_watts),
    ("nv_energy_consumption", "counter", "joules since the driver was loaded", |device| device.energy_joules),
];

/// The text of all figures.
pub(super) fn text(metrics: &Metrics) -> String {
    let mut out = String::new();
    let measured = &metrics.models;
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
    let name = "vaccel_model_device_bytes";
    head(&mut out, name, "gauge", "bytes of devices that are counted for a model");
    for one in measured {
        let _ = writeln!(out, "{name}{{{}}} {}", labels(one), one.device_bytes);
    }
    let name = "vaccel_device_bytes";
    head(&mut out, name, "gauge", "bytes of devices that the caller has");
    let _ = writeln!(out, "{name} {}", metrics.device_bytes);
    if !metrics.counted.is_empty() {
        let name = "vaccel_device_counted_bytes";
        head(&mut out, name, "gauge", "bytes of a device that the agent and all callers have");
        for (device, bytes) in &metrics.counted {
            let _ = writeln!(out, "{name}{{device=\"{}\"}} {bytes}", quoted(device));
        }
    }
    devices(&mut out, &metrics.devices);
    out
}

fn devices(out: &mut String, devices: &[Figures]) {
    for (name, kind, help, figure) in DEVICE_FIGURES {
        let told: Vec<_> = devices.iter().filter_map(|one| Some((one, figure(one)?))).collect();
        if told.is_empty() {
            continue;
        }
        head(out, name, kind, help);
        for (one, figure) in told {
            let _ = writeln!(out, "{name}{{gpu_uuid=\"{}\"}} {figure}", quoted(&one.uuid));
        }
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A label's value as the format wants it.
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
