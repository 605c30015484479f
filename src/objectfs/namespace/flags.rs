//! open(2)'s flags, as FUSE sends them.

/// Read, write, or both.
pub(crate) const O_ACCMODE: u32 = 3;
/// Write only.
pub(crate) const O_WRONLY: u32 = 1;
/// Has to be made by this call.
pub(crate) const O_EXCL: u32 = 0o200;
/// Empty from now on.
pub(crate) const O_TRUNC: u32 = 0o1000;
