//! Callers that leave, by the hundred thousand.

use std::time::Duration;

use tokio::task::JoinSet;
use vaccel_client::proto::inference::ModelStatisticsRequest;

use super::{Inference, floats, inference, numbers, request, start, tensor};
use crate::support::{Agent, connect, until};

const CALLS: usize = 100_000;
/// Callers at the same time, over a few connections.
const CALLERS: usize = 128;

/// 1 ms for a run and 10 us for a row, calls of all callers together.
const DEVICE: &str = r#"
backend: "identity"
max_batch_size: 32
dynamic_batching { }
input [ { name: "in" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "out" data_type: TYPE_FP32 dims: [ -1 ] } ]
parameters { key: "run_us" value { string_value: "1000" } }
parameters { key: "row_us" value { string_value: "10" } }
"#;

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % sides
    }
}

/// Calls, most of which their caller leaves: before they are sent, while they wait or run, as the answer comes.
async fn leave(mut client: Inference, seed: u64, calls: usize) {
    let mut dice = Dice(seed);
    for _ in 0..calls {
        let asked = request("device", tensor("in", "FP32", &[1, 256]), floats(&[1.0; 256]));
        let call = client.model_infer(asked);
        match dice.roll(4) {
            0 => drop(call),
            1 => drop(call.await.unwrap()),
            _ => drop(tokio::time::timeout(Duration::from_micros(dice.roll(4000)), call).await),
        }
    }
}

fn memory(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

async fn storm(agent: &Agent, calls: usize) {
    let mut callers = JoinSet::new();
    let mut client = None;
    for caller in 0..CALLERS {
        if caller % 32 == 0 {
            client = Some(inference(agent.address()).await);
        }
        callers.spawn(leave(client.clone().unwrap(), caller as u64, calls / CALLERS));
    }
    callers.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_leave_leave_nothing_behind() {
    let agent = start(|models| _ = models.config("device", DEVICE), &["--tenant-calls-max", "512"]);
    storm(&agent, CALLS / 10).await;
    let before = memory(&agent);
    storm(&agent, CALLS).await;
    let observer = connect(agent.address()).await;
    // Its own call is one.
    until("an idle agent", async || observer.info().await.unwrap().usage.unwrap().calls_in_flight == 1).await;
    let after = memory(&agent);
    assert!(after < before + (16 << 20), "{before} bytes before, {after} after");

    let mut client = inference(agent.address()).await;
    let asked = || ModelStatisticsRequest { name: "device".into(), ..Default::default() };
    let stats = client.model_statistics(asked()).await.unwrap().into_inner().model_stats.remove(0);
    let sums = stats.inference_stats.unwrap();
    let (served, left) = (sums.success.unwrap().count, sums.fail.unwrap().count);
    assert!(served > 0 && left > 0 && served + left <= (CALLS + CALLS / 10) as u64, "{served} {left}");
    assert_eq!(served, stats.inference_count);
    let rows: u64 =
        stats.batch_stats.iter().map(|batch| batch.batch_size * batch.compute_infer.unwrap().count).sum();
    assert!(rows >= served, "runs are counted with those that left, too: {rows} {served}");
    println!("{served} served, {left} left; memory grew by {} KiB", after.saturating_sub(before) >> 10);

    // All lanes are there, and every call gets its own answer.
    let mut calls = JoinSet::new();
    for value in 0..64_u8 {
        let mut client = client.clone();
        calls.spawn(async move {
            let asked = request("device", tensor("in", "FP32", &[1, 1]), floats(&[f32::from(value)]));
            let reply = client.model_infer(asked).await.unwrap().into_inner();
            assert_eq!(numbers(&reply.raw_output_contents[0]), [f32::from(value)]);
        });
    }
    calls.join_all().await;
}
