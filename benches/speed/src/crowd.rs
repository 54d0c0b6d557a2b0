//! Callers at the same time: how many calls a second they make together, and how much memory a fresh agent takes for
//! large ones.

use crate::peers::{self, Peer};
use crate::process::{Crowded, Pair, Pairs, Programs};
use crate::rows::median;
use crate::shape::{Shape, Socket};
use crate::{Effort, Failure};

/// Callers at the same time.
pub(crate) const CALLERS: usize = 8;

/// Calls of each caller in a round.
const CALLS: usize = 100;

/// Calls of each caller that are to bring the agent to its peak.
const LARGE_CALLS: usize = 4;

/// What an agent may take beside twice the requests in flight: what it received and what it makes of it.
pub(crate) const BESIDE_BYTES: i64 = 32 << 20;

/// The callers of one peer on one socket.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) peer: &'static Peer,
    pub(crate) socket: Socket,
    /// Why there are no figures, or not all.
    pub(crate) failure: Option<String>,
    /// Calls per second in each round.
    pub(crate) rates: Vec<f64>,
}

impl Row {
    /// By which people choose rows.
    pub(crate) fn name(&self) -> String {
        format!("concurrency, {}, {}", self.peer.name, self.socket.name())
    }

    /// Median of the rounds' ratios to another row: below 1 is fewer calls.
    pub(crate) fn ratio(&self, other: &Self) -> Option<f64> {
        median(self.rates.iter().zip(&other.rates).map(|(own, other)| own / other).collect())
    }

    fn round(&mut self, pairs: &mut Pairs, calls: usize) {
        if self.failure.is_some() {
            return;
        }
        let crowd = Crowded { callers: CALLERS, calls };
        match pairs.of(self.peer).and_then(|pair| pair.crowd(self.socket, Shape::IMAGE, crowd)) {
            Ok(rate) => self.rates.push(rate),
            Err(failure) => self.failure = Some(failure.to_string()),
        }
    }
}

/// The rows that are wanted by their names, and those they are compared with.
pub(crate) fn all(wanted: &dyn Fn(&str) -> bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for socket in Socket::ALL {
        let row = |peer| Row { peer, socket, failure: None, rates: Vec::new() };
        let others: Vec<Row> = peers::ALL.iter().filter(|peer| peer.is_crowd()).map(row).collect();
        let any = others.iter().any(|row| wanted(&row.name()));
        rows.extend(others.into_iter().filter(|row| (any && row.peer.is_raw()) || wanted(&row.name())));
    }
    rows
}

/// Measures all rows in turn. A first round warms them up.
pub(crate) fn measure(rows: &mut [Row], pairs: &mut Pairs, effort: Effort) {
    for round in 0..=effort.rounds {
        rows.iter_mut().for_each(|row| row.round(pairs, if effort.tiny { 2 } else { CALLS }));
        if round == 0 {
            rows.iter_mut().for_each(|row| row.rates.clear());
        }
    }
}

/// The memory of a fresh agent after large calls at the same time.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) socket: Socket,
    /// The most it had, in bytes.
    pub(crate) peak_bytes: Result<i64, String>,
}

/// Bytes of the requests that are in flight together.
pub(crate) fn payload_bytes() -> i64 {
    (CALLERS * Shape::LARGE.up) as i64
}

/// The sockets over which memory is wanted.
pub(crate) fn memory_sockets(wanted: &dyn Fn(&str) -> bool) -> Vec<Socket> {
    Socket::ALL.into_iter().filter(|socket| wanted(&format!("memory, {}", socket.name()))).collect()
}

/// Starts an agent and calls it.
pub(crate) fn memory(programs: &Programs, socket: Socket) -> Memory {
    Memory { socket, peak_bytes: peak(programs, socket).map_err(|failure| failure.to_string()) }
}

fn peak(programs: &Programs, socket: Socket) -> Result<i64, Failure> {
    let mut pair = Pair::start(programs, &peers::GUEST)?;
    pair.crowd(socket, Shape::LARGE, Crowded { callers: CALLERS, calls: LARGE_CALLS })?;
    pair.peak_bytes()
}
