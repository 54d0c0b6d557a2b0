//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use vaccel_client::proto::limits::DEADLINE_MAX;
use vaccel_client::{Builder, Client, Endpoint, Pem, Tls, env};

use crate::output::Failure;

/// How long a dial may take when there is no shorter deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks a vaccel agent what it can do, classifies images and runs models.
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
    /// Run a model on tensors from .npy files
    Run(RunArgs),
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

    #[test]
    fn an_input_may_go_without_a_name() {
        assert_eq!(input("x=a.npy").unwrap().name, "x");
        assert_eq!(input("a.npy").unwrap().name, "");
        assert_eq!(input("x=a=b.npy").unwrap().file, PathBuf::from("a=b.npy"));
        assert!(input("x=").is_err());
    }
}
