//! A file's attributes, and how they are written into an object's metadata: as s3fs writes them, read leniently.
//!
//! Pure. Keys that are not ours (content type, other tools' metadata) are carried along and never lost.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::settings::Settings;
use super::store::Metadata;

/// The type's bits of a mode.
pub const S_IFMT: u32 = 0o170_000;
/// A directory.
pub const S_IFDIR: u32 = 0o040_000;
/// A regular file.
pub const S_IFREG: u32 = 0o100_000;
/// A symbolic link.
pub const S_IFLNK: u32 = 0o120_000;
/// A FIFO.
pub const S_IFIFO: u32 = 0o010_000;
/// A character device.
pub const S_IFCHR: u32 = 0o020_000;
/// A block device.
pub const S_IFBLK: u32 = 0o060_000;
/// A socket.
pub const S_IFSOCK: u32 = 0o140_000;

/// S3 takes so many bytes of keys and values.
pub const METADATA_MAX: usize = 2048;

/// The content type of a directory's marker.
const DIRECTORY_TYPE: &str = "application/x-directory";

/// What stat says of a file beside its size, its extended attributes, and what else its object's metadata holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of content.
    pub mtime: SystemTime,
    /// Last change of anything.
    pub ctime: SystemTime,
    /// Of device nodes.
    pub rdev: u32,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// The rest of the metadata, kept as it is.
    pub other: Metadata,
}

/// What files that say nothing are shown with.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits of files.
    pub file_mode: u32,
    /// Permission bits of directories.
    pub dir_mode: u32,
}

impl From<&Settings> for Defaults {
    fn from(settings: &Settings) -> Self {
        Self { uid: settings.uid, gid: settings.gid, file_mode: settings.file_mode, dir_mode: settings.dir_mode }
    }
}

impl Defaults {
    /// Attributes of a directory without a marker.
    pub fn directory(&self, time: SystemTime) -> Attributes {
        Attributes::read(&Metadata::default(), time, true, self)
    }
}

impl Attributes {
    /// A new file's, made now.
    pub fn new(mode: u32, uid: u32, gid: u32, rdev: u32) -> Self {
        let now = SystemTime::now();
        let mut other = Metadata::default();
        if mode & S_IFMT == S_IFDIR {
            other.content_type = Some(DIRECTORY_TYPE.to_owned());
        }
        Self { mode, uid, gid, mtime: now, ctime: now, rdev, xattrs: BTreeMap::new(), other }
    }

    /// Reads an object's metadata. `modified` stands in for times that are missing; what can't be read is as if it
    /// were missing, and stays in `other` so that nobody's data is lost.
    pub fn read(metadata: &Metadata, modified: SystemTime, directory: bool, defaults: &Defaults) -> Self {
        let mut other = metadata.clone();
        fn take<T>(other: &mut Metadata, key: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
            let parsed = parse(other.user.get(key)?)?;
            other.user.remove(key);
            Some(parsed)
        }
        let number = |text: &str| text.trim().parse::<u32>().ok();
        // The largest number says "nobody" to the kernel: such a file could not even be removed.
        let id = |text: &str| number(text).filter(|id| *id != u32::MAX);
        let mode = take(&mut other, "mode", parse_mode);
        let mtime = take(&mut other, "mtime", parse_time).unwrap_or(modified);
        let default = if directory { defaults.dir_mode } else { defaults.file_mode };
        let mode = mode.unwrap_or(default & 0o7777);
        // The key says whether it is a directory, whatever the metadata says.
        let kind = match (directory, mode & S_IFMT) {
            (true, _) => S_IFDIR,
            (false, 0 | S_IFDIR) => S_IFREG,
            (false, kind) => kind,
        };
        Self {
            mode: kind | mode & 0o7777,
            uid: take(&mut other, "uid", id).unwrap_or(defaults.uid),
            gid: take(&mut other, "gid", id).unwrap_or(defaults.gid),
            ctime: take(&mut other, "ctime", parse_time).unwrap_or(mtime.max(modified)),
            mtime,
            rdev: take(&mut other, "rdev", number).unwrap_or(0),
            xattrs: take(&mut other, "xattr", parse_xattrs).unwrap_or_default(),
            other,
        }
    }

    /// These attributes, which were `before` here, after others have changed that into `theirs`: what was changed here, and
    /// else what they have.
    pub fn merged(&self, before: &Self, theirs: &Self) -> Self {
        fn pick<T: PartialEq + Clone>(ours: &T, before: &T, theirs: &T) -> T {
            if ours == before { theirs.clone() } else { ours.clone() }
        }
        let names = self.xattrs.keys().chain(theirs.xattrs.keys());
        let xattr = |name: &String| {
            let [ours, before, theirs] = [self, before, theirs].map(|attributes| attributes.xattrs.get(name));
            Some((name.clone(), pick(&ours, &before, &theirs)?.clone()))
        };
        Self {
            mode: pick(&self.mode, &before.mode, &theirs.mode),
            uid: pick(&self.uid, &before.uid, &theirs.uid),
            gid: pick(&self.gid, &before.gid, &theirs.gid),
            mtime: pick(&self.mtime, &before.mtime, &theirs.mtime),
            ctime: self.ctime.max(theirs.ctime),
            rdev: pick(&self.rdev, &before.rdev, &theirs.rdev),
            xattrs: names.filter_map(xattr).collect(),
            other: pick(&self.other, &before.other, &theirs.other),
        }
    }

    /// The metadata of an object with these attributes.
    pub fn metadata(&self) -> Metadata {
        let mut metadata = self.other.clone();
        let user = &mut metadata.user;
        user.insert("mode".to_owned(), self.mode.to_string());
        user.insert("uid".to_owned(), self.uid.to_string());
        user.insert("gid".to_owned(), self.gid.to_string());
        user.insert("mtime".to_owned(), write_time(self.mtime));
        user.insert("ctime".to_owned(), write_time(self.ctime));
        if matches!(self.kind(), S_IFCHR | S_IFBLK) {
            user.insert("rdev".to_owned(), self.rdev.to_string());
        }
        if !self.xattrs.is_empty() {
            user.insert("xattr".to_owned(), write_xattrs(&self.xattrs));
        }
        metadata
    }

    /// The type, `S_IF*`.
    pub fn kind(&self) -> u32 {
        self.mode & S_IFMT
    }

    /// Does S3 take it? Its limit is on the bytes of all keys and values.
    pub fn fits(&self) -> bool {
        self.metadata().user.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() <= METADATA_MAX
    }
}

/// s3fs writes `st_mode` in decimal, rclone in octal. Read as decimal it has to have a type that exists.
fn parse_mode(text: &str) -> Option<u32> {
    let text = text.trim();
    let octal = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o177_777);
    if text.starts_with('0') {
        return octal;
    }
    let decimal = text.parse::<u32>().ok();
    let known = |mode: u32| {
        matches!(mode & S_IFMT, S_IFDIR | S_IFREG | S_IFLNK | S_IFIFO | S_IFCHR | S_IFBLK | S_IFSOCK)
            && mode <= 0o177_777
    };
    match decimal {
        Some(mode) if known(mode) => Some(mode),
        // Bare permission bits: three digits that can be octal are.
        Some(mode) if mode < 0o10_000 => octal.filter(|_| text.len() == 3).or(Some(mode)),
        _ => octal.filter(|mode| known(*mode) || *mode <= 0o7777),
    }
}

/// Seconds since 1970 with or without a fraction.
fn parse_time(text: &str) -> Option<SystemTime> {
    let text = text.trim();
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |text| (true, text));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) || !whole.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let time = Duration::new(whole.parse().ok()?, digits.parse().ok()?);
    if negative { UNIX_EPOCH.checked_sub(time) } else { UNIX_EPOCH.checked_add(time) }
}

fn write_time(time: SystemTime) -> String {
    let (sign, time) = match time.duration_since(UNIX_EPOCH) {
        Ok(time) => ("", time),
        Err(before) => ("-", before.duration()),
    };
    match time.subsec_nanos() {
        0 => format!("{sign}{}", time.as_secs()),
        nanos => format!("{sign}{}.{}", time.as_secs(), format!("{nanos:09}").trim_end_matches('0')),
    }
}

/// URL-encoded JSON: names to values in base64.
fn parse_xattrs(text: &str) -> Option<BTreeMap<String, Vec<u8>>> {
    let json: BTreeMap<String, String> = serde_json::from_slice(&url_decode(text)?).ok()?;
    json.into_iter().map(|(name, value)| Some((name, STANDARD.decode(value).ok()?))).collect()
}

fn write_xattrs(xattrs: &BTreeMap<String, Vec<u8>>) -> String {
    let json: BTreeMap<&str, String> =
        xattrs.iter().map(|(name, value)| (name.as_str(), STANDARD.encode(value))).collect();
    url_encode(&serde_json::to_vec(&json).unwrap_or_default())
}

fn url_encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(byte) {
            text.push(*byte as char);
        } else {
            // Writing to a string can't fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

fn url_decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            let (hex, tail) = tail.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Defaults = Defaults { uid: 7, gid: 8, file_mode: 0o644, dir_mode: 0o755 };

    fn metadata(pairs: &[(&str, &str)]) -> Metadata {
        let user = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Metadata { content_type: None, user }
    }

    fn read(pairs: &[(&str, &str)]) -> Attributes {
        Attributes::read(&metadata(pairs), UNIX_EPOCH + Duration::from_secs(1000), false, &DEFAULTS)
    }

    #[test]
    fn modes_of_s3fs_and_rclone_are_told_apart() {
        for (text, mode) in [
            ("33188", 0o100_644),
            ("41471", 0o120_777),
            ("4516", 0o010_644),
            ("100644", 0o100_644),
            ("0100600", 0o100_600),
            ("120777", 0o120_777),
            ("40755", 0o040_755),
            ("0644", 0o644),
            ("755", 0o755),
        ] {
            assert_eq!(parse_mode(text), Some(mode), "{text}");
        }
        for text in ["", "rw-r--r--", "-1", "99999999", "0999"] {
            assert_eq!(parse_mode(text), None, "{text}");
        }
    }

    #[test]
    fn an_object_that_says_nothing_has_the_defaults_and_its_own_time() {
        let bare = read(&[]);
        assert_eq!((bare.mode, bare.uid, bare.gid), (S_IFREG | 0o644, 7, 8));
        assert_eq!(bare.mtime, UNIX_EPOCH + Duration::from_secs(1000));
        let marker = Attributes::read(&metadata(&[("mode", "33188")]), UNIX_EPOCH, true, &DEFAULTS);
        assert_eq!(marker.mode, S_IFDIR | 0o644, "the key decides what is a directory");
        assert_eq!(read(&[("mode", "16877")]).kind(), S_IFREG);
    }

    #[test]
    fn what_cannot_be_read_is_kept_as_it_is() {
        let odd = read(&[("mode", "rwx"), ("mtime", "yesterday"), ("xattr", "%7"), ("color", "blue")]);
        assert_eq!(odd.mode, S_IFREG | 0o644);
        let again = odd.metadata();
        assert_eq!(again.user["color"], "blue");
        assert_eq!(again.user["mode"], "33188");
        assert_eq!(again.user["xattr"], "%7");
    }

    #[test]
    fn changes_of_two_nodes_come_together() {
        let set = |attributes: &Attributes, name: &str, value: &[u8]| {
            let mut attributes = attributes.clone();
            attributes.xattrs.insert(name.to_owned(), value.to_vec());
            attributes
        };
        let before = set(&set(&read(&[("mode", "33188"), ("uid", "1")]), "both", b"0"), "gone", b"0");
        let mut ours = set(&set(&before, "both", b"ours"), "mine", b"1");
        ours.mtime = UNIX_EPOCH + Duration::from_secs(5);
        ours.xattrs.remove("gone");
        let mut theirs = set(&set(&before, "both", b"theirs"), "new", b"2");
        (theirs.mode, theirs.ctime) = (S_IFREG | 0o600, UNIX_EPOCH + Duration::from_secs(2000));
        let merged = ours.merged(&before, &theirs);
        assert_eq!((merged.mode, merged.uid, merged.mtime, merged.ctime), (theirs.mode, 1, ours.mtime, theirs.ctime));
        let xattrs: Vec<_> = merged.xattrs.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        assert_eq!(xattrs, [("both", &b"ours"[..]), ("mine", b"1"), ("new", b"2")]);
    }

    #[test]
    fn times_have_nanoseconds_and_may_lie_before_1970() {
        for (text, seconds, nanos, negative) in [
            ("1700000000", 1_700_000_000, 0, false),
            ("1700000000.5", 1_700_000_000, 500_000_000, false),
            ("1354040105.123456789", 1_354_040_105, 123_456_789, false),
            ("-0.25", 0, 250_000_000, true),
        ] {
            let span = Duration::new(seconds, nanos);
            let time = if negative { UNIX_EPOCH - span } else { UNIX_EPOCH + span };
            assert_eq!(parse_time(text), Some(time), "{text}");
            assert_eq!(write_time(time), text);
        }
        assert_eq!(parse_time("1.x"), None);
        assert_eq!(parse_time("+5"), None);
    }

    #[test]
    fn extended_attributes_look_as_s3fs_writes_them() {
        let xattrs = BTreeMap::from([("user.a".to_owned(), b"1".to_vec())]);
        assert_eq!(write_xattrs(&xattrs), "%7B%22user.a%22%3A%22MQ%3D%3D%22%7D");
        assert_eq!(parse_xattrs("%7B%22user.a%22%3A%22MQ%3D%3D%22%7D"), Some(xattrs));
    }

    #[test]
    fn whatever_is_written_is_read_again() {
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..2000 {
            let kinds = [S_IFREG, S_IFLNK, S_IFIFO, S_IFCHR, S_IFBLK, S_IFSOCK, S_IFDIR];
            let kind = kinds[random.usize(..kinds.len())];
            let time = |random: &mut fastrand::Rng| {
                let span = Duration::new(random.u64(..4_000_000_000), random.u32(..1_000_000_000));
                if random.u8(..10) == 0 { UNIX_EPOCH - span } else { UNIX_EPOCH + span }
            };
            let mut attributes = Attributes::new(kind | random.u32(..0o10_000), random.u32(..), random.u32(..), 0);
            attributes.mtime = time(&mut random);
            attributes.ctime = time(&mut random);
            if matches!(kind, S_IFCHR | S_IFBLK) {
                attributes.rdev = random.u32(..);
            }
            for _ in 0..random.usize(..4) {
                let name = format!("user.{}", (0..random.usize(1..9)).map(|_| random.char(..)).collect::<String>());
                attributes.xattrs.insert(name, (0..random.usize(..50)).map(|_| random.u8(..)).collect());
            }
            if random.bool() {
                attributes.other.user.insert("x".to_owned(), "y".to_owned());
                attributes.other.content_type = Some("image/png".to_owned());
            }
            let again = Attributes::read(&attributes.metadata(), UNIX_EPOCH, kind == S_IFDIR, &DEFAULTS);
            assert_eq!(again, attributes);
            assert!(attributes.metadata().user.values().all(|value| value.is_ascii()), "headers are ASCII");
        }
    }

    #[test]
    fn garbage_never_panics() {
        let mut random = fastrand::Rng::with_seed(6);
        for _ in 0..5000 {
            let letters: Vec<char> = "0123456789.-%{}\"aé ".chars().collect();
            let text: String = (0..random.usize(..12)).map(|_| letters[random.usize(..letters.len())]).collect();
            read(&[
                ("mode", &text),
                ("uid", &text),
                ("mtime", &text),
                ("ctime", &text),
                ("xattr", &text),
                ("rdev", &text),
            ]);
        }
    }
}
