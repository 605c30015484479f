//! `berth pool`: the disks of this machine, the pools made of them, and making them.

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;

use super::table::columns;
use crate::backend::nvme::disks::{self, DiskView, MemberView, Plan, PoolView, Refusal, Verdict};
use crate::config::{Config, Deadlines, Layout, Source};
use crate::host::disks::{Disk, Found, Machine};
use crate::host::smart::Smart;
use crate::volume::format_bytes;

/// Which pools, and what about them.
#[derive(Debug, Args)]
pub struct PoolArguments {
    /// What to do.
    #[command(subcommand)]
    pub command: PoolCommand,
}

/// What to do with pools.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Show every disk of this machine: what is on it, and which pool it belongs to or would fit. Changes nothing.
    Discover {
        /// The YAML file with the pools. Without it only the disks are shown.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print JSON, for programs: sizes are in bytes.
        #[arg(long)]
        json: bool,
    },
    /// Make a pool of the blank disks that its rules in the configuration mean, or add them to it.
    Create {
        /// The pool's name.
        name: String,
        /// The YAML file; docs/configuration.md describes it.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Do it without asking.
        #[arg(long)]
        yes: bool,
    },
    /// Show the pools: what they are made of, how full they are, how their disks are.
    Show {
        /// Only this one.
        name: Option<String>,
        /// The YAML file; docs/configuration.md describes it.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print JSON, for programs: sizes are in bytes.
        #[arg(long)]
        json: bool,
    },
}

/// Does it. Blocks.
///
/// # Errors
/// When it can't be done, or a disk could not be made a part of the pool.
pub fn run(arguments: PoolArguments) -> Result<()> {
    match arguments.command {
        PoolCommand::Discover { config, json } => discover(config.as_deref(), json),
        PoolCommand::Create { name, config, yes } => create(&name, &Config::load(&config)?, yes),
        PoolCommand::Show { name, config, json } => show(name.as_deref(), &Config::load(&config)?, json),
    }
}

/// A disk as `--json` shows it. The keys are a promise.
#[derive(Debug, Serialize)]
struct DiskJson {
    name: String,
    path: PathBuf,
    links: Vec<PathBuf>,
    /// In bytes.
    size: u64,
    model: String,
    serial: String,
    wwid: String,
    rotational: bool,
    /// `null`: it could not be told.
    blank: Option<bool>,
    found: Vec<String>,
    /// `member`, `interrupted`, `fits`, `refused`, `none`.
    verdict: &'static str,
    pool: Option<String>,
    why: Vec<String>,
}

impl From<DiskView> for DiskJson {
    fn from(view: DiskView) -> Self {
        let (verdict, pool, why) = match view.verdict {
            Verdict::Member(pool) => ("member", Some(pool), Vec::new()),
            Verdict::HalfMade(pool) => ("interrupted", Some(pool), Vec::new()),
            Verdict::Fits(pool) => ("fits", Some(pool), Vec::new()),
            Verdict::Refused(pool, why) => ("refused", Some(pool), why),
            Verdict::Unmeant(why) => {
                ("none", None, why.into_iter().map(|(pool, why)| format!("{pool}: {why}")).collect())
            }
        };
        let Disk { name, path, links, size, model, serial, wwid, rotational, .. } = view.disk;
        let blank = view.found.as_ref().ok().map(Vec::is_empty);
        let found = match view.found {
            Ok(found) => found.iter().map(Found::to_string).collect(),
            Err(error) => vec![error],
        };
        Self { name, path, links, size, model, serial, wwid, rotational, blank, found, verdict, pool, why }
    }
}

impl DiskJson {
    /// What it is to the pools, in words.
    fn standing(&self) -> String {
        let pool = self.pool.as_deref().unwrap_or_default();
        match self.verdict {
            "member" => format!("belongs to {pool}"),
            "interrupted" => format!("interrupted: `berth pool create {pool}` goes on"),
            "fits" => format!("fits {pool}"),
            "refused" => format!("not for {pool}: {}", self.why.join("; ")),
            _ => self.why.join("; "),
        }
    }
}

fn discover(config: Option<&Path>, json: bool) -> Result<()> {
    let (pools, deadline) = match config {
        Some(file) => {
            let config = Config::load(file)?;
            (config.pools, config.deadlines.command)
        }
        None => (Vec::new(), Deadlines::default().command),
    };
    let views: Vec<_> =
        disks::discover(&pools, &Machine::default(), deadline)?.into_iter().map(DiskJson::from).collect();
    if json {
        super::say(&serde_json::to_string_pretty(&json!({ "disks": views }))?);
        return Ok(());
    }
    let row = |disk: &DiskJson| {
        let found = match disk.verdict {
            "fits" => "blank".to_owned(),
            "none" if disk.blank == Some(true) => "blank".to_owned(),
            // All the rest is what a part of a pool has on it.
            "member" => disk.found.iter().filter(|found| found.starts_with("mounted")).cloned().collect(),
            _ => disk.found.join("; "),
        };
        let DiskJson { name, model, serial, .. } = disk;
        [name.clone(), format_bytes(disk.size), model.clone(), serial.clone(), found, disk.standing()]
    };
    super::say(&columns(["DISK", "SIZE", "MODEL", "SERIAL", "WHAT IS ON IT", "POOL"], views.iter().map(row)));
    Ok(())
}

fn create(name: &str, config: &Config, yes: bool) -> Result<()> {
    let (machine, deadline) = (Machine::default(), config.deadlines.command);
    let plan = disks::plan(name, &config.pools, &machine, deadline)?;
    super::say(&plan_text(&plan));
    if plan.take.is_empty() && plan.members.is_empty() {
        bail!("there is no blank disk for pool {name}: nothing was changed");
    }
    // A striped pool may have its volume group, and not yet its file system.
    if !plan.take.is_empty() || plan.layout == Layout::Striped {
        if !plan.take.is_empty() && !yes && !agrees(&plan)? {
            bail!("nothing was changed");
        }
        let failures = disks::make(&plan, &machine, deadline)?;
        if !failures.is_empty() {
            let all: Vec<_> = failures.iter().map(ToString::to_string).collect();
            bail!(
                "{} of {} disks could not be made a part of the pool: {}",
                all.len(),
                plan.take.len(),
                all.join("; ")
            );
        }
    }
    let pools = disks::show(&config.pools, Some(name), true, deadline)?;
    super::say(&pools_text(&pools));
    let troubles: Vec<_> = pools.iter().flat_map(|pool| &pool.parts).filter_map(|part| part.trouble.clone()).collect();
    if !troubles.is_empty() {
        bail!("{}", troubles.join("; "));
    }
    Ok(())
}

fn plan_text(plan: &Plan) -> String {
    let row = |disk: &Disk, what: String| {
        let Disk { name, size, model, serial, .. } = disk.clone();
        [name, format_bytes(size), model, serial, what]
    };
    let taken =
        plan.take.iter().map(|disk| row(disk, format!("becomes a part of {} ({})", plan.pool, plan.layout.name())));
    let members = plan.members.iter().map(|disk| row(disk, format!("belongs to {} already", plan.pool)));
    let refused = plan.refused.iter().map(|Refusal { disk, why }| row(disk, format!("left alone: {}", why.join("; "))));
    columns(["DISK", "SIZE", "MODEL", "SERIAL", "WHAT WOULD BE DONE"], taken.chain(members).chain(refused))
}

/// Asks a person.
fn agrees(plan: &Plan) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("nobody can be asked here: say --yes if that is right; nothing was changed");
    }
    let count = plan.take.len();
    let what = if count == 1 { "this disk".to_owned() } else { format!("these {count} disks") };
    print!("Make {what} a part of pool {}? Type yes: ", plan.pool);
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}

/// A pool as `--json` shows it. The keys are a promise.
#[derive(Debug, Serialize)]
struct PoolJson<'a> {
    name: &'a str,
    /// `directory`, `disks` or `group`.
    kind: &'static str,
    layout: Option<&'static str>,
    parts: Vec<PartJson<'a>>,
}

/// What volumes are carved from. The keys are a promise; `null` is what could not be told.
#[derive(Debug, Serialize)]
struct PartJson<'a> {
    path: &'a Path,
    uuid: Option<&'a str>,
    disks: Vec<PartDiskJson<'a>>,
    trouble: Option<&'a str>,
    warnings: &'a [String],
    size: Option<u64>,
    free: Option<u64>,
    promised: Option<u64>,
    reflink: Option<bool>,
    quotas: Option<bool>,
}

/// A disk of a part. The keys are a promise.
#[derive(Debug, Serialize)]
struct PartDiskJson<'a> {
    name: &'a str,
    model: &'a str,
    serial: &'a str,
    /// In bytes.
    size: u64,
    smart: Option<&'a Smart>,
}

impl<'a> From<&'a PoolView> for PoolJson<'a> {
    fn from(view: &'a PoolView) -> Self {
        let (kind, layout) = match &view.source {
            Source::Folder => ("directory", None),
            Source::Disks(disks) => ("disks", Some(disks.layout.name())),
            Source::Group(_) => ("group", None),
        };
        Self { name: &view.name, kind, layout, parts: view.parts.iter().map(PartJson::from).collect() }
    }
}

impl<'a> From<&'a MemberView> for PartJson<'a> {
    fn from(view: &'a MemberView) -> Self {
        let disk = |(disk, smart): &'a (Disk, Option<Smart>)| PartDiskJson {
            name: &disk.name,
            model: &disk.model,
            serial: &disk.serial,
            size: disk.size,
            smart: smart.as_ref(),
        };
        Self {
            path: &view.path,
            uuid: view.uuid.as_deref(),
            disks: view.disks.iter().map(disk).collect(),
            trouble: view.trouble.as_deref(),
            warnings: &view.warnings,
            size: view.size,
            free: view.free,
            promised: view.promised,
            reflink: view.reflink,
            quotas: view.quotas,
        }
    }
}

fn show(name: Option<&str>, config: &Config, json: bool) -> Result<()> {
    let pools = disks::show(&config.pools, name, false, config.deadlines.command)?;
    if json {
        let pools: Vec<_> = pools.iter().map(PoolJson::from).collect();
        super::say(&serde_json::to_string_pretty(&json!({ "pools": pools }))?);
        return Ok(());
    }
    super::say(&pools_text(&pools));
    Ok(())
}

fn pools_text(pools: &[PoolView]) -> String {
    let bytes = |size: Option<u64>| size.map_or("-".to_owned(), format_bytes);
    let rows = pools.iter().flat_map(|pool| {
        pool.parts.iter().map(move |part| {
            let disks: Vec<_> = part.disks.iter().map(|(disk, _)| disk.to_string()).collect();
            let disk = if disks.is_empty() { "-".to_owned() } else { disks.join(", ") };
            let path = part.path.display().to_string();
            [
                pool.name.clone(),
                disk,
                path,
                bytes(part.size),
                bytes(part.promised),
                bytes(part.free),
                abilities(part),
                state(part),
            ]
        })
    });
    columns(["POOL", "DISK", "PATH", "SIZE", "PROMISED", "FREE", "HAS", "STATE"], rows)
}

fn abilities(part: &MemberView) -> String {
    let has = [(part.reflink, "reflink"), (part.quotas, "quotas")];
    let words: Vec<_> = has.iter().filter(|(has, _)| *has == Some(true)).map(|(_, word)| *word).collect();
    if words.is_empty() { "-".to_owned() } else { words.join(", ") }
}

fn state(part: &MemberView) -> String {
    let mut words: Vec<_> = part.trouble.iter().chain(&part.warnings).cloned().collect();
    if words.is_empty() {
        words.push("ok".to_owned());
    }
    for smart in part.disks.iter().filter_map(|(_, smart)| smart.as_ref()) {
        let Smart { percentage_used, media_errors, temperature, .. } = smart;
        let degrees = temperature.map(|degrees| format!(", {degrees} °C")).unwrap_or_default();
        words.push(format!("wear {percentage_used} %, media errors {media_errors}{degrees}"));
    }
    words.join("; ")
}
