//! The process that outlives the driver: it keeps each mount's FUSE descriptor and runs one unprivileged worker per mount.
//!
//! ```text
//! driver ── settings, descriptor ──> mounter ── the same ──> worker
//!                                       └ a duplicate, in escrow
//! ```
//!
//! A worker outlives its mounter: the next one finds it by its socket in the mounter's folder, and asks for what it holds. Nothing
//! about mounts is written to disk, least of all credentials.

pub mod client;
mod folders;
mod mounts;
pub mod objects;
mod protocol;
pub mod server;
pub mod start;
pub mod worker;

pub use folders::Users;
