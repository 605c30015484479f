//! ListVolumes, page by page.

use anyhow::{Result, ensure};
use berth::proto::csi::ListVolumesRequest;
use tokio::task::JoinSet;

use crate::Options;
use crate::driver::{Client, Driver, Pool, Wanted};
use crate::lab::Lab;
use crate::measure::{Pairs, Row, median, time};

const PAGE: usize = 500;
/// CreateVolume calls at once.
const AT_ONCE: usize = 16;

/// A page of a long list against one of a short list, and many pages against one.
pub(crate) async fn list(lab: &Lab, options: &Options) -> Result<Vec<Row>> {
    let (few, many) = (options.count(1000, 600), options.count(10_000, 2000));
    let (short, long) =
        (Driver::start(lab, "list-short", Pool::Thin).await?, Driver::start(lab, "list-long", Pool::Thin).await?);
    let (mut short, mut long) = (short.with_client().await?, long.with_client().await?);
    fill(&short.1, few).await?;
    fill(&long.1, many).await?;

    let (mut page, mut pages) = (Pairs::default(), Pairs::default());
    let ten = many.min(10 * PAGE);
    for round in 0..=options.count(40, 10) {
        let in_short = read(&mut short.1, PAGE).await?;
        let in_long = read(&mut long.1, PAGE).await?;
        let ten_pages = read(&mut long.1, ten).await?;
        if round > 0 {
            page.baseline.push(in_short);
            page.subject.push(in_long);
            pages.baseline.push(in_long);
            pages.subject.push(ten_pages);
        }
    }
    let number = u32::try_from(ten / PAGE)?;
    let each = median(&pages.subject) / f64::from(number);
    let one = median(&pages.baseline);
    Ok(vec![
        page.at_most(
            format!("ListVolumes, first page of {PAGE} of {many}"),
            &format!("the same page of {few} volumes"),
            1.5,
            0.0,
        ),
        Row {
            what: format!("ListVolumes, {number} pages of {PAGE} of {many}, each"),
            figure: time(each),
            against: format!("the first one: {}", time(one)),
            ratio: Some(each / one),
            target: "≤ 1.5x".to_owned(),
            met: Some(each <= 1.5 * one),
        },
    ])
}

impl Driver {
    /// Keeps the driver with its client.
    async fn with_client(self) -> Result<(Self, Client)> {
        let client = self.client().await?;
        Ok((self, client))
    }
}

/// Makes volumes of 16 MiB.
async fn fill(client: &Client, count: usize) -> Result<()> {
    let mut all = JoinSet::new();
    for number in 0..count {
        if all.len() == AT_ONCE
            && let Some(ended) = all.join_next().await
        {
            ended??;
        }
        let mut client = client.clone();
        all.spawn(async move { client.create(&format!("pvc-{number}"), Wanted::of_size(16 << 20)).await });
    }
    while let Some(ended) = all.join_next().await {
        ended??;
    }
    Ok(())
}

/// Reads the first `count` volumes in pages, and returns how long that took in seconds.
async fn read(client: &mut Client, count: usize) -> Result<f64> {
    let begun = std::time::Instant::now();
    let mut token = String::new();
    for _ in 0..count / PAGE {
        let request = ListVolumesRequest { max_entries: i32::try_from(PAGE)?, starting_token: token };
        let page = client.controller.list_volumes(request).await?.into_inner();
        ensure!(page.entries.len() == PAGE, "a page has {} entries", page.entries.len());
        token = page.next_token;
    }
    Ok(begun.elapsed().as_secs_f64())
}
