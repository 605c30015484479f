//! Limits of I/O: what classes and VolumeAttributesClasses say.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::host::cgroups;
use crate::volume::{Parameters, parse_bytes};

/// What each pod may do with the volume, a second. `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Limits {
    read_iops: Option<u64>,
    write_iops: Option<u64>,
    /// In bytes.
    read_bandwidth: Option<u64>,
    /// In bytes.
    write_bandwidth: Option<u64>,
}

impl Limits {
    pub(super) const KEYS: [&'static str; 6] =
        ["iops", "readIops", "writeIops", "bandwidth", "readBandwidth", "writeBandwidth"];

    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Takes one of [`Self::KEYS`] over: a whole number of operations, or of bytes such as `100Mi`; `none` lifts it.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let limit = match value {
            "none" => None,
            _ if key.to_ascii_lowercase().ends_with("bandwidth") => Some(parse_bytes(value)?),
            _ => match value.parse::<u64>() {
                Ok(number) => Some(number),
                Err(_) => fail!(Invalid, "{key} {value:?}: write a whole number of operations a second, or none"),
            },
        };
        if limit == Some(0) {
            fail!(Invalid, "{key}: a limit of 0 would stop the volume for ever; write none for no limit");
        }
        match key {
            "iops" => (self.read_iops, self.write_iops) = (limit, limit),
            "readIops" => self.read_iops = limit,
            "writeIops" => self.write_iops = limit,
            "bandwidth" => (self.read_bandwidth, self.write_bandwidth) = (limit, limit),
            "readBandwidth" => self.read_bandwidth = limit,
            "writeBandwidth" => self.write_bandwidth = limit,
            _ => fail!(Invalid, "mutable parameter {key:?} is not known; known: {}", Self::KEYS.join(", ")),
        }
        Ok(())
    }

    /// These, changed by the keys of a VolumeAttributesClass.
    pub(super) fn changed_by(mut self, mutable: &Parameters) -> Result<Self> {
        // The general ones first, in whatever order they come.
        let (general, special): (Vec<_>, Vec<_>) =
            mutable.iter().partition(|(key, _)| matches!(key.as_str(), "iops" | "bandwidth"));
        for (key, value) in general.into_iter().chain(special) {
            self.set(key, value)?;
        }
        Ok(self)
    }

    pub(super) fn of_group(self) -> cgroups::Limits {
        cgroups::Limits {
            read_iops: self.read_iops,
            write_iops: self.write_iops,
            read_bytes: self.read_bandwidth,
            write_bytes: self.write_bandwidth,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Limits> {
        let mutable = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Limits::default().changed_by(&mutable)
    }

    #[test]
    fn general_limits_are_both_and_special_ones_win() {
        let limits = parse(&[("bandwidth", "10Mi"), ("iops", "100"), ("readIops", "200"), ("writeBandwidth", "none")]);
        let expected = Limits {
            read_iops: Some(200),
            write_iops: Some(100),
            read_bandwidth: Some(10 << 20),
            write_bandwidth: None,
        };
        assert_eq!(limits.unwrap(), expected);
        assert!(parse(&[]).unwrap().is_none());
        for bad in [("iops", "0"), ("iops", "1.5"), ("bandwidth", "fast"), ("bandwidth", "0"), ("iopz", "1")] {
            assert!(parse(&[bad]).is_err(), "{bad:?}");
        }
    }
}
