//! `vaccel`: asks an agent what it can do, looks at images, runs models and measures them, from a shell.
//!
//! Exit codes: 0 done, 1 the call failed, 2 the command line or the environment is wrong.

mod args;
mod bench;
mod classify;
mod images;
mod info;
mod model;
mod output;
mod run;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use vaccel_client::{Builder, CallOptions, Error, Reason, Session, SessionOptions};

use crate::args::{Args, Command, Target};
use crate::output::{Failure, Output};

/// How long to wait for the agent when a session is given back: it ends by itself if that fails.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // On a wrong command line clap prints why and exits with 2.
    let Args { target, command } = Args::parse();
    let mut output = Output::new(target.json);
    let mut runtime = match command {
        Command::Bench(_) => bench::runtime(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let outcome = runtime
        .enable_all()
        .build()
        .map_err(|e| Error::new(Reason::BackendFailed, format!("cannot start: {e}")).into())
        .and_then(|runtime| {
            let outcome = runtime.block_on(execute(&target, command, &mut output));
            // A name lookup that hangs must not hold up the exit.
            runtime.shutdown_background();
            outcome
        });
    match outcome.and_then(|()| output.finish()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => output::report(&failure, target.json),
    }
}

async fn execute(target: &Target, command: Command, output: &mut Output) -> Result<(), Failure> {
    let builder = target.builder()?;
    match command {
        Command::Info => info::info(&builder.connect().await?, output).await,
        Command::Ops => info::ops(&builder.connect().await?, output).await,
        Command::Classify(args) => {
            let session = open(builder, target).await?;
            give_back(&session, classify::classify(&session, &args, output).await).await
        }
        Command::Detect(_) | Command::Segment(_) | Command::Pose(_) | Command::Depth(_) => {
            let session = open(builder, target).await?;
            give_back(&session, images::look(&session, &command, output).await).await
        }
        Command::Run(args) => {
            let session = open(builder, target).await?;
            give_back(&session, run::run(&session, &args, output).await).await
        }
        Command::Bench(args) => bench::bench(&builder, &args, target.deadline(), output).await,
    }
}

async fn open(builder: Builder, target: &Target) -> Result<Session, Error> {
    let (device, engine) = (target.device.clone(), target.engine.clone());
    let options = SessionOptions { device, engine, ..SessionOptions::default() };
    builder.connect().await?.open_session(options).await
}

async fn give_back(session: &Session, outcome: Result<(), Failure>) -> Result<(), Failure> {
    let _ = session
        .with(CallOptions { deadline: Some(CLOSE_TIMEOUT), repeatable: false, ..CallOptions::default() })
        .close()
        .await;
    outcome
}
