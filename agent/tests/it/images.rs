//! What models see in images: things, classes, bodies and distances, with the pictures of them.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use image::{ImageFormat, RgbImage};
use vaccel_client::proto::is_resource_id;
use vaccel_client::proto::v1::Area;
use vaccel_client::{
    Arg, ArgType, ImageOptions, Reason, Resource, ResourceFiles, ResourceKind, Session, SessionOptions, arg,
    room,
};

use crate::support::{Agent, onnx, onnxruntime, output_text, seer, vaccel};

const PICTURED: ImageOptions = ImageOptions { threshold: 0.0, at_most: 0, picture: true };
const PLAIN: ImageOptions = ImageOptions { picture: false, ..PICTURED };

/// Pictures that a session holds.
const PICTURES_MAX: usize = 16;

async fn seeing(session: &Session) -> Resource {
    session.register(ResourceFiles::new(ResourceKind::Model, seer::files())).await.unwrap()
}

fn sides(area: &Area) -> [f32; 4] {
    [area.left, area.top, area.right, area.bottom]
}

fn picture(jpeg: &Bytes) -> RgbImage {
    image::load_from_memory_with_format(jpeg, ImageFormat::Jpeg).unwrap().into_rgb8()
}

/// Whether a pixel is nearly of a color: JPEG changes it somewhat, more so beside other colors.
fn is_near(image: &RgbImage, [x, y]: [u32; 2], color: [u8; 3]) -> bool {
    image.get_pixel(x, y).0.iter().zip(color).all(|(sample, wanted)| sample.abs_diff(wanted) < 60)
}

/// Red in column 2 and row 1, green in column 0 and row 3, each part 8 pixels wide and high.
async fn assert_sees(session: &Session, model: &Resource) {
    let image = || seer::image([2, 1], [0, 3]);
    let seen = session.detect(model, image(), PICTURED).await.unwrap();
    let mut found: Vec<_> = seen
        .detections
        .iter()
        .map(|detection| {
            let label = detection.label.as_ref().unwrap();
            (label.name.as_str(), label.index, label.probability, sides(detection.area.as_ref().unwrap()))
        })
        .collect();
    found.sort_by_key(|(_, index, ..)| *index);
    assert_eq!(found, [("red", 0, 1.0, [16.0, 8.0, 24.0, 16.0]), ("green", 1, 1.0, [0.0, 24.0, 8.0, 32.0]),]);
    let drawn = picture(&seen.picture.unwrap());
    assert_eq!(drawn.dimensions(), (seer::IMAGE, seer::IMAGE));
    assert!(is_near(&drawn, [28, 2], [0, 0, 0]), "what is nothing is as it was");

    let seen = session.segment(model, image(), PICTURED).await.unwrap();
    let segments: Vec<_> =
        seen.segments.iter().map(|segment| (segment.index, segment.name.as_str(), segment.share)).collect();
    assert_eq!(segments[0], (0, "", 0.875));
    assert_eq!(segments[1..].iter().map(|segment| segment.2).collect::<Vec<_>>(), [0.0625; 2]);
    assert_eq!(sides(&seen.area), [0.0, 0.0, 32.0, 32.0]);
    assert_eq!(seen.classes.shape, [16, 16]);
    let classes = seen.classes.elements::<u8>().unwrap();
    let at = |x: usize, y: usize| classes[y * 16 + x];
    assert_eq!([at(0, 0), at(8, 4), at(11, 7), at(12, 7), at(0, 12), at(3, 15)], [0, 1, 1, 0, 2, 2]);
    assert!(is_near(&picture(&seen.picture.unwrap()), [28, 2], [0, 0, 0]), "what has no name is not colored");

    let seen = session.pose(model, image(), PICTURED).await.unwrap();
    let [pose] = &seen.poses[..] else { panic!("one body: {:?}", seen.poses) };
    let label = pose.label.as_ref().unwrap();
    assert_eq!((label.name.as_str(), label.probability), ("person", 1.0));
    let points: Vec<_> =
        pose.points.iter().map(|point| (point.name.as_str(), point.x, point.y, point.probability)).collect();
    assert_eq!(points, [("head", 17.5, 9.5, 1.0), ("foot", 1.0, 25.5, 1.0)]);
    assert_eq!(sides(pose.area.as_ref().unwrap()), [1.0, 9.5, 17.5, 25.5]);
    let drawn = picture(&seen.picture.unwrap());
    assert!(!is_near(&drawn, [9, 17], [0, 0, 0]), "a line from one to the other");

    let seen = session.depth(model, image(), PICTURED).await.unwrap();
    assert_eq!((seen.depth.shape.as_slice(), sides(&seen.area)), (&[16, 16][..], [0.0, 0.0, 32.0, 32.0]));
    let depth = seen.depth.elements::<f32>().unwrap();
    assert!((depth[4 * 16 + 8] - 1.0 / 3.0).abs() < 1e-6 && depth[0] == 0.0, "{depth:?}");
    let drawn = picture(&seen.picture.unwrap());
    assert!(
        is_near(&drawn, [20, 12], [255; 3]) && is_near(&drawn, [28, 2], [0; 3]),
        "what is near is bright"
    );
}

#[tokio::test]
async fn what_a_model_sees_comes_back_over_every_socket_and_from_both_engines() {
    let library = onnxruntime();
    let flags = ["--onnxruntime", library.to_str().unwrap()];
    let agent = Agent::start(&["unix://{}/s", "tcp://127.0.0.1:0", "hvsock://{}/vm:2048"], &flags);
    for index in 0..agent.addresses.len() {
        for engine in ["tract", "onnxruntime"] {
            let options = SessionOptions { engine: engine.into(), ..SessionOptions::default() };
            let session = agent.guest(index).await.open_session(options).await.unwrap();
            assert_sees(&session, &seeing(&session).await).await;
        }
    }
}

#[tokio::test]
async fn a_call_says_how_much_it_wants_and_gets_no_picture_unasked() {
    let agent = Agent::unix(&[]);
    let (_, session) = agent.session().await;
    let model = seeing(&session).await;
    let image = || seer::image([2, 1], [0, 3]);
    let one = session.detect(&model, image(), ImageOptions { at_most: 1, ..PLAIN }).await.unwrap();
    assert_eq!((one.detections.len(), one.picture), (1, None));
    // Beside each other, half of the next part is somewhat red.
    let all = session.detect(&model, image(), ImageOptions { threshold: 1.0, ..PLAIN }).await.unwrap();
    assert_eq!(all.detections.len(), 2);
    let none = session.detect(&model, seer::image([9, 9], [9, 9]), PLAIN).await.unwrap();
    assert!(none.detections.is_empty());
    assert!(session.pose(&model, seer::image([9, 9], [9, 9]), PLAIN).await.unwrap().poses.is_empty());
}

fn seen(number: u8) -> Vec<Arg> {
    vec![arg(ArgType::Uint8, vec![number]), arg(ArgType::Buffer, seer::image([2, 1], [0, 3]).to_vec())]
}

/// The name that a generic operation gives a picture.
async fn named_picture(session: &Session, read: Vec<Arg>) -> String {
    let (written, _) = session.genop(read, vec![room(ArgType::UcharArray, 65)]).await.unwrap();
    let name = written[0].data.strip_suffix(&[0]).unwrap();
    String::from_utf8(name.to_vec()).unwrap()
}

#[tokio::test]
async fn the_generic_operation_makes_pictures_resources_of_the_session() {
    let agent = Agent::start(&["unix://{}/a", "unix://{}/b"], &[]);
    let (_, session) = agent.session().await;
    let model = seeing(&session).await;
    let image = || seer::image([2, 1], [0, 3]);
    for (number, expected) in [
        (4, session.detect(&model, image(), PICTURED).await.unwrap().picture),
        (5, session.segment(&model, image(), PICTURED).await.unwrap().picture),
        (6, session.pose(&model, image(), PICTURED).await.unwrap().picture),
        (7, session.depth(&model, image(), PICTURED).await.unwrap().picture),
    ] {
        let name = named_picture(&session, seen(number)).await;
        let held = session.list_resources().await.unwrap();
        let held = held.iter().find(|held| held.resource == name).unwrap();
        assert_eq!(held.kind(), ResourceKind::Data);
        // As a guest finds it that has nothing but the name.
        assert_eq!(held.files.len(), 1);
        let handle = Resource::of_session(name.clone(), ResourceKind::Data);
        let file = &held.files[0].name;
        let content = session.read_resource(&handle, file, 0, 0).await.unwrap().rest().await.unwrap();
        assert_eq!(Some(Bytes::from(content)), expected, "{number}");
        let stranger = agent.guest(1).await.open_session(SessionOptions::default()).await.unwrap();
        let refusal = stranger.read_resource(&handle, file, 0, 0).await.err();
        assert_eq!(refusal.unwrap().reason(), Reason::NotFound);
    }
    let short = session.genop(seen(4), vec![room(ArgType::UcharArray, 64)]).await.unwrap_err();
    assert!(short.message().contains("room for 65 bytes"), "{short}");
}

#[tokio::test]
async fn a_call_without_a_model_takes_the_hosts_for_the_operation() {
    let folder = tempfile::tempdir().unwrap();
    let version = folder.path().join("models/image_detection/1");
    std::fs::create_dir_all(&version).unwrap();
    for (name, content) in seer::files() {
        std::fs::write(version.join(name), content).unwrap();
    }
    let agent = Agent::start_in(folder, &["unix://{}/s"], &["--model-repository", "{}/models"]);
    let (_, session) = agent.session().await;
    let name = named_picture(&session, seen(4)).await;
    assert!(is_resource_id(&name), "{name}");
    let model = Resource::of_repository("image_detection");
    let named = session.detect(&model, seer::image([2, 1], [0, 3]), PLAIN).await.unwrap();
    assert_eq!(named.detections.len(), 2);
    assert_eq!(session.detect(None, seer::image([2, 1], [0, 3]), PLAIN).await.unwrap(), named);
    let image = agent.folder().join("things.png");
    std::fs::write(&image, seer::image([2, 1], [0, 3])).unwrap();
    let told = vaccel().args(["--address", agent.address(), "detect"]).arg(&image).output().unwrap();
    let told = output_text(&told);
    assert!(told.contains("100.0 %  red    16,8 24,16"), "{told}");
    let refusal = session.genop(seen(7), vec![room(ArgType::UcharArray, 65)]).await.unwrap_err();
    assert_eq!(refusal.reason(), Reason::BadArgument);
    assert!(refusal.message().contains("no model image_depth of its own"), "{refusal}");
}

#[tokio::test]
async fn a_session_holds_its_last_pictures_and_no_more() {
    let agent = Agent::unix(&[]);
    let (_, session) = agent.session().await;
    seeing(&session).await;
    let mut names = Vec::new();
    // Red in each part of the first columns, then green too.
    let places = (0..12).map(|place| ([place % 3, place / 3], [9, 9]));
    let places = places.chain((0..6).map(|place| ([0, 0], [3 - place / 4, place % 4])));
    for (red, green) in places {
        let image = seer::image(red, green).to_vec();
        let read = vec![arg(ArgType::Uint8, vec![5]), arg(ArgType::Buffer, image)];
        names.push(named_picture(&session, read).await);
    }
    let held: BTreeSet<String> =
        session.list_resources().await.unwrap().into_iter().map(|held| held.resource).collect();
    let kept: Vec<bool> = names.iter().map(|name| held.contains(name)).collect();
    assert_eq!(kept, [vec![false; names.len() - PICTURES_MAX], vec![true; PICTURES_MAX]].concat());
    assert_eq!(held.len(), PICTURES_MAX + 1, "the model and the pictures");
}

/// A model that makes an output of this shape from a few numbers, which it repeats along one axis.
fn crowd(numbers: &[f32], axis: usize, shape: &[i64], file: &str, said: &str) -> Vec<(String, Bytes)> {
    let nodes = vec![
        onnx::node("ReduceMax", &["x"], &["one"]).message(5, onnx::number_attribute("keepdims", 1)),
        onnx::node("Reshape", &["one", "flat"], &["row"]),
        onnx::node("Mul", &["row", "few"], &["first"]),
        onnx::node("Expand", &["first", "shape"], &["y"]),
    ];
    let few: Vec<u64> =
        shape.iter().enumerate().map(|(at, side)| if at == axis { 1 } else { side.unsigned_abs() }).collect();
    let weights = vec![
        onnx::i64s("flat", &vec![1; shape.len()]),
        onnx::i64s("shape", shape),
        onnx::f32s("few", &few, numbers),
    ];
    let input = onnx::port("x", onnx::F32, &[1, 3, 8, 8]);
    let model = onnx::model(nodes, weights, vec![input], vec![onnx::port("y", onnx::F32, shape)]);
    vec![("crowd.onnx".into(), model), (file.into(), said.to_owned().into())]
}

fn detector(rows: i64) -> Vec<(String, Bytes)> {
    let said = r#"{"width":8,"height":8,"form":"cxcywh","labels":["a","b"],"overlap":1}"#;
    crowd(&[4.0, 4.0, 2.0, 2.0, 0.9, 0.8], 2, &[1, 6, rows], "image_detection.json", said)
}

#[tokio::test]
async fn a_model_that_sees_a_million_things_gives_as_many_as_were_asked_for() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let (_, session) = agent.session().await;
    let register =
        async |files| session.register(ResourceFiles::new(ResourceKind::Model, files)).await.unwrap();
    let model = register(detector(1_000_000)).await;
    let white = || {
        let mut png = std::io::Cursor::new(Vec::new());
        RgbImage::from_pixel(8, 8, image::Rgb([255; 3])).write_to(&mut png, ImageFormat::Png).unwrap();
        Bytes::from(png.into_inner())
    };
    let seen = session.detect(&model, white(), PICTURED).await.unwrap();
    assert_eq!(seen.detections.len(), 100);
    let most = session.detect(&model, white(), ImageOptions { at_most: 1000, ..PLAIN }).await.unwrap();
    assert_eq!(most.detections.len(), 1000);
    let wider = register(detector(10_000_000)).await;
    let refusal = session.detect(&wider, white(), PLAIN).await.unwrap_err();
    assert_eq!(
        refusal.reason(),
        Reason::MessageTooLarge,
        "outputs are bounded as those of every run: {refusal}"
    );
    // Bodies of one point, each of which would take a hundred times its numbers.
    let said = r#"{"width":8,"height":8,"given":"points","point":"xy","points":["a"],"threshold":0}"#;
    let bodies = register(crowd(&[4.0, 2.0], 1, &[1, 4_000_000, 1, 2], "image_pose.json", said)).await;
    let before = agent.peak();
    let seen = session.pose(&bodies, white(), PLAIN).await.unwrap();
    assert_eq!(seen.poses.len(), 100);
    assert_eq!((seen.poses[0].points[0].x, seen.poses[0].points[0].probability), (4.0, 1.0));
    let grown = agent.peak() - before;
    assert!(grown < 300 << 20, "{} MiB", grown >> 20);
}

#[tokio::test]
async fn a_description_that_is_not_of_this_model_is_told_what_is_wrong() {
    let agent = Agent::unix(&["--engine", "tract"]);
    let (_, session) = agent.session().await;
    for (said, told) in [
        (r#"{"width":16,"height":16,"labels":["a"],"sort":1}"#, "no key \"sort\""),
        (r#"{"width":16,"height":16,"labels":["a"],"row":["corners"]}"#, "unknown variant"),
        (r#"{"width":16,"height":16,"labels":["a"],"output":"nothing"}"#, "\"nothing\""),
        (r#"{"width":16,"height":16,"labels":["a"],"output":"rows"}"#, "[1, rows, 5]"),
        (r#"{"width":8,"height":16,"labels":["a"]}"#, "images become"),
        (r#"{"width":16,"height":16}"#, "labels: expected 1 to"),
        (r#"{"width":16,"height":16,"labels":["a"],"output":"rows","scores":"rows"}"#, "each output once"),
        ("[", "EOF"),
    ] {
        let mut files = seer::files();
        files.retain(|(name, _)| name.ends_with(".onnx"));
        files.push(("image_detection.json".into(), said.into()));
        let model = session.register(ResourceFiles::new(ResourceKind::Model, files)).await.unwrap();
        let refusal = session.detect(&model, seer::image([0, 0], [1, 1]), PLAIN).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::ModelRejected, "{said}: {refusal}");
        assert!(refusal.message().contains(told), "{said}: {refusal}");
    }
}

#[tokio::test]
async fn a_model_that_takes_whole_numbers_gets_the_samples() {
    let library = onnxruntime();
    let agent = Agent::unix(&["--onnxruntime", library.to_str().unwrap()]);
    let shape = [1, 3, 8, 8];
    let nodes = vec![
        onnx::node("Cast", &["x"], &["f"]).message(5, onnx::number_attribute("to", onnx::F32)),
        onnx::node("ReduceMean", &["f"], &["y"]).message(5, onnx::numbers_attribute("axes", &[1])),
    ];
    let output = onnx::port("y", onnx::F32, &[1, 1, 8, 8]);
    let model = onnx::model(nodes, vec![], vec![onnx::port("x", onnx::U8, &shape)], vec![output]);
    let said = Bytes::from_static(br#"{"width":8,"height":8,"filter":"nearest"}"#);
    let files = vec![("m.onnx".into(), model), ("image_depth.json".into(), said)];
    for engine in ["tract", "onnxruntime"] {
        let options = SessionOptions { engine: engine.into(), ..SessionOptions::default() };
        let session = agent.guest(0).await.open_session(options).await.unwrap();
        let model = session.register(ResourceFiles::new(ResourceKind::Model, files.clone())).await.unwrap();
        let seen = session.depth(&model, seer::image([2, 1], [0, 3]), PLAIN).await.unwrap();
        let depth = seen.depth.elements::<f32>().unwrap();
        assert_eq!([depth[0], depth[2 * 8 + 4], depth[7 * 8 + 1]], [0.0, 85.0, 85.0], "{engine}");
    }
}

#[test]
fn the_command_tells_what_it_finds_and_keeps_pictures_and_maps() {
    let agent = Agent::unix(&[]);
    let folder = agent.folder();
    let model = folder.join("seer");
    std::fs::create_dir(&model).unwrap();
    for (name, content) in seer::files() {
        std::fs::write(model.join(name), content).unwrap();
    }
    let image = folder.join("things.png");
    std::fs::write(&image, seer::image([2, 1], [0, 3])).unwrap();
    let run = |command: &str, more: &[&Path]| -> serde_json::Value {
        let mut run = vaccel();
        run.args(["--json", "--address", agent.address(), command, "--model"])
            .arg(&model)
            .arg(&image)
            .args(more);
        let output = run.output().unwrap();
        assert!(output.status.success(), "{command}: {}", output_text(&output));
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        document[0].clone()
    };
    let out = folder.join("out");
    let kept = |name: &str| std::fs::read(out.join(name)).unwrap();
    let pictures: &[&Path] = &[Path::new("--pictures"), &out];
    let found = run("detect", pictures);
    assert_eq!(found["detections"].as_array().unwrap().len(), 2, "{found}");
    assert_eq!(picture(&kept("things.jpg").into()).dimensions(), (seer::IMAGE, seer::IMAGE));
    let maps: &[&Path] = &[Path::new("--maps"), &out];
    assert_eq!(run("segment", maps)["segments"].as_array().unwrap().len(), 3);
    assert!(kept("things.npy").starts_with(b"\x93NUMPY"));
    let body = run("pose", &[]);
    assert_eq!(body["poses"][0]["points"].as_array().unwrap().len(), 2, "{body}");
    run("depth", maps);
    let depth = vaccel_client::npy::read(&out.join("things.npy")).unwrap();
    assert_eq!(depth.shape, [16, 16]);
}
