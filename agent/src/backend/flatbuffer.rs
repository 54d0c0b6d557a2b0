//! FlatBuffers as they lie in a file: tables, vectors and text by their offsets, every one of which a hostile file can
//! choose.
//!
//! *Source:* the FlatBuffers internals document: offsets are 32 bits and relative to where they lie, a table begins
//! with the distance back to its vtable, and vtables hold 16-bit places of fields in the table.

use vaccel_proto::Error;

use super::file::refuse;

/// A table.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    file: &'a [u8],
    at: usize,
}

/// A vector of elements of one size.
#[derive(Clone, Copy)]
pub(super) struct Vector<'a> {
    file: &'a [u8],
    at: usize,
    count: usize,
}

fn outside() -> Error {
    refuse("its encoding is broken (an offset leads out of the file)")
}

fn bytes<const N: usize>(file: &[u8], at: usize) -> Result<[u8; N], Error> {
    file.get(at..).and_then(|rest| rest.first_chunk().copied()).ok_or_else(outside)
}

fn follow(file: &[u8], at: usize) -> Result<usize, Error> {
    let offset = u32::from_le_bytes(bytes(file, at)?) as usize;
    at.checked_add(offset).filter(|at| *at < file.len()).ok_or_else(outside)
}

impl<'a> Table<'a> {
    /// The root of a file.
    ///
    /// # Errors
    /// `MODEL_REJECTED` when it is not inside the file; so for everything below.
    pub(super) fn root(file: &'a [u8]) -> Result<Self, Error> {
        Ok(Self { file, at: follow(file, 0)? })
    }

    /// Where a field lies in the file; none where it is left out.
    pub(super) fn place(self, field: usize) -> Result<Option<usize>, Error> {
        const HEAD: usize = 4;
        let back = i64::from(i32::from_le_bytes(bytes(self.file, self.at)?));
        let vtable = i64::try_from(self.at).ok().and_then(|at| usize::try_from(at - back).ok());
        let vtable = vtable.ok_or_else(outside)?;
        let size = usize::from(u16::from_le_bytes(bytes(self.file, vtable)?));
        let entry = HEAD + 2 * field;
        if entry + 2 > size {
            return Ok(None);
        }
        let offset = usize::from(u16::from_le_bytes(bytes(self.file, vtable + entry)?));
        Ok(if offset == 0 { None } else { Some(self.at + offset) })
    }

    fn number<const N: usize>(self, field: usize) -> Result<Option<[u8; N]>, Error> {
        self.place(field)?.map(|at| bytes(self.file, at)).transpose()
    }

    pub(super) fn i8(self, field: usize) -> Result<i8, Error> {
        Ok(i8::from_le_bytes(self.number(field)?.unwrap_or_default()))
    }

    pub(super) fn i32(self, field: usize) -> Result<i32, Error> {
        Ok(i32::from_le_bytes(self.number(field)?.unwrap_or_default()))
    }

    pub(super) fn u32(self, field: usize) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.number(field)?.unwrap_or_default()))
    }

    pub(super) fn u64(self, field: usize) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.number(field)?.unwrap_or_default()))
    }

    pub(super) fn table(self, field: usize) -> Result<Option<Self>, Error> {
        let Some(place) = self.place(field)? else { return Ok(None) };
        Ok(Some(Self { file: self.file, at: follow(self.file, place)? }))
    }

    /// A vector of elements of `size` bytes.
    pub(super) fn vector(self, field: usize, size: usize) -> Result<Option<Vector<'a>>, Error> {
        let Some(place) = self.place(field)? else { return Ok(None) };
        let head = follow(self.file, place)?;
        let count = u32::from_le_bytes(bytes(self.file, head)?) as usize;
        let at = head + 4;
        let end = count.checked_mul(size).and_then(|length| at.checked_add(length));
        if end.is_none_or(|end| end > self.file.len()) {
            return Err(outside());
        }
        Ok(Some(Vector { file: self.file, at, count }))
    }

    pub(super) fn tables(self, field: usize) -> Result<Vector<'a>, Error> {
        Ok(self.vector(field, 4)?.unwrap_or(Vector { file: self.file, at: 0, count: 0 }))
    }

    pub(super) fn i32s(self, field: usize) -> Result<Option<Vec<i32>>, Error> {
        let Some(vector) = self.vector(field, 4)? else { return Ok(None) };
        let numbers = self.file[vector.at..vector.at + 4 * vector.count].as_chunks().0;
        Ok(Some(numbers.iter().map(|number| i32::from_le_bytes(*number)).collect()))
    }

    pub(super) fn bytes(self, field: usize) -> Result<Option<&'a [u8]>, Error> {
        let Some(vector) = self.vector(field, 1)? else { return Ok(None) };
        Ok(Some(&self.file[vector.at..vector.at + vector.count]))
    }

    pub(super) fn text(self, field: usize) -> Result<Option<&'a str>, Error> {
        let Some(bytes) = self.bytes(field)? else { return Ok(None) };
        std::str::from_utf8(bytes)
            .map(Some)
            .map_err(|_| refuse("its encoding is broken (a name is not UTF-8)"))
    }
}

impl<'a> Vector<'a> {
    pub(super) fn len(self) -> usize {
        self.count
    }

    /// The table at an index.
    pub(super) fn table(self, index: usize) -> Result<Table<'a>, Error> {
        if index >= self.count {
            return Err(refuse(format!("it names part {index} of a list of {}", self.count)));
        }
        Ok(Table { file: self.file, at: follow(self.file, self.at + 4 * index)? })
    }

    /// All tables.
    pub(super) fn each(self) -> impl Iterator<Item = Result<Table<'a>, Error>> {
        (0..self.count).map(move |index| self.table(index))
    }
}
