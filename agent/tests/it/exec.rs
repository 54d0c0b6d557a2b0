//! Libraries that guests bring: what they compute, and that they can do nothing else.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vaccel_client::{
    Arg, ArgType, CallOptions, Error, Reason, Resource, ResourceFiles, ResourceKind, Session, SessionOptions,
    arg, room,
};

use crate::support::{Agent, PATIENCE, output_text, repository};

/// An agent with two addresses: libraries run for the tenants of the first.
fn agent() -> Agent {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("agent.toml"), "[[policy]]\ntenant = 'unix:*/first:*'\nexec = true\n")
        .unwrap();
    Agent::start_in(folder, &["unix://{}/first", "unix://{}/second"], &["--config", "{}/agent.toml"])
}

/// A file of this folder as a library.
pub fn compiled(folder: &Path, source: &str, flags: &[&str]) -> Vec<u8> {
    let (file, output) = (repository().join("agent/tests/it/exec").join(source), folder.join("library.so"));
    let mut command = Command::new("cc");
    command
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&output)
        .arg(file)
        .args(flags);
    let compiled = command.output().unwrap();
    assert!(compiled.status.success(), "{}", output_text(&compiled));
    std::fs::read(output).unwrap()
}

async fn session(agent: &Agent, address: usize) -> Session {
    agent.guest(address).await.open_session(SessionOptions::default()).await.unwrap()
}

async fn register(session: &Session, files: &[(&str, &[u8])]) -> Resource {
    let files = files.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec().into())).collect();
    session.register(ResourceFiles::new(ResourceKind::Library, files)).await.unwrap()
}

/// A session with the library.
async fn equipped(agent: &Agent) -> (Session, Resource) {
    let session = session(agent, 0).await;
    let library =
        register(&session, &[("library.so", &compiled(agent.folder(), "library.c", &["-lm"]))]).await;
    (session, library)
}

fn text(text: &str) -> Arg {
    arg(ArgType::String, [text.as_bytes(), &[0]].concat())
}

fn int(number: i32) -> Arg {
    arg(ArgType::Int32, number.to_le_bytes().to_vec())
}

fn place() -> Vec<Arg> {
    vec![room(ArgType::Int32, 4)]
}

async fn exec(
    session: &Session,
    library: &Resource,
    function: &str,
    read: Vec<Arg>,
    write: Vec<Arg>,
) -> Result<Vec<Arg>, Error> {
    Ok(session.exec_with_resource(library, function, read, write).await?.0)
}

fn number(written: &[Arg]) -> i32 {
    i32::from_le_bytes(written[0].data[..].try_into().unwrap())
}

/// Processes that the agent started.
fn workers(agent: &Agent) -> Vec<u32> {
    let pid = agent.process.id();
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    children
        .flat_map(|pids| pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

/// The letter of what a process does: `S`leeping, `R`unning, s`T`opped.
fn state(pid: u32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").map(|(_, rest)| rest[..1].to_owned()).unwrap_or_default()
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn functions_of_a_guests_library_compute() {
    let agent = agent();
    let (session, library) = equipped(&agent).await;
    assert_eq!(number(&exec(&session, &library, "add", vec![int(40), int(2)], place()).await.unwrap()), 42);
    let data: Vec<u8> = (0..5_000_000_u32).map(|index| (index % 251) as u8).collect();
    let place_for = vec![room(ArgType::Buffer, data.len() as u64)];
    let reversed = exec(&session, &library, "reverse", vec![arg(ArgType::Buffer, data.clone())], place_for)
        .await
        .unwrap();
    assert!(reversed[0].data.iter().eq(data.iter().rev()));
    let eight = arg(ArgType::Float64, 8_f64.to_le_bytes().to_vec());
    let root = exec(&session, &library, "root", vec![eight], vec![room(ArgType::Float64, 8)]).await.unwrap();
    assert_eq!(root[0].data[..], 2_f64.to_le_bytes());
    // It stays loaded, and stands still between calls.
    for calls in 1..=3 {
        assert_eq!(number(&exec(&session, &library, "count", vec![], place()).await.unwrap()), calls);
    }
    let [worker] = workers(&agent)[..] else { panic!("one process") };
    until("it stands still", || state(worker) == "T").await;
    // By its file's name, with any path before it.
    let by_name = [arg(ArgType::Uint8, vec![1]), text("/usr/lib/library.so"), text("count")];
    assert_eq!(number(&session.genop(by_name.to_vec(), place()).await.unwrap().0), 4);
    session.unregister(&library).await.unwrap();
    until("it is gone with its library", || workers(&agent).is_empty()).await;
    let refusal = exec(&session, &library, "count", vec![], place()).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::NotFound);
}

#[tokio::test]
async fn only_whom_the_host_trusts_with_it_brings_code() {
    let agent = agent();
    let library = compiled(agent.folder(), "library.c", &["-lm"]);
    let session = session(&agent, 1).await;
    let library = register(&session, &[("library.so", &library)]).await;
    let refusal = exec(&session, &library, "add", vec![int(1), int(2)], place()).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::Disabled);
    assert!(refusal.message().contains("exec = true"), "{refusal}");
    assert!(workers(&agent).is_empty());
}

#[tokio::test]
async fn a_library_reaches_nothing() {
    let agent = agent();
    let (session, library) = equipped(&agent).await;
    let loaded = number(&exec(&session, &library, "reached_when_loaded", vec![], place()).await.unwrap());
    assert_eq!(loaded, 0, "when it was loaded: {loaded:b}");
    let mut attempts = 0;
    loop {
        let tried = exec(&session, &library, "escape", vec![int(attempts)], place()).await;
        match number(&tried.unwrap_or_else(|error| panic!("attempt {attempts}: {error}"))) {
            0 => attempts += 1,
            2 => break,
            _ => panic!("attempt {attempts} did not fail"),
        }
    }
    assert_eq!(attempts, 44);
    let [worker] = workers(&agent)[..] else { panic!("one process") };
    let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
    for sets in ["CapInh:", "CapPrm:", "CapEff:"] {
        assert_eq!(u64::from_str_radix(line(sets), 16), Ok(0), "{sets}");
    }
    // No part of what a terminal, or a shell that ends, has the agent's processes in.
    let stat = std::fs::read_to_string(format!("/proc/{worker}/stat")).unwrap();
    let group = stat.rsplit_once(") ").unwrap().1.split(' ').nth(2).unwrap();
    assert_eq!(group, worker.to_string());
    let eaten = number(&exec(&session, &library, "eat", vec![], place()).await.unwrap());
    assert!((100..1024).contains(&eaten), "{eaten} MiB");
}

#[tokio::test]
async fn what_ends_a_librarys_process_is_one_calls_error() {
    let agent = agent();
    let (session, library) = equipped(&agent).await;
    let failed = async |function: &str, words: &str| {
        let error = exec(&session, &library, function, vec![], place()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::BackendFailed, "{function}: {error}");
        assert!(error.message().contains(words), "{function}: {error}");
    };
    failed("fail", "returned 7").await;
    failed("crash", "signal 11").await;
    failed("give_up", "signal").await;
    failed("leave", "code 3").await;
    failed("recurse", "signal").await;
    failed("overrun", "signal").await;
    let missing = exec(&session, &library, "missing", vec![], place()).await.unwrap_err();
    assert_eq!(missing.reason(), Reason::BadArgument);
    // More than was asked for is not read; whatever became of the rest, the next call is another process's or right.
    let babble = exec(&session, &library, "babble", vec![], place()).await;
    assert!(babble.is_err() || babble.unwrap()[0].data[..] == [0x5a; 4]);
    let spent =
        session.with(CallOptions { deadline: Some(Duration::from_millis(500)), ..CallOptions::default() });
    let late = exec(&spent, &library, "spin", vec![], place()).await.unwrap_err();
    assert_eq!(late.reason(), Reason::Deadline);
    until("nothing runs on", || workers(&agent).iter().all(|worker| state(*worker) != "R")).await;
    assert_eq!(number(&exec(&session, &library, "add", vec![int(1), int(2)], place()).await.unwrap()), 3);
}

#[tokio::test]
async fn a_library_that_goes_on_after_its_answer_stands_still() {
    let agent = agent();
    let (session, library) = equipped(&agent).await;
    let written = exec(&session, &library, "go_on", vec![], place()).await.unwrap();
    assert_eq!(written[0].data[..], [1, 2, 3, 4]);
    let [worker] = workers(&agent)[..] else { panic!("one process") };
    until("it stands still", || state(worker) == "T").await;
    // It does not answer the next call.
    let spent =
        session.with(CallOptions { deadline: Some(Duration::from_millis(500)), ..CallOptions::default() });
    assert!(exec(&spent, &library, "add", vec![int(1), int(2)], place()).await.is_err());
    until("it is killed", || state(worker) != "T" && state(worker) != "R").await;
    assert_eq!(number(&exec(&session, &library, "add", vec![int(1), int(2)], place()).await.unwrap()), 3);
}

#[tokio::test]
async fn libraries_that_cannot_be_loaded_say_why() {
    let agent = agent();
    let session = session(&agent, 0).await;
    let rejected = async |files: &[(&str, &[u8])], words: &[&str]| {
        let library = register(&session, files).await;
        let error = exec(&session, &library, "add", vec![int(1), int(2)], place()).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ModelRejected, "{error}");
        assert!(words.iter().all(|word| error.message().contains(word)), "{error}");
        assert!(!error.message().contains("/proc"), "{error}");
    };
    rejected(&[("text.so", b"no library at all")], &["text.so", "file too short"]).await;
    rejected(&[("long.so", &[b'x'; 5000])], &["long.so", "invalid ELF header"]).await;
    let needy = compiled(agent.folder(), "needy.c", &["-Wl,--unresolved-symbols=ignore-all"]);
    rejected(&[("needy.so", &needy)], &["needy.so", "of_another"]).await;
    // With the one that it needs before it.
    let other = compiled(agent.folder(), "other.c", &[]);
    let both = register(&session, &[("other.so", &other), ("needy.so", &needy)]).await;
    assert_eq!(number(&exec(&session, &both, "ask", vec![], place()).await.unwrap()), 17);
    let data = session.register(ResourceFiles::new(ResourceKind::Data, vec![("x".into(), vec![1].into())]));
    let refusal = exec(&session, &data.await.unwrap(), "add", vec![], place()).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::BadArgument);
}

#[tokio::test]
async fn a_library_that_is_let_go_of_while_it_runs_ends_with_its_call() {
    let agent = agent();
    let (session, library) = equipped(&agent).await;
    let running = exec(&session, &library, "nap", vec![int(300)], vec![]);
    let letting_go = async {
        until("it runs", || !workers(&agent).is_empty()).await;
        session.unregister(&library).await.unwrap();
    };
    let (ran, ()) = tokio::join!(running, letting_go);
    // Or it was not there any more when its turn came.
    assert!(ran.is_ok() || ran.unwrap_err().reason() == Reason::NotFound);
    until("it is gone", || workers(&agent).is_empty()).await;
}

#[tokio::test]
async fn a_name_that_two_libraries_have_is_refused() {
    let agent = agent();
    let session = session(&agent, 0).await;
    let other = compiled(agent.folder(), "other.c", &[]);
    for content in [&other[..], &[&other[..], &[0]].concat()] {
        register(&session, &[("same.so", content)]).await;
    }
    let by_name = [arg(ArgType::Uint8, vec![1]), text("same.so"), text("of_another")];
    let refusal = session.genop(by_name.to_vec(), vec![]).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::BadArgument);
    assert!(refusal.message().contains("holds 2"), "{refusal}");
}

#[tokio::test]
async fn processes_are_counted_and_end_with_their_session() {
    const MOST: usize = 8;
    let agent = agent();
    let code = compiled(agent.folder(), "library.c", &["-lm"]);
    let session = session(&agent, 0).await;
    // As many libraries as there are processes for, and one more, for which the others give way.
    for index in 0..=MOST {
        let library = register(&session, &[(&format!("{index}.so"), &code)]).await;
        assert_eq!(number(&exec(&session, &library, "count", vec![], place()).await.unwrap()), 1);
        assert!(workers(&agent).len() <= MOST);
    }
    // Another session's calls have room, too.
    let (others, library) = equipped(&agent).await;
    assert_eq!(number(&exec(&others, &library, "count", vec![], place()).await.unwrap()), 1);
    until("one gave way", || workers(&agent).len() <= MOST).await;
    session.close().await.unwrap();
    until("one is left", || workers(&agent).len() == 1).await;
    others.close().await.unwrap();
    until("all are gone", || workers(&agent).is_empty()).await;
    let (session, library) = equipped(&agent).await;
    exec(&session, &library, "count", vec![], place()).await.unwrap();
    let [worker] = workers(&agent)[..] else { panic!("one process") };
    drop(agent);
    until("it ends with the agent", || ["", "Z"].contains(&&*state(worker))).await;
}
