//! Ends that are harder than most: engines that do not stop, and agents under load.

use std::process::Command;
use std::time::Duration;

use vaccel_client::{CallOptions, Reason, ResourceFiles, Tensor, named};

use crate::support::{Agent, onnx, output_text, until};

fn one() -> Tensor {
    Tensor::new(&[1, 1], &[1.0_f32]).unwrap()
}

/// An engine inside one long operator hears nobody. It must not keep the agent from ending, whether its caller waits
/// or has long left.
#[tokio::test]
async fn an_engine_that_does_not_stop_does_not_keep_the_agent() {
    for caller_waits in [true, false] {
        let mut agent = Agent::unix(&["--engine", "tract", "--grace", "0.2"]);
        let (client, session) = agent.session().await;
        let stubborn = ResourceFiles::model("m.onnx", onnx::stubborn(1 << 26));
        let model = session.register(stubborn).await.unwrap();
        let once = session.with(CallOptions { repeatable: false, ..CallOptions::default() });
        let call =
            tokio::spawn(async move { once.run(&model, vec![named("x", one())], &[]).await.map(drop) });
        // What the model makes from its input, 256 MiB: the one operator before the long one is done.
        until("the engine", async || agent.resident() > 200 << 20).await;
        if !caller_waits {
            call.abort();
            let in_flight = async || client.info().await.unwrap().usage.unwrap().calls_in_flight;
            until("the end of the call", async || in_flight().await == 1).await;
            assert!(agent.computes(), "an engine that stops proves nothing here");
        }
        agent.signal("TERM");
        let ended = tokio::task::spawn_blocking(move || agent.process.wait().unwrap());
        let status = tokio::time::timeout(Duration::from_secs(20), ended).await;
        assert!(status.expect("the agent waits for the engine").unwrap().success());
        if caller_waits {
            assert_eq!(call.await.unwrap().unwrap_err().reason(), Reason::Unreachable);
        }
    }
}

/// Memory that models and their runs took is given back when nobody holds them any more.
#[tokio::test]
async fn sessions_that_come_and_go_leave_no_memory_behind() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let client = agent.guest(0).await;
    let weights = vec![0.5_f32; 4 << 20];
    let visit = async |number: u16| {
        let session = client.open_session(Default::default()).await.unwrap();
        let shape = [4 << 20];
        let ports = |name| vec![onnx::port(name, onnx::F32, &shape.map(|dim: u64| dim as i64))];
        let nodes = vec![onnx::node("Add", &["x", "w"], &["y"])];
        let mut own = weights.clone();
        own[0] = f32::from(number);
        let model = onnx::model(nodes, vec![onnx::f32s("w", &shape, &own)], ports("x"), ports("y"));
        let model = session.register(ResourceFiles::model("m.onnx", model)).await.unwrap();
        let input = Tensor::new(&[4 << 20], &own).unwrap();
        let run = session.run(&model, vec![named("x", input)], &[]).await.unwrap();
        let output = run.outputs[0].tensor.as_ref().unwrap().elements::<f32>().unwrap()[..2].to_vec();
        assert_eq!(output, [2.0 * f32::from(number), 1.0]);
        session.close().await.unwrap();
    };
    // What the allocator keeps of a visit differs from visit to visit: the most of some is compared with the most of
    // more.
    let most = async |visits: std::ops::Range<u16>| {
        let mut most = 0;
        for number in visits {
            visit(number).await;
            most = most.max(agent.resident());
        }
        most
    };
    let before = most(0..8).await;
    let grown = most(8..24).await.saturating_sub(before);
    eprintln!("{} MiB after 8 visits, at most {} MiB more in the next 16", before >> 20, grown >> 20);
    // One model with its weights and tensors twice; 16 of them are 768 MiB, were they kept.
    assert!(grown <= 192 << 20, "{} MiB", grown >> 20);
    assert_eq!(client.info().await.unwrap().usage.unwrap().resource_bytes, 0);
}

#[test]
fn the_demo_ends_by_itself_with_the_right_labels() {
    let output = Command::new(env!("CARGO_BIN_EXE_vaccel-agent")).arg("demo").output().unwrap();
    let text = output_text(&output);
    assert!(output.status.success(), "{text}");
    let names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
    let labels = text.lines().filter(|line| line.starts_with("guest ")).map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let digit = words[1].rsplit("is-").next().unwrap()[..1].parse::<usize>().unwrap();
        assert_eq!(words[2], names[digit], "{line}");
        digit
    });
    assert!(labels.eq(0..10), "{text}");
    let rows = ["direct call", "unix", "tcp"];
    let row =
        |name: &&str| text.lines().any(|line| line.trim_start().starts_with(*name) && line.contains("µs"));
    assert!(rows.iter().all(row), "{text}");
}
