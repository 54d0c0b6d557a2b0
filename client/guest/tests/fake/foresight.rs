//! Who is awake for an answer, and when.

use std::cell::Cell;
use std::rc::Rc;

use vaccel_guest::{Guest, Reason};

use crate::peer::Event;
use crate::transport::Fake;
use crate::{fails, opened};

/// Calls after which those like them are foreseen.
const ENOUGH: usize = 8;

/// A guest whose runs are answered after so many milliseconds, and which may have an exact clock.
fn guest(is_exact: bool) -> (Guest<Fake>, Rc<Cell<u64>>) {
    let takes = Rc::new(Cell::new(3));
    let own = Rc::clone(&takes);
    let mut guest = opened(move |peer, event| {
        if let Event::Head(call) = event {
            peer.delay = if call.is("Run") { own.get() } else { 0 };
        }
        false
    });
    guest.transport().exactly = is_exact.then_some(0);
    (guest, takes)
}

/// How often a call looks for its answer in vain.
fn looks(guest: &mut Guest<Fake>) -> usize {
    let before = std::mem::take(&mut guest.transport().vain_reads);
    assert_eq!(before, 0, "between the calls");
    guest.noop().unwrap();
    std::mem::take(&mut guest.transport().vain_reads)
}

#[test]
fn an_answer_that_is_foreseen_is_awaited_awake() {
    let (mut guest, takes) = guest(true);
    for call in 0..ENOUGH {
        assert_eq!(looks(&mut guest), 0, "{call}");
    }
    let begun = guest.transport().peer.now;
    // It wakes a tenth of a millisecond before.
    for _ in 0..4 {
        assert!((10..=100).contains(&looks(&mut guest)));
    }
    assert_eq!(guest.transport().peer.now - begun, 4 * 3);
    // One that comes sooner is not waited for, and for one that is late nobody is awake for long.
    takes.set(1);
    assert_eq!(looks(&mut guest), 0);
    takes.set(10);
    assert!((100..=700).contains(&looks(&mut guest)));
    // Nor for those of which it is not known how long they take.
    takes.set(20);
    assert!(looks(&mut guest) > 0);
    assert_eq!(looks(&mut guest), 0);
    assert_eq!(guest.transport().peer.now - begun, 4 * 3 + 1 + 10 + 20 + 20);
}

#[test]
fn who_does_not_want_to_be_awake_sleeps() {
    let (mut guest, _) = guest(true);
    guest.set_awake(false);
    assert!((0..2 * ENOUGH).all(|_| looks(&mut guest) == 0));
    guest.set_awake(true);
    assert!(looks(&mut guest) > 0);
}

#[test]
fn nobody_is_awake_where_clocks_go_by_milliseconds_or_calls_are_short() {
    for (is_exact, milliseconds) in [(false, 3), (true, 0)] {
        let (mut guest, takes) = guest(is_exact);
        takes.set(milliseconds);
        assert!((0..2 * ENOUGH).all(|_| looks(&mut guest) == 0), "{is_exact} {milliseconds}");
    }
}

#[test]
fn a_wait_that_ends_early_is_no_deadline() {
    let (mut guest, _) = guest(true);
    assert!((0..ENOUGH).all(|_| looks(&mut guest) == 0));
    guest.transport().ends_early = true;
    assert!(looks(&mut guest) > 0);
}

#[test]
fn a_deadline_is_kept_before_and_while_it_is_awake() {
    for deadline in [1, 3] {
        let (mut guest, takes) = guest(true);
        assert!((0..ENOUGH).all(|_| looks(&mut guest) == 0));
        takes.set(50);
        guest.set_deadline_ms(deadline);
        let begun = guest.transport().peer.now;
        let outcome = guest.noop();
        fails(&guest, outcome, Reason::Deadline, "the deadline passed");
        assert_eq!(guest.transport().peer.now - begun, u64::from(deadline));
    }
}
