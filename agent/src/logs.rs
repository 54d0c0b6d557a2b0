//! What the log may become. Guests can cause any number of lines: of one kind and tenant a few are written in a time,
//! and then how many more there were.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter};
use vaccel_proto::error::shown;

/// How long lines are counted, before as many are written again.
const TURN: Duration = Duration::from_secs(10);

/// Lines of one kind and tenant in a turn: enough to see what goes on.
const LINES_MAX: u64 = 10;

/// Kinds and tenants that are counted apart in a turn. Of more tenants than that, the lines of a kind are counted
/// together: who can be many tenants has no more lines for it.
const KINDS_MAX: usize = 64;

/// Where the lines come from that tell of others.
const TOLD: &str = concat!(module_path!(), "::told");

/// Where a line comes from, and the tenant it is about.
type Kind = (Identifier, Option<String>);

/// Lines of one kind in a turn.
#[derive(Default)]
struct Lines {
    /// What they say.
    text: String,
    written: u64,
    kept_back: u64,
}

/// Writes so many lines of a kind in a turn. Those about single calls, which somebody has to ask for, are all written.
/// Cloning it gives the same counts.
#[derive(Clone)]
pub(crate) struct Bounded {
    lines_max: u64,
    counts: Arc<Mutex<HashMap<Kind, Lines>>>,
}

impl Bounded {
    /// For an agent that serves others.
    pub(crate) fn new() -> Self {
        Self { lines_max: LINES_MAX, counts: Arc::default() }
    }

    /// For a command whose lines are all its own.
    pub(crate) fn all() -> Self {
        Self { lines_max: u64::MAX, counts: Arc::default() }
    }

    fn admits(&self, kind: Identifier, about: About) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kind = (kind, about.tenant);
        if counts.len() >= KINDS_MAX && !counts.contains_key(&kind) {
            kind.1 = None;
        }
        let lines = counts.entry(kind).or_default();
        lines.text = about.text;
        let is_written = lines.written < self.lines_max;
        *if is_written { &mut lines.written } else { &mut lines.kept_back } += 1;
        is_written
    }

    /// Begins a turn; tells what was kept back in the last one.
    fn turn(&self) {
        let counts = std::mem::take(&mut *self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        for ((_, tenant), Lines { text, kept_back, .. }) in counts {
            if kept_back > 0 {
                tracing::warn!(target: TOLD, tenant, lines = kept_back, like = text, "there were more lines");
            }
        }
    }

    /// Tells what is kept back, turn by turn, for ever.
    pub(crate) async fn tell(self) {
        let mut turns = tokio::time::interval(TURN);
        loop {
            turns.tick().await;
            self.turn();
        }
    }
}

impl<S: Subscriber> Filter<S> for Bounded {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO || metadata.target() == TOLD {
            return true;
        }
        let mut about = About::default();
        event.record(&mut about);
        self.admits(metadata.callsite(), about)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        // What is not written for its level must not be looked at.
        Some(LevelFilter::TRACE)
    }
}

/// What of a line says of which kind it is.
#[derive(Default)]
struct About {
    tenant: Option<String>,
    text: String,
}

impl Visit for About {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "tenant" => self.tenant = Some(format!("{value:?}")),
            "message" => self.text = format!("{value:?}"),
            _ => {}
        }
    }
}

/// Lets panics, of which those of engines end in an error of the call, be lines as all others.
pub(crate) fn take_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let text = shown(panic.payload_as_str().unwrap_or_default());
        tracing::error!(place, %text, "panicked");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use tracing_subscriber::Layer;
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("not poisoned").write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The lines that this writes.
    fn lines(write: impl FnOnce(&Bounded)) -> Vec<String> {
        let (bounded, written) = (Bounded::new(), Written::default());
        let into = written.clone();
        let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(move || into.clone());
        let layer = layer.with_filter(bounded.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || write(&bounded));
        let written = written.0.lock().expect("not poisoned");
        String::from_utf8_lossy(&written).lines().map(str::to_owned).collect()
    }

    fn refuse(tenant: &str) {
        tracing::warn!(%tenant, "connection refused");
    }

    #[test]
    fn of_a_kind_and_tenant_a_few_lines_are_written_and_how_many_more_there_were() {
        let lines = lines(|bounded| {
            for _ in 0..100 {
                refuse("a");
                tracing::debug!("asked for");
            }
            refuse("b");
            tracing::error!(tenant = "a", "another kind");
            bounded.turn();
            refuse("a");
            bounded.turn();
        });
        let count = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
        assert_eq!(count("connection refused tenant=a"), 11, "ten, and one of the next turn: {lines:?}");
        assert_eq!((count("connection refused tenant=b"), count("another kind")), (1, 1));
        assert_eq!(count("asked for"), 100);
        assert_eq!(count(r#"there were more lines tenant="a" lines=90 like="connection refused""#), 1);
    }

    #[test]
    fn who_is_many_tenants_has_no_more_lines_for_it() {
        let lines = lines(|_| (0..10_000).for_each(|tenant| refuse(&tenant.to_string())));
        assert!(lines.len() < 100, "{} lines", lines.len());
    }
}
