//! The power is cut while volumes are made, written, grown and deleted, and the machine boots again on the same disks.
//!
//! `scripts/test-vm.sh` boots this program again and again, cuts the power when it has said enough, and gives the next boot
//! what the one before has said (`BERTH_POWER_SAID`). What was acknowledged has to be so; of what was begun, either.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{Client, Lab, MI, Use, read, run, write};

const GROUP: &str = "berthpower";
/// So many volumes at most are there at a time.
const VOLUMES: usize = 6;

/// A volume as far as it was acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    carve: String,
    size: i64,
    /// What its file holds.
    text: String,
}

/// The state after everything that was acknowledged, and the name and carve of what was begun and was not.
fn said(text: &str) -> (BTreeMap<String, Known>, Option<(String, String)>) {
    let (mut known, mut open) = (BTreeMap::new(), None);
    // A line that was cut is no line.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for line in whole.lines() {
        let words: Vec<_> = line.trim().split(' ').collect();
        match words[..] {
            ["BEGIN", name, carve] => open = Some((name.to_owned(), carve.to_owned())),
            ["DONE", name, carve, size, text] => {
                let known_now = Known { carve: carve.to_owned(), size: size.parse().unwrap(), text: text.to_owned() };
                known.insert(name.to_owned(), known_now);
                open = None;
            }
            ["GONE", name] => {
                known.remove(name);
                open = None;
            }
            _ => {}
        }
    }
    (known, open)
}

fn usage(carve: &str) -> Use {
    if carve == "directory" { Use::default() } else { Use::fs("xfs") }
}

fn request(name: &str, carve: &str, size: i64) -> berth::proto::csi::CreateVolumeRequest {
    let pool = if carve == "lvm" { "group" } else { "files" };
    berth::proto::csi::CreateVolumeRequest {
        parameters: common::map(&[("carve", carve), ("pool", pool)]),
        ..Client::request(name, size, &usage(carve))
    }
}

fn done(name: &str, known: &Known) {
    println!("DONE {name} {} {} {}", known.carve, known.size, known.text);
}

/// > After a power cut at any moment what was acknowledged is there, with its size and its data, what was deleted is gone, and no
/// > room is lost.
#[tokio::test]
#[ignore = "make test-vm"]
async fn nothing_acknowledged_is_lost_in_a_power_cut() {
    let (one, two) = (disk_or_skip!("berth0001"), disk_or_skip!("berth0002"));
    let Ok(round) = std::env::var("BERTH_POWER_ROUND") else { return };
    let is_last = round == "last";
    let mut lab = Lab::bare();
    let files = lab.path("files");
    std::fs::create_dir(&files).unwrap();
    if round == "first" {
        run("mkfs.xfs", &["-q", "-f", one.to_str().unwrap()]);
        run("vgcreate", &["-q", "-y", "--metadatasize", "16m", GROUP, two.to_str().unwrap()]);
    }
    run("mount", &["-o", "prjquota,noatime", one.to_str().unwrap(), files.to_str().unwrap()]);
    lab.config.pool = format!("{{name: files, path: {}}}\n  - {{name: group, group: {GROUP}}}", files.display());
    let client = lab.start().await;

    let text = std::env::var("BERTH_POWER_SAID").map(|file| std::fs::read_to_string(file).unwrap()).unwrap_or_default();
    let (mut known, open) = said(&text);
    println!("looking at {} volumes, {open:?} was begun", known.len());
    let listed = client.list().await;
    let mut there = 0;
    // What was begun may be either way, and is taken away, so that the rest is as it was said.
    if let Some((name, carve)) = &open {
        let size = known.remove(name).map_or(320 * MI, |known| known.size);
        let id = client.try_create(request(name, carve, size)).await.unwrap().volume_id;
        client.delete(&id).await.unwrap();
    }
    for (number, (name, known)) in known.iter().enumerate() {
        let volume = client.try_create(request(name, &known.carve, known.size)).await.unwrap();
        assert!(listed.contains(&volume.volume_id), "{name}: {known:?} was acknowledged, and was not there");
        assert_eq!(volume.capacity_bytes, known.size, "{name}");
        assert_eq!(client.health(&volume.volume_id).await.unwrap(), [""; 0]);
        let mounted = client.mount(&lab, &volume.volume_id, &format!("look-{number}"), &usage(&known.carve)).await;
        if known.text != "-" {
            assert_eq!(read(mounted.file("f")), known.text.as_bytes(), "{name}: {known:?}");
        }
        let total = client.total(&mounted.id, &mounted.target).await.unwrap();
        assert!(total > known.size - 70 * MI, "{name} has {total} bytes");
        client.unmount(&mounted).await;
        there += 1;
        done(name, known);
    }
    assert_eq!(client.list().await.len(), there, "{listed:?}");

    let mut random = fastrand::Rng::new();
    let end = Instant::now() + Duration::from_secs(if is_last { 0 } else { 600 });
    let mut next = random.u32(..);
    while Instant::now() < end {
        let names: Vec<_> = known.keys().cloned().collect();
        if names.is_empty() || (names.len() < VOLUMES && random.u8(..3) > 0) {
            next += 1;
            let name = format!("v{next}");
            let carve = random.choice(["directory", "image", "lvm"]).unwrap();
            println!("BEGIN {name} {carve}");
            let volume = client.try_create(request(&name, carve, 320 * MI)).await.unwrap();
            let fresh = Known { carve: carve.to_owned(), size: volume.capacity_bytes, text: "-".to_owned() };
            done(&name, &fresh);
            known.insert(name, fresh);
            continue;
        }
        let name = random.choice(&names).unwrap();
        let present = known.get_mut(name).unwrap();
        println!("BEGIN {name} {}", present.carve);
        let id = client.try_create(request(name, &present.carve, present.size)).await.unwrap().volume_id;
        if random.u8(..4) == 0 {
            client.delete(&id).await.unwrap();
            println!("GONE {name}");
            known.remove(name);
            continue;
        }
        let mounted = client.mount(&lab, &id, "work", &usage(&present.carve)).await;
        // In place, as a database writes; the file itself has to be durable, too.
        present.text = format!("{:016x}", random.u64(..));
        write(mounted.file("f"), &present.text);
        run("sync", &["-f", &mounted.target]);
        if random.bool() {
            present.size = client.expand(&id, &mounted.target, present.size + 32 * MI).await.unwrap();
        }
        done(name, present);
        client.unmount(&mounted).await;
    }
    assert!(is_last, "the power should have been cut");

    for name in known.keys() {
        let known = &known[name];
        let id = client.try_create(request(name, &known.carve, known.size)).await.unwrap().volume_id;
        client.delete(&id).await.unwrap();
    }
    assert_eq!(common::loops_below(&files), [""; 0]);
    let end = Instant::now() + Duration::from_secs(120);
    let left = || {
        let volumes = run("lvs", &["--noheadings", "-o", "lv_name", GROUP]);
        let entries = |folder: &str| std::fs::read_dir(files.join(folder)).unwrap().count();
        (volumes.trim().to_owned(), entries("volumes"), entries("trash"), entries("tmp"))
    };
    while left() != (String::new(), 0, 0, 0) && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(left(), (String::new(), 0, 0, 0));
    drop(client);
    lab.kill();
    common::unmount(&[files.to_str().unwrap()]);
    // The file system itself is whole, and nothing but its own metadata is left on it.
    run("xfs_repair", &["-n", one.to_str().unwrap()]);
    run("mount", &[one.to_str().unwrap(), files.to_str().unwrap()]);
    let used = run("du", &["-s", "-k", files.to_str().unwrap()]);
    let used: u64 = used.split_whitespace().next().unwrap().parse().unwrap();
    assert!(used < 512, "{used} KiB");
    common::unmount(&[files.to_str().unwrap()]);
    run("vgremove", &["-q", "-y", GROUP]);
}
