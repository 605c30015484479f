//! Objects as a POSIX file system: a file is the object whose key is the prefix and the file's path.
//!
//! | layer | owns | never |
//! |---|---|---|
//! | [`shell`] | FUSE requests in, answers out | decides anything |
//! | `namespace` | inodes, names, attributes, listings and how fresh they are, renames | reads or writes a file's bytes |
//! | [`content`] | a file's bytes: staged writes, commits, read-ahead, the node's cache, memory | knows names or inodes |
//! | [`usage`] | how full the volume is, on all nodes | |
//! | [`store`] | the S3 calls, retries, conditions | knows what a file is |
//!
//! Each layer is tested without the one above it. `docs/object-storage.md` is the design.

pub mod attributes;
pub mod content;
mod namespace;
pub mod settings;
pub mod shell;
pub mod store;
pub mod usage;

pub use namespace::{HandleRow, InodeRow, Tables};
pub use shell::ObjectFs;
