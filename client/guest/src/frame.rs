//! HTTP/2 frames.
//!
//! *Source:* RFC 9113, sections 4.1, 6 and 7.

/// What every connection of a client begins with.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Length, type, flags, stream.
pub const HEADER_BYTES: usize = 9;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
/// A call is about to come: whoever is going to work on it may wake. None of the RFC's, by which those who do not know
/// it pass over it (5.5).
pub const ALERT: u8 = 0xfa;

pub const END_STREAM: u8 = 0x1;
pub const ACK: u8 = 0x1;
pub const END_HEADERS: u8 = 0x4;
pub const PADDED: u8 = 0x8;
pub const PRIORITY: u8 = 0x20;

/// Error codes of RST_STREAM and GOAWAY.
pub const NO_ERROR: u32 = 0;
pub const PROTOCOL_ERROR: u32 = 1;
pub const INTERNAL_ERROR: u32 = 2;
pub const FLOW_CONTROL_ERROR: u32 = 3;
pub const FRAME_SIZE_ERROR: u32 = 6;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const COMPRESSION_ERROR: u32 = 9;
pub const ENHANCE_YOUR_CALM: u32 = 11;

/// Settings.
pub const HEADER_TABLE_SIZE: u16 = 1;
pub const ENABLE_PUSH: u16 = 2;
pub const MAX_CONCURRENT_STREAMS: u16 = 3;
pub const INITIAL_WINDOW_SIZE: u16 = 4;
pub const MAX_FRAME_SIZE: u16 = 5;
pub const MAX_HEADER_LIST_SIZE: u16 = 6;

/// What holds until a peer's settings say otherwise.
pub const WINDOW_DEFAULT: i64 = 65_535;
pub const FRAME_BYTES_DEFAULT: usize = 16_384;
/// The largest window, and the largest frame a peer may name.
pub const WINDOW_MAX: u32 = 0x7fff_ffff;
pub const FRAME_BYTES_MAX: usize = 0x00ff_ffff;

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub length: usize,
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
}

impl Header {
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let [_, high, middle, low] = (self.length as u32).to_be_bytes();
        let [a, b, c, d] = self.stream.to_be_bytes();
        [high, middle, low, self.kind, self.flags, a, b, c, d]
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let [high, middle, low, kind, flags, a, b, c, d] = *bytes;
        let length = u32::from_be_bytes([0, high, middle, low]) as usize;
        // The highest bit of the stream is reserved.
        Self { length, kind, flags, stream: u32::from_be_bytes([a & 0x7f, b, c, d]) }
    }

    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}
