//! What was measured, and the table that is made of it.

use std::collections::BTreeMap;

use comfy_table::Table;

use super::contender::Who;
use crate::measure::{mebibytes, median, time};

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Metric {
    ReadCold,
    ReadWarm,
    Write,
    WriteOver,
    FirstByte,
    Random4Cold,
    Random4Warm,
    Random128Cold,
    Random128Warm,
    Create,
    CreateReturned,
    Read,
    Rename,
    Remove,
    Append,
    Patch,
    Find,
    ListLong,
    ListAgain,
    Untar,
    MemoryRest,
    MemoryLoad,
}

/// How a figure is shown. Times are kept in seconds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    Time,
    /// So many bytes in that time.
    Bytes(u64),
    /// So many of something in that time: the time of each.
    Each(usize),
    /// It is no time, but bytes.
    Memory,
}

/// What is aimed at.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// Before each peer that promises as much.
    First,
    /// The same, and in lane B at least so much of the bare client's speed.
    FirstAndBare(f64),
    /// At most so many bytes.
    AtMost(u64),
    /// The row explains another one.
    None,
}

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Bytes of the large file, and of the one that is changed.
    pub(crate) large: u64,
    pub(crate) changed: u64,
    /// Small files, files to be listed, and files of the archive.
    pub(crate) small: usize,
    pub(crate) listed: usize,
    pub(crate) source: usize,
    /// Random reads.
    pub(crate) reads: usize,
}

impl Metric {
    pub(crate) const ALL: [Self; 22] = [
        Self::ReadCold,
        Self::ReadWarm,
        Self::Write,
        Self::WriteOver,
        Self::FirstByte,
        Self::Random4Cold,
        Self::Random4Warm,
        Self::Random128Cold,
        Self::Random128Warm,
        Self::Create,
        Self::CreateReturned,
        Self::Read,
        Self::Rename,
        Self::Remove,
        Self::Append,
        Self::Patch,
        Self::Find,
        Self::ListLong,
        Self::ListAgain,
        Self::Untar,
        Self::MemoryRest,
        Self::MemoryLoad,
    ];

    fn what(self, sizes: &Sizes) -> String {
        let large = format!("{} MiB", sizes.large >> 20);
        let changed = format!("{} MiB", sizes.changed >> 20);
        match self {
            Self::ReadCold => format!("sequential read of {large}, cold"),
            Self::ReadWarm => "– the second time".to_owned(),
            Self::Write => format!("sequential write of {large}"),
            Self::WriteOver => "– over the old file".to_owned(),
            Self::FirstByte => format!("first byte of {large}, cold"),
            Self::Random4Cold => format!("{} random reads of 4 KiB, cold, each", sizes.reads),
            Self::Random4Warm => "– the second time".to_owned(),
            Self::Random128Cold => format!("{} random reads of 128 KiB, cold, each", sizes.reads),
            Self::Random128Warm => "– the second time".to_owned(),
            Self::Create => format!("{} small files created, each", sizes.small),
            Self::CreateReturned => "– until the last close returns, each".to_owned(),
            Self::Read => "– listed and read, cold, each".to_owned(),
            Self::Rename => "– their directory renamed".to_owned(),
            Self::Remove => "– removed, each".to_owned(),
            Self::Append => format!("4 KiB appended to {changed}, fsync"),
            Self::Patch => format!("4 KiB in the midst of {changed}, fsync"),
            Self::ListLong => format!("`ls -l` of {} files, which no mount has seen yet", sizes.listed),
            Self::ListAgain => "– by the next mount".to_owned(),
            Self::Find => format!("`find` of {} files in 100 directories, likewise", sizes.listed),
            Self::Untar => format!("`tar x` of {} files", sizes.source),
            Self::MemoryRest => "memory at rest".to_owned(),
            Self::MemoryLoad => "– at most, reading and writing the large file".to_owned(),
        }
    }

    fn unit(self, sizes: &Sizes) -> Unit {
        match self {
            Self::ReadCold | Self::ReadWarm | Self::Write | Self::WriteOver => Unit::Bytes(sizes.large),
            Self::Random4Cold | Self::Random4Warm | Self::Random128Cold | Self::Random128Warm => {
                Unit::Each(sizes.reads)
            }
            Self::Create | Self::CreateReturned | Self::Read | Self::Remove => Unit::Each(sizes.small),
            Self::MemoryRest | Self::MemoryLoad => Unit::Memory,
            _ => Unit::Time,
        }
    }

    /// Does what a peer promises about close matter?
    fn writes(self) -> bool {
        matches!(
            self,
            Self::Write
                | Self::WriteOver
                | Self::Create
                | Self::CreateReturned
                | Self::Append
                | Self::Patch
                | Self::Untar
        )
    }

    fn target(self) -> Target {
        match self {
            Self::ReadCold | Self::Write => Target::FirstAndBare(0.9),
            Self::Create => Target::FirstAndBare(1.0 / 1.15),
            Self::CreateReturned => Target::None,
            Self::MemoryRest => Target::AtMost(15 << 20),
            Self::MemoryLoad => Target::AtMost(64 << 20),
            _ => Target::First,
        }
    }
}

/// What came of measuring something.
#[derive(Clone, Debug)]
enum Outcome {
    /// Seconds, or bytes.
    Figures(Vec<f64>),
    /// It took more than so many seconds.
    Beyond(f64),
    Failed,
}

/// All figures of a lane.
pub(crate) struct Sheet {
    pub(crate) sizes: Sizes,
    /// Whether what the network takes is the larger part.
    far: bool,
    outcomes: BTreeMap<(Metric, Who), Outcome>,
}

impl Sheet {
    pub(crate) fn new(sizes: Sizes, far: bool) -> Self {
        Self { sizes, far, outcomes: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, metric: Metric, who: Who, figure: f64) {
        match self.outcomes.entry((metric, who)).or_insert(Outcome::Figures(Vec::new())) {
            Outcome::Figures(figures) => figures.push(figure),
            other => *other = Outcome::Figures(vec![figure]),
        }
    }

    /// It was given up after so many seconds.
    pub(crate) fn add_beyond(&mut self, metric: Metric, who: Who, seconds: f64) {
        self.outcomes.entry((metric, who)).or_insert(Outcome::Beyond(seconds));
    }

    pub(crate) fn add_failure(&mut self, metric: Metric, who: Who) {
        self.outcomes.entry((metric, who)).or_insert(Outcome::Failed);
    }

    fn figure(&self, metric: Metric, who: Who) -> Option<f64> {
        match self.outcomes.get(&(metric, who))? {
            Outcome::Figures(figures) => Some(median(figures)),
            Outcome::Beyond(seconds) => Some(*seconds),
            Outcome::Failed => None,
        }
    }

    fn shown(&self, metric: Metric, who: Who) -> String {
        let unit = metric.unit(&self.sizes);
        let figure = match self.outcomes.get(&(metric, who)) {
            None => return "–".to_owned(),
            Some(Outcome::Failed) => return "fails".to_owned(),
            Some(Outcome::Beyond(seconds)) => format!("> {seconds:.0} s in all"),
            Some(Outcome::Figures(figures)) => show(median(figures), unit),
        };
        let weaker = who == Who::Rclone && metric.writes();
        if weaker { format!("{figure} ¹") } else { figure }
    }

    /// The best time, or the least memory, of those that promise as much.
    fn best_peer(&self, metric: Metric, who: Who) -> Option<f64> {
        let peers = [Who::S3fs, Who::Rclone].into_iter();
        let peers = peers.filter(|peer| !(metric.writes() && who == Who::Strict && *peer == Who::Rclone));
        peers.filter_map(|peer| self.figure(metric, peer)).reduce(f64::min)
    }

    /// Times as fast (or as small) as the best peer that promises as much.
    fn lead(&self, metric: Metric, who: Who) -> Option<f64> {
        Some(self.best_peer(metric, who)? / self.figure(metric, who)?)
    }

    /// Times as fast as the bare client.
    fn of_bare(&self, metric: Metric, who: Who) -> Option<f64> {
        Some(self.figure(metric, Who::Raw)? / self.figure(metric, who)?)
    }

    fn verdict(&self, metric: Metric) -> (String, Option<bool>) {
        let leads: Vec<_> = [Who::Strict, Who::WriteBack].iter().filter_map(|who| self.lead(metric, *who)).collect();
        let first = (!leads.is_empty()).then(|| leads.iter().all(|lead| *lead >= 1.0));
        match metric.target() {
            Target::None => ("–".to_owned(), None),
            Target::FirstAndBare(share) if self.far => {
                let enough = self.of_bare(metric, Who::Strict).map(|bare| bare >= share);
                let met = first.zip(enough).map(|(first, enough)| first && enough);
                (format!("first, ≥ {share:.2} of bare"), met)
            }
            Target::First | Target::FirstAndBare(_) => ("first".to_owned(), first),
            Target::AtMost(bytes) => {
                let ours = [Who::Strict, Who::WriteBack].iter().filter_map(|who| self.figure(metric, *who));
                let most = ours.reduce(f64::max);
                (format!("< {} MiB", bytes >> 20), most.map(|most| most < as_f64(bytes)))
            }
        }
    }

    /// The table of those metrics that were measured.
    pub(crate) fn table(&self) -> Table {
        let mut table = crate::new_table();
        table.set_header([
            "what",
            "strict",
            "write-back",
            "s3fs",
            "rclone",
            "bare client",
            "strict: best peer",
            "write-back: best peer",
            "strict: bare",
            "target",
            "met",
        ]);
        for metric in Metric::ALL {
            if !self.outcomes.keys().any(|(measured, _)| *measured == metric) {
                continue;
            }
            let times = |ratio: Option<f64>| ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}x"));
            let (target, met) = self.verdict(metric);
            let whos = [Who::Strict, Who::WriteBack, Who::S3fs, Who::Rclone, Who::Raw];
            let mut cells = vec![metric.what(&self.sizes)];
            cells.extend(whos.map(|who| self.shown(metric, who)));
            cells.push(times(self.lead(metric, Who::Strict)));
            cells.push(times(self.lead(metric, Who::WriteBack)));
            cells.push(times(self.of_bare(metric, Who::Strict)));
            cells.extend([target, crate::met(met).to_owned()]);
            table.add_row(cells);
        }
        table
    }
}

fn show(figure: f64, unit: Unit) -> String {
    match unit {
        Unit::Time => time(figure),
        Unit::Bytes(bytes) => format!("{:.0} MiB/s", as_f64(bytes) / figure / f64::from(1 << 20)),
        Unit::Each(count) => time(figure / as_f64(count as u64)),
        Unit::Memory => mebibytes(figure),
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes below 2^52")]
pub(crate) fn as_f64(count: u64) -> f64 {
    count as f64
}
