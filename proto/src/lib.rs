//! The contract between guests and the agent: messages and services of `vaccel.v1`, addresses, tensors, errors and
//! limits. Nothing here does I/O.

pub mod carrier;
pub mod codec;
pub mod compute;
pub mod endpoint;
pub mod error;
pub mod gather;
pub mod hints;
pub mod limits;
pub mod tensor;

pub use endpoint::Endpoint;
pub use error::{Error, Reason};

/// Descriptions of all messages and services, encoded: a `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Messages and services of package `inference`, generated from `proto/inference/*.proto`: the Open Inference Protocol.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::pedantic,
    clippy::large_enum_variant,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the .proto files carry the documentation"
)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// Messages and services of package `vaccel.v1`, generated from `proto/vaccel/v1/*.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the .proto files carry the documentation"
)]
pub mod v1 {
    tonic::include_proto!("vaccel.v1");
}

/// Whether a text can be the name of a resource: the hexadecimal digits of a SHA-256.
pub fn is_resource_id(name: &str) -> bool {
    const DIGITS: usize = 64;
    name.len() == DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl v1::Arg {
    /// Bytes that there are for a written argument: as many as it brings, or else as it says.
    pub fn room(&self) -> u64 {
        if self.data.is_empty() { self.size } else { self.data.len() as u64 }
    }
}
