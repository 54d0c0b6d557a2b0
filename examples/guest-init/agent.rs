//! An agent of this machine's own, for the guests in it and beside it.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::Failure;

const PROGRAM: &str = "/bin/vaccel-agent";

/// Half a second, in the kernel's hundredths: more than it takes to read a request.
const BUSY_TICKS: u64 = 50;

/// A running agent, killed when dropped.
#[derive(Debug)]
pub(crate) struct Agent {
    process: Child,
    /// Kept open: the agent writes there.
    _output: BufReader<ChildStdout>,
}

impl Agent {
    /// Starts it and waits until it accepts connections.
    pub(crate) fn start() -> Result<Self, Failure> {
        let mut process = Command::new(PROGRAM).arg("--vsock").stdout(Stdio::piped()).spawn()?;
        let mut output = BufReader::new(process.stdout.take().ok_or("it has no output")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let agent = Self { process, _output: output };
        if line.starts_with("listening on ") { Ok(agent) } else { Err("it ended before it listened".into()) }
    }

    /// Waits until it has computed for a while: then it is in the middle of a call that is long enough.
    pub(crate) fn busy(&self) -> Result<(), Failure> {
        let begun = self.ticks()?;
        while self.ticks()? < begun + BUSY_TICKS {
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Time it was on the processor, in the kernel's hundredths of a second.
    fn ticks(&self) -> Result<u64, Failure> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        // The name is in parentheses and may hold anything; user and system time are the 12th and 13th fields after it.
        let (_, fields) = stat.rsplit_once(") ").ok_or("no name in its stat")?;
        let times = fields.split(' ').skip(11).take(2);
        times.map(|time| Ok(time.parse::<u64>()?)).sum()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
