//! Agents that are killed in the middle of uploads.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use vaccel_client::{Link, Resource, ResourceFiles, ResourceKind};

use super::{Numbers, hexadecimal, missing, sha256, stored, upload};
use crate::support::Agent;

const KILLS: usize = 200;

/// Files that go up at the same time, their size, and how much of one goes up in one call.
const UPLOADS: usize = 4;
const FILE_BYTES: usize = 300_000;
const CALL_BYTES: usize = 50_000;

/// An agent is killed at most so late, in microseconds: about as long as the uploads take.
const MOMENT_MICROS_MAX: u64 = 10_000;

/// Longest time in which a killed agent's successor must serve on a slow and busy machine; `benches/store.rs` measures.
const RESTART_MAX: Duration = Duration::from_secs(3);

/// Brings one file, in several calls, so that there are many moments; says whether a part of it was there already. None
/// when the agent was killed meanwhile.
async fn bring(link: Link, session: String, content: Bytes) -> Option<bool> {
    let Some(missing) = missing(&link, &session, &content).await.ok()?.pop() else { return Some(true) };
    let had = usize::try_from(missing.offset).unwrap();
    let mut at = had;
    loop {
        let end = content.len().min(at + CALL_BYTES);
        upload(&link, &session, &content, at..end).await.ok()?;
        if end == content.len() {
            return Some(had > 0);
        }
        at = end;
    }
}

/// What the killed agents left behind, as far as it was looked at.
#[derive(Default)]
struct Seen {
    /// Files that some agent answered to be complete.
    complete: BTreeSet<String>,
    /// Files whose content was compared with their name. They are not written to again.
    whole: BTreeSet<PathBuf>,
    resumed: usize,
}

impl Seen {
    fn completed(&mut self, content: &[u8], was_resumed: bool) {
        self.complete.insert(hexadecimal(&sha256(content)));
        self.resumed += usize::from(was_resumed);
    }

    /// Every complete file has the hash that is its name, and none is gone.
    fn look(&mut self, agent: &Agent) {
        let paths = stored(agent.folder(), "complete");
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        let names: BTreeSet<_> = paths.iter().map(name).collect();
        for path in paths {
            if !self.whole.contains(&path) {
                assert_eq!(hexadecimal(&sha256(&std::fs::read(&path).unwrap())), name(&path));
                self.whole.insert(path);
            }
        }
        let lost: Vec<_> = self.complete.difference(&names).collect();
        assert!(lost.is_empty(), "answered as complete and gone: {lost:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_moment_an_agent_is_killed_at_files_are_whole_or_absent() {
    let mut numbers = Numbers(1);
    let mut agent = Agent::unix(&[]);
    let mut files: Vec<Bytes> = (0..UPLOADS).map(|_| numbers.bytes(FILE_BYTES)).collect();
    let mut seen = Seen::default();
    let (mut slowest, mut total) = (Duration::ZERO, Duration::ZERO);
    for kill in 0..KILLS {
        let (client, session) = agent.session().await;
        let mut uploads = JoinSet::new();
        for (index, content) in files.iter().cloned().enumerate() {
            let upload = bring(client.link().clone(), session.id(), content);
            uploads.spawn(async move { (index, upload.await) });
        }
        let mut done = Vec::new();
        let all = async {
            while let Some(one) = uploads.join_next().await {
                done.push(one.unwrap());
            }
        };
        let moment = Duration::from_micros(numbers.next() % MOMENT_MICROS_MAX);
        let _ = tokio::time::timeout(moment, all).await;
        let folder = agent.kill();
        done.extend(uploads.join_all().await);
        let begun = Instant::now();
        agent = Agent::start_in(folder, &["unix://{}/s"], &["--log", "warn"]);
        let took = begun.elapsed();
        (slowest, total) = (slowest.max(took), total + took);
        assert!(took < RESTART_MAX, "kill {kill}: the next agent listened after {took:?}");
        for (index, outcome) in done {
            if let Some(was_resumed) = outcome {
                seen.completed(&files[index], was_resumed);
                files[index] = numbers.bytes(FILE_BYTES);
            }
        }
        seen.look(&agent);
    }
    let mean = total / u32::try_from(KILLS).unwrap();
    let Seen { complete, resumed, .. } = &seen;
    eprintln!(
        "{KILLS} kills: {} files complete, {resumed} of them resumed; the next agent listened after {mean:?}, at \
         most {slowest:?}",
        complete.len()
    );
    assert!(complete.len() > KILLS / 4 && *resumed > 0, "the moments prove nothing");
    seen.whole.clear();
    seen.look(&agent);
    everything_is_served(&agent, files).await;
}

/// What is complete is held without an upload and read back as it was; what is not goes up.
async fn everything_is_served(agent: &Agent, files: Vec<Bytes>) {
    let (client, session) = agent.session().await;
    for content in files {
        let named = ResourceFiles::new(ResourceKind::Data, vec![("f".into(), content.clone())]);
        let resource: Resource = session.register(named).await.unwrap();
        let mut reader = session.read_resource(&resource, "f", 0, 0).await.unwrap();
        assert!(reader.rest().await.unwrap() == content);
    }
    for path in stored(agent.folder(), "complete").into_iter().step_by(7) {
        let content = std::fs::read(path).unwrap();
        assert!(missing(client.link(), &session.id(), &content).await.unwrap().is_empty());
    }
}
