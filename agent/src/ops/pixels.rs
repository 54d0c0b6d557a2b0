//! Images of bytes, and how each number of a result comes about.
//!
//! Channels are computed each for itself. *Rounding* is to the nearest whole number, halves up, then to 0 to 255.
//! Beyond its edges an image goes on as in a mirror that stands on the outermost pixels (OpenCV's
//! `BORDER_REFLECT_101`).

use vaccel_proto::Error;

use crate::scheduler::Cancel;

/// An image in rows of pixels.
pub(super) struct Image<'a> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) channels: usize,
    /// Channel by channel, pixel by pixel, row by row.
    pub(super) data: &'a [u8],
}

/// What is made of an image.
#[derive(Clone, Copy, Debug)]
pub(super) enum Function {
    /// Another size. Pixels are squares, and the corners of both images lie on each other. Nearest: the old pixel in
    /// which the new one's upper left corner lies. Linear: between the centers of the four nearest old pixels.
    Resize { rows: usize, columns: usize, linear: bool },
    /// Other channels.
    Convert(Conversion),
    /// Each byte by whether it is above a threshold, which is rounded down.
    Threshold { cut: Cut, above: f64, full: f64 },
    /// Weights `exp(-d² / 2 sigma²)` at a distance of d pixels in each direction, that sum to 1.
    Gaussian { reach: usize, sigma: f64 },
    /// The mean of a square of pixels.
    Blur { reach: usize },
    /// The slope: `-1 0 1` along one direction, `1 2 1` along the other.
    Sobel { across: bool },
    /// Mirrored.
    Flip { rows: bool, columns: bool },
    /// Turned.
    Rotate(Turn),
}

/// Changes of channels. Gray is `(9798 red + 19235 green + 3735 blue + 2^14) / 2^15`, rounded down: BT.601 in
/// OpenCV's 15 bits.
#[derive(Clone, Copy, Debug)]
pub(super) enum Conversion {
    Swap,
    BgrToGray,
    RgbToGray,
    GrayToColor,
}

/// What becomes of bytes above a threshold, and of the others.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    /// The full value; 0.
    Binary,
    /// 0; the full value.
    BinaryInverse,
    /// The threshold; unchanged.
    Truncate,
    /// Unchanged; 0.
    ToZero,
    /// 0; unchanged.
    ToZeroInverse,
}

/// By 90°, 180°, or 270° clockwise.
#[derive(Clone, Copy, Debug)]
pub(super) enum Turn {
    Clockwise,
    Half,
    CounterClockwise,
}

/// Fills a row of the result, given its number.
type Painter<'a> = Box<dyn FnMut(usize, &mut [u8]) + 'a>;

impl Function {
    /// Rows, columns and channels of the result, or the shape of image that the function takes.
    pub(super) fn result(self, image: &Image<'_>) -> Result<(usize, usize, usize), &'static str> {
        let Image { rows, columns, channels, .. } = *image;
        match self {
            Self::Resize { rows, columns, .. } => Ok((rows, columns, channels)),
            Self::Convert(Conversion::GrayToColor) if channels != 1 => Err("[height, width] for this code"),
            Self::Convert(Conversion::GrayToColor) => Ok((rows, columns, 3)),
            Self::Convert(_) if channels != 3 => Err("[height, width, 3] for this code"),
            Self::Convert(Conversion::BgrToGray | Conversion::RgbToGray) => Ok((rows, columns, 1)),
            Self::Rotate(Turn::Clockwise | Turn::CounterClockwise) => Ok((columns, rows, channels)),
            _ => Ok((rows, columns, channels)),
        }
    }

    /// The result's bytes; numbers of 16 bits are little-endian.
    ///
    /// # Errors
    /// `CANCELLED` when nobody waits any more.
    pub(super) fn apply(self, image: &Image<'_>, cancel: &Cancel) -> Result<Vec<u8>, Error> {
        let (rows, columns, channels) =
            self.result(image).map_err(|why| Error::field("image", why, "another"))?;
        let sample = if matches!(self, Self::Sobel { .. }) { size_of::<i16>() } else { 1 };
        let mut bytes = vec![0; rows * columns * channels * sample];
        let mut painter = self.painter(image);
        for (row, bytes) in bytes.chunks_exact_mut(columns * channels * sample).enumerate() {
            cancel.check()?;
            painter(row, bytes);
        }
        Ok(bytes)
    }

    /// What fills a row of the result.
    fn painter<'a>(self, image: &'a Image<'a>) -> Painter<'a> {
        match self {
            Self::Resize { rows, columns, linear: false } => Box::new(nearest(image, rows, columns)),
            Self::Resize { rows, columns, linear: true } => Box::new(linear(image, rows, columns)),
            Self::Convert(conversion) => {
                Box::new(move |row, bytes| convert(conversion, image.row(row), bytes))
            }
            Self::Threshold { cut, above, full } => {
                let table: Vec<u8> = (0..=255).map(|byte| cut.of(byte, above, full)).collect();
                Box::new(move |row, bytes| {
                    let pairs = bytes.iter_mut().zip(image.row(row));
                    pairs.for_each(|(byte, from)| *byte = table[usize::from(*from)]);
                })
            }
            Self::Gaussian { reach, sigma } => {
                let weights = gaussian(reach, sigma);
                Box::new(smooth(image, weights.clone(), weights, round))
            }
            // Whole numbers, and an odd number of pixels: the mean is never a half, and its rounding exact.
            Self::Blur { reach } => {
                let side = 2 * reach + 1;
                #[allow(clippy::cast_precision_loss, reason = "at most 31")]
                let area = (side * side) as f64;
                Box::new(smooth(image, vec![1.0; side], vec![1.0; side], move |sum| round(sum / area)))
            }
            Self::Sobel { across } => {
                let (slope, mean) = (vec![-1.0, 0.0, 1.0], vec![1.0, 2.0, 1.0]);
                let (along, down) = if across { (slope, mean) } else { (mean, slope) };
                Box::new(smooth(image, along, down, whole))
            }
            Self::Flip { rows, columns } => Box::new(move |row, bytes| {
                let from = image.row(if rows { image.rows - 1 - row } else { row });
                if columns { reversed(from, image.channels, bytes) } else { bytes.copy_from_slice(from) }
            }),
            Self::Rotate(Turn::Half) => {
                let last = image.rows - 1;
                Box::new(move |row, bytes| reversed(image.row(last - row), image.channels, bytes))
            }
            Self::Rotate(turn) => Box::new(move |row, bytes| turned(turn, image, row, bytes)),
        }
    }
}

impl Image<'_> {
    fn row(&self, row: usize) -> &[u8] {
        let length = self.columns * self.channels;
        &self.data[row * length..][..length]
    }

    fn pixel(&self, row: usize, column: usize) -> &[u8] {
        &self.row(row)[column * self.channels..][..self.channels]
    }
}

impl Cut {
    fn of(self, byte: u8, above: f64, full: f64) -> u8 {
        let is_above = f64::from(byte) > above.floor();
        match (self, is_above) {
            (Self::Binary, true) | (Self::BinaryInverse, false) => round(full),
            (Self::Truncate, true) => round(above.floor()),
            (Self::Binary | Self::ToZero, false) | (Self::BinaryInverse | Self::ToZeroInverse, true) => 0,
            (Self::Truncate | Self::ToZeroInverse, false) | (Self::ToZero, true) => byte,
        }
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it saturates, which is what is meant"
)]
fn round(number: f64) -> u8 {
    (number + 0.5).floor() as u8
}

/// A whole number of 16 bits: a slope is at most 1,020.
#[allow(clippy::cast_possible_truncation, reason = "it saturates, and does not have to")]
fn whole(number: f64) -> [u8; 2] {
    (number as i16).to_le_bytes()
}

/// A byte as it is written.
trait Sample {
    fn put(self, at: &mut [u8]);
    const BYTES: usize;
}

impl Sample for u8 {
    fn put(self, at: &mut [u8]) {
        at[0] = self;
    }
    const BYTES: usize = 1;
}

impl Sample for [u8; 2] {
    fn put(self, at: &mut [u8]) {
        at.copy_from_slice(&self);
    }
    const BYTES: usize = 2;
}

/// The old row or column in which each new one begins.
fn corners(old: usize, new: usize) -> Vec<usize> {
    (0..new).map(|at| at * old / new).collect()
}

fn nearest<'a>(image: &'a Image<'a>, rows: usize, columns: usize) -> impl FnMut(usize, &mut [u8]) + 'a {
    let (from_rows, from_columns) = (corners(image.rows, rows), corners(image.columns, columns));
    move |row, bytes| {
        for (pixel, column) in bytes.chunks_exact_mut(image.channels).zip(&from_columns) {
            pixel.copy_from_slice(image.pixel(from_rows[row], *column));
        }
    }
}

/// For each new row or column the two old ones whose centers are nearest, and the weight of the second.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sides are small, and nothing is below 0"
)]
fn centers(old: usize, new: usize) -> Vec<(usize, usize, f64)> {
    let scale = old as f64 / new as f64;
    let of = |at: usize| {
        let place = ((at as f64 + 0.5) * scale - 0.5).clamp(0.0, (old - 1) as f64);
        let first = place.floor() as usize;
        (first, (first + 1).min(old - 1), place - place.floor())
    };
    (0..new).map(of).collect()
}

fn linear<'a>(image: &'a Image<'a>, rows: usize, columns: usize) -> impl FnMut(usize, &mut [u8]) + 'a {
    let (from_rows, from_columns) = (centers(image.rows, rows), centers(image.columns, columns));
    move |row, bytes| {
        let (above, below, down) = from_rows[row];
        let (above, below) = (image.row(above), image.row(below));
        for (pixel, (left, right, along)) in bytes.chunks_exact_mut(image.channels).zip(&from_columns) {
            for (channel, byte) in pixel.iter_mut().enumerate() {
                let (left, right) = (left * image.channels + channel, right * image.channels + channel);
                let between =
                    |row: &[u8]| f64::from(row[left]) * (1.0 - along) + f64::from(row[right]) * along;
                *byte = round(between(above) * (1.0 - down) + between(below) * down);
            }
        }
    }
}

fn convert(conversion: Conversion, from: &[u8], bytes: &mut [u8]) {
    let gray = |red: u8, green: u8, blue: u8| {
        let sum = 9798 * u32::from(red) + 19235 * u32::from(green) + 3735 * u32::from(blue);
        // The weights sum to 2^15.
        u8::try_from((sum + (1 << 14)) >> 15).unwrap_or(u8::MAX)
    };
    match conversion {
        Conversion::GrayToColor => {
            bytes.chunks_exact_mut(3).zip(from).for_each(|(pixel, gray)| pixel.fill(*gray));
        }
        Conversion::Swap => {
            let pairs = bytes.chunks_exact_mut(3).zip(from.chunks_exact(3));
            pairs.for_each(|(pixel, from)| pixel.copy_from_slice(&[from[2], from[1], from[0]]));
        }
        Conversion::BgrToGray | Conversion::RgbToGray => {
            let is_rgb = matches!(conversion, Conversion::RgbToGray);
            for (byte, from) in bytes.iter_mut().zip(from.chunks_exact(3)) {
                let (red, blue) = if is_rgb { (from[0], from[2]) } else { (from[2], from[0]) };
                *byte = gray(red, from[1], blue);
            }
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "at most 15")]
fn gaussian(reach: usize, sigma: f64) -> Vec<f64> {
    let weight = |at: usize| {
        let distance = at as f64 - reach as f64;
        (-distance * distance / (2.0 * sigma * sigma)).exp()
    };
    let weights: Vec<f64> = (0..=2 * reach).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// Where a row or column beyond the edges is found: `at` counts from `reach` before the first.
fn mirrored(at: usize, reach: usize, size: usize) -> usize {
    let period = 2 * (size - 1);
    if period == 0 {
        return 0;
    }
    // A multiple of the period that makes it positive.
    let at = (at + period * reach - reach) % period;
    if at < size { at } else { period - at }
}

/// A kernel that is a product of weights along the rows and down the columns, first down, then along.
fn smooth<'a, S: Sample>(
    image: &'a Image<'a>,
    along: Vec<f64>,
    down: Vec<f64>,
    finish: impl Fn(f64) -> S + 'a,
) -> impl FnMut(usize, &mut [u8]) + 'a {
    let (above, left) = (down.len() / 2, along.len() / 2);
    let channels = image.channels;
    let width = image.columns * channels;
    let mut sums = vec![0.0; width];
    let mut wide = vec![0.0; width + 2 * left * channels];
    move |row, bytes| {
        sums.fill(0.0);
        for (at, weight) in down.iter().enumerate() {
            let from = image.row(mirrored(row + at, above, image.rows));
            sums.iter_mut().zip(from).for_each(|(sum, byte)| *sum += weight * f64::from(*byte));
        }
        for (at, pixel) in wide.chunks_exact_mut(channels).enumerate() {
            let from = mirrored(at, left, image.columns) * channels;
            pixel.copy_from_slice(&sums[from..from + channels]);
        }
        sums.fill(0.0);
        for (at, weight) in along.iter().enumerate() {
            let from = &wide[at * channels..];
            sums.iter_mut().zip(from).for_each(|(sum, number)| *sum += weight * number);
        }
        let places = bytes.chunks_exact_mut(S::BYTES);
        places.zip(&sums).for_each(|(place, sum)| finish(*sum).put(place));
    }
}

fn reversed(from: &[u8], channels: usize, bytes: &mut [u8]) {
    let pairs = bytes.chunks_exact_mut(channels).zip(from.chunks_exact(channels).rev());
    pairs.for_each(|(pixel, from)| pixel.copy_from_slice(from));
}

/// A row of a turned image is a column of the other.
fn turned(turn: Turn, image: &Image<'_>, row: usize, bytes: &mut [u8]) {
    let clockwise = matches!(turn, Turn::Clockwise);
    let column = if clockwise { row } else { image.columns - 1 - row };
    for (at, pixel) in bytes.chunks_exact_mut(image.channels).enumerate() {
        let from = if clockwise { image.rows - 1 - at } else { at };
        pixel.copy_from_slice(image.pixel(from, column));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_proto::Reason;

    #[test]
    fn a_mirror_stands_on_the_outermost_pixels() {
        let of = |reach: usize, size: usize| -> Vec<usize> {
            (0..size + 2 * reach).map(|at| mirrored(at, reach, size)).collect()
        };
        assert_eq!(of(2, 4), [2, 1, 0, 1, 2, 3, 2, 1]);
        assert_eq!(of(4, 2), [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]);
        assert_eq!(of(2, 1), [0; 5]);
        assert_eq!(of(0, 3), [0, 1, 2]);
    }

    #[test]
    fn rounding_is_to_the_nearest_and_stays_in_a_byte() {
        for (number, byte) in [(-3.0, 0), (0.49, 0), (0.5, 1), (254.5, 255), (1e9, 255)] {
            assert_eq!(round(number), byte, "{number}");
        }
    }

    #[test]
    fn a_cancelled_function_stops() {
        let image = Image { rows: 2, columns: 2, channels: 1, data: &[1, 2, 3, 4] };
        let cancel = Cancel::default();
        cancel.set();
        let stopped = Function::Blur { reach: 1 }.apply(&image, &cancel).expect_err("cancelled");
        assert_eq!(stopped.reason(), Reason::Cancelled);
    }
}
