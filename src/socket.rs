//! Unix sockets that nobody else can connect to.
//!
//! The process' umask is 077 from its first line (see `main`), so a socket is private before it has its final mode.

use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use crate::error::{Context, Result};

/// Whose directory a socket lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Directory {
    /// Ours: made if missing, 0700.
    Ours,
    /// Somebody else's, such as kubelet's: left as it is.
    Shared,
}

/// Listens at `path`, taking the place of a socket that nobody listens on any more.
///
/// # Errors
/// `Precondition` when another process serves there, or something else is there.
pub(crate) fn bind(path: &Path, directory: Directory) -> Result<(UnixListener, SocketFile)> {
    if directory == Directory::Ours {
        make_private(path.parent().unwrap_or(path))?;
    }
    match path.symlink_metadata() {
        Ok(there) if !there.file_type().is_socket() => {
            fail!(Precondition, "{} is not a socket: not replacing it", path.display());
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            fail!(Precondition, "another process serves {}: stop it first", path.display());
        }
        Ok(_) => std::fs::remove_file(path).context(|| format!("cannot remove the stale {}", path.display()))?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).context(|| format!("cannot listen at {}", path.display()))?;
    let file = SocketFile(path.to_owned());
    std::fs::set_permissions(path, Permissions::from_mode(0o600))
        .context(|| format!("cannot protect {}", path.display()))?;
    Ok((listener, file))
}

/// Our socket's file: removed when dropped, however its server ends.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "cannot remove a socket");
        }
    }
}

/// Makes a directory that only this user enters, with its parents.
///
/// # Errors
/// `Precondition` when it is somebody else's.
pub(crate) fn make_private(directory: &Path) -> Result<()> {
    let what = || format!("cannot make {} a private directory", directory.display());
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).context(what)?;
    let stat = directory.symlink_metadata().context(what)?;
    if !stat.is_dir() || stat.uid() != rustix::process::geteuid().as_raw() {
        fail!(
            Precondition,
            "{} is not a directory of this user: others could swap the socket in it",
            directory.display()
        );
    }
    if stat.mode() & 0o7777 != 0o700 {
        std::fs::set_permissions(directory, Permissions::from_mode(0o700)).context(what)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_private_and_takes_the_place_of_a_dead_one_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("driver/csi.sock");
        let first = bind(&path, Directory::Ours).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(path.parent().unwrap().metadata().unwrap().mode() & 0o777, 0o700);
        assert!(bind(&path, Directory::Ours).unwrap_err().to_string().contains("another process"));
        // A driver that died leaves its file.
        let (listener, file) = first;
        drop(listener);
        std::mem::forget(file);
        drop(bind(&path, Directory::Ours).unwrap());
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(bind(&path, Directory::Ours).unwrap_err().to_string().contains("not a socket"));
    }
}
