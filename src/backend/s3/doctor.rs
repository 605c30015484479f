//! A look at the services of a configuration, before a volume needs them.

use super::services::endpoint_of;
use crate::backend::Finding;
use crate::config::{Mounter, Service};
use crate::error::Result;
use crate::objectfs::store::blocking::{Bucket, Buckets};
use crate::objectfs::store::{ListRequest, StoreErrorKind};

/// A bucket that need not exist: only to have something to ask for.
const ANY: &str = "berth";

/// Is the service there, may we list, and what does it honour?
pub fn examine(service: &Service, buckets: &Buckets) -> Vec<Finding> {
    let subject = format!("service {}", service.name);
    let credentials = match super::services::configured(service) {
        Ok(credentials) => credentials,
        Err(error) => return vec![Finding::wrong(&subject, error.to_string(), "make the files readable for berth")],
    };
    if credentials.is_none() && !service.chain {
        let url = endpoint_of(service).ok().and_then(|endpoint| endpoint.url);
        if let Some(url) = url.filter(|url| !super::node::reaches(url)) {
            return vec![Finding::wrong(
                &subject,
                format!("{url} accepts no connection"),
                "check `url` and the network",
            )];
        }
        return vec![Finding::doubtful(
            &subject,
            "has neither keys nor `chain` here: not asked, and volumes are not listed",
            "right on nodes; give a controller accessKeyFile and secretKeyFile, or `chain: true`",
        )];
    }
    let open = |name: &str| -> Result<Bucket> {
        let mut endpoint = endpoint_of(service)?;
        endpoint.patience = 5_000;
        Ok(buckets.open(&endpoint, credentials.as_ref(), name)?)
    };
    let mut findings = Vec::new();
    match open(ANY).and_then(|account| Ok(account.siblings()?)) {
        Ok(all) => {
            findings.push(Finding::fine(&subject, format!("answers, and the account has {} buckets", all.len())))
        }
        Err(error) => {
            let advice =
                "check `url`, `region`, `ca` and the keys; classes that bring their own secret may work all the same";
            findings.push(Finding::wrong(&subject, error.to_string(), advice));
            return findings;
        }
    }
    for name in &service.buckets {
        findings.push(examine_bucket(&format!("{}/{name}", service.name), open(name)));
    }
    findings
}

fn examine_bucket(subject: &str, bucket: Result<Bucket>) -> Finding {
    let listed = bucket.and_then(|bucket| {
        let request = ListRequest { limit: Some(1), ..ListRequest::default() };
        match bucket.list(&request) {
            Err(error) if error.kind == StoreErrorKind::NoBucket => Ok(None),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(Some(bucket.able()?)),
        }
    });
    match listed {
        Err(error) => {
            Finding::wrong(subject, error.to_string(), "the account needs to list, read, write and delete there")
        }
        Ok(None) => Finding::wrong(subject, "the bucket does not exist", "make it, or leave it out of `buckets`"),
        Ok(Some(able)) if able.conditional_put && able.conditional_finish => {
            Finding::fine(subject, "can be listed; writes are conditional: what others change is never overwritten")
        }
        Ok(Some(_)) => Finding::doubtful(
            subject,
            "can be listed, but the service does not know conditional writes",
            "two nodes that write the same file at the same moment may overwrite each other: see docs/object-storage.md",
        ),
    }
}

/// Is there a mounter, or somebody who starts one?
pub fn examine_mounter(mounter: &Mounter) -> Finding {
    let subject = "mounter";
    match crate::mounter::client::Mounter::new(&mounter.socket, super::node::QUESTION).list() {
        Ok(mounts) => {
            Finding::fine(subject, format!("answers at {}, and has {} mounts", mounter.socket.display(), mounts.len()))
        }
        Err(_) if mounter.starts => Finding::fine(subject, "is not there: started with the first volume"),
        Err(error) => {
            Finding::wrong(subject, error.to_string(), "start `berth mounter`, or say `start: true` below `mounter`")
        }
    }
}
