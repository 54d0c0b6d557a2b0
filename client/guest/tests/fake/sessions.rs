//! Sessions that come and go, resources that go up in pieces, tokens.

use prost::Message;
use vaccel_guest::{DType, File, Input, Output, Reason, ResourceKind};
use vaccel_proto::v1::{self, UploadRequest};

use crate::frames;
use crate::peer::{Event, MODEL, SESSION};
use crate::{fails, flow, guest, opened, peer};

fn lost(peer: &mut crate::peer::Peer, stream: u32) {
    peer.refuse(stream, &vaccel_proto::Error::not_found("session", "x"));
}

#[test]
fn a_session_that_was_lost_and_held_nothing_is_opened_again() {
    let mut gone = false;
    let mut guest = opened(move |peer, event| match event {
        Event::Asked(call) if call.is("Run") && !std::mem::replace(&mut gone, true) => {
            lost(peer, call.stream);
            true
        }
        _ => false,
    });
    guest.noop().unwrap();
    let asked: Vec<_> = peer(&mut guest).asked.iter().map(|path| path.rsplit('/').next().unwrap()).collect();
    assert_eq!(asked, ["Open", "Run", "Open", "Run"]);
}

#[test]
fn a_session_that_is_lost_again_and_again_is_told() {
    let mut guest = opened(|peer, event| match event {
        Event::Asked(call) if call.is("Run") => {
            lost(peer, call.stream);
            true
        }
        _ => false,
    });
    let outcome = guest.noop();
    assert!(fails(&guest, outcome, Reason::NotFound, "session").session_lost);
    assert_eq!(peer(&mut guest).asked.len(), 4);
}

#[test]
fn a_session_that_was_lost_with_what_it_held_is_told_once() {
    let mut gone = false;
    let mut guest = opened(move |peer, event| match event {
        Event::Asked(call) if call.is("Run") && !std::mem::replace(&mut gone, true) => {
            lost(peer, call.stream);
            true
        }
        _ => false,
    });
    let model = flow::model(&mut guest);
    let outcome = guest.noop();
    assert!(fails(&guest, outcome, Reason::NotFound, "session").session_lost);
    let asked = peer(&mut guest).asked.len();
    guest.noop().unwrap();
    assert_eq!(peer(&mut guest).asked.len(), asked + 2, "Open and Run");
    // A resource that is lost is another matter.
    let mut guest = opened(|peer, event| match event {
        Event::Asked(call) if call.is("Run") => {
            peer.refuse(call.stream, &vaccel_proto::Error::not_found("resource", "x"));
            true
        }
        _ => false,
    });
    let outcome = guest.run(&model, &[], &[], &mut []);
    assert!(!fails(&guest, outcome, Reason::NotFound, "resource").session_lost);
}

#[test]
fn a_session_that_is_gone_already_is_closed() {
    let mut guest = opened(|peer, event| match event {
        Event::Asked(call) => {
            lost(peer, call.stream);
            true
        }
        _ => false,
    });
    guest.close().unwrap();
    guest.close().unwrap();
    assert_eq!(peer(&mut guest).asked.len(), 2);
    assert!(!peer(&mut guest).connected);
}

#[test]
fn a_session_whose_id_is_none_is_not_used() {
    for session in ["", "0123", &"0".repeat(33), &"0".repeat(64)] {
        let session = session.to_owned();
        let mut guest = guest(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            peer.reply(call.stream, &v1::OpenSessionReply { session: session.clone(), lease_ms: 1 });
            true
        });
        assert_eq!(guest.noop().unwrap_err().reason, Reason::BackendFailed);
    }
}

#[test]
fn opening_a_session_is_repeated_when_the_connection_breaks() {
    let mut broken = false;
    let mut guest = guest(move |peer, event| {
        let cut = matches!(event, Event::Asked(_)) && !std::mem::replace(&mut broken, true);
        if cut {
            peer.end(104);
        }
        cut
    });
    guest.noop().unwrap();
    assert_eq!(peer(&mut guest).dials.len(), 2);
}

#[test]
fn the_deadline_and_the_token_go_with_every_call() {
    let mut guest = guest(|peer, event| {
        if let Event::Head(call) = event {
            assert_eq!(call.header(":method"), "POST");
            assert_eq!(call.header(":scheme"), "http");
            assert_eq!(call.header(":authority"), "fake.agent");
            assert_eq!(call.header("content-type"), "application/grpc");
            assert_eq!(call.header("te"), "trailers");
            assert!(call.header("user-agent").starts_with("vaccel-guest/"));
            let token = if peer.dials.len() == 1 { "Bearer t0k" } else { "" };
            assert_eq!(call.header("authorization"), token);
            let left = call.header("grpc-timeout").strip_suffix('m').unwrap();
            assert!(left.len() <= 8 && left.parse::<u64>().unwrap() > 0, "{left}");
        }
        false
    });
    guest.set_token("t0k");
    guest.set_deadline_ms(u32::MAX);
    guest.noop().unwrap();
    guest.close().unwrap();
    guest.set_token("");
    guest.set_deadline_ms(1);
    guest.noop().unwrap();
}

/// An agent that stores one file, and breaks the connection after so many bytes of it, again and again.
fn storing(content: Vec<u8>, breaks_after: usize) -> impl FnMut(&mut crate::peer::Peer, Event<'_>) -> bool {
    let mut stored = Vec::new();
    let mut taken = 0;
    move |peer, event| match event {
        Event::Data(call) if call.is("Upload") && call.body.len() >= breaks_after => {
            // Messages that came whole are kept.
            let mut rest = &call.body[..];
            while let Some([_, length @ ..]) = rest.first_chunk::<5>().copied() {
                let Some(message) = rest.get(5..5 + u32::from_be_bytes(length) as usize) else { break };
                stored.extend_from_slice(&UploadRequest::decode(message).unwrap().data);
                rest = &rest[5 + message.len()..];
            }
            peer.end(104);
            peer.write_fails = Some(32);
            true
        }
        Event::Asked(call) if call.is("Register") => {
            let request: v1::RegisterResourceRequest = call.message();
            assert_eq!((request.session.as_str(), request.kind), (SESSION, 1));
            taken += 1;
            assert!(taken < 12);
            let missing =
                v1::MissingFile { sha256: request.files[0].sha256.clone(), offset: stored.len() as u64 };
            let whole = stored.len() == content.len();
            let resource = MODEL.into();
            peer.reply(
                call.stream,
                &v1::RegisterResourceReply { resource, missing: if whole { vec![] } else { vec![missing] } },
            );
            true
        }
        Event::Asked(call) if call.is("Upload") => {
            for (number, message) in call.messages().into_iter().enumerate() {
                let message = UploadRequest::decode(message).unwrap();
                if number == 0 {
                    assert_eq!((message.offset, message.size), (stored.len() as u64, content.len() as u64));
                }
                stored.extend_from_slice(&message.data);
            }
            assert!(content.starts_with(&stored));
            peer.reply(call.stream, &v1::UploadReply { offset: stored.len() as u64 });
            true
        }
        _ => false,
    }
}

#[test]
fn a_file_goes_up_in_pieces_and_goes_on_where_it_broke_off() {
    for (size, breaks_after) in
        [(1, usize::MAX), (1 << 20, usize::MAX), ((40 << 20) + 3, usize::MAX), (7 << 20, 3 << 20)]
    {
        let content = crate::random::Random::new(size as u64).bytes(size);
        let mut guest = opened(storing(content.clone(), breaks_after));
        // Each piece is a write, so that a break is seen in the middle.
        guest.transport().manner.write = 1 << 14;
        let model = guest.register(ResourceKind::Model, &[File { name: "m", content: &content }]);
        assert_eq!(model.unwrap_or_else(|_| panic!("{size}: {}", guest.message())).as_str(), MODEL);
    }
}

#[test]
fn outputs_that_find_no_place_are_told() {
    let mut guest = opened(|_, _| false);
    let model = flow::model(&mut guest);
    let data = [1; 100];
    let input = Input { name: "", dtype: DType::U8, shape: &[100], data: &data };
    let (mut one, mut two) = ([0; 100], [0; 99]);
    let mut places = [Output::new(&mut one), Output::new(&mut two)];
    let outcome = guest.run(&model, &[input, input], &[], &mut places);
    assert_eq!(places.each_ref().map(|place| place.length), [100, 100]);
    fails(&guest, outcome, Reason::BadArgument, "outputs[1]: expected a place for 100 bytes");
    let outcome = guest.run(&model, &[input, input], &[], &mut [Output::new(&mut one)]);
    fails(&guest, outcome, Reason::BadArgument, "outputs[1]: expected a place for ");
    guest.noop().unwrap();
}

#[test]
fn a_request_that_is_too_long_is_not_sent() {
    let mut guest = opened(|_, _| false);
    let image = vec![0; 32 << 20];
    let outcome = guest.classify(None, &[&image], &mut [vaccel_guest::Label::default()]);
    fails(&guest, outcome, Reason::MessageTooLarge, "longer than a message may be");
    assert_eq!(peer(&mut guest).asked.len(), 1);
    let image = vec![0; (32 << 20) - 60];
    guest.classify(None, &[&image], &mut [vaccel_guest::Label::default()]).unwrap();
    assert!(peer(&mut guest).came(frames::RST_STREAM, 0).is_empty());
}
