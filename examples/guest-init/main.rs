//! The first process of a Linux microVM, and the only program in it: it makes a machine out of a kernel, calls the
//! agent over vsock, says on the console what came back, and switches the machine off.
//!
//! Built static and packed as `/init` in an initramfs, with the kernel's vsock modules and some images, it is a whole
//! guest:
//!
//! ```text
//! RUSTFLAGS="-C target-feature=+crt-static" cargo build --release -p guest-init --target x86_64-unknown-linux-gnu
//! ```
//!
//! What it does are *steps*: the words behind ` -- ` on the kernel's command line, for example
//!
//! ```text
//! console=ttyS0 quiet panic=-1 -- classify=vsock://2:2048
//! ```
//!
//! | step | what it does |
//! |---|---|
//! | `info=ADDRESS` | says who the agent takes this machine for |
//! | `classify=ADDRESS` | says what every file in `/images` shows |
//! | `classify-c=ADDRESS` | has `/bin/classify`, the guest in C, say the same |
//! | `classify-rust=ADDRESS` | has `/bin/guest-rust`, the guest in Rust, say the same |
//! | `echo=ADDRESS` | sends 8 MiB through `/models/echo.onnx`, and says whether they came back as they went |
//! | `endless=ADDRESS` | runs `/models/endless.onnx` |
//! | `hold=ADDRESS` | registers `/models/echo.onnx` and keeps the session |
//! | `borrow=ADDRESS` | runs that model without holding it |
//! | `deadline=MS` | how long each later call may take; 60 seconds if not said |
//! | `agent` | starts `/bin/vaccel-agent` of this machine on vsock port 2048, and waits until it listens |
//! | `busy` | waits until that agent has computed for half a second more |
//! | `kill` | kills that agent, as a crash would |
//! | `console` | takes further steps from the console, one a line, until one is `end` |
//!
//! Every line it writes begins with `guest: `; a step ends with `done STEP` or `failed STEP: WHY`.

#![allow(clippy::print_stdout, reason = "the console is all it has")]

mod agent;
mod calls;
mod machine;

use std::io::BufRead;

use agent::Agent;
use calls::Caller;

/// Why a step failed, for a person.
type Failure = Box<dyn std::error::Error>;

fn main() {
    let outcome = machine::set_up().and_then(|()| Guest::new().run(std::env::args().skip(1)));
    if let Err(failure) = &outcome {
        say(&format!("failed: {failure}"));
    }
    machine::leave(outcome.is_ok());
}

fn say(line: &str) {
    println!("guest: {line}");
}

/// How long a call may take when no step says so, in milliseconds.
const DEADLINE_MS: u32 = 60_000;

/// What outlives a step.
#[derive(Debug)]
struct Guest {
    deadline_ms: u32,
    held: Option<Caller>,
    agent: Option<Agent>,
}

impl Guest {
    fn new() -> Self {
        Self { deadline_ms: DEADLINE_MS, held: None, agent: None }
    }

    /// Takes the steps one after the other, up to the first that fails.
    fn run(&mut self, steps: impl Iterator<Item = String>) -> Result<(), Failure> {
        for step in steps {
            if step == "console" {
                self.obey()?;
            } else {
                self.take(&step).map_err(|failure| format!("{step}: {failure}"))?;
                say(&format!("done {step}"));
            }
        }
        Ok(())
    }

    /// Takes steps from the console. Whoever writes them reads how they went.
    fn obey(&mut self) -> Result<(), Failure> {
        machine::silence_echo()?;
        say("obeys");
        for line in std::io::stdin().lock().lines() {
            match line?.trim() {
                "end" => break,
                step => match self.take(step) {
                    Ok(()) => say(&format!("done {step}")),
                    Err(failure) => say(&format!("failed {step}: {failure}")),
                },
            }
        }
        Ok(())
    }

    fn take(&mut self, step: &str) -> Result<(), Failure> {
        let (verb, value) = step.split_once('=').unwrap_or((step, ""));
        let caller = || Caller::new(value, self.deadline_ms);
        match verb {
            "info" => caller()?.info()?,
            "classify" => caller()?.classify()?,
            "classify-c" => calls::have_classified(calls::GUEST_IN_C, value)?,
            "classify-rust" => calls::have_classified(calls::GUEST_IN_RUST, value)?,
            "echo" => caller()?.echo()?,
            "endless" => caller()?.endless()?,
            "hold" => self.held = Some(caller()?.hold()?),
            "borrow" => caller()?.borrow()?,
            "deadline" => self.deadline_ms = value.parse()?,
            "agent" => self.agent = Some(Agent::start()?),
            "busy" => self.agent.as_ref().ok_or("there is no agent here")?.busy()?,
            // Dropped is killed.
            "kill" => self.agent = None,
            _ => return Err("there is no such step".into()),
        }
        Ok(())
    }
}
