//! A stub of tailscaled's local API: the shapes of a real one, on a unix socket of the lab.
//! Who asks for another host or from a browser gets a 403, as there.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::{Shutdown, shutdown};
use serde_json::{Value, json};

pub const SOCKET: &str = "tailscaled.sock";

pub struct Tailscaled {
    path: PathBuf,
    listener: UnixListener,
    /// Status, preferences, and the compiled filter; `null`: this version has no such path.
    says: Arc<Mutex<[Value; 3]>>,
    thread: Option<JoinHandle<()>>,
}

impl Tailscaled {
    /// Logged in, with these addresses, and nothing to object to.
    pub fn start(folder: &Path, addresses: &[&str]) -> Result<Self> {
        let path = folder.join(SOCKET);
        let listener = UnixListener::bind(&path).with_context(|| format!("bind {}", path.display()))?;
        let status = json!({
            "Version": "1.86.2-t2b5b5ba1b", "TUN": true, "BackendState": "Running", "HaveNodeKey": true, "AuthURL": "",
            "TailscaleIPs": addresses, "Health": [], "MagicDNSSuffix": "tail1234.ts.net", "CertDomains": null,
            "Self": { "ID": "n16CNTRL", "HostName": "singapore", "DNSName": "singapore.tail1234.ts.net.", "OS": "linux",
                "UserID": 10, "TailscaleIPs": addresses, "Online": true, "PeerAPIURL": null },
            "CurrentTailnet": { "Name": "example.com", "MagicDNSEnabled": true }, "Peer": null, "User": null,
        });
        let prefs = json!({
            "ControlURL": "https://controlplane.tailscale.com", "RouteAll": false, "CorpDNS": true, "RunSSH": false,
            "WantRunning": true, "LoggedOut": false, "ShieldsUp": false, "AdvertiseTags": null, "NetfilterMode": 2,
        });
        let says = Arc::new(Mutex::new([status, prefs, Value::Null]));
        let (heard, waiting) = (Arc::clone(&says), listener.try_clone()?);
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = waiting.accept() {
                let says = heard.lock().unwrap_or_else(PoisonError::into_inner).clone();
                // How a client leaves is its own business.
                let _ = answer(stream, &says);
            }
        });
        Ok(Self { path, listener, says, thread: Some(thread) })
    }

    /// Changes its status (`[0]`), its preferences (`[1]`) and the compiled filter (`[2]`).
    pub fn change(&self, change: impl FnOnce(&mut [Value; 3])) {
        change(&mut self.says.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Its socket goes, as when the service is stopped.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        // Ends the wait for the next client.
        let _ = shutdown(&self.listener, Shutdown::Both);
        let _ = thread.join();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for Tailscaled {
    fn drop(&mut self) {
        self.stop();
    }
}

fn answer(mut stream: UnixStream, says: &[Value; 3]) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && request.len() < 4096 && stream.read(&mut byte)? == 1 {
        request.extend(byte);
    }
    let request = String::from_utf8_lossy(&request);
    let host = request.lines().find_map(|line| line.strip_prefix("Host: ")).unwrap_or_default();
    let foreign = !matches!(host, "" | "local-tailscaled.sock") || request.contains("\r\nOrigin:");
    let post = request.starts_with("POST ");
    let (code, body) = match request.split(' ').nth(1) {
        _ if foreign => ("403 Forbidden", "invalid localapi request\n".to_owned()),
        Some("/localapi/v0/status?peers=false") => ("200 OK", says[0].to_string()),
        Some("/localapi/v0/prefs") => ("200 OK", says[1].to_string()),
        Some("/localapi/v0/debug-packet-filter-rules") if !says[2].is_null() => match post {
            true => ("200 OK", says[2].to_string()),
            false => ("405 Method Not Allowed", "POST required\n".to_owned()),
        },
        _ => ("404 Not Found", "unknown localapi path\n".to_owned()),
    };
    stream.write_all(format!("HTTP/1.0 {code}\r\nContent-Type: application/json\r\n\r\n{body}").as_bytes())
}
