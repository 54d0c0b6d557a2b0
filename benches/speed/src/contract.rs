//! What tonic, ttrpc and grpcio say to each other, made of `speed.proto`.

#![allow(
    unreachable_pub,
    missing_debug_implementations,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]

tonic::include_proto!("speed");
