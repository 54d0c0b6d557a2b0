//! A model's files before any engine sees them. What a file is its bytes say: its name, and the call that brought it,
//! do not matter.
//!
//! **Invariant:** whatever an engine gets was scanned here, in its own format: sizes add up, and nothing refers to
//! anything outside of it.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use vaccel_proto::error::shown;
use vaccel_proto::v1::{DType, ModelDescription, ModelPort};
use vaccel_proto::{Error, Reason};

use super::formats::{Content, recognise};
use super::{onnx, tensorflow, tflite};

/// Bytes of one initializer or constant written out in a model: 1 GiB is beyond what one resource may hold.
pub(super) const INITIALIZER_BYTES_MAX: u64 = 1 << 30;

/// Axes of a tensor inside a model. Networks that take images apart into windows reach 10.
pub(super) const AXES_MAX: usize = 32;

/// Elements of a pooling window: an engine keeps the place of each. The largest images in use have as many pixels.
const WINDOW_MAX: i64 = 1 << 20;

/// What engines here load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Onnx,
    /// TensorFlow Lite.
    Tflite,
    /// A TensorFlow graph with its weights inside.
    Tensorflow,
    /// No file.
    None,
}

impl Format {
    /// Its name on the wire.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Onnx => "onnx",
            Self::Tflite => "tflite",
            Self::Tensorflow => "tensorflow",
            Self::None => "identity",
        }
    }

    /// Its name for people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Onnx => "ONNX",
            Self::Tflite => "TensorFlow Lite",
            Self::Tensorflow => "frozen TensorFlow graph",
            Self::None => "model without a file",
        }
    }

    /// How its files are usually named: decides only between several files of one resource that are models.
    fn ending(self) -> &'static str {
        match self {
            Self::Onnx => ".onnx",
            Self::Tflite => ".tflite",
            Self::Tensorflow => ".pb",
            Self::None => "",
        }
    }
}

/// Who brought a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Guest,
    /// The host's people, who answer for what it computes.
    Host,
}

/// An input or output of a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Port {
    pub(crate) name: String,
    /// Unspecified for outputs of formats that do not say; the engine that loads the model fills it in where it can.
    pub(crate) dtype: DType,
    /// Dimensions, none where the model leaves one open; none at all where it leaves even their number open.
    pub(crate) shape: Option<Vec<Option<i64>>>,
}

impl Port {
    fn describe(&self) -> ModelPort {
        let dimension = |dim: &Option<i64>| dim.unwrap_or(-1);
        ModelPort {
            name: self.name.clone(),
            dtype: self.dtype.into(),
            shape: self.shape.iter().flatten().map(dimension).collect(),
            any_rank: self.shape.is_none(),
        }
    }
}

/// What the scan of one format gives.
pub(super) struct Scanned {
    pub(super) bytes: Bytes,
    /// Whether it says that the first dimension of all inputs and outputs is a batch.
    pub(super) has_rows: bool,
    pub(super) inputs: Vec<Port>,
    pub(super) outputs: Vec<Port>,
    pub(super) metadata: HashMap<String, String>,
    /// The operators it uses, each once.
    pub(super) operators: BTreeSet<String>,
}

/// A scanned model: complete in itself.
#[derive(Clone, Debug)]
pub(crate) struct ModelFile {
    pub(crate) format: Format,
    pub(crate) bytes: Bytes,
    /// Whether it says that the first dimension of all inputs and outputs is a batch.
    pub(crate) has_rows: bool,
    pub(crate) inputs: Vec<Port>,
    pub(crate) outputs: Vec<Port>,
    pub(crate) metadata: HashMap<String, String>,
    /// The operators it uses, each once; for the engine that loads it, empty afterwards.
    pub(super) operators: BTreeSet<String>,
    /// Files of the resource beside the model, by name.
    pub(crate) companions: HashMap<String, Bytes>,
}

/// `MODEL_REJECTED` with a text for the guest.
pub(super) fn refuse(message: impl Into<String>) -> Error {
    Error::new(Reason::ModelRejected, message)
}

/// Refuses a pooling window beyond reason.
///
/// # Errors
/// `MODEL_REJECTED`.
pub(super) fn check_window(what: &str, sides: &[i64]) -> Result<(), Error> {
    let volume = sides.iter().try_fold(1_i64, |volume, side| volume.checked_mul(*side).filter(|_| *side > 0));
    if volume.is_some_and(|volume| volume <= WINDOW_MAX) {
        return Ok(());
    }
    Err(refuse(format!("{what}: expected a window of 1 to {WINDOW_MAX} elements, its sides are {sides:?}")))
}

/// Whether these are the numbers from 0, each once, in any order: what an engine needs to move axes about.
pub(super) fn is_order(axes: &[i64]) -> bool {
    axes.len() <= AXES_MAX && (0_i64..).zip(axes).all(|(axis, _)| axes.contains(&axis))
}

impl ModelFile {
    /// Reads the model of a resource: its only file, or the only one that is a model.
    ///
    /// # Errors
    /// `MODEL_REJECTED`: no model, several, one that no engine here loads (the text says what does), or one whose scan
    /// finds sizes that do not add up.
    pub(crate) fn scan(files: &[(&str, Bytes)], origin: Origin) -> Result<Self, Error> {
        let (name, bytes, format) = choose(files)?;
        let scanned = match format {
            Format::Onnx => onnx::scan(bytes, files)?,
            Format::Tflite => tflite::scan(bytes)?,
            Format::Tensorflow => tensorflow::scan(bytes)?,
            Format::None => return Err(refuse("expected a file")),
        };
        // What strings take while a model computes with them is outside of what an engine can be held to.
        let mut ports = scanned.inputs.iter().chain(&scanned.outputs);
        if let Some(port) = ports.find(|port| port.dtype == DType::Bytes && origin == Origin::Guest) {
            let name = shown(&port.name);
            let message = format!("{name} has strings, which only models in the host's repository may have");
            return Err(refuse(message));
        }
        // Weights beside the model are in it by now, and only descriptions are asked for later.
        let companions = files.iter().filter(|(other, _)| *other != name && other.ends_with(".json"));
        Ok(Self {
            format,
            bytes: scanned.bytes,
            has_rows: scanned.has_rows,
            inputs: scanned.inputs,
            outputs: scanned.outputs,
            metadata: scanned.metadata,
            operators: scanned.operators,
            companions: companions.map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect(),
        })
    }

    /// The name of its format.
    pub(crate) fn format_name(&self) -> &'static str {
        self.format.name()
    }

    /// The text of a companion file or a metadata property, the file first.
    pub(crate) fn description(&self, file: &str, property: &str) -> Option<Cow<'_, str>> {
        match self.companions.get(file) {
            Some(bytes) => Some(String::from_utf8_lossy(bytes)),
            None => self.metadata.get(property).map(|text| Cow::Borrowed(text.as_str())),
        }
    }

    /// What goes in and out, for guests.
    pub(crate) fn describe(&self) -> ModelDescription {
        ModelDescription {
            format: self.format.name().into(),
            inputs: self.inputs.iter().map(Port::describe).collect(),
            outputs: self.outputs.iter().map(Port::describe).collect(),
        }
    }
}

/// The file that is the model.
fn choose<'a>(files: &'a [(&'a str, Bytes)]) -> Result<(&'a str, &'a Bytes, Format), Error> {
    let found: Vec<(&str, &Bytes, Content)> =
        files.iter().map(|(name, bytes)| (*name, bytes, recognise(bytes))).collect();
    let models =
        || found.iter().filter_map(|(name, bytes, content)| Some((*name, *bytes, content.format()?)));
    let named: Vec<_> = models().filter(|(name, _, format)| name.ends_with(format.ending())).collect();
    // Weights of another format's model can look like a model by chance: a name decides then.
    let single = if models().count() == 1 { models().next() } else { None };
    let single = single.or_else(|| if let [named] = named[..] { Some(named) } else { None });
    if let Some(model) = single {
        return Ok(model);
    }
    if models().next().is_some() {
        let names: Vec<String> = models().map(|(name, ..)| shown(name)).collect();
        let names = names.join(", ");
        return Err(refuse(format!(
            "expected a resource with one model, it has several: {names}; register each as a resource of its own"
        )));
    }
    for (name, _, content) in &found {
        if let Content::Foreign(foreign) = content {
            return Err(refuse(format!(
                "{} is {}, which no engine of this agent runs; {}",
                shown(name),
                foreign.name,
                foreign.advice
            )));
        }
    }
    const MODEL: &str = "a model (ONNX, TensorFlow Lite or a frozen TensorFlow graph)";
    Err(match found.as_slice() {
        [(name, bytes, _)] => {
            let (name, bytes) = (shown(name), bytes.len());
            refuse(format!("{name}: expected {MODEL}, these {bytes} bytes are none of them"))
        }
        files => {
            refuse(format!("expected a resource with {MODEL}, none of its {} files is one", files.len()))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONNX: &[u8] = b"\x08\x08\x3a\x02\x0a\x00";
    const TENSORFLOW: &[u8] = b"\x0a\x06\x0a\x01x\x12\x01y";

    fn chosen(files: &[(&str, &[u8])]) -> Result<(String, Format), String> {
        let files: Vec<(&str, Bytes)> =
            files.iter().map(|(name, content)| (*name, Bytes::copy_from_slice(content))).collect();
        let chosen = choose(&files).map(|(name, _, format)| (name.to_owned(), format));
        chosen.map_err(|error| error.message().to_owned())
    }

    #[test]
    fn the_content_decides_and_not_the_name() {
        assert_eq!(chosen(&[("model.tflite", ONNX)]), Ok(("model.tflite".into(), Format::Onnx)));
        let beside = [("weights.bin", &[0; 64][..]), ("graph", TENSORFLOW), ("labels.json", b"{}")];
        assert_eq!(chosen(&beside), Ok(("graph".into(), Format::Tensorflow)));
    }

    #[test]
    fn between_several_models_names_decide() {
        assert_eq!(chosen(&[("m.onnx", ONNX), ("data", TENSORFLOW)]), Ok(("m.onnx".into(), Format::Onnx)));
        let several = chosen(&[("a.onnx", ONNX), ("b.pb", TENSORFLOW)]).expect_err("two");
        assert!(several.contains("a.onnx") && several.contains("b.pb"), "{several}");
        assert!(chosen(&[("a", ONNX), ("b", ONNX)]).is_err());
    }

    #[test]
    fn what_is_no_model_is_said() {
        let text = chosen(&[("m.onnx", b"hello")]).expect_err("text");
        assert!(text.contains("5 bytes") && text.contains("TensorFlow Lite"), "{text}");
        let folder = [
            ("saved_model.pb", &b"\x08\x01\x12\x04\x0a\x02\x0a\x00"[..]),
            ("variables/variables.index", b""),
        ];
        let text = chosen(&folder).expect_err("SavedModel");
        assert!(text.contains("SavedModel"), "{text}");
    }
}
