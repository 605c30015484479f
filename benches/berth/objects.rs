//! Object storage against other mounts of it, and against a bare client, on a MinIO of its own.
//!
//! Lane A is the loopback interface: what a mount costs in processor time. Lane B goes through a proxy that delays each
//! reply and limits each connection, as S3 is: what a mount costs in round trips.

mod contender;
mod content;
mod lane;
mod passes;
mod raw;
mod requests;
mod service;
mod sheet;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use berth::host::command;
use bytes::Bytes;
use comfy_table::Table;

use crate::Options;
use contender::{Mounts, PREFIX, Who};
use lane::{LIMIT, Lane, Pass};
use passes::{CHANGED, DEEP, FLAT, LARGE, SEED};
use raw::Raw;
use service::{Access, Keeper, Programs, Service};
use sheet::{Sheet, Sizes};

/// A table and what is above it.
pub(crate) type Titled = (String, Table);

/// The rows, by the names that `BENCH_ONLY` knows.
pub(crate) const ROWS: [&str; 8] = [
    "objects-stream",
    "objects-first-byte",
    "objects-random",
    "objects-small",
    "objects-change",
    "objects-list",
    "objects-tar",
    REQUESTS,
];
const REQUESTS: &str = "objects-requests";

const PROMISE: &str = "¹ its close and fsync do not wait for the bucket";

/// Directories of the tree that is walked through.
const DIRECTORIES: usize = 100;

fn pass(row: &str) -> Option<Pass> {
    Some(match row {
        "objects-stream" => passes::stream,
        "objects-first-byte" => passes::first_byte,
        "objects-random" => passes::random,
        "objects-small" => passes::small,
        "objects-change" => passes::change,
        "objects-list" => passes::list,
        "objects-tar" => passes::untar,
        _ => return None,
    })
}

/// Measures these rows, and returns a table for each lane. In a thread of its own: calls into mounts block, and a thread that is
/// stuck in one must not keep this process from ending.
pub(crate) async fn objects(folder: &Path, options: &Options, rows: Vec<&'static str>) -> Result<Vec<Titled>> {
    let programs = Programs::default();
    let (alive, thread) = std::sync::mpsc::channel();
    // However this ends: nothing that was started stays.
    let _keeper = Keeper { programs: programs.clone(), thread };
    let (folder, options) = (folder.join("objects"), options.clone());
    let (send, done) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _alive = alive;
        // Nobody may be waiting any more.
        let _ = send.send(all(&programs, &folder, &options, &rows));
    });
    done.await.context("the thread that measures object storage broke")?
}

fn all(programs: &Programs, folder: &Path, options: &Options, rows: &[&str]) -> Result<Vec<Titled>> {
    std::fs::create_dir(folder)?;
    let mut who = Vec::new();
    for contender in Who::ALL {
        if !options.wants_contender(&contender.to_string()) {
            continue;
        }
        match contender.missing() {
            Some(why) => println!("SKIPPED {contender}: {why}"),
            None => who.push(contender),
        }
    }
    if let Some(why) = ["minio", "toxiproxy-server"].into_iter().find(|name| service::find_program(name).is_none()) {
        println!("SKIPPED object storage: no {why}: scripts/setup.sh bench builds it");
        return Ok(Vec::new());
    }
    let (mut tables, mut failures) = (Vec::new(), Vec::new());
    let timed: Vec<_> = rows.iter().filter_map(|row| Some((*row, pass(row)?))).collect();
    if !timed.is_empty() {
        let service = Service::start(programs, &folder.join("service"), None)?;
        let other = Raw::new(&service.access())?;
        let sizes = sizes(options);
        let archive = prepare(&other, folder, &sizes, rows)?;
        for (name, far) in [("A", false), ("B", true)] {
            if !options.wants_lane(name) {
                continue;
            }
            let (_proxy, access) = if far {
                let (proxy, access) = service.far_away(folder)?;
                (Some(proxy), access)
            } else {
                (None, service.access())
            };
            let mut lane = Lane {
                bare: Raw::new(&access)?,
                mounts: mounts(programs, folder, name, access)?,
                other: &other,
                sheet: Sheet::new(sizes.in_lane(far), far),
                archive: archive.clone(),
                who: who.clone(),
                rounds: options.rounds,
                failures: Vec::new(),
            };
            for (row, pass) in &timed {
                eprintln!("measuring: {row}, lane {name}");
                lane.in_turns(row, *pass);
            }
            let title = if far {
                format!(
                    "Lane B: each reply {} ms later, {} MB/s for each connection; {PROMISE}",
                    service::LATENCY,
                    service::BANDWIDTH / 1000
                )
            } else {
                format!("Lane A: loopback; {PROMISE}")
            };
            eprintln!("{title}\n{}", lane.sheet.table());
            tables.push((title, lane.sheet.table()));
            failures.append(&mut lane.failures);
        }
    }
    if rows.contains(&REQUESTS) {
        eprintln!("measuring: {REQUESTS}");
        tables.push(requests::requests(programs, folder, &who)?);
    }
    if !failures.is_empty() {
        for (title, table) in tables {
            println!("{title}\n{table}");
        }
        bail!("object storage failed: {}", failures.join("; "));
    }
    Ok(tables)
}

fn mounts(programs: &Programs, folder: &Path, lane: &str, access: Access) -> Result<Mounts> {
    let folder = folder.join(format!("lane-{lane}"));
    std::fs::create_dir(&folder)?;
    Ok(Mounts { programs: programs.clone(), access, folder })
}

fn sizes(options: &Options) -> Sizes {
    let large = options.object_size;
    Sizes {
        large,
        changed: (large / 4).max(32 << 20),
        small: options.count(1000, 50),
        listed: options.count(10_000, 500),
        source: options.count(200, 50),
        reads: options.count(256, 32),
    }
}

impl Sizes {
    /// Far away everything that is done one by one takes its time, and peers take it several times: fewer of those.
    fn in_lane(self, far: bool) -> Self {
        if far { Self { small: self.small / 5, reads: self.reads / 2, ..self } } else { self }
    }
}

/// Makes what the other client has in the bucket before anybody mounts it, and the archive to unpack.
fn prepare(other: &Raw, folder: &Path, sizes: &Sizes, rows: &[&str]) -> Result<PathBuf> {
    let wants = |names: &[&str]| names.iter().any(|name| rows.contains(name));
    other.create_bucket()?;
    other.put(PREFIX, Bytes::new())?;
    if wants(&["objects-stream", "objects-first-byte", "objects-random"]) {
        other.write_large(&format!("{PREFIX}{LARGE}"), sizes.large, SEED)?;
    }
    if wants(&["objects-change"]) {
        other.write_large(&format!("{PREFIX}{CHANGED}"), sizes.changed, SEED)?;
    }
    if wants(&["objects-list"]) {
        other.put_all(listed(sizes.listed))?;
    }
    let archive = folder.join("source.tar");
    if wants(&["objects-tar"]) {
        let source = folder.join("source");
        for (name, size) in passes::source(sizes.source) {
            let path = source.join(name);
            std::fs::create_dir_all(path.parent().unwrap_or(&source))?;
            std::fs::write(path, content::random(usize::try_from(size)?))?;
        }
        let (archive, source) = (archive.display().to_string(), source.display().to_string());
        command::run("tar", &["cf", &archive, "-C", &source, "project"], LIMIT)?;
    }
    Ok(archive)
}

/// As many files in one directory, and again in a hundred.
fn listed(count: usize) -> impl Iterator<Item = (String, Bytes)> {
    let folders = [format!("{PREFIX}{FLAT}/"), format!("{PREFIX}{DEEP}/")].into_iter();
    let folders = folders.chain((0..DIRECTORIES).map(|number| format!("{PREFIX}{DEEP}/directory-{number:02}/")));
    let flat = (0..count).map(|number| format!("{PREFIX}{FLAT}/file-{number:05}"));
    let deep =
        (0..count).map(|number| format!("{PREFIX}{DEEP}/directory-{:02}/file-{number:05}", number % DIRECTORIES));
    folders.map(|key| (key, Bytes::new())).chain(flat.chain(deep).map(|key| (key, Bytes::from_static(b"listed"))))
}
