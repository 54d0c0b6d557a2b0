//! Beginnings and ends: of calls, sessions, guests and agents.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use vaccel_client::{Client, Reason, ResourceFiles, Session, SessionOptions, Tensor, named};
use vaccel_proto::error::Detail;
use vaccel_proto::v1::operations_client::OperationsClient;
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::sessions_client::SessionsClient;
use vaccel_proto::v1::{NoopRequest, OpenSessionRequest, RenewSessionRequest, RunRequest, Usage};
use vaccel_proto::{Error, v1};

use crate::support::{Agent, PATIENCE, onnx, output_text, until, vaccel};

/// Side of the matrices of slow models, and steps that take longer than any test waits.
const SIDE: usize = 1024;
const STEPS_ENDLESS: usize = 8000;

/// What an idle agent may have of its own; it has 3 MB.
const IDLE_BYTES_MAX: u64 = 8 << 20;

async fn usage(client: &Client) -> Usage {
    client.info().await.unwrap().usage.unwrap()
}

fn square() -> Tensor {
    let side = i64::try_from(SIDE).unwrap();
    Tensor::new(&[side, side], &vec![0.0_f32; SIDE * SIDE]).unwrap()
}

fn slow(steps: usize) -> ResourceFiles {
    ResourceFiles::model("slow.onnx", onnx::slow(i64::try_from(SIDE).unwrap(), steps))
}

/// Runs a slow model in the background, and returns when the agent runs it too.
async fn running(
    session: &Session,
    observer: &Client,
    steps: usize,
) -> tokio::task::JoinHandle<Result<(), Error>> {
    let model = session.register(slow(steps)).await.unwrap();
    let session = session.clone();
    let call =
        tokio::spawn(async move { session.run(&model, vec![named("x", square())], &[]).await.map(drop) });
    // The observer's own call is one.
    until("a second call", async || usage(observer).await.calls_in_flight >= 2).await;
    call
}

#[tokio::test]
async fn a_guest_killed_in_the_middle_of_a_call_leaves_nothing_behind() {
    let agent = Agent::unix(&["--session-lease", "1", "--engine", "tract"]);
    let observer = agent.guest(0).await;
    assert_eq!(usage(&observer).await.sessions, 0);
    let resident = agent.resident();

    let folder = agent.folder();
    std::fs::write(folder.join("slow.onnx"), onnx::slow(i64::try_from(SIDE).unwrap(), STEPS_ENDLESS))
        .unwrap();
    let header = format!(
        "{:<117}\n",
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({SIDE}, {SIDE}), }}")
    );
    let npy = [&b"\x93NUMPY\x01\x00\x76\x00"[..], header.as_bytes(), &square().data];
    std::fs::write(folder.join("x.npy"), npy.concat()).unwrap();
    let mut command = vaccel();
    command.current_dir(folder).args([
        "--address",
        agent.address(),
        "run",
        "slow.onnx",
        "--input",
        "x=x.npy",
    ]);
    let mut guest = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("the guest's call", async || {
        assert!(guest.try_wait().unwrap().is_none(), "the guest ended by itself");
        let usage = usage(&observer).await;
        usage.calls_in_flight == 2 && usage.sessions == 1 && usage.resource_bytes > 0
    })
    .await;
    // In the model's run, and not only in its upload.
    until("the run's memory", async || agent.resident() > resident + (4 << 20)).await;

    guest.kill().unwrap();
    guest.wait().unwrap();
    until("the end of the call", async || usage(&observer).await.calls_in_flight == 1).await;
    until("the end of the session", async || {
        let usage = usage(&observer).await;
        usage.sessions == 0 && usage.resource_bytes == 0
    })
    .await;
    until("the memory", async || agent.resident() < resident + (32 << 20)).await;
}

#[tokio::test]
async fn a_guest_goes_on_after_its_agent_was_restarted() {
    let mut agent = Agent::unix(&[]);
    let (_client, session) = agent.session().await;
    let model = session.register(ResourceFiles::model("m.onnx", onnx::add())).await.unwrap();
    let answer = async || {
        let input = Tensor::new(&[1, 2], &[1.0_f32, 1.0]).unwrap();
        let run = session.run(&model, vec![named("x", input)], &[]).await.unwrap();
        run.outputs[0].tensor.as_ref().unwrap().elements::<f32>().unwrap().to_vec()
    };
    assert_eq!(answer().await, [2.0, 3.0]);
    for killed in [true, false] {
        let before = session.id();
        let folder = if killed { agent.kill() } else { agent.terminate().1 };
        agent = Agent::start_in(folder, &["unix://{}/s"], &[]);
        assert_eq!(answer().await, [2.0, 3.0]);
        assert_ne!(session.id(), before);
    }
}

#[test]
fn a_second_agent_on_the_same_socket_does_not_start() {
    let agent = Agent::unix(&[]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
    command.env("VACCEL_AGENT_STORE", agent.folder().join("another store"));
    let output = command.args(["--address", agent.address()]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output_text(&output).contains("living process"), "{}", output_text(&output));
    let mut command = vaccel();
    assert!(command.args(["--address", agent.address(), "info"]).output().unwrap().status.success());
}

#[tokio::test]
async fn a_session_outlives_its_connection_by_its_lease() {
    let agent = Agent::unix(&["--session-lease", "1"]);
    let observer = agent.guest(0).await;
    let open = async |client: &Client| {
        let request = OpenSessionRequest::default();
        SessionsClient::new(client.link().clone()).open(request).await.unwrap().into_inner().session
    };
    let renew = async |client: &Client, session: &str| {
        let request = RenewSessionRequest { session: session.into() };
        let reply = SessionsClient::new(client.link().clone()).renew(request).await;
        reply.map(drop).map_err(|status| Error::from_status(&status).reason())
    };
    let first = agent.guest(0).await;
    let (resumed, left) = (open(&first).await, open(&first).await);
    drop(first);
    // A new connection takes one of the two over; nobody takes the other.
    let second = agent.guest(0).await;
    renew(&second, &resumed).await.unwrap();
    until("the end of the other", async || observer.list_sessions().await.unwrap().len() == 1).await;
    assert_eq!(renew(&second, &left).await, Err(Reason::NotFound));
    renew(&second, &resumed).await.unwrap();
    drop(second);
    until("the end of both", async || observer.list_sessions().await.unwrap().is_empty()).await;
}

#[tokio::test]
async fn stopping_lets_running_calls_finish_and_takes_no_new_ones() {
    let mut agent = Agent::unix(&["--engine", "tract"]);
    let observer = agent.guest(0).await;
    let (client, session) = agent.session().await;
    let mut health = HealthClient::new(agent.guest(0).await.link().clone());
    let check = || HealthCheckRequest { service: String::new() };
    let mut watch = health.watch(check()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);

    let call = running(&session, &observer, 60).await;
    agent.signal("TERM");
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let refusal = until_draining(&client, &session.id()).await;
    assert!(matches!(refusal.detail(), Detail::RetryAfter(_)), "{refusal:?}");
    call.await.unwrap().expect("it was running before the signal");
    assert!(agent.process.wait().unwrap().success());
    assert!(!agent.folder().join("s").exists());
}

/// The refusal of a draining agent, as soon as there is one.
async fn until_draining(client: &Client, session: &str) -> Error {
    let begun = Instant::now();
    loop {
        let request = RunRequest {
            session: session.into(),
            op: Some(Op::Noop(NoopRequest {})),
            ..RunRequest::default()
        };
        match OperationsClient::new(client.link().clone()).run(request).await {
            Ok(_) => assert!(begun.elapsed() < PATIENCE, "the agent goes on serving"),
            Err(status) => {
                let refusal = Error::from_status(&status);
                assert_eq!(refusal.reason(), Reason::ShuttingDown, "{refusal:?}");
                return refusal;
            }
        }
    }
}

#[tokio::test]
async fn the_grace_ends_calls_that_do_not() {
    let mut agent = Agent::unix(&["--engine", "tract", "--grace", "0.2"]);
    let observer = agent.guest(0).await;
    let (_client, session) = agent.session().await;
    let once = vaccel_client::CallOptions { repeatable: false, ..Default::default() };
    let call = running(&session.with(once), &observer, STEPS_ENDLESS).await;
    agent.signal("TERM");
    assert!(agent.process.wait().unwrap().success());
    assert_eq!(call.await.unwrap().unwrap_err().reason(), Reason::Unreachable);
}

#[test]
fn settings_come_from_file_environment_and_flags_in_this_order() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("agent.toml");
    std::fs::write(&file, "lanes = 11\ngrace = 11\ncall-deadline = 11\naddress = ['unix://@x']").unwrap();
    let check = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
        command.args(["check-config", "--config", file.to_str().unwrap()]).args(arguments);
        command.env("VACCEL_AGENT_LANES", "22").env("VACCEL_AGENT_GRACE", "22").output().unwrap()
    };
    let output = check(&["--lanes", "33"]);
    let text = output_text(&output);
    assert!(output.status.success(), "{text}");
    for expected in ["lanes: 33,", "grace: 22s,", "call_deadline: 11s,", "\"x\""] {
        assert!(text.contains(expected), "{expected} is not in {text}");
    }
    assert_eq!(check(&["--lane", "3"]).status.code(), Some(2));
    std::fs::write(&file, "lane = 3").unwrap();
    let output = check(&[]);
    assert_eq!(output.status.code(), Some(78));
    assert!(output_text(&output).contains("lane"), "{}", output_text(&output));
}

#[test]
fn the_command_lists_the_operations() {
    let output = Command::new(env!("CARGO_BIN_EXE_vaccel-agent")).arg("ops").output().unwrap();
    let text = output_text(&output);
    for operation in vaccel_agent::operations() {
        assert!(text.contains(&operation.name), "{text}");
    }
}

#[tokio::test]
async fn an_idle_agent_is_small_and_soon_there() {
    let begun = Instant::now();
    let agent = Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0"], &[]);
    let ready = begun.elapsed();
    let info: v1::InfoReply = agent.guest(0).await.info().await.unwrap();
    let served = begun.elapsed();
    let own = agent.own();
    eprintln!("ready after {ready:?}, first call served after {served:?}, {} KiB of its own", own >> 10);
    assert!(info.usage.is_some());
    assert!(own <= IDLE_BYTES_MAX, "{own} bytes of its own");
    assert!(ready < Duration::from_secs(2), "ready after {ready:?}");
}

#[tokio::test]
async fn dropping_a_call_cancels_it_and_frees_its_lane() {
    let agent = Agent::unix(&["--engine", "tract", "--lanes", "1"]);
    let observer = agent.guest(0).await;
    let (_client, session) = agent.session().await;
    let call = running(&session, &observer, STEPS_ENDLESS).await;
    call.abort();
    until("the end of the call", async || usage(&observer).await.calls_in_flight == 1).await;
    let other = observer.open_session(SessionOptions::default()).await.unwrap();
    let image = bytes::Bytes::from(std::fs::read(&crate::support::digits("png")[0].0).unwrap());
    let labels = other.classify([image], vaccel_client::ClassifyOptions::default()).await.unwrap();
    assert_eq!(labels[0].len(), 1);
}
