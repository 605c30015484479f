//! A look at pools, before a volume needs them.

use super::pool::Pool;
use crate::backend::Finding;
use crate::config;

/// Can each pool be used now?
pub fn examine(pools: &[config::Pool]) -> Vec<Finding> {
    let look = |config: &config::Pool| {
        let subject = format!("pool {}", config.name);
        match Pool::new(config.clone()).state() {
            Ok(()) => Finding::fine(&subject, format!("{} is there", config.path.display())),
            Err(trouble) => {
                let what = trouble.message.trim_start_matches(&format!("{subject}: "));
                Finding::wrong(&subject, what, "is its disk mounted there, and well?")
            }
        }
    };
    pools.iter().map(look).collect()
}
