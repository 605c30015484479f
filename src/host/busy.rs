//! What is busy for a moment, though nobody uses it.
//!
//! A program that is being started has copies of all our descriptors from its fork to its exec, and so keeps whatever
//! another thread closes meanwhile: a mount can't be unmounted, a loop device not detached. udev, which looks into
//! every device that changes, does the same.

use std::time::{Duration, Instant};

/// So long for a moment. An exec takes a few milliseconds where the machine is busy.
const PATIENCE: Duration = Duration::from_millis(250);
const PAUSE: Duration = Duration::from_millis(2);

/// Tries again while the result says busy, and returns the last one.
pub(crate) fn settle<T>(mut attempt: impl FnMut() -> T, is_busy: impl Fn(&T) -> bool) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        let result = attempt();
        if !is_busy(&result) || Instant::now() >= end {
            return result;
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_busy_for_a_moment_is_tried_again_and_what_stays_busy_is_given_up() {
        let mut left = 3;
        let mut count_down = || {
            left -= 1;
            left
        };
        assert_eq!(settle(&mut count_down, |left| *left > 0), 0);
        let begun = Instant::now();
        assert!(settle(|| true, |busy| *busy));
        assert!(begun.elapsed() >= PATIENCE);
    }
}
