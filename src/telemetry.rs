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
        Self { registry, calls, ceph, in_flight, memory }
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

    /// Everything in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        self.memory.set(i64::try_from(resident_memory()).unwrap_or(i64::MAX));
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
}
