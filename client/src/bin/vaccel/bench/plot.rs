//! Latency over throughput as an SVG: a line for each percentile, a point for each step.

use super::report::{PERCENTILES, Step, amount, unit};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
/// The area of the lines: left, top, right, bottom.
const AREA: [f64; 4] = [76.0, 64.0, 736.0, 404.0];
/// How many ticks an axis has, about.
const TICKS: f64 = 6.0;
/// Above so many microseconds the axis is in milliseconds.
const MILLISECONDS_FROM: f64 = 10_000.0;
/// Text and axes: as far from white as from black, for pages of either kind.
const INK: &str = "#7f7f7f";
/// The lines, in the order of the percentiles; readable on white and on black, and apart for those who see few colours.
const COLOURS: [&str; 4] = ["#2f8fd8", "#1fa187", "#d98a1e", "#d8503f"];

/// One axis: what its end stands for, where its ticks are, and where both ends are on paper.
struct Axis {
    step: f64,
    end: f64,
    paper: [f64; 2],
}

impl Axis {
    /// From 0 to the first tick that is not below `max`.
    fn new(max: f64, paper: [f64; 2]) -> Self {
        let step = tick(max);
        Self { step, end: ((max / step).ceil() * step).max(step), paper }
    }

    fn at(&self, value: f64) -> f64 {
        let [from, to] = self.paper;
        from + (to - from) * value / self.end
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        // The last one may miss the end by what floats lose.
        let (step, end) = (self.step, self.end * 1.000_001);
        (0_u32..).map(move |number| f64::from(number) * step).take_while(move |value| *value <= end)
    }

    /// The text of a tick, with as many decimals as the step has.
    fn text(&self, value: f64) -> String {
        let decimals = [1.0, 0.1, 0.01].iter().position(|unit| self.step >= *unit).unwrap_or(3);
        format!("{value:.decimals$}")
    }
}

/// A distance of ticks that people count in: 1, 2 or 5 and zeros.
fn tick(max: f64) -> f64 {
    if max <= 0.0 {
        return 1.0;
    }
    let rough = max / TICKS;
    let zeros = 10_f64.powf(rough.log10().floor());
    let digit = [1.0, 2.0, 5.0].into_iter().find(|digit| digit * zeros >= rough * 0.999_999).unwrap_or(10.0);
    digit * zeros
}

/// The plot of all steps in which calls succeeded.
pub(crate) fn svg(title: &str, steps: &[Step]) -> String {
    let steps: Vec<&Step> = steps.iter().filter(|step| step.tally.latency.count() > 0).collect();
    let latencies = |step: &&Step| PERCENTILES.map(|percent| step.tally.latency.percentile(percent));
    let highest = steps.iter().flat_map(latencies).fold(0.0, f64::max);
    let (scale, time) = if highest > MILLISECONDS_FROM { (1e3, "ms") } else { (1.0, "µs") };
    let [left, top, right, bottom] = AREA;
    let x = Axis::new(steps.iter().map(|step| step.tally.rate).fold(0.0, f64::max), [left, right]);
    let y = Axis::new(highest / scale, [bottom, top]);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" role=\"img\" font-family=\"sans-serif\" font-size=\"12\" fill=\"{INK}\">\n"
    );
    svg += &format!("<title>{}</title>\n", escaped(title));
    svg += &text(left, 20.0, "start", "font-size=\"14\"", title);
    svg += &axes(&x, &y);
    svg += &text((left + right) / 2.0, bottom + 38.0, "middle", "", "calls/s");
    let middle = (top + bottom) / 2.0;
    let turned = format!("transform=\"rotate(-90 18 {middle})\"");
    svg += &text(18.0, middle, "middle", &turned, &format!("latency, {time}"));
    svg += &legend();
    for (index, colour) in COLOURS.iter().enumerate() {
        let place = |step: &&Step| [x.at(step.tally.rate), y.at(latencies(step)[index] / scale)];
        svg += &line(colour, &steps.iter().map(place).collect::<Vec<_>>());
    }
    if let Some(first) = steps.first() {
        let note = format!("numbers at the points: {}", unit(first.load));
        svg += &text(right, 46.0, "end", "", &note);
    }
    for step in &steps {
        let above = y.at(latencies(step)[PERCENTILES.len() - 1] / scale) - 9.0;
        svg += &text(x.at(step.tally.rate), above, "middle", "", &amount(step.load));
    }
    svg + "</svg>\n"
}

fn axes(x: &Axis, y: &Axis) -> String {
    let [left, top, right, bottom] = AREA;
    let mut svg = String::new();
    let mut rule = |x1: f64, y1: f64, x2: f64, y2: f64, opacity: f64| {
        svg += &format!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{INK}\" \
             stroke-opacity=\"{opacity}\"/>\n"
        );
    };
    for at in x.ticks().map(|value| x.at(value)) {
        rule(at, top, at, bottom, 0.2);
        rule(at, bottom, at, bottom + 5.0, 1.0);
    }
    for at in y.ticks().map(|value| y.at(value)) {
        rule(left, at, right, at, 0.2);
        rule(left - 5.0, at, left, at, 1.0);
    }
    rule(left, bottom, right, bottom, 1.0);
    rule(left, top, left, bottom, 1.0);
    for value in x.ticks() {
        svg += &text(x.at(value), bottom + 20.0, "middle", "", &x.text(value));
    }
    for value in y.ticks() {
        svg += &text(left - 9.0, y.at(value) + 4.0, "end", "", &y.text(value));
    }
    svg
}

fn legend() -> String {
    let mut svg = String::new();
    let mut at = AREA[0];
    // The highest line first, as they lie above each other.
    for (percent, colour) in PERCENTILES.iter().zip(COLOURS).rev() {
        svg += &line(colour, &[[at, 42.0], [at + 22.0, 42.0]]);
        svg += &text(at + 30.0, 46.0, "start", "", &format!("p{percent}"));
        at += 68.0;
    }
    svg
}

/// A line with its points, in the order of the sweep: where more load brings less throughput it turns back.
fn line(colour: &str, places: &[[f64; 2]]) -> String {
    let list: Vec<String> = places.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
    let list = list.join(" ");
    let mut svg =
        format!("<polyline points=\"{list}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n");
    for [x, y] in places {
        svg += &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>\n");
    }
    svg
}

fn text(x: f64, y: f64, anchor: &str, more: &str, content: &str) -> String {
    let content = escaped(content);
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {more}>{content}</text>\n")
}

/// Text as XML has it, which knows no control characters either.
fn escaped(text: &str) -> String {
    crate::output::plain(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::step;

    /// Whether every element is closed, in order, and no text or attribute has what would be markup. Returns how many
    /// elements have each name.
    fn elements(svg: &str) -> std::collections::BTreeMap<String, usize> {
        let (mut open, mut counts) = (Vec::new(), std::collections::BTreeMap::new());
        for part in svg.trim_end().split('<').skip(1) {
            let (tag, after) = part.split_once('>').expect("a tag that ends");
            assert!(!after.contains('>') && tag.matches('"').count().is_multiple_of(2), "{part}");
            for entity in after.split('&').skip(1) {
                assert!(["amp;", "lt;", "gt;"].iter().any(|known| entity.starts_with(known)), "{part}");
            }
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name));
                continue;
            }
            let name = tag.split([' ', '/']).next().unwrap().to_owned();
            *counts.entry(name.clone()).or_default() += 1;
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?} stay open");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        counts
    }

    #[test]
    fn a_plot_is_well_formed_for_one_step_and_for_several() {
        let legend = COLOURS.len() * 2;
        for count in [1_usize, 2, 5] {
            let steps: Vec<Step> =
                (1..).take(count).map(|n| step(n, &[u64::from(n) * 700, 90_000], 0)).collect();
            let counts = elements(&svg("a & b <c> \u{1}", &steps));
            assert_eq!(counts["circle"], legend + count * COLOURS.len());
            assert_eq!(counts["polyline"], 2 * COLOURS.len());
        }
        // A step without calls has no point, and one whose calls all came late has no throughput.
        let mut late = step(2, &[5], 0);
        late.tally.rate = 0.0;
        assert_eq!(elements(&svg("m", &[step(1, &[], 3), late]))["circle"], legend + COLOURS.len());
        assert_eq!(elements(&svg("m", &[]))["circle"], legend);
    }

    #[test]
    fn ticks_are_round_and_reach_the_end() {
        for (max, step, end) in
            [(0.0, 1.0, 1.0), (6.0, 1.0, 6.0), (7.0, 2.0, 8.0), (1234.0, 500.0, 1500.0), (0.03, 0.005, 0.03)]
        {
            let axis = Axis::new(max, [0.0, 100.0]);
            assert!((axis.step - step).abs() < 1e-9 * step && (axis.end - end).abs() < 1e-9 * end, "{max}");
            let ticks: Vec<f64> = axis.ticks().collect();
            assert!((3..=9).contains(&ticks.len()) || max == 0.0, "{ticks:?}");
            assert!((ticks[ticks.len() - 1] - end).abs() < 1e-9 * end);
            assert_eq!((axis.at(0.0), axis.at(axis.end)), (0.0, 100.0));
        }
        assert_eq!(Axis::new(1.0, [0.0, 1.0]).text(0.4), "0.4");
        assert_eq!(Axis::new(1234.0, [0.0, 1.0]).text(500.0), "500");
    }
}
