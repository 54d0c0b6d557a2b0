//! Outputs that are tables: a row for each thing that may be there, with its box, how probable it is, and what it is.

use std::borrow::Cow;

use serde::Deserialize;
use vaccel_proto::v1::{Area, Label, Tensor};
use vaccel_proto::{Error, Reason};

use super::Placed;
use super::describe::check_names;
use super::table::Table;
use crate::scheduler::Cancel;

/// Things that a call gets, unless it says how many it wants: what a crowded image has.
const AT_MOST_DEFAULT: usize = 100;

/// Rows that are compared with each other, the most probable ones: each with each takes a millisecond.
const CANDIDATES_MAX: usize = 1000;

/// Rows that are looked at between two looks whether somebody still waits.
const ROWS_PER_CHECK: usize = 4096;

/// How a model gives its rows.
#[derive(Debug, Deserialize)]
pub(in crate::ops) struct Rows {
    /// Names of the classes, in the model's order; what has an empty one is nothing.
    #[serde(default)]
    pub(in crate::ops) labels: Vec<String>,
    /// The output with the rows.
    #[serde(default = "super::first")]
    pub(in crate::ops) output: String,
    /// What a row consists of, in order.
    row: Option<Vec<Field>>,
    /// Another output, with a score for each row and class, or with `classes` for each row.
    scores: Option<String>,
    /// Another output, with the class of each row.
    classes: Option<String>,
    #[serde(default)]
    form: Form,
    #[serde(default)]
    unit: Unit,
    #[serde(default)]
    pub(in crate::ops) activation: Activation,
    /// Least probability of what is found.
    #[serde(default = "half")]
    pub(in crate::ops) threshold: f32,
    /// Of two boxes of a class that overlap by more than this, as their common part of both together, the less probable
    /// one is not found.
    #[serde(default = "overlap")]
    overlap: f32,
}

fn half() -> f32 {
    0.5
}

fn overlap() -> f32 {
    0.45
}

/// A part of a row.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Field {
    Box,
    /// Whether there is anything; what is multiplied with the score.
    Confidence,
    /// Of the row.
    Score,
    /// Of each class.
    Scores,
    Class,
    /// Those of a body.
    Points,
    /// A number that means nothing.
    Skip,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Form {
    /// Left, top, right, bottom.
    #[default]
    Xyxy,
    /// Top, left, bottom, right.
    Yxyx,
    /// Center, width, height.
    Cxcywh,
    /// Left, top, width, height.
    Xywh,
}

/// What places are counted in.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Unit {
    /// Pixels of the input.
    #[default]
    Pixels,
    /// 0 to 1 across the input.
    Relative,
}

/// What makes probabilities of what a model gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::ops) enum Activation {
    #[default]
    None,
    Sigmoid,
    Softmax,
}

impl Activation {
    /// Of a number that stands for itself.
    pub(in crate::ops) fn of(self, number: f32) -> f32 {
        if self == Self::Sigmoid { 1.0 / (1.0 + (-number).exp()) } else { number }
    }
}

/// What a call asks for.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Wish {
    /// 0 for what the description says.
    pub(in crate::ops) threshold: f32,
    pub(in crate::ops) at_most: usize,
}

/// Checks what a call asks for.
pub(in crate::ops) fn check_wish(threshold: f32, at_most: u32, most: usize) -> Result<Wish, Error> {
    if !(0.0..=1.0).contains(&threshold) {
        return Err(Error::field("threshold", "a probability from 0 to 1", threshold));
    }
    let at_most = usize::try_from(at_most).unwrap_or(usize::MAX);
    if at_most > most {
        return Err(Error::field("at_most", format!("at most {most}"), at_most));
    }
    Ok(Wish { threshold, at_most: if at_most == 0 { AT_MOST_DEFAULT } else { at_most } })
}

/// A row that is something.
#[derive(Clone, Debug)]
pub(in crate::ops) struct Found {
    pub(in crate::ops) label: Label,
    pub(in crate::ops) area: Area,
    /// As the row has them.
    pub(in crate::ops) points: Vec<f32>,
}

/// Where a row has what.
struct Columns {
    all: usize,
    field: Vec<(Field, usize)>,
}

impl Columns {
    fn of(&self, field: Field) -> Option<usize> {
        self.field.iter().find(|(known, _)| *known == field).map(|(_, place)| *place)
    }
}

impl Rows {
    /// Checks what is the same for all that have rows.
    ///
    /// # Errors
    /// What is wrong.
    pub(in crate::ops) fn check(&self, has_points: bool) -> Result<(), String> {
        check_names("labels", &self.labels)?;
        if ![self.threshold, self.overlap].iter().all(|number| (0.0..=1.0).contains(number)) {
            return Err("threshold and overlap: expected numbers from 0 to 1".into());
        }
        if self.classes.is_some() && self.scores.is_none() {
            return Err("classes: expected scores, too, which are not in the rows then".into());
        }
        let row = self.row(has_points);
        let times = |field: Field| row.iter().filter(|one| **one == field).count();
        let scores = times(Field::Score) + times(Field::Scores) + usize::from(self.scores.is_some());
        let classes = times(Field::Class) + usize::from(self.classes.is_some());
        if times(Field::Box) != 1
            || times(Field::Confidence) > 1
            || times(Field::Points) != usize::from(has_points)
        {
            let points = if has_points { " and points once" } else { " and no points" };
            return Err(format!("row: expected box once, confidence at most once{points}"));
        }
        if scores != 1 || classes > 1 || (times(Field::Scores) == 1 && classes > 0) {
            return Err("row: expected scores, or score and class, or an output for scores".into());
        }
        Ok(())
    }

    fn row(&self, has_points: bool) -> Cow<'_, [Field]> {
        const ALONE: &[Field] = &[Field::Box];
        const SCORED: &[Field] = &[Field::Box, Field::Scores];
        const BODIES: &[Field] = &[Field::Box, Field::Scores, Field::Points];
        match &self.row {
            Some(row) => row.into(),
            None if self.scores.is_some() => ALONE.into(),
            None if has_points => BODIES.into(),
            None => SCORED.into(),
        }
    }

    /// The outputs that are read.
    pub(in crate::ops) fn outputs(&self) -> Vec<String> {
        let all = [Some(&self.output), self.scores.as_ref(), self.classes.as_ref()];
        all.into_iter().flatten().cloned().collect()
    }

    fn columns(&self, points: usize) -> Columns {
        let (mut all, mut field) = (0, Vec::new());
        for one in self.row(points > 0).iter() {
            field.push((*one, all));
            all += match one {
                Field::Box => 4,
                Field::Scores => self.labels.len(),
                Field::Points => points,
                Field::Confidence | Field::Score | Field::Class | Field::Skip => 1,
            };
        }
        Columns { all, field }
    }

    /// What is there, the most probable first. `points` are the numbers of a row's points.
    ///
    /// # Errors
    /// `MODEL_REJECTED` for outputs that are not as described, `CANCELLED`.
    pub(in crate::ops) fn find(
        &self,
        outputs: &[Tensor],
        points: usize,
        placed: &Placed,
        wish: &Wish,
        cancel: &Cancel,
    ) -> Result<Vec<Found>, Error> {
        let columns = self.columns(points);
        let rows = Table::of(&outputs[0], columns.all)?;
        let has_class = self.classes.is_some() || columns.of(Field::Class).is_some();
        let wide = if has_class { 1 } else { self.labels.len() };
        let scores = outputs.get(1).map(|output| Table::of(output, wide)).transpose()?;
        let classes = outputs.get(2).map(|output| Table::of(output, 1)).transpose()?;
        if let Some(other) = scores.iter().chain(&classes).find(|other| other.rows != rows.rows) {
            let message =
                format!("this model gives {} boxes and {} scores or classes", rows.rows, other.rows);
            return Err(Error::new(Reason::ModelRejected, message));
        }
        let likely = Likely { of: self, columns: &columns, rows: &rows, scores, classes };
        let mut candidates = likely.candidates(wish, cancel)?;
        candidates.sort_by(|a, b| b.probability.total_cmp(&a.probability));
        candidates.truncate(CANDIDATES_MAX);
        let begin = columns.of(Field::Box).unwrap_or(0);
        // Boxes are compared as the model gives them: what is beside the image is part of them.
        let mut found: Vec<(Area, Found)> = Vec::new();
        for Candidate { row, class, probability } in candidates {
            if found.len() >= wish.at_most {
                break;
            }
            let given = self.area([0, 1, 2, 3].map(|side| rows.at(row, begin + side)), placed);
            let area = placed.area(given);
            let index = u32::try_from(class).unwrap_or(u32::MAX);
            let is_hidden = |(other, found): &(Area, Found)| {
                found.label.index == index && overlaps(other, &given) > self.overlap
            };
            if surface(&area) <= 0.0 || found.iter().any(is_hidden) {
                continue;
            }
            let label = Label { index, name: self.labels[class].clone(), probability };
            let of_points = columns.of(Field::Points).unwrap_or(0);
            let points = (0..points).map(|point| rows.at(row, of_points + point)).collect();
            found.push((given, Found { label, area, points }));
        }
        Ok(found.into_iter().map(|(_, found)| found).collect())
    }

    /// Least probability of what a call finds.
    pub(in crate::ops) fn threshold(&self, wish: &Wish) -> f32 {
        if wish.threshold > 0.0 { wish.threshold } else { self.threshold }
    }

    /// A box in pixels of the input.
    fn area(&self, [a, b, c, d]: [f32; 4], placed: &Placed) -> Area {
        let (left, top, right, bottom) = match self.form {
            Form::Xyxy => (a, b, c, d),
            Form::Yxyx => (b, a, d, c),
            Form::Cxcywh => (a - c / 2.0, b - d / 2.0, a + c / 2.0, b + d / 2.0),
            Form::Xywh => (a, b, a + c, b + d),
        };
        let [x, y] = self.unit(placed);
        Area { left: left * x, top: top * y, right: right * x, bottom: bottom * y }
    }

    /// Pixels of the input that a place of 1 is.
    pub(in crate::ops) fn unit(&self, placed: &Placed) -> [f32; 2] {
        match self.unit {
            Unit::Pixels => [1.0, 1.0],
            Unit::Relative => placed.input,
        }
    }
}

struct Candidate {
    row: usize,
    class: usize,
    probability: f32,
}

/// The outputs, to tell how likely rows are.
struct Likely<'a> {
    of: &'a Rows,
    columns: &'a Columns,
    rows: &'a Table<'a>,
    scores: Option<Table<'a>>,
    classes: Option<Table<'a>>,
}

impl Likely<'_> {
    fn candidates(&self, wish: &Wish, cancel: &Cancel) -> Result<Vec<Candidate>, Error> {
        let threshold = self.of.threshold(wish);
        let confidence = self.columns.of(Field::Confidence);
        let mut candidates = Vec::new();
        for row in 0..self.rows.rows {
            if row % ROWS_PER_CHECK == 0 {
                cancel.check()?;
            }
            let Some((class, score)) = self.best(row) else { continue };
            let confidence = confidence.map_or(1.0, |at| self.of.activation.of(self.rows.at(row, at)));
            let probability = score * confidence;
            // What is no number is nothing, and what a network computes can be somewhat more than 1.
            if probability.is_nan() || probability < threshold {
                continue;
            }
            let class = self.known(class)?;
            if !self.of.labels[class].is_empty() {
                candidates.push(Candidate { row, class, probability: probability.min(1.0) });
            }
        }
        Ok(candidates)
    }

    /// The class that a row is most probably of, by number, and the score.
    fn best(&self, row: usize) -> Option<(f32, f32)> {
        let activation = self.of.activation;
        let class_at = self.columns.of(Field::Class).map(|at| self.rows.at(row, at));
        let class = class_at.or_else(|| self.classes.as_ref().map(|classes| classes.at(row, 0)));
        let score = |class: usize| match (&self.scores, self.columns.of(Field::Scores)) {
            (Some(scores), _) => scores.at(row, class),
            (None, Some(begin)) => self.rows.at(row, begin + class),
            (None, None) => self.rows.at(row, self.columns.of(Field::Score).unwrap_or(0)),
        };
        let is_single = class.is_some() || self.columns.of(Field::Score).is_some();
        if is_single {
            return Some((class.unwrap_or(0.0), activation.of(score(0))));
        }
        let classes = 0..self.of.labels.len();
        let things = classes.clone().filter(|class| !self.of.labels[*class].is_empty());
        let best = things.max_by(|a, b| score(*a).total_cmp(&score(*b)))?;
        let probability = if activation == Activation::Softmax {
            let highest = classes.clone().map(score).fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = classes.map(|class| (score(class) - highest).exp()).sum();
            (score(best) - highest).exp() / sum
        } else {
            activation.of(score(best))
        };
        #[allow(clippy::cast_precision_loss, reason = "the number of a class, far below 2^24")]
        Some((best as f32, probability))
    }

    /// A class that the model names.
    fn known(&self, class: f32) -> Result<usize, Error> {
        let named = self.of.labels.len();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked before")]
        let known = (class >= 0.0 && class.fract() == 0.0).then_some(class as usize);
        known.filter(|class| *class < named).ok_or_else(|| {
            let message = format!("this model gives class {class} and names {named} labels");
            Error::new(Reason::ModelRejected, message)
        })
    }
}

fn surface(area: &Area) -> f32 {
    let surface = (area.right - area.left).max(0.0) * (area.bottom - area.top).max(0.0);
    if surface.is_finite() { surface } else { 0.0 }
}

/// The common part of two boxes, of both together.
fn overlaps(one: &Area, other: &Area) -> f32 {
    let common = surface(&Area {
        left: one.left.max(other.left),
        top: one.top.max(other.top),
        right: one.right.min(other.right),
        bottom: one.bottom.min(other.bottom),
    });
    common / (surface(one) + surface(other) - common)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::vision::ImageInput;
    use image::{DynamicImage, RgbImage};
    use vaccel_proto::v1::DType;

    /// An input of 100 x 100 pixels, of an image twice as large.
    fn placed() -> Placed {
        let input: ImageInput = serde_json::from_str(r#"{"width":100,"height":100}"#).expect("valid");
        input.place(DynamicImage::from(RgbImage::new(200, 200)), DType::F32).expect("fits").1
    }

    fn rows(json: &str) -> Rows {
        let rows: Rows = serde_json::from_str(json).expect(json);
        rows.check(false).expect(json);
        rows
    }

    fn table(rows: &[&[f32]]) -> Tensor {
        let shape = [1, rows.len(), rows[0].len()].map(|side| i64::try_from(side).expect("small"));
        Tensor::new(&shape, &rows.concat()).expect("valid")
    }

    /// What is found: class, thousandths of the probability, and the box.
    fn found(rows: &Rows, outputs: &[Tensor]) -> Vec<(u32, f32, [f32; 4])> {
        let wish = check_wish(0.0, 0, 1000).expect("valid");
        let found = rows.find(outputs, 0, &placed(), &wish, &Cancel::default()).expect("fits");
        let plain = |Found { label, area, .. }| {
            let Area { left, top, right, bottom } = area;
            (label.index, (label.probability * 1000.0).round(), [left, top, right, bottom].map(f32::round))
        };
        found.into_iter().map(plain).collect()
    }

    #[test]
    fn every_usual_row_gives_the_same() {
        let expected = [(1, 900.0, [20.0, 40.0, 60.0, 80.0])];
        let labels = r#""labels":["a","b"]"#;
        for (row, numbers) in [
            (r#""form":"xyxy""#, &[10.0, 20.0, 30.0, 40.0, 0.2, 0.9][..]),
            (r#""form":"yxyx""#, &[20.0, 10.0, 40.0, 30.0, 0.2, 0.9]),
            (r#""form":"cxcywh""#, &[20.0, 30.0, 20.0, 20.0, 0.2, 0.9]),
            (r#""form":"xywh""#, &[10.0, 20.0, 20.0, 20.0, 0.2, 0.9]),
            (r#""unit":"relative""#, &[0.1, 0.2, 0.3, 0.4, 0.2, 0.9]),
            (r#""row":["box","confidence","scores"]"#, &[10.0, 20.0, 30.0, 40.0, 0.9, 0.2, 1.0]),
            (r#""row":["box","score","class"]"#, &[10.0, 20.0, 30.0, 40.0, 0.9, 1.0]),
            (r#""row":["skip","box","class","score"]"#, &[7.0, 10.0, 20.0, 30.0, 40.0, 1.0, 0.9]),
            (r#""activation":"sigmoid""#, &[10.0, 20.0, 30.0, 40.0, -3.0, 2.197_224_6]),
            (r#""activation":"softmax""#, &[10.0, 20.0, 30.0, 40.0, 1.0, 3.197_224_6]),
        ] {
            let rows = rows(&format!("{{{labels},{row}}}"));
            assert_eq!(found(&rows, &[table(&[numbers])]), expected, "{row}");
            // The same with each column's numbers beside each other, as some give it.
            let nothing = vec![0.0; numbers.len()];
            let turned: Vec<f32> = numbers.iter().zip(&nothing).flat_map(|(a, b)| [*a, *b, *b]).collect();
            let shape = [1, i64::try_from(numbers.len()).expect("small"), 3];
            let turned = Tensor::new(&shape, &turned).expect("valid");
            let first = found(&rows, &[turned]).remove(0);
            assert_eq!(first, expected[0], "{row}, turned");
        }
    }

    #[test]
    fn scores_and_classes_may_be_outputs_of_their_own() {
        let boxes =
            Tensor::new(&[1, 2, 4], &[10.0_f32, 20.0, 30.0, 40.0, 0.0, 0.0, 9.0, 9.0]).expect("valid");
        let expected = [(1, 900.0, [20.0, 40.0, 60.0, 80.0])];
        let by_class = Tensor::new(&[1, 2, 2], &[0.2_f32, 0.9, 0.1, 0.3]).expect("valid");
        let both = rows(r##"{"labels":["a","b"],"scores":"#1"}"##);
        assert_eq!(found(&both, &[boxes.clone(), by_class]), expected);
        let all = rows(r##"{"labels":["a","b"],"scores":"#1","classes":"#2"}"##);
        let scores = Tensor::new(&[1, 2], &[0.9_f32, 0.1]).expect("valid");
        for classes in [
            Tensor::new(&[1, 2], &[1.0_f32, 7.0]),
            Tensor::new(&[2], &[1_i64, 7]),
            Tensor::new(&[1, 2, 1], &[1_i32, 7]),
        ] {
            let classes = classes.expect("valid");
            assert_eq!(found(&all, &[boxes.clone(), scores.clone(), classes]), expected);
        }
        let few = Tensor::new(&[1, 1], &[0.9_f32]).expect("valid");
        let wish = check_wish(0.0, 0, 9).expect("valid");
        let outputs = [boxes, few.clone(), few];
        let refusal = all.find(&outputs, 0, &placed(), &wish, &Cancel::default()).expect_err("one score");
        assert_eq!(refusal.reason(), Reason::ModelRejected);
        // A model that finds nothing.
        let none = [&[0_i64, 4][..], &[0], &[0]].map(|shape| Tensor::new::<f32>(shape, &[]).expect("valid"));
        assert_eq!(found(&all, &none), []);
    }

    #[test]
    fn of_boxes_that_overlap_the_most_probable_of_a_class_is_found() {
        let near: &[&[f32]] = &[
            &[10.0, 10.0, 30.0, 30.0, 0.8, 0.0],
            &[11.0, 11.0, 31.0, 31.0, 0.9, 0.0],
            &[11.0, 11.0, 31.0, 31.0, 0.0, 0.7],
            &[60.0, 60.0, 80.0, 80.0, 0.6, 0.0],
            &[60.0, 60.0, 80.0, 80.0, 0.4, 0.0],
            &[60.0, 60.0, 60.0, 80.0, 0.9, 0.0],
            &[f32::NAN, 60.0, 80.0, 80.0, 0.9, 0.0],
            &[60.0, 60.0, 80.0, 80.0, f32::NAN, 0.0],
        ];
        let rows = |more: &str| rows(&format!(r#"{{"labels":["a","b"]{more}}}"#));
        let classes = |rows: &Rows| -> Vec<(u32, f32)> {
            found(rows, &[table(near)])
                .into_iter()
                .map(|(class, probability, _)| (class, probability))
                .collect()
        };
        assert_eq!(classes(&rows("")), [(0, 900.0), (1, 700.0), (0, 600.0)]);
        assert_eq!(classes(&rows(r#","overlap":1,"threshold":0.75"#)), [(0, 900.0), (0, 800.0)]);
        let hidden = self::rows(r#"{"labels":["","b"]}"#);
        assert_eq!(classes(&hidden), [(1, 700.0)]);
        let wish = check_wish(0.65, 1, 9).expect("valid");
        let one = rows("").find(&[table(near)], 0, &placed(), &wish, &Cancel::default()).expect("fits");
        assert_eq!(one.len(), 1);
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for json in [
            r#"{"labels":[]}"#,
            r#"{"labels":["a"],"threshold":1.5}"#,
            r#"{"labels":["a"],"overlap":-1}"#,
            r#"{"labels":["a"],"row":["scores"]}"#,
            r#"{"labels":["a"],"row":["box"]}"#,
            r#"{"labels":["a"],"row":["box","box","scores"]}"#,
            r#"{"labels":["a"],"row":["box","scores","class"]}"#,
            r#"{"labels":["a"],"row":["box","scores","points"]}"#,
            r##"{"labels":["a"],"row":["box","scores"],"scores":"#1"}"##,
            r##"{"labels":["a"],"classes":"#1"}"##,
        ] {
            let rows: Rows = serde_json::from_str(json).expect(json);
            assert!(rows.check(false).is_err(), "{json}");
        }
        let rows = rows(r#"{"labels":["a","b"],"row":["box","score","class"]}"#);
        let wish = check_wish(0.0, 0, 9).expect("valid");
        for outputs in [
            [table(&[&[1.0, 2.0, 3.0, 4.0, 0.9, 2.0]])],
            [table(&[&[1.0, 2.0, 3.0, 4.0, 0.9, 0.5]])],
            [table(&[&[1.0, 2.0, 3.0, 4.0, 0.9]])],
            [Tensor::new(&[6], &[1_u16; 6]).expect("valid")],
        ] {
            let refusal = rows.find(&outputs, 0, &placed(), &wish, &Cancel::default()).expect_err("unknown");
            assert_eq!(refusal.reason(), Reason::ModelRejected);
        }
        for (threshold, at_most) in [(-0.1, 0), (1.1, 0), (f32::NAN, 0), (0.5, 10)] {
            assert!(check_wish(threshold, at_most, 9).is_err(), "{threshold} {at_most}");
        }
    }
}
