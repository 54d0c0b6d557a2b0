//! What a process has used up so far, as the kernel counts it.

use std::ops::{AddAssign, Sub};

use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

use crate::Failure;

/// In what the kernel counts buffers of TCP's sockets.
const PAGE_BYTES: i64 = 4096;

/// Counts of one process, all its threads together.
///
/// They are signed, because what calls took is a difference of differences (see [`crate::rows`]).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu_ns: i64,
    pub(crate) page_faults: i64,
    /// Calls of read, readv, write and writev; the kernel counts no others.
    pub(crate) system_calls: i64,
}

impl Usage {
    pub(crate) fn of(process: u32) -> Result<Self, Failure> {
        // The process's own clock has nanoseconds, is brought up to date when it is read, and keeps what threads used
        // that have ended; none of the files that tell processor time has all three.
        let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(process)?))?;
        let time = clock.now()?;
        let cpu_ns = time.tv_sec() * 1_000_000_000 + time.tv_nsec();
        // Behind the name come nine fields and then the minor faults.
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let page_faults = fields.split(' ').nth(8).ok_or("no faults in stat")?.parse()?;
        let io = std::fs::read_to_string(format!("/proc/{process}/io"))?;
        let system_calls = number(&io, "syscr:")? + number(&io, "syscw:")?;
        Ok(Self { cpu_ns, page_faults, system_calls })
    }
}

/// The most memory a process had, in bytes.
pub(crate) fn peak_bytes(process: u32) -> Result<i64, Failure> {
    status_bytes(process, "VmHWM:")
}

/// The memory a process has, in bytes.
pub(crate) fn resident_bytes(process: u32) -> Result<i64, Failure> {
    status_bytes(process, "VmRSS:")
}

fn status_bytes(process: u32, name: &str) -> Result<i64, Failure> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    Ok(number(&status, name)? << 10)
}

/// What the kernel has for itself in small pieces, sockets among them, and what is in the buffers of TCP's sockets: of
/// the whole machine, in bytes.
pub(crate) fn kernel_bytes() -> Result<[i64; 2], Failure> {
    let slab = number(&std::fs::read_to_string("/proc/meminfo")?, "Slab:")? << 10;
    let sockets = std::fs::read_to_string("/proc/net/sockstat")?;
    let tcp = sockets.lines().find_map(|line| line.strip_prefix("TCP:")).ok_or("no TCP in sockstat")?;
    let pages = tcp.rsplit("mem ").next().unwrap_or_default().trim();
    Ok([slab, pages.parse::<i64>()? * PAGE_BYTES])
}

/// The number behind a name at the begin of a line.
fn number(text: &str, name: &str) -> Result<i64, Failure> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).ok_or_else(|| format!("no {name}"))?;
    let digits = line.split_whitespace().next().unwrap_or_default();
    Ok(digits.parse()?)
}

impl Sub for Usage {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns - other.cpu_ns,
            page_faults: self.page_faults - other.page_faults,
            system_calls: self.system_calls - other.system_calls,
        }
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.cpu_ns += other.cpu_ns;
        self.page_faults += other.page_faults;
        self.system_calls += other.system_calls;
    }
}
