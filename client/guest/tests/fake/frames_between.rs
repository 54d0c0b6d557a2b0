//! What comes between the frames of a reply: questions, goodbyes, ends, and frames that are not for this call.

use vaccel_guest::Reason;

use crate::frames::{self, END_HEADERS, END_STREAM, Frame, HEADERS};
use crate::peer::{Event, Peer, prefixed, run, timings};
use crate::{fails, flow, guest, opened, peer};

/// The frames of a reply to a call that does nothing, the message in two.
fn reply(stream: u32) -> Vec<Frame> {
    let message = prost::Message::encode_to_vec(&vaccel_proto::v1::RunReply {
        timings: Some(timings()),
        ..Default::default()
    });
    let body = prefixed(&message);
    let (first, second) = body.split_at(7);
    vec![
        frames::headers(stream, frames::REPLY),
        frames::data(stream, first),
        frames::data(stream, second),
        frames::trailers(stream, frames::OK),
    ]
}

/// A guest with a session, whose next call gets the frames that are made of those of a plain reply.
fn replying(
    make: impl Fn(Vec<Frame>, u32) -> Vec<Frame> + 'static,
) -> vaccel_guest::Guest<crate::transport::Fake> {
    opened(move |peer, event| {
        let Event::Asked(call) = event else { return false };
        make(reply(call.stream), call.stream).into_iter().for_each(|frame| peer.send(frame));
        true
    })
}

#[test]
fn other_frames_may_stand_between_any_two_of_a_reply() {
    let others = |stream: u32| {
        [
            frames::ping(77),
            frames::settings(&[(3, 100), (99, 1)]),
            Frame::new(frames::PRIORITY, 0, stream, [0, 0, 0, 0, 15]),
            Frame::new(0xfa, 0xff, stream, vec![1; 20_000]),
            frames::window_update(0, 10),
            frames::window_update(stream, 10),
            frames::reset(1, 0),
            frames::data(1, b"late"),
            frames::padded(frames::data(1, b""), 255),
            frames::trailers(1, frames::OK),
            frames::goaway(stream),
            Frame::new(frames::PING, frames::ACK, 0, [1; 8]),
            frames::data(stream, b""),
            frames::padded(frames::data(stream, b""), 9),
        ]
    };
    for manner in [1, 5, 64, usize::MAX] {
        for (number, _) in others(0).iter().enumerate() {
            for position in 0..4 {
                // Content comes between headers and trailers only.
                if number >= 12 && position == 0 {
                    continue;
                }
                let mut guest = replying(move |mut reply, stream| {
                    reply.insert(position, others(stream)[number].clone());
                    reply
                });
                guest.transport().manner.read = manner;
                let outcome = guest.noop();
                assert!(outcome.is_ok(), "{number} {position}: {}", guest.message());
                assert_eq!(outcome.unwrap().batch_size, 3);
            }
        }
    }
}

#[test]
fn a_ping_is_answered_at_once_and_settings_with_what_is_sent_next() {
    let mut guest = opened(|peer, event| {
        peer.delay = 0;
        let Event::Asked(call) = event else { return false };
        if call.stream == 3 {
            peer.send(frames::settings(&[]));
            peer.delay = 40;
            peer.send(frames::ping(77));
        }
        if call.stream == 5 {
            peer.send(frames::settings(&[]));
        }
        peer.delay = 500;
        false
    });
    let answered = |peer: &Peer| peer.came(frames::SETTINGS, frames::ACK).len();
    peer(&mut guest).frames.clear();
    guest.noop().unwrap();
    // With the answer to the PING, after 40 ms.
    let pings = peer(&mut guest).came(frames::PING, frames::ACK);
    assert_eq!((pings.len(), &pings[0].payload[..]), (1, &77_u64.to_be_bytes()[..]));
    let position = |kind| move |frame: &Frame| frame.is(kind, frames::ACK);
    let frames = &peer(&mut guest).frames;
    let settings = frames.iter().rposition(position(frames::SETTINGS)).unwrap();
    assert!(settings < frames.iter().position(position(frames::PING)).unwrap());
    // By itself after a tenth of a second.
    let before = answered(peer(&mut guest));
    guest.noop().unwrap();
    assert_eq!(answered(peer(&mut guest)), before + 1);
    // At once between two calls.
    peer(&mut guest).delay = 0;
    peer(&mut guest).send(frames::settings(&[]));
    guest.noop().unwrap();
    assert_eq!(answered(peer(&mut guest)), before + 2);
}

#[test]
fn many_pings_are_answered_in_every_state() {
    for (count, manner) in [(4, 1), (5, usize::MAX), (200, usize::MAX), (200, 3)] {
        // In front of a reply that comes with them, and nothing after it.
        let mut guest = replying(move |reply, _| (0..count).map(frames::ping).chain(reply).collect());
        guest.transport().manner.read = manner;
        let begin = peer(&mut guest).now;
        guest.noop().unwrap();
        assert_eq!(peer(&mut guest).now, begin, "{count} questions hold nothing up");
        guest.attend();
        assert_eq!(peer(&mut guest).came(frames::PING, frames::ACK).len() as u64, count);
    }
}

#[test]
fn a_flood_of_pings_between_calls_is_outlived() {
    for writable_from in [0, u64::MAX] {
        let mut guest = opened(|_, _| false);
        let peer = peer(&mut guest);
        (0..5000).for_each(|number| peer.send(frames::ping(number)));
        peer.writable_from = writable_from;
        guest.attend();
        self::peer(&mut guest).writable_from = 0;
        guest.noop().unwrap();
        assert!(self::peer(&mut guest).came(frames::PING, frames::ACK).len() >= 4);
    }
}

#[test]
fn pings_come_while_a_long_message_is_stuck() {
    let mut asked = false;
    let mut guest = opened(move |peer, event| {
        if matches!(event, Event::Data(call) if call.is("Run")) && !std::mem::replace(&mut asked, true) {
            (0..1000).for_each(|number| peer.send(frames::ping(number)));
            peer.writable_from = peer.now + 50;
        }
        false
    });
    guest.transport().manner.write = 10_000;
    flow::echo(&mut guest, 200_000).unwrap();
}

#[test]
fn a_goodbye_that_covers_the_call_lets_it_end() {
    for position in 0..4 {
        let mut guest = replying(move |mut reply, stream| {
            reply.insert(position, frames::goaway(stream));
            reply
        });
        guest.noop().unwrap();
        guest.noop().unwrap();
        assert_eq!(peer(&mut guest).dials.len(), 2, "the next call has a new connection");
    }
}

#[test]
fn a_goodbye_after_the_answer_began_changes_nothing() {
    for position in 1..4 {
        let mut guest = replying(move |mut reply, stream| {
            reply.insert(position, frames::goaway(stream - 2));
            reply
        });
        guest.noop().unwrap();
        assert_eq!(peer(&mut guest).dials.len(), 1);
    }
}

#[test]
fn a_goodbye_that_does_not_cover_the_call_moves_it_to_a_new_connection() {
    let mut guest = opened(|peer, event| {
        if matches!(event, Event::Asked(call) if call.stream == 3) {
            peer.send(frames::goaway(1));
            return true;
        }
        false
    });
    guest.noop().unwrap();
    assert_eq!(peer(&mut guest).dials.len(), 2);
}

#[test]
fn a_goodbye_and_then_the_end_leaves_it_open_whether_the_call_ran() {
    let mut guest = opened(|peer, event| {
        if matches!(event, Event::Asked(_)) {
            peer.send(frames::goaway(3));
            peer.end(0);
        }
        matches!(event, Event::Asked(_))
    });
    let outcome = guest.noop();
    assert!(fails(&guest, outcome, Reason::Unreachable, "the connection to the agent broke").may_have_run);
}

#[test]
fn each_code_of_rst_stream_has_its_reason() {
    for code in (0..=14).chain([0xffff_ffff]) {
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            if peer.dials.len() == 1 {
                peer.send(frames::reset(call.stream, code));
            }
            peer.dials.len() == 1
        });
        let outcome = guest.noop();
        let (reason, text) = match code {
            7 => {
                outcome.unwrap();
                continue;
            }
            8 => (Reason::Cancelled, "cancelled"),
            11 => (Reason::QuotaExceeded, "too busy"),
            _ => (Reason::BackendFailed, "without a status"),
        };
        assert!(fails(&guest, outcome, reason, text).may_have_run, "{code}");
        guest.noop().unwrap();
    }
}

#[test]
fn a_call_that_is_refused_for_ever_ends_before_the_deadline() {
    let mut guest = guest(|peer, event| {
        if let Event::Asked(call) = event {
            peer.send(frames::reset(call.stream, 7));
        }
        matches!(event, Event::Asked(_))
    });
    guest.set_deadline_ms(3000);
    let outcome = guest.noop();
    assert!(!fails(&guest, outcome, Reason::Unreachable, "took no more calls").may_have_run);
    assert!(peer(&mut guest).now < 1_003_000);
}

#[test]
fn late_frames_of_an_abandoned_call_are_passed_over() {
    for cut in 0..5 {
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            if call.stream != 3 || !call.is("Run") {
                return false;
            }
            // The deadline passes after `cut` frames and a half.
            let frames = [&[frames::goaway(0x7fff_ffff)][..], &reply(3)].concat();
            let bytes: Vec<_> = frames[1..].iter().map(Frame::encode).collect();
            bytes[..cut.min(3)].iter().for_each(|frame| peer.raw(frame.clone()));
            let (now, later) = bytes[cut.min(3)].split_at(if cut == 4 { 9 } else { 11 });
            peer.raw(now);
            peer.delay = 2000;
            peer.raw(later);
            bytes[cut.min(3) + 1..].iter().for_each(|frame| peer.raw(frame.clone()));
            peer.delay = 0;
            true
        });
        guest.set_deadline_ms(1000);
        let begin = peer(&mut guest).now;
        let outcome = guest.noop();
        fails(&guest, outcome, Reason::Deadline, "the deadline passed");
        assert_eq!(peer(&mut guest).now, begin + 1000);
        let [reset] = peer(&mut guest).came(frames::RST_STREAM, 0)[..] else { panic!("one RST_STREAM") };
        assert_eq!((reset.stream, reset.number()), (3, 8));
        // The next call comes before the late frames, and its reply after them.
        guest.set_deadline_ms(10_000);
        let timings = guest.noop().unwrap();
        assert_eq!((timings.batch_size, peer(&mut guest).now), (3, begin + 2000), "{cut}");
        assert_eq!(peer(&mut guest).dials.len(), 1, "the connection stays");
    }
}

#[test]
fn what_breaks_the_rules_ends_the_connection() {
    let long = vec![0; (1 << 20) + 1];
    let block = frames::block(frames::REPLY, false);
    let cases: Vec<(Vec<Frame>, &str)> = vec![
        (vec![Frame::new(frames::PUSH_PROMISE, END_HEADERS, 3, [0, 0, 0, 2, 0x88])], "PUSH_PROMISE"),
        (vec![Frame::new(frames::CONTINUATION, END_HEADERS, 3, [0x88])], "CONTINUATION of nothing"),
        (vec![Frame::new(HEADERS, 0, 3, &block[..9]), frames::ping(1)], "interrupted"),
        (vec![Frame::new(HEADERS, 0, 3, &block[..9]), frames::data(3, b"")], "interrupted"),
        (
            vec![
                Frame::new(HEADERS, 0, 3, &block[..9]),
                Frame::new(frames::CONTINUATION, END_HEADERS, 5, &block[9..]),
            ],
            "interrupted",
        ),
        (
            vec![
                Frame::new(HEADERS, 0, 3, vec![0; 10_000]),
                Frame::new(frames::CONTINUATION, 0, 3, vec![0; 10_000]),
            ],
            "longer than this side allows",
        ),
        (vec![Frame::new(HEADERS, END_HEADERS, 3, vec![0; 16_385])], "longer than this side allows"),
        (vec![Frame::new(frames::DATA, 0, 1, long.clone())], "a frame is longer"),
        (vec![Frame::new(0xfa, 0, 1, long)], "a frame is longer"),
        (vec![frames::data(5, b"x")], "DATA on a stream that is not open"),
        (vec![frames::data(0, b"x")], "DATA on a stream that is not open"),
        (vec![frames::headers(5, frames::REPLY)], "HEADERS on a stream that is not open"),
        (vec![frames::headers(0, frames::REPLY)], "HEADERS on a stream that is not open"),
        (vec![frames::data(3, b"x")], "DATA without headers"),
        (
            vec![frames::headers(3, frames::REPLY), Frame::new(frames::DATA, frames::PADDED, 3, [3, 0, 0])],
            "padding",
        ),
        (vec![Frame::new(HEADERS, END_HEADERS | frames::PADDED, 3, [3, 0, 0])], "padding"),
        (vec![Frame::new(HEADERS, END_HEADERS | frames::PADDED, 3, [])], "padding"),
        (vec![Frame::new(HEADERS, END_HEADERS | frames::WITH_PRIORITY, 3, [0; 4])], "padding"),
        (vec![Frame::new(frames::PING, 0, 0, [0; 7])], "wrong length"),
        (vec![Frame::new(frames::GOAWAY, 0, 0, [0; 7])], "wrong length"),
        (vec![Frame::new(frames::RST_STREAM, 0, 3, [0; 5])], "wrong length"),
        (vec![Frame::new(frames::SETTINGS, frames::ACK, 0, [0; 6])], "wrong length"),
        // An entry of a dynamic table, a table that grows, strings that end too late or are no code.
        (vec![Frame::new(HEADERS, END_HEADERS, 3, [0xbe])], "headers that cannot be read"),
        (vec![Frame::new(HEADERS, END_HEADERS, 3, [0x3f, 0xe1, 0x1f])], "headers that cannot be read"),
        (vec![Frame::new(HEADERS, END_HEADERS, 3, [0x00, 0x05, b'a'])], "headers that cannot be read"),
        (vec![Frame::new(HEADERS, END_HEADERS, 3, [0x08, 0x81, 0x00])], "headers that cannot be read"),
        (
            vec![frames::headers(1, frames::REPLY), Frame::new(HEADERS, END_HEADERS, 1, [0xbe])],
            "cannot be read",
        ),
    ];
    for (bad, text) in cases {
        let what = format!("{text} {:?}", bad.iter().map(|frame| frame.kind).collect::<Vec<_>>());
        let mut guest = opened(move |peer, event| {
            if !matches!(event, Event::Asked(_)) || peer.dials.len() > 1 {
                return false;
            }
            bad.iter().for_each(|frame| peer.raw(frame.encode()));
            true
        });
        guest.set_repeatable(true);
        guest.set_deadline_ms(1000);
        let outcome = guest.noop();
        assert!(outcome.is_err(), "{what}");
        assert!(fails(&guest, outcome, Reason::BackendFailed, text).may_have_run);
        guest.noop().unwrap();
        assert_eq!(peer(&mut guest).dials.len(), 2, "{what}");
    }
}

#[test]
fn a_reply_may_end_with_its_last_data() {
    let mut guest = opened(|peer, event| {
        let Event::Asked(call) = event else { return false };
        let body = prefixed(&prost::Message::encode_to_vec(&run(call.message())));
        peer.send(frames::headers(call.stream, frames::REPLY));
        peer.send(Frame::new(frames::DATA, END_STREAM, call.stream, body));
        true
    });
    let outcome = guest.noop();
    fails(&guest, outcome, Reason::BackendFailed, "the reply ended without a status");
}
