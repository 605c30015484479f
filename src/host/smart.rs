//! What an NVMe disk says about its own health: the SMART log page (NVM Express base specification, "SMART / Health
//! Information", log page 2).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};

/// The page's length in bytes.
const LENGTH: usize = 512;

/// A disk's own view of its health.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Smart {
    /// The bits of "Critical Warning": see [`Self::warnings`].
    pub critical_warning: u8,
    /// In degrees Celsius, of the whole controller. `None`: it does not say.
    pub temperature: Option<i32>,
    /// Percent of the spare blocks that are left.
    pub available_spare: u8,
    /// Below so many percent of spare blocks it warns.
    pub spare_threshold: u8,
    /// Percent of the rated life that is used up; above 100 it has lasted longer than it was rated for. At most 255.
    pub percentage_used: u8,
    /// Bytes that the host has read, in steps of 512,000.
    pub bytes_read: u128,
    /// Bytes that the host has written, likewise.
    pub bytes_written: u128,
    /// How often power was lost without notice.
    pub unsafe_shutdowns: u128,
    /// How often data could not be read or its integrity was violated.
    pub media_errors: u128,
}

impl Smart {
    fn parse(page: &[u8; LENGTH]) -> Self {
        let wide = |at: usize| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&page[at..at + 16]);
            u128::from_le_bytes(bytes)
        };
        let kelvin = i32::from(u16::from_le_bytes([page[1], page[2]]));
        Self {
            critical_warning: page[0],
            temperature: (kelvin > 0).then_some(kelvin - 273),
            available_spare: page[3],
            spare_threshold: page[4],
            percentage_used: page[5],
            bytes_read: wide(32).saturating_mul(512_000),
            bytes_written: wide(48).saturating_mul(512_000),
            unsafe_shutdowns: wide(144),
            media_errors: wide(160),
        }
    }

    /// What the critical warnings mean, in words.
    pub fn warnings(&self) -> Vec<&'static str> {
        let meanings = [
            "its spare blocks run out",
            "its temperature is out of range",
            "its reliability is degraded",
            "it has become read-only",
            "its memory's backup has failed",
            "its persistent memory is read-only or unreliable",
        ];
        let known = meanings.iter().enumerate().filter(|(bit, _)| self.critical_warning & (1 << bit) != 0);
        let mut words: Vec<_> = known.map(|(_, meaning)| *meaning).collect();
        if self.critical_warning & 0b1100_0000 != 0 {
            words.push("it warns of what this version does not know");
        }
        words
    }
}

/// Asks the disk. `None`: it is no NVMe disk. May block as long as the kernel waits for a controller, which is a minute.
///
/// # Errors
/// When it is one and does not say.
pub fn ask(device: &Path) -> Result<Option<Smart>> {
    let what = || format!("cannot ask {} for its health", device.display());
    let file = File::open(device).context(what)?;
    let mut page = [0; LENGTH];
    match get_log_page(&file, &mut page) {
        Ok(0) => Ok(Some(Smart::parse(&page))),
        Ok(status) => Err(Error::new(ErrorKind::Internal, format!("{}: NVMe status {status:#x}", what()))),
        // SCSI takes the number for one of its own, or knows it not.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP)) => Ok(None),
        Err(error) => Err(error).context(what),
    }
}

/// Fills the page; returns the NVMe status, of which 0 is success.
fn get_log_page(device: &File, page: &mut [u8; LENGTH]) -> std::io::Result<i32> {
    let mut command = abi::AdminCommand::log_page(abi::SMART, page);
    #[expect(unsafe_code, reason = "no crate wraps NVMe's commands")]
    // SAFETY: the structure has the kernel's layout (size asserted below), and the buffer that it points to is as long as
    // it says and outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), abi::NVME_IOCTL_ADMIN_CMD, &raw mut command) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

/// Numbers and layouts of `linux/nvme_ioctl.h`.
mod abi {
    pub(super) const NVME_IOCTL_ADMIN_CMD: libc::Ioctl = 0xC048_4E41_u32 as libc::Ioctl;
    const GET_LOG_PAGE: u8 = 2;
    const ALL_NAMESPACES: u32 = u32::MAX;
    pub(super) const SMART: u32 = 2;

    /// `struct nvme_passthru_cmd`.
    #[repr(C)]
    #[derive(Default)]
    pub(super) struct AdminCommand {
        opcode: u8,
        flags: u8,
        reserved: u16,
        namespace: u32,
        word2: u32,
        word3: u32,
        metadata: u64,
        data: u64,
        metadata_length: u32,
        data_length: u32,
        word10: u32,
        word11: u32,
        word12: u32,
        word13: u32,
        word14: u32,
        word15: u32,
        /// 0: the kernel's own, after which it resets the controller.
        timeout: u32,
        result: u32,
    }

    const _: () = assert!(size_of::<AdminCommand>() == 72);

    impl AdminCommand {
        /// Of the whole controller.
        pub(super) fn log_page(number: u32, page: &mut [u8; super::LENGTH]) -> Self {
            let length = page.len() as u32;
            Self {
                opcode: GET_LOG_PAGE,
                namespace: ALL_NAMESPACES,
                data: page.as_mut_ptr() as u64,
                data_length: length,
                // The length is in words of four bytes, less one.
                word10: number | ((length / 4 - 1) << 16),
                ..Self::default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read_as_the_specification_has_it() {
        let mut page = [0; LENGTH];
        page[0] = 0b0000_0101;
        page[1..3].copy_from_slice(&310_u16.to_le_bytes());
        page[3..6].copy_from_slice(&[9, 10, 101]);
        page[32..48].copy_from_slice(&2_u128.to_le_bytes());
        page[48..64].copy_from_slice(&(1_u128 << 64).to_le_bytes());
        page[144..160].copy_from_slice(&7_u128.to_le_bytes());
        page[160..176].copy_from_slice(&300_u128.to_le_bytes());
        let smart = Smart::parse(&page);
        let wanted = Smart {
            critical_warning: 5,
            temperature: Some(37),
            available_spare: 9,
            spare_threshold: 10,
            percentage_used: 101,
            bytes_read: 1_024_000,
            bytes_written: 512_000 << 64,
            unsafe_shutdowns: 7,
            media_errors: 300,
        };
        assert_eq!(smart, wanted);
        assert_eq!(smart.warnings(), ["its spare blocks run out", "its reliability is degraded"]);
        assert_eq!(Smart::parse(&[0; LENGTH]), Smart::default());
        assert_eq!(Smart { critical_warning: 0x80, ..Smart::default() }.warnings().len(), 1);
    }

    #[test]
    fn what_is_no_nvme_disk_does_not_say() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(ask(file.path()).unwrap(), None);
        assert!(ask(Path::new("/no/such/disk")).is_err());
    }
}
