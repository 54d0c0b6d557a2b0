//! In the steady state a call of the guest allocates nothing.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

use prost::Message;
use vaccel_guest::{DType, Detection, File, Guest, Input, Label, Output, Posix, ResourceKind};
use vaccel_proto::v1::{self, RunReply, run_reply::Outcome};

/// The system's allocator, which counts what each thread asks of it: the server here may allocate.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    // A thread that is at its end has no count any more.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

#[allow(unsafe_code, reason = "only an allocator sees every allocation, and its interface is unsafe")]
// SAFETY: everything is passed on to the system's allocator as it is; counting allocates nothing and cannot panic.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract, which is the same; `place` came from the system's allocator.
        unsafe { System.realloc(place, layout, size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract, which is the same; `place` came from the system's allocator.
        unsafe { System.dealloc(place, layout) }
    }
}

/// Allocations of this thread meanwhile.
fn allocations(mut work: impl FnMut()) -> u64 {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}

#[test]
fn calls_allocate_nothing() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1, "allocations are counted");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || serve(&listener.accept().unwrap().0));
    let mut guest = Guest::new(address.parse::<Posix>().unwrap());
    let model = guest.register(ResourceKind::Model, &[File { name: "m", content: b"model" }]).unwrap();
    let image = [7; 3000];
    let images = [&image[..], &image[..]];
    let mut labels = [Label::default(); 4];
    let mut things = [Detection::default(); 3];
    // More than the window of the server and than a frame of it.
    let data = vec![7; 4 * TENSOR_ELEMENTS];
    let inputs = [Input { name: "x", dtype: DType::F32, shape: &[TENSOR_ELEMENTS as i64], data: &data }];
    let mut place = vec![0; data.len()];
    let mut outputs = [Output::new(&mut place)];
    let mut calls = || {
        guest.noop().unwrap();
        assert_eq!(guest.classify(Some(&model), &images, &mut labels).unwrap().0, 4);
        assert_eq!(guest.detect(Some(&model), &image[..1000], 0.5, &mut things).unwrap().0, 1);
        guest.run(&model, &inputs, &["y"], &mut outputs).unwrap();
        guest.renew().unwrap();
        guest.info().unwrap();
    };
    calls();
    let count = allocations(|| (0..100).for_each(|_| calls()));
    assert_eq!(count, 0);
    assert_eq!((outputs[0].length, labels[3].name.as_str()), (4 * TENSOR_ELEMENTS, "a label"));
    assert!(place.iter().all(|byte| *byte == 1));
}

const TENSOR_ELEMENTS: usize = 50_000;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;

fn frame(kind: u8, flags: u8, stream: u32, content: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = (content.len() as u32).to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), content].concat()
}

/// An agent on one connection, with HTTP/2's own limits, that does nothing and says it did.
fn serve(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut incoming = BufReader::new(stream);
    incoming.read_exact(&mut [0; 24])?;
    stream.write_all(&frame(SETTINGS, 0, 0, &[]))?;
    let mut path = Vec::new();
    let mut content = vec![0; 1 << 16];
    loop {
        let mut header = [0; 9];
        incoming.read_exact(&mut header)?;
        let [high, middle, low, kind, flags, id @ ..] = header;
        let (length, id) = (u32::from_be_bytes([0, high, middle, low]), u32::from_be_bytes(id));
        let content = &mut content[..length as usize];
        incoming.read_exact(content)?;
        match kind {
            HEADERS => path = content.to_vec(),
            SETTINGS if flags & 1 == 0 => stream.write_all(&frame(SETTINGS, 1, 0, &[]))?,
            DATA => {
                stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &length.to_be_bytes()))?;
                if flags & 1 == 0 {
                    stream.write_all(&frame(WINDOW_UPDATE, 0, id, &length.to_be_bytes()))?;
                } else {
                    stream.write_all(&reply(&path, content, id))?;
                }
            }
            _ => {}
        }
    }
}

/// The frames of a reply, after a request with these headers whose last frame has this content.
fn reply(headers: &[u8], content: &[u8], stream: u32) -> Vec<u8> {
    let is = |name: &str| headers.windows(name.len()).any(|bytes| bytes == name.as_bytes());
    let message = if is("Sessions/Open") {
        v1::OpenSessionReply { session: "0".repeat(32), ..Default::default() }.encode_to_vec()
    } else if is("Register") {
        v1::RegisterResourceReply { resource: "0".repeat(64), ..Default::default() }.encode_to_vec()
    } else if is("Info") {
        v1::InfoReply { version: "1".into(), ..Default::default() }.encode_to_vec()
    } else if is("Operations/Run") {
        ran(content).encode_to_vec()
    } else {
        Vec::new()
    };
    let prefix = (message.len() as u32).to_be_bytes();
    let body = [&[0], &prefix[..], &message].concat();
    let mut frames = frame(HEADERS, 4, stream, b"\x88\x0f\x10\x10application/grpc");
    body.chunks(16_384).for_each(|piece| frames.extend(frame(DATA, 0, stream, piece)));
    frames.extend(frame(HEADERS, 5, stream, b"\0\x0bgrpc-status\x010"));
    frames
}

/// A reply that fits the operation: an empty request's, that of two images, or that of a tensor.
fn ran(content: &[u8]) -> RunReply {
    let timings = Some(v1::Timings { queue_us: 1, run_us: 2, batch_size: 3 });
    let label = v1::Label { index: 1, name: "a label".into(), probability: 0.5 };
    let classification = v1::Classification { labels: vec![label.clone(); 2] };
    let outcome = match content.len() {
        ..64 => Outcome::Noop(v1::NoopReply {}),
        // An image half as long as one of those below.
        64..2000 => {
            let (label, area) = (Some(label), Some(v1::Area::default()));
            let detections = vec![v1::Detection { label, area }];
            Outcome::ImageDetection(v1::ImageDetectionReply { detections, ..Default::default() })
        }
        // Two images and the little around them fit in one frame; a tensor ends with a shorter one.
        6000..7000 => Outcome::ImageClassification(v1::ImageClassificationReply {
            classifications: vec![classification; 2],
        }),
        _ => {
            let data = vec![1; 4 * TENSOR_ELEMENTS].into();
            let tensor = v1::Tensor::from_bytes(v1::DType::F32, &[TENSOR_ELEMENTS as i64], data);
            let outputs = vec![v1::NamedTensor { name: "y".into(), tensor: Some(tensor) }];
            Outcome::ModelRun(v1::ModelRunReply { outputs })
        }
    };
    RunReply { timings, outcome: Some(outcome), ..RunReply::default() }
}
