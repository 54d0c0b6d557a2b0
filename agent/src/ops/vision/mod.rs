//! What the operations on images share: a model says in JSON how an image becomes its input and what its outputs mean;
//! an image goes through it; what was found is told, and drawn into a picture if somebody wants to look at it.
//!
//! The description is in the model's metadata property `vaccel.OPERATION`, or in a file `OPERATION.json` of its
//! resource; the file wins. Places in images are in their own pixels, from the upper left corner, as the image is
//! looked at.

mod describe;
mod file;
mod input;
mod map;
mod picture;
mod rows;
mod table;

use std::any::Any;
use std::sync::Arc;

use bytes::Bytes;
use vaccel_proto::limits::MESSAGE_BYTES_MAX;
use vaccel_proto::v1::{DType, NamedTensor, Picture, ResourceKind, Tensor};
use vaccel_proto::{Error, Reason};

use super::Context;
use super::ports::choose_named;
use crate::backend::Model;
use crate::scheduler::{Cancel, Timed};

pub(super) use describe::{Description, check_names, read};
pub(super) use file::check_pixels;
pub(super) use input::{ImageInput, Placed};
pub(super) use map::{Covered, Grid};
pub(super) use picture::{Canvas, color};
pub(super) use rows::{Activation, Found, Rows, Wish, check_wish};
pub(super) use table::numbers;

/// The image that vAccel's noop plugin makes of every image.
pub(super) const DUMMY_IMAGE: &str = "This is a dummy imgname!";

/// What a model sees in an image.
pub(super) trait Sight: Any + Send + Sync + Sized {
    /// The operation.
    const NAME: &'static str;
    /// What a call asks for.
    type Wish: Send + 'static;
    /// What it gets.
    type Found: Send + 'static;

    /// Reads what the model says of its outputs, and checks it.
    ///
    /// # Errors
    /// What is wrong with it.
    fn read(description: &mut Description<'_>) -> Result<Self, String>;

    /// The outputs that are looked at, by name or as `#0`, each once.
    fn outputs(&self) -> Vec<String>;

    /// What the outputs, in that order, say of the image.
    ///
    /// # Errors
    /// `MODEL_REJECTED` for outputs that are not as described.
    fn find(
        &self,
        outputs: &[Tensor],
        placed: &Placed,
        wish: &Self::Wish,
        cancel: &Cancel,
    ) -> Result<Self::Found, Error>;

    /// Draws it.
    fn draw(&self, found: &Self::Found, canvas: &mut Canvas);
}

/// What a call gives back.
pub(super) struct Seen<F> {
    pub(super) found: F,
    /// Empty unless it comes with the reply.
    pub(super) picture: Bytes,
    /// The picture's resource; empty where it is none.
    pub(super) image_name: String,
}

/// A model that sees something.
struct Seer<S> {
    input: ImageInput,
    sight: S,
    /// Places of the outputs.
    outputs: Vec<usize>,
}

impl<S: Sight> Seer<S> {
    fn of(model: &Model) -> Result<Self, Error> {
        let refuse = |why: String| Error::new(Reason::ModelRejected, why);
        let (input, sight) = describe::read(&model.file, S::NAME, S::read)?;
        if let Some(Some(rows)) = model.file.inputs[0].shape.as_ref().map(|shape| shape[0])
            && rows != 1
        {
            return Err(refuse(format!("expected a model that takes 1 image, this one takes {rows}")));
        }
        let outputs = choose_named(&model.file.outputs, &sight.outputs()).map_err(|error| {
            refuse(format!("the description of this model is wrong: {}", error.message()))
        })?;
        Ok(Self { input, sight, outputs })
    }

    fn look(
        &self,
        model: &Model,
        file: &Bytes,
        wish: &S::Wish,
        wants_picture: bool,
        cancel: &Cancel,
    ) -> Result<(S::Found, Bytes), Error> {
        file::pixels("image", file)?;
        let image = file::decode("image", file)?;
        let mut canvas = wants_picture.then(|| Canvas::new(&image, cancel));
        let (input, placed) = self.input.place(image, model.file.inputs[0].dtype)?;
        cancel.check()?;
        let outputs = model.program.run(vec![input], &self.outputs, MESSAGE_BYTES_MAX as u64, cancel)?;
        let found = self.sight.find(&outputs, &placed, wish, cancel)?;
        let Some(canvas) = &mut canvas else { return Ok((found, Bytes::new())) };
        cancel.check()?;
        self.sight.draw(&found, canvas);
        cancel.check()?;
        Ok((found, canvas.encode()?))
    }
}

/// Looks at an image with a model of the session.
pub(super) async fn look<S: Sight>(
    context: &Context<'_>,
    model: &str,
    image: Bytes,
    picture: i32,
    wish: S::Wish,
) -> Result<Timed<Seen<S::Found>>, Error> {
    let picture = Picture::try_from(picture).unwrap_or_default();
    // Where a call names none, the host may have one for the operation.
    let found = context.model(if model.is_empty() { S::NAME } else { model }).await;
    let (model, loading) = found.map_err(|error| match error.reason() {
        Reason::NotFound if model.is_empty() => {
            let expected =
                format!("a resource of the session, as the agent has no model {} of its own", S::NAME);
            Error::field("model", expected, "none")
        }
        _ => error,
    })?;
    let looking = {
        let model = Arc::clone(&model);
        // A description can be long, and is read here, too.
        move |cancel: &Cancel| {
            let seer = model.note(Seer::<S>::of)?;
            seer.look(&model, &image, &wish, picture != Picture::None, cancel)
        }
    };
    let mut seen = context.compute_on(&model, looking).await?;
    seen.spans.run += loading;
    let (drawn, mut image_name) = (seen.value.1.clone(), String::new());
    if picture == Picture::Resource {
        image_name = keep(context, S::NAME, drawn.clone()).await?;
    }
    let picture = if picture == Picture::Reply { drawn } else { Bytes::new() };
    Ok(seen.map(|(found, _)| Seen { found, picture, image_name }))
}

/// Makes a picture a resource of the session; returns its name.
async fn keep(context: &Context<'_>, name: &str, picture: Bytes) -> Result<String, Error> {
    let holdings = &context.session.holdings;
    let files = vec![(format!("{name}.jpg"), picture)];
    let (tenant, account) = (context.tenant, context.account);
    let resource = context.store.add(tenant, holdings, account, ResourceKind::Data, files).await?;
    holdings.made(resource.id.clone());
    Ok(resource.id.clone())
}

/// The output that is read unless a description names one.
pub(super) fn first() -> String {
    "#0".into()
}

/// A map of a reply, in rows and columns.
pub(super) fn map(name: &str, dtype: DType, shape: [usize; 2], data: Bytes) -> NamedTensor {
    let shape = shape.map(|side| i64::try_from(side).unwrap_or(i64::MAX));
    NamedTensor { name: name.into(), tensor: Some(Tensor::from_bytes(dtype, &shape, data)) }
}

/// Checks what all of these operations take.
pub(super) fn check_picture(picture: i32) -> Result<(), Error> {
    if Picture::try_from(picture).is_err() {
        return Err(Error::field("picture", "NONE, REPLY or RESOURCE", picture));
    }
    Ok(())
}

/// What the `noop` engine answers: the name of an image.
pub(super) fn dummy(context: &Context<'_>, model: &str) -> Result<String, Error> {
    if !model.is_empty() {
        context.resource("model", model, ResourceKind::Model)?;
    }
    Ok(DUMMY_IMAGE.into())
}
