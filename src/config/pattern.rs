//! Shell patterns for names of disks: `*`, `?`, `[a-z]`, `[!a-z]`, and `\` before a character that stands for itself.

use std::fmt;

/// A shell pattern that fits whole texts. In one that begins with `/`, a path, nothing but a `/` fits a `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    One(char),
    /// `?`
    AnyOne,
    /// `*`
    Any,
    /// `[…]`: these, or with `!` all but these.
    Set {
        ranges: Vec<(char, char)>,
        all_but: bool,
    },
}

impl Pattern {
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("nothing fits an empty pattern".to_owned());
        }
        let mut parts = Vec::new();
        let mut rest = text.chars();
        while let Some(one) = rest.next() {
            parts.push(match one {
                '*' => Part::Any,
                '?' => Part::AnyOne,
                '[' => set(&mut rest)?,
                '\\' => Part::One(rest.next().ok_or("a `\\` at the end stands before nothing")?),
                one => Part::One(one),
            });
        }
        Ok(Self { text: text.to_owned(), parts })
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Does all of the text fit?
    pub fn fits(&self, text: &str) -> bool {
        let is_path = self.text.starts_with('/');
        let text: Vec<_> = text.chars().collect();
        let (mut at, mut part) = (0, 0);
        // The last `*`, and how far what it stands for reaches.
        let mut star: Option<(usize, usize)> = None;
        while at < text.len() {
            match self.parts.get(part) {
                Some(Part::Any) => {
                    star = Some((part, at));
                    part += 1;
                    continue;
                }
                Some(single) if single.fits(text[at], is_path) => {
                    part += 1;
                    at += 1;
                    continue;
                }
                _ => {}
            }
            match star {
                Some((begun, reach)) if !(is_path && text[reach] == '/') => {
                    star = Some((begun, reach + 1));
                    part = begun + 1;
                    at = reach + 1;
                }
                _ => return false,
            }
        }
        self.parts[part..].iter().all(|part| *part == Part::Any)
    }
}

impl Part {
    fn fits(&self, one: char, is_path: bool) -> bool {
        match self {
            Self::One(this) => one == *this,
            _ if is_path && one == '/' => false,
            Self::AnyOne => true,
            Self::Set { ranges, all_but } => {
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&one)) != *all_but
            }
            Self::Any => false,
        }
    }
}

/// What stands between `[` and `]`.
fn set(rest: &mut std::str::Chars<'_>) -> Result<Part, String> {
    let end = || "`[` has no `]`".to_owned();
    let mut ranges = Vec::new();
    let mut next = rest.next().ok_or_else(end)?;
    let all_but = matches!(next, '!' | '^');
    if all_but {
        next = rest.next().ok_or_else(end)?;
    }
    // A `]` that comes first stands for itself.
    loop {
        let first = if next == '\\' { rest.next().ok_or_else(end)? } else { next };
        next = rest.next().ok_or_else(end)?;
        let mut last = first;
        if next == '-' {
            let after = rest.next().ok_or_else(end)?;
            if after == ']' {
                ranges.extend([(first, first), ('-', '-')]);
                return Ok(Part::Set { ranges, all_but });
            }
            last = if after == '\\' { rest.next().ok_or_else(end)? } else { after };
            next = rest.next().ok_or_else(end)?;
        }
        if last < first {
            return Err(format!("nothing lies between {first} and {last}"));
        }
        ranges.push((first, last));
        if next == ']' {
            return Ok(Part::Set { ranges, all_but });
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_texts_fit_as_in_a_shell() {
        for (pattern, fits, does_not) in [
            ("/dev/nvme*n1", &["/dev/nvme0n1", "/dev/nvme12n1", "/dev/nvmen1"][..], &["/dev/nvme0n1p1", "nvme0n1"][..]),
            ("/dev/sd[a-c]", &["/dev/sda", "/dev/sdc"], &["/dev/sdd", "/dev/sdaa", "/dev/sd"]),
            ("/dev/sd[!a-c]", &["/dev/sdd", "/dev/sd-"], &["/dev/sda", "/dev/sd/"]),
            ("/dev/*", &["/dev/sda"], &["/dev/disk/by-id/x", "/dev"]),
            ("/dev/disk/by-id/*x*", &["/dev/disk/by-id/axb", "/dev/disk/by-id/x"], &["/dev/disk/by-id/a/x"]),
            ("Amazon EC2*", &["Amazon EC2 NVMe Instance Storage", "Amazon EC2"], &["an Amazon EC2", "amazon ec2"]),
            ("*a*b*", &["ab", "xaxbx", "aab/b"], &["ba", "a"]),
            ("?", &["a", "ä", "/"], &["", "ab"]),
            ("[]x-]", &["]", "x", "-"], &["a", "[]x-]"]),
            ("[^\\]]", &["a", "["], &["]"]),
            ("a\\*b", &["a*b"], &["axb", "a\\*b"]),
            ("**", &["", "a"], &[]),
        ] {
            let pattern = Pattern::parse(pattern).unwrap();
            for text in fits {
                assert!(pattern.fits(text), "{pattern} and {text}");
            }
            for text in does_not {
                assert!(!pattern.fits(text), "{pattern} and {text}");
            }
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for bad in ["", "[", "[a", "[!", "[a-", "[z-a]", "a\\"] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn many_stars_take_no_longer_than_few() {
        let pattern = Pattern::parse(&"*a".repeat(40)).unwrap();
        assert!(!pattern.fits(&"a".repeat(39)));
        assert!(pattern.fits(&"a".repeat(4000)));
    }
}
