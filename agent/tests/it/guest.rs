//! The thin guest on a real agent: everything it can ask for, over every socket, and what it does when things break.

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use vaccel_guest::{
    DType, File, Guest, Input, Label, Output, Posix, Reason, ResourceId, ResourceKind, Sgemm, Transport,
};

use crate::support::{Agent, digits, onnx, read};

pub fn guest(address: &str) -> Guest<Posix> {
    Guest::new(address.parse().unwrap())
}

const SOCKETS: &[&str] = &["unix://{}/s", "unix://@vaccel-guest-{}", "tcp://127.0.0.1:0", "tcp://[::1]:0"];

#[test]
fn images_get_the_same_labels_over_every_socket() {
    let agent = Agent::start(SOCKETS, &[]);
    for address in &agent.addresses {
        let mut guest = guest(address);
        let mut right = 0;
        for batch in digits("png").chunks(16) {
            let files: Vec<_> = batch.iter().map(|(path, _)| read(path)).collect();
            let images: Vec<&[u8]> = files.iter().map(|file| &file[..]).collect();
            let mut labels = vec![Label::default(); 3 * images.len()];
            let (count, timings) = guest.classify(None, &images, &mut labels).unwrap();
            assert_eq!(count, labels.len());
            assert!(timings.batch_size >= 1);
            let best = labels.iter().step_by(3).zip(batch).enumerate();
            for (image, (label, (_, digit))) in best {
                assert_eq!(label.image as usize, image);
                assert!(label.probability > 0.1 && !label.name.is_empty());
                right += usize::from(label.index as usize == *digit);
            }
        }
        assert!(right >= 97, "{right} of 100 on {address}");
        guest.close().unwrap();
    }
}

#[test]
fn matrices_are_multiplied_into_rows_of_any_distance() {
    let agent = Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0"], &[]);
    let bytes = |numbers: &[f32]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
    let numbers = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    let (a, b) = (bytes(&[1.0, 2.0, 0.0, 3.0, 4.0]), bytes(&[5.0, 6.0, 7.0, 8.0]));
    let before = bytes(&[1.0, 1.0, -1.0, 1.0, 1.0]);
    for address in &agent.addresses {
        let mut guest = guest(address);
        let product = Sgemm {
            sizes: [2, 2, 2],
            alpha: 2.0,
            a: &a,
            lda: 3,
            b: &b,
            ldb: 0,
            beta: 3.0,
            c: &before,
            ldc: 3,
        };
        let mut c = vec![0; before.len()];
        guest.sgemm(&product, &mut c).unwrap();
        assert_eq!(numbers(&c), [41.0, 47.0, -1.0, 89.0, 103.0]);
        let mut dense = vec![0; 16];
        guest.sgemm(&Sgemm { beta: 0.0, c: &[], ldc: 0, ..product }, &mut dense).unwrap();
        assert_eq!(numbers(&dense), [38.0, 44.0, 86.0, 100.0]);
        let error = guest.sgemm(&Sgemm { lda: 1, ..product }, &mut c).unwrap_err();
        assert_eq!(error.reason, Reason::BadArgument);
        assert!(guest.message().contains("lda"), "{}", guest.message());
    }
}

#[test]
fn tensors_of_every_size_come_back_as_they_went() {
    let agent = Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0"], &["--engine", "tract"]);
    for address in &agent.addresses {
        let mut guest = guest(address);
        let model = register(&mut guest, &onnx::echo());
        for count in [0_usize, 1, 3, 255, 4096, 150_528, (4 << 20) + 1] {
            let sent: Vec<u8> = (0..count * 4)
                .map(|at| at.wrapping_mul(31).wrapping_add(at / 4093).to_le_bytes()[0])
                .collect();
            let mut place = vec![0; count * 4];
            let shape = [i64::try_from(count).unwrap()];
            let input = Input { name: "x", dtype: DType::F32, shape: &shape, data: &sent };
            let mut outputs = [Output::new(&mut place)];
            guest.run(&model, &[input], &["y"], &mut outputs).unwrap();
            assert_eq!(
                (outputs[0].dtype, outputs[0].shape(), outputs[0].length),
                (DType::F32, &shape[..], count * 4)
            );
            assert!(place == sent, "{count} numbers over {address}");
        }
    }
}

pub fn register(guest: &mut Guest<Posix>, model: &[u8]) -> ResourceId {
    guest.register(ResourceKind::Model, &[File { name: "model.onnx", content: model }]).unwrap()
}

#[test]
fn models_of_the_host_go_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let name = "n".repeat(64);
    let version = folder.path().join("models").join(&name).join("1");
    std::fs::create_dir_all(&version).unwrap();
    std::fs::write(version.join("model.onnx"), onnx::add()).unwrap();
    let agent = Agent::start_in(folder, &["unix://{}/s"], &["--model-repository", "{}/models"]);
    let mut guest = guest(agent.address());
    let (numbers, mut sums) = ([1.0_f32, 2.0], [0.0_f32; 2]);
    let data = bytemuck::cast_slice(&numbers);
    let mut run = |name: &str| {
        let model = ResourceId::of_repository(name).unwrap();
        assert_eq!(model.as_str(), name);
        let input = Input { name: "", dtype: DType::F32, shape: &[1, 2], data };
        let places = &mut [Output::new(bytemuck::cast_slice_mut(&mut sums))];
        guest.run(&model, &[input], &[], places).map(|_| ()).map_err(|error| error.reason)
    };
    assert_eq!(run(&name), Ok(()));
    assert_eq!([run("absent"), run("n")], [Err(Reason::NotFound); 2]);
    assert_eq!(sums, [2.0, 4.0]);
    for none in ["", "with\0", &"n".repeat(65)] {
        assert_eq!(ResourceId::of_repository(none), None);
    }
}

#[test]
fn errors_have_their_reason_and_text() {
    let agent = Agent::unix(&["--tenant-resource-mib", "1"]);
    let mut guest = guest(agent.address());
    let error = guest.classify(None, &[b"no image"], &mut [Label::default()]).unwrap_err();
    assert_eq!((error.reason, error.reason.errno()), (Reason::BadArgument, 22));
    assert!(guest.message().starts_with("images[0]"), "{}", guest.message());
    let model = register(&mut guest, &onnx::add());
    let data = [0; 8];
    let input = |shape| Input { name: "", dtype: DType::F32, shape, data: &data };
    let error = guest.run(&model, &[input(&[2])], &[], &mut []).unwrap_err();
    assert_eq!(error.reason, Reason::BadArgument);
    assert!(guest.message().contains("inputs[0].shape"), "{}", guest.message());
    let mut small = [0; 7];
    let error = guest.run(&model, &[input(&[1, 2])], &[], &mut [Output::new(&mut small)]).unwrap_err();
    assert_eq!(error.reason, Reason::BadArgument);
    assert_eq!(guest.message(), "outputs[0]: expected a place for 8 bytes");
    let mut place = [0; 8];
    guest.run(&model, &[input(&[1, 2])], &[], &mut [Output::new(&mut place)]).unwrap();
    let large = vec![7; 2 << 20];
    let error = guest.register(ResourceKind::Data, &[File { name: "large", content: &large }]).unwrap_err();
    assert_eq!(error.reason, Reason::QuotaExceeded, "{}", guest.message());
    guest.unregister(&model).unwrap();
    assert_eq!(guest.unregister(&model).unwrap_err().reason, Reason::NotFound);
    let info = guest.info().unwrap();
    assert_eq!(info.version.as_str(), env!("CARGO_PKG_VERSION"));
    assert!(info.operations.as_str().contains("model_run") && info.engines.as_str().contains("tract"));
    assert!(info.tenant.as_str().starts_with("unix:"), "{info:?}");
    guest.noop().unwrap();
    guest.renew().unwrap();
}

#[test]
fn a_resource_goes_up_in_pieces_and_only_once() {
    let agent = Agent::unix(&[]);
    let mut guest = guest(agent.address());
    let large: Vec<u8> = (0..40_u32 << 20).map(|at| (at ^ at >> 9).to_le_bytes()[0]).collect();
    let files = [File { name: "a", content: &large }, File { name: "empty", content: &[] }];
    let first = guest.register(ResourceKind::Data, &files).unwrap();
    assert_eq!(guest.register(ResourceKind::Data, &files).unwrap(), first);
    guest.close().unwrap();
    assert_ne!(guest.register(ResourceKind::Data, &files[..1]).unwrap(), first);
}

#[test]
fn a_deadline_ends_a_call_and_not_the_connection() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let mut guest = guest(agent.address());
    let model = register(&mut guest, &onnx::slow(512, 3000));
    let side = vec![0; 512 * 512 * 4];
    let mut place = vec![0; side.len()];
    let input = Input { name: "x", dtype: DType::F32, shape: &[512, 512], data: &side };
    guest.set_deadline_ms(150);
    let begun = Instant::now();
    let error = guest.run(&model, &[input], &[], &mut [Output::new(&mut place)]).unwrap_err();
    assert_eq!(error.reason, Reason::Deadline, "{}", guest.message());
    assert!(begun.elapsed() < Duration::from_secs(20));
    guest.set_deadline_ms(60_000);
    guest.noop().unwrap();
}

#[test]
fn a_guest_goes_on_after_its_agent_was_restarted() {
    let agent = Agent::unix(&[]);
    let address = agent.address().to_owned();
    let mut guest = guest(&address);
    guest.noop().unwrap();
    let folder = agent.kill();
    let agent = Agent::start_in(folder, &["unix://{}/s"], &[]);
    guest.noop().unwrap();
    let model = register(&mut guest, &onnx::add());
    let folder = agent.kill();
    let _agent = Agent::start_in(folder, &["unix://{}/s"], &[]);
    let data = [0; 8];
    let input = Input { name: "", dtype: DType::F32, shape: &[1, 2], data: &data };
    let mut place = [0; 8];
    let error = guest.run(&model, &[input], &[], &mut [Output::new(&mut place)]).unwrap_err();
    assert!(error.session_lost, "what the session held is gone: {error:?}");
    let model = register(&mut guest, &onnx::add());
    guest.run(&model, &[input], &[], &mut [Output::new(&mut place)]).unwrap();
}

#[test]
fn an_agent_that_is_not_there_is_unreachable_when_time_is_over() {
    let folder = tempfile::tempdir().unwrap();
    for address in [format!("unix://{}/nobody", folder.path().display()), "tcp://127.0.0.1:1".into()] {
        let mut guest = guest(&address);
        guest.set_deadline_ms(60);
        let error = guest.noop().unwrap_err();
        assert!(matches!(error.reason, Reason::Unreachable | Reason::Deadline), "{address}: {error:?}");
        assert!(guest.message().contains("cannot reach"), "{}", guest.message());
    }
}

/// What stands between guest and agent and can cut the wire.
struct Wire {
    address: String,
    cut: std::sync::mpsc::Sender<()>,
    connections: std::sync::mpsc::Receiver<()>,
}

impl Wire {
    fn to(agent: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp://{}", listener.local_addr().unwrap());
        let agent = agent.strip_prefix("tcp://").unwrap().to_owned();
        let (cut, is_cut) = std::sync::mpsc::channel::<()>();
        let (count, connections) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for guest in listener.incoming() {
                let (guest, agent) = (guest.unwrap(), TcpStream::connect(&agent).unwrap());
                for (from, to) in [(&guest, &agent), (&agent, &guest)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
                }
                if count.send(()).is_err() || is_cut.recv().is_err() {
                    return;
                }
                for stream in [guest, agent] {
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                }
            }
        });
        Self { address, cut, connections }
    }

    /// Waits for the guest's connection, and ends it.
    fn cut(&self) {
        self.connections.recv().unwrap();
        self.cut.send(()).unwrap();
    }
}

#[test]
fn a_session_outlives_the_connection_and_the_program_does_not_notice() {
    let agent = Agent::start(&["tcp://127.0.0.1:0"], &[]);
    let wire = Wire::to(agent.address());
    let mut guest = guest(&wire.address);
    let model = register(&mut guest, &onnx::add());
    let data = [0; 8];
    let input = Input { name: "", dtype: DType::F32, shape: &[1, 2], data: &data };
    for _ in 0..3 {
        let mut place = [0; 8];
        guest.run(&model, &[input], &[], &mut [Output::new(&mut place)]).unwrap();
        assert_eq!(place, [0, 0, 128, 63, 0, 0, 0, 64], "1 and 2");
        wire.cut();
        // Until the end has arrived.
        while guest.transport().wait(false, 0).is_err() {}
    }
}
