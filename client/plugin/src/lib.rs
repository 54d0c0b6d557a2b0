//! A plugin of libvaccel 0.8: programs of vAccel compute on a vaccel agent, as they are.
//!
//! libvaccel finds it by `VACCEL_PLUGINS`, and it finds the agent as all clients do, by `VACCEL_RPC_ADDRESS`. It
//! connects when the program opens its first session: libvaccel loads plugins before `main`, and ends the process when
//! one fails.
//!
//! **Contract of every function that libvaccel calls:** sessions and resources are those that it made; other pointers
//! are null where its header allows that, or what their types say for the duration of the call; counts are those of the
//! arrays they come with; texts end with a NUL; what a call writes is nobody else's meanwhile. That is what each SAFETY
//! comment rests on. What is null and must not be, counts below 0, and resources of other sessions are refused.

#![allow(unsafe_code, reason = "the boundary to C")]

mod abi;
mod given;
mod host;
mod models;
mod operations;
mod pictures;
mod resources;
mod signals;

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;

use abi::{Info, KIND_REMOTE, ListEntry, OPERATIONS, Operation, Plugin};

/// What libvaccel looks for.
#[derive(Debug)]
#[repr(transparent)]
pub struct Entry(*mut Plugin);

// SAFETY: libvaccel reads it, and nothing changes it.
unsafe impl Sync for Entry {}

#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "the name that libvaccel looks for")]
/// The plugin.
pub static vaccel_plugin: Entry = Entry(&raw mut PLUGIN);

/// libvaccel's from when it was found: here nothing reads or writes it.
static mut PLUGIN: Plugin = Plugin {
    library: ptr::null_mut(),
    // In no list: its own neighbour.
    // SAFETY: addresses, which nobody follows here.
    entry: unsafe { ListEntry { next: &raw mut PLUGIN.entry, previous: &raw mut PLUGIN.entry } },
    operations: listed(),
    info: &raw const INFO.0,
};

/// Tables that libvaccel reads.
struct Table<T>(T);

// SAFETY: their pointers are to statics, and nothing changes them.
unsafe impl<T> Sync for Table<T> {}

static INFO: Table<Info> = Table(Info {
    name: c"sockets".as_ptr(),
    version: VERSION.as_ptr(),
    libvaccel: c"0.8.0".as_ptr(),
    begin,
    end,
    is_remote: true,
    kind: KIND_REMOTE,
    open: resources::open,
    close: resources::close,
    // A session's engine is chosen when it is opened.
    update: None,
    register: resources::register,
    unregister: resources::unregister,
    sync: resources::sync,
});

const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => panic!("a version is a text"),
};

/// vAccel's operations, each at the place that is its number.
static FUNCTIONS: Table<[Operation; OPERATIONS]> = Table(numbered([
    operations::noop as *const c_void,
    operations::exec as *const c_void,
    operations::exec_with_resource as *const c_void,
    operations::image_classification as *const c_void,
    operations::image_detection as *const c_void,
    operations::image_segmentation as *const c_void,
    operations::image_pose as *const c_void,
    operations::image_depth as *const c_void,
    models::tf_model_load as *const c_void,
    models::tf_model_unload as *const c_void,
    models::tf_model_run as *const c_void,
    models::tflite_model_load as *const c_void,
    models::tflite_model_unload as *const c_void,
    models::tflite_model_run as *const c_void,
    models::torch_model_load as *const c_void,
    models::torch_model_run as *const c_void,
    models::torch_sgemm as *const c_void,
    operations::sgemm as *const c_void,
    operations::fpga_arraycopy as *const c_void,
    operations::fpga_mmult as *const c_void,
    operations::fpga_parallel as *const c_void,
    operations::fpga_vectoradd as *const c_void,
    operations::minmax as *const c_void,
    operations::opencv as *const c_void,
]));

const fn numbered(functions: [*const c_void; OPERATIONS]) -> [Operation; OPERATIONS] {
    let mut list = [Operation { number: 0, function: functions[0], owner: &raw mut PLUGIN }; OPERATIONS];
    let (mut place, mut number): (usize, c_uint) = (0, 0);
    while place < OPERATIONS {
        list[place].number = number;
        list[place].function = functions[place];
        (place, number) = (place + 1, number + 1);
    }
    list
}

const fn listed() -> [*const Operation; OPERATIONS] {
    let mut list = [ptr::null(); OPERATIONS];
    let mut place = 0;
    while place < OPERATIONS {
        list[place] = (&raw const FUNCTIONS.0).cast::<Operation>().wrapping_add(place);
        place += 1;
    }
    list
}

unsafe extern "C" fn begin() -> c_int {
    0
}

unsafe extern "C" fn end() -> c_int {
    host::answer("fini", || {
        host::end();
        Ok(())
    })
}
