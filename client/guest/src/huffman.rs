//! Strings of HPACK in the static Huffman code. The code is canonical: the lengths are all there is to it.
//!
//! *Source:* RFC 7541, section 5.2 and appendix B.

/// Bits of the code of each byte.
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28,
    28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6,
    6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7,
    8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7,
    15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24,
    23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23,
    23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26,
    26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20,
    21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27,
    27, 27, 26,
];

/// The shortest and the longest code, in bits.
const LENGTH_MIN: usize = 5;
const LENGTH_MAX: usize = 30;

/// Bytes in the order of their codes, and for each length its first code and where its bytes begin.
struct Table {
    order: [u8; 256],
    first: [u32; LENGTH_MAX + 1],
    begin: [u16; LENGTH_MAX + 1],
    /// For each length from the shortest on: 32 bits below this begin with a code of the length or of a shorter one.
    limit: [u32; LENGTH_MAX + 1 - LENGTH_MIN],
}

static TABLE: Table = table();

#[allow(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "runs in the compiler, on constants"
)]
const fn table() -> Table {
    let mut table = Table {
        order: [0; 256],
        first: [0; LENGTH_MAX + 1],
        begin: [0; LENGTH_MAX + 1],
        limit: [0; LENGTH_MAX + 1 - LENGTH_MIN],
    };
    let (mut code, mut length, mut next) = (0_u32, 1, 0);
    while length <= LENGTH_MAX {
        code <<= 1;
        table.first[length] = code;
        table.begin[length] = next as u16;
        let mut byte = 0;
        while byte < 256 {
            if LENGTHS[byte] as usize == length {
                table.order[next] = byte as u8;
                next += 1;
                code += 1;
            }
            byte += 1;
        }
        if length >= LENGTH_MIN {
            // The highest code of all is that of the end, which is no byte's: this is below 2^32.
            table.limit[length - LENGTH_MIN] = code << (32 - length);
        }
        length += 1;
    }
    table
}

/// The bytes a Huffman string stands for; ends early, and says so, where it is none.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    bytes: core::slice::Iter<'a, u8>,
    /// Bits taken from `bytes` and not used yet, the next one highest, zeros behind them.
    bits: u64,
    count: usize,
    pub(crate) broken: bool,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(string: &'a [u8]) -> Self {
        Self { bytes: string.iter(), bits: 0, count: 0, broken: false }
    }
}

impl Iterator for Decoder<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        while self.count < LENGTH_MAX
            && let Some(byte) = self.bytes.next()
        {
            self.bits |= u64::from(*byte) << (56 - self.count);
            self.count += 8;
        }
        let bits = (self.bits >> 32) as u32;
        let at = TABLE.limit.iter().position(|limit| bits < *limit);
        let Some(length) = at.map(|at| at + LENGTH_MIN).filter(|length| *length <= self.count) else {
            // The last byte is filled up with the highest bits of the code that means the end: ones, fewer than 8.
            let ones = !(u64::MAX >> self.count);
            self.broken |= self.count > 7 || self.bits != ones;
            return None;
        };
        self.bits <<= length;
        self.count -= length;
        let (first, begin) = (TABLE.first.get(length)?, TABLE.begin.get(length)?);
        let index = (bits >> (32 - length)).checked_sub(*first)? as usize;
        TABLE.order.get(usize::from(*begin) + index).copied()
    }
}

/// Code and length of a byte.
#[cfg(test)]
pub(crate) fn code(byte: u8) -> (u32, usize) {
    let length = usize::from(LENGTHS[usize::from(byte)]);
    let begin = usize::from(TABLE.begin[length]);
    let index = TABLE.order[begin..].iter().position(|other| *other == byte).unwrap();
    (TABLE.first[length] + u32::try_from(index).unwrap(), length)
}
