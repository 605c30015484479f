//! Does a Ceph daemon listen at an address? Told from the first bytes that it sends to whoever connects, before any key.

use std::io::Read;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, ErrorKind, Result};

/// How a daemon's address has to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The legacy one.
    V1,
    /// The second one.
    V2,
}

/// Connects to `HOST:PORT` and waits for the daemon's greeting. Looking up a name is not within `patience`.
///
/// # Errors
/// `Unreachable`, or `Invalid` when it is no Ceph daemon that answers.
pub fn greeting(address: &str, patience: Duration) -> Result<Protocol> {
    let end = Instant::now() + patience;
    let left = || end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let unreachable = |error: std::io::Error| Error::caused(ErrorKind::Unreachable, "cannot connect", error);
    let mut refused = None;
    for resolved in address.to_socket_addrs().map_err(unreachable)? {
        match TcpStream::connect_timeout(&resolved, left()) {
            Ok(mut stream) => {
                stream.set_read_timeout(Some(left())).context(|| "cannot wait for a greeting".to_owned())?;
                let mut said = [0; 8];
                return match stream.read_exact(&mut said) {
                    Ok(()) => protocol(said),
                    Err(_) => fail!(Unreachable, "somebody listens there, but says nothing"),
                };
            }
            Err(error) => refused = Some(error),
        }
    }
    Err(unreachable(refused.unwrap_or_else(|| std::io::ErrorKind::NotFound.into())))
}

/// Ceph's src/include/msgr.h: `ceph v027` of the legacy protocol, `ceph v2` and a line feed of the second.
fn protocol(said: [u8; 8]) -> Result<Protocol> {
    match &said {
        b"ceph v2\n" => Ok(Protocol::V2),
        b"ceph v02" => Ok(Protocol::V1),
        _ => fail!(Invalid, "somebody answers there, but no Ceph daemon"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn what_listens_is_told_from_its_greeting_and_silence_has_an_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let greeted = |said: &'static [u8]| {
            let listener = listener.try_clone().unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(said).unwrap();
                stream
            });
            let found = greeting(&address, Duration::from_millis(300));
            drop(server.join());
            found.map_err(|error| error.kind())
        };
        assert_eq!(greeted(b"ceph v2\n\x10\0"), Ok(Protocol::V2));
        assert_eq!(greeted(b"ceph v027"), Ok(Protocol::V1));
        assert_eq!(greeted(b"HTTP/1.1 400 Bad Request"), Err(ErrorKind::Invalid));
        assert_eq!(greeted(b""), Err(ErrorKind::Unreachable));
        drop(listener);
        assert_eq!(greeting(&address, Duration::from_secs(5)).unwrap_err().kind(), ErrorKind::Unreachable);
    }
}
