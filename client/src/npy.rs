//! NumPy's `.npy` files as tensors, for the command and for programs that feed models from files.
//!
//! *Source.* The format is that of `numpy.lib.format`, versions 1 and 2. What would need a conversion
//! (big-endian data, Fortran order, Python objects) is refused with the NumPy expression that does it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use bytes::Bytes;
use vaccel_proto::limits::TENSOR_RANK_MAX;
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

const MAGIC: &[u8] = b"\x93NUMPY";

/// Longest header that is read, in bytes; version 1 cannot have a longer one.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// Longest file that is read, in bytes: some end never, and no agent takes so much for a call unless it is told to.
const FILE_BYTES_MAX: u64 = 4 << 30;

/// NumPy aligns the data to this, in bytes.
const ALIGNMENT: usize = 64;

const TYPES: [(&str, DType); 12] = [
    ("|b1", DType::Bool),
    ("|u1", DType::U8),
    ("|i1", DType::I8),
    ("<u2", DType::U16),
    ("<i2", DType::I16),
    ("<u4", DType::U32),
    ("<i4", DType::I32),
    ("<u8", DType::U64),
    ("<i8", DType::I64),
    ("<f2", DType::F16),
    ("<f4", DType::F32),
    ("<f8", DType::F64),
];

/// The tensor in a file.
///
/// # Errors
/// `BAD_ARGUMENT` for a file that cannot be read or is not such an array, `MESSAGE_TOO_LARGE` for one that no
/// agent would take.
pub fn read(path: &Path) -> Result<Tensor, Error> {
    let unreadable = |e| bad(format!("cannot read {}: {e}", path.display()));
    let mut content = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    let mut length = file.metadata().map_err(unreadable)?.len();
    if length <= FILE_BYTES_MAX {
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut content).map_err(unreadable)?;
        length = content.len() as u64;
    }
    if length > FILE_BYTES_MAX {
        let message = format!("{}: expected at most {FILE_BYTES_MAX} bytes", path.display());
        return Err(Error::new(Reason::MessageTooLarge, message));
    }
    parse(&content.into()).map_err(|e| bad(format!("{}: {e}", path.display())))
}

/// The tensor in a file's content. Its data is a slice of it.
///
/// # Errors
/// `BAD_ARGUMENT`.
pub fn parse(content: &Bytes) -> Result<Tensor, Error> {
    let cut = || bad("not a whole .npy file");
    let version = content
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.first_chunk::<2>())
        .ok_or_else(|| bad("not a .npy file: it does not begin with \\x93NUMPY and a version"))?;
    let after = &content[MAGIC.len() + 2..];
    let (length, start) = match version {
        [1, 0] => (usize::from(u16::from_le_bytes(*after.first_chunk().ok_or_else(cut)?)), 2),
        [2, 0] => {
            let length = u32::from_le_bytes(*after.first_chunk().ok_or_else(cut)?);
            (usize::try_from(length).unwrap_or(usize::MAX), 4)
        }
        [major, minor] => {
            return Err(bad(format!("version {major}.{minor} of .npy is not known here, only 1.0 and 2.0")));
        }
    };
    if length > HEADER_BYTES_MAX {
        return Err(bad(format!("its header is {length} bytes, the limit is {HEADER_BYTES_MAX}")));
    }
    let header = after.get(start..start + length).ok_or_else(cut)?;
    let header = std::str::from_utf8(header).map_err(|_| bad("its header is not text"))?;
    let header = Header::parse(header).ok_or_else(|| {
        bad(format!("its header is not a description of an array: {}", vaccel_proto::error::shown(header)))
    })?;
    let dtype = header.dtype()?;
    if header.fortran_order {
        return Err(bad("it is in Fortran order; save numpy.ascontiguousarray(a)"));
    }
    let data = content.slice(MAGIC.len() + 2 + start + length..);
    let tensor = Tensor::from_bytes(dtype, &header.shape, data);
    tensor.check("array")?;
    Ok(tensor)
}

/// Writes a tensor to a file.
///
/// # Errors
/// `BAD_ARGUMENT` for a tensor of a type that NumPy has not, or that is not whole; `BACKEND_FAILED` when the
/// file cannot be written.
pub fn write(path: &Path, tensor: &Tensor) -> Result<(), Error> {
    let content = format(tensor)?;
    std::fs::write(path, content)
        .map_err(|e| Error::new(Reason::BackendFailed, format!("cannot write {}: {e}", path.display())))
}

/// The content of a file that holds the tensor.
///
/// # Errors
/// `BAD_ARGUMENT`, as for [`write()`].
pub fn format(tensor: &Tensor) -> Result<Vec<u8>, Error> {
    tensor.check("array")?;
    let dtype = tensor.dtype();
    let (name, _) = TYPES
        .into_iter()
        .find(|(_, known)| *known == dtype)
        .ok_or_else(|| bad(format!("NumPy has no type {}", dtype.name())))?;
    let shape: String = tensor.shape.iter().map(|dimension| format!("{dimension}, ")).collect();
    // A tuple of one needs its comma, a longer one does without the last.
    let shape = if tensor.shape.len() == 1 { shape.trim_end() } else { shape.trim_end_matches(", ") };
    let header = format!("{{'descr': '{name}', 'fortran_order': False, 'shape': ({shape}), }}");
    let prefix = MAGIC.len() + 4;
    let length = (prefix + header.len() + 1).next_multiple_of(ALIGNMENT) - prefix;
    let length_field = u16::try_from(length).map_err(|_| bad("its shape is too long to write"))?;
    let mut content = Vec::with_capacity(prefix + length + tensor.data.len());
    content.extend_from_slice(MAGIC);
    content.extend_from_slice(&[1, 0]);
    content.extend_from_slice(&length_field.to_le_bytes());
    content.extend_from_slice(header.as_bytes());
    content.resize(prefix + length - 1, b' ');
    content.push(b'\n');
    content.extend_from_slice(&tensor.data);
    Ok(content)
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(Reason::BadArgument, message)
}

/// The Python dictionary before the data.
struct Header<'a> {
    descr: &'a str,
    fortran_order: bool,
    shape: Vec<i64>,
}

impl<'a> Header<'a> {
    /// None for anything but the three keys, once each, with values of their types.
    fn parse(text: &'a str) -> Option<Self> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        let mut text = Text(text);
        text.expect('{')?;
        while text.expect('}').is_none() {
            let key = text.quoted()?;
            text.expect(':')?;
            let first = match key {
                "descr" => descr.replace(text.quoted()?).is_none(),
                "fortran_order" => fortran_order.replace(text.boolean()?).is_none(),
                "shape" => shape.replace(text.tuple()?).is_none(),
                _ => false,
            };
            // Only the last entry may go without a comma.
            if !first || text.expect(',').is_none() && !text.0.trim_start().starts_with('}') {
                return None;
            }
        }
        text.0.trim().is_empty().then_some(())?;
        Some(Self { descr: descr?, fortran_order: fortran_order?, shape: shape? })
    }

    fn dtype(&self) -> Result<DType, Error> {
        if let Some((_, dtype)) = TYPES.into_iter().find(|(name, _)| *name == self.descr) {
            return Ok(dtype);
        }
        let name = vaccel_proto::error::shown(self.descr);
        Err(bad(if self.descr.starts_with('>') {
            format!("its type {name} is big-endian; save a.astype(a.dtype.newbyteorder('<'))")
        } else {
            let known = TYPES.map(|(name, _)| name).join(" ");
            format!("its type {name} is not one a tensor can have; these are: {known}")
        }))
    }
}

/// What is left to read of a header.
struct Text<'a>(&'a str);

impl<'a> Text<'a> {
    fn expect(&mut self, c: char) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(c)?;
        Some(())
    }

    fn quoted(&mut self) -> Option<&'a str> {
        let quote = ['\'', '"'].into_iter().find(|&quote| self.expect(quote).is_some())?;
        let (inside, rest) = self.0.split_once(quote)?;
        self.0 = rest;
        (!inside.contains('\\')).then_some(inside)
    }

    fn boolean(&mut self) -> Option<bool> {
        let text = self.0.trim_start();
        let (value, rest) = [("True", true), ("False", false)]
            .into_iter()
            .find_map(|(name, value)| Some((value, text.strip_prefix(name)?)))?;
        self.0 = rest;
        Some(value)
    }

    fn tuple(&mut self) -> Option<Vec<i64>> {
        let mut dimensions = Vec::new();
        self.expect('(')?;
        while self.expect(')').is_none() {
            let text = self.0.trim_start();
            let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
            let (number, rest) = text.split_at(digits);
            dimensions.push(number.parse().ok()?);
            self.0 = rest;
            let comma = self.expect(',').is_some();
            // In Python `(3)` is a number, not a tuple.
            let closes = self.0.trim_start().starts_with(')');
            if dimensions.len() > TENSOR_RANK_MAX || !comma && (!closes || dimensions.len() == 1) {
                return None;
            }
        }
        Some(dimensions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version 1 file around this header and data.
    fn file(header: &str, data: &[u8]) -> Bytes {
        let length = u16::try_from(header.len()).unwrap().to_le_bytes();
        [MAGIC, &[1, 0], &length, header.as_bytes(), data].concat().into()
    }

    fn header(descr: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n")
    }

    #[test]
    fn every_type_and_rank_comes_back() {
        for (_, dtype) in TYPES {
            for shape in [&[][..], &[3], &[0], &[2, 3], &[1, 1, 2, 2, 1, 1, 1, 3]] {
                let count: i64 = shape.iter().product();
                let bytes = usize::try_from(count).unwrap() * dtype.size();
                let tensor = Tensor::from_bytes(dtype, shape, (0..=255).cycle().take(bytes).collect());
                let content = format(&tensor).unwrap();
                assert_eq!((content.len() - bytes) % ALIGNMENT, 0);
                assert_eq!(parse(&content.into()).unwrap(), tensor, "{}", tensor.signature());
            }
        }
        let bf16 = Tensor::from_bytes(DType::Bf16, &[1], Bytes::from_static(&[0, 0]));
        assert!(format(&bf16).unwrap_err().to_string().contains("bf16"));
    }

    #[test]
    fn what_is_written_is_what_numpy_writes() {
        // numpy.save of numpy.array([1.5, -2.0], dtype="<f4"), NumPy 2.
        let description = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }";
        let numpy = [&description[..], &[b' '; 60], b"\n\x00\x00\xc0\x3f\x00\x00\x00\xc0"].concat();
        let tensor = Tensor::new(&[2], &[1.5_f32, -2.0]).unwrap();
        assert_eq!(format(&tensor).unwrap(), numpy);
        assert_eq!(parse(&numpy.into()).unwrap(), tensor);
    }

    #[test]
    fn version_2_is_read() {
        let header = header("<i8", "(1,)");
        let length = u32::try_from(header.len()).unwrap().to_le_bytes();
        let content = [MAGIC, &[2, 0], &length, header.as_bytes(), &7_i64.to_le_bytes()].concat();
        assert_eq!(parse(&content.into()).unwrap().elements::<i64>().unwrap().as_ref(), [7]);
    }

    #[test]
    fn what_would_need_a_conversion_says_which() {
        let refusal = |content: Bytes| parse(&content).unwrap_err().to_string();
        assert!(refusal(file(&header(">f4", "(1,)"), &[0; 4])).contains("newbyteorder"));
        assert!(refusal(file(&header("|O", "(1,)"), &[0; 4])).contains("|b1"));
        let fortran = header("<f4", "(1,)").replace("False", "True");
        assert!(refusal(file(&fortran, &[0; 4])).contains("ascontiguousarray"));
    }

    #[test]
    fn hostile_files_are_refused() {
        let large = i64::MAX;
        let mut hostile: Vec<Bytes> = vec![
            Bytes::new(),
            Bytes::from_static(b"\x93NUMPY"),
            Bytes::from_static(b"\x93NUMPY\x01\x00"),
            Bytes::from_static(b"\x93NUMPY\x01\x00\xff\xff{"),
            Bytes::from_static(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"),
            Bytes::from_static(b"\x93NUMPY\x03\x00\x02\x00{}"),
            Bytes::from_static(b"\x93NUMPY\x01\x00\x01\x00\xff"),
            Bytes::from_static(b"PK\x03\x04 an .npz, rather"),
            file(&header("<f4", "(2,)"), &[0; 4]),
            file(&header("<f4", "(1,)"), &[0; 5]),
            file(&header("<f4", &format!("({large}, {large})")), &[]),
            file(&header("<f4", "(1, 1, 1, 1, 1, 1, 1, 1, 1)"), &[0; 4]),
        ];
        for text in [
            "",
            "{",
            "{}",
            "{'descr': '<f4'}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} x",
            "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
            "{'descr': '<f4' 'fortran_order': False, 'shape': (1,)}",
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': 1}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
            "{'descr': '<f\\x34', 'fortran_order': False, 'shape': (1,)}",
        ] {
            hostile.push(file(text, &[0; 4]));
        }
        for content in hostile {
            let refusal = parse(&content).expect_err(&content.escape_ascii().to_string());
            assert_eq!(refusal.reason(), Reason::BadArgument);
        }
    }

    #[test]
    fn every_cut_of_a_file_is_refused_without_a_panic() {
        let whole = Bytes::from(format(&Tensor::new(&[2, 2], &[1_u16, 2, 3, 4]).unwrap()).unwrap());
        for length in 0..whole.len() {
            assert!(parse(&whole.slice(..length)).is_err(), "{length}");
        }
    }

    #[test]
    fn a_file_too_large_for_a_call_is_not_read_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large.npy");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(read(&path).unwrap_err().reason(), Reason::MessageTooLarge);
    }
}
