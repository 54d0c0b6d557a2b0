//! The client's side of a process: makes calls on command and says how long they took.
//!
//! A command is a line, `call SOCKET BYTES cut|echo CALLS` or `crowd SOCKET BYTES cut|echo CALLERS CALLS`; the answer
//! is a line of nanoseconds, by call or for the whole crowd, or `failed:` and why. `grpcio.py` takes calls as well.

use std::collections::HashMap;
use std::io::Write;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::peers::{self, Caller, Crowd};
use crate::shape::Shape;

/// A burst that has taken so long is over: rows that wait 44 ms for each call must not make a round last minutes.
const BURST_TIME_MAX: Duration = Duration::from_millis(200);

/// Answers commands until there are no more.
pub(crate) fn answer(kind: &str, [tcp, unix]: [&str; 2]) -> Result<(), Failure> {
    let addresses = HashMap::from([("tcp", tcp), ("unix", unix)]);
    let mut callers = Callers { kind, addresses, single: HashMap::new(), crowds: HashMap::new() };
    for line in std::io::stdin().lines() {
        let reply = callers.perform(&line?).unwrap_or_else(|failure| {
            let words: Vec<String> = failure.to_string().split_whitespace().map(str::to_owned).collect();
            format!("failed: {}", words.join(" "))
        });
        std::io::stdout().write_all(format!("{reply}\n").as_bytes())?;
    }
    Ok(())
}

/// Connections that were made for earlier commands.
struct Callers<'a> {
    kind: &'a str,
    addresses: HashMap<&'a str, &'a str>,
    single: HashMap<String, Box<dyn Caller>>,
    crowds: HashMap<String, Box<dyn Crowd>>,
}

impl Callers<'_> {
    fn perform(&mut self, line: &str) -> Result<String, Failure> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let address = |socket: &str| self.addresses.get(socket).copied().ok_or("no such socket");
        match words[..] {
            ["call", socket, up, down, calls] => {
                if !self.single.contains_key(socket) {
                    self.single.insert(socket.into(), peers::caller(self.kind, address(socket)?)?);
                }
                let caller = self.single.get_mut(socket).ok_or("no such socket")?;
                let times = burst(&mut **caller, shape(up, down)?, calls.parse()?)?;
                Ok(times.iter().map(u128::to_string).collect::<Vec<_>>().join(" "))
            }
            ["crowd", socket, up, down, count, calls] => {
                if !self.crowds.contains_key(socket) {
                    let crowd = peers::crowd(self.kind, address(socket)?, count.parse()?)?;
                    self.crowds.insert(socket.into(), crowd);
                }
                let crowd = self.crowds.get_mut(socket).ok_or("no such socket")?;
                Ok(crowd.call(shape(up, down)?, calls.parse()?)?.as_nanos().to_string())
            }
            _ => Err(format!("no command: {line}").into()),
        }
    }
}

fn shape(up: &str, down: &str) -> Result<Shape, Failure> {
    Ok(Shape { up: up.parse()?, echo: down == "echo" })
}

fn burst(caller: &mut dyn Caller, shape: Shape, calls: usize) -> Result<Vec<u128>, Failure> {
    let mut times = Vec::with_capacity(calls);
    let whole = Instant::now();
    while times.len() < calls && (times.is_empty() || whole.elapsed() < BURST_TIME_MAX) {
        let begun = Instant::now();
        caller.call(shape)?;
        times.push(begun.elapsed().as_nanos());
    }
    Ok(times)
}
