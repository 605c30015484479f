//! Many volumes live their lives at once, in any order of calls, while the driver is killed again and again.
//! `BERTH_SOAK_SECONDS` makes it longer.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::{Client, GI, Lab, MI, Use, from_snapshot, from_volume, is_root, read, write};
use tonic::{Code, Status};

const WORKERS: u64 = 6;
const SIZE: i64 = 320 * MI;

/// splitmix64: small, and the same again for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % sides
    }
}

/// Repeats a call as kubelet and the sidecars do, over the deaths of the driver.
async fn persist<T>(socket: &Path, what: &str, call: impl AsyncFn(Client) -> Result<T, Status>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let result = match Client::connect(socket).await {
            Ok(client) => call(client).await,
            Err(_) => Err(Status::unavailable("no driver")),
        };
        match result {
            Ok(value) => return value,
            Err(status) => {
                let passing = [Code::Unavailable, Code::Aborted, Code::DeadlineExceeded].contains(&status.code());
                assert!(passing || status.message().contains("transport error"), "{what}: {status:?}");
                assert!(Instant::now() < end, "{what} is stuck: {status}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

struct Worker {
    dir: PathBuf,
    socket: PathBuf,
    number: u64,
    dice: Dice,
}

impl Worker {
    async fn mount(&self, id: &str, place: &str, usage: &Use) -> PathBuf {
        let staging = self.dir.join(format!("s-{}-{place}", self.number));
        let target = self.dir.join(format!("t-{}-{place}", self.number));
        std::fs::create_dir_all(&staging).unwrap();
        let staging = staging.to_str().unwrap();
        persist(&self.socket, "stage", async |client| client.stage(id, staging, usage).await).await;
        let path = target.to_str().unwrap();
        persist(&self.socket, "publish", async |client| client.publish(id, staging, path, usage).await).await;
        target
    }

    async fn unmount(&self, id: &str, place: &str) {
        let target = self.dir.join(format!("t-{}-{place}", self.number));
        let staging = self.dir.join(format!("s-{}-{place}", self.number));
        let (target, staging) = (target.to_str().unwrap(), staging.to_str().unwrap());
        persist(&self.socket, "unpublish", async |client| client.unpublish(id, target).await).await;
        persist(&self.socket, "unstage", async |client| client.unstage(id, staging).await).await;
    }

    async fn delete(&self, id: &str) {
        persist(&self.socket, "delete", async |client| client.delete(id).await).await;
    }

    /// One volume from its name to its end.
    async fn life(&mut self, round: u32) {
        let usage = Use::fs(["xfs", "ext4"][usize::try_from(self.dice.roll(2)).unwrap()]);
        let name = format!("w{}-{round}", self.number);
        let id = persist(&self.socket, "create", async |client| {
            client.try_create(Client::request(&name, SIZE, &usage)).await.map(|volume| volume.volume_id)
        })
        .await;
        let mut target = self.mount(&id, "own", &usage).await;
        let mut contents = vec![0; 64 * 1024];
        for _ in 0..self.dice.roll(4) {
            let value = u8::try_from(self.dice.roll(256)).unwrap();
            contents.fill(value);
            write(target.join("f"), &contents);
            match self.dice.roll(4) {
                0 => {
                    self.unmount(&id, "own").await;
                    target = self.mount(&id, "own", &usage).await;
                }
                1 if usage.fs == "xfs" => {
                    let size = SIZE + MI * i64::try_from(self.dice.roll(128)).unwrap();
                    let path = target.to_str().unwrap();
                    persist(&self.socket, "expand", async |client| client.expand(&id, path, size).await).await;
                }
                2 => {
                    let snapshot =
                        persist(&self.socket, "snapshot", async |client| client.snapshot(&id, &name).await).await;
                    std::fs::write(target.join("f"), "changed since").unwrap();
                    self.copy(
                        &format!("{name}-r"),
                        snapshot.size_bytes,
                        &usage,
                        from_snapshot(&snapshot.snapshot_id),
                        &contents,
                    )
                    .await;
                    let id = snapshot.snapshot_id;
                    persist(&self.socket, "delete snapshot", async |client| client.delete_snapshot(&id).await).await;
                    write(target.join("f"), &contents);
                }
                _ => {
                    let more = if usage.fs == "xfs" { 128 * MI } else { 0 };
                    self.copy(&format!("{name}-c"), SIZE + more, &usage, from_volume(&id), &contents).await;
                }
            }
            assert!(read(target.join("f")) == contents, "{name} holds something else");
        }
        self.unmount(&id, "own").await;
        self.delete(&id).await;
    }

    async fn copy(
        &self,
        name: &str,
        size: i64,
        usage: &Use,
        source: berth::proto::csi::volume_content_source::Type,
        contents: &[u8],
    ) {
        let id = persist(&self.socket, "copy", async |client| {
            client.create_from(name, size, usage, source.clone()).await.map(|volume| volume.volume_id)
        })
        .await;
        let target = self.mount(&id, "copy", usage).await;
        assert!(read(target.join("f")) == contents, "{name} holds something else");
        self.unmount(&id, "copy").await;
        self.delete(&id).await;
    }
}

/// > Whatever order the calls come in and whenever the driver dies, data stays what it was and nothing is left over.
#[tokio::test]
async fn random_lives_and_random_deaths_lose_nothing() {
    skip_unless!(is_root(), "needs root");
    let seconds = std::env::var("BERTH_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(15);
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    println!("seed {seed}");
    let (mut lab, client) = Lab::on("xfs", 32 * GI).await;
    let before = client.capacity().await;
    let stop = Arc::new(AtomicBool::new(false));
    let lives = Arc::new(AtomicU32::new(0));
    // A thread each: they block in reads and writes.
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        let mut worker = Worker {
            dir: lab.path("x").parent().unwrap().to_owned(),
            socket: lab.path("run/csi.sock"),
            number,
            dice: Dice(seed.wrapping_mul(WORKERS) + number),
        };
        let (stop, lives) = (stop.clone(), lives.clone());
        workers.push(std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    worker.life(round).await;
                    lives.fetch_add(1, Ordering::Relaxed);
                }
            });
        }));
    }
    let mut dice = Dice(seed);
    let mut deaths = 0;
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(50 + dice.roll(600))).await;
        lab.restart().await;
        deaths += 1;
    }
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.join().unwrap();
    }
    let client = lab.restart().await;
    assert_eq!(client.list().await, Vec::<String>::new());
    lab.assert_clean();
    assert_eq!(client.capacity().await.maximum_volume_size, before.maximum_volume_size);
    println!("{} lives, {deaths} deaths", lives.load(Ordering::Relaxed));
    assert!(lives.load(Ordering::Relaxed) > 0);
}
