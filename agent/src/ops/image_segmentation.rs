//! What each part of an image is.
//!
//! *Shapes:* the model takes one image ([`super::vision`]) and gives scores `[1, classes, rows, columns]` or `[1, rows,
//! columns, classes]`, of which the highest decides; or the classes themselves, in whole numbers `[1, rows, columns]`;
//! or with two classes how probable the second is. The map that comes back has the model's rows and columns, without
//! those beside the image. *Units:* shares of the area that the map is of, which is in pixels of the image. *Errors:*
//! `BAD_ARGUMENT` for the image, `MODEL_REJECTED` for a model that does not describe this, `QUOTA_EXCEEDED` where a
//! picture becomes a resource. *Source:* vAccel's `image_segmentation`; maps as FCN, DeepLab, U-Net and SegFormer give
//! them.

use bytes::Bytes;
use serde::Deserialize;
use vaccel_proto::v1::{Area, DType, ImageSegmentationReply, ImageSegmentationRequest, Segment, Tensor};
use vaccel_proto::{Error, Reason};

use super::vision::{
    self, Activation, Canvas, Covered, Description, Grid, Placed, Sight, check_names, check_picture,
};
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

/// Classes: a map has a byte for each part. The largest sets in use have 150.
const CLASSES_MAX: usize = 256;

/// Name of the map.
const MAP: &str = "classes";

/// How much of a class's color the picture has, of 256.
const TINT: u16 = 128;

impl Operation for ImageSegmentationRequest {
    const NAME: &'static str = "image_segmentation";
    const SUMMARY: &'static str = "tell what each part of an image is";
    type Reply = ImageSegmentationReply;

    fn validate(&self) -> Result<(), Error> {
        check_picture(self.picture)
    }

    fn dummy(self, context: &Context<'_>) -> Result<ImageSegmentationReply, Error> {
        let image_name = vision::dummy(context, &self.model)?;
        let (area, maps) = (Some(Area::default()), vec![vision::map(MAP, DType::U8, [0, 0], Bytes::new())]);
        Ok(ImageSegmentationReply { image_name, area, maps, ..ImageSegmentationReply::default() })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<ImageSegmentationReply>, Error> {
        let seen = vision::look::<Classes>(context, &self.model, self.image, self.picture, ()).await?;
        Ok(seen.map(|seen| {
            let Parts { classes, shape, area, segments } = seen.found;
            ImageSegmentationReply {
                image_name: seen.image_name,
                segments,
                picture: seen.picture,
                area: Some(area),
                maps: vec![vision::map(MAP, DType::U8, shape, Bytes::from(classes))],
            }
        }))
    }
}

/// What a model says of its map.
#[derive(Debug, Deserialize)]
struct Classes {
    /// Names of the classes, in the model's order; what has an empty one is told and not colored.
    labels: Vec<String>,
    #[serde(default = "vision::first")]
    output: String,
    #[serde(default)]
    activation: Activation,
}

/// A class for each part of an area.
struct Parts {
    classes: Vec<u8>,
    shape: [usize; 2],
    area: Area,
    segments: Vec<Segment>,
}

impl Classes {
    /// The class of a part, as far as the numbers tell.
    fn class(&self, grid: &Grid<'_>, is_class: bool, row: usize, column: usize) -> f32 {
        #[allow(clippy::cast_precision_loss, reason = "at most 256")]
        if grid.channels > 1 {
            let number = |class: &usize| grid.at(*class, row, column);
            (0..grid.channels).max_by(|a, b| number(a).total_cmp(&number(b))).unwrap_or(0) as f32
        } else if is_class {
            grid.at(0, row, column)
        } else {
            f32::from(u8::from(self.activation.of(grid.at(0, row, column)) > 0.5))
        }
    }

    fn segments(&self, classes: &[u8]) -> Vec<Segment> {
        let mut counts = [0_usize; CLASSES_MAX];
        classes.iter().for_each(|class| counts[usize::from(*class)] += 1);
        let named = (0..).zip(&self.labels).zip(counts).filter(|(_, count)| *count > 0);
        #[allow(clippy::cast_precision_loss, reason = "a share")]
        let segment = |((index, name), count): ((u32, &String), usize)| {
            let share = count as f32 / classes.len() as f32;
            Segment { index, name: name.clone(), share }
        };
        let mut segments: Vec<Segment> = named.map(segment).collect();
        segments.sort_by(|a, b| b.share.total_cmp(&a.share));
        segments
    }
}

impl Sight for Classes {
    const NAME: &'static str = ImageSegmentationRequest::NAME;
    type Wish = ();
    type Found = Parts;

    fn read(description: &mut Description<'_>) -> Result<Self, String> {
        let classes: Self = description.part()?;
        check_names("labels", &classes.labels)?;
        if !(2..=CLASSES_MAX).contains(&classes.labels.len()) {
            return Err(format!("labels: expected 2 to {CLASSES_MAX}, got {}", classes.labels.len()));
        }
        Ok(classes)
    }

    fn outputs(&self) -> Vec<String> {
        vec![self.output.clone()]
    }

    fn find(&self, outputs: &[Tensor], placed: &Placed, (): &(), cancel: &Cancel) -> Result<Parts, Error> {
        let is_class = outputs[0].dtype() != DType::F32;
        let labels = self.labels.len();
        let channels: &[usize] = match (is_class, labels) {
            (true, _) => &[1],
            (false, 2) => &[2, 1],
            (false, _) => &[labels],
        };
        let grid = Grid::of(&outputs[0], channels)?;
        let covered = Covered::new(placed, grid.rows, grid.columns);
        let mut classes = Vec::with_capacity(covered.shape().iter().product());
        for (row, column) in covered.parts() {
            if column == covered.columns.start {
                cancel.check()?;
            }
            let class = self.class(&grid, is_class, row, column);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked here")]
            let known = (class >= 0.0).then_some(class as usize).filter(|class| *class < labels);
            let Some(class) = known.and_then(|class| u8::try_from(class).ok()) else {
                let message = format!("this model gives class {class} and names {labels} labels");
                return Err(Error::new(Reason::ModelRejected, message));
            };
            classes.push(class);
        }
        let segments = self.segments(&classes);
        Ok(Parts { classes, shape: covered.shape(), area: covered.area, segments })
    }

    fn draw(&self, found: &Parts, canvas: &mut Canvas) {
        let colors: Vec<_> = (0..).zip(&self.labels).map(|(class, _)| vision::color(class)).collect();
        canvas.tint(&found.area, found.shape, |row, column| {
            let class = usize::from(found.classes[row * found.shape[1] + column]);
            let much = if self.labels[class].is_empty() { 0 } else { TINT };
            (much, colors[class])
        });
    }
}
