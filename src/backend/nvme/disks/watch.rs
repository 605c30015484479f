//! The figures of pools and disks, each minute.

use std::sync::Arc;
use std::time::Duration;

use super::{Entry, Part, Pools};
use crate::backend::nvme::Nvme;
use crate::backend::nvme::pool::Pool;
use crate::host::files;
use crate::telemetry::{Metrics, PoolFigures};

const EVERY: Duration = Duration::from_secs(60);
/// Enough for a few system calls.
const STACK: usize = 256 << 10;

impl Nvme {
    /// From now on looks after the pools' disks, and keeps their figures up to date, for as long as the process lives.
    pub fn watch(self: Arc<Self>, metrics: Arc<Metrics>) {
        let thread = std::thread::Builder::new().name("watch-pools".to_owned()).stack_size(STACK);
        let started = thread.spawn(move || {
            loop {
                self.pools.report(&metrics);
                self.tend();
                self.renew_limits();
                std::thread::sleep(EVERY);
            }
        });
        if let Err(error) = started {
            tracing::error!(%error, "cannot start a thread to look after the pools");
        }
    }
}

impl Pools {
    /// Asks each disk how it is, and tells the metrics.
    fn report(&self, metrics: &Metrics) {
        // Also when nobody asks for a volume: a disk that has come back is used again.
        self.disks.look_soon();
        for entry in &self.entries {
            match entry {
                Entry::One(pool) => metrics.pool(pool.name(), "", figures(pool)),
                Entry::Group(group) => metrics.pool(group.name(), "", group.figures()),
                Entry::Disks(number) => {
                    let pool = &self.disks.pools[*number];
                    let name = &pool.config.name;
                    // Of what has had no disk until now.
                    metrics.forget(name, "");
                    if pool.parts.iter().next().is_none() {
                        metrics.pool(name, "", None);
                    }
                    for part in pool.parts.iter() {
                        part.held().look_after();
                        let wards = part.held().wards();
                        // One that lies on several disks is not told by any one of them.
                        let disk = if let [only] = &wards[..] { only.disk.identity() } else { String::new() };
                        let figures = match part {
                            Part::Filesystem(_, pool) => figures(pool),
                            Part::Group(_, group) => group.figures(),
                        };
                        metrics.pool(name, &disk, figures);
                        for ward in wards {
                            if let Some(smart) = ward.smart {
                                metrics.disk(name, &ward.disk.identity(), &smart);
                            }
                        }
                    }
                    if pool.spare_state.has_fallback {
                        metrics.fallback(name, pool.spare_state.is_used());
                    }
                }
            }
        }
    }
}

/// `None`: it can't be used.
fn figures(pool: &Pool) -> Option<PoolFigures> {
    let space = pool.state().is_ok().then(|| files::space(pool.path()).ok()).flatten();
    space.map(|space| PoolFigures { size: space.total, free: space.free, stray: pool.stray().ok().flatten() })
}
