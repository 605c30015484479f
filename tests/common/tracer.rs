//! strace on the driver: what it does, and its death at a chosen moment.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The system calls that change files, mounts or devices.
pub const STEPS: &str = "mkdir,mkdirat,fallocate,ftruncate,fsync,fdatasync,syncfs,rename,renameat,renameat2,unlink,unlinkat,rmdir,\
                     ioctl,lseek,mount,umount2,open_tree,move_mount,mount_setattr,fsopen,fsconfig,fsmount,quotactl_fd,chmod,clone,vfork,clone3";

/// Those that start a program.
pub const STARTS: &str = "clone";

/// A system call, and which of its occurrences.
pub type Step = (String, u32);

/// Watches the driver and its children.
pub struct Tracer(Child);

impl Tracer {
    /// Writes down the steps that are made.
    pub fn watch(pid: u32, log: &Path, steps: &str) -> Self {
        Self::attach(pid, &["-e", &format!("trace={steps}"), "-o", log.to_str().unwrap()])
    }

    /// Kills whoever is about to make this step.
    pub fn kill_before(pid: u32, (name, occurrence): &Step) -> Self {
        let inject = format!("inject={name}:signal=SIGKILL:when={occurrence}");
        Self::attach(pid, &["-e", &format!("trace={name}"), "-e", &inject, "-o", "/dev/null"])
    }

    fn attach(pid: u32, arguments: &[&str]) -> Self {
        let mut strace = Command::new("strace")
            .args(["-f", "-qq", "-p", &pid.to_string()])
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        // Every thread has a tracer once strace has attached.
        let traced = || {
            std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| {
                let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
                !status.contains("TracerPid:\t0\n")
            })
        };
        while !traced() {
            if Instant::now() > end || strace.try_wait().unwrap().is_some() {
                let said =
                    BufReader::new(strace.stderr.take().unwrap()).lines().map_while(Result::ok).collect::<Vec<_>>();
                panic!("strace did not attach: {said:?}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Self(strace)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // The kernel lets go of whom it traced.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
