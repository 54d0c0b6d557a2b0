//! ONNX files before any engine sees them: what goes in and out, the metadata, and whether the file may be loaded.
//!
//! *External data.* An ONNX tensor may keep its bytes in another file, named by a path, and engines open such paths
//! relative to wherever they run. No engine of the agent ever opens a file for a guest: [`scan`] takes the
//! bytes from the same resource and writes them into the model, and refuses names the resource does not have.
//!
//! *Source:* onnx.proto3 of ONNX IR version 11; only the fields read here are declared.

use std::collections::{BTreeSet, HashMap, HashSet};

use bytes::{BufMut, Bytes};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use vaccel_proto::Error;
use vaccel_proto::error::shown;
use vaccel_proto::v1::DType;

use super::file::{AXES_MAX, INITIALIZER_BYTES_MAX, Port, Scanned, check_window, is_order, refuse};
use super::protobuf::{DEPTH_MAX, PARTS_MAX, Parts, count_parts, for_each_field, messages};

/// Operators that are not run: joining text to itself makes a terabyte of a byte in 40 nodes, outside of every engine's
/// own limits. No call takes or gives text.
const REFUSED_OPERATORS: &[&str] = &["StringConcat"];

/// How often the bytes of other files may be in a model: once, and again for weights that two tensors share.
const INLINED_TIMES_MAX: usize = 2;

/// Reads an ONNX model of a resource that has these files.
///
/// # Errors
/// `MODEL_REJECTED`: bytes that are not ONNX, sizes that do not add up, or external data that is not in the resource.
pub(super) fn scan(bytes: &Bytes, files: &[(&str, Bytes)]) -> Result<Scanned, Error> {
    let not_onnx = |why: &dyn std::fmt::Display| {
        refuse(format!("expected an ONNX model, these {} bytes are not one ({why})", bytes.len()))
    };
    count_parts(bytes, Part::Model, &mut 0, DEPTH_MAX)?;
    let model = ModelProto::decode(bytes.clone()).map_err(|error| not_onnx(&error))?;
    let graph = model.graph.as_ref().ok_or_else(|| not_onnx(&"it has no graph"))?;
    if graph.node.is_empty() {
        return Err(not_onnx(&"its graph has no nodes"));
    }
    let mut external = false;
    check_graph(graph, &mut external, true)?;
    for function in &model.functions {
        check_nodes(&function.node, &mut external)?;
    }
    Functions::new(&model.functions).check_size(&graph.node)?;
    let files_by_name: HashMap<&str, &Bytes> = files.iter().map(|(name, bytes)| (*name, bytes)).collect();
    let bytes = if external { inline_external(bytes, &files_by_name)? } else { bytes.clone() };

    let initialized: HashSet<&str> = graph.initializer.iter().map(|tensor| &*tensor.name).collect();
    let inputs: Vec<_> = graph.input.iter().filter(|input| !initialized.contains(&*input.name)).collect();
    let mut operators = BTreeSet::new();
    name_operators(&graph.node, &mut operators);
    for function in &model.functions {
        name_operators(&function.node, &mut operators);
    }
    for function in &model.functions {
        operators.remove(&function.name);
    }
    Ok(Scanned {
        bytes,
        has_rows: is_batch(inputs.iter().copied().chain(&graph.output)),
        inputs: inputs.into_iter().map(port).collect::<Result<_, _>>()?,
        outputs: graph.output.iter().map(port).collect::<Result<_, _>>()?,
        metadata: model.metadata_props.into_iter().map(|entry| (entry.key, entry.value)).collect(),
        operators,
    })
}

/// Collects the operators of these nodes and of the graphs inside them.
fn name_operators(nodes: &[NodeProto], names: &mut BTreeSet<String>) {
    for node in nodes {
        if !names.contains(&node.op_type) {
            names.insert(node.op_type.clone());
        }
        for attribute in &node.attribute {
            for inner in attribute.g.iter().chain(&attribute.graphs) {
                name_operators(&inner.node, names);
            }
        }
    }
}

/// Whether all of these begin with one open dimension, the same for all, that exporters call a batch. That it is open
/// alone says nothing: it may be a length, along which what a model computes depends.
fn is_batch<'a>(mut ports: impl Iterator<Item = &'a ValueInfoProto>) -> bool {
    fn first(info: &ValueInfoProto) -> Option<&str> {
        let first = info.r#type.as_ref()?.tensor_type.as_ref()?.shape.as_ref()?.dim.first()?;
        Some(&first.dim_param)
            .filter(|name| first.dim_value.is_none() && !name.is_empty())
            .map(String::as_str)
    }
    let Some(name) = ports.next().and_then(first) else { return false };
    let lower = name.to_ascii_lowercase();
    (lower.contains("batch") || ["n", "b", "bs"].contains(&&*lower))
        && ports.all(|port| first(port) == Some(name))
}

fn port(info: &ValueInfoProto) -> Result<Port, Error> {
    let name = info.name.clone();
    let Some(tensor) = info.r#type.as_ref().and_then(|r#type| r#type.tensor_type.as_ref()) else {
        return Err(refuse(format!("{} is not a tensor; only tensors go in and out", shown(&name))));
    };
    let dtype = dtype(tensor.elem_type).ok_or_else(|| {
        refuse(format!("{} has element type {}, which is not supported", shown(&name), tensor.elem_type))
    })?;
    let dimension = |dim: &Dimension| dim.dim_value.filter(|value| *value >= 0);
    let shape = tensor.shape.as_ref().map(|shape| shape.dim.iter().map(dimension).collect());
    Ok(Port { name, dtype, shape })
}

/// The type of `TensorProto.DataType`.
fn dtype(onnx: i32) -> Option<DType> {
    Some(match onnx {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        8 => DType::Bytes,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::Bf16,
        _ => return None,
    })
}

/// Checks every tensor a graph writes out. External data is for initializers of the main graph alone.
fn check_graph(graph: &GraphProto, external: &mut bool, main: bool) -> Result<(), Error> {
    for tensor in &graph.initializer {
        check_tensor(tensor)?;
        if tensor.is_external() {
            if !main {
                return Err(misplaced(tensor));
            }
            *external = true;
        }
    }
    if !graph.sparse_initializer.is_empty() {
        return Err(refuse("sparse initializers are not supported; store them dense"));
    }
    check_nodes(&graph.node, external)
}

fn check_nodes(nodes: &[NodeProto], external: &mut bool) -> Result<(), Error> {
    if let Some(node) = nodes.iter().find(|node| REFUSED_OPERATORS.contains(&node.op_type.as_str())) {
        return Err(refuse(format!("operator {} is not run here", node.op_type)));
    }
    for (node, attribute) in nodes.iter().flat_map(|node| node.attribute.iter().map(move |of| (node, of))) {
        check_numbers(node, attribute)?;
        for tensor in attribute.t.iter().chain(&attribute.tensors) {
            check_tensor(tensor)?;
            if tensor.is_external() {
                return Err(misplaced(tensor));
            }
        }
        for inner in attribute.g.iter().chain(&attribute.graphs) {
            check_graph(inner, external, false)?;
        }
        if attribute.sparse_tensor.is_some() || !attribute.sparse_tensors.is_empty() {
            return Err(refuse("sparse constants are not supported; store them dense"));
        }
    }
    Ok(())
}

/// Lists of numbers by which a few bytes make an engine take any amount of memory.
fn check_numbers(node: &NodeProto, attribute: &AttributeProto) -> Result<(), Error> {
    let numbers = &attribute.ints;
    match (node.op_type.as_str(), attribute.name.as_str()) {
        (op, "kernel_shape") => check_window(&shown(op), numbers),
        ("Transpose", "perm") if !is_order(numbers) => Err(refuse(format!(
            "Transpose: expected an order of at most {AXES_MAX} axes, each once, got {numbers:?}"
        ))),
        _ => Ok(()),
    }
}

/// The functions of a model: nodes that stand for other nodes. Engines put those in their place, and functions that
/// call others twice each become any number of nodes.
struct Functions<'a> {
    by_name: HashMap<(&'a str, &'a str), Vec<&'a FunctionProto>>,
    /// Nodes a call becomes, of the functions looked at.
    sizes: HashMap<(&'a str, &'a str), usize>,
}

impl<'a> Functions<'a> {
    fn new(functions: &'a [FunctionProto]) -> Self {
        let mut by_name: HashMap<_, Vec<_>> = HashMap::new();
        for function in functions {
            by_name.entry((plain(&function.domain), function.name.as_str())).or_default().push(function);
        }
        Self { by_name, sizes: HashMap::new() }
    }

    /// Refuses a graph that is too large with all calls replaced.
    fn check_size(&mut self, graph: &'a [NodeProto]) -> Result<(), Error> {
        if self.size(graph, DEPTH_MAX)? <= PARTS_MAX {
            return Ok(());
        }
        Err(refuse(format!("with its functions put in place it has more than {PARTS_MAX} nodes")))
    }

    fn size(&mut self, nodes: &'a [NodeProto], depth_left: usize) -> Result<usize, Error> {
        let depth_left =
            depth_left.checked_sub(1).ok_or_else(|| refuse("its functions call each other too deep"))?;
        let mut size = nodes.len();
        for node in nodes {
            let name = (plain(&node.domain), node.op_type.as_str());
            let called = match (self.sizes.get(&name), self.by_name.get(&name).cloned()) {
                (Some(known), _) => *known,
                (None, None) => 0,
                (None, Some(functions)) => {
                    let mut called = 0_usize;
                    for function in functions {
                        called = called.saturating_add(self.size(&function.node, depth_left)?);
                    }
                    self.sizes.insert(name, called);
                    called
                }
            };
            size = size.saturating_add(called);
            for inner in
                node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs))
            {
                size = size.saturating_add(self.size(&inner.node, depth_left)?);
            }
        }
        Ok(size)
    }
}

/// The default domain of operators has two names.
fn plain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

fn misplaced(tensor: &TensorProto) -> Error {
    refuse(format!(
        "tensor {}: external data is for initializers of the main graph; store it inside",
        shown(&tensor.name)
    ))
}

fn check_tensor(tensor: &TensorProto) -> Result<(), Error> {
    let name = shown(&tensor.name);
    let count = tensor.dims.iter().try_fold(1_u64, |count, dim| u64::try_from(*dim).ok()?.checked_mul(count));
    let size = dtype(tensor.data_type).map_or(1, |dtype| dtype.size().max(1) as u64);
    let bytes =
        count.and_then(|count| count.checked_mul(size)).filter(|bytes| *bytes <= INITIALIZER_BYTES_MAX);
    let Some(bytes) = bytes else {
        return Err(refuse(format!(
            "tensor {name}: dimensions {:?} are negative or beyond {INITIALIZER_BYTES_MAX} bytes",
            tensor.dims
        )));
    };
    // Text and the packed fields (float_data and so on) are counted by the engines; raw bytes must fit exactly.
    if !tensor.raw_data.is_empty()
        && dtype(tensor.data_type).is_some()
        && tensor.raw_data.len() as u64 != bytes
    {
        let got = tensor.raw_data.len();
        return Err(refuse(format!(
            "tensor {name}: expected {bytes} bytes for dimensions {:?}, got {got}",
            tensor.dims
        )));
    }
    Ok(())
}

/// The model with the bytes of external tensors inside, everything else copied as it stands.
fn inline_external(model: &Bytes, files: &HashMap<&str, &Bytes>) -> Result<Bytes, Error> {
    const GRAPH: u32 = 7;
    const INITIALIZER: u32 = 5;
    let mut left = files.values().map(|file| file.len()).sum::<usize>() * INLINED_TIMES_MAX;
    let inlined = rewrite(model, GRAPH, &mut |graph| {
        rewrite(graph, INITIALIZER, &mut |tensor| {
            let decoded = TensorProto::decode(tensor).map_err(|error| refuse(error.to_string()))?;
            if !decoded.is_external() {
                return Ok(tensor.to_vec());
            }
            let data = external_data(&decoded, files)?;
            left = left.checked_sub(data.len()).ok_or_else(|| {
                refuse("its tensors keep more data in other files than those have; store shared data once")
            })?;
            inline_tensor(tensor, &decoded, &data)
        })
    })?;
    Ok(inlined.into())
}

/// Where a tensor says its bytes are.
fn external_data(tensor: &TensorProto, files: &HashMap<&str, &Bytes>) -> Result<Bytes, Error> {
    let name = shown(&tensor.name);
    let entry = |key: &str| {
        tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str())
    };
    let location = entry("location").unwrap_or_default();
    let Some(file) = files.get(location) else {
        return Err(refuse(format!(
            "tensor {name} keeps its data in {}, which is not a file of this resource; upload it with the model",
            shown(location)
        )));
    };
    let number = |key: &str| entry(key).map(|text| text.parse::<usize>()).transpose().ok();
    let range = number("offset").zip(number("length")).and_then(|(offset, length)| {
        let offset = offset.unwrap_or(0);
        let length = length.unwrap_or(file.len().checked_sub(offset)?);
        let end = offset.checked_add(length).filter(|end| *end <= file.len())?;
        Some(file.slice(offset..end))
    });
    range.ok_or_else(|| {
        refuse(format!("tensor {name}: offset and length lie outside its file of {} bytes", file.len()))
    })
}

fn inline_tensor(wire: &[u8], tensor: &TensorProto, data: &Bytes) -> Result<Vec<u8>, Error> {
    const RAW_DATA: u32 = 9;
    check_tensor(&TensorProto { raw_data: data.clone(), ..tensor.clone() })?;
    let mut out = without_external(wire)?;
    encode_key(RAW_DATA, WireType::LengthDelimited, &mut out);
    encode_varint(data.len() as u64, &mut out);
    out.put_slice(data);
    Ok(out)
}

/// A tensor's encoding without the fields that say its data is elsewhere.
fn without_external(tensor: &[u8]) -> Result<Vec<u8>, Error> {
    const EXTERNAL_DATA: u32 = 13;
    const DATA_LOCATION: u32 = 14;
    let mut out = Vec::with_capacity(tensor.len());
    for_each_field(tensor, &mut |tag, field| {
        if ![EXTERNAL_DATA, DATA_LOCATION].contains(&tag) {
            out.put_slice(field.whole);
        }
        Ok(())
    })?;
    Ok(out)
}

/// What becomes of one occurrence of a field.
type Replace<'a> = dyn FnMut(&[u8]) -> Result<Vec<u8>, Error> + 'a;

/// A message with every occurrence of one length-delimited field replaced.
fn rewrite(message: &[u8], field_tag: u32, replace: &mut Replace<'_>) -> Result<Vec<u8>, Error> {
    let mut out = Vec::with_capacity(message.len());
    for_each_field(message, &mut |tag, field| {
        match field.content {
            Some(content) if tag == field_tag => {
                let replaced = replace(content)?;
                encode_key(tag, WireType::LengthDelimited, &mut out);
                encode_varint(replaced.len() as u64, &mut out);
                out.put_slice(&replaced);
            }
            _ => out.put_slice(field.whole),
        }
        Ok(())
    })?;
    Ok(out)
}

/// What the messages of a model are, as far as others are inside them. What is a leaf holds none.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Model,
    Function,
    Graph,
    Node,
    Attribute,
    Tensor,
    Value,
    Type,
    TensorType,
    Shape,
    Leaf,
}

impl Parts for Part {
    fn inside(self, tag: u32) -> Option<(Self, bool)> {
        let inner = match (self, tag) {
            (Self::Model, 25) => Some(Self::Function),
            (Self::Model, 7) | (Self::Attribute, 6 | 11) => Some(Self::Graph),
            (Self::Graph, 1) | (Self::Function, 7) => Some(Self::Node),
            (Self::Node, 5) | (Self::Function, 11) => Some(Self::Attribute),
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) => Some(Self::Tensor),
            (Self::Graph, 11..=13) | (Self::Function, 12) => Some(Self::Value),
            (Self::Value, 2) | (Self::Attribute, 14 | 15) => Some(Self::Type),
            (Self::Type, 1) => Some(Self::TensorType),
            (Self::TensorType, 2) => Some(Self::Shape),
            (Self::Model, 8 | 14 | 20)
            | (Self::Graph, 14..=16)
            | (Self::Node, 1 | 2 | 9)
            | (Self::Attribute, 22 | 23)
            | (Self::Tensor, 13)
            | (Self::Shape, 1) => Some(Self::Leaf),
            _ => None,
        };
        inner.map(|inner| (inner, inner == Self::Leaf))
    }
}

messages! {
    ModelProto {
        graph: Option<GraphProto> = #[prost(message, optional, tag = "7")];
        metadata_props: Vec<StringStringEntryProto> = #[prost(message, repeated, tag = "14")];
        functions: Vec<FunctionProto> = #[prost(message, repeated, tag = "25")];
    }
    FunctionProto {
        name: String = #[prost(string, tag = "1")];
        domain: String = #[prost(string, tag = "10")];
        node: Vec<NodeProto> = #[prost(message, repeated, tag = "7")];
    }
    StringStringEntryProto {
        key: String = #[prost(string, tag = "1")];
        value: String = #[prost(string, tag = "2")];
    }
    GraphProto {
        node: Vec<NodeProto> = #[prost(message, repeated, tag = "1")];
        initializer: Vec<TensorProto> = #[prost(message, repeated, tag = "5")];
        input: Vec<ValueInfoProto> = #[prost(message, repeated, tag = "11")];
        output: Vec<ValueInfoProto> = #[prost(message, repeated, tag = "12")];
        sparse_initializer: Vec<Bytes> = #[prost(bytes = "bytes", repeated, tag = "15")];
    }
    NodeProto {
        op_type: String = #[prost(string, tag = "4")];
        domain: String = #[prost(string, tag = "7")];
        attribute: Vec<AttributeProto> = #[prost(message, repeated, tag = "5")];
    }
    AttributeProto {
        name: String = #[prost(string, tag = "1")];
        ints: Vec<i64> = #[prost(int64, repeated, tag = "8")];
        t: Option<TensorProto> = #[prost(message, optional, tag = "5")];
        g: Option<GraphProto> = #[prost(message, optional, tag = "6")];
        tensors: Vec<TensorProto> = #[prost(message, repeated, tag = "10")];
        graphs: Vec<GraphProto> = #[prost(message, repeated, tag = "11")];
        sparse_tensor: Option<Bytes> = #[prost(bytes = "bytes", optional, tag = "22")];
        sparse_tensors: Vec<Bytes> = #[prost(bytes = "bytes", repeated, tag = "23")];
    }
    TensorProto {
        dims: Vec<i64> = #[prost(int64, repeated, tag = "1")];
        data_type: i32 = #[prost(int32, tag = "2")];
        name: String = #[prost(string, tag = "8")];
        raw_data: Bytes = #[prost(bytes = "bytes", tag = "9")];
        external_data: Vec<StringStringEntryProto> = #[prost(message, repeated, tag = "13")];
        data_location: i32 = #[prost(int32, tag = "14")];
    }
    ValueInfoProto {
        name: String = #[prost(string, tag = "1")];
        r#type: Option<TypeProto> = #[prost(message, optional, tag = "2")];
    }
    TypeProto {
        tensor_type: Option<TensorTypeProto> = #[prost(message, optional, tag = "1")];
    }
    TensorTypeProto {
        elem_type: i32 = #[prost(int32, tag = "1")];
        shape: Option<TensorShapeProto> = #[prost(message, optional, tag = "2")];
    }
    TensorShapeProto {
        dim: Vec<Dimension> = #[prost(message, repeated, tag = "1")];
    }
    Dimension {
        dim_value: Option<i64> = #[prost(int64, optional, tag = "1")];
        dim_param: String = #[prost(string, tag = "2")];
    }
}

impl TensorProto {
    fn is_external(&self) -> bool {
        const EXTERNAL: i32 = 1;
        self.data_location == EXTERNAL || !self.external_data.is_empty()
    }
}
