//! Header blocks: requests' with the dynamic table that peers may use, replies' as literals.
//!
//! *Source:* RFC 7541 (the blocks), RFC 9113, section 8 (what a request must have).

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use vaccel_guest::hpack::{self, Broken, Field, Fields, Name, Value};

/// Bytes of the dynamic table: what a peer may take for granted.
const TABLE_BYTES_MAX: usize = 4096;

/// What an entry takes beside its name and its value.
const ENTRY_BYTES: usize = 32;

/// One field, understood: what is kept in the table is not read again.
#[derive(Clone, Debug)]
enum Entry {
    Method(Method),
    Path(Uri),
    /// Nothing here asks for it. Some of gRPC's libraries put a socket's path there, which no authority can be.
    Authority,
    Scheme,
    Header(HeaderName, HeaderValue),
    /// Nothing that a request may have.
    Wrong,
}

impl Entry {
    fn new(name: &[u8], value: Bytes) -> Self {
        let parsed = match name {
            b":method" => Method::from_bytes(&value).ok().map(Self::Method),
            b":path" if matches!(value.first(), Some(b'/' | b'*')) => {
                PathAndQuery::from_maybe_shared(value).ok().map(|path| Self::Path(path.into()))
            }
            b":path" => None,
            b":authority" => Some(Self::Authority),
            b":scheme" => Some(Self::Scheme),
            _ => Self::header(name, value),
        };
        parsed.unwrap_or(Self::Wrong)
    }

    fn header(name: &[u8], value: Bytes) -> Option<Self> {
        if name.iter().any(u8::is_ascii_uppercase) {
            return None;
        }
        let name = HeaderName::from_bytes(name).ok()?;
        let belongs_to_connections = match name.as_str() {
            "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade" => true,
            "te" => &value[..] != b"trailers",
            _ => false,
        };
        let value = HeaderValue::from_maybe_shared(value).ok()?;
        Some(Self::Header(name, value)).filter(|_| !belongs_to_connections)
    }
}

/// What a peer's fields say, with what they refer to.
#[derive(Debug)]
pub(super) struct Table<H> {
    /// The newest first, each with its name as it was written and its size.
    entries: VecDeque<(Bytes, Entry, usize)>,
    bytes: usize,
    /// What the peer made of [`TABLE_BYTES_MAX`], none as long as it says nothing.
    bytes_max: Option<usize>,
    /// How often it changed.
    changes: u64,
    last: Option<Last<H>>,
}

impl<H> Default for Table<H> {
    fn default() -> Self {
        Self { entries: VecDeque::new(), bytes: 0, bytes_max: None, changes: 0, last: None }
    }
}

/// The last block and what it meant: most callers say the same thing again and again.
#[derive(Debug)]
struct Last<H> {
    block: Vec<u8>,
    changes: u64,
    head: Arc<H>,
}

/// Longer blocks are read every time, in bytes: what is kept of them would be held for every connection.
const LAST_BYTES_MAX: usize = 512;

/// What a block is.
#[derive(Debug)]
pub(super) enum Block<H> {
    /// A request, and what was made of it.
    Request(Arc<H>),
    /// The peer's mistake, in this request alone.
    Wrong,
    /// More than a request may have.
    TooLarge,
}

/// A request as far as it was read.
#[derive(Default)]
struct Parts {
    method: Option<Method>,
    path: Option<Uri>,
    has_scheme: bool,
    headers: HeaderMap,
    bytes: usize,
    is_wrong: bool,
}

impl Parts {
    fn add(&mut self, entry: Entry, bytes: usize, bytes_max: usize) {
        self.bytes += bytes;
        if self.bytes > bytes_max {
            return;
        }
        let is_late = !self.headers.is_empty();
        let twice = match entry {
            Entry::Method(method) => is_late || self.method.replace(method).is_some(),
            Entry::Path(path) => is_late || self.path.replace(path).is_some(),
            Entry::Scheme => is_late || std::mem::replace(&mut self.has_scheme, true),
            Entry::Authority => is_late,
            Entry::Header(name, value) => {
                self.headers.append(name, value);
                false
            }
            Entry::Wrong => true,
        };
        self.is_wrong |= twice;
    }

    fn finish<H>(self, bytes_max: usize, understand: impl FnOnce(Request<()>) -> H) -> Block<H> {
        if self.bytes > bytes_max {
            return Block::TooLarge;
        }
        let (Some(method), Some(path), true, false) =
            (self.method, self.path, self.has_scheme, self.is_wrong)
        else {
            return Block::Wrong;
        };
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = path;
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = self.headers;
        Block::Request(Arc::new(understand(request)))
    }
}

impl<H> Table<H> {
    /// Reads a block whose fields take at most so many bytes, counted as the protocol does. What is kept of them must
    /// be read even where nobody is interested in the rest. A request that is not the last one again is to be
    /// understood.
    ///
    /// # Errors
    /// A block after which nothing else can be read.
    pub(super) fn read(
        &mut self,
        block: &[u8],
        bytes_max: usize,
        understand: impl FnOnce(Request<()>) -> H,
    ) -> Result<Block<H>, Broken> {
        if let Some(last) =
            self.last.as_ref().filter(|last| last.changes == self.changes && last.block == block)
        {
            return Ok(Block::Request(Arc::clone(&last.head)));
        }
        let before = self.changes;
        let read = self.read_anew(block, bytes_max)?.finish(bytes_max, understand);
        if let Block::Request(head) = &read
            && block.len() <= LAST_BYTES_MAX
            && self.changes == before
        {
            self.last = Some(Last { block: block.to_vec(), changes: before, head: Arc::clone(head) });
        }
        Ok(read)
    }

    fn read_anew(&mut self, block: &[u8], bytes_max: usize) -> Result<Parts, Broken> {
        let mut fields = Fields::new(block);
        let mut parts = Parts::default();
        while let Some(field) = fields.next()? {
            match field {
                Field::Entry(number) => {
                    let (entry, bytes) = self.entry(number)?;
                    parts.add(entry, bytes, bytes_max);
                }
                Field::Written { name, value, kept } => {
                    let name = match name {
                        Name::Written(name) => text(name),
                        Name::Of(number) => self.name(number)?,
                    };
                    let value = text(value);
                    let bytes = name.len() + value.len() + ENTRY_BYTES;
                    let entry = Entry::new(&name, value);
                    if kept {
                        self.keep(name, entry.clone(), bytes);
                    }
                    parts.add(entry, bytes, bytes_max);
                }
                Field::Size(size) if size <= TABLE_BYTES_MAX => {
                    self.changes += 1;
                    self.bytes_max = Some(size);
                    self.shrink(size);
                }
                Field::Size(_) => return Err(Broken),
            }
        }
        Ok(parts)
    }

    fn entry(&self, number: usize) -> Result<(Entry, usize), Broken> {
        if let Some((name, value)) = hpack::entry(number) {
            let entry = Entry::new(name.as_bytes(), Bytes::from_static(value.as_bytes()));
            return Ok((entry, name.len() + value.len() + ENTRY_BYTES));
        }
        let (_, entry, bytes) = self.own(number)?;
        Ok((entry.clone(), *bytes))
    }

    fn name(&self, number: usize) -> Result<Bytes, Broken> {
        match hpack::entry(number) {
            Some((name, _)) => Ok(Bytes::from_static(name.as_bytes())),
            None => self.own(number).map(|(name, ..)| name.clone()),
        }
    }

    fn own(&self, number: usize) -> Result<&(Bytes, Entry, usize), Broken> {
        number.checked_sub(hpack::ENTRIES + 1).and_then(|index| self.entries.get(index)).ok_or(Broken)
    }

    fn keep(&mut self, name: Bytes, entry: Entry, bytes: usize) {
        self.changes += 1;
        let limit = self.bytes_max.unwrap_or(TABLE_BYTES_MAX);
        self.shrink(limit.saturating_sub(bytes));
        // One that is larger than the table empties it, and that is all.
        if bytes <= limit {
            self.bytes += bytes;
            self.entries.push_front((name, entry, bytes));
        }
    }

    fn shrink(&mut self, size: usize) {
        while self.bytes > size
            && let Some((.., bytes)) = self.entries.pop_back()
        {
            self.bytes -= bytes;
        }
    }
}

fn text(value: Value<'_>) -> Bytes {
    match value {
        Value::Plain(bytes) => Bytes::copy_from_slice(bytes),
        Value::Huffman(_) => value.bytes().collect(),
    }
}

/// Entries of the static table that replies use.
const STATUS: u8 = 8;
const CONTENT_LENGTH: u8 = 28;
const CONTENT_TYPE: u8 = 31;

/// Statuses that are whole entries of the static table.
const STATUSES: [(u16, u8); 7] = [(200, 8), (204, 9), (206, 10), (304, 11), (400, 12), (404, 13), (500, 14)];

/// The block of a reply's head.
pub(super) fn write_head(status: StatusCode, headers: &HeaderMap, into: &mut Vec<u8>) {
    match STATUSES.iter().find(|(code, _)| *code == status.as_u16()) {
        Some((_, number)) => into.push(0x80 | number),
        None => {
            into.push(STATUS);
            write_string(status.as_str().as_bytes(), into);
        }
    }
    write(headers, into);
}

/// The block of fields.
pub(super) fn write(headers: &HeaderMap, into: &mut Vec<u8>) {
    for (name, value) in headers {
        let known = match *name {
            http::header::CONTENT_TYPE => Some(CONTENT_TYPE),
            http::header::CONTENT_LENGTH => Some(CONTENT_LENGTH),
            _ => None,
        };
        // Four bits of the first byte are the number; 15 and more go on in the next.
        match known {
            Some(number) => into.extend([0x0f, number - 15]),
            None => {
                into.push(0);
                write_string(name.as_str().as_bytes(), into);
            }
        }
        write_string(value.as_bytes(), into);
    }
}

fn write_string(bytes: &[u8], into: &mut Vec<u8>) {
    const FULL: usize = 0x7f;
    let mut rest = bytes.len();
    if rest < FULL {
        into.push(low(rest));
    } else {
        into.push(low(FULL));
        rest -= FULL;
        while rest > FULL {
            into.push(low(rest & FULL) | 0x80);
            rest >>= 7;
        }
        into.push(low(rest));
    }
    into.extend_from_slice(bytes);
}

/// The lowest byte of a number.
fn low(number: usize) -> u8 {
    number.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 16 << 10;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).expect("digits"));
        pairs.map(|pair| u8::from_str_radix(pair, 16).expect("digits")).collect()
    }

    fn read(table: &mut Table<Request<()>>, block: &[u8]) -> Result<Block<Request<()>>, Broken> {
        table.read(block, LIMIT, |request| request)
    }

    fn request(table: &mut Table<Request<()>>, block: &str) -> Request<()> {
        match read(table, &hex(block)) {
            Ok(Block::Request(request)) => (*request).clone(),
            other => panic!("{other:?}"),
        }
    }

    /// RFC 7541, C.3 and C.4: three requests that use what the ones before have left.
    #[test]
    fn the_examples_of_the_standard_are_read() {
        let plain = [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ];
        let coded = [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ];
        for blocks in [plain, coded] {
            let mut table = Table::default();
            let [first, second, third] = blocks.map(|block| request(&mut table, block));
            assert_eq!((first.uri().path(), second.uri().path()), ("/", "/"));
            assert_eq!(second.headers()["cache-control"], "no-cache");
            assert_eq!(third.uri().path(), "/index.html");
            assert_eq!(third.headers()["custom-key"], "custom-value");
            assert_eq!((table.entries.len(), table.bytes), (3, 164));
        }
    }

    #[test]
    fn the_table_forgets_what_is_oldest() {
        let mut table = Table::default();
        let head = "8286 84";
        // 32 + 1 + 1 bytes each.
        request(&mut table, &format!("{head} 4001 6101 31 4001 6201 32"));
        let both = request(&mut table, &format!("{head} be bf"));
        assert_eq!(
            (&both.headers()["b"], &both.headers()["a"]),
            (&"2".parse().expect("valid"), &"1".parse().expect("valid"))
        );
        request(&mut table, &format!("3f03 {head}"));
        assert_eq!(table.bytes, 34, "of 34 bytes, which has room for one");
        assert_eq!(request(&mut table, &format!("{head} be")).headers()["b"], "2");
        assert!(read(&mut table, &hex("bf")).is_err(), "it is gone");
        request(&mut table, &format!("20 {head}"));
        assert_eq!((table.bytes, table.entries.len()), (0, 0));
        assert!(read(&mut table, &hex("be")).is_err());
        assert!(read(&mut table, &hex("3fe2 1f")).is_err(), "more than its 4096 bytes");
        // What is larger than the table is read, and not kept.
        assert_eq!(request(&mut table, &format!("{head} 4001 6301 33")).headers()["c"], "3");
        assert!(table.entries.is_empty());
    }

    #[test]
    fn a_block_that_comes_again_means_what_the_table_says_now() {
        let mut table = Table::default();
        let head = "8286 84";
        request(&mut table, &format!("{head} 4001 6101 31"));
        let again = format!("{head} be");
        for _ in 0..3 {
            assert_eq!(request(&mut table, &again).headers()["a"], "1");
        }
        request(&mut table, &format!("{head} 4001 6101 32"));
        assert_eq!(request(&mut table, &again).headers()["a"], "2");
        request(&mut table, &format!("20 {head}"));
        assert!(read(&mut table, &hex(&again)).is_err());
    }

    #[test]
    fn what_is_no_request_is_told_from_what_is_no_block() {
        for (block, why) in [
            ("82 86", "no path"),
            ("82 84", "no scheme"),
            ("86 84", "no method"),
            ("82 82 86 84", "two methods"),
            ("82 86 84 84", "two paths"),
            ("82 86 84 0001 4101 61", "capitals"),
            ("82 86 84 000a 636f 6e6e 6563 7469 6f6e 0161", "connection"),
            ("82 86 84 0002 7465 0161", "te that is not trailers"),
            ("82 86 84 0001 6101 61 82", "a method behind a header"),
            ("88 82 86 84", "a status"),
            ("82 86 04 0161", "a path that is none"),
            ("82 86 84 0001 6101 0a", "a line break in a value"),
        ] {
            let read = read(&mut Table::default(), &hex(block));
            assert!(matches!(read, Ok(Block::Wrong)), "{why}: {read:?}");
        }
        for block in ["be", "80", "82 04", "3f e2 1f", "04 ff ff ff ff ff 0f"] {
            assert!(read(&mut Table::default(), &hex(block)).is_err(), "{block}");
        }
    }

    #[test]
    fn a_block_can_refer_to_more_than_a_request_may_have() {
        let mut table = Table::default();
        let long = format!("82 86 84 4001 617f 8107 {}", "62".repeat(1024));
        request(&mut table, &long);
        let many = hex(&format!("82 86 84 {}", "be".repeat(60)));
        assert!(matches!(read(&mut table, &many), Ok(Block::TooLarge)));
    }

    #[test]
    fn a_socket_s_path_is_no_authority_and_no_harm() {
        let mut block = hex("83 86");
        for (number, value) in [(0x41, &b"%2Frun%2Fagent.sock"[..]), (0x44, b"/a/%/b?c")] {
            block.push(number);
            write_string(value, &mut block);
        }
        let read = read(&mut Table::default(), &block);
        let Ok(Block::Request(request)) = read else { panic!("{read:?}") };
        assert_eq!(
            (request.method(), request.uri()),
            (&Method::POST, &"/a/%/b?c".parse::<Uri>().expect("valid"))
        );
    }

    #[test]
    fn replies_are_read_as_they_were_written() {
        let headers: HeaderMap =
            [("content-type", "application/grpc"), ("x", &"y".repeat(300)), ("grpc-status", "0")]
                .into_iter()
                .map(|(name, value)| {
                    (name.parse::<HeaderName>().expect("valid"), value.parse().expect("valid"))
                })
                .collect();
        for status in [200, 404, 418] {
            let mut block = Vec::new();
            write_head(StatusCode::from_u16(status).expect("valid"), &headers, &mut block);
            let mut fields = Fields::new(&block);
            let mut read = Vec::new();
            while let Some(field) = fields.next().expect("a block") {
                let of = |number| hpack::entry(number).expect("static");
                read.push(match field {
                    Field::Entry(number) => (of(number).0.to_owned(), of(number).1.to_owned()),
                    Field::Written { name, value, kept: false } => {
                        let name = match name {
                            Name::Of(number) => of(number).0.to_owned(),
                            Name::Written(name) => String::from_utf8(text(name).to_vec()).expect("text"),
                        };
                        (name, String::from_utf8(text(value).to_vec()).expect("text"))
                    }
                    other => panic!("{other:?}"),
                });
            }
            assert_eq!(read.remove(0), (":status".to_owned(), status.to_string()));
            let written = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().expect("text")));
            assert!(read.iter().map(|(name, value)| (&**name, &**value)).eq(written));
        }
    }
}
