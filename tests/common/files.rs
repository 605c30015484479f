//! What tests of file systems do again and again.

use std::path::Path;
use std::process::{Command, Output};

/// The call failed, and with this errno.
#[track_caller]
pub fn fails<T>(result: Result<T, impl Into<std::io::Error>>, errno: i32) {
    match result.map_err(Into::into) {
        Ok(_) => panic!("it worked, instead of {}", std::io::Error::from_raw_os_error(errno)),
        Err(error) => {
            let wanted = std::io::Error::from_raw_os_error(errno);
            assert_eq!(error.raw_os_error(), Some(errno), "{error}, instead of {wanted}");
        }
    }
}

/// A program in a directory, to its end.
pub fn output(dir: &Path, words: &[&str]) -> Output {
    Command::new(words[0]).args(&words[1..]).current_dir(dir).output().unwrap()
}

/// Its standard output; it must succeed.
#[track_caller]
pub fn sh(dir: &Path, script: &str) -> String {
    succeeded(&output(dir, &["sh", "-ec", script]))
}

#[track_caller]
pub fn python(dir: &Path, script: &str) -> String {
    succeeded(&output(dir, &["python3", "-c", script]))
}

/// As somebody else, who is in no other group. They could not run a Python that lies in root's home: it becomes them.
pub fn as_user(id: u32, dir: &Path, script: &str) -> Output {
    let become_user = format!("import os, errno, socket\nos.setgroups([])\nos.setgid({id})\nos.setuid({id})\n");
    output(dir, &["python3", "-c", &(become_user + script)])
}

/// The Python statement ends like this, done by somebody else: `worked`, or the name of an errno.
#[track_caller]
pub fn user_gets(id: u32, dir: &Path, statement: &str, outcome: &str) {
    let script = format!(
        "try:\n    {statement}\n    print('worked')\nexcept OSError as error:\n    print(errno.errorcode[error.errno])"
    );
    assert_eq!(succeeded(&as_user(id, dir, &script)).trim(), outcome, "{statement}");
}

#[track_caller]
pub fn succeeded(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// Names of a directory, sorted.
pub fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Bytes that look like nothing, the same for the same seed. splitmix64: quick, also where nothing is optimised.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.next_multiple_of(8)];
    let mut state = seed;
    for word in bytes.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Compares without printing megabytes.
#[track_caller]
pub fn same(found: &[u8], wanted: &[u8]) {
    if found == wanted {
        return;
    }
    if let Some(at) = found.iter().zip(wanted).position(|(one, other)| one != other) {
        panic!("they differ at byte {at}: {} instead of {}", found[at], wanted[at]);
    }
    assert_eq!(found.len(), wanted.len(), "they are the same as far as both go");
}
