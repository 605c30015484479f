//! A file system in memory, mounted for one test and gone with it.
#![allow(unreachable_pub, reason = "as in common")]

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth::fuse::{Agreed, Ended, Options, Parker, Session};
use berth::host::fuse::{MountOptions, abort, connection_of, mount};
use tokio::sync::watch;

use super::memory::Memory;

type Serving = tokio::task::JoinHandle<std::io::Result<Ended>>;

/// A mount, with a duplicate of its descriptor as a mounter would keep it.
pub struct Mount {
    pub runtime: tokio::runtime::Runtime,
    dir: tempfile::TempDir,
    pub fs: Arc<Memory>,
    pub descriptor: OwnedFd,
    pub connection: u32,
    pub write_buffers: usize,
    serving: Option<(Serving, Parker, watch::Receiver<Option<Agreed>>)>,
}

impl Mount {
    /// Served.
    pub fn new() -> Self {
        let mut mount = Self::unserved(Duration::from_secs(1));
        mount.serve(None, false);
        mount
    }

    pub fn unserved(ttl: Duration) -> Self {
        let dir = tempfile::Builder::new().prefix("berth-fuse-").tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let target = dir.path().join("mnt");
        std::fs::create_dir(&target).unwrap();
        let descriptor = mount("s3://bucket/a b", &target, &MountOptions::default()).unwrap();
        let connection = connection_of(&target).unwrap().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self { runtime, dir, fs: Arc::new(Memory::new(ttl)), descriptor, connection, write_buffers: 32, serving: None }
    }

    /// By a session of its own, on a duplicate of the descriptor.
    pub fn serve(&mut self, agreed: Option<Agreed>, resend: bool) {
        let options = Options {
            interrupt_patience: Duration::from_millis(10),
            idle: Duration::from_millis(20),
            write_buffers: self.write_buffers,
            ..Options::default()
        };
        let descriptor = self.descriptor.try_clone().unwrap();
        let session = Session::new(descriptor, Arc::clone(&self.fs), options, agreed).unwrap();
        if resend {
            assert!(session.resend().unwrap());
        }
        let (parker, agreed) = (session.parker(), session.agreed());
        self.serving = Some((self.runtime.spawn(session.serve()), parker, agreed));
    }

    /// What was agreed, through text as another process would get it.
    pub fn park(&mut self) -> Agreed {
        let (serving, parker, _) = self.serving.take().unwrap();
        let agreed = self.runtime.block_on(parker.park()).unwrap();
        assert_eq!(self.runtime.block_on(serving).unwrap().unwrap(), Ended::Parked(agreed.clone()));
        serde_json::from_str(&serde_json::to_string(&agreed).unwrap()).unwrap()
    }

    pub fn agreed(&self) -> Agreed {
        let mut agreed = self.serving.as_ref().unwrap().2.clone();
        self.runtime.block_on(async { agreed.wait_for(Option::is_some).await.unwrap().clone().unwrap() })
    }

    /// How serving ended.
    pub fn ended(&mut self) -> Ended {
        let (serving, ..) = self.serving.take().unwrap();
        self.runtime.block_on(serving).unwrap().unwrap()
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root().join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.fs.gate.send(true);
        // Nobody is left waiting, whatever the test did.
        let _ = abort(self.connection);
        let _ = berth::host::mounts::detach(&self.root());
    }
}
