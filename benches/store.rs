//! What a large resource costs: memory of the agent, throughput, bytes sent again after a cut, and how soon an agent
//! with a large store serves.
//!
//! `cargo bench --bench store` prints a table and writes `target/bench-store.json`. It needs 9 GiB of disk in
//! `target`. `-- --test` does the same with little, to see that it works.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program for people, on known input")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use vaccel_client::{Client, ResourceFiles, ResourceKind, Session, SessionOptions};

struct Effort {
    /// Bytes of the large resource.
    large: u64,
    /// Tenants with a full store, and files of each.
    tenants: usize,
    files: usize,
    /// Starts with the full store.
    starts: usize,
}

const SMOKE: Effort = Effort { large: 16 << 20, tenants: 2, files: 10, starts: 2 };
const FULL: Effort = Effort { large: 4 << 30, tenants: 64, files: 1000, starts: 21 };

struct Agent {
    process: Child,
    session: Session,
    /// From the start of the process to the first line, and to the first answer.
    listens: Duration,
    serves: Duration,
}

impl Agent {
    async fn start(folder: &Path) -> Self {
        let socket = format!("unix://{}/s", folder.display());
        let begun = Instant::now();
        let mut process = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"))
            .args([
                "--engine",
                "tract",
                "--log",
                "warn",
                "--tenant-resource-mib",
                "8192",
                "--address",
                &socket,
            ])
            .arg("--store")
            .arg(folder.join("store"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let listens = begun.elapsed();
        let client = Client::builder(socket.parse().unwrap()).connect().await.unwrap();
        let session = client.open_session(SessionOptions::default()).await.unwrap();
        Self { process, session, listens, serves: begun.elapsed() }
    }

    fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// A file of this size in which no two blocks are alike.
fn write_large(path: &Path, bytes: u64) {
    let mut file = File::create(path).unwrap();
    let mut block: Vec<u8> = Sha256::digest(b"block").iter().copied().cycle().take(1 << 20).collect();
    for number in 0..bytes >> 20 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&block).unwrap();
    }
    // Writing it back must not meet what is measured.
    file.sync_all().unwrap();
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let smoke = std::env::args().any(|argument| argument == "--test");
    let effort = if smoke { SMOKE } else { FULL };
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
    let folder = tempfile::tempdir_in(target).unwrap();
    let large = folder.path().join("large.bin");
    write_large(&large, effort.large);
    let mut rows = Vec::new();
    upload(&effort, folder.path(), &large, &mut rows).await;
    resume(&effort, folder.path(), &large, &mut rows).await;
    restart(&effort, folder.path(), &mut rows).await;
    report(&rows);
}

type Rows = Vec<(String, f64, &'static str)>;

const MIB: f64 = (1 << 20) as f64;

async fn upload(effort: &Effort, folder: &Path, large: &Path, rows: &mut Rows) {
    let size = effort.large as f64 / MIB;
    let agent = Agent::start(folder).await;
    let before = agent.peak();
    let begun = Instant::now();
    let resource = agent.session.register(ResourceFiles::path(ResourceKind::Data, large)).await.unwrap();
    let took = begun.elapsed();
    rows.push((
        format!("upload of {size:.0} MiB from disk, hashed on both sides"),
        size / took.as_secs_f64(),
        "MiB/s",
    ));
    rows.push(("the agent's peak memory grew by".into(), (agent.peak() - before) as f64 / MIB, "MiB"));
    let begun = Instant::now();
    let mut reader = agent.session.read_resource(&resource, "", 0, 0).await.unwrap();
    let mut read = 0;
    while let Some(piece) = reader.next().await.unwrap() {
        read += piece.len() as u64;
    }
    assert_eq!(read, effort.large);
    rows.push(("read back, checked first".into(), size / begun.elapsed().as_secs_f64(), "MiB/s"));
    rows.push(("and by then".into(), (agent.peak() - before) as f64 / MIB, "MiB"));
    agent.kill();
    let mut disk = File::open(large).unwrap();
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    let begun = Instant::now();
    while let count @ 1.. = disk.read(&mut buffer).unwrap() {
        hasher.update(&buffer[..count]);
    }
    rows.push(("for comparison, SHA-256 alone".into(), size / begun.elapsed().as_secs_f64(), "MiB/s"));
    std::fs::remove_dir_all(folder.join("store")).unwrap();
}

async fn resume(effort: &Effort, folder: &Path, large: &Path, rows: &mut Rows) {
    let agent = Agent::start(folder).await;
    let cut = Arc::new(tokio::sync::Notify::new());
    let (at, notify) = (effort.large / 10 * 9, Arc::clone(&cut));
    let files = ResourceFiles::path(ResourceKind::Data, large).on_progress(move |done, _| {
        if done >= at {
            notify.notify_one();
        }
    });
    tokio::select! {
        _ = agent.session.register(files) => {}
        () = cut.notified() => {}
    }
    agent.kill();
    let agent = Agent::start(folder).await;
    let had = Arc::new(AtomicU64::new(u64::MAX));
    let first = Arc::clone(&had);
    let files = ResourceFiles::path(ResourceKind::Data, large).on_progress(move |done, _| {
        first.fetch_min(done, Ordering::Relaxed);
    });
    let begun = Instant::now();
    agent.session.register(files).await.unwrap();
    let again = effort.large.saturating_sub(had.load(Ordering::Relaxed));
    let percent = again as f64 * 100.0 / effort.large as f64;
    rows.push(("sent again after the agent was killed at 90 %".into(), percent, "% of the file"));
    rows.push(("in, with hashing what was there on both sides".into(), begun.elapsed().as_secs_f64(), "s"));
    agent.kill();
}

async fn restart(effort: &Effort, folder: &Path, rows: &mut Rows) {
    // Beside the large file: tenants as earlier agents leave them.
    for tenant in 0..effort.tenants {
        let room = folder.join("store/v1").join(hex(&Sha256::digest(tenant.to_le_bytes()))).join("complete");
        std::fs::create_dir_all(&room).unwrap();
        for file in 0..effort.files {
            let content = [tenant.to_le_bytes(), file.to_le_bytes()].concat();
            std::fs::write(room.join(hex(&Sha256::digest(&content))), content).unwrap();
        }
    }
    let (mut listens, mut serves) = (Vec::new(), Vec::new());
    for _ in 0..effort.starts {
        let agent = Agent::start(folder).await;
        listens.push(agent.listens.as_secs_f64() * 1e3);
        serves.push(agent.serves.as_secs_f64() * 1e3);
        agent.kill();
    }
    let files = effort.tenants * effort.files;
    for (what, mut times) in [("listens", listens), ("has answered", serves)] {
        times.sort_by(f64::total_cmp);
        let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
        rows.push((
            format!("with {files} files of {} tenants it {what} after", effort.tenants),
            median,
            "ms, median",
        ));
        rows.push((String::new(), most, "ms, at most"));
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn report(rows: &Rows) {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let commit = said("git", &["describe", "--always", "--dirty"]);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("", |(_, n)| n);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let machine = format!("{cores} cores of {cpu}, {}", said("uname", &["-sr"]));
    println!("{machine}\ncommit {commit}\n");
    for (what, value, unit) in rows {
        println!("{what:<60} {value:>9.1} {unit}");
    }
    let rows: Vec<_> = rows
        .iter()
        .map(|(what, value, unit)| serde_json::json!({ "what": what, "value": value, "unit": unit }))
        .collect();
    let document = serde_json::json!({ "machine": machine, "commit": commit, "rows": rows });
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench-store.json");
    std::fs::write(path, format!("{document:#}\n")).unwrap();
}
