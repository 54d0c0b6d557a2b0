//! Header blocks: written as literals, read with the static table. The guest allows no dynamic table, and a peer that
//! uses one all the same is refused, as does the async client. The agent, which has one, reads the same [`Field`]s.
//!
//! *Source:* RFC 7541.

use crate::huffman;

/// Why a block cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// A string as it stands in a block.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    Plain(&'a [u8]),
    Huffman(&'a [u8]),
}

/// The bytes of a string.
#[derive(Clone, Debug)]
pub enum Bytes<'a> {
    Plain(core::slice::Iter<'a, u8>),
    Huffman(huffman::Decoder<'a>),
}

impl Iterator for Bytes<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        match self {
            Self::Plain(bytes) => bytes.next().copied(),
            Self::Huffman(bytes) => bytes.next(),
        }
    }
}

impl<'a> Value<'a> {
    pub fn bytes(self) -> Bytes<'a> {
        match self {
            Self::Plain(bytes) => Bytes::Plain(bytes.iter()),
            Self::Huffman(string) => Bytes::Huffman(huffman::Decoder::new(string)),
        }
    }

    pub fn is(self, text: &[u8]) -> bool {
        self.bytes().eq(text.iter().copied())
    }

    pub(crate) fn starts_with(self, text: &[u8]) -> bool {
        self.bytes().take(text.len()).eq(text.iter().copied())
    }

    /// The number in decimal digits, if it is one below 2^32.
    pub fn number(self) -> Option<u32> {
        let mut bytes = self.bytes().peekable();
        bytes.peek()?;
        bytes.try_fold(0_u32, |number, byte| {
            let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
            number.checked_mul(10)?.checked_add(u32::from(digit))
        })
    }

    /// Whether the whole string can be read.
    fn check(self) -> Result<Self, Broken> {
        if let Self::Huffman(string) = self {
            let mut bytes = huffman::Decoder::new(string);
            bytes.by_ref().for_each(drop);
            if bytes.broken {
                return Err(Broken);
            }
        }
        Ok(self)
    }
}

/// The static table: names, and values where there are some.
#[rustfmt::skip]
static STATIC: [(&str, &str); 61] = [
    (":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html"),
    (":scheme", "http"), (":scheme", "https"), (":status", "200"), (":status", "204"), (":status", "206"),
    (":status", "304"), (":status", "400"), (":status", "404"), (":status", "500"), ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"), ("accept-language", ""), ("accept-ranges", ""), ("accept", ""),
    ("access-control-allow-origin", ""), ("age", ""), ("allow", ""), ("authorization", ""), ("cache-control", ""),
    ("content-disposition", ""), ("content-encoding", ""), ("content-language", ""), ("content-length", ""),
    ("content-location", ""), ("content-range", ""), ("content-type", ""), ("cookie", ""), ("date", ""), ("etag", ""),
    ("expect", ""), ("expires", ""), ("from", ""), ("host", ""), ("if-match", ""), ("if-modified-since", ""),
    ("if-none-match", ""), ("if-range", ""), ("if-unmodified-since", ""), ("last-modified", ""), ("link", ""),
    ("location", ""), ("max-forwards", ""), ("proxy-authenticate", ""), ("proxy-authorization", ""), ("range", ""),
    ("referer", ""), ("refresh", ""), ("retry-after", ""), ("server", ""), ("set-cookie", ""),
    ("strict-transport-security", ""), ("transfer-encoding", ""), ("user-agent", ""), ("vary", ""), ("via", ""),
    ("www-authenticate", ""),
];

/// The name of a written field.
#[derive(Clone, Copy, Debug)]
pub enum Name<'a> {
    /// That of an entry of the tables, by its number.
    Of(usize),
    Written(Value<'a>),
}

/// A field as it stands in a block.
#[derive(Clone, Copy, Debug)]
pub enum Field<'a> {
    /// An entry of the tables, by its number: from 1 the static one's, then the dynamic one's.
    Entry(usize),
    /// Written out, and whether it is to be kept in the dynamic table.
    Written { name: Name<'a>, value: Value<'a>, kept: bool },
    /// A new size of the dynamic table, in bytes.
    Size(usize),
}

/// An entry of the static table.
pub fn entry(number: usize) -> Option<(&'static str, &'static str)> {
    STATIC.get(number.checked_sub(1)?).copied()
}

/// Entries of the static table.
pub const ENTRIES: usize = STATIC.len();

/// The fields of a block, in order.
#[derive(Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub fn new(block: &'a [u8]) -> Self {
        Self { rest: block }
    }

    fn byte(&mut self) -> Result<u8, Broken> {
        let (byte, rest) = self.rest.split_first().ok_or(Broken)?;
        self.rest = rest;
        Ok(*byte)
    }

    /// An integer whose first byte, without its `prefix` lowest bits, was looked at already.
    fn integer(&mut self, prefix: u32) -> Result<usize, Broken> {
        let full = (1_usize << prefix) - 1;
        let mut value = usize::from(self.byte()?) & full;
        if value < full {
            return Ok(value);
        }
        // Nothing in a block of ours needs more than 28 bits.
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Broken)
    }

    fn string(&mut self) -> Result<Value<'a>, Broken> {
        let huffman = self.rest.first().ok_or(Broken)? & 0x80 != 0;
        let length = self.integer(7)?;
        let (string, rest) = self.rest.split_at_checked(length).ok_or(Broken)?;
        self.rest = rest;
        if huffman { Value::Huffman(string).check() } else { Ok(Value::Plain(string)) }
    }

    /// The next field; none at the end.
    #[allow(
        clippy::should_implement_trait,
        reason = "what cannot be read is no item: nothing comes after it"
    )]
    pub fn next(&mut self) -> Result<Option<Field<'a>>, Broken> {
        let Some(first) = self.rest.first() else { return Ok(None) };
        let (prefix, kept) = match first {
            0x80.. => return self.integer(7).map(|number| Some(Field::Entry(number))),
            0x40.. => (6, true),
            0x20.. => return self.integer(5).map(|size| Some(Field::Size(size))),
            _ => (4, false),
        };
        let name = match self.integer(prefix)? {
            0 => Name::Written(self.string()?),
            number => Name::Of(number),
        };
        Ok(Some(Field::Written { name, value: self.string()?, kept }))
    }
}

/// The headers of a block, in order, without a dynamic table.
#[derive(Debug)]
pub struct Headers<'a> {
    fields: Fields<'a>,
}

impl<'a> Headers<'a> {
    pub fn new(block: &'a [u8]) -> Self {
        Self { fields: Fields::new(block) }
    }

    /// The next header; none at the end.
    #[allow(
        clippy::should_implement_trait,
        reason = "what cannot be read is no item: nothing comes after it"
    )]
    pub fn next(&mut self) -> Result<Option<(Value<'a>, Value<'a>)>, Broken> {
        let of_table = |number| {
            let (name, value) = entry(number).ok_or(Broken)?;
            Ok((Value::Plain(name.as_bytes()), Value::Plain(value.as_bytes())))
        };
        loop {
            return Ok(Some(match self.fields.next()? {
                None => return Ok(None),
                Some(Field::Entry(number)) => of_table(number)?,
                // To be kept in a table of size 0: nothing is.
                Some(Field::Written { name: Name::Written(name), value, .. }) => (name, value),
                Some(Field::Written { name: Name::Of(number), value, .. }) => (of_table(number)?.0, value),
                Some(Field::Size(0)) => continue,
                Some(Field::Size(_)) => return Err(Broken),
            }));
        }
    }
}

/// Writes headers; what does not fit is noticed, not written.
#[derive(Debug)]
pub struct Writer<'a> {
    into: &'a mut [u8],
    length: usize,
    overflow: bool,
}

/// Entries of the static table that requests use.
pub const METHOD_POST: u8 = 3;
pub const SCHEME_HTTP: u8 = 6;
pub const SCHEME_HTTPS: u8 = 7;
pub const PATH: u8 = 4;
pub const AUTHORITY: u8 = 1;
pub const CONTENT_TYPE: u8 = 31;
pub const AUTHORIZATION: u8 = 23;
pub const USER_AGENT: u8 = 58;

impl<'a> Writer<'a> {
    pub fn new(into: &'a mut [u8]) -> Self {
        Self { into, length: 0, overflow: false }
    }

    /// Bytes written; none when not everything fitted.
    pub fn finish(self) -> Option<usize> {
        Some(self.length).filter(|_| !self.overflow)
    }

    fn put(&mut self, bytes: &[u8]) {
        let place = self.into.get_mut(self.length..).and_then(|rest| rest.get_mut(..bytes.len()));
        match place {
            Some(place) => {
                place.copy_from_slice(bytes);
                self.length += bytes.len();
            }
            None => self.overflow = true,
        }
    }

    fn integer(&mut self, pattern: u8, prefix: u32, value: usize) {
        let full = (1_usize << prefix) - 1;
        // Both are below 256.
        if value < full {
            return self.put(&[pattern | value as u8]);
        }
        self.put(&[pattern | full as u8]);
        let mut rest = value - full;
        while rest >= 0x80 {
            self.put(&[rest as u8 | 0x80]);
            rest >>= 7;
        }
        self.put(&[rest as u8]);
    }

    fn string(&mut self, bytes: &[u8]) {
        self.integer(0, 7, bytes.len());
        self.put(bytes);
    }

    /// A header of the static table as it stands.
    pub fn indexed(&mut self, index: u8) {
        self.integer(0x80, 7, usize::from(index));
    }

    /// A header whose name is in the static table.
    pub fn named(&mut self, index: u8, value: &[u8]) {
        self.integer(0, 4, usize::from(index));
        self.string(value);
    }

    /// The same for a secret, which nobody on the way may keep in a table.
    pub fn secret(&mut self, index: u8, parts: [&[u8]; 2]) {
        self.integer(0x10, 4, usize::from(index));
        self.integer(0, 7, parts.iter().map(|part| part.len()).sum());
        for part in parts {
            self.put(part);
        }
    }

    pub fn literal(&mut self, name: &[u8], value: &[u8]) {
        self.put(&[0]);
        self.string(name);
        self.string(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
        pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
    }

    fn read(block: &[u8]) -> Result<Vec<(String, String)>, Broken> {
        let mut headers = Headers::new(block);
        let text = |value: Value<'_>| String::from_utf8(value.bytes().collect()).unwrap();
        let mut read = Vec::new();
        while let Some((name, value)) = headers.next()? {
            read.push((text(name), text(value)));
        }
        Ok(read)
    }

    /// RFC 7541, C.2, C.3.1, C.4.1, C.5.1 and C.6.1: those that need no dynamic table.
    #[test]
    fn the_examples_of_the_standard_are_read() {
        let request =
            [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
        let reply = [
            (":status", "302"),
            ("cache-control", "private"),
            ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
            ("location", "https://www.example.com"),
        ];
        let cases: [(&str, &[(&str, &str)]); 8] = [
            (
                "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572",
                &[("custom-key", "custom-header")],
            ),
            ("040c 2f73 616d 706c 652f 7061 7468", &[(":path", "/sample/path")]),
            ("1008 7061 7373 776f 7264 0673 6563 7265 74", &[("password", "secret")]),
            ("82", &[(":method", "GET")]),
            ("8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d", &request),
            ("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", &request),
            (
                "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 \
                 3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                &reply,
            ),
            (
                "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad \
                 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
                &reply,
            ),
        ];
        for (block, expected) in cases {
            let expected: Vec<_> = expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
            assert_eq!(read(&hex(block)).unwrap(), expected, "{block}");
        }
    }

    #[test]
    fn what_needs_a_dynamic_table_or_is_cut_is_refused() {
        for block in [
            "be",
            "80",
            "7e 00",
            "3f e1 1f",
            "82 04",
            "04 05 61",
            "04 ff ff ff ff ff 0f",
            "04 81 00",
            "04 81 fe",
        ] {
            assert_eq!(read(&hex(block)), Err(Broken), "{block}");
        }
        assert_eq!(
            read(&hex("20 82")).unwrap(),
            [(":method".to_owned(), "GET".to_owned())],
            "a size of 0 is ours"
        );
    }

    #[test]
    fn every_byte_survives_the_huffman_code() {
        // Encoded by the table itself, which the standard's examples hold.
        for byte in 0..=u8::MAX {
            let string = encode(&[byte, b'a', byte]);
            assert!(Value::Huffman(&string).check().is_ok(), "{byte}");
            assert!(Value::Huffman(&string).is(&[byte, b'a', byte]), "{byte}");
        }
    }

    #[test]
    fn a_huffman_string_is_what_its_bytes_encode_to_or_none() {
        let mut whole = 0;
        for string in 0..=u16::MAX {
            let string = string.to_be_bytes();
            for string in [&string[..1], &string, &[&[0xff, 0xff][..], &string].concat()] {
                if let Ok(value) = Value::Huffman(string).check() {
                    assert_eq!(encode(&value.bytes().collect::<Vec<_>>()), string);
                    whole += 1;
                }
            }
        }
        assert!(whole > 1000, "{whole}");
    }

    fn encode(bytes: &[u8]) -> Vec<u8> {
        let mut bits = Vec::new();
        for byte in bytes {
            let (code, length) = huffman::code(*byte);
            bits.extend((0..length).rev().map(|bit| code >> bit & 1));
        }
        bits.resize(bits.len().next_multiple_of(8), 1);
        bits.chunks(8).map(|byte| byte.iter().fold(0, |byte, bit| byte << 1 | *bit as u8)).collect()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut block = [0; 600];
        let long = "x".repeat(400);
        let mut writer = Writer::new(&mut block);
        writer.indexed(METHOD_POST);
        writer.named(CONTENT_TYPE, b"application/grpc");
        writer.named(PATH, long.as_bytes());
        writer.literal(b"te", b"trailers");
        writer.secret(AUTHORIZATION, [b"Bearer ", b"token"]);
        let length = writer.finish().unwrap();
        let read = read(&block[..length]).unwrap();
        let names: Vec<&str> = read.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [":method", "content-type", ":path", "te", "authorization"]);
        assert_eq!(read[2].1, long);
        assert_eq!(read[4].1, "Bearer token");
        let mut small = [0; 5];
        let mut writer = Writer::new(&mut small);
        writer.literal(b"te", b"trailers");
        assert!(writer.finish().is_none());
    }

    #[test]
    fn numbers_are_decimal_and_bounded() {
        for (text, number) in
            [("0", Some(0)), ("200", Some(200)), ("", None), ("2x", None), ("4294967296", None)]
        {
            assert_eq!(Value::Plain(text.as_bytes()).number(), number, "{text}");
        }
    }
}
