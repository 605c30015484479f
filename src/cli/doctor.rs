//! `berth doctor`: a look at what a configuration names, before a volume needs it.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use serde_json::json;
use tokio::runtime::Handle;

use super::table::columns;
use crate::backend::cephfs::doctor::Users;
use crate::backend::{Finding, Verdict, cephfs, nvme, s3};
use crate::config::{Account, BackendKind, Cluster, Config, Driver};
use crate::objectfs::store::blocking::Buckets;
use crate::objectfs::store::places::Services;

/// What to look at.
#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// The YAML file; docs/configuration.md describes it.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Only this cluster; all by default.
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Only what this driver needs; all of them by default.
    #[arg(long, value_name = "NAME")]
    pub driver: Option<String>,
    /// The Ceph user in the controller's secrets: may it do all that it has to, and no more?
    #[arg(long, value_name = "USER", requires = "provisioner_key_file")]
    pub provisioner: Option<String>,
    /// The file that holds its key and nothing else.
    #[arg(long, value_name = "FILE", requires = "provisioner")]
    pub provisioner_key_file: Option<PathBuf>,
    /// The Ceph user in the nodes' secrets: can it connect, and may it do no more?
    #[arg(long, value_name = "USER", requires = "node_key_file")]
    pub node: Option<String>,
    /// The file that holds its key and nothing else.
    #[arg(long, value_name = "FILE", requires = "node")]
    pub node_key_file: Option<PathBuf>,
    /// Print JSON, for programs.
    #[arg(long)]
    pub json: bool,
}

/// A finding as `--json` shows it. The keys are a promise.
#[derive(Debug, Serialize)]
struct FindingView {
    verdict: &'static str,
    subject: String,
    what: String,
    advice: Option<String>,
}

/// Looks, and prints what it sees. Blocks.
///
/// # Errors
/// When anything is wrong, after all of it has been printed.
pub fn run(arguments: DoctorArguments, runtime: &Handle) -> Result<()> {
    let json = arguments.json;
    let findings = examine(arguments, runtime)?;
    let wrong = findings.iter().filter(|finding| finding.verdict == Verdict::Wrong).count();
    let views: Vec<_> = findings.into_iter().map(FindingView::from).collect();
    let text = if json { serde_json::to_string_pretty(&json!({ "findings": views }))? } else { table(views) };
    super::say(&text);
    match wrong {
        0 => Ok(()),
        1 => bail!("one thing is wrong"),
        _ => bail!("{wrong} things are wrong"),
    }
}

fn examine(arguments: DoctorArguments, runtime: &Handle) -> Result<Vec<Finding>> {
    let config = Config::load(&arguments.config)?;
    let (drivers, clusters) = chosen(&config, arguments.driver.as_deref(), arguments.cluster.as_deref())
        .with_context(|| format!("cannot choose from {}", arguments.config.display()))?;
    let account =
        |user: Option<String>, file: Option<PathBuf>| user.zip(file).map(|(user, key_file)| Account { user, key_file });
    let provisioner = account(arguments.provisioner, arguments.provisioner_key_file);
    let node = account(arguments.node, arguments.node_key_file);
    if clusters.len() != 1 && (provisioner.is_some() || node.is_some()) {
        bail!("a user belongs to one cluster: name that with --cluster");
    }
    let users = Users { provisioner: provisioner.as_ref(), node: node.as_ref() };
    let is_served = |backend| drivers.iter().any(|driver| driver.backend == backend);
    let mut findings = Vec::new();
    if is_served(BackendKind::Nvme) && arguments.cluster.is_none() {
        findings.extend(nvme::doctor::examine(&config.pools, config.deadlines.command));
    }
    for cluster in clusters {
        findings.extend(cephfs::doctor::examine(cluster, users, config.deadlines.ceph));
    }
    if drivers.iter().any(|driver| driver.backend == BackendKind::Cephfs && driver.role.has_node()) {
        findings.push(cephfs::doctor::examine_machine(config.deadlines.command));
    }
    if is_served(BackendKind::S3) && arguments.cluster.is_none() {
        let buckets = Buckets::new(runtime.clone(), Arc::new(Services::default()), config.deadlines.s3);
        findings.extend(config.services.iter().flat_map(|service| s3::doctor::examine(service, &buckets)));
        if drivers.iter().any(|driver| driver.backend == BackendKind::S3 && driver.role.has_node()) {
            findings.push(s3::doctor::examine_mounter(&config.mounter));
        }
    }
    Ok(findings)
}

/// The drivers that are meant, and the clusters that they need.
fn chosen<'c>(
    config: &'c Config,
    driver: Option<&str>,
    cluster: Option<&str>,
) -> Result<(Vec<&'c Driver>, Vec<&'c Cluster>)> {
    let drivers: Vec<_> = config.drivers.iter().filter(|one| driver.is_none_or(|name| one.name == name)).collect();
    if drivers.is_empty() {
        let names: Vec<_> = config.drivers.iter().map(|driver| driver.name.as_str()).collect();
        bail!("it has no driver {}; it has: {}", driver.unwrap_or_default(), names.join(", "));
    }
    if !drivers.iter().any(|driver| driver.backend == BackendKind::Cephfs) {
        return match cluster {
            None => Ok((drivers, Vec::new())),
            Some(name) => bail!("no driver of these needs the cluster {name}"),
        };
    }
    let clusters: Vec<_> = config.clusters.iter().filter(|one| cluster.is_none_or(|name| one.name == name)).collect();
    if let Some(name) = cluster.filter(|_| clusters.is_empty()) {
        let names: Vec<_> = config.clusters.iter().map(|cluster| cluster.name.as_str()).collect();
        bail!("it has no cluster {name}; it has: {}", names.join(", "));
    }
    Ok((drivers, clusters))
}

impl From<Finding> for FindingView {
    fn from(finding: Finding) -> Self {
        let verdict = match finding.verdict {
            Verdict::Fine => "ok",
            Verdict::Doubtful => "warning",
            Verdict::Wrong => "wrong",
        };
        let advice = Some(finding.advice).filter(|advice| !advice.is_empty());
        Self { verdict, subject: finding.subject, what: finding.what, advice }
    }
}

fn table(views: Vec<FindingView>) -> String {
    let row = |view: FindingView| {
        let what = match view.advice {
            None => view.what,
            Some(advice) => format!("{} -> {advice}", view.what),
        };
        [view.verdict.to_owned(), view.subject, what]
    };
    columns(["RESULT", "WHERE", "WHAT -> WHAT TO DO"], views.into_iter().map(row))
}
