//! What very many guests come to, for people and for programs.

use serde_json::{Value, json};

use super::{Active, Among, Crowded, EACH_BYTES_MAX, SLOWER_MAX, Scale};
use crate::report::mib;

/// What a percentile of calls is printed with.
const PERCENTILES: [usize; 2] = [50, 99];

fn verdict(is_within: bool) -> &'static str {
    if is_within { "within" } else { "ABOVE" }
}

fn kib_each(bytes: i64, connections: usize) -> f64 {
    bytes as f64 / 1024.0 / connections as f64
}

impl Scale {
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for (socket, crowded) in &self.idle {
            match crowded {
                Ok(crowded) => text += &crowded.text(socket.name()),
                Err(failure) => text += &format!("\nidle connections, {}: {failure}\n", socket.name()),
            }
        }
        match &self.active {
            Some(Ok(active)) => text += &active.text(),
            Some(Err(failure)) => text += &format!("\nactive guests: {failure}\n"),
            None => {}
        }
        text
    }

    pub(crate) fn json(&self) -> Value {
        let idle = self.idle.iter().map(|(socket, crowded)| match crowded {
            Ok(crowded) => crowded.json(socket.name()),
            Err(failure) => json!({ "socket": socket.name(), "failure": failure }),
        });
        let active = self.active.as_ref().map(|active| match active {
            Ok(active) => active.json(),
            Err(failure) => json!({ "failure": failure }),
        });
        json!({ "idle": idle.collect::<Vec<_>>(), "active": active })
    }
}

impl Crowded {
    fn text(&self, socket: &str) -> String {
        let ([before, after], [slab, buffers]) = (self.resident_bytes, self.kernel_bytes);
        let each = self.each_bytes();
        let mut text = format!(
            "\n{} idle connections, {socket}, each with a session and one call made: the agent's memory (VmRSS) \
             {:.1} -> {:.1} MiB\n  {:.1} KiB each, {} {} KiB; the kernel's for both ends {:.1} KiB each, and {:.1} KiB \
             in buffers of TCP\n",
            self.connections,
            mib(before),
            mib(after),
            each / 1024.0,
            verdict(each <= EACH_BYTES_MAX),
            EACH_BYTES_MAX / 1024.0,
            kib_each(slab, self.connections),
            kib_each(buffers, self.connections),
        );
        text += &format!(
            "  {:<22} {:>9} {:>9}   {:>9} {:>9}   {:>7}\n",
            "a guest beside them", "p50 alone", "among µs", "p99 alone", "among µs", "x p99"
        );
        self.among.iter().for_each(|among| text += &among.text());
        text
    }

    fn json(&self, socket: &str) -> Value {
        let ([before, after], [slab, buffers]) = (self.resident_bytes, self.kernel_bytes);
        json!({
            "socket": socket, "connections": self.connections,
            "resident_before_bytes": before, "resident_bytes": after, "each_bytes": self.each_bytes(),
            "kernel_bytes": slab, "tcp_buffer_bytes": buffers,
            "guest": self.among.iter().map(Among::json).collect::<Vec<_>>(),
        })
    }
}

impl Among {
    fn text(&self) -> String {
        let name = self.shape.to_string();
        let ([Some([alone, among]), Some([alone_slow, among_slow])], Some(slower)) =
            (PERCENTILES.map(|percent| self.percentiles(percent)), self.slower())
        else {
            return format!("  {name:<22} no calls\n");
        };
        format!(
            "  {name:<22} {alone:>9.1} {among:>9.1}   {alone_slow:>9.1} {among_slow:>9.1}   {slower:>7.2} {} \
             {SLOWER_MAX}\n",
            verdict(slower <= SLOWER_MAX),
        )
    }

    fn json(&self) -> Value {
        let [p50, p99] = PERCENTILES.map(|percent| self.percentiles(percent));
        json!({
            "shape": self.shape.to_string(), "calls": self.times.each_ref().map(Vec::len),
            "alone_among_p50_us": p50, "alone_among_p99_us": p99, "x_p99": self.slower(),
        })
    }
}

impl Active {
    fn text(&self) -> String {
        let ([before, after], outcome) = (self.resident_bytes, &self.outcome);
        let [p50, p99] = PERCENTILES.map(|percent| self.percentile(percent).unwrap_or(f64::NAN));
        let errors = outcome.errors.len();
        let first = outcome.errors.first().map_or(String::new(), |error| format!(", the first: {error}"));
        format!(
            "\n{} guests that call once a second each for {} s, half over TCP, half over unix, half of the calls \
             empty, half of 64 KiB\n  {:.0} calls/s, p50 {p50:.1} µs, p99 {p99:.1} µs, {errors} errors{first}; \
             the agent's memory {:.1} -> {:.1} MiB\n",
            self.guests,
            self.time.as_secs(),
            outcome.rate,
            mib(before),
            mib(after),
        )
    }

    fn json(&self) -> Value {
        let ([before, after], outcome) = (self.resident_bytes, &self.outcome);
        let [p50, p99] = PERCENTILES.map(|percent| self.percentile(percent));
        json!({
            "guests": self.guests, "seconds": self.time.as_secs(), "calls": outcome.times.len(),
            "calls_per_s": outcome.rate, "p50_us": p50, "p99_us": p99, "errors": outcome.errors,
            "resident_before_bytes": before, "resident_bytes": after,
        })
    }
}
