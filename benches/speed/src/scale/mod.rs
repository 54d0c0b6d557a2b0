//! Very many guests on one agent: what each takes that only keeps its connection, what they do to one that works, and
//! how an agent fares that a thousand call every now and then.

mod active;
mod idle;
mod report;

use std::time::{Duration, Instant};

use crate::peers;
use crate::process::{Pair, Programs};
use crate::shape::{Shape, Socket};
use crate::usage::kernel_bytes;
use crate::{Effort, Failure};

pub(crate) use active::Outcome;

/// Idle connections.
const IDLE: usize = 10_000;

/// What the agent may take for each of them, in bytes.
pub(crate) const EACH_BYTES_MAX: f64 = 20.0 * 1024.0;

/// How many times as long the slow calls of a guest may take among idle ones as alone.
pub(crate) const SLOWER_MAX: f64 = 1.5;

/// Guests that call every now and then.
const ACTIVE: usize = 1000;

/// How long they do.
const ACTIVE_TIME: Duration = Duration::from_secs(20);
const ACTIVE_TIME_LONG: Duration = Duration::from_secs(60);

/// Calls of one turn.
const CALLS: usize = 100;

/// How long the turns of a round are taken: in all rounds together the agent asks every idle connection more than once
/// whether somebody is there.
const ROUND_TIME: Duration = Duration::from_millis(2500);

/// What is wanted, by its name.
#[derive(Debug)]
pub(crate) struct Wanted {
    idle: Vec<Socket>,
    active: bool,
}

impl Wanted {
    pub(crate) fn new(wanted: &dyn Fn(&str) -> bool) -> Self {
        let idle =
            Socket::ALL.into_iter().filter(|socket| wanted(&format!("scale, idle, {}", socket.name())));
        Self { idle: idle.collect(), active: wanted("scale, active") }
    }

    pub(crate) fn is_nothing(&self) -> bool {
        self.idle.is_empty() && !self.active
    }
}

/// What was measured.
#[derive(Debug)]
pub(crate) struct Scale {
    pub(crate) idle: Vec<(Socket, Result<Crowded, String>)>,
    pub(crate) active: Option<Result<Active, String>>,
}

impl Scale {
    /// Whether everything was that should be.
    pub(crate) fn is_whole(&self) -> bool {
        let idle = self.idle.iter().all(|(_, crowded)| crowded.is_ok());
        idle && self.active.as_ref().is_none_or(|active| active.as_ref().is_ok_and(Active::is_whole))
    }
}

/// An agent with idle connections.
#[derive(Debug)]
pub(crate) struct Crowded {
    pub(crate) connections: usize,
    /// The agent's memory before they came and when they were there, in bytes.
    pub(crate) resident_bytes: [i64; 2],
    /// What the kernel took for both ends of them, in bytes: small pieces, and buffers of TCP.
    pub(crate) kernel_bytes: [i64; 2],
    pub(crate) among: Vec<Among>,
}

impl Crowded {
    /// What the agent takes for one connection, in bytes.
    pub(crate) fn each_bytes(&self) -> f64 {
        let [before, after] = self.resident_bytes;
        (after - before) as f64 / self.connections as f64
    }
}

/// Calls of a guest, on an agent of its own and on one with idle connections.
#[derive(Debug)]
pub(crate) struct Among {
    pub(crate) shape: Shape,
    /// How long they took, in microseconds and, in the end, in order.
    times: [Vec<f64>; 2],
}

impl Among {
    /// Makes one round's calls on two agents, in turns.
    fn measure(&mut self, mut pairs: [&mut Pair; 2], socket: Socket, effort: Effort) -> Result<(), Failure> {
        let begun = Instant::now();
        let mut is_first = true;
        while is_first || (begun.elapsed() < ROUND_TIME && !effort.tiny) {
            for (pair, times) in pairs.iter_mut().zip(&mut self.times) {
                // The first one after a pause finds nothing in the caches, here as there.
                pair.call(socket, self.shape, 1)?;
                times.extend(pair.call(socket, self.shape, CALLS)?);
            }
            is_first = false;
        }
        Ok(())
    }

    /// What so many of a hundred calls were not above, alone and among others, in microseconds.
    pub(crate) fn percentiles(&self, percent: usize) -> Option<[f64; 2]> {
        let [alone, among] = &self.times;
        Some([percentile(alone, percent)?, percentile(among, percent)?])
    }

    /// How many times as long the slow calls take among others.
    pub(crate) fn slower(&self) -> Option<f64> {
        let [alone, among] = self.percentiles(99)?;
        Some(among / alone)
    }
}

/// What so many of a hundred times, which are in order, are not above.
fn percentile(times: &[f64], percent: usize) -> Option<f64> {
    times.get(times.len() * percent / 100).copied()
}

/// An agent that many guests call.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) guests: usize,
    pub(crate) time: Duration,
    pub(crate) outcome: Outcome,
    /// The agent's memory before the calls that count and after them, in bytes.
    pub(crate) resident_bytes: [i64; 2],
}

impl Active {
    fn is_whole(&self) -> bool {
        self.outcome.errors.is_empty()
    }

    /// What so many of a hundred calls were not above, in microseconds.
    pub(crate) fn percentile(&self, percent: usize) -> Option<f64> {
        percentile(&self.outcome.times, percent)
    }
}

/// Measures what is wanted.
pub(crate) fn measure(programs: &Programs, wanted: &Wanted, effort: Effort) -> Scale {
    let idle = wanted.idle.iter().map(|&socket| {
        let crowded = crowded(programs, socket, effort).map_err(|failure| failure.to_string());
        (socket, crowded)
    });
    let idle = idle.collect();
    let active = || active(programs, effort).map_err(|failure| failure.to_string());
    Scale { idle, active: wanted.active.then(active) }
}

/// A guest and an agent that takes so many connections.
fn start(programs: &Programs, connections: usize) -> Result<Pair, Failure> {
    let names = ["--connections-max", "--tenant-connections-max", "--tenant-sessions-max"];
    // One more is the guest's.
    let flags: Vec<String> =
        names.iter().flat_map(|name| [(*name).to_owned(), (connections + 1).to_string()]).collect();
    Pair::start_with(programs, &peers::GUEST, &flags, |_| Ok(()))
}

fn crowded(programs: &Programs, socket: Socket, effort: Effort) -> Result<Crowded, Failure> {
    let connections = if effort.tiny { IDLE / 100 } else { IDLE };
    let [mut alone, mut agent] = [start(programs, connections)?, start(programs, connections)?];
    // What comes only once has come.
    for pair in [&mut alone, &mut agent] {
        Shape::SHORT.into_iter().try_for_each(|shape| pair.call(socket, shape, CALLS).map(|_| ()))?;
    }
    let (before, kernel_before) = (agent.resident_bytes()?, kernel_bytes()?);
    let idle = idle::Idle::open(agent.address(socket), connections)?;
    let (after, kernel_after) = (agent.resident_bytes()?, kernel_bytes()?);
    let mut among = Shape::SHORT.map(|shape| Among { shape, times: Default::default() });
    for round in 0..effort.rounds {
        for row in &mut among {
            row.measure([&mut alone, &mut agent], socket, effort)?;
        }
        eprintln!("among idle ones, {}: round {} of {}", socket.name(), round + 1, effort.rounds);
    }
    among.iter_mut().flat_map(|row| &mut row.times).for_each(|times| times.sort_by(f64::total_cmp));
    if idle.lost() > 0 {
        return Err(format!("{} of {connections} idle connections ended", idle.lost()).into());
    }
    Ok(Crowded {
        connections,
        resident_bytes: [before, after],
        kernel_bytes: [0, 1].map(|kind| kernel_after[kind] - kernel_before[kind]),
        among: among.into(),
    })
}

fn active(programs: &Programs, effort: Effort) -> Result<Active, Failure> {
    let (guests, time) = match effort {
        Effort { tiny: true, .. } => (ACTIVE / 50, Duration::from_secs(2)),
        Effort { long: true, .. } => (ACTIVE, ACTIVE_TIME_LONG),
        _ => (ACTIVE, ACTIVE_TIME),
    };
    let pair = start(programs, guests)?;
    let callers = active::Guests::open(&pair, guests)?;
    let before = pair.resident_bytes()?;
    let outcome = callers.work(time)?;
    Ok(Active { guests, time, outcome, resident_bytes: [before, pair.resident_bytes()?] })
}
