//! What a look at a configuration and its storage found: plain data, for `berth doctor` to show.

/// One check, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How it ended.
    pub verdict: Verdict,
    /// What was looked at: `main`, `main/cephfs/csi`, `pool fast`.
    pub subject: String,
    /// What was found.
    pub what: String,
    /// What to do about it, and empty where there is nothing to do.
    pub advice: String,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is as it should be.
    Fine,
    /// Berth works with it, but somebody should look.
    Doubtful,
    /// Berth does not work with it.
    Wrong,
}

impl Finding {
    pub(super) fn fine(subject: &str, what: impl Into<String>) -> Self {
        Self::new(Verdict::Fine, subject, what, "")
    }

    pub(super) fn doubtful(subject: &str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Verdict::Doubtful, subject, what, advice)
    }

    pub(super) fn wrong(subject: &str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Verdict::Wrong, subject, what, advice)
    }

    fn new(verdict: Verdict, subject: &str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict, subject: subject.to_owned(), what: what.into(), advice: advice.into() }
    }
}
