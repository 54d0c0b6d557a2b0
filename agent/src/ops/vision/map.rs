//! Outputs that are maps: numbers for each part of the input, in rows and columns.

use std::borrow::Cow;
use std::ops::Range;

use vaccel_proto::v1::{Area, Tensor};
use vaccel_proto::{Error, Reason};

use super::Placed;
use super::table::numbers;

/// Numbers of each part of the input.
pub(in crate::ops) struct Grid<'a> {
    numbers: Cow<'a, [f32]>,
    pub(in crate::ops) channels: usize,
    pub(in crate::ops) rows: usize,
    pub(in crate::ops) columns: usize,
    /// Whether the channels of one part lie beside each other.
    is_last: bool,
}

impl<'a> Grid<'a> {
    /// A map of one of these numbers of channels, of which the first that fits is taken.
    ///
    /// # Errors
    /// `MODEL_REJECTED` for an output that is none.
    pub(in crate::ops) fn of(output: &'a Tensor, channels: &[usize]) -> Result<Self, Error> {
        let numbers = numbers(output)?;
        let sides: Vec<usize> = output.shape.iter().filter_map(|side| usize::try_from(*side).ok()).collect();
        // One image, and it may or may not be said.
        let mut shape: &[usize] = &sides;
        while let [1, rest @ ..] = shape
            && rest.len() >= 3
        {
            shape = rest;
        }
        let fits = |channels: usize| match *shape {
            [first, rows, columns] if first == channels => Some((rows, columns, false)),
            [rows, columns, last] if last == channels => Some((rows, columns, true)),
            [rows, columns] if channels == 1 => Some((rows, columns, false)),
            _ => None,
        };
        let found = channels.iter().find_map(|&channels| Some((channels, fits(channels)?)));
        let Some((channels, (rows, columns, is_last))) = found.filter(|_| !numbers.is_empty()) else {
            let most = channels.iter().max().copied().unwrap_or(1);
            let message = format!(
                "expected an output [1, {most}, rows, columns] or [1, rows, columns, {most}], this model gives {}",
                output.signature()
            );
            return Err(Error::new(Reason::ModelRejected, message));
        };
        Ok(Self { numbers, channels, rows, columns, is_last })
    }

    pub(in crate::ops) fn at(&self, channel: usize, row: usize, column: usize) -> f32 {
        let part = row * self.columns + column;
        let index = if self.is_last {
            part * self.channels + channel
        } else {
            channel * self.rows * self.columns + part
        };
        self.numbers[index]
    }

    /// Where in a channel the highest number is, 0 to 1 across and down, and the number. It is a quarter of a part
    /// towards the higher neighbour: maps are coarse, and that is how far their points are from the middle on the
    /// whole.
    #[allow(clippy::cast_precision_loss, reason = "sides of maps are far below 2^24")]
    pub(in crate::ops) fn peak(&self, channel: usize) -> ([f32; 2], f32) {
        let parts = (0..self.rows).flat_map(|row| (0..self.columns).map(move |column| (row, column)));
        let number = |row: usize, column: usize| self.at(channel, row, column);
        // The first of the highest.
        let higher = |best: (usize, usize), part: (usize, usize)| {
            if number(part.0, part.1) > number(best.0, best.1) { part } else { best }
        };
        let (row, column) = parts.reduce(higher).unwrap_or((0, 0));
        let towards = |before: Option<f32>, after: Option<f32>| match before.zip(after) {
            Some((before, after)) if before != after => 0.25 * (after - before).signum(),
            _ => 0.0,
        };
        let above = row.checked_sub(1).map(|row| number(row, column));
        let below = (row + 1 < self.rows).then(|| number(row + 1, column));
        let left = column.checked_sub(1).map(|column| number(row, column));
        let right = (column + 1 < self.columns).then(|| number(row, column + 1));
        let x = (column as f32 + 0.5 + towards(left, right)) / self.columns as f32;
        let y = (row as f32 + 0.5 + towards(above, below)) / self.rows as f32;
        ([x, y], number(row, column))
    }
}

/// The part of a map that is of the image and not of what is beside it.
#[derive(Clone, Debug)]
pub(in crate::ops) struct Covered {
    pub(in crate::ops) rows: Range<usize>,
    pub(in crate::ops) columns: Range<usize>,
    /// What of the image it is of.
    pub(in crate::ops) area: Area,
}

impl Covered {
    pub(in crate::ops) fn new(placed: &Placed, rows: usize, columns: usize) -> Self {
        let ([left, right], across) = (placed.span(0), side(placed, 0, columns));
        let ([top, bottom], down) = (placed.span(1), side(placed, 1, rows));
        let (columns, rows) = (inside(left, right, across, columns), inside(top, bottom, down, rows));
        #[allow(clippy::cast_precision_loss, reason = "sides of maps are far below 2^24")]
        let place = |cell: usize, size: f32| cell as f32 * size;
        let area = Area {
            left: place(columns.start, across),
            top: place(rows.start, down),
            right: place(columns.end, across),
            bottom: place(rows.end, down),
        };
        Self { rows, columns, area: placed.area(area) }
    }

    /// The shape of the part.
    pub(in crate::ops) fn shape(&self) -> [usize; 2] {
        [self.rows.len(), self.columns.len()]
    }

    /// All of its parts, row by row.
    pub(in crate::ops) fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
        let columns = self.columns.clone();
        self.rows.clone().flat_map(move |row| columns.clone().map(move |column| (row, column)))
    }
}

/// Pixels of the input that one part has along an axis.
#[allow(clippy::cast_precision_loss, reason = "sides of maps are far below 2^24")]
fn side(placed: &Placed, axis: usize, parts: usize) -> f32 {
    placed.input[axis] / parts as f32
}

/// The parts whose middle is between two places, at least one.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "from 0 to the number of parts"
)]
fn inside(begin: f32, end: f32, size: f32, parts: usize) -> Range<usize> {
    let number = |place: f32| (place / size - 0.5).ceil().clamp(0.0, parts as f32) as usize;
    let first = number(begin).min(parts - 1);
    first..number(end).max(first + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::vision::ImageInput;
    use image::{DynamicImage, RgbImage};
    use vaccel_proto::v1::DType;

    fn placed(json: &str, width: u32, height: u32) -> Placed {
        let input: ImageInput = serde_json::from_str(json).expect("valid");
        input.place(DynamicImage::from(RgbImage::new(width, height)), DType::F32).expect("fits").1
    }

    fn tensor(shape: &[i64]) -> Tensor {
        let count = usize::try_from(shape.iter().product::<i64>()).expect("positive");
        #[allow(clippy::cast_precision_loss, reason = "small")]
        let numbers: Vec<f32> = (0..count).map(|number| number as f32).collect();
        Tensor::new(shape, &numbers).expect("valid")
    }

    #[test]
    fn channels_come_first_or_last() {
        let first = tensor(&[1, 2, 3, 4]);
        let first = Grid::of(&first, &[2]).expect("fits");
        assert_eq!((first.rows, first.columns, first.at(1, 2, 3)), (3, 4, 23.0));
        let last = tensor(&[1, 3, 4, 2]);
        let last = Grid::of(&last, &[2]).expect("fits");
        assert_eq!((last.rows, last.columns, last.at(1, 2, 3)), (3, 4, 23.0));
        for shape in [&[3, 4][..], &[1, 3, 4], &[1, 1, 3, 4], &[1, 3, 4, 1]] {
            let output = tensor(shape);
            let one = Grid::of(&output, &[5, 1]).expect("fits");
            assert_eq!((one.channels, one.rows, one.columns, one.at(0, 2, 3)), (1, 3, 4, 11.0), "{shape:?}");
        }
        for shape in [&[12][..], &[2, 3, 4], &[2, 1, 3, 4], &[0, 3]] {
            let output = tensor(shape);
            assert!(Grid::of(&output, &[1]).is_err(), "{shape:?}");
        }
    }

    #[test]
    fn a_map_is_of_the_image_without_its_bars() {
        let stretched = placed(r#"{"width":8,"height":8}"#, 100, 50);
        let covered = Covered::new(&stretched, 4, 4);
        assert_eq!((covered.shape(), covered.area.right, covered.area.bottom), ([4, 4], 100.0, 50.0));
        let padded = placed(r#"{"width":8,"height":8,"fit":"pad"}"#, 100, 50);
        let covered = Covered::new(&padded, 4, 4);
        assert_eq!((covered.rows.clone(), covered.columns.clone()), (1..3, 0..4));
        let Area { left, top, right, bottom } = covered.area;
        assert_eq!([left, top, right, bottom], [0.0, 0.0, 100.0, 50.0]);
        assert_eq!(covered.parts().count(), 8);
        let corner = placed(r#"{"width":8,"height":8,"fit":"pad","place":"corner"}"#, 50, 100);
        assert_eq!(Covered::new(&corner, 8, 8).columns, 0..4);
        let cut = placed(r#"{"width":8,"height":8,"fit":"crop"}"#, 100, 50);
        let Area { left, top, right, bottom } = Covered::new(&cut, 2, 2).area;
        assert_eq!([left, top, right, bottom], [25.0, 0.0, 75.0, 50.0]);
    }
}
