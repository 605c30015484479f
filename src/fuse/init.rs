//! What is agreed with the kernel when a mount begins. Touches no descriptor.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use zerocopy::FromBytes;

use super::abi::{self, InitIn, InitOut, feature};
use crate::host::{Errno, memory};

/// What a session may use.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of one WRITE at the most; reads are as large.
    pub max_write: u32,
    /// Bytes that the kernel reads ahead of a program.
    pub max_readahead: u32,
    /// Requests nobody waits for (read-ahead, releases) that are out at the same time.
    pub max_background: u16,
    /// Threads that read requests.
    pub readers: usize,
    /// Large writes that are out at the same time; each holds a buffer of `max_write`. Further ones wait in the kernel,
    /// with whatever comes behind them.
    pub write_buffers: usize,
    /// How long an interrupted request may go on before it is given up. Signals that don't kill (timers, children)
    /// interrupt as well, and programs don't expect EINTR of files.
    pub interrupt_patience: Duration,
    /// Unused buffers are given back after this time without requests.
    pub idle: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_write: 1 << 20,
            max_readahead: 1 << 20,
            max_background: 64,
            readers: 2,
            write_buffers: 32,
            interrupt_patience: Duration::from_secs(2),
            idle: Duration::from_secs(2),
        }
    }
}

/// What INIT settled. Whoever has it and the descriptor can serve the mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// The protocol's minor version.
    pub minor: u32,
    /// What the kernel can do.
    pub offered: u64,
    /// What of it is used.
    pub used: u64,
    /// Bytes of one WRITE.
    pub max_write: u32,
    /// Bytes that the kernel reads ahead.
    pub max_readahead: u32,
    /// Requests nobody waits for.
    pub max_background: u16,
}

impl Agreed {
    /// Can the kernel send again what a dead server had read? (Linux 6.9.)
    pub fn can_resend(&self) -> bool {
        self.offered & feature::HAS_RESEND != 0
    }

    /// Bytes of the largest request.
    pub(super) fn largest_request(&self) -> usize {
        largest_request(self.max_write)
    }
}

/// The kernel refuses smaller buffers than this. An extended attribute may have 64 KiB, whatever a WRITE may have.
pub(super) fn largest_request(max_write: u32) -> usize {
    let head = size_of::<abi::InHeader>() + size_of::<abi::WriteIn>();
    head + usize::try_from(max_write).unwrap_or(usize::MAX / 2).max(128 << 10)
}

/// What is wanted where the kernel offers it.
const WANTED: u64 = feature::ASYNC_READ
    | feature::ATOMIC_O_TRUNC
    | feature::BIG_WRITES
    | feature::DONT_MASK
    | feature::AUTO_INVAL_DATA
    | feature::DO_READDIRPLUS
    | feature::READDIRPLUS_AUTO
    | feature::ASYNC_DIO
    | feature::PARALLEL_DIROPS
    | feature::ABORT_ERROR
    | feature::MAX_PAGES
    | feature::CACHE_SYMLINKS
    | feature::HANDLE_KILLPRIV_V2
    | feature::INIT_EXT
    | feature::HAS_RESEND;

/// The answer to INIT. Without [`Agreed`]: the kernel is newer by a major version, and will ask again.
pub(super) fn negotiate(body: &[u8], options: &Options) -> Result<(InitOut, Option<Agreed>), Errno> {
    let (asked, rest) = InitIn::read_from_prefix(body).map_err(|_| Errno::PROTO)?;
    if asked.major > abi::MAJOR {
        return Ok((InitOut { major: abi::MAJOR, minor: abi::MINOR, ..InitOut::default() }, None));
    }
    if asked.major < abi::MAJOR || asked.minor < abi::OLDEST_MINOR {
        return Err(Errno::PROTO);
    }
    let mut offered = u64::from(asked.flags);
    if offered & feature::INIT_EXT != 0 {
        let (more, _) = u32::read_from_prefix(rest).map_err(|_| Errno::PROTO)?;
        offered |= u64::from(more) << 32;
    }
    let used = offered & WANTED;
    let page = memory::page_size();
    // Below a page the kernel goes up to one; what it can't do is its own to cut.
    let most = if used & feature::MAX_PAGES == 0 { 32 * page } else { usize::from(u16::MAX) * page };
    let most = u32::try_from(most).unwrap_or(u32::MAX);
    let max_write = options.max_write.clamp(4096, most);
    let agreed = Agreed {
        minor: asked.minor.min(abi::MINOR),
        offered,
        used,
        max_write,
        max_readahead: options.max_readahead.min(asked.max_readahead),
        max_background: options.max_background.max(1),
    };
    let pages = usize::try_from(max_write).unwrap_or(usize::MAX).div_ceil(page);
    let answer = InitOut {
        major: abi::MAJOR,
        minor: agreed.minor,
        max_readahead: agreed.max_readahead,
        flags: low(used),
        max_background: agreed.max_background,
        congestion_threshold: (agreed.max_background / 4 * 3).max(1),
        max_write,
        time_granularity: 1,
        max_pages: u16::try_from(pages).unwrap_or(u16::MAX),
        flags2: low(used >> 32),
        ..InitOut::default()
    };
    Ok((answer, Some(agreed)))
}

/// What a session goes by that was given nothing although INIT was answered: its predecessor died before it could say what
/// was agreed. Then at least what is necessary was.
pub(super) fn assumed(options: &Options) -> Agreed {
    Agreed {
        minor: abi::OLDEST_MINOR,
        offered: 0,
        used: 0,
        max_write: options.max_write,
        max_readahead: options.max_readahead,
        max_background: options.max_background,
    }
}

fn low(bits: u64) -> u32 {
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn asked(minor: u32, flags: u64) -> Vec<u8> {
        let mut body = InitIn { major: 7, minor, max_readahead: 131_072, flags: low(flags) }.as_bytes().to_vec();
        body.extend(low(flags >> 32).to_ne_bytes());
        body.resize(64, 0);
        body
    }

    #[test]
    fn a_new_kernel_agrees_to_resend() {
        let (answer, agreed) = negotiate(&asked(60, u64::MAX), &Options::default()).unwrap();
        let agreed = agreed.unwrap();
        assert_eq!((answer.minor, answer.max_pages, answer.max_write), (abi::MINOR, 256, 1 << 20));
        assert_eq!(agreed.used, WANTED);
        assert_eq!(u64::from(answer.flags) | u64::from(answer.flags2) << 32, WANTED);
        assert_eq!(answer.max_readahead, 131_072);
        assert!(agreed.can_resend());
    }

    #[test]
    fn an_older_kernel_is_taken_at_its_word() {
        // The second field is rubbish unless the first says that it counts.
        let flags = !feature::INIT_EXT & !feature::MAX_PAGES;
        let (answer, agreed) = negotiate(&asked(34, flags), &Options::default()).unwrap();
        let agreed = agreed.unwrap();
        assert_eq!((answer.minor, answer.flags2), (34, 0));
        assert_eq!(agreed.max_write, 128 << 10);
        assert!(!agreed.can_resend());
        // Sixteen bytes are a whole INIT then.
        negotiate(&asked(34, flags)[..16], &Options::default()).unwrap();
    }

    #[test]
    fn other_versions_are_asked_again_or_refused() {
        let mut body = asked(45, 0);
        body[0] = 8;
        let (answer, agreed) = negotiate(&body, &Options::default()).unwrap();
        assert!(agreed.is_none());
        assert_eq!(answer.major, 7);
        body[0] = 6;
        negotiate(&body, &Options::default()).unwrap_err();
        negotiate(&asked(30, 0), &Options::default()).unwrap_err();
        negotiate(&asked(45, u64::MAX)[..17], &Options::default()).unwrap_err();
        negotiate(&[], &Options::default()).unwrap_err();
    }

    #[test]
    fn what_was_agreed_survives_being_written_down() {
        let (_, agreed) = negotiate(&asked(45, u64::MAX), &Options::default()).unwrap();
        let text = serde_json::to_string(&agreed).unwrap();
        assert_eq!(serde_json::from_str::<Option<Agreed>>(&text).unwrap(), agreed);
    }
}
