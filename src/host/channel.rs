//! Descriptors that pass from process to process over a Unix socket, and who is at its other end.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// At most so many descriptors go with one call.
pub const MOST_DESCRIPTORS: usize = 4;

/// Who is at the other end of a connected socket, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its user when it connected, or began to listen.
    pub uid: u32,
}

impl Peer {
    /// Looks at a connected socket.
    pub fn of(socket: impl AsFd) -> std::io::Result<Self> {
        Ok(Self { uid: rustix::net::sockopt::socket_peercred(socket)?.uid.as_raw() })
    }

    /// Is it root, or this process' own user?
    pub fn is_trusted(self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}

/// What one call of [`receive`] brought.
#[derive(Debug, Default)]
pub struct Received {
    /// So many bytes are in the buffer; 0: the other end has closed.
    pub bytes: usize,
    /// They are closed on exec.
    pub descriptors: Vec<OwnedFd>,
    /// The process that sent it, where [`ask_for_sender`] was called.
    pub sender: Option<i32>,
}

/// From now on the kernel says which process sent what is received.
pub fn ask_for_sender(socket: impl AsFd) -> std::io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_passcred(socket, true)?)
}

/// Sends as many of the bytes as fit, at least one, with all of the descriptors.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> std::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fits = descriptors.len() <= MOST_DESCRIPTORS;
    if !fits || (!descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))) {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let slices = [IoSlice::new(bytes)];
    let send = || rustix::net::sendmsg(&socket, &slices, &mut ancillary, SendFlags::NOSIGNAL);
    Ok(rustix::io::retry_on_intr(send)?)
}

/// Receives what is there, up to the buffer's length.
///
/// # Errors
/// `InvalidData` when descriptors came that there was no room for: they are closed.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> std::io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS), ScmCredentials(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(buffer)];
    let receive = || rustix::net::recvmsg(&socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    let message = rustix::io::retry_on_intr(receive)?;
    let mut received = Received { bytes: message.bytes, ..Received::default() };
    for part in ancillary.drain() {
        match part {
            RecvAncillaryMessage::ScmRights(descriptors) => received.descriptors.extend(descriptors),
            RecvAncillaryMessage::ScmCredentials(sender) => {
                received.sender = Some(sender.pid.as_raw_nonzero().get());
            }
            _ => {}
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_arrive_with_the_bytes_and_the_kernel_says_who_sent_them() {
        let (one, two) = UnixStream::pair().unwrap();
        ask_for_sender(&two).unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        assert_eq!(send(&one, b"hello", &[writer.as_fd()]).unwrap(), 5);
        drop(writer);
        let mut buffer = [0; 8];
        let mut received = receive(&two, &mut buffer).unwrap();
        assert_eq!(&buffer[..received.bytes], b"hello");
        assert_eq!(received.sender, Some(std::process::id().cast_signed()));
        let mut writer = std::fs::File::from(received.descriptors.pop().unwrap());
        assert!(rustix::io::fcntl_getfd(&writer).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        writer.write_all(b"through").unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        assert!(Peer::of(&one).unwrap().is_trusted());
        drop(one);
        assert_eq!(receive(&two, &mut buffer).unwrap().bytes, 0);
    }

    #[test]
    fn more_descriptors_than_there_is_room_for_are_refused() {
        let (one, two) = UnixStream::pair().unwrap();
        let many = [one.as_fd(); MOST_DESCRIPTORS + 1];
        assert!(send(&one, b"x", &many).is_err());
        drop(two);
    }
}
