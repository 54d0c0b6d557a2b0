//! A guest: its session on an agent and everything it can ask for.

mod runs;

use sha2::{Digest, Sha256};

use crate::error::{Error, Reason, Result};
use crate::link::{Link, Request};
use crate::protobuf::Reader;
use crate::protobuf::Writer;
use crate::reply::{Classified, Detected, Informed, Nothing, Opened, Ran, Received, Registered};
use crate::request::{self, Ask, Piece, SCRATCH_BYTES, UPLOAD_BYTES};
use crate::shared::Shared;
use crate::text::Text;
use crate::transport::Transport;
use crate::types::{
    DType, Detection, File, ITEMS_MAX, Info, Label, NAME_BYTES_MAX, ResourceId, ResourceKind, SessionId,
    Timings,
};

/// How long a call may take when nothing else is said, in milliseconds.
const DEADLINE_MS: u32 = 60_000;

/// Files of one resource that a guest registers. The agent takes more; their descriptions have to fit in one request
/// here.
pub const FILES_MAX: usize = 8;

/// Things of one call: an agent gives no more.
const DETECTIONS_MAX: u32 = 1000;

/// Connections that may break during the upload of one resource.
const BREAKS_MAX: usize = 8;

/// A guest of one agent.
///
/// All its memory is in it (some 27 KiB): put it on the stack, in a `static` or in a box. It does nothing by itself
/// and belongs to one thread at a time.
///
/// Every call opens the connection and the session when they are not there, and again when they were lost, as long as
/// that cannot make the agent run something twice. A session that was lost took its resources with it: a guest that
/// had registered some gets `NOT_FOUND` with [`Error::session_lost`] and registers them again.
#[derive(Debug)]
pub struct Guest<T: Transport> {
    link: Link<T>,
    shared: Shared<T::Memory>,
    scratch: [u8; SCRATCH_BYTES],
    session: Option<SessionId>,
    /// The session holds something that a new one would not have.
    holds: bool,
    engine: Text<32>,
    device: Text<32>,
    hints: u32,
    deadline_ms: u32,
    repeatable: bool,
    reply_type: DType,
}

impl<T: Transport> Guest<T> {
    /// A guest that reaches its agent over `transport`. Nothing is sent yet.
    pub const fn new(transport: T) -> Self {
        Self {
            link: Link::new(transport),
            shared: Shared::new(),
            scratch: [0; SCRATCH_BYTES],
            session: None,
            holds: false,
            engine: Text::new(),
            device: Text::new(),
            hints: 0,
            deadline_ms: DEADLINE_MS,
            repeatable: false,
            reply_type: DType::Unspecified,
        }
    }

    /// The token that an agent on TCP may want; at most 256 bytes of it.
    pub fn set_token(&mut self, token: &str) {
        self.link.token = token.into();
    }

    /// How long each later call may take, in milliseconds, connecting included.
    pub fn set_deadline_ms(&mut self, deadline_ms: u32) {
        self.deadline_ms = deadline_ms;
    }

    /// Whether later calls may be run twice when the connection breaks under them. Classifications and runs of models
    /// only compute: running one twice does nothing but take time.
    pub fn set_repeatable(&mut self, repeatable: bool) {
        self.repeatable = repeatable;
    }

    /// [`DType::F16`] or [`DType::Bf16`] for half the bytes: what models give as `f32` comes back rounded to that.
    /// [`DType::Unspecified`] for outputs as they are.
    pub fn set_reply_type(&mut self, reply_type: DType) {
        self.reply_type = reply_type;
    }

    /// How many bytes of memory this guest and an agent on its machine may have together, behind a unix socket or TCP;
    /// 0 for none. There are none before the second run or generic operation with 32 KiB of data and more, and then as
    /// many as the longest one needs.
    pub fn set_shared_bytes(&mut self, bytes: usize) {
        self.shared.limit(bytes);
    }

    /// Whether later calls that always took the same time are awaited awake, from shortly before their answers on. They
    /// are if not said, where the transport has an exact clock; it takes some 4 % of a processor's time.
    pub fn set_awake(&mut self, awake: bool) {
        self.link.is_awake = awake;
    }

    /// Engine and device of later sessions; empty for the agent's choice.
    pub fn choose(&mut self, engine: &str, device: &str) {
        (self.engine, self.device) = (engine.into(), device.into());
    }

    /// Kinds of engines that later sessions wish for, in vAccel's bits of plugin types (CPU 1, GPU 2, …, DEBUG 256);
    /// any of them will do, and 0 is no wish. One that is absent is an error.
    pub fn wish(&mut self, hints: u32) {
        self.hints = hints;
    }

    /// What people are told about the last failed call.
    pub fn message(&self) -> &str {
        self.link.text.as_str()
    }

    /// The way to the agent.
    pub fn transport(&mut self) -> &mut T {
        &mut self.link.transport
    }

    /// Answers what the agent has asked between calls, such as whether this guest is still there. A guest that calls
    /// this more often than every 20 seconds keeps its connection; without it the next call opens another one.
    pub fn attend(&mut self) {
        self.link.attend();
    }

    /// What the agent is.
    ///
    /// # Errors
    /// `UNREACHABLE`, `UNAUTHENTICATED`, `DEADLINE` and so on.
    pub fn info(&mut self) -> Result<Info> {
        let mut informed = Informed::default();
        let until = self.until();
        self.plain("/vaccel.v1.Agent/Info", until, |_| {}, &mut informed)?;
        Ok(informed.info)
    }

    /// Opens a session, if there is none. Calls that need one do this by themselves.
    ///
    /// # Errors
    /// Those of [`Guest::info`], `DISABLED` for an engine or device that is not there, `QUOTA_EXCEEDED`.
    pub fn open(&mut self) -> Result<()> {
        let until = self.until();
        self.session(until).map(drop)
    }

    /// Ends the session and frees what it holds, and closes the connection.
    ///
    /// # Errors
    /// Those of [`Guest::info`]; the session then ends by its lease.
    pub fn close(&mut self) -> Result<()> {
        self.holds = false;
        let closed = match self.session.take() {
            None => Ok(()),
            Some(session) => {
                let until = self.until();
                match self.ask_once(&Ask::Close, &session, until, true, &mut Nothing) {
                    // It is gone already, which is what was wanted.
                    Err(error) if error.session_lost => Ok(()),
                    outcome => outcome,
                }
            }
        };
        self.link.close();
        self.shared.close();
        closed
    }

    /// Starts the session's lease anew; every other call does so too.
    ///
    /// # Errors
    /// Those of [`Guest::info`].
    pub fn renew(&mut self) -> Result<()> {
        self.ask(&Ask::Renew, &mut Nothing)
    }

    /// Does nothing, all the way to the agent's scheduler and back.
    ///
    /// # Errors
    /// Those of [`Guest::info`].
    pub fn noop(&mut self) -> Result<Timings> {
        let mut ran = Ran::default();
        self.ask(&Ask::Noop, &mut ran)?;
        Ok(ran.timings)
    }

    /// Classifies PNG or JPEG files, at most [`ITEMS_MAX`]: for each one its `labels.len() / images.len()` best
    /// classes, best first, one image after the other. Returns how many labels there are. Without a model it is the
    /// agent's own.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a file that is no image, `NOT_FOUND` for the model, `MODEL_REJECTED`, `MESSAGE_TOO_LARGE`,
    /// and those of [`Guest::info`].
    pub fn classify(
        &mut self,
        model: Option<&ResourceId>,
        images: &[&[u8]],
        labels: &mut [Label],
    ) -> Result<(usize, Timings)> {
        let top_k = labels.len().checked_div(images.len()).unwrap_or(0);
        if images.len() > ITEMS_MAX || top_k == 0 {
            return self.refuse("expected 1 to 16 images and a place for a label of each");
        }
        let top_k = u32::try_from(top_k).unwrap_or(u32::MAX);
        let mut classified = Classified::new(labels);
        let model = model.map_or(&[][..], ResourceId::as_bytes);
        self.ask(&Ask::Classify { model, top_k, images }, &mut classified)?;
        Ok((classified.count, classified.timings))
    }

    /// Finds things in a PNG or JPEG file with a model that describes itself, as many as there are places for and at
    /// most 1000, the most probable first. Returns how many there are. Those less probable than `threshold`, or with 0
    /// than the model says, are none. Without a model it is the agent's own for this, if it has one.
    ///
    /// # Errors
    /// Those of [`Guest::classify`].
    pub fn detect(
        &mut self,
        model: Option<&ResourceId>,
        image: &[u8],
        threshold: f32,
        detections: &mut [Detection],
    ) -> Result<(usize, Timings)> {
        if detections.is_empty() {
            return self.refuse("expected a place for at least one thing");
        }
        let at_most = u32::try_from(detections.len()).unwrap_or(DETECTIONS_MAX).min(DETECTIONS_MAX);
        let mut detected = Detected::new(detections);
        let model = model.map_or(&[][..], ResourceId::as_bytes);
        self.ask(&Ask::Detect { model, image, threshold, at_most }, &mut detected)?;
        Ok((detected.count, detected.timings))
    }

    /// Makes the session hold a resource; only what the agent lacks is sent. A file that broke off goes on where it
    /// stopped. It takes several calls, each of which has the deadline.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for files that cannot be, `QUOTA_EXCEEDED`, and those of [`Guest::info`].
    pub fn register(&mut self, kind: ResourceKind, files: &[File<'_>]) -> Result<ResourceId> {
        if files.is_empty()
            || files.len() > FILES_MAX
            || files.iter().any(|file| file.name.len() > NAME_BYTES_MAX)
        {
            return self.refuse("expected 1 to 8 files with names of at most 256 bytes");
        }
        let mut all = [[0; 32]; FILES_MAX];
        for (file, hash) in files.iter().zip(&mut all) {
            *hash = Sha256::digest(file.content).into();
        }
        let hashes = &all;
        // Each round sends one file, or learns that all are there. A file that came whole is not asked for again.
        for _ in 0..=FILES_MAX + BREAKS_MAX {
            let mut registered = Registered::new();
            self.ask(&Ask::Register { kind, files, hashes }, &mut registered)?;
            let Some((missing, has)) = registered.missing() else {
                self.holds = true;
                return registered.resource().ok_or(Error::new(Reason::BackendFailed));
            };
            let Some((file, hash)) = files.iter().zip(hashes).find(|(_, hash)| **hash == missing) else {
                break;
            };
            match self.upload(file.content, hash, has) {
                // The agent says how far it came.
                Err(error) if error.reason == Reason::Unreachable && error.may_have_run => {}
                outcome => outcome?,
            }
        }
        self.refuse("the agent keeps asking for files it was sent")
    }

    /// Sends a file from an offset to its end.
    fn upload(&mut self, content: &[u8], hash: &[u8; 32], mut offset: u64) -> Result<()> {
        let size = content.len() as u64;
        loop {
            let rest = usize::try_from(offset).ok().and_then(|at| content.get(at..)).unwrap_or_default();
            let data = rest.get(..UPLOAD_BYTES).unwrap_or(rest);
            let piece = Piece { hash: *hash, size, offset, data };
            let mut received = Received::default();
            self.ask(&Ask::Upload(piece), &mut received)?;
            if received.offset >= size {
                return Ok(());
            }
            if received.offset <= offset {
                return self.refuse("the agent takes nothing more of a file");
            }
            offset = received.offset;
        }
    }

    /// Lets a resource go.
    ///
    /// # Errors
    /// `NOT_FOUND` when the session does not hold it, and those of [`Guest::info`].
    pub fn unregister(&mut self, resource: &ResourceId) -> Result<()> {
        self.ask(&Ask::Unregister(resource), &mut Nothing)
    }
}

impl<T: Transport> Guest<T> {
    fn refuse<R>(&mut self, text: &str) -> Result<R> {
        self.fail(Reason::BadArgument, text)
    }

    fn fail<R>(&mut self, reason: Reason, text: &str) -> Result<R> {
        self.link.text.clear();
        self.link.text.push(text);
        Err(Error::new(reason))
    }

    fn until(&mut self) -> u64 {
        self.link.transport.now().saturating_add(u64::from(self.deadline_ms))
    }

    /// A call that needs no session, and that may be run twice.
    fn plain(
        &mut self,
        path: &str,
        until: u64,
        write: impl FnOnce(&mut Writer<'_>),
        reply: &mut dyn Reader,
    ) -> Result<()> {
        let parts = request::whole(&mut self.scratch, write)?;
        self.link.call(&Request { path, parts: parts.as_slice(), until, repeatable: true }, reply)
    }

    fn session(&mut self, until: u64) -> Result<SessionId> {
        if let Some(session) = self.session {
            return Ok(session);
        }
        let (engine, device, hints) = (self.engine, self.device, self.hints);
        let write = |writer: &mut Writer<'_>| {
            writer.bytes(1, device.as_bytes());
            writer.bytes(2, engine.as_bytes());
            writer.number(3, u64::from(hints));
        };
        let mut opened = Opened::new();
        // A session that was opened without this guest's hearing of it ends by its lease.
        self.plain("/vaccel.v1.Sessions/Open", until, write, &mut opened)?;
        self.session = opened.session();
        self.session.ok_or(Error::new(Reason::BackendFailed))
    }

    /// A call of the session. A session that the agent does not know any more ran nothing: unless it held resources,
    /// another one takes its place.
    fn ask(&mut self, ask: &Ask<'_>, reply: &mut dyn Reader) -> Result<()> {
        let until = self.until();
        self.ask_by(until, ask, reply)
    }

    fn ask_by(&mut self, until: u64, ask: &Ask<'_>, reply: &mut dyn Reader) -> Result<()> {
        let mut renewed = false;
        loop {
            let session = self.session(until)?;
            match self.ask_once(ask, &session, until, self.repeatable, reply) {
                Err(error) if error.session_lost => {
                    self.session = None;
                    if renewed || core::mem::take(&mut self.holds) {
                        return Err(error);
                    }
                    renewed = true;
                }
                outcome => return outcome,
            }
        }
    }

    fn ask_once(
        &mut self,
        ask: &Ask<'_>,
        session: &SessionId,
        until: u64,
        repeatable: bool,
        reply: &mut dyn Reader,
    ) -> Result<()> {
        let parts = ask.parts(&mut self.scratch, session).inspect_err(|_| {
            self.link.text.clear();
            self.link.text.push("the request is longer than a message may be");
        })?;
        self.link.call(&Request { path: ask.path(), parts: parts.as_slice(), until, repeatable }, reply)
    }
}
