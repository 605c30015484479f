//! Answers that XML can't hold, made such that they can be read.
//!
//! Keys in listings are encoded, as is asked for; but Ceph echoes the prefix as it was asked, also with U+FFFE and U+FFFF
//! in it, which no XML may hold (XML 1.0, 2.2). What is echoed is nobody's concern here: U+FFFD takes its place.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::BeforeDeserializationInterceptorContextMut;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::config_bag::ConfigBag;
use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};

/// For the answers of one call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Legible;

impl Intercept for Legible {
    fn name(&self) -> &'static str {
        "answers that XML can't hold"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let body = context.response_mut().body_mut();
        let inner = std::mem::replace(body, SdkBody::taken());
        *body = SdkBody::from_body_1_x(Replaced { inner, seen: 0 });
        Ok(())
    }
}

/// In UTF-8 U+FFFD, U+FFFE and U+FFFF differ in the last of three bytes.
const BEGINNING: [u8; 2] = [0xEF, 0xBF];
const REPLACEMENT: u8 = 0xBD;

struct Replaced {
    inner: SdkBody,
    /// So many bytes of the beginning were the last ones.
    seen: usize,
}

impl Replaced {
    fn replace(&mut self, bytes: &[u8]) -> Bytes {
        let mut bytes = BytesMut::from(bytes);
        for byte in bytes.iter_mut() {
            if self.seen == BEGINNING.len() && matches!(*byte, 0xBE | 0xBF) {
                *byte = REPLACEMENT;
            }
            self.seen = match *byte {
                byte if self.seen == 1 && byte == BEGINNING[1] => 2,
                byte if byte == BEGINNING[0] => 1,
                _ => 0,
            };
        }
        bytes.freeze()
    }
}

impl Body for Replaced {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(context));
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(|data| this.replace(&data)))))
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_xml_is_replaced_wherever_an_answer_is_cut() {
        let text = "a\u{fffe}\u{ffff}\u{fffd}\u{ff1a}é\u{efff}".as_bytes();
        for cut in 0..text.len() {
            let mut body = Replaced { inner: SdkBody::empty(), seen: 0 };
            let all = [body.replace(&text[..cut]), body.replace(&text[cut..])].concat();
            assert_eq!(String::from_utf8(all).unwrap(), "a\u{fffd}\u{fffd}\u{fffd}\u{ff1a}é\u{efff}");
        }
    }
}
