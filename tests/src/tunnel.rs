//! The WireGuard tunnel between hub and spoke, keys included.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{
    HUB_MESH, HUB_MESH_V6, HUB_PUBLIC, Lab, Node, Running, SPOKE_MESH, SPOKE_MESH_V6, TUNNEL_PORT, wait_until,
};

/// Fresh for every lab: a key in a repository would be a secret that looks like one.
#[derive(Clone, Debug)]
pub struct Keys {
    pub hub: KeyPair,
    pub spoke: KeyPair,
}

#[derive(Clone, Debug)]
pub struct KeyPair {
    pub private: String,
    pub public: String,
}

impl Keys {
    pub(crate) fn generate() -> Result<Keys> {
        Ok(Keys { hub: KeyPair::generate()?, spoke: KeyPair::generate()? })
    }
}

impl KeyPair {
    /// A lab without a tunnel has no need for `wg`; any 32 bytes do as the public key there.
    pub fn generate() -> Result<KeyPair> {
        let private = random_key()?;
        if crate::need::find("wg").is_none() {
            return Ok(KeyPair { private, public: random_key()? });
        }
        let mut wg = Command::new("wg")
            .arg("pubkey")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start wg pubkey")?;
        wg.stdin.take().context("wg has no standard input")?.write_all(private.as_bytes())?;
        let output = wg.wait_with_output().context("wait for wg pubkey")?;
        ensure!(output.status.success(), "wg pubkey: {}", output.status);
        let public = String::from_utf8(output.stdout).context("read a public key")?.trim().to_string();
        Ok(KeyPair { private, public })
    }
}

/// Whether this kernel makes links of type wireguard. Asked in a namespace that ends with the question.
pub(crate) fn kernel_has_it() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let probe = ["--net", "ip", "link", "add", "wg0", "type", "wireguard"];
        let output = Command::new("unshare").args(probe).stderr(Stdio::null()).status();
        output.is_ok_and(|status| status.success())
    })
}

/// The mesh addresses of a node, as `ip addr add` wants them.
pub(crate) fn addresses(node: &str) -> &'static [&'static str] {
    if node == "hub" { &["10.84.0.1/24", "fd84::1/64"] } else { &["10.84.0.16/24", "fd84::16/64"] }
}

/// Raises both ends; the processes that carry them, if any, live as long as what is returned.
pub(crate) fn raise(lab: &Lab) -> Result<Vec<Running>> {
    let mut running = Vec::new();
    if !kernel_has_it() {
        for node in [&lab.hub, &lab.spoke] {
            running.push(node.spawn(&["env", "LOG_LEVEL=error", "wireguard-go", "-f", "wg0"])?);
        }
    }
    let spoke_peer = format!(
        "peer {} allowed-ips {SPOKE_MESH}/32,{SPOKE_MESH_V6}/128 persistent-keepalive 25",
        lab.keys.spoke.public
    );
    end(&lab.hub, &lab.keys.hub, Some(TUNNEL_PORT), &spoke_peer, addresses("hub"))?;
    end(&lab.spoke, &lab.keys.spoke, None, &hub_peer(lab), addresses("spoke"))?;
    Ok(running)
}

/// The mesh is the hub's to route: a spoke sends everything for it there.
pub(crate) fn hub_peer(lab: &Lab) -> String {
    format!(
        "peer {} allowed-ips {HUB_MESH}/32,{HUB_MESH_V6}/128,10.84.0.0/24,fd84::/64 endpoint {HUB_PUBLIC}:{TUNNEL_PORT} \
         persistent-keepalive 25",
        lab.keys.hub.public
    )
}

pub(crate) fn end(
    node: &Node,
    keys: &KeyPair,
    port: Option<u16>,
    peer: &str,
    addresses: &[&str],
) -> Result<()> {
    if kernel_has_it() {
        crate::ip(Some(&node.netns), "link add wg0 type wireguard\n")?;
    } else {
        // Seen through its keeper, as the folder is the node's own. There before anybody answers at it, and wg
        // takes away one that nobody answers at.
        let socket = node.path("/run/wireguard/wg0.sock");
        wait_until(Duration::from_secs(30), "wireguard-go takes commands", || {
            UnixStream::connect(&socket).ok()
        })?;
    }
    let key_file = node.dir.join(format!("{}.key", node.name));
    fs::write(&key_file, &keys.private).with_context(|| format!("write {}", key_file.display()))?;
    let key_file = key_file.display().to_string();
    let port = port.map(|port| format!("listen-port {port}")).unwrap_or_default();
    let words = format!("wg set wg0 private-key {key_file} {port} {peer}");
    node.ok(&words.split_whitespace().collect::<Vec<_>>())?;
    let mut batch: String = addresses.iter().map(|address| format!("addr add {address} dev wg0\n")).collect();
    batch += "link set wg0 mtu 1420 up\n";
    crate::ip(Some(&node.netns), &batch)
}

fn random_key() -> Result<String> {
    let mut key = [0u8; 32];
    fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut key))
        .context("read /dev/urandom")?;
    // Curve25519 wants these bits so; `wg` would change them silently and then show another key.
    key[0] &= 248;
    key[31] = (key[31] & 127) | 64;
    Ok(base64(&key))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let value = (word >> (18 - 6 * digit)) & 63;
            out.push(if digit <= chunk.len() { DIGITS[value as usize] as char } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_pads_as_wg_expects() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        let key = random_key().unwrap();
        assert_eq!(key.len(), 44);
        assert_ne!(key, random_key().unwrap());
    }
}
