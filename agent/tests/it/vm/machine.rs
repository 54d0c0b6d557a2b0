//! Virtual machines on QEMU's own processor, and the vsock device they share. None of it touches the vsock of this
//! machine: the device's host side is unix sockets.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::image::tool;
use crate::support::{PATIENCE, repository, until};

/// Port of the agents, on both sides.
pub const PORT: u32 = 2048;

/// QEMU's exit codes when the first process was content and when it was not: twice what it wrote to `isa-debug-exit`,
/// and one.
pub const PASSED: i32 = 2 * 0x10 + 1;
pub const FAILED: i32 = 2 * 0x11 + 1;

/// Before each line the first process writes.
const GUEST_SAYS: &str = "guest: ";

/// What the kernel does: say nothing, and end rather than hang. It is not to judge its timer by a moment in which the
/// host was busy with something else.
const KERNEL: &str = "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t no_timer_check";

/// Longest wait for a line. An emulated processor is many times slower than this machine's.
const MACHINE_PATIENCE: Duration = PATIENCE.saturating_mul(3);

/// A process, killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The vsock device of some machines. Guests reach each other because one process serves all of them.
pub struct Device {
    _process: Process,
    folder: tempfile::TempDir,
}

impl Device {
    /// Starts it, with machines of these CIDs.
    pub async fn start(cids: &[u32]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |cid, kind| folder.path().join(format!("{cid}.{kind}"));
        let mut command = Command::new(tool("vhost-device-vsock/bin/vhost-device-vsock"));
        for cid in cids {
            let (vhost, vsock) = (path(cid, "vhost"), path(cid, "vsock"));
            let (vhost, vsock) = (vhost.display(), vsock.display());
            command.arg("--vm").arg(format!("guest-cid={cid},socket={vhost},uds-path={vsock}"));
        }
        let mut process = Process(command.stdin(Stdio::null()).spawn().unwrap());
        until("the vsock device", async || {
            assert!(process.0.try_wait().unwrap().is_none(), "it ended by itself");
            cids.iter().all(|cid| path(cid, "vhost").exists() && path(cid, "vsock").exists())
        })
        .await;
        Self { _process: process, folder }
    }

    /// The socket between QEMU and the device.
    fn vhost(&self, cid: u32) -> PathBuf {
        self.folder.path().join(format!("{cid}.vhost"))
    }

    /// The machine's hybrid vsock: where an agent of the host listens for its guests, and where the host finds an agent
    /// in it.
    pub fn address(&self, cid: u32, port: u32) -> String {
        format!("hvsock://{}/{cid}.vsock:{port}", self.folder.path().display())
    }

    /// How a process of the host passes for the machine's guests, at the agent that listens for them.
    pub fn disguise(&self, cid: u32) -> String {
        format!("unix://{}/{cid}.vsock_{PORT}", self.folder.path().display())
    }
}

/// How a guest's kernel finds the device.
#[derive(Clone, Copy)]
pub enum Model {
    /// A PC: virtio over PCI.
    Q35,
    /// QEMU's idea of a Firecracker machine: virtio-mmio and nothing of a PC.
    Microvm,
}

impl Model {
    fn arguments(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Q35 => ("q35,usb=off,vmport=off,smbus=off,sata=off,hpet=off", "vhost-user-vsock-pci", ""),
            // Its only clocks are those of a PC, and on a busy host the kernel cannot measure with them: it hangs.
            Self::Microvm => (
                "microvm,pic=on,pit=on,rtc=on,isa-serial=on,usb=off",
                "vhost-user-vsock-device",
                " tsc_early_khz=2000000 lpj=4000000",
            ),
        }
    }
}

/// What a machine is made of.
pub struct Plan<'a> {
    pub model: Model,
    pub cid: u32,
    pub initramfs: &'a Path,
    pub memory_mib: u32,
    /// What its first process does.
    pub steps: &'a [&'a str],
}

/// A running machine, killed when dropped.
pub struct Machine {
    process: Process,
    input: ChildStdin,
    lines: Receiver<String>,
    begun: Instant,
    /// The file with everything it wrote to its console; kept when the test fails.
    console: PathBuf,
}

impl Machine {
    /// Begins to boot. `name` is the name of the file with its console.
    pub fn boot(name: &str, device: &Device, plan: &Plan<'_>) -> Self {
        let Plan { model, cid, initramfs, memory_mib, steps } = plan;
        let (machine, vsock, kernel) = model.arguments();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-machine", &format!("{machine},memory-backend=memory")]);
        // Never the host's processor, even where it could be had: one way for all.
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"]);
        command.args(["-m", &format!("{memory_mib}M"), "-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-serial", "stdio"]);
        // The device reads and writes the guest's memory.
        let memory = format!("memory-backend-memfd,id=memory,size={memory_mib}M,share=on");
        command.args(["-object", &memory]);
        command.args(["-chardev", &format!("socket,id=vhost,path={}", device.vhost(*cid).display())]);
        command.args(["-device", &format!("{vsock},chardev=vhost")]);
        command.args(["-device", "isa-debug-exit,iobase=0x501,iosize=2"]);
        command.arg("-kernel").arg(tool("kernel/vmlinuz")).arg("-initrd").arg(initramfs);
        command.args(["-append", &format!("{KERNEL}{kernel} -- {}", steps.join(" "))]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let begun = Instant::now();
        let mut child = command.spawn().expect("no qemu-system-x86_64: run ./test once, it installs it");
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let console = repository().join(format!("target/vm/consoles/{name}-{}.log", std::process::id()));
        let (sender, lines) = mpsc::channel();
        let mut log = create(&console);
        std::thread::spawn(move || copy_console(output, begun, &mut log, &sender));
        Self { process: Process(child), input, lines, begun, console }
    }

    /// Time since it was switched on.
    pub fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The next line of its first process.
    pub fn line(&mut self) -> String {
        let line = self.lines.recv_timeout(MACHINE_PATIENCE);
        line.unwrap_or_else(|error| {
            let ended = self.process.0.try_wait();
            panic!("the guest says nothing: {error}; end of QEMU: {ended:?}")
        })
    }

    /// Waits for this line.
    pub fn wait_for(&mut self, expected: &str) {
        while self.line() != expected {}
    }

    /// Begins a step.
    pub fn tell(&mut self, step: &str) {
        writeln!(self.input, "{step}").unwrap();
    }

    /// Waits for the end of a step: what it said, or why it failed.
    pub fn hear(&mut self, step: &str) -> Result<Vec<String>, String> {
        let (done, failed) = (format!("done {step}"), format!("failed {step}: "));
        let mut said = Vec::new();
        loop {
            let line = self.line();
            if line == done {
                return Ok(said);
            }
            if let Some(why) = line.strip_prefix(&failed) {
                return Err(why.into());
            }
            said.push(line);
        }
    }

    /// Has a step done.
    pub fn ask(&mut self, step: &str) -> Result<Vec<String>, String> {
        self.tell(step);
        self.hear(step)
    }

    /// Waits until it has switched itself off with this exit code: what it said until then.
    pub fn end(mut self, expected: i32) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            match self.lines.recv_timeout(MACHINE_PATIENCE) {
                Ok(line) => said.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("the machine goes on"),
            }
        }
        // QEMU closes its console only by ending.
        let code = self.process.0.wait().unwrap().code();
        assert_eq!(code, Some(expected), "{said:?}");
        said
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the console of a machine is in {}", self.console.display());
        } else {
            let _ = std::fs::remove_file(&self.console);
        }
    }
}

fn create(console: &Path) -> std::fs::File {
    std::fs::create_dir_all(console.parent().unwrap()).unwrap();
    std::fs::File::create(console).unwrap()
}

/// Copies the console to its file, with the time before each line, and sends on what the first process says.
fn copy_console(output: ChildStdout, begun: Instant, log: &mut std::fs::File, lines: &Sender<String>) {
    for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end();
        let _ = writeln!(log, "{:7.3} {line}", begun.elapsed().as_secs_f64());
        if let Some((_, said)) = line.split_once(GUEST_SAYS) {
            let _ = lines.send(said.into());
        }
    }
}
