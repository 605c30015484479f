//! Options for mkfs that a class, or the author of a pod with an inline volume, may give.
//!
//! mkfs can read and write the files of who runs it (a directory to copy in, a prototype, an undo file, an external
//! journal), and inline volumes let anybody who may create a pod choose its options. So only what is listed passes.

use crate::error::Result;
use crate::host::filesystem::Kind;

/// What may follow an option.
#[derive(Clone, Copy)]
enum Value {
    /// Digits, perhaps with k, m, g or t.
    Number,
    /// A label of at most so many letters, digits, `-`, `_` and `.`.
    Label(usize),
    /// Names of features, parted by commas, each perhaps with `^` before it.
    Features,
    /// `key=number` of these keys, parted by commas.
    Keys(&'static [&'static str]),
}

const EXT4: [(&str, Value); 10] = [
    ("-b", Value::Number),
    ("-i", Value::Number),
    ("-I", Value::Number),
    ("-m", Value::Number),
    ("-N", Value::Number),
    ("-J", Value::Keys(&["size"])),
    ("-L", Value::Label(16)),
    ("-O", Value::Features),
    ("-T", Value::Features),
    ("-E", Value::Keys(&["stride", "stripe_width", "stripe-width", "lazy_itable_init", "lazy_journal_init"])),
];

const XFS: [(&str, Value); 7] = [
    ("-b", Value::Keys(&["size"])),
    ("-d", Value::Keys(&["agcount", "agsize", "su", "sw", "sunit", "swidth"])),
    ("-i", Value::Keys(&["size", "maxpct", "sparse", "nrext64"])),
    ("-l", Value::Keys(&["size", "su", "sunit"])),
    ("-L", Value::Label(12)),
    ("-m", Value::Keys(&["bigtime", "crc", "finobt", "inobtcount", "reflink", "rmapbt"])),
    ("-n", Value::Keys(&["size", "ftype"])),
];

impl Value {
    fn allows(self, text: &str) -> bool {
        let number = |text: &str| {
            let digits = text.strip_suffix(['k', 'm', 'g', 't']).unwrap_or(text);
            !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
        };
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        match self {
            Self::Number => number(text),
            Self::Label(most) => !text.is_empty() && text.len() <= most && !text.starts_with('-') && plain(text),
            Self::Features => text.split(',').all(|one| {
                let name = one.strip_prefix('^').unwrap_or(one);
                !name.is_empty() && !name.starts_with('-') && plain(name)
            }),
            Self::Keys(keys) => text
                .split(',')
                .all(|one| one.split_once('=').is_some_and(|(key, value)| keys.contains(&key) && number(value))),
        }
    }
}

/// # Errors
/// `Invalid` for anything that is not an option of the list with a value of its form.
pub(super) fn check(kind: Kind, words: &[String]) -> Result<()> {
    let known: &[(&str, Value)] = match kind {
        Kind::Ext4 => &EXT4,
        Kind::Xfs => &XFS,
    };
    for pair in words.chunks(2) {
        let value = known.iter().find(|(option, _)| *option == pair[0]).map(|(_, value)| *value);
        if !pair.get(1).zip(value).is_some_and(|(text, value)| value.allows(text)) {
            let list = known.iter().map(|(option, _)| *option).collect::<Vec<_>>().join(" ");
            fail!(
                Invalid,
                "mkfs option {:?} is not allowed for {}; docs/configuration.md says which values these take: {list}",
                pair.join(" "),
                kind.name()
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_options_with_plain_values_reach_mkfs() {
        let check = |kind, text: &str| check(kind, &text.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        for good in [
            "",
            "-m 0 -i 65536 -L data",
            "-O ^has_journal,extent -T largefile4 -J size=64 -E stride=16,stripe_width=64",
        ] {
            check(Kind::Ext4, good).unwrap();
        }
        for good in ["-L data -m reflink=1,rmapbt=0", "-d agcount=4,su=64k,sw=2 -i size=512 -n size=8192 -l size=64m"] {
            check(Kind::Xfs, good).unwrap();
        }
        for bad in [
            "-d etc",
            "-d .",
            "-m",
            "-m -d",
            "m 0",
            "-z undo",
            "-J device=sda",
            "-J location=x",
            "-E offset=1",
            "-n",
            "-S",
            "-V",
            "-c",
            "-F",
            "-U clear",
            "-L -d",
            "-l badblocks",
            "-t ext2",
            "-M x",
            "-O",
            "-L ../x",
            "-m 0 extra",
            "-E lazy_itable_init",
            "-O a,,b",
        ] {
            assert!(check(Kind::Ext4, bad).is_err(), "{bad}");
        }
        for bad in [
            "-p proto",
            "-d file",
            "-d name=x",
            "-d agcount=4,file",
            "-c options=x",
            "-r rtdev=x",
            "-l logdev=x",
            "-N",
            "-K",
            "-L",
            "-P",
            "-s size=512,x",
            "-l internal",
        ] {
            assert!(check(Kind::Xfs, bad).is_err(), "{bad}");
        }
    }
}
