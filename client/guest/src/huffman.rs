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

/// The longest code, in bits.
const LENGTH_MAX: usize = 30;

/// Bytes in the order of their codes, and for each length its first code and where its bytes begin.
struct Table {
    order: [u8; 256],
    first: [u32; LENGTH_MAX + 1],
    begin: [u16; LENGTH_MAX + 2],
}

static TABLE: Table = table();

#[allow(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "runs in the compiler, on constants"
)]
const fn table() -> Table {
    let mut table = Table { order: [0; 256], first: [0; LENGTH_MAX + 1], begin: [0; LENGTH_MAX + 2] };
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
        length += 1;
    }
    table.begin[LENGTH_MAX + 1] = next as u16;
    table
}

/// The bytes a Huffman string stands for; ends early, and says so, where it is none.
#[derive(Clone, Debug)]
pub(crate) struct Decoder<'a> {
    bytes: core::slice::Iter<'a, u8>,
    /// Bits taken from `bytes` and not used yet, the next one highest.
    bits: u32,
    count: usize,
    pub(crate) broken: bool,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(string: &'a [u8]) -> Self {
        Self { bytes: string.iter(), bits: 0, count: 0, broken: false }
    }

    fn bit(&mut self) -> Option<u32> {
        if self.count == 0 {
            self.bits = u32::from(*self.bytes.next()?);
            self.count = 8;
        }
        self.count -= 1;
        Some(self.bits >> self.count & 1)
    }
}

impl Iterator for Decoder<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let mut code = 0;
        for length in 1..=LENGTH_MAX {
            let Some(bit) = self.bit() else {
                // The last byte is filled up with the highest bits of the code that means the end: ones, fewer than 8.
                let padding = length - 1;
                self.broken |= padding > 7 || code != (1_u32 << padding) - 1;
                return None;
            };
            code = code << 1 | bit;
            let first = TABLE.first.get(length).copied().unwrap_or(u32::MAX);
            let (begin, end) = (TABLE.begin.get(length)?, TABLE.begin.get(length + 1)?);
            let index = code.checked_sub(first).and_then(|index| usize::try_from(index).ok());
            if let Some(index) = index.filter(|index| *index < usize::from(end - begin)) {
                return TABLE.order.get(usize::from(*begin) + index).copied();
            }
        }
        self.broken = true;
        None
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
