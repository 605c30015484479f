//! The tables of inodes and handles as values, for a worker that takes a live mount over.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Namespace;
use super::facts::Seen;
use super::tree::{Learned, ROOT};
use crate::fuse::filesystem::{Handle, Ino};

/// What the kernel believes of this mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tables {
    /// By number; directories before what is in them.
    pub inodes: Vec<InodeRow>,
    /// Open files and directories.
    pub handles: Vec<HandleRow>,
}

/// An inode that the kernel knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InodeRow {
    /// Its number.
    pub ino: Ino,
    /// Its directory.
    pub parent: Ino,
    /// Its name.
    pub name: String,
    /// Is it a directory?
    pub directory: bool,
    /// The kernel's references.
    pub lookups: u64,
}

/// An open file or directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandleRow {
    /// Its number.
    pub handle: Handle,
    /// Of which inode.
    pub ino: Ino,
    /// open(2)'s.
    pub flags: u32,
    /// Is it a directory's?
    pub directory: bool,
}

impl Namespace {
    /// All inodes, parents first.
    pub(crate) fn rows(&self) -> Vec<InodeRow> {
        let tree = self.tree();
        let mut sorted = BTreeMap::new();
        for (ino, node) in tree.iter() {
            if let (Some((parent, name)), Some(key)) = (&node.place, tree.key(ino)) {
                let row = InodeRow {
                    ino,
                    parent: *parent,
                    name: name.to_string(),
                    directory: node.directory.is_some(),
                    lookups: node.lookups,
                };
                sorted.insert((key.trim_end_matches('/').matches('/').count(), key), row);
            }
        }
        sorted.into_values().collect()
    }

    /// Takes the kernel's inodes over. What they are is looked at when it is asked for.
    pub(crate) fn restore(self: &Arc<Self>, rows: &[InodeRow]) {
        let mut tree = self.tree();
        for row in rows {
            if row.ino == ROOT || tree.directory(row.parent).is_none() {
                continue;
            }
            if tree.facts(row.parent, &row.name).is_none() {
                let mut ask = tree.ask();
                // Long ago, so that it counts as old.
                ask.at = ask.at.checked_sub(self.max_age * 2).unwrap_or(ask.at);
                let seen = match row.directory {
                    true => Seen::Directory(None),
                    false => Seen::Object(super::facts::Stored::unknown()),
                };
                if tree.learn(row.parent, &row.name, ask, seen) != Learned::Same {
                    continue;
                }
            }
            tree.adopt_number(row.parent, &row.name, row.ino, row.lookups);
        }
    }
}
