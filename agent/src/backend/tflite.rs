//! TensorFlow Lite models before the engine sees them: what goes in and out, and whether the file may be loaded.
//!
//! *Shapes* are those of the file; an axis that its `shape_signature` leaves open takes any size, and
//! [`with_input_shapes`] writes the size of a call into the file before the engine reads it. *Constants:* the engine
//! computes what is constant while it reads, so what would grow there is refused here. *Source:* schema.fbs, version 3.

use std::collections::{BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::error::shown;
use vaccel_proto::v1::DType;

use super::file::{AXES_MAX, INITIALIZER_BYTES_MAX, Port, Scanned, check_window, is_order, refuse};
use super::flatbuffer::{Table, Vector};

/// Operators of a model: the engine compares the name of each with all before. The largest in use have some 5000.
const OPERATORS_MAX: usize = 1 << 14;

/// Tensors of a model, for the same reason: each constant is compared with those before.
const TENSORS_MAX: usize = 1 << 16;

/// Inputs and outputs of all operators together.
const EDGES_MAX: usize = 1 << 18;

/// Elements of the shape a tensor is given: as bytes as much as one initializer may have.
const ELEMENTS_MAX: u64 = INITIALIZER_BYTES_MAX;

/// Places of the fields that are read here, by table.
mod field {
    pub(super) const MODEL_OPERATOR_CODES: usize = 1;
    pub(super) const MODEL_SUBGRAPHS: usize = 2;
    pub(super) const MODEL_BUFFERS: usize = 4;
    pub(super) const MODEL_METADATA: usize = 6;
    pub(super) const GRAPH_TENSORS: usize = 0;
    pub(super) const GRAPH_INPUTS: usize = 1;
    pub(super) const GRAPH_OUTPUTS: usize = 2;
    pub(super) const GRAPH_OPERATORS: usize = 3;
    pub(super) const TENSOR_SHAPE: usize = 0;
    pub(super) const TENSOR_TYPE: usize = 1;
    pub(super) const TENSOR_BUFFER: usize = 2;
    pub(super) const TENSOR_NAME: usize = 3;
    pub(super) const TENSOR_SPARSITY: usize = 6;
    pub(super) const TENSOR_SHAPE_SIGNATURE: usize = 7;
    pub(super) const OPERATOR_CODE: usize = 0;
    pub(super) const OPERATOR_INPUTS: usize = 1;
    pub(super) const OPERATOR_OUTPUTS: usize = 2;
    pub(super) const OPERATOR_OPTIONS: usize = 4;
    pub(super) const CODE_OLD: usize = 0;
    pub(super) const CODE_CUSTOM: usize = 1;
    pub(super) const CODE_BUILTIN: usize = 3;
    pub(super) const BUFFER_DATA: usize = 0;
    pub(super) const BUFFER_OFFSET: usize = 1;
    pub(super) const METADATA_NAME: usize = 0;
    pub(super) const METADATA_BUFFER: usize = 1;
}

/// What is not done to constants: the engine computes it while it reads, before anything is known of what comes out.
const REFUSED_ON_CONSTANTS: &[&str] = &[
    "AVERAGE_POOL_2D",
    "BROADCAST_TO",
    "MAX_POOL_2D",
    "PAD",
    "PADV2",
    "RESIZE_BILINEAR",
    "RESIZE_NEAREST_NEIGHBOR",
];

/// Steps and spreads of windows: beyond the side of every image.
const STEP_MAX: i32 = 1 << 15;

/// The number of operators that have only a name.
const CUSTOM: i32 = 32;

/// Stands in the old field, of one byte, for a number that does not fit there.
const IN_NEW_FIELD: i8 = 127;

/// Names of the operators, by number.
const NAMES: &str = "\
    ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE EMBEDDING_LOOKUP FLOOR \
    FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION LOGISTIC \
    LSH_PROJECTION LSTM MAX_POOL_2D MUL RELU RELU_N1_TO_1 RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX SPACE_TO_DEPTH \
    SVDF TANH CONCAT_EMBEDDINGS SKIP_GRAM CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD UNIDIRECTIONAL_SEQUENCE_RNN GATHER \
    BATCH_TO_SPACE_ND SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE \
    BIDIRECTIONAL_SEQUENCE_RNN EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE BIDIRECTIONAL_SEQUENCE_LSTM CAST PRELU MAXIMUM \
    ARG_MAX MINIMUM LESS NEG PADV2 GREATER GREATER_EQUAL LESS_EQUAL SELECT SLICE SIN TRANSPOSE_CONV SPARSE_TO_DENSE \
    TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG SUM SQRT RSQRT SHAPE POW ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK \
    LOGICAL_OR ONE_HOT LOGICAL_AND LOGICAL_NOT UNPACK REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL \
    FLOOR_MOD RANGE RESIZE_NEAREST_NEIGHBOR LEAKY_RELU SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL \
    REVERSE_V2 ADD_N GATHER_ND COS WHERE RANK ELU REVERSE_SEQUENCE MATRIX_DIAG QUANTIZE MATRIX_SET_DIAG ROUND \
    HARD_SWISH IF WHILE NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM \
    BATCH_MATMUL PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM CALL_ONCE BROADCAST_TO RFFT2D CONV_3D IMAG REAL COMPLEX_ABS \
    HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL CONV_3D_TRANSPOSE VAR_HANDLE READ_VARIABLE \
    ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL BUCKETIZE RANDOM_UNIFORM MULTINOMIAL GELU \
    DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_SUM ATAN2 \
    UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR RIGHT_SHIFT";

/// The model's main graph and what its parts refer to.
struct Lite<'a> {
    codes: Vec<Code<'a>>,
    buffers: Vector<'a>,
    tensors: Vec<Tensor<'a>>,
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    operators: Vec<Operator<'a>>,
    model: Table<'a>,
}

struct Code<'a> {
    number: i32,
    custom: &'a str,
}

struct Tensor<'a> {
    table: Table<'a>,
    name: &'a str,
    r#type: i8,
    shape: Vec<i32>,
    signature: Option<Vec<i32>>,
    /// What it is when it is a constant.
    data: Option<&'a [u8]>,
}

struct Operator<'a> {
    code: usize,
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    options: Option<Table<'a>>,
}

impl<'a> Lite<'a> {
    fn read(file: &'a [u8]) -> Result<Self, Error> {
        let model = Table::root(file)?;
        let graphs = model.tables(field::MODEL_SUBGRAPHS)?;
        if graphs.len() == 0 {
            return Err(refuse("expected a TensorFlow Lite model, this file has no graph"));
        }
        let graph = graphs.table(0)?;
        let code = |code: Result<Table<'a>, Error>| -> Result<Code<'a>, Error> {
            let code = code?;
            let old = code.i8(field::CODE_OLD)?;
            let new = || code.i32(field::CODE_BUILTIN);
            let number = if old == IN_NEW_FIELD { new()? } else { i32::from(old) };
            Ok(Code { number, custom: code.text(field::CODE_CUSTOM)?.unwrap_or_default() })
        };
        let (tensors, operators) =
            (graph.tables(field::GRAPH_TENSORS)?, graph.tables(field::GRAPH_OPERATORS)?);
        let codes = model.tables(field::MODEL_OPERATOR_CODES)?;
        for (what, count, most) in [
            ("tensors", tensors.len(), TENSORS_MAX),
            ("operators", operators.len(), OPERATORS_MAX),
            ("kinds of operators", codes.len(), OPERATORS_MAX),
        ] {
            if count > most {
                return Err(refuse(format!("expected a model of at most {most} {what}, it has {count}")));
            }
        }
        let buffers = model.tables(field::MODEL_BUFFERS)?;
        let tensors: Vec<Tensor<'_>> =
            tensors.each().map(|tensor| Tensor::read(tensor?, buffers)).collect::<Result<_, _>>()?;
        let indices = |place| graph.i32s(place).and_then(|list| places(list, tensors.len()));
        let (inputs, outputs) = (indices(field::GRAPH_INPUTS)?, indices(field::GRAPH_OUTPUTS)?);
        let mut edges = 0;
        let operator = |operator: Result<Table<'a>, Error>| {
            let operator = Operator::read(operator?, tensors.len())?;
            edges += operator.inputs.len() + operator.outputs.len();
            if edges > EDGES_MAX {
                return Err(refuse(format!("its operators have more than {EDGES_MAX} inputs and outputs")));
            }
            Ok(operator)
        };
        let operators = operators.each().map(operator).collect::<Result<_, _>>()?;
        let codes = codes.each().map(code).collect::<Result<_, _>>()?;
        Ok(Self { codes, buffers, inputs, outputs, operators, tensors, model })
    }

    /// The name of an operator's kind; empty for one that the schema does not have.
    fn kind(&self, operator: &Operator<'_>) -> Result<&'static str, Error> {
        let code = self.codes.get(operator.code);
        let code = code.ok_or_else(|| {
            refuse(format!("an operator is of kind {}, which is not listed", operator.code))
        })?;
        Ok(name(code.number).unwrap_or_default())
    }

    /// The names of all operators in use.
    fn operators(&self) -> BTreeSet<String> {
        let name = |operator: &Operator<'_>| {
            let code = self.codes.get(operator.code)?;
            Some(match code.number {
                CUSTOM => format!("custom operator {}", shown(code.custom)),
                number => name(number).map_or_else(|| format!("operator {number}"), str::to_owned),
            })
        };
        self.operators.iter().filter_map(name).collect()
    }

    /// Properties under names of the agent.
    fn metadata(&self) -> Result<HashMap<String, String>, Error> {
        let mut properties = HashMap::new();
        for entry in self.model.tables(field::MODEL_METADATA)?.each() {
            let entry = entry?;
            let Some(name) = entry.text(field::METADATA_NAME)? else { continue };
            if name.starts_with("vaccel.") {
                let buffer = self.buffers.table(entry.u32(field::METADATA_BUFFER)? as usize)?;
                let text = buffer.bytes(field::BUFFER_DATA)?.unwrap_or_default();
                properties.insert(name.to_owned(), String::from_utf8_lossy(text).into_owned());
            }
        }
        Ok(properties)
    }
}

/// The name of an operator.
pub(super) fn name(number: i32) -> Option<&'static str> {
    NAMES.split(' ').nth(usize::try_from(number).ok()?)
}

/// Indices of tensors.
fn places(list: Option<Vec<i32>>, tensors: usize) -> Result<Vec<usize>, Error> {
    let place = |index: i32| match usize::try_from(index) {
        Ok(index) if index < tensors => Ok(index),
        Ok(index) => Err(refuse(format!("it names tensor {index} of {tensors}"))),
        Err(_) => Err(refuse(
            "an operator leaves out an optional input, which is not supported; give it, for example a bias of zeros, \
             or export the model to ONNX",
        )),
    };
    list.unwrap_or_default().into_iter().map(place).collect()
}

impl<'a> Operator<'a> {
    fn read(table: Table<'a>, tensors: usize) -> Result<Self, Error> {
        let indices = |place| table.i32s(place).and_then(|list| places(list, tensors));
        Ok(Self {
            code: table.u32(field::OPERATOR_CODE)? as usize,
            inputs: indices(field::OPERATOR_INPUTS)?,
            outputs: indices(field::OPERATOR_OUTPUTS)?,
            options: table.table(field::OPERATOR_OPTIONS)?,
        })
    }
}

impl<'a> Tensor<'a> {
    fn read(table: Table<'a>, buffers: Vector<'a>) -> Result<Self, Error> {
        let name = table.text(field::TENSOR_NAME)?.unwrap_or_default();
        let buffer = match table.u32(field::TENSOR_BUFFER)? as usize {
            // The first buffer is nobody's.
            0 => None,
            index => Some(buffers.table(index)?),
        };
        if buffer.map_or(Ok(0), |buffer| buffer.u64(field::BUFFER_OFFSET))? != 0 {
            return Err(refuse("weights behind the model (a file beyond 2 GiB) are not supported"));
        }
        if table.table(field::TENSOR_SPARSITY)?.is_some() {
            return Err(refuse(format!(
                "tensor {}: sparse tensors are not supported; store it dense",
                shown(name)
            )));
        }
        let data = buffer.map_or(Ok(None), |buffer| buffer.bytes(field::BUFFER_DATA))?;
        Ok(Self {
            table,
            name,
            r#type: table.i8(field::TENSOR_TYPE)?,
            shape: table.i32s(field::TENSOR_SHAPE)?.unwrap_or_default(),
            signature: table.i32s(field::TENSOR_SHAPE_SIGNATURE)?.filter(|axes| !axes.is_empty()),
            data: data.filter(|data| !data.is_empty()),
        })
    }

    /// Its bytes, if shape and data agree.
    fn check(&self) -> Result<(), Error> {
        let name = shown(self.name);
        let dtype = dtype(self.r#type).ok_or_else(|| {
            refuse(format!("tensor {name} has element type {}, which is not supported", self.r#type))
        })?;
        let count =
            self.shape.iter().try_fold(1_u64, |count, dim| u64::try_from(*dim).ok()?.checked_mul(count));
        let bytes = count.and_then(|count| count.checked_mul(dtype.size() as u64));
        let Some(bytes) = bytes.filter(|bytes| *bytes <= INITIALIZER_BYTES_MAX) else {
            return Err(refuse(format!(
                "tensor {name}: dimensions {:?} are negative or beyond {INITIALIZER_BYTES_MAX} bytes",
                self.shape
            )));
        };
        match self.data {
            Some(data) if data.len() as u64 != bytes => Err(refuse(format!(
                "tensor {name}: expected {bytes} bytes for dimensions {:?}, got {}",
                self.shape,
                data.len()
            ))),
            _ => Ok(()),
        }
    }

    fn port(&self) -> Result<Port, Error> {
        self.check()?;
        let open = |index: usize| {
            self.signature.as_ref().is_some_and(|axes| axes.len() == self.shape.len() && axes[index] < 0)
        };
        let dimension = |(index, dim): (usize, &i32)| if open(index) { None } else { Some(i64::from(*dim)) };
        let shape = Some(self.shape.iter().enumerate().map(dimension).collect());
        Ok(Port { name: self.name.to_owned(), dtype: dtype(self.r#type).unwrap_or_default(), shape })
    }

    /// The whole numbers of a constant.
    fn numbers(&self) -> Option<Vec<i64>> {
        let data = self.data?;
        Some(match dtype(self.r#type)? {
            DType::I32 => {
                data.as_chunks().0.iter().map(|number| i32::from_le_bytes(*number).into()).collect()
            }
            DType::I64 => data.as_chunks().0.iter().map(|number| i64::from_le_bytes(*number)).collect(),
            _ => return None,
        })
    }
}

/// The type of schema.fbs's `TensorType`.
fn dtype(number: i8) -> Option<DType> {
    Some(match number {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::I32,
        3 => DType::U8,
        4 => DType::I64,
        6 => DType::Bool,
        7 => DType::I16,
        9 => DType::I8,
        10 => DType::F64,
        12 => DType::U64,
        15 => DType::U32,
        16 => DType::U16,
        18 => DType::Bf16,
        _ => return None,
    })
}

/// Reads a model.
///
/// # Errors
/// `MODEL_REJECTED`: bytes that are no model, sizes that do not add up, or what would grow while the engine reads it.
pub(super) fn scan(bytes: &Bytes) -> Result<Scanned, Error> {
    let lite = Lite::read(bytes)?;
    if lite.operators.is_empty() {
        return Err(refuse("expected a TensorFlow Lite model, its graph has no operators"));
    }
    let mut inputs = HashSet::new();
    for &index in &lite.inputs {
        let tensor = &lite.tensors[index];
        if tensor.data.is_some() || !inputs.insert(index) {
            let name = shown(tensor.name);
            return Err(refuse(format!("input {name} is a constant, or an input twice")));
        }
    }
    check_operators(&lite)?;
    let ports = |indices: &[usize]| -> Result<Vec<Port>, Error> {
        indices.iter().map(|index| lite.tensors[*index].port()).collect()
    };
    Ok(Scanned {
        // No name tells a batch from another open dimension.
        has_rows: false,
        bytes: bytes.clone(),
        inputs: ports(&lite.inputs)?,
        outputs: ports(&lite.outputs)?,
        metadata: lite.metadata()?,
        operators: lite.operators(),
    })
}

/// Follows the constants through the graph, as the engine does, and checks what each operator gets.
fn check_operators(lite: &Lite<'_>) -> Result<(), Error> {
    let mut computed: HashSet<usize> = lite.inputs.iter().copied().collect();
    let mut constant: HashSet<usize> = HashSet::new();
    for operator in &lite.operators {
        let kind = lite.kind(operator)?;
        for &index in &operator.inputs {
            let tensor = &lite.tensors[index];
            tensor.check()?;
            if !computed.contains(&index) {
                if tensor.data.is_none() && !tensor.shape.contains(&0) {
                    let name = shown(tensor.name);
                    return Err(refuse(format!("tensor {name} is used before anything gives it")));
                }
                constant.insert(index);
            }
        }
        check_operator(lite, kind, operator, &constant)?;
        let all = operator.inputs.iter().all(|index| constant.contains(index));
        for &index in &operator.outputs {
            lite.tensors[index].check()?;
            computed.insert(index);
            // One that is given twice stays a constant: the engine may keep the first.
            if all || kind == "SHAPE" {
                constant.insert(index);
            }
        }
        if operator.outputs.is_empty() {
            return Err(refuse("an operator gives nothing"));
        }
    }
    match lite.outputs.iter().find(|index| !computed.contains(index)) {
        Some(&index) => Err(refuse(format!("nothing gives output {}", shown(lite.tensors[index].name)))),
        None => Ok(()),
    }
}

/// Refuses what would take any amount of memory or time while the engine reads the model, and numbers that the engine
/// takes for others than they are.
fn check_operator(
    lite: &Lite<'_>,
    kind: &str,
    operator: &Operator<'_>,
    constant: &HashSet<usize>,
) -> Result<(), Error> {
    let is_constant = operator.inputs.first().is_some_and(|index| constant.contains(index));
    if is_constant && REFUSED_ON_CONSTANTS.contains(&kind) {
        return Err(refuse(format!("{kind} of a constant is not supported; store its result")));
    }
    if let Some(options) = operator.options {
        check_window_options(kind, options)?;
    }
    let parameters = operator.inputs.get(1..).unwrap_or_default().iter().map(|index| &lite.tensors[*index]);
    let parameters: Vec<&Tensor<'_>> = parameters.collect();
    let first = parameters.first().copied();
    match (kind, first) {
        ("TRANSPOSE", Some(order)) if !order.numbers().is_some_and(|order| is_order(&order)) => {
            Err(refuse("TRANSPOSE: expected a constant order of the axes, each once"))
        }
        ("RESHAPE" | "BROADCAST_TO", _) => check_shape(kind, operator, first),
        ("PAD" | "PADV2" | "MEAN" | "SUM" | "REDUCE_PROD" | "REDUCE_MAX" | "REDUCE_MIN", Some(numbers)) => {
            check_positive(kind, &[numbers])
        }
        ("SLICE", _) => check_positive(kind, &parameters),
        _ => Ok(()),
    }
}

/// Checks amounts and axes: those below 0 would be taken for very large ones.
fn check_positive(kind: &str, parameters: &[&Tensor<'_>]) -> Result<(), Error> {
    let negative =
        |tensor: &&Tensor<'_>| !tensor.numbers().is_some_and(|all| all.iter().all(|one| *one >= 0));
    match parameters.iter().find(|tensor| negative(tensor)) {
        Some(tensor) => {
            let name = shown(tensor.name);
            Err(refuse(format!("{kind}: expected {name} to be a constant of numbers from 0 on")))
        }
        None => Ok(()),
    }
}

/// Checks windows, their steps and how far they are spread.
fn check_window_options(kind: &str, options: Table<'_>) -> Result<(), Error> {
    const STEPS: [usize; 2] = [1, 2];
    const WINDOW: [usize; 2] = [3, 4];
    let spreads = match kind {
        "AVERAGE_POOL_2D" | "MAX_POOL_2D" => {
            let sides = [options.i32(WINDOW[0])?, options.i32(WINDOW[1])?];
            check_window(kind, &sides.map(i64::from))?;
            [None; 2]
        }
        "CONV_2D" => [Some(4), Some(5)],
        "DEPTHWISE_CONV_2D" => [Some(5), Some(6)],
        _ => return Ok(()),
    };
    // Spreads that are left out are 1.
    let given = |field: &usize| options.place(*field).map(|place| place.is_some()).unwrap_or(true);
    let fields = STEPS.into_iter().chain(spreads.into_iter().flatten().filter(given));
    for field in fields {
        let step = options.i32(field)?;
        if !(1..=STEP_MAX).contains(&step) {
            return Err(refuse(format!(
                "{kind}: expected steps and spreads of 1 to {STEP_MAX}, one is {step}"
            )));
        }
    }
    Ok(())
}

/// Checks the shape that an operator gives to its result.
fn check_shape(kind: &str, operator: &Operator<'_>, parameter: Option<&Tensor<'_>>) -> Result<(), Error> {
    const NEW_SHAPE: usize = 0;
    let shape: Option<Vec<i64>> = match (parameter, operator.options) {
        // The shape of a single number has no axes, and no data.
        (Some(shape), _) => shape.numbers().or_else(|| shape.shape.contains(&0).then(Vec::new)),
        (None, Some(options)) => {
            let shape = options.i32s(NEW_SHAPE)?;
            shape.map(|shape| shape.into_iter().map(i64::from).collect())
        }
        (None, None) => None,
    };
    let elements = |count: u64, dim: &i64| match *dim {
        // Taken from the input.
        -1 | 0 => Some(count),
        dim => u64::try_from(dim).ok()?.checked_mul(count).filter(|count| *count <= ELEMENTS_MAX),
    };
    let size =
        shape.filter(|shape| shape.len() <= AXES_MAX).and_then(|shape| shape.iter().try_fold(1, elements));
    if size.is_some() {
        return Ok(());
    }
    Err(refuse(format!(
        "{kind}: expected a constant shape of at most {AXES_MAX} axes and {ELEMENTS_MAX} elements"
    )))
}

/// The model with other sizes along the open axes of its inputs.
///
/// # Errors
/// `MODEL_REJECTED` for a file that [`scan`] would refuse.
pub(super) fn with_input_shapes(bytes: &Bytes, shapes: &[Vec<i32>]) -> Result<Bytes, Error> {
    let lite = Lite::read(bytes)?;
    let own = lite.inputs.iter().map(|index| &lite.tensors[*index].shape);
    if own.eq(shapes) {
        return Ok(bytes.clone());
    }
    let mut file = bytes.to_vec();
    for (index, shape) in lite.inputs.iter().zip(shapes) {
        let tensor = &lite.tensors[*index];
        let Some(place) = tensor.table.place(field::TENSOR_SHAPE)?.filter(|_| tensor.shape != *shape) else {
            continue;
        };
        // Behind everything else: the old list may be other tensors' too.
        file.resize(file.len().next_multiple_of(4), 0);
        let offset = u32::try_from(file.len() - place).map_err(|_| refuse("the model is too large"))?;
        file[place..place + 4].copy_from_slice(&offset.to_le_bytes());
        let count = u32::try_from(shape.len()).unwrap_or(u32::MAX);
        file.extend_from_slice(&count.to_le_bytes());
        file.extend(shape.iter().flat_map(|dim| dim.to_le_bytes()));
    }
    let file = Bytes::from(file);
    // A hostile file may have had other parts where the new offsets went.
    scan(&file)?;
    Ok(file)
}

/// The file with another number for its first kind of operator.
#[cfg(test)]
pub(super) fn with_first_operator(file: &[u8], number: i32) -> Result<Vec<u8>, Error> {
    let code = Table::root(file)?.tables(field::MODEL_OPERATOR_CODES)?.table(0)?;
    let place = |field| code.place(field).map(|place| place.expect("the field is there"));
    let (old, new) = (place(field::CODE_OLD)?, place(field::CODE_BUILTIN)?);
    let mut file = file.to_vec();
    file[old] = i8::try_from(number).unwrap_or(IN_NEW_FIELD).cast_unsigned();
    file[new..new + 4].copy_from_slice(&number.to_le_bytes());
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_have_their_numbers() {
        for (number, expected) in [
            (0, Some("ADD")),
            (CUSTOM, Some("CUSTOM")),
            (39, Some("TRANSPOSE")),
            (i32::from(IN_NEW_FIELD), Some("PLACEHOLDER_FOR_GREATER_OP_CODES")),
            (130, Some("BROADCAST_TO")),
            (161, Some("RIGHT_SHIFT")),
            (162, None),
            (-1, None),
        ] {
            assert_eq!(name(number), expected, "{number}");
        }
    }
}
