//! Bodies in an image, and where their points are: joints, eyes, or whatever a model was trained to find.
//!
//! *Shapes:* the model takes one image ([`super::vision`]) and gives, as its description says, a row for each body with
//! its box and its points; or the points alone, `[1, bodies, points, 2 or 3]`; or a map for each point of one body,
//! `[1, points, rows, columns]`, whose highest number is where it is. *Units:* pixels of the image, probabilities in
//! [0, 1]; points of which a model says none have that of their body. *Errors:* as those of `image_detection`.
//! *Source:* vAccel's `image_pose`; rows as YOLO's, points as MoveNet's, maps as HRNet's and simple baselines'.

use serde::Deserialize;
use vaccel_proto::v1::{Area, ImagePoseReply, ImagePoseRequest, Keypoint, Label, Pose, Tensor};
use vaccel_proto::{Error, Reason};

use super::vision::{
    self, Canvas, Description, Found, Grid, Placed, Rows, Sight, Wish, check_names, check_picture,
    check_wish, numbers,
};
use super::{Context, Operation};
use crate::scheduler::{Cancel, Timed};

/// Bodies that a call can ask for: with all their points they are far shorter than a message.
const AT_MOST_MAX: usize = 100;

/// Points of a body, and lines between them: the whole of a body with its hands and face has 133.
const POINTS_MAX: usize = 256;

/// Bodies that are looked at between two looks whether somebody still waits.
const BODIES_PER_CHECK: usize = 4096;

/// The class of bodies where a model names none.
const BODY: &str = "person";

impl Operation for ImagePoseRequest {
    const NAME: &'static str = "image_pose";
    const SUMMARY: &'static str = "find bodies in an image, and their points";
    type Reply = ImagePoseReply;

    fn validate(&self) -> Result<(), Error> {
        check_picture(self.picture)?;
        check_wish(self.threshold, self.at_most, AT_MOST_MAX).map(drop)
    }

    fn dummy(self, context: &Context<'_>) -> Result<ImagePoseReply, Error> {
        let image_name = vision::dummy(context, &self.model)?;
        Ok(ImagePoseReply { image_name, ..ImagePoseReply::default() })
    }

    async fn execute(self, context: &Context<'_>) -> Result<Timed<ImagePoseReply>, Error> {
        let wish = check_wish(self.threshold, self.at_most, AT_MOST_MAX)?;
        let seen = vision::look::<Bodies>(context, &self.model, self.image, self.picture, wish).await?;
        Ok(seen.map(|seen| ImagePoseReply {
            image_name: seen.image_name,
            poses: seen.found,
            picture: seen.picture,
        }))
    }
}

/// What a model says of the bodies that it finds.
struct Bodies {
    rows: Rows,
    points: Points,
}

#[derive(Debug, Deserialize)]
struct Points {
    /// Their names, in the model's order.
    points: Vec<String>,
    /// Lines of the picture, each from one point to another, by number.
    #[serde(default)]
    links: Vec<[usize; 2]>,
    #[serde(default)]
    given: Given,
    #[serde(default)]
    point: Form,
}

/// How a model gives bodies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Given {
    #[default]
    Rows,
    Points,
    Maps,
}

/// The numbers of a point: where it is, and how probably.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Form {
    #[default]
    Xyp,
    Yxp,
    Xy,
}

impl Form {
    fn numbers(self) -> usize {
        if matches!(self, Self::Xy) { 2 } else { 3 }
    }
}

/// What is no number is nothing, and what a network computes can be somewhat more than 1.
fn bounded(probability: f32) -> f32 {
    if probability.is_nan() { 0.0 } else { probability.clamp(0.0, 1.0) }
}

#[allow(clippy::cast_precision_loss, reason = "at most 256")]
fn mean(probabilities: impl ExactSizeIterator<Item = f32>) -> f32 {
    let count = probabilities.len() as f32;
    probabilities.sum::<f32>() / count
}

/// A point in pixels of the input, and how probable it is.
type Point = ([f32; 2], f32);

impl Bodies {
    /// A body's points from its numbers; `whole` is the probability of those that have none.
    fn points(&self, numbers: &[f32], whole: f32, placed: &Placed) -> Vec<Point> {
        let [across, down] = self.rows.unit(placed);
        let point = |numbers: &[f32]| match (self.points.point, numbers) {
            (Form::Xy, [x, y]) => ([x * across, y * down], whole),
            (Form::Xyp, [x, y, _]) => ([x * across, y * down], self.probability(numbers)),
            (_, [y, x, _]) => ([x * across, y * down], self.probability(numbers)),
            _ => ([0.0; 2], 0.0),
        };
        numbers.chunks_exact(self.points.point.numbers()).map(point).collect()
    }

    /// The points in pixels of the image, with their names.
    fn named(&self, points: Vec<Point>, placed: &Placed) -> Vec<Keypoint> {
        let names = self.points.points.iter();
        let named = |(([x, y], p), name): (Point, &String)| Keypoint {
            name: name.clone(),
            x: placed.x(x),
            y: placed.y(y),
            probability: bounded(p),
        };
        points.into_iter().zip(names).map(named).collect()
    }

    /// A body of which nothing but its points is known: it is as probable as they are on the whole, and where they are.
    fn around(&self, points: Vec<Point>, placed: &Placed) -> Pose {
        let points = self.named(points, placed);
        let probability = mean(points.iter().map(|point| point.probability));
        let bounds = |of: fn(&Keypoint) -> f32| {
            let each = || points.iter().map(of);
            (each().reduce(f32::min).unwrap_or(0.0), each().reduce(f32::max).unwrap_or(0.0))
        };
        let ((left, right), (top, bottom)) = (bounds(|point| point.x), bounds(|point| point.y));
        let area = Area { left, top, right, bottom };
        let label = Label { index: 0, name: self.rows.labels[0].clone(), probability };
        Pose { label: Some(label), area: Some(area), points }
    }

    /// Bodies as `[…, points, numbers]`.
    fn of_points(
        &self,
        output: &Tensor,
        placed: &Placed,
        wish: &Wish,
        cancel: &Cancel,
    ) -> Result<Vec<Pose>, Error> {
        let (points, each) = (self.points.points.len(), self.points.point.numbers());
        let numbers = numbers(output)?;
        let wanted = [points, each].map(|side| i64::try_from(side).unwrap_or(i64::MAX));
        if !output.shape.ends_with(&wanted) {
            let got = output.signature();
            let message = format!("expected an output [1, bodies, {points}, {each}], this model gives {got}");
            return Err(Error::new(Reason::ModelRejected, message));
        }
        // There may be millions; only those that are given back are made.
        let mut bodies = Vec::new();
        for (body, numbers) in numbers.chunks_exact(points * each).enumerate() {
            if body % BODIES_PER_CHECK == 0 {
                cancel.check()?;
            }
            let probability = mean(numbers.chunks_exact(each).map(|point| self.probability(point)));
            if probability >= self.rows.threshold(wish) {
                bodies.push((probability, numbers));
            }
        }
        bodies.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        bodies.truncate(wish.at_most);
        let pose = |(_, numbers): (f32, &[f32])| self.around(self.points(numbers, 1.0, placed), placed);
        Ok(bodies.into_iter().map(pose).collect())
    }

    /// The probability of a point from its numbers; 1 where a model says none.
    fn probability(&self, point: &[f32]) -> f32 {
        point.get(2).map_or(1.0, |number| bounded(self.rows.activation.of(*number)))
    }

    /// One body as a map for each point.
    fn of_maps(
        &self,
        output: &Tensor,
        placed: &Placed,
        wish: &Wish,
        cancel: &Cancel,
    ) -> Result<Vec<Pose>, Error> {
        let grid = Grid::of(output, &[self.points.points.len()])?;
        let mut points = Vec::with_capacity(grid.channels);
        for point in 0..grid.channels {
            cancel.check()?;
            let ([x, y], number) = grid.peak(point);
            let place = [x * placed.input[0], y * placed.input[1]];
            points.push((place, self.rows.activation.of(number)));
        }
        let probability = mean(points.iter().map(|(_, probability)| bounded(*probability)));
        let is_there = probability >= self.rows.threshold(wish);
        Ok(is_there.then(|| self.around(points, placed)).into_iter().collect())
    }
}

impl Sight for Bodies {
    const NAME: &'static str = ImagePoseRequest::NAME;
    type Wish = Wish;
    type Found = Vec<Pose>;

    fn read(description: &mut Description<'_>) -> Result<Self, String> {
        let mut bodies = Self { rows: description.part()?, points: description.part()? };
        if bodies.rows.labels.is_empty() {
            bodies.rows.labels.push(BODY.into());
        }
        let Points { points, links, given, .. } = &bodies.points;
        check_names("points", points)?;
        if points.len() > POINTS_MAX || links.len() > POINTS_MAX {
            return Err(format!("points and links: expected at most {POINTS_MAX}"));
        }
        if links.iter().flatten().any(|point| *point >= points.len()) {
            return Err(format!("links: expected numbers of points, from 0 to {}", points.len() - 1));
        }
        bodies.rows.check(*given == Given::Rows)?;
        Ok(bodies)
    }

    fn outputs(&self) -> Vec<String> {
        if self.points.given == Given::Rows { self.rows.outputs() } else { vec![self.rows.output.clone()] }
    }

    fn find(
        &self,
        outputs: &[Tensor],
        placed: &Placed,
        wish: &Wish,
        cancel: &Cancel,
    ) -> Result<Vec<Pose>, Error> {
        match self.points.given {
            Given::Rows => {
                let numbers = self.points.points.len() * self.points.point.numbers();
                let found = self.rows.find(outputs, numbers, placed, wish, cancel)?;
                let pose = |Found { label, area, points }| {
                    let points = self.named(self.points(&points, label.probability, placed), placed);
                    Pose { label: Some(label), area: Some(area), points }
                };
                Ok(found.into_iter().map(pose).collect())
            }
            Given::Points => self.of_points(&outputs[0], placed, wish, cancel),
            Given::Maps => self.of_maps(&outputs[0], placed, wish, cancel),
        }
    }

    fn draw(&self, found: &Vec<Pose>, canvas: &mut Canvas) {
        for (number, pose) in (0..).zip(found) {
            let color = vision::color(number);
            let place = |point: &Keypoint| [point.x, point.y];
            let is_seen = |point: &Keypoint| point.probability >= self.rows.threshold;
            for link in &self.points.links {
                let [from, to] = link.map(|point| &pose.points[point]);
                if is_seen(from) && is_seen(to) {
                    canvas.line(place(from), place(to), color);
                }
            }
            pose.points
                .iter()
                .filter(|point| is_seen(point))
                .for_each(|point| canvas.dot(place(point), color));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::vision::ImageInput;
    use image::{DynamicImage, RgbImage};
    use vaccel_proto::v1::DType;

    /// What is found in an image twice as large as the input of 100 x 100: a body's probability, its box, and its
    /// points.
    fn found(said: &str, output: &Tensor, threshold: f32) -> Vec<(f32, [f32; 4], Vec<[f32; 3]>)> {
        let input: ImageInput = serde_json::from_str(r#"{"width":100,"height":100}"#).expect("valid");
        let image = DynamicImage::from(RgbImage::new(200, 200));
        let placed = input.place(image, DType::F32).expect("fits").1;
        let bodies = Bodies::read(&mut Description::of(said)).expect(said);
        let wish = check_wish(threshold, 0, AT_MOST_MAX).expect("valid");
        let poses =
            bodies.find(std::slice::from_ref(output), &placed, &wish, &Cancel::default()).expect(said);
        let thousandths = |number: f32| (number * 1000.0).round() / 1000.0;
        let plain = |Pose { label, area, points }| {
            let Area { left, top, right, bottom } = area.expect("always");
            let numbers = |point: &Keypoint| [point.x, point.y, point.probability].map(thousandths);
            let points = points.iter().map(numbers);
            let probability = thousandths(label.expect("always").probability);
            (probability, [left, top, right, bottom].map(thousandths), points.collect())
        };
        poses.into_iter().map(plain).collect()
    }

    fn tensor(shape: &[i64], numbers: &[f32]) -> Tensor {
        Tensor::new(shape, numbers).expect("valid")
    }

    #[test]
    fn rows_end_with_points() {
        let body = [(0.9, [20.0, 40.0, 60.0, 80.0], vec![[30.0, 50.0, 0.75], [40.0, 60.0, 0.25]])];
        let said = r#"{"points":["a","b"]}"#;
        let row = [10.0, 20.0, 30.0, 40.0, 0.9, 15.0, 25.0, 0.75, 20.0, 30.0, 0.25];
        assert_eq!(found(said, &tensor(&[1, 1, 11], &row), 0.0), body);
        let said = r#"{"points":["a","b"],"point":"xy","unit":"relative","row":["points","box","score"]}"#;
        let row = [0.15, 0.25, 0.2, 0.3, 0.1, 0.2, 0.3, 0.4, 0.9];
        let points = vec![[30.0, 50.0, 0.9], [40.0, 60.0, 0.9]];
        assert_eq!(found(said, &tensor(&[1, 1, 9], &row), 0.0), [(0.9, body[0].1, points)]);
    }

    #[test]
    fn points_alone_are_a_body_where_they_are() {
        let said = r#"{"points":["a","b"],"given":"points","point":"yxp","unit":"relative","threshold":0.4}"#;
        let two = [0.25, 0.15, 0.75, 0.3, 0.2, 0.25, 0.5, 0.5, 0.3, 0.5, 0.5, f32::NAN];
        let body = (0.5, [30.0, 50.0, 40.0, 60.0], vec![[30.0, 50.0, 0.75], [40.0, 60.0, 0.25]]);
        for output in [tensor(&[1, 2, 2, 3], &two), tensor(&[1, 1, 2, 3], &two[..6])] {
            assert_eq!(found(said, &output, 0.0), std::slice::from_ref(&body));
        }
        assert_eq!(found(said, &tensor(&[2, 2, 3], &two), 0.1).len(), 2);
        assert!(found(said, &tensor(&[2, 2, 3], &two), 0.6).is_empty());
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for said in [
            r#"{"points":[]}"#,
            r#"{"points":["a"],"links":[[0,1]]}"#,
            r#"{"points":["a"],"row":["box","scores"]}"#,
            r#"{"points":["a"],"given":"maps","row":["box","scores","points"]}"#,
            r#"{"points":["a"],"given":"lines"}"#,
        ] {
            assert!(Bodies::read(&mut Description::of(said)).is_err(), "{said}");
        }
        let many = format!(r#"{{"points":{:?}}}"#, vec!["a"; POINTS_MAX + 1]);
        assert!(Bodies::read(&mut Description::of(&many)).is_err());
    }
}
