//! What volumes are called, and where their objects lie.
//!
//! | id | volume |
//! |---|---|
//! | `SERVICE/BUCKET` | a bucket of its own |
//! | `SERVICE/BUCKET/vol-HASH` | a prefix in a bucket that others use too; its notes say which |
//!
//! SERVICE is a name of the configuration, or `@` and what a class says itself. Ids that can't be read so are handles of
//! volumes that an administrator wrote by hand.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::config::services::{bucket_name, region, service_url};
use crate::error::Result;
use crate::objectfs::settings::Checksums;
use crate::volume::{Name, Owner, VolumeId};

/// An S3 service, by name or by what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Site {
    /// One of the configuration.
    Named(String),
    /// What a class or a volume's attributes say.
    Given(Given),
}

/// An endpoint that is not in the configuration. All of it is in the ids of its volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given {
    /// `http[s]://HOST[:PORT]`.
    pub(super) url: String,
    pub(super) region: Option<String>,
    pub(super) path_style: Option<bool>,
    pub(super) checksums: Option<Checksums>,
}

/// Where a volume lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) site: Site,
    pub(super) bucket: String,
    /// `None`: the bucket is the volume.
    pub(super) name: Option<String>,
}

/// Before the hash of a volume's name.
const VOLUME: &str = "vol-";
/// Hex digits of a name's hash: 96 bits.
const DIGITS: usize = 24;

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Given(given) => {
                write!(f, "@{}", given.url.replacen("://", ":", 1))?;
                if let Some(region) = &given.region {
                    write!(f, ";r={region}")?;
                }
                if let Some(path_style) = given.path_style {
                    f.write_str(if path_style { ";p" } else { ";v" })?;
                }
                match given.checksums {
                    None => Ok(()),
                    Some(Checksums::WhenSupported) => f.write_str(";s"),
                    Some(Checksums::WhenRequired) => f.write_str(";q"),
                }
            }
        }
    }
}

impl Site {
    fn parse(text: &str) -> Option<Self> {
        let Some(text) = text.strip_prefix('@') else {
            let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let is_name = (1..=16).contains(&text.len()) && text.chars().all(fits);
            return is_name.then(|| Self::Named(text.to_owned()));
        };
        let mut words = text.split(';');
        let url = service_url(&words.next()?.replacen(':', "://", 1)).ok()?;
        let mut given = Given { url, region: None, path_style: None, checksums: None };
        for word in words {
            match word {
                "p" => given.path_style = Some(true),
                "v" => given.path_style = Some(false),
                "s" => given.checksums = Some(Checksums::WhenSupported),
                "q" => given.checksums = Some(Checksums::WhenRequired),
                _ => given.region = Some(region(word.strip_prefix("r=")?).ok()?),
            }
        }
        Some(Self::Given(given))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.site, self.bucket)?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, "/{name}"))
    }
}

impl Address {
    /// A volume with a bucket of its own.
    pub(super) fn of_bucket(site: Site, prefix: &str, name: &Name) -> Self {
        Self { site, bucket: format!("{prefix}{}", digest(name)), name: None }
    }

    /// A volume with a prefix in a bucket.
    pub(super) fn of_prefix(site: Site, bucket: &str, name: &Name) -> Self {
        Self { site, bucket: bucket.to_owned(), name: Some(format!("{VOLUME}{}", digest(name))) }
    }

    /// `None`: it is not one that this back end made.
    pub(super) fn of(id: &VolumeId) -> Option<Self> {
        Self::parse(id.as_str())
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let parts: Vec<_> = text.split('/').collect();
        let (site, bucket, name) = match *parts.as_slice() {
            [site, bucket] if is_volume_bucket(bucket) => (site, bucket, None),
            [site, bucket, name] if is_volume_name(name) => (site, bucket, Some(name.to_owned())),
            _ => return None,
        };
        Some(Self { site: Site::parse(site)?, bucket: bucket_name(bucket).ok()?, name })
    }

    /// # Errors
    /// `Invalid` when it is too long for CSI.
    pub(super) fn id(&self) -> Result<VolumeId> {
        let text = self.to_string();
        if text.len() > 128 {
            fail!(
                Invalid,
                "the volume's id {text:?} would have {} bytes, and CSI allows 128: give the service a name in the configuration, or the bucket a shorter one",
                text.len()
            );
        }
        VolumeId::new(text)
    }

    /// Where the notes of this volume lie in its bucket.
    pub(super) fn notes(&self) -> String {
        format!("{VOLUMES}{}/", self.name.as_deref().unwrap_or(WHOLE))
    }
}

/// Where the notes of all volumes of a bucket lie.
pub(super) const VOLUMES: &str = ".berth/volumes/";
/// What stands for the name where the bucket is the volume.
pub(super) const WHOLE: &str = "bucket";

/// Is this the name of a bucket that was made for a volume?
pub(super) fn is_volume_bucket(bucket: &str) -> bool {
    bucket.len() >= DIGITS && bucket.is_char_boundary(bucket.len() - DIGITS) && {
        let (_, hash) = bucket.split_at(bucket.len() - DIGITS);
        is_digest(hash)
    }
}

pub(super) fn is_volume_name(name: &str) -> bool {
    name.strip_prefix(VOLUME).is_some_and(is_digest)
}

fn is_digest(text: &str) -> bool {
    text.len() == DIGITS && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn digest(name: &Name) -> String {
    Sha256::digest(name.as_str().as_bytes())[..DIGITS / 2].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The last part of the key that says whose a prefix is. No volume's path has a part that begins like it.
const CLAIM: &str = ".berth";
/// Where claims lie: below it, each prefix has a path of its own, so that one inside another is found by its path.
const CLAIMS: &str = ".berth/prefixes/";

/// The key of the object that says whose the prefix is.
pub(super) fn claim(prefix: &str) -> String {
    format!("{CLAIMS}{prefix}{CLAIM}")
}

/// The claims of the prefixes that this one lies in.
pub(super) fn claims_above(prefix: &str) -> Vec<String> {
    let slashes = prefix.match_indices('/').map(|(at, _)| at + 1);
    slashes.filter(|end| *end < prefix.len()).map(|end| claim(&prefix[..end])).collect()
}

/// Below this lie the claim of the prefix itself, and those of all that lie in it.
pub(super) fn claims_below(prefix: &str) -> String {
    format!("{CLAIMS}{prefix}")
}

/// A prefix of a volume: a relative path that ends in `/`.
///
/// # Errors
/// `Invalid` for one that can't be a path of ordinary names.
pub(super) fn checked_prefix(text: &str) -> Result<String> {
    let path = text.strip_suffix('/').unwrap_or(text);
    let is_bad =
        |part: &str| part.is_empty() || matches!(part, "." | "..") || part.starts_with(CLAIM) || part.len() > 255;
    if path.len() > LONGEST_PREFIX || path.chars().any(char::is_control) || path.split('/').any(is_bad) {
        fail!(
            Invalid,
            "{text:?} can't be the path of a volume: write names with `/` between them, up to {LONGEST_PREFIX} bytes, none of them `.`, `..` or beginning with {CLAIM}"
        );
    }
    Ok(format!("{path}/"))
}

/// Keys have at most 1,024 bytes, of which most should be left to the files.
const LONGEST_PREFIX: usize = 400;

/// The prefix that a class's pattern means for this volume.
///
/// # Errors
/// `Invalid` for a bad pattern, or one with a word that the provisioner did not fill.
pub(super) fn prefix_of(pattern: &str, owner: &Owner) -> Result<String> {
    let mut path = String::new();
    let mut rest = pattern;
    while let Some(start) = rest.find("${") {
        let Some(length) = rest[start..].find('}') else { fail!(Invalid, "`${{` in path {pattern:?} has no `}}`") };
        let word = &rest[start + 2..start + length];
        let value = match word {
            "pvc.name" => &owner.claim,
            "pvc.namespace" => &owner.namespace,
            "pv.name" => &owner.volume,
            _ => fail!(
                Invalid,
                "${{{word}}} in path {pattern:?} is not known; known: ${{pv.name}}, ${{pvc.name}}, ${{pvc.namespace}}"
            ),
        };
        if value.is_empty() || value.contains('/') {
            fail!(
                Invalid,
                "nobody says what ${{{word}}} in path {pattern:?} is: csi-provisioner needs --extra-create-metadata"
            );
        }
        path.push_str(&rest[..start]);
        path.push_str(value);
        rest = &rest[start + length + 1..];
    }
    checked_prefix(&(path + rest))
}

/// Is the pattern one, whatever its words will be? Asks nobody.
pub(super) fn check_pattern(pattern: &str) -> Result<()> {
    let word = || "x".to_owned();
    prefix_of(pattern, &Owner { claim: word(), namespace: word(), volume: word() }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(url: &str) -> Given {
        Given { url: url.to_owned(), region: None, path_style: None, checksums: None }
    }

    #[test]
    fn an_id_says_where_its_volume_lies() {
        let name = Name::new("pvc-1").unwrap();
        let full = Given {
            region: Some("eu-1".to_owned()),
            path_style: Some(false),
            checksums: Some(Checksums::WhenSupported),
            ..given("https://s3.example.com")
        };
        for site in [Site::Named("main".to_owned()), Site::Given(given("http://127.0.0.1:9000")), Site::Given(full)] {
            for address in
                [Address::of_bucket(site.clone(), "berth-", &name), Address::of_prefix(site.clone(), "data", &name)]
            {
                let id = address.id().unwrap();
                assert_eq!(Address::of(&id), Some(address), "{id}");
            }
        }
        let long = Address::of_prefix(Site::Given(given(&format!("https://{}", "x".repeat(100)))), "data", &name);
        assert!(long.id().unwrap_err().to_string().contains("CSI allows 128"));
    }

    #[test]
    fn other_ids_are_nobodys() {
        let hash = "0123456789abcdef01234567";
        for id in [
            "fake",
            "main/data",
            "main/data/models",
            "a/b/c/d",
            &format!("main/data/{hash}"),
            &format!("main/Data/vol-{hash}"),
            &format!("MAIN/data/vol-{hash}"),
            &format!("main/data/vol-{hash}0"),
            &format!("@ftp:host/data/vol-{hash}"),
            &format!("main/data/vol-{}", hash.to_uppercase()),
        ] {
            assert_eq!(Address::parse(id), None, "{id}");
        }
        assert!(Address::parse(&format!("main/data/vol-{hash}")).is_some());
    }

    #[test]
    fn a_pattern_makes_a_prefix_that_ends_in_a_slash() {
        let owner = Owner { claim: "data".to_owned(), namespace: "team".to_owned(), volume: "pvc-1".to_owned() };
        assert_eq!(prefix_of("${pvc.namespace}/${pvc.name}", &owner).unwrap(), "team/data/");
        assert_eq!(prefix_of("x-${pv.name}/", &owner).unwrap(), "x-pvc-1/");
        for bad in ["", "/", "a//b", "../a", "a/.", ".berth/x", "a/.berthx", "${pvc.uid}", "${pvc.name", "a\nb"] {
            assert!(prefix_of(bad, &owner).is_err(), "{bad:?}");
        }
        assert!(prefix_of("${pvc.name}", &Owner::default()).unwrap_err().to_string().contains("extra-create-metadata"));
        assert!(prefix_of("${pvc.name}", &Owner { claim: "..".to_owned(), ..owner }).is_err());
    }

    #[test]
    fn claims_of_prefixes_lie_as_the_prefixes_do() {
        assert_eq!(claim("a/b/"), ".berth/prefixes/a/b/.berth");
        assert_eq!(claims_above("a/b/c/"), [claim("a/"), claim("a/b/")]);
        assert!(claim("a/b/c/").starts_with(&claims_below("a/b/")));
        assert!(!claim("a/bc/").starts_with(&claims_below("a/b/")));
    }
}
