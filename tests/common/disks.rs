//! The NVMe disks of the virtual machine.

use std::path::{Path, PathBuf};

/// The disk in that namespace of the controller with that serial. `None`: this machine has none.
///
/// By serial: which controller becomes `nvme0` differs from boot to boot.
pub fn find(serial: &str, namespace: u32) -> Option<PathBuf> {
    for entry in std::fs::read_dir("/sys/block").unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let read = |file: &str| std::fs::read_to_string(format!("/sys/block/{name}/{file}")).unwrap_or_default();
        // Not by its name, either: one that comes back while something still holds the old one is called nvme0n2.
        if read("device/serial").trim() == serial && read("nsid").trim() == namespace.to_string() {
            return Some(PathBuf::from("/dev").join(name));
        }
    }
    None
}

/// `nvme0n1`.
pub fn name(disk: &Path) -> &str {
    disk.file_name().unwrap().to_str().unwrap()
}

/// Ends the test where there is no such disk.
#[macro_export]
macro_rules! disk_or_skip {
    ($serial:expr) => {{
        skip_unless!($crate::common::is_root(), "needs root");
        let disk = $crate::common::disks::find($serial, 1);
        skip_unless!(disk.is_some(), "no NVMe disk of the virtual machine; `make test-vm` has them");
        disk.unwrap()
    }};
}
