//! Uploads that break off and go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use vaccel_client::{ResourceFiles, ResourceKind, SessionOptions};

use super::{Numbers, missing, stored, upload};
use crate::support::{Agent, connect};

const SIZE: usize = 40 << 20;

/// Stands between guest and agent, counts what goes to the agent, and ends every connection after so many bytes.
struct Wire {
    address: String,
    sent: Arc<AtomicU64>,
    cut_after: watch::Sender<u64>,
}

impl Wire {
    async fn to(agent: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("tcp://{}", listener.local_addr().unwrap());
        let sent = Arc::new(AtomicU64::new(0));
        let (cut_after, limit) = watch::channel(u64::MAX);
        let counted = Arc::clone(&sent);
        tokio::spawn(async move {
            loop {
                let (guest, _) = listener.accept().await.unwrap();
                // A guest that comes while there is no agent is closed, as one is by a machine.
                let Ok(agent) = TcpStream::connect(&agent).await else { continue };
                tokio::spawn(carry(guest, agent, Arc::clone(&counted), limit.clone()));
            }
        });
        Self { address, sent, cut_after }
    }
}

async fn carry(guest: TcpStream, agent: TcpStream, sent: Arc<AtomicU64>, limit: watch::Receiver<u64>) {
    let (mut from_guest, mut to_guest) = guest.into_split();
    let (mut from_agent, mut to_agent) = agent.into_split();
    let up = async {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = from_guest.read(&mut buffer).await.unwrap_or(0);
            let total = sent.fetch_add(count as u64, Ordering::SeqCst) + count as u64;
            if count == 0 || total > *limit.borrow() || to_agent.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = up => {}
        _ = copy(&mut from_agent, &mut to_guest) => {}
    }
}

/// The rest of an upload that was cut at nine tenths, and a tenth of slack for frames and the piece that was cut.
const AGAIN_MAX: u64 = SIZE as u64 * 11 / 100;

#[tokio::test]
async fn an_upload_that_was_cut_sends_only_the_rest_again() {
    let agent = Agent::start(&["tcp://127.0.0.1:0"], &[]);
    let wire = Wire::to(agent.address().trim_start_matches("tcp://").to_owned()).await;
    wire.cut_after.send_replace(SIZE as u64 * 9 / 10 + (1 << 20));
    let session = connect(&wire.address).await.open_session(SessionOptions::default()).await.unwrap();
    let content = Numbers(2).bytes(SIZE);
    let files = ResourceFiles::new(ResourceKind::Data, vec![("f".into(), content.clone())]);
    // The cut comes once: what is counted behind it is the second attempt.
    let registering = tokio::spawn(async move { session.register(files).await });
    let cut = SIZE as u64 * 9 / 10 + (1 << 20);
    crate::support::until("the cut", async || wire.sent.load(Ordering::SeqCst) > cut).await;
    wire.cut_after.send_replace(u64::MAX);
    registering.await.unwrap().unwrap();
    let again = wire.sent.load(Ordering::SeqCst).saturating_sub(cut);
    eprintln!("{again} of {SIZE} bytes sent after the cut at 90 %");
    assert!(again <= AGAIN_MAX, "{again} of {SIZE} bytes");
}

#[tokio::test]
async fn an_upload_goes_on_after_the_agent_was_killed() {
    let mut agent = Agent::unix(&[]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.bin");
    let content = Numbers(3).bytes(SIZE);
    std::fs::write(&path, &content).unwrap();
    {
        let (client, session) = agent.session().await;
        let nine_tenths = SIZE / 10 * 9;
        upload(client.link(), &session.id(), &content, 0..nine_tenths).await.unwrap();
        agent = Agent::start_in(agent.kill(), &["unix://{}/s"], &[]);
    }
    let (client, session) = agent.session().await;
    let lacking = missing(client.link(), &session.id(), &content).await.unwrap().remove(0);
    let again = SIZE as u64 - lacking.offset;
    eprintln!("{again} of {SIZE} bytes to send after the agent was killed at 90 %");
    assert!(again <= AGAIN_MAX, "{again} of {SIZE} bytes");
    let told = Arc::new(AtomicU64::new(u64::MAX));
    let first = Arc::clone(&told);
    let files = ResourceFiles::path(ResourceKind::Data, &path).on_progress(move |done, _| {
        first.fetch_min(done, Ordering::SeqCst);
    });
    let resource = session.register(files).await.unwrap();
    assert_eq!(told.load(Ordering::SeqCst), lacking.offset, "it begins where the first one ended");
    let mut reader = session.read_resource(&resource, "weights.bin", 0, 0).await.unwrap();
    assert!(reader.rest().await.unwrap() == content);
    assert!(stored(agent.folder(), "partial").is_empty());
}

#[tokio::test]
async fn complete_files_need_no_upload_after_a_restart() {
    let mut agent = Agent::unix(&[]);
    let content = Numbers(4).bytes(3 << 20);
    {
        let (client, session) = agent.session().await;
        upload(client.link(), &session.id(), &content, 0..content.len()).await.unwrap();
    }
    for killed in [true, false] {
        let folder = if killed { agent.kill() } else { agent.terminate().1 };
        agent = Agent::start_in(folder, &["unix://{}/s"], &[]);
        let (client, session) = agent.session().await;
        assert_eq!(client.info().await.unwrap().usage.unwrap().cached_bytes, content.len() as u64);
        assert!(missing(client.link(), &session.id(), &content).await.unwrap().is_empty());
        let usage = client.info().await.unwrap().usage.unwrap();
        assert_eq!((usage.cached_bytes, usage.resource_bytes), (0, content.len() as u64));
    }
}

#[test]
fn a_second_agent_on_the_same_store_does_not_start() {
    let agent = Agent::unix(&[]);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    command.env("VACCEL_AGENT_STORE", agent.folder().join("store"));
    let output = command.args(["--address", "tcp://127.0.0.1:0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let text = crate::support::output_text(&output);
    for part in ["--store", "another agent", &agent.process.id().to_string()] {
        assert!(text.contains(part), "{text}");
    }
}
