//! The structures of libvaccel 0.8 that a plugin sees, each as far as this one reads or writes it.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// Operations of vAccel, and the number of each: its place in a plugin's list.
pub(crate) const OPERATIONS: usize = 24;

/// What `info.kind` says: computes on another machine.
pub(crate) const KIND_REMOTE: c_uint = 0x4000;

/// Linux's own, which libvaccel takes.
const PATH_MAX: usize = 4096;

/// `struct vaccel_session`, to its folder. There is more behind it.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Session {
    id: i64,
    pub(crate) remote_id: i64,
    hint: c_uint,
    /// A `bool`, which is there only once the session is open.
    pub(crate) is_remote: u8,
    /// A text.
    pub(crate) folder: [u8; PATH_MAX],
}

/// `struct vaccel_resource`, to its files.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Resource {
    id: i64,
    pub(crate) remote_id: i64,
    pub(crate) kind: c_uint,
    pub(crate) path_kind: c_uint,
    pub(crate) paths: *const *const c_char,
    pub(crate) path_count: usize,
    run_folder: *const c_char,
    pub(crate) blobs: *const *mut Blob,
    pub(crate) blob_count: usize,
}

/// What `Resource::path_kind` says.
pub(crate) const LOCAL_FOLDER: c_uint = 1;
pub(crate) const REMOTE_FILE: c_uint = 2;

/// `struct vaccel_blob`: a file of a resource.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) kind: c_uint,
    pub(crate) name: *const c_char,
    pub(crate) path: *const c_char,
    path_owned: bool,
    pub(crate) data: *mut u8,
    data_owned: bool,
    pub(crate) size: usize,
}

/// What `Blob::kind` says: a file of the program's machine, which stays as it is.
pub(crate) const FILE: c_uint = 0;

/// `struct vaccel_arg`: an argument of a generic operation.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Arg {
    pub(crate) data: *mut c_void,
    pub(crate) size: usize,
    pub(crate) kind: c_uint,
    pub(crate) custom: u32,
    owned: bool,
}

/// `struct vaccel_tf_node`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct TfNode {
    pub(crate) name: *const c_char,
    pub(crate) id: c_int,
}

/// `struct vaccel_tf_status`. The program frees the message.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct TfStatus {
    pub(crate) code: u8,
    pub(crate) message: *mut c_char,
}

/// `struct vaccel_tf_tensor` and its like, which differ in how they count axes. The program frees all of it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor<Rank, Size> {
    pub(crate) data: *mut c_void,
    pub(crate) size: usize,
    pub(crate) owned: bool,
    pub(crate) rank: Rank,
    pub(crate) sizes: *mut Size,
    pub(crate) kind: c_uint,
}

pub(crate) type TfTensor = Tensor<c_int, i64>;
pub(crate) type TfliteTensor = Tensor<c_int, i32>;
pub(crate) type TorchTensor = Tensor<i64, i64>;

/// `struct vaccel_list_entry`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct ListEntry {
    pub(crate) next: *mut ListEntry,
    pub(crate) previous: *mut ListEntry,
}

/// `struct vaccel_op`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) number: c_uint,
    pub(crate) function: *const c_void,
    pub(crate) owner: *mut Plugin,
}

/// `struct vaccel_plugin`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Plugin {
    pub(crate) library: *mut c_void,
    pub(crate) entry: ListEntry,
    pub(crate) operations: [*const Operation; OPERATIONS],
    pub(crate) info: *const Info,
}

/// `struct vaccel_plugin_info`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Info {
    pub(crate) name: *const c_char,
    pub(crate) version: *const c_char,
    pub(crate) libvaccel: *const c_char,
    pub(crate) begin: unsafe extern "C" fn() -> c_int,
    pub(crate) end: unsafe extern "C" fn() -> c_int,
    pub(crate) is_remote: bool,
    pub(crate) kind: c_uint,
    pub(crate) open: unsafe extern "C" fn(*mut Session, u32) -> c_int,
    pub(crate) close: unsafe extern "C" fn(*mut Session) -> c_int,
    pub(crate) update: Option<unsafe extern "C" fn(*mut Session, u32) -> c_int>,
    pub(crate) register: unsafe extern "C" fn(*mut Resource, *mut Session) -> c_int,
    pub(crate) unregister: unsafe extern "C" fn(*mut Resource, *mut Session) -> c_int,
    pub(crate) sync: unsafe extern "C" fn(*mut Resource, *mut Session) -> c_int,
}
