//! Requests, written by hand around the caller's bytes.
//!
//! A request is a row of parts. Those that this module writes lie in one scratch place; between them are images and
//! tensors where the caller has them. The field numbers are those of `proto/vaccel/v1`.

use crate::connection::MESSAGE_BYTES_MAX;
use crate::error::{Error, Reason, Result};
use crate::protobuf::{FIXED_BYTES, Writer, field_len, varint_len};
use crate::shared::{Lent, Place};
use crate::types::{
    Arg, ArgType, DType, File, ITEMS_MAX, Input, ResourceId, ResourceKind, SESSION_BYTES, SessionId,
};

/// Parts of a request: what is written before each item, and the item.
const PARTS_MAX: usize = 2 * ITEMS_MAX + 1;

/// Bytes of all that is written around the items of one request.
pub(crate) const SCRATCH_BYTES: usize = 4096 + BESIDE_BYTES_MAX;

/// Every message begins with this much of gRPC's: a byte that says it is not compressed, and four of length.
const PREFIX_BYTES: usize = 5;

/// Tensors begin on this boundary in the agent's memory, so that engines can use them where they are.
const ALIGNMENT: usize = 16;

/// The parts of one request.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    parts: [&'a [u8]; PARTS_MAX],
    count: usize,
}

impl<'a> Parts<'a> {
    pub(crate) fn as_slice(&self) -> &[&'a [u8]] {
        self.parts.get(..self.count).unwrap_or_default()
    }

    /// What was written, cut before each item, with the items between. The first part is written before the first
    /// item.
    fn interleaved(written: &'a [u8], cuts: &[usize], items: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut made = Self { parts: [&[]; PARTS_MAX], count: 0 };
        let mut rest = written;
        let mut at = 0;
        for (cut, item) in cuts.iter().zip(items) {
            let (before, after) = rest.split_at_checked(cut - at).unwrap_or_default();
            (rest, at) = (after, *cut);
            made.push(before);
            made.push(item);
        }
        made.push(rest);
        made
    }

    fn push(&mut self, part: &'a [u8]) {
        if let (false, Some(place)) = (part.is_empty(), self.parts.get_mut(self.count)) {
            *place = part;
            self.count += 1;
        }
    }
}

const TOO_LONG: Error = Error::new(Reason::MessageTooLarge);

/// The prefix of a message of so many bytes.
fn prefix(writer: &mut Writer<'_>, length: usize) -> Result<()> {
    if length > MESSAGE_BYTES_MAX {
        return Err(TOO_LONG);
    }
    writer.put(&[0]);
    writer.put(&(length as u32).to_be_bytes());
    Ok(())
}

/// A message that is written whole.
pub(crate) fn whole(scratch: &mut [u8], write: impl FnOnce(&mut Writer<'_>)) -> Result<Parts<'_>> {
    let (head, content) = scratch.split_at_mut_checked(PREFIX_BYTES).ok_or(TOO_LONG)?;
    let mut writer = Writer::new(content);
    write(&mut writer);
    let length = writer.finish().ok_or(TOO_LONG)?.len();
    prefix(&mut Writer::new(head), length)?;
    let written = scratch.get(..PREFIX_BYTES + length).ok_or(TOO_LONG)?;
    Ok(Parts::interleaved(written, &[], core::iter::empty()))
}

/// What a guest asks of its session.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask<'a> {
    Renew,
    Close,
    Register { kind: ResourceKind, files: &'a [File<'a>], hashes: &'a [[u8; 32]] },
    Upload(Piece<'a>),
    Unregister(&'a ResourceId),
    Noop,
    Classify { model: &'a [u8], top_k: u32, images: &'a [&'a [u8]] },
    Detect { model: &'a [u8], image: &'a [u8], threshold: f32, at_most: u32 },
    ModelRun { model: &'a ResourceId, inputs: &'a [Input<'a>], outputs: &'a [&'a str], beside: Beside<'a> },
    Genop { read: &'a [Arg<'a>], write: &'a [Room<'a>], beside: Beside<'a> },
}

/// What a run's request says beside the operation.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Beside<'a> {
    /// What of the data lies in memory that the agent has, too, if any does.
    pub(crate) lent: Option<&'a Lent>,
    /// In what type tensors of `f32` are wanted, if not as they are.
    pub(crate) reply_type: DType,
}

/// An argument that comes out, as the request describes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room<'a> {
    pub(crate) kind: ArgType,
    pub(crate) before: &'a [u8],
    pub(crate) size: usize,
}

impl<'a> Ask<'a> {
    /// The method that is called.
    pub(crate) fn path(&self) -> &'static str {
        match self {
            Self::Renew => "/vaccel.v1.Sessions/Renew",
            Self::Close => "/vaccel.v1.Sessions/Close",
            Self::Register { .. } => "/vaccel.v1.Resources/Register",
            Self::Upload(_) => "/vaccel.v1.Resources/Upload",
            Self::Unregister(_) => "/vaccel.v1.Resources/Unregister",
            Self::Noop
            | Self::Classify { .. }
            | Self::Detect { .. }
            | Self::ModelRun { .. }
            | Self::Genop { .. } => "/vaccel.v1.Operations/Run",
        }
    }

    /// Its request.
    ///
    /// # Errors
    /// `MESSAGE_TOO_LARGE`.
    pub(crate) fn parts<'b>(&self, scratch: &'b mut [u8], session: &SessionId) -> Result<Parts<'b>>
    where
        'a: 'b,
    {
        match *self {
            Self::Renew | Self::Close => whole(scratch, |writer| writer.bytes(1, &session.0)),
            Self::Register { kind, files, hashes } => register(scratch, session, kind, files, hashes),
            Self::Upload(piece) => upload(scratch, session, &piece),
            Self::Unregister(resource) => whole(scratch, |writer| {
                writer.bytes(1, &session.0);
                writer.bytes(2, resource.as_bytes());
            }),
            Self::Noop => noop(scratch, session),
            Self::Classify { model, top_k, images } => classify(scratch, session, model, top_k, images),
            Self::Detect { model, image, threshold, at_most } => {
                detect(scratch, session, model, image, threshold, at_most)
            }
            Self::ModelRun { model, inputs, outputs, beside } => {
                model_run(scratch, session, beside, model.as_bytes(), inputs, outputs)
            }
            Self::Genop { read, write, beside } => genop(scratch, session, beside, read, write),
        }
    }
}

/// Field numbers of the operations in `RunRequest` and `RunReply`.
pub(crate) mod op {
    pub(crate) const NOOP: u32 = 16;
    pub(crate) const IMAGE_CLASSIFICATION: u32 = 17;
    pub(crate) const MODEL_RUN: u32 = 18;
    pub(crate) const GENOP: u32 = 37;
    pub(crate) const IMAGE_DETECTION: u32 = 38;
}

/// Tags of operations take two bytes, all others one.
const OP_TAG_BYTES: usize = 2;

/// Bytes of `RunRequest` around an operation's request of so many bytes.
fn run_len(beside: usize, length: usize) -> usize {
    field_len(SESSION_BYTES) + beside + OP_TAG_BYTES + varint_len(length as u64) + length
}

fn begin_run(
    writer: &mut Writer<'_>,
    session: &SessionId,
    beside: &[u8],
    op: u32,
    length: usize,
) -> Result<()> {
    prefix(writer, run_len(beside.len(), length))?;
    writer.bytes(1, &session.0);
    writer.put(beside);
    writer.begin(op, length);
    Ok(())
}

fn number_len(number: u64) -> usize {
    if number == 0 { 0 } else { 1 + varint_len(number) }
}

/// Bytes of a field that is left out when it is empty.
fn optional(length: usize) -> usize {
    if length == 0 { 0 } else { field_len(length) }
}

/// `Place{1: offset, 2: bytes}`.
fn put_place(writer: &mut Writer<'_>, field: u32, place: Place) {
    writer.begin(field, number_len(place.offset) + number_len(place.bytes));
    writer.number(1, place.offset);
    writer.number(2, place.bytes);
}

/// Bytes of the longest fields beside an operation: a name of 66, 17 places of at most 24, and a type of 2.
const BESIDE_BYTES_MAX: usize = 512;

/// The fields of `RunRequest` beside the session and the operation: `2: shared{1: region, 2: places, 3: room}, 3:
/// reply_type`.
fn put_beside<'a>(place: &'a mut [u8; BESIDE_BYTES_MAX], beside: Beside<'_>, inputs: usize) -> &'a [u8] {
    let mut writer = Writer::new(place);
    if let Some(lent) = beside.lent {
        let place_len = |place: &Place| field_len(number_len(place.offset) + number_len(place.bytes));
        let places = lent.places.get(..inputs).unwrap_or_default();
        let length = field_len(lent.region.as_bytes().len())
            + places.iter().map(place_len).sum::<usize>()
            + place_len(&lent.room);
        writer.begin(2, length);
        writer.bytes(1, lent.region.as_bytes());
        places.iter().for_each(|place| put_place(&mut writer, 2, *place));
        put_place(&mut writer, 3, lent.room);
    }
    writer.number(3, beside.reply_type as u64);
    writer.finish().unwrap_or_default()
}

/// `RunRequest{session, noop}`.
fn noop<'a>(scratch: &'a mut [u8], session: &SessionId) -> Result<Parts<'a>> {
    let mut writer = Writer::new(scratch);
    begin_run(&mut writer, session, &[], op::NOOP, 0)?;
    let written = writer.finish().ok_or(TOO_LONG)?;
    Ok(Parts::interleaved(written, &[], core::iter::empty()))
}

/// `RunRequest{session, image_classification{1: model, 2: top_k, 3: images}}`.
fn classify<'a>(
    scratch: &'a mut [u8],
    session: &SessionId,
    model: &[u8],
    top_k: u32,
    images: &'a [&'a [u8]],
) -> Result<Parts<'a>> {
    let top_k_len = number_len(u64::from(top_k));
    let images_len: usize = images.iter().map(|image| field_len(image.len())).sum();
    let mut writer = Writer::new(scratch);
    begin_run(
        &mut writer,
        session,
        &[],
        op::IMAGE_CLASSIFICATION,
        optional(model.len()) + top_k_len + images_len,
    )?;
    writer.bytes(1, model);
    writer.number(2, u64::from(top_k));
    let mut cuts = [0; ITEMS_MAX];
    for (image, cut) in images.iter().zip(&mut cuts) {
        writer.begin(3, image.len());
        *cut = writer.len();
    }
    let written = writer.finish().ok_or(TOO_LONG)?;
    Ok(Parts::interleaved(written, cuts.get(..images.len()).unwrap_or_default(), images.iter().copied()))
}

/// `RunRequest{session, image_detection{1: model, 3: threshold, 4: at_most, 2: image}}`, the longest last.
fn detect<'a>(
    scratch: &'a mut [u8],
    session: &SessionId,
    model: &[u8],
    image: &'a [u8],
    threshold: f32,
    at_most: u32,
) -> Result<Parts<'a>> {
    let length = optional(model.len())
        + FIXED_BYTES * usize::from(threshold != 0.0)
        + number_len(u64::from(at_most))
        + field_len(image.len());
    let mut writer = Writer::new(scratch);
    begin_run(&mut writer, session, &[], op::IMAGE_DETECTION, length)?;
    writer.bytes(1, model);
    writer.fixed(3, threshold);
    writer.number(4, u64::from(at_most));
    writer.begin(2, image.len());
    let cut = [writer.len()];
    let written = writer.finish().ok_or(TOO_LONG)?;
    Ok(Parts::interleaved(written, &cut, core::iter::once(image)))
}

/// `RunRequest{session, beside, model_run{1: model, 2: outputs, 3: inputs}}`, each input's data on a boundary.
fn model_run<'a>(
    scratch: &'a mut [u8],
    session: &SessionId,
    beside: Beside<'_>,
    model: &[u8],
    inputs: &'a [Input<'a>],
    outputs: &[&str],
) -> Result<Parts<'a>> {
    let mut place = [0; BESIDE_BYTES_MAX];
    let beside = put_beside(&mut place, beside, inputs.len());
    let before = optional(model.len()) + outputs.iter().map(|name| field_len(name.len())).sum::<usize>();
    let pads = pads(beside.len(), before, inputs);
    let length = before + inputs_len(inputs, &pads);
    let mut writer = Writer::new(scratch);
    begin_run(&mut writer, session, beside, op::MODEL_RUN, length)?;
    writer.bytes(1, model);
    for output in outputs {
        writer.begin(2, output.len());
        writer.put(output.as_bytes());
    }
    let mut cuts = [0; ITEMS_MAX];
    for ((input, pad), cut) in inputs.iter().zip(pads).zip(&mut cuts) {
        let tensor = tensor_len(input, pad);
        writer.begin(3, named_len(input, pad));
        writer.bytes(1, input.name.as_bytes());
        writer.begin(2, tensor);
        writer.number(1, input.dtype as u64);
        if !input.shape.is_empty() {
            writer.begin(2, shape_len(input));
            // Negative dimensions are for the agent to refuse; they are ten bytes each.
            input.shape.iter().for_each(|dimension| writer.varint(dimension.cast_unsigned()));
        }
        writer.zeros(3, pad);
        if !input.data.is_empty() {
            writer.begin(4, input.data.len());
        }
        *cut = writer.len();
    }
    let written = writer.finish().ok_or(TOO_LONG)?;
    let cuts = cuts.get(..inputs.len()).unwrap_or_default();
    Ok(Parts::interleaved(written, cuts, inputs.iter().map(|input| input.data)))
}

/// `RunRequest{session, beside, genop{2: read{1: type, 4: data}, 3: write{1: type, 3: size, 4: data}}}`; a written
/// argument has a size where it has no data.
fn genop<'a>(
    scratch: &'a mut [u8],
    session: &SessionId,
    beside: Beside<'_>,
    read: &'a [Arg<'a>],
    write: &'a [Room<'a>],
) -> Result<Parts<'a>> {
    let data_len = |length: usize| if length == 0 { 0 } else { field_len(length) };
    let args = read.iter().map(|arg| (2, arg.kind, 0, arg.data));
    let rooms = write.iter().map(|room| (3, room.kind, room.size, room.before));
    let all = args.chain(rooms);
    let arg_len = |kind: ArgType, size: usize, data: &[u8]| {
        number_len(u64::from(kind.0)) + number_len(size as u64) + data_len(data.len())
    };
    let length = all.clone().map(|(_, kind, size, data)| field_len(arg_len(kind, size, data))).sum();
    let mut place = [0; BESIDE_BYTES_MAX];
    let beside = put_beside(&mut place, beside, read.len() + write.len());
    let mut writer = Writer::new(scratch);
    begin_run(&mut writer, session, beside, op::GENOP, length)?;
    let mut cuts = [0; ITEMS_MAX];
    for ((field, kind, size, data), cut) in all.clone().zip(&mut cuts) {
        writer.begin(field, arg_len(kind, size, data));
        writer.number(1, u64::from(kind.0));
        writer.number(3, size as u64);
        if !data.is_empty() {
            writer.begin(4, data.len());
        }
        *cut = writer.len();
    }
    let written = writer.finish().ok_or(TOO_LONG)?;
    let cuts = cuts.get(..read.len() + write.len()).unwrap_or_default();
    Ok(Parts::interleaved(written, cuts, all.map(|(_, _, _, data)| data)))
}

fn shape_len(input: &Input<'_>) -> usize {
    input.shape.iter().map(|dimension| varint_len(dimension.cast_unsigned())).sum()
}

fn pad_len(pad: usize) -> usize {
    if pad == 0 { 0 } else { field_len(pad) }
}

fn tensor_len(input: &Input<'_>, pad: usize) -> usize {
    let dtype = if input.dtype == DType::Unspecified { 0 } else { 2 };
    let shape = if input.shape.is_empty() { 0 } else { field_len(shape_len(input)) };
    let data = if input.data.is_empty() { 0 } else { field_len(input.data.len()) };
    dtype + shape + pad_len(pad) + data
}

fn named_len(input: &Input<'_>, pad: usize) -> usize {
    let name = if input.name.is_empty() { 0 } else { field_len(input.name.len()) };
    name + field_len(tensor_len(input, pad))
}

fn inputs_len(inputs: &[Input<'_>], pads: &[usize; ITEMS_MAX]) -> usize {
    inputs.iter().zip(pads).map(|(input, pad)| field_len(named_len(input, *pad))).sum()
}

/// How much padding moves each input's data to a boundary, behind so many bytes of the operation's.
fn pads(beside: usize, before: usize, inputs: &[Input<'_>]) -> [usize; ITEMS_MAX] {
    let mut pads = [0; ITEMS_MAX];
    // A pad may lengthen the lengths before it by a byte, which the next pass sees. Pads only grow, so that no two
    // passes undo each other.
    for _ in 0..3 {
        let inputs_bytes = inputs_len(inputs, &pads);
        let mut end = PREFIX_BYTES + run_len(beside, before + inputs_bytes) - inputs_bytes;
        for index in 0..inputs.len().min(ITEMS_MAX) {
            let (Some(input), Some(pad)) = (inputs.get(index), pads.get_mut(index)) else { break };
            end += field_len(named_len(input, *pad));
            if !input.data.is_empty() {
                let unpadded = end - input.data.len() - pad_len(*pad);
                // A field of one byte takes three: shifts of 1 and 2 are those of 17 and 18.
                let fits = |pad: &usize| (unpadded + pad_len(*pad)).is_multiple_of(ALIGNMENT);
                let wider = (*pad..4 * ALIGNMENT).find(fits).unwrap_or(*pad);
                end = end - pad_len(*pad) + pad_len(wider);
                *pad = wider;
            }
        }
    }
    pads
}

/// `RegisterResourceRequest{1: session, 2: kind, 3: files{1: name, 2: size, 3: sha256}}`.
fn register<'a>(
    scratch: &'a mut [u8],
    session: &SessionId,
    kind: ResourceKind,
    files: &[File<'_>],
    hashes: &[[u8; 32]],
) -> Result<Parts<'a>> {
    whole(scratch, |writer| {
        writer.bytes(1, &session.0);
        writer.number(2, kind as u64);
        for (file, hash) in files.iter().zip(hashes) {
            let size = file.content.len() as u64;
            let size_len = number_len(size);
            let name_len = if file.name.is_empty() { 0 } else { field_len(file.name.len()) };
            writer.begin(3, name_len + size_len + field_len(hash.len()));
            writer.bytes(1, file.name.as_bytes());
            writer.number(2, size);
            writer.bytes(3, hash);
        }
    })
}

/// What an upload sends of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    pub(crate) hash: [u8; 32],
    pub(crate) size: u64,
    pub(crate) offset: u64,
    pub(crate) data: &'a [u8],
}

/// Bytes of a file in one message of an upload; the contract's limit.
const CHUNK_BYTES: usize = 1 << 20;

/// Bytes of a file that one upload carries: as many messages as a request has items.
pub(crate) const UPLOAD_BYTES: usize = ITEMS_MAX * CHUNK_BYTES;

/// Messages `UploadRequest{1: session, 2: sha256, 3: size, 4: offset, 5: data}`; those after the first have data only.
fn upload<'a>(scratch: &'a mut [u8], session: &SessionId, piece: &Piece<'a>) -> Result<Parts<'a>> {
    let numbers = [(3, piece.size), (4, piece.offset)].into_iter().filter(|(_, number)| *number > 0);
    let named: usize = numbers.clone().map(|(_, number)| 1 + varint_len(number)).sum();
    let named = field_len(SESSION_BYTES) + field_len(piece.hash.len()) + named;
    // A file of no bytes is one message without data.
    let first = piece.data.get(..CHUNK_BYTES).unwrap_or(piece.data);
    let chunks = core::iter::once(first).chain(piece.data.chunks(CHUNK_BYTES).skip(1));
    let mut writer = Writer::new(scratch);
    let (mut cuts, mut count) = ([0; ITEMS_MAX], 0);
    for (chunk, cut) in chunks.clone().zip(&mut cuts) {
        let data = if chunk.is_empty() { 0 } else { field_len(chunk.len()) };
        prefix(&mut writer, data + if count == 0 { named } else { 0 })?;
        if count == 0 {
            writer.bytes(1, &session.0);
            writer.bytes(2, &piece.hash);
            numbers.clone().for_each(|(field, number)| writer.number(field, number));
        }
        if !chunk.is_empty() {
            writer.begin(5, chunk.len());
        }
        *cut = writer.len();
        count += 1;
    }
    let written = writer.finish().ok_or(TOO_LONG)?;
    Ok(Parts::interleaved(written, cuts.get(..count).unwrap_or_default(), chunks))
}
