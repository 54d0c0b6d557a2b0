//! The thin guest: calls a vaccel agent from whatever has a socket — a unikernel, a microVM, a container, a program
//! without a runtime.
//!
//! ```no_run
//! use vaccel_guest::{Guest, Label, Posix};
//!
//! let mut guest = Guest::new("unix:///run/vaccel.sock".parse::<Posix>()?);
//! let image = std::fs::read("digit.png")?;
//! let mut labels = [Label::default(); 3];
//! let (found, _) = guest.classify(None, &[&image], &mut labels)?;
//! println!("{} ({:.4}), best of {found}", labels[0].name.as_str(), labels[0].probability);
//! guest.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! It speaks the agent's own gRPC, and needs little for that: no thread, no allocation, no epoll, no timer, no
//! signal, no name service; `socket`, `connect`, `send`, `read`, `poll`, `close` and a clock. All memory is in a
//! [`Guest`] and in what the caller gives; tensors are sent from where they are and arrive where they are wanted. With
//! an agent on the same machine it shares [`Memory`] for long ones, unless [`Guest::set_shared_bytes`] says not to.
//!
//! *Features.* None: the protocol, for a [`Transport`] of your own. `posix`: [`Posix`] sockets by the C library, still
//! `no_std`. `std` (default): the environment, and errors as the standard library knows them. `capi`: the C interface
//! of `include/vaccel_guest.h`.
//!
//! *Layers, each knowing those above it:* `frame`, `hpack`, `protobuf` are encodings; `connection` is HTTP/2 without
//! any I/O; `link` makes calls over a [`Transport`]; `request` and `reply` are the contract's messages; [`Guest`] is
//! all a program sees.

#![cfg_attr(not(any(test, feature = "std")), no_std)]
// What an agent sends, and what C programs pass, must end in an error and never in a panic.
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, clippy::expect_used)
)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "lengths are bounded by MESSAGE_BYTES_MAX, bytes by a mask, before they are made smaller"
)]

mod address;
#[cfg(feature = "capi")]
mod capi;
mod connection;
// For the client, too.
#[doc(hidden)]
pub mod copy;
mod error;
// For the client, too.
#[doc(hidden)]
pub mod foresight;
// For the agent's end of the wire, too.
#[doc(hidden)]
pub mod frame;
mod guest;
#[doc(hidden)]
pub mod hpack;
mod huffman;
mod link;
#[cfg(feature = "posix")]
mod posix;
mod protobuf;
mod reply;
mod request;
mod shared;
mod status;
mod text;
mod transport;
mod types;

pub use address::{Address, NoAddress, UNIX_PATH_BYTES_MAX};
pub use error::{Error, Reason, Result};
pub use guest::{FILES_MAX, Guest};
#[cfg(feature = "posix")]
pub use posix::{Posix, SharedMemory};
pub use text::Text;
pub use transport::{Fault, Memory, NoMemory, Ready, Transport};
pub use types::{
    Arg, ArgOut, ArgType, DType, Detection, File, ITEMS_MAX, Info, Input, Label, Output, RANK_MAX,
    ResourceId, ResourceKind, Sgemm, Timings,
};
