//! A Hermit unikernel that sends an image to the agent and prints what it shows: `[ADDRESS]`, else the host of QEMU's
//! own network. The image is part of the program.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

use std::process::ExitCode;

#[cfg(target_os = "hermit")]
use hermit as _;
use vaccel_guest::{Guest, Label, Posix};

const IMAGE: &[u8] = include_bytes!("../../images/digit-000-is-2.png");

fn main() -> ExitCode {
    let address = std::env::args().nth(1).unwrap_or("tcp://10.0.2.2:65500".into());
    let transport: Posix = match address.parse() {
        Ok(transport) => transport,
        Err(error) => {
            eprintln!("{address}: {error}");
            return ExitCode::from(2);
        }
    };
    let mut guest = Guest::new(transport);
    // A classification that is run twice takes time and does nothing else.
    guest.set_repeatable(true);
    let mut label = [Label::default()];
    if let Err(error) = guest.classify(None, &[IMAGE], &mut label) {
        eprintln!("{error}: {}", guest.message());
        return ExitCode::FAILURE;
    }
    let [label] = label;
    println!("{} {:.4}", label.name.as_str(), label.probability);
    // What this leaves behind, the agent frees by itself.
    let _ = guest.close();
    ExitCode::SUCCESS
}
