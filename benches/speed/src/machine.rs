//! Where and of what figures are.

use std::fmt;
use std::process::Command;

/// The machine, and the commit that is measured.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) cpu: String,
    pub(crate) kernel: String,
    pub(crate) commit: String,
}

impl Machine {
    pub(crate) fn this() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = |line: &str| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned());
        let here = env!("CARGO_MANIFEST_DIR");
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: cpuinfo.lines().find_map(name).unwrap_or_else(|| "an unknown processor".into()),
            kernel: said("uname", &["-sr"]),
            commit: said("git", &["-C", here, "describe", "--always", "--dirty"]),
        }
    }
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cores, cpu, kernel, commit } = self;
        write!(f, "{cores} cores of {cpu}, {kernel}, commit {commit}")
    }
}
