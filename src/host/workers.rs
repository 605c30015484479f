//! Processes that outlive this one and may do nothing but their own work: started as a user of their own, without
//! capabilities, with one socket as their only inheritance; and found by that socket.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::{Context, Error, ErrorKind, Result};

/// A worker has so many descriptors for connections and staged files.
const DESCRIPTORS: u64 = 65_536;
/// Ordinary pods go first when memory is short: without its worker a mount is dead for all of them.
const OOM_SCORE: &[u8] = b"-500";

/// What a worker is to be.
pub struct Plan<'a> {
    /// The arguments of this same program.
    pub arguments: &'a [&'a str],
    /// All of its environment.
    pub environment: &'a [(String, String)],
    /// Its user and group, where this process may choose. `None`: as this process.
    pub user: Option<(u32, u32)>,
    /// Its control group: made by [`Cgroup::make`].
    pub cgroup: Option<&'a Cgroup>,
}

/// Starts this same program, in the version that runs, even if its file was replaced. The socket becomes its standard input.
///
/// # Errors
/// `Internal` when it can't be started.
pub fn start(plan: &Plan<'_>, listener: UnixListener) -> Result<Worker> {
    let what = || "cannot start a worker".to_owned();
    let members = plan.cgroup.map(Cgroup::members).transpose()?;
    let user = plan.user.map(|(uid, gid)| (rustix::process::Uid::from_raw(uid), rustix::process::Gid::from_raw(gid)));
    #[expect(clippy::disallowed_methods, reason = "a worker is meant to outlive this process")]
    let mut command = Command::new("/proc/self/exe");
    command.arg0("berth").args(plan.arguments).env_clear().envs(plan.environment.iter().cloned());
    command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null()).stderr(Stdio::inherit());
    let prepare = move || -> std::io::Result<()> {
        rustix::process::setsid()?;
        rustix::process::chdir(c"/")?;
        rustix::process::umask(Mode::from_raw_mode(0o077));
        if let Some(members) = &members {
            // cgroups(7): 0 is the process that writes it.
            rustix::io::write(members, b"0")?;
        }
        limit()?;
        only_standard_descriptors()?;
        if let Some((uid, gid)) = user {
            become_user(uid, gid)?;
        }
        Ok(rustix::thread::set_no_new_privs(true)?)
    };
    #[expect(unsafe_code, reason = "the child gives up its rights before it becomes the program")]
    // SAFETY: between fork and exec only system calls are made, which allocate nothing and take no lock.
    unsafe {
        command.pre_exec(prepare);
    }
    let child = command.spawn().context(what)?;
    let process = Process::open(child.id()).context(what)?;
    Ok(Worker { child, process })
}

/// Starts this same program in the background, where it outlives this process: its output goes to the file.
///
/// # Errors
/// `Internal` when it can't be started.
pub fn start_in_background(arguments: &[String], log: File) -> Result<()> {
    let what = || "cannot start a process in the background".to_owned();
    let errors = log.try_clone().context(what)?;
    #[expect(clippy::disallowed_methods, reason = "it is meant to outlive this process")]
    let mut command = Command::new("/proc/self/exe");
    command.arg0("berth").args(arguments).current_dir("/").stdin(Stdio::null()).stdout(log).stderr(errors);
    #[expect(unsafe_code, reason = "the child leaves this process' session before it becomes the program")]
    // SAFETY: between fork and exec only system calls are made, which allocate nothing and take no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            only_standard_descriptors()
        });
    }
    command.spawn().context(what).map(drop)
}

/// A process that was just started.
pub struct Worker {
    child: Child,
    process: Process,
}

impl Worker {
    /// It, without the duty to wait for it: whoever drops the `Child` leaves a zombie until this process ends.
    pub fn into_parts(self) -> (Process, Child) {
        (self.process, self.child)
    }
}

/// A process, held by a descriptor: its number can't become another's.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    descriptor: OwnedFd,
}

impl Process {
    /// Holds on to a running process.
    pub fn open(pid: u32) -> std::io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        Ok(Self { pid, descriptor: rustix::process::pidfd_open(raw, PidfdFlags::NONBLOCK)? })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends it at once.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.descriptor, Signal::KILL);
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.descriptor, Signal::TERM);
    }

    /// Has it ended, within this time?
    pub fn has_ended(&self, patience: Duration) -> bool {
        has_event(&self.descriptor, PollFlags::IN, patience)
    }

    /// Has it been killed, with threads that the kernel does not let go? Their descriptors stay open.
    pub fn is_stuck_in_its_end(&self) -> bool {
        // Asked last: the number is still this process' then.
        let is_dead =
            || i32::try_from(self.pid).ok().and_then(|pid| procfs::process::Process::new(pid).ok()?.stat().ok());
        is_dead().is_some_and(|stat| stat.state == 'Z') && !self.has_ended(Duration::ZERO)
    }
}

/// Is the file system of this FUSE descriptor gone, by unmounting it or by an abort? (fuse_dev_poll in the kernel.)
pub fn is_disconnected(fuse: impl AsFd) -> bool {
    has_event(fuse, PollFlags::ERR, Duration::ZERO)
}

fn has_event(descriptor: impl AsFd, event: PollFlags, patience: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    // Errors are reported without being asked for.
    let mut polled = [PollFd::new(&descriptor, event)];
    let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&timeout)));
    ready.is_ok_and(|ready| ready > 0) && polled[0].revents().contains(event)
}

/// The listening socket that this process was started with, as its standard input.
///
/// # Errors
/// `Precondition` when there is none: somebody has typed the command.
pub fn inherited_listener() -> Result<UnixListener> {
    let given = std::io::stdin();
    if !rustix::net::sockopt::socket_acceptconn(&given).unwrap_or(false) {
        fail!(Precondition, "a worker is started by `berth mounter`, with a socket to listen at");
    }
    let listener = rustix::io::fcntl_dupfd_cloexec(&given, 3).context(|| "cannot take the socket over".to_owned())?;
    // Not inherited by anything that the SDK may start, such as a program that knows credentials.
    let null = File::open("/dev/null").context(|| "cannot open /dev/null".to_owned())?;
    rustix::stdio::dup2_stdin(&null).context(|| "cannot close the standard input".to_owned())?;
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(true).context(|| "cannot use the socket".to_owned())?;
    Ok(listener)
}

/// What people see in `ps`: this process was started through a link.
pub fn set_process_name(name: &std::ffi::CStr) {
    let _ = rustix::thread::set_name(name);
}

fn limit() -> rustix::io::Result<()> {
    let there = rustix::process::getrlimit(Resource::Nofile);
    let most = there.maximum.map_or(DESCRIPTORS, |maximum| maximum.max(DESCRIPTORS));
    let raised = Rlimit { current: Some(most), maximum: Some(most) };
    if rustix::process::setrlimit(Resource::Nofile, raised).is_err() {
        rustix::process::setrlimit(Resource::Nofile, Rlimit { current: there.maximum, maximum: there.maximum })?;
    }
    // A core would hold credentials and other people's data.
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    // Only root may lower it; without that it stays as it is.
    if let Ok(score) = rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::io::write(&score, OOM_SCORE);
    }
    Ok(())
}

/// The program that this process becomes has no other descriptors. Only system calls are made.
pub(super) fn only_standard_descriptors() -> std::io::Result<()> {
    #[expect(unsafe_code, reason = "rustix does not wrap close_range")]
    // SAFETY: it takes integers. Nothing is closed before exec, so what the child still uses stays open until then.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn become_user(uid: rustix::process::Uid, gid: rustix::process::Gid) -> rustix::io::Result<()> {
    for capability in CapabilitySet::all().iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // One that this kernel does not know; or a container without CAP_SETPCAP, where no_new_privs has to do.
            Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
            Err(error) => return Err(error),
        }
    }
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// A control group of version 2 with a limit on memory.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes `parent` ready for groups with a limit on memory.
    ///
    /// # Errors
    /// `Precondition` when it is not one of version 2 that can be written and knows memory.
    pub fn prepare(parent: &Path) -> Result<()> {
        let what = || format!("cannot limit memory below the control group {}", parent.display());
        let refuse = |error: std::io::Error| Error::caused(ErrorKind::Precondition, what(), error);
        std::fs::create_dir_all(parent).map_err(refuse)?;
        let known = std::fs::read_to_string(parent.join("cgroup.controllers")).map_err(refuse)?;
        if !known.split_whitespace().any(|controller| controller == "memory") {
            fail!(Precondition, "{}: its parent does not give it the memory controller", what());
        }
        std::fs::write(parent.join("cgroup.subtree_control"), "+memory").map_err(refuse)
    }

    /// Makes the group `name` below `parent`, in which more than `high` bytes slow a process down and more than `most` end it.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn make(parent: &Path, name: &str, high: u64, most: u64) -> Result<Self> {
        Self::prepare(parent)?;
        let group = Self(parent.join(name));
        let set = || {
            std::fs::create_dir_all(&group.0)?;
            std::fs::write(group.0.join("memory.high"), high.to_string())?;
            std::fs::write(group.0.join("memory.max"), most.to_string())
        };
        set().context(|| format!("cannot set the limits of the control group {}", group.0.display()))?;
        Ok(group)
    }

    fn members(&self) -> Result<File> {
        let path = self.0.join("cgroup.procs");
        File::options().write(true).open(&path).context(|| format!("cannot open {}", path.display()))
    }

    /// Takes a group whose processes have ended away. It may not have existed.
    pub fn remove(parent: &Path, name: &str) {
        let _ = std::fs::remove_dir(parent.join(name));
    }
}
