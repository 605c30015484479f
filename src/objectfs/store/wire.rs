//! How keys, metadata and payloads look on the wire.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use aws_sdk_s3::primitives::{ByteStream, SdkBody};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use md5::{Digest, Md5};

use super::{Etag, Metadata, Part, Payload};

/// A file is read in pieces of this size while it is sent.
const PIECE: u64 = 128 << 10;

/// A payload's body, and where it leaves the error if its file can't be read.
pub(super) fn body(payload: &Payload) -> (ByteStream, Trouble) {
    let trouble = Trouble::default();
    let body = match payload {
        Payload::Bytes(bytes) => SdkBody::from(bytes.clone()),
        Payload::File(file, range) => {
            let (file, range, trouble) = (file.clone(), range.clone(), trouble.clone());
            SdkBody::retryable(move || {
                SdkBody::from_body_1_x(FileBody { file: file.clone(), range: range.clone(), trouble: trouble.clone() })
            })
        }
    };
    (ByteStream::new(body), trouble)
}

/// Why a local file could not be read, once it could not.
#[derive(Clone, Default)]
pub(super) struct Trouble(Arc<Mutex<Option<String>>>);

impl Trouble {
    pub(super) fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A range of a file. Its reads are short and mostly from the page cache, so they are made where they are asked for.
struct FileBody {
    file: Arc<File>,
    range: Range<u64>,
    trouble: Trouble,
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let this = self.get_mut();
        if this.range.is_empty() {
            return Poll::Ready(None);
        }
        let length = PIECE.min(this.range.end - this.range.start);
        let mut piece = BytesMut::zeroed(length as usize);
        if let Err(error) = this.file.read_exact_at(&mut piece, this.range.start) {
            *this.trouble.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
            return Poll::Ready(Some(Err(error)));
        }
        this.range.start += length;
        Poll::Ready(Some(Ok(Frame::data(piece.freeze()))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.range.end.saturating_sub(self.range.start))
    }
}

/// Percent-encodes all but letters, digits, `-._~` and `/`: for the header that names a copy's source.
pub(super) fn percent_encoded(key: &str) -> String {
    let mut text = String::with_capacity(key.len());
    for byte in key.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(byte as char);
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

/// XML 1.0, 2.2, and what services take for that.
pub(super) fn is_beyond_xml(letter: char) -> bool {
    letter.is_control() || matches!(letter, '\u{fffe}' | '\u{ffff}')
}

/// Undoes the encoding of keys in listings, where a space may be `+` too. `None`: it is none.
pub(super) fn percent_decoded(text: &str) -> Option<String> {
    if !text.contains(['%', '+']) {
        return Some(text.to_owned());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| byte.and_then(|byte| (byte as char).to_digit(16));
                let (high, low) = (digit(rest.next())?, digit(rest.next())?);
                (high * 16 + low) as u8
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

/// An entity tag with its quotes, whether or not the service wrote them.
pub(super) fn etag(text: Option<String>) -> Etag {
    let text = text.unwrap_or_default();
    if text.starts_with('"') || text.starts_with("W/") { Etag(text) } else { Etag(format!("\"{text}\"")) }
}

/// User metadata as headers: what is not printable ASCII goes as an encoded word (RFC 2047), as S3 takes it.
pub(super) fn headers(metadata: &Metadata) -> HashMap<String, String> {
    let value = |value: &String| {
        let plain = value.bytes().all(|byte| (0x20..0x7f).contains(&byte)) && value.trim() == value;
        if plain { value.clone() } else { format!("=?UTF-8?B?{}?=", STANDARD.encode(value)) }
    };
    metadata.user.iter().map(|(key, text)| (key.clone(), value(text))).collect()
}

/// Headers as user metadata; encoded words are decoded, and what only looks like one stays.
pub(super) fn metadata(content_type: Option<String>, user: Option<HashMap<String, String>>) -> Metadata {
    let user = user.unwrap_or_default().into_iter();
    let user: BTreeMap<_, _> =
        user.map(|(key, value)| (key.to_ascii_lowercase(), words(&value).unwrap_or(value))).collect();
    Metadata { content_type, user }
}

/// Decodes a value that consists of encoded words.
fn words(value: &str) -> Option<String> {
    let mut bytes = Vec::new();
    for word in value.split_ascii_whitespace() {
        let inner = word.strip_prefix("=?")?.strip_suffix("?=")?;
        let mut parts = inner.splitn(3, '?');
        let (charset, how, text) = (parts.next()?, parts.next()?, parts.next()?);
        if !charset.eq_ignore_ascii_case("utf-8") {
            return None;
        }
        match how {
            "B" | "b" => bytes.extend(STANDARD.decode(text).ok()?),
            "Q" | "q" => {
                let escaped = text.replace('%', "=25").replace('+', "=2B").replace('_', "=20").replace('=', "%");
                bytes.extend(percent_decoded(&escaped)?.into_bytes());
            }
            _ => return None,
        }
    }
    if bytes.is_empty() { None } else { String::from_utf8(bytes).ok() }
}

/// The etag that an object made of these parts has, if theirs are MD5s.
pub(super) fn etag_of(parts: &[Part]) -> Option<Etag> {
    let mut sum = Md5::new();
    for part in parts {
        let text = part.etag.0.trim_matches('"');
        if text.len() != 32 || !text.is_ascii() {
            return None;
        }
        for at in (0..32).step_by(2) {
            sum.update([u8::from_str_radix(&text[at..at + 2], 16).ok()?]);
        }
    }
    let hex: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Some(Etag(format!("\"{hex}-{}\"", parts.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sources_are_encoded_byte_by_byte() {
        assert_eq!(percent_encoded("b/a b+c%d?é"), "b/a%20b%2Bc%25d%3F%C3%A9");
        assert_eq!(percent_encoded("x-._~/y"), "x-._~/y");
    }

    #[test]
    fn keys_of_listings_are_decoded() {
        assert_eq!(percent_decoded("a+b%2Bc%25/%C3%A9%01").as_deref(), Some("a b+c%/é\u{1}"));
        assert_eq!(percent_decoded("plain/é").as_deref(), Some("plain/é"));
        assert_eq!(percent_decoded("%4"), None);
        assert_eq!(percent_decoded("%ff"), None);
    }

    #[test]
    fn metadata_survives_the_wire() {
        for value in ["plain", "grüße", " spaces ", "tab\there", "=?no?", "a=b_c", ""] {
            let sent = Metadata { content_type: None, user: [("k".to_owned(), value.to_owned())].into() };
            let wire = headers(&sent);
            assert!(wire["k"].is_ascii() && wire["k"].trim() == wire["k"], "{wire:?}");
            assert_eq!(metadata(None, Some(wire)), sent);
        }
        let q = HashMap::from([("K".to_owned(), "=?utf-8?Q?gr=C3=BC=C3=9Fe_+%?=".to_owned())]);
        assert_eq!(metadata(None, Some(q)).user["k"], "grüße +%");
    }

    #[test]
    fn tags_have_quotes() {
        assert_eq!(etag(Some("abc".into())).0, "\"abc\"");
        assert_eq!(etag(Some("\"abc\"".into())).0, "\"abc\"");
    }
}
