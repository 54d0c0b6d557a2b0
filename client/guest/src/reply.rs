//! Replies, read into the caller's places as they come. The field numbers are those of `proto/vaccel/v1`.

use crate::protobuf::{Malformed, Reader, Reading, Take};
use crate::request::op;
use crate::shared::Place;
use crate::text::Text;
use crate::types::{
    ArgOut, DType, Detection, ITEMS_MAX, Info, Label, Output, RESOURCE_BYTES, ResourceId, SESSION_BYTES,
    SessionId, Timings,
};

/// A reply that says nothing.
#[derive(Debug)]
pub(crate) struct Nothing;

impl Reader for Nothing {}

/// `Timings`, field 1 of `RunReply`.
fn timing(timings: &mut Timings, path: &[u32], value: u64) {
    match path {
        [1, 1] => timings.queue_us = value,
        [1, 2] => timings.run_us = value,
        [1, 3] => timings.batch_size = u32::try_from(value).unwrap_or(u32::MAX),
        _ => {}
    }
}

/// Field 2 of `RunReply`: where results are whose data is not in the reply, `{1: offset, 2: bytes}` of each.
#[derive(Debug, Default)]
pub(crate) struct Places {
    places: [Place; ITEMS_MAX],
    count: usize,
}

impl Places {
    pub(crate) fn as_slice(&self) -> &[Place] {
        self.places.get(..self.count).unwrap_or_default()
    }

    fn begin(&mut self) -> Reading<Take> {
        self.count += 1;
        if self.count > ITEMS_MAX { Err(Malformed) } else { Ok(Take::Enter) }
    }

    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        let [2, field] = path else { return Ok(()) };
        let last = self.count.checked_sub(1).and_then(|last| self.places.get_mut(last));
        let last = last.ok_or(Malformed)?;
        match field {
            1 => last.offset = value,
            2 => last.bytes = value,
            _ => {}
        }
        Ok(())
    }
}

/// `RunReply` of an operation that gives nothing.
#[derive(Debug, Default)]
pub(crate) struct Ran {
    pub(crate) timings: Timings,
}

impl Reader for Ran {
    fn begin(&mut self, path: &[u32], _length: usize) -> Reading<Take> {
        Ok(if path == [1] { Take::Enter } else { Take::Skip })
    }

    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        timing(&mut self.timings, path, value);
        Ok(())
    }
}

/// `RunReply{timings, image_classification{1: classifications{1: labels{1: index, 2: name, 3: probability}}}}`.
#[derive(Debug)]
pub(crate) struct Classified<'a> {
    pub(crate) labels: &'a mut [Label],
    pub(crate) count: usize,
    pub(crate) images: u32,
    pub(crate) timings: Timings,
}

const LABEL: [u32; 3] = [op::IMAGE_CLASSIFICATION, 1, 1];

impl<'a> Classified<'a> {
    pub(crate) fn new(labels: &'a mut [Label]) -> Self {
        Self { labels, count: 0, images: 0, timings: Timings::default() }
    }

    fn label(&mut self) -> Option<&mut Label> {
        self.count.checked_sub(1).and_then(|last| self.labels.get_mut(last))
    }
}

impl Reader for Classified<'_> {
    fn begin(&mut self, path: &[u32], _length: usize) -> Reading<Take> {
        match path {
            [1] | [op::IMAGE_CLASSIFICATION] => Ok(Take::Enter),
            [op::IMAGE_CLASSIFICATION, 1] => {
                self.images += 1;
                Ok(Take::Enter)
            }
            path if *path == LABEL => {
                let image = self.images - 1;
                let place = self.labels.get_mut(self.count).ok_or(Malformed)?;
                *place = Label { image, ..Label::default() };
                self.count += 1;
                Ok(Take::Enter)
            }
            [label @ .., 2] if *label == LABEL => Ok(Take::Bytes),
            _ => Ok(Take::Skip),
        }
    }

    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        timing(&mut self.timings, path, value);
        match (path, self.label()) {
            ([label @ .., 1], Some(place)) if *label == LABEL => place.index = value as u32,
            ([label @ .., 3], Some(place)) if *label == LABEL => {
                place.probability = f32::from_bits(value as u32)
            }
            _ => {}
        }
        Ok(())
    }

    fn place(&mut self) -> &mut [u8] {
        self.label().map(|label| label.name.spare()).unwrap_or_default()
    }

    fn placed(&mut self, count: usize) {
        if let Some(label) = self.label() {
            label.name.grow(count);
        }
    }
}

/// `RunReply{timings, image_detection{2: detections{1: label{1: index, 2: name, 3: probability}, 2: area{1: left,
/// 2: top, 3: right, 4: bottom}}}}`.
#[derive(Debug)]
pub(crate) struct Detected<'a> {
    pub(crate) detections: &'a mut [Detection],
    pub(crate) count: usize,
    pub(crate) timings: Timings,
}

const DETECTION: [u32; 2] = [op::IMAGE_DETECTION, 2];

impl<'a> Detected<'a> {
    pub(crate) fn new(detections: &'a mut [Detection]) -> Self {
        Self { detections, count: 0, timings: Timings::default() }
    }

    fn detection(&mut self) -> Option<&mut Detection> {
        self.count.checked_sub(1).and_then(|last| self.detections.get_mut(last))
    }
}

impl Reader for Detected<'_> {
    fn begin(&mut self, path: &[u32], _length: usize) -> Reading<Take> {
        match path {
            [1] | [op::IMAGE_DETECTION] => Ok(Take::Enter),
            path if *path == DETECTION => {
                *self.detections.get_mut(self.count).ok_or(Malformed)? = Detection::default();
                self.count += 1;
                Ok(Take::Enter)
            }
            [detection @ .., 1 | 2] if *detection == DETECTION => Ok(Take::Enter),
            [detection @ .., 1, 2] if *detection == DETECTION => Ok(Take::Bytes),
            _ => Ok(Take::Skip),
        }
    }

    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        timing(&mut self.timings, path, value);
        let ([detection @ .., part, field], Some(place)) = (path, self.detection()) else { return Ok(()) };
        if *detection != DETECTION {
            return Ok(());
        }
        let number = f32::from_bits(value as u32);
        match (part, field) {
            (1, 1) => place.label.index = value as u32,
            (1, 3) => place.label.probability = number,
            (2, 1) => place.left = number,
            (2, 2) => place.top = number,
            (2, 3) => place.right = number,
            (2, 4) => place.bottom = number,
            _ => {}
        }
        Ok(())
    }

    fn place(&mut self) -> &mut [u8] {
        self.detection().map(|detection| detection.label.name.spare()).unwrap_or_default()
    }

    fn placed(&mut self, count: usize) {
        if let Some(detection) = self.detection() {
            detection.label.name.grow(count);
        }
    }
}

/// `RunReply{timings, places, model_run{1: outputs{2: tensor{1: dtype, 2: shape, 4: data}}}}`.
#[derive(Debug)]
pub(crate) struct Computed<'a, 'd> {
    pub(crate) outputs: &'a mut [Output<'d>],
    pub(crate) count: usize,
    pub(crate) places: Places,
    pub(crate) timings: Timings,
    /// The output that found no place, and the bytes it needs.
    pub(crate) too_small: Option<(usize, usize)>,
    /// A dimension on its way: the encoding of the shape is taken byte by byte.
    byte: [u8; 1],
    dimension: u64,
    bits: u32,
    in_shape: bool,
    /// The shape has too many axes, or one that is no number.
    broken: bool,
}

const TENSOR: [u32; 3] = [op::MODEL_RUN, 1, 2];

impl<'a, 'd> Computed<'a, 'd> {
    pub(crate) fn new(outputs: &'a mut [Output<'d>]) -> Self {
        for output in outputs.iter_mut() {
            (output.length, output.dtype, output.rank) = (0, DType::Unspecified, 0);
        }
        let timings = Timings::default();
        Self {
            outputs,
            count: 0,
            places: Places::default(),
            timings,
            too_small: None,
            byte: [0],
            dimension: 0,
            bits: 0,
            in_shape: false,
            broken: false,
        }
    }

    fn output(&mut self) -> Option<&mut Output<'d>> {
        self.count.checked_sub(1).and_then(|last| self.outputs.get_mut(last))
    }

    fn dimension(&mut self, value: u64) -> Reading<()> {
        let output = self.output().ok_or(Malformed)?;
        *output.shape.get_mut(output.rank).ok_or(Malformed)? = value.cast_signed();
        output.rank += 1;
        Ok(())
    }
}

impl Reader for Computed<'_, '_> {
    fn begin(&mut self, path: &[u32], length: usize) -> Reading<Take> {
        match path {
            [1] | [op::MODEL_RUN] => Ok(Take::Enter),
            [2] => self.places.begin(),
            [op::MODEL_RUN, 1] => {
                self.count += 1;
                if self.count > self.outputs.len() {
                    self.too_small = Some((self.outputs.len(), length));
                    return Err(Malformed);
                }
                Ok(Take::Enter)
            }
            path if *path == TENSOR => Ok(Take::Enter),
            [tensor @ .., 2] if *tensor == TENSOR => {
                (self.in_shape, self.dimension, self.bits) = (true, 0, 0);
                Ok(Take::Bytes)
            }
            [tensor @ .., 4] if *tensor == TENSOR => {
                let index = self.count - 1;
                let output = self.output().ok_or(Malformed)?;
                if length > output.data.len() {
                    output.length = length;
                    self.too_small = Some((index, length));
                    return Err(Malformed);
                }
                output.length = 0;
                self.in_shape = false;
                Ok(Take::Bytes)
            }
            _ => Ok(Take::Skip),
        }
    }

    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        timing(&mut self.timings, path, value);
        self.places.number(path, value)?;
        match (path, self.output()) {
            ([tensor @ .., 1], Some(output)) if *tensor == TENSOR => output.dtype = DType::from_number(value),
            // A shape may come number by number as well.
            ([tensor @ .., 2], Some(_)) if *tensor == TENSOR => self.dimension(value)?,
            _ => {}
        }
        Ok(())
    }

    fn place(&mut self) -> &mut [u8] {
        if self.in_shape {
            return &mut self.byte;
        }
        self.output().and_then(|output| output.data.get_mut(output.length..)).unwrap_or_default()
    }

    fn placed(&mut self, count: usize) {
        if !self.in_shape {
            if let Some(output) = self.output() {
                output.length += count;
            }
            return;
        }
        let [byte] = self.byte;
        self.dimension |= u64::from(byte & 0x7f).checked_shl(self.bits).unwrap_or(0);
        self.bits = self.bits.saturating_add(7);
        self.broken |= self.bits > 70;
        if byte & 0x80 == 0 {
            self.broken |= self.dimension(self.dimension).is_err();
            (self.dimension, self.bits) = (0, 0);
        }
    }

    fn end(&mut self, path: &[u32]) -> Reading<()> {
        match path {
            [tensor @ .., 2] if *tensor == TENSOR && (self.broken || self.bits > 0) => Err(Malformed),
            _ => Ok(()),
        }
    }
}

/// `RunReply{timings, places, genop{1: write{4: data}}}`.
#[derive(Debug)]
pub(crate) struct Generic<'a, 'd> {
    pub(crate) write: &'a mut [ArgOut<'d>],
    pub(crate) count: usize,
    pub(crate) places: Places,
    pub(crate) timings: Timings,
    /// The argument that found no place, and the bytes it needs.
    pub(crate) too_small: Option<(usize, usize)>,
}

impl<'a, 'd> Generic<'a, 'd> {
    pub(crate) fn new(write: &'a mut [ArgOut<'d>]) -> Self {
        write.iter_mut().for_each(|arg| arg.length = 0);
        let (places, timings) = Default::default();
        Self { write, count: 0, places, timings, too_small: None }
    }

    fn arg(&mut self) -> Option<&mut ArgOut<'d>> {
        self.count.checked_sub(1).and_then(|last| self.write.get_mut(last))
    }
}

impl Reader for Generic<'_, '_> {
    fn begin(&mut self, path: &[u32], length: usize) -> Reading<Take> {
        match path {
            [1] | [op::GENOP] => Ok(Take::Enter),
            [2] => self.places.begin(),
            [op::GENOP, 1] => {
                self.count += 1;
                Ok(Take::Enter)
            }
            [op::GENOP, 1, 4] => {
                let index = self.count.saturating_sub(1);
                if let Some(arg) = self.arg() {
                    arg.length = if length <= arg.data.len() { 0 } else { length };
                }
                if self.arg().is_none_or(|arg| arg.length > 0) {
                    self.too_small = Some((index, length));
                    return Err(Malformed);
                }
                Ok(Take::Bytes)
            }
            _ => Ok(Take::Skip),
        }
    }

    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        timing(&mut self.timings, path, value);
        self.places.number(path, value)
    }

    fn place(&mut self) -> &mut [u8] {
        self.arg().and_then(|arg| arg.data.get_mut(arg.length..)).unwrap_or_default()
    }

    fn placed(&mut self, count: usize) {
        if let Some(arg) = self.arg() {
            arg.length += count;
        }
    }
}

/// `InfoReply`, of what a guest wants to know.
#[derive(Debug, Default)]
pub(crate) struct Informed {
    pub(crate) info: Info,
    field: u32,
    /// An engine's name, kept when the engine is there.
    engine: Text<32>,
    absent: bool,
}

impl Reader for Informed {
    fn begin(&mut self, path: &[u32], length: usize) -> Reading<Take> {
        Ok(match path {
            // Operations, engines, limits.
            [3 | 5] => Take::Enter,
            [4] => {
                (self.absent, self.engine) = (false, Text::new());
                Take::Enter
            }
            [1 | 2] | [3 | 4, 1] => {
                self.field = path.first().copied().unwrap_or(0);
                if self.field == 3 && !self.info.operations.is_empty() {
                    self.info.operations.push(" ");
                }
                Take::Bytes
            }
            [4, 4] => {
                self.absent = length > 0;
                Take::Skip
            }
            _ => Take::Skip,
        })
    }

    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        match path {
            [5, 1] => self.info.message_bytes_max = value,
            [5, 3] => self.info.session_lease_ms = value,
            _ => {}
        }
        Ok(())
    }

    fn place(&mut self) -> &mut [u8] {
        match self.field {
            1 => self.info.version.spare(),
            2 => self.info.tenant.spare(),
            3 => self.info.operations.spare(),
            _ => self.engine.spare(),
        }
    }

    fn placed(&mut self, count: usize) {
        match self.field {
            1 => self.info.version.grow(count),
            2 => self.info.tenant.grow(count),
            3 => self.info.operations.grow(count),
            _ => self.engine.grow(count),
        }
    }

    fn end(&mut self, path: &[u32]) -> Reading<()> {
        if path == [4] && !self.absent {
            if !self.info.engines.is_empty() {
                self.info.engines.push(" ");
            }
            let Self { info, engine, .. } = self;
            info.engines.push(engine.as_str());
        }
        Ok(())
    }
}

/// `OpenSessionReply{1: session}`.
#[derive(Debug)]
pub(crate) struct Opened {
    id: [u8; SESSION_BYTES],
    length: usize,
}

impl Opened {
    pub(crate) fn new() -> Self {
        Self { id: [0; SESSION_BYTES], length: 0 }
    }

    /// The session, when its id is as long as one is.
    pub(crate) fn session(&self) -> Option<SessionId> {
        (self.length == SESSION_BYTES).then_some(SessionId(self.id))
    }
}

impl Reader for Opened {
    fn begin(&mut self, path: &[u32], length: usize) -> Reading<Take> {
        Ok(if path == [1] && length == SESSION_BYTES { Take::Bytes } else { Take::Skip })
    }

    fn place(&mut self) -> &mut [u8] {
        self.id.get_mut(self.length..).unwrap_or_default()
    }

    fn placed(&mut self, count: usize) {
        self.length += count;
    }
}

/// `RegisterResourceReply{1: resource, 2: missing{1: sha256, 2: offset}}`; of the missing files the first one counts:
/// after it was sent, the agent is asked again.
#[derive(Debug)]
pub(crate) struct Registered {
    id: [u8; RESOURCE_BYTES],
    length: usize,
    hash: [u8; HASH_BYTES],
    hash_length: usize,
    offset: u64,
    missing: usize,
}

/// Bytes of a SHA-256.
pub(crate) const HASH_BYTES: usize = 32;

impl Registered {
    pub(crate) fn new() -> Self {
        Self {
            id: [0; RESOURCE_BYTES],
            length: 0,
            hash: [0; HASH_BYTES],
            hash_length: 0,
            offset: 0,
            missing: 0,
        }
    }

    /// The resource, when its name is as long as one is.
    pub(crate) fn resource(&self) -> Option<ResourceId> {
        (self.length == RESOURCE_BYTES && self.id.is_ascii()).then_some(ResourceId::of_bytes(self.id))
    }

    /// The first file the agent lacks, and how much of it it has.
    pub(crate) fn missing(&self) -> Option<([u8; HASH_BYTES], u64)> {
        (self.missing > 0).then_some((self.hash, self.offset))
    }
}

impl Reader for Registered {
    fn begin(&mut self, path: &[u32], length: usize) -> Reading<Take> {
        Ok(match path {
            [1] if length == RESOURCE_BYTES => Take::Bytes,
            [2] => {
                self.missing += 1;
                if self.missing == 1 { Take::Enter } else { Take::Skip }
            }
            [2, 1] if length == HASH_BYTES => Take::Bytes,
            _ => Take::Skip,
        })
    }

    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        if path == [2, 2] {
            self.offset = value;
        }
        Ok(())
    }

    fn place(&mut self) -> &mut [u8] {
        let place = if self.missing > 0 {
            self.hash.get_mut(self.hash_length..)
        } else {
            self.id.get_mut(self.length..)
        };
        place.unwrap_or_default()
    }

    fn placed(&mut self, count: usize) {
        if self.missing > 0 {
            self.hash_length += count;
        } else {
            self.length += count;
        }
    }
}

/// `UploadReply{1: offset}`.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub(crate) offset: u64,
}

impl Reader for Received {
    fn number(&mut self, path: &[u32], value: u64) -> Reading<()> {
        if path == [1] {
            self.offset = value;
        }
        Ok(())
    }
}
