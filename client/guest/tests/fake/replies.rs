//! Replies: as servers cut, pad, code and end them, and what is none.

use std::time::Duration;

use prost::Message;
use vaccel_guest::{Detection, Guest, Label, Reason};
use vaccel_proto::error::Detail;
use vaccel_proto::v1::{self, RunReply, run_reply::Outcome};

use crate::frames::{self, CONTINUATION, END_HEADERS, END_STREAM, Frame, HEADERS};
use crate::peer::{Event, Peer, prefixed, timings};
use crate::transport::{Fake, Item};
use crate::{fails, flow, opened, peer};

/// A guest whose calls with a session get what is made for their stream.
fn replying(make: impl Fn(&mut Peer, u32) + 'static) -> Guest<Fake> {
    opened(move |peer, event| {
        let Event::Asked(call) = event else { return false };
        make(peer, call.stream);
        true
    })
}

fn body() -> Vec<u8> {
    prefixed(&RunReply { timings: Some(timings()), outcome: None, ..RunReply::default() }.encode_to_vec())
}

#[test]
fn frames_may_be_padded_even_all_through() {
    for padding in [0, 1, 7, 255] {
        for manner in [1, 10, usize::MAX] {
            let mut guest = replying(move |peer, stream| {
                peer.send(frames::padded(frames::headers(stream, frames::REPLY), padding));
                peer.send(frames::padded(frames::data(stream, b""), padding));
                for byte in body() {
                    peer.send(frames::padded(frames::data(stream, &[byte]), padding));
                }
                peer.send(frames::data(stream, b""));
                peer.send(frames::padded(frames::trailers(stream, frames::OK), padding));
            });
            guest.transport().manner.read = manner;
            assert_eq!(guest.noop().unwrap().batch_size, 3);
        }
    }
}

#[test]
fn headers_come_in_both_codes_and_with_a_priority() {
    for huffman in [false, true] {
        let mut guest = replying(move |peer, stream| {
            let block = [&[0, 0, 0, 0, 9][..], &frames::block(frames::REPLY, huffman)].concat();
            peer.send(Frame::new(HEADERS, END_HEADERS | frames::WITH_PRIORITY, stream, block));
            peer.send(frames::data(stream, &body()));
            let headers = [("x-long", "~{}|é".repeat(900).leak() as &str), ("grpc-status", "0")];
            peer.send(Frame::new(
                HEADERS,
                END_HEADERS | END_STREAM,
                stream,
                frames::block(&headers, huffman),
            ));
        });
        assert_eq!(guest.noop().unwrap().run_us, 2);
    }
}

#[test]
fn a_header_block_may_be_cut_anywhere() {
    let length = frames::block(frames::REPLY, true).len();
    for cut in 0..=length {
        for manner in [1, usize::MAX] {
            let mut guest = replying(move |peer, stream| {
                let block = frames::block(frames::REPLY, true);
                peer.send(Frame::new(HEADERS, 0, stream, &block[..cut]));
                peer.send(Frame::new(CONTINUATION, 0, stream, []));
                peer.send(Frame::new(CONTINUATION, END_HEADERS, stream, &block[cut..]));
                peer.send(frames::data(stream, &body()));
                let block = frames::block(frames::OK, false);
                peer.send(frames::padded(Frame::new(HEADERS, END_STREAM, stream, &block[..3]), 5));
                for byte in &block[3..] {
                    peer.send(Frame::new(CONTINUATION, 0, stream, [*byte]));
                }
                peer.send(Frame::new(CONTINUATION, END_HEADERS, stream, []));
            });
            guest.transport().manner.read = manner;
            for _ in 0..2 {
                assert_eq!(guest.noop().unwrap().queue_us, 1, "{cut}");
            }
        }
    }
}

#[test]
fn trailers_of_sixteen_kibibytes_are_taken() {
    let mut guest = replying(move |peer, stream| {
        let text = "é%".repeat(5000);
        let block = frames::block(&[(":status", "200"), ("grpc-status", "9"), ("x", &text)], false);
        let (first, second) = block.split_at(9000);
        peer.send(Frame::new(HEADERS, END_STREAM, stream, first));
        peer.send(Frame::new(CONTINUATION, END_HEADERS, stream, second));
    });
    let outcome = guest.noop();
    fails(&guest, outcome, Reason::Disabled, "gRPC status 9");
    assert_eq!(peer(&mut guest).dials.len(), 1);
}

#[test]
fn an_error_may_come_with_the_first_headers_or_after_them() {
    for late in [false, true] {
        let mut guest = replying(move |peer, stream| {
            if late {
                peer.send(frames::headers(stream, frames::REPLY));
            }
            peer.refuse(stream, &vaccel_proto::Error::field("x", "y", "100 % é"));
        });
        let outcome = guest.noop();
        fails(&guest, outcome, Reason::BadArgument, "100 % é");
        guest.transport().manner.read = 1;
        let outcome = guest.noop();
        fails(&guest, outcome, Reason::BadArgument, "100 % é");
        assert_eq!(peer(&mut guest).dials.len(), 1);
    }
}

#[test]
fn informational_headers_may_come_first() {
    let mut guest = replying(|peer, stream| {
        for status in ["100", "103"] {
            peer.send(frames::headers(stream, &[(":status", status), ("link", "</style.css>")]));
        }
        peer.reply_bytes(stream, &body());
    });
    guest.noop().unwrap();
    let mut guest = replying(|peer, stream| peer.send(frames::trailers(stream, &[(":status", "103")])));
    let outcome = guest.noop();
    fails(&guest, outcome, Reason::BackendFailed, "HTTP status is 103");
}

#[test]
fn replies_of_other_servers_are_explained_and_the_connection_goes_on() {
    for (status, reason) in [
        ("200", Reason::BackendFailed),
        ("301", Reason::BackendFailed),
        ("401", Reason::Unauthenticated),
        ("403", Reason::Denied),
        ("404", Reason::UnknownOperation),
        ("415", Reason::BackendFailed),
        ("502", Reason::Unreachable),
    ] {
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            if call.stream == 3 {
                let headers =
                    [(":status", status), ("content-type", "text/html"), ("location", "/elsewhere")];
                peer.send(frames::headers(3, &headers));
                peer.delay = 5;
                peer.send(frames::data(3, b"<h1>Not here</h1>"));
                peer.send(frames::data(3, &[0; 9000]));
                peer.send(Frame::new(frames::DATA, END_STREAM, 3, []));
                peer.delay = 0;
            }
            call.stream == 3
        });
        let begin = peer(&mut guest).now;
        let outcome = guest.noop();
        assert!(fails(&guest, outcome, reason, &format!("HTTP status is {status}")).retry_after_ms == 0);
        assert_eq!(peer(&mut guest).now, begin, "nobody waits for the page");
        guest.noop().unwrap();
        assert_eq!(peer(&mut guest).dials.len(), 1);
    }
}

/// The body of a reply that is none, and what is said about it.
fn bad_bodies() -> Vec<(Vec<u8>, &'static str)> {
    const NO_MESSAGE: &str = "the reply is no message of the contract";
    let body = body();
    let changed = |at: usize, byte: u8| {
        let mut body = self::body();
        body[at] = byte;
        body
    };
    vec![
        (vec![], NO_MESSAGE),
        (body[..4].to_vec(), NO_MESSAGE),
        (body[..5].to_vec(), NO_MESSAGE),
        (body[..body.len() - 1].to_vec(), NO_MESSAGE),
        ([&body[..], &[0]].concat(), NO_MESSAGE),
        ([&body[..], &body].concat(), NO_MESSAGE),
        ([&prefixed(&[])[..], &body].concat(), NO_MESSAGE),
        (changed(0, 1), NO_MESSAGE),
        (changed(4, body[4] + 1), NO_MESSAGE),
        (changed(4, body[4] - 1), NO_MESSAGE),
        ([&[0][..], &((32 << 20) + 1_u32).to_be_bytes()].concat(), NO_MESSAGE),
        ([&[0][..], &[0xff; 4]].concat(), NO_MESSAGE),
        (prefixed(&[0x0b]), NO_MESSAGE),
        (prefixed(&[0x0a, 0x05, 0x08]), NO_MESSAGE),
    ]
}

#[test]
fn what_is_no_message_is_no_reply() {
    for (number, (body, text)) in bad_bodies().into_iter().enumerate() {
        for manner in [1, usize::MAX] {
            let body = body.clone();
            let mut guest = replying(move |peer, stream| peer.reply_bytes(stream, &body));
            guest.transport().manner.read = manner;
            guest.set_deadline_ms(1000);
            let outcome = guest.noop();
            assert!(outcome.is_err(), "{number}");
            fails(&guest, outcome, Reason::BackendFailed, text);
        }
    }
}

#[test]
fn the_longest_reply_is_one_and_a_longer_one_is_not() {
    for (more, outcome) in [(0, None), (1, Some(Reason::BackendFailed))] {
        let mut guest = replying(move |peer, stream| {
            // The field's tag and length are five bytes.
            let size = vaccel_proto::limits::MESSAGE_BYTES_MAX - 5 + more;
            let head = flow::skipped(size);
            assert_eq!(head.len(), 5 + 5);
            peer.send(frames::headers(stream, frames::REPLY));
            peer.send(frames::data(stream, &head));
            let mut left = size;
            while left > 0 {
                let frame = vec![0; left.min(1 << 20)];
                peer.send(frames::data(stream, &frame));
                left -= frame.len();
            }
            peer.send(frames::trailers(stream, frames::OK));
        });
        assert_eq!(guest.noop().err().map(|error| error.reason), outcome);
    }
}

#[test]
fn a_reply_without_a_status_is_none() {
    for end in [frames::trailers(3, &[("x", "y")]), Frame::new(frames::DATA, END_STREAM, 3, [])] {
        let mut guest = replying(move |peer, stream| {
            peer.send(frames::headers(stream, frames::REPLY));
            peer.send(frames::data(stream, &body()));
            peer.send(end.clone());
        });
        let outcome = guest.noop();
        fails(&guest, outcome, Reason::BackendFailed, "the reply ended without a status");
    }
}

#[test]
fn a_reply_may_come_before_the_request_went_out() {
    for (window, manner) in [(65_535, usize::MAX), (65_535, 20_000), (1 << 20, 20_000), (1 << 20, 1 << 20)] {
        let mut guest = opened(move |peer, event| match event {
            Event::Head(call) if call.is("Run") => {
                peer.holds_windows = true;
                peer.send(frames::settings(&[(frames::INITIAL_WINDOW_SIZE, window)]));
                peer.send(frames::window_update(0, window));
                peer.refuse(call.stream, &vaccel_proto::Error::new(vaccel_proto::Reason::Denied, "not you"));
                peer.send(frames::reset(call.stream, 0));
                // The sender is stuck until the reply is there.
                peer.writable_from = peer.now + 1;
                true
            }
            _ => false,
        });
        guest.transport().manner.write = manner;
        let outcome = flow::echo(&mut guest, 300_000);
        fails(&guest, outcome, Reason::Denied, "not you");
        peer(&mut guest).now += 1;
        peer(&mut guest).holds_windows = false;
        guest.renew().unwrap();
        assert!(peer(&mut guest).dials.len() <= 2);
    }
}

#[test]
fn an_early_reply_leaves_room_for_the_next_call() {
    // Many parts that are short: all of the request is ready to be sent, and nothing can be.
    let mut first = true;
    let mut guest = opened(move |peer, event| match event {
        Event::Head(call) if call.is("Run") && std::mem::replace(&mut first, false) => {
            peer.refuse(call.stream, &vaccel_proto::Error::new(vaccel_proto::Reason::Denied, "not you"));
            peer.writable_from = peer.now + 1;
            true
        }
        _ => false,
    });
    let images = [&[7; 1024][..], &[7; 1024], &[7; 1024], &[7; 650]];
    guest.transport().manner.write = 50;
    let outcome = guest.classify(None, &images, &mut [Label::default(); 4]);
    fails(&guest, outcome, Reason::Denied, "not you");
    guest.set_token(&"t".repeat(256));
    guest.set_deadline_ms(10);
    guest.noop().unwrap();
}

#[test]
fn an_agent_that_is_overloaded_is_asked_again_when_it_says() {
    for reason in [vaccel_proto::Reason::Overloaded, vaccel_proto::Reason::ShuttingDown] {
        let mut times = 0;
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            times += 1;
            if times < 3 {
                let detail = Detail::RetryAfter(Duration::from_millis(1250));
                peer.refuse(call.stream, &vaccel_proto::Error::new(reason, "busy").with(detail));
            }
            times < 3
        });
        let begin = peer(&mut guest).now;
        guest.noop().unwrap();
        assert_eq!(peer(&mut guest).now - begin, 2500);
        // Not when the deadline would pass before.
        let mut guest = replying(move |peer, stream| {
            let detail = Detail::RetryAfter(Duration::from_millis(1250));
            peer.refuse(stream, &vaccel_proto::Error::new(reason, "busy").with(detail));
        });
        guest.set_deadline_ms(1250);
        let outcome = guest.noop();
        let error = outcome.unwrap_err();
        assert_eq!((error.reason.name(), error.retry_after_ms), (reason.name(), 1250));
        assert_eq!((peer(&mut guest).now, guest.message()), (begin, "busy"));
    }
}

#[test]
fn a_message_before_an_error_is_not_taken_for_half_a_reply() {
    let mut times = 0;
    let mut guest = opened(move |peer, event| {
        let Event::Asked(call) = event else { return false };
        times += 1;
        if times == 1 {
            let reply = prefixed(&crate::peer::run(call.message()).encode_to_vec());
            peer.send(frames::headers(call.stream, frames::REPLY));
            peer.send(frames::data(call.stream, &reply));
            peer.refuse(call.stream, &vaccel_proto::Error::new(vaccel_proto::Reason::Overloaded, "busy"));
        }
        times == 1
    });
    let mut labels = [Label::default(); 2];
    let outcome = guest.classify(None, &[b"a", b"b"], &mut labels);
    fails(&guest, outcome, Reason::Overloaded, "busy");
}

#[test]
fn more_things_than_there_are_places_for_are_no_reply() {
    let detection = v1::Detection { label: Some(v1::Label::default()), area: None };
    let reply = v1::ImageDetectionReply { detections: vec![detection; 3], ..Default::default() };
    let outcome = Some(Outcome::ImageDetection(reply));
    let body =
        prefixed(&RunReply { timings: Some(timings()), outcome, ..RunReply::default() }.encode_to_vec());
    let mut guest = opened(move |peer, event| match event {
        Event::Asked(call) if call.is("Run") => {
            peer.send(frames::headers(call.stream, frames::REPLY));
            peer.send(frames::data(call.stream, &body));
            peer.send(frames::trailers(call.stream, frames::OK));
            true
        }
        _ => false,
    });
    let model = flow::model(&mut guest);
    let mut things = [Detection { left: 7.0, ..Detection::default() }; 3];
    assert_eq!(guest.detect(Some(&model), b"image", 0.0, &mut things).unwrap().0, 3);
    assert!(things.iter().all(|thing| (thing.left, thing.label.index) == (0.0, 0)), "what is not said is 0");
    let outcome = guest.detect(Some(&model), b"image", 0.0, &mut things[..2]);
    fails(&guest, outcome, Reason::BackendFailed, "no message of the contract");
}

#[test]
fn a_text_of_any_length_is_kept_as_far_as_there_is_room() {
    let mut guest = replying(|peer, stream| {
        let text = "é".repeat(5000);
        peer.refuse(stream, &vaccel_proto::Error::new(vaccel_proto::Reason::ModelRejected, text));
    });
    let outcome = guest.noop();
    fails(&guest, outcome, Reason::ModelRejected, &"é".repeat(250));
    assert!(guest.message().len() <= 512);
}

#[test]
fn more_than_the_windows_allow_ends_the_call() {
    let mut guest = replying(|peer, stream| {
        // The server in memory would not send it by itself.
        peer.send(frames::headers(stream, frames::REPLY));
        let frame = std::rc::Rc::new(Frame::new(frames::DATA, 0, 1, vec![0; 1 << 20]).encode());
        (0..2050).for_each(|_| peer.items.push_back((0, Item::Bytes(frame.clone(), 0))));
    });
    let outcome = guest.noop();
    fails(&guest, outcome, Reason::BackendFailed, "more DATA than this side allows");
}
