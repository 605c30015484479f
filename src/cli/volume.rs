//! `berth volume`: a driver's calls by hand, as the provisioner and kubelet make them.
//!
//! Everything goes over the socket: nothing here knows what a volume is made of.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde_json::json;

use super::client::{Access, Client, Origin, Wish};
use super::kubelet::{Kubelet, STAGING, absolute};
use super::orphans::{self, Orphans};
use super::progress;
use super::table::{self, Answer, SnapshotView, VolumeView, columns};
use crate::config::Config;
use crate::mounter::start::SOCKET;
use crate::volume::{format_bytes, parse_bytes};

/// Which driver to ask, and for what.
#[derive(Debug, Args)]
pub struct VolumeArguments {
    /// Which driver.
    #[command(flatten)]
    pub connection: Connection,
    /// Print JSON, for programs: sizes are in bytes.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: VolumeCommand,
}

/// How to reach a driver.
#[derive(Debug, Args)]
pub struct Connection {
    /// The driver's socket.
    #[arg(long, value_name = "PATH", global = true)]
    pub socket: Option<PathBuf>,
    /// The node service's socket, where it is another one.
    #[arg(long, value_name = "PATH", global = true, requires = "socket")]
    pub node_socket: Option<PathBuf>,
    /// Find the sockets in the driver's configuration file instead.
    #[arg(long, value_name = "FILE", global = true, conflicts_with = "socket")]
    pub config: Option<PathBuf>,
    /// The driver's name in that file; the first one by default.
    #[arg(long, value_name = "NAME", global = true, requires = "config")]
    pub driver: Option<String>,
    /// Where volumes are staged.
    #[arg(long, value_name = "DIR", global = true, default_value = STAGING)]
    pub staging: PathBuf,
}

/// What to do with volumes.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume; the same name again finds it.
    Create(Create),
    /// List the volumes.
    List {
        /// The snapshots instead.
        #[arg(long)]
        snapshots: bool,
    },
    /// List, or delete, the volumes that no PersistentVolume stands for.
    Orphans(Orphans),
    /// Show one volume and what is wrong with it; of object storage also what is on its way to the bucket.
    Show {
        /// The volume's id, the name that it was made with, or the path where `berth mount` has mounted it.
        id: String,
        /// It is the id of a snapshot.
        #[arg(long)]
        snapshot: bool,
        /// The mounter's socket, where mounts of object storage are asked for [default: that of the configuration file, or
        /// /run/berth/mounter.sock].
        #[arg(long, value_name = "PATH")]
        mounter: Option<PathBuf>,
    },
    /// Mount a volume at a path of this machine.
    Mount(Mount),
    /// Unmount a volume from a path, and remove the empty path.
    Unmount {
        /// The volume's id, or the name that it was made with.
        id: String,
        /// Where it is mounted.
        path: PathBuf,
    },
    /// Grow a mounted volume.
    Grow {
        /// The volume's id, or the name that it was made with.
        id: String,
        /// Where it is mounted.
        path: PathBuf,
        /// The new size, such as 20Gi.
        #[arg(value_parser = parse_bytes)]
        size: u64,
    },
    /// Take a snapshot of a volume; the same name again finds it.
    Snapshot {
        /// The volume's id, or the name that it was made with.
        id: String,
        /// The snapshot's name.
        name: String,
    },
    /// Delete a volume and its data.
    Delete {
        /// The volume's id, or the name that it was made with.
        id: String,
        /// It is the id of a snapshot.
        #[arg(long)]
        snapshot: bool,
    },
}

/// A volume to be made.
#[derive(Debug, Args)]
pub struct Create {
    /// The name; the driver derives the id from it.
    pub name: String,
    /// The size, such as 10Gi.
    #[arg(long, value_parser = parse_bytes, required_unless_present_any = ["from_snapshot", "from_volume"])]
    pub size: Option<u64>,
    /// The file system; the driver chooses by default.
    #[arg(long, value_parser = ["ext4", "xfs"], conflicts_with = "block")]
    pub fs: Option<String>,
    /// A raw block device, without a file system.
    #[arg(long)]
    pub block: bool,
    /// A parameter as a StorageClass has them; may be repeated.
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = parameter)]
    pub parameters: Vec<(String, String)>,
    /// Start with the contents of this snapshot.
    #[arg(long, value_name = "ID", conflicts_with = "from_volume")]
    pub from_snapshot: Option<String>,
    /// Start with the contents of this volume.
    #[arg(long, value_name = "ID")]
    pub from_volume: Option<String>,
}

/// A volume to be mounted.
#[derive(Debug, Args)]
pub struct Mount {
    /// The volume's id, or the name that it was made with.
    pub id: String,
    /// Where to; made if missing.
    pub path: PathBuf,
    /// Nothing can be written through this path.
    #[arg(long)]
    pub read_only: bool,
    /// A mount option, such as noatime; may be repeated.
    #[arg(long = "option", value_name = "OPTION", conflicts_with = "block")]
    pub options: Vec<String>,
    /// It is a block volume: put its device there.
    #[arg(long)]
    pub block: bool,
    /// The user of the storage that a class has in its node-stage secret, where the driver needs one.
    #[arg(long, requires = "key_file")]
    pub user: Option<String>,
    /// The file that has this user's key and nothing else.
    #[arg(long, value_name = "FILE", requires = "user")]
    pub key_file: Option<PathBuf>,
}

impl Mount {
    fn secrets(&self) -> Result<HashMap<String, String>> {
        let (Some(user), Some(file)) = (&self.user, &self.key_file) else { return Ok(HashMap::new()) };
        let key = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let pairs = [("userID", user.as_str()), ("userKey", key.trim())];
        Ok(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into())
    }
}

fn parameter(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// Does what was asked for, and prints what came of it.
///
/// # Errors
/// When no driver is named or it can't be reached, and what the driver refuses, with its gRPC code.
pub async fn run(arguments: VolumeArguments) -> Result<()> {
    let mounter = match &arguments.command {
        VolumeCommand::Show { mounter: Some(socket), .. } => socket.clone(),
        _ => arguments.connection.mounter()?,
    };
    if let VolumeCommand::Show { id, snapshot: false, .. } = &arguments.command
        && let path = std::path::absolute(id).with_context(|| format!("cannot find {id}"))?
        && let Some(answer) = progress::of_path(&path, &mounter, id.starts_with('/')).await?
    {
        super::say(&if arguments.json { serde_json::to_string_pretty(&answer.json)? } else { answer.text });
        return Ok(());
    }
    let (controller, node) = arguments.connection.sockets()?;
    let client = Client::connect(&controller, node.as_deref()).await?;
    let staging = std::path::absolute(&arguments.connection.staging).context("cannot find the staging directory")?;
    let secrets = match &arguments.command {
        VolumeCommand::Mount(mount) => mount.secrets()?,
        _ => HashMap::new(),
    };
    let kubelet = Kubelet { client: &client, staging: &staging, secrets };
    let answer = match arguments.command {
        VolumeCommand::Orphans(command) => return orphans::run(&client, &command, arguments.json).await,
        command => answer(&kubelet, command, &mounter).await?,
    };
    let text = if arguments.json { serde_json::to_string_pretty(&answer.json)? } else { answer.text };
    super::say(&text);
    Ok(())
}

impl Connection {
    /// The sockets of the controller and of the node service, where there is one.
    fn sockets(&self) -> Result<(PathBuf, Option<PathBuf>)> {
        match (&self.socket, &self.config) {
            (Some(socket), _) => Ok((socket.clone(), Some(self.node_socket.as_ref().unwrap_or(socket).clone()))),
            (None, Some(file)) => sockets_of(&Config::load(file)?, self.driver.as_deref())
                .with_context(|| format!("cannot find a driver's sockets in {}", file.display())),
            (None, None) => bail!("cannot reach a driver: name its --socket, or its --config file"),
        }
    }

    fn mounter(&self) -> Result<PathBuf> {
        match &self.config {
            Some(file) => Ok(Config::load(file)?.mounter.socket),
            None => Ok(SOCKET.into()),
        }
    }
}

fn sockets_of(config: &Config, name: Option<&str>) -> Result<(PathBuf, Option<PathBuf>)> {
    let names: Vec<_> = config.drivers.iter().map(|driver| driver.name.as_str()).collect();
    let name = name.or(names.first().copied()).unwrap_or_default();
    if !names.contains(&name) {
        bail!("it has no driver {name}; it has: {}", names.join(", "));
    }
    let of_name = || config.drivers.iter().filter(|driver| driver.name == name);
    let controller = of_name().find(|driver| driver.role.has_controller());
    let node = of_name().find(|driver| driver.role.has_node());
    match controller {
        Some(controller) => Ok((controller.socket.clone(), node.map(|node| node.socket.clone()))),
        None => bail!("{name} has no controller in it: name both sockets with --socket and --node-socket"),
    }
}

async fn answer(kubelet: &Kubelet<'_>, command: VolumeCommand, mounter: &Path) -> Result<Answer> {
    let client = kubelet.client;
    Ok(match command {
        VolumeCommand::Create(create) => {
            let view = VolumeView::from(client.create(&create.into()).await?);
            Answer { json: json!(view), text: table::volumes(&[view]) }
        }
        VolumeCommand::Orphans(_) => bail!("orphans are listed elsewhere"),
        VolumeCommand::List { snapshots: false } => {
            let views: Vec<_> = client.volumes().await?.into_iter().map(VolumeView::from).collect();
            Answer { json: json!({ "volumes": views }), text: table::volumes(&views) }
        }
        VolumeCommand::List { snapshots: true } => {
            let views: Vec<_> = client.snapshots(None).await?.into_iter().map(SnapshotView::from).collect();
            Answer { json: json!({ "snapshots": views }), text: table::snapshots(&views) }
        }
        VolumeCommand::Show { id, snapshot: false, .. } => {
            let shown = async { show(kubelet, &resolve(client, id.clone()).await?, mounter).await };
            match (shown.await, progress::of_volume(&id, mounter).await) {
                // The service may be away: what is on its way from this node is known here.
                (Err(error), Ok(Some(mount))) => {
                    let rows = [["driver".to_owned(), format!("{error:#}")]];
                    let text = columns(["id", &id], rows.into_iter().chain(progress::rows(&mount)));
                    Answer {
                        json: json!({ "id": id, "error": format!("{error:#}"), "mount": progress::json(&mount) }),
                        text,
                    }
                }
                (shown, _) => shown?,
            }
        }
        VolumeCommand::Show { id, snapshot: true, .. } => {
            let found = client.snapshots(Some(&id)).await?.into_iter().next();
            let view =
                SnapshotView::from(found.with_context(|| format!("cannot show {id}: there is no such snapshot"))?);
            Answer { json: json!(view), text: table::snapshots(&[view]) }
        }
        VolumeCommand::Mount(Mount { id, path, read_only, options, block, .. }) => {
            let id = resolve(client, id).await?;
            let access = if block { Access::Block } else { Access::Mount { filesystem: String::new(), options } };
            let path = kubelet.mount(&id, &path, &access, read_only).await?;
            at(&id, &path, "is at")
        }
        VolumeCommand::Unmount { id, path } => {
            let (id, path) = (resolve(client, id).await?, absolute(&path)?);
            kubelet.unmount(&id, &path).await?;
            at(&id, &path, "is no more at")
        }
        VolumeCommand::Grow { id, path, size } => {
            let id = resolve(client, id).await?;
            let size = kubelet.grow(&id, &absolute(&path)?, size).await?;
            Answer { text: format!("{id} has {} now", format_bytes(size)), json: json!({ "id": id, "size": size }) }
        }
        VolumeCommand::Snapshot { id, name } => {
            let id = resolve(client, id).await?;
            let view = SnapshotView::from(client.snapshot(&id, &name).await?);
            Answer { json: json!(view), text: table::snapshots(&[view]) }
        }
        VolumeCommand::Delete { id, snapshot } => {
            let id = if snapshot {
                client.delete_snapshot(&id).await?;
                id
            } else {
                let known = find(client, &id).await?;
                let is_there = known.is_some();
                let id = known.unwrap_or(id);
                client.delete(&id).await?;
                if !is_there {
                    // Right for programs, and for people mostly a slip of the pen.
                    let text = format!("there is no volume {id}");
                    return Ok(Answer { text, json: json!({ "id": id, "deleted": true }) });
                }
                id
            };
            Answer { text: format!("{id} is deleted"), json: json!({ "id": id, "deleted": true }) }
        }
    })
}

/// The id of the volume that a person means: by its id, or by the name that it was made with.
async fn resolve(client: &Client, given: String) -> Result<String> {
    Ok(find(client, &given).await?.unwrap_or(given))
}

/// The same. `None`: there is none.
async fn find(client: &Client, given: &str) -> Result<Option<String>> {
    let views: Vec<_> = client.volumes().await?.into_iter().map(VolumeView::from).collect();
    let named = views.iter().find(|view| view.id == given).or(views.iter().find(|view| view.name() == given));
    Ok(named.map(|view| view.id.clone()))
}

fn at(id: &str, path: &Path, how: &str) -> Answer {
    let text = format!("{id} {how} {}", path.display());
    Answer { text, json: json!({ "id": id, "path": path }) }
}

async fn show(kubelet: &Kubelet<'_>, id: &str, mounter: &Path) -> Result<Answer> {
    let view = VolumeView::from(kubelet.client.volume(id).await?);
    let problems = kubelet.client.health(id).await?.map(table::problems);
    let published = kubelet.published(id)?;
    let mount = progress::of_volume(id, mounter).await;
    let health = match &problems {
        None => "the driver does not tell".to_owned(),
        Some(problems) if problems.is_empty() => "well".to_owned(),
        Some(problems) => problems.iter().map(|one| one.status).collect::<Vec<_>>().join(", "),
    };
    let mut rows = vec![
        ["size".to_owned(), format_bytes(view.size)],
        ["where".to_owned(), table::where_text(&view.places)],
        ["health".to_owned(), health],
    ];
    let problem_rows = problems.iter().flatten().map(|one| [format!("  {}", one.reason), one.message.clone()]);
    rows.extend(problem_rows);
    rows.extend(published.iter().map(|path| ["mounted at".to_owned(), path.display().to_string()]));
    if view.source.is_some() {
        rows.push(["made from".to_owned(), view.made_from()]);
    }
    match &mount {
        Ok(mount) => rows.extend(mount.iter().flat_map(progress::rows)),
        Err(error) => rows.push(["mount".to_owned(), format!("unknown: {error:#}")]),
    }
    rows.extend(view.context.iter().map(|(key, value)| [key.clone(), value.clone()]));
    let mut json = json!(view);
    json["problems"] = json!(problems);
    json["published"] = json!(published);
    if let Ok(Some(mount)) = &mount {
        json["mount"] = progress::json(mount);
    }
    Ok(Answer { text: columns(["id", &view.id], rows), json })
}

impl From<Create> for Wish {
    fn from(create: Create) -> Self {
        let filesystem = create.fs.unwrap_or_default();
        let origin = match (create.from_snapshot, create.from_volume) {
            (Some(id), _) => Origin::Snapshot(id),
            (None, Some(id)) => Origin::Volume(id),
            (None, None) => Origin::Empty,
        };
        Self {
            name: create.name,
            size: create.size,
            access: if create.block { Access::Block } else { Access::Mount { filesystem, options: Vec::new() } },
            parameters: create.parameters.into_iter().collect(),
            origin,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_by_role_and_name() {
        let text = "
pools: [{name: a, path: /a}]
drivers:
  - {backend: nvme, role: controller, socket: /run/c}
  - {backend: nvme, role: node, socket: /run/n}
  - {backend: nvme, name: two.berth.dev, socket: /run/two}
  - {backend: nvme, name: half.berth.dev, role: node, socket: /run/half}
  - {backend: nvme, name: other.berth.dev, role: controller, socket: /run/other}";
        let config = Config::parse(text, &|_| None).unwrap();
        let sockets = |name| sockets_of(&config, name);
        let pair = |a: &str, b: &str| (PathBuf::from(a), Some(PathBuf::from(b)));
        assert_eq!(sockets(None).unwrap(), pair("/run/c", "/run/n"));
        assert_eq!(sockets(Some("two.berth.dev")).unwrap(), pair("/run/two", "/run/two"));
        assert_eq!(sockets(Some("other.berth.dev")).unwrap(), (PathBuf::from("/run/other"), None));
        assert!(sockets(Some("half.berth.dev")).unwrap_err().to_string().contains("no controller"));
        assert!(sockets(Some("x")).unwrap_err().to_string().contains("it has: nvme.csi.berth.dev"));
    }

    #[test]
    fn a_parameter_has_a_key_and_a_value() {
        assert_eq!(parameter("mkfsOptions=-m reflink=1").unwrap().1, "-m reflink=1");
        assert!(parameter("x").is_err());
        assert!(parameter("=x").is_err());
    }
}
