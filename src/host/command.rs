//! Programs, started without a shell, with a deadline.

use std::ffi::OsStr;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::error::{Context, Error, ErrorKind, Result};

/// So much of what a program says is kept, in bytes, from the end.
const OUTPUT_LIMIT: usize = 2000;

/// Runs a program to its end. Its output is returned only in the error, where it helps.
///
/// The program dies with this process: one that wrote on after a restart would meet its successor on the same disk.
///
/// # Errors
/// `Internal` when it can't be started or fails, with the last of its output; `OutcomeUnknown` when it was still
/// running at the deadline. It has been killed *and is gone* by then: the caller may go on with what it had open.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A], deadline: Duration) -> Result<()> {
    output(program, arguments, deadline).map(drop)
}

/// Runs a program to its end, as [`run`] does, and returns the end of what it printed.
///
/// # Errors
/// As for [`run`].
pub fn output<A: AsRef<OsStr>>(program: &str, arguments: &[A], deadline: Duration) -> Result<String> {
    run_as(program, arguments, deadline, || {
        rustix::process::setpgid(None, None)?;
        Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
    })
}

/// Runs a program that ends when it has put itself into the background, where it outlives this process: in a session of
/// its own, and in that control group, made if missing.
///
/// # Errors
/// As for [`run`].
pub fn launch<A: AsRef<OsStr>>(
    program: &str,
    arguments: &[A],
    cgroup: Option<&Path>,
    deadline: Duration,
) -> Result<()> {
    let what = |cgroup: &Path| format!("cannot use the control group {}", cgroup.display());
    let members = cgroup
        .map(|cgroup| {
            std::fs::create_dir_all(cgroup)
                .and_then(|()| std::fs::File::options().write(true).open(cgroup.join("cgroup.procs")))
                .context(|| what(cgroup))
        })
        .transpose()?;
    run_as(program, arguments, deadline, move || {
        rustix::process::setsid()?;
        // cgroups(7): 0 is the process that writes it.
        if let Some(members) = &members {
            rustix::io::write(members, b"0")?;
        }
        Ok(())
    })
    .map(drop)
}

fn run_as<A: AsRef<OsStr>>(
    program: &str,
    arguments: &[A],
    deadline: Duration,
    prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
) -> Result<String> {
    let end = Instant::now() + deadline;
    let output = rustix::fs::memfd_create(program, rustix::fs::MemfdFlags::CLOEXEC)
        .context(|| format!("cannot keep the output of {program}"))?;
    let mut output = std::fs::File::from(output);
    let shared = || output.try_clone().map(Stdio::from).context(|| format!("cannot keep the output of {program}"));

    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(shared()?).stderr(shared()?);
    #[expect(unsafe_code, reason = "the child prepares itself before it becomes the program")]
    // SAFETY: between fork and exec only system calls are made, which allocate nothing and take no lock.
    unsafe {
        command.pre_exec(prepare);
    }
    let mut child = command.spawn().map_err(|error| {
        Error::caused(ErrorKind::Internal, format!("cannot start {program}: is it installed?"), error)
    })?;

    let pid = Pid::from_child(&child);
    let ended = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .and_then(|pidfd| {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)))
        })
        .is_ok_and(|ready| ready > 0);
    if !ended {
        // Its children too: it leads a process group of its own.
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    }
    let status = child.wait().context(|| format!("cannot wait for {program}"))?;
    if !ended {
        return Err(Error::new(
            ErrorKind::OutcomeUnknown,
            format!("{program} did not end within {deadline:?} and was killed"),
        ));
    }
    let mut said = Vec::new();
    let _ = output.rewind().and_then(|()| output.read_to_end(&mut said));
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(OUTPUT_LIMIT)..]).trim().to_owned();
    if status.success() {
        return Ok(said);
    }
    let said = said.replace('\n', " | ");
    Err(Error::new(ErrorKind::Internal, format!("{program} failed ({status}): {said}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_tells_why_and_one_that_hangs_is_gone_at_the_deadline() {
        run("true", &[""; 0], Duration::from_secs(10)).unwrap();
        assert_eq!(output("echo", &["a word"], Duration::from_secs(10)).unwrap(), "a word");
        let error = run("ls", &["/no/such/place"], Duration::from_secs(10)).unwrap_err();
        assert!(error.to_string().contains("/no/such/place"), "{error}");
        let begun = Instant::now();
        let error = run("sleep", &["60"], Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutcomeUnknown);
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert!(run("no-such-program", &[""; 0], Duration::from_secs(1)).is_err());
    }
}
