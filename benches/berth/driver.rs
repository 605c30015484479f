//! The driver under test: the release binary in a process of its own, and a client of it.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use berth::proto::csi::controller_client::ControllerClient;
use berth::proto::csi::identity_client::IdentityClient;
use berth::proto::csi::node_client::NodeClient;
use berth::proto::csi::volume_capability::access_mode::Mode;
use berth::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use berth::proto::csi::{self, VolumeCapability};
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::lab::Lab;

/// The binary that is measured.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_berth");

/// It has to serve within this time.
const START: Duration = Duration::from_secs(30);

/// How a pool is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pool {
    /// Space is set aside: the default.
    Reserved,
    /// Space is taken when it is written.
    Thin,
}

/// What a driver is started with.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// The configuration without its drivers.
    pub(crate) settings: String,
    pub(crate) backend: &'static str,
    pub(crate) role: &'static str,
    pub(crate) secrets: Secrets,
}

/// What its calls bring along.
#[derive(Clone, Debug, Default)]
pub(crate) struct Secrets {
    pub(crate) controller: HashMap<String, String>,
    pub(crate) node: HashMap<String, String>,
}

/// A running driver. Killed when dropped.
pub(crate) struct Driver {
    child: Child,
    socket: PathBuf,
    folder: PathBuf,
    /// The port of its metrics.
    http: u16,
    secrets: Secrets,
}

impl Driver {
    /// Starts one whose pool, socket, log and paths bear this name.
    pub(crate) async fn start(lab: &Lab, name: &str, pool: Pool) -> Result<Self> {
        let path = lab.disk().join(name);
        std::fs::create_dir(&path)?;
        let thin = pool == Pool::Thin;
        let settings = format!("pools:\n  - {{name: local, path: \"{}\", thin: {thin}}}\n", path.display());
        Self::launch(lab, name, Setup { settings, backend: "nvme", role: "both", secrets: Secrets::default() }).await
    }

    /// Starts one whose socket, log and paths bear this name.
    pub(crate) async fn launch(lab: &Lab, name: &str, setup: Setup) -> Result<Self> {
        let folder = lab.new_directory(name)?;
        let socket = folder.join("csi/csi.sock");
        let config = folder.join("berth.yaml");
        // Free a moment ago; nobody else on this machine is in a hurry for it.
        let http = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let Setup { settings, backend, role, secrets } = setup;
        std::fs::write(
            &config,
            format!(
                "node: {{name: bench}}\n\
                 http: {{address: \"127.0.0.1:{http}\"}}\n\
                 {settings}\
                 drivers:\n  - {{backend: {backend}, role: {role}, socket: \"{}\"}}\n",
                socket.display()
            ),
        )?;
        let log = std::fs::File::create(folder.join("berth.log"))?;
        #[expect(clippy::disallowed_methods, reason = "the driver is the one program that has to outlive a call")]
        let mut command = Command::new(BINARY);
        command.args(["serve".as_ref(), "--config".as_ref(), config.as_os_str()]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        #[expect(unsafe_code, reason = "the driver must not outlive the benchmark, however that ends")]
        // SAFETY: between fork and exec only one system call is made, which allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let child = command.spawn().context("cannot start berth")?;
        let mut driver = Self { child, socket, folder, http, secrets };
        let begun = Instant::now();
        while UnixStream::connect(&driver.socket).await.is_err() {
            if driver.child.try_wait()?.is_some() || begun.elapsed() > START {
                bail!("berth does not serve; it said: {}", driver.log());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(driver)
    }

    /// A client with a connection of its own.
    pub(crate) async fn client(&self) -> Result<Client> {
        let socket = self.socket.clone();
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The address is not used: the connector knows the socket.
        let channel = Endpoint::from_static("http://berth").connect_with_connector(connect).await?;
        Ok(Client {
            identity: IdentityClient::new(channel.clone()),
            controller: ControllerClient::new(channel.clone()),
            node: NodeClient::new(channel),
            folder: self.folder.clone(),
            secrets: self.secrets.clone(),
        })
    }

    /// How many commands it has sent to Ceph, as it counts them itself.
    pub(crate) fn ceph_commands(&self) -> Result<u64> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.http))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: berth\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let counts = text.lines().filter(|line| line.starts_with("berth_ceph_command_duration_seconds_count{"));
        counts.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse::<u64>()?)).sum()
    }

    /// Is a library of this name in the process?
    pub(crate) fn has_loaded(&self, library: &str) -> Result<bool> {
        Ok(std::fs::read_to_string(format!("/proc/{}/maps", self.child.id()))?.contains(library))
    }

    /// Bytes of the process that are in memory.
    pub(crate) fn resident(&self) -> Result<u64> {
        let status = procfs::process::Process::new(self.child.id().cast_signed())?.status()?;
        Ok(status.vmrss.context("the kernel does not tell how much memory berth has")? * 1024)
    }

    /// What it logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("berth.log")).unwrap_or_default()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// Calls, as kubelet and the provisioner make them.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) identity: IdentityClient<Channel>,
    pub(crate) controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
    folder: PathBuf,
    secrets: Secrets,
}

/// A volume as it is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Bytes.
    pub(crate) size: u64,
    /// Empty: the driver's choice.
    pub(crate) filesystem: &'static str,
    pub(crate) mode: Mode,
    /// A device instead of a file system.
    pub(crate) block: bool,
    /// The class's.
    pub(crate) parameters: &'static [(&'static str, &'static str)],
}

impl Wanted {
    /// ReadWriteOnce, with the driver's choice of file system.
    pub(crate) fn of_size(size: u64) -> Self {
        Self { size, filesystem: "", mode: Mode::SingleNodeMultiWriter, block: false, parameters: &[] }
    }

    /// ReadWriteMany.
    pub(crate) fn shared(size: u64) -> Self {
        Self { mode: Mode::MultiNodeMultiWriter, ..Self::of_size(size) }
    }

    fn capability(self) -> VolumeCapability {
        let mount = MountVolume { fs_type: self.filesystem.to_owned(), ..MountVolume::default() };
        let access = if self.block { AccessType::Block(BlockVolume {}) } else { AccessType::Mount(mount) };
        VolumeCapability { access_type: Some(access), access_mode: Some(AccessMode { mode: self.mode.into() }) }
    }
}

impl Client {
    /// Makes a volume.
    pub(crate) async fn create(&mut self, name: &str, wanted: Wanted) -> Result<csi::Volume> {
        let request = csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange { required_bytes: wanted.size.cast_signed(), limit_bytes: 0 }),
            volume_capabilities: vec![wanted.capability()],
            parameters: wanted.parameters.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            secrets: self.secrets.controller.clone(),
            ..csi::CreateVolumeRequest::default()
        };
        let volume = self.controller.create_volume(request).await?.into_inner().volume;
        volume.context("CreateVolume answered without a volume")
    }

    pub(crate) async fn delete(&mut self, volume: &csi::Volume) -> Result<()> {
        let request =
            csi::DeleteVolumeRequest { volume_id: volume.volume_id.clone(), secrets: self.secrets.controller.clone() };
        self.controller.delete_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn stage(&mut self, volume: &csi::Volume, wanted: Wanted) -> Result<()> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: volume.volume_id.clone(),
            staging_target_path: text(&self.staging(volume)),
            volume_capability: Some(wanted.capability()),
            secrets: self.secrets.node.clone(),
            volume_context: volume.volume_context.clone(),
            ..csi::NodeStageVolumeRequest::default()
        };
        self.node.node_stage_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn unstage(&mut self, volume: &csi::Volume) -> Result<()> {
        let staging_target_path = text(&self.staging(volume));
        let request = csi::NodeUnstageVolumeRequest { volume_id: volume.volume_id.clone(), staging_target_path };
        self.node.node_unstage_volume(request).await?;
        // Kubelet's part.
        let _ = std::fs::remove_dir(self.staging(volume));
        Ok(())
    }

    /// Publishes a staged volume at [`Self::target`].
    pub(crate) async fn publish(&mut self, volume: &csi::Volume, wanted: Wanted) -> Result<()> {
        let request = csi::NodePublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            staging_target_path: text(&self.staging(volume)),
            target_path: text(&self.target(volume)),
            volume_capability: Some(wanted.capability()),
            secrets: self.secrets.node.clone(),
            volume_context: volume.volume_context.clone(),
            ..csi::NodePublishVolumeRequest::default()
        };
        self.node.node_publish_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn unpublish(&mut self, volume: &csi::Volume) -> Result<()> {
        let (volume_id, target_path) = (volume.volume_id.clone(), text(&self.target(volume)));
        let request = csi::NodeUnpublishVolumeRequest { volume_id, target_path };
        self.node.node_unpublish_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn probe(&mut self) -> Result<()> {
        self.identity.probe(csi::ProbeRequest {}).await?;
        Ok(())
    }

    /// Where a volume is staged.
    pub(crate) fn staging(&self, volume: &csi::Volume) -> PathBuf {
        self.folder.join(format!("{}.staging", flat(volume)))
    }

    /// Where a volume is published.
    pub(crate) fn target(&self, volume: &csi::Volume) -> PathBuf {
        self.folder.join(format!("{}.target", flat(volume)))
    }
}

/// The volume's id as the name of a file.
fn flat(volume: &csi::Volume) -> String {
    volume.volume_id.replace('/', "_")
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
