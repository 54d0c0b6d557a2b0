//! wip
#![cfg_attr(not(any(test, feature = "std")), no_std)]

mod address;
mod connection;
mod error;
mod frame;
mod guest;
mod hpack;
mod huffman;
mod link;
#[cfg(feature = "posix")]
mod posix;
mod protobuf;
mod reply;
mod request;
mod status;
mod text;
mod transport;
mod types;
pub use address::{Address, NoAddress, UNIX_PATH_BYTES_MAX};
pub use error::{Error, Reason, Result};
pub use guest::{FILES_MAX, Guest};
#[cfg(feature = "posix")]
pub use posix::Posix;
pub use text::Text;
pub use transport::{Fault, Ready, Transport};
pub use types::*;
#[cfg(feature = "capi")]
mod capi;
