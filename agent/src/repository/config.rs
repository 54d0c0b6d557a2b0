//! The configuration of a model: what a person wrote, checked, and what its file says where nobody wrote anything.
//!
//! *Followed:* `name`, `backend` and `platform` (which say the format; `tract` and `identity` the engine, too),
//! `max_batch_size`, `input` and `output` with `label_filename`, `version_policy`, `default_model_filename`,
//! `dynamic_batching`, `instance_group`, `model_warmup`, `response_cache`, `sequence_batching`, `parameters`.
//! Of `dynamic_batching` the preferred sizes are not followed (sizes are measured), and a timeout always rejects.
//! *Refused,* because ignoring them would change results: `ensemble_scheduling`, `batch_input`, `batch_output`,
//! `reshape`, optional, ragged and shape tensors, decoupled models, operator libraries, repository agents.
//! *Without effect:* everything else, which only tunes another server.

use std::collections::HashSet;
use std::sync::LazyLock;
use std::time::Duration;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use vaccel_proto::inference::model_config::SchedulingChoice;
use vaccel_proto::inference::model_instance_group::Kind;
use vaccel_proto::inference::model_sequence_batching::State;
use vaccel_proto::inference::model_sequence_batching::initial_state::StateData;
use vaccel_proto::inference::model_warmup::input::InputDataType;
use vaccel_proto::inference::{
    DataType, ModelConfig, ModelDynamicBatching, ModelInput, ModelInstanceGroup, ModelOutput, ModelWarmup,
};
use vaccel_proto::limits::TENSORS_PER_CALL_MAX;
use vaccel_proto::v1::DType;

use crate::backend::{Model, Origin, Port, RunRules};

/// Longest text of a configuration, in bytes: those in use have some hundred. Read, it can take fifty times as much.
pub(super) const TEXT_BYTES_MAX: usize = 256 << 10;

/// Instances of one model, of all its groups: each may be a thread. Devices take some tens of runs at the same time.
const INSTANCES_MAX: usize = 256;

/// Inputs of a model, and its outputs, that a configuration writes down: each is looked for among all of the model's.
const TENSORS_MAX: usize = 4 * TENSORS_PER_CALL_MAX;

/// Rows of one run where a file says that it has rows, and nobody said how many.
const ROWS_DEFAULT: i32 = 64;

static POOL: LazyLock<Option<DescriptorPool>> =
    LazyLock::new(|| DescriptorPool::decode(vaccel_proto::DESCRIPTORS).ok());

fn descriptor(name: &str) -> Result<MessageDescriptor, String> {
    let found = POOL.as_ref().and_then(|pool| pool.get_message_by_name(&format!("inference.{name}")));
    found.ok_or_else(|| format!("no message {name}"))
}

/// Reads a `config.pbtxt`.
///
/// # Errors
/// Where it is not one, in words.
pub(super) fn read_text(text: &str) -> Result<ModelConfig, String> {
    let message = DynamicMessage::parse_text_format(descriptor("ModelConfig")?, &with_colons(text));
    let message = message.map_err(|error| format!("config.pbtxt: {error}"))?;
    message.transcode_to().map_err(|error| format!("config.pbtxt: {error}"))
}

/// The same text with a colon before every list: the format lets lists of messages do without, the parser does not.
fn with_colons(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut chars = text.chars().peekable();
    // Whether the last thing that counts was a name.
    let mut after_name = false;
    while let Some(char) = chars.next() {
        match char {
            '#' => {
                out.push('#');
                while let Some(other) = chars.next_if(|other| *other != '\n') {
                    out.push(other);
                }
                continue;
            }
            '"' | '\'' => {
                out.push(char);
                while let Some(other) = chars.next() {
                    out.push(other);
                    if other == '\\' {
                        out.extend(chars.next());
                    } else if other == char {
                        break;
                    }
                }
                after_name = false;
                continue;
            }
            '[' if after_name => out.push(':'),
            _ => {}
        }
        out.push(char);
        after_name = char.is_alphanumeric() || char == '_' || after_name && char.is_whitespace();
    }
    out
}

/// Reads a configuration in JSON.
///
/// # Errors
/// Where it is not one, in words.
pub(super) fn read_json(text: &str) -> Result<ModelConfig, String> {
    let wrong = |error: &dyn std::fmt::Display| format!("config: expected a ModelConfig in JSON: {error}");
    if text.len() > TEXT_BYTES_MAX {
        return Err(format!("config: expected at most {TEXT_BYTES_MAX} bytes, got {}", text.len()));
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let message = DynamicMessage::deserialize(descriptor("ModelConfig")?, &mut json);
    let message = message.map_err(|error| wrong(&error))?;
    json.end().map_err(|error| wrong(&error))?;
    message.transcode_to().map_err(|error| wrong(&error))
}

/// A message of the protocol as JSON, with the names of its fields and every field there.
pub(crate) fn to_json(name: &str, message: &impl Message) -> serde_json::Value {
    let options = SerializeOptions::new()
        .stringify_64_bit_integers(false)
        .use_proto_field_name(true)
        .skip_default_fields(false);
    let dynamic = descriptor(name)
        .ok()
        .and_then(|descriptor| DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).ok());
    let json = dynamic
        .and_then(|message| message.serialize_with_options(serde_json::value::Serializer, &options).ok());
    json.unwrap_or_default()
}

/// The engine that a configuration means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// Whichever loads the file.
    Any,
    Tract,
    /// None: inputs are outputs.
    Identity,
}

/// # Errors
/// A backend that is not here, with those that are.
pub(super) fn engine(config: &ModelConfig) -> Result<Engine, String> {
    let name = if config.backend.is_empty() { &config.platform } else { &config.backend };
    Ok(match name.as_str() {
        "" | "onnxruntime" | "onnxruntime_onnx" | "tensorflow_graphdef" | "tflite" => Engine::Any,
        "tract" => Engine::Tract,
        "identity" => Engine::Identity,
        other => {
            return Err(format!(
                "backend: expected onnxruntime, tract, tensorflow_graphdef, tflite or identity, got {other:?}; \
                 convert the model to ONNX"
            ));
        }
    })
}

/// Fields without which a model would give other results, and whether they are there.
fn refused(config: &ModelConfig) -> Vec<(bool, &'static str)> {
    let sequences = match &config.scheduling_choice {
        Some(SchedulingChoice::SequenceBatching(sequences)) => Some(sequences),
        _ => None,
    };
    let has_file = |state: &State| {
        state.initial_state.iter().any(|initial| matches!(initial.state_data, Some(StateData::DataFile(_))))
    };
    let warms_with_file = |warmup: &ModelWarmup| {
        let mut inputs = warmup.inputs.values();
        inputs.any(|input| matches!(input.input_data_type, Some(InputDataType::InputDataFile(_))))
    };
    vec![
        (config.model_warmup.iter().any(warms_with_file), "model_warmup.inputs.input_data_file"),
        (
            sequences.is_some_and(|sequences| sequences.iterative_sequence),
            "sequence_batching.iterative_sequence",
        ),
        (
            sequences.is_some_and(|sequences| sequences.state.iter().any(has_file)),
            "sequence_batching.state.initial_state.data_file",
        ),
        (
            matches!(config.scheduling_choice, Some(SchedulingChoice::EnsembleScheduling(_))),
            "ensemble_scheduling",
        ),
        (!config.batch_input.is_empty(), "batch_input"),
        (!config.batch_output.is_empty(), "batch_output"),
        (config.input.iter().any(|input| input.reshape.is_some()), "input.reshape"),
        (config.output.iter().any(|output| output.reshape.is_some()), "output.reshape"),
        (config.input.iter().any(|input| input.optional), "input.optional"),
        (config.input.iter().any(|input| input.allow_ragged_batch), "input.allow_ragged_batch"),
        (config.input.iter().any(|input| input.is_shape_tensor), "input.is_shape_tensor"),
        (config.output.iter().any(|output| output.is_shape_tensor), "output.is_shape_tensor"),
        (
            config.model_transaction_policy.is_some_and(|policy| policy.decoupled),
            "model_transaction_policy.decoupled",
        ),
        (
            config.model_operations.as_ref().is_some_and(|ops| !ops.op_library_filename.is_empty()),
            "model_operations",
        ),
        (
            config.model_repository_agents.as_ref().is_some_and(|agents| !agents.agents.is_empty()),
            "model_repository_agents",
        ),
    ]
}

/// Checks what can be checked without the model.
///
/// # Errors
/// The first field that cannot be, with what was expected.
pub(super) fn check(name: &str, config: &ModelConfig) -> Result<(), String> {
    if !config.name.is_empty() && config.name != name {
        return Err(format!("name: expected {name:?}, as the model's folder, got {:?}", config.name));
    }
    engine(config)?;
    if config.max_batch_size < 0 {
        return Err(format!("max_batch_size: expected 0 or more, got {}", config.max_batch_size));
    }
    if let Some(count) = instances(config).filter(|count| *count > INSTANCES_MAX) {
        return Err(format!(
            "instance_group: expected at most {INSTANCES_MAX} instances in all groups, got {count}"
        ));
    }
    for (what, count) in [("input", config.input.len()), ("output", config.output.len())] {
        if count > TENSORS_MAX {
            return Err(format!("{what}: expected at most {TENSORS_MAX}, got {count}"));
        }
    }
    let refused = refused(config);
    if let Some((_, field)) = refused.iter().find(|(is_there, _)| *is_there) {
        return Err(format!(
            "{field}: this agent does not have it, and the model would give other results without"
        ));
    }
    for (what, dims) in config
        .input
        .iter()
        .map(|input| (&input.name, &input.dims))
        .chain(config.output.iter().map(|output| (&output.name, &output.dims)))
    {
        if dims.iter().any(|dim| *dim < -1) {
            return Err(format!("dims of {what:?}: expected sizes, or -1 for any, got {dims:?}"));
        }
    }
    Ok(())
}

/// The device that a configuration asks for; empty where it leaves that open.
pub(super) fn device(config: &ModelConfig) -> String {
    let group = config.instance_group.iter().find(|group| group.kind() == Kind::Gpu);
    group.map_or_else(String::new, |group| format!("cuda:{}", group.gpus.first().unwrap_or(&0)))
}

/// Instances that a configuration asks for; none where it leaves that open.
pub(super) fn instances(config: &ModelConfig) -> Option<usize> {
    let counts = config.instance_group.iter().map(|group| usize::try_from(group.count).unwrap_or(0));
    let count = counts.fold(0, usize::saturating_add);
    Some(count).filter(|count| *count > 0)
}

/// How the model's calls run together.
pub(super) fn rules(config: Option<&ModelConfig>, origin: Origin) -> RunRules {
    // What nobody wrote, the file says.
    let Some(config) = config.filter(|config| says_batches(config)) else { return RunRules::default() };
    let dynamic = match &config.scheduling_choice {
        Some(SchedulingChoice::DynamicBatching(dynamic)) => Some(dynamic),
        _ => None,
    };
    let rows = dynamic.map_or(0, |_| usize::try_from(config.max_batch_size).unwrap_or(0));
    RunRules {
        parallel: instances(config),
        rows_max: Some(rows),
        mixes_tenants: origin == Origin::Host && dynamic.is_some(),
        delay: Duration::from_micros(dynamic.map_or(0, |dynamic| dynamic.max_queue_delay_microseconds)),
    }
}

/// Whether a person decided what is a batch: a configuration that says nothing of it and of tensors leaves it open.
fn says_batches(config: &ModelConfig) -> bool {
    config.max_batch_size > 0 || !config.input.is_empty() || config.scheduling_choice.is_some()
}

/// The inputs and outputs of a model that are no caller's: where it is told of sequences, and what it keeps of them.
fn reserved(config: &ModelConfig) -> HashSet<&str> {
    let Some(SchedulingChoice::SequenceBatching(sequences)) = &config.scheduling_choice else {
        return HashSet::new();
    };
    let controls = sequences.control_input.iter().map(|input| &input.name);
    let states = sequences.state.iter().flat_map(|state| [&state.input_name, &state.output_name]);
    controls.chain(states).map(String::as_str).collect()
}

/// The whole configuration of a loaded model.
///
/// # Errors
/// Tensors that the model does not have.
pub(super) fn complete(
    name: &str,
    given: Option<&ModelConfig>,
    model: &Model,
) -> Result<ModelConfig, String> {
    let mut config = given.cloned().unwrap_or_default();
    config.name = name.into();
    if !says_batches(&config) && model.file.has_rows {
        config.max_batch_size = ROWS_DEFAULT;
        config.scheduling_choice = Some(SchedulingChoice::DynamicBatching(ModelDynamicBatching::default()));
    }
    let rows = config.max_batch_size > 0;
    let reserved = reserved(&config);
    let is_callers = |port: &&Port| !reserved.contains(port.name.as_str());
    let own: Vec<&Port> = model.file.inputs.iter().filter(is_callers).collect();
    let inputs = own.iter().map(|port| input(port, rows)).collect::<Result<_, _>>();
    let outputs =
        model.file.outputs.iter().filter(is_callers).map(|port| output(port, rows)).collect::<Result<_, _>>();
    if config.input.is_empty() {
        config.input = inputs?;
    }
    if config.output.is_empty() {
        config.output = outputs?;
    }
    let inputs = config.input.iter().map(|input| (&input.name, input.data_type, &input.dims));
    fit("input", inputs, &model.file.inputs, rows)?;
    if config.input.len() != own.len() {
        let all: Vec<_> = own.iter().map(|port| port.name.as_str()).collect();
        let (all, got) = (all.join(", "), config.input.len());
        return Err(format!("input: expected all of the model's inputs ({all}), got {got}"));
    }
    let outputs = config.output.iter().map(|output| (&output.name, output.data_type, &output.dims));
    fit("output", outputs, &model.file.outputs, rows)?;
    if config.backend.is_empty() && config.platform.is_empty() {
        let (backend, platform) = match model.file.format_name() {
            "onnx" => ("onnxruntime", "onnxruntime_onnx"),
            "tensorflow" => ("tensorflow", "tensorflow_graphdef"),
            other => (other, other),
        };
        (config.backend, config.platform) = (backend.into(), platform.into());
    }
    if config.instance_group.is_empty() {
        let group =
            ModelInstanceGroup { name: format!("{name}_0"), count: 1, ..ModelInstanceGroup::default() };
        config.instance_group = vec![ModelInstanceGroup { kind: Kind::Cpu.into(), ..group }];
    }
    Ok(config)
}

/// A tensor's dimensions as configurations have them, without the batch.
fn dims(port: &Port, rows: bool) -> Result<Vec<i64>, String> {
    let open =
        || format!("{}: its number of dimensions is open; write input and output in config.pbtxt", port.name);
    let shape = port.shape.as_ref().ok_or_else(open)?;
    let dims = shape.iter().map(|dim| dim.unwrap_or(-1));
    Ok(dims.skip(usize::from(rows)).collect())
}

fn input(port: &Port, rows: bool) -> Result<ModelInput, String> {
    let data_type = data_type(port.dtype).into();
    Ok(ModelInput { name: port.name.clone(), data_type, dims: dims(port, rows)?, ..ModelInput::default() })
}

fn output(port: &Port, rows: bool) -> Result<ModelOutput, String> {
    let data_type = data_type(port.dtype).into();
    Ok(ModelOutput { name: port.name.clone(), data_type, dims: dims(port, rows)?, ..ModelOutput::default() })
}

/// Compares written tensors with those the model has.
fn fit<'a>(
    what: &str,
    written: impl Iterator<Item = (&'a String, i32, &'a Vec<i64>)>,
    ports: &[Port],
    rows: bool,
) -> Result<(), String> {
    for (name, kind, dims) in written {
        let Some(port) = ports.iter().find(|port| port.name == *name) else {
            let all: Vec<_> = ports.iter().map(|port| port.name.as_str()).collect();
            return Err(format!("{what}: expected one of {}, got {name:?}", all.join(", ")));
        };
        let expected = data_type(port.dtype);
        if port.dtype != DType::Unspecified && DataType::try_from(kind) != Ok(expected) {
            let got = DataType::try_from(kind).map_or("another number", |kind| kind.as_str_name());
            return Err(format!("{what} {name:?}: expected data_type {}, got {got}", expected.as_str_name()));
        }
        let Some(shape) = &port.shape else { continue };
        let written: Vec<i64> = rows.then_some(-1).into_iter().chain(dims.iter().copied()).collect();
        let fits = written.len() == shape.len()
            && written
                .iter()
                .zip(shape)
                .all(|(written, own)| own.is_none_or(|own| own == *written || *written == -1));
        if !fits {
            let own: Vec<i64> = shape.iter().map(|dim| dim.unwrap_or(-1)).collect();
            let batch =
                if rows { " with the batch before them, because max_batch_size is not 0" } else { "" };
            return Err(format!("{what} {name:?}: the model has {own:?}, dims are {dims:?}{batch}"));
        }
    }
    Ok(())
}

/// The names of a type: on the protocol's wire and in configurations.
const TYPES: &[(DType, &str, DataType)] = &[
    (DType::Bool, "BOOL", DataType::TypeBool),
    (DType::U8, "UINT8", DataType::TypeUint8),
    (DType::U16, "UINT16", DataType::TypeUint16),
    (DType::U32, "UINT32", DataType::TypeUint32),
    (DType::U64, "UINT64", DataType::TypeUint64),
    (DType::I8, "INT8", DataType::TypeInt8),
    (DType::I16, "INT16", DataType::TypeInt16),
    (DType::I32, "INT32", DataType::TypeInt32),
    (DType::I64, "INT64", DataType::TypeInt64),
    (DType::F16, "FP16", DataType::TypeFp16),
    (DType::F32, "FP32", DataType::TypeFp32),
    (DType::F64, "FP64", DataType::TypeFp64),
    (DType::Bf16, "BF16", DataType::TypeBf16),
    (DType::Bytes, "BYTES", DataType::TypeString),
];

fn data_type(dtype: DType) -> DataType {
    TYPES.iter().find(|(own, ..)| *own == dtype).map_or(DataType::TypeInvalid, |(.., kind)| *kind)
}

/// The type with this name in a configuration.
pub(crate) fn dtype_of(kind: i32) -> DType {
    let kind = DataType::try_from(kind).unwrap_or_default();
    TYPES.iter().find(|(.., other)| *other == kind).map_or(DType::Unspecified, |(dtype, ..)| *dtype)
}

/// The protocol's name of a type.
pub(crate) fn type_name(dtype: DType) -> &'static str {
    TYPES.iter().find(|(own, ..)| *own == dtype).map_or("<invalid>", |(_, name, _)| name)
}

/// The type with this name on the protocol's wire.
pub(crate) fn type_named(name: &str) -> DType {
    TYPES.iter().find(|(_, other, _)| *other == name).map_or(DType::Unspecified, |(dtype, ..)| *dtype)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_need_no_colon() {
        let text = r#"
            # input [ no ]
            name: "a [b] \" ["
            input [ { name: 'x' data_type: TYPE_FP32 dims: [ -1, 4 ] }, { name: "y" dims [ 1 ] } ]
            instance_group [{ kind: KIND_CPU count: 2 }]
            version_policy: { specific { versions: [1, 3] } }
        "#;
        let config = read_text(text).expect("valid");
        assert_eq!(config.name, "a [b] \" [");
        assert_eq!(config.input.len(), 2);
        assert_eq!((&config.input[0].dims[..], &config.input[1].dims[..]), (&[-1, 4][..], &[1][..]));
        assert_eq!(instances(&config), Some(2));
    }

    #[test]
    fn what_is_no_configuration_is_said() {
        assert!(read_text("max_batch_size: many").is_err());
        assert!(read_text("colour: 1").expect_err("unknown").contains("colour"));
        assert!(read_json("{").is_err());
        assert!(read_json("{} {}").is_err());
    }

    #[test]
    fn what_would_change_results_is_refused() {
        for (text, field) in [
            ("ensemble_scheduling { }", "ensemble_scheduling"),
            ("input [ { name: 'x' reshape { shape: [ 1 ] } } ]", "reshape"),
            ("model_transaction_policy { decoupled: true }", "decoupled"),
            ("name: 'other'", "name"),
            ("backend: 'python'", "backend"),
            ("max_batch_size: -1", "max_batch_size"),
            ("input [ { name: 'x' dims: [ -2 ] } ]", "dims"),
            ("instance_group [ { count: 257 } ]", "at most 256 instances in all groups, got 257"),
            ("instance_group [ { count: 200 }, { count: 200 } ]", "got 400"),
        ] {
            let why = check("m", &read_text(text).expect(text)).expect_err(text);
            assert!(why.contains(field), "{why}");
        }
        let many = "input { } ".repeat(TENSORS_MAX + 1);
        let why = check("m", &read_text(&many).expect("valid")).expect_err("more than there may be");
        assert_eq!(why, "input: expected at most 1024, got 1025");
        check("m", &read_text("optimization { graph { level: 1 } } backend: 'onnxruntime'").expect("valid"))
            .expect("served");
    }

    #[test]
    fn a_gpu_is_a_device() {
        for (text, expected) in [
            ("", ""),
            ("instance_group [ { kind: KIND_CPU } ]", ""),
            ("instance_group [ { kind: KIND_GPU } ]", "cuda:0"),
            ("instance_group [ { kind: KIND_CPU }, { kind: KIND_GPU gpus: [ 1, 0 ] } ]", "cuda:1"),
        ] {
            assert_eq!(device(&read_text(text).expect(text)), expected);
        }
    }

    #[test]
    fn types_have_one_name_each() {
        for (dtype, name, kind) in TYPES {
            assert_eq!(type_named(name), *dtype);
            assert_eq!(type_name(*dtype), *name);
            assert_eq!(dtype_of((*kind).into()), *dtype);
        }
    }
}
