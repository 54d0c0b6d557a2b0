//! Operations that have a generic form, which is what the agent is asked for: numbers, arrays and texts in, arrays out.

use std::ffi::{c_char, c_int, c_uchar, c_void};
use std::path::Path;
use std::slice;
use std::sync::Arc;
use std::time::Duration;

use vaccel_client::proto::is_resource_id;
use vaccel_client::proto::v1::Arg;
use vaccel_client::{ArgType, Error, Resource, ResourceKind, arg, room};

use crate::abi;
use crate::given::{array, array_mut, count, refused, text};
use crate::host::{Opened, answer, lock};
use crate::pictures::{folder, put};
use crate::resources::{library, registered};

/// Where an argument that comes out is to be.
struct Place<'a> {
    kind: ArgType,
    data: &'a mut [u8],
    /// What is there goes in, too.
    counts: bool,
    custom: u32,
}

impl<'a> Place<'a> {
    fn new<T>(kind: ArgType, data: &'a mut [T]) -> Self
    where
        T: Plain,
    {
        Self { kind, data: T::bytes_mut(data), counts: false, custom: 0 }
    }
}

/// Numbers without gaps between them, of which all bytes are some.
trait Plain: Copy + 'static {
    fn bytes(numbers: &[Self]) -> &[u8] {
        // SAFETY: numbers are bytes, so many for each.
        unsafe { slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
    }

    fn bytes_mut(numbers: &mut [Self]) -> &mut [u8] {
        // SAFETY: numbers are bytes, so many for each, and any bytes are numbers.
        unsafe { slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
    }
}

impl Plain for u8 {}
impl Plain for c_int {}
impl Plain for f32 {}
impl Plain for f64 {}

impl Opened {
    /// Has the agent do an operation by its number, and copies what comes out to its places.
    fn generic(&self, number: u8, mut read: Vec<Arg>, places: Vec<Place<'_>>) -> Result<(), Error> {
        read.insert(0, arg(ArgType::Uint8, vec![number]));
        let write = places.iter().map(|place| {
            let data = if place.counts { self.copy(place.data) } else { Default::default() };
            let size = if place.counts { 0 } else { place.data.len() as u64 };
            Arg { data, custom_kind: place.custom, ..room(place.kind, size) }
        });
        let (written, _) = self.wait(self.session.genop(read, write.collect()))?;
        for (index, (place, written)) in places.into_iter().zip(written).enumerate() {
            let Some(room) = place.data.get_mut(..written.data.len()) else {
                let got = format!("{} bytes", written.data.len());
                return Err(refused(
                    &format!("write[{index}]"),
                    &format!("at most {} bytes", place.data.len()),
                    got,
                ));
            };
            room.copy_from_slice(&written.data);
        }
        Ok(())
    }

    fn numbers<T: Plain>(&self, kind: ArgType, numbers: &[T]) -> Arg {
        arg(kind, self.copy(T::bytes(numbers)))
    }
}

fn word(text: &str) -> Arg {
    arg(ArgType::String, [text.as_bytes(), &[0]].concat())
}

fn long(number: i64) -> Arg {
    arg(ArgType::Int64, number.to_le_bytes().to_vec())
}

fn int(number: i32) -> Arg {
    arg(ArgType::Int32, number.to_le_bytes().to_vec())
}

fn float(number: f32) -> Arg {
    arg(ArgType::Float32, number.to_le_bytes().to_vec())
}

/// Does an operation in the session that a program means.
///
/// # Safety
/// Null, or libvaccel's session.
pub(crate) unsafe fn on(
    session: *const abi::Session,
    operation: &str,
    work: impl FnOnce(&Arc<Opened>) -> Result<(), Error>,
) -> c_int {
    // SAFETY: as this function's.
    answer(operation, || work(&unsafe { Opened::of(session)? }))
}

pub(crate) unsafe extern "C" fn noop(session: *mut abi::Session) -> c_int {
    // SAFETY: libvaccel's session.
    unsafe { on(session, "noop", |opened| opened.wait(opened.session.noop()).map(drop)) }
}

/// What vAccel's mbench plugin takes for its own, of those that run a library's function.
const MBENCH: &str = "mbench";

pub(crate) unsafe extern "C" fn exec(
    session: *mut abi::Session,
    library: *const c_char,
    symbol: *const c_char,
    read: *mut abi::Arg,
    read_count: usize,
    write: *mut abi::Arg,
    write_count: usize,
) -> c_int {
    let work = |opened: &Arc<Opened>| {
        // SAFETY: texts, and arguments of such numbers.
        let (library, symbol, given, places) = unsafe {
            let (library, symbol) = (text("library", library)?, text("symbol", symbol)?);
            (library, symbol, taken(opened, read, read_count)?, places(write, write_count)?)
        };
        if library == MBENCH || symbol == MBENCH {
            return mbench(opened, &given);
        }
        let (number, library) = match brought(opened, Path::new(library))? {
            Some(brought) => (2, brought.id().to_owned()),
            None => (1, library.to_owned()),
        };
        opened.generic(number, [vec![word(&library), word(symbol)], given].concat(), places)
    };
    // SAFETY: libvaccel's session.
    unsafe { on(session, "exec", work) }
}

/// A library that is a file here, which the session then holds; none where the program means one that it registered.
fn brought(opened: &Opened, path: &Path) -> Result<Option<Resource>, Error> {
    if !path.is_file() {
        return Ok(None);
    }
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if let Some(known) = lock(&opened.libraries).get(&path) {
        return Ok(Some(known.clone()));
    }
    let registered = opened.wait(opened.session.register(library(&path)?))?;
    lock(&opened.libraries).insert(path, registered.clone());
    Ok(Some(registered))
}

/// Keeps a processor of the agent busy for as many milliseconds as the first argument begins with, in words.
fn mbench(opened: &Opened, read: &[Arg]) -> Result<(), Error> {
    let said = read.first().map(|time| time.data.to_vec()).unwrap_or_default();
    let digits = said.iter().take_while(|byte| byte.is_ascii_digit()).map(|byte| char::from(*byte));
    let time = digits.collect::<String>().parse();
    let time = time
        .map_err(|_| refused("read[0]", "milliseconds", format!("{:?}", String::from_utf8_lossy(&said))))?;
    opened.wait(opened.session.mbench(Duration::from_millis(time)))
}

pub(crate) unsafe extern "C" fn exec_with_resource(
    session: *mut abi::Session,
    resource: *mut abi::Resource,
    symbol: *const c_char,
    read: *mut abi::Arg,
    read_count: usize,
    write: *mut abi::Arg,
    write_count: usize,
) -> c_int {
    answer("exec_with_resource", || {
        // SAFETY: libvaccel's session and resource, a text, and arguments of such numbers.
        let (opened, library, symbol) = unsafe {
            let (opened, library) = registered(resource, session)?;
            (opened, library, text("symbol", symbol)?)
        };
        // SAFETY: arguments of such numbers.
        let (given, places) = unsafe { (taken(&opened, read, read_count)?, places(write, write_count)?) };
        opened.generic(2, [vec![word(library.id()), word(symbol)], given].concat(), places)
    })
}

/// The program's own arguments.
///
/// # Safety
/// Null, or so many arguments.
unsafe fn taken(opened: &Opened, args: *const abi::Arg, count: usize) -> Result<Vec<Arg>, Error> {
    // SAFETY: as this function's.
    let args = unsafe { array("read", args, count)? };
    let one = |given: &abi::Arg| {
        // SAFETY: an argument of so many bytes.
        let data = unsafe { array::<u8>("read", given.data.cast(), given.size)? };
        Ok(Arg { custom_kind: given.custom, ..arg(kind(given)?, opened.copy(data)) })
    };
    args.iter().map(one).collect()
}

/// Where the program's own arguments come out; what is there goes in, too.
///
/// # Safety
/// Null, or so many arguments, whose data are this call's alone.
unsafe fn places<'a>(args: *const abi::Arg, count: usize) -> Result<Vec<Place<'a>>, Error> {
    // SAFETY: as this function's.
    let args = unsafe { array("write", args, count)? };
    let one = |given: &abi::Arg| {
        // SAFETY: an argument of so many bytes.
        let data = unsafe { array_mut::<u8>("write", given.data.cast(), given.size)? };
        Ok(Place { kind: kind(given)?, data, counts: true, custom: given.custom })
    };
    args.iter().map(one).collect()
}

fn kind(given: &abi::Arg) -> Result<ArgType, Error> {
    let kind = i32::try_from(given.kind).ok().and_then(|kind| ArgType::try_from(kind).ok());
    kind.ok_or_else(|| refused("argument's type", "0 to 29", given.kind))
}

pub(crate) unsafe extern "C" fn image_classification(
    session: *mut abi::Session,
    image: *const c_void,
    out_text: *mut c_uchar,
    out_name: *mut c_uchar,
    image_bytes: usize,
    text_room: usize,
    name_room: usize,
) -> c_int {
    let work = |opened: &Arc<Opened>| {
        // SAFETY: arrays of such lengths; what goes in is copied before what comes out is anybody's.
        let (image, text, name) = unsafe {
            let image = opened.numbers(ArgType::Buffer, array::<u8>("image", image.cast(), image_bytes)?);
            (
                image,
                array_mut("out_text", out_text, text_room)?,
                array_mut("out_imgname", out_name, name_room)?,
            )
        };
        let places = [name, text].map(|place| Place::new(ArgType::UcharArray, place));
        opened.generic(3, vec![image], places.into())
    };
    // SAFETY: libvaccel's session.
    unsafe { on(session, "image_classification", work) }
}

/// Room for the name that the agent gives a picture: 64 digits of a resource's, or another one of its.
const NAME_ROOM: usize = 128;

/// A picture as the agent names it, or itself.
enum Shown {
    Name(Vec<u8>),
    Picture(Vec<u8>),
}

impl Opened {
    /// Has the agent look at an image. It names a resource of the session, or with the engine `noop` what is none.
    fn shown(&self, number: u8, image: Arg) -> Result<Shown, Error> {
        let mut name = [0; NAME_ROOM];
        self.generic(number, vec![image], vec![Place::new(ArgType::UcharArray, &mut name)])?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let digits = std::str::from_utf8(name).ok().filter(|name| is_resource_id(name));
        let Some(id) = digits else { return Ok(Shown::Name(name.to_vec())) };
        let picture = Resource::of_session(id, ResourceKind::Data);
        let reading = async { self.session.read_resource(&picture, "", 0, 0).await?.rest().await };
        self.wait(reading).map(Shown::Picture)
    }
}

macro_rules! images {
    ($($operation:ident = $number:literal;)*) => { $(
        pub(crate) unsafe extern "C" fn $operation(
            session: *mut abi::Session,
            image: *const c_void,
            out_name: *mut c_uchar,
            image_bytes: usize,
            name_room: usize,
        ) -> c_int {
            let work = |opened: &Arc<Opened>| {
                // SAFETY: arrays of such lengths; what goes in is copied before what comes out is anybody's.
                let (image, place) = unsafe {
                    let image = opened.numbers(ArgType::Buffer, array::<u8>("image", image.cast(), image_bytes)?);
                    (image, array_mut("out_imgname", out_name, name_room)?)
                };
                match opened.shown($number, image)? {
                    // What has no place goes nowhere.
                    _ if place.is_empty() => Ok(()),
                    Shown::Name(name) => put(&name, place),
                    Shown::Picture(picture) => {
                        // SAFETY: an open session, or there would have been no answer.
                        let folder = folder(unsafe { &*session });
                        lock(&opened.pictures).write(&folder, stringify!($operation), &picture, place)
                    }
                }
            };
            // SAFETY: libvaccel's session.
            unsafe { on(session, stringify!($operation), work) }
        }
    )* };
}

images! {
    image_detection = 4;
    image_segmentation = 5;
    image_pose = 6;
    image_depth = 7;
}

/// Elements from the first of a matrix to its last, with rows that are so far from each other.
fn span(what: &str, rows: i64, columns: i64, stride: i64) -> Result<usize, Error> {
    if rows == 0 || columns == 0 {
        return Ok(0);
    }
    let span = || {
        let (rows, columns) = (usize::try_from(rows).ok()?, usize::try_from(columns).ok()?);
        let stride = usize::try_from(stride).ok().filter(|stride| *stride >= columns)?;
        rows.checked_sub(1)?.checked_mul(stride)?.checked_add(columns)
    };
    let got = || format!("{rows} x {columns} with rows {stride} apart");
    span().ok_or_else(|| refused(what, "a matrix with rows of as much as they are apart, or less", got()))
}

pub(crate) unsafe extern "C" fn sgemm(
    session: *mut abi::Session,
    m: i64,
    n: i64,
    k: i64,
    alpha: f32,
    a: *mut f32,
    lda: i64,
    b: *mut f32,
    ldb: i64,
    beta: f32,
    c: *mut f32,
    ldc: i64,
) -> c_int {
    let work = |opened: &Arc<Opened>| {
        // SAFETY: matrices of such sizes; what goes in is copied before what comes out is anybody's.
        let (a, b, c) = unsafe {
            let numbers = |matrix| opened.numbers(ArgType::Float32Array, matrix);
            let a = numbers(array("a", a, span("a", m, k, lda)?)?);
            let b = numbers(array("b", b, span("b", k, n, ldb)?)?);
            (a, b, array_mut("c", c, span("c", m, n, ldc)?)?)
        };
        let read =
            vec![long(m), long(n), long(k), float(alpha), a, long(lda), b, long(ldb), float(beta), long(ldc)];
        // What is between its rows stays.
        let counts = beta != 0.0 || ldc > n;
        opened.generic(17, read, vec![Place { counts, ..Place::new(ArgType::Float32Array, c) }])
    };
    // SAFETY: libvaccel's session.
    unsafe { on(session, "sgemm", work) }
}

pub(crate) unsafe extern "C" fn fpga_arraycopy(
    session: *mut abi::Session,
    a: *mut c_int,
    out: *mut c_int,
    length: usize,
) -> c_int {
    let work = |opened: &Arc<Opened>| {
        // SAFETY: arrays of this length; what goes in is copied before what comes out is anybody's.
        let (a, out) = unsafe {
            let a = opened.numbers(ArgType::Int32Array, array("a", a, length)?);
            (a, array_mut("out_a", out, length)?)
        };
        opened.generic(18, vec![a], vec![Place::new(ArgType::Int32Array, out)])
    };
    // SAFETY: libvaccel's session.
    unsafe { on(session, "fpga_arraycopy", work) }
}

/// Arrays of single precision, two in and some out.
///
/// # Safety
/// Arrays of such lengths.
unsafe fn of_two(
    opened: &Opened,
    number: u8,
    [a, b]: [(*const f32, usize); 2],
    out: &[(*mut f32, usize)],
) -> Result<(), Error> {
    // SAFETY: as this function's.
    let (a, b) = unsafe { (array("a", a.0, a.1)?, array("b", b.0, b.1)?) };
    let read = [a, b].map(|numbers| opened.numbers(ArgType::Float32Array, numbers));
    let place = |&(out, length)| {
        // SAFETY: as this function's.
        Ok(Place::new(ArgType::Float32Array, unsafe { array_mut("out", out, length)? }))
    };
    opened.generic(number, read.into(), out.iter().map(place).collect::<Result<_, Error>>()?)
}

pub(crate) unsafe extern "C" fn fpga_mmult(
    session: *mut abi::Session,
    a: *mut f32,
    b: *mut f32,
    c: *mut f32,
    length: usize,
) -> c_int {
    // SAFETY: arrays of this length, and libvaccel's session.
    unsafe {
        on(session, "fpga_mmult", |opened| of_two(opened, 19, [(a, length), (b, length)], &[(c, length)]))
    }
}

pub(crate) unsafe extern "C" fn fpga_parallel(
    session: *mut abi::Session,
    a: *mut f32,
    b: *mut f32,
    sum: *mut f32,
    product: *mut f32,
    length: usize,
) -> c_int {
    // SAFETY: arrays of this length, and libvaccel's session.
    unsafe {
        on(session, "fpga_parallel", |opened| {
            of_two(opened, 20, [(a, length), (b, length)], &[(sum, length), (product, length)])
        })
    }
}

pub(crate) unsafe extern "C" fn fpga_vectoradd(
    session: *mut abi::Session,
    a: *mut f32,
    b: *mut f32,
    c: *mut f32,
    a_length: usize,
    b_length: usize,
) -> c_int {
    // SAFETY: arrays of such lengths, and libvaccel's session.
    unsafe {
        on(session, "fpga_vectoradd", |opened| {
            of_two(opened, 21, [(a, a_length), (b, b_length)], &[(c, a_length)])
        })
    }
}

pub(crate) unsafe extern "C" fn minmax(
    session: *mut abi::Session,
    data: *const f64,
    length: c_int,
    low: c_int,
    high: c_int,
    out: *mut f64,
    least: *mut f64,
    greatest: *mut f64,
) -> c_int {
    let work = |opened: &Arc<Opened>| {
        let numbers = count("ndata", length)?;
        // SAFETY: arrays of this length, and numbers; what goes in is copied before what comes out is anybody's.
        let (data, out, least, greatest) = unsafe {
            let data = opened.numbers(ArgType::Float64Array, array("indata", data, numbers)?);
            let out = array_mut("outdata", out, numbers)?;
            (data, out, array_mut("min", least, 1)?, array_mut("max", greatest, 1)?)
        };
        let read = vec![data, int(length), int(low), int(high)];
        let places = vec![
            Place::new(ArgType::Float64Array, out),
            Place::new(ArgType::Float64, least),
            Place::new(ArgType::Float64, greatest),
        ];
        opened.generic(22, read, places)
    };
    // SAFETY: libvaccel's session.
    unsafe { on(session, "minmax", work) }
}

pub(crate) unsafe extern "C" fn opencv(
    session: *mut abi::Session,
    read: *mut abi::Arg,
    read_count: c_int,
    write: *mut abi::Arg,
    write_count: c_int,
) -> c_int {
    let work = |opened: &Arc<Opened>| {
        let (read_count, write_count) = (count("nr_read", read_count)?, count("nr_write", write_count)?);
        // SAFETY: arguments of such numbers.
        let (given, places) = unsafe { (taken(opened, read, read_count)?, places(write, write_count)?) };
        let places = places.into_iter().map(|place| Place { counts: false, ..place });
        opened.generic(23, given, places.collect())
    };
    // SAFETY: libvaccel's session.
    unsafe { on(session, "opencv", work) }
}
