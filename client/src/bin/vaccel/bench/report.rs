//! What was measured, for people and for programs.

use serde_json::{Value, json};

use super::counters::{self, Split};
use super::load::Tally;
use crate::args::Load;
use crate::output::{plain, table};

/// Percentiles that are told, from the median to what one call in a hundred exceeds.
pub(crate) const PERCENTILES: [u64; 4] = [50, 90, 95, 99];

/// The percentile of how late calls of an open loop were sent.
const LATE_PERCENT: u64 = 99;

/// One step of the sweep.
pub(crate) struct Step {
    pub(crate) load: Load,
    pub(crate) tally: Tally,
    pub(crate) server: Split,
    /// Rows of each call.
    pub(crate) batch: u32,
}

/// What a load is a number of.
pub(crate) fn unit(load: Load) -> &'static str {
    match load {
        Load::Concurrency(_) => "concurrency",
        Load::Rate(_) => "rate",
    }
}

/// The number of a load.
pub(crate) fn amount(load: Load) -> String {
    match load {
        Load::Concurrency(calls) => calls.to_string(),
        Load::Rate(rate) => rate.to_string(),
    }
}

impl Step {
    pub(crate) fn calls(&self) -> u64 {
        self.tally.latency.count() + self.tally.errors
    }

    fn rows_per_second(&self) -> f64 {
        self.tally.rate * f64::from(self.batch)
    }
}

/// What the columns of the table are, as a line above it.
pub(crate) fn legend(load: Load) -> &'static str {
    match load {
        Load::Concurrency(_) => "mean to max: latency, µs; queue to output: the server's part of it, µs",
        Load::Rate(_) => {
            "mean to max: latency from when a call was due, µs; late: 99 % were sent at most so long after that, µs; \
             queue to output: the server's part, µs"
        }
    }
}

/// The steps as a table, and below it the errors, if there were any.
pub(crate) fn text(steps: &[Step]) -> String {
    let Some(first) = steps.first() else { return String::new() };
    let mut heads = vec![unit(first.load), "calls", "errors", "calls/s", "rows/s"];
    heads.extend(["mean", "p50", "p90", "p95", "p99", "max"]);
    if is_open(first) {
        heads.push("late");
    }
    heads.extend(["queue", "input", "infer", "output", "rows/run"]);
    let mut rows = vec![heads.into_iter().map(str::to_owned).collect()];
    rows.extend(steps.iter().map(row));
    table(&to_the_right(rows)) + &steps.iter().map(errors).collect::<String>()
}

fn row(step: &Step) -> Vec<String> {
    let latency = &step.tally.latency;
    let whole = |number: f64| format!("{number:.0}");
    let one = |number: f64| format!("{number:.1}");
    // Figures of no calls are none.
    let some = |number: f64| if latency.count() > 0 { whole(number) } else { "-".into() };
    let mut row = vec![amount(step.load), step.calls().to_string(), step.tally.errors.to_string()];
    row.extend([one(step.tally.rate), one(step.rows_per_second()), some(latency.mean())]);
    row.extend(PERCENTILES.map(|percent| some(latency.percentile(percent))));
    row.push(some(latency.max()));
    if is_open(step) {
        row.push(whole(step.tally.late.percentile(LATE_PERCENT)));
    }
    let Split { queue, input, infer, output, rows } = step.server;
    row.extend([queue, input, infer, output].map(|time| time.map_or("-".into(), whole)));
    row.push(rows.map_or("-".into(), one));
    row
}

fn is_open(step: &Step) -> bool {
    matches!(step.load, Load::Rate(_))
}

/// Numbers stand below each other by their last digits.
fn to_the_right(mut rows: Vec<Vec<String>>) -> Vec<Vec<String>> {
    let columns = rows.first().map_or(0, Vec::len);
    for column in 0..columns {
        let width = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        for row in &mut rows {
            row[column] = format!("{:>width$}", row[column]);
        }
    }
    rows
}

fn errors(step: &Step) -> String {
    let tally = &step.tally;
    if tally.errors == 0 {
        return String::new();
    }
    let (unit, amount) = (unit(step.load), amount(step.load));
    let mut text = format!("{unit} {amount}: {} of {} calls failed\n", tally.errors, step.calls());
    for complaint in &tally.messages {
        text += &format!("  {} x {} ({})\n", complaint.count, plain(&complaint.message), complaint.reason);
    }
    let told: u64 = tally.messages.iter().map(|complaint| complaint.count).sum();
    if told < tally.errors {
        text += &format!("  {} x others\n", tally.errors - told);
    }
    text
}

/// A step as JSON.
pub(crate) fn document(step: &Step) -> Value {
    let latency = &step.tally.latency;
    let figure = |number: f64| (latency.count() > 0).then(|| tenths(number));
    let mut latencies = json!({"mean": figure(latency.mean()), "max": figure(latency.max())});
    for percent in PERCENTILES {
        latencies[format!("p{percent}")] = figure(latency.percentile(percent)).into();
    }
    let errors = step.tally.messages.iter().map(|complaint| {
        let (reason, message) = (complaint.reason.name(), &complaint.message);
        json!({"reason": reason, "message": message, "count": complaint.count})
    });
    let mut document = json!({
        "calls": step.calls(),
        "errors": step.tally.errors,
        "error_messages": errors.collect::<Vec<_>>(),
        "calls_per_s": tenths(step.tally.rate),
        "rows_per_s": tenths(step.rows_per_second()),
        "latency_us": latencies,
        "server_us": counters::to_json(&step.server),
        "rows_per_execution": step.server.rows.map(tenths),
    });
    if is_open(step) {
        let late = &step.tally.late;
        document["sent_late_us"] = json!({"mean": tenths(late.mean()), "max": tenths(late.max())});
        document["sent_late_us"][format!("p{LATE_PERCENT}")] = tenths(late.percentile(LATE_PERCENT)).into();
    }
    document[unit(step.load)] = match step.load {
        Load::Concurrency(calls) => calls.into(),
        Load::Rate(rate) => rate.into(),
    };
    document
}

/// A measured number with the digits that mean something.
pub(crate) fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bench::load::Complaint;
    use std::time::Duration;
    use vaccel_client::Reason;

    pub(crate) fn step(calls: u32, latencies: &[u64], errors: u64) -> Step {
        let mut tally = Tally { rate: 1234.56, errors, ..Tally::default() };
        for us in latencies {
            tally.latency.record(Duration::from_micros(*us));
        }
        if errors > 0 {
            let message = "too much\n".to_owned();
            tally.messages.push(Complaint { reason: Reason::Overloaded, message, count: errors - 1 });
        }
        Step { load: Load::Concurrency(calls), tally, server: Split::default(), batch: 2 }
    }

    #[test]
    fn the_table_has_a_line_for_each_step_and_the_errors_below() {
        let mut good = step(8, &[1000, 2000], 0);
        good.server = Split { queue: Some(1.6), rows: Some(3.25), ..Split::default() };
        let text = text(&[good, step(64, &[], 3)]);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0][..4], ["concurrency", "calls", "errors", "calls/s"]);
        let figures = "8 2 0 1234.6 2469.1 1500 1000 2000 2000 2000 2000 2 - - - 3.2";
        assert_eq!(lines[1].join(" "), figures);
        assert_eq!(lines[2].join(" "), "64 3 3 1234.6 2469.1 - - - - - - - - - - -");
        assert!(lines[0].len() == lines[1].len() && lines[0].len() == lines[2].len());
        let after: Vec<&str> = text.lines().skip(3).collect();
        assert_eq!(
            after,
            ["concurrency 64: 3 of 3 calls failed", "  2 x too much\u{fffd} (OVERLOADED)", "  1 x others"]
        );
    }

    #[test]
    fn the_document_has_the_same() {
        let step = Step { load: Load::Rate(0.5), ..step(1, &[1000, 1500], 2) };
        let document = document(&step);
        assert_eq!(document["rate"], 0.5);
        assert_eq!((&document["calls"], &document["errors"]), (&json!(4), &json!(2)));
        let p99 = document["latency_us"]["p99"].as_f64().unwrap();
        assert!((p99 - 1500.0).abs() < 1.0, "{p99}");
        assert_eq!(document["latency_us"]["mean"], 1250.0);
        assert_eq!(document["error_messages"][0]["reason"], "OVERLOADED");
        assert_eq!(document["server_us"]["queue"], Value::Null);
        assert_eq!(super::document(&super::tests::step(1, &[], 1))["latency_us"]["p50"], Value::Null);
    }
}
