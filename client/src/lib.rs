//! Calls a vaccel agent: sessions, models and the operations that run on them, over vsock, hybrid vsock, unix
//! sockets, TCP or TLS.
//!
//! ```no_run
//! use vaccel_client::{ResourceFiles, SessionOptions, Tensor, named};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = vaccel_client::connect("unix:///run/vaccel.sock").await?;
//! let session = client.open_session(SessionOptions::default()).await?;
//! let model = session.register(ResourceFiles::model("model.onnx", std::fs::read("model.onnx")?)).await?;
//! let input = Tensor::new(&[1, 4], &[1.0_f32, 2.0, 3.0, 4.0])?;
//! let run = session.run(&model, vec![named("x", input)], &[]).await?;
//! println!("{} in {} µs", run.outputs[0].name, run.timings.run_us);
//! session.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What happens when something breaks
//! A call ends by its deadline ([`Builder::deadline`], [`CallOptions`]), whatever happens. Until then:
//!
//! * The connection is dialed again when it is gone, with pauses from 50 ms to 5 s.
//! * A call that the agent cannot have run is repeated. One that may have run is repeated only if it is
//!   [`repeatable`](CallOptions::repeatable), which all calls are by default: operations compute, they change
//!   nothing.
//! * An agent that was restarted knows no sessions. The client then opens one, registers again what the
//!   session held, and goes on. [`Session`] and [`Resource`] stay valid.
//! * A file that was damaged on the agent's disk is found out there and goes up again.
//!
//! Every error is an [`Error`] with a [`Reason`] from one table.

pub mod env;
// Its queue of what is to be written is the agent's, too.
#[doc(hidden)]
pub mod http2;
#[cfg(feature = "cli")]
pub mod npy;
// The agent maps the same memory.
#[doc(hidden)]
pub mod shared;
pub mod vsock;

mod backoff;
mod client;
mod compute;
mod dial;
mod error;
mod files;
mod genop;
mod gzip;
#[cfg(feature = "cli")]
mod http1;
mod hybrid;
mod images;
mod large;
mod link;
mod models;
mod opening;
mod read;
mod retry;
mod session;
mod tls;
mod unary;
mod upload;
mod wire;

pub use client::{Builder, Client, DEADLINE_DEFAULT, connect};
pub use compute::{Minmax, Parallel, Sgemm};
pub use files::ResourceFiles;
pub use genop::{arg, room};
#[cfg(feature = "cli")]
pub use http1::Http1;
pub use images::{Depth, Detected, ImageOptions, Posed, Segmented};
pub use link::Link;
pub use models::{TfRun, tf_input, tf_node};
pub use read::ResourceReader;
pub use session::{CallOptions, ClassifyOptions, ModelRun, Resource, Session, SessionOptions, named};
pub use shared::Buffer;
pub use tls::{Pem, Tls};
pub use unary::Awake;
pub use vaccel_proto as proto;
pub use vaccel_proto::v1::{
    Area, Arg, ArgType, DType, Detection, Keypoint, Label, ModelDescription, ModelPort, NamedTensor,
    OperationProfile, Pose, ResourceKind, Segment, StageProfile, Tensor, TfInput, TfNode, TfStatus, Timings,
};
pub use vaccel_proto::{Endpoint, Error, Reason, hints};
