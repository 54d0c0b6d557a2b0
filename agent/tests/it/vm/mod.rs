//! Real AF_VSOCK: microVMs with a kernel, the agent and its guests, on a machine that needs no vsock of its own.
//!
//! The guests are `examples/guest-init`, the first process of each machine; what it is told to do are its steps. The
//! consoles of the machines of a failed test are kept in `target/vm/consoles`.

#![allow(clippy::print_stderr, reason = "figures, and where the consoles are")]

mod cpio;
mod image;
mod machine;

use std::path::Path;
use std::time::Instant;

use vaccel_client::proto::v1::RenewSessionRequest;
use vaccel_client::proto::v1::sessions_client::SessionsClient;
use vaccel_client::{
    CallOptions, ClassifyOptions, Client, Error, Reason, ResourceFiles, Session, SessionOptions, Tensor,
    named,
};

use self::image::{endless, initramfs};
use self::machine::{Device, FAILED, Machine, Model, PASSED, PORT, Plan};
use crate::support::{Agent, PATIENCE, connect, digits, endpoint, onnx, read, until};

/// CIDs of the machines.
const A: u32 = 3;
const B: u32 = 4;

/// How the guests call the agents: of their own machine, of machine A, and of the host.
const LOCAL: &str = "vsock://local:2048";
const SIBLING: &str = "vsock://3:2048";
const HOST: &str = "vsock://host:2048";

/// A port where nobody listens.
const CLOSED_PORT: u32 = 2049;

/// Memory of a machine with an agent, and of one without.
const AGENT_MIB: u32 = 256;
const GUEST_MIB: u32 = 128;

/// How far the scores of two processors may be apart, which add in different orders; those of one are the same.
const NEAR: f32 = 1e-4;

/// Numbers in a tensor of 8 MiB, and what a guest says that sent them through a model and back.
const NUMBERS: usize = 2 << 20;
const ECHOED: &str = "8388608 bytes came back as they went";

/// Computing time that tells that an agent is in the middle of a call, in the kernel's hundredths of a second: more
/// than it takes to read a request.
const BUSY_TICKS: u64 = 50;

/// What an image shows, and how surely.
#[derive(Debug)]
struct Seen {
    image: String,
    class: String,
    probability: f32,
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_siblings_and_hosts_meet_over_vsock() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::start(&[A, B]).await;
    // It listens before any guest dials: nobody else makes these sockets.
    let addresses = [device.address(A, PORT), device.address(B, PORT)];
    let host = Agent::start(&[&addresses[0], &addresses[1]], &["--engine", "tract"]);
    let (with_agent, without) = (initramfs(folder.path(), true), initramfs(folder.path(), false));
    let mut a = Machine::boot("a", &device, &plan(A, &with_agent, &["agent", "console"]));
    let mut b = Machine::boot("b", &device, &plan(B, &without, &["console"]));
    let seen = seen_by_the_host(&connect(&device.disguise(A)).await).await;
    a.wait_for("obeys");
    b.wait_for("obeys");

    the_host_uses_an_agent_in(&a, &device, &seen).await;
    uses_an_agent(&mut a, LOCAL, "vsock:1", &seen, NEAR);
    uses_an_agent(&mut b, SIBLING, "vsock:4", &seen, NEAR);
    let tenants = [tenant(&mut a, HOST), tenant(&mut b, HOST)];
    assert!(tenants[0] != tenants[1] && tenants.iter().all(|tenant| tenant.starts_with("hvsock:")));
    uses_an_agent(&mut a, HOST, &tenants[0], &seen, 0.0);
    uses_an_agent(&mut b, HOST, &tenants[1], &seen, 0.0);
    classify_by_themselves(&mut a, &[LOCAL, HOST], &seen);
    classify_by_themselves(&mut b, &[SIBLING, HOST], &seen);
    keeps_to_itself_what_it_holds(&mut a, &mut b, &device).await;

    finds_nobody(&mut a, &["vsock://local:2049", "vsock://host:2049"]);
    finds_nobody(&mut b, &["vsock://3:2049", "vsock://77:2048"]);
    let refusal = Client::builder(endpoint(&device.address(A, CLOSED_PORT))).connect().await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::Unreachable, "{refusal}");

    the_host_outlives_the_agent_in(&mut a, &device).await;
    outlives_the_agent_beside_it(&mut b, &mut a);
    outlives_the_agent_of_the_host(&mut a, host, &device).await;
    for mut machine in [a, b] {
        machine.tell("end");
        machine.end(PASSED);
    }
}

/// Virtio without PCI, as in Firecracker, and a guest that needs no hand on its console.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_on_virtio_mmio_does_its_steps_and_switches_off() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::start(&[A, B]).await;
    let _host = Agent::start(&[&device.address(A, PORT)], &["--engine", "tract"]);
    let initramfs = initramfs(folder.path(), false);
    let (classify, echo) = (format!("classify={HOST}"), format!("echo={HOST}"));
    let steps = [&classify[..], &echo];
    let guest = Plan { model: Model::Microvm, ..plan(A, &initramfs, &steps) };
    let guest = Machine::boot("microvm", &device, &guest);
    let lost = Plan { model: Model::Microvm, ..plan(B, &initramfs, &["no-step"]) };
    let lost = Machine::boot("microvm-lost", &device, &lost);
    let seen = seen_by_the_host(&connect(&device.disguise(A)).await).await;
    let said = guest.end(PASSED);
    let (images, rest) = said.split_at(seen.len());
    assert_seen(images, &seen, 0.0);
    assert_eq!(rest, [format!("done {classify}"), ECHOED.into(), format!("done {echo}")]);
    assert_eq!(lost.end(FAILED), ["failed: no-step: there is no such step"]);
}

fn plan<'a>(cid: u32, initramfs: &'a Path, steps: &'a [&'a str]) -> Plan<'a> {
    let memory_mib = if steps.contains(&"agent") { AGENT_MIB } else { GUEST_MIB };
    Plan { model: Model::Q35, cid, initramfs, memory_mib, steps }
}

/// A client of an agent in a machine, which may be slow to answer.
async fn reach(address: &str) -> Client {
    Client::builder(endpoint(address)).connect_timeout(PATIENCE).connect().await.unwrap()
}

/// What a client of the host is told about all images.
async fn seen_by_the_host(client: &Client) -> Vec<Seen> {
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let mut paths: Vec<_> = digits("png").into_iter().chain(digits("jpg")).map(|(path, _)| path).collect();
    paths.sort();
    let images = paths.iter().map(|path| read(path));
    let labels = session.classify(images, ClassifyOptions::default()).await.unwrap();
    session.close().await.unwrap();
    let seen = paths.iter().zip(labels).map(|(path, labels)| Seen {
        image: path.file_name().unwrap().to_str().unwrap().into(),
        class: labels[0].name.clone(),
        probability: labels[0].probability,
    });
    seen.collect()
}

/// A guest's lines say what the host was told.
fn assert_seen(lines: &[String], expected: &[Seen], near: f32) {
    assert_eq!(lines.len(), expected.len());
    for (line, expected) in lines.iter().zip(expected) {
        let words: Vec<&str> = line.split(' ').collect();
        let ["image", image, class, probability] = words[..] else { panic!("{line}") };
        assert_eq!((image, class), (&expected.image[..], &expected.class[..]));
        let apart = (probability.parse::<f32>().unwrap() - expected.probability).abs();
        assert!(apart <= near, "{line} instead of {expected:?}");
    }
}

/// Who the agent at this address takes the guest for.
fn tenant(machine: &mut Machine, address: &str) -> String {
    let said = machine.ask(&format!("info={address}")).unwrap();
    said[0].strip_prefix("tenant ").unwrap().to_owned()
}

/// A guest does everything there is to do with the agent at this address.
fn uses_an_agent(machine: &mut Machine, address: &str, expected: &str, seen: &[Seen], near: f32) {
    let begun = Instant::now();
    assert_eq!(tenant(machine, address), expected);
    assert_seen(&machine.ask(&format!("classify={address}")).unwrap(), seen, near);
    assert_eq!(machine.ask(&format!("echo={address}")).unwrap(), [ECHOED]);
    eprintln!("{address} as {expected}: {:.2?}", begun.elapsed());
}

/// The guests in C and in Rust get the same labels; their probabilities have four places.
fn classify_by_themselves(machine: &mut Machine, addresses: &[&str], seen: &[Seen]) {
    for address in addresses {
        for program in ["classify-c", "classify-rust"] {
            assert_seen(&machine.ask(&format!("{program}={address}")).unwrap(), seen, NEAR);
        }
    }
}

/// The host does the same with an agent in a machine.
async fn the_host_uses_an_agent_in(machine: &Machine, device: &Device, seen: &[Seen]) {
    let client = reach(&device.address(A, PORT)).await;
    assert_eq!(client.info().await.unwrap().tenant, "vsock:2");
    eprintln!("from switching on to the first reply: {:.2?}", machine.age());
    let begun = Instant::now();
    let labels = seen_by_the_host(&client).await;
    let line = |seen: &Seen| format!("image {} {} {}", seen.image, seen.class, seen.probability);
    assert_seen(&labels.iter().map(line).collect::<Vec<_>>(), seen, NEAR);
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let model = session.register(ResourceFiles::model("echo.onnx", onnx::echo())).await.unwrap();
    let numbers: Vec<f32> = (0..NUMBERS).map(|number| number as f32).collect();
    let sent = Tensor::new(&[i64::try_from(NUMBERS).unwrap()], &numbers).unwrap();
    let run = session.run(&model, vec![named("x", sent.clone())], &[]).await.unwrap();
    assert!(run.outputs[0].tensor.as_ref().unwrap().data == sent.data);
    session.close().await.unwrap();
    eprintln!("the host in the machine: {:.2?}", begun.elapsed());
}

/// What the guest of one machine holds, that of another can neither see nor use: their paths tell them apart.
async fn keeps_to_itself_what_it_holds(a: &mut Machine, b: &mut Machine, device: &Device) {
    a.ask(&format!("hold={HOST}")).unwrap();
    let why = b.ask(&format!("borrow={HOST}")).unwrap_err();
    assert!(why.starts_with("NOT_FOUND"), "{why}");
    let (of_a, of_b) = (connect(&device.disguise(A)).await, connect(&device.disguise(B)).await);
    let sessions = of_a.list_sessions().await.unwrap();
    let held = sessions.iter().find(|session| session.resources > 0).unwrap();
    let renew = async |client: &Client| {
        let request = RenewSessionRequest { session: held.session.clone() };
        let reply = SessionsClient::new(client.link().clone()).renew(request).await;
        reply.map(drop).map_err(|status| Error::from_status(&status).reason())
    };
    assert_eq!(renew(&of_b).await, Err(Reason::NotFound));
    renew(&of_a).await.unwrap();
}

/// Calls to where nobody is fail by their deadline. Not every device tells the guest that nobody is there.
fn finds_nobody(machine: &mut Machine, addresses: &[&str]) {
    machine.ask("deadline=500").unwrap();
    for address in addresses {
        let begun = Instant::now();
        let why = machine.ask(&format!("info={address}")).unwrap_err();
        assert!(why.starts_with("UNREACHABLE") || why.starts_with("DEADLINE"), "{why}");
        assert!(begun.elapsed() < PATIENCE, "{why} after {:?}", begun.elapsed());
        eprintln!("{address}: {why} after {:.2?}", begun.elapsed());
    }
    machine.ask("deadline=60000").unwrap();
}

/// A call that its agent does not outlive fails, and the next one finds another agent.
async fn the_host_outlives_the_agent_in(machine: &mut Machine, device: &Device) {
    let client = reach(&device.address(A, PORT)).await;
    let session = client.open_session(SessionOptions::default()).await.unwrap();
    let call = tokio::spawn(run_endless(session.clone()));
    machine.ask("busy").unwrap();
    machine.ask("kill").unwrap();
    let failure = call.await.unwrap().unwrap_err();
    assert_eq!(failure.reason(), Reason::Unreachable, "{failure}");
    machine.ask("agent").unwrap();
    session.noop().await.unwrap();
}

async fn run_endless(session: Session) -> Result<(), Error> {
    let model = session.register(ResourceFiles::model("endless.onnx", endless())).await?;
    let once = session.with(CallOptions { repeatable: false, ..Default::default() });
    let number = Tensor::new(&[1, 1], &[0.0_f32])?;
    once.run(&model, vec![named("x", number)], &[]).await.map(drop)
}

fn outlives_the_agent_beside_it(machine: &mut Machine, sibling: &mut Machine) {
    let step = format!("endless={SIBLING}");
    machine.tell(&step);
    sibling.ask("busy").unwrap();
    sibling.ask("kill").unwrap();
    let why = machine.hear(&step).unwrap_err();
    assert!(why.starts_with("UNREACHABLE"), "{why}");
    sibling.ask("agent").unwrap();
    assert_eq!(machine.ask(&format!("echo={SIBLING}")).unwrap(), [ECHOED]);
}

async fn outlives_the_agent_of_the_host(machine: &mut Machine, host: Agent, device: &Device) {
    let step = format!("endless={HOST}");
    let begun = ticks(&host);
    machine.tell(&step);
    until("computing", async || ticks(&host) >= begun + BUSY_TICKS).await;
    host.kill();
    let why = machine.hear(&step).unwrap_err();
    assert!(why.starts_with("UNREACHABLE"), "{why}");
    let address = device.address(A, PORT);
    let host = Agent::start(&[&address], &[]);
    assert_eq!(machine.ask(&format!("echo={HOST}")).unwrap(), [ECHOED]);

    // The device does not tell the guest of an agent that dies before it reads: the deadline has to.
    host.signal("STOP");
    machine.ask("deadline=500").unwrap();
    let step = format!("info={HOST}");
    machine.tell(&step);
    host.kill();
    machine.hear(&step).unwrap_err();
    let _host = Agent::start(&[&address], &[]);
    machine.ask("deadline=60000").unwrap();
    assert_eq!(machine.ask(&format!("echo={HOST}")).unwrap(), [ECHOED]);
}

/// Time an agent was on a processor, in hundredths of a second.
fn ticks(agent: &Agent) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.process.id())).unwrap();
    // The name is in parentheses and may hold anything; user and system time are the 12th and 13th fields after it.
    let fields = stat.rsplit(") ").next().unwrap().split(' ');
    fields.skip(11).take(2).map(|time| time.parse::<u64>().unwrap()).sum()
}
