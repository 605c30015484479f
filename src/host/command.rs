//! Programs, started without a shell, with a deadline.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::workers;
use crate::error::{Context, Error, ErrorKind, Result};

/// So much of what a program says is in an error, in bytes, from the end.
const SHOWN: usize = 2000;

/// Runs a program to its end. Its output is returned only in the error, where it helps.
///
/// The program dies with this process: one that wrote on after a restart would meet its successor on the same disk.
///
/// # Errors
/// `Internal` when it can't be started or fails, with the last of its output; `OutcomeUnknown` when it was still
/// running at the deadline. It has been killed *and is gone* by then: the caller may go on with what it had open.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A], deadline: Duration) -> Result<()> {
    ask(program, arguments, &[], deadline)?.succeeded().map(drop)
}

/// Runs a program to its end, as [`run`] does, and returns what it printed: standard output and then standard error.
///
/// # Errors
/// As for [`run`].
pub fn output<A: AsRef<OsStr>>(program: &str, arguments: &[A], deadline: Duration) -> Result<String> {
    let answer = ask(program, arguments, &[], deadline)?.succeeded()?;
    Ok(format!("{}{}", answer.output, answer.errors).trim().to_owned())
}

/// Runs a program to its end, as [`run`] does, with this on its standard input, and returns how it ended and all that
/// it said. The input never leaves memory, and is in no error.
///
/// # Errors
/// `Internal` when it can't be started; `OutcomeUnknown` as for [`run`]. That it failed is an answer too.
pub fn ask<A: AsRef<OsStr>>(program: &str, arguments: &[A], input: &[u8], deadline: Duration) -> Result<Answer> {
    run_as(program, arguments, input, deadline, || {
        rustix::process::setpgid(None, None)?;
        Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
    })
}

/// How a program has ended, and what it said.
#[derive(Debug)]
pub struct Answer {
    program: String,
    status: ExitStatus,
    /// All of its standard output.
    pub output: String,
    /// All of its standard error.
    pub errors: String,
}

impl Answer {
    /// Its exit code. `None`: a signal has ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// It, if the program ended well.
    ///
    /// # Errors
    /// `Internal` if not, with the last of what it said.
    pub fn succeeded(self) -> Result<Self> {
        if self.status.success() { Ok(self) } else { Err(self.failure(ErrorKind::Internal)) }
    }

    /// An error with the last of what the program said.
    pub fn failure(&self, kind: ErrorKind) -> Error {
        let said = if self.errors.trim().is_empty() { &self.output } else { &self.errors };
        let mut lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        // Some tell of each attempt.
        lines.dedup();
        let said = lines.join(" | ");
        let mut start = said.len().saturating_sub(SHOWN);
        while !said.is_char_boundary(start) {
            start += 1;
        }
        Error::new(kind, format!("{} failed ({}): {}", self.program, self.status, &said[start..]))
    }
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
                .and_then(|()| File::options().write(true).open(cgroup.join("cgroup.procs")))
                .context(|| what(cgroup))
        })
        .transpose()?;
    let prepare = move || {
        rustix::process::setsid()?;
        // cgroups(7): 0 is the process that writes it.
        if let Some(members) = &members {
            rustix::io::write(members, b"0")?;
        }
        Ok(())
    };
    run_as(program, arguments, &[], deadline, prepare)?.succeeded().map(drop)
}

fn run_as<A: AsRef<OsStr>>(
    program: &str,
    arguments: &[A],
    input: &[u8],
    deadline: Duration,
    mut prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
) -> Result<Answer> {
    let end = Instant::now() + deadline;
    // In memory and without an end: neither side waits for the other.
    let stream = || -> Result<(File, Stdio)> {
        let what = || format!("cannot talk to {program}");
        let file = File::from(rustix::fs::memfd_create(program, rustix::fs::MemfdFlags::CLOEXEC).context(what)?);
        let theirs = file.try_clone().map(Stdio::from).context(what)?;
        Ok((file, theirs))
    };
    let (output, their_output) = stream()?;
    let (errors, their_errors) = stream()?;
    let given = if input.is_empty() {
        Stdio::null()
    } else {
        let (mut file, theirs) = stream()?;
        file.write_all(input).and_then(|()| file.rewind()).context(|| format!("cannot talk to {program}"))?;
        theirs
    };

    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    let mut command = Command::new(program);
    command.args(arguments).stdin(given).stdout(their_output).stderr(their_errors);
    // What programs say is compared with what they say in English.
    command.env("LC_ALL", "C");
    // Whoever uses device mapper would wait for udev to have noticed, and for ever where udev can't answer: it is in another
    // IPC namespace when this is a container. Device nodes are made by the program then.
    command.env("DM_DISABLE_UDEV", "1");
    let prepare = move || {
        prepare()?;
        workers::only_standard_descriptors()
    };
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
    Ok(Answer { program: program.to_owned(), status, output: text(output), errors: text(errors) })
}

fn text(mut stream: File) -> String {
    let mut said = Vec::new();
    let _ = stream.rewind().and_then(|()| stream.read_to_end(&mut said));
    String::from_utf8_lossy(&said).into_owned()
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

    #[test]
    fn a_program_is_given_its_input_and_all_that_it_says_comes_back() {
        let patience = Duration::from_secs(30);
        let long = "line\n".repeat(100_000);
        let answer = ask("cat", &["-", "/no/such/place"], long.as_bytes(), patience).unwrap();
        assert_eq!((answer.code(), answer.output.len()), (Some(1), long.len()));
        assert!(answer.errors.contains("/no/such/place") && !answer.errors.contains("line"));
        let error = answer.succeeded().unwrap_err().to_string();
        assert!(error.contains("/no/such/place") && error.len() < 2 * SHOWN, "{error}");
        assert_eq!(ask("cat", &[""; 0], &[], patience).unwrap().output, "");
    }

    #[test]
    fn a_program_inherits_three_descriptors() {
        let file = File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        // The last one is that of the folder itself.
        let seen = output("ls", &["/proc/self/fd"], Duration::from_secs(30)).unwrap();
        assert_eq!(seen.lines().collect::<Vec<_>>(), ["0", "1", "2", "3"]);
    }
}
