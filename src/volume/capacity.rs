//! Sizes, in bytes.

use crate::error::Result;

/// How big a volume has to be and may be, in bytes. `required <= limit` always holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapacityRange {
    required: u64,
    limit: Option<u64>,
}

impl CapacityRange {
    /// From the message's two numbers, where 0 leaves a side open.
    ///
    /// # Errors
    /// `Invalid` for negative numbers, two zeros, or `required > limit` (CSI 1.13, CapacityRange).
    pub fn new(required: i64, limit: i64) -> Result<Self> {
        let (Ok(required), Ok(limit)) = (u64::try_from(required), u64::try_from(limit)) else {
            fail!(Invalid, "capacity range has a negative size: required {required}, limit {limit}");
        };
        if required == 0 && limit == 0 {
            fail!(Invalid, "capacity range is empty: set required_bytes, limit_bytes or both");
        }
        if limit != 0 && required > limit {
            fail!(Invalid, "required size {required} is above the limit {limit}");
        }
        Ok(Self { required, limit: (limit != 0).then_some(limit) })
    }

    /// At least this many bytes; 0 if any size will do.
    pub fn required(self) -> u64 {
        self.required
    }

    /// At most this many bytes.
    pub fn limit(self) -> Option<u64> {
        self.limit
    }

    /// Does an existing size satisfy the range?
    pub fn allows(self, size: u64) -> bool {
        size >= self.required && self.limit.is_none_or(|limit| size <= limit)
    }

    /// The size to make: what is required, or `default` (within the limit) if nothing is, rounded up to `step`.
    ///
    /// # Errors
    /// `OutOfRange` when that is below `minimum` or rounding passes the limit.
    pub fn choose(self, default: u64, minimum: u64, step: u64) -> Result<u64> {
        let wanted = match self.required {
            0 => self.limit.map_or(default, |limit| limit.min(default) / step * step),
            required => required,
        };
        if wanted < minimum {
            fail!(OutOfRange, "size {} is below the minimum of {}", format_bytes(wanted), format_bytes(minimum));
        }
        let Some(size) = wanted.checked_next_multiple_of(step).filter(|size| i64::try_from(*size).is_ok()) else {
            fail!(OutOfRange, "size {wanted} is too large");
        };
        if !self.allows(size) {
            fail!(OutOfRange, "sizes are multiples of {step} bytes: none lies between {wanted} and the limit");
        }
        Ok(size)
    }
}

const UNITS: [(&str, u64); 9] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("", 1),
];

/// A size as people and Kubernetes write it: `10Gi`, `500M`, `1073741824`. Whole numbers only.
///
/// # Errors
/// `Invalid` with the accepted units.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = &text[digits.len()..];
    let size = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .and_then(|(_, factor)| digits.parse::<u64>().ok()?.checked_mul(*factor));
    match size {
        Some(size) => Ok(size),
        None => {
            fail!(Invalid, "{text:?} is not a size: write a whole number with Ki, Mi, Gi, Ti, k, M, G, T or no unit")
        }
    }
}

/// The shortest exact way to write a size in binary units, with one decimal where none is exact.
pub fn format_bytes(size: u64) -> String {
    let (unit, factor) = UNITS[..4].iter().rev().find(|(_, factor)| size >= *factor).unwrap_or(&("B", 1));
    if size.is_multiple_of(*factor) {
        format!("{}{unit}", size / factor)
    } else {
        format!("{:.1}{unit}", size as f64 / *factor as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const GI: i64 = 1 << 30;

    #[test]
    fn a_range_that_contradicts_itself_is_invalid() {
        for (required, limit) in [(-1, 0), (0, -1), (0, 0), (2, 1)] {
            assert_eq!(CapacityRange::new(required, limit).unwrap_err().kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn the_chosen_size_lies_in_the_range() {
        let choose = |required, limit| CapacityRange::new(required, limit).unwrap().choose(1 << 30, 1 << 24, 4096);
        assert_eq!(choose(GI, GI).unwrap(), 1 << 30);
        assert_eq!(choose(GI + 1, 0).unwrap(), (1 << 30) + 4096);
        assert_eq!(choose(0, GI / 2).unwrap(), 1 << 29);
        assert_eq!(choose(0, 4 * GI).unwrap(), 1 << 30);
        for (required, limit) in [(GI + 1, GI + 2), (1, 0), (0, 4096), (i64::MAX, 0)] {
            assert_eq!(choose(required, limit).unwrap_err().kind(), ErrorKind::OutOfRange, "{required} {limit}");
        }
    }

    #[test]
    fn sizes_are_read_and_written_as_kubernetes_does() {
        for (text, size) in [("10Gi", 10 << 30), ("500M", 500_000_000), ("4096", 4096), ("1Ti", 1 << 40), ("7k", 7000)]
        {
            assert_eq!(parse_bytes(text).unwrap(), size);
        }
        for bad in ["", "Gi", "1.5Gi", "-1", "10 Gi", "99999999999Ti", "1gi"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(format_bytes(10 << 30), "10Gi");
        assert_eq!(format_bytes((3 << 30) / 2), "1.5Gi");
        assert_eq!(format_bytes(5), "5B");
    }
}
