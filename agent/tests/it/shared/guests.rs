//! The thin guest's memory.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vaccel_client::Client;
use vaccel_guest::{
    DType, Guest, Input, Memory as _, Output, Posix, Reason, ResourceId, Sgemm, SharedMemory,
};

use super::{MEBIBYTE, NEAR, bytes_of, double, numbers, told};
use crate::guest::{guest, register};
use crate::support::{Agent, endpoint};

/// Regions that this process has mapped.
fn mapped() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:vaccel")).count()
}

/// Doubles numbers that lie in this memory, or anywhere.
fn double_by(
    guest: &mut Guest<Posix>,
    model: &ResourceId,
    data: &[u8],
    memory: Option<&SharedMemory>,
) -> Vec<u8> {
    let mut place = vec![0; data.len()];
    let shape = [(data.len() / 4) as i64];
    let inputs = [Input { name: "x", dtype: DType::F32, shape: &shape, data }];
    let mut outputs = [Output::new(&mut place)];
    let outcome = match memory {
        Some(memory) => guest.run_from(memory, model, &inputs, &[], &mut outputs),
        None => guest.run(model, &inputs, &[], &mut outputs),
    };
    outcome.unwrap_or_else(|error| panic!("{error:?}: {}", guest.message()));
    assert_eq!((outputs[0].length, outputs[0].shape()), (data.len(), &shape[..]));
    place
}

#[test]
fn thin_guests_get_the_same_results_with_and_without() {
    let agent = Agent::start(NEAR, &["--engine", "tract"]);
    for address in &agent.addresses {
        thin_guests_get_the_same_results_at(address);
        assert_eq!(mapped(), 0, "{address}");
    }
}

fn thin_guests_get_the_same_results_at(address: &str) {
    let mut guest = guest(address);
    let model = register(&mut guest, &double());
    for count in [1, 3000, 20_000, 150_528, 300_000, 2_000_000, 4_000_000] {
        let given = bytes_of(&numbers(count));
        let doubled = bytes_of(&numbers(count).iter().map(|x| x * 2.0).collect::<Vec<_>>());
        for call in 0..3 {
            assert!(double_by(&mut guest, &model, &given, None) == doubled, "{count} numbers, call {call}");
            assert_eq!(mapped(), usize::from(count > 20_000 || (count == 20_000 && call > 0)), "{count}");
        }
        let mut memory = guest.share(4 * count + 100).unwrap();
        assert!(memory.iter().all(|byte| *byte == 0) && memory.name().len() == 32);
        for offset in [0, 4, 100] {
            memory[offset..][..given.len()].copy_from_slice(&given);
            let there = &memory[offset..][..given.len()];
            assert!(double_by(&mut guest, &model, there, Some(&memory)) == doubled, "{count} at {offset}");
        }
    }
    guest.close().unwrap();
}

#[tokio::test]
async fn memory_over_tcp_is_its_tokens_tenants() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, "one one-one-one-one-one\ntwo two-two-two-two-two\n").unwrap();
    let flags = ["--engine", "tract", "--token-file", tokens.to_str().unwrap()];
    let agent = Agent::start(&["tcp://127.0.0.1:0"], &flags);
    for (wish, answer) in [
        ("4096", "ERROR UNAUTHENTICATED: "),
        ("4096 three-three-three-three", "ERROR UNAUTHENTICATED: "),
        ("4096 one-one-one-one-one", "AT vaccel-memory-"),
    ] {
        let tcp = std::net::TcpStream::connect(agent.address().trim_start_matches("tcp://")).unwrap();
        let told = told(tcp, wish);
        assert!(told.starts_with(answer), "{wish}: {told}");
    }
    let client = Client::builder(endpoint(agent.address())).token("two-two-two-two-two");
    let client = client.connect().await.unwrap();
    assert!(client.buffer(MEBIBYTE).await.is_shared());
    let address = agent.address().to_owned();
    let thin = tokio::task::spawn_blocking(move || {
        let mut guest = guest(&address);
        guest.set_token("one-one-one-one-one");
        let model = register(&mut guest, &double());
        let data = bytes_of(&vec![1.0; 100_000]);
        (0..3).for_each(|_| drop(double_by(&mut guest, &model, &data, None)));
        assert_eq!(mapped(), 2);
    });
    thin.await.unwrap();
}

#[test]
fn thin_guests_multiply_matrices_through_it() {
    let agent = Agent::unix(&[]);
    let mut guest = guest(agent.address());
    let ones = bytes_of(&vec![1.0; 256 * 256]);
    let product = Sgemm {
        sizes: [256; 3],
        alpha: 1.0,
        a: &ones,
        lda: 0,
        b: &ones,
        ldb: 0,
        beta: 2.0,
        c: &ones,
        ldc: 0,
    };
    for _ in 0..3 {
        let mut c = vec![0; ones.len()];
        guest.sgemm(&product, &mut c).unwrap();
        assert!(c.chunks_exact(4).all(|number| number == 258_f32.to_le_bytes()));
    }
    assert_eq!(mapped(), 1);
}

#[test]
fn thin_guests_go_on_without_it_and_after_a_restart() {
    let none = Agent::unix(&["--engine", "tract", "--tenant-shared-mib", "0"]);
    let mut without = guest(none.address());
    let model = register(&mut without, &double());
    let (given, doubled) = (bytes_of(&vec![1.0; 100_000]), bytes_of(&vec![2.0; 100_000]));
    for _ in 0..3 {
        assert!(double_by(&mut without, &model, &given, None) == doubled);
    }
    let refusal = without.share(4096).unwrap_err();
    assert_eq!(refusal.reason, Reason::Unusable, "{}", without.message());
    let agent = Agent::unix(&["--engine", "tract"]);
    let mut guest = guest(agent.address());
    let model = register(&mut guest, &double());
    double_by(&mut guest, &model, &given, None);
    double_by(&mut guest, &model, &given, None);
    let mut memory = guest.share(given.len()).unwrap();
    memory.copy_from_slice(&given);
    let (_, folder) = agent.terminate();
    let _again = Agent::start_in(folder, &["unix://{}/s"], &["--engine", "tract"]);
    let lost = guest.noop().unwrap_err();
    assert!(lost.session_lost, "{lost:?}");
    let model = register(&mut guest, &double());
    for _ in 0..3 {
        assert!(double_by(&mut guest, &model, &given, None) == doubled);
        // The agent does not know this memory, and gets what lies in it.
        assert!(double_by(&mut guest, &model, &memory, Some(&memory)) == doubled);
    }
    assert_eq!(mapped(), 2);
}

#[test]
fn thin_guests_know_memory_that_could_be_taken_away() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let impostor = std::thread::spawn(move || {
        let flags = MemfdFlags::ALLOW_SEALING;
        for (bytes, seals, text) in [
            (8192, SealFlags::GROW, "OK name\n"),
            (4096, SealFlags::SHRINK, "OK name\n"),
            (8192, SealFlags::SHRINK, "OK nobody ends this line"),
            (8192, SealFlags::SHRINK, "ERROR BAD_ARGUMENT: no\n"),
            (8192, SealFlags::SHRINK, "OK name\n"),
        ] {
            let (mut connection, _) = listener.accept().unwrap();
            let mut asked = [0; 21];
            connection.read_exact(&mut asked).unwrap();
            assert_eq!(&asked, b"VACCEL-MEMORY/1 8192\n");
            let file = memfd_create("impostor", flags).unwrap();
            ftruncate(&file, bytes).unwrap();
            fcntl_add_seals(&file, seals).unwrap();
            let files = [file.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if text.starts_with("OK") {
                control.push(SendAncillaryMessage::ScmRights(&files));
            }
            let text = [IoSlice::new(text.as_bytes())];
            sendmsg(&connection, &text, &mut control, SendFlags::empty()).unwrap();
        }
    });
    let mut guest = guest(&format!("unix://{}", path.display()));
    for _ in 0..4 {
        assert_eq!(guest.share(8192).unwrap_err().reason, Reason::Unusable);
        // Nothing was closed that is somebody else's.
        assert!(rustix::io::fcntl_getfd(std::io::stdin()).is_ok());
    }
    assert_eq!(guest.share(8192).unwrap().len(), 8192);
    impostor.join().unwrap();
}

#[test]
fn results_stay_right_while_calls_are_given_up() {
    let agent = Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0"], &["--engine", "tract"]);
    let work = &|number: usize| {
        let mut guest = guest(&agent.addresses[number % 2]);
        let model = register(&mut guest, &double());
        let (mut state, mut right) = (u32::try_from(number).unwrap(), 0);
        for call in 0..60 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let count = 10_000 + (state >> 12) as usize % 400_000;
            let value = (100 * number + call) as f32;
            let data = bytes_of(&vec![value; count]);
            let mut place = vec![0; data.len()];
            let shape = [count as i64];
            let input = Input { name: "x", dtype: DType::F32, shape: &shape, data: &data };
            let mut outputs = [Output::new(&mut place)];
            // Every other call has hardly the time it takes, and ends anywhere.
            guest.set_deadline_ms(if call % 2 == 0 { 60_000 } else { 1 + (state >> 8) % 4 });
            match guest.run(&model, &[input], &[], &mut outputs) {
                Ok(_) => {
                    let doubled = (2.0 * value).to_le_bytes();
                    assert!(place.chunks_exact(4).all(|number| number == doubled), "{number}: {call}");
                    right += 1;
                }
                Err(error) => {
                    let is_late = matches!(error.reason, Reason::Deadline | Reason::Overloaded);
                    assert!(is_late, "{number}: {call}: {error:?} {}", guest.message());
                    assert!(call % 2 == 1, "{number}: {call}");
                }
            }
        }
        assert!(right >= 30, "{right}");
    };
    std::thread::scope(|scope| {
        for number in 0..6 {
            scope.spawn(move || work(number));
        }
    });
    assert_eq!(mapped(), 0);
}
