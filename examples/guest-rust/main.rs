//! A guest in Rust: sends images to the agent and prints what each shows.
//!
//! `guest-rust [ADDRESS] IMAGE...`, where an IMAGE of `-` is standard input. Without ADDRESS it is taken from the
//! environment (`VACCEL_RPC_ADDRESS`, then `VACCEL_RPC_ADDR`), then from what `VACCEL_RPC_ADDRESS` was when this was
//! built, then from the library; a token from `VACCEL_TOKEN`, milliseconds a call may take from
//! `VACCEL_DEADLINE_MS`. Exit codes: 0 all images have a label, 1 something failed, 2 wrong usage.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::io::{self, Read, Write};
use std::process::ExitCode;

use vaccel_guest::{Guest, Label, NoAddress, Posix};

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let has_address = arguments.first().is_some_and(|first| first.contains("://"));
    let address = has_address.then(|| arguments.remove(0));
    if arguments.is_empty() {
        eprintln!("usage: guest-rust [ADDRESS] IMAGE...");
        return ExitCode::from(2);
    }
    let mut guest = match connector(address.as_deref()) {
        Ok(transport) => Guest::new(transport),
        Err(error) => {
            eprintln!("guest-rust: {error}");
            return ExitCode::from(2);
        }
    };
    // A classification that is run twice takes time and does nothing else.
    guest.set_repeatable(true);
    if let Ok(token) = std::env::var("VACCEL_TOKEN") {
        guest.set_token(&token);
    }
    if let Some(deadline) = std::env::var("VACCEL_DEADLINE_MS").ok().and_then(|text| text.parse().ok()) {
        guest.set_deadline_ms(deadline);
    }
    let mut failed = false;
    for name in &arguments {
        if let Err(error) = classify(&mut guest, name) {
            eprintln!("guest-rust: {name}: {error}");
            failed = true;
        }
    }
    // What this leaves behind, the agent frees by itself.
    let _ = guest.close();
    ExitCode::from(u8::from(failed))
}

fn connector(address: Option<&str>) -> Result<Posix, NoAddress> {
    address.map_or_else(Posix::from_env, str::parse)
}

fn classify(guest: &mut Guest<Posix>, name: &str) -> Result<(), String> {
    let image = read(name).map_err(|error| error.to_string())?;
    let mut label = [Label::default()];
    guest.classify(None, &[&image], &mut label).map_err(|error| format!("{error}: {}", guest.message()))?;
    let [label] = label;
    writeln!(io::stdout(), "{name}: {} {:.4}", label.name.as_str(), label.probability)
        .map_err(|error| error.to_string())
}

fn read(name: &str) -> io::Result<Vec<u8>> {
    if name != "-" {
        return std::fs::read(name);
    }
    let mut image = Vec::new();
    io::stdin().read_to_end(&mut image)?;
    Ok(image)
}
