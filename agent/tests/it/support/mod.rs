//! What the tests share: real agents in processes of their own, guests, and models made on the spot.

pub mod onnx;
pub mod seer;
pub mod tensorflow;
pub mod tflite;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use vaccel_client::{Client, Endpoint, Session, SessionOptions};

/// Longest wait for something that must happen: far beyond what it takes, so that only its absence fails a test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running `vaccel-agent`, killed when dropped.
pub struct Agent {
    pub process: Child,
    pub addresses: Vec<String>,
    folder: tempfile::TempDir,
}

impl Agent {
    /// Starts an agent on these addresses with these further flags. `{}` in either is a folder of the agent's own.
    pub fn start(addresses: &[&str], flags: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), addresses, flags)
    }

    /// Starts an agent on a unix socket.
    pub fn unix(flags: &[&str]) -> Self {
        Self::start(&["unix://{}/s"], flags)
    }

    /// Starts an agent in a folder that is there, for example one an earlier agent left. Its store is in it, unless a
    /// flag names another one.
    pub fn start_in(folder: tempfile::TempDir, addresses: &[&str], flags: &[&str]) -> Self {
        Self::start_program(Path::new(env!("CARGO_BIN_EXE_vaccel-agent")), folder, addresses, flags)
    }

    /// Starts an agent whose log goes elsewhere.
    pub fn start_logged(addresses: &[&str], flags: &[&str], log: Stdio) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vaccel-agent"));
        command.stderr(log);
        Self::start_command(command, tempfile::tempdir().unwrap(), addresses, flags)
    }

    /// Starts a program that becomes an agent.
    pub fn start_program(
        program: &Path,
        folder: tempfile::TempDir,
        addresses: &[&str],
        flags: &[&str],
    ) -> Self {
        Self::start_command(Command::new(program), folder, addresses, flags)
    }

    pub fn start_command(
        mut command: Command,
        folder: tempfile::TempDir,
        addresses: &[&str],
        flags: &[&str],
    ) -> Self {
        let fill = |text: &&str| text.replace("{}", folder.path().to_str().unwrap());
        for address in addresses {
            command.args(["--address", &fill(address)]);
        }
        command.env("VACCEL_AGENT_STORE", folder.path().join("store"));
        command.args(flags.iter().map(fill)).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        // It says each address once it accepts there.
        let bound = addresses.iter().map(|_| {
            let line = lines.next().expect("the agent ended before it listened").unwrap();
            line.strip_prefix("listening on ").expect("an address").to_owned()
        });
        let addresses = bound.collect();
        Self { process, addresses, folder }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The first address.
    pub fn address(&self) -> &str {
        &self.addresses[0]
    }

    /// A guest at the address with this index.
    pub async fn guest(&self, index: usize) -> Client {
        connect(&self.addresses[index]).await
    }

    /// A guest at the first address and its session.
    pub async fn session(&self) -> (Client, Session) {
        let client = self.guest(0).await;
        let session = client.open_session(SessionOptions::default()).await.unwrap();
        (client, session)
    }

    pub fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(mut self) -> (ExitStatus, tempfile::TempDir) {
        self.signal("TERM");
        let status = self.process.wait().unwrap();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        (status, folder)
    }

    /// Kills it with SIGKILL; its sockets stay behind.
    pub fn kill(mut self) -> tempfile::TempDir {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }

    /// Resident memory of the agent, in bytes.
    pub fn resident(&self) -> u64 {
        self.status("VmRSS:")
    }

    /// The memory that is its own, in bytes: without the pages of its file, of which the kernel has more or fewer at
    /// hand.
    pub fn own(&self) -> u64 {
        self.status("RssAnon:")
    }

    /// The most resident memory it ever had, in bytes.
    pub fn peak(&self) -> u64 {
        self.status("VmHWM:")
    }

    fn status(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Whether one of its threads is on a core or wants one.
    pub fn computes(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.id())).unwrap();
        let mut stats =
            tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).ok());
        // The state follows the name, which is in parentheses and may hold anything.
        stats.any(|stat| stat.rsplit(") ").next().unwrap().starts_with('R'))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub async fn connect(address: &str) -> Client {
    Client::builder(endpoint(address)).connect().await.unwrap()
}

pub fn endpoint(address: &str) -> Endpoint {
    address.parse().unwrap()
}

/// The path behind a `unix://` address.
pub fn socket_path(address: &str) -> PathBuf {
    address.strip_prefix("unix://").unwrap().into()
}

/// The `vaccel` command, built beside the agent by `cargo test --workspace`.
pub fn vaccel() -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_vaccel-agent")).with_file_name("vaccel");
    assert!(path.is_file(), "no vaccel command at {}: build and test with --workspace", path.display());
    let mut command = Command::new(path);
    for variable in ["VACCEL_RPC_ADDRESS", "VACCEL_RPC_ADDR", "VACCEL_TOKEN", "VACCEL_TOKEN_FILE"] {
        command.env_remove(variable);
    }
    command
}

pub fn output_text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().into()
}

/// The held-out digits in `examples/images`, with the label in each name.
pub fn digits(ending: &str) -> Vec<(PathBuf, usize)> {
    let entries = std::fs::read_dir(repository().join("examples/images")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut digits: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|found| found == ending))
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap();
            let label = name[name.len() - 1..].parse().unwrap();
            (path, label)
        })
        .collect();
    digits.sort();
    digits
}

pub fn read(path: &Path) -> Bytes {
    std::fs::read(path).unwrap().into()
}

/// ONNX Runtime's library, where `./test` puts it.
pub fn onnxruntime() -> PathBuf {
    let path = repository().join("target/onnxruntime/libonnxruntime.so");
    assert!(path.is_file(), "no ONNX Runtime at {}: run ./test once, it installs it", path.display());
    path
}

/// Asks until the answer is yes.
pub async fn until(what: &str, mut ask: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !ask().await {
        assert!(begun.elapsed() < PATIENCE, "{what} did not happen");
        tokio::task::yield_now().await;
    }
}
