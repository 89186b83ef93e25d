//! The report: the tables of figures and goals, and the same as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::book::{Book, Bound, COMPARED, FIGURES, Figure, GOALS, Of, Spread};
use super::run::Point;
use crate::lab::numbers::thousands;

/// What was measured on what.
#[derive(Debug, Serialize)]
pub(super) struct Setting {
    /// `2 cores, Intel(R) Xeon(R) CPU @ 2.20GHz, 8 GiB`.
    pub(super) machine: String,
    /// PostgreSQL's version.
    pub(super) postgres: String,
    /// nats-server's version.
    pub(super) nats: String,
    /// Whether the servers are the bench's own.
    pub(super) servers: &'static str,
    /// Events of a drain.
    pub(super) events: u64,
    /// Worker threads of a daemon.
    pub(super) workers: usize,
    /// The batch that drained fastest, where that was looked for.
    pub(super) best_batch: Option<usize>,
    /// The other build, if there is one.
    pub(super) against: Option<String>,
    /// Rounds.
    pub(super) rounds: usize,
    /// Little of everything: the figures are rough.
    pub(super) quick: bool,
    /// Events that words of figures and goals stand for: `{10k}`, `{100k}`, `{1m}` and `{5m}` pending, `{published}`, and
    /// behind an open writer `{two steps}` and `{all steps}`.
    pub(super) sizes: Vec<(&'static str, u64)>,
}

impl Setting {
    /// What stands above the tables.
    fn header(&self) -> String {
        let Setting { machine, postgres, nats, servers, events, workers, rounds, .. } = self;
        let batch = self.best_batch.map(|batch| format!(", best batch {batch}")).unwrap_or_default();
        let mut text = format!(
            "{machine}; PostgreSQL {postgres}, nats-server {nats}, {servers}\n\
             drains of {} events unless said otherwise, {workers} workers{batch}, {rounds} rounds; \
             median (lowest to highest)\n\n",
            thousands(*events)
        );
        if let Some(other) = &self.against {
            text += &format!("the other build: {other}\n\n");
        }
        if self.quick {
            text += "a quick run: the figures are rough, and the goals are those of a whole run\n\n";
        }
        text
    }

    /// The words of a figure or a goal, with the numbers of this run.
    fn label(&self, what: &str) -> String {
        self.sizes.iter().fold(what.to_owned(), |text, (name, size)| text.replace(name, &thousands(*size)))
    }
}

/// Everything that the bench found.
#[derive(Debug)]
pub(super) struct BenchReport {
    /// On what.
    pub(super) setting: Setting,
    /// The figures.
    pub(super) book: Book,
    /// Curves by name: how far a drain was after so many seconds.
    pub(super) curves: Vec<(String, Vec<Point>)>,
    /// What could not be measured, and why.
    pub(super) omitted: Vec<String>,
}

/// A goal beside what was measured.
#[derive(Debug, Serialize)]
struct GoalResult {
    what: String,
    #[serde(flatten)]
    bound: Bound,
    #[serde(flatten)]
    spread: Spread,
    reached: bool,
}

#[derive(Serialize)]
struct Measured<'a> {
    name: &'static str,
    what: String,
    unit: &'static str,
    #[serde(flatten)]
    spread: Spread,
    values: &'a [f64],
}

/// A figure of this program beside the other build's.
#[derive(Serialize)]
struct Compared {
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    this: Spread,
    other: Spread,
    /// This over the other, within each round.
    ratio: Spread,
}

impl BenchReport {
    /// As one JSON object.
    pub(super) fn json(&self) -> serde_json::Value {
        let curve =
            |(name, points): &(String, Vec<Point>)| serde_json::json!({ "name": name, "points": points });
        serde_json::json!({
            "setting": self.setting,
            "figures": self.figures().collect::<Vec<_>>(),
            "compared": self.compared().collect::<Vec<_>>(),
            "goals": self.goals().collect::<Vec<_>>(),
            "curves": self.curves.iter().map(curve).collect::<Vec<_>>(),
            "omitted": self.omitted,
        })
    }

    /// As tables in Markdown, which a terminal shows as well.
    pub(super) fn table(&self) -> String {
        let mut text = self.setting.header();
        text += &grid(["figure", "median", "spread", "unit"], &self.figure_rows());
        for (head, rows) in [
            (["compared", "this program", "the other build", "ratio"], self.compared_rows()),
            (["goal", "", "measured", ""], self.goal_rows()),
        ] {
            if !rows.is_empty() {
                text.push('\n');
                text += &grid(head, &rows);
            }
        }
        for omitted in &self.omitted {
            // Infallible: it writes to a String.
            let _ = writeln!(text, "\nnot measured: {omitted}");
        }
        text
    }

    fn figure_rows(&self) -> Vec<[String; 4]> {
        let row = |figure: Measured<'_>| {
            let Spread { median, low, high } = figure.spread;
            let spread = format!("{} to {}", number(low), number(high));
            [figure.what, number(median), spread, figure.unit.to_owned()]
        };
        self.figures().map(row).collect()
    }

    fn compared_rows(&self) -> Vec<[String; 4]> {
        let row = |Compared { what, unit, this, other, ratio, .. }| {
            [format!("{what}, {unit}"), median_of(this), median_of(other), median_of(ratio)]
        };
        self.compared().map(row).collect()
    }

    fn goal_rows(&self) -> Vec<[String; 4]> {
        let row = |result: GoalResult| {
            let goal = match result.bound {
                Bound::AtLeast(goal) => format!("at least {}", number(goal)),
                Bound::AtMost(goal) => format!("at most {}", number(goal)),
            };
            let verdict = if result.reached { "reached" } else { "missed" };
            [result.what, goal, median_of(result.spread), verdict.to_owned()]
        };
        self.goals().map(row).collect()
    }

    fn compared(&self) -> impl Iterator<Item = Compared> {
        COMPARED.iter().filter_map(|figure| {
            let Figure { name, what, unit } = *figure;
            let [this, other] = [self.book.spread(name)?, self.book.other(name)?];
            Some(Compared { name, what, unit, this, other, ratio: self.book.against(name)? })
        })
    }

    fn figures(&self) -> impl Iterator<Item = Measured<'_>> {
        FIGURES.iter().filter_map(|figure| {
            let spread = self.book.spread(figure.name)?;
            let values = self.book.values(figure.name);
            Some(Measured {
                name: figure.name,
                what: self.setting.label(figure.what),
                unit: figure.unit,
                spread,
                values,
            })
        })
    }

    fn goals(&self) -> impl Iterator<Item = GoalResult> {
        GOALS.iter().filter_map(|goal| {
            let spread = match goal.of {
                Of::Figure(name) => self.book.spread(name),
                Of::Ratio(above, below) => self.book.ratio(above, below),
                Of::Against(name) => self.book.against(name),
            }?;
            Some(GoalResult {
                what: self.setting.label(goal.what),
                bound: goal.bound,
                spread,
                reached: goal.bound.is_reached(spread),
            })
        })
    }
}

/// `0.52 (0.50 to 0.55)`.
fn median_of(Spread { median, low, high }: Spread) -> String {
    format!("{} ({} to {})", number(median), number(low), number(high))
}

/// Three digits or all before the point: `0.47`, `12.3`, `31,415`.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1_000.0 => thousands(value.round().abs() as u64),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A Markdown table with columns of even width; the middle ones are flush right.
fn grid(head: [&str; 4], rows: &[[String; 4]]) -> String {
    let widths: [usize; 4] = std::array::from_fn(|at| {
        rows.iter().map(|row| row[at].chars().count()).chain([head[at].len()]).max().unwrap_or(0)
    });
    let [a, b, c, d] = widths;
    let line = |[first, second, third, fourth]: [&str; 4]| {
        format!("| {first:<a$} | {second:>b$} | {third:>c$} | {fourth:<d$} |\n")
    };
    let mut text = line(head);
    text += &format!("|{:-<1$}|", "", a + 2);
    text += &format!("{:->1$}:|{2:->3$}:|{4:-<5$}|\n", "", b + 1, "", c + 1, "", d + 2);
    for row in rows {
        text += &line(std::array::from_fn(|at| row[at].as_str()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> BenchReport {
        let mut book = Book::default();
        for (best, alone) in [(30_000.0, 60_000.0), (33_000.0, 60_000.0)] {
            book.note("drain.best", best);
            book.note("publish.alone", alone);
        }
        let setting = Setting {
            machine: "2 cores".into(),
            postgres: "15.1".into(),
            nats: "2.9".into(),
            servers: "private",
            events: 10,
            workers: 2,
            best_batch: Some(500),
            against: None,
            rounds: 2,
            quick: true,
            sizes: vec![("{10k}", 1), ("{100k}", 2), ("{1m}", 3_000), ("{5m}", 4), ("{published}", 5)],
        };
        BenchReport {
            setting,
            book,
            curves: vec![("c".into(), vec![(0.5, 10.0)])],
            omitted: vec!["x: y".into()],
        }
    }

    #[test]
    fn the_table_shows_figures_and_the_goals_that_they_bear_on() {
        let table = report().table();
        let line = |start: &str| {
            table.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{table}"))
        };
        assert!(line("| drain, 1,000 keys, best batch, all workers").contains("31,500 | 30,000 to 33,000"));
        let goal = line("| drain, 1,000 keys, best batch / publishing alone");
        assert!(goal.contains("at least 0.45 | 0.53 (0.50 to 0.55) | reached"), "{goal}");
        assert!(!table.contains("idle"), "{table}");
        assert!(line("a quick run").contains("rough"));
        assert!(table.ends_with("not measured: x: y\n"));
    }

    #[test]
    fn labels_have_the_numbers_of_the_run() {
        let setting = report().setting;
        assert_eq!(
            setting.label("drain, {1m} pending, {published} published"),
            "drain, 3,000 pending, 5 published"
        );
    }

    #[test]
    fn the_json_has_the_same_and_every_value() {
        let json = report().json();
        assert_eq!(json["figures"][1]["values"], serde_json::json!([30_000.0, 33_000.0]));
        assert_eq!(json["goals"][0]["at_least"], 0.45);
        assert_eq!(json["goals"][0]["reached"], true);
        assert_eq!(json["curves"][0]["points"][0][1], 10.0);
    }

    #[test]
    fn numbers_have_three_digits_or_more() {
        let numbers = [0.456, 12.34, 123.4, 1_234.5, 1_234_567.0].map(number);
        assert_eq!(numbers, ["0.46", "12.3", "123", "1,235", "1,234,567"]);
    }
}
