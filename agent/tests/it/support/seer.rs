//! A model that sees things in images: red ones and green ones, as rows, as maps, as points, and how bright all is.

use bytes::Bytes;

use super::onnx::{F32, Message, f32s, i64s, model, node, number_attribute, numbers_attribute, port};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};

/// Sides of the input, of the parts that rows are of, and of the image, in pixels.
const INPUT: usize = 16;
const PART: usize = 4;
pub const IMAGE: u32 = 32;

/// Parts beside each other.
const PARTS: u32 = 4;

/// The model and what it says of itself, for each operation.
pub fn files() -> Vec<(String, Bytes)> {
    let (size, filter) = (format!(r#""width":{INPUT},"height":{INPUT}"#), r#""filter":"box""#);
    let describe = |what: &str| Bytes::from(format!("{{{size},{filter},{what}}}"));
    vec![
        ("seer.onnx".into(), network()),
        (
            "image_detection.json".into(),
            describe(r#""output":"rows","form":"cxcywh","labels":["red","green"]"#),
        ),
        ("image_segmentation.json".into(), describe(r#""output":"classes","labels":["","red","green"]"#)),
        (
            "image_pose.json".into(),
            describe(r#""output":"maps","given":"maps","points":["head","foot"],"links":[[0,1]]"#),
        ),
        ("image_depth.json".into(), describe(r#""output":"depth""#)),
    ]
}

/// The same in one file, which says all that by itself.
pub fn single() -> Bytes {
    let mut all = files().into_iter();
    let (_, network) = all.next().unwrap();
    let said = all.map(|(name, description)| {
        let key = format!("vaccel.{}", name.trim_end_matches(".json"));
        Message::default().message(14, Message::default().bytes(1, key).bytes(2, description)).finish()
    });
    std::iter::once(network).chain(said).collect::<Vec<_>>().concat().into()
}

/// Colors are numbers of 0 to 1; black is neither red nor green.
fn network() -> Bytes {
    let (side, parts) = (INPUT as u64, INPUT / PART);
    let colors = [1.0, -1.0, -1.0, -1.0, 1.0, -1.0];
    let conv = |weights: &str, bias: &str, output: &str| node("Conv", &["image", weights, bias], &[output]);
    let pool = node("AveragePool", &["maps"], &["means"])
        .message(5, numbers_attribute("kernel_shape", &[PART as u64; 2]))
        .message(5, numbers_attribute("strides", &[PART as u64; 2]));
    let nodes = vec![
        conv("colors", "zeros", "maps"),
        conv("classes_of", "background", "classes"),
        conv("thirds", "zero", "depth"),
        pool,
        node("Reshape", &["means", "flat"], &["scores"]),
        node("Concat", &["boxes", "scores"], &["rows"]).message(5, number_attribute("axis", 1)),
    ];
    let middle = |at: usize| (at * PART + PART / 2) as f32;
    let cells = || (0..parts * parts).map(|cell| (cell % parts, cell / parts));
    let boxes: Vec<f32> = cells()
        .map(|(column, _)| middle(column))
        .chain(cells().map(|(_, row)| middle(row)))
        .chain(vec![PART as f32; 2 * parts * parts])
        .collect();
    let count = (parts * parts) as u64;
    let initializers = vec![
        f32s("colors", &[2, 3, 1, 1], &colors),
        f32s("zeros", &[2], &[0.0; 2]),
        f32s("classes_of", &[3, 3, 1, 1], &[&[0.0; 3][..], &colors].concat()),
        f32s("background", &[3], &[0.3, 0.0, 0.0]),
        f32s("thirds", &[1, 3, 1, 1], &[1.0 / 3.0; 3]),
        f32s("zero", &[1], &[0.0]),
        i64s("flat", &[1, 2, (parts * parts) as i64]),
        f32s("boxes", &[1, 4, count], &boxes),
    ];
    let map = |name: &str, channels: u64| port(name, F32, &[1, channels, side, side].map(|size| size as i64));
    let rows = port("rows", F32, &[1, 6, count as i64]);
    model(
        nodes,
        initializers,
        vec![map("image", 3)],
        vec![rows, map("classes", 3), map("maps", 2), map("depth", 1)],
    )
}

/// A black image, red and green in one part each, which are named by column and row.
pub fn image(red: [u32; 2], green: [u32; 2]) -> Bytes {
    let part = IMAGE / PARTS;
    let color = |x: u32, y: u32| {
        let within = |[column, row]: [u32; 2]| (x / part, y / part) == (column, row);
        match (within(red), within(green)) {
            (true, _) => Rgb([255, 0, 0]),
            (_, true) => Rgb([0, 255, 0]),
            _ => Rgb([0, 0, 0]),
        }
    };
    let image = RgbImage::from_fn(IMAGE, IMAGE, color);
    let mut png = std::io::Cursor::new(Vec::new());
    DynamicImage::from(image).write_to(&mut png, ImageFormat::Png).unwrap();
    png.into_inner().into()
}
