//! The shape of the code, said as absences, and the documents' promises.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;

/// Every source file below a folder, with its text up to its unit tests.
fn sources(folder: &str) -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = BTreeMap::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                files.insert(name, text);
            }
        }
    }
    assert!(files.len() > 5, "{folder}");
    files
}

/// Lines of code with one of the words, outside the files that may have it, unit tests and comments.
fn offenders(words: &[&str], allowed: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (name, text) in sources("src") {
        if allowed.iter().any(|place| name.starts_with(&format!("src/{place}"))) {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap();
        for (number, line) in code.lines().enumerate() {
            let line = line.trim();
            if !line.starts_with("//") && words.iter().any(|word| line.contains(word)) {
                found.push(format!("{name}:{}: {line}", number + 1));
            }
        }
    }
    found
}

const NONE: Vec<String> = Vec::new();

#[test]
fn only_the_front_rooms_know_grpc() {
    // The command line is a client of the protocol, and the one other place.
    assert_eq!(offenders(&["tonic", "prost"], &["proto.rs", "server/", "rpc/", "cli/", "telemetry.rs"]), NONE);
    // Telemetry names them to keep their logs quiet.
    let telemetry = &sources("src")["src/telemetry.rs"];
    assert!(!telemetry.contains("tonic::") && !telemetry.contains("use prost"));
}

#[test]
fn only_the_store_knows_the_sdk() {
    assert_eq!(offenders(&["aws_sdk", "aws_config", "aws_smithy", "s3s::", "s3s_fs"], &["objectfs/store/"]), NONE);
}

#[test]
fn only_the_cellar_touches_the_kernel() {
    let syscalls = ["rustix::mount", "rustix::fs::", "rustix::io", "rustix::event", "libc::", "Command::new"];
    // `main` sets the umask; a quickstart starts the driver itself and drops a file from the page cache.
    assert_eq!(offenders(&syscalls, &["host/", "main.rs", "cli/quickstart/"]), NONE);
    assert_eq!(offenders(&["unsafe {", "unsafe fn", "unsafe impl"], &["host/"]), NONE);
}

#[test]
fn each_unsafe_block_says_why_it_is_sound() {
    for (name, text) in sources("src/host") {
        let lines: Vec<_> = text.lines().collect();
        for (number, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("unsafe {")) {
            let before = &lines[number.saturating_sub(4)..number];
            assert!(before.iter().any(|line| line.contains("SAFETY:")), "{name}:{}: {line}", number + 1);
        }
    }
}

#[test]
fn dependencies_point_one_way() {
    // A room, and the rooms that nothing in it may name.
    for (room, forbidden) in [
        (
            "volume/",
            &["crate::backend", "crate::host", "crate::rpc", "crate::server", "crate::cli", "crate::config"][..],
        ),
        (
            "host/",
            &[
                "crate::backend",
                "crate::rpc",
                "crate::server",
                "crate::cli",
                "crate::config",
                "crate::volume",
                "crate::fuse",
                "crate::objectfs",
                "crate::mounter",
            ],
        ),
        (
            "fuse/",
            &["crate::objectfs", "crate::mounter", "crate::backend", "crate::rpc", "crate::cli", "crate::config"],
        ),
        (
            "objectfs/",
            &["crate::mounter", "crate::backend", "crate::rpc", "crate::server", "crate::cli", "crate::config"],
        ),
        ("objectfs/content/", &["namespace", "shell", "crate::fuse"]),
        (
            "objectfs/store/",
            &["super::content", "objectfs::content", "namespace", "shell", "super::usage", "crate::fuse"],
        ),
        ("mounter/", &["crate::backend", "crate::rpc", "crate::server", "crate::cli", "crate::config"]),
        ("backend/", &["crate::rpc", "crate::server", "crate::cli", "crate::proto", "tokio"]),
        ("rpc/", &["backend::nvme", "backend::cephfs", "backend::s3", "crate::server", "crate::cli"]),
        ("backend/nvme/", &["cephfs", "backend::s3"]),
        ("backend/cephfs/", &["nvme", "backend::s3"]),
        ("backend/s3/", &["nvme", "cephfs"]),
        ("server/", &["crate::backend", "crate::host", "crate::cli"]),
        ("config/", &["crate::backend", "crate::host", "crate::rpc", "crate::server", "crate::cli"]),
        ("error.rs", &["use crate::"]),
        ("locks.rs", &["crate::volume", "crate::backend", "crate::host"]),
    ] {
        let found = offenders(forbidden, &[]);
        let found: Vec<_> = found.into_iter().filter(|line| line.starts_with(&format!("src/{room}"))).collect();
        assert_eq!(found, NONE, "{room}");
    }
}

#[test]
fn there_is_no_global_state_and_no_setting_read_elsewhere() {
    assert_eq!(offenders(&["static mut", "lazy_static", "= OnceLock::new", "LazyLock", "thread_local!"], &[]), NONE);
    assert_eq!(offenders(&["env::var(", "env::vars("], &["config/"]), NONE);
}

/// A promise in `docs/semantics.md` is a line `> …`, followed by the name of its test; the test's comment quotes it.
#[test]
fn every_promise_has_a_test_that_quotes_it() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/semantics.md")).unwrap();
    let tests = sources("tests");
    let mut promises = 0;
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(promise) = line.strip_prefix("> ") else { continue };
        let mut promise = promise.to_owned();
        let mut reference = lines.next().unwrap_or_default();
        while let Some(more) = reference.strip_prefix("> ") {
            promise = format!("{promise} {more}");
            reference = lines.next().unwrap_or_default();
        }
        let (file, name) = reference
            .trim_matches(['`', ' '])
            .split_once("::")
            .unwrap_or_else(|| panic!("no `file::test` follows the promise {promise:?}, but {reference:?}"));
        let source = tests.get(&format!("tests/{file}.rs")).unwrap_or_else(|| panic!("no tests/{file}.rs"));
        let at = source.find(&format!("fn {name}(")).unwrap_or_else(|| panic!("no test {name} in tests/{file}.rs"));
        let comment = source[..at].rsplit("\n\n").next().unwrap();
        let quoted: Vec<_> = comment.lines().filter_map(|line| line.trim().strip_prefix("/// > ")).collect();
        assert!(quoted.join(" ").contains(&promise), "{name} does not quote {promise:?}, but {quoted:?}");
        promises += 1;
    }
    let quotes = tests.values().flat_map(|text| text.lines()).filter(|line| line.starts_with("/// > ")).count();
    assert!(promises > 20 && quotes >= promises, "{promises} promises, {quotes} lines of quotes");
}
