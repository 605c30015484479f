//! What a mounted bucket promises, promise by promise, on every service; and on a plain directory, where that can
//! promise the same.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;

mod attributes;
mod bytes;
mod directories;
mod names;
mod objects;
mod permissions;
