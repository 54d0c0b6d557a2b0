//! The tables for people and the document for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::Effort;
use crate::crowd::{self, Memory, Row as CrowdRow};
use crate::machine::Machine;
use crate::rows::{Row, median};
use crate::scale::Scale;
use crate::wan::Wan;

const LEGEND: &str = "\
p50: median of the rounds' medians; p99: of all calls; x raw: median of the rounds' ratios to the raw socket;
x best: ratio of the best rounds, for short calls, which depend on whether the kernel keeps both sides on one core.
Of client/server, by call: CPU, user and system, all threads; rw: calls of read, readv, write and writev, the only ones
that the kernel counts (tokio reads sockets by recv, ttrpc by recv and send, gRPC's core by recvmsg and sendmsg: those
are not in it, wake-ups by eventfd are); faults: minor page faults. What being told to make calls costs is taken off.
Bytes up, and at most 4096 down unless it is an echo. On the agent: exec on its engine that computes nothing, an echo is
a model run on it; \"model\" is a Slice by tract. Sinks are HTTP/2 servers that read and answer, with frames of so much.
tonic, ttrpc and grpcio with their defaults, but that messages may be long; grpcio's are bytes without a message around.
";

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) effort: Effort,
    pub(crate) rows: Vec<Row>,
    /// The most memory of each server after single calls, in bytes.
    pub(crate) peaks: Vec<(&'static str, i64)>,
    pub(crate) crowds: Vec<CrowdRow>,
    pub(crate) memory: Vec<Memory>,
    pub(crate) scale: Scale,
    pub(crate) wan: Wan,
}

impl Report {
    /// Whether everything that can be measured was.
    pub(crate) fn is_whole(&self) -> bool {
        let rows = self.rows.iter().all(|row| row.failure.is_none() || row.is_left_out);
        let crowds = self.crowds.iter().all(|row| row.failure.is_none());
        let memory = self.memory.iter().all(|memory| memory.peak_bytes.is_ok());
        rows && crowds && memory && self.scale.is_whole() && self.wan.is_whole()
    }

    /// The row of the raw socket that a row is compared with.
    pub(crate) fn raw(&self, row: &Row) -> Option<&Row> {
        self.rows
            .iter()
            .find(|other| other.peer.is_raw() && (other.shape, other.socket) == (row.shape, row.socket))
    }

    pub(crate) fn ratio(&self, row: &Row) -> Option<f64> {
        row.ratio(self.raw(row)?)
    }

    fn best_ratio(&self, row: &Row) -> Option<f64> {
        row.best_ratio(self.raw(row)?)
    }

    fn crowd_ratio(&self, row: &CrowdRow) -> Option<f64> {
        row.ratio(self.crowds.iter().find(|other| other.peer.is_raw() && other.socket == row.socket)?)
    }

    pub(crate) fn text(&self) -> String {
        let rounds = self.effort.rounds;
        let mut text = format!("\n{}\n", self.machine);
        if !(self.rows.is_empty() && self.crowds.is_empty()) {
            text += &format!("{rounds} interleaved rounds\n\n{LEGEND}");
        }
        for group in self.rows.chunk_by(|one, other| (one.shape, one.socket) == (other.shape, other.socket)) {
            let Row { shape, socket, .. } = &group[0];
            text += &format!(
                "\n{:<24} {:>9} {:>9} {:>7} {:>6}   {:>15}   {:>11}   {:>13}\n",
                format!("{shape}, {}", socket.name()),
                "p50 µs",
                "p99 µs",
                "x raw",
                "x best",
                "CPU µs",
                "rw",
                "faults"
            );
            group.iter().for_each(|row| self.write_row(&mut text, row));
        }
        self.write_rest(&mut text);
        text + &self.scale.text() + &self.wan.text()
    }

    fn write_row(&self, text: &mut String, row: &Row) {
        *text += &format!("  {:<22}", row.peer.name);
        if let (Some(p50), Some(p99), Some([client, server])) = (row.p50(), row.p99(), row.each()) {
            let times = |ratio: Option<f64>| ratio.map_or_else(|| "?".into(), |ratio| format!("{ratio:.2}"));
            let (ratio, best) = (times(self.ratio(row)), times(self.best_ratio(row)));
            let both = |one: f64, other: f64, decimals| format!("{one:.decimals$}/{other:.decimals$}");
            *text += &format!(
                " {p50:>9.1} {p99:>9.1} {ratio:>7} {best:>6}   {:>15}   {:>11}   {:>13}",
                both(client.cpu_us, server.cpu_us, 1),
                both(client.system_calls, server.system_calls, 1),
                both(client.page_faults, server.page_faults, 1),
            );
        }
        if let Some(failure) = &row.failure {
            *text += &format!("  {failure}");
        }
        *text += "\n";
    }

    fn write_rest(&self, text: &mut String) {
        if !self.peaks.is_empty() {
            *text += "\nmost memory of a server (VmHWM) after all of the above\n";
        }
        for (name, bytes) in &self.peaks {
            *text += &format!("  {name:<22} {:>9.1} MiB\n", mib(*bytes));
        }
        if !self.crowds.is_empty() {
            *text += &format!(
                "\n{} callers at the same time, 602112 B; a connection each, or one client\n{:<31} {:>9} {:>7}\n",
                crowd::CALLERS,
                "",
                "calls/s",
                "x raw"
            );
        }
        for row in &self.crowds {
            *text += &format!("  {:<29}", format!("{}, {}", row.peer.name, row.socket.name()));
            if let (Some(rate), Some(ratio)) = (median(row.rates.clone()), self.crowd_ratio(row)) {
                *text += &format!(" {rate:>9.0} {ratio:>7.2}");
            }
            let failure = row.failure.as_deref().unwrap_or_default();
            // A text takes whatever is written to it.
            let _ = writeln!(text, "  {failure}");
        }
        for Memory { socket, peak_bytes } in &self.memory {
            let bound = 2 * crowd::payload_bytes() + crowd::BESIDE_BYTES;
            let peak = match peak_bytes {
                Ok(bytes) => {
                    let verdict = if *bytes <= bound { "within" } else { "ABOVE" };
                    format!("{:.1} MiB, {verdict}", mib(*bytes))
                }
                Err(failure) => format!("{failure};"),
            };
            *text += &format!(
                "\nmost memory of a fresh agent with {} calls of 16 MiB in flight, {}: {peak} 2 x payload + 32 MiB \
                 = {} MiB",
                crowd::CALLERS,
                socket.name(),
                mib(bound)
            );
        }
        if !self.memory.is_empty() {
            *text += "\n";
        }
    }

    pub(crate) fn json(&self) -> Value {
        let Machine { cores, cpu, kernel, commit } = &self.machine;
        let peaks = self.peaks.iter().map(|(name, bytes)| json!({ "server": name, "peak_bytes": bytes }));
        let crowds = self.crowds.iter().map(|row| {
            json!({
                "row": row.peer.name, "socket": row.socket.name(), "callers": crowd::CALLERS,
                "calls_per_s": median(row.rates.clone()), "x_raw": self.crowd_ratio(row),
                "rounds_calls_per_s": row.rates, "failure": row.failure,
            })
        });
        let memory = self.memory.iter().map(|memory| {
            json!({
                "socket": memory.socket.name(), "payload_bytes": crowd::payload_bytes(),
                "peak_bytes": memory.peak_bytes.as_ref().ok(), "failure": memory.peak_bytes.as_ref().err(),
            })
        });
        json!({
            "machine": { "cores": cores, "cpu": cpu, "kernel": kernel },
            "commit": commit,
            "rounds": self.effort.rounds,
            "rows": self.rows.iter().map(|row| self.row_json(row)).collect::<Vec<_>>(),
            "peaks": peaks.collect::<Vec<_>>(),
            "concurrency": crowds.collect::<Vec<_>>(),
            "memory": memory.collect::<Vec<_>>(),
            "scale": self.scale.json(),
            "wan": self.wan.json(),
        })
    }

    fn row_json(&self, row: &Row) -> Value {
        let each = row.each().map(|sides| {
            sides.map(|side| {
                json!({
                    "cpu_us": side.cpu_us, "rw_calls": side.system_calls, "page_faults": side.page_faults,
                })
            })
        });
        json!({
            "row": row.peer.name, "socket": row.socket.name(), "shape": row.shape.to_string(),
            "up_bytes": row.shape.up, "down_bytes": row.shape.down(), "calls": row.times.len(),
            "p50_us": row.p50(), "p99_us": row.p99(), "x_raw": self.ratio(row),
            "x_best": self.best_ratio(row), "rounds_us": row.medians,
            "client": each.as_ref().map(|[client, _]| client), "server": each.as_ref().map(|[_, server]| server),
            "failure": row.failure,
        })
    }
}

/// So many bytes in MiB.
pub(crate) fn mib(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
