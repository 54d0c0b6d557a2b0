//! Memory that agent and client share: the same results as through the socket, and nothing that a tenant can do with
//! it to the agent or to others.

mod guests;

use std::io::{BufRead, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vaccel_client::proto::v1::operations_client::OperationsClient;
use vaccel_client::proto::v1::run_reply::Outcome;
use vaccel_client::proto::v1::run_request::Op;
use vaccel_client::proto::v1::{ModelRunRequest, NamedTensor, Place, RunReply, RunRequest, Shared};
use vaccel_client::shared::Mapping;
use vaccel_client::{
    Client, DType, Error, Reason, Resource, ResourceFiles, Session, SessionOptions, Sgemm, Tensor, named,
};

use crate::support::{Agent, endpoint, onnx, onnxruntime, socket_path};

const MEBIBYTE: usize = 1 << 20;

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|at| (at % 1000) as f32 / 8.0).collect()
}

fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn tensor(data: impl Into<Bytes>) -> Tensor {
    let data = data.into();
    Tensor::from_bytes(DType::F32, &[(data.len() / 4) as i64], data)
}

/// A region as any program could get it.
struct Raw {
    name: String,
    file: OwnedFd,
    mapping: Arc<Mapping>,
    connection: UnixStream,
}

/// Asks for memory in these words. An agent's refusal otherwise.
fn ask(agent: &Agent, words: &[u8], bytes: usize) -> Result<Raw, String> {
    let mut connection = UnixStream::connect(socket_path(agent.address())).unwrap();
    connection.write_all(words).unwrap();
    let mut line = [0; 512];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut line)];
    let received = recvmsg(&connection, &mut into, &mut control, RecvFlags::empty()).unwrap();
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let file = files.flatten().next();
    let text = String::from_utf8(line[..received.bytes].to_vec()).unwrap();
    let Some(name) = text.strip_prefix("OK ") else { return Err(text) };
    let file = file.expect("with OK comes the memory");
    let mapping = Mapping::new(&file, bytes).unwrap();
    Ok(Raw { name: name.trim_end().into(), file, mapping, connection })
}

fn region(agent: &Agent, bytes: usize) -> Raw {
    ask(agent, format!("VACCEL-MEMORY/1 {bytes}\n").as_bytes(), bytes).expect("there is memory")
}

/// What is answered to a wish, whole or its first line.
fn told(connection: impl Read + Write, wish: &str) -> String {
    try_told(connection, wish).unwrap()
}

fn try_told(mut connection: impl Read + Write, wish: &str) -> std::io::Result<String> {
    connection.write_all(format!("VACCEL-MEMORY/1 {wish}\n").as_bytes())?;
    let mut line = String::new();
    std::io::BufReader::new(connection).read_line(&mut line)?;
    Ok(line)
}

/// A model that gives back what it gets, doubled.
fn double() -> Bytes {
    let node = onnx::node("Add", &["x", "x"], &["y"]);
    let any = |name| onnx::port(name, 1, &[-1]);
    onnx::model(vec![node], vec![], vec![any("x")], vec![any("y")])
}

/// A session with that model.
async fn doubling(agent: &Agent) -> (Session, Resource) {
    doubling_at(agent.address()).await
}

async fn doubling_at(address: &str) -> (Session, Resource) {
    let client = Client::builder(endpoint(address)).connect().await.unwrap();
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let model = session.register(ResourceFiles::model("m", double())).await.unwrap();
    (session, model)
}

/// Runs a model with a request of one's own.
async fn run(
    session: &Session,
    model: &Resource,
    inputs: Vec<NamedTensor>,
    shared: Shared,
) -> Result<RunReply, Error> {
    let run = ModelRunRequest { model: model.id().into(), inputs, ..Default::default() };
    let request = RunRequest {
        session: session.id(),
        shared: Some(shared),
        op: Some(Op::ModelRun(run)),
        ..RunRequest::default()
    };
    let reply = OperationsClient::new(session.client().link().clone()).run(request).await;
    reply.map(tonic::Response::into_inner).map_err(|status| Error::from_status(&status))
}

fn outputs(reply: &RunReply) -> &[NamedTensor] {
    match &reply.outcome {
        Some(Outcome::ModelRun(run)) => &run.outputs,
        other => panic!("{other:?}"),
    }
}

/// Sockets of this machine.
const NEAR: &[&str] = &["unix://{}/s", "unix://@vaccel-shared-{}", "tcp://127.0.0.1:0", "tcp://[::1]:0"];

#[tokio::test]
async fn results_are_the_same_with_and_without() {
    let agent = Agent::start(NEAR, &["--engine", "tract"]);
    for address in &agent.addresses {
        results_are_the_same_at(address).await;
    }
}

async fn results_are_the_same_at(address: &str) {
    let (session, model) = doubling_at(address).await;
    for count in [1, 20_000, 70_000, 300_000, 4_000_000, 9_000_000] {
        let given = numbers(count);
        let doubled: Vec<f32> = given.iter().map(|x| x * 2.0).collect();
        let mut own = session.client().buffer(4 * count).await;
        own.copy_from_slice(&bytes_of(&given));
        assert_eq!(own.is_shared(), count >= 20_000, "{count}");
        let own = own.freeze();
        for data in [Bytes::from(bytes_of(&given)), own.clone(), own] {
            // The second time there is room for the reply, too.
            for _ in 0..2 {
                let run = session.run(&model, vec![named("x", tensor(data.clone()))], &[]).await.unwrap();
                let got = run.outputs[0].tensor.as_ref().unwrap();
                assert!(got.elements::<f32>().unwrap() == doubled, "{count}");
            }
        }
    }
}

#[tokio::test]
async fn many_calls_at_a_time_share_a_region_and_keep_what_is_theirs() {
    let agent = Agent::unix(&["--engine", "tract", "--tenant-calls-max", "100"]);
    let (session, model) = doubling(&agent).await;
    assert!(session.client().buffer(MEBIBYTE).await.is_shared());
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..200_usize {
        let (session, model) = (session.clone(), model.clone());
        calls.spawn(async move {
            let given = vec![number as f32; 100_000 + 1000 * (number % 7)];
            let run = session.run(&model, vec![named("x", tensor(bytes_of(&given)))], &[]).await.unwrap();
            (number, given.len(), run.outputs[0].tensor.clone().unwrap())
        });
        if calls.len() == 16 {
            let (number, count, got) = calls.join_next().await.unwrap().unwrap();
            assert!(got.elements::<f32>().unwrap() == vec![2.0 * number as f32; count], "{number}");
        }
    }
    // All replies are still there, each with its own numbers.
    for (number, count, got) in calls.join_all().await {
        assert!(got.elements::<f32>().unwrap() == vec![2.0 * number as f32; count], "{number}");
    }
}

#[tokio::test]
async fn whoever_wants_a_buffer_waits_for_the_region() {
    let agent = Agent::unix(&[]);
    let (session, _) = doubling(&agent).await;
    let buffers: tokio::task::JoinSet<_> = (0..16)
        .map(|_| {
            let session = session.clone();
            async move { session.client().buffer(MEBIBYTE).await.is_shared() }
        })
        .collect();
    assert_eq!(buffers.join_all().await, [true; 16]);
}

#[tokio::test]
async fn products_of_matrices_use_it_too() {
    let agent = Agent::unix(&[]);
    let (session, _) = doubling(&agent).await;
    let side = 512_i64;
    let ones = || Tensor::new(&[side, side], &vec![1.0_f32; 512 * 512]).unwrap();
    for _ in 0..3 {
        let c = session.sgemm(Sgemm::new(ones(), ones()).unwrap()).await.unwrap();
        assert!(c.elements::<f32>().unwrap().iter().all(|x| *x == 512.0));
    }
}

#[tokio::test]
async fn a_restarted_agent_gives_another_region() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let (session, model) = doubling(&agent).await;
    let kept = session.client().buffer(MEBIBYTE).await;
    assert!(kept.is_shared());
    let given = kept.freeze();
    session.run(&model, vec![named("x", tensor(given.clone()))], &[]).await.unwrap();
    let address = agent.address().to_owned();
    let (_, folder) = agent.terminate();
    let again = Agent::start_in(folder, &["unix://{}/s"], &["--engine", "tract"]);
    assert_eq!(again.address(), address);
    // What lies in the old memory is data as any other now.
    for _ in 0..3 {
        let run = session.run(&model, vec![named("x", tensor(given.clone()))], &[]).await.unwrap();
        assert!(run.outputs[0].tensor.as_ref().unwrap().elements::<f32>().unwrap().iter().all(|x| *x == 0.0));
    }
    assert!(session.client().buffer(MEBIBYTE).await.is_shared());
}

#[tokio::test]
async fn a_program_of_its_own_reads_and_writes_in_place() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let (session, model) = doubling(&agent).await;
    let raw = region(&agent, MEBIBYTE);
    assert!(raw.mapping.write(4096, &bytes_of(&numbers(50_000))));
    let shared = Shared {
        region: raw.name.clone(),
        places: vec![Place { offset: 4096, bytes: 200_000 }],
        room: Some(Place { offset: 300_001, bytes: 300_000 }),
    };
    let input = || vec![named("x", Tensor { shape: vec![50_000], ..tensor(Bytes::new()) })];
    let reply = run(&session, &model, input(), shared.clone()).await.unwrap();
    let [Place { offset, bytes: 200_000 }] = reply.places[..] else { panic!("{:?}", reply.places) };
    assert!((300_001..600_001 - 200_000).contains(&offset));
    assert!(outputs(&reply)[0].tensor.as_ref().unwrap().data.is_empty());
    let begin = usize::try_from(offset).unwrap();
    let got = raw.mapping.view(begin..begin + 200_000).unwrap();
    assert!(got == bytes_of(&numbers(50_000).iter().map(|x| x * 2.0).collect::<Vec<_>>()));
    // Without room, or without enough, the reply comes as ever.
    for room in [None, Some(Place { offset: 0, bytes: 199_999 })] {
        let reply = run(&session, &model, input(), Shared { room, ..shared.clone() }).await.unwrap();
        assert!(reply.places.is_empty());
        assert_eq!(outputs(&reply)[0].tensor.as_ref().unwrap().data.len(), 200_000);
    }
}

#[tokio::test]
async fn what_is_copied_is_the_tenants_bytes_in_flight() {
    let library = onnxruntime();
    let flags = ["--engine", "onnxruntime", "--onnxruntime", library.to_str().unwrap()];
    let agent = Agent::unix(&[&flags[..], &["--tenant-in-flight-mib", "1"]].concat());
    let (session, model) = doubling(&agent).await;
    let raw = region(&agent, 4 * MEBIBYTE);
    let place = Place { offset: 0, bytes: 2 << 20 };
    let shared = Shared { region: raw.name, places: vec![place], room: None };
    let input = named("x", Tensor { shape: vec![1 << 19], ..tensor(Bytes::new()) });
    let refusal = run(&session, &model, vec![input], shared).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::QuotaExceeded, "{refusal}");
    session.noop().await.unwrap();
}

#[tokio::test]
async fn memory_cannot_be_made_shorter_and_goes_with_its_connection() {
    let agent = Agent::unix(&["--tenant-shared-mib", "2"]);
    let (session, model) = doubling(&agent).await;
    let limits = session.client().info().await.unwrap().limits.unwrap();
    assert_eq!(limits.shared_bytes_max, 2 << 20);
    let raw = region(&agent, 2 * MEBIBYTE);
    assert!(ftruncate(&raw.file, 4096).is_err());
    assert!(fcntl_add_seals(&raw.file, SealFlags::WRITE).is_err());
    let refusal = ask(&agent, b"VACCEL-MEMORY/1 1\n", 1).err().expect("all is given away");
    assert!(refusal.starts_with("ERROR QUOTA_EXCEEDED: shared memory of this tenant"), "{refusal}");
    drop(raw.connection);
    // When the region is gone, so is its place in the limit; the agent notices as soon as it looks.
    let input = || vec![named("x", Tensor { shape: vec![16], ..tensor(Bytes::new()) })];
    let shared = Shared { region: raw.name, places: vec![Place { offset: 0, bytes: 64 }], room: None };
    while run(&session, &model, input(), shared.clone()).await.is_ok() {}
    let gone = run(&session, &model, input(), shared).await.unwrap_err();
    assert_eq!(gone.reason(), Reason::NotFound);
    region(&agent, 2 * MEBIBYTE);
}

#[tokio::test]
async fn wishes_that_cannot_be_met_are_answered_in_words() {
    let agent = Agent::start(&["unix://{}/a", "hvsock://{}/v:5"], &["--tenant-shared-mib", "4"]);
    for (words, answer) in [
        ("VACCEL-MEMORY/1 0\n", "ERROR BAD_ARGUMENT: bytes"),
        ("VACCEL-MEMORY/1 many\n", "ERROR BAD_ARGUMENT: bytes"),
        ("VACCEL-MEMORY/1 -1\n", "ERROR BAD_ARGUMENT: bytes"),
        ("VACCEL-MEMORY/1 18446744073709551616\n", "ERROR BAD_ARGUMENT: bytes"),
        ("VACCEL-MEMORY/1 999999999999999999999999\n", "ERROR BAD_ARGUMENT: bytes"),
        (&*format!("VACCEL-MEMORY/1 {}", "9".repeat(300)), "ERROR BAD_ARGUMENT: bytes"),
        ("VACCEL-MEMORY/1 18446744073709551615\n", "ERROR QUOTA_EXCEEDED: "),
        ("VACCEL-MEMORY/1 4194305\n", "ERROR QUOTA_EXCEEDED: "),
    ] {
        let refusal = ask(&agent, words.as_bytes(), 1).err().expect(words);
        assert!(refusal.starts_with(answer) && refusal.ends_with('\n'), "{words:?}: {refusal}");
    }
    let vm = agent.addresses[1].strip_prefix("hvsock://").unwrap().replace(":5", "_5");
    let refusal = told(UnixStream::connect(vm).unwrap(), "4096");
    assert_eq!(
        refusal,
        "ERROR DENIED: shared memory is for callers from this machine, over unix sockets or TCP\n"
    );
    // An agent that gives none is no reason for a client to fail.
    let none = Agent::unix(&["--engine", "tract", "--tenant-shared-mib", "0"]);
    let (session, model) = doubling(&none).await;
    assert!(!session.client().buffer(MEBIBYTE).await.is_shared());
    session.run(&model, vec![named("x", tensor(vec![0; MEBIBYTE]))], &[]).await.unwrap();
}

#[tokio::test]
async fn places_are_checked_and_regions_are_their_tenants_own() {
    let agent = Agent::start(&["unix://{}/a", "unix://{}/b"], &["--engine", "tract"]);
    let (session, model) = doubling(&agent).await;
    let raw = region(&agent, MEBIBYTE);
    let empty = || named("x", Tensor { shape: vec![16], ..tensor(Bytes::new()) });
    let full = || named("x", tensor(vec![0; 64]));
    let place = |offset, bytes| Place { offset, bytes };
    let shared = |places: Vec<Place>, room| Shared { region: raw.name.clone(), places, room };
    let end = MEBIBYTE as u64;
    let cases = [
        (empty(), shared(vec![place(end - 63, 64)], None), "shared.places[0]"),
        (empty(), shared(vec![place(u64::MAX, 64)], None), "shared.places[0]"),
        (empty(), shared(vec![place(0, u64::MAX)], None), "shared.places[0]"),
        (empty(), shared(vec![place(0, 63)], None), "inputs[0]"),
        (empty(), shared(vec![place(0, 64); 2], None), "shared.places"),
        (full(), shared(vec![place(0, 64)], None), "shared.places[0]"),
        (full(), shared(vec![], Some(place(1, end))), "shared.room"),
        (full(), shared(vec![], Some(place(u64::MAX, u64::MAX))), "shared.room"),
    ];
    for (input, shared, field) in cases {
        let refusal = run(&session, &model, vec![input], shared.clone()).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::BadArgument, "{shared:?}: {refusal}");
        assert!(refusal.message().contains(field), "{shared:?}: {refusal}");
    }
    for name in ["", "0", &"0".repeat(32), &raw.name[1..], &"x".repeat(100_000)] {
        let shared = Shared { region: name.into(), ..Shared::default() };
        let refusal = run(&session, &model, vec![full()], shared).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::NotFound, "{name:?}");
        assert!(refusal.message().len() < 1000);
    }
    // Another tenant that knows the name sees what it would see without.
    let other = agent.guest(1).await.open_session(SessionOptions::default()).await.unwrap();
    let own = other.register(ResourceFiles::model("m", onnx::echo())).await.unwrap();
    let refusal = run(&other, &own, vec![empty()], shared(vec![place(0, 64)], None)).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::NotFound);
    run(&session, &model, vec![empty()], shared(vec![place(0, 64)], None)).await.unwrap();
}

#[tokio::test]
async fn a_region_that_goes_during_a_run_stays_for_the_run() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let (session, _) = doubling(&agent).await;
    let slow = session.register(ResourceFiles::model("slow", onnx::slow(256, 200))).await.unwrap();
    let bytes = 256 * 256 * 4;
    loop {
        let raw = region(&agent, MEBIBYTE);
        let shared = Shared {
            region: raw.name.clone(),
            places: vec![Place { offset: 0, bytes }],
            room: Some(Place { offset: bytes, bytes }),
        };
        let input = Tensor::from_bytes(DType::F32, &[256, 256], Bytes::new());
        let (session, slow) = (session.clone(), slow.clone());
        let running = tokio::spawn({
            let session = session.clone();
            async move { run(&session, &slow, vec![named("x", input)], shared).await }
        });
        while !agent.computes() && !running.is_finished() {
            tokio::task::yield_now().await;
        }
        drop(raw);
        match running.await.unwrap() {
            Ok(reply) => break assert_eq!(reply.places.len(), 1),
            // It was busy with something else, and the region went before the call came.
            Err(error) => assert_eq!(error.reason(), Reason::NotFound, "{error}"),
        }
    }
    session.noop().await.unwrap();
}

/// A unix socket that is reached by the name that an agent on TCP told.
fn annex(name: &str) -> UnixStream {
    UnixStream::connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap()).unwrap()
}

#[test]
fn tickets_are_valid_once_and_while_they_are_wanted() {
    let agent = Agent::start(&["tcp://127.0.0.1:0"], &["--tenant-shared-mib", "2"]);
    let tcp = || std::net::TcpStream::connect(agent.address().trim_start_matches("tcp://")).unwrap();
    let ticket = |connection: &std::net::TcpStream| {
        let told = told(connection, "2097152");
        let (name, ticket) = told.trim_end().strip_prefix("AT ")?.split_once(' ')?;
        Some((name.to_owned(), ticket.to_owned()))
    };
    let first = tcp();
    let (name, one) = ticket(&first).expect("there is memory");
    let refusal = told(tcp(), "1");
    assert!(refusal.starts_with("ERROR QUOTA_EXCEEDED: shared memory of this tenant"), "{refusal}");
    // Guesses, what is no ticket, and what is no wish at all.
    for wish in ["", "1", &"0".repeat(32), &one[1..], &format!("{one} {one}")] {
        assert_eq!(told(annex(&name), wish), "ERROR DENIED: expected a ticket that is valid\n", "{wish:?}");
    }
    let mut http = annex(&name);
    http.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    assert_eq!(http.read_to_end(&mut Vec::new()).unwrap_or(0), 0);
    assert!(told(annex(&name), &one).starts_with("OK "));
    assert_eq!(told(annex(&name), &one), "ERROR DENIED: expected a ticket that is valid\n");
    drop(first);
    // The agent notices as soon as it looks that nobody wants it any more.
    let offered = || loop {
        let connection = tcp();
        if let Some(offered) = ticket(&connection) {
            break offered;
        }
    };
    let (name, unused) = offered();
    offered();
    assert_eq!(told(annex(&name), &unused), "ERROR DENIED: expected a ticket that is valid\n");
}

#[test]
fn connections_for_memory_leave_half_to_those_for_calls() {
    let path = |agent: &Agent| socket_path(agent.address());
    let wish = |agent: &Agent| {
        let connection = UnixStream::connect(path(agent)).unwrap();
        let told = told(&connection, "4096");
        (connection, told)
    };
    for (flag, refusal) in [
        (
            "--tenant-connections-max",
            "ERROR QUOTA_EXCEEDED: connections of this tenant, for what can be done without",
        ),
        ("--connections-max", "ERROR OVERLOADED: the agent has too many connections"),
    ] {
        let agent = Agent::unix(&[flag, "8"]);
        let mut kept: Vec<_> = (0..4).map(|_| wish(&agent)).collect();
        assert!(kept.iter().all(|(_, told)| told.starts_with("OK ")), "{kept:?}");
        let (connection, told) = wish(&agent);
        assert!(told.starts_with(refusal), "{told}");
        drop(connection);
        // All others are there for calls.
        let guests: Vec<_> = (0..4)
            .map(|_| {
                let mut guest = crate::guest::guest(agent.address());
                guest.noop().unwrap();
                guest
            })
            .collect();
        drop(guests);
        kept.clear();
        // The agent notices as soon as it looks, and has no connection for anybody before.
        let again = || try_told(UnixStream::connect(path(&agent)).unwrap(), "4096");
        while !again().is_ok_and(|told| told.starts_with("OK ")) {}
    }
}
