//! Where a volume appears.

use std::ffi::CString;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use crate::error::Result;

/// Linux' PATH_MAX, with the terminating NUL.
const PATH_LIMIT: usize = 4096;

/// A staging or target path: absolute, with neither `.`, `..` nor empty parts, not `/` itself.
///
/// Whether a part of it is a symbolic link only the machine knows; `host::paths` refuses those when it opens one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MountPath(PathBuf);

impl MountPath {
    /// # Errors
    /// `Invalid`, naming `what` and the reason.
    pub fn new(what: &str, path: &str) -> Result<Self> {
        if path.is_empty() {
            fail!(Invalid, "{what} is missing");
        }
        if path.len() >= PATH_LIMIT || CString::new(path).is_err() {
            fail!(Invalid, "{what} is longer than {PATH_LIMIT} bytes or has a NUL in it");
        }
        if !path.starts_with('/') {
            fail!(Invalid, "{what} {path:?} is relative: an absolute path is needed");
        }
        let parts = || path[1..].split('/');
        if parts().any(|part| part.is_empty() || part == "." || part == "..") {
            fail!(Invalid, "{what} {path:?} has an empty, `.` or `..` part");
        }
        debug_assert!(Path::new(path).components().all(|c| matches!(c, Component::RootDir | Component::Normal(_))));
        Ok(Self(PathBuf::from(path)))
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// Another path inside this one. `name` is ours, never the caller's.
    pub fn join(&self, name: &'static str) -> Self {
        Self(self.0.join(name))
    }
}

impl fmt::Display for MountPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        for bad in ["", "/", "some/path", "/a/../b", "/a/./b", "/a//b", "/a/", "/a\0b"] {
            assert_eq!(MountPath::new("target path", bad).unwrap_err().kind(), ErrorKind::Invalid, "{bad:?}");
        }
        assert!(MountPath::new("target path", "/var/lib/kubelet/pods/1/volumes/x~y/pv/mount").is_ok());
    }
}
