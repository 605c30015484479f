//! Calls made once for each of their steps, with the driver killed before that step.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use tonic::{Code, Status};

use super::tracer::{self, Step, Tracer};
use super::{Client, Lab};

/// The steps in a tracer's log: of each process, the first, second ... occurrence of each call.
fn steps(log: &Path) -> Vec<Step> {
    let mut counts = BTreeMap::<(String, String), u32>::new();
    let mut steps = BTreeSet::new();
    for line in std::fs::read_to_string(log).unwrap().lines() {
        let mut words = line.split_whitespace();
        let (Some(pid), Some(call)) = (words.next(), words.next()) else { continue };
        // Not `<... ioctl resumed>` and `+++ exited +++`.
        let Some((name, _)) = call.split_once('(') else { continue };
        let count = counts.entry((pid.to_owned(), name.to_owned())).or_default();
        *count += 1;
        steps.insert((name.to_owned(), *count));
    }
    steps.into_iter().collect()
}

/// What a test of one call needs to know.
pub struct Case<'a> {
    pub lab: &'a mut Lab,
    pub client: Client,
    /// The system calls that count as steps.
    calls: &'static str,
}

impl<'a> Case<'a> {
    pub fn new(lab: &'a mut Lab, client: Client) -> Self {
        Self { lab, client, calls: tracer::STEPS }
    }

    /// Only the starting of programs counts as a step.
    pub fn of_programs(lab: &'a mut Lab, client: Client) -> Self {
        Self { lab, client, calls: tracer::STARTS }
    }

    /// Makes the call once for each of its steps, with the driver killed before that step; repeats it; and lets `check`
    /// see the repeated call's result, and make everything ready for the next round.
    pub async fn survive<T, Call, Check>(&mut self, what: &str, call: Call, check: Check)
    where
        Call: AsyncFn(&Client, i64) -> Result<T, Status>,
        Check: AsyncFn(&Lab, &Client, i64, T),
    {
        self.survive_after(what, async |_, _| (), call, check).await;
    }

    /// The same, with something to be made ready, undisturbed, before each round.
    pub async fn survive_after<T, Prepare, Call, Check>(
        &mut self,
        what: &str,
        prepare: Prepare,
        call: Call,
        check: Check,
    ) where
        Prepare: AsyncFn(&Client, i64),
        Call: AsyncFn(&Client, i64) -> Result<T, Status>,
        Check: AsyncFn(&Lab, &Client, i64, T),
    {
        let log = self.lab.path("steps");
        prepare(&self.client, 0).await;
        let tracer = Tracer::watch(self.lab.pid(), &log, self.calls);
        let value = call(&self.client, 0).await.unwrap();
        // strace writes a line once the call returns, which may be after the reply.
        std::thread::sleep(Duration::from_millis(50));
        drop(tracer);
        check(self.lab, &self.client, 0, value).await;
        let steps = steps(&log);
        let mut deaths = 0;
        for (round, step) in (1..).zip(&steps) {
            // It may die after its answer, in what it does in the background.
            std::thread::sleep(Duration::from_millis(100));
            if self.lab.has_ended() {
                self.client = self.lab.restart().await;
                deaths += 1;
            }
            prepare(&self.client, round).await;
            let tracer = Tracer::kill_before(self.lab.pid(), step);
            let mut result = call(&self.client, round).await;
            let died = result.as_ref().is_err_and(|status| status.message().contains("transport error"));
            if died {
                self.lab.wait();
                deaths += 1;
            }
            drop(tracer);
            if died {
                self.client = self.lab.restart().await;
            } else if let Err(status) = &result {
                // A program was killed.
                assert_eq!(status.code(), Code::Internal, "{what}, before {step:?}: {status}");
            }
            if result.is_err() {
                result = call(&self.client, round).await;
            }
            for _ in 0..20 {
                // What is busy is busy for a moment; nothing else may stand in the way.
                if !result.as_ref().is_err_and(|status| status.code() == Code::Aborted) {
                    break;
                }
                result = call(&self.client, round).await;
            }
            let value = result.unwrap_or_else(|status| panic!("{what}: not survived before {step:?}: {status}"));
            check(self.lab, &self.client, round, value).await;
        }
        println!("{what}: {} steps, the driver killed before {deaths}", steps.len());
        assert!(deaths >= 2, "{what} has more steps than {steps:?}");
    }
}
