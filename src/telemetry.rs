//! What the process says about itself: structured logs and metrics.

use std::fmt::Write;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tracing_subscriber::EnvFilter;

use crate::config::Log;
use crate::error::{Error, ErrorKind, Result};
use crate::host::smart::Smart;

/// Starts logging to standard error. Call it once.
pub fn start_logging(log: &Log) -> Result<()> {
    // The libraries' own logs are about frames and connections; who wants them names them.
    let filter = EnvFilter::try_new(format!(
        "aws=warn,h2=warn,hyper=warn,hyper_util=warn,rustls=warn,tonic=warn,tower=warn,{}",
        log.level
    ))
    .map_err(|error| Error::caused(ErrorKind::Invalid, format!("cannot use log level {:?}", log.level), error))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if log.json {
        subscriber.json().flatten_event(true).init();
    } else {
        subscriber.with_ansi(false).with_target(false).init();
    }
    Ok(())
}

/// The metrics of the process.
pub struct Metrics {
    registry: Registry,
    calls: Family<CallLabels, Histogram>,
    ceph: Family<CephLabels, Histogram>,
    in_flight: Family<DriverLabels, Gauge>,
    memory: Gauge<i64, AtomicI64>,
    pools: Pools,
}

/// The gauges of local storage.
#[derive(Default)]
struct Pools {
    up: Family<PoolLabels, Gauge>,
    size: Family<PoolLabels, Gauge>,
    free: Family<PoolLabels, Gauge>,
    stray: Family<PoolLabels, Gauge>,
    fallback: Family<FallbackLabels, Gauge>,
    wear: Family<PoolLabels, Gauge>,
    warning: Family<PoolLabels, Gauge>,
    media_errors: Family<PoolLabels, Gauge>,
}

/// How big a pool, or its part on one disk, is.
#[derive(Clone, Copy, Debug)]
pub struct PoolFigures {
    /// Bytes.
    pub size: u64,
    /// Bytes that nothing lies on.
    pub free: u64,
    /// Bytes that have left their volume's limit. `None`: nobody can tell.
    pub stray: Option<u64>,
}

/// A pool, and the disk's serial number where it is the part of a pool on one disk.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PoolLabels {
    pool: String,
    disk: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FallbackLabels {
    pool: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CallLabels {
    driver: String,
    rpc: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CephLabels {
    cluster: String,
    command: &'static str,
    errno: i32,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct DriverLabels {
    driver: String,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("berth");
        // 0.25 ms to 4 minutes.
        let histogram: fn() -> Histogram = || Histogram::new(exponential_buckets(0.000_25, 4.0, 11));
        let calls = Family::new_with_constructor(histogram);
        let ceph = Family::new_with_constructor(histogram);
        let in_flight = Family::default();
        let memory = Gauge::default();
        registry.register_with_unit("rpc_duration", "Time to answer a CSI call", Unit::Seconds, calls.clone());
        registry.register_with_unit(
            "ceph_command_duration",
            "Time to answer a Ceph command",
            Unit::Seconds,
            ceph.clone(),
        );
        registry.register("rpc_in_flight", "CSI calls being answered now", in_flight.clone());
        registry.register_with_unit("process_resident_memory", "Memory of this process", Unit::Bytes, memory.clone());
        let pools = Pools::default();
        pools.register(&mut registry);
        Self { registry, calls, ceph, in_flight, memory, pools }
    }
}

impl Pools {
    fn register(&self, registry: &mut Registry) {
        registry.register("pool_up", "Can the pool, or its part on this disk, be used?", self.up.clone());
        registry.register_with_unit("pool_size", "Size of the pool's file system", Unit::Bytes, self.size.clone());
        registry.register_with_unit("pool_free", "What is free on it", Unit::Bytes, self.free.clone());
        let stray = "What has left its volume's limit, by another project id";
        registry.register_with_unit("pool_stray", stray, Unit::Bytes, self.stray.clone());
        registry.register("pool_fallback", "Do new volumes lie on the root disk?", self.fallback.clone());
        registry.register("disk_wear_percent", "How much of its rated life a disk has used", self.wear.clone());
        let warning = "The bits of the critical warning in a disk's SMART log";
        registry.register("disk_critical_warning", warning, self.warning.clone());
        registry.register(
            "disk_media_errors",
            "Errors of the medium that a disk has counted",
            self.media_errors.clone(),
        );
    }
}

impl Metrics {
    /// A call has begun; drop the guard when it has been answered.
    pub fn begin(&self, driver: &str) -> InFlight {
        let gauge = self.in_flight.get_or_create_owned(&DriverLabels { driver: driver.to_owned() });
        gauge.inc();
        InFlight(gauge)
    }

    /// A call has been answered.
    pub fn answered(&self, driver: &str, rpc: &'static str, code: &'static str, after: Duration) {
        self.calls.get_or_create(&CallLabels { driver: driver.to_owned(), rpc, code }).observe(after.as_secs_f64());
    }

    /// Ceph has answered a command, or has not: `errno` 0 is success, 110 no answer.
    pub fn ceph_answered(&self, cluster: &str, command: &'static str, errno: i32, after: Duration) {
        let labels = CephLabels { cluster: cluster.to_owned(), command, errno };
        self.ceph.get_or_create(&labels).observe(after.as_secs_f64());
    }

    /// The figures of a pool, or of its part on the disk with this serial number. `None`: it can't be used.
    pub fn pool(&self, pool: &str, disk: &str, figures: Option<PoolFigures>) {
        let labels = PoolLabels { pool: pool.to_owned(), disk: disk.to_owned() };
        self.pools.up.get_or_create(&labels).set(i64::from(figures.is_some()));
        let sizes = [
            (&self.pools.size, figures.map(|all| all.size)),
            (&self.pools.free, figures.map(|all| all.free)),
            (&self.pools.stray, figures.and_then(|all| all.stray)),
        ];
        for (family, bytes) in sizes {
            match bytes {
                Some(bytes) => drop(family.get_or_create(&labels).set(signed(bytes))),
                None => drop(family.remove(&labels)),
            }
        }
    }

    /// No figures of that are known any more.
    pub fn forget(&self, pool: &str, disk: &str) {
        let labels = PoolLabels { pool: pool.to_owned(), disk: disk.to_owned() };
        for family in [&self.pools.up, &self.pools.size, &self.pools.free] {
            family.remove(&labels);
        }
    }

    /// What a pool's disk says about itself.
    pub fn disk(&self, pool: &str, disk: &str, smart: &Smart) {
        let labels = PoolLabels { pool: pool.to_owned(), disk: disk.to_owned() };
        self.pools.wear.get_or_create(&labels).set(i64::from(smart.percentage_used));
        self.pools.warning.get_or_create(&labels).set(i64::from(smart.critical_warning));
        self.pools.media_errors.get_or_create(&labels).set(signed(smart.media_errors));
    }

    /// Does this pool use the root disk for want of a disk of its own?
    pub fn fallback(&self, pool: &str, is_used: bool) {
        self.pools.fallback.get_or_create(&FallbackLabels { pool: pool.to_owned() }).set(i64::from(is_used));
    }

    /// Everything in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        self.memory.set(signed(resident_memory()));
        let mut text = String::new();
        if prometheus_client::encoding::text::encode(&mut text, &self.registry).is_err() {
            let _ = write!(text, "# cannot encode the metrics");
        }
        text
    }
}

/// Counts a call for as long as it is being answered, also when it is cancelled.
pub struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// As a gauge has it.
fn signed(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// Bytes of this process in memory; 0 if the kernel does not tell.
fn resident_memory() -> u64 {
    let pages = procfs::process::Process::myself().and_then(|me| me.statm()).map_or(0, |memory| memory.resident);
    pages * procfs::page_size()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_driver_rpc_and_code() {
        let metrics = Metrics::default();
        let begun = metrics.begin("nvme.csi.berth.dev");
        metrics.answered("nvme.csi.berth.dev", "CreateVolume", "OK", Duration::from_millis(3));
        let text = metrics.encode();
        let labels = r#"{driver="nvme.csi.berth.dev",rpc="CreateVolume",code="OK"}"#;
        assert!(text.contains(&format!("berth_rpc_duration_seconds_count{labels} 1")), "{text}");
        assert!(text.contains(r#"berth_rpc_in_flight{driver="nvme.csi.berth.dev"} 1"#), "{text}");
        drop(begun);
        assert!(metrics.encode().contains(r#"berth_rpc_in_flight{driver="nvme.csi.berth.dev"} 0"#));
        let memory = text.lines().find_map(|line| line.strip_prefix("berth_process_resident_memory_bytes ")).unwrap();
        assert!(memory.parse::<u64>().unwrap() > 100_000);
    }

    #[test]
    fn a_pool_that_can_not_be_used_has_no_size() {
        let metrics = Metrics::default();
        metrics.pool("fast", "S1", Some(PoolFigures { size: 10, free: 5, stray: Some(0) }));
        metrics.disk("fast", "S1", &Smart { percentage_used: 7, media_errors: u128::MAX, ..Smart::default() });
        metrics.fallback("fast", true);
        let text = metrics.encode();
        for line in [
            r#"berth_pool_up{pool="fast",disk="S1"} 1"#,
            r#"berth_pool_size_bytes{pool="fast",disk="S1"} 10"#,
            r#"berth_pool_free_bytes{pool="fast",disk="S1"} 5"#,
            r#"berth_pool_stray_bytes{pool="fast",disk="S1"} 0"#,
            r#"berth_pool_fallback{pool="fast"} 1"#,
            r#"berth_disk_wear_percent{pool="fast",disk="S1"} 7"#,
            r#"berth_disk_critical_warning{pool="fast",disk="S1"} 0"#,
            r#"berth_disk_media_errors{pool="fast",disk="S1"} 9223372036854775807"#,
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        metrics.pool("fast", "S1", None);
        let text = metrics.encode();
        assert!(text.contains(r#"berth_pool_up{pool="fast",disk="S1"} 0"#) && !text.contains("berth_pool_size_bytes{"));
        metrics.forget("fast", "S1");
        assert!(!metrics.encode().contains("berth_pool_up{"));
    }
}
