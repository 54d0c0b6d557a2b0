//! Windows and frame sizes. The server in memory counts them and ends the test where the guest sends more.

use vaccel_guest::{DType, Guest, Input, Output, Reason, ResourceId, ResourceKind};

use crate::frames::{self, Frame, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE};
use crate::peer::{Event, Peer};
use crate::random::Random;
use crate::transport::Fake;
use crate::{fails, opened, peer};

/// The id of a model that is registered.
pub fn model(guest: &mut Guest<Fake>) -> ResourceId {
    guest.register(ResourceKind::Model, &[vaccel_guest::File { name: "m", content: b"m" }]).unwrap()
}

/// Runs a model that gives back what it gets.
pub fn echo(guest: &mut Guest<Fake>, size: usize) -> vaccel_guest::Result<()> {
    let model = model(guest);
    let data = Random::new(size as u64).bytes(size);
    let input = Input { name: "x", dtype: DType::U8, shape: &[size as i64], data: &data };
    let mut place = vec![0; size];
    let mut outputs = [Output::new(&mut place)];
    guest.run(&model, &[input], &[], &mut outputs)?;
    let [Output { length, dtype, rank, .. }] = outputs;
    assert_eq!((length, dtype, rank), (size, DType::U8, 1));
    assert!(place == data, "{size} bytes");
    Ok(())
}

/// The lengths of the DATA frames of the last call.
fn frames_of(peer: &Peer) -> Vec<usize> {
    let last = peer.came(frames::DATA, 0).last().unwrap().stream;
    let own = peer.sizes.iter().filter(|(stream, _)| *stream == last);
    own.map(|(_, size)| *size).collect()
}

#[test]
fn messages_around_the_first_window_use_it_to_the_last_byte() {
    // What is around the tensor, measured.
    let mut guest = opened(|_, _| false);
    echo(&mut guest, 60_000).unwrap();
    let around = frames_of(peer(&mut guest)).iter().sum::<usize>() - 60_000;
    for length in 65_530..=65_540 {
        let mut guest = opened(move |peer, event| {
            // The windows of the opening are all there is until they are used up.
            peer.holds_windows = !matches!(event, Event::Asked(call) if call.is("Register"));
            if let Event::Data(call) = event
                && call.body.len() == 65_535
            {
                peer.send(frames::window_update(0, 100));
                peer.delay = 7;
                peer.send(frames::window_update(call.stream, 100));
                peer.delay = 0;
            }
            false
        });
        // What the calls before took of the connection's window.
        let model = model(&mut guest);
        let taken: usize = peer(&mut guest).sizes.iter().map(|(_, size)| size).sum();
        peer(&mut guest).send(frames::window_update(0, taken as u32));
        let data = vec![7; length - around];
        let input = Input { name: "x", dtype: DType::U8, shape: &[data.len() as i64], data: &data };
        let mut place = vec![0; data.len()];
        let begin = peer(&mut guest).now;
        guest.run(&model, &[input], &[], &mut [Output::new(&mut place)]).unwrap();
        assert!(place == data);
        let peer = peer(&mut guest);
        let sizes = frames_of(peer);
        assert_eq!(sizes.iter().sum::<usize>(), length);
        assert_eq!(peer.now - begin, if length > 65_535 { 7 } else { 0 }, "{length}: {sizes:?}");
    }
}

#[test]
fn frames_that_the_windows_allow_go_together_and_no_short_write_comes_last() {
    const FRAME: usize = 65_536;
    for (size, most) in [(1, 1), (602_112, 1), (15 * FRAME, 1), (16 * FRAME + 1, 2), (100 * FRAME + 1, 14)] {
        let mut guest = opened(|_, _| false);
        let settings = [(INITIAL_WINDOW_SIZE, 1 << 30), (MAX_FRAME_SIZE, FRAME as u32)];
        peer(&mut guest).send(frames::settings(&settings));
        peer(&mut guest).send(frames::window_update(0, 1 << 30));
        let model = model(&mut guest);
        guest.transport().writes.clear();
        let data = vec![7; size];
        let input = Input { name: "x", dtype: DType::U8, shape: &[size as i64], data: &data };
        let mut place = vec![0; size];
        guest.run(&model, &[input], &[], &mut [Output::new(&mut place)]).unwrap();
        assert!(place == data, "{size} bytes");
        // Long replies are acknowledged with a window.
        let mut writes = guest.transport().writes.clone();
        writes.retain(|length| *length > 30);
        assert!(writes.len() <= most, "{size} bytes: {writes:?}");
        assert!(writes.len() == 1 || writes.iter().all(|length| *length > 6 * FRAME), "{size}: {writes:?}");
    }
}

#[test]
fn large_messages_go_through_windows_of_every_size() {
    for (window, manner) in [(1, usize::MAX), (13, 1), (1000, 7), (16_384, 1000), (1 << 20, usize::MAX)] {
        let mut first = true;
        let mut guest = opened(move |peer, event| {
            if matches!(event, Event::Head(_)) && std::mem::replace(&mut first, false) {
                peer.send(frames::settings(&[(INITIAL_WINDOW_SIZE, window)]));
            }
            false
        });
        (guest.transport().manner.write, guest.transport().manner.read) = (manner, manner);
        echo(&mut guest, if window < 100 { 3000 } else { 300_000 }).unwrap();
    }
}

#[test]
fn a_window_that_is_closed_by_settings_is_waited_for() {
    let mut guest = opened(|peer, event| match event {
        Event::Head(call) if call.is("Run") => {
            peer.holds_windows = true;
            false
        }
        // The stream's window goes below zero: it has to be given more than was taken.
        Event::Data(call) if call.body.len() == 16_384 => {
            peer.send(frames::settings(&[(INITIAL_WINDOW_SIZE, 0)]));
            peer.send(frames::window_update(0, 100_000));
            for _ in 0..3 {
                peer.delay += 20;
                peer.send(frames::window_update(call.stream, 16_384));
            }
            peer.delay += 20;
            peer.send(frames::settings(&[(INITIAL_WINDOW_SIZE, 100_000)]));
            true
        }
        _ => false,
    });
    // One frame at a time, so that the settings come in the middle.
    guest.transport().manner.write = 9;
    let begin = peer(&mut guest).now;
    echo(&mut guest, 90_000).unwrap();
    assert_eq!(peer(&mut guest).now - begin, 80 + 80, "the reply has the same delay");
}

#[test]
fn a_window_that_stays_closed_ends_at_the_deadline_and_the_connection_goes_on() {
    let mut guest = opened(|peer, event| {
        if matches!(event, Event::Head(call) if call.is("Run")) {
            peer.holds_windows = true;
        }
        false
    });
    guest.set_deadline_ms(5000);
    let begin = peer(&mut guest).now;
    let outcome = echo(&mut guest, 70_000);
    fails(&guest, outcome, Reason::Deadline, "the deadline passed");
    let after = peer(&mut guest);
    assert_eq!(after.now - begin, 5000);
    assert_eq!(after.came(frames::RST_STREAM, 0).len(), 1);
    after.holds_windows = false;
    after.send(frames::window_update(0, 65_535));
    guest.renew().unwrap();
    assert_eq!(peer(&mut guest).dials.len(), 1);
}

#[test]
fn the_window_of_the_connection_holds_for_all_calls_together() {
    let mut guest = opened(|peer, event| {
        peer.holds_windows = true;
        if let Event::Dial = event {
            return false;
        }
        if matches!(event, Event::Head(call) if call.stream == 3) {
            peer.send(frames::settings(&[(INITIAL_WINDOW_SIZE, 1 << 20)]));
        }
        // Used up by several calls, and given back once the guest has to wait.
        if matches!(event, Event::Data(_)) && peer.window == 0 {
            peer.delay = 30;
            peer.send(frames::window_update(0, 500_000));
            peer.delay = 0;
        }
        false
    });
    let begin = peer(&mut guest).now;
    for size in [30_000, 30_000, 30_000] {
        echo(&mut guest, size).unwrap();
    }
    assert_eq!(peer(&mut guest).now - begin, 30, "the third call waits");
}

#[test]
fn frames_are_as_long_as_the_peer_allows() {
    let mut guest = opened(|peer, event| {
        match event {
            Event::Head(call) if call.is("Register") => {
                peer.send(frames::settings(&[(MAX_FRAME_SIZE, 40_000), (INITIAL_WINDOW_SIZE, 1 << 20)]));
                peer.send(frames::window_update(0, 1 << 20));
            }
            Event::Data(call) if call.is("Run") && call.body.len() == 80_000 => {
                peer.send(frames::settings(&[(MAX_FRAME_SIZE, 16_384)]));
            }
            _ => {}
        }
        false
    });
    guest.transport().manner.write = 1;
    echo(&mut guest, 120_000).unwrap();
    let sizes = frames_of(peer(&mut guest));
    assert_eq!(sizes[..2], [40_000, 40_000]);
    assert!(sizes[2..].iter().all(|size| *size <= 40_000) && *sizes.last().unwrap() <= 16_384, "{sizes:?}");
}

#[test]
fn windows_and_frame_sizes_that_cannot_be_are_refused() {
    let overflow = |stream| vec![frames::window_update(stream, 0x7fff_ffff)];
    for (bad, text) in [
        (overflow(0), "a window that cannot be"),
        (overflow(3), "a window that cannot be"),
        (vec![frames::window_update(0, 0)], "a window that cannot be"),
        (vec![frames::window_update(3, 0)], "a window that cannot be"),
        (vec![frames::settings(&[(INITIAL_WINDOW_SIZE, 1 << 31)])], "a window that cannot be"),
        (
            vec![
                frames::window_update(3, 0x7fff_0000),
                frames::settings(&[(INITIAL_WINDOW_SIZE, 0x7fff_ffff)]),
            ],
            "a window that cannot be",
        ),
        (vec![frames::settings(&[(MAX_FRAME_SIZE, 16_383)])], "a frame size that cannot be"),
        (vec![frames::settings(&[(MAX_FRAME_SIZE, 1 << 24)])], "a frame size that cannot be"),
        (vec![Frame::new(frames::SETTINGS, 0, 0, [0; 5])], "a frame of the wrong length"),
        (vec![Frame::new(frames::WINDOW_UPDATE, 0, 0, [1; 3])], "a frame of the wrong length"),
    ] {
        let what = format!("{bad:?}");
        let mut guest = opened(move |peer, event| {
            let Event::Head(call) = event else { return false };
            if call.stream == 3 {
                bad.iter().for_each(|frame| peer.raw(frame.encode()));
            }
            true
        });
        peer(&mut guest).holds_windows = true;
        let outcome = guest.noop();
        assert!(outcome.is_err(), "{what}");
        fails(&guest, outcome, Reason::BackendFailed, text);
        assert_eq!(peer(&mut guest).dials.len(), 1);
        guest.renew().unwrap();
        assert_eq!(peer(&mut guest).dials.len(), 2, "such a connection is not used again");
    }
}

#[test]
fn windows_are_given_back_before_they_run_out() {
    // 70 replies of 31 MiB are more than the largest window; the server in memory counts it.
    const SIZE: usize = 31 << 20;
    let mut given = 1;
    let mut guest = opened(move |peer, event| {
        let Event::Asked(call) = event else { return false };
        let now = peer.came(frames::WINDOW_UPDATE, 0).len();
        if now > std::mem::replace(&mut given, now) {
            assert_eq!(peer.own_window, 0x7fff_ffff, "all of it, padding too");
        }
        if !call.is("Run") {
            return false;
        }
        peer.send(frames::headers(call.stream, frames::REPLY));
        // A field that the guest passes over.
        peer.send(frames::data(call.stream, &skipped((SIZE >> 20) * ((1 << 20) - 256))));
        for _ in 0..SIZE >> 20 {
            peer.send(frames::padded(frames::data(call.stream, &[0; (1 << 20) - 256]), 255));
        }
        peer.send(frames::trailers(call.stream, frames::OK));
        true
    });
    for _ in 0..70 {
        guest.noop().unwrap();
    }
    let peer = peer(&mut guest);
    assert_eq!(peer.dials.len(), 1);
    assert!(peer.came(frames::WINDOW_UPDATE, 0).len() >= 3);
}

/// The beginning of a message whose only field is one of so many bytes that no reply has.
pub fn skipped(size: usize) -> Vec<u8> {
    let mut head = vec![0x7a];
    prost::encoding::encode_varint(size as u64, &mut head);
    [&[0][..], &((head.len() + size) as u32).to_be_bytes(), &head].concat()
}

#[test]
fn messages_go_through_windows_that_change_by_chance() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut own = Random::new(seed + 1000);
        let mut guest = opened(move |peer, event| {
            match event {
                Event::Head(_) => {
                    peer.holds_windows = true;
                    peer.send(frames::window_update(0, 1_000_000));
                }
                Event::Data(call) => {
                    let stream = call.stream;
                    peer.delay += own.below(3) as u64;
                    peer.send(frames::window_update(stream, 1 + own.below(40_000) as u32));
                    match own.below(6) {
                        0 => {
                            let window = [0, 1, 1000, 65_535, 200_000][own.below(5)];
                            peer.send(frames::settings(&[(INITIAL_WINDOW_SIZE, window)]));
                            // Below zero, it takes this to go on.
                            peer.send(frames::window_update(stream, 200_000));
                        }
                        1 => {
                            let length = 16_384 + own.below(60_000) as u32;
                            peer.send(frames::settings(&[(MAX_FRAME_SIZE, length)]));
                        }
                        2 => peer.send(frames::ping(1)),
                        3 => peer.writable_from = peer.now + 2,
                        _ => {}
                    }
                }
                Event::Asked(_) => peer.delay = 0,
                _ => {}
            }
            false
        });
        let manner = &mut guest.transport().manner;
        manner.write = [7, 1000, 20_000, usize::MAX][random.below(4)];
        manner.read = [1, 30, usize::MAX][random.below(3)];
        manner.blocks = random.below(2) == 0;
        manner.random = Some(random.clone());
        let size = random.below(400_000);
        if let Err(error) = echo(&mut guest, size) {
            panic!("{seed}: {error:?} {}", guest.message());
        }
        assert_eq!(peer(&mut guest).dials.len(), 1);
    }
}
