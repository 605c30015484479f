//! Metadata in listings: what MinIO tells with `metadata=true`, and the SDK has no place for.
//!
//! Each `Contents` then has a `UserMetadata`, whose elements are the headers that a HEAD would show.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::AfterDeserializationInterceptorContextRef;
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::config_bag::ConfigBag;
use quick_xml::Reader;
use quick_xml::events::Event;

use super::Metadata;
use super::wire::metadata;

/// Asks for it.
pub(super) fn ask(request: &mut HttpRequest) {
    let uri = format!("{}&metadata=true", request.uri());
    // The URI was one before.
    let _ = request.set_uri(uri);
}

/// What a page tells, by the keys as they are written there. Nothing if it can't be read: there are HEADs.
#[derive(Clone, Debug, Default)]
pub(super) struct Told(Arc<Mutex<HashMap<String, Metadata>>>);

impl Told {
    pub(super) fn take(&self) -> HashMap<String, Metadata> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Intercept for Told {
    fn name(&self) -> &'static str {
        "metadata in listings"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let bytes = context.response().body().bytes().unwrap_or_default();
        let told = std::str::from_utf8(bytes).ok().and_then(read).unwrap_or_default();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = told;
        Ok(())
    }
}

fn read(page: &str) -> Option<HashMap<String, Metadata>> {
    let mut reader = Reader::from_str(page);
    let mut told = HashMap::new();
    let (mut path, mut text) = (Vec::<String>::new(), String::new());
    let (mut key, mut user, mut content_type, mut known) = (String::new(), HashMap::new(), None, false);
    loop {
        match reader.read_event().ok()? {
            Event::Start(start) => {
                path.push(std::str::from_utf8(start.local_name().as_ref()).ok()?.to_owned());
                text.clear();
            }
            Event::Text(part) => text.push_str(&part.decode().ok()?),
            Event::CData(part) => text.push_str(&part.decode().ok()?),
            Event::GeneralRef(part) => match part.resolve_char_ref().ok()? {
                Some(letter) => text.push(letter),
                None => text.push_str(quick_xml::escape::resolve_predefined_entity(&part.decode().ok()?)?),
            },
            Event::End(_) => {
                let names: Vec<&str> = path.iter().map(String::as_str).collect();
                match names.as_slice() {
                    [_, "Contents", "Key"] => key = std::mem::take(&mut text),
                    [_, "Contents", "UserMetadata", header] => {
                        known = true;
                        let header = header.to_ascii_lowercase();
                        match header.strip_prefix("x-amz-meta-") {
                            Some(name) => {
                                user.insert(name.to_owned(), std::mem::take(&mut text));
                            }
                            None if header == "content-type" => content_type = Some(std::mem::take(&mut text)),
                            None => {}
                        }
                    }
                    // Whose attributes may not be read has no element.
                    [_, "Contents"] => {
                        let about = metadata(content_type.take(), Some(std::mem::take(&mut user)));
                        if std::mem::take(&mut known) {
                            told.insert(std::mem::take(&mut key), about);
                        }
                    }
                    _ => {}
                }
                path.pop();
            }
            Event::Eof => return path.is_empty().then_some(told),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_found_below_their_keys() {
        let page = "<?xml version=\"1.0\"?>\n<ListBucketResult xmlns=\"x\"><Name>b</Name>\
            <Contents><Key>a%20b</Key><Size>1</Size><UserMetadata><content-type>text/plain</content-type>\
            <X-Amz-Meta-Mode>33188</X-Amz-Meta-Mode><X-Amz-Meta-Note>a &lt;b&gt; &#38; c</X-Amz-Meta-Note>\
            </UserMetadata></Contents><Contents><Key>secret</Key></Contents>\
            <Contents><Key>plain</Key><UserMetadata><etag>1</etag></UserMetadata></Contents>\
            <CommonPrefixes><Prefix>d/</Prefix></CommonPrefixes></ListBucketResult>";
        let told = read(page).unwrap();
        let mut keys: Vec<_> = told.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["a%20b", "plain"]);
        assert_eq!(told["a%20b"].content_type.as_deref(), Some("text/plain"));
        let wanted = [("mode", "33188"), ("note", "a <b> & c")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(told["a%20b"].user, wanted.into());
        assert_eq!(told["plain"], Metadata::default());
    }

    #[test]
    fn half_a_page_tells_nothing() {
        assert!(read("<a><Contents><Key>k</Key>").is_none());
        assert!(read("<a><Contents></a>").is_none());
    }
}
