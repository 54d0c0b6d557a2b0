//! The ratios to the raw socket by size as an SVG: a panel for each socket, a line for each peer.

use crate::report::Report;
use crate::rows::Row;
use crate::shape::{Shape, Socket};

const WIDTH: f64 = 1080.0;
const HEIGHT: f64 = 552.0;
/// Left and right of each panel, and top and bottom of both.
const PANELS: [[f64; 2]; 2] = [[64.0, 528.0], [592.0, 1056.0]];
const TOP: f64 = 120.0;
const BOTTOM: f64 = 510.0;
/// Where the legend begins, how wide an entry is, and how many there are in a line.
const LEGEND: [f64; 2] = [64.0, 46.0];
const ENTRY: [f64; 2] = [248.0, 18.0];
const ENTRIES: usize = 4;
/// Text and axes: as far from white as from black, for pages of either kind.
const INK: &str = "#7f7f7f";
/// Ratios with a line across.
const TICKS: [f64; 15] =
    [0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0];
/// Where an empty call is on an axis of logarithms, as bytes; and an echo, which is behind all that only goes up.
const EMPTY_AT: f64 = 128.0;
const ECHO_AT: f64 = 128.0 * 1024.0 * 1024.0;

/// The colours of the peers, readable on white and on black; and dashes where they are variants.
const STYLES: [(&str, &str, &str); 11] = [
    ("guest, agent", "#2f8fd8", ""),
    ("async client, agent", "#1fa187", ""),
    ("guest, agent, model", "#2f8fd8", "2 3"),
    ("guest, sink 64 KiB", "#8a63d2", "6 3"),
    ("guest, sink 1 MiB", "#8a63d2", "2 3"),
    ("tonic", "#d98a1e", ""),
    ("ttrpc sync", "#d8503f", ""),
    ("ttrpc sync, nodelay", "#d8503f", "6 3"),
    ("ttrpc async", "#c2478f", ""),
    ("ttrpc async, nodelay", "#c2478f", "6 3"),
    ("grpcio", "#7a8b2a", ""),
];

/// An axis of logarithms: the values at its ends, and where those are on paper.
struct Axis {
    ends: [f64; 2],
    paper: [f64; 2],
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let ([low, high], [from, to]) = (self.ends.map(f64::ln), self.paper);
        from + (to - from) * (value.ln() - low) / (high - low)
    }
}

/// The axis of ratios, from the tick below all of them to the one above.
fn ratios(report: &Report) -> Axis {
    let ratios = || report.rows.iter().filter_map(|row| report.ratio(row));
    let (low, high) = (ratios().fold(1.0, f64::min), ratios().fold(2.0, f64::max));
    let low = TICKS.into_iter().rfind(|tick| *tick <= low).unwrap_or(TICKS[0]);
    let high = TICKS.into_iter().find(|tick| *tick >= high).unwrap_or(TICKS[TICKS.len() - 1]);
    Axis { ends: [low, high], paper: [BOTTOM, TOP] }
}

/// Where a shape is on the axis of sizes, as bytes.
fn place(shape: Shape) -> f64 {
    match shape {
        Shape { echo: true, .. } => ECHO_AT,
        Shape { up: 0, .. } => EMPTY_AT,
        Shape { up, .. } => up as f64,
    }
}

/// The plot of all rows that have figures.
pub(crate) fn svg(report: &Report) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" role=\"img\" font-family=\"sans-serif\" font-size=\"12\" fill=\"{INK}\">\n"
    );
    let title = "Time of a call as a multiple of a raw blocking socket's, by bytes that go up";
    svg += &format!("<title>{title}</title>\n");
    svg += &text([LEGEND[0], 20.0], "start", "font-size=\"14\"", title);
    svg += &text([PANELS[1][1], 20.0], "end", "", &report.machine.to_string());
    svg += &legend();
    let y = ratios(report);
    for (socket, paper) in Socket::ALL.into_iter().zip(PANELS) {
        let x = Axis { ends: [EMPTY_AT / 2.0, ECHO_AT * 2.0], paper };
        svg += &panel(socket.name(), &x, &y);
        for (name, colour, dashes) in STYLES {
            let is_its = |row: &&Row| row.peer.name == name && row.socket == socket;
            let at = |row: &Row| Some((row.shape.echo, [x.at(place(row.shape)), y.at(report.ratio(row)?)]));
            let points: Vec<_> = report.rows.iter().filter(is_its).filter_map(at).collect();
            let up: Vec<[f64; 2]> = points.iter().filter(|(echo, _)| !echo).map(|(_, at)| *at).collect();
            svg += &line(colour, dashes, &up);
            points.iter().for_each(|(_, at)| svg += &dot(colour, *at));
        }
    }
    svg + "</svg>\n"
}

fn panel(name: &str, x: &Axis, y: &Axis) -> String {
    let [left, right] = x.paper;
    let mut svg = text([left, TOP - 8.0], "start", "font-size=\"13\"", name);
    let mut rule = |from: [f64; 2], to: [f64; 2], opacity: f64| {
        let ([x1, y1], [x2, y2]) = (from, to);
        svg += &format!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{INK}\" \
             stroke-opacity=\"{opacity}\"/>\n"
        );
    };
    let [low, high] = y.ends;
    let ticks = || TICKS.into_iter().filter(|tick| (low..=high).contains(tick));
    for tick in ticks() {
        // The raw socket itself.
        let opacity = if tick == 1.0 { 1.0 } else { 0.2 };
        rule([left, y.at(tick)], [right, y.at(tick)], opacity);
    }
    for shape in Shape::ALL {
        let at = x.at(place(shape));
        rule([at, TOP], [at, BOTTOM], 0.2);
    }
    rule([left, BOTTOM], [right, BOTTOM], 1.0);
    rule([left, TOP], [left, BOTTOM], 1.0);
    for tick in ticks() {
        svg += &text([left - 8.0, y.at(tick) + 4.0], "end", "", &tick.to_string());
    }
    for shape in Shape::ALL {
        let label = shape.to_string();
        let label = if shape.echo { "echo" } else { &*label };
        // Neighbours on this axis are close.
        let below = if shape == Shape::IMAGE { 30.0 } else { 18.0 };
        svg += &text([x.at(place(shape)), BOTTOM + below], "middle", "", label);
    }
    svg
}

fn legend() -> String {
    let mut svg = String::new();
    for (index, (name, colour, dashes)) in STYLES.into_iter().enumerate() {
        let (column, row) = ((index % ENTRIES) as f64, (index / ENTRIES) as f64);
        let (x, y) = (LEGEND[0] + column * ENTRY[0], LEGEND[1] + row * ENTRY[1]);
        svg += &line(colour, dashes, &[[x, y], [x + 26.0, y]]);
        svg += &text([x + 34.0, y + 4.0], "start", "", name);
    }
    svg
}

fn line(colour: &str, dashes: &str, places: &[[f64; 2]]) -> String {
    let list: Vec<String> = places.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
    let list = list.join(" ");
    format!(
        "<polyline points=\"{list}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
         stroke-dasharray=\"{dashes}\"/>\n"
    )
}

fn dot(colour: &str, [x, y]: [f64; 2]) -> String {
    format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>\n")
}

fn text([x, y]: [f64; 2], anchor: &str, more: &str, content: &str) -> String {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {more}>{content}</text>\n")
}
