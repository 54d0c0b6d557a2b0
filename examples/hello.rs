//! A guest: sends an image to the agent and prints what it shows.
//!
//! `cargo run --release --example hello`, with `vaccel-agent` running in another terminal.

#![allow(clippy::print_stdout, reason = "a program for people")]

use vaccel_client::{ClassifyOptions, Client, SessionOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or("examples/images/digit-000-is-2.png".into());
    let session = Client::from_env().await?.open_session(SessionOptions::default()).await?;
    let labels = session.classify([std::fs::read(&path)?.into()], ClassifyOptions::default()).await?;
    println!("{path}: {} ({:.4})", labels[0][0].name, labels[0][0].probability);
    session.close().await?;
    Ok(())
}
