//! A look at pools, before a volume needs them.

use std::time::Duration;

use super::disks::{MemberView, PoolView, show};
use crate::backend::Finding;
use crate::config::{self, Source};

/// Can each pool be used now? A program is killed after `deadline`.
pub fn examine(pools: &[config::Pool], deadline: Duration) -> Vec<Finding> {
    match show(pools, None, false, deadline) {
        Ok(views) => views.iter().flat_map(examine_pool).collect(),
        Err(error) => vec![Finding::wrong("pools", error.to_string(), "see what the kernel's log says")],
    }
}

fn examine_pool(pool: &PoolView) -> Vec<Finding> {
    let subject = &format!("pool {}", pool.name);
    let strip = |message: &str| message.trim_start_matches(&format!("{subject}: ")).to_owned();
    let advice = match &pool.source {
        Source::Disks(_) => "`berth pool discover` shows the disks, and `berth pool create` makes the pool",
        _ => "is its disk mounted there, and well?",
    };
    let look = |part: &MemberView| {
        let whole = match &part.trouble {
            None => Finding::fine(subject, format!("{} is there", part.path.display())),
            Some(trouble) if part.waits_for_mount => {
                Finding::doubtful(subject, strip(trouble), "the driver mounts it when it starts")
            }
            Some(trouble) => Finding::wrong(subject, strip(trouble), advice),
        };
        let warning = |warning: &String| Finding::doubtful(subject, strip(warning), "have the disk replaced in time");
        std::iter::once(whole).chain(part.warnings.iter().map(warning)).collect::<Vec<_>>()
    };
    pool.parts.iter().flat_map(look).collect()
}
