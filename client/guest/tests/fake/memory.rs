//! Memory that the agent has, too: what is asked for and when, what requests say of it, and what replies may.

use std::cell::RefCell;
use std::rc::Rc;

use prost::bytes::Bytes;
use vaccel_guest::{Arg, ArgOut, ArgType, DType, Guest, Input, Output, Reason, Result, Timings};
use vaccel_proto::v1::{
    Arg as TheirArg, GenopReply, ModelRunReply, NamedTensor, Place, RunReply, RunRequest, Shared, Tensor,
    run_reply::Outcome, run_request::Op,
};

use crate::peer::{Event, Peer, timings};
use crate::transport::{EPIPE, Fake};
use crate::{fails, flow, frames, opened, peer};

/// What memory is full of when it comes.
const FILL: u8 = 7;

const LONG: usize = 65_536;
const MEBIBYTE: usize = 1 << 20;

type Requests = Rc<RefCell<Vec<RunRequest>>>;

/// A guest that gets memory, and the runs it asks for, which the script answers or else the agent.
fn sharing(mut answer: impl FnMut(&mut Peer, u32, &RunRequest) -> bool + 'static) -> (Guest<Fake>, Requests) {
    let requests = Requests::default();
    let seen = Rc::clone(&requests);
    let mut guest = opened(move |peer, event| {
        let Event::Asked(call) = event else { return false };
        if !call.is("Run") {
            return false;
        }
        let request: RunRequest = call.message();
        let done = answer(peer, call.stream, &request);
        seen.borrow_mut().push(request);
        done
    });
    guest.transport().memory = Some(FILL);
    (guest, requests)
}

/// Runs a model on so many bytes, with as much place for what comes.
fn run(guest: &mut Guest<Fake>, bytes: usize, place: &mut [u8]) -> Result<(Timings, usize)> {
    let data = vec![1; bytes];
    let model = flow::model(guest);
    let input = Input { name: "x", dtype: DType::U8, shape: &[bytes as i64], data: &data };
    let mut outputs = [Output::new(place)];
    let timings = guest.run(&model, &[input], &[], &mut outputs)?;
    Ok((timings, outputs[0].length))
}

/// The reply to a run of one output that lies at a place.
fn at(places: Vec<Place>) -> RunReply {
    let tensor = Tensor { dtype: DType::U8 as i32, shape: vec![4, 5], ..Tensor::default() };
    let outputs = vec![NamedTensor { name: "y".into(), tensor: Some(tensor) }];
    let outcome = Some(Outcome::ModelRun(ModelRunReply { outputs }));
    RunReply { timings: Some(timings()), places, outcome }
}

fn shared(request: &RunRequest) -> &Shared {
    request.shared.as_ref().expect("the call's tensors are lent")
}

fn tensor(request: &RunRequest) -> &Tensor {
    let Some(Op::ModelRun(run)) = &request.op else { panic!("a run of a model") };
    run.inputs[0].tensor.as_ref().unwrap()
}

#[test]
fn long_tensors_lie_there_from_the_second_call_on() {
    let (mut guest, requests) = sharing(|peer, stream, request| {
        let Some(Shared { room: Some(room), .. }) = &request.shared else { return false };
        let place = Place { offset: room.offset + 64, bytes: 20_000 };
        peer.reply(stream, &at(vec![place]));
        true
    });
    let mut place = vec![0; LONG];
    assert_eq!(run(&mut guest, LONG, &mut place).unwrap().1, LONG);
    assert!(place.iter().all(|byte| *byte == 1) && guest.transport().shares.is_empty());
    for _ in 0..2 {
        place.fill(0);
        let (timings, length) = run(&mut guest, LONG - 3, &mut place).unwrap();
        assert_eq!((timings.run_us, length), (2, 20_000));
        assert!(
            place[..length].iter().all(|byte| *byte == FILL) && place[length..].iter().all(|byte| *byte == 0)
        );
    }
    assert_eq!(guest.transport().shares, [MEBIBYTE]);
    let [first, second, third] = &requests.borrow()[..] else { panic!("three runs") };
    assert!(first.shared.is_none() && tensor(first).data.len() == LONG);
    assert_eq!(second, third);
    let Shared { region, places, room } = shared(second);
    assert_eq!(region, "region 1");
    assert_eq!(places[..], [Place { offset: 0, bytes: LONG as u64 - 3 }]);
    assert_eq!(*room, Some(Place { offset: LONG as u64, bytes: LONG as u64 }));
    let Tensor { shape, pad, data, .. } = tensor(second);
    assert!(shape[..] == [LONG as i64 - 3] && pad.is_empty() && data.is_empty());
}

#[test]
fn short_tensors_and_all_where_none_is_wanted_go_as_ever() {
    for (limit, bytes) in [(usize::MAX, 15_000), (0, MEBIBYTE), (LONG, LONG), (usize::MAX, 33 << 20)] {
        let (mut guest, requests) = sharing(|_, _, _| false);
        guest.set_shared_bytes(limit);
        for _ in 0..3 {
            let outcome = run(&mut guest, bytes, &mut vec![0; bytes]);
            assert_eq!(outcome.is_ok(), bytes <= MEBIBYTE, "{bytes}");
        }
        assert!(guest.transport().shares.is_empty(), "{limit} {bytes}");
        assert!(requests.borrow().iter().all(|request| request.shared.is_none()));
    }
}

#[test]
fn an_agent_that_may_sleep_is_told_before_data_is_copied_for_long() {
    let (mut guest, _) = sharing(|_, _, _| false);
    let (model, long) = (flow::model(&mut guest), 256 << 10);
    let (data, mut place) = (vec![1; long], vec![0; long]);
    let mut alerts_after = |pause: u64, bytes: usize| {
        peer(&mut guest).now += pause;
        let data = &data[..bytes];
        let input = Input { name: "x", dtype: DType::U8, shape: &[bytes as i64], data };
        guest.run(&model, &[input], &[], &mut [Output::new(&mut place)]).unwrap();
        peer(&mut guest).came(frames::ALERT, 0).len()
    };
    // There is no memory for the first call yet, and who is awake need not be told.
    for (pause, bytes, alerts) in
        [(1000, long, 0), (1000, long, 1), (0, long, 1), (1, long, 1), (1000, long - 64, 1), (2, long, 2)]
    {
        assert_eq!(alerts_after(pause, bytes), alerts, "{pause} {bytes}");
    }
    // It comes before the call, at once; if it cannot, the call is as good on another connection.
    let frames: Vec<u8> = peer(&mut guest).frames.iter().map(|frame| frame.kind).collect();
    assert_eq!(frames[frames.len() - 3..], [frames::ALERT, frames::HEADERS, frames::DATA]);
    peer(&mut guest).now += 1000;
    peer(&mut guest).write_fails = Some(EPIPE);
    let input = Input { name: "x", dtype: DType::U8, shape: &[long as i64], data: &data };
    guest.run(&model, &[input], &[], &mut [Output::new(&mut place)]).unwrap();
    assert_eq!(peer(&mut guest).dials.len(), 2);
}

#[test]
fn more_is_asked_for_when_more_is_needed() {
    let (mut guest, _) = sharing(|peer, stream, request| {
        let place = request.shared.as_ref().map(|shared| shared.places[0]);
        peer.reply(stream, &at(place.into_iter().collect()));
        true
    });
    for bytes in [LONG, LONG, 400_000, 700_000, LONG, 3 * MEBIBYTE, 9 * MEBIBYTE, MEBIBYTE] {
        run(&mut guest, bytes, &mut vec![0; bytes]).unwrap();
    }
    assert_eq!(guest.transport().shares, [MEBIBYTE, 2 * MEBIBYTE, 8 * MEBIBYTE, 32 * MEBIBYTE]);
    // Closed with the guest, and not asked for again before it is needed.
    guest.close().unwrap();
    run(&mut guest, LONG, &mut [0; LONG]).unwrap();
    assert_eq!(guest.transport().shares.len(), 5);
}

#[test]
fn an_agent_that_has_none_is_asked_once_a_minute() {
    let (mut guest, _) = sharing(|_, _, _| false);
    guest.transport().memory = None;
    for _ in 0..4 {
        assert_eq!(run(&mut guest, LONG, &mut [0; LONG]).unwrap().1, LONG);
    }
    assert_eq!(guest.transport().shares.len(), 1);
    peer(&mut guest).now += 60_001;
    run(&mut guest, LONG, &mut [0; LONG]).unwrap();
    assert_eq!(guest.transport().shares.len(), 2);
}

#[test]
fn places_that_cannot_be_are_the_agents_fault() {
    let place = |offset, bytes| Place { offset, bytes };
    let mebibyte = MEBIBYTE as u64;
    let cases = [
        (vec![place(mebibyte - 10, 11)], Reason::BackendFailed, "places that are not its own"),
        (vec![place(u64::MAX, 2)], Reason::BackendFailed, "places that are not its own"),
        (vec![place(1, u64::MAX)], Reason::BackendFailed, "places that are not its own"),
        (vec![place(0, 1); 17], Reason::BackendFailed, "no message of the contract"),
        (
            vec![place(0, LONG as u64 + 1)],
            Reason::BadArgument,
            "outputs[0]: expected a place for 65537 bytes",
        ),
    ];
    for (places, reason, text) in cases {
        for is_lent in [false, true] {
            let named = places.clone();
            let (mut guest, _) = sharing(move |peer, stream, request| {
                let is_asked = is_lent == request.shared.is_some();
                if is_asked {
                    peer.reply(stream, &at(named.clone()));
                }
                is_asked
            });
            if is_lent {
                run(&mut guest, LONG, &mut [0; LONG]).unwrap();
            }
            let outcome = run(&mut guest, LONG, &mut [0; LONG]);
            // Who was lent nothing is told of places all the same.
            let (reason, text) = match is_lent || places.len() > 16 {
                true => (reason, text),
                false => (Reason::BackendFailed, "places that are not its own"),
            };
            fails(&guest, outcome, reason, text);
        }
    }
}

#[test]
fn memory_that_the_agent_does_not_know_is_replaced() {
    let mut known = 2;
    let (mut guest, requests) = sharing(move |peer, stream, request| {
        let Some(shared) = &request.shared else { return false };
        if shared.region == format!("region {known}") {
            peer.reply(stream, &at(vec![shared.places[0]]));
            known = 0;
        } else {
            peer.refuse(stream, &vaccel_proto::Error::not_found("region", "x"));
        }
        true
    });
    for _ in 0..4 {
        assert_eq!(run(&mut guest, LONG, &mut [0; LONG]).unwrap().1, LONG);
    }
    let regions = |request: &RunRequest| request.shared.as_ref().map(|shared| shared.region.clone());
    let regions: Vec<_> = requests.borrow().iter().map(regions).collect();
    let [one, two] = ["region 1", "region 2"].map(|region| Some(region.to_owned()));
    // The first is unknown, the second is not, and then is.
    assert_eq!(regions, [None, one, None, two.clone(), two, None]);
}

#[test]
fn memory_of_a_call_without_an_answer_is_not_used_again() {
    let (mut guest, requests) = sharing(|peer, stream, request| {
        let Some(shared) = &request.shared else { return false };
        match shared.region.as_str() {
            // Nothing.
            "region 1" => {}
            "region 2" => peer.end(104),
            "region 3" => {
                peer.refuse(stream, &vaccel_proto::Error::new(vaccel_proto::Reason::Deadline, "late"))
            }
            "region 4" => peer.refuse(stream, &vaccel_proto::Error::field("x", "a", "b")),
            _ => peer.reply(stream, &at(vec![shared.places[0]])),
        }
        true
    });
    run(&mut guest, LONG, &mut [0; LONG]).unwrap();
    for reason in
        [Reason::Deadline, Reason::Unreachable, Reason::Deadline, Reason::BadArgument, Reason::BadArgument]
    {
        assert_eq!(run(&mut guest, LONG, &mut [0; LONG]).unwrap_err().reason, reason);
    }
    // What was refused is over.
    assert_eq!(guest.transport().shares.len(), 4);
    let seen = requests.borrow().len();
    // A call that is repeated has been begun before: the first attempt may still be about to write.
    guest.set_repeatable(true);
    guest.set_shared_bytes(MEBIBYTE);
    let mut is_broken = false;
    let (mut other, _) = sharing(move |peer, stream, request| {
        let Some(shared) = &request.shared else { return false };
        if std::mem::replace(&mut is_broken, true) {
            peer.reply(stream, &at(vec![shared.places[0]]));
        } else {
            peer.end(104);
        }
        true
    });
    other.set_repeatable(true);
    for _ in 0..3 {
        run(&mut other, LONG, &mut [0; LONG]).unwrap();
    }
    assert_eq!((other.transport().shares.len(), requests.borrow().len()), (2, seen));
}

#[test]
fn arguments_lie_there_in_their_order_and_come_back() {
    let (mut guest, requests) = sharing(|peer, stream, request| {
        let args = |data: &[&'static [u8]]| {
            data.iter()
                .map(|data| TheirArg { data: Bytes::from_static(data), ..TheirArg::default() })
                .collect()
        };
        let places = match &request.shared {
            Some(Shared { room: Some(room), .. }) => {
                vec![Place::default(), Place { offset: room.offset, bytes: 20_000 }]
            }
            _ => vec![],
        };
        let outcome = Some(Outcome::Genop(GenopReply { write: args(&[b"short", b""]) }));
        peer.reply(stream, &RunReply { timings: Some(timings()), places, outcome });
        true
    });
    let (long, before) = (vec![1; 40_000], vec![2; 30_000]);
    let read = [Arg { kind: ArgType::UINT8, data: &[1] }, Arg { kind: ArgType::BUFFER, data: &long }];
    let (mut short, mut result) = ([0; 8], vec![0; 30_000]);
    let mut lengths = Vec::new();
    for _ in 0..2 {
        let mut write = [
            ArgOut::new(ArgType::BUFFER, &mut short),
            ArgOut { kind: ArgType::BUFFER, before: &before, data: &mut result, length: 0 },
        ];
        guest.genop(&read, &mut write).unwrap();
        lengths.push([write[0].length, write[1].length]);
    }
    assert_eq!(lengths, [[5, 0], [5, 20_000]]);
    assert!(&short[..5] == b"short" && result[..20_000].iter().all(|byte| *byte == FILL));
    let [first, second] = &requests.borrow()[..] else { panic!("two calls") };
    let shape = |request: &RunRequest| {
        let Some(Op::Genop(genop)) = &request.op else { panic!("a generic operation") };
        let all = genop.read.iter().chain(&genop.write);
        all.map(|arg| (arg.kind as u32, arg.size, arg.data.len())).collect::<Vec<_>>()
    };
    let (byte, buffer) = (ArgType::UINT8.0, ArgType::BUFFER.0);
    assert_eq!(shape(first), [(byte, 0, 1), (buffer, 0, 40_000), (buffer, 8, 0), (buffer, 0, 30_000)]);
    assert_eq!(shape(second), [(byte, 0, 1), (buffer, 0, 0), (buffer, 8, 0), (buffer, 0, 0)]);
    let place = |offset, bytes| Place { offset, bytes };
    let none = Place::default();
    assert_eq!(shared(second).places, [none, place(0, 40_000), none, place(40_000, 30_000)]);
    assert_eq!(shared(second).room, Some(place(70_016, 64 + 30_016)));
}

#[test]
fn what_was_produced_there_is_named_where_it_is() {
    let (mut guest, requests) = sharing(|peer, stream, request| {
        let shared = request.shared.as_ref().filter(|shared| shared.region == "region 1");
        match shared {
            Some(shared) => peer.reply(stream, &at(vec![shared.places[1]])),
            None if request.shared.is_some() => {
                peer.refuse(stream, &vaccel_proto::Error::not_found("region", "x"));
            }
            None => return false,
        }
        true
    });
    let model = flow::model(&mut guest);
    let elsewhere = [3; 10];
    let (mut first, mut second) = (guest.share(1000).unwrap(), guest.share(2000).unwrap());
    first[..100].fill(5);
    second.fill(6);
    let mut place = [0; 1000];
    let mut other = [0; 1000];
    for (memory, is_known) in [(&first, true), (&second, false)] {
        let input = |data| Input { name: "", dtype: DType::U8, shape: &[10], data };
        let inputs = [input(&elsewhere), input(&memory[90..110]), input(&memory[1000..])];
        let mut outputs = [Output::new(&mut place), Output::new(&mut other), Output::new(&mut [])];
        let outcome = guest.run_from(memory, &model, &inputs, &[], &mut outputs);
        if is_known {
            outcome.unwrap();
            assert_eq!(outputs[0].length, 20);
            assert!(place[..10] == [5; 10] && place[10..20] == [FILL; 10]);
        } else {
            // The other one ends with its memory, and there is no place for that.
            fails(&guest, outcome, Reason::BadArgument, "outputs[2]");
        }
    }
    let seen = requests.borrow();
    let [known, unknown, sent] = &seen[..] else { panic!("three runs") };
    let places = [Place::default(), Place { offset: 90, bytes: 20 }, Place::default()];
    assert_eq!(shared(known).places, places);
    assert_eq!(shared(unknown).places[2], Place { offset: 1000, bytes: 1000 });
    assert!(sent.shared.is_none());
    // Arguments as well.
    let read = [Arg { kind: ArgType::UINT8, data: &[1] }, Arg { kind: ArgType::BUFFER, data: &first[8..16] }];
    drop(seen);
    guest.genop_from(&first, &read, &mut []).unwrap();
    assert_eq!(shared(requests.borrow().last().unwrap()).places[1], Place { offset: 8, bytes: 8 });
    guest.transport().memory = None;
    let outcome = guest.share(1);
    fails(&guest, outcome, Reason::Unusable, "no memory");
}
