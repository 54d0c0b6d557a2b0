//! Operations of vAccel that are known by name and not served yet: only the `noop` engine answers them.
//!
//! *Errors:* `UNKNOWN_OPERATION` with that reason. *Source:* vAccel's `image_detection`, `image_segmentation`,
//! `image_pose` and `image_depth`.

use vaccel_proto::v1::{
    ImageDepthReply, ImageDepthRequest, ImageDetectionReply, ImageDetectionRequest, ImagePoseReply,
    ImagePoseRequest, ImageSegmentationReply, ImageSegmentationRequest, ResourceKind,
};
use vaccel_proto::{Error, Reason};

use super::{Context, Operation};
use crate::scheduler::Timed;

/// The image that vAccel's noop plugin makes of every image.
pub(super) const DUMMY_IMAGE: &str = "This is a dummy imgname!";

fn not_served<T>(name: &str) -> Result<T, Error> {
    let message = format!("{name} is not served by this version of the agent; `vaccel ops` lists what is");
    Err(Error::new(Reason::UnknownOperation, message))
}

macro_rules! images {
    ($($request:ident, $reply:ident, $name:literal, $summary:literal;)*) => { $(
        impl Operation for $request {
            const NAME: &'static str = $name;
            const SUMMARY: &'static str = concat!($summary, " (not served yet)");
            type Reply = $reply;

            fn validate(&self) -> Result<(), Error> {
                Ok(())
            }

            fn dummy(self, context: &Context<'_>) -> Result<$reply, Error> {
                if !self.model.is_empty() {
                    context.resource("model", &self.model, ResourceKind::Model)?;
                }
                Ok($reply { image_name: DUMMY_IMAGE.into() })
            }

            async fn execute(self, _: &Context<'_>) -> Result<Timed<$reply>, Error> {
                not_served(Self::NAME)
            }
        }
    )* };
}

images! {
    ImageDetectionRequest, ImageDetectionReply, "image_detection", "find things in images";
    ImageSegmentationRequest, ImageSegmentationReply, "image_segmentation", "divide images into things";
    ImagePoseRequest, ImagePoseReply, "image_pose", "find how bodies stand in images";
    ImageDepthRequest, ImageDepthReply, "image_depth", "tell distances in images";
}
