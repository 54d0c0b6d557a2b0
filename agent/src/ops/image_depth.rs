//! How far the parts of an image are.
//!
//! *Shapes:* the model takes one image ([`super::vision`]) and gives a number for each part, `[1, rows, columns]` with
//! or without an axis of one channel. The map that comes back has the model's rows and columns, without those beside
//! the image. *Units:* the model's own: distances, or what grows the nearer something is; the area is in pixels of the
//! image. *Errors:* as those of `image_segmentation`. *Source:* vAccel's `image_depth`; maps as MiDaS, DPT, Depth
//! Anything and monodepth give them.

use bytes::Bytes;
use image::Rgb;
use serde::Deserialize;
use vaccel_proto::Error;
use vaccel_proto::v1::{Area, DType, ImageDepthReply, ImageDepthRequest, Tensor};

use super::vision::{self, Canvas, Covered, Description, Grid, Placed, Sight, check_picture};
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

/// Name of the map.
const MAP: &str = "depth";

/// How much of the picture is the map, of 256: all of it.
const TINT: u16 = 256;

impl Operation for ImageDepthRequest {
    const NAME: &'static str = "image_depth";
    const SUMMARY: &'static str = "tell how far the parts of an image are";
    type Reply = ImageDepthReply;

    fn validate(&self) -> Result<(), Error> {
        check_picture(self.picture)
    }

    fn dummy(self, context: &Context<'_>) -> Result<ImageDepthReply, Error> {
        let image_name = vision::dummy(context, &self.model)?;
        let (area, maps) = (Some(Area::default()), vec![vision::map(MAP, DType::F32, [0, 0], Bytes::new())]);
        Ok(ImageDepthReply { image_name, area, maps, ..ImageDepthReply::default() })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<ImageDepthReply>, Error> {
        let seen = vision::look::<Depth>(context, &self.model, self.image, self.picture, ()).await?;
        Ok(seen.map(|seen| {
            let Distances { numbers, shape, area } = seen.found;
            let data: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            ImageDepthReply {
                image_name: seen.image_name,
                picture: seen.picture,
                area: Some(area),
                maps: vec![vision::map(MAP, DType::F32, shape, Bytes::from(data))],
            }
        }))
    }
}

/// What a model says of its map.
#[derive(Debug, Deserialize)]
struct Depth {
    #[serde(default = "vision::first")]
    output: String,
    /// What is near has these numbers, and is bright in the picture.
    #[serde(default)]
    near: Near,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Near {
    /// As of models that were trained without knowing distances.
    #[default]
    Large,
    /// As of distances.
    Small,
}

/// A number for each part of an area.
struct Distances {
    numbers: Vec<f32>,
    shape: [usize; 2],
    area: Area,
}

impl Sight for Depth {
    const NAME: &'static str = ImageDepthRequest::NAME;
    type Wish = ();
    type Found = Distances;

    fn read(description: &mut Description<'_>) -> Result<Self, String> {
        description.part()
    }

    fn outputs(&self) -> Vec<String> {
        vec![self.output.clone()]
    }

    fn find(&self, outputs: &[Tensor], placed: &Placed, (): &(), _: &Cancel) -> Result<Distances, Error> {
        let grid = Grid::of(&outputs[0], &[1])?;
        let covered = Covered::new(placed, grid.rows, grid.columns);
        let numbers = covered.parts().map(|(row, column)| grid.at(0, row, column)).collect();
        Ok(Distances { numbers, shape: covered.shape(), area: covered.area })
    }

    fn draw(&self, found: &Distances, canvas: &mut Canvas) {
        let finite = || found.numbers.iter().copied().filter(|number| number.is_finite());
        let (least, most) =
            (finite().fold(f32::INFINITY, f32::min), finite().fold(f32::NEG_INFINITY, f32::max));
        let range = (most - least).max(f32::MIN_POSITIVE);
        canvas.tint(&found.area, found.shape, |row, column| {
            let along = (found.numbers[row * found.shape[1] + column] - least) / range;
            let near = if self.near == Near::Large { along } else { 1.0 - along };
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
            let bright = (near * 255.0).round() as u8;
            (TINT, Rgb([bright; 3]))
        });
    }
}
