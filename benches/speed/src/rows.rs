//! Rows of the main table: calls of one peer, one shape and one socket, measured in rounds.
//!
//! A turn of a row is one burst. Before it come a call that is not counted, for whatever comes only once, and two empty
//! bursts: what an empty burst takes is what being commanded costs, and is taken off. The empty burst behind the calls
//! gives a server that answers before it is done the time to be done.

use crate::peers::{self, Cover, Peer};
use crate::process::{Pair, Pairs};
use crate::shape::{Shape, Socket};
use crate::usage::Usage;
use crate::{Effort, Failure};

/// Turns of each row in a round.
const TURNS: usize = 4;

/// Calls of one peer, one shape and one socket.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) peer: &'static Peer,
    pub(crate) socket: Socket,
    pub(crate) shape: Shape,
    /// Why there are no figures, or not all.
    pub(crate) failure: Option<String>,
    /// They were not even to be measured.
    pub(crate) is_left_out: bool,
    /// Medians of the rounds, in microseconds.
    pub(crate) medians: Vec<f64>,
    /// All calls, in microseconds.
    pub(crate) times: Vec<f64>,
    /// What all calls took of client and server.
    used: [Usage; 2],
}

/// What one call takes of one side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Each {
    pub(crate) cpu_us: f64,
    pub(crate) system_calls: f64,
    pub(crate) page_faults: f64,
}

impl Row {
    fn new(peer: &'static Peer, socket: Socket, shape: Shape) -> Option<Self> {
        let cover = peer.covers(socket, shape);
        let (medians, times, used) = (Vec::new(), Vec::new(), [Usage::default(); 2]);
        let mut row = Self { peer, socket, shape, failure: None, is_left_out: false, medians, times, used };
        match cover {
            Cover::Yes => {}
            Cover::Above(limit) => row.leave_out(limit),
            Cover::No => return None,
        }
        Some(row)
    }

    /// Says that there will be no figures, and why: that the measurement cannot have them is no failure of it.
    pub(crate) fn leave_out(&mut self, why: &str) {
        self.failure = Some(format!("not measured: {why}"));
        self.is_left_out = true;
    }

    /// By which people choose rows.
    pub(crate) fn name(&self) -> String {
        format!("{}, {}, {}", self.peer.name, self.socket.name(), self.shape)
    }

    /// Median of the rounds' medians, in microseconds.
    pub(crate) fn p50(&self) -> Option<f64> {
        median(self.medians.clone())
    }

    /// Of all calls, in microseconds.
    pub(crate) fn p99(&self) -> Option<f64> {
        let mut times = self.times.clone();
        times.sort_by(f64::total_cmp);
        times.get(times.len() * 99 / 100).copied()
    }

    /// Median of the rounds' ratios to another row.
    pub(crate) fn ratio(&self, other: &Self) -> Option<f64> {
        median(self.medians.iter().zip(&other.medians).map(|(own, other)| own / other).collect())
    }

    /// Ratio of the best rounds: whether the kernel keeps client and server on one core decides about a short call and
    /// stays for a round or more, and the best rounds had the same luck.
    pub(crate) fn best_ratio(&self, other: &Self) -> Option<f64> {
        let best = |row: &Self| row.medians.iter().copied().min_by(f64::total_cmp);
        Some(best(self)? / best(other)?)
    }

    /// What one call takes of client and server.
    pub(crate) fn each(&self) -> Option<[Each; 2]> {
        let calls = self.times.len() as f64;
        let each = |used: Usage| Each {
            cpu_us: used.cpu_ns as f64 / 1e3 / calls,
            system_calls: used.system_calls as f64 / calls,
            page_faults: used.page_faults as f64 / calls,
        };
        (calls > 0.0).then(|| self.used.map(each))
    }

    /// One turn: the times of its calls, and what they took.
    fn turn(&self, pair: &mut Pair, calls: usize) -> Result<(Vec<f64>, [Usage; 2]), Failure> {
        let (socket, shape) = (self.socket, self.shape);
        pair.call(socket, shape, 1)?;
        pair.call(socket, shape, 0)?;
        let before = pair.usage()?;
        for _ in 0..2 {
            pair.call(socket, shape, 0)?;
        }
        let between = pair.usage()?;
        let times = pair.call(socket, shape, calls)?;
        pair.call(socket, shape, 0)?;
        let after = pair.usage()?;
        let used = [0, 1].map(|side| (after[side] - between[side]) - (between[side] - before[side]));
        Ok((times, used))
    }

    /// Takes a turn and keeps it, or why there was none: then there are no more.
    fn take(&mut self, pairs: &mut Pairs, calls: usize) {
        if self.failure.is_some() {
            return;
        }
        match pairs.of(self.peer).and_then(|pair| self.turn(pair, calls)) {
            Ok((times, used)) => {
                self.times.extend(times);
                self.used.iter_mut().zip(used).for_each(|(all, used)| *all += used);
            }
            Err(failure) => self.failure = Some(failure.to_string()),
        }
    }

    fn forget(&mut self) {
        self.medians.clear();
        self.times.clear();
        self.used = [Usage::default(); 2];
    }
}

/// The rows that are wanted by their names, and those they are compared with.
pub(crate) fn all(wanted: &dyn Fn(&str) -> bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for shape in Shape::ALL {
        for socket in Socket::ALL {
            let row = |peer| Row::new(peer, socket, shape);
            let others: Vec<Row> = peers::ALL.iter().filter_map(row).collect();
            let any = others.iter().any(|row| wanted(&row.name()));
            rows.extend(others.into_iter().filter(|row| (any && row.peer.is_raw()) || wanted(&row.name())));
        }
    }
    rows
}

/// Measures all rows in turn.
pub(crate) fn measure(rows: &mut [Row], pairs: &mut Pairs, effort: Effort) {
    let turns = if effort.tiny { 1 } else { TURNS };
    for round in 0..=effort.rounds {
        for group in rows.chunk_by_mut(|one, other| (one.shape, one.socket) == (other.shape, other.socket)) {
            measure_group(group, pairs, turns, effort.tiny);
        }
        if round == 0 {
            rows.iter_mut().for_each(Row::forget);
        }
        eprintln!("round {round} of {}", effort.rounds);
    }
}

/// One round of the rows that are compared with each other.
fn measure_group(group: &mut [Row], pairs: &mut Pairs, turns: usize, tiny: bool) {
    let begun: Vec<usize> = group.iter().map(|row| row.times.len()).collect();
    for _ in 0..turns {
        for row in &mut *group {
            let calls = row.shape.calls_in_burst();
            row.take(pairs, if tiny { calls.min(3) } else { calls });
        }
    }
    for (row, begun) in group.iter_mut().zip(begun) {
        let round = row.times[begun..].to_vec();
        row.medians.extend(median(round));
    }
}

/// The median; none of nothing.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
