//! Small TensorFlow Lite models, written as FlatBuffers.
//!
//! *Source:* schema.fbs, version 3; the numbers below are places of its fields.

use bytes::Bytes;

pub const F32: i8 = 0;
pub const I32: i8 = 2;

pub const ADD: i32 = 0;
pub const MAX_POOL_2D: i32 = 17;
pub const RESHAPE: i32 = 22;
pub const RESIZE_BILINEAR: i32 = 23;
pub const PAD: i32 = 34;
pub const TRANSPOSE: i32 = 39;
pub const LOGISTIC: i32 = 14;
pub const BROADCAST_TO: i32 = 130;

/// A value of a table's field.
#[derive(Clone)]
pub enum Value {
    I8(i8),
    I32(i32),
    Bytes(Vec<u8>),
    Ints(Vec<i32>),
    Longs(Vec<i64>),
    Table(Table),
    Tables(Vec<Table>),
}

/// Fields by place.
pub type Table = Vec<(usize, Value)>;

/// A whole FlatBuffer.
pub fn file(root: &Table, identifier: &[u8; 4]) -> Bytes {
    let mut out = vec![0; 4];
    out.extend_from_slice(identifier);
    let at = write_table(&mut out, root);
    point(&mut out, 0, at);
    out.into()
}

fn point(out: &mut [u8], place: usize, target: usize) {
    let offset = u32::try_from(target - place).unwrap();
    out[place..place + 4].copy_from_slice(&offset.to_le_bytes());
}

fn pad(out: &mut Vec<u8>, boundary: usize) {
    out.resize(out.len().next_multiple_of(boundary), 0);
}

fn write_table(out: &mut Vec<u8>, table: &Table) -> usize {
    let count = table.iter().map(|(field, _)| field + 1).max().unwrap_or(0);
    pad(out, 4);
    // The vtable is padded in front, so that the table after it is aligned.
    let vtable_bytes = 4 + 2 * count;
    out.resize(out.len() + vtable_bytes % 4, 0);
    let vtable = out.len();
    out.resize(vtable + vtable_bytes, 0);
    let at = out.len();
    out.extend_from_slice(&i32::try_from(at - vtable).unwrap().to_le_bytes());
    for (index, (field, value)) in table.iter().enumerate() {
        let offset = u16::try_from(4 + 4 * index).unwrap();
        out[vtable + 4 + 2 * field..][..2].copy_from_slice(&offset.to_le_bytes());
        out.extend_from_slice(&match value {
            Value::I8(number) => [number.to_le_bytes()[0], 0, 0, 0],
            Value::I32(number) => number.to_le_bytes(),
            _ => [0; 4],
        });
    }
    let table_bytes = u16::try_from(out.len() - at).unwrap();
    out[vtable..vtable + 2].copy_from_slice(&u16::try_from(vtable_bytes).unwrap().to_le_bytes());
    out[vtable + 2..vtable + 4].copy_from_slice(&table_bytes.to_le_bytes());
    for (index, (_, value)) in table.iter().enumerate() {
        if let Some(target) = write_value(out, value) {
            point(out, at + 4 + 4 * index, target);
        }
    }
    at
}

/// Writes what lies outside of its table.
fn write_value(out: &mut Vec<u8>, value: &Value) -> Option<usize> {
    let count = |count: usize| u32::try_from(count).unwrap().to_le_bytes();
    pad(out, 4);
    let at = out.len();
    match value {
        Value::I8(_) | Value::I32(_) => return None,
        Value::Table(table) => return Some(write_table(out, table)),
        Value::Bytes(bytes) => {
            out.extend_from_slice(&count(bytes.len()));
            out.extend_from_slice(bytes);
            // Text ends with a zero.
            out.push(0);
        }
        Value::Ints(numbers) => {
            out.extend_from_slice(&count(numbers.len()));
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        Value::Longs(numbers) => {
            // The numbers lie on their own boundary, the count right before them.
            if out.len().is_multiple_of(8) {
                out.extend_from_slice(&[0; 4]);
            }
            let at = out.len();
            out.extend_from_slice(&count(numbers.len()));
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            return Some(at);
        }
        Value::Tables(tables) => {
            out.extend_from_slice(&count(tables.len()));
            out.resize(out.len() + 4 * tables.len(), 0);
            for (index, table) in tables.iter().enumerate() {
                let target = write_table(out, table);
                point(out, at + 4 + 4 * index, target);
            }
        }
    }
    Some(at)
}

/// A model as its parts.
#[derive(Clone, Default)]
pub struct Lite {
    tensors: Vec<Table>,
    buffers: Vec<Table>,
    codes: Vec<Table>,
    operators: Vec<Table>,
    pub inputs: Vec<i32>,
    pub outputs: Vec<i32>,
}

fn index(length: usize) -> i32 {
    i32::try_from(length - 1).unwrap()
}

impl Lite {
    /// Adds a tensor; an axis of -1 is open. Returns its index.
    pub fn tensor(&mut self, name: &str, r#type: i8, shape: &[i32]) -> i32 {
        let sizes = shape.iter().map(|dim| if *dim == -1 { 1 } else { *dim }).collect();
        let mut tensor =
            vec![(0, Value::Ints(sizes)), (1, Value::I8(r#type)), (3, Value::Bytes(name.into()))];
        if shape.contains(&-1) {
            tensor.push((7, Value::Ints(shape.to_vec())));
        }
        self.tensors.push(tensor);
        index(self.tensors.len())
    }

    /// Adds fields to a tensor.
    pub fn extend(&mut self, tensor: i32, fields: Table) {
        self.tensors[usize::try_from(tensor).unwrap()].extend(fields);
    }

    /// Adds a constant. Returns its index.
    pub fn constant(&mut self, name: &str, r#type: i8, shape: &[i32], data: Vec<u8>) -> i32 {
        let tensor = self.tensor(name, r#type, shape);
        if self.buffers.is_empty() {
            self.buffers.push(vec![]);
        }
        self.buffers.push(vec![(0, Value::Bytes(data))]);
        self.extend(tensor, vec![(2, Value::I32(index(self.buffers.len())))]);
        tensor
    }

    pub fn i32s(&mut self, name: &str, shape: &[i32], values: &[i32]) -> i32 {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name, I32, shape, data)
    }

    pub fn f32s(&mut self, name: &str, shape: &[i32], values: &[f32]) -> i32 {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name, F32, shape, data)
    }

    /// Adds an operator with a kind of its own.
    pub fn operator(&mut self, number: i32, inputs: &[i32], outputs: &[i32], options: Option<(i8, Table)>) {
        let old = i8::try_from(number).unwrap_or(127);
        self.code(vec![(0, Value::I8(old)), (3, Value::I32(number))], inputs, outputs, options);
    }

    pub fn custom(&mut self, name: &str, inputs: &[i32], outputs: &[i32]) {
        let code = vec![(0, Value::I8(32)), (1, Value::Bytes(name.into())), (3, Value::I32(32))];
        self.code(code, inputs, outputs, None);
    }

    fn code(&mut self, code: Table, inputs: &[i32], outputs: &[i32], options: Option<(i8, Table)>) {
        self.codes.push(code);
        let mut operator = vec![
            (0, Value::I32(index(self.codes.len()))),
            (1, Value::Ints(inputs.to_vec())),
            (2, Value::Ints(outputs.to_vec())),
        ];
        if let Some((member, options)) = options {
            operator.push((3, Value::I8(member)));
            operator.push((4, Value::Table(options)));
        }
        self.operators.push(operator);
    }

    pub fn finish(self) -> Bytes {
        let graph = vec![
            (0, Value::Tables(self.tensors)),
            (1, Value::Ints(self.inputs)),
            (2, Value::Ints(self.outputs)),
            (3, Value::Tables(self.operators)),
        ];
        let buffers = if self.buffers.is_empty() { vec![vec![]] } else { self.buffers };
        let model = vec![
            (0, Value::I32(3)),
            (1, Value::Tables(self.codes)),
            (2, Value::Tables(vec![graph])),
            (4, Value::Tables(buffers)),
        ];
        file(&model, b"TFL3")
    }
}

/// A model of one operator on `x`, of these shapes, and perhaps a constant of whole numbers.
pub fn single(
    number: i32,
    (x, y): (&[i32], &[i32]),
    parameter: Option<&[i32]>,
    options: Option<(i8, Table)>,
) -> Bytes {
    let mut lite = Lite::default();
    let x = lite.tensor("x", F32, x);
    let mut inputs = vec![x];
    if let Some(values) = parameter {
        inputs.push(lite.i32s("parameter", &[i32::try_from(values.len()).unwrap()], values));
    }
    let y = lite.tensor("y", F32, y);
    lite.operator(number, &inputs, &[y], options);
    lite.inputs = vec![x];
    lite.outputs = vec![y];
    lite.finish()
}
