//! Object storage in a quickstart: an S3 server in this process, or one that the user names, and a volume on it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::report::Report;
use super::steps::{FILE, create, mount, read, write};
use super::work::{State, Work, beside};
use crate::cli::client::{Client, Origin};
use crate::cli::kubelet::Kubelet;
use crate::config::aws::Aws;
use crate::host::files;
use crate::objectfs::settings::{Checksums, Credentials, Endpoint};
use crate::objectfs::store::embedded::{self, Handle};
use crate::objectfs::store::services::{PATIENCE, STALL};
use crate::objectfs::store::{self, Store};
use crate::volume::format_bytes;

/// A mount knows of a new limit by then.
const GROWN_LIMIT: Duration = Duration::from_secs(60);

/// Where object storage is.
#[derive(Debug, Args)]
pub struct ObjectArguments {
    /// Show object storage on this service, such as `https://s3.example.com`, instead of a server of our own.
    #[arg(long, value_name = "URL", conflicts_with = "end")]
    pub s3_endpoint: Option<String>,
    /// The service's region.
    #[arg(long, value_name = "REGION", default_value = "us-east-1")]
    pub s3_region: String,
    /// A file of credentials as the AWS command line has it; by default AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else
    /// ~/.aws/credentials.
    #[arg(long, value_name = "FILE", requires = "s3_endpoint")]
    pub s3_credentials_file: Option<PathBuf>,
    /// Which of the profiles in the file of credentials.
    #[arg(long, value_name = "NAME", requires = "s3_endpoint")]
    pub s3_profile: Option<String>,
}

/// The service that a quickstart uses, as its state knows it. The keys are in files of their own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Service {
    url: String,
    region: String,
    /// It is our own, in a quickstart's process.
    embedded: bool,
}

impl Service {
    /// What the driver's configuration says of it, below `drivers:`.
    fn configuration(&self, work: &Work) -> Result<String> {
        // A JSON string is one of YAML's.
        let quoted = |path: PathBuf| serde_json::to_string(&path);
        Ok(format!(
            "  - backend: s3\n    socket: {}\n\
             services:\n  - name: quickstart\n    url: {}\n    region: {}\n    accessKeyFile: {}\n    secretKeyFile: {}\n\
             mounter:\n  start: true\n  socket: {}\n  staging: {}\n  cache: {}\n  cacheSize: 1Gi\n",
            quoted(work.object_socket())?,
            serde_json::to_string(&self.url)?,
            serde_json::to_string(&self.region)?,
            quoted(work.access_key())?,
            quoted(work.secret_key())?,
            quoted(work.mounter_socket())?,
            quoted(work.objects().join("staging"))?,
            quoted(work.objects().join("cache"))?,
        ))
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint {
            url: Some(self.url.clone()),
            region: self.region.clone(),
            path_style: true,
            ca: None,
            checksums: Checksums::WhenRequired,
            anonymous: false,
            patience: PATIENCE,
            stall: STALL,
        }
    }
}

/// Makes ready what object storage needs. `None`: it can't be shown here, and the report says why.
pub(super) async fn prepare(
    arguments: &ObjectArguments,
    keep: bool,
    report: &mut Report,
    state: &mut State,
    work: &Work,
) -> Result<Option<Handle>> {
    if let Some(why) = obstacle(arguments, keep, work) {
        report.skip("show object storage", &why);
        return Ok(None);
    }
    let own = arguments.s3_endpoint.is_none();
    let credentials = if own {
        Credentials { access_key: "quickstart".to_owned(), secret_key: random() + &random(), session_token: None }
    } else {
        let aws = Aws::of_this_process();
        let found = aws.credentials(arguments.s3_credentials_file.as_deref(), arguments.s3_profile.as_deref())?;
        found.context(
            "cannot use --s3-endpoint: there are no credentials for it, neither in a file nor in AWS_ACCESS_KEY_ID",
        )?
    };
    work.make_objects(&credentials)?;
    let (url, server) = match &arguments.s3_endpoint {
        Some(url) => (url.clone(), None),
        None => {
            let (url, server) = report.step("start an S3 server", serve(work, "127.0.0.1:0", &credentials)).await?;
            (url, Some(server))
        }
    };
    let service = Service { url, region: arguments.s3_region.clone(), embedded: own };
    work.add_to_configuration(&service.configuration(work)?)?;
    state.service = Some(service);
    work.write_state(state)?;
    Ok(server)
}

fn obstacle(arguments: &ObjectArguments, keep: bool, work: &Work) -> Option<String> {
    if !Path::new("/dev/fuse").exists() {
        return Some("this kernel has no FUSE (try `modprobe fuse`)".to_owned());
    }
    if keep && arguments.s3_endpoint.is_none() {
        return Some("its server would end with this process: name an --s3-endpoint to keep it".to_owned());
    }
    // Workers are other users.
    let is_closed = |part: &&Path| part.metadata().is_ok_and(|stat| stat.mode() & 0o001 == 0);
    let closed = work.folder().ancestors().filter(|part| !part.as_os_str().is_empty()).find(is_closed)?;
    Some(format!("{} is closed to other users: name another --pool", closed.display()))
}

async fn serve(work: &Work, address: &str, credentials: &Credentials) -> Result<((String, Handle), String)> {
    let serving = embedded::serve(&work.bucket_store(), address.parse()?, credentials).await;
    let (address, server) = serving.with_context(|| format!("cannot serve {}", work.bucket_store().display()))?;
    let url = format!("http://{address}");
    let result = format!("at {url}, in this process");
    Ok(((url, server), result))
}

/// For the clean-up after a quickstart that was killed: its server again, where it was.
pub(super) async fn revive(state: &State, work: &Work) -> Result<Option<Handle>> {
    let Some(service) = state.service.as_ref().filter(|service| service.embedded) else { return Ok(None) };
    let address = service.url.trim_start_matches("http://");
    let ((_, server), _) = serve(work, address, &work.credentials()?).await?;
    Ok(Some(server))
}

/// Sixteen digits that nobody else has.
fn random() -> String {
    format!("{:016x}", std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0))
}

/// Shows a volume on it. What is left afterwards the clean-up finds by itself.
pub(super) async fn run(report: &mut Report, state: &State, work: &Work, size: u64) -> Result<()> {
    let Some(service) = &state.service else { return Ok(()) };
    let socket = work.object_socket();
    let client = Client::connect(&socket, Some(&socket)).await?;
    let staging = work.staging();
    let kubelet = Kubelet { client: &client, staging: &staging, secrets: Default::default() };
    let (stop, path) = (report.stop.clone(), beside(&state.path, "objects"));
    // Names of buckets are derived from it, and another quickstart may be at work.
    let name = format!("quickstart-{}", random());
    let id = report.step("create a volume of objects", create(&client, &name, size, Origin::Empty)).await?;
    report.step("mount it", mount(&kubelet, &id, &path)).await?;
    let written = report.step("write 256Mi of random data", write(&path, &stop)).await?;
    let context = client.volume(&id).await?.volume_context;
    report
        .step("find the file in the bucket", async {
            let of = |key: &str| context.get(key).cloned().unwrap_or_default();
            let (bucket, key) = (of("bucket"), of("prefix") + FILE);
            let found = checksum(service, work, &bucket, &key).await?;
            if found != written {
                bail!("s3://{bucket}/{key} is not what was written: SHA-256 is {found}, and {written} is right");
            }
            Ok(((), format!("s3://{bucket}/{key}, SHA-256 is right")))
        })
        .await?;
    report.step("read it through the mount", read(&path, &stop, &written)).await?;
    report.step("grow it while mounted", grow(&kubelet, &id, &path, size.saturating_mul(2))).await
}

/// A mount looks for a new limit every few seconds.
async fn grow(kubelet: &Kubelet<'_>, id: &str, path: &Path, size: u64) -> Result<((), String)> {
    let before = files::space(path)?.total;
    kubelet.grow(id, path, size).await?;
    let end = Instant::now() + GROWN_LIMIT;
    loop {
        let after = files::space(path)?.total;
        if after > before {
            return Ok(((), format!("df says {}, was {}", format_bytes(after), format_bytes(before))));
        }
        if Instant::now() > end {
            bail!("{} has {} as before", path.display(), format_bytes(after));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Asks the service itself, past the mount.
async fn checksum(service: &Service, work: &Work, bucket: &str, key: &str) -> Result<String> {
    let store = store::connect(&service.endpoint(), Some(&work.credentials()?), bucket).await?;
    let (_, mut body) = store.get(key, None, None).await?;
    let mut hasher = Sha256::new();
    while let Some(bytes) = body.try_next().await? {
        hasher.update(&bytes);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
