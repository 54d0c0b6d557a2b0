//! Calls over a long line, 100 ms there and back at a gigabit per second: how many round trips they wait beyond those
//! of a raw socket, and what part of the line a tensor uses that needs more than one message.

mod relay;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::peers::{CLIENT, GUEST, Peer, RAW};
use crate::process::{Pair, Programs};
use crate::rows::median;
use crate::shape::{Shape, Socket};
use crate::{Effort, Failure};

/// Of a tensor that is longer than a message, how much of the line is to be used at least.
const SHARE_MIN: f64 = 0.85;

/// Requests that the agent holds for a tenant, in MiB: the longest, and its reply.
const FLAGS: [&str; 2] = ["--tenant-in-flight-mib", "1024"];

/// Rounds that count, at most: a call takes as long here as it takes, and not as long as the machine likes.
const ROUNDS_MAX: usize = 5;

/// Calls over the line.
#[derive(Debug)]
pub(crate) struct Row {
    peer: &'static Peer,
    shape: Shape,
    failure: Option<String>,
    /// The first one, in microseconds: with what comes only once, as larger windows do.
    first: Option<f64>,
    /// In microseconds.
    times: Vec<f64>,
}

impl Row {
    fn name(&self) -> String {
        format!("wan, {}, {}", self.peer.name, self.shape)
    }

    fn is_raw(&self) -> bool {
        self.peer.is_raw()
    }

    fn p50_us(&self) -> Option<f64> {
        median(self.times.clone())
    }

    /// Whether the line's rate is what counts.
    fn is_long(&self) -> bool {
        self.shape.up >= Shape::HUGE.up
    }

    fn measure(&mut self, pair: &mut Pair) {
        if self.failure.is_some() {
            return;
        }
        match (0..2).map(|_| pair.call(Socket::Tcp, self.shape, 1)).collect::<Result<Vec<_>, _>>() {
            Ok(calls) => {
                let [first, counted] = [0, 1].map(|call| calls[call].first().copied());
                self.first = self.first.or(first);
                self.times.extend(counted);
            }
            Err(failure) => self.failure = Some(failure.to_string()),
        }
    }

    /// Bytes per second both ways, without the round trip that any call takes.
    fn rate(&self, round_trip_us: f64) -> Option<f64> {
        Some((self.shape.up + self.shape.down()) as f64 / ((self.p50_us()? - round_trip_us) / 1e6))
    }
}

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Wan(Vec<Row>);

/// The rows that are wanted by their names, and those they are compared with.
pub(crate) fn all(wanted: &dyn Fn(&str) -> bool) -> Wan {
    let mut rows = Vec::new();
    for shape in [Shape::EMPTY, Shape::IMAGE, Shape::LARGE, Shape::HUGE, Shape { echo: true, ..Shape::HUGE }]
    {
        for peer in [&RAW, &GUEST, &CLIENT] {
            let row = Row { peer, shape, failure: None, first: None, times: Vec::new() };
            // The thin guest's calls are one message.
            if !(row.is_long() && peer.name == GUEST.name) {
                rows.push(row);
            }
        }
    }
    let shapes: Vec<Shape> = rows.iter().filter(|row| wanted(&row.name())).map(|row| row.shape).collect();
    rows.retain(|row| {
        let is_compared = row.is_raw() && (shapes.contains(&row.shape) || row.shape == Shape::EMPTY);
        !shapes.is_empty() && (is_compared || wanted(&row.name()))
    });
    Wan(rows)
}

/// Measures all rows in turn. Before each call that counts comes one that does not: the raw socket is a new one after
/// calls of another shape.
pub(crate) fn measure(Wan(rows): &mut Wan, programs: &Programs, effort: Effort) {
    let mut pairs: BTreeMap<&str, Result<Pair, String>> = BTreeMap::new();
    let rounds = if rows.is_empty() { 0 } else { effort.rounds.min(ROUNDS_MAX) };
    for round in 0..rounds {
        for row in &mut *rows {
            let start = || start(programs, row.peer).map_err(|failure| failure.to_string());
            match pairs.entry(row.peer.name).or_insert_with(start) {
                Ok(pair) => row.measure(pair),
                Err(failure) => row.failure = Some(failure.clone()),
            }
        }
        eprintln!("wan: round {} of {rounds}", round + 1);
    }
}

fn start(programs: &Programs, peer: &Peer) -> Result<Pair, Failure> {
    Pair::start_with(programs, peer, &FLAGS.map(String::from), |[tcp, _]| {
        *tcp = relay::start(tcp)?;
        Ok(())
    })
}

impl Wan {
    pub(crate) fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.0.iter().all(|row| row.failure.is_none())
    }

    fn raw(&self, shape: Shape) -> Option<f64> {
        self.0.iter().find(|row| row.is_raw() && row.shape == shape)?.p50_us()
    }

    /// What the shortest call takes.
    fn round_trip_us(&self) -> f64 {
        self.raw(Shape::EMPTY).unwrap_or(2e6 * relay::DELAY.as_secs_f64())
    }

    pub(crate) fn text(&self) -> String {
        if self.is_nothing() {
            return String::new();
        }
        let round_trip = self.round_trip_us();
        let mut text = format!(
            "\na long line, TCP: a relay in user space of {} ms each way and {:.0} MB/s; a round trip is {:.1} ms; \
             {} rounds\n\
             {:<35} {:>9} {:>9} {:>7} {:>11} {:>7} {:>8}\n",
            relay::DELAY.as_millis(),
            relay::RATE / 1e6,
            round_trip / 1e3,
            self.0.iter().map(|row| row.times.len()).max().unwrap_or(0),
            "",
            "first ms",
            "p50 ms",
            "x raw",
            "trips more",
            "MB/s",
            "of line"
        );
        for row in &self.0 {
            text += &format!("  {:<33}", format!("{}, {}", row.peer.name, row.shape));
            if let (Some(first), Some(p50), Some(raw)) = (row.first, row.p50_us(), self.raw(row.shape)) {
                let (first, more) = (first / 1e3, (p50 - raw) / round_trip);
                text += &format!(" {first:>9.1} {:>9.1} {:>7.2} {more:>11.2}", p50 / 1e3, p50 / raw);
            }
            if let Some(rate) = row.rate(round_trip).filter(|_| row.is_long()) {
                let share = rate / relay::RATE;
                text += &format!(" {:>7.1} {:>6.0} %", rate / 1e6, share * 100.0);
                if !row.is_raw() {
                    let verdict = if share >= SHARE_MIN { "within" } else { "BELOW" };
                    text += &format!(", {verdict} {:.0} %", SHARE_MIN * 100.0);
                }
            }
            text += &row.failure.as_ref().map_or("\n".into(), |failure| format!("  {failure}\n"));
        }
        text
    }

    pub(crate) fn json(&self) -> Value {
        let round_trip = self.round_trip_us();
        let rows = self.0.iter().map(|row| {
            let rate = row.rate(round_trip).filter(|_| row.is_long());
            json!({
                "row": row.peer.name, "shape": row.shape.to_string(),
                "up_bytes": row.shape.up, "down_bytes": row.shape.down(), "first_us": row.first, "p50_us": row.p50_us(),
                "x_raw": row.p50_us().zip(self.raw(row.shape)).map(|(own, raw)| own / raw),
                "bytes_per_s": rate, "of_line": rate.map(|rate| rate / relay::RATE),
                "calls_us": row.times, "failure": row.failure,
            })
        });
        json!({
            "delay_ms": relay::DELAY.as_millis() as u64, "rate_bytes_per_s": relay::RATE,
            "rows": rows.collect::<Vec<_>>(),
        })
    }
}
