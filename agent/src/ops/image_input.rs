//! From image files to the tensor a classifier takes, as the model itself describes it.
//!
//! The description is JSON, in the model's metadata property `vaccel.image_classification` or in a file
//! `image_classification.json` of its resource; the file wins. See [`ImageInput`] for its keys.

use std::io::Cursor;

use bytes::Bytes;
use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use serde::Deserialize;
use vaccel_proto::limits::{CALL_PIXELS_MAX, IMAGE_PIXELS_MAX};
use vaccel_proto::v1::{DType, Tensor};
use vaccel_proto::{Error, Reason};

use crate::backend::ModelFile;
use crate::scheduler::Cancel;

/// Metadata property with the description.
pub(super) const PROPERTY: &str = "vaccel.image_classification";
/// File of the resource with the description.
pub(super) const FILE: &str = "image_classification.json";

/// Memory one decoder may take, in bytes: the largest image at 16 bits for each of four channels.
const DECODER_BYTES_MAX: u64 = IMAGE_PIXELS_MAX * 8;

/// Widest and highest input of a model, in pixels. The largest classifiers in use take 1,024.
const INPUT_SIDE_MAX: u32 = 4096;

/// How images become the model's input.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImageInput {
    /// Size of the input in pixels.
    width: u32,
    height: u32,
    #[serde(default)]
    color: Color,
    #[serde(default)]
    layout: Layout,
    #[serde(default)]
    fit: Fit,
    /// With `fit: crop`, what the shorter side is scaled to before the middle is cut out; the larger of width and
    /// height when absent.
    shorter_side: Option<u32>,
    #[serde(default)]
    filter: Filter,
    /// The input is `(sample * scale - mean) / std` with samples from 0 to 255; mean and std for each channel, or one
    /// for all.
    #[serde(default = "scale_to_one")]
    scale: f32,
    #[serde(default)]
    mean: Vec<f32>,
    #[serde(default)]
    std: Vec<f32>,
    #[serde(default)]
    pub(super) scores: Scores,
    /// Names of the classes, in the order of the output.
    pub(super) labels: Vec<String>,
}

fn scale_to_one() -> f32 {
    1.0 / 255.0
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Color {
    #[default]
    Rgb,
    Bgr,
    Gray,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
enum Layout {
    /// Channels outermost: `[n, channels, height, width]`.
    #[default]
    #[serde(rename = "NCHW")]
    ChannelsFirst,
    /// Channels innermost: `[n, height, width, channels]`.
    #[serde(rename = "NHWC")]
    ChannelsLast,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Fit {
    /// The whole image, its sides scaled each by itself.
    #[default]
    Stretch,
    /// Scaled alike, the middle cut out.
    Crop,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Filter {
    Nearest,
    /// Average over the area of each target pixel.
    Box,
    /// Linear, over the area when scaling down, as training libraries do with antialiasing.
    #[default]
    Triangle,
    Lanczos3,
}

/// What the model's output is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Scores {
    /// Softmax makes probabilities of it.
    #[default]
    Logits,
    Probabilities,
}

impl ImageInput {
    /// Reads a model's description and checks it against the model's input.
    pub(super) fn of(model: &ModelFile) -> Result<Self, Error> {
        let refuse = |why: String| Error::new(Reason::ModelRejected, why);
        let text = model.description(FILE, PROPERTY).ok_or_else(|| {
            refuse(format!(
                "this model does not say how images become its input; \
                 add the metadata property {PROPERTY} or a file {FILE} to its resource"
            ))
        })?;
        let input: Self = serde_json::from_str(&text)
            .map_err(|error| refuse(format!("the image description of this model is wrong: {error}")))?;
        input
            .check()
            .map_err(|why| refuse(format!("the image description of this model is wrong: {why}")))?;
        let [port] = model.inputs.as_slice() else {
            return Err(refuse(format!(
                "expected a model with 1 input, this one has {}",
                model.inputs.len()
            )));
        };
        if port.dtype != DType::F32 {
            return Err(refuse(format!(
                "expected an input of type f32, this model takes {}",
                port.dtype.name()
            )));
        }
        let expected = input.item_shape().map(Some);
        if let Some(shape) = &port.shape {
            let fits =
                shape.len() == 4 && shape[1..].iter().zip(&expected).all(|(a, b)| a.is_none() || a == b);
            if !fits {
                return Err(refuse(format!("images become {expected:?}, and this model takes {shape:?}")));
            }
        }
        Ok(input)
    }

    fn check(&self) -> Result<(), String> {
        for (name, side) in
            [("width", self.width), ("height", self.height), ("shorter_side", self.shorter_side.unwrap_or(1))]
        {
            if side == 0 || side > INPUT_SIDE_MAX {
                return Err(format!("{name}: expected 1 to {INPUT_SIDE_MAX}, got {side}"));
            }
        }
        if self.shorter_side.is_some_and(|side| side < self.width.max(self.height)) {
            return Err("shorter_side: expected at least width and height".into());
        }
        for (name, values) in [("mean", &self.mean), ("std", &self.std)] {
            if ![0, 1, self.channels()].contains(&values.len()) {
                return Err(format!(
                    "{name}: expected 1 or {} values, got {}",
                    self.channels(),
                    values.len()
                ));
            }
        }
        if self.std.contains(&0.0)
            || !self.mean.iter().chain(&self.std).chain([&self.scale]).all(|v| v.is_finite())
        {
            return Err("scale, mean and std: expected finite numbers, std not 0".into());
        }
        if self.labels.is_empty() { Err("labels: expected at least one".into()) } else { Ok(()) }
    }

    fn channels(&self) -> usize {
        if self.color == Color::Gray { 1 } else { 3 }
    }

    /// Shape of one image's part of the input.
    fn item_shape(&self) -> [i64; 3] {
        let channels = if self.color == Color::Gray { 1 } else { 3 };
        let (height, width) = (i64::from(self.height), i64::from(self.width));
        match self.layout {
            Layout::ChannelsFirst => [channels, height, width],
            Layout::ChannelsLast => [height, width, channels],
        }
    }

    /// Decodes files into one tensor `[files, …]`.
    ///
    /// # Errors
    /// `BAD_ARGUMENT` naming the image that cannot be decoded or is too large.
    pub(super) fn tensor(&self, files: &[Bytes], first: usize, cancel: &Cancel) -> Result<Tensor, Error> {
        let item = self.item_shape();
        let item_elements = self.channels() * self.width as usize * self.height as usize;
        let mut elements = Vec::with_capacity(item_elements * files.len());
        for (index, file) in files.iter().enumerate() {
            if cancel.is_set() {
                return Err(Error::new(Reason::Cancelled, "nobody waits for the result"));
            }
            let image = decode(&format!("images[{}]", first + index), file)?;
            self.write(&self.resize(image), &mut elements);
        }
        let count = i64::try_from(files.len()).unwrap_or(i64::MAX);
        Tensor::new(&[count, item[0], item[1], item[2]], &elements)
    }

    fn resize(&self, image: DynamicImage) -> DynamicImage {
        // Fewer channels first: scaling is what costs.
        let image = match self.color {
            Color::Gray => DynamicImage::ImageLuma8(image.into_luma8()),
            Color::Rgb | Color::Bgr => DynamicImage::ImageRgb8(image.into_rgb8()),
        };
        match self.fit {
            Fit::Stretch => self.scale_to(&image, self.width, self.height),
            Fit::Crop => {
                let shorter = self.shorter_side.unwrap_or(self.width.max(self.height));
                let (width, height) = (u64::from(image.width()), u64::from(image.height()));
                let side = |length: u64| {
                    let scaled = (length * u64::from(shorter)).div_ceil(width.min(height).max(1));
                    // A strip one pixel wide would be scaled without bound.
                    u32::try_from(scaled.min(u64::from(INPUT_SIDE_MAX) * 4)).unwrap_or(INPUT_SIDE_MAX)
                };
                let scaled = self.scale_to(&image, side(width), side(height));
                let (x, y) = ((scaled.width() - self.width) / 2, (scaled.height() - self.height) / 2);
                scaled.crop_imm(x, y, self.width, self.height)
            }
        }
    }

    fn scale_to(&self, image: &DynamicImage, width: u32, height: u32) -> DynamicImage {
        if (image.width(), image.height()) == (width, height) {
            return image.clone();
        }
        match self.filter {
            Filter::Nearest => image.resize_exact(width, height, FilterType::Nearest),
            Filter::Box => match image {
                DynamicImage::ImageLuma8(gray) => imageops::thumbnail(gray, width, height).into(),
                other => imageops::thumbnail(&other.to_rgb8(), width, height).into(),
            },
            Filter::Triangle => image.resize_exact(width, height, FilterType::Triangle),
            Filter::Lanczos3 => image.resize_exact(width, height, FilterType::Lanczos3),
        }
    }

    fn write(&self, image: &DynamicImage, out: &mut Vec<f32>) {
        let samples = image.as_bytes();
        let channels = self.channels();
        let of_channel = |values: &[f32], channel: usize, default| match values {
            [] => default,
            [one] => *one,
            many => many[channel],
        };
        let value = |channel: usize, pixel: &[u8]| {
            let source = if self.color == Color::Bgr { channels - 1 - channel } else { channel };
            let (mean, std) = (of_channel(&self.mean, channel, 0.0), of_channel(&self.std, channel, 1.0));
            (f32::from(pixel[source]) * self.scale - mean) / std
        };
        match self.layout {
            Layout::ChannelsFirst => {
                for channel in 0..channels {
                    out.extend(samples.chunks_exact(channels).map(|pixel| value(channel, pixel)));
                }
            }
            Layout::ChannelsLast => {
                for pixel in samples.chunks_exact(channels) {
                    out.extend((0..channels).map(|channel| value(channel, pixel)));
                }
            }
        }
    }
}

/// Checks the sizes that the headers of all files claim, before any is decoded.
pub(super) fn check_pixels(files: &[Bytes]) -> Result<(), Error> {
    let mut total = 0_u64;
    for (index, file) in files.iter().enumerate() {
        let path = format!("images[{index}]");
        let (width, height) = decoder(&path, file)?.dimensions();
        let pixels = u64::from(width) * u64::from(height);
        if pixels > IMAGE_PIXELS_MAX {
            return Err(Error::field(
                path,
                format!("at most {IMAGE_PIXELS_MAX} pixels"),
                format!("{width} x {height}"),
            ));
        }
        total += pixels;
    }
    if total > CALL_PIXELS_MAX {
        return Err(Error::field("images", format!("at most {CALL_PIXELS_MAX} pixels in all"), total));
    }
    Ok(())
}

fn decoder<'a>(path: &str, file: &'a Bytes) -> Result<impl ImageDecoder + 'a, Error> {
    let reader = ImageReader::new(Cursor::new(file.as_ref())).with_guessed_format();
    let mut reader = reader.map_err(|error| undecodable(path, file, &error))?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(DECODER_BYTES_MAX);
    reader.limits(limits);
    reader.into_decoder().map_err(|error| undecodable(path, file, &error))
}

fn decode(path: &str, file: &Bytes) -> Result<DynamicImage, Error> {
    let mut decoder = decoder(path, file)?;
    let orientation = decoder.orientation().map_err(|error| undecodable(path, file, &error))?;
    if !is_whole(file) {
        return Err(undecodable(path, file, &"the end is missing"));
    }
    let mut image = DynamicImage::from_decoder(decoder).map_err(|error| undecodable(path, file, &error))?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Whether a JPEG file has its end: the decoder makes up what is missing of one, unlike of a PNG.
///
/// *Source:* ITU-T T.81, B.1.1: segments begin with a marker and their length, up to the first scan; inside scans the
/// byte 0xFF is followed by others than those of the end marker.
fn is_whole(file: &[u8]) -> bool {
    const SCAN: u8 = 0xda;
    const END: [u8; 2] = [0xff, 0xd9];
    let Some(mut rest) = file.strip_prefix(&[0xff, 0xd8]) else { return true };
    while let [0xff, marker, high, low, ..] = *rest {
        if marker == SCAN {
            return rest.windows(END.len()).any(|bytes| bytes == END);
        }
        // A marker may be preceded by any number of fill bytes.
        let length = if marker == 0xff { 1 } else { 2 + usize::from(u16::from_be_bytes([high, low])) };
        rest = rest.get(length..).unwrap_or_default();
    }
    // Not as the standard has it, and decoded all the same.
    true
}

fn undecodable(path: &str, file: &Bytes, error: &dyn std::fmt::Display) -> Error {
    Error::field(
        path,
        "a whole PNG or JPEG file",
        format!("{} bytes that cannot be decoded: {error}", file.len()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, ImageFormat, Luma, Rgb, RgbImage};

    fn input(json: &str) -> ImageInput {
        let input: ImageInput = serde_json::from_str(json).expect("valid");
        input.check().expect("valid");
        input
    }

    fn png(image: &DynamicImage) -> Bytes {
        let mut out = Cursor::new(Vec::new());
        image.write_to(&mut out, ImageFormat::Png).expect("encodes");
        out.into_inner().into()
    }

    /// Shape and elements, the latter rounded to thousandths.
    fn elements(input: &ImageInput, file: Bytes) -> (Vec<i64>, Vec<f32>) {
        let tensor = input.tensor(&[file], 0, &Cancel::default()).expect("decodes");
        let elements = tensor.elements::<f32>().expect("f32");
        let rounded = elements.iter().map(|element| (element * 1000.0).round() / 1000.0).collect();
        (tensor.shape, rounded)
    }

    #[test]
    fn layouts_colors_and_normalisation() {
        let mut image = RgbImage::new(2, 1);
        image.put_pixel(0, 0, Rgb([255, 0, 51]));
        image.put_pixel(1, 0, Rgb([0, 102, 255]));
        let file = png(&image.into());
        let first = input(r#"{"width":2,"height":1,"labels":["a"]}"#);
        assert_eq!(elements(&first, file.clone()), (vec![1, 3, 1, 2], vec![1.0, 0.0, 0.0, 0.4, 0.2, 1.0]));
        let last = input(r#"{"width":2,"height":1,"layout":"NHWC","color":"bgr","labels":["a"]}"#);
        assert_eq!(elements(&last, file.clone()), (vec![1, 1, 2, 3], vec![0.2, 0.0, 1.0, 1.0, 0.4, 0.0]));
        let scaled = r#"{"width":2,"height":1,"scale":1,"mean":[255,0,0],"std":[1,102,51],"labels":["a"]}"#;
        assert_eq!(elements(&input(scaled), file).1, [0.0, -255.0, 0.0, 1.0, 1.0, 5.0]);
    }

    #[test]
    fn box_filter_averages_areas_and_crop_takes_the_middle() {
        let gray = |width, height, sample: fn(u32, u32) -> u8| {
            png(&GrayImage::from_fn(width, height, |x, y| Luma([sample(x, y)])).into())
        };
        let average =
            input(r#"{"width":2,"height":2,"color":"gray","filter":"box","scale":1,"labels":["a"]}"#);
        let blocks = gray(8, 8, |x, y| if (x < 4) == (y < 4) { 200 } else { 100 });
        assert_eq!(elements(&average, blocks).1, [200.0, 100.0, 100.0, 200.0]);
        let crop = input(
            r#"{"width":2,"height":2,"color":"gray","fit":"crop","filter":"nearest","scale":1,"labels":["a"]}"#,
        );
        let wide = gray(6, 2, |x, _| u8::try_from(x).expect("small"));
        assert_eq!(elements(&crop, wide).1, [2.0, 3.0, 2.0, 3.0]);
        let strip = gray(1, 5000, |_, _| 9);
        assert_eq!(elements(&crop, strip).1, [9.0; 4]);
    }

    #[test]
    fn descriptions_that_cannot_be_are_refused() {
        for json in [
            r#"{"width":0,"height":1,"labels":["a"]}"#,
            r#"{"width":1,"height":99999,"labels":["a"]}"#,
            r#"{"width":1,"height":1,"labels":[]}"#,
            r#"{"width":1,"height":1,"std":[0],"labels":["a"]}"#,
            r#"{"width":1,"height":1,"mean":[1,2],"labels":["a"]}"#,
            r#"{"width":8,"height":8,"fit":"crop","shorter_side":4,"labels":["a"]}"#,
        ] {
            let input: ImageInput = serde_json::from_str(json).expect("parses");
            assert!(input.check().is_err(), "{json}");
        }
        assert!(
            serde_json::from_str::<ImageInput>(r#"{"width":1,"height":1,"labels":["a"],"sort":1}"#).is_err()
        );
    }

    #[test]
    fn broken_and_huge_files_are_refused_before_they_cost() {
        let whole = png(&GrayImage::new(40, 40).into());
        let mut huge = whole.to_vec();
        // Width and height of the header, then its checksum over type and data.
        huge[16..24].copy_from_slice(&[0, 0, 0xc3, 0x50, 0, 0, 0xc3, 0x50]);
        let checksum = crc32(&huge[12..29]);
        huge[29..33].copy_from_slice(&checksum.to_be_bytes());
        let refusal = check_pixels(&[whole.clone(), huge.into()]).expect_err("2.5 Gpx");
        assert!(
            refusal.message().starts_with("images[1]") && refusal.message().contains("50000 x 50000"),
            "{refusal}"
        );
        let mut jpeg = Cursor::new(Vec::new());
        GrayImage::new(40, 40).write_to(&mut jpeg, ImageFormat::Jpeg).expect("encodes");
        let jpeg = Bytes::from(jpeg.into_inner());
        decode("images[0]", &jpeg).expect("whole");
        let cut =
            [whole.slice(..whole.len() - 20), jpeg.slice(..jpeg.len() - 2), jpeg.slice(..jpeg.len() / 2)];
        for broken in cut.into_iter().chain([Bytes::new(), Bytes::from_static(b"GIF89a")]) {
            let refusal = decode("images[0]", &broken).expect_err("broken");
            assert_eq!(refusal.reason(), Reason::BadArgument);
        }
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0_u32, |crc, byte| {
            (0..8)
                .fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
        })
    }
}
