//! The guest against a server in memory that does on purpose what servers, proxies and networks do: in virtual time, so
//! that every deadline is seen to the millisecond and nothing waits.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::needless_pass_by_value,
    clippy::unwrap_used,
    reason = "tests"
)]

#[allow(dead_code, reason = "the tests write Huffman's code; the guest reads it")]
#[path = "../../src/huffman.rs"]
mod huffman;

mod frames;
mod memory;
mod peer;
mod random;
mod replies;
mod sessions;
mod transport;

mod conversations;
mod cuts;
mod dialing;
mod encoding;
mod flow;
mod foresight;
mod frames_between;

use vaccel_guest::{Error, Guest, Reason};

use crate::peer::{Event, Peer};
use crate::transport::Fake;

/// A guest of a server with this script.
fn guest(script: impl FnMut(&mut Peer, Event<'_>) -> bool + 'static) -> Guest<Fake> {
    Guest::new(Fake::new(Peer::new(script)))
}

/// A guest with a session, of a server that then follows the script.
fn opened(mut script: impl FnMut(&mut Peer, Event<'_>) -> bool + 'static) -> Guest<Fake> {
    let mut open = false;
    let mut guest = guest(move |peer, event| {
        let begun = open;
        open |= matches!(event, Event::Asked(call) if call.is("Sessions/Open"));
        begun && script(peer, event)
    });
    guest.open().unwrap();
    guest
}

fn peer(guest: &mut Guest<Fake>) -> &mut Peer {
    &mut guest.transport().peer
}

/// The error, with its text.
fn fails<T: std::fmt::Debug>(
    guest: &Guest<Fake>,
    outcome: Result<T, Error>,
    reason: Reason,
    text: &str,
) -> Error {
    let error = outcome.unwrap_err();
    assert_eq!(error.reason, reason, "{}", guest.message());
    assert!(guest.message().contains(text), "{}", guest.message());
    error
}
