//! The driver as a process of its own: this same program, started, found again and stopped.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::net::UnixStream;

use super::work::{State, Work};

const START_LIMIT: Duration = Duration::from_secs(20);
/// Calls that are being answered may end first.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A running driver, held by a descriptor: its number can't become another process'.
pub(super) struct Driver(OwnedFd);

impl Driver {
    /// Starts the driver, in a process group of its own so that Ctrl-C reaches only us. Its pid goes into the state.
    pub(super) fn start(state: &mut State, work: &Work) -> Result<Self> {
        let what = || format!("cannot start {}", state.program.display());
        let log = OpenOptions::new().create(true).append(true).open(work.log()).with_context(what)?;
        #[expect(
            clippy::disallowed_methods,
            reason = "it outlives this process with --keep, and is not killed with it"
        )]
        let mut command = Command::new(&state.program);
        command.arg("serve").arg("--config").arg(work.config()).current_dir("/").process_group(0);
        command.stdin(Stdio::null()).stdout(log.try_clone().with_context(what)?).stderr(log);
        let pid = Pid::from_child(&command.spawn().with_context(what)?);
        let driver = Self(rustix::process::pidfd_open(pid, PidfdFlags::empty()).with_context(what)?);
        state.pid = Some(pid.as_raw_pid());
        work.write_state(state)?;
        Ok(driver)
    }

    /// The driver of this work folder, if it is running.
    pub(super) fn find(state: &State, work: &Work) -> Option<Self> {
        let pid = state.pid?;
        // Held before it is looked at: what is found out below is about this very process.
        let held = rustix::process::pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        // The program may have been replaced meanwhile, by an upgrade.
        let is_program = program.to_str()?.trim_end_matches(" (deleted)") == state.program.to_str()?;
        let has_config =
            arguments.split(|byte| *byte == 0).any(|argument| argument == work.config().as_os_str().as_encoded_bytes());
        (is_program && has_config).then_some(Self(held))
    }

    /// Waits until the driver's socket can be connected to.
    pub(super) async fn ready(&self, work: &Work) -> Result<()> {
        let end = Instant::now() + START_LIMIT;
        while UnixStream::connect(work.socket()).await.is_err() {
            if ended_within(&self.0, Duration::ZERO) {
                bail!("the driver ended instead of serving {}", work.socket().display());
            }
            if Instant::now() > end {
                bail!("the driver does not serve {} within {START_LIMIT:?}", work.socket().display());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Ends the driver and waits until it has.
    pub(super) async fn stop(self) -> Result<()> {
        match rustix::process::pidfd_send_signal(&self.0, Signal::TERM) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error).context("cannot stop the driver"),
        }
        if !tokio::task::spawn_blocking(move || ended_within(&self.0, STOP_LIMIT)).await? {
            bail!("the driver does not end within {STOP_LIMIT:?}: its log says what it is doing");
        }
        Ok(())
    }
}

fn ended_within(process: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec { tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
    let poll = || rustix::event::poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&limit));
    rustix::io::retry_on_intr(poll).is_ok_and(|ready| ready > 0)
}
