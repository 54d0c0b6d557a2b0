//! Bytes of an agent that were changed at random, in cuts of chance: the guest outlives them all, keeps its deadline
//! and writes nothing beside the places it was given. `fuzz/run` does the same for longer, led by what it finds.

#[allow(clippy::indexing_slicing, reason = "tests")]
#[path = "../../fuzz/conversation.rs"]
mod conversation;

use crate::random::Random;

/// Conversations to begin with: whole ones, and one of everything an agent can say.
fn seeds() -> Vec<Vec<u8>> {
    let all = |gate: u8| (0..20_u8).flat_map(move |kind| [gate, 2, kind, 9, 7, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    // After those of the session and the model, the third call's reply: timings, labels, tensors.
    let reply = |message: &[u8]| [&[0, 2, 15, 30, message.len() as u8], message].concat();
    let timings = b"\x0a\x06\x08\x01\x10\x02\x18\x03";
    let labels = b"\x8a\x01\x11\x0a\x0f\x0a\x0d\x08\x07\x12\x04name\x1d\0\0\0\x3f";
    let tensor = b"\x92\x01\x18\x0a\x16\x12\x14\x08\x02\x12\x02\x05\x01\x1a\x05\0\0\0\0\0\x22\x05hello";
    let head = |calls: u8, end: u8| vec![end << 4, calls, 3];
    let mut seeds: Vec<Vec<u8>> = (0..64).map(|calls| head(calls, calls % 4)).collect();
    for calls in [0, 2, 7, 0x12, 0x38] {
        for message in [&timings[..], labels, tensor] {
            seeds.push([head(calls, 0), reply(message), reply(&[timings, message].concat())].concat());
        }
        seeds.push([head(calls, 1), all(0).collect(), all(0x70).collect()].concat());
    }
    seeds
}

fn change(random: &mut Random, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let at = random.below(input.len() + 1);
    match random.below(8) {
        0 => input.insert(at, random.next() as u8),
        1 => input.truncate(at.max(3)),
        2 => {
            let count = random.below(20);
            let bytes = random.bytes(count);
            input.splice(at..at, bytes);
        }
        3 => {
            let other = &seeds[random.below(seeds.len())];
            input.extend_from_slice(&other[random.below(other.len())..]);
        }
        4 => input.extend_from_within(at..),
        _ if at < input.len() => match random.below(3) {
            0 => input[at] = random.next() as u8,
            1 => input[at] ^= 1 << random.below(8),
            _ => drop(input.remove(at)),
        },
        _ => {}
    }
    input.truncate(2000);
}

#[test]
fn a_guest_outlives_whatever_an_agent_says() {
    let seeds = seeds();
    // Those with a reply in them are answered, or nothing would be tried behind it.
    let answered: Vec<_> = seeds.iter().filter(|seed| conversation::hold(seed)[0]).collect();
    for (call, field) in [(0, &b"\x92\x01"[..]), (2, b"\x8a\x01"), (7, b"\x0a\x06")] {
        let reply = |seed: &[u8]| seed.get(8..10).is_some_and(|tag| tag == field);
        assert!(answered.iter().any(|seed| seed[1] == call && reply(seed)), "{call}");
    }
    let mut random = Random::new(9113);
    for _ in 0..200_000 {
        let mut input = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(6) {
            change(&mut random, &mut input, &seeds);
        }
        conversation::hold(&input);
    }
}
