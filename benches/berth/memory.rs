//! How big the driver is, in memory and on disk.

use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;

use crate::Options;
use crate::driver::{BINARY, Client, Driver, Pool, Wanted};
use crate::lab::Lab;
use crate::measure::{Row, mebibytes};

/// Volumes at work at once.
const AT_ONCE: usize = 8;
/// For each of the process' memory and the program's file.
const TARGET: f64 = (20 << 20) as f64;
/// So much may the second round add before it counts as growth.
const NOISE: f64 = (1 << 20) as f64;

/// Calls of a volume's life after CreateVolume.
const STEPS: usize = 5;
/// A call that is answered with Aborted is repeated after this time; kubelet does so after half a second.
const PAUSE: Duration = Duration::from_millis(20);

/// Resident memory after a thousand volumes lived and died, and after a thousand more; the program's size.
pub(crate) async fn memory(lab: &Lab, options: &Options) -> Result<Vec<Row>> {
    let count = options.count(1000, 50);
    let driver = Driver::start(lab, "memory", Pool::Thin).await?;
    let client = driver.client().await?;
    let start = in_bytes(driver.resident()?);
    let mut repeated = live_and_die(&client, "first", count).await?;
    let first = in_bytes(driver.resident()?);
    repeated += live_and_die(&client, "second", count).await?;
    let second = in_bytes(driver.resident()?);
    let binary = in_bytes(std::fs::metadata(BINARY)?.len());
    Ok(vec![
        Row {
            what: format!("memory (VmRSS) after {count} volumes lived and died"),
            figure: mebibytes(first),
            against: format!("at the start: {}", mebibytes(start)),
            ratio: Some(first / start),
            target: format!("< {}", mebibytes(TARGET)),
            met: Some(first < TARGET),
        },
        Row {
            what: format!("– after {count} more"),
            figure: mebibytes(second),
            against: format!("after the first {count}: {}", mebibytes(first)),
            ratio: Some(second / first),
            target: format!("≤ + {}", mebibytes(NOISE)),
            met: Some(second <= first + NOISE),
        },
        Row {
            what: format!("– of their {} calls, {AT_ONCE} at once, answered with Aborted", 2 * (STEPS + 1) * count),
            figure: repeated.to_string(),
            against: "–".to_owned(),
            ratio: None,
            target: "0".to_owned(),
            met: Some(repeated == 0),
        },
        Row {
            what: "the program's file, stripped".to_owned(),
            figure: mebibytes(binary),
            against: "–".to_owned(),
            ratio: None,
            target: format!("< {}", mebibytes(TARGET)),
            met: Some(binary < TARGET),
        },
    ])
}

/// Takes so many volumes through their lives, and returns how many calls had to be repeated.
async fn live_and_die(client: &Client, prefix: &str, count: usize) -> Result<usize> {
    let wanted = Wanted { filesystem: "ext4", ..Wanted::of_size(16 << 20) };
    let mut repeated = 0;
    let mut all: JoinSet<Result<usize>> = JoinSet::new();
    for number in 0..count {
        if all.len() == AT_ONCE
            && let Some(ended) = all.join_next().await
        {
            repeated += ended??;
        }
        let (mut client, name) = (client.clone(), format!("{prefix}-{number}"));
        all.spawn(async move {
            let mut repeated = 0;
            let volume = client.create(&name, wanted).await?;
            let mut step = 0;
            while step < STEPS {
                let done = match step {
                    0 => client.stage(&volume, wanted).await,
                    1 => client.publish(&volume, wanted).await,
                    2 => client.unpublish(&volume).await,
                    3 => client.unstage(&volume).await,
                    _ => client.delete(&volume).await,
                };
                match done {
                    Ok(()) => step += 1,
                    Err(error) if is_aborted(&error) => {
                        repeated += 1;
                        tokio::time::sleep(PAUSE).await;
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(repeated)
        });
    }
    while let Some(ended) = all.join_next().await {
        repeated += ended??;
    }
    Ok(repeated)
}

fn is_aborted(error: &anyhow::Error) -> bool {
    error.downcast_ref::<tonic::Status>().is_some_and(|status| status.code() == tonic::Code::Aborted)
}

#[expect(clippy::cast_precision_loss, reason = "sizes below 2^52")]
fn in_bytes(bytes: u64) -> f64 {
    bytes as f64
}
