//! The process that outlives the driver: it keeps each mount's FUSE descriptor and runs one unprivileged worker per mount.
//!
//! Skeleton of the interface; the bodies follow.

pub mod client;
mod protocol;
