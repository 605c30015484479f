//! What the contenders do: each function is done once by each of them, in each round.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth::host::command;
use berth::objectfs::settings::HIDDEN;
use bytes::Bytes;

use super::contender::{PREFIX, Who};
use super::content::{self, BLOCK};
use super::lane::{LIMIT, Lane};
use super::sheet::{Metric, as_f64};

/// Made by the other client: the file that is read, and the one whose copies are changed.
pub(crate) const LARGE: &str = "large.bin";
pub(crate) const CHANGED: &str = "changed.bin";
/// Seeds of these, and of what is written.
pub(crate) const SEED: u64 = 1;
const WRITTEN: [u64; 2] = [2, 3];
/// Folders of many files, of the other client.
pub(crate) const FLAT: &str = "flat";
pub(crate) const DEEP: &str = "deep";
/// A program's buffer.
const BUFFER: usize = 1 << 20;
/// After so long a mount is at rest.
const REST: Duration = Duration::from_secs(1);

fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// The large file from begin to end: read twice, and written twice. What that takes of memory.
pub(crate) fn stream(lane: &mut Lane<'_>, who: Who, round: usize) -> Result<()> {
    let size = lane.sheet.sizes.large;
    let name = format!("written-{who}-{round}.bin");
    let written = key(&name);
    if who == Who::Raw {
        lane.measure_bare(Metric::ReadCold, |bare| bare.read_large(&key(LARGE), size, SEED))?;
        lane.measure_bare(Metric::Write, |bare| bare.write_large(&written, size, WRITTEN[0]))?;
        lane.measure_bare(Metric::WriteOver, |bare| bare.write_large(&written, size, WRITTEN[1]))?;
        return lane.other.delete(&written);
    }
    let mount = lane.mounts.cold(who)?;
    std::thread::sleep(REST);
    lane.sheet.add(Metric::MemoryRest, who, as_f64(mount.memory()?.now));
    for metric in [Metric::ReadCold, Metric::ReadWarm] {
        lane.measure(&mount, metric, move |path| read_file(&path.join(LARGE), size, SEED), |_| Ok(()))?;
    }
    let mut tag = None;
    for (metric, seed) in [Metric::Write, Metric::WriteOver].into_iter().zip(WRITTEN) {
        let (name, mut buffer, before) = (name.clone(), content::random(BUFFER), tag.take());
        lane.measure(
            &mount,
            metric,
            move |path| write_file(&path.join(name), size, seed, &mut buffer),
            |other| {
                tag = Some(other.wait_for(&written, size, before.as_deref(), LIMIT)?);
                Ok(())
            },
        )?;
        for offset in [0, size / 2 / BLOCK * BLOCK, size - BLOCK] {
            content::check(&lane.other.get(&written, Some(offset..offset + BLOCK))?, offset, seed)?;
        }
    }
    lane.sheet.add(Metric::MemoryLoad, who, as_f64(mount.memory()?.most));
    lane.other.delete(&written)?;
    mount.stop()
}

fn read_file(path: &Path, size: u64, seed: u64) -> Result<()> {
    let (mut file, mut buffer, mut at) = (File::open(path)?, vec![0; BUFFER], 0);
    loop {
        // Whole buffers, since stamps are looked for in them.
        let mut filled = 0;
        while filled < BUFFER {
            match file.read(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        content::check(&buffer[..filled], at, seed)?;
        at += filled as u64;
        if filled < BUFFER {
            break;
        }
    }
    ensure!(at == size, "{} bytes were read of {size}", at);
    Ok(())
}

fn write_file(path: &Path, size: u64, seed: u64, buffer: &mut [u8]) -> Result<()> {
    let mut file = File::create(path)?;
    let mut at = 0;
    while at < size {
        let length = usize::try_from(size - at).map_or(BUFFER, |left| left.min(BUFFER));
        content::fill(&mut buffer[..length], at, seed);
        file.write_all(&buffer[..length])?;
        at += length as u64;
    }
    close(file)
}

/// Closes, and hears of errors, which a drop would not.
fn close(file: File) -> Result<()> {
    #[expect(unsafe_code, reason = "the one way to learn what close(2) says")]
    // SAFETY: the descriptor's owner has given it away, and it is closed once.
    match unsafe { libc::close(file.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

/// The first byte of a file in a mount that nobody has used.
pub(crate) fn first_byte(lane: &mut Lane<'_>, who: Who, _round: usize) -> Result<()> {
    if who == Who::Raw {
        return lane.measure_bare(Metric::FirstByte, |bare| bare.get(&key(LARGE), Some(0..1)).map(drop));
    }
    let mount = lane.mounts.cold(who)?;
    let first = |path: &Path| Ok(File::open(path.join(LARGE))?.read_exact(&mut [0])?);
    lane.measure(&mount, Metric::FirstByte, first, |_| Ok(()))?;
    mount.stop()
}

/// Random reads of the large file, and the same ones again.
pub(crate) fn random(lane: &mut Lane<'_>, who: Who, round: usize) -> Result<()> {
    let (size, count) = (lane.sheet.sizes.large, lane.sheet.sizes.reads);
    for (length, metrics) in [
        (4 << 10, [Metric::Random4Cold, Metric::Random4Warm]),
        (128 << 10, [Metric::Random128Cold, Metric::Random128Warm]),
    ] {
        // The same for everyone.
        let mut random = fastrand::Rng::with_seed(round as u64 + length);
        let offsets: Vec<_> = (0..count).map(|_| random.u64(..size / length) * length).collect();
        if who == Who::Raw {
            lane.measure_bare(metrics[0], |bare| {
                offsets.iter().try_for_each(|offset| {
                    content::check(&bare.get(&key(LARGE), Some(*offset..offset + length))?, *offset, SEED)
                })
            })?;
            continue;
        }
        let mount = lane.mounts.cold(who)?;
        for metric in metrics {
            let offsets = offsets.clone();
            let read = move |path: &Path| -> Result<()> {
                let (file, mut buffer) = (File::open(path.join(LARGE))?, vec![0; usize::try_from(length)?]);
                for offset in offsets {
                    file.read_exact_at(&mut buffer, offset)?;
                    content::check(&buffer, offset, SEED)?;
                }
                Ok(())
            };
            lane.measure(&mount, metric, read, |_| Ok(()))?;
        }
        mount.stop()?;
    }
    Ok(())
}

/// Small files, one by one: created, read by a mount that has not seen them, their directory renamed, removed.
pub(crate) fn small(lane: &mut Lane<'_>, who: Who, round: usize) -> Result<()> {
    let names: Vec<_> = (0..lane.sheet.sizes.small).map(|number| format!("file-{number:04}")).collect();
    let (folder, renamed) = (format!("small-{who}-{round}"), format!("renamed-{who}-{round}"));
    let (at, at_renamed) = (format!("{}/", key(&folder)), format!("{}/", key(&renamed)));
    let wanted: BTreeMap<_, _> = names.iter().map(|name| (name.clone(), BLOCK)).collect();
    if who == Who::Raw {
        lane.measure_bare(Metric::Create, |bare| {
            names.iter().try_for_each(|name| bare.put(&format!("{at}{name}"), Bytes::from(small_bytes(name))))
        })?;
        lane.measure_bare(Metric::Read, |bare| {
            names.iter().try_for_each(|name| bare.get(&format!("{at}{name}"), None).map(drop))
        })?;
        lane.measure_bare(Metric::Rename, |bare| bare.rename_all(&at, &at_renamed))?;
        return lane.measure_bare(Metric::Remove, |bare| {
            names.iter().try_for_each(|name| bare.delete(&format!("{at_renamed}{name}")))
        });
    }
    let mount = lane.mounts.cold(who)?;
    let (inside, made) = (folder.clone(), names.clone());
    let create = move |path: &Path| -> Result<f64> {
        let begun = Instant::now();
        let folder = path.join(inside);
        fs::create_dir(&folder)?;
        for name in &made {
            let mut file = File::create(folder.join(name))?;
            file.write_all(&small_bytes(name))?;
            close(file)?;
        }
        Ok(begun.elapsed().as_secs_f64())
    };
    let returned = lane.measure(&mount, Metric::Create, create, |other| other.wait_for_all(&at, &wanted, LIMIT))?;
    lane.sheet.add(Metric::CreateReturned, who, returned);
    mount.stop()?;

    let mount = lane.mounts.cold(who)?;
    let (inside, count) = (folder.clone(), names.len());
    let read = move |path: &Path| -> Result<()> {
        let mut seen = 0;
        for entry in fs::read_dir(path.join(inside))? {
            let entry = entry?;
            let bytes = fs::read(entry.path())?;
            let name = entry.file_name().into_string().ok().context("a name that nobody gave")?;
            ensure!(bytes == small_bytes(&name), "{name} has other bytes than were written");
            seen += 1;
        }
        ensure!(seen == count, "{seen} of {count} files are listed");
        Ok(())
    };
    lane.measure(&mount, Metric::Read, read, |_| Ok(()))?;
    let (from, to) = (folder.clone(), renamed.clone());
    lane.measure(
        &mount,
        Metric::Rename,
        move |path| Ok(fs::rename(path.join(from), path.join(to))?),
        |other| {
            other.wait_for_all(&at_renamed, &wanted, LIMIT)?;
            other.wait_for_all(&at, &BTreeMap::new(), LIMIT)
        },
    )?;
    let remove = move |path: &Path| -> Result<()> {
        let folder = path.join(renamed);
        for name in &names {
            fs::remove_file(folder.join(name))?;
        }
        Ok(fs::remove_dir(folder)?)
    };
    lane.measure(&mount, Metric::Remove, remove, |other| other.wait_for_all(&at_renamed, &BTreeMap::new(), LIMIT))?;
    mount.stop()
}

/// What a small file holds: no two are the same.
fn small_bytes(name: &str) -> Vec<u8> {
    name.bytes().cycle().take(4096).collect()
}

/// A few bytes added to a large file, and a few changed in its middle; fsync both times.
pub(crate) fn change(lane: &mut Lane<'_>, who: Who, round: usize) -> Result<()> {
    let size = lane.sheet.sizes.changed;
    let name = format!("changed-{who}-{round}.bin");
    let changed = key(&name);
    lane.other.copy(&key(CHANGED), &changed)?;
    // In the middle, and in no part's begin.
    let place = size / 2 / BLOCK * BLOCK + BLOCK;
    let (more, other_bytes) = (small_bytes("appended"), small_bytes("patched"));
    if who == Who::Raw {
        lane.measure_bare(Metric::Append, |bare| bare.append(&changed, size, Bytes::from(more)))?;
        lane.measure_bare(Metric::Patch, |bare| bare.patch(&changed, size + BLOCK, place, &other_bytes))?;
        return lane.other.delete(&changed);
    }
    let mount = lane.mounts.cold(who)?;
    let (inside, bytes) = (name.clone(), more.clone());
    let append = move |path: &Path| -> Result<()> {
        let mut file = File::options().append(true).open(path.join(inside))?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        close(file)
    };
    lane.measure(&mount, Metric::Append, append, |other| {
        other.wait_for(&changed, size + BLOCK, None, LIMIT)?;
        other.wait_for_bytes(&changed, size, &more, LIMIT)
    })?;
    let bytes = other_bytes.clone();
    let patch = move |path: &Path| -> Result<()> {
        let mut file = File::options().write(true).open(path.join(name))?;
        file.seek(SeekFrom::Start(place))?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        close(file)
    };
    lane.measure(&mount, Metric::Patch, patch, |other| other.wait_for_bytes(&changed, place, &other_bytes, LIMIT))?;
    let (around, after) = (lane.other.get(&changed, Some(place - BLOCK..place))?, place + BLOCK);
    content::check(&around, place - BLOCK, SEED)?;
    content::check(&lane.other.get(&changed, Some(after..after + BLOCK))?, after, SEED)?;
    lane.other.delete(&changed)?;
    mount.stop()
}

/// Many files of another client, listed by the programs that people use, in mounts that nobody has used.
pub(crate) fn list(lane: &mut Lane<'_>, who: Who, _round: usize) -> Result<()> {
    const LIST: &str = "ls -l \"$1\" | grep -c ^-";
    const FIND: &str = "find \"$1\" -type f | wc -l";
    let count = lane.sheet.sizes.listed;
    if who.is_ours() {
        // What earlier mounts have noted of these files.
        lane.other.clear(HIDDEN)?;
    }
    for (metric, folder, program) in
        [(Metric::Find, DEEP, FIND), (Metric::ListLong, FLAT, LIST), (Metric::ListAgain, FLAT, LIST)]
    {
        if who == Who::Raw {
            if metric != Metric::ListAgain {
                lane.measure_bare(metric, |bare| {
                    let found = bare.list(&format!("{}/", key(folder)))?.len();
                    ensure!(found == count, "{found} of {count} files are listed");
                    Ok(())
                })?;
            }
            continue;
        }
        let mount = lane.mounts.cold(who)?;
        let work = move |path: &Path| -> Result<()> {
            let path = path.join(folder).display().to_string();
            let found = command::output("sh", &["-c", program, "sh", &path], 2 * LIMIT)?;
            ensure!(found.trim() == count.to_string(), "{} of {count} files are listed", found.trim());
            Ok(())
        };
        lane.measure(&mount, metric, work, |_| Ok(()))?;
        mount.stop()?;
    }
    Ok(())
}

/// An archive of a source tree, unpacked.
pub(crate) fn untar(lane: &mut Lane<'_>, who: Who, round: usize) -> Result<()> {
    let folder = format!("untar-{who}-{round}");
    let prefix = format!("{}/", key(&folder));
    let files = source(lane.sheet.sizes.source);
    if who == Who::Raw {
        let bytes = content::random(files.values().copied().max().map_or(0, |most| most as usize));
        let bytes = Bytes::from(bytes);
        lane.measure_bare(Metric::Untar, |bare| {
            files.iter().try_for_each(|(name, size)| {
                bare.put(&format!("{prefix}{name}"), bytes.slice(..usize::try_from(*size)?))
            })
        })?;
        return lane.other.clear(&prefix);
    }
    let mount = lane.mounts.cold(who)?;
    let archive = lane.archive.display().to_string();
    let unpack = move |path: &Path| -> Result<()> {
        let folder = path.join(folder);
        fs::create_dir(&folder)?;
        command::run("tar", &["xf", &archive, "-C", &folder.display().to_string()], 2 * LIMIT)?;
        Ok(())
    };
    lane.measure(&mount, Metric::Untar, unpack, |other| other.wait_for_all(&prefix, &files, LIMIT))?;
    lane.other.clear(&prefix)?;
    mount.stop()
}

/// Paths and sizes of a source tree: many small files, few larger ones, ten to a folder.
pub(crate) fn source(count: usize) -> BTreeMap<String, u64> {
    let mut random = fastrand::Rng::with_seed(7);
    let size = |random: &mut fastrand::Rng| (200 + random.u64(..5000)) << random.u64(..4);
    let name = |number| format!("project/module-{:02}/source-{number:03}.rs", number / 10);
    (0..count).map(|number| (name(number), size(&mut random))).collect()
}
