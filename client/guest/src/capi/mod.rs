//! The C interface of `include/vaccel_guest.h`, which says what each function does.
//!
//! **Contract of every function:** pointers are null where the header allows it, or point to what their type says, for
//! the duration of the call; counts are those of the arrays they come with; strings end with a NUL; a guest is used by
//! one thread at a time, between its initialisation and the end of its memory. That is what each SAFETY comment below
//! rests on. Nothing here panics, allocates, or keeps a pointer except those of `vaccel_guest_io`.

#![allow(unsafe_code, reason = "the boundary to C")]

mod types;
mod way;

macro_rules! guest {
    ($guest:ident) => {
        // SAFETY: null, or a guest that is this call's own.
        match unsafe { $guest.as_mut() } {
            Some(guest) => guest,
            None => return NO_GUEST,
        }
    };
}

// It has the macro.
mod images;

use core::ffi::{c_char, c_int, c_void};
use core::ptr;

use self::types::{
    CArg, CArgOut, CFile, CInfo, CInput, COutput, CResource, CTimings, array, array_mut, resource, terminate,
    text,
};
use self::way::{Io, Way};
use crate::error::{Error, Reason, Result};
use crate::posix::{Posix, SharedMemory};
use crate::status::TEXT_BYTES;
use crate::text::Text;
use crate::types::{
    Arg, ArgOut, ArgType, DType, File, ITEMS_MAX, Input, Output, RESOURCE_BYTES, ResourceKind, Timings,
};
use crate::{FILES_MAX, Guest};

/// A guest of a C program.
#[derive(Debug)]
pub(crate) struct Handle {
    guest: Guest<Way>,
    /// What the program produces its data in.
    memory: Option<SharedMemory>,
    error: Error,
    message: [u8; TEXT_BYTES + 1],
}

impl Handle {
    /// What a call returns to C.
    fn returns(&mut self, outcome: Result<()>) -> c_int {
        match outcome {
            Ok(()) => 0,
            Err(error) => {
                self.error = error;
                terminate(&Text::<TEXT_BYTES>::from(self.guest.message()), &mut self.message);
                error.reason.errno()
            }
        }
    }

    fn refuses(&mut self, text: &str) -> c_int {
        self.error = Error::new(Reason::BadArgument);
        terminate(&Text::<TEXT_BYTES>::from(text), &mut self.message);
        self.error.reason.errno()
    }

    /// The same, with how long it took.
    ///
    /// # Safety
    /// As the module's contract says.
    unsafe fn returns_timed(&mut self, outcome: Result<Timings>, timings: *mut CTimings) -> c_int {
        // SAFETY: null, or a place for timings.
        if let (Ok(took), Some(place)) = (outcome, unsafe { timings.as_mut() }) {
            *place = CTimings { queue_us: took.queue_us, run_us: took.run_us, batch_size: took.batch_size };
        }
        self.returns(outcome.map(drop))
    }
}

/// Bad pointers of C programs that can be told.
const NO_GUEST: c_int = Reason::BadArgument.errno();
const NO_ARRAY: &str = "expected an array, and got NULL";

/// Whether data is in memory that the agent has, too.
fn lies_in(memory: &SharedMemory, data: &[u8]) -> bool {
    !data.is_empty() && memory.as_ptr_range().contains(&data.as_ptr())
}

/// # Safety
/// The module's contract; the memory is this guest's own until it is closed.
unsafe fn place(memory: *mut c_void, size: usize, way: Way) -> *mut Handle {
    let skipped = memory.align_offset(align_of::<Handle>());
    if memory.is_null() || size.checked_sub(skipped).is_none_or(|size| size < size_of::<Handle>()) {
        return ptr::null_mut();
    }
    let place = memory.wrapping_byte_add(skipped).cast::<Handle>();
    let error = Error::new(Reason::BadArgument);
    // SAFETY: aligned and large enough, as was checked, and the caller's own to give.
    unsafe {
        place.write(Handle { guest: Guest::new(way), memory: None, error, message: [0; TEXT_BYTES + 1] })
    };
    place
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_init(
    memory: *mut c_void,
    size: usize,
    address: *const c_char,
) -> *mut Handle {
    let posix = if address.is_null() {
        Posix::built_in().ok()
    } else {
        // SAFETY: not null, so a string.
        unsafe { text(address) }.and_then(|address| address.parse().ok())
    };
    match posix {
        Some(mut posix) => {
            // Whatever Rust's standard library would have done about it.
            posix.set_sigpipe_ignored(false);
            // SAFETY: the module's contract.
            unsafe { place(memory, size, Way::Posix(posix)) }
        }
        None => ptr::null_mut(),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_init_io(memory: *mut c_void, size: usize, io: *const Io) -> *mut Handle {
    // SAFETY: null, or the program's functions.
    match unsafe { io.as_ref() } {
        // SAFETY: the module's contract.
        Some(io) => unsafe { place(memory, size, Way::Own(*io)) },
        None => ptr::null_mut(),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_set_token(guest: *mut Handle, token: *const c_char) {
    // SAFETY: null, or a guest that is this call's own; null, or a string.
    if let (Some(guest), Some(token)) = unsafe { (guest.as_mut(), text(token)) } {
        guest.guest.set_token(token);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_set_deadline_ms(guest: *mut Handle, deadline_ms: u32) {
    // SAFETY: null, or a guest that is this call's own.
    if let Some(guest) = unsafe { guest.as_mut() } {
        guest.guest.set_deadline_ms(deadline_ms);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_set_repeatable(guest: *mut Handle, repeatable: c_int) {
    // SAFETY: null, or a guest that is this call's own.
    if let Some(guest) = unsafe { guest.as_mut() } {
        guest.guest.set_repeatable(repeatable != 0);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_set_sigpipe_ignored(guest: *mut Handle, ignored: c_int) {
    // SAFETY: null, or a guest that is this call's own.
    if let Some(Way::Posix(posix)) = unsafe { guest.as_mut() }.map(|guest| guest.guest.transport()) {
        posix.set_sigpipe_ignored(ignored != 0);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_choose(guest: *mut Handle, engine: *const c_char, device: *const c_char) {
    // SAFETY: null, or a guest that is this call's own; null, or strings.
    if let (Some(guest), Some(engine), Some(device)) = unsafe { (guest.as_mut(), text(engine), text(device)) }
    {
        guest.guest.choose(engine, device);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_wish(guest: *mut Handle, hints: u32) {
    // SAFETY: null, or a guest that is this call's own.
    if let Some(guest) = unsafe { guest.as_mut() } {
        guest.guest.wish(hints);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_set_shared_bytes(guest: *mut Handle, size: usize) {
    // SAFETY: null, or a guest that is this call's own.
    if let Some(guest) = unsafe { guest.as_mut() } {
        guest.guest.set_shared_bytes(size);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_set_awake(guest: *mut Handle, awake: c_int) {
    // SAFETY: null, or a guest that is this call's own.
    if let Some(guest) = unsafe { guest.as_mut() } {
        guest.guest.set_awake(awake != 0);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_set_reply_type(guest: *mut Handle, dtype: c_int) {
    // SAFETY: null, or a guest that is this call's own.
    if let Some(guest) = unsafe { guest.as_mut() } {
        guest.guest.set_reply_type(DType::from_number(dtype.try_into().unwrap_or(0)));
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_share(guest: *mut Handle, size: usize) -> *mut c_void {
    // SAFETY: null, or a guest that is this call's own.
    let Some(guest) = (unsafe { guest.as_mut() }) else { return ptr::null_mut() };
    // What there is counts, too, against what this guest may have.
    guest.memory = None;
    let made = guest.guest.share(size).map(|memory| guest.memory = Some(memory));
    guest.returns(made);
    guest.memory.as_mut().map_or(ptr::null_mut(), |memory| memory.as_mut_ptr().cast())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_open(guest: *mut Handle) -> c_int {
    let guest = guest!(guest);
    let outcome = guest.guest.open();
    guest.returns(outcome)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_close(guest: *mut Handle) -> c_int {
    let guest = guest!(guest);
    guest.memory = None;
    let outcome = guest.guest.close();
    guest.returns(outcome)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_renew(guest: *mut Handle) -> c_int {
    let guest = guest!(guest);
    let outcome = guest.guest.renew();
    guest.returns(outcome)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_attend(guest: *mut Handle) {
    // SAFETY: null, or a guest that is this call's own.
    if let Some(guest) = unsafe { guest.as_mut() } {
        guest.guest.attend();
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_about(guest: *mut Handle, info: *mut CInfo) -> c_int {
    let guest = guest!(guest);
    let outcome = guest.guest.info();
    // SAFETY: null, or a place for the answer.
    if let (Ok(found), Some(place)) = (&outcome, unsafe { info.as_mut() }) {
        terminate(&found.version, &mut place.version);
        terminate(&found.tenant, &mut place.tenant);
        terminate(&found.operations, &mut place.operations);
        terminate(&found.engines, &mut place.engines);
        (place.message_bytes_max, place.session_lease_ms) = (found.message_bytes_max, found.session_lease_ms);
    }
    guest.returns(outcome.map(drop))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_noop(guest: *mut Handle, timings: *mut CTimings) -> c_int {
    let guest = guest!(guest);
    let outcome = guest.guest.noop();
    // SAFETY: the module's contract.
    unsafe { guest.returns_timed(outcome, timings) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_run(
    guest: *mut Handle,
    model: *const CResource,
    inputs: *const CInput,
    input_count: usize,
    names: *const *const c_char,
    name_count: usize,
    outputs: *mut COutput,
    output_count: usize,
    timings: *mut CTimings,
) -> c_int {
    let guest = guest!(guest);
    // SAFETY: the module's contract.
    let (model, Some(given), Some(wanted), Some(places)) = (unsafe {
        (
            resource(model),
            array(inputs, input_count),
            array(names, name_count),
            array_mut(outputs, output_count),
        )
    }) else {
        return guest.refuses(NO_ARRAY);
    };
    let Some(model) = model else { return guest.refuses("expected a model") };
    let mut inputs = [Input { name: "", dtype: DType::Unspecified, shape: &[], data: &[] }; ITEMS_MAX];
    let mut names = [""; ITEMS_MAX];
    let mut outputs: [Output<'_>; ITEMS_MAX] = core::array::from_fn(|_| Output::new(&mut []));
    let (Some(inputs), Some(names), Some(outputs)) =
        (inputs.get_mut(..given.len()), names.get_mut(..wanted.len()), outputs.get_mut(..places.len()))
    else {
        return guest.refuses("expected at most 16 inputs, names and outputs");
    };
    for (input, given) in inputs.iter_mut().zip(given) {
        // SAFETY: the module's contract.
        let (name, shape, data) =
            unsafe { (text(given.name), array(given.shape, given.rank), array(given.data, given.length)) };
        let Some(name) = name else { return guest.refuses("expected names of inputs in UTF-8") };
        let (Some(shape), Some(data)) = (shape, data) else { return guest.refuses(NO_ARRAY) };
        // A number below 0 is of no type, as 0 is.
        let dtype = DType::from_number(given.dtype.try_into().unwrap_or(0));
        *input = Input { name, dtype, shape, data };
    }
    for (name, wanted) in names.iter_mut().zip(wanted) {
        // SAFETY: the module's contract.
        let Some(wanted) = (unsafe { text(*wanted) }) else {
            return guest.refuses("expected names in UTF-8");
        };
        *name = wanted;
    }
    for (output, place) in outputs.iter_mut().zip(places.iter()) {
        // SAFETY: the module's contract.
        let Some(data) = (unsafe { array_mut(place.data, place.size) }) else {
            return guest.refuses(NO_ARRAY);
        };
        *output = Output::new(data);
    }
    let outcome = match &guest.memory {
        Some(memory) if inputs.iter().any(|input| lies_in(memory, input.data)) => {
            guest.guest.run_from(memory, &model, inputs, names, outputs)
        }
        _ => guest.guest.run(&model, inputs, names, outputs),
    };
    for (place, output) in places.iter_mut().zip(outputs.iter()) {
        (place.length, place.dtype) = (output.length, output.dtype as c_int);
        (place.rank, place.shape) = (output.rank, output.shape);
    }
    // SAFETY: the module's contract.
    unsafe { guest.returns_timed(outcome, timings) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_genop(
    guest: *mut Handle,
    read: *const CArg,
    read_count: usize,
    write: *mut CArgOut,
    write_count: usize,
    timings: *mut CTimings,
) -> c_int {
    let guest = guest!(guest);
    // SAFETY: the module's contract.
    let (Some(given), Some(places)) = (unsafe { (array(read, read_count), array_mut(write, write_count)) })
    else {
        return guest.refuses(NO_ARRAY);
    };
    let mut read = [Arg { kind: ArgType::RAW, data: &[] }; ITEMS_MAX];
    let mut write: [ArgOut<'_>; ITEMS_MAX] = core::array::from_fn(|_| ArgOut::new(ArgType::RAW, &mut []));
    let (Some(read), Some(write)) = (read.get_mut(..given.len()), write.get_mut(..places.len())) else {
        return guest.refuses("expected at most 16 arguments");
    };
    for (arg, given) in read.iter_mut().zip(given) {
        // SAFETY: the module's contract.
        let Some(data) = (unsafe { array(given.data, given.length) }) else { return guest.refuses(NO_ARRAY) };
        *arg = Arg { kind: ArgType(given.kind), data };
    }
    for (arg, place) in write.iter_mut().zip(places.iter()) {
        // SAFETY: the module's contract.
        let (Some(before), Some(data)) =
            (unsafe { (array(place.before, place.before_length), array_mut(place.data, place.size)) })
        else {
            return guest.refuses(NO_ARRAY);
        };
        *arg = ArgOut { kind: ArgType(place.kind), before, data, length: 0 };
    }
    let given = read.iter().map(|arg| arg.data).chain(write.iter().map(|arg| arg.before));
    let outcome = match &guest.memory {
        Some(memory) if given.into_iter().any(|data| lies_in(memory, data)) => {
            guest.guest.genop_from(memory, read, write)
        }
        _ => guest.guest.genop(read, write),
    };
    for (place, arg) in places.iter_mut().zip(write.iter()) {
        place.length = arg.length;
    }
    // SAFETY: the module's contract.
    unsafe { guest.returns_timed(outcome, timings) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_register(
    guest: *mut Handle,
    kind: c_int,
    files: *const CFile,
    file_count: usize,
    resource: *mut CResource,
) -> c_int {
    let guest = guest!(guest);
    // SAFETY: the module's contract.
    let Some(given) = (unsafe { array(files, file_count) }) else { return guest.refuses(NO_ARRAY) };
    let kind = match kind {
        1 => ResourceKind::Model,
        2 => ResourceKind::Data,
        3 => ResourceKind::Library,
        _ => return guest.refuses("expected a kind of 1, 2 or 3"),
    };
    let mut files = [File { name: "", content: &[] }; FILES_MAX];
    let Some(files) = files.get_mut(..given.len()) else { return guest.refuses("expected 1 to 8 files") };
    for (file, given) in files.iter_mut().zip(given) {
        // SAFETY: the module's contract.
        let (name, content) = unsafe { (text(given.name), array(given.data, given.length)) };
        let Some(name) = name else { return guest.refuses("expected names of files in UTF-8") };
        let Some(content) = content else { return guest.refuses(NO_ARRAY) };
        *file = File { name, content };
    }
    let outcome = guest.guest.register(kind, files);
    // SAFETY: null, or a place for a name.
    if let (Ok(id), Some(place)) = (&outcome, unsafe { resource.as_mut() }) {
        terminate(&Text::<RESOURCE_BYTES>::from(id.as_str()), &mut place.name);
    }
    guest.returns(outcome.map(drop))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_unregister(guest: *mut Handle, id: *const CResource) -> c_int {
    let guest = guest!(guest);
    // SAFETY: the module's contract.
    let Some(id) = (unsafe { resource(id) }) else { return guest.refuses("expected a resource") };
    let outcome = guest.guest.unregister(&id);
    guest.returns(outcome)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_reason(guest: *const Handle) -> *const c_char {
    macro_rules! names {
        ($($reason:ident),*) => { |reason| match reason { $(Reason::$reason => {
            const NAME: &[u8] = &nul::<{ Reason::$reason.name().len() + 1 }>(Reason::$reason.name());
            NAME
        })* } };
    }
    let name = names!(
        BadArgument,
        MessageTooLarge,
        UnknownOperation,
        Disabled,
        Unauthenticated,
        Denied,
        NotFound,
        AlreadyExists,
        ModelRejected,
        QuotaExceeded,
        Overloaded,
        ShuttingDown,
        Unreachable,
        Deadline,
        Cancelled,
        BackendFailed,
        Unusable
    );
    // SAFETY: null, or a guest.
    unsafe { guest.as_ref() }.map_or(ptr::null(), |guest| name(guest.error.reason).as_ptr().cast())
}

/// A name and the NUL at its end.
#[allow(clippy::indexing_slicing, reason = "runs in the compiler")]
const fn nul<const N: usize>(name: &str) -> [u8; N] {
    let (mut ended, mut at) = ([0; N], 0);
    while at < name.len() {
        ended[at] = name.as_bytes()[at];
        at += 1;
    }
    ended
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_message(guest: *const Handle) -> *const c_char {
    // SAFETY: null, or a guest.
    unsafe { guest.as_ref() }.map_or(ptr::null(), |guest| guest.message.as_ptr().cast())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_may_have_run(guest: *const Handle) -> c_int {
    // SAFETY: null, or a guest.
    unsafe { guest.as_ref() }.map_or(0, |guest| c_int::from(guest.error.may_have_run))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_session_lost(guest: *const Handle) -> c_int {
    // SAFETY: null, or a guest.
    unsafe { guest.as_ref() }.map_or(0, |guest| c_int::from(guest.error.session_lost))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_retry_after_ms(guest: *const Handle) -> u32 {
    // SAFETY: null, or a guest.
    unsafe { guest.as_ref() }.map_or(0, |guest| guest.error.retry_after_ms)
}

/// Without the standard library somebody has to say what a panic does. Nothing in this crate panics; a test holds the
/// linked C example to that, where this function must not be found.
#[cfg(not(any(test, feature = "std")))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
