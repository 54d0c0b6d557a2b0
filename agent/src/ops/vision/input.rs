//! From image files to the tensor a model takes, as the model itself describes it, and from places in that input back
//! to places in the image.

use bytes::Bytes;
use image::imageops::{self, FilterType};
use image::{DynamicImage, GrayImage, Luma, Rgb, RgbImage};
use serde::Deserialize;
use vaccel_proto::v1::{Area, DType, Tensor};
use vaccel_proto::{Error, Reason};

use super::super::pixels::{Function, Image};
use super::file::decode;
use crate::backend::ModelFile;
use crate::scheduler::Cancel;

/// Widest and highest input of a model, in pixels. The largest classifiers in use take 1,024.
const INPUT_SIDE_MAX: u32 = 4096;

/// How images become the model's input.
#[derive(Clone, Debug, Deserialize)]
pub(in crate::ops) struct ImageInput {
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
    /// for all. Without a scale, numbers of 0 to 1 are made of samples, and whole numbers of what they are.
    scale: Option<f32>,
    #[serde(default)]
    mean: Vec<f32>,
    #[serde(default)]
    std: Vec<f32>,
    /// With `fit: pad`, where the image is in the input.
    #[serde(default)]
    place: Place,
    /// With `fit: pad`, the samples of what is around it.
    #[serde(default = "gray")]
    fill: u8,
}

/// What detectors are usually trained with.
fn gray() -> u8 {
    114
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
    /// Scaled alike, all of it, with bars beside it.
    Pad,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Place {
    #[default]
    Center,
    /// The upper left one.
    Corner,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Filter {
    Nearest,
    /// Between the four nearest pixels, also when scaling down, as OpenCV does by default.
    Linear,
    /// Average over the area of each target pixel.
    Box,
    /// Linear, over the area when scaling down, as training libraries do with antialiasing.
    #[default]
    Triangle,
    Lanczos3,
}

/// Where in an input the image is, in pixels along each axis: all of it, `image` long, takes `size` from `offset` on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::ops) struct Placed {
    pub(super) image: [f32; 2],
    pub(in crate::ops) input: [f32; 2],
    size: [f32; 2],
    offset: [f32; 2],
}

impl Placed {
    /// The place in the image of a place in the input; of one beside it, the next one.
    pub(in crate::ops) fn x(&self, input: f32) -> f32 {
        self.back(0, input)
    }

    /// The same along the other axis.
    pub(in crate::ops) fn y(&self, input: f32) -> f32 {
        self.back(1, input)
    }

    fn back(&self, axis: usize, input: f32) -> f32 {
        ((input - self.offset[axis]) * self.image[axis] / self.size[axis]).clamp(0.0, self.image[axis])
    }

    /// The same of a part.
    pub(super) fn area(&self, input: Area) -> Area {
        Area {
            left: self.x(input.left),
            top: self.y(input.top),
            right: self.x(input.right),
            bottom: self.y(input.bottom),
        }
    }

    /// What of the input the image takes, along an axis.
    pub(super) fn span(&self, axis: usize) -> [f32; 2] {
        let end = self.offset[axis] + self.size[axis];
        [self.offset[axis].max(0.0), end.min(self.input[axis])]
    }
}

impl ImageInput {
    /// Checks the description against the model's input.
    pub(super) fn fits(&self, model: &ModelFile) -> Result<(), Error> {
        let refuse = |why: String| Error::new(Reason::ModelRejected, why);
        let [port] = model.inputs.as_slice() else {
            return Err(refuse(format!(
                "expected a model with 1 input, this one has {}",
                model.inputs.len()
            )));
        };
        if !matches!(port.dtype, DType::F32 | DType::U8 | DType::I8 | DType::I32) {
            return Err(refuse(format!(
                "expected an input of type f32, u8, i8 or i32, this model takes {}",
                port.dtype.name()
            )));
        }
        let expected = self.item_shape().map(Some);
        if let Some(shape) = &port.shape {
            let fits =
                shape.len() == 4 && shape[1..].iter().zip(&expected).all(|(a, b)| a.is_none() || a == b);
            if !fits {
                return Err(refuse(format!("images become {expected:?}, and this model takes {shape:?}")));
            }
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<(), String> {
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
            || !self.mean.iter().chain(&self.std).chain(&self.scale).all(|v| v.is_finite())
        {
            return Err("scale, mean and std: expected finite numbers, std not 0".into());
        }
        Ok(())
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
    pub(in crate::ops) fn tensor(
        &self,
        files: &[Bytes],
        first: usize,
        dtype: DType,
        cancel: &Cancel,
    ) -> Result<Tensor, Error> {
        let mut elements = Vec::with_capacity(self.item_elements() * files.len());
        for (index, file) in files.iter().enumerate() {
            cancel.check()?;
            let image = decode(&format!("images[{}]", first + index), file)?;
            self.write(&self.resize(image).0, dtype, &mut elements);
        }
        self.of_items(files.len(), dtype, &elements)
    }

    /// The tensor of one image, of the type that the model takes, and where in it the image is.
    pub(in crate::ops) fn place(&self, image: DynamicImage, dtype: DType) -> Result<(Tensor, Placed), Error> {
        let (resized, placed) = self.resize(image);
        let mut elements = Vec::with_capacity(self.item_elements());
        self.write(&resized, dtype, &mut elements);
        Ok((self.of_items(1, dtype, &elements)?, placed))
    }

    fn item_elements(&self) -> usize {
        self.channels() * self.width as usize * self.height as usize
    }

    fn of_items(&self, count: usize, dtype: DType, elements: &[f32]) -> Result<Tensor, Error> {
        let item = self.item_shape();
        let shape = [i64::try_from(count).unwrap_or(i64::MAX), item[0], item[1], item[2]];
        let whole = elements.iter().map(|element| element.round());
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
        match dtype {
            DType::U8 => Tensor::new(&shape, &whole.map(|number| number as u8).collect::<Vec<_>>()),
            DType::I8 => Tensor::new(&shape, &whole.map(|number| number as i8).collect::<Vec<_>>()),
            DType::I32 => Tensor::new(&shape, &whole.map(|number| number as i32).collect::<Vec<_>>()),
            _ => Tensor::new(&shape, elements),
        }
    }

    fn resize(&self, image: DynamicImage) -> (DynamicImage, Placed) {
        // Fewer channels first: scaling is what costs.
        let image = match self.color {
            Color::Gray => DynamicImage::ImageLuma8(image.into_luma8()),
            Color::Rgb | Color::Bgr => DynamicImage::ImageRgb8(image.into_rgb8()),
        };
        let (old, new) = ([image.width(), image.height()], [self.width, self.height]);
        match self.fit {
            Fit::Stretch => (self.scale_to(&image, new), placed(old, new, new, [0, 0])),
            Fit::Crop => {
                let shorter = self.shorter_side.unwrap_or(self.width.max(self.height));
                let size = old.map(|length| scaled(length, shorter, old[0].min(old[1])));
                let cut = [(size[0] - new[0]) / 2, (size[1] - new[1]) / 2];
                let resized = self.scale_to(&image, size).crop_imm(cut[0], cut[1], new[0], new[1]);
                (resized, placed(old, size, new, cut.map(|cut| -i64::from(cut))))
            }
            Fit::Pad => {
                // The side that reaches the edge first decides.
                let is_wide = u64::from(old[0]) * u64::from(new[1]) >= u64::from(old[1]) * u64::from(new[0]);
                let axis = usize::from(!is_wide);
                let size = [0, 1].map(|at| scaled(old[at], new[axis], old[axis]).min(new[at]));
                let offset = match self.place {
                    Place::Center => [(new[0] - size[0]) / 2, (new[1] - size[1]) / 2].map(i64::from),
                    Place::Corner => [0, 0],
                };
                let resized = self.scale_to(&image, size);
                (self.padded(resized, offset), placed(old, size, new, offset))
            }
        }
    }

    /// The image with bars beside it.
    fn padded(&self, image: DynamicImage, [x, y]: [i64; 2]) -> DynamicImage {
        match image {
            DynamicImage::ImageLuma8(image) => {
                let mut padded = GrayImage::from_pixel(self.width, self.height, Luma([self.fill]));
                imageops::replace(&mut padded, &image, x, y);
                padded.into()
            }
            image => {
                let mut padded = RgbImage::from_pixel(self.width, self.height, Rgb([self.fill; 3]));
                imageops::replace(&mut padded, &image.into_rgb8(), x, y);
                padded.into()
            }
        }
    }

    fn scale_to(&self, image: &DynamicImage, [width, height]: [u32; 2]) -> DynamicImage {
        if (image.width(), image.height()) == (width, height) {
            return image.clone();
        }
        match self.filter {
            Filter::Nearest => image.resize_exact(width, height, FilterType::Nearest),
            Filter::Box => match image {
                DynamicImage::ImageLuma8(gray) => imageops::thumbnail(gray, width, height).into(),
                other => imageops::thumbnail(&other.to_rgb8(), width, height).into(),
            },
            Filter::Linear => between(image, width, height),
            Filter::Triangle => image.resize_exact(width, height, FilterType::Triangle),
            Filter::Lanczos3 => image.resize_exact(width, height, FilterType::Lanczos3),
        }
    }

    fn write(&self, image: &DynamicImage, dtype: DType, out: &mut Vec<f32>) {
        let scale = self.scale.unwrap_or(if dtype == DType::F32 { 1.0 / 255.0 } else { 1.0 });
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
            (f32::from(pixel[source]) * scale - mean) / std
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

/// OpenCV's bilinear scaling.
fn between(image: &DynamicImage, width: u32, height: u32) -> DynamicImage {
    let channels = usize::from(image.color().channel_count());
    let size = [image.height(), image.width(), height, width].map(|side| side as usize);
    let [rows, columns, new_rows, new_columns] = size;
    let from = Image { rows, columns, channels, data: image.as_bytes() };
    let function = Function::Resize { rows: new_rows, columns: new_columns, linear: true };
    let samples = function.apply(&from, &Cancel::default()).unwrap_or_default();
    let scaled = match image {
        DynamicImage::ImageLuma8(_) => GrayImage::from_raw(width, height, samples).map(DynamicImage::from),
        _ => RgbImage::from_raw(width, height, samples).map(DynamicImage::from),
    };
    // As many samples as it takes come of an image of bytes, which all are here.
    scaled.unwrap_or_default()
}

/// A length that grows as another one of the same image does, at least a pixel.
fn scaled(length: u32, new: u32, old: u32) -> u32 {
    let scaled = (u64::from(length) * u64::from(new)).div_ceil(u64::from(old.max(1)));
    // A strip one pixel wide would be scaled without bound.
    u32::try_from(scaled.clamp(1, u64::from(INPUT_SIDE_MAX) * 4)).unwrap_or(INPUT_SIDE_MAX)
}

#[allow(clippy::cast_precision_loss, reason = "sides of images, and of inputs, are far below 2^24")]
fn placed(old: [u32; 2], size: [u32; 2], input: [u32; 2], offset: [i64; 2]) -> Placed {
    Placed {
        image: old.map(|side| side as f32),
        input: input.map(|side| side as f32),
        size: size.map(|side| side as f32),
        offset: offset.map(|offset| offset as f32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::ImageFormat;
    use std::io::Cursor;

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
        let tensor = input.tensor(&[file], 0, DType::F32, &Cancel::default()).expect("decodes");
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
        let first = input(r#"{"width":2,"height":1}"#);
        assert_eq!(elements(&first, file.clone()), (vec![1, 3, 1, 2], vec![1.0, 0.0, 0.0, 0.4, 0.2, 1.0]));
        let last = input(r#"{"width":2,"height":1,"layout":"NHWC","color":"bgr"}"#);
        assert_eq!(elements(&last, file.clone()), (vec![1, 1, 2, 3], vec![0.2, 0.0, 1.0, 1.0, 0.4, 0.0]));
        let whole =
            |dtype, json: &str| input(json).tensor(std::slice::from_ref(&file), 0, dtype, &Cancel::default());
        let bytes = whole(DType::U8, r#"{"width":2,"height":1}"#).expect("decodes");
        assert_eq!(bytes.elements::<u8>().expect("u8").as_ref(), [255, 0, 0, 102, 51, 255]);
        let signed = whole(DType::I8, r#"{"width":2,"height":1,"mean":[128]}"#).expect("decodes");
        assert_eq!(signed.elements::<i8>().expect("i8").as_ref(), [127, -128, -128, -26, -77, 127]);
        let wide = whole(DType::I32, r#"{"width":2,"height":1,"scale":2}"#).expect("decodes");
        assert_eq!(wide.elements::<i32>().expect("i32").as_ref(), [510, 0, 0, 204, 102, 510]);
        let scaled = r#"{"width":2,"height":1,"scale":1,"mean":[255,0,0],"std":[1,102,51]}"#;
        assert_eq!(elements(&input(scaled), file).1, [0.0, -255.0, 0.0, 1.0, 1.0, 5.0]);
    }

    #[test]
    fn box_filter_averages_areas_and_crop_takes_the_middle() {
        let gray = |width, height, sample: fn(u32, u32) -> u8| {
            png(&GrayImage::from_fn(width, height, |x, y| Luma([sample(x, y)])).into())
        };
        let average = input(r#"{"width":2,"height":2,"color":"gray","filter":"box","scale":1}"#);
        let blocks = gray(8, 8, |x, y| if (x < 4) == (y < 4) { 200 } else { 100 });
        assert_eq!(elements(&average, blocks).1, [200.0, 100.0, 100.0, 200.0]);
        let crop =
            input(r#"{"width":2,"height":2,"color":"gray","fit":"crop","filter":"nearest","scale":1}"#);
        // Between the second and the third of four, where the middle of the new pixel is.
        let linear = input(r#"{"width":1,"height":1,"color":"gray","filter":"linear","scale":1}"#);
        let four = gray(4, 4, |x, _| [0, 100, 200, 0][x as usize]);
        assert_eq!(elements(&linear, four).1, [150.0]);
        let wide = gray(6, 2, |x, _| u8::try_from(x).expect("small"));
        assert_eq!(elements(&crop, wide).1, [2.0, 3.0, 2.0, 3.0]);
        let strip = gray(1, 5000, |_, _| 9);
        assert_eq!(elements(&crop, strip).1, [9.0; 4]);
    }

    #[test]
    fn bars_are_beside_the_whole_image_and_places_lead_back() {
        let wide = DynamicImage::from(GrayImage::from_pixel(40, 20, Luma([200])));
        for (place, bars) in [("center", [1, 1]), ("corner", [0, 2])] {
            let json = format!(
                r#"{{"width":4,"height":4,"color":"gray","fit":"pad","place":"{place}","fill":9,"scale":1}}"#
            );
            let (tensor, placed) = input(&json).place(wide.clone(), DType::F32).expect("fits");
            let rows: Vec<f32> =
                tensor.elements::<f32>().expect("f32").chunks_exact(4).map(|row| row[0]).collect();
            let expected = [vec![9.0; bars[0]], vec![200.0; 2], vec![9.0; bars[1]]].concat();
            assert_eq!(rows, expected, "{place}");
            #[allow(clippy::cast_precision_loss, reason = "small")]
            let first = bars[0] as f32;
            assert_eq!([placed.x(1.0), placed.y(first + 1.0)], [10.0, 10.0], "{place}");
            assert_eq!([placed.y(0.0), placed.y(4.0), placed.x(9.0)], [0.0, 20.0, 40.0], "{place}");
            assert_eq!(placed.span(1), [first, first + 2.0], "{place}");
        }
    }

    #[test]
    fn places_lead_back_from_what_was_stretched_or_cut() {
        let wide = || DynamicImage::from(RgbImage::new(60, 20));
        let stretched = input(r#"{"width":4,"height":4}"#).place(wide(), DType::F32).expect("fits").1;
        assert_eq!([stretched.x(1.0), stretched.y(3.0)], [15.0, 15.0]);
        let cut = input(r#"{"width":2,"height":2,"fit":"crop","shorter_side":4}"#)
            .place(wide(), DType::F32)
            .expect("fits")
            .1;
        // 60 x 20 became 12 x 4, and of that the middle was cut out: from (5, 1) to (7, 3).
        assert_eq!([cut.x(0.0), cut.x(2.0), cut.y(0.0), cut.y(2.0)], [25.0, 35.0, 5.0, 15.0]);
    }

    #[test]
    fn descriptions_that_cannot_be_are_refused() {
        for json in [
            r#"{"width":0,"height":1}"#,
            r#"{"width":1,"height":99999}"#,
            r#"{"width":1,"height":1,"std":[0]}"#,
            r#"{"width":1,"height":1,"mean":[1,2]}"#,
            r#"{"width":8,"height":8,"fit":"crop","shorter_side":4}"#,
        ] {
            let input: ImageInput = serde_json::from_str(json).expect("parses");
            assert!(input.check().is_err(), "{json}");
        }
    }
}
