//! What was done, how it went and how long it took: one short table at the end.

use std::future::Future;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::cli::table::columns;

/// The steps so far.
pub(super) struct Report {
    rows: Vec<Row>,
    /// Set by a signal: no further step begins.
    pub(super) stop: Arc<AtomicBool>,
}

struct Row {
    step: &'static str,
    outcome: Outcome,
    result: String,
    took: Duration,
}

#[derive(Clone, Copy)]
enum Outcome {
    Done,
    Skipped,
    Failed,
}

impl Report {
    pub(super) fn new(stop: Arc<AtomicBool>) -> Self {
        Self { rows: Vec::new(), stop }
    }

    /// Does one step and notes how it went. The work says its result in a few words.
    pub(super) async fn step<T>(
        &mut self,
        step: &'static str,
        work: impl Future<Output = Result<(T, String)>>,
    ) -> Result<T> {
        if self.stop.load(Ordering::Relaxed) {
            bail!("interrupted before: {step}");
        }
        let begun = Instant::now();
        let done = work.await;
        let (outcome, result) = match &done {
            Ok((_, result)) => (Outcome::Done, result.clone()),
            Err(_) => (Outcome::Failed, "see below".to_owned()),
        };
        self.rows.push(Row { step, outcome, result, took: begun.elapsed() });
        done.map(|(value, _)| value)
    }

    /// Notes a step that is not possible here, and why.
    pub(super) fn skip(&mut self, step: &'static str, why: &str) {
        let (outcome, took) = (Outcome::Skipped, Duration::ZERO);
        self.rows.push(Row { step, outcome, result: why.to_owned(), took });
    }

    /// The table; in colours for a terminal whose user has not refused them (no-color.org).
    pub(super) fn print(&self) {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        crate::cli::say(&self.render(std::io::stdout().is_terminal() && !refused));
    }

    fn render(&self, colours: bool) -> String {
        let text = columns(["STEP", "RESULT", "", "TIME"], self.rows.iter().map(Row::cells));
        if !colours {
            return text;
        }
        let mut lines = text.lines();
        let header = lines.next().map(|line| format!("\x1b[1m{line}\x1b[0m"));
        header
            .into_iter()
            .chain(lines.zip(&self.rows).map(|(line, row)| row.coloured(line)))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl Row {
    fn cells(&self) -> [String; 4] {
        let took = match self.outcome {
            Outcome::Skipped => String::new(),
            Outcome::Done | Outcome::Failed => format!("{:.2} s", self.took.as_secs_f64()),
        };
        [self.step.to_owned(), self.outcome.word().to_owned(), self.result.clone(), took]
    }

    /// Colours the outcome, which is the first word behind the step.
    fn coloured(&self, line: &str) -> String {
        let word = self.outcome.word();
        match line.split_at_checked(self.step.len()) {
            Some((step, rest)) => {
                step.to_owned() + &rest.replacen(word, &format!("\x1b[{}m{word}\x1b[0m", self.outcome.colour()), 1)
            }
            None => line.to_owned(),
        }
    }
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Skipped => "skipped",
            Self::Failed => "failed",
        }
    }

    /// Green, yellow, red.
    fn colour(self) -> u8 {
        match self {
            Self::Done => 32,
            Self::Skipped => 33,
            Self::Failed => 31,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_table_has_a_line_for_each_step_and_only_the_outcome_is_coloured() {
        let mut report = Report::new(Arc::default());
        report.step("look ok", async { Ok(((), "as it should".to_owned())) }).await.unwrap();
        report.skip("snapshot", "no reflink");
        let failed: Result<()> = report.step("grow", async { bail!("no room") }).await;
        assert!(failed.is_err());
        let lines: Vec<_> = report.render(false).lines().map(str::to_owned).collect();
        assert!(lines[1].starts_with("look ok   ok       as it should"), "{lines:?}");
        assert!(lines[2].contains("skipped  no reflink") && lines[3].contains("failed   see below"), "{lines:?}");
        let coloured = report.render(true);
        assert!(coloured.contains("look ok   \x1b[32mok\x1b[0m"), "{coloured:?}");
        report.stop.store(true, Ordering::Relaxed);
        assert!(report.step("more", async { Ok(((), String::new())) }).await.is_err());
    }
}
