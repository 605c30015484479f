//! Berth, a Container Storage Interface driver: the map of its rooms.
//!
//! A call passes each room once: `server` accepts it, `rpc` parses it, takes the volume's lock and hands it to a back
//! end on a thread of its own, the back end uses `host` to do it, and `rpc` replies.
//!
//! | room | owns | never |
//! |---|---|---|
//! | [`cli`] | what a person types | decides about storage |
//! | [`config`] | the one typed configuration | is read by anything but `main` and `server` |
//! | [`server`] | sockets, registration with kubelet, health, metrics, drain | knows what a volume is |
//! | [`rpc`] | CSI messages, locks, deadlines, gRPC codes | names a back end |
//! | [`volume`] | the nouns | touches the machine |
//! | [`backend`] | the two traits, and a folder for each back end | knows gRPC, the runtime, or another back end |
//! | [`mounter`] | the process that keeps FUSE descriptors, and its workers | knows CSI |
//! | [`objectfs`] | objects as a POSIX file system | knows volumes, CSI or the mounter |
//! | [`fuse`] | the FUSE protocol | knows objects |
//! | [`host`] | everything that touches the kernel | knows CSI |
//!
//! Dependencies point one way: `main -> cli -> server -> rpc -> backend -> mounter -> objectfs -> fuse -> host -> error`,
//! and everything may use [`volume`] and [`error`]. `tests/architecture.rs` enforces it. There is no global state: what a
//! part needs, it is given.

#[macro_use]
pub mod error;
pub mod backend;
pub mod cli;
pub mod config;
pub mod fuse;
pub mod host;
pub mod locks;
pub mod mounter;
pub mod objectfs;
pub mod proto;
pub mod rpc;
pub mod secrets;
pub mod server;
mod socket;
pub mod telemetry;
pub mod volume;
