//! Medians of paired measurements, and a row of the table.

use std::time::{Duration, Instant};

use anyhow::Result;

/// One row of the table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) figure: String,
    /// What it is compared with, and that figure from the same run.
    pub(crate) against: String,
    pub(crate) ratio: Option<f64>,
    pub(crate) target: String,
    /// `None`: the row is there to explain another one.
    pub(crate) met: Option<bool>,
}

/// Two things that were measured in turns. Both lists are as long.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pairs {
    pub(crate) subject: Vec<f64>,
    pub(crate) baseline: Vec<f64>,
}

impl Pairs {
    pub(crate) const EMPTY: Self = Self { subject: Vec::new(), baseline: Vec::new() };

    /// Takes in what another one has.
    pub(crate) fn extend(&mut self, other: Self) {
        self.subject.extend(other.subject);
        self.baseline.extend(other.baseline);
    }

    /// The subject's median over the baseline's.
    pub(crate) fn ratio(&self) -> f64 {
        median(&self.subject) / median(&self.baseline)
    }

    /// The median of each round's own ratio: what changes from one round to the next is in neither.
    pub(crate) fn ratio_in_rounds(&self) -> f64 {
        let each: Vec<_> =
            self.subject.iter().zip(&self.baseline).map(|(subject, baseline)| subject / baseline).collect();
        median(&each)
    }

    /// A row of times in seconds, of which at most `factor` times the baseline plus `slack` is allowed.
    pub(crate) fn at_most(&self, what: impl Into<String>, against: &str, factor: f64, slack: f64) -> Row {
        let (subject, baseline) = (median(&self.subject), median(&self.baseline));
        let extra = if slack > 0.0 { format!(" + {}", time(slack)) } else { String::new() };
        Row {
            what: what.into(),
            figure: time(subject),
            against: format!("{against}: {}", time(baseline)),
            ratio: Some(self.ratio()),
            target: format!("≤ {factor}x{extra}"),
            met: Some(subject <= factor * baseline + slack),
        }
    }

    /// The same row without a target.
    pub(crate) fn compared(&self, what: impl Into<String>, against: &str) -> Row {
        Row { target: "–".to_owned(), met: None, ..self.at_most(what, against, 1.0, 0.0) }
    }
}

/// Times both sides in turns, `count` times, after one round that does not count.
pub(crate) async fn in_turns(
    count: usize,
    mut baseline: impl FnMut(usize) -> Result<()>,
    mut subject: impl AsyncFnMut(usize) -> Result<()>,
) -> Result<Pairs> {
    let mut pairs = Pairs::default();
    for round in 0..=count {
        let begun = Instant::now();
        baseline(round)?;
        let bare = begun.elapsed();
        let begun = Instant::now();
        subject(round).await?;
        let ours = begun.elapsed();
        if round > 0 {
            pairs.baseline.push(bare.as_secs_f64());
            pairs.subject.push(ours.as_secs_f64());
        }
    }
    Ok(pairs)
}

impl Row {
    /// A figure that nothing of the same run can be compared with.
    pub(crate) fn alone(what: impl Into<String>, figure: String, against: impl Into<String>) -> Self {
        let (what, against, target) = (what.into(), against.into(), "–".to_owned());
        Self { what, figure, against, ratio: None, target, met: None }
    }

    /// The same row with a limit that its figure keeps or not.
    pub(crate) fn limited(self, target: impl Into<String>, met: bool) -> Self {
        Self { target: target.into(), met: Some(met), ..self }
    }
}

/// How long something takes, in seconds.
pub(crate) async fn timed<T>(work: impl Future<Output = Result<T>>) -> Result<(f64, T)> {
    let begun = Instant::now();
    let result = work.await?;
    Ok((begun.elapsed().as_secs_f64(), result))
}

/// The median; NaN of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// Seconds for people.
pub(crate) fn time(seconds: f64) -> String {
    format!("{:.2?}", Duration::from_secs_f64(seconds.max(0.0)))
}

/// Bytes for people.
pub(crate) fn mebibytes(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / f64::from(1 << 20))
}
