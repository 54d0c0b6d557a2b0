//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use vaccel_client::proto::limits::DEADLINE_MAX;
use vaccel_client::{Builder, Client, DEADLINE_DEFAULT, Endpoint, Pem, Tls, env};

use crate::output::Failure;

/// How long a dial may take when there is no shorter deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Most calls that `bench` holds in flight: beyond it the callers themselves are what is measured.
const CONCURRENCY_MAX: i64 = 4096;
/// Most calls a second that `bench` makes, for the same reason.
const RATE_MAX: f64 = 1e6;

/// Asks a vaccel agent what it can do, looks at images and runs models.
#[derive(Debug, Parser)]
#[command(name = "vaccel", version, propagate_version = true)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where the agent is and how to speak to it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Agent")]
pub(crate) struct Target {
    /// vsock://CID:PORT, hvsock://PATH:PORT, unix://PATH, tcp://HOST:PORT or tls://HOST:PORT
    /// [env: VACCEL_RPC_ADDRESS, VACCEL_RPC_ADDR] [default: tcp://127.0.0.1:65500]
    #[arg(long, global = true, value_name = "URL")]
    address: Option<Endpoint>,

    /// Print one JSON document on stdout, and errors as JSON on stderr
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// How long each call may take; for an upload, how long without progress [default: 60]
    #[arg(long, global = true, value_name = "SECONDS", value_parser = seconds)]
    deadline: Option<Duration>,

    /// Device to compute on; the agent chooses if not said
    #[arg(long, global = true, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) device: String,

    /// Engine to load models with; the agent chooses if not said
    #[arg(long, global = true, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) engine: String,

    /// PEM file of the CA that signed the agent's certificate; the system's CAs if not said
    /// [env: VACCEL_TLS_CA]
    #[arg(long, global = true, value_name = "FILE")]
    tls_ca: Option<PathBuf>,

    /// PEM file of this client's certificate chain [env: VACCEL_TLS_CERT]
    #[arg(long, global = true, value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// PEM file of its private key [env: VACCEL_TLS_KEY]
    #[arg(long, global = true, value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// Name that the agent's certificate is for, where it is not the host of the address
    #[arg(long, global = true, value_name = "NAME")]
    tls_server_name: Option<String>,

    /// File that holds the bearer token [env: VACCEL_TOKEN_FILE, or the token itself in VACCEL_TOKEN]
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What the agent is, what it can do, and who it takes you for
    Info,
    /// The operations it has
    Ops,
    /// Classify images
    Classify(ClassifyArgs),
    /// Find things in images
    Detect(FindArgs),
    /// Tell what the parts of images are
    Segment(MapArgs),
    /// Find bodies in images, and their points
    Pose(FindArgs),
    /// Tell how far the parts of images are
    Depth(MapArgs),
    /// Run a model on tensors from .npy files
    Run(RunArgs),
    /// Measure how fast a model of the Open Inference Protocol answers under load
    Bench(BenchArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ClassifyArgs {
    /// PNG or JPEG files
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<PathBuf>,

    /// Model file, or folder with the model's files; the agent's embedded digit classifier if not said
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) model: Option<PathBuf>,

    /// Labels per image
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) top: u32,
}

/// Images, and a model that looks at them.
#[derive(Debug, clap::Args)]
pub(crate) struct LookArgs {
    /// PNG or JPEG files
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<PathBuf>,

    /// Model file, or folder with the model's files, that describes how images become its input and what its outputs
    /// mean; the agent's own for the operation if not said
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) model: Option<PathBuf>,

    /// Folder for pictures, the images with what was found drawn into them, as JPEG files
    #[arg(long, value_name = "DIR")]
    pub(crate) pictures: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FindArgs {
    #[command(flatten)]
    pub(crate) look: LookArgs,

    /// Least probability of what is found; what the model's description says if not said
    #[arg(long, value_name = "P", default_value = "0", hide_default_value = true)]
    pub(crate) threshold: f32,

    /// Most things in an image, the most probable ones
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) at_most: u32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct MapArgs {
    #[command(flatten)]
    pub(crate) look: LookArgs,

    /// Folder for the maps, a .npy file for each image
    #[arg(long, value_name = "DIR")]
    pub(crate) maps: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// Model file, or folder with the model's files
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,

    /// An input and the .npy file with its tensor; without a name, in the model's order
    #[arg(long = "input", required = true, value_name = "[NAME=]FILE.npy", value_parser = input)]
    pub(crate) inputs: Vec<Input>,

    /// Folder for the outputs, one .npy file each; without it, their first values are printed
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// Name of the model in the agent's repository
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,

    /// Protocol of the calls
    #[arg(long, value_name = "NAME", value_enum, default_value_t = Protocol::Grpc)]
    pub(crate) protocol: Protocol,

    /// Rows of each call
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch: u32,

    /// Calls in flight: each caller calls again when it has its answer. One step for each number
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1", conflicts_with = "rate")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=CONCURRENCY_MAX))]
    pub(crate) concurrency: Vec<u32>,

    /// Calls a second, at fixed times whether or not earlier ones were answered; latency counts from when a call was
    /// due. One step for each number
    #[arg(long, value_name = "R,...", value_delimiter = ',', value_parser = rate)]
    pub(crate) rate: Vec<f64>,

    /// How long each step measures
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub(crate) duration: Duration,

    /// How long each step runs before it measures; 0 for not at all
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds_or_none)]
    pub(crate) warm_up: Duration,

    /// Sizes of an input that has open ones, without the batch; repeats
    #[arg(long = "shape", value_name = "NAME:D1,D2", value_parser = shape)]
    pub(crate) shapes: Vec<Shape>,

    /// File for a plot of latency over throughput
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// HTTP/2, some calls on each connection
    Grpc,
    /// HTTP/1.1 with binary tensors, a connection for each call in flight
    Http,
}

/// What one step of `bench` asks of the agent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Load {
    /// Calls in flight.
    Concurrency(u32),
    /// Calls a second.
    Rate(f64),
}

impl BenchArgs {
    pub(crate) fn loads(&self) -> Vec<Load> {
        if self.rate.is_empty() {
            return self.concurrency.iter().copied().map(Load::Concurrency).collect();
        }
        self.rate.iter().copied().map(Load::Rate).collect()
    }
}

/// The sizes of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) name: String,
    pub(crate) sizes: Vec<i64>,
}

fn shape(text: &str) -> Result<Shape, String> {
    // Names of TensorFlow's tensors have a colon in them.
    let parsed = text.rsplit_once(':').filter(|(name, _)| !name.is_empty()).and_then(|(name, sizes)| {
        let sizes: Option<Vec<i64>> =
            sizes.split(',').map(|size| size.parse().ok().filter(|size| *size > 0)).collect();
        Some(Shape { name: name.into(), sizes: sizes? })
    });
    parsed.ok_or_else(|| "expected NAME:D1,D2 with sizes of 1 or more, as in x:3,224,224".into())
}

fn rate(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|rate| *rate > 0.0 && *rate <= RATE_MAX)
        .ok_or_else(|| format!("expected calls a second, more than 0 and at most {RATE_MAX}"))
}

fn seconds_or_none(text: &str) -> Result<Duration, String> {
    let none = text.parse().is_ok_and(|seconds: f64| seconds == 0.0);
    if none { Ok(Duration::ZERO) } else { seconds(text) }
}

#[derive(Clone, Debug)]
pub(crate) struct Input {
    /// Empty: by position.
    pub(crate) name: String,
    pub(crate) file: PathBuf,
}

fn input(text: &str) -> Result<Input, String> {
    let (name, file) = text.split_once('=').unwrap_or(("", text));
    if file.is_empty() {
        return Err("expected NAME=FILE.npy".into());
    }
    Ok(Input { name: name.into(), file: file.into() })
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| !time.is_zero() && *time <= DEADLINE_MAX)
        .ok_or_else(|| format!("expected seconds, more than 0 and at most {}", DEADLINE_MAX.as_secs()))
}

impl Target {
    /// How long a call may take.
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline.unwrap_or(DEADLINE_DEFAULT)
    }

    pub(crate) fn builder(&self) -> Result<Builder, Failure> {
        let usage = |e: vaccel_client::Error| Failure::Usage(e.to_string());
        let endpoint = match &self.address {
            Some(endpoint) => endpoint.clone(),
            None => env::address().map_err(usage)?,
        };
        let endpoint = endpoint.for_dialing().map_err(|e| Failure::Usage(e.to_string()))?;
        let set = env::tls().map_err(usage)?;
        let file = |path: &Option<PathBuf>| path.clone().map(Pem::File);
        let identity = match (file(&self.tls_cert), file(&self.tls_key)) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => set.identity,
            _ => return Err(Failure::Usage("--tls-cert and --tls-key go together".into())),
        };
        let ca = file(&self.tls_ca).or(set.ca);
        let tls = Tls { ca, identity, server_name: self.tls_server_name.clone() };
        let mut builder = Client::builder(endpoint).tls(tls);
        let token = match &self.token_file {
            Some(path) => Some(env::token_in(path).map_err(usage)?),
            None => env::token().map_err(usage)?,
        };
        if let Some(token) = token {
            builder = builder.token(token);
        }
        if let Some(deadline) = self.deadline {
            builder = builder.deadline(deadline).connect_timeout(deadline.min(CONNECT_TIMEOUT));
        }
        Ok(builder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn deadlines_have_bounds() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "601", "NaN", "inf", "1e400", "x", ""] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    fn bench(flags: &[&str]) -> Result<BenchArgs, clap::Error> {
        let line = ["vaccel", "bench", "m"].iter().chain(flags);
        match Args::try_parse_from(line)?.command {
            Command::Bench(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_sweep_is_a_list_of_numbers() {
        let loads = |flags: &[&str]| bench(flags).unwrap().loads();
        assert_eq!(loads(&[]), [Load::Concurrency(1)]);
        assert_eq!(loads(&["--concurrency", "1,8,32"]), [1, 8, 32].map(Load::Concurrency));
        assert_eq!(loads(&["--rate", "0.5,1e3"]), [Load::Rate(0.5), Load::Rate(1000.0)]);
        for flags in [
            &["--concurrency", "1,,8"][..],
            &["--concurrency", "0"],
            &["--concurrency", "4097"],
            &["--concurrency", "1;8"],
            &["--rate", "0"],
            &["--rate", "-1"],
            &["--rate", "NaN"],
            &["--rate", "inf"],
            &["--rate", "10,"],
            &["--rate", "10", "--concurrency", "1"],
            &["--batch", "0"],
            &["--duration", "0"],
            &["--protocol", "rest"],
        ] {
            assert!(bench(flags).is_err(), "{flags:?}");
        }
        assert_eq!(bench(&["--warm-up", "0"]).unwrap().warm_up, Duration::ZERO);
        assert!(bench(&["--warm-up", "-1"]).is_err());
    }

    #[test]
    fn a_shape_is_a_name_and_sizes() {
        let parsed = |name: &str, sizes: &[i64]| Ok(Shape { name: name.into(), sizes: sizes.into() });
        assert_eq!(shape("x:16"), parsed("x", &[16]));
        assert_eq!(shape("x:0:3,224,224"), parsed("x:0", &[3, 224, 224]));
        for text in ["x", "x:", ":3", "x:0", "x:-1", "x:3,", "x:a", ""] {
            assert!(shape(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_input_may_go_without_a_name() {
        assert_eq!(input("x=a.npy").unwrap().name, "x");
        assert_eq!(input("a.npy").unwrap().name, "");
        assert_eq!(input("x=a=b.npy").unwrap().file, PathBuf::from("a=b.npy"));
        assert!(input("x=").is_err());
    }
}
