//! A long line in user space: a TCP relay that lets bytes through at a rate and gives them on after a delay.
//!
//! It stands for what few kernels have at hand (`netem`), and is kinder than a real line: nothing is lost, and its
//! buffers take more than is ever under way, so that TCP itself, whose ends are both on this machine, has nothing to
//! learn. What is left is what the ends of a call do about distance: how much they send before they wait.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Failure;

/// On the way, in each direction.
pub(super) const DELAY: Duration = Duration::from_millis(50);

/// Bytes per second in each direction of each connection: a gigabit.
pub(super) const RATE: f64 = 125e6;

/// Bytes that a direction takes before it reads no more: above those of a round trip, 12.5 MB.
const BUFFER_BYTES: usize = 16 << 20;

/// Bytes that are read at a time.
const PIECE_BYTES: usize = 64 << 10;

/// Starts a relay to an address, `tcp://` as its own, which is returned. It ends with the process.
pub(super) fn start(target: &str) -> Result<String, Failure> {
    let target = target.strip_prefix("tcp://").ok_or("a relay is for TCP")?.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("tcp://{}", listener.local_addr()?);
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            // A connection that cannot be made ends at its other end.
            let _ = TcpStream::connect(&target).and_then(|far| connect(&near, &far));
        }
    });
    Ok(address)
}

fn connect(near: &TcpStream, far: &TcpStream) -> io::Result<()> {
    for (from, to) in [(near, far), (far, near)] {
        from.set_nodelay(true)?;
        let (from, to, line) = (from.try_clone()?, to.try_clone()?, Arc::new(Line::default()));
        let entrance = Arc::clone(&line);
        std::thread::spawn(move || entrance.fill(from));
        std::thread::spawn(move || line.empty(to));
    }
    Ok(())
}

/// One direction of a connection.
#[derive(Default)]
struct Line {
    way: Mutex<Way>,
    changed: Condvar,
}

#[derive(Default)]
struct Way {
    /// What is on its way, and when it arrives; nothing is the end.
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// Nobody takes anything any more.
    is_broken: bool,
}

impl Line {
    /// Takes what comes, as fast as the line's rate allows.
    fn fill(&self, mut from: TcpStream) {
        let mut piece = vec![0; PIECE_BYTES];
        let mut free = Instant::now();
        loop {
            let count = from.read(&mut piece).unwrap_or(0);
            free = free.max(Instant::now()) + Duration::from_secs_f64(count as f64 / RATE);
            let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
            while way.bytes + count > BUFFER_BYTES && !way.is_broken {
                way = self.changed.wait(way).unwrap_or_else(PoisonError::into_inner);
            }
            way.bytes += count;
            way.pieces.push_back((free + DELAY, piece[..count].to_vec()));
            self.changed.notify_all();
            if count == 0 || way.is_broken {
                return;
            }
        }
    }

    /// Gives on what arrives.
    fn empty(&self, mut to: TcpStream) {
        loop {
            let (due, piece) = self.next();
            while let Some(rest) = due.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero()) {
                std::thread::park_timeout(rest);
            }
            let is_over = piece.is_empty() || to.write_all(&piece).is_err();
            let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
            way.bytes -= piece.len();
            way.is_broken = is_over;
            self.changed.notify_all();
            if is_over {
                // The other end hears of it.
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
        }
    }

    fn next(&self) -> (Instant, Vec<u8>) {
        let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(piece) = way.pieces.pop_front() {
                return piece;
            }
            way = self.changed.wait(way).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
