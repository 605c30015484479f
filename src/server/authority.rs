//! Kubelet names a plugin's socket as the HTTP/2 `:authority`, which no HTTP library of Rust accepts.
//!
//! It dials a registration socket by its bare path (`pluginmanager/operationexecutor`, up to 1.36 at least), so that
//! grpc-go sends `:authority: %2Fvar%2Flib%2F…`. RFC 9113, section 8.3.1 allows no such thing, and `h2` answers with
//! PROTOCOL_ERROR before anybody else sees the request (hyperium/h2#487). Here the value is replaced on its way in.
//! Everything else passes as it is. Kubelet's connections to the CSI socket itself say `localhost` and need none of it.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// RFC 9113, section 3.4: what a client says first.
const PREFACE: usize = 24;
/// Section 4.1: length (3 bytes), type, flags, stream (4 bytes).
const FRAME_HEADER: usize = 9;
/// Section 6.5.2: what a peer may send as long as nobody allowed it more, which `h2` doesn't by default.
const LARGEST_FRAME: usize = 16_384;
const HEADERS: u8 = 1;
/// Of HEADERS: the block does not begin with the frame. grpc-go sets neither.
const PADDED_OR_PRIORITY: u8 = 0x08 | 0x20;
/// RFC 7541, appendix A: `:authority` in the static table.
const AUTHORITY: usize = 1;
const REPLACEMENT: &[u8] = b"localhost";

/// The same connection, with an `:authority` that every server accepts. Needs the runtime.
pub(super) fn replaced(client: UnixStream) -> io::Result<UnixStream> {
    let (server, inner) = UnixStream::pair()?;
    tokio::spawn(async move {
        if let Err(error) = pump(client, inner).await {
            tracing::debug!(%error, "a registration connection ended");
        }
    });
    Ok(server)
}

/// Until either side is done.
async fn pump(mut client: UnixStream, mut server: UnixStream) -> io::Result<()> {
    let (mut requests, mut replies) = client.split();
    let (mut answers, mut accepted) = server.split();
    let inward = async {
        let mut preface = [0; PREFACE];
        requests.read_exact(&mut preface).await?;
        accepted.write_all(&preface).await?;
        let mut frame = Vec::new();
        loop {
            let mut header = [0; FRAME_HEADER];
            requests.read_exact(&mut header).await?;
            let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
            if length > LARGEST_FRAME {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is too large"));
            }
            frame.resize(length, 0);
            requests.read_exact(&mut frame).await?;
            if header[3] == HEADERS
                && header[4] & PADDED_OR_PRIORITY == 0
                && let Some(block) = replace(&frame)
            {
                header[..3].copy_from_slice(&u32::try_from(block.len()).unwrap_or_default().to_be_bytes()[1..]);
                frame = block;
            }
            accepted.write_all(&header).await?;
            accepted.write_all(&frame).await?;
        }
    };
    tokio::select! {
        ended = inward => ended,
        ended = tokio::io::copy(&mut answers, &mut replies) => ended.map(drop),
    }
}

/// A header block (RFC 7541, section 6) with the value of `:authority` replaced. `None`: it has none, or it is cut
/// short; then it is for the server to judge.
///
/// Only the structure is read: no string has to be decoded, and both ends' tables stay the same but for this value.
fn replace(block: &[u8]) -> Option<Vec<u8>> {
    let mut rest = block;
    while let Some(first) = rest.first() {
        // How many bits of the first byte begin a number, and does a value follow?
        let (bits, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let name = number(&mut rest, bits)?;
        if !literal {
            continue;
        }
        if name == 0 {
            string(&mut rest)?;
        }
        let before = block.len() - rest.len();
        string(&mut rest)?;
        if name == AUTHORITY {
            let length = u8::try_from(REPLACEMENT.len()).ok()?;
            return Some([&block[..before], &[length], REPLACEMENT, rest].concat());
        }
    }
    None
}

/// Section 5.1: a number that begins in the last `bits` of the first byte. Takes it off the front.
fn number(rest: &mut &[u8], bits: u32) -> Option<usize> {
    let (first, mut tail) = rest.split_first()?;
    let mask = (1_u8 << bits) - 1;
    let mut value = usize::from(first & mask);
    if first & mask == mask {
        for shift in [0, 7, 14, 21] {
            let (next, after) = tail.split_first()?;
            tail = after;
            value += usize::from(next & 0x7F) << shift;
            if next & 0x80 == 0 {
                *rest = tail;
                return Some(value);
            }
        }
        return None;
    }
    *rest = tail;
    Some(value)
}

/// Section 5.2: a string, however it is coded. Takes it off the front.
fn string(rest: &mut &[u8]) -> Option<()> {
    let length = number(rest, 7)?;
    *rest = rest.get(length..)?;
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_value_of_the_authority_is_replaced() {
        // :method POST, :scheme http, :path literal with a 130-byte value, :authority, te: trailers with a new name.
        let long = [&[0x44, 0x7F, 3][..], &[b'p'; 130]].concat();
        let block = |authority: &[u8]| {
            [&[0x3F, 0xE1, 0x1F, 0x83, 0x86][..], &long, &[0x41], authority, b"\x40\x02te\x08trailers"].concat()
        };
        assert_eq!(replace(&block(b"\x0c%2Fvar%2Frun")).unwrap(), block(b"\x09localhost"));
        // As a Huffman code: its bytes are skipped unread.
        assert_eq!(replace(&block(&[0x83, 0xFF, 0x41, 0x80])).unwrap(), block(b"\x09localhost"));
    }

    #[test]
    fn what_has_no_authority_or_is_damaged_passes_as_it_is() {
        // The last: a number without an end.
        for block in [&b""[..], b"\x83\x86\xBE", b"\x41", b"\x41\x05abc", b"\x7F\xFF\xFF\xFF\xFF\xFF\x01"] {
            assert!(replace(block).is_none(), "{block:?}");
        }
    }
}
