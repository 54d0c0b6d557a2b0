//! The picture: an image for people to look at, with what was found drawn into it.

use std::io::Cursor;

use bytes::Bytes;
use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, Rgb, RgbImage};
use vaccel_proto::v1::Area;
use vaccel_proto::{Error, Reason};

use crate::scheduler::Cancel;

/// Longest side of a picture, in pixels: as much as screens show. Larger ones would cost more than what they show.
const SIDE_MAX: u32 = 2048;

/// Of JPEG, 1 to 100: beyond it files grow and pictures look the same.
const QUALITY: u8 = 90;

/// Lines are as many pixels wide as the picture has of these, and at least two.
const PIXELS_PER_WIDTH: u32 = 400;

/// An image that is drawn on, in places of the image that it was made from.
pub(in crate::ops) struct Canvas {
    image: RgbImage,
    /// Pixels here of a pixel of the image.
    scale: f32,
    /// Once it is set, nothing more is drawn: thousands of lines take seconds.
    cancel: Cancel,
}

/// A color for each class, such that neighbours differ.
pub(in crate::ops) fn color(class: u32) -> Rgb<u8> {
    // Steps of the golden ratio around the circle of hues never meet and stay far from each other.
    const STEP: u32 = 2_654_435_769;
    let hue = class.wrapping_mul(STEP) >> 16;
    let (sector, rise) = ((hue * 6) >> 16, u8::try_from(((hue * 6) & 0xffff) >> 8).unwrap_or(u8::MAX));
    let fall = u8::MAX - rise;
    Rgb(match sector {
        0 => [255, rise, 0],
        1 => [fall, 255, 0],
        2 => [0, 255, rise],
        3 => [0, fall, 255],
        4 => [rise, 0, 255],
        _ => [255, 0, fall],
    })
}

impl Canvas {
    pub(super) fn new(image: &DynamicImage, cancel: &Cancel) -> Self {
        let longer = image.width().max(image.height());
        // Averages over areas, which takes no memory beside the picture's own.
        let shown = if longer <= SIDE_MAX {
            image.to_rgb8()
        } else {
            image.thumbnail(SIDE_MAX, SIDE_MAX).into_rgb8()
        };
        #[allow(clippy::cast_precision_loss, reason = "sides of images are far below 2^24")]
        let scale = shown.width().max(shown.height()) as f32 / longer as f32;
        Self { image: shown, scale, cancel: cancel.clone() }
    }

    /// The pixel of a place in the image. What is far beside the picture is only somewhat beside it.
    #[allow(clippy::cast_possible_truncation, reason = "it is bounded, and what is no number becomes 0")]
    fn pixel(&self, place: f32) -> i64 {
        const FAR: f32 = SIDE_MAX as f32;
        (place * self.scale).clamp(-FAR, 2.0 * FAR) as i64
    }

    fn width_of_lines(&self) -> i64 {
        i64::from((self.image.width().max(self.image.height()) / PIXELS_PER_WIDTH).max(2))
    }

    /// Fills what of a rectangle is in the picture.
    fn fill(&mut self, [left, top, right, bottom]: [i64; 4], color: Rgb<u8>) {
        if self.cancel.is_set() {
            return;
        }
        let inside = |at: i64, size: u32| u32::try_from(at.clamp(0, i64::from(size))).unwrap_or(size);
        let (width, height) = self.image.dimensions();
        for y in inside(top, height)..inside(bottom, height) {
            for x in inside(left, width)..inside(right, width) {
                self.image.put_pixel(x, y, color);
            }
        }
    }

    /// The outline of a part of the image.
    pub(in crate::ops) fn outline(&mut self, area: &Area, color: Rgb<u8>) {
        let wide = self.width_of_lines();
        let [left, top] = [area.left, area.top].map(|place| self.pixel(place));
        let [right, bottom] = [area.right, area.bottom].map(|place| self.pixel(place));
        for line in [
            [left, top, right, top + wide],
            [left, bottom - wide, right, bottom],
            [left, top, left + wide, bottom],
            [right - wide, top, right, bottom],
        ] {
            self.fill(line, color);
        }
    }

    /// A dot around a place.
    pub(in crate::ops) fn dot(&mut self, [x, y]: [f32; 2], color: Rgb<u8>) {
        let (x, y, reach) = (self.pixel(x), self.pixel(y), 2 * self.width_of_lines());
        self.fill([x - reach, y - reach, x + reach, y + reach], color);
    }

    /// A line from one place to another.
    pub(in crate::ops) fn line(&mut self, from: [f32; 2], to: [f32; 2], color: Rgb<u8>) {
        let wide = self.width_of_lines();
        let (from, to) = (from.map(|place| self.pixel(place)), to.map(|place| self.pixel(place)));
        let steps = (to[0] - from[0]).abs().max((to[1] - from[1]).abs()).max(1);
        for step in 0..=steps {
            let at = [0, 1].map(|axis| from[axis] + (to[axis] - from[axis]) * step / steps);
            let begin = at.map(|at| at - wide / 2);
            self.fill([begin[0], begin[1], begin[0] + wide, begin[1] + wide], color);
        }
    }

    /// Colors a part of the image by a grid over it: what there is of a color, 0 to 256 of 256, and which.
    pub(in crate::ops) fn tint(
        &mut self,
        area: &Area,
        [rows, columns]: [usize; 2],
        tint: impl Fn(usize, usize) -> (u16, Rgb<u8>),
    ) {
        let [left, top] = [area.left, area.top].map(|place| self.pixel(place));
        let [right, bottom] = [area.right, area.bottom].map(|place| self.pixel(place));
        let cell = |at: u32, begin: i64, end: i64, cells: usize| {
            let along = i64::from(at) - begin;
            let inside = (0..end - begin).contains(&along);
            let cell = usize::try_from(along).unwrap_or(0) * cells
                / usize::try_from(end - begin).unwrap_or(1).max(1);
            inside.then_some(cell)
        };
        for (x, y, pixel) in self.image.enumerate_pixels_mut() {
            let cells = cell(y, top, bottom, rows).zip(cell(x, left, right, columns));
            let Some((row, column)) = cells else { continue };
            let (much, Rgb(color)) = tint(row, column);
            let much = much.min(256);
            for (sample, color) in pixel.0.iter_mut().zip(color) {
                let mixed = u32::from(*sample) * u32::from(256 - much) + u32::from(color) * u32::from(much);
                *sample = u8::try_from(mixed >> 8).unwrap_or(u8::MAX);
            }
        }
    }

    /// A JPEG file.
    pub(super) fn encode(&self) -> Result<Bytes, Error> {
        let mut file = Cursor::new(Vec::new());
        let encoder = JpegEncoder::new_with_quality(&mut file, QUALITY);
        self.image.write_with_encoder(encoder).map_err(|error| {
            Error::new(Reason::BackendFailed, "the picture could not be encoded").caused_by(error)
        })?;
        Ok(file.into_inner().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RED: Rgb<u8> = Rgb([255, 0, 0]);

    fn canvas(width: u32, height: u32) -> Canvas {
        Canvas::new(&RgbImage::new(width, height).into(), &Cancel::default())
    }

    fn drawn(canvas: &Canvas) -> usize {
        canvas.image.pixels().filter(|pixel| **pixel != Rgb([0, 0, 0])).count()
    }

    #[test]
    fn colors_of_neighbours_differ() {
        for class in 0..1000 {
            let (Rgb(one), Rgb(next)) = (color(class), color(class + 1));
            let distance: u32 = one.iter().zip(next).map(|(a, b)| u32::from(a.abs_diff(b))).sum();
            assert!(distance > 150, "{class}: {one:?} {next:?}");
        }
    }

    #[test]
    fn large_images_become_smaller_pictures_and_places_follow() {
        let mut canvas = canvas(4096, 1024);
        assert_eq!(canvas.image.dimensions(), (2048, 512));
        canvas.dot([4000.0, 1000.0], RED);
        assert_eq!(*canvas.image.get_pixel(2000, 500), RED);
        let strip = self::canvas(40_000, 1);
        assert_eq!(strip.image.dimensions(), (2048, 1));
    }

    #[test]
    fn what_is_beside_the_picture_is_not_drawn() {
        let mut canvas = canvas(20, 10);
        canvas.outline(&Area { left: 2.0, top: 2.0, right: 18.0, bottom: 9.0 }, RED);
        assert_eq!(drawn(&canvas), 16 * 7 - 12 * 3);
        canvas.dot([0.0, 0.0], RED);
        canvas.line([-50.0, 5.0], [1e9, 5.0], RED);
        canvas.outline(&Area { left: -9.0, top: f32::NAN, right: f32::INFINITY, bottom: 3.0 }, RED);
        canvas.encode().expect("encodes");
    }

    #[test]
    fn nothing_is_drawn_for_nobody() {
        let cancel = Cancel::default();
        let mut canvas = Canvas::new(&RgbImage::new(9, 9).into(), &cancel);
        cancel.set();
        canvas.line([0.0, 0.0], [8.0, 8.0], RED);
        assert_eq!(drawn(&canvas), 0);
    }

    #[test]
    fn a_grid_tints_the_part_that_it_is_of() {
        let mut canvas = canvas(8, 4);
        let area = Area { left: 2.0, top: 0.0, right: 6.0, bottom: 4.0 };
        canvas.tint(&area, [2, 2], |row, column| if (row, column) == (1, 0) { (256, RED) } else { (0, RED) });
        let red = canvas.image.enumerate_pixels().filter(|(_, _, pixel)| **pixel == RED);
        assert_eq!(red.map(|(x, y, _)| (x, y)).collect::<Vec<_>>(), [(2, 2), (3, 2), (2, 3), (3, 3)]);
        canvas.tint(&area, [2, 2], |_, _| (128, Rgb([0, 200, 0])));
        assert_eq!(*canvas.image.get_pixel(2, 2), Rgb([127, 100, 0]));
    }
}
