//! `vaccel run`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vaccel_client::{DType, Error, NamedTensor, Session, Tensor, Timings, named, npy};

use crate::args::{Input, RunArgs};
use crate::model;
use crate::output::{Failure, Output, plain, table, unwritable};

/// How many values of an output are printed.
const VALUES_SHOWN: usize = 8;

pub(crate) async fn run(session: &Session, args: &RunArgs, output: &mut Output) -> Result<(), Failure> {
    let inputs = args
        .inputs
        .iter()
        .map(|Input { name, file }| Ok(named(name, npy::read(file)?)))
        .collect::<Result<Vec<_>, Error>>()?;
    let model = model::register(session, &args.model).await?;
    let run = session.run(&model, inputs, &[]).await?;
    let files = match &args.output {
        Some(folder) => write(folder, &run.outputs)?.into_iter().map(Some).collect(),
        None => vec![None; run.outputs.len()],
    };
    let (mut rows, mut outputs) = (Vec::new(), Vec::new());
    for (NamedTensor { name, tensor }, file) in run.outputs.iter().zip(files) {
        let tensor = tensor.clone().unwrap_or_default();
        let file = file.map(|file| file.display().to_string());
        if output.is_json() {
            outputs.push(describe(name, &tensor, file.as_deref()));
        } else {
            rows.push(vec![plain(name), tensor.signature(), file.unwrap_or_else(|| first_values(&tensor))]);
        }
    }
    let Timings { queue_us, run_us, batch_size } = run.timings;
    let timings = json!({"queue_us": queue_us, "run_us": run_us, "batch_size": batch_size});
    output.document(json!({"outputs": outputs, "timings": timings}));
    output.text(&table(&rows))?;
    output.text(&format!("waited {queue_us} µs, ran {run_us} µs in a batch of {batch_size}\n"))
}

fn describe(name: &str, tensor: &Tensor, file: Option<&str>) -> Value {
    let mut output = json!({"name": name, "dtype": tensor.dtype().name(), "shape": tensor.shape});
    if let Some(file) = file {
        output["file"] = file.into();
    }
    output
}

/// Writes each output to a file of its own and returns their paths.
fn write(folder: &Path, outputs: &[NamedTensor]) -> Result<Vec<PathBuf>, Error> {
    std::fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
    let mut taken = BTreeSet::new();
    let mut paths = Vec::new();
    for (index, NamedTensor { name, tensor }) in outputs.iter().enumerate() {
        let mut label = file_label(name);
        if label.is_empty() {
            label = "output".into();
        }
        if !taken.insert(label.clone()) {
            label = format!("{label}.{index}");
            taken.insert(label.clone());
        }
        let path = folder.join(format!("{label}.npy"));
        npy::write(&path, tensor.as_ref().unwrap_or(&Tensor::default()))?;
        paths.push(path);
    }
    Ok(paths)
}

/// A model's name for an output as a file name: it may hold anything, a path for example.
fn file_label(name: &str) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let label: String = name.chars().map(letter).collect();
    label.trim_start_matches('.').to_owned()
}

fn first_values(tensor: &Tensor) -> String {
    fn list<T: vaccel_client::proto::tensor::Element + ToString>(tensor: &Tensor) -> Vec<String> {
        let elements = tensor.elements::<T>().unwrap_or_default();
        elements.iter().take(VALUES_SHOWN + 1).map(ToString::to_string).collect()
    }
    let mut values = match tensor.dtype() {
        DType::Unspecified => Vec::new(),
        DType::Bool => {
            tensor.data.iter().take(VALUES_SHOWN + 1).map(|&byte| (byte != 0).to_string()).collect()
        }
        DType::U8 => list::<u8>(tensor),
        DType::I8 => list::<i8>(tensor),
        DType::U16 => list::<u16>(tensor),
        DType::I16 => list::<i16>(tensor),
        DType::U32 => list::<u32>(tensor),
        DType::I32 => list::<i32>(tensor),
        DType::U64 => list::<u64>(tensor),
        DType::I64 => list::<i64>(tensor),
        DType::F16 => list::<half::f16>(tensor),
        DType::Bf16 => list::<half::bf16>(tensor),
        DType::F32 => list::<f32>(tensor),
        DType::F64 => list::<f64>(tensor),
        DType::Bytes => {
            let strings =
                vaccel_client::proto::tensor::strings(&tensor.data).take(VALUES_SHOWN + 1).flatten();
            strings.map(|string| plain(&String::from_utf8_lossy(&string))).collect()
        }
    };
    if values.len() > VALUES_SHOWN {
        values[VALUES_SHOWN] = "…".into();
    }
    values.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn outputs_stay_in_their_folder_and_apart() {
        let folder = tempfile::tempdir().unwrap();
        let output = |name: &str| named(name, Tensor::new(&[1], &[1.0_f32]).unwrap());
        let outputs = ["logits", "../logits", "..", "", "a/b", "a_b"].map(output);
        let paths = write(&folder.path().join("new"), &outputs).unwrap();
        let names: Vec<_> = paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(
            names,
            ["logits.npy", "_logits.npy", "output.npy", "output.3.npy", "a_b.npy", "a_b.5.npy"]
        );
        for path in paths {
            assert_eq!(npy::read(&path).unwrap(), *outputs[0].tensor.as_ref().unwrap());
        }
    }

    #[test]
    fn first_values_are_few_and_of_every_type() {
        let long = Tensor::new(&[9], &[0_i64, 1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert_eq!(first_values(&long), "0 1 2 3 4 5 6 7 …");
        assert_eq!(first_values(&Tensor::new(&[2], &[1.5_f32, -2.0]).unwrap()), "1.5 -2");
        assert_eq!(first_values(&Tensor::new(&[1], &[half::f16::from_f32(0.25)]).unwrap()), "0.25");
        let flags = Tensor::from_bytes(DType::Bool, &[2], Bytes::from_static(&[0, 1]));
        assert_eq!(first_values(&flags), "false true");
        assert_eq!(first_values(&Tensor::default()), "");
    }

    #[test]
    fn an_output_is_described() {
        let tensor = Tensor::new(&[2, 1], &[1_u8, 2]).unwrap();
        let text = describe("y", &tensor, Some("out/y.npy")).to_string();
        assert_eq!(text, r#"{"dtype":"u8","file":"out/y.npy","name":"y","shape":[2,1]}"#);
        assert!(describe("y", &tensor, None).get("file").is_none());
    }
}
