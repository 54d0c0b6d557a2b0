//! One content, many guests; and one large content, an agent with little memory.

use std::io::Write;
use std::process::Stdio;
use std::sync::Arc;

use tokio::task::JoinSet;
use vaccel_client::{ResourceFiles, ResourceKind, SessionOptions, Tensor, named};

use super::{Numbers, missing, stored, upload};
use crate::support::{Agent, connect, onnx};

const GUESTS: usize = 50;

/// What an upload of any size may add to the agent's memory, in bytes.
const GROWTH_MAX: u64 = 64 << 20;
const LARGE: usize = 256 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_guests_with_one_model_store_and_load_it_once() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let flags = ["--engine", "tract", "--log", "vaccel_agent::resource=debug"];
    let agent = Agent::start_logged(&["unix://{}/s"], &flags, Stdio::from(log.reopen().unwrap()));
    let weights: Vec<f32> = (0..1_u16 << 15).map(f32::from).collect();
    let shape = [1 << 15];
    let ports = |name| vec![onnx::port(name, onnx::F32, &[1 << 15])];
    let nodes = vec![onnx::node("Add", &["x", "w"], &["y"])];
    let model = onnx::model(nodes, vec![onnx::f32s("w", &shape, &weights)], ports("x"), ports("y"));
    let mut guests = JoinSet::new();
    let address: Arc<str> = agent.address().into();
    for _ in 0..GUESTS {
        let (address, model) = (Arc::clone(&address), model.clone());
        guests.spawn(async move {
            let session = connect(&address).await.open_session(SessionOptions::default()).await.unwrap();
            let resource = session.register(ResourceFiles::model("m.onnx", model)).await.unwrap();
            let input = Tensor::new(&[1 << 15], &vec![1.0_f32; 1 << 15]).unwrap();
            let run = session.run(&resource, vec![named("x", input)], &[]).await.unwrap();
            assert_eq!(run.outputs[0].tensor.as_ref().unwrap().elements::<f32>().unwrap()[7], 8.0);
            // All hold it at the same time.
            session
        });
    }
    let sessions = guests.join_all().await;
    assert_eq!(sessions.len(), GUESTS);
    let client = agent.guest(0).await;
    let usage = client.info().await.unwrap().usage.unwrap();
    assert_eq!((usage.resource_bytes, usage.cached_bytes), (model.len() as u64, 0), "counted once");
    assert_eq!(stored(agent.folder(), "complete").len(), 1, "stored once");
    assert!(stored(agent.folder(), "partial").is_empty());
    let log = std::fs::read_to_string(log.path()).unwrap();
    assert_eq!(log.matches("file read to be loaded").count(), 1, "loaded once:\n{log}");
}

#[tokio::test]
async fn a_large_resource_takes_no_memory_of_either_side() {
    let agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.bin");
    let mut written = std::fs::File::create(&path).unwrap();
    let mut numbers = Numbers(5);
    let block = numbers.bytes(1 << 20);
    for number in 0..(LARGE >> 20) as u64 {
        written.write_all(&number.to_le_bytes()).unwrap();
        written.write_all(&block[8..]).unwrap();
    }
    drop(written);
    let (before, own) = (agent.peak(), own_peak());
    let resource = session.register(ResourceFiles::path(ResourceKind::Data, &path)).await.unwrap();
    let uploaded = agent.peak() - before;
    let mut reader = session.read_resource(&resource, "", 0, 0).await.unwrap();
    let mut read = 0;
    while let Some(piece) = reader.next().await.unwrap() {
        read += piece.len();
    }
    assert_eq!(read, LARGE);
    let (both, own) = (agent.peak() - before, own_peak() - own);
    eprintln!(
        "{} MiB: the agent grew by {} MiB for the upload, {} MiB with reading it back; the guest by {} MiB",
        LARGE >> 20,
        uploaded >> 20,
        both >> 20,
        own >> 20
    );
    assert!(both <= GROWTH_MAX && own <= GROWTH_MAX);
}

fn own_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[tokio::test]
async fn two_sessions_that_upload_one_file_at_once_both_have_it() {
    let agent = Agent::unix(&[]);
    let content = Numbers(6).bytes(8 << 20);
    let mut uploads = JoinSet::new();
    for _ in 0..2 {
        let (_client, session) = agent.session().await;
        let content = content.clone();
        uploads.spawn(async move {
            let files = ResourceFiles::new(ResourceKind::Data, vec![("f".into(), content.clone())]);
            let resource = session.register(files).await.unwrap();
            let mut reader = session.read_resource(&resource, "", 0, 0).await.unwrap();
            assert!(reader.rest().await.unwrap() == content);
            session
        });
    }
    let sessions = uploads.join_all().await;
    let usage = agent.guest(0).await.info().await.unwrap().usage.unwrap();
    assert_eq!(usage.resource_bytes, content.len() as u64);
    drop(sessions);
}

/// Two guests with half of a file each, neither of which is the beginning for the other.
#[tokio::test]
async fn guests_that_take_turns_at_a_file_complete_it() {
    let agent = Agent::unix(&[]);
    let content = Numbers(7).bytes(100_000);
    let (first, a) = agent.session().await;
    let (second, b) = agent.session().await;
    let turns = [(&first, &a), (&second, &b)];
    for (turn, end) in (10_000..=content.len()).step_by(10_000).enumerate() {
        let (client, session) = turns[turn % 2];
        // From the beginning of its own last turn: what is there already is skipped.
        let begin = end.saturating_sub(20_000);
        assert_eq!(upload(client.link(), &session.id(), &content, begin..end).await.unwrap(), end as u64);
    }
    for (client, session) in turns {
        assert!(missing(client.link(), &session.id(), &content).await.unwrap().is_empty());
    }
}
