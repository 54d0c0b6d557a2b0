//! A [`Transport`] in memory: the peer is a script, and time passes only where the guest waits.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use vaccel_guest::{Fault, Memory, Ready, Transport};

use crate::peer::{Event, Peer};
use crate::random::Random;

pub const ECONNREFUSED: i32 = 111;
pub const ECONNRESET: i32 = 104;
pub const ENOTCONN: i32 = 107;
pub const EPIPE: i32 = 32;

/// What comes to the guest, in order.
#[derive(Debug)]
pub enum Item {
    Bytes(Rc<Vec<u8>>, usize),
    /// The end, or with an `errno` a reset; it stays.
    End(i32),
}

/// How bytes are moved.
#[derive(Debug)]
pub struct Manner {
    /// At most so many bytes at once.
    pub read: usize,
    pub write: usize,
    /// Fewer, as chance has it.
    pub random: Option<Random>,
    /// Milliseconds that each write takes, as with a transport that waits in it.
    pub write_takes: u64,
    /// Every other time nothing moves although it was said that it could.
    pub blocks: bool,
    turn: bool,
}

/// Times in a row that the guest may ask without anything moving, time included.
const TURNS_MAX: u32 = 10_000;

/// The guest's side of the network.
pub struct Fake {
    pub peer: Peer,
    pub manner: Manner,
    /// The lengths of its writes.
    pub writes: Vec<usize>,
    /// What memory is filled with that the guest gets, if it gets any.
    pub memory: Option<u8>,
    /// The bytes of memory it asked for.
    pub shares: Vec<usize>,
    /// Microseconds beyond the clock's milliseconds, if it goes by them: each look at it takes one.
    pub exactly: Option<u64>,
    /// Waits end before the microsecond for which they were asked.
    pub ends_early: bool,
    /// Reads for which there was nothing.
    pub vain_reads: usize,
    turns: u32,
}

impl std::fmt::Debug for Fake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fake").finish_non_exhaustive()
    }
}

impl Fake {
    pub fn new(peer: Peer) -> Self {
        let manner = Manner {
            read: usize::MAX,
            write: usize::MAX,
            random: None,
            write_takes: 0,
            blocks: false,
            turn: false,
        };
        Self {
            peer,
            manner,
            writes: Vec::new(),
            memory: None,
            shares: Vec::new(),
            exactly: None,
            ends_early: false,
            vain_reads: 0,
            turns: 0,
        }
    }

    fn moved(&mut self) {
        self.turns = 0;
    }

    fn in_vain(&mut self) {
        self.turns += 1;
        assert!(self.turns < TURNS_MAX, "the guest turns in a circle");
    }

    fn pass_to(&mut self, time: u64) {
        if time > self.peer.now {
            self.exactly = self.exactly.map(|_| 0);
            self.peer.now = time;
            self.moved();
        }
    }

    /// Whether this time nothing moves.
    fn blocks(&mut self) -> bool {
        self.manner.turn ^= self.manner.blocks;
        self.manner.turn
    }

    fn some(&mut self, most: usize, room: usize) -> usize {
        let most = most.min(room);
        match &mut self.manner.random {
            Some(random) if most > 1 => 1 + random.below(most),
            _ => most,
        }
    }
}

/// The next item, when it is there already.
fn due(items: &mut VecDeque<(u64, Item)>, now: u64) -> Option<&mut Item> {
    items.front_mut().filter(|(when, _)| *when <= now).map(|(_, item)| item)
}

/// Memory of which the agent sees nothing, but may say what it likes.
#[derive(Debug)]
pub struct FakeMemory {
    bytes: Vec<u8>,
    name: String,
}

impl Deref for FakeMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for FakeMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Memory for FakeMemory {
    fn name(&self) -> &str {
        &self.name
    }
}

impl Transport for Fake {
    type Memory = FakeMemory;

    fn authority(&self) -> &str {
        "fake.agent"
    }

    fn connect(&mut self, until: u64) -> Result<(), Fault> {
        self.moved();
        self.peer.dialed();
        self.peer.happen(Event::Dial);
        match self.peer.dial.take() {
            None => {
                self.peer.connected = true;
                Ok(())
            }
            Some(Fault::Late) => {
                self.pass_to(until);
                Err(Fault::Late)
            }
            Some(fault) => Err(fault),
        }
    }

    fn write(&mut self, pieces: &[&[u8]]) -> Result<usize, Fault> {
        assert!(self.peer.connected, "nothing is connected");
        assert!(!pieces.is_empty() && pieces.iter().all(|piece| !piece.is_empty()), "an empty write");
        if self.peer.now < self.peer.writable_from {
            self.in_vain();
            return Err(Fault::WouldBlock);
        }
        if let Some(errno) = self.peer.write_fails {
            return Err(Fault::Broken(errno));
        }
        if self.blocks() {
            self.in_vain();
            return Err(Fault::WouldBlock);
        }
        let count = self.some(self.manner.write, pieces.iter().map(|piece| piece.len()).sum());
        self.moved();
        self.writes.push(count);
        self.peer.now += self.manner.write_takes;
        let mut left = count;
        for piece in pieces {
            let now = left.min(piece.len());
            self.peer.take(&piece[..now]);
            left -= now;
        }
        Ok(count)
    }

    fn read(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        assert!(self.peer.connected, "nothing is connected");
        assert!(!second.is_empty(), "a read without the second place");
        if self.blocks() {
            self.in_vain();
            return Err(Fault::WouldBlock);
        }
        let most = self.some(self.manner.read, first.len() + second.len());
        let now = self.peer.now;
        let mut count = 0;
        while count < most
            && let Some(item) = due(&mut self.peer.items, now)
        {
            let Item::Bytes(bytes, at) = item else { break };
            let place =
                if count < first.len() { &mut first[count..] } else { &mut second[count - first.len()..] };
            let length = place.len().min(bytes.len() - *at).min(most - count);
            place[..length].copy_from_slice(&bytes[*at..*at + length]);
            (count, *at) = (count + length, *at + length);
            if *at == bytes.len() {
                self.peer.items.pop_front();
            }
        }
        match due(&mut self.peer.items, now) {
            _ if count > 0 => {
                self.moved();
                Ok(count)
            }
            Some(Item::End(0)) => Ok(0),
            Some(Item::End(errno)) => Err(Fault::Broken(*errno)),
            _ => {
                self.vain_reads += 1;
                self.in_vain();
                Err(Fault::WouldBlock)
            }
        }
    }

    fn wait(&mut self, write: bool, until: u64) -> Result<Ready, Fault> {
        assert!(self.peer.connected, "nothing is connected");
        self.in_vain();
        let readable_from = self.peer.items.front().map_or(u64::MAX, |(when, _)| *when);
        let writable_from = if write { self.peer.writable_from } else { u64::MAX };
        let next = readable_from.min(writable_from);
        if next > until.max(self.peer.now) {
            assert!(until < u64::MAX, "the guest would wait for ever");
            self.pass_to(until);
            return Err(Fault::Late);
        }
        self.pass_to(next);
        let now = self.peer.now;
        Ok(Ready { read: readable_from <= now, write: write && writable_from <= now })
    }

    fn now_exactly(&mut self) -> Option<u64> {
        let beyond = self.exactly? + 1;
        self.exactly = Some(beyond % 1000);
        if beyond == 1000 {
            self.peer.now += 1;
            self.moved();
        }
        Some(self.peer.now * 1000 + beyond % 1000)
    }

    fn wait_exactly(&mut self, until: u64) -> Result<Ready, Fault> {
        let outcome = self.wait(false, until / 1000);
        if outcome == Err(Fault::Late) && !self.ends_early {
            self.exactly = Some(until % 1000);
        }
        outcome
    }

    fn share(&mut self, _token: &str, bytes: usize, _until: u64) -> Result<FakeMemory, Fault> {
        self.shares.push(bytes);
        let fill = self.memory.ok_or(Fault::Broken(0))?;
        Ok(FakeMemory { bytes: vec![fill; bytes], name: format!("region {}", self.shares.len()) })
    }

    fn pause(&mut self, until: u64) {
        self.pass_to(until);
    }

    fn close(&mut self) {
        assert!(self.peer.connected, "nothing is connected");
        self.peer.connected = false;
    }

    fn now(&mut self) -> u64 {
        self.peer.now
    }
}
