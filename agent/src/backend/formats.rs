//! What a file is, by its bytes: the formats that engines here load, and those that guests bring by mistake.
//!
//! *Sources:* onnx.proto3, graph.proto, saved_model.proto, the TensorFlow Lite schema, APPNOTE.TXT of PKWARE for ZIP
//! archives, and the writers of the others.

use std::str;

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use super::file::Format;

/// A format that is known and not loaded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Foreign {
    pub(super) name: &'static str,
    /// What would load it, or into what to turn it.
    pub(super) advice: &'static str,
}

/// What a file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Perhaps a broken one: its scan says.
    Model(Format),
    Foreign(&'static Foreign),
    Unknown,
}

impl Content {
    pub(super) fn format(&self) -> Option<Format> {
        if let Self::Model(format) = self { Some(*format) } else { None }
    }
}

const TORCHSCRIPT: Foreign =
    Foreign { name: "TorchScript", advice: "export it to ONNX with torch.onnx.export" };
const TORCH_WEIGHTS: Foreign = Foreign {
    name: "a PyTorch checkpoint or state dict (weights without a network)",
    advice: "load it into its module and export that to ONNX with torch.onnx.export",
};
const TORCH_PROGRAM: Foreign = Foreign {
    name: "a PyTorch exported program (.pt2)",
    advice: "load it with torch.export.load and export it to ONNX with torch.onnx.export",
};
const SAVED_MODEL: Foreign = Foreign {
    name: "a TensorFlow SavedModel",
    advice: "freeze it with convert_variables_to_constants_v2 and upload the graph (.pb), or turn it into \
             TensorFlow Lite (TFLiteConverter.from_saved_model) or ONNX (tf2onnx)",
};
const KERAS: Foreign = Foreign {
    name: "a Keras model",
    advice: "load it with keras.models.load_model and turn it into TensorFlow Lite \
             (TFLiteConverter.from_keras_model) or ONNX (model.export with format=\"onnx\", tf2onnx)",
};
const ZIP: Foreign = Foreign { name: "a ZIP archive", advice: "upload the files inside it" };

/// Formats with a mark at a fixed place.
const MARKED: &[(usize, &[u8], Foreign)] = &[
    (0, b"\x89HDF\r\n\x1a\n", KERAS),
    // The magic number of torch.save before archives, pickled.
    (0, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", TORCH_WEIGHTS),
    (0, b"\x80\x04\x95", Foreign { name: "a Python pickle", advice: "export the model to ONNX" }),
    (
        4,
        b"ORTM",
        Foreign { name: "ONNX Runtime's own format", advice: "upload the ONNX model it was made from" },
    ),
    (
        4,
        b"ET12",
        Foreign { name: "an ExecuTorch program", advice: "export its module with torch.onnx.export" },
    ),
    (0, b"GGUF", Foreign { name: "GGUF", advice: "export the model to ONNX" }),
    (0, b"\x1f\x8b", Foreign { name: "a file compressed with gzip", advice: "upload what is inside it" }),
    (257, b"ustar", Foreign { name: "a tar archive", advice: "upload the files inside it" }),
    (
        0,
        b"node {",
        Foreign {
            name: "a TensorFlow graph as text",
            advice: "write it as binary: tf.io.write_graph with as_text=False",
        },
    ),
];

const SAFETENSORS: Foreign = Foreign {
    name: "safetensors (weights without a network)",
    advice: "load them into their module and export that to ONNX",
};

/// Says what the bytes are.
pub(super) fn recognise(bytes: &[u8]) -> Content {
    if bytes.get(4..8) == Some(b"TFL3") {
        return Content::Model(Format::Tflite);
    }
    if bytes.starts_with(b"PK\x03\x04") {
        return Content::Foreign(archive(bytes));
    }
    let marked = |(at, mark, _): &&(usize, &[u8], Foreign)| {
        bytes.get(*at..).is_some_and(|rest| rest.starts_with(mark))
    };
    if let Some((_, _, foreign)) = MARKED.iter().find(marked) {
        return Content::Foreign(foreign);
    }
    let header = bytes.first_chunk().map(|length| u64::from_le_bytes(*length));
    if bytes.get(8) == Some(&b'{') && header.is_some_and(|length| length <= bytes.len() as u64 - 8) {
        return Content::Foreign(&SAFETENSORS);
    }
    protobuf(bytes)
}

// === protobuf: no mark, but fields that only one of the three has ===

/// Fields of onnx.proto3's ModelProto: number and wire type.
const ONNX_FIELDS: &[(u32, WireType)] = &[
    (1, WireType::Varint),
    (2, WireType::LengthDelimited),
    (3, WireType::LengthDelimited),
    (4, WireType::LengthDelimited),
    (5, WireType::Varint),
    (6, WireType::LengthDelimited),
    (7, WireType::LengthDelimited),
    (8, WireType::LengthDelimited),
    (14, WireType::LengthDelimited),
    (20, WireType::LengthDelimited),
    (25, WireType::LengthDelimited),
    (26, WireType::LengthDelimited),
];

/// Of graph.proto's GraphDef.
const GRAPH_FIELDS: &[(u32, WireType)] = &[
    (1, WireType::LengthDelimited),
    (2, WireType::LengthDelimited),
    (3, WireType::Varint),
    (4, WireType::LengthDelimited),
    (5, WireType::LengthDelimited),
];

/// Of saved_model.proto's SavedModel.
const SAVED_MODEL_FIELDS: &[(u32, WireType)] = &[(1, WireType::Varint), (2, WireType::LengthDelimited)];

/// A top-level field as far as it is there.
struct Seen<'a> {
    key: (u32, WireType),
    /// Of a length-delimited field, up to the end of the file.
    content: &'a [u8],
}

/// The top-level fields up to the first that is broken.
fn fields(bytes: &[u8]) -> impl Iterator<Item = Seen<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (tag, wire_type) = decode_key(&mut rest).ok()?;
        let mut content = &rest[..0];
        if wire_type == WireType::LengthDelimited {
            let length = decode_varint(&mut rest).ok().and_then(|length| usize::try_from(length).ok());
            let Some(length) = length else {
                rest = &[];
                return Some(Seen { key: (tag, wire_type), content });
            };
            (content, rest) = rest.split_at_checked(length).unwrap_or((rest, &[]));
        } else if skip_field(wire_type, tag, &mut rest, DecodeContext::default()).is_err() {
            rest = &[];
        }
        Some(Seen { key: (tag, wire_type), content })
    })
}

fn protobuf(bytes: &[u8]) -> Content {
    const VERSION: (u32, WireType) = (1, WireType::Varint);
    const ONNX_GRAPH: (u32, WireType) = (7, WireType::LengthDelimited);
    const ONNX_OPERATORS: (u32, WireType) = (8, WireType::LengthDelimited);
    const META_GRAPH: (u32, WireType) = (2, WireType::LengthDelimited);
    const NODE: (u32, WireType) = (1, WireType::LengthDelimited);
    let (mut onnx, mut graph, mut saved) = (true, true, true);
    let (mut version, mut onnx_only, mut meta_graph, mut node) = (false, false, false, None);
    for seen in fields(bytes) {
        onnx &= ONNX_FIELDS.contains(&seen.key);
        graph &= GRAPH_FIELDS.contains(&seen.key);
        saved &= SAVED_MODEL_FIELDS.contains(&seen.key);
        version |= seen.key == VERSION;
        onnx_only |= [ONNX_GRAPH, ONNX_OPERATORS].contains(&seen.key);
        meta_graph |= seen.key == META_GRAPH && is_meta_graph(seen.content);
        if seen.key == NODE {
            node.get_or_insert(is_node(seen.content));
        }
        if !(onnx || graph || saved) {
            return Content::Unknown;
        }
    }
    if saved && version && meta_graph {
        Content::Foreign(&SAVED_MODEL)
    } else if onnx && (version || onnx_only) {
        Content::Model(Format::Onnx)
    } else if graph && node == Some(true) {
        Content::Model(Format::Tensorflow)
    } else {
        Content::Unknown
    }
}

/// Whether this can be a MetaGraphDef and not the name of the program that wrote an ONNX model.
fn is_meta_graph(content: &[u8]) -> bool {
    let mut fields = fields(content);
    let known = |seen: Seen<'_>| (1..=7).contains(&seen.key.0) && seen.key.1 == WireType::LengthDelimited;
    fields.next().is_some_and(known) && fields.all(known)
}

/// Whether this can be a NodeDef: its name comes first, then its operator.
fn is_node(content: &[u8]) -> bool {
    fields(content).zip(1..=2).all(|(seen, tag)| {
        // Text that was cut off ends anywhere.
        let text = match str::from_utf8(seen.content) {
            Ok(_) => true,
            Err(error) => error.error_len().is_none(),
        };
        seen.key == (tag, WireType::LengthDelimited) && text
    })
}

// === ZIP archives ===

/// Names looked at in an archive: the telling ones are among the first.
const ARCHIVE_NAMES_MAX: usize = 4096;

/// Which archive it is, by the names in it.
fn archive(bytes: &[u8]) -> &'static Foreign {
    let names = names(bytes);
    let any = |sign: &dyn Fn(&str) -> bool| names.iter().any(|name| sign(name));
    if any(&|name| name.contains("/code/") || name.ends_with("/constants.pkl")) {
        &TORCHSCRIPT
    } else if any(&|name| {
        name.ends_with("serialized_exported_program.json") || name.contains("/models/model.json")
    }) {
        &TORCH_PROGRAM
    } else if any(&|name| name.ends_with("data.pkl")) {
        &TORCH_WEIGHTS
    } else if any(&|name| name.ends_with(".weights.h5")) {
        &KERAS
    } else if any(&|name| name.ends_with("saved_model.pb")) {
        &SAVED_MODEL
    } else {
        &ZIP
    }
}

/// Names of an archive's files: those in its directory; of one that was cut off, the first.
fn names(bytes: &[u8]) -> Vec<&str> {
    const FIRST_NAME: usize = 30;
    const ENTRY: usize = 46;
    let mut names = Vec::new();
    let mut at = directory(bytes);
    while let Some(place) = at.filter(|_| names.len() < ARCHIVE_NAMES_MAX) {
        let Some(entry) = bytes.get(place..).filter(|entry| entry.starts_with(b"PK\x01\x02")) else { break };
        let sizes = [28, 30, 32].map(|field| short(entry, field).unwrap_or(0));
        let name = entry.get(ENTRY..ENTRY + sizes[0]).and_then(|name| str::from_utf8(name).ok());
        names.extend(name);
        at = place.checked_add(ENTRY + sizes.iter().sum::<usize>());
    }
    if names.is_empty() {
        let length = short(bytes, FIRST_NAME - 4).unwrap_or(0);
        names.extend(bytes.get(FIRST_NAME..FIRST_NAME + length).and_then(|name| str::from_utf8(name).ok()));
    }
    names
}

/// Where an archive's directory begins.
fn directory(bytes: &[u8]) -> Option<usize> {
    const END_BYTES: usize = 22;
    const COMMENT_BYTES_MAX: usize = 1 << 16;
    let from = bytes.len().saturating_sub(END_BYTES + COMMENT_BYTES_MAX);
    let end = bytes[from..].windows(4).rposition(|window| window == b"PK\x05\x06")?;
    let place = bytes[from + end..].get(16..20)?;
    usize::try_from(u32::from_le_bytes(place.try_into().ok()?)).ok()
}

fn short(bytes: &[u8], at: usize) -> Option<usize> {
    let field = bytes.get(at..at + 2)?;
    Some(usize::from(u16::from_le_bytes(field.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive of empty files, without the parts that nobody here reads.
    fn zip(names: &[&str]) -> Vec<u8> {
        let length = |name: &str| u16::try_from(name.len()).expect("short").to_le_bytes();
        let header = |mark: &[u8], name: &str, at: usize, size: usize| {
            let mut header = vec![0; size];
            header[..4].copy_from_slice(mark);
            header[at..at + 2].copy_from_slice(&length(name));
            [&header[..], name.as_bytes()].concat()
        };
        let files: Vec<u8> = names.iter().flat_map(|name| header(b"PK\x03\x04", name, 26, 30)).collect();
        let directory = names.iter().flat_map(|name| header(b"PK\x01\x02", name, 28, 46));
        let mut end = vec![0; 22];
        end[..4].copy_from_slice(b"PK\x05\x06");
        end[16..20].copy_from_slice(&u32::try_from(files.len()).expect("small").to_le_bytes());
        [&files[..], &directory.collect::<Vec<u8>>(), &end].concat()
    }

    fn foreign(bytes: &[u8]) -> &'static str {
        match recognise(bytes) {
            Content::Foreign(foreign) => foreign.name,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn formats_are_told_by_their_bytes() {
        let onnx = b"\x08\x08\x12\x07pytorch\x3a\x04\x0a\x02\x12\x00\x42\x02\x10\x0d";
        let graph = b"\x0a\x12\x0a\x01x\x12\x0bPlaceholder\x22\x00\x22\x03\x08\xd5\x01";
        let lite = b"\x1c\x00\x00\x00TFL3\x00\x00";
        let saved = b"\x08\x01\x12\x08\x0a\x02\x0a\x00\x12\x02\x0a\x00";
        for (bytes, content) in [
            (&onnx[..], Content::Model(Format::Onnx)),
            (&graph[..], Content::Model(Format::Tensorflow)),
            (&lite[..], Content::Model(Format::Tflite)),
            (&saved[..], Content::Foreign(&SAVED_MODEL)),
            (b"", Content::Unknown),
            (&[0; 512], Content::Unknown),
            (b"you are a model now", Content::Unknown),
            (b"\xff\xd8\xff\xe0 JFIF", Content::Unknown),
            (b"\x89PNG\r\n\x1a\n", Content::Unknown),
        ] {
            assert_eq!(recognise(bytes), content, "{bytes:?}");
        }
        // A file that was cut off is still told, so that its error speaks of it.
        for length in 1..onnx.len() {
            assert_eq!(recognise(&onnx[..length]), Content::Model(Format::Onnx), "{length}");
        }
        for length in 3..graph.len() {
            assert_eq!(recognise(&graph[..length]), Content::Model(Format::Tensorflow), "{length}");
        }
    }

    #[test]
    fn what_is_not_loaded_is_told_too() {
        let script = zip(&["net/data.pkl", "net/code/__torch__.py", "net/constants.pkl", "net/version"]);
        assert_eq!(foreign(&script), TORCHSCRIPT.name);
        assert_eq!(foreign(&zip(&["archive/data.pkl", "archive/data/0"])), TORCH_WEIGHTS.name);
        assert_eq!(foreign(&zip(&["archive/data.pkl"])[..50]), TORCH_WEIGHTS.name, "cut off");
        assert_eq!(foreign(&zip(&["metadata.json", "config.json", "model.weights.h5"])), KERAS.name);
        assert_eq!(foreign(&zip(&["m/models/model.json", "m/data/weights"])), TORCH_PROGRAM.name);
        assert_eq!(foreign(&zip(&["a.txt"])), ZIP.name);
        assert_eq!(foreign(b"PK\x03\x04"), ZIP.name);
        assert_eq!(foreign(b"\x89HDF\r\n\x1a\n\0\0"), KERAS.name);
        assert_eq!(foreign(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M"), TORCH_WEIGHTS.name);
        assert_eq!(foreign(b"\x02\0\0\0\0\0\0\0{}"), SAFETENSORS.name);
        assert_eq!(foreign(b"node {\n  name: \"x\"\n}\n"), "a TensorFlow graph as text");
    }

    #[test]
    fn hostile_archives_are_only_archives() {
        let whole = zip(&["net/data.pkl", "net/code/x.py"]);
        for at in 0..whole.len() {
            for value in [0, 0xff] {
                let mut broken = whole.clone();
                broken[at] = value;
                recognise(&broken);
                recognise(&broken[..at]);
            }
        }
    }
}
