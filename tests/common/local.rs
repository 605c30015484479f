//! Pools as production has them, on the NVMe disks of the virtual machine.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use berth::proto::csi;

use super::{Client, Lab, Use, map, run};

/// A pool of XFS with project quotas on the first disk, and the driver.
pub async fn quota_pool(disk: &Path) -> (Lab, Client) {
    let mut lab = Lab::bare();
    lab.make_pool_on("pool", disk);
    let client = lab.start().await;
    (lab, client)
}

/// A volume group on a disk, as an administrator makes one, with a volume of somebody else in it; and the driver.
pub struct Grouped {
    pub lab: Lab,
    disks: Vec<std::path::PathBuf>,
}

pub const GROUP: &str = "berthtest";

impl Grouped {
    pub async fn on(disks: &[std::path::PathBuf]) -> (Self, Client) {
        let names: Vec<_> = disks.iter().map(|disk| disk.to_str().unwrap()).collect();
        for name in &names {
            run("wipefs", &["-q", "-a", name]);
            // Small, since all of it is overwritten again and again.
            run("pvcreate", &["-q", "-y", "--metadatasize", "16m", "--setphysicalvolumesize", "2g", name]);
        }
        run("vgcreate", &[&["-q", "-y", GROUP][..], &names].concat());
        run("lvcreate", &["-q", "-y", "-n", "stranger", "-L", "64m", GROUP]);
        let mut lab = Lab::bare();
        lab.config.pool = format!("{{name: main, group: {GROUP}}}");
        let client = lab.start().await;
        (Self { lab, disks: disks.to_vec() }, client)
    }

    pub fn volumes() -> Vec<String> {
        let names = run("lvs", &["--noheadings", "-o", "lv_name", GROUP]);
        names.split_whitespace().filter(|name| *name != "stranger").map(str::to_owned).collect()
    }

    pub fn assert_clean(&self) {
        self.lab.assert_no_places();
        let end = Instant::now() + Duration::from_secs(120);
        while !Self::volumes().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(Self::volumes(), [""; 0]);
        assert!(run("lvs", &["--noheadings", "-o", "lv_name", GROUP]).contains("stranger"));
    }
}

impl Drop for Grouped {
    fn drop(&mut self) {
        self.lab.kill();
        for mount in super::mounts_below(&self.lab.path("")).iter().rev() {
            let _ = Command::new("umount").arg(mount).status();
        }
        let mappings = Command::new("sh")
            .args(["-c", "for m in /dev/mapper/berth-*; do [ -e $m ] && cryptsetup close $m; done"])
            .status();
        let removed = Command::new("vgremove").args(["-q", "-y", "-f", GROUP]).status();
        println!("cleaned up: {mappings:?} {removed:?}");
        // LVM leaves links alone that it made without udev.
        let _ = std::fs::remove_dir_all(Path::new("/dev").join(GROUP));
        for disk in &self.disks {
            let _ = Command::new("wipefs").args(["-q", "-a"]).arg(disk).status();
        }
    }
}

pub fn lvm(name: &str, size: i64, usage: &Use, parameters: &[(&str, &str)]) -> csi::CreateVolumeRequest {
    csi::CreateVolumeRequest { parameters: map(parameters), ..Client::request(name, size, usage) }
}
