//! Encrypted devices (dm-crypt): LUKS2 by `cryptsetup`, and a plain mapping with a key that nobody has.
//!
//! Keys go to the program by its standard input; they are in no argument, no file and no error.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::command::{self, Answer};
use super::mapper::{self, Mapped};
use crate::error::{Context, Error, ErrorKind, Result};

/// How hard a key is to guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strength {
    /// 128 random bits or more: stretching it would only cost time.
    Random,
    /// Chosen by a person: it is stretched with argon2id. Opening takes about a second and 64 MiB, so that it fits into a pod.
    Passphrase,
}

const CIPHER: [&str; 4] = ["--cipher", "aes-xts-plain64", "--key-size", "512"];
/// Bytes of the key that [`CIPHER`] takes.
const KEY: usize = 64;

/// How `cryptsetup` ends (its manual, RETURN CODES).
const NO_PERMISSION: i32 = 2;
const WRONG_DEVICE: i32 = 4;
const BUSY: i32 = 5;

/// Makes a LUKS2 header, which takes 16 MiB of the device. The caller knows that the device is blank: it is not asked.
///
/// # Errors
/// `Busy` when the device is in use, `OutcomeUnknown` at the deadline.
pub fn format(device: &Path, key: &[u8], strength: Strength, deadline: Duration) -> Result<()> {
    let stretching: &[&str] = match strength {
        Strength::Random => &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"],
        Strength::Passphrase => &["--pbkdf", "argon2id", "--pbkdf-memory", "65536", "--iter-time", "1000"],
    };
    let mut words = vec!["luksFormat", "--type", "luks2", "--hash", "sha256"];
    words.extend(CIPHER.iter().chain(stretching));
    cryptsetup(&words, &[device.as_os_str()], Some(key), deadline)
}

/// Opens a LUKS2 device as `/dev/mapper/NAME`.
///
/// # Errors
/// `Denied` when the key is a wrong one, `Busy` when there is such a mapping already or the device is in use.
pub fn open(device: &Path, name: &str, key: &[u8], deadline: Duration) -> Result<()> {
    check_name(name)?;
    cryptsetup(&["open", "--type", "luks2"], &[device.as_os_str(), name.as_ref()], Some(key), deadline)
}

/// Opens a device as `/dev/mapper/NAME` with a random key that exists only in the kernel, as long as the mapping does.
/// What is read then is noise: the caller makes a file system, or the reader expects nothing. The mapping has sectors of 4 KiB.
///
/// # Errors
/// `Busy` as for [`open`].
pub fn open_throwaway(device: &Path, name: &str, deadline: Duration) -> Result<()> {
    check_name(name)?;
    let mut key = [0; KEY];
    rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())
        .context(|| "cannot have a random key".to_owned())?;
    let mut words = vec!["open", "--type", "plain", "--sector-size", "4096"];
    words.extend(CIPHER);
    cryptsetup(&words, &[device.as_os_str(), name.as_ref()], Some(&key), deadline)
}

/// Takes a mapping away. There may be none.
///
/// # Errors
/// `Busy` when it is in use.
pub fn close(name: &str, deadline: Duration) -> Result<()> {
    check_name(name)?;
    let answer = ask(&["close"], &[name.as_ref()], None, deadline)?;
    match answer.code() {
        Some(0 | WRONG_DEVICE) => Ok(()),
        _ => Err(failure(&answer)),
    }
}

/// Makes a mapping as big as its device has become. The key is needed for LUKS; a throw-away mapping has none.
///
/// # Errors
/// `Denied` when the key is a wrong one.
pub fn resize(name: &str, key: Option<&[u8]>, deadline: Duration) -> Result<()> {
    check_name(name)?;
    cryptsetup(&["resize"], &[name.as_ref()], key, deadline)
}

/// The mapping that is open on the device with this number. Asks sysfs only.
///
/// # Errors
/// When sysfs can't be read.
pub fn mapping_on(device: u64) -> Result<Option<Mapped>> {
    Ok(mapper::above(device)?.into_iter().find(Mapped::is_crypt))
}

/// Does the device have a LUKS header, of either version, or the second copy of one?
///
/// # Errors
/// When the device can't be read: that is no answer.
pub fn is_luks(device: &Path) -> Result<bool> {
    // LUKS2 On-Disk Format Specification, 2.1: the second header begins where the first one's area, of one of these sizes, ends.
    const SECOND: [u64; 9] = [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];
    let what = || format!("cannot read {}", device.display());
    let file = File::open(device).context(what)?;
    let has = |magic: &[u8; 6], at: u64| {
        let mut found = [0; 6];
        match file.read_exact_at(&mut found, at) {
            Ok(()) => Ok(found == *magic),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error).context(what),
        }
    };
    if has(b"LUKS\xBA\xBE", 0)? {
        return Ok(true);
    }
    for at in SECOND {
        if has(b"SKUL\xBA\xBE", at)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn cryptsetup(words: &[&str], names: &[&std::ffi::OsStr], key: Option<&[u8]>, deadline: Duration) -> Result<()> {
    let answer = ask(words, names, key, deadline)?;
    if answer.code() == Some(0) { Ok(()) } else { Err(failure(&answer)) }
}

fn ask(words: &[&str], names: &[&std::ffi::OsStr], key: Option<&[u8]>, deadline: Duration) -> Result<Answer> {
    let mut arguments: Vec<&std::ffi::OsStr> = words.iter().map(AsRef::as_ref).collect();
    arguments.push("--batch-mode".as_ref());
    if let Some(key) = key {
        if key.is_empty() {
            fail!(Invalid, "a key must not be empty");
        }
        arguments.extend(["--key-file".as_ref(), "-".as_ref()] as [&std::ffi::OsStr; 2]);
    }
    arguments.push("--".as_ref());
    arguments.extend(names);
    command::ask("cryptsetup", &arguments, key.unwrap_or_default(), deadline)
}

fn failure(answer: &Answer) -> Error {
    answer.failure(match answer.code() {
        Some(NO_PERMISSION) => ErrorKind::Denied,
        Some(BUSY) => ErrorKind::Busy,
        _ if answer.errors.contains("device in use") => ErrorKind::Busy,
        _ => ErrorKind::Internal,
    })
}

/// What device mapper takes without rewriting it.
fn check_name(name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"#+.:=@_-".contains(&byte);
    if name.is_empty() || name.len() > 127 || name.starts_with(['.', '-']) || !name.bytes().all(plain) {
        fail!(Invalid, "{name:?} can't be the name of a mapping");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_known_by_either_copy() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let is = |bytes: &[u8]| {
            std::fs::write(file.path(), bytes).unwrap();
            is_luks(file.path()).unwrap()
        };
        assert!(!is(b""));
        assert!(!is(b"LUKS"));
        assert!(is(b"LUKS\xBA\xBE\0\x02"));
        let mut bytes = vec![0; 1 << 20];
        assert!(!is(&bytes));
        bytes[0x4000..0x4006].copy_from_slice(b"SKUL\xBA\xBE");
        assert!(is(&bytes));
        assert!(is_luks(Path::new("/no/such/device")).is_err());
    }

    #[test]
    fn names_and_keys_that_can_not_be_are_refused_before_anything_is_started() {
        let patience = Duration::from_secs(1);
        for name in ["", "a/b", "..", "-a", "a b", "ä"] {
            assert_eq!(close(name, patience).unwrap_err().kind(), ErrorKind::Invalid, "{name}");
        }
        let error = open(Path::new("/dev/null"), "name", b"", patience).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
