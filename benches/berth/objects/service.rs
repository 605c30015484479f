//! The S3 service that everything is measured on, the proxy that makes it far away, and the programs' lives.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};

use crate::variable;

/// Whatever is started has to answer within this time.
pub(crate) const START: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(10);

/// What each reply waits for in lane B, in milliseconds, and the kilobytes per second that a connection gets.
pub(crate) const LATENCY: u32 = 15;
pub(crate) const BANDWIDTH: u32 = 90_000;

/// Programs that run beside the benchmark, all of which can be ended at once.
#[derive(Clone, Default)]
pub(crate) struct Programs {
    running: Arc<Mutex<Running>>,
}

#[derive(Default)]
struct Running {
    children: Vec<Child>,
    /// Nothing is started any more.
    over: bool,
}

/// Ends all programs when dropped, and waits a moment for the thread that has used them.
pub(crate) struct Keeper {
    pub(crate) programs: Programs,
    /// Its other end is the thread's.
    pub(crate) thread: Receiver<()>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        {
            let mut running = self.programs.running();
            running.over = true;
            for mut child in running.children.drain(..) {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        let _ = self.thread.recv_timeout(START);
    }
}

impl Programs {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one that logs to this file. It ends with the thread that has started it, at the latest.
    pub(crate) fn start(&self, mut command: Command, log: &Path) -> Result<Pid> {
        let output = std::fs::File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
        #[expect(unsafe_code, reason = "what is measured must not outlive the benchmark, however that ends")]
        // SAFETY: between fork and exec only one system call is made, which allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let mut running = self.running();
        ensure!(!running.over, "the benchmark is over");
        let child = command.spawn().with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let pid = Pid::from_child(&child);
        running.children.push(child);
        Ok(pid)
    }

    /// Is nothing started any more?
    pub(crate) fn are_over(&self) -> bool {
        self.running().over
    }

    /// Has it ended?
    pub(crate) fn has_ended(&self, pid: Pid) -> Result<bool> {
        match self.running().children.iter_mut().find(|child| Pid::from_child(child) == pid) {
            Some(child) => Ok(child.try_wait()?.is_some()),
            None => Ok(true),
        }
    }

    /// Waits until it has ended by itself; kills it at the deadline. Did it end by itself?
    pub(crate) fn ended(&self, pid: Pid, deadline: Duration) -> Result<bool> {
        let begun = Instant::now();
        while !self.has_ended(pid)? && begun.elapsed() < deadline {
            std::thread::sleep(LOOK);
        }
        let itself = self.has_ended(pid)?;
        let children = &mut self.running().children;
        if let Some(place) = children.iter().position(|child| Pid::from_child(child) == pid) {
            let mut child = children.swap_remove(place);
            // It may have ended by now.
            let _ = child.kill();
            child.wait()?;
        }
        Ok(itself)
    }

    /// Waits until something is true, for as long as the program runs.
    pub(crate) fn wait_for(&self, pid: Pid, log: &Path, mut ready: impl FnMut() -> bool) -> Result<()> {
        let begun = Instant::now();
        while !ready() {
            if self.has_ended(pid)? || begun.elapsed() > START {
                let said = std::fs::read_to_string(log).unwrap_or_default();
                let tail: Vec<_> = said.lines().rev().take(5).collect();
                bail!(
                    "{} does not begin; it said: {}",
                    log.display(),
                    tail.into_iter().rev().collect::<Vec<_>>().join(" | ")
                );
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// Where a program is: among what `scripts/setup.sh` has built, or where the system has it. `None`: nowhere.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
    let built = cache.map(|cache| cache.join("berth/bin"));
    let system = variable("PATH").unwrap_or_default();
    let folders = built.into_iter().chain(std::env::split_paths(&system).collect::<Vec<_>>());
    folders.map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// A program with nothing of this process' environment but the path: its settings shall be ours.
pub(crate) fn program(path: &Path, home: &Path) -> Command {
    #[expect(clippy::disallowed_methods, reason = "these programs have to outlive a call")]
    let mut command = Command::new(path);
    command.env_clear().env("PATH", variable("PATH").unwrap_or_default()).env("HOME", home);
    command
}

/// Removes a folder of ours with all that is in it, of which nothing is mounted any more. Not being there is fine.
pub(crate) fn remove_tree(path: &Path) -> std::io::Result<()> {
    #[expect(clippy::disallowed_methods, reason = "it is below the benchmark's own folder")]
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a file that nobody else may read, in place of the one that is there.
pub(crate) fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let mut options = std::fs::File::options();
    options.create(true).write(true).truncate(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}

/// Nobody listens there, a moment ago.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// How the service is reached.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) endpoint: String,
    pub(crate) access_key: String,
    pub(crate) secret_key: String,
}

/// A MinIO of one disk, in a process of its own.
pub(crate) struct Service {
    programs: Programs,
    pid: Pid,
    port: u16,
    secret_key: String,
}

const ACCESS_KEY: &str = "berth-bench";

impl Service {
    /// Starts one on an empty folder. `audit`: the port that hears of each call.
    pub(crate) fn start(programs: &Programs, folder: &Path, audit: Option<u16>) -> Result<Self> {
        let minio = find_program("minio").context("no minio: scripts/setup.sh bench builds it")?;
        std::fs::create_dir_all(folder)?;
        let (port, console) = (free_port()?, free_port()?);
        let secret_key = format!("{:032x}", fastrand::u128(..));
        let mut command = program(&minio, folder);
        command.arg("server").arg(folder.join("data")).args(["--quiet", "--address", &format!("127.0.0.1:{port}")]);
        command.args(["--console-address", &format!("127.0.0.1:{console}")]);
        command.env("MINIO_ROOT_USER", ACCESS_KEY).env("MINIO_ROOT_PASSWORD", &secret_key);
        command.env("MINIO_BROWSER", "off").env("MINIO_UPDATE", "off").env("MINIO_CI_CD", "1");
        if let Some(audit) = audit {
            command.env("MINIO_AUDIT_WEBHOOK_ENABLE_bench", "on");
            command.env("MINIO_AUDIT_WEBHOOK_ENDPOINT_bench", format!("http://127.0.0.1:{audit}/"));
        }
        let log = folder.join("minio.log");
        let pid = programs.start(command, &log)?;
        let service = Self { programs: programs.clone(), pid, port, secret_key };
        programs.wait_for(pid, &log, || matches!(http(port, "GET", "/minio/health/cluster", ""), Ok((200, _))))?;
        Ok(service)
    }

    pub(crate) fn access(&self) -> Access {
        self.access_through(self.port)
    }

    fn access_through(&self, port: u16) -> Access {
        let endpoint = format!("http://127.0.0.1:{port}");
        Access { endpoint, access_key: ACCESS_KEY.to_owned(), secret_key: self.secret_key.clone() }
    }

    /// Starts a proxy before it, and says how to reach the service through that.
    pub(crate) fn far_away(&self, folder: &Path) -> Result<(Proxy, Access)> {
        let toxiproxy = find_program("toxiproxy-server").context("no toxiproxy: scripts/setup.sh bench builds it")?;
        let (control, port) = (free_port()?, free_port()?);
        let mut command = program(&toxiproxy, folder);
        command.args(["-host", "127.0.0.1", "-port", &control.to_string()]).env("LOG_LEVEL", "error");
        let log = folder.join("toxiproxy.log");
        let pid = self.programs.start(command, &log)?;
        let proxy = Proxy { programs: self.programs.clone(), pid };
        self.programs.wait_for(pid, &log, || http(control, "GET", "/version", "").is_ok())?;
        let post = |path: &str, body: String| -> Result<()> {
            let (status, answer) = http(control, "POST", path, &body)?;
            ensure!((200..300).contains(&status), "toxiproxy answers {status} to {body}: {answer}");
            Ok(())
        };
        let (listen, upstream) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{}", self.port));
        post("/proxies", format!(r#"{{"name":"s3","listen":"{listen}","upstream":"{upstream}","enabled":true}}"#))?;
        post(
            "/proxies/s3/toxics",
            format!(r#"{{"name":"late","type":"latency","stream":"downstream","attributes":{{"latency":{LATENCY}}}}}"#),
        )?;
        for stream in ["downstream", "upstream"] {
            let limit = format!(
                r#"{{"name":"{stream}","type":"bandwidth","stream":"{stream}","attributes":{{"rate":{BANDWIDTH}}}}}"#
            );
            post("/proxies/s3/toxics", limit)?;
        }
        Ok((proxy, self.access_through(port)))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.programs.ended(self.pid, Duration::ZERO);
    }
}

/// A running toxiproxy.
pub(crate) struct Proxy {
    programs: Programs,
    pid: Pid,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.programs.ended(self.pid, Duration::ZERO);
    }
}

/// One call to a local service: its status and what it said.
pub(crate) fn http(port: u16, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(START))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Length: {length}\r\n\
         Content-Type: application/json\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.context("no HTTP")?, answer))
}
