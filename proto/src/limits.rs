//! Every bound of the wire contract, with its reason. Bounds of the agent's own memory are in its configuration.

use std::time::Duration;

/// Longest gRPC message either side sends, in bytes. A 16 MiB tensor and its envelope fit with room to spare;
/// larger data goes up as a resource, in chunks. The receiver holds at most this much per call in flight.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// Longest `mbench`, in milliseconds: that of vAccel's own mbench plugin. Deadlines are longer, lanes are few.
pub const MBENCH_MS_MAX: u32 = 300_000;

/// Longest piece of a file in one upload message, in bytes: large enough that its envelope costs nothing, small enough
/// that a stream pins little memory.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

/// Axes of a tensor. The widest models in use have 6.
pub const TENSOR_RANK_MAX: usize = 8;

/// Inputs of one model run, and outputs asked for. Bounds the work of matching names.
pub const TENSORS_PER_CALL_MAX: usize = 256;

/// Length of a guest's label (tensor, file, output name), in bytes. They are kept in memory and shown in logs.
pub const NAME_BYTES_MAX: usize = 256;

/// Fields of one request, at every depth: a tensor has some five, so that a call of as many tensors as may be stays far
/// below. Decoded, a field of two bytes can take two hundred.
pub const PARTS_MAX: usize = 1 << 16;

/// Bytes of the lists of numbers in one request, which take up to eight times as much when they are decoded. Tensors in
/// bulk are bytes.
pub const PACKED_BYTES_MAX: usize = 8 << 20;

/// Options of one model run, in bytes. TensorFlow's `RunOptions` take some tens; no engine here reads them.
pub const RUN_OPTIONS_BYTES_MAX: usize = 4096;

/// Files of one resource: a model with its weights split in pieces stays far below.
pub const FILES_PER_RESOURCE_MAX: usize = 64;

/// Images of one classification call. They are decoded together into one batch.
pub const IMAGES_PER_CALL_MAX: usize = 256;

/// Pixels of one decoded image: 64 Mpx, beyond any camera a classifier is fed from. Decoded it is 192 MiB of RGB.
pub const IMAGE_PIXELS_MAX: u64 = 64 << 20;

/// Pixels of all images of one call together, the same: decoding is what a small call can make dear.
pub const CALL_PIXELS_MAX: u64 = IMAGE_PIXELS_MAX;

/// Highest gRPC deadline that is honoured; a call without one gets the agent's default.
pub const DEADLINE_MAX: Duration = Duration::from_secs(600);

/// Port of `vaccel-agent --vsock`, the one vAccel's own examples use.
pub const VSOCK_PORT_DEFAULT: u32 = 2048;

/// Where an agent on the same machine listens when nothing else is said, as vAccel's own agent does.
pub const LOCAL_ADDRESS_DEFAULT: &str = "tcp://127.0.0.1:65500";

/// Bytes of a session id before hexadecimal encoding: 128 random bits cannot be guessed.
pub const SESSION_ID_BYTES: usize = 16;
