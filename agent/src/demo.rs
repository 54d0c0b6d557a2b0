//! `vaccel-agent demo`: agent and guest in one process, over real sockets, on bundled images. Ends by itself.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use bytes::Bytes;
use vaccel_client::{ClassifyOptions, Client, SessionOptions};
use vaccel_proto::{Endpoint, Error};

use crate::{Agent, Config, Direct, Settings, StartError};

/// Calls that each row of the latency table is measured on.
const CALLS: usize = 300;

/// Calls before the measurement: connections grow their windows, the engine makes its plan.
const WARM_UP: usize = 20;

/// Held-out digits: the model has never seen them. Name and content.
const IMAGES: &[(&str, &[u8])] = &[
    ("digit-016-is-0.png", include_bytes!("../../examples/images/digit-016-is-0.png")),
    ("digit-004-is-1.png", include_bytes!("../../examples/images/digit-004-is-1.png")),
    ("digit-000-is-2.png", include_bytes!("../../examples/images/digit-000-is-2.png")),
    ("digit-007-is-3.png", include_bytes!("../../examples/images/digit-007-is-3.png")),
    ("digit-002-is-4.png", include_bytes!("../../examples/images/digit-002-is-4.png")),
    ("digit-039-is-5.png", include_bytes!("../../examples/images/digit-039-is-5.png")),
    ("digit-001-is-6.png", include_bytes!("../../examples/images/digit-001-is-6.png")),
    ("digit-008-is-7.png", include_bytes!("../../examples/images/digit-008-is-7.png")),
    ("digit-is-8.jpg", include_bytes!("../../examples/images/digit-is-8.jpg")),
    ("digit-is-9.jpg", include_bytes!("../../examples/images/digit-is-9.jpg")),
];

/// Why the demo stopped.
#[derive(Debug)]
pub enum DemoError {
    /// The agent did not start.
    Start(StartError),
    /// A call failed.
    Call(Error),
    /// The output cannot be written, or the folder of the socket not made.
    Io(io::Error),
    /// The guest got another label than the engine gives.
    Differs(String),
}

impl std::fmt::Display for DemoError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Start(error) => error.fmt(f),
            Self::Call(error) => error.fmt(f),
            Self::Io(error) => error.fmt(f),
            Self::Differs(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for DemoError {}

impl From<StartError> for DemoError {
    fn from(error: StartError) -> Self {
        Self::Start(error)
    }
}

impl From<Error> for DemoError {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

impl From<io::Error> for DemoError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Runs the demo with these settings, but on addresses of its own.
///
/// # Errors
/// Anything that keeps a guest from getting the right labels.
pub async fn run(settings: Settings, out: &mut (impl Write + Send)) -> Result<(), DemoError> {
    let socket = std::env::temp_dir().join(format!("vaccel-demo-{}.sock", std::process::id()));
    let address = vec![format!("unix://{}", socket.display()), "tcp://127.0.0.1:0".into()];
    let store = Some(std::env::temp_dir().join(format!("vaccel-demo-{}", std::process::id())));
    let settings = Settings { address, vsock: None, token_file: None, store: store.clone(), ..settings };
    let config = Config::new(settings).map_err(StartError::Config)?;
    let direct = Direct::new(&config.engines)?;
    let agent = Agent::start(config).await?;
    let endpoints = agent.endpoints().to_vec();
    let shown = endpoints.iter().map(Endpoint::to_string).collect::<Vec<_>>().join("  ");
    writeln!(out, "agent   listens on {shown}")?;

    let done = visit(&endpoints, &direct, out).await;
    agent.drain().await;
    if let Some(store) = store {
        let _ = std::fs::remove_dir_all(store);
    }
    done?;
    writeln!(
        out,
        "\nnext    vaccel-agent                                   # the same agent, for your guests"
    )?;
    writeln!(out, "        vaccel classify examples/images/*.png          # a guest, in another terminal")?;
    writeln!(out, "        cargo run --release --example hello            # a guest of 12 lines")?;
    Ok(())
}

async fn visit(
    endpoints: &[Endpoint],
    direct: &Direct,
    out: &mut (impl Write + Send),
) -> Result<(), DemoError> {
    let images: Vec<Bytes> = IMAGES.iter().map(|(_, content)| Bytes::from_static(content)).collect();
    let expected = direct.classify(&images, 1)?;
    let mut rows = vec![("direct call".to_owned(), measure_direct(direct, &images)?)];
    for (index, endpoint) in endpoints.iter().enumerate() {
        let client = Client::builder(endpoint.clone()).connect().await?;
        if index == 0 {
            show_engines(&client, out).await?;
        }
        let session = client.open_session(SessionOptions::default()).await?;
        let options = ClassifyOptions { model: None, top_k: 1 };
        let found = session.classify(images.clone(), options).await?;
        for ((labels, (name, _)), expected) in found.iter().zip(IMAGES).zip(&expected) {
            let (Some(label), Some(expected)) = (labels.first(), expected.labels.first()) else {
                return Err(DemoError::Differs(format!("{name}: no label")));
            };
            if label.name != expected.name {
                let what = format!("{name}: {} by {endpoint}, {} by the engine", label.name, expected.name);
                return Err(DemoError::Differs(what));
            }
            if index == 0 {
                writeln!(out, "guest   {name:<20} {:<6} {:.4}", label.name, label.probability)?;
            }
        }
        let mut latencies = Vec::with_capacity(CALLS);
        for call in 0..WARM_UP + CALLS {
            let begun = Instant::now();
            session.classify([images[call % images.len()].clone()], options).await?;
            latencies.push(begun.elapsed());
        }
        let scheme = endpoint.to_string().split("://").next().unwrap_or_default().to_owned();
        rows.push((scheme, latencies.split_off(WARM_UP)));
        session.close().await?;
    }
    out.write_all(table(rows).as_bytes())?;
    Ok(())
}

async fn show_engines(client: &Client, out: &mut (impl Write + Send)) -> Result<(), DemoError> {
    for engine in client.info().await?.engines {
        let state = if engine.absent_because.is_empty() { engine.version } else { engine.absent_because };
        writeln!(out, "engine  {}: {state}", engine.name)?;
    }
    Ok(())
}

fn measure_direct(direct: &Direct, images: &[Bytes]) -> Result<Vec<Duration>, Error> {
    let mut latencies = Vec::with_capacity(CALLS);
    for call in 0..WARM_UP + CALLS {
        let begun = Instant::now();
        direct.classify(std::slice::from_ref(&images[call % images.len()]), 1)?;
        latencies.push(begun.elapsed());
    }
    Ok(latencies.split_off(WARM_UP))
}

fn table(rows: Vec<(String, Vec<Duration>)>) -> String {
    let mut text = format!("\nlatency of one image      p50        p99     (of {CALLS} calls)\n");
    for (name, mut latencies) in rows {
        latencies.sort_unstable();
        let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100].as_micros();
        let _ = writeln!(text, "        {name:<12} {:>7} µs {:>7} µs", at(50), at(99));
    }
    text
}
