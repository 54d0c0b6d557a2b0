//! Callers of unix sockets whose library puts the socket's path in `:authority`.
//!
//! gRPC's libraries for Python, C++, Java and Swift do so, as `%2Frun%2Fagent.sock` or as it is. HTTP/2 has no such
//! authority, and the server library refuses the call. Nothing here looks at the field, so it is made harmless on its
//! way in: percent signs and slashes become hyphens. Both encodings of a string have the same length for all three, so
//! that nothing else moves, neither in the frame nor in the table that later calls refer to.
//!
//! *Source:* RFC 9113, section 6.2 (frames), RFC 7541, sections 5 and 6 (fields), appendix B (the code of strings).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, ReadBuf};

use super::Stream;

const FRAME_HEADER_BYTES: usize = 9;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Bytes of a priority: a stream and a weight.
const PRIORITY_BYTES: usize = 5;
/// `:authority`: its place in the table that every connection begins with, and written out, as it is and in the code of
/// strings.
const AUTHORITY: usize = 1;
const WRITTEN: &[u8] = b":authority";
const CODED: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// A stream of HTTP/2 from such a caller.
pub(super) struct Lenient {
    stream: Box<dyn Stream>,
    /// Bytes to come that are no frame header: of the preface, then of frames.
    skip: usize,
    header: [u8; FRAME_HEADER_BYTES],
    header_bytes: usize,
    /// Fields that have not come whole, and how long they will be.
    held: Vec<u8>,
    whole: usize,
    flags: u8,
    /// Fields that have, and can be read.
    ready: Bytes,
}

impl Lenient {
    /// `preface` bytes come before the first frame.
    pub(super) fn new(stream: Box<dyn Stream>, preface: usize) -> Self {
        let (header, ready) = ([0; FRAME_HEADER_BYTES], Bytes::new());
        Self { stream, skip: preface, header, header_bytes: 0, held: Vec::new(), whole: 0, flags: 0, ready }
    }

    /// Follows the frames through what was read. Returns where fields begin that are not whole, if there are any.
    fn follow(&mut self, read: &mut [u8]) -> Option<usize> {
        let mut at = 0;
        while at < read.len() {
            if self.skip > 0 {
                let part = self.skip.min(read.len() - at);
                self.skip -= part;
                at += part;
                continue;
            }
            self.header[self.header_bytes] = read[at];
            self.header_bytes += 1;
            at += 1;
            if self.header_bytes < FRAME_HEADER_BYTES {
                continue;
            }
            self.header_bytes = 0;
            let [a, b, c, kind, flags, ..] = self.header;
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if kind != HEADERS {
                self.skip = length;
                continue;
            }
            match read.get_mut(at..at + length) {
                Some(payload) => {
                    soften(payload, flags);
                    at += length;
                }
                None => {
                    (self.whole, self.flags) = (length, flags);
                    return Some(at);
                }
            }
        }
        None
    }

    /// Reads more of fields that are not whole.
    fn poll_held(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let begun = self.held.len();
        self.held.resize(self.whole, 0);
        let mut rest = ReadBuf::new(&mut self.held[begun..]);
        let read = Pin::new(&mut self.stream).poll_read(context, &mut rest);
        let came = rest.filled().len();
        self.held.truncate(begun + came);
        ready!(read)?;
        if self.held.len() == self.whole || came == 0 {
            soften(&mut self.held, self.flags);
            self.ready = std::mem::take(&mut self.held).into();
            self.whole = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Lenient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.ready.has_remaining() {
                let part = this.ready.len().min(into.remaining());
                into.put_slice(&this.ready.split_to(part));
                return Poll::Ready(Ok(()));
            }
            if this.whole > 0 {
                ready!(this.poll_held(context))?;
                if this.whole == 0 && this.ready.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let before = into.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(context, into))?;
            let fresh = &mut into.filled_mut()[before..];
            let Some(begin) = this.follow(fresh) else { return Poll::Ready(Ok(())) };
            this.held = fresh[begin..].to_vec();
            into.set_filled(before + begin);
            if begin > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

writes_through!(Lenient);

/// Makes the authority in a frame of fields harmless. What is not as it should be is left to the server library.
fn soften(payload: &mut [u8], flags: u8) {
    let _ = authority(payload, flags).map(|(string, is_coded)| {
        if is_coded {
            soften_coded(string)
        } else {
            string.iter_mut().for_each(|byte| *byte = harmless(*byte))
        }
    });
}

fn harmless(byte: u8) -> u8 {
    if matches!(byte, b'%' | b'/') { b'-' } else { byte }
}

/// The string of the authority, and whether it is in the code of strings.
fn authority(payload: &mut [u8], flags: u8) -> Option<(&mut [u8], bool)> {
    let mut at = usize::from(flags & PADDED != 0) + if flags & PRIORITY != 0 { PRIORITY_BYTES } else { 0 };
    loop {
        let first = *payload.get(at)?;
        let is_field = first & 0x80 != 0;
        let is_size = first & 0xe0 == 0x20;
        let prefix = match first {
            _ if is_field => 7,
            _ if first & 0x40 != 0 => 6,
            _ if is_size => 5,
            _ => 4,
        };
        let name;
        (name, at) = number(payload, at, prefix)?;
        if is_field || is_size {
            continue;
        }
        let mut is_authority = name == AUTHORITY;
        if name == 0 {
            let is_coded = *payload.get(at)? & 0x80 != 0;
            let (length, begin) = number(payload, at, 7)?;
            at = begin.checked_add(length)?;
            is_authority = payload.get(begin..at)? == if is_coded { CODED } else { WRITTEN };
        }
        let is_coded = *payload.get(at)? & 0x80 != 0;
        let (length, begin) = number(payload, at, 7)?;
        at = begin.checked_add(length)?;
        if is_authority {
            return Some((payload.get_mut(begin..at)?, is_coded));
        }
    }
}

/// A number whose first byte has so many bits of it, and where it ends.
fn number(bytes: &[u8], at: usize, prefix: u32) -> Option<(usize, usize)> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(*bytes.get(at)?) & mask;
    let mut at = at + 1;
    if value < mask {
        return Some((value, at));
    }
    for shift in [0, 7, 14, 21] {
        let byte = *bytes.get(at)?;
        at += 1;
        value += (usize::from(byte) & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

/// The same in the code of strings: percent sign, slash and hyphen have six bits each.
fn soften_coded(string: &mut [u8]) {
    const PERCENT: u32 = 0b01_0101;
    const HYPHEN: u32 = 0b01_0110;
    const SLASH: u32 = 0b01_1000;
    let bits = string.len() * 8;
    let mut at = 0;
    while at + 6 <= bits {
        // Eight bits from here on, with ones behind the end.
        let byte = |index: usize| u32::from(string.get(index).copied().unwrap_or(0xff));
        let window = (byte(at / 8) << 8 | byte(at / 8 + 1)) >> (8 - at % 8) & 0xff;
        let length = match window {
            0..0b0101_0000 => 5,
            0b0101_0000..0b1011_1000 => 6,
            0b1011_1000..0b1111_1000 => 7,
            0b1111_1000..0b1111_1110 => 8,
            // Longer codes: characters that no path in a socket's name needs, or the end.
            _ => return,
        };
        if length == 6 && [PERCENT, SLASH].contains(&(window >> 2)) {
            for bit in 0..6 {
                let place = at + bit;
                let mask = 0x80 >> (place % 8);
                let is_set = HYPHEN >> (5 - bit) & 1 != 0;
                string[place / 8] = if is_set { string[place / 8] | mask } else { string[place / 8] & !mask };
            }
        }
        at += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// `:authority: text` with a name from the table, as it is.
    fn plain(text: &str) -> Vec<u8> {
        [&[0x41, u8::try_from(text.len()).expect("short")][..], text.as_bytes()].concat()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// What comes out of a connection on which this is sent, in pieces of a size.
    async fn through(sent: &[u8], piece: usize) -> Vec<u8> {
        let (mut peer, stream) = tokio::io::duplex(piece);
        let mut lenient = Lenient::new(Box::new(stream), 4);
        let (mut got, sent) = (Vec::new(), sent.to_vec());
        let writing = async move {
            peer.write_all(&sent).await.expect("it is read");
            drop(peer);
        };
        let (read, ()) = tokio::join!(lenient.read_to_end(&mut got), writing);
        read.expect("no error");
        got
    }

    #[tokio::test]
    async fn paths_become_names_however_they_are_cut() {
        let fields = |authority: &str| {
            let path = [&[0x44, 6][..], b"/a/%/b"].concat();
            let fields = [&[0x83, 0x86][..], &path, &plain(authority), &[0x40, 1, b'x', 1, b'/']].concat();
            let padded = [&[2, 0, 0, 0, 0, 16][..], &fields, &[0, 0]].concat();
            // With the name written out, too: as it is, and in the code of strings.
            let written = [&[0x40, 10][..], WRITTEN, &plain(authority)[1..]].concat();
            let coded = [&[0x00, 0x88][..], CODED, &plain(authority)[1..]].concat();
            [
                frame(HEADERS, 0x4, &fields),
                frame(0, 0, b"data %/"),
                frame(HEADERS, 0x4 | PADDED | PRIORITY, &padded),
                frame(HEADERS, 0x4, &written),
                frame(HEADERS, 0x4, &coded),
            ]
            .concat()
        };
        let sent = [&b"PRI%"[..], &frame(4, 0, &[]), &fields("%2Ftmp%2Fs/t.sock")].concat();
        let expected = [&b"PRI%"[..], &frame(4, 0, &[]), &fields("-2Ftmp-2Fs-t.sock")].concat();
        for piece in [1, 2, 3, 7, 16, 64, 4096] {
            assert_eq!(through(&sent, piece).await, expected, "{piece}");
        }
    }

    #[test]
    fn coded_strings_too() {
        // "%2Ftmp%2F-s" and "-2Ftmp-2F--s" in the code of strings, from its table: % 010101, 2 00010, F 1100010,
        // t 01001, m 101001, p 101011, - 010110, s 01000, / 011000.
        fn code(text: &str) -> Vec<u8> {
            let bits: String = text
                .chars()
                .map(|char| match char {
                    '%' => "010101",
                    '2' => "00010",
                    'F' => "1100010",
                    't' => "01001",
                    'm' => "101001",
                    'p' => "101011",
                    '-' => "010110",
                    's' => "01000",
                    '/' => "011000",
                    other => unreachable!("{other}"),
                })
                .collect();
            let padded = format!("{bits:1<width$}", width = bits.len().div_ceil(8) * 8);
            padded
                .as_bytes()
                .chunks(8)
                .map(|byte| byte.iter().fold(0, |all, bit| all << 1 | (bit & 1)))
                .collect()
        }
        for (path, name) in [("%2Ftmp%2F-s", "-2Ftmp-2F-s"), ("/tmp/s", "-tmp-s"), ("%", "-"), ("smt", "smt")]
        {
            let mut string = code(path);
            soften_coded(&mut string);
            assert_eq!(string, code(name), "{path}");
        }
    }

    #[test]
    fn anything_else_is_left_as_it_is() {
        for payload in
            [&[][..], &[0x41], &[0x41, 9, b'%'], &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff], &[0x00, 0x7f]]
        {
            let mut softened = payload.to_vec();
            soften(&mut softened, 0);
            soften(&mut softened, PADDED | PRIORITY);
            assert_eq!(softened, payload);
        }
    }
}
