//! Tensors that come in many frames, cut by chance: every byte lands where the caller wants it.

use prost::Message;
use prost::bytes::Bytes;
use vaccel_guest::{DType, Output};
use vaccel_proto::v1::{self, RunReply, run_reply::Outcome};

use crate::frames::{self, Frame};
use crate::peer::{Event, Peer, prefixed, timings};
use crate::random::Random;
use crate::{flow, opened, peer};

/// A tensor of so many bytes.
fn tensor(random: &mut Random, size: usize) -> v1::NamedTensor {
    let data = random.bytes(size);
    let pad = Bytes::from(vec![0; random.below(20)]);
    let shape = vec![1, size as i64, i64::from(random.next() as u8)];
    let tensor = v1::Tensor { dtype: v1::DType::U8.into(), shape, pad, data: data.into() };
    v1::NamedTensor { name: "y".repeat(random.below(9)), tensor: Some(tensor) }
}

/// Sends a reply in frames of chance, with others between them.
fn send(peer: &mut Peer, random: &mut Random, stream: u32, body: &[u8]) {
    peer.send(frames::headers(stream, frames::REPLY));
    let longest = [1, 3, 20, 500, 16_384, 100_000][random.below(6)];
    let mut rest = body;
    while !rest.is_empty() {
        let piece = rest.split_off(..(1 + random.below(longest)).min(rest.len())).unwrap();
        let frame = frames::data(stream, piece);
        let padding = random.next() as u8;
        peer.send(if padding > 200 { frames::padded(frame, padding) } else { frame });
        match random.below(30) {
            0 => peer.send(frames::ping(7)),
            1 => peer.send(frames::data(stream, b"")),
            2 => peer.send(frames::settings(&[])),
            3 => peer.send(Frame::new(0x42, 0xff, stream, vec![7; padding.into()])),
            4 => peer.delay += 1,
            5 => peer.send(frames::window_update(0, 1)),
            _ => {}
        }
    }
    peer.send(frames::trailers(stream, frames::OK));
}

#[test]
fn tensors_arrive_byte_for_byte_in_any_cuts() {
    const CANARY: u8 = 0xa5;
    for seed in 0..400 {
        let mut random = Random::new(seed);
        let sizes: Vec<usize> = (0..=random.below(4)).map(|_| [0, 1, 900, 40_000][random.below(4)]).collect();
        let outputs: Vec<_> = sizes.iter().map(|size| tensor(&mut random, *size)).collect();
        let outcome = Outcome::ModelRun(v1::ModelRunReply { outputs: outputs.clone() });
        let reply = RunReply { timings: Some(timings()), outcome: Some(outcome), ..RunReply::default() };
        let body = prefixed(&reply.encode_to_vec());
        let mut own = Random::new(seed + 1000);
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            if call.is("Run") {
                send(peer, &mut own, call.stream, &body);
            }
            call.is("Run")
        });
        let manner = &mut guest.transport().manner;
        manner.read = [1, 100, 5000, usize::MAX][random.below(4)];
        manner.blocks = random.below(3) == 0;
        manner.random = Some(random.clone());
        let model = flow::model(&mut guest);
        // Places are larger than what comes, by chance.
        let mut places: Vec<_> = sizes.iter().map(|size| vec![CANARY; size + random.below(3)]).collect();
        let mut got: Vec<_> = places.iter_mut().map(|place| Output::new(place)).collect();
        let timings = guest.run(&model, &[], &[], &mut got).unwrap();
        assert_eq!(timings.batch_size, 3);
        for (got, sent) in got.iter().zip(&outputs) {
            let sent = sent.tensor.as_ref().unwrap();
            assert_eq!((got.length, got.dtype, got.shape()), (sent.data.len(), DType::U8, &sent.shape[..]));
            assert!(got.data[..got.length] == sent.data[..], "{seed}");
            assert!(got.data[got.length..].iter().all(|byte| *byte == CANARY), "{seed}");
        }
        assert_eq!(peer(&mut guest).dials.len(), 1);
    }
}

#[test]
fn a_deadline_in_the_middle_of_a_tensor_leaves_the_next_call_whole() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let sent = tensor(&mut random, 30_000);
        let outcome = Outcome::ModelRun(v1::ModelRunReply { outputs: vec![sent] });
        let body = prefixed(
            &RunReply { timings: None, outcome: Some(outcome), ..RunReply::default() }.encode_to_vec(),
        );
        let mut own = random.clone();
        let mut late = true;
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            if !call.is("Run") || !std::mem::replace(&mut late, false) {
                return false;
            }
            let mut bytes = frames::headers(call.stream, frames::REPLY).encode();
            for piece in body.chunks(1 + own.below(20_000)) {
                bytes.extend(frames::data(call.stream, piece).encode());
            }
            bytes.extend(frames::trailers(call.stream, frames::OK).encode());
            let (now, later) = bytes.split_at(own.below(bytes.len()));
            peer.raw(now);
            peer.delay = 100;
            peer.raw(later);
            peer.delay = 0;
            true
        });
        let model = flow::model(&mut guest);
        guest.set_deadline_ms(50);
        let mut place = vec![0; 30_000];
        guest.run(&model, &[], &[], &mut [Output::new(&mut place)]).unwrap_err();
        place.fill(1);
        guest.set_deadline_ms(60);
        guest.noop().unwrap();
        flow::echo(&mut guest, 2000).unwrap();
        assert!(place.iter().all(|byte| *byte == 1), "late bytes go nowhere");
        assert_eq!(peer(&mut guest).dials.len(), 1, "{seed}");
    }
}
