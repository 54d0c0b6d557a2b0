//! What models see in images.

use bytes::Bytes;
use vaccel_proto::Error;
use vaccel_proto::v1::run_reply::Outcome;
use vaccel_proto::v1::run_request::Op;
use vaccel_proto::v1::{
    Area, DType, Detection, ImageDepthRequest, ImageDetectionRequest, ImagePoseRequest,
    ImageSegmentationRequest, NamedTensor, Picture, Pose, Segment, Tensor,
};

use crate::session::{Resource, Session, malformed};

/// Axes of a map: rows and columns.
const MAP_RANK: usize = 2;

/// What is wanted of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ImageOptions {
    /// Least probability of what is found, above 0 and at most 1; 0 for what the model's description says. Classes and
    /// distances heed neither this nor the number.
    pub threshold: f32,
    /// Most things or bodies, the most probable ones; 0 for 100.
    pub at_most: u32,
    /// Whether the picture comes, too: the image with what was found drawn into it.
    pub picture: bool,
}

impl ImageOptions {
    fn picture(self) -> i32 {
        if self.picture { Picture::Reply.into() } else { Picture::None.into() }
    }

    /// A picture as it came. The engine `noop` has none, but a name for it.
    fn pictured(self, operation: &str, picture: Bytes, name: &str) -> Result<Option<Bytes>, Error> {
        if self.picture && picture.is_empty() && name.is_empty() {
            return Err(malformed(operation));
        }
        Ok(Some(picture).filter(|picture| self.picture && !picture.is_empty()))
    }
}

/// Things that were found.
#[derive(Clone, Debug, PartialEq)]
pub struct Detected {
    /// The most probable first, each with its label and its area.
    pub detections: Vec<Detection>,
    /// A JPEG file, if it was asked for.
    pub picture: Option<Bytes>,
}

/// What the parts of an image are.
#[derive(Clone, Debug, PartialEq)]
pub struct Segmented {
    /// The classes that there are, the largest first.
    pub segments: Vec<Segment>,
    /// What of the image `classes` is of, in its pixels.
    pub area: Area,
    /// u8[rows, columns].
    pub classes: Tensor,
    /// A JPEG file, if it was asked for.
    pub picture: Option<Bytes>,
}

/// Bodies that were found.
#[derive(Clone, Debug, PartialEq)]
pub struct Posed {
    /// The most probable first, each with its label, its area and all of its points.
    pub poses: Vec<Pose>,
    /// A JPEG file, if it was asked for.
    pub picture: Option<Bytes>,
}

/// How far the parts of an image are.
#[derive(Clone, Debug, PartialEq)]
pub struct Depth {
    /// What of the image `depth` is of, in its pixels.
    pub area: Area,
    /// f32[rows, columns], in the model's own unit.
    pub depth: Tensor,
    /// A JPEG file, if it was asked for.
    pub picture: Option<Bytes>,
}

/// How a request names a model; not at all, for the agent's own of the operation.
fn id(model: Option<&Resource>) -> String {
    model.map(|model| model.id().to_owned()).unwrap_or_default()
}

/// The only map of a reply, with rows and columns of this type.
fn map(operation: &str, dtype: DType, maps: Vec<NamedTensor>) -> Result<Tensor, Error> {
    let [NamedTensor { tensor: Some(map), .. }] =
        <[_; 1]>::try_from(maps).map_err(|_| malformed(operation))?
    else {
        return Err(malformed(operation));
    };
    let is_map = map.dtype() == dtype && map.shape.len() == MAP_RANK && map.check("maps[0]").is_ok();
    // The pad served its purpose, and equal results are to be equal.
    if is_map { Ok(Tensor { pad: Bytes::new(), ..map }) } else { Err(malformed(operation)) }
}

impl Session {
    /// Finds things in a PNG or JPEG file, with a model of the session that describes how, or with `None` with the
    /// agent's own for the operation. Places are in pixels of the image, from its upper left corner, probabilities in
    /// [0, 1].
    ///
    /// # Errors
    /// `BAD_ARGUMENT` for a file that is no image, a threshold or a number, `MODEL_REJECTED` for a model that does not
    /// describe this, and those of [`Session::classify`].
    pub async fn detect<'a>(
        &self,
        model: impl Into<Option<&'a Resource>>,
        image: Bytes,
        options: ImageOptions,
    ) -> Result<Detected, Error> {
        const NAME: &str = "image_detection";
        let (model, picture) = (id(model.into()), options.picture());
        let ImageOptions { threshold, at_most, .. } = options;
        let request = ImageDetectionRequest { model, image, threshold, at_most, picture };
        let Some(Outcome::ImageDetection(reply)) = self.operate(Op::ImageDetection(request)).await?.outcome
        else {
            return Err(malformed(NAME));
        };
        if reply.detections.iter().any(|found| found.label.is_none() || found.area.is_none()) {
            return Err(malformed(NAME));
        }
        let picture = options.pictured(NAME, reply.picture, &reply.image_name)?;
        Ok(Detected { detections: reply.detections, picture })
    }

    /// Tells what each part of a PNG or JPEG file is, with a model of the session that describes how.
    ///
    /// # Errors
    /// Those of [`Session::detect`].
    pub async fn segment<'a>(
        &self,
        model: impl Into<Option<&'a Resource>>,
        image: Bytes,
        options: ImageOptions,
    ) -> Result<Segmented, Error> {
        const NAME: &str = "image_segmentation";
        let (model, picture) = (id(model.into()), options.picture());
        let op = Op::ImageSegmentation(ImageSegmentationRequest { model, image, picture });
        let Some(Outcome::ImageSegmentation(reply)) = self.operate(op).await?.outcome else {
            return Err(malformed(NAME));
        };
        let area = reply.area.ok_or_else(|| malformed(NAME))?;
        let classes = map(NAME, DType::U8, reply.maps)?;
        let picture = options.pictured(NAME, reply.picture, &reply.image_name)?;
        Ok(Segmented { segments: reply.segments, area, classes, picture })
    }

    /// Finds bodies in a PNG or JPEG file, and where their points are, with a model of the session that describes how.
    ///
    /// # Errors
    /// Those of [`Session::detect`].
    pub async fn pose<'a>(
        &self,
        model: impl Into<Option<&'a Resource>>,
        image: Bytes,
        options: ImageOptions,
    ) -> Result<Posed, Error> {
        const NAME: &str = "image_pose";
        let (model, picture) = (id(model.into()), options.picture());
        let ImageOptions { threshold, at_most, .. } = options;
        let op = Op::ImagePose(ImagePoseRequest { model, image, threshold, at_most, picture });
        let Some(Outcome::ImagePose(reply)) = self.operate(op).await?.outcome else {
            return Err(malformed(NAME));
        };
        if reply.poses.iter().any(|found| found.label.is_none() || found.area.is_none()) {
            return Err(malformed(NAME));
        }
        let picture = options.pictured(NAME, reply.picture, &reply.image_name)?;
        Ok(Posed { poses: reply.poses, picture })
    }

    /// Tells how far the parts of a PNG or JPEG file are, with a model of the session that describes how.
    ///
    /// # Errors
    /// Those of [`Session::detect`].
    pub async fn depth<'a>(
        &self,
        model: impl Into<Option<&'a Resource>>,
        image: Bytes,
        options: ImageOptions,
    ) -> Result<Depth, Error> {
        const NAME: &str = "image_depth";
        let (model, picture) = (id(model.into()), options.picture());
        let op = Op::ImageDepth(ImageDepthRequest { model, image, picture });
        let Some(Outcome::ImageDepth(reply)) = self.operate(op).await?.outcome else {
            return Err(malformed(NAME));
        };
        let area = reply.area.ok_or_else(|| malformed(NAME))?;
        let depth = map(NAME, DType::F32, reply.maps)?;
        let picture = options.pictured(NAME, reply.picture, &reply.image_name)?;
        Ok(Depth { area, depth, picture })
    }
}
