//! What the server counted of a model, and what it did between two counts.

use serde_json::{Value, json};
use vaccel_client::proto::inference::{ModelStatistics, StatisticDuration};

/// A server's `ModelStatistics`, those of all versions together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) queue: Sum,
    pub(crate) input: Sum,
    pub(crate) infer: Sum,
    pub(crate) output: Sum,
    pub(crate) rows: u64,
    pub(crate) executions: u64,
}

/// How often, and nanoseconds together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) count: u64,
    pub(crate) ns: u64,
}

impl Counters {
    pub(crate) fn of<'a>(versions: impl IntoIterator<Item = &'a ModelStatistics>) -> Self {
        let mut all = Self::default();
        for version in versions {
            let sums = version.inference_stats.unwrap_or_default();
            all.queue.add(sums.queue);
            all.input.add(sums.compute_input);
            all.infer.add(sums.compute_infer);
            all.output.add(sums.compute_output);
            all.rows += version.inference_count;
            all.executions += version.execution_count;
        }
        all
    }
}

impl Sum {
    fn add(&mut self, more: Option<StatisticDuration>) {
        let more = more.unwrap_or_default();
        self.count += more.count;
        self.ns += more.ns;
    }
}

/// What the server did with the calls of a step: microseconds of each call, where it counted any.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Split {
    pub(crate) queue: Option<f64>,
    pub(crate) input: Option<f64>,
    pub(crate) infer: Option<f64>,
    pub(crate) output: Option<f64>,
    /// Rows that it computed together.
    pub(crate) rows: Option<f64>,
}

impl Split {
    /// Nothing of a server that does not count, or that began again in between.
    pub(crate) fn between(before: Option<Counters>, after: Option<Counters>) -> Self {
        let (Some(before), Some(after)) = (before, after) else { return Self::default() };
        let each = |before: Sum, after: Sum| {
            let ns = after.ns.checked_sub(before.ns)?;
            mean(ns, after.count.checked_sub(before.count)?).map(|ns| ns / 1e3)
        };
        let executions = after.executions.checked_sub(before.executions);
        let rows = after.rows.checked_sub(before.rows).zip(executions);
        Self {
            queue: each(before.queue, after.queue),
            input: each(before.input, after.input),
            infer: each(before.infer, after.infer),
            output: each(before.output, after.output),
            rows: rows.and_then(|(rows, executions)| mean(rows, executions)),
        }
    }
}

fn mean(sum: u64, count: u64) -> Option<f64> {
    (count > 0).then(|| sum as f64 / count as f64)
}

/// A whole number of JSON; some servers write those of 64 bits as text.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

/// The same counts in the JSON of HTTP.
pub(crate) fn of_json(document: &Value) -> Counters {
    let count = |value: &Value| whole(value).and_then(|count| u64::try_from(count).ok()).unwrap_or(0);
    let sum = |version: &Value, name: &str| {
        let sum = &version["inference_stats"][name];
        Sum { count: count(&sum["count"]), ns: count(&sum["ns"]) }
    };
    let mut all = Counters::default();
    for version in document["model_stats"].as_array().into_iter().flatten() {
        for (into, name) in [
            (&mut all.queue, "queue"),
            (&mut all.input, "compute_input"),
            (&mut all.infer, "compute_infer"),
            (&mut all.output, "compute_output"),
        ] {
            let Sum { count, ns } = sum(version, name);
            into.add(Some(StatisticDuration { count, ns }));
        }
        all.rows += count(&version["inference_count"]);
        all.executions += count(&version["execution_count"]);
    }
    all
}

/// The split as JSON; null for what the server did not count.
pub(crate) fn to_json(split: &Split) -> Value {
    json!({
        "queue": split.queue.map(super::report::tenths),
        "compute_input": split.input.map(super::report::tenths),
        "compute_infer": split.infer.map(super::report::tenths),
        "compute_output": split.output.map(super::report::tenths),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_client::proto::inference::InferStatistics;

    fn version(count: u64, ns: u64) -> ModelStatistics {
        let sum = |times: u64| Some(StatisticDuration { count, ns: ns * times });
        let inference_stats = Some(InferStatistics {
            queue: sum(1),
            compute_input: sum(2),
            compute_infer: sum(3),
            compute_output: sum(4),
            ..InferStatistics::default()
        });
        let (inference_count, execution_count) = (count * 2, count / 2);
        ModelStatistics { inference_count, execution_count, inference_stats, ..ModelStatistics::default() }
    }

    #[test]
    fn a_step_is_what_came_between() {
        let before = Counters::of(&[version(4, 1_000), version(6, 4_000)]);
        let after = Counters::of(&[version(4, 1_000), version(16, 24_000)]);
        let split = Split::between(Some(before), Some(after));
        let expected = Split {
            queue: Some(2.0),
            input: Some(4.0),
            infer: Some(6.0),
            output: Some(8.0),
            rows: Some(4.0),
        };
        assert_eq!(split, expected);
        for (before, after) in
            [(None, Some(after)), (Some(before), Some(before)), (Some(after), Some(before))]
        {
            assert_eq!(Split::between(before, after), Split::default());
        }
    }

    #[test]
    fn counts_in_json_are_the_same() {
        let sum = |count: u64, ns: u64| json!({"count": count, "ns": ns.to_string()});
        let document = json!({"model_stats": [{
            "inference_count": "8",
            "execution_count": 2,
            "inference_stats": {
                "queue": sum(4, 100),
                "compute_input": sum(4, 200),
                "compute_infer": sum(4, 300),
                "compute_output": sum(4, 400),
            },
        }]});
        assert_eq!(of_json(&document), Counters::of(&[version(4, 100)]));
        assert_eq!(of_json(&json!({})), Counters::default());
    }
}
