//! `berth mount s3://bucket/prefix PATH`: a bucket as a file system, without Kubernetes.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Log;
use crate::config::aws::Aws;
use crate::host::fuse::{self, MountOptions};
use crate::host::mounts;
use crate::mounter::client::Mounter;
use crate::mounter::objects::Objects;
use crate::mounter::start::{SOCKET, Start, start_detached};
use crate::mounter::worker::{Opener, Volume};
use crate::objectfs::settings::{Checksums, Consistency, Credentials, Endpoint, Limit, Settings};
use crate::telemetry;
use crate::volume::parse_bytes;

/// So long a mount may take: what was staged earlier may be uploaded first.
const DEADLINE: Duration = Duration::from_secs(120);
/// A call is tried again for so long while the service is away, in milliseconds; the same as a driver's default.
const PATIENCE: u64 = 300_000;
/// One attempt without progress is given up after so long, in milliseconds.
const STALL: u64 = 20_000;

/// What to mount, and where.
#[derive(Debug, Args)]
pub struct MountArguments {
    /// The bucket, and what keys begin with: s3://bucket or s3://bucket/prefix.
    #[arg(value_parser = source)]
    pub source: Source,
    /// Where to: an existing, empty directory.
    pub path: PathBuf,
    /// The service, such as `https://s3.example.com`; by default AWS_ENDPOINT_URL, else AWS itself.
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// By default AWS_REGION, else us-east-1.
    #[arg(long)]
    pub region: Option<String>,
    /// Put the bucket into the path of requests, not into the host name; what an --endpoint of one's own does anyway.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub path_style: Option<bool>,
    /// When checksums are sent; at an --endpoint of one's own only where S3 insists.
    #[arg(long, value_name = "WHEN")]
    pub checksums: Option<ChecksumsArgument>,
    /// PEM certificates to trust beside the system's; by default AWS_CA_BUNDLE.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// A file of credentials as the AWS command line has it; by default AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else
    /// ~/.aws/credentials.
    #[arg(long, value_name = "FILE")]
    pub credentials_file: Option<PathBuf>,
    /// Which of the profiles in the file of credentials.
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// An access key id, with its secret in --secret-key-file: a secret on the command line would be seen by everybody.
    #[arg(long, value_name = "ID", requires = "secret_key_file", conflicts_with_all = ["credentials_file", "profile"])]
    pub access_key: Option<String>,
    /// The file that holds the secret of --access-key and nothing else.
    #[arg(long, value_name = "FILE", requires = "access_key")]
    pub secret_key_file: Option<PathBuf>,
    /// Send no credentials: a public bucket.
    #[arg(long, conflicts_with_all = ["credentials_file", "profile", "access_key"])]
    pub anonymous: bool,
    /// Nothing can be written.
    #[arg(long)]
    pub read_only: bool,
    /// When close returns.
    #[arg(long, default_value = "strict")]
    pub consistency: ConsistencyArgument,
    /// Owner of files that say none; by default you.
    #[arg(long)]
    pub uid: Option<u32>,
    /// Group of files that say none; by default yours.
    #[arg(long)]
    pub gid: Option<u32>,
    /// Permission bits of files that say none, in octal.
    #[arg(long, value_name = "MODE", value_parser = mode, default_value = "644")]
    pub file_mode: u32,
    /// Permission bits of directories that say none, in octal.
    #[arg(long, value_name = "MODE", value_parser = mode, default_value = "755")]
    pub dir_mode: u32,
    /// Where written data lies until it is in the bucket.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/berth/staging")]
    pub staging: PathBuf,
    /// Where what was read is kept.
    #[arg(long, value_name = "DIR", default_value = "/var/cache/berth/blocks")]
    pub cache: PathBuf,
    /// Keep so much of what was read; 0: nothing.
    #[arg(long, value_name = "SIZE", default_value = "10Gi", value_parser = parse_bytes)]
    pub cache_size: u64,
    /// Memory for data in flight.
    #[arg(long, value_name = "SIZE", default_value = "32Mi", value_parser = parse_bytes)]
    pub memory: u64,
    /// The bucket (or the prefix) may grow to this size; then programs get ENOSPC.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub limit: Option<u64>,
    /// Names and attributes that others may change are looked at again when they are older than this, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub max_age: u64,
    /// A call is tried again for so long while the service is away, in milliseconds; then programs get EIO.
    #[arg(long, value_name = "MS", default_value_t = PATIENCE)]
    pub patience: u64,
    /// One attempt without progress is given up, and made again, after so long, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = STALL)]
    pub stall: u64,
    /// Serve it in this process, until it is unmounted or interrupted.
    #[arg(long)]
    pub foreground: bool,
    /// The mounter's socket; one is started there if there is none.
    #[arg(long, value_name = "PATH", default_value = SOCKET, conflicts_with = "foreground")]
    pub mounter: PathBuf,
}

/// A bucket, and what keys begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The bucket.
    pub bucket: String,
    /// Empty, or ends in `/`.
    pub prefix: String,
}

/// When checksums are sent.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ChecksumsArgument {
    /// With each transfer.
    WhenSupported,
    /// Only where S3 insists.
    WhenRequired,
}

/// When close returns.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ConsistencyArgument {
    /// When the bucket has the file.
    Strict,
    /// When this machine's disk has it; fsync waits for the bucket.
    WriteBack,
}

fn source(text: &str) -> Result<Source, String> {
    let rest = text.strip_prefix("s3://").ok_or("write s3://bucket or s3://bucket/prefix")?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if bucket.len() < 3 || bucket.len() > 63 || !bucket.chars().all(fits) {
        return Err(format!("{bucket:?} can't be a bucket's name"));
    }
    let prefix = prefix.trim_end_matches('/');
    let parts = || prefix.split('/');
    if !prefix.is_empty() && parts().any(|part| part.is_empty() || part == "." || part == ".." || part == ".berth") {
        return Err(format!("{prefix:?} can't be a prefix: it has an empty part, `.`, `..` or `.berth`"));
    }
    let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
    Ok(Source { bucket: bucket.to_owned(), prefix })
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err("write permission bits in octal, such as 644".to_owned()),
    }
}

impl MountArguments {
    fn settings(&self, aws: &Aws<'_>) -> Result<Settings> {
        let url = self.endpoint.clone().or_else(|| aws.endpoint());
        let ca = self.ca.clone().or_else(|| aws.ca_bundle());
        let read =
            |file: &Path| std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()));
        let own = url.is_some();
        let checksums = match self.checksums {
            Some(ChecksumsArgument::WhenSupported) => Checksums::WhenSupported,
            Some(ChecksumsArgument::WhenRequired) => Checksums::WhenRequired,
            None if own => Checksums::WhenRequired,
            None => Checksums::WhenSupported,
        };
        let endpoint = Endpoint {
            url,
            region: self.region.clone().or_else(|| aws.region()).unwrap_or_else(|| "us-east-1".to_owned()),
            path_style: self.path_style.unwrap_or(own),
            ca: ca.as_deref().map(read).transpose()?,
            checksums,
            anonymous: self.anonymous,
            patience: self.patience,
            stall: self.stall,
        };
        let credentials = match (&self.access_key, &self.secret_key_file) {
            _ if self.anonymous => None,
            (Some(access_key), Some(file)) => Some(Credentials {
                access_key: access_key.clone(),
                secret_key: read(file)?.trim().to_owned(),
                session_token: None,
            }),
            _ => aws.credentials(self.credentials_file.as_deref(), self.profile.as_deref())?,
        };
        let id = self.id(endpoint.url.as_deref());
        let limit = self.limit.map(|bytes| Limit { bytes, notes: format!(".berth/volumes/{id}/") });
        Ok(Settings {
            endpoint,
            credentials,
            bucket: self.source.bucket.clone(),
            prefix: self.source.prefix.clone(),
            read_only: self.read_only,
            consistency: match self.consistency {
                ConsistencyArgument::Strict => Consistency::Strict,
                ConsistencyArgument::WriteBack => Consistency::WriteBack,
            },
            uid: self.uid.unwrap_or(rustix::process::getuid().as_raw()),
            gid: self.gid.unwrap_or(rustix::process::getgid().as_raw()),
            file_mode: self.file_mode,
            dir_mode: self.dir_mode,
            max_age: self.max_age,
            staging: std::path::absolute(&self.staging)?,
            cache: if self.cache_size == 0 { None } else { Some(std::path::absolute(&self.cache)?) },
            cache_size: self.cache_size,
            memory: self.memory,
            limit,
            id,
        })
    }

    /// The same for the same tree, wherever it is mounted: what was staged is found again.
    fn id(&self, endpoint: Option<&str>) -> String {
        use sha2::Digest;
        let Source { bucket, prefix } = &self.source;
        let text = format!("{}\n{bucket}\n{prefix}", endpoint.unwrap_or("aws").trim_end_matches('/'));
        let hash = sha2::Sha256::digest(text.as_bytes());
        let short: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        format!("mount-{short}")
    }
}

/// Mounts, and says how to unmount.
///
/// # Errors
/// Without root; when something is mounted there; what the service says.
pub async fn run(arguments: MountArguments) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("cannot mount: only root may (mount(2) needs CAP_SYS_ADMIN), so run it with sudo");
    }
    let settings = arguments.settings(&Aws::of_this_process())?;
    let path = super::kubelet::absolute(&arguments.path)?;
    let path = path.canonicalize().with_context(|| format!("cannot find the directory {}", path.display()))?;
    if mounts::is_mount(&path)? {
        bail!("something is mounted at {} already: unmount it first", path.display());
    }
    if arguments.foreground {
        return foreground(settings, &path).await;
    }
    let socket = std::path::absolute(&arguments.mounter)?;
    let there = tokio::task::spawn_blocking({
        let path = path.clone();
        move || detached(&settings, &path, &socket)
    });
    there.await??;
    super::say(&format!("mounted at {0}\nunmount it with: umount {0}", path.display()));
    Ok(())
}

fn mount(settings: &Settings, path: &Path) -> Result<OwnedFd> {
    let source = format!("s3://{}/{}", settings.bucket, settings.prefix);
    let options = MountOptions { read_only: settings.read_only, ..MountOptions::default() };
    Ok(fuse::mount(&source, path, &options)?)
}

/// Blocks.
fn detached(settings: &Settings, path: &Path, socket: &Path) -> Result<()> {
    start_detached(&Start::at(socket), DEADLINE)?;
    let mounter = Mounter::new(socket, DEADLINE);
    if let Some(there) = mounter.status(&settings.id)?
        && there.worker.is_some()
    {
        // Unmounted a moment ago it is brought to its end first.
        mounter.ended(&settings.id).with_context(|| {
            format!("cannot mount it at {}: it is or was mounted at {}", path.display(), there.mountpoint.display())
        })?;
    }
    let descriptor = mount(settings, path)?;
    if let Err(error) = mounter.serve(settings, path, descriptor) {
        mounts::detach(path)?;
        return Err(error.into());
    }
    Ok(())
}

/// Serves in this process. It ends when it is unmounted; the first signal unmounts it.
async fn foreground(settings: Settings, path: &Path) -> Result<()> {
    telemetry::start_logging(&Log { json: false, level: "info".to_owned() })?;
    // Not to be missed while the file system is opened.
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let volume: Arc<dyn Volume> = Objects.open(settings.clone()).await?;
    let descriptor = mount(&settings, path)?;
    super::say(&format!("mounted at {0}\nunmount it with Ctrl-C, or: umount {0}", path.display()));
    let place = path.to_owned();
    let unmounting = tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            let place = place.clone();
            match tokio::task::spawn_blocking(move || mounts::unmount_top(&place)).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => tracing::warn!(%error, "still mounted"),
                Err(error) => tracing::warn!(%error, "still mounted"),
            }
        }
    });
    let served = volume.serve(descriptor, Box::new(|_| {})).await;
    unmounting.abort();
    let left = volume.finish().await;
    served?;
    if left > 0 {
        let staged = settings.staging.join(&settings.id);
        bail!("{left} files could not be uploaded: they are in {}, and the next mount tries again", staged.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_bucket_and_a_prefix_that_ends_in_a_slash() {
        let found = |text| source(text).map(|source| (source.bucket, source.prefix));
        assert_eq!(found("s3://bucket"), Ok(("bucket".into(), String::new())));
        assert_eq!(found("s3://bucket/"), Ok(("bucket".into(), String::new())));
        assert_eq!(found("s3://bucket/a/b"), Ok(("bucket".into(), "a/b/".into())));
        for wrong in ["bucket", "s3://", "s3://x", "s3://bucket//a", "s3://bucket/a/../b", "s3://bucket/.berth/x"] {
            assert!(source(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn permission_bits_are_octal() {
        assert_eq!(mode("640"), Ok(0o640));
        assert!(mode("9").is_err() && mode("17777").is_err());
    }
}
