//! A proxy before a service, in a process of its own, that spoils what passes: slow, cut off, reset, gone.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// One server with one proxy. Ends with the value.
pub struct Toxiproxy {
    server: Child,
    api: u16,
    port: u16,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Toxiproxy {
    /// Before `http://host:port`. Says why, and is `None`, where there is no such program.
    pub fn before(url: &str) -> Option<Self> {
        let home = std::env::var("HOME").unwrap_or_default();
        let cache = std::env::var("XDG_CACHE_HOME").unwrap_or(format!("{home}/.cache"));
        let program = PathBuf::from(cache).join("berth/bin/toxiproxy-server");
        if !program.exists() {
            println!("SKIPPED {}: no {}; scripts/setup.sh test builds it", module_path!(), program.display());
            return None;
        }
        let (api, port) = (free_port(), free_port());
        let mut command = Command::new(program);
        command.args(["-host", "127.0.0.1", "-port", &api.to_string()]);
        let server = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let proxy = Self { server, api, port };
        let end = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(("127.0.0.1", api)).is_err() {
            assert!(Instant::now() < end, "toxiproxy does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        let upstream = url.strip_prefix("http://").unwrap();
        proxy.ask(
            "POST",
            "/proxies",
            &format!(r#"{{"name":"s3","listen":"127.0.0.1:{port}","upstream":"{upstream}","enabled":true}}"#),
        );
        Some(proxy)
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// `stream` is `upstream` or `downstream`; `attributes` is JSON.
    pub fn add(&self, kind: &str, stream: &str, attributes: &str) {
        let toxic = format!(r#"{{"name":"{kind}","type":"{kind}","stream":"{stream}","attributes":{attributes}}}"#);
        self.ask("POST", "/proxies/s3/toxics", &toxic);
    }

    pub fn remove(&self, kind: &str) {
        self.ask("DELETE", &format!("/proxies/s3/toxics/{kind}"), "");
    }

    /// Does the service exist? When not, connections break and new ones are refused.
    pub fn set_there(&self, there: bool) {
        self.ask("POST", "/proxies/s3", &format!(r#"{{"enabled":{there}}}"#));
    }

    fn ask(&self, method: &str, path: &str, body: &str) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.api)).unwrap();
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer.split(' ').nth(1).and_then(|status| status.chars().next()), Some('2'), "{answer}");
    }
}

impl Drop for Toxiproxy {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
