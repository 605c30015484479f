//! What goes over the sockets: frames of JSON, each with a magic number, a version and its length, and descriptors that
//! come with its first byte.
//!
//! One format for both sockets. Nothing here knows what the messages do.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::PathBuf;
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::client::Status;
use crate::error;
use crate::host::channel::{self, Received};
use crate::objectfs::content::Progress;
use crate::objectfs::settings::{Credentials, Settings};

const MAGIC: [u8; 2] = *b"Bm";
/// Changes when an older or newer process would misunderstand a message. New kinds of messages need no new version.
const VERSION: u16 = 1;
const HEADER: usize = 8;
/// No message is longer, in bytes: settings with a bundle of certificates are the longest.
const LIMIT: usize = 1 << 20;

/// What the driver and the command line ask of a mounter.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Request {
    /// Serve the descriptor that comes with this.
    Serve { settings: Box<Settings>, mountpoint: PathBuf, patience: u64 },
    /// Use other credentials from now on.
    Renew { id: String, credentials: Credentials },
    /// How is this mount?
    Status { id: String },
    /// How are all mounts?
    List,
    /// Wait until the worker of an unmounted file system has ended, so many milliseconds.
    Ended { id: String, patience: u64 },
}

/// What a mounter answers.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Reply {
    /// It is done.
    Done,
    /// These mounts there are.
    Mounts(Vec<Status>),
    /// It can't be done.
    Failed(Failure),
}

/// What a mounter asks of a worker.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Order {
    /// Serve the descriptor that comes with this; without one only upload what an earlier worker has staged, and end.
    /// `Ready` or `Failed` is the answer; then, on the same connection, what [`Life`] says.
    Begin { settings: Box<Settings>, mountpoint: PathBuf },
    /// Tell a new mounter everything, with a duplicate of the descriptor; then, on the same connection, what [`Life`] says.
    Adopt,
    /// How do things stand?
    Report,
    /// Use other credentials from now on.
    Renew { credentials: Credentials },
}

/// What a worker answers.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Answer {
    /// The file system is open: requests are being answered.
    Ready,
    /// It is done.
    Done,
    /// What it serves. With the descriptor, unless it only uploads.
    Held { settings: Box<Settings>, mountpoint: PathBuf },
    /// How things stand.
    Report(Report),
    /// What has happened meanwhile.
    Life(Life),
    /// It can't be done.
    Failed(Failure),
}

/// What a worker tells its mounter by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Life {
    /// INIT has been answered like this: whoever goes on with the descriptor has to know it.
    Agreed(serde_json::Value),
    /// The file system was unmounted and the worker ends. So many files are still only on the node's disk.
    Ended { left: u64 },
}

/// How things stand in a volume.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// What lies only on this node, and more.
    pub progress: Progress,
    /// Bytes in use on all nodes.
    pub used: u64,
    /// The most that there may be.
    pub limit: Option<u64>,
}

/// An error on its way to another process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Failure {
    kind: error::ErrorKind,
    message: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<&error::Error> for Failure {
    fn from(error: &error::Error) -> Self {
        Self { kind: error.kind(), message: error.to_string() }
    }
}

impl From<Failure> for error::Error {
    fn from(failure: Failure) -> Self {
        Self::new(failure.kind, failure.message)
    }
}

/// A message with what came beside it.
pub(super) struct Frame<T> {
    pub(super) message: T,
    pub(super) descriptors: Vec<OwnedFd>,
    /// The process that sent it, as the kernel knows it, where that was asked for.
    pub(super) sender: Option<i32>,
}

fn encode(message: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; HEADER];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - HEADER;
    if length > LIMIT {
        return Err(Error::new(ErrorKind::InvalidInput, format!("a message of {length} bytes is too long")));
    }
    bytes[..2].copy_from_slice(&MAGIC);
    bytes[2..4].copy_from_slice(&VERSION.to_be_bytes());
    bytes[4..HEADER].copy_from_slice(&u32::try_from(length).unwrap_or_default().to_be_bytes());
    Ok(bytes)
}

/// A frame that has come in part.
#[derive(Default)]
struct Incoming {
    buffer: Vec<u8>,
    filled: usize,
    descriptors: Vec<OwnedFd>,
    sender: Option<i32>,
}

impl Incoming {
    /// Where the next bytes belong: never those of the next frame, whose descriptors would get lost.
    fn room(&mut self) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer.resize(HEADER, 0);
        }
        &mut self.buffer[self.filled..]
    }

    /// Is the frame complete? `None`: the other end has closed, between two frames.
    fn took(&mut self, received: Received) -> Result<Option<bool>> {
        if received.bytes == 0 {
            return if self.filled == 0 { Ok(None) } else { Err(ErrorKind::UnexpectedEof.into()) };
        }
        self.filled += received.bytes;
        self.descriptors.extend(received.descriptors);
        self.sender = received.sender.or(self.sender);
        if self.descriptors.len() > channel::MOST_DESCRIPTORS {
            return Err(Error::new(ErrorKind::InvalidData, "too many descriptors"));
        }
        if self.filled == HEADER && self.buffer.len() == HEADER {
            let length = self.length()?;
            self.buffer.resize(HEADER + length, 0);
            return Ok(Some(false));
        }
        Ok(Some(self.filled == self.buffer.len()))
    }

    /// Of the body, out of the header. A body is never empty.
    fn length(&self) -> Result<usize> {
        let invalid = |message: String| Error::new(ErrorKind::InvalidData, message);
        let [m0, m1, v0, v1, l0, l1, l2, l3] = self.buffer[..] else { return Err(invalid("no header".to_owned())) };
        if [m0, m1] != MAGIC {
            return Err(invalid("this is not Berth's protocol".to_owned()));
        }
        let version = u16::from_be_bytes([v0, v1]);
        if version != VERSION {
            return Err(invalid(format!("the other process speaks version {version}, and this one {VERSION}")));
        }
        match usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])) {
            Ok(length) if (1..=LIMIT).contains(&length) => Ok(length),
            _ => Err(invalid("a message has a length that can't be".to_owned())),
        }
    }

    fn finish<T: DeserializeOwned>(self) -> Result<Frame<T>> {
        // The text of the error may quote the message, which may hold a secret.
        let message = serde_json::from_slice(&self.buffer[HEADER..])
            .map_err(|_| Error::new(ErrorKind::InvalidData, "a message is not understood"))?;
        Ok(Frame { message, descriptors: self.descriptors, sender: self.sender })
    }
}

/// One end of a connection, on the runtime.
pub(super) struct Connection {
    stream: UnixStream,
    incoming: Incoming,
}

impl Connection {
    /// Takes a connection over.
    ///
    /// # Errors
    /// `PermissionDenied` when the other end is neither root nor this process' own user.
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        check_peer(&stream)?;
        Ok(Self { stream, incoming: Incoming::default() })
    }

    /// As [`Self::new`], and messages say who sent them.
    pub(super) fn with_senders(stream: UnixStream) -> Result<Self> {
        channel::ask_for_sender(&stream)?;
        Self::new(stream)
    }

    /// Sends a message.
    pub(super) async fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let bytes = encode(message)?;
        let mut sent = 0;
        while sent < bytes.len() {
            let descriptors = if sent == 0 { descriptors } else { &[] };
            let send = || channel::send(&self.stream, &bytes[sent..], descriptors);
            sent += self.stream.async_io(Interest::WRITABLE, send).await?;
        }
        Ok(())
    }

    /// The next message. `None`: the other end has closed. Dropping the future loses nothing.
    pub(super) async fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<Frame<T>>> {
        loop {
            let (stream, incoming) = (&self.stream, &mut self.incoming);
            let received = stream.async_io(Interest::READABLE, || channel::receive(stream, incoming.room())).await?;
            match self.incoming.took(received)? {
                None => return Ok(None),
                Some(false) => {}
                Some(true) => return std::mem::take(&mut self.incoming).finish().map(Some),
            }
        }
    }

    /// The next message, which has to come.
    pub(super) async fn expect<T: DeserializeOwned>(&mut self) -> Result<Frame<T>> {
        self.receive().await?.ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }
}

fn check_peer(stream: impl AsFd) -> Result<()> {
    let peer = channel::Peer::of(stream)?;
    if peer.is_trusted() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::PermissionDenied, format!("user {} is at the other end", peer.uid)))
}

/// One message there and one back, on a thread that may wait.
///
/// # Errors
/// `WouldBlock` or `TimedOut` at the deadline.
pub(super) fn ask<T: DeserializeOwned>(
    stream: &BlockingStream,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<Frame<T>> {
    let left = || match deadline.saturating_duration_since(Instant::now()) {
        left if left.is_zero() => Err(Error::from(ErrorKind::TimedOut)),
        left => Ok(Some(left)),
    };
    check_peer(stream)?;
    let bytes = encode(message)?;
    let mut sent = 0;
    while sent < bytes.len() {
        stream.set_write_timeout(left()?)?;
        sent += channel::send(stream, &bytes[sent..], if sent == 0 { descriptors } else { &[] })?;
    }
    let mut incoming = Incoming::default();
    loop {
        stream.set_read_timeout(left()?)?;
        let received = channel::receive(stream, incoming.room())?;
        match incoming.took(received)? {
            None => return Err(ErrorKind::UnexpectedEof.into()),
            Some(false) => {}
            Some(true) => return incoming.finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;

    fn pair() -> (BlockingStream, Connection) {
        let (one, two) = BlockingStream::pair().unwrap();
        two.set_nonblocking(true).unwrap();
        (one, Connection::new(UnixStream::from_std(two).unwrap()).unwrap())
    }

    #[tokio::test]
    async fn a_long_message_with_a_descriptor_arrives_whole_and_the_next_keeps_its_own() {
        let (one, mut two) = pair();
        let long = "x".repeat(LIMIT - 100);
        let sender = std::thread::spawn(move || {
            for text in [long.as_str(), "short"] {
                let file = std::fs::File::open("/dev/null").unwrap();
                let request = Request::Status { id: text.to_owned() };
                let deadline = Instant::now() + Duration::from_secs(20);
                let reply: Frame<Reply> = ask(&one, &request, &[file.as_fd()], deadline).unwrap();
                assert!(matches!(reply.message, Reply::Done));
            }
        });
        for length in [LIMIT - 100, 5] {
            let frame = two.expect::<Request>().await.unwrap();
            assert!(matches!(frame.message, Request::Status { id } if id.len() == length));
            assert_eq!(frame.descriptors.len(), 1);
            two.send(&Reply::Done, &[]).await.unwrap();
        }
        sender.join().unwrap();
        assert!(two.receive::<Request>().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_not_ours_is_refused_before_it_takes_memory() {
        let header = |bytes: [u8; 8]| async move {
            let (mut one, mut two) = pair();
            one.write_all(&bytes).unwrap();
            two.receive::<Request>().await.err().unwrap().to_string()
        };
        assert!(header(*b"GET / HT").await.contains("not Berth's"));
        assert!(header([b'B', b'm', 0, 9, 0, 0, 0, 1]).await.contains("version 9"));
        assert!(header([b'B', b'm', 0, 1, 255, 0, 0, 0]).await.contains("length"));
        assert!(header([b'B', b'm', 0, 1, 0, 0, 0, 0]).await.contains("length"));
        assert!(encode(&"x".repeat(LIMIT)).is_err());
    }

    #[tokio::test]
    async fn a_message_that_is_not_understood_is_not_quoted() {
        let (mut one, mut two) = pair();
        one.write_all(&encode(&serde_json::json!({ "canary": "canary" })).unwrap()).unwrap();
        let error = two.receive::<Request>().await.err().unwrap();
        assert!(!error.to_string().contains("canary"), "{error}");
    }

    #[test]
    fn nobody_answers_and_the_deadline_passes() {
        let (one, _two) = BlockingStream::pair().unwrap();
        let error = ask::<Reply>(&one, &Request::List, &[], Instant::now() + Duration::from_millis(20)).err().unwrap();
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    }
}
