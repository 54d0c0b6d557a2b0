//! The way to the agent: networks that lie, agents that come late, time that runs out.

use vaccel_guest::{Fault, Reason};
use vaccel_proto::Error as Wrong;

use crate::frames::{self, Frame};
use crate::peer::Event;
use crate::transport::{ECONNREFUSED, ECONNRESET, ENOTCONN, EPIPE};
use crate::{fails, flow, guest, opened, peer};

#[test]
fn what_moves_byte_by_byte_arrives_alike() {
    for blocks in [false, true] {
        let mut guest = guest(|_, _| false);
        (guest.transport().manner.read, guest.transport().manner.write) = (1, 1);
        guest.transport().manner.blocks = blocks;
        let timings = guest.noop().unwrap();
        assert_eq!((timings.queue_us, timings.run_us, timings.batch_size), (1, 2, 3));
        guest.close().unwrap();
        let peer = peer(&mut guest);
        let calls = ["/vaccel.v1.Sessions/Open", "/vaccel.v1.Operations/Run", "/vaccel.v1.Sessions/Close"];
        assert_eq!((&peer.asked[..], peer.dials.len()), (&calls.map(str::to_owned)[..], 1));
    }
}

#[test]
fn a_connection_that_breaks_before_settings_is_tried_again_until_the_deadline() {
    for errno in [0, ENOTCONN, ECONNRESET] {
        let mut guest = guest(move |peer, event| {
            if matches!(event, Event::Dial) {
                peer.end(errno);
            }
            true
        });
        guest.set_deadline_ms(1500);
        let outcome = guest.noop();
        let error = fails(&guest, outcome, Reason::Unreachable, "no agent, or is none yet");
        assert!(!error.may_have_run);
        let peer = peer(&mut guest);
        let begin = peer.dials[0];
        let pauses: Vec<u64> = peer.dials.iter().map(|dial| dial - begin).collect();
        assert_eq!(pauses, [0, 10, 30, 70, 150, 310, 630, 1270], "each pause is twice the last");
        assert!(peer.now < begin + 1500, "a pause beyond the deadline is not waited for");
    }
}

#[test]
fn pauses_grow_to_a_second_and_the_agent_is_found_when_it_comes() {
    let mut guest = guest(|peer, event| {
        if matches!(event, Event::Dial) && peer.now < 1_005_000 {
            peer.dial = Some(Fault::Broken(ECONNREFUSED));
            return true;
        }
        false
    });
    guest.noop().unwrap();
    let dials = &peer(&mut guest).dials;
    assert_eq!(dials[dials.len() - 1] - dials[dials.len() - 2], 1000);
}

#[test]
fn an_agent_that_refuses_or_is_silent_is_told_apart() {
    for (fault, reason, text) in [
        (Fault::Broken(ECONNREFUSED), Reason::Unreachable, "cannot reach the agent: error 111"),
        (Fault::Late, Reason::Deadline, "cannot reach the agent: no answer in time"),
    ] {
        let mut guest = guest(move |peer, _| {
            peer.dial = Some(fault);
            true
        });
        guest.set_deadline_ms(700);
        let outcome = guest.noop();
        assert!(!fails(&guest, outcome, reason, text).may_have_run);
        assert!(peer(&mut guest).now <= 1_000_700);
    }
}

#[test]
fn silence_ends_at_the_deadline_to_the_millisecond() {
    // Before SETTINGS, before the reply, and in the middle of it.
    for silence in 0..3 {
        let mut guest = guest(move |peer, event| match event {
            _ if silence == 0 => {
                peer.holds_windows = true;
                true
            }
            Event::Asked(call) if call.is("Run") => {
                if silence == 2 {
                    peer.send(frames::headers(call.stream, frames::REPLY));
                    peer.send(frames::data(call.stream, &[0, 0, 0, 0, 9, 10]));
                }
                true
            }
            _ => false,
        });
        guest.set_deadline_ms(12_345);
        let outcome = guest.noop();
        let error = fails(&guest, outcome, Reason::Deadline, "the deadline passed");
        assert_eq!(error.may_have_run, silence > 0);
        assert_eq!(peer(&mut guest).now, 1_012_345, "{silence}");
        assert_eq!(peer(&mut guest).dials.len(), 1);
    }
}

#[test]
fn one_deadline_holds_for_the_session_and_the_call() {
    let mut guest = guest(|peer, event| {
        peer.delay = 600;
        matches!(event, Event::Dial) && {
            peer.delay = 0;
            peer.send(frames::settings(&[]));
            true
        }
    });
    guest.set_deadline_ms(1000);
    let outcome = guest.noop();
    fails(&guest, outcome, Reason::Deadline, "the deadline passed");
    assert_eq!(peer(&mut guest).now, 1_001_000);
}

#[test]
fn one_deadline_holds_when_a_lost_session_is_opened_again() {
    let mut guest = opened(|peer, event| {
        peer.delay = 600;
        let Event::Asked(call) = event else { return false };
        if call.is("Run") {
            peer.refuse(call.stream, &vaccel_proto::Error::not_found("session", "x"));
        }
        call.is("Run")
    });
    let begin = peer(&mut guest).now;
    guest.set_deadline_ms(1000);
    let outcome = guest.noop();
    fails(&guest, outcome, Reason::Deadline, "the deadline passed");
    assert_eq!(peer(&mut guest).now - begin, 1000);
}

#[test]
fn a_deadline_passes_while_nothing_can_be_written() {
    let mut guest = opened(|_, _| false);
    let begin = peer(&mut guest).now;
    peer(&mut guest).writable_from = begin + 500;
    guest.set_deadline_ms(499);
    let outcome = guest.noop();
    fails(&guest, outcome, Reason::Deadline, "the deadline passed");
    assert_eq!(peer(&mut guest).now - begin, 499);
    peer(&mut guest).now += 1;
    guest.noop().unwrap();
}

#[test]
fn a_deadline_passes_while_writing_takes_long() {
    let mut guest = opened(|_, _| false);
    let begin = peer(&mut guest).now;
    guest.transport().manner.write = 1000;
    guest.transport().manner.write_takes = 10;
    guest.set_deadline_ms(200);
    let image = [7; 60_000];
    let outcome = guest.classify(None, &[&image], &mut [vaccel_guest::Label::default()]);
    fails(&guest, outcome, Reason::Deadline, "the deadline passed");
    assert!(peer(&mut guest).now - begin <= 220, "one write and one goodbye more");
    guest.transport().manner.write_takes = 0;
    guest.noop().unwrap();
}

#[test]
fn a_deadline_passes_while_other_things_are_said() {
    for frame in [frames::ping(1), frames::data(1, b"late"), Frame::new(0x42, 0, 3, [0; 100])] {
        let mut guest = opened(move |peer, event| {
            let Event::Asked(call) = event else { return false };
            if call.stream == 3 {
                for _ in 0..1000 {
                    peer.delay += 1;
                    peer.send(frame.clone());
                }
                peer.delay = 0;
            }
            call.stream == 3
        });
        let begin = peer(&mut guest).now;
        guest.set_deadline_ms(500);
        let outcome = guest.noop();
        fails(&guest, outcome, Reason::Deadline, "the deadline passed");
        assert_eq!(peer(&mut guest).now - begin, 500);
        guest.set_deadline_ms(5000);
        guest.noop().unwrap();
        assert_eq!(peer(&mut guest).dials.len(), 1);
    }
}

#[test]
fn settings_may_come_late() {
    let mut guest = guest(|peer, event| {
        peer.delay = if matches!(event, Event::Dial) { 5000 } else { 0 };
        false
    });
    guest.noop().unwrap();
    let peer = peer(&mut guest);
    assert_eq!((peer.now, peer.dials.len()), (1_005_000, 1), "the request did not wait for them");
}

#[test]
fn what_does_not_begin_with_settings_is_no_agent() {
    for first in
        [&frames::ping(1).encode()[..], b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"]
    {
        let first = first.to_vec();
        let mut guest = guest(move |peer, event| {
            if matches!(event, Event::Dial) {
                peer.raw(first.clone());
            }
            true
        });
        guest.set_deadline_ms(100);
        let outcome = guest.noop();
        let error = fails(&guest, outcome, Reason::Unreachable, "the first frame is not SETTINGS");
        assert!(!error.may_have_run);
        assert!(peer(&mut guest).dials.len() > 3);
    }
}

#[test]
fn an_idle_connection_that_the_agent_closed_is_dialed_again() {
    for (errno, goodbye) in [(0, true), (0, false), (ECONNRESET, false)] {
        let mut guest = opened(|_, _| false);
        let peer = peer(&mut guest);
        if goodbye {
            peer.send(frames::goaway(1));
        }
        peer.end(errno);
        guest.noop().unwrap();
        assert_eq!(self::peer(&mut guest).dials.len(), 2);
        guest.noop().unwrap();
        assert_eq!(self::peer(&mut guest).dials.len(), 2);
    }
}

#[test]
fn a_connection_that_says_goodbye_while_it_is_idle_is_left() {
    let mut guest = opened(|_, _| false);
    peer(&mut guest).send(frames::goaway(1));
    guest.noop().unwrap();
    assert_eq!(peer(&mut guest).dials.len(), 2);
}

#[test]
fn a_call_that_may_have_run_is_repeated_only_where_that_is_allowed() {
    for repeatable in [false, true] {
        let mut broken = false;
        let mut guest = opened(move |peer, event| {
            let Event::Asked(_) = event else { return false };
            if !std::mem::replace(&mut broken, true) {
                peer.end(ECONNRESET);
                return true;
            }
            false
        });
        guest.set_repeatable(repeatable);
        let outcome = guest.noop();
        if repeatable {
            outcome.unwrap();
        } else {
            let error =
                fails(&guest, outcome, Reason::Unreachable, "the connection to the agent broke: error 104");
            assert!(error.may_have_run);
        }
        guest.noop().unwrap();
    }
}

#[test]
fn a_call_that_may_have_run_says_so_whatever_became_of_its_repetitions() {
    let mut broken = false;
    let mut guest = opened(move |peer, event| match event {
        Event::Asked(_) => {
            broken = true;
            peer.end(ECONNRESET);
            true
        }
        Event::Dial if broken => {
            peer.dial = Some(Fault::Broken(ECONNREFUSED));
            true
        }
        _ => false,
    });
    guest.set_repeatable(true);
    guest.set_deadline_ms(100);
    let outcome = guest.noop();
    assert!(fails(&guest, outcome, Reason::Unreachable, "cannot reach the agent").may_have_run);
}

#[test]
fn why_a_connection_was_closed_is_seen_although_writing_failed() {
    let mut gone = false;
    let mut guest = opened(move |peer, event| {
        let Event::Head(_) = event else { return false };
        if std::mem::replace(&mut gone, true) {
            return false;
        }
        // The call was never looked at; the guest learns it when it goes on writing.
        peer.send(frames::goaway(1));
        peer.end(0);
        peer.write_fails = Some(EPIPE);
        true
    });
    guest.transport().manner.write = 16;
    guest.noop().unwrap();
    assert_eq!(peer(&mut guest).dials.len(), 2);
}

#[test]
fn an_answer_that_was_read_counts_although_writing_fails_then() {
    let mut guest = opened(|peer, event| match event {
        Event::Head(call) if call.is("Run") => {
            // It comes while the guest waits to write on, which it cannot then.
            (peer.delay, peer.writable_from, peer.write_fails) = (1, peer.now + 1, Some(EPIPE));
            peer.refuse(call.stream, &Wrong::new(vaccel_proto::Reason::QuotaExceeded, "not so much"));
            true
        }
        _ => false,
    });
    let outcome = flow::echo(&mut guest, 300_000);
    fails(&guest, outcome, Reason::QuotaExceeded, "not so much");
}

#[test]
fn the_opening_allows_no_push_and_no_table_and_gives_the_largest_windows() {
    let mut guest = guest(|_, _| false);
    guest.noop().unwrap();
    let frames = &peer(&mut guest).frames;
    let settings: Vec<_> = frames[0].settings().collect();
    assert_eq!(settings, [(1, 0), (2, 0), (4, 0x7fff_ffff), (5, 1 << 20), (6, 16_384)]);
    assert_eq!(frames[1], frames::window_update(0, 0x7fff_ffff - 65_535));
    let answers: Vec<&Frame> =
        frames.iter().filter(|frame| frame.is(frames::SETTINGS, frames::ACK)).collect();
    assert_eq!(answers.len(), 1);
}
