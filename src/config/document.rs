//! Reading a YAML document so that every mistake is found, each with its path.
//!
//! Nothing here knows what Berth's configuration looks like.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::Mistake;

/// Gathers mistakes while it reads.
pub(super) struct Reader<'a> {
    pub(super) mistakes: RefCell<Vec<Mistake>>,
    pub(super) environment: &'a dyn Fn(&str) -> Option<String>,
}

/// A mapping of the file, and which of its keys have been asked for.
pub(super) struct Section<'a> {
    reader: &'a Reader<'a>,
    path: String,
    map: Option<&'a Map<String, Value>>,
    known: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Reader<'a> {
    pub(super) fn mistake<T>(&self, path: &str, message: impl Into<String>) -> Option<T> {
        self.mistakes.borrow_mut().push(Mistake { path: path.to_owned(), message: message.into() });
        None
    }

    /// A mapping; a missing one reads as empty, anything else is a mistake.
    pub(super) fn section(&'a self, path: String, value: Option<&'a Value>) -> Section<'a> {
        let map = match value {
            None | Some(Value::Null) => None,
            Some(Value::Object(map)) => Some(map),
            Some(_) => self.mistake(&path, "keys and values are needed here"),
        };
        Section { reader: self, path, map, known: RefCell::default() }
    }
}

impl<'a> Section<'a> {
    pub(super) fn at(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.known.borrow_mut().insert(key);
        self.map?.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn has(&self, key: &'static str) -> bool {
        self.known.borrow_mut().insert(key);
        self.map.is_some_and(|map| map.contains_key(key))
    }

    pub(super) fn section(&self, key: &'static str) -> Section<'a> {
        self.reader.section(self.at(key), self.get(key))
    }

    pub(super) fn list(&self, key: &'static str) -> Vec<Section<'a>> {
        match self.get(key) {
            None => Vec::new(),
            Some(Value::Array(items)) => items
                .iter()
                .enumerate()
                .map(|(index, item)| self.reader.section(format!("{}[{index}]", self.at(key)), Some(item)))
                .collect(),
            Some(_) => {
                self.reader.mistake::<()>(&self.at(key), "a list is needed here: begin each item with `- `");
                Vec::new()
            }
        }
    }

    /// `None`: the key is not there. `Some(None)`: it is wrong, and that has been noted.
    pub(super) fn read<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        let value = self.get(key)?;
        let text = match value {
            Value::String(text) => match self.expand(text) {
                Ok(text) => text,
                Err(message) => return Some(self.reader.mistake(&self.at(key), message)),
            },
            Value::Bool(_) | Value::Number(_) => value.to_string(),
            _ => return Some(self.reader.mistake(&self.at(key), "a single value is needed here")),
        };
        Some(
            parse(&text).map_or_else(
                |message| self.reader.mistake(&self.at(key), format!("{text:?} is wrong: {message}")),
                Some,
            ),
        )
    }

    /// A list of single values, each parsed; empty if the key is not there. `None`: one is wrong, and that has been noted.
    pub(super) fn values<T>(&self, key: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Option<Vec<T>> {
        let items = match self.get(key) {
            None => return Some(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(_) => return self.reader.mistake(&self.at(key), "a list is needed here: write [a, b]"),
        };
        let one = |(index, item): (usize, &Value)| {
            let path = format!("{}[{index}]", self.at(key));
            let Value::String(text) = item else {
                return self.reader.mistake(&path, "a text is needed here: put it in quotes");
            };
            let text = self.expand(text).or_else(|message| self.reader.mistake(&path, message).ok_or(())).ok()?;
            parse(&text)
                .or_else(|message| self.reader.mistake(&path, format!("{text:?} is wrong: {message}")).ok_or(()))
                .ok()
        };
        // All of them, so that every mistake is found.
        let parsed: Vec<_> = items.iter().enumerate().map(one).collect();
        parsed.into_iter().collect()
    }

    /// A mapping whose keys the file chooses, each key and value parsed; empty if it is not there. `None`: one is wrong, and
    /// that has been noted.
    pub(super) fn map(
        &self,
        key: &'static str,
        parse_key: impl Fn(&str) -> Result<String, String>,
        parse_value: impl Fn(&str) -> Result<String, String>,
    ) -> Option<BTreeMap<String, String>> {
        let section = self.section(key);
        let one = |(name, value): (&String, &Value)| {
            let path = section.at(name);
            let Value::String(text) = value else {
                return self.reader.mistake(&path, "a text is needed here: put it in quotes");
            };
            let wrong = |what: &str, message: String| {
                self.reader.mistake::<()>(&path, format!("{what:?} is wrong: {message}"));
            };
            let text = self.expand(text).or_else(|message| self.reader.mistake(&path, message).ok_or(())).ok()?;
            let key = parse_key(name).map_err(|message| wrong(name, message)).ok();
            let value = parse_value(&text).map_err(|message| wrong(&text, message)).ok();
            Some((key?, value?))
        };
        let parsed: Vec<_> = section.map.into_iter().flatten().map(one).collect();
        parsed.into_iter().collect()
    }

    pub(super) fn required<T>(&self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.read(key, parse).unwrap_or_else(|| self.reader.mistake(&self.at(key), "is missing"))
    }

    /// Replaces `${NAME}` by the environment's value.
    fn expand(&self, text: &str) -> Result<String, String> {
        let mut result = String::new();
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            let Some(length) = rest[start..].find('}') else { return Err("`${` has no `}`".to_owned()) };
            let name = &rest[start + 2..start + length];
            let value = (self.reader.environment)(name)
                .ok_or_else(|| format!("the environment has no {name}: set it, or write the value here"))?;
            result.push_str(&rest[..start]);
            result.push_str(&value);
            rest = &rest[start + length + 1..];
        }
        Ok(result + rest)
    }

    /// Everything has been asked for: what remains is unknown.
    pub(super) fn end(self) {
        let known = self.known.borrow();
        for key in self.map.into_iter().flat_map(Map::keys).filter(|key| !known.contains(key.as_str())) {
            let list = known.iter().copied().collect::<Vec<_>>().join(", ");
            self.reader.mistake::<()>(&self.at(key), format!("is not known; known here: {list}"));
        }
    }
}
