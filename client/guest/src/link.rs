//! A connection that is dialed when it is needed and again when it broke, and calls over it until they succeed, cannot
//! succeed, or their time is over.
//!
//! A call is repeated by itself only when the agent cannot have run it. A blocking guest answers no PING between its
//! calls, so that the agent may have closed the connection meanwhile: that is looked for before each call.

use core::ops::Range;

use crate::connection::{Call, Connection, Fault as Broken, RequestHead};
use crate::error::{Error, Reason, Result};
use crate::foresight::{self, Foresight};
use crate::frame;
use crate::protobuf::Reader;
use crate::status::TEXT_BYTES;
use crate::text::Text;
use crate::transport::{Fault, Ready, Transport};

/// Pause before the second attempt, and the longest before a later one, in milliseconds.
const PAUSE_FIRST_MS: u64 = 10;
const PAUSE_MAX_MS: u64 = 1000;

/// How long the answer to the peer's SETTINGS may wait for something it can be sent with, in milliseconds. By itself
/// it would be a small packet that holds up the next one.
const ANSWER_DELAY_MS: u64 = 100;

/// How long after it was heard last a peer is not listened to before a call that may be run twice, in milliseconds: a
/// guest that calls again and again saves a system call each time, and its agent is awake. For other calls it has to be
/// known before that the connection has not ended.
const HEARD_MS: u64 = 1;

/// Reads between two calls. A peer that has more to say is heard during the call, which has a deadline.
const IDLE_READS_MAX: usize = 4096;

/// Bytes of a bearer token.
pub(crate) const TOKEN_BYTES: usize = 256;

/// The connection and the way to it.
#[derive(Debug)]
pub(crate) struct Link<T> {
    pub(crate) transport: T,
    connection: Connection,
    connected: bool,
    /// When the peer was heard last.
    heard: u64,
    foresight: Foresight,
    /// Answers that are foreseen are awaited awake.
    pub(crate) is_awake: bool,
    /// The last call was begun more than once.
    pub(crate) is_repeated: bool,
    pub(crate) token: Text<TOKEN_BYTES>,
    /// What people are told about the last failure.
    pub(crate) text: Text<TEXT_BYTES>,
}

/// One call as the link makes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) path: &'a str,
    pub(crate) parts: &'a [&'a [u8]],
    /// When the caller stops waiting.
    pub(crate) until: u64,
    /// The same call twice does no harm.
    pub(crate) repeatable: bool,
}

/// A failed attempt.
struct Miss {
    error: Error,
    /// Another attempt may do better, and does no harm.
    again: bool,
}

impl<T: Transport> Link<T> {
    pub(crate) const fn new(transport: T) -> Self {
        Self {
            transport,
            connection: Connection::new(),
            connected: false,
            heard: 0,
            foresight: Foresight::new(),
            is_awake: true,
            is_repeated: false,
            token: Text::new(),
            text: Text::new(),
        }
    }

    /// Makes a call.
    ///
    /// # Errors
    /// The agent's, or what became of the connection.
    pub(crate) fn call(&mut self, request: &Request<'_>, reply: &mut dyn Reader) -> Result<()> {
        let mut pause = PAUSE_FIRST_MS;
        self.is_repeated = false;
        let mut may_have_run = false;
        loop {
            let Err(mut miss) = self.attempt(request, reply) else { return Ok(()) };
            // Or one before it.
            may_have_run |= miss.error.may_have_run;
            miss.error.may_have_run = may_have_run;
            let wait = pause.max(u64::from(miss.error.retry_after_ms));
            let again = self.transport.now().saturating_add(wait);
            if !miss.again || again >= request.until {
                return Err(miss.error);
            }
            self.transport.pause(again);
            self.is_repeated = true;
            pause = (pause * 2).min(PAUSE_MAX_MS);
        }
    }

    /// Takes note of what the agent has said since the last call, and answers it.
    pub(crate) fn attend(&mut self) {
        self.listen();
        if self.connected && self.send(None, true, u64::MAX).is_err() {
            self.close();
        }
    }

    /// Tells an agent that was not heard just now that a call is about to come: its threads wake meanwhile.
    pub(crate) fn alert(&mut self) {
        if !self.connected || self.transport.now() <= self.heard.saturating_add(HEARD_MS) {
            return;
        }
        // By itself it would hold up the call.
        self.transport.hurry();
        if self.connection.alert() && self.send(None, false, u64::MAX).is_err() {
            self.close();
        }
    }

    /// Takes note of what the agent has said since the last call, and answers what cannot wait for the next one.
    fn listen(&mut self) {
        for _ in 0..IDLE_READS_MAX {
            if !self.connected || !self.transport.wait(false, 0).is_ok_and(|ready| ready.read) {
                return;
            }
            let answered = self.receive(None).and_then(|()| match self.connection.is_full_of_pings() {
                true => self.send(None, false, u64::MAX),
                false => Ok(false),
            });
            match answered {
                Ok(false) => {}
                // What cannot be answered now is not asked for more.
                Ok(true) => return,
                Err(_) => self.close(),
            }
        }
    }

    /// Closes the connection; the next call opens another one.
    pub(crate) fn close(&mut self) {
        if self.connected {
            self.connected = false;
            self.transport.close();
        }
    }

    fn attempt(&mut self, request: &Request<'_>, reply: &mut dyn Reader) -> core::result::Result<(), Miss> {
        let authority: Text<128> = self.transport.authority().into();
        self.ready(request)?;
        let timeout_ms = request.until.saturating_sub(self.transport.now()).max(1);
        let token = self.token;
        let head = RequestHead {
            path: request.path,
            authority: authority.as_str(),
            token: token.as_bytes(),
            timeout_ms,
        };
        let mut call = Call::new(request.parts, reply);
        if let Err(error) = self.connection.start(&head, &mut call) {
            self.say("the address and the token are too long for a request");
            return Err(Miss { error, again: false });
        }
        let kind = foresight::name(request.parts.first().copied().unwrap_or_default());
        let begun = self.transport.now_exactly();
        let awake = begun.filter(|_| self.is_awake).zip(self.foresight.awake(kind));
        let awake = awake.map(|(begun, awake)| begun + awake.start..begun + awake.end);
        if let Err(fault) = self.drive(&mut call, request.until, awake.as_ref()) {
            let miss = self.explain(fault, &call, request.repeatable);
            if fault != Lost::Late || !self.give_up(&mut call) {
                self.close();
            }
            return Err(miss);
        }
        if !self.connection.takes_calls() {
            self.close();
        }
        let outcome = call.outcome();
        if outcome.is_ok()
            && let Some((begun, now)) = begun.zip(self.transport.now_exactly())
        {
            self.foresight.learn(kind, now.saturating_sub(begun));
        }
        outcome.map_err(|error| {
            self.text = *call.text();
            // What came of a message was taken already.
            let refused = matches!(error.reason, Reason::Overloaded | Reason::ShuttingDown);
            let again = refused && !call.has_message();
            // It was at work, or what stands before it does not know.
            let is_late = matches!(error.reason, Reason::Deadline | Reason::Cancelled | Reason::Unreachable);
            Miss { error: Error { may_have_run: is_late || error.may_have_run, ..error }, again }
        })
    }

    /// A connection on which a call can begin.
    fn ready(&mut self, request: &Request<'_>) -> core::result::Result<(), Miss> {
        if !request.repeatable || self.transport.now() > self.heard.saturating_add(HEARD_MS) {
            self.listen();
        }
        if self.connected && self.connection.takes_calls() {
            return Ok(());
        }
        self.close();
        match self.transport.connect(request.until) {
            Ok(()) => {
                self.connection.open();
                self.connected = true;
                Ok(())
            }
            Err(Fault::Broken(errno)) => {
                self.say("cannot reach the agent");
                if errno != 0 {
                    self.text.push(": error ").push_number(u64::from(errno.unsigned_abs()));
                }
                Err(Miss { error: Error::new(Reason::Unreachable), again: true })
            }
            Err(_) => {
                self.say("cannot reach the agent: no answer in time");
                Err(Miss { error: Error::new(Reason::Deadline), again: false })
            }
        }
    }

    /// Moves bytes until the call is over, awake at the time for which its answer is foreseen.
    fn drive(
        &mut self,
        call: &mut Call<'_>,
        until: u64,
        awake: Option<&Range<u64>>,
    ) -> core::result::Result<(), Lost> {
        let mut answer_by = u64::MAX;
        let mut now = self.transport.now();
        loop {
            let blocked = self.send(Some(call), now >= answer_by, until)?;
            if call.is_over() {
                self.heard = now;
                return Ok(());
            }
            if blocked || call.is_held_up() {
                self.transport.hurry();
            }
            answer_by = match self.connection.owes_answer() {
                true => answer_by.min(now.saturating_add(ANSWER_DELAY_MS)),
                false => u64::MAX,
            };
            match self.wait(blocked, until.min(answer_by), awake.filter(|_| !blocked)) {
                Ok(ready) if ready.read => self.receive(Some(call))?,
                Ok(_) => {}
                Err(Fault::Late) if answer_by < until => {}
                Err(Fault::Late) => return Err(Lost::Late),
                Err(Fault::Broken(errno)) => return Err(Lost::Gone(errno)),
                Err(Fault::WouldBlock) => {}
            }
            now = self.transport.now();
            if now >= until && !call.is_over() {
                return Err(Lost::Late);
            }
        }
    }

    /// Waits until bytes can be moved. Whoever is to be awake wakes for that, and then reads without knowing that there
    /// is something.
    fn wait(
        &mut self,
        write: bool,
        until: u64,
        awake: Option<&Range<u64>>,
    ) -> core::result::Result<Ready, Fault> {
        let Some((awake, now)) =
            awake.zip(self.transport.now_exactly()).filter(|(awake, now)| *now < awake.end)
        else {
            return self.transport.wait(write, until);
        };
        if now >= awake.start {
            return Ok(Ready { read: true, write: false });
        }
        match self.transport.wait_exactly(awake.start.min(until.saturating_mul(1000))) {
            Err(Fault::Late) => {
                let late = self.transport.now_exactly().and_then(|now| now.checked_sub(awake.start));
                late.into_iter().for_each(|late| self.foresight.woken(late));
                Ok(Ready::default())
            }
            waited => waited,
        }
    }

    /// Sends what can be sent until the clock shows `until`; returns whether more is there and cannot.
    fn send(
        &mut self,
        mut call: Option<&mut Call<'_>>,
        answers: bool,
        until: u64,
    ) -> core::result::Result<bool, Lost> {
        let mut is_first = true;
        loop {
            let pieces = self.connection.outgoing(call.as_deref_mut(), answers);
            if pieces.as_slice().is_empty() {
                return Ok(false);
            }
            // A transport may wait in its writes.
            if !core::mem::take(&mut is_first) && self.transport.now() >= until {
                return Ok(true);
            }
            match self.transport.write(pieces.as_slice()) {
                Ok(0) => return Err(Lost::Gone(0)),
                Ok(count) => self.connection.sent(call.as_deref_mut(), count),
                Err(Fault::WouldBlock) => return Ok(true),
                Err(Fault::Late) => return Err(Lost::Late),
                Err(Fault::Broken(errno)) => return self.last_words(call, errno),
            }
        }
    }

    /// What the agent said before writing to it failed: perhaps the end of the call, or why it closed.
    fn last_words(
        &mut self,
        mut call: Option<&mut Call<'_>>,
        errno: i32,
    ) -> core::result::Result<bool, Lost> {
        if call.as_ref().is_some_and(|call| call.is_over()) {
            // It has been read already; the next call finds out about the connection.
            return Ok(false);
        }
        for _ in 0..IDLE_READS_MAX {
            if !self.transport.wait(false, 0).is_ok_and(|ready| ready.read) {
                break;
            }
            match self.receive(call.as_deref_mut()) {
                Err(Lost::Broken(why)) => return Err(Lost::Broken(why)),
                Err(_) => break,
                Ok(()) if call.as_ref().is_some_and(|call| call.is_over()) => return Ok(false),
                Ok(()) => {}
            }
        }
        Err(Lost::Gone(errno))
    }

    /// Takes in what came.
    fn receive(&mut self, mut call: Option<&mut Call<'_>>) -> core::result::Result<(), Lost> {
        let [direct, buffer] = self.connection.places(call.as_deref_mut());
        if buffer.is_empty() {
            return Ok(());
        }
        let room = direct.len();
        match self.transport.read(direct, buffer) {
            Ok(0) => Err(Lost::Gone(0)),
            Ok(count) => {
                let direct = count.min(room);
                self.connection
                    .received(call.as_deref_mut(), direct, count - direct)
                    .map_err(Lost::Broken)?;
                self.connection.process(call).map_err(Lost::Broken)
            }
            Err(Fault::WouldBlock) => Ok(()),
            Err(Fault::Late) => Err(Lost::Late),
            Err(Fault::Broken(errno)) => Err(Lost::Gone(errno)),
        }
    }

    /// Tells the agent that nobody waits any more; returns whether the connection can go on.
    fn give_up(&mut self, call: &mut Call<'_>) -> bool {
        self.connection.is_settled()
            && self.connection.abandon(call)
            && self.send(None, true, u64::MAX) == Ok(false)
    }

    fn say(&mut self, text: &str) {
        self.text.clear();
        self.text.push(text);
    }

    /// What a lost call means to its caller.
    fn explain(&mut self, lost: Lost, call: &Call<'_>, repeatable: bool) -> Miss {
        let settled = self.connection.is_settled();
        let (reason, text) = match lost {
            Lost::Late => (Reason::Deadline, "the deadline passed"),
            Lost::Gone(_) if !settled => {
                (Reason::Unreachable, "what was reached is no agent, or is none yet")
            }
            Lost::Gone(_) => (Reason::Unreachable, "the connection to the agent broke"),
            Lost::Broken(Broken::Refused) => (Reason::Unreachable, "the agent took no more calls"),
            Lost::Broken(Broken::Reset(frame::CANCEL)) => (Reason::Cancelled, "the agent cancelled the call"),
            Lost::Broken(Broken::Reset(frame::ENHANCE_YOUR_CALM)) => {
                (Reason::QuotaExceeded, "the agent finds this guest too busy")
            }
            Lost::Broken(Broken::Reset(_)) => {
                (Reason::BackendFailed, "the agent ended the call without a status")
            }
            Lost::Broken(Broken::Reply) => {
                (Reason::BackendFailed, "the reply is no message of the contract, or found no place")
            }
            Lost::Broken(Broken::Protocol(text)) => {
                let reason = if settled { Reason::BackendFailed } else { Reason::Unreachable };
                (reason, text)
            }
        };
        self.say(text);
        if let Lost::Gone(errno @ 1..) = lost {
            self.text.push(": error ").push_number(u64::from(errno.unsigned_abs()));
        }
        let not_run = !settled || lost == Lost::Broken(Broken::Refused);
        let broke = matches!(lost, Lost::Gone(_) | Lost::Broken(Broken::Refused | Broken::Protocol(_)));
        let again = broke && !call.is_answered() && (not_run || repeatable) && reason == Reason::Unreachable;
        Miss { error: Error { may_have_run: !not_run, ..Error::new(reason) }, again }
    }
}

/// What ended an attempt without a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    /// Its time is over.
    Late,
    /// The connection closed or broke.
    Gone(i32),
    /// It cannot be understood, or the call was ended.
    Broken(Broken),
}
