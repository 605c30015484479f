//! The cellar: everything that touches this machine's kernel. Every function here blocks.
//!
//! Nothing here knows CSI, volumes' ids or gRPC. All `unsafe` code of the local side is in this folder, and programs
//! are started by `command` only.

mod busy;
pub mod ceph;
pub mod cgroups;
pub mod channel;
pub mod command;
pub mod crypt;
pub mod disks;
pub mod extents;
pub mod files;
pub mod filesystem;
pub mod fuse;
pub mod librados;
pub mod loops;
pub mod lvm;
pub mod mapper;
pub mod memory;
pub mod mounts;
pub mod paths;
pub mod patience;
pub mod probe;
pub mod processes;
pub mod quota;
pub mod smart;
pub mod trees;
pub mod workers;
pub mod xfs;
pub mod zero;

pub use rustix::io::Errno;
