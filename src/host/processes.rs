//! Processes of this machine, found by what they were started with; and the end of this one.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

use crate::error::{Context, Result};

/// Waits until no process of this program name has arguments that fit. `false`: one is still there at the deadline.
pub fn wait_until_gone(program: &str, fits: impl Fn(&[String]) -> bool, patience: Duration) -> Result<bool> {
    let end = Instant::now() + patience;
    for process in procfs::process::all_processes()
        .map_err(std::io::Error::other)
        .context(|| "cannot list processes".to_owned())?
    {
        // One that ends meanwhile is one less.
        let Ok(process) = process else { continue };
        if !process.stat().is_ok_and(|stat| stat.comm == program) || !process.cmdline().is_ok_and(|line| fits(&line)) {
            continue;
        }
        let Some(pid) = Pid::from_raw(process.pid) else { continue };
        let Ok(ended) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let ready =
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&left)));
        if ready.is_ok_and(|ready| ready == 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Ends this process at once. Ceph's library aborts in its destructors while anything of it is in use, and a thread
/// that waits for a daemon can't be told to stop.
pub fn exit(code: i32) -> ! {
    let _ = std::io::Write::flush(&mut std::io::stdout());
    #[expect(unsafe_code, reason = "std::process::exit runs the libraries' destructors")]
    // SAFETY: it takes an integer and never returns.
    unsafe {
        libc::_exit(code)
    }
}
