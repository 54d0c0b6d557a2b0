//! Labels for images: PNG or JPEG files in, the best classes of each out.
//!
//! *Shapes:* the model takes one input `[n, c, h, w]` or `[n, h, w, c]` made from the files as it describes itself
//! ([`super::vision`]), and gives `[n, classes]` first. *Units:* probabilities in [0, 1], summing to 1 over all
//! classes. *Errors:* `BAD_ARGUMENT` naming the image, `MODEL_REJECTED` for a model that is not a described classifier.
//! *Source:* vAccel's `image_classification`; softmax for models that give logits.

use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use vaccel_proto::limits::{IMAGES_PER_CALL_MAX, MESSAGE_BYTES_MAX};
use vaccel_proto::v1::{
    Classification, ImageClassificationReply, ImageClassificationRequest, Label, ResourceKind, Tensor,
};
use vaccel_proto::{Error, Reason};

use super::vision::{self, Description, ImageInput, check_pixels};
use super::{Context, EMBEDDED_MODEL, EMBEDDED_NAME, Operation};
use crate::backend::{Asked, Choice, Engines, Model, ModelFile, Origin, RunRules};
use crate::scheduler::{Cancel, Timed};

/// Images that run together. All batches are powers of two, so that an engine that plans by shape needs few plans.
const BATCH_MAX: usize = 32;

/// What vAccel's noop plugin sees on every image.
const DUMMY_TAG: &str = "This is a dummy classification tag!";

impl Operation for ImageClassificationRequest {
    const NAME: &'static str = "image_classification";
    const SUMMARY: &'static str = "label PNG or JPEG images";
    type Reply = ImageClassificationReply;

    fn validate(&self) -> Result<(), Error> {
        if self.images.is_empty() || self.images.len() > IMAGES_PER_CALL_MAX {
            return Err(Error::field(
                "images",
                format!("1 to {IMAGES_PER_CALL_MAX} files"),
                self.images.len(),
            ));
        }
        Ok(())
    }

    fn dummy(self, context: &Context<'_>) -> Result<ImageClassificationReply, Error> {
        if !self.model.is_empty() {
            context.resource("model", &self.model, ResourceKind::Model)?;
        }
        let label = Label { index: 0, name: DUMMY_TAG.into(), probability: 1.0 };
        let classification = Classification { labels: vec![label] };
        Ok(ImageClassificationReply { classifications: vec![classification; self.images.len()] })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<ImageClassificationReply>, Error> {
        let (model, loading) = context.model(&self.model).await?;
        let top_k = usize::try_from(self.top_k.max(1)).unwrap_or(usize::MAX);
        let images = self.images;
        let classifying = {
            let model = Arc::clone(&model);
            // A description can be long, and is read here, too.
            move |cancel: &Cancel| Classifier::new(model)?.classify(&images, top_k, cancel)
        };
        let mut ran = context.compute_on(&model, classifying).await?;
        ran.spans.run += loading;
        Ok(ran.map(|classifications| ImageClassificationReply { classifications }))
    }
}

/// A loaded model that says how images become its input, and what its output is.
#[derive(Debug)]
pub(crate) struct Classifier {
    model: Arc<Model>,
    described: Arc<(ImageInput, Classes)>,
}

/// What a model says of its classes.
#[derive(Clone, Debug, Deserialize)]
struct Classes {
    #[serde(default)]
    scores: Scores,
    /// Their names, in the order of the output.
    labels: Vec<String>,
}

/// What the model's output is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Scores {
    /// Softmax makes probabilities of it.
    #[default]
    Logits,
    Probabilities,
}

impl Classes {
    fn read(description: &mut Description<'_>) -> Result<Self, String> {
        let classes: Self = description.part()?;
        if classes.labels.is_empty() { Err("labels: expected at least one".into()) } else { Ok(classes) }
    }
}

impl Classifier {
    fn new(model: Arc<Model>) -> Result<Self, Error> {
        let name = ImageClassificationRequest::NAME;
        let described = model.note(|model| vision::read(&model.file, name, Classes::read))?;
        Ok(Self { model, described })
    }

    /// The embedded one, outside of any call.
    pub(crate) fn embedded(engines: &Engines, choice: &Choice) -> Result<Self, Error> {
        let files = [(EMBEDDED_NAME, Bytes::from_static(EMBEDDED_MODEL))];
        let file = ModelFile::scan(&files, Origin::Host)?;
        let asked = Asked { rules: &RunRules::default(), account: None };
        let model = engines.load(choice, file, &asked, &Cancel::default())?;
        Self::new(Arc::new(model))
    }

    /// The best classes of each image.
    pub(crate) fn classify(
        &self,
        images: &[Bytes],
        top_k: usize,
        cancel: &Cancel,
    ) -> Result<Vec<Classification>, Error> {
        check_pixels(images)?;
        let size_max = match self.model.file.inputs[0].shape.as_ref().and_then(|shape| shape[0]) {
            None => BATCH_MAX,
            Some(1) => 1,
            Some(fixed) => {
                let expected = "expected a model that takes 1 image or any number";
                return Err(Error::new(Reason::ModelRejected, format!("{expected}, this one takes {fixed}")));
            }
        };
        let (input, classes) = &*self.described;
        let dtype = self.model.file.inputs[0].dtype;
        let mut classifications = Vec::with_capacity(images.len());
        let mut rest = images;
        while let Some(whole) = rest.len().checked_ilog2() {
            let (files, after) = rest.split_at(size_max.min(1 << whole));
            rest = after;
            let tensor = input.tensor(files, classifications.len(), dtype, cancel)?;
            let outputs = self.model.program.run(vec![tensor], &[0], MESSAGE_BYTES_MAX as u64, cancel)?;
            for scores in rows(&outputs[0], files.len())? {
                classifications.push(best(scores, classes, top_k)?);
            }
        }
        Ok(classifications)
    }
}

/// The scores of each image.
fn rows(output: &Tensor, images: usize) -> Result<Vec<Vec<f32>>, Error> {
    let refuse = || {
        let expected =
            format!("expected scores f32[{images}, classes], this model gives {}", output.signature());
        Error::new(Reason::ModelRejected, expected)
    };
    let elements = output.elements::<f32>().map_err(|_| refuse())?;
    let classes = elements.len() / images.max(1);
    let leading = output.shape.first().and_then(|first| usize::try_from(*first).ok());
    if leading != Some(images) || classes == 0 {
        return Err(refuse());
    }
    Ok(elements.chunks_exact(classes).map(<[f32]>::to_vec).collect())
}

/// The classes with the highest scores, best first; equal scores in the order of the model.
fn best(scores: Vec<f32>, classes: &Classes, top_k: usize) -> Result<Classification, Error> {
    if scores.len() != classes.labels.len() {
        let message =
            format!("this model gives {} scores and names {} labels", scores.len(), classes.labels.len());
        return Err(Error::new(Reason::ModelRejected, message));
    }
    if scores.iter().any(|score| !score.is_finite()) {
        return Err(Error::new(
            Reason::BackendFailed,
            "the model gave scores that are not numbers for this image",
        ));
    }
    // By score: probabilities of very unlikely classes are all 0.
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let probabilities = match classes.scores {
        Scores::Logits => softmax(&scores),
        Scores::Probabilities => scores,
    };
    let labels = order.into_iter().take(top_k).map(|index| Label {
        index: u32::try_from(index).unwrap_or(u32::MAX),
        name: classes.labels[index].clone(),
        probability: probabilities[index],
    });
    Ok(Classification { labels: labels.collect() })
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = scores.iter().map(|score| (score - highest).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes(scores: &str) -> Classes {
        let json = format!(r#"{{"scores":"{scores}","labels":["a","b","c"]}}"#);
        serde_json::from_str(&json).expect("valid")
    }

    #[test]
    fn labels_are_best_first_and_probabilities_sum_to_one() {
        let found = best(vec![1.0, 1000.0, 2.0], &classes("logits"), 9).expect("valid");
        let names: Vec<_> = found.labels.iter().map(|label| label.name.as_str()).collect();
        assert_eq!(names, ["b", "c", "a"]);
        let sum: f32 = found.labels.iter().map(|label| label.probability).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        let found = best(vec![0.5, 0.2, 0.5], &classes("probabilities"), 2).expect("valid");
        assert_eq!(found.labels.iter().map(|label| label.index).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn scores_that_do_not_fit_are_refused() {
        assert!(best(vec![1.0], &classes("logits"), 1).is_err());
        assert!(best(vec![f32::NAN, 0.0, 0.0], &classes("logits"), 1).is_err());
        let output = Tensor::new(&[3, 2], &[0.0_f32; 6]).expect("valid");
        assert!(rows(&output, 2).is_err());
        assert_eq!(rows(&output, 3).expect("fits").len(), 3);
    }
}
