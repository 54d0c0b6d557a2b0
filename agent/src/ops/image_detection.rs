//! Things in an image: what each is, how probably, and the box that it is in.
//!
//! *Shapes:* the model takes one image ([`super::vision`]) and gives a row for each thing that may be there, `[1, rows,
//! columns]` or `[1, columns, rows]`, with what a row consists of in its description; scores and classes may be outputs
//! of their own. *Units:* boxes in pixels of the image, probabilities in [0, 1]. Of boxes of one class that overlap the
//! most probable one is found. *Errors:* `BAD_ARGUMENT` for the image, the threshold and the number, `MODEL_REJECTED`
//! for a model that is not a described detector, `QUOTA_EXCEEDED` where a picture becomes a resource. *Source:*
//! vAccel's `image_detection`; rows as YOLO 5 to 11, SSD, Faster R-CNN and DETR export them.

use vaccel_proto::Error;
use vaccel_proto::v1::{Detection, ImageDetectionReply, ImageDetectionRequest, Tensor};

use super::vision::{self, Canvas, Description, Found, Placed, Rows, Sight, Wish, check_picture, check_wish};
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

/// Things that a call can ask for: a reply of them is far shorter than a message.
const AT_MOST_MAX: usize = 1000;

impl Operation for ImageDetectionRequest {
    const NAME: &'static str = "image_detection";
    const SUMMARY: &'static str = "find things in an image";
    type Reply = ImageDetectionReply;

    fn validate(&self) -> Result<(), Error> {
        check_picture(self.picture)?;
        check_wish(self.threshold, self.at_most, AT_MOST_MAX).map(drop)
    }

    fn dummy(self, context: &Context<'_>) -> Result<ImageDetectionReply, Error> {
        let image_name = vision::dummy(context, &self.model)?;
        Ok(ImageDetectionReply { image_name, ..ImageDetectionReply::default() })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<ImageDetectionReply>, Error> {
        let wish = check_wish(self.threshold, self.at_most, AT_MOST_MAX)?;
        let seen = vision::look::<Detector>(context, &self.model, self.image, self.picture, wish).await?;
        Ok(seen.map(|seen| {
            let detection = |Found { label, area, .. }| Detection { label: Some(label), area: Some(area) };
            let detections = seen.found.into_iter().map(detection).collect();
            ImageDetectionReply { image_name: seen.image_name, detections, picture: seen.picture }
        }))
    }
}

/// What a detector says of its rows.
struct Detector(Rows);

impl Sight for Detector {
    const NAME: &'static str = ImageDetectionRequest::NAME;
    type Wish = Wish;
    type Found = Vec<Found>;

    fn read(description: &mut Description<'_>) -> Result<Self, String> {
        let rows: Rows = description.part()?;
        rows.check(false)?;
        Ok(Self(rows))
    }

    fn outputs(&self) -> Vec<String> {
        self.0.outputs()
    }

    fn find(
        &self,
        outputs: &[Tensor],
        placed: &Placed,
        wish: &Wish,
        cancel: &Cancel,
    ) -> Result<Vec<Found>, Error> {
        self.0.find(outputs, 0, placed, wish, cancel)
    }

    fn draw(&self, found: &Vec<Found>, canvas: &mut Canvas) {
        // The most probable last, above the others.
        for Found { label, area, .. } in found.iter().rev() {
            canvas.outline(area, vision::color(label.index));
        }
    }
}
