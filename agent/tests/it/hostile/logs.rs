//! What guests can make an agent write to its log: any number of lines, each with their texts in it.

use std::process::Stdio;

use bytes::Bytes;
use tempfile::NamedTempFile;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use vaccel_client::{DType, Reason, ResourceFiles, SessionOptions, Tensor, named};

use super::refused;
use crate::support::{Agent, onnx, socket_path};

/// Lines of one kind and tenant: ten in ten seconds, of which a test can see the end and the next beginning.
const LINES: std::ops::RangeInclusive<usize> = 10..=20;

fn start(flags: &[&str]) -> (Agent, NamedTempFile) {
    let log = NamedTempFile::new().unwrap();
    let flags = [&["--engine", "tract"], flags].concat();
    let into = Stdio::from(log.reopen().unwrap());
    (Agent::start_logged(&["unix://{}/s"], &flags, into), log)
}

fn read(log: &NamedTempFile) -> String {
    std::fs::read_to_string(log.path()).unwrap()
}

#[tokio::test]
async fn refused_connections_are_few_lines() {
    let (agent, log) = start(&["--tenant-connections-max", "1"]);
    let client = agent.guest(0).await;
    for _ in 0..100 {
        let mut stream = UnixStream::connect(socket_path(agent.address())).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    client.info().await.unwrap();
    let log = read(&log);
    let lines = log.matches("connection refused").count();
    assert!(LINES.contains(&lines), "{lines} lines:\n{log}");
}

/// A model that fails when it runs, with nodes of long names.
#[tokio::test]
async fn calls_that_fail_are_few_lines_and_short_ones() {
    let (agent, log) = start(&[]);
    let session = agent.guest(0).await.open_session(SessionOptions::default()).await.unwrap();
    let node = onnx::node("Gather", &["w", "x"], &["y"]).bytes(3, format!("a\n{}", "n".repeat(60_000)));
    let weights = onnx::f32s("w", &[4], &[0.0; 4]);
    let (x, y) = (onnx::port("x", onnx::I64, &[-1]), onnx::port("y", onnx::F32, &[-1]));
    let model = onnx::model(vec![node], vec![weights], vec![x], vec![y]);
    let model = session.register(ResourceFiles::model("m.onnx", model)).await.unwrap();
    for _ in 0..50 {
        let beyond = Tensor::from_bytes(DType::I64, &[1], Bytes::copy_from_slice(&99_i64.to_le_bytes()));
        let outcome = session.run(&model, vec![named("x", beyond)], &[]).await;
        refused("beyond the end", outcome.map(|_| ()), Reason::BackendFailed, "");
    }
    let log = read(&log);
    let lines = log.matches("call failed").count();
    assert!(LINES.contains(&lines), "{lines} lines:\n{log}");
    assert!(log.lines().all(|line| line.len() < 8192), "{log}");
    assert!(log.lines().count() < 60, "{log}");
}
