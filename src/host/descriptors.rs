//! Descriptors that go from one process to another, over a Unix socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::error::{Context, Result};

/// As many as one message carries here.
pub const MOST: usize = 8;

/// Sends all of the bytes; the descriptors go with the first of them. Blocks.
///
/// # Errors
/// When the other side is gone, or there are more than [`MOST`] descriptors.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let what = || "cannot send descriptors to another process".to_owned();
    if descriptors.len() > MOST || bytes.is_empty() {
        fail!(Internal, "cannot send {} descriptors with {} bytes", descriptors.len(), bytes.len());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        fail!(Internal, "cannot send {} descriptors at once", descriptors.len());
    }
    let mut sent = retry(|| rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL))
        .context(what)?;
    while sent < bytes.len() {
        sent += retry(|| rustix::net::send(&socket, &bytes[sent..], SendFlags::NOSIGNAL)).context(what)?;
    }
    Ok(())
}

/// Receives one piece: how many bytes (0: the other side has closed), and what came with them. The descriptors are
/// closed on exec. Blocks.
///
/// # Errors
/// When more descriptors were sent than fit.
pub fn receive(socket: impl AsFd, bytes: &mut [u8]) -> Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        retry(|| rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC))
            .context(|| "cannot receive from another process".to_owned())?;
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        fail!(Invalid, "another process sent more descriptors than the {MOST} that are taken");
    }
    Ok((message.bytes, descriptors))
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_file_arrives_with_its_message() {
        let (left, right) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"contents").unwrap();
        send(&left, b"take this", &[file.as_fd()]).unwrap();
        let mut bytes = [0; 64];
        let (length, descriptors) = receive(&right, &mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"take this");
        let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
        let mut copy = std::fs::File::from(descriptor);
        copy.rewind().unwrap();
        let mut text = String::new();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "contents");
        drop(left);
        assert_eq!(receive(&right, &mut bytes).unwrap().0, 0);
    }

    #[test]
    fn more_descriptors_than_are_taken_are_refused() {
        let (left, right) = UnixStream::pair().unwrap();
        let many = vec![left.as_fd(); MOST + 1];
        send(&left, b"x", &many).unwrap_err();
        send(&left, b"x", &many[..MOST]).unwrap();
        assert_eq!(receive(&right, &mut [0; 8]).unwrap().1.len(), MOST);
    }
}
