//! Functions of OpenCV on images of bytes.
//!
//! *Shapes:* `image` is `u8[height, width, channels]` with 1 to 4 channels, or `u8[height, width]`, of 1 to 32,768
//! rows and columns; one image comes back. Every function needs all its parameters; constants are OpenCV's numbers:
//!
//! | function | parameters | what comes back |
//! |---|---|---|
//! | `resize` | `width`, `height`: 1 to 32,768; `interpolation`: 0 nearest, 1 linear | u8, the new size |
//! | `cvtColor` | `code`: 4 BGR to RGB and back, 6 BGR or 7 RGB to gray, 8 back | u8, gray without channels |
//! | `threshold` | `thresh`, `maxval`; `type`: 0 binary, 1 inverse, 2 truncate, 3 to zero, 4 inverse | u8, same shape |
//! | `GaussianBlur` | `ksize`: odd, 1 to 31; `sigma`: more than 0, to 1,000 | u8, same shape |
//! | `blur` | `ksize`: odd, 1 to 31 | u8, same shape |
//! | `Sobel` | `dx`, `dy`: 1 and 0, or 0 and 1; the kernel is 3 by 3 | i16, same shape |
//! | `flip` | `code`: 0 upside down, 1 left to right, -1 both | u8, same shape |
//! | `rotate` | `code`: 0 by 90° clockwise, 1 by 180°, 2 by 90° counter-clockwise | u8, turned |
//!
//! How each number is computed is said in [`super::pixels`]. *Errors:* `BAD_ARGUMENT` with the field, for an unknown
//! function with the list of those there are; `MESSAGE_TOO_LARGE`, `DEADLINE`. *Source:* OpenCV 4's imgproc, with
//! exact arithmetic where OpenCV has fixed-point weights: `resize` differs from it by 1, `GaussianBlur` by 2 at most,
//! the others not at all. vAccel passes the arguments of its `opencv` through to whatever a plugin defines; this list
//! is this agent's.

use std::collections::HashMap;

use vaccel_proto::Error;
use vaccel_proto::compute::{Given, arrange};
use vaccel_proto::error::shown;
use vaccel_proto::v1::{DType, NamedTensor, OpencvReply, OpencvRequest, Tensor};

use super::pixels::{Conversion, Cut, Function, Image, Turn};
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

/// Rows and columns of an image: what OpenCV's own coordinates in 16 bits hold.
const SIDE_MAX: usize = 1 << 15;

/// Channels of an image: color with transparency.
const CHANNELS_MAX: usize = 4;

/// Widest kernel. A wider blur is made of a smaller image.
const KERNEL_MAX: f64 = 31.0;

/// Widest Gaussian: beyond it all weights of the widest kernel are the same to three digits.
const SIGMA_MAX: f64 = 1000.0;

/// The functions and the names of their parameters.
const FUNCTIONS: [(&str, &[&str]); 8] = [
    ("resize", &["width", "height", "interpolation"]),
    ("cvtColor", &["code"]),
    ("threshold", &["thresh", "maxval", "type"]),
    ("GaussianBlur", &["ksize", "sigma"]),
    ("blur", &["ksize"]),
    ("Sobel", &["dx", "dy"]),
    ("flip", &["code"]),
    ("rotate", &["code"]),
];

/// A request in which everything is checked.
struct Task<'a> {
    function: Function,
    image: Image<'a>,
    dtype: DType,
    shape: Vec<i64>,
}

impl Operation for OpencvRequest {
    const NAME: &'static str = "opencv";
    const SUMMARY: &'static str = "resize, convert, blur or turn an image, find its edges";
    type Reply = OpencvReply;

    fn validate(&self) -> Result<(), Error> {
        task(self).map(drop)
    }

    /// The noop plugin begins every result with its length in words of four bytes, as a number of eight.
    fn dummy(self, _: &Context<'_>) -> Result<OpencvReply, Error> {
        let task = task(&self)?;
        let mut bytes = vec![0; task.bytes()?];
        let words = (bytes.len() / size_of::<f32>()).to_le_bytes();
        if let Some(header) = bytes.first_chunk_mut() {
            *header = words;
        }
        Ok(task.reply(bytes))
    }

    fn reply_bytes(&self) -> u64 {
        task(self).map_or(0, |task| {
            task.shape
                .iter()
                .fold(task.dtype.size() as u64, |bytes, side| bytes.saturating_mul(side.unsigned_abs()))
        })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<OpencvReply>, Error> {
        let work = move |cancel: &Cancel| {
            let task = task(&self)?;
            let bytes = task.function.apply(&task.image, cancel)?;
            Ok(task.reply(bytes))
        };
        context.workshop.scheduler.run(&context.asker(), work).await
    }
}

impl Task<'_> {
    fn bytes(&self) -> Result<usize, Error> {
        Ok(vaccel_proto::tensor::element_count("image", &self.shape)? * self.dtype.size())
    }

    fn reply(&self, bytes: Vec<u8>) -> OpencvReply {
        let tensor = Tensor::from_bytes(self.dtype, &self.shape, bytes.into());
        OpencvReply { tensors: vec![NamedTensor { name: "image".into(), tensor: Some(tensor) }] }
    }
}

fn task(request: &OpencvRequest) -> Result<Task<'_>, Error> {
    let known = FUNCTIONS.iter().find(|(name, _)| *name == request.function);
    let Some((name, parameters)) = known else {
        let names: Vec<&str> = FUNCTIONS.iter().map(|(name, _)| *name).collect();
        let expected = format!("one of {}", names.join(", "));
        return Err(Error::field("function", expected, shown(&request.function)));
    };
    if let Some(other) = request.parameters.keys().find(|name| !parameters.contains(&name.as_str())) {
        let expected = format!("{} for {name}", parameters.join(", "));
        return Err(Error::field("parameters", expected, shown(other)));
    }
    let given = arrange("tensors", &["image"], DType::U8, &request.tensors)?;
    let image = image(&given[0])?;
    let function = function(name, &Parameters(&request.parameters))?;
    let flat = given[0].tensor.shape.len() == 2;
    let (rows, columns, channels) = function.result(&image).map_err(|expected| {
        Error::field(format!("{}.shape", given[0].path), expected, format!("{:?}", given[0].tensor.shape))
    })?;
    let dtype = if matches!(function, Function::Sobel { .. }) { DType::I16 } else { DType::U8 };
    let gray = matches!(function, Function::Convert(Conversion::BgrToGray | Conversion::RgbToGray));
    let mut shape = vec![rows, columns, channels];
    if gray || (flat && channels == 1) {
        shape.pop();
    }
    // Sides are bounded.
    let shape = shape.into_iter().filter_map(|size| i64::try_from(size).ok()).collect();
    Ok(Task { function, image, dtype, shape })
}

fn image<'a>(given: &Given<'a>) -> Result<Image<'a>, Error> {
    let shape: Vec<usize> =
        given.tensor.shape.iter().filter_map(|size| usize::try_from(*size).ok()).collect();
    let (rows, columns, channels) = match shape[..] {
        [rows, columns] => (rows, columns, 1),
        [rows, columns, channels] => (rows, columns, channels),
        _ => (0, 0, 0),
    };
    let side = 1..=SIDE_MAX;
    if side.contains(&rows) && side.contains(&columns) && (1..=CHANNELS_MAX).contains(&channels) {
        return Ok(Image { rows, columns, channels, data: &given.tensor.data });
    }
    let expected = format!(
        "[height, width] or [height, width, channels], sides of 1 to {SIDE_MAX}, \
                            1 to {CHANNELS_MAX} channels"
    );
    Err(Error::field(format!("{}.shape", given.path), expected, format!("{:?}", given.tensor.shape)))
}

fn function(name: &str, parameters: &Parameters<'_>) -> Result<Function, Error> {
    Ok(match name {
        "resize" => Function::Resize {
            columns: parameters.side("width")?,
            rows: parameters.side("height")?,
            linear: parameters.choice("interpolation", &[0, 1])? == 1,
        },
        "cvtColor" => Function::Convert(match parameters.choice("code", &[4, 6, 7, 8])? {
            4 => Conversion::Swap,
            6 => Conversion::BgrToGray,
            7 => Conversion::RgbToGray,
            _ => Conversion::GrayToColor,
        }),
        "threshold" => {
            let cuts = [Cut::Binary, Cut::BinaryInverse, Cut::Truncate, Cut::ToZero, Cut::ToZeroInverse];
            let kind = parameters.choice("type", &[0, 1, 2, 3, 4])?;
            let cut = usize::try_from(kind).ok().and_then(|kind| cuts.get(kind)).copied();
            Function::Threshold {
                cut: cut.unwrap_or(Cut::Binary),
                above: parameters.number("thresh")?,
                full: parameters.number("maxval")?,
            }
        }
        "GaussianBlur" => {
            let sigma = parameters.number("sigma")?;
            if !(sigma > 0.0 && sigma <= SIGMA_MAX) {
                return Err(Error::field("parameters.sigma", format!("more than 0, to {SIGMA_MAX}"), sigma));
            }
            Function::Gaussian { reach: parameters.reach("ksize")?, sigma }
        }
        "blur" => Function::Blur { reach: parameters.reach("ksize")? },
        "Sobel" => {
            let (dx, dy) = (parameters.choice("dx", &[0, 1])?, parameters.choice("dy", &[0, 1])?);
            if dx == dy {
                return Err(Error::field("parameters.dy", format!("{} with dx {dx}", 1 - dx), dy));
            }
            Function::Sobel { across: dx == 1 }
        }
        "flip" => {
            let code = parameters.choice("code", &[-1, 0, 1])?;
            Function::Flip { rows: code < 1, columns: code != 0 }
        }
        _ => Function::Rotate(match parameters.choice("code", &[0, 1, 2])? {
            0 => Turn::Clockwise,
            1 => Turn::Half,
            _ => Turn::CounterClockwise,
        }),
    })
}

/// A function's parameters, by name.
struct Parameters<'a>(&'a HashMap<String, f64>);

impl Parameters<'_> {
    fn number(&self, name: &str) -> Result<f64, Error> {
        let path = || format!("parameters.{name}");
        match self.0.get(name) {
            Some(number) if number.is_finite() => Ok(*number),
            Some(number) => Err(Error::field(path(), "a finite number", number)),
            None => Err(Error::field(path(), "a number", "none")),
        }
    }

    fn choice(&self, name: &str, choices: &[i8]) -> Result<i8, Error> {
        let number = self.number(name)?;
        let chosen = choices.iter().find(|choice| f64::from(**choice) == number);
        chosen.copied().ok_or_else(|| {
            let choices: Vec<String> = choices.iter().map(i8::to_string).collect();
            Error::field(format!("parameters.{name}"), format!("one of {}", choices.join(", ")), number)
        })
    }

    /// A whole number from 1 to `max`.
    fn whole(&self, name: &str, max: f64, odd: bool) -> Result<usize, Error> {
        let number = self.number(name)?;
        if !(1.0..=max).contains(&number) || number.fract() != 0.0 || (odd && number % 2.0 != 1.0) {
            let kind = if odd { "an odd" } else { "a whole" };
            let expected = format!("{kind} number from 1 to {max}");
            return Err(Error::field(format!("parameters.{name}"), expected, number));
        }
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole, and between the bounds"
        )]
        Ok(number as usize)
    }

    fn side(&self, name: &str) -> Result<usize, Error> {
        self.whole(name, f64::from(u32::try_from(SIDE_MAX).unwrap_or(u32::MAX)), false)
    }

    /// Pixels on each side of the one in the middle of a kernel.
    fn reach(&self, name: &str) -> Result<usize, Error> {
        Ok(self.whole(name, KERNEL_MAX, true)? / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_proto::error::Detail;

    fn request(function: &str, parameters: &[(&str, f64)], shape: &[i64]) -> OpencvRequest {
        let count = usize::try_from(shape.iter().product::<i64>()).expect("small");
        let tensor = Tensor::new(shape, &vec![7_u8; count]).expect("valid");
        let parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let tensors = vec![NamedTensor { name: String::new(), tensor: Some(tensor) }];
        OpencvRequest { function: function.into(), parameters, tensors }
    }

    #[test]
    fn results_have_the_shapes_that_are_said() {
        for (request, shape, dtype) in [
            (
                request("resize", &[("width", 3.0), ("height", 4.0), ("interpolation", 1.0)], &[2, 2]),
                vec![4, 3],
                DType::U8,
            ),
            (request("cvtColor", &[("code", 7.0)], &[2, 5, 3]), vec![2, 5], DType::U8),
            (request("cvtColor", &[("code", 8.0)], &[2, 5]), vec![2, 5, 3], DType::U8),
            (request("cvtColor", &[("code", 8.0)], &[2, 5, 1]), vec![2, 5, 3], DType::U8),
            (request("cvtColor", &[("code", 4.0)], &[2, 5, 3]), vec![2, 5, 3], DType::U8),
            (request("Sobel", &[("dx", 1.0), ("dy", 0.0)], &[2, 5, 1]), vec![2, 5, 1], DType::I16),
            (request("rotate", &[("code", 0.0)], &[2, 5, 4]), vec![5, 2, 4], DType::U8),
            (request("rotate", &[("code", 1.0)], &[2, 5]), vec![2, 5], DType::U8),
            (request("blur", &[("ksize", 31.0)], &[1, 1]), vec![1, 1], DType::U8),
        ] {
            let task = task(&request).expect(&request.function);
            assert_eq!((&task.shape, task.dtype), (&shape, dtype), "{}", request.function);
            let bytes = task.function.apply(&task.image, &Cancel::default()).expect("computed");
            assert_eq!(bytes.len(), task.bytes().expect("counted"), "{}", request.function);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_field() {
        let linear = ("interpolation", 1.0);
        for (request, field) in [
            (request("erode", &[], &[2, 2]), "function"),
            (request("", &[], &[2, 2]), "function"),
            (request("resize", &[("width", 3.0), linear], &[2, 2]), "parameters.height"),
            (request("resize", &[("width", 0.0), ("height", 1.0), linear], &[2, 2]), "parameters.width"),
            (request("resize", &[("width", 1.5), ("height", 1.0), linear], &[2, 2]), "parameters.width"),
            (request("resize", &[("width", 1e300), ("height", 1.0), linear], &[2, 2]), "parameters.width"),
            (request("resize", &[("width", f64::NAN), ("height", 1.0), linear], &[2, 2]), "parameters.width"),
            (
                request("resize", &[("width", 1.0), ("height", 1.0), ("interpolation", 2.0)], &[2, 2]),
                "parameters.interpolation",
            ),
            (request("flip", &[("code", 0.0), ("mode", 1.0)], &[2, 2]), "parameters"),
            (request("flip", &[("code", 2.0)], &[2, 2]), "parameters.code"),
            (request("flip", &[("code", 0.0)], &[2]), "tensors[0].shape"),
            (request("flip", &[("code", 0.0)], &[0, 2]), "tensors[0].shape"),
            (request("flip", &[("code", 0.0)], &[2, 2, 5]), "tensors[0].shape"),
            (request("flip", &[("code", 0.0)], &[1, 32769]), "tensors[0].shape"),
            (request("flip", &[("code", 0.0)], &[1, 2, 2, 1]), "tensors[0].shape"),
            (request("cvtColor", &[("code", 6.0)], &[2, 2]), "tensors[0].shape"),
            (request("cvtColor", &[("code", 8.0)], &[2, 2, 3]), "tensors[0].shape"),
            (request("blur", &[("ksize", 4.0)], &[2, 2]), "parameters.ksize"),
            (request("blur", &[("ksize", 33.0)], &[2, 2]), "parameters.ksize"),
            (request("GaussianBlur", &[("ksize", 3.0), ("sigma", 0.0)], &[2, 2]), "parameters.sigma"),
            (request("Sobel", &[("dx", 1.0), ("dy", 1.0)], &[2, 2]), "parameters.dy"),
            (
                request("threshold", &[("thresh", f64::INFINITY), ("maxval", 1.0), ("type", 0.0)], &[2, 2]),
                "parameters.thresh",
            ),
        ] {
            let refusal = task(&request).map(drop).expect_err(field);
            assert_eq!(refusal.detail(), &Detail::Field(field.into()), "{refusal}");
        }
        let large = request("resize", &[("width", 32768.0), ("height", 32768.0), linear], &[2, 2]);
        assert_eq!(large.reply_bytes(), 1 << 30);
        let unknown = task(&request("erode", &[], &[2, 2])).map(drop).expect_err("unknown");
        assert!(FUNCTIONS.iter().all(|(name, _)| unknown.message().contains(name)), "{unknown}");
    }
}
