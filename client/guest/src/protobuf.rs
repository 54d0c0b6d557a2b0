//! Protocol Buffers: just what the contract's messages need, written into a given place and read as they come.

/// Messages inside messages that are read; the contract has 5.
const DEPTH_MAX: usize = 8;

/// Encoded length of a number.
pub(crate) const fn varint_len(value: u64) -> usize {
    // 7 bits a byte, at least one.
    (70 - (value | 1).leading_zeros() as usize) / 7
}

/// Encoded length of a length-delimited field with a tag of one byte and `length` bytes of content.
pub(crate) const fn field_len(length: usize) -> usize {
    1 + varint_len(length as u64) + length
}

const LENGTH_DELIMITED: u64 = 2;
const FIXED: u64 = 5;

/// Bytes of a field that is a number of 4 bytes: a tag of one, and the number.
pub(crate) const FIXED_BYTES: usize = 5;

/// Writes fields; what does not fit is noticed, not written.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    into: &'a mut [u8],
    length: usize,
    overflow: bool,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(into: &'a mut [u8]) -> Self {
        Self { into, length: 0, overflow: false }
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// What was written; none when not everything fitted.
    pub(crate) fn finish(self) -> Option<&'a [u8]> {
        let into: &'a [u8] = self.into;
        into.get(..self.length).filter(|_| !self.overflow)
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        let place = self.into.get_mut(self.length..).and_then(|rest| rest.get_mut(..bytes.len()));
        match place {
            Some(place) => {
                place.copy_from_slice(bytes);
                self.length += bytes.len();
            }
            None => self.overflow = true,
        }
    }

    pub(crate) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.put(&[value as u8 | 0x80]);
            value >>= 7;
        }
        self.put(&[value as u8]);
    }

    /// A number, unless it is 0, which is what an absent one means.
    pub(crate) fn number(&mut self, field: u32, value: u64) {
        if value != 0 {
            self.varint(u64::from(field) << 3);
            self.varint(value);
        }
    }

    /// A number of 4 bytes, unless it is 0, as an absent one is.
    pub(crate) fn fixed(&mut self, field: u32, value: f32) {
        if value != 0.0 {
            self.varint(u64::from(field) << 3 | FIXED);
            self.put(&value.to_le_bytes());
        }
    }

    /// The beginning of a field of so many bytes.
    pub(crate) fn begin(&mut self, field: u32, length: usize) {
        self.varint(u64::from(field) << 3 | LENGTH_DELIMITED);
        self.varint(length as u64);
    }

    /// Bytes or text, unless there are none, which is what an absent field means.
    pub(crate) fn bytes(&mut self, field: u32, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.begin(field, bytes.len());
            self.put(bytes);
        }
    }

    pub(crate) fn zeros(&mut self, field: u32, count: usize) {
        if count > 0 {
            self.begin(field, count);
            (0..count).for_each(|_| self.put(&[0]));
        }
    }
}

/// What is done with a field that has a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Take {
    /// It is a message: read its fields.
    Enter,
    /// Put its bytes in the places the reader gives.
    Bytes,
    /// Pass over it.
    Skip,
}

/// What reads a message: told of each field by the numbers of the fields it is in, outermost first, and its own. It
/// may be told of fields in any order and more than once.
pub(crate) trait Reader {
    /// A field of `length` bytes begins.
    ///
    /// # Errors
    /// There is no place for it.
    fn begin(&mut self, _path: &[u32], _length: usize) -> Reading<Take> {
        Ok(Take::Skip)
    }

    /// A number, or 4 or 8 bytes as one.
    ///
    /// # Errors
    /// There is no place for it.
    fn number(&mut self, _path: &[u32], _value: u64) -> Reading<()> {
        Ok(())
    }

    /// Where the next bytes of the field that was taken go; nowhere to pass over the rest.
    fn place(&mut self) -> &mut [u8] {
        &mut []
    }

    /// So many of them are there.
    fn placed(&mut self, _count: usize) {}

    /// A message that was entered, or a field whose bytes were taken, is at its end.
    ///
    /// # Errors
    /// It cannot be.
    fn end(&mut self, _path: &[u32]) -> Reading<()> {
        Ok(())
    }
}

/// What a [`Reader`] returns.
pub(crate) type Reading<T> = Result<T, Malformed>;

/// The bytes are no message of the contract, or do not fit where they should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

#[derive(Clone, Copy, Debug)]
enum State {
    /// Between fields.
    Tag,
    Number,
    Length,
    /// Bytes of a fixed-size number still to come, of so many.
    Fixed {
        left: u32,
        of: u32,
    },
    Content {
        left: usize,
        take: bool,
    },
}

/// Reads a message as it comes, in pieces of any size.
#[derive(Debug)]
pub(crate) struct Walker {
    state: State,
    /// A number on its way, and how many of its bits are there.
    value: u64,
    bits: u32,
    /// Bytes read.
    at: usize,
    /// Where the message and those inside it that were entered end.
    ends: [usize; DEPTH_MAX],
    /// The field each of them is, and last the field that is being read.
    path: [u32; DEPTH_MAX + 1],
    depth: usize,
}

impl Walker {
    /// A message of `length` bytes is about to come.
    pub(crate) fn new(length: usize) -> Self {
        let mut ends = [0; DEPTH_MAX];
        if let Some(end) = ends.first_mut() {
            *end = length;
        }
        Self { state: State::Tag, value: 0, bits: 0, at: 0, ends, path: [0; DEPTH_MAX + 1], depth: 0 }
    }

    /// Bytes still to come.
    pub(crate) fn left(&self) -> usize {
        self.ends.first().map_or(0, |end| end.saturating_sub(self.at))
    }

    fn end(&self) -> usize {
        self.ends.get(self.depth).copied().unwrap_or(0)
    }

    fn path(&self) -> &[u32] {
        self.path.get(..=self.depth).unwrap_or_default()
    }

    /// Where the bytes that come next can be put by whoever reads them, when they go straight to their place.
    pub(crate) fn direct<'r>(&self, reader: &'r mut dyn Reader) -> &'r mut [u8] {
        match self.state {
            State::Content { left, take: true } => {
                let place = reader.place();
                let length = place.len().min(left);
                place.get_mut(..length).unwrap_or_default()
            }
            _ => Default::default(),
        }
    }

    /// So many bytes were put where [`Walker::direct`] said.
    pub(crate) fn directed(&mut self, reader: &mut dyn Reader, count: usize) -> Result<(), Malformed> {
        reader.placed(count);
        self.pass(reader, count)
    }

    /// The next bytes.
    ///
    /// # Errors
    /// They are no message, or there is no place for them.
    pub(crate) fn feed(&mut self, reader: &mut dyn Reader, mut bytes: &[u8]) -> Result<(), Malformed> {
        if bytes.len() > self.left() {
            return Err(Malformed);
        }
        while let Some((byte, rest)) = bytes.split_first() {
            if let State::Content { left, .. } = self.state {
                let place = self.direct(reader);
                let room = if place.is_empty() { left } else { place.len() };
                let (now, later) = bytes.split_at_checked(room).unwrap_or((bytes, &[]));
                if let Some(place) = place.get_mut(..now.len()) {
                    place.copy_from_slice(now);
                    reader.placed(now.len());
                }
                self.pass(reader, now.len())?;
                bytes = later;
                continue;
            }
            bytes = rest;
            self.at += 1;
            self.byte(reader, *byte)?;
        }
        Ok(())
    }

    fn byte(&mut self, reader: &mut dyn Reader, byte: u8) -> Result<(), Malformed> {
        if let State::Fixed { left, of } = self.state {
            self.value |= u64::from(byte) << ((of - left) * 8);
            self.state = State::Fixed { left: left - 1, of };
            if left > 1 {
                return Ok(());
            }
            reader.number(self.path(), self.value)?;
            return self.next_field(reader);
        }
        if self.bits >= 64 {
            return Err(Malformed);
        }
        self.value |= u64::from(byte & 0x7f) << self.bits;
        self.bits += 7;
        if byte & 0x80 != 0 {
            return Ok(());
        }
        match self.state {
            State::Tag => self.tag(),
            State::Number => {
                reader.number(self.path(), self.value)?;
                self.next_field(reader)
            }
            _ => self.length(reader),
        }
    }

    fn tag(&mut self) -> Result<(), Malformed> {
        let field = u32::try_from(self.value >> 3).ok().filter(|field| *field > 0).ok_or(Malformed)?;
        *self.path.get_mut(self.depth).ok_or(Malformed)? = field;
        self.state = match self.value & 7 {
            0 => State::Number,
            1 => State::Fixed { left: 8, of: 8 },
            LENGTH_DELIMITED => State::Length,
            5 => State::Fixed { left: 4, of: 4 },
            _ => return Err(Malformed),
        };
        (self.value, self.bits) = (0, 0);
        Ok(())
    }

    fn length(&mut self, reader: &mut dyn Reader) -> Result<(), Malformed> {
        let length = usize::try_from(self.value).map_err(|_| Malformed)?;
        if length > self.end().checked_sub(self.at).ok_or(Malformed)? {
            return Err(Malformed);
        }
        match reader.begin(self.path(), length)? {
            Take::Enter => {
                self.depth += 1;
                *self.ends.get_mut(self.depth).ok_or(Malformed)? = self.at + length;
                self.next_field(reader)
            }
            take => {
                self.state = State::Content { left: length, take: take == Take::Bytes };
                self.pass(reader, 0)
            }
        }
    }

    /// So many bytes of the content are done with.
    fn pass(&mut self, reader: &mut dyn Reader, count: usize) -> Result<(), Malformed> {
        let State::Content { left, take } = self.state else { return Err(Malformed) };
        let left = left.checked_sub(count).ok_or(Malformed)?;
        self.at += count;
        self.state = State::Content { left, take };
        if left > 0 {
            return Ok(());
        }
        if take {
            reader.end(self.path())?;
        }
        self.next_field(reader)
    }

    /// A field is at its end, and perhaps messages with it.
    fn next_field(&mut self, reader: &mut dyn Reader) -> Result<(), Malformed> {
        (self.state, self.value, self.bits) = (State::Tag, 0, 0);
        while self.depth > 0 && self.at >= self.end() {
            if self.at > self.end() {
                return Err(Malformed);
            }
            self.depth -= 1;
            reader.end(self.path())?;
        }
        Ok(())
    }

    /// Whether the message ended where it should.
    pub(crate) fn is_whole(&self) -> bool {
        self.left() == 0 && self.depth == 0 && self.bits == 0 && matches!(self.state, State::Tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use vaccel_proto::v1::{
        Classification, ImageClassificationReply, Label, RunReply, Timings, run_reply::Outcome,
    };

    /// Takes down what it is told; enters fields 1 and 17, and takes others 5 bytes at a time.
    #[derive(Default)]
    struct Notes {
        told: Vec<String>,
        place: [u8; 5],
        taken: Vec<u8>,
    }

    impl Reader for Notes {
        fn begin(&mut self, path: &[u32], length: usize) -> Reading<Take> {
            self.told.push(format!("{path:?} {length}"));
            Ok(if matches!(path.last(), Some(1 | 17)) { Take::Enter } else { Take::Bytes })
        }

        fn number(&mut self, path: &[u32], value: u64) -> Result<(), Malformed> {
            self.told.push(format!("{path:?} = {value}"));
            Ok(())
        }

        fn place(&mut self) -> &mut [u8] {
            &mut self.place
        }

        fn placed(&mut self, count: usize) {
            self.taken.extend_from_slice(&self.place[..count]);
        }

        fn end(&mut self, path: &[u32]) -> Result<(), Malformed> {
            let taken = String::from_utf8(std::mem::take(&mut self.taken)).unwrap();
            self.told.push(format!("{path:?} end {taken}"));
            Ok(())
        }
    }

    fn message() -> Vec<u8> {
        let label = Label { index: 300, name: "a longer name".into(), probability: 0.5 };
        let classifications = vec![Classification { labels: vec![label, Label::default()] }];
        let timings = Some(Timings { queue_us: 1, run_us: u64::MAX, batch_size: 0 });
        let outcome = Some(Outcome::ImageClassification(ImageClassificationReply { classifications }));
        RunReply { timings, outcome, ..RunReply::default() }.encode_to_vec()
    }

    fn read(bytes: &[u8], piece: usize) -> Result<Notes, Malformed> {
        let (mut walker, mut notes) = (Walker::new(bytes.len()), Notes::default());
        for piece in bytes.chunks(piece) {
            walker.feed(&mut notes, piece)?;
        }
        if walker.is_whole() { Ok(notes) } else { Err(Malformed) }
    }

    #[test]
    fn a_message_is_read_alike_however_it_is_cut() {
        let message = message();
        let half = u64::from(0.5_f32.to_bits());
        for piece in [1, 2, 3, 7, message.len()] {
            let notes = read(&message, piece).unwrap();
            assert_eq!(
                notes.told,
                [
                    "[1] 13",
                    "[1, 1] = 1",
                    "[1, 2] = 18446744073709551615",
                    "[1] end ",
                    "[17] 29",
                    "[17, 1] 27",
                    "[17, 1, 1] 23",
                    "[17, 1, 1, 1] = 300",
                    "[17, 1, 1, 2] 13",
                    "[17, 1, 1, 2] end a longer name",
                    &format!("[17, 1, 1, 3] = {half}"),
                    "[17, 1, 1] end ",
                    "[17, 1, 1] 0",
                    "[17, 1, 1] end ",
                    "[17, 1] end ",
                    "[17] end ",
                ],
                "{piece}"
            );
        }
    }

    #[test]
    fn what_is_cut_or_lies_about_its_lengths_is_refused() {
        let message = message();
        for end in (1..message.len()).filter(|end| *end != 15) {
            assert!(read(&message[..end], end).is_err(), "{end}");
        }
        for bytes in [&[0x0a, 0x02, 0x08][..], &[0x0a, 0x01, 0x08, 0x01], &[0x03], &[0x00], &[0x0f]] {
            assert!(read(bytes, 1).is_err(), "{bytes:?}");
        }
        assert!(read(&[0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], 1).is_err());
        let nested = (0..12_u8).rev().flat_map(|level| [0x0a, level * 2]).collect::<Vec<u8>>();
        assert!(read(&nested, 1).is_err(), "deeper than any message of the contract");
    }

    #[test]
    fn lengths_of_numbers_are_those_of_their_encoding() {
        for value in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), u64::MAX] {
            let mut place = [0; 16];
            let mut writer = Writer::new(&mut place);
            writer.varint(value);
            assert_eq!(writer.finish().unwrap().len(), varint_len(value), "{value}");
            assert_eq!(prost::length_delimiter_len(usize::try_from(value).unwrap()), varint_len(value));
        }
    }
}
