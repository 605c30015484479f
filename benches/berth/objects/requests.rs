//! How many calls each contender sends for what a program does, as the service counts them: unlike times, these are the same
//! on a machine with other work.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth::host::command;
use bytes::Bytes;
use serde_json::Value;

use super::contender::{Mount, PREFIX, Who};
use super::lane::LIMIT;
use super::raw::{BUCKET, Raw};
use super::service::{Programs, Service};
use super::{Titled, content, mounts};

/// Files of each step.
const FILES: usize = 20;
/// Bytes of the file that is changed.
const LARGE: u64 = 64 << 20;
/// Nothing more is to be heard of a step when nothing was for so long.
const QUIET: Duration = Duration::from_millis(700);

/// What the service says that it was asked for.
#[derive(Clone, Default)]
struct Heard {
    calls: Arc<Mutex<Calls>>,
}

#[derive(Default)]
struct Calls {
    counts: BTreeMap<String, usize>,
    last: Option<Instant>,
}

impl Heard {
    fn listen(&self, listener: TcpListener) {
        let heard = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let heard = heard.clone();
                std::thread::spawn(move || heard.hear(stream));
            }
        });
    }

    /// Takes messages from a connection until it ends.
    fn hear(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut writer = stream;
        loop {
            let mut length = 0;
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).ok()? == 0 {
                    return None;
                }
                let line = line.trim().to_ascii_lowercase();
                if let Some(value) = line.strip_prefix("content-length:") {
                    length = value.trim().parse().ok()?;
                }
                if line.is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).ok()?;
            self.note(&body);
            writer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").ok()?;
        }
    }

    fn note(&self, body: &[u8]) {
        let entries = serde_json::Deserializer::from_slice(body).into_iter::<Value>().flatten();
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in entries {
            // The service's own calls, such as whether it is healthy, name no bucket.
            if entry.pointer("/api/bucket").and_then(Value::as_str) == Some(BUCKET) {
                let name = entry.pointer("/api/name").and_then(Value::as_str).unwrap_or("unknown");
                *calls.counts.entry(short(name)).or_default() += 1;
                calls.last = Some(Instant::now());
            }
        }
    }

    /// What was heard since it was asked last, when all is quiet.
    fn take(&self) -> BTreeMap<String, usize> {
        let begun = Instant::now();
        loop {
            std::thread::sleep(QUIET / 10);
            let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
            let quiet = calls.last.unwrap_or(begun).max(begun).elapsed() > QUIET;
            if quiet || begun.elapsed() > LIMIT {
                return std::mem::take(&mut calls.counts);
            }
        }
    }
}

/// The names of calls, as one says them.
fn short(name: &str) -> String {
    match name {
        "PutObject" => "PUT",
        "GetObject" => "GET",
        "HeadObject" => "HEAD",
        "DeleteObject" => "DELETE",
        "CopyObject" => "COPY",
        "ListObjectsV2" | "ListObjectsV1" => "LIST",
        "DeleteMultipleObjects" => "DELETE*",
        "NewMultipartUpload" => "BEGIN",
        "PutObjectPart" => "PART",
        "CopyObjectPart" => "COPYPART",
        "CompleteMultipartUpload" => "FINISH",
        other => other,
    }
    .to_owned()
}

/// What a program does.
struct Step {
    what: &'static str,
    /// The least that it takes.
    least: &'static str,
    /// Counts are shown for each of so many.
    each: usize,
    /// In a mount that nobody has used.
    cold: bool,
    work: fn(&Path) -> Result<()>,
}

const STEPS: [Step; 14] = [
    Step { what: "mount, first listing", least: "1 LIST", each: 1, cold: true, work: |path| names(path).map(drop) },
    Step { what: "mkdir", least: "1 PUT", each: 1, cold: false, work: |path| Ok(fs::create_dir(path.join("new"))?) },
    Step {
        what: "a small file created (of 20)",
        least: "1 PUT",
        each: FILES,
        cold: false,
        work: |path| create(&path.join("new")),
    },
    Step {
        what: "read again in the same mount",
        least: "1 HEAD",
        each: FILES,
        cold: false,
        work: |path| read(&path.join("new")),
    },
    Step {
        what: "read, cold (of 20, listed first)",
        least: "1 GET",
        each: FILES,
        cold: true,
        work: |path| read(&path.join("new")),
    },
    Step {
        what: "written over (of 20)",
        least: "1 PUT",
        each: FILES,
        cold: false,
        work: |path| create(&path.join("new")),
    },
    Step {
        what: "a file renamed (of 20)",
        least: "1 COPY, 1 DELETE",
        each: FILES,
        cold: false,
        work: |path| {
            let folder = path.join("new");
            (0..FILES).try_for_each(|number| {
                Ok(fs::rename(folder.join(file(number)), folder.join(format!("moved-{number}")))?)
            })
        },
    },
    Step {
        what: "their directory renamed, for each",
        least: "1 COPY",
        each: FILES,
        cold: false,
        work: |path| Ok(fs::rename(path.join("new"), path.join("newer"))?),
    },
    Step {
        what: "a file removed (of 20)",
        least: "1 DELETE",
        each: FILES,
        cold: false,
        work: |path| {
            let folder = path.join("newer");
            (0..FILES).try_for_each(|number| Ok(fs::remove_file(folder.join(format!("moved-{number}")))?))
        },
    },
    Step {
        what: "4 KiB appended to 64 MiB, fsync",
        least: "1 BEGIN, 1 COPYPART, 1 PART, 1 FINISH",
        each: 1,
        cold: true,
        work: |path| {
            let mut file = File::options().append(true).open(path.join("large"))?;
            file.write_all(&[7; 4096])?;
            Ok(file.sync_all()?)
        },
    },
    Step {
        what: "4 KiB patched in 64 MiB, fsync",
        least: "1 BEGIN, 1 GET, 2 COPYPART, 1 PART, 1 FINISH",
        each: 1,
        cold: true,
        work: |path| {
            let file = File::options().write(true).open(path.join("large"))?;
            file.write_all_at(&[7; 4096], LARGE / 2)?;
            Ok(file.sync_all()?)
        },
    },
    Step {
        what: "`ls -l` of 100 files of another client",
        least: "1 LIST, or 100 HEAD",
        each: 1,
        cold: true,
        work: |path| Ok(command::run("ls", &["-l", &path.join("others").display().to_string()], LIMIT)?),
    },
    Step {
        what: "`find` of 100 files in 10 directories",
        least: "1 LIST",
        each: 1,
        cold: true,
        work: |path| Ok(command::run("find", &[&path.join("tree").display().to_string()], LIMIT)?),
    },
    Step {
        what: "a file unpacked by `tar x` (of 20)",
        least: "1 PUT",
        each: FILES,
        cold: true,
        work: |path| {
            let path = path.display().to_string();
            let archive = format!("{path}.tar");
            Ok(command::run("tar", &["xf", &archive, "-C", &path], LIMIT)?)
        },
    },
];

fn file(number: usize) -> String {
    format!("file-{number:02}")
}

fn create(folder: &Path) -> Result<()> {
    (0..FILES).try_for_each(|number| Ok(fs::write(folder.join(file(number)), [number as u8; 4096])?))
}

fn names(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
}

fn read(folder: &Path) -> Result<()> {
    let names = names(folder)?;
    ensure!(names.len() == FILES, "{} of {FILES} files are listed", names.len());
    names.iter().try_for_each(|path| fs::read(path).map(drop).with_context(|| path.display().to_string()))
}

/// The table of calls.
pub(crate) fn requests(programs: &Programs, folder: &Path, who: &[Who]) -> Result<Titled> {
    let heard = Heard::default();
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let audit = listener.local_addr()?.port();
    heard.listen(listener);
    let service = Service::start(programs, &folder.join("counted"), Some(audit))?;
    let other = Raw::new(&service.access())?;
    other.create_bucket()?;
    other.put(PREFIX, Bytes::new())?;
    let mounts = mounts(programs, folder, "requests", service.access())?;
    let who: Vec<_> = who.iter().copied().filter(|who| *who != Who::Raw).collect();
    let mut cells: Vec<Vec<String>> = STEPS.iter().map(|step| vec![step.what.to_owned()]).collect();
    for contender in &who {
        prepare(&other, &mounts.folder, *contender)?;
        heard.take();
        let mut mount: Option<Mount> = None;
        for (step, row) in STEPS.iter().zip(&mut cells) {
            if step.cold || mount.is_none() {
                if let Some(mount) = mount.take() {
                    mount.stop()?;
                }
                if step.what != STEPS[0].what {
                    heard.take();
                    mount = Some(mounts.cold(*contender)?);
                    heard.take();
                } else {
                    mount = Some(mounts.cold(*contender)?);
                }
            }
            let Some(mount) = &mount else { continue };
            let done = (step.work)(&mount.path);
            let calls = heard.take();
            row.push(match done {
                Ok(()) => shown(&calls, step.each),
                Err(error) => {
                    eprintln!("{}: {contender}: {error:#}", step.what);
                    format!("fails ({})", shown(&calls, step.each))
                }
            });
        }
        if let Some(mount) = mount {
            mount.stop()?;
        }
        other.clear(PREFIX)?;
    }
    let mut table = crate::new_table();
    let header = std::iter::once("what".to_owned()).chain(who.iter().map(ToString::to_string));
    table.set_header(header.chain(["the least".to_owned()]));
    for (mut row, step) in cells.into_iter().zip(&STEPS) {
        row.push(step.least.to_owned());
        table.add_row(row);
    }
    Ok(("Calls to the service".to_owned(), table))
}

/// What is there before a contender begins.
fn prepare(other: &Raw, folder: &Path, who: Who) -> Result<()> {
    other.put(PREFIX, Bytes::new())?;
    other.write_large(&format!("{PREFIX}large"), LARGE, 1)?;
    let small = || Bytes::from_static(b"small");
    let others = (0..100).map(|number| format!("{PREFIX}others/file-{number:03}"));
    let tree = (0..100).map(|number| format!("{PREFIX}tree/directory-{}/file-{number:03}", number % 10));
    let folders = ["others/", "tree/"].map(|name| format!("{PREFIX}{name}")).into_iter();
    let folders = folders.chain((0..10).map(|number| format!("{PREFIX}tree/directory-{number}/")));
    other.put_all(folders.map(|key| (key, Bytes::new())).chain(others.chain(tree).map(|key| (key, small()))))?;
    let source = folder.join(format!("{who}.source/unpacked"));
    fs::create_dir_all(&source)?;
    for number in 0..FILES {
        fs::write(source.join(file(number)), content::random(3000))?;
    }
    let (archive, source) = (folder.join(format!("{who}.tar")), source.with_file_name(""));
    command::run(
        "tar",
        &["cf", &archive.display().to_string(), "-C", &source.display().to_string(), "unpacked"],
        LIMIT,
    )?;
    Ok(())
}

/// Counts of calls, for each of so many.
fn shown(calls: &BTreeMap<String, usize>, each: usize) -> String {
    let count = |calls: usize| {
        if calls.is_multiple_of(each) {
            (calls / each).to_string()
        } else {
            format!("{:.2}", calls as f64 / each as f64)
        }
    };
    let all: Vec<_> = calls.iter().map(|(name, calls)| format!("{} {name}", count(*calls))).collect();
    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
}
