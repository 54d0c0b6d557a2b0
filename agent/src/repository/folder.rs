//! Models on the host's disk: `FOLDER/NAME/VERSION/model.onnx`, with an optional `FOLDER/NAME/config.pbtxt`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use vaccel_proto::inference::ModelConfig;
use vaccel_proto::inference::model_version_policy::PolicyChoice;

use super::config;
use crate::backend::Reader;

const CONFIG: &str = "config.pbtxt";

/// Endings of files that are models, of which a version has one.
const ENDINGS: [&str; 4] = [".onnx", ".tflite", ".pb", ".graphdef"];

/// A file of a version, and what tells that it is another one now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileMark {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    modified: Option<SystemTime>,
}

/// A model as it is on the disk now.
#[derive(Debug)]
pub(super) struct OnDisk {
    pub(super) config: Option<ModelConfig>,
    /// The text beside each output's name that names a file with labels.
    pub(super) labels: BTreeMap<String, Vec<String>>,
    pub(super) versions: BTreeMap<u64, Vec<FileMark>>,
}

/// Names of the models in a folder.
pub(super) fn names(folder: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !name.starts_with('.') && entry.path().is_dir() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a folder is a model by itself: it has a file that is one, as KServe mounts them.
pub(super) fn is_model(folder: &Path) -> bool {
    files(folder)
        .is_ok_and(|files| files.iter().any(|file| ENDINGS.iter().any(|end| file.name.ends_with(end))))
}

/// Reads the configuration that is written in a model's folder, if there is one.
fn written(folder: &Path) -> Result<Option<ModelConfig>, String> {
    match fs::read_to_string(folder.join(CONFIG)) {
        Ok(text) if text.len() > config::TEXT_BYTES_MAX => {
            let (limit, length) = (config::TEXT_BYTES_MAX, text.len());
            Err(format!("{CONFIG}: expected at most {limit} bytes, it has {length}"))
        }
        Ok(text) => Ok(Some(config::read_text(&text)?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{CONFIG} cannot be read: {}", error.kind())),
    }
}

/// Looks at a model. Its versions are folders with numbers; without any, its own files are version 1. Its configuration
/// is the one that is `given`, or the one that is written there.
///
/// # Errors
/// Why it is none, in words for the host's people and for guests: without the folder.
pub(super) fn look(folder: &Path, name: &str, given: Option<&ModelConfig>) -> Result<OnDisk, String> {
    let config = given.cloned().map_or_else(|| written(folder), |given| Ok(Some(given)))?;
    if let Some(config) = &config {
        config::check(name, config)?;
    }
    let mut versions = BTreeMap::new();
    for version in names(folder).map_err(|error| format!("its folder cannot be read: {}", error.kind()))? {
        let Some(number) = version.parse::<u64>().ok().filter(|number| *number > 0) else { continue };
        let files = files(&folder.join(&version));
        let files = files.map_err(|error| format!("version {number} cannot be read: {}", error.kind()))?;
        versions.insert(number, files);
    }
    if versions.is_empty() && is_model(folder) {
        let files = files(folder).map_err(|error| format!("its files cannot be read: {}", error.kind()))?;
        versions.insert(1, files.into_iter().filter(|file| file.name != CONFIG).collect());
    }
    let needs_no_file =
        config.as_ref().is_some_and(|config| config::engine(config) == Ok(config::Engine::Identity));
    if versions.is_empty() && needs_no_file {
        versions.insert(1, Vec::new());
    }
    // One whose files are still to come is none yet.
    versions.retain(|_, files| needs_no_file || files.iter().any(|file| file.bytes > 0));
    if versions.is_empty() {
        return Err("it has no version: expected a folder with a number, with a model file in it".into());
    }
    keep_served(config.as_ref(), &mut versions);
    let labels = labels(folder, config.as_ref())?;
    if let Some(config) = &config {
        keep_named(&config.default_model_filename, &mut versions)?;
    }
    Ok(OnDisk { config, labels, versions })
}

/// Leaves the file that a configuration names as the model, and those that are none.
///
/// # Errors
/// A version without it.
fn keep_named(named: &str, versions: &mut BTreeMap<u64, Vec<FileMark>>) -> Result<(), String> {
    if named.is_empty() {
        return Ok(());
    }
    for (number, files) in versions {
        if !files.iter().any(|file| file.name == *named) {
            return Err(format!("default_model_filename: version {number} has no file {named:?}"));
        }
        files.retain(|file| file.name == *named || !ENDINGS.iter().any(|end| file.name.ends_with(end)));
    }
    Ok(())
}

/// Leaves the versions that the policy serves: the newest, where there is none.
fn keep_served(config: Option<&ModelConfig>, versions: &mut BTreeMap<u64, Vec<FileMark>>) {
    let policy = config.and_then(|config| config.version_policy.as_ref());
    let newest = match policy.and_then(|policy| policy.policy_choice.as_ref()) {
        Some(PolicyChoice::All(_)) => return,
        Some(PolicyChoice::Specific(specific)) => {
            versions
                .retain(|number, _| specific.versions.iter().any(|one| u64::try_from(*one) == Ok(*number)));
            return;
        }
        Some(PolicyChoice::Latest(latest)) => latest.num_versions.max(1) as usize,
        None => 1,
    };
    while versions.len() > newest {
        versions.pop_first();
    }
}

fn labels(folder: &Path, config: Option<&ModelConfig>) -> Result<BTreeMap<String, Vec<String>>, String> {
    let mut labels = BTreeMap::new();
    for output in
        config.iter().flat_map(|config| &config.output).filter(|output| !output.label_filename.is_empty())
    {
        let text = fs::read_to_string(folder.join(&output.label_filename));
        let text =
            text.map_err(|error| format!("label_filename {:?}: {}", output.label_filename, error.kind()))?;
        labels.insert(output.name.clone(), text.lines().map(str::to_owned).collect());
    }
    Ok(labels)
}

fn files(folder: &Path) -> std::io::Result<Vec<FileMark>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // What the name points to, if it is a link.
        let meta = fs::metadata(entry.path())?;
        if meta.is_file() && !name.starts_with('.') {
            found.push(FileMark {
                name,
                path: entry.path(),
                bytes: meta.len(),
                modified: meta.modified().ok(),
            });
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

/// How the files of a version are read when it is loaded.
pub(super) fn readers(files: &[FileMark]) -> Vec<(String, Reader)> {
    let reader = |file: &FileMark| {
        let (path, name) = (file.path.clone(), file.name.clone());
        let read: Reader = Box::new(move |_| {
            let content = fs::read(&path).map_err(|error| {
                let message = format!("a file of this model cannot be read: {}", error.kind());
                vaccel_proto::Error::new(vaccel_proto::Reason::ModelRejected, message).caused_by(error)
            })?;
            Ok(Bytes::from(content))
        });
        (name, read)
    };
    files.iter().map(reader).collect()
}
