//! `vaccel detect`, `segment`, `pose` and `depth`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde_json::{Value, json};
use vaccel_client::{
    Area, Detection, Error, ImageOptions, Keypoint, Pose, Resource, Segment, Session, Tensor, npy,
};

use crate::args::{Command, FindArgs, LookArgs, MapArgs};
use crate::classify::{digits, label, name_file, percent, read};
use crate::model;
use crate::output::{Failure, Output, plain, table, unwritable};

/// What was seen in one image: lines of cells for people, a document for programs, and what goes to files.
struct Seen {
    rows: Vec<Vec<String>>,
    document: Value,
    picture: Option<Bytes>,
    map: Option<Tensor>,
}

pub(crate) async fn look(session: &Session, command: &Command, output: &mut Output) -> Result<(), Failure> {
    let (args, maps) = match command {
        Command::Detect(FindArgs { look, .. }) | Command::Pose(FindArgs { look, .. }) => (look, None),
        Command::Segment(MapArgs { look, maps }) | Command::Depth(MapArgs { look, maps }) => {
            (look, maps.as_deref())
        }
        _ => return Err(Failure::Usage("expected a command that looks at images".into())),
    };
    let LookArgs { images, model, pictures } = args;
    let model = model::register_said(session, model.as_ref()).await?;
    let mut names = Names::new(images);
    let mut document = Vec::new();
    for path in images {
        let seen = see(session, command, model.as_ref(), read(path)?, pictures.is_some()).await;
        let mut seen = seen.map_err(|error| name_file(error, std::slice::from_ref(path)))?;
        let shown = path.display().to_string();
        seen.document["file"] = shown.clone().into();
        let stem = names.stem(path, pictures.iter().map(PathBuf::as_path).chain(maps));
        let mut kept = Vec::new();
        if let (Some(folder), Some(picture)) = (pictures, &seen.picture) {
            let file = file(folder, &stem, PICTURE)?;
            std::fs::write(&file, picture).map_err(|error| unwritable(&file, &error))?;
            kept.push(file.display().to_string());
            seen.document["picture"] = file.display().to_string().into();
        }
        if let (Some(folder), Some(map)) = (maps, &seen.map) {
            let file = file(folder, &stem, MAP)?;
            npy::write(&file, map)?;
            kept.push(file.display().to_string());
            seen.document["map"] = file.display().to_string().into();
        }
        // Distances are one line, which has room for it.
        if let (Command::Depth(_), Some(line)) = (command, seen.rows.first_mut()) {
            line.extend(kept.iter().map(|file| plain(file)));
        }
        let named = |(number, row): (usize, Vec<String>)| {
            // The name stands before the first line only.
            let file = if number == 0 { plain(&shown) } else { String::new() };
            [vec![file], row].concat()
        };
        output.text(&table(&seen.rows.into_iter().enumerate().map(named).collect::<Vec<_>>()))?;
        document.push(seen.document);
    }
    output.document(Value::Array(document));
    Ok(())
}

async fn see(
    session: &Session,
    command: &Command,
    model: Option<&Resource>,
    image: Bytes,
    picture: bool,
) -> Result<Seen, Error> {
    let plain = ImageOptions { picture, ..ImageOptions::default() };
    let wish = |args: &FindArgs| ImageOptions { threshold: args.threshold, at_most: args.at_most, picture };
    Ok(match command {
        Command::Detect(args) => {
            let seen = session.detect(model, image, wish(args)).await?;
            let (rows, found) =
                each(&seen.detections, |found| (vec![detection_row(found)], detection(found)));
            Seen { rows, document: json!({"detections": found}), picture: seen.picture, map: None }
        }
        Command::Pose(args) => {
            let seen = session.pose(model, image, wish(args)).await?;
            let (rows, found) = each(&seen.poses, |found| (pose_rows(found), pose(found)));
            Seen { rows, document: json!({"poses": found}), picture: seen.picture, map: None }
        }
        Command::Depth(_) => {
            let seen = session.depth(model, image, plain).await?;
            let numbers = seen.depth.elements::<f32>()?;
            let finite = || numbers.iter().copied().filter(|number| number.is_finite());
            let (least, most) = (finite().reduce(f32::min), finite().reduce(f32::max));
            let (least, most) = (least.unwrap_or(f32::NAN), most.unwrap_or(f32::NAN));
            let document = json!({
                "least": digits(least), "most": digits(most), "shape": seen.depth.shape, "area": sides(&seen.area),
            });
            let rows = vec![vec![format!("{least} to {most}"), seen.depth.signature()]];
            Seen { rows, document, picture: seen.picture, map: Some(seen.depth) }
        }
        _ => {
            let seen = session.segment(model, image, plain).await?;
            let row = |found: &Segment| vec![vec![percent(found.share), named(&found.name)]];
            let (rows, found) = each(&seen.segments, |found| (row(found), segment(found)));
            let (shape, area) = (&seen.classes.shape, sides(&seen.area));
            let document = json!({"segments": found, "shape": shape, "area": area});
            Seen { rows, document, picture: seen.picture, map: Some(seen.classes) }
        }
    })
}

/// Lines and documents of all that was found; a line that says so if nothing was.
fn each<T>(found: &[T], one: impl Fn(&T) -> (Vec<Vec<String>>, Value)) -> (Vec<Vec<String>>, Vec<Value>) {
    let (rows, documents): (Vec<_>, Vec<_>) = found.iter().map(one).unzip();
    if found.is_empty() { (vec![vec!["nothing".into()]], documents) } else { (rows.concat(), documents) }
}

fn detection_row(found: &Detection) -> Vec<String> {
    let (probability, name) =
        found.label.as_ref().map_or((0.0, ""), |label| (label.probability, label.name.as_str()));
    vec![percent(probability), named(name), corners(found.area.as_ref())]
}

fn detection(found: &Detection) -> Value {
    let mut document = found.label.as_ref().map(label).unwrap_or_default();
    document["box"] = found.area.as_ref().map(sides).into();
    document
}

fn pose_rows(found: &Pose) -> Vec<Vec<String>> {
    let (label, area) = (found.label.clone(), found.area);
    let body = detection_row(&Detection { label, area });
    let point = |point: &Keypoint| {
        let place = format!("{:.0},{:.0}", point.x, point.y);
        vec![percent(point.probability), format!("  {}", named(&point.name)), place]
    };
    std::iter::once(body).chain(found.points.iter().map(point)).collect()
}

fn pose(found: &Pose) -> Value {
    let (label, area) = (found.label.clone(), found.area);
    let mut document = detection(&Detection { label, area });
    let point = |Keypoint { name, x, y, probability }: &Keypoint| {
        let probability = digits(*probability);
        json!({"name": name, "x": digits(*x), "y": digits(*y), "probability": probability})
    };
    document["points"] = found.points.iter().map(point).collect();
    document
}

fn segment(Segment { index, name, share }: &Segment) -> Value {
    json!({"name": name, "index": index, "share": digits(*share)})
}

/// A name, or what stands for none.
fn named(name: &str) -> String {
    if name.is_empty() { "-".into() } else { plain(name) }
}

fn sides(area: &Area) -> [f64; 4] {
    [area.left, area.top, area.right, area.bottom].map(digits)
}

fn corners(area: Option<&Area>) -> String {
    let Area { left, top, right, bottom } = area.copied().unwrap_or_default();
    format!("{left:.0},{top:.0} {right:.0},{bottom:.0}")
}

/// Endings of the files.
const PICTURE: &str = "jpg";
const MAP: &str = "npy";

/// A file in a folder, which is made if it is not there.
fn file(folder: &Path, stem: &str, ending: &str) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
    Ok(folder.join(format!("{stem}.{ending}")))
}

/// Names of the files, by those of the images: none twice, and none of an image itself.
struct Names {
    images: BTreeSet<PathBuf>,
    taken: BTreeSet<String>,
}

impl Names {
    fn new(images: &[PathBuf]) -> Self {
        let images = images.iter().filter_map(|image| image.canonicalize().ok()).collect();
        Self { images, taken: BTreeSet::new() }
    }

    /// The name without its ending, for all of these folders.
    fn stem<'a>(&mut self, image: &Path, folders: impl Iterator<Item = &'a Path>) -> String {
        let first = image.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let folders: Vec<_> = folders.collect();
        let is_free = |stem: &String| {
            let is_image = |folder: &&Path| {
                // What a file is called says nothing about what is in it: an image may have either ending.
                [PICTURE, MAP].iter().any(|ending| {
                    let path = folder.join(format!("{stem}.{ending}"));
                    path.canonicalize().is_ok_and(|path| self.images.contains(&path))
                })
            };
            !self.taken.contains(stem) && !folders.iter().any(is_image)
        };
        let numbered = (2_u64..).map(|number| format!("{first}-{number}"));
        let stem = std::iter::once(first.clone()).chain(numbered).find(is_free).unwrap_or(first);
        self.taken.insert(stem.clone());
        stem
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_client::Label;

    #[test]
    fn no_two_images_have_one_file_and_no_image_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["a.png", "b/a.png", "a.jpg", "b/a.jpg", "c.png"].map(|name| folder.path().join(name));
        std::fs::create_dir(folder.path().join("b")).unwrap();
        paths.iter().for_each(|path| std::fs::write(path, "").unwrap());
        let stems = |into: &str| {
            let mut names = Names::new(&paths);
            let into = folder.path().join(into);
            paths.each_ref().map(|path| names.stem(path, std::iter::once(into.as_path())))
        };
        assert_eq!(stems("new"), ["a", "a-2", "a-3", "a-4", "c"]);
        assert_eq!(stems(""), ["a-2", "a-3", "a-4", "a-5", "c"]);
        assert_eq!(stems("b/../b"), ["a-2", "a-3", "a-4", "a-5", "c"]);
        let odd = folder.path().join("d.npy");
        std::fs::write(&odd, "").unwrap();
        let stem = Names::new(std::slice::from_ref(&odd)).stem(&odd, std::iter::once(folder.path()));
        assert_eq!(stem, "d-2");
    }

    #[test]
    fn what_was_found_is_told_in_lines_and_in_documents() {
        let label = Some(Label { index: 1, name: "cat\n".into(), probability: 0.1 });
        let area = Some(Area { left: 1.4, top: 2.6, right: 10.0, bottom: 20.0 });
        let points = vec![Keypoint { name: "nose".into(), x: 3.0, y: 4.5, probability: 0.5 }];
        let found = Pose { label, area, points };
        let expected = [
            [" 10.0 %", "cat\u{fffd}", "1,3 10,20"].map(str::to_owned),
            [" 50.0 %", "  nose", "3,4"].map(str::to_owned),
        ];
        assert_eq!(pose_rows(&found), expected);
        let document = json!({
            "name": "cat\n", "index": 1, "probability": 0.1, "box": [1.4, 2.6, 10.0, 20.0],
            "points": [{"name": "nose", "x": 3.0, "y": 4.5, "probability": 0.5}],
        });
        assert_eq!(pose(&found), document);
        let none: &[Pose] = &[];
        assert_eq!(
            each(none, |found| (pose_rows(found), pose(found))),
            (vec![vec!["nothing".into()]], vec![])
        );
    }
}
