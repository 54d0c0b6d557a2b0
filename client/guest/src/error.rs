//! Why a call failed: the table of reasons of the contract, without what needs memory.
//!
//! An [`Error`] is small and says what a program needs; the text for people of the last one is kept by the guest
//! ([`Guest::message`](crate::Guest::message)).

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $code:literal, $errno:literal;)*) => {
        /// Why a call failed. Each reason has a gRPC status code and the Linux `errno` that vAccel programs know.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// All reasons, in the contract's order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Name on the wire and in documents.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// gRPC status code.
            pub const fn code(self) -> u8 {
                match self { $(Self::$variant => $code,)* }
            }

            /// Linux `errno`.
            pub const fn errno(self) -> i32 {
                match self { $(Self::$variant => $errno,)* }
            }
        }
    };
}

reasons! {
    /// The request is wrong: a size, a shape, a name, bytes that are not what they should be.
    BadArgument = "BAD_ARGUMENT", 3, 22;
    /// More bytes than there may be.
    MessageTooLarge = "MESSAGE_TOO_LARGE", 8, 7;
    /// The agent has no such operation.
    UnknownOperation = "UNKNOWN_OPERATION", 12, 95;
    /// It exists and is not available there.
    Disabled = "DISABLED", 9, 1;
    /// No valid credentials.
    Unauthenticated = "UNAUTHENTICATED", 16, 13;
    /// Known, and not allowed.
    Denied = "DENIED", 7, 13;
    /// Absent, or somebody else's.
    NotFound = "NOT_FOUND", 5, 2;
    /// Something of that name is there.
    AlreadyExists = "ALREADY_EXISTS", 6, 17;
    /// The engine, or the scan before it, refused the model.
    ModelRejected = "MODEL_REJECTED", 9, 8;
    /// The tenant's limit is used up.
    QuotaExceeded = "QUOTA_EXCEEDED", 8, 122;
    /// The agent cannot take the call now.
    Overloaded = "OVERLOADED", 14, 11;
    /// The agent is about to stop.
    ShuttingDown = "SHUTTING_DOWN", 14, 11;
    /// No connection, or it broke.
    Unreachable = "UNREACHABLE", 14, 111;
    /// The call's time is over.
    Deadline = "DEADLINE", 4, 110;
    /// The call was given up.
    Cancelled = "CANCELLED", 1, 125;
    /// The backend failed, or what came back is no answer.
    BackendFailed = "BACKEND_FAILED", 13, 5;
    /// What the call refers to outside of it cannot be used.
    Unusable = "UNUSABLE", 13, 5;
}

impl Reason {
    /// The nearest reason for a status that names none: from something between guest and agent, or another server.
    pub(crate) fn from_code(code: u8) -> Self {
        match code {
            11 => Self::MessageTooLarge,
            14 => Self::Unreachable,
            8 => Self::QuotaExceeded,
            9 => Self::Disabled,
            code => {
                Self::ALL.iter().copied().find(|reason| reason.code() == code).unwrap_or(Self::BackendFailed)
            }
        }
    }
}

/// A failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// Why.
    pub reason: Reason,
    /// When the agent asks to try again, in milliseconds; 0 when it does not say.
    pub retry_after_ms: u32,
    /// Whether the agent may have run the call.
    pub may_have_run: bool,
    /// The agent does not know the session any more: its lease ended, or the agent was restarted.
    pub session_lost: bool,
    /// The agent does not know the memory that the call's tensors lay in, and has done nothing.
    pub(crate) region_lost: bool,
}

impl Error {
    pub(crate) const fn new(reason: Reason) -> Self {
        Self { reason, retry_after_ms: 0, may_have_run: false, session_lost: false, region_lost: false }
    }
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.reason.name())
    }
}

impl core::error::Error for Error {}

/// What most functions return.
pub type Result<T> = core::result::Result<T, Error>;
