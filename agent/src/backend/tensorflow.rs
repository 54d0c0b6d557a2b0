//! Frozen TensorFlow graphs before the engine sees them: what goes in and out, and whether the file may be loaded.
//!
//! *Inputs* are the placeholders, in the order of the file; *outputs* the nodes whose result no other node takes. The
//! format does not say what type and shape those have: the engine that loads the graph does.
//!
//! *Constants.* A tensor of any size may be written as one number. The sizes they come to are added up here, before the
//! engine writes them out. *Source:* graph.proto, attr_value.proto and tensor.proto of TensorFlow 2; only the fields
//! read here are declared.

use std::collections::{BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use prost::{Message, Oneof};
use vaccel_proto::Error;
use vaccel_proto::error::shown;
use vaccel_proto::v1::DType;

use super::file::{INITIALIZER_BYTES_MAX, Port, Scanned, check_window, refuse};
use super::protobuf::{DEPTH_MAX, Parts, count_parts, messages};

/// Nodes times inputs of a graph: the engine looks for each input among all nodes. Graphs in use come to a fifth.
const LOOKUPS_MAX: usize = 1 << 30;

/// Outputs of one node: the engine makes as many as the highest number that another node names. A split into 1000 is
/// rare, and each takes 200 bytes.
const NODE_OUTPUTS_MAX: usize = 4096;

/// Outputs of all nodes that others name by number, for the same reason.
const OUTPUTS_MAX: usize = 1 << 18;

/// Bytes of all constants that are written as one number: in use are biases and masks of some kilobytes.
const SPLAT_BYTES_MAX: u64 = 32 << 20;

/// Operators without a result: they order others, or check them.
const WITHOUT_RESULT: &[&str] = &["NoOp", "Assert"];

/// Loops and branches of TensorFlow 1: the engine reads them and cannot run them.
const REFUSED_OPERATORS: &[&str] =
    &["Enter", "Exit", "LoopCond", "NextIteration", "Switch", "Merge", "RefSwitch", "RefMerge"];

/// Reads a graph.
///
/// # Errors
/// `MODEL_REJECTED`: bytes that are no graph, sizes that do not add up, or what the engine would run wrongly.
pub(super) fn scan(bytes: &Bytes) -> Result<Scanned, Error> {
    let not_a_graph = |why: &dyn std::fmt::Display| {
        refuse(format!("expected a frozen TensorFlow graph, these {} bytes are not one ({why})", bytes.len()))
    };
    count_parts(bytes, Part::Graph, &mut 0, DEPTH_MAX)?;
    let graph = GraphDef::decode(bytes.clone()).map_err(|error| not_a_graph(&error))?;
    if graph.node.is_empty() {
        return Err(not_a_graph(&"it has no nodes"));
    }
    let taken = check_edges(&graph.node)?;
    let mut splat = 0;
    for node in &graph.node {
        check_node(node, &mut splat)?;
    }
    let inputs = graph.node.iter().filter(|node| node.op == "Placeholder");
    let is_output = |node: &&NodeDef| {
        !taken.contains(node.name.as_str())
            && !["Placeholder", "Const"].contains(&node.op.as_str())
            && !WITHOUT_RESULT.contains(&node.op.as_str())
    };
    let outputs = graph.node.iter().filter(is_output);
    let outputs: Vec<Port> = outputs
        .map(|node| Port { name: node.name.clone(), dtype: DType::Unspecified, shape: None })
        .collect();
    if outputs.is_empty() {
        return Err(refuse(
            "expected a graph that computes something, this one only has constants and inputs",
        ));
    }
    let mut operators = BTreeSet::new();
    for node in &graph.node {
        if !operators.contains(&node.op) {
            operators.insert(node.op.clone());
        }
    }
    Ok(Scanned {
        // No name tells a batch from another open dimension.
        has_rows: false,
        bytes: bytes.clone(),
        inputs: inputs.map(placeholder).collect::<Result<_, _>>()?,
        outputs,
        metadata: HashMap::new(),
        operators,
    })
}

/// Checks names and what nodes take from each other; gives the names of the nodes that others take from.
fn check_edges(nodes: &[NodeDef]) -> Result<HashSet<&str>, Error> {
    let edges: usize = nodes.iter().map(|node| node.input.len()).sum();
    if nodes.len().saturating_mul(nodes.len() + edges) > LOOKUPS_MAX {
        return Err(refuse(format!(
            "a graph of {} nodes with {edges} inputs is larger than this agent reads",
            nodes.len()
        )));
    }
    let mut names = HashSet::new();
    if let Some(twice) = nodes.iter().find(|node| !names.insert(node.name.as_str())) {
        return Err(refuse(format!("two nodes have the name {}", shown(&twice.name))));
    }
    let mut outputs: HashMap<&str, usize> = HashMap::new();
    for node in nodes {
        for input in node.input.iter().filter(|input| !input.starts_with('^')) {
            let (name, output) = source(input).ok_or_else(|| {
                let name = shown(&node.name);
                refuse(format!("node {name} takes {}, which names no output", shown(input)))
            })?;
            if !names.contains(name) {
                let (name, node) = (shown(name), shown(&node.name));
                return Err(refuse(format!("node {node} takes from {name}, which is not in the graph")));
            }
            let highest = outputs.entry(name).or_default();
            *highest = (*highest).max(output + 1);
        }
        // What only orders nodes must be there too.
        let orders = node.input.iter().filter_map(|input| input.strip_prefix('^'));
        if let Some(absent) = orders.into_iter().find(|name| !names.contains(name)) {
            let (absent, node) = (shown(absent), shown(&node.name));
            return Err(refuse(format!("node {node} comes after {absent}, which is not in the graph")));
        }
    }
    if outputs.values().sum::<usize>() > OUTPUTS_MAX {
        return Err(refuse(format!("its nodes have more than {OUTPUTS_MAX} outputs together")));
    }
    Ok(outputs.into_keys().collect())
}

/// Node and output of an input written as `node` or `node:output`.
fn source(input: &str) -> Option<(&str, usize)> {
    let Some((name, output)) = input.split_once(':') else { return Some((input, 0)) };
    let output = output.parse().ok().filter(|output| *output < NODE_OUTPUTS_MAX)?;
    Some((name, output))
}

fn check_node(node: &NodeDef, splat: &mut u64) -> Result<(), Error> {
    if REFUSED_OPERATORS.contains(&node.op.as_str()) {
        let (name, op) = (shown(&node.name), &node.op);
        return Err(refuse(format!(
            "node {name}: operator {op} (control flow of TensorFlow 1) is not run here"
        )));
    }
    for (tensor, name) in node.attr.iter().filter_map(|attr| Some((attr.tensor()?, &node.name))) {
        check_tensor(name, tensor, splat)?;
    }
    if let Some(window) = node.attr("ksize").and_then(AttrEntry::list) {
        check_window(&format!("node {}", shown(&node.name)), &window.i)?;
    }
    // The engine does not look at these: it would give wrong numbers.
    let misread = match node.op.as_str() {
        "Conv2D" | "DepthwiseConv2dNative" => {
            let dilated = |attr: &AttrEntry| attr.list().is_some_and(|list| list.i.iter().any(|by| *by != 1));
            node.attr("dilations").is_some_and(dilated).then_some("dilations other than 1")
        }
        "BiasAdd" => (node.attr("data_format").and_then(AttrEntry::text) == Some(b"NCHW"))
            .then_some("data_format NCHW"),
        _ => None,
    };
    match misread {
        Some(what) => {
            let (name, op) = (shown(&node.name), &node.op);
            Err(refuse(format!("node {name}: {op} with {what} is not run here; export the model to ONNX")))
        }
        None => Ok(()),
    }
}

/// Checks a constant's size against its data, and adds it up if it is one number many times over.
fn check_tensor(node: &str, tensor: &TensorProto, splat: &mut u64) -> Result<(), Error> {
    let dims: Vec<i64> = tensor.shape.iter().flat_map(|shape| &shape.dim).map(|dim| dim.size).collect();
    let count = dims.iter().try_fold(1_u64, |count, dim| u64::try_from(*dim).ok()?.checked_mul(count));
    // Text is not computed with; its elements are pointers.
    let size = dtype(tensor.dtype).map_or(16, |dtype| dtype.size() as u64);
    let bytes =
        count.and_then(|count| count.checked_mul(size)).filter(|bytes| *bytes <= INITIALIZER_BYTES_MAX);
    let Some(bytes) = bytes else {
        return Err(refuse(format!(
            "node {}: dimensions {dims:?} are negative or beyond {INITIALIZER_BYTES_MAX} bytes",
            shown(node)
        )));
    };
    let values = tensor.values();
    let written = tensor.content.len() as u64;
    if written > 0 && dtype(tensor.dtype).is_some() && written != bytes {
        return Err(refuse(format!(
            "node {}: expected {bytes} bytes for dimensions {dims:?}, got {written}",
            shown(node)
        )));
    }
    if written == 0 && values == 1 {
        *splat = splat.saturating_add(bytes);
        if *splat > SPLAT_BYTES_MAX {
            return Err(refuse(format!(
                "node {}: constants written as one number come to more than {SPLAT_BYTES_MAX} bytes together",
                shown(node)
            )));
        }
    }
    Ok(())
}

fn placeholder(node: &NodeDef) -> Result<Port, Error> {
    let name = node.name.clone();
    let number = node.attr("dtype").and_then(AttrEntry::r#type).unwrap_or_default();
    let dtype = dtype(number).ok_or_else(|| {
        refuse(format!("{} has element type {number}, which is not supported", shown(&name)))
    })?;
    let shape = node.attr("shape").and_then(AttrEntry::shape).filter(|shape| !shape.unknown_rank);
    let shape = shape.map(|shape| -> Result<Vec<Option<i64>>, Error> {
        let dimension = |dim: &Dim| match dim.size {
            -1 => Ok(None),
            size if size >= 0 => Ok(Some(size)),
            size => Err(refuse(format!("{} has a dimension of {size}", shown(&name)))),
        };
        shape.dim.iter().map(dimension).collect()
    });
    Ok(Port { shape: shape.transpose()?, name, dtype })
}

/// The type of types.proto's `DataType`.
fn dtype(number: i32) -> Option<DType> {
    Some(match number {
        1 => DType::F32,
        2 => DType::F64,
        3 => DType::I32,
        4 => DType::U8,
        5 => DType::I16,
        6 => DType::I8,
        9 => DType::I64,
        10 => DType::Bool,
        14 => DType::Bf16,
        17 => DType::U16,
        19 => DType::F16,
        22 => DType::U32,
        23 => DType::U64,
        _ => return None,
    })
}

/// What the messages of a graph are, as far as others are inside them.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Graph,
    Library,
    Function,
    Operator,
    OperatorAttr,
    Node,
    AttrEntry,
    Attr,
    List,
    NamedAttrs,
    Tensor,
    Variant,
    Shape,
    Versions,
    Leaf,
}

impl Parts for Part {
    fn inside(self, tag: u32) -> Option<(Self, bool)> {
        let inner = match (self, tag) {
            (Self::Graph, 1) | (Self::Function, 3) => Self::Node,
            (Self::Graph, 2) => Self::Library,
            (Self::Graph, 4) => Self::Versions,
            (Self::Library, 1) => Self::Function,
            (Self::Function, 1) => Self::Operator,
            (Self::Operator, 4) => Self::OperatorAttr,
            (Self::OperatorAttr, 3 | 7) | (Self::AttrEntry, 2) => Self::Attr,
            (Self::Node, 5) | (Self::NamedAttrs, 2) | (Self::Function, 5) => Self::AttrEntry,
            (Self::Attr, 1) => Self::List,
            (Self::Attr, 7) | (Self::List, 7) | (Self::Tensor, 2) => Self::Shape,
            (Self::Attr, 8) | (Self::List, 8) | (Self::Variant, 3) => Self::Tensor,
            (Self::Attr, 10) | (Self::List, 9) => Self::NamedAttrs,
            (Self::Tensor, 15) => Self::Variant,
            (Self::Library, 2)
            | (Self::Function, 4)
            | (Self::Operator, 2 | 3 | 8)
            | (Self::Node, 3)
            | (Self::List, 2)
            | (Self::Tensor, 8 | 14)
            | (Self::Shape, 2) => Self::Leaf,
            _ => return None,
        };
        Some((inner, inner == Self::Leaf))
    }
}

messages! {
    GraphDef {
        node: Vec<NodeDef> = #[prost(message, repeated, tag = "1")];
    }
    NodeDef {
        name: String = #[prost(string, tag = "1")];
        op: String = #[prost(string, tag = "2")];
        input: Vec<String> = #[prost(string, repeated, tag = "3")];
        attr: Vec<AttrEntry> = #[prost(message, repeated, tag = "5")];
    }
    AttrEntry {
        key: String = #[prost(string, tag = "1")];
        value: Option<AttrValue> = #[prost(message, optional, tag = "2")];
    }
    AttrValue {
        value: Option<Value> = #[prost(oneof = "Value", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10")];
    }
    ListValue {
        i: Vec<i64> = #[prost(int64, repeated, tag = "3")];
    }
    TensorProto {
        dtype: i32 = #[prost(int32, tag = "1")];
        shape: Option<ShapeProto> = #[prost(message, optional, tag = "2")];
        content: Bytes = #[prost(bytes = "bytes", tag = "4")];
        floats: Vec<f32> = #[prost(float, repeated, tag = "5")];
        doubles: Vec<f64> = #[prost(double, repeated, tag = "6")];
        ints: Vec<i32> = #[prost(int32, repeated, tag = "7")];
        texts: Vec<Bytes> = #[prost(bytes = "bytes", repeated, tag = "8")];
        longs: Vec<i64> = #[prost(int64, repeated, tag = "10")];
    }
    ShapeProto {
        dim: Vec<Dim> = #[prost(message, repeated, tag = "2")];
        unknown_rank: bool = #[prost(bool, tag = "3")];
    }
    Dim {
        size: i64 = #[prost(int64, tag = "1")];
    }
}

/// The fields of `AttrValue` are one of each other: what a second one does to a first must be the same here as in the
/// engine, so all are declared.
#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum Value {
    #[prost(message, tag = "1")]
    List(ListValue),
    #[prost(bytes = "bytes", tag = "2")]
    Text(Bytes),
    #[prost(int64, tag = "3")]
    Int(i64),
    #[prost(float, tag = "4")]
    Float(f32),
    #[prost(bool, tag = "5")]
    Truth(bool),
    #[prost(int32, tag = "6")]
    Type(i32),
    #[prost(message, tag = "7")]
    Shape(ShapeProto),
    #[prost(message, tag = "8")]
    Tensor(TensorProto),
    #[prost(string, tag = "9")]
    Placeholder(String),
    #[prost(bytes = "bytes", tag = "10")]
    Function(Bytes),
}

impl TensorProto {
    /// The most numbers that one of its lists has: one of one is repeated to fill the tensor.
    fn values(&self) -> usize {
        let lists =
            [self.floats.len(), self.doubles.len(), self.ints.len(), self.longs.len(), self.texts.len()];
        // Any list of one counts: which is read depends on the type.
        if lists.contains(&1) { 1 } else { lists.into_iter().max().unwrap_or(0) }
    }
}

impl NodeDef {
    /// The attribute of a name; of several the last, which is what a map keeps.
    fn attr(&self, name: &str) -> Option<&AttrEntry> {
        self.attr.iter().rfind(|attr| attr.key == name)
    }
}

impl AttrEntry {
    fn value(&self) -> Option<&Value> {
        self.value.as_ref()?.value.as_ref()
    }

    fn tensor(&self) -> Option<&TensorProto> {
        if let Value::Tensor(tensor) = self.value()? { Some(tensor) } else { None }
    }

    fn list(&self) -> Option<&ListValue> {
        if let Value::List(list) = self.value()? { Some(list) } else { None }
    }

    fn text(&self) -> Option<&[u8]> {
        if let Value::Text(text) = self.value()? { Some(text) } else { None }
    }

    fn r#type(&self) -> Option<i32> {
        if let Value::Type(number) = self.value()? { Some(*number) } else { None }
    }

    fn shape(&self) -> Option<&ShapeProto> {
        if let Value::Shape(shape) = self.value()? { Some(shape) } else { None }
    }
}
