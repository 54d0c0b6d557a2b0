//! `vaccel classify`.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde_json::{Value, json};
use vaccel_client::proto::error::Detail;
use vaccel_client::proto::limits::{IMAGES_PER_CALL_MAX, MESSAGE_BYTES_MAX};
use vaccel_client::{ClassifyOptions, Error, Label, Reason, Session};

use crate::args::ClassifyArgs;
use crate::model;
use crate::output::{Failure, Output, plain, table};

/// Bytes of a message that are kept for what is around the images: ids, and a tag and a length for each.
const ENVELOPE_BYTES: usize = 64 << 10;

pub(crate) async fn classify(
    session: &Session,
    args: &ClassifyArgs,
    output: &mut Output,
) -> Result<(), Failure> {
    let model = model::register_said(session, args.model.as_ref()).await?;
    let options = ClassifyOptions { model: model.as_ref(), top_k: args.top };
    let name_width =
        args.images.iter().map(|path| path.display().to_string().chars().count()).max().unwrap_or(0);
    let mut document = Vec::new();
    let mut left = &args.images[..];
    while !left.is_empty() {
        let (images, files) = next_batch(&mut left)?;
        let labels = session.classify(images, options).await.map_err(|error| name_file(error, files))?;
        for (file, labels) in files.iter().zip(&labels) {
            output.text(&text(&file.display().to_string(), name_width, labels))?;
            document.push(json!({
                "file": file.display().to_string(),
                "labels": labels.iter().map(label).collect::<Vec<_>>(),
            }));
        }
    }
    output.document(Value::Array(document));
    Ok(())
}

pub(crate) fn read(path: &Path) -> Result<Bytes, Error> {
    let unreadable = |e| Error::new(Reason::BadArgument, format!("cannot read {}: {e}", path.display()));
    Ok(Bytes::from(std::fs::read(path).map_err(unreadable)?))
}

/// Reads as many of the files as one call takes, at least one.
fn next_batch<'a>(left: &mut &'a [PathBuf]) -> Result<(Vec<Bytes>, &'a [PathBuf]), Error> {
    let mut images = Vec::new();
    let mut room = MESSAGE_BYTES_MAX - ENVELOPE_BYTES;
    for path in left.iter().take(IMAGES_PER_CALL_MAX) {
        let image = read(path)?;
        if image.len() > room && !images.is_empty() {
            break;
        }
        room = room.saturating_sub(image.len());
        images.push(image);
    }
    let (files, rest) = left.split_at(images.len());
    *left = rest;
    Ok((images, files))
}

/// Puts the file before the text of an error that is about one image.
pub(crate) fn name_file(error: Error, files: &[PathBuf]) -> Error {
    let file = match (error.detail(), files) {
        (Detail::Field(path), [only]) if path.ends_with("image") => Some(only),
        (Detail::Field(path), _) => image_index(path).and_then(|index| files.get(index)),
        // Nothing else in the message is large.
        (Detail::Limit { .. }, [only]) if error.reason() == Reason::MessageTooLarge => Some(only),
        _ => None,
    };
    match file {
        Some(file) => {
            let message = format!("{}: {error}", file.display());
            Error::new(error.reason(), message).with(error.detail().clone())
        }
        None => error,
    }
}

/// The index in a field path that ends with `images[INDEX]` or goes on from there.
fn image_index(path: &str) -> Option<usize> {
    let (_, after) = path.split_once("images[")?;
    after.split_once(']')?.0.parse().ok()
}

fn text(file: &str, width: usize, labels: &[Label]) -> String {
    let row = |(rank, label): (usize, &Label)| {
        // The name stands before the first label only.
        let file = if rank == 0 { plain(file) } else { String::new() };
        vec![format!("{file:width$}"), percent(label.probability), plain(&label.name)]
    };
    table(&labels.iter().enumerate().map(row).collect::<Vec<_>>())
}

pub(crate) fn percent(part: f32) -> String {
    format!("{:5.1} %", part * 100.0)
}

pub(crate) fn label(label: &Label) -> Value {
    json!({"name": label.name, "index": label.index, "probability": digits(label.probability)})
}

/// The number with the digits that it has: as an f64 the shortest text of an f32 is not the shortest any more, and 0.1
/// would print as 0.10000000149011612.
pub(crate) fn digits(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_what_a_call_takes() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: usize| {
            let path = folder.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(bytes as u64).unwrap();
            path
        };
        let half = MESSAGE_BYTES_MAX / 2;
        let paths =
            [file("a", half), file("b", 10), file("c", half), file("d", 2 * MESSAGE_BYTES_MAX), file("e", 1)];
        let mut left = &paths[..];
        let mut sizes = Vec::new();
        while !left.is_empty() {
            sizes.push(next_batch(&mut left).unwrap().0.len());
        }
        assert_eq!(sizes, [2, 1, 1, 1]);

        let many = vec![file("f", 1); IMAGES_PER_CALL_MAX + 1];
        let mut left = &many[..];
        assert_eq!(next_batch(&mut left).unwrap().0.len(), IMAGES_PER_CALL_MAX);
        assert_eq!(left.len(), 1);
    }

    #[test]
    fn an_error_about_one_image_names_its_file() {
        let files = [PathBuf::from("good.png"), PathBuf::from("bad.png")];
        let about_one = Error::field("images[1]", "a PNG or JPEG file", "something else");
        assert!(name_file(about_one, &files).to_string().starts_with("bad.png: images[1]"));
        let beyond = Error::field("images[7]", "a", "b");
        assert!(name_file(beyond, &files).to_string().starts_with("images[7]"));
        let large = Error::limit(Reason::MessageTooLarge, "message", 1, 2, "bytes");
        assert!(name_file(large, &files[..1]).to_string().starts_with("good.png: "));
    }

    #[test]
    fn probabilities_keep_their_digits() {
        let one = Label { index: 3, name: "3".into(), probability: 0.1 };
        assert_eq!(label(&one).to_string(), r#"{"index":3,"name":"3","probability":0.1}"#);
        let two = Label { index: 4, name: "4\n".into(), probability: 0.0501 };
        assert_eq!(text("a.png", 6, &[one, two]), "a.png    10.0 %  3\n          5.0 %  4\u{fffd}\n");
    }
}
