//! The words everything else is written in: protocols, families, scopes, names of
//! interfaces, moments, owners, secrets. Values only; knows no other module.

mod addresses;
mod digits;

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use addresses::Addresses;
pub use digits::{push_address, push_net};

/// A TCP or UDP port. Never 0: "any port" is spelled out where it is meant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Port(std::num::NonZeroU16);

impl Port {
    /// `None` for 0, which is not a port.
    pub const fn new(number: u16) -> Option<Self> {
        match std::num::NonZeroU16::new(number) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl TryFrom<u16> for Port {
    type Error = &'static str;
    fn try_from(number: u16) -> Result<Self, Self::Error> {
        Self::new(number).ok_or("port 0 is not a port")
    }
}

impl From<Port> for u16 {
    fn from(port: Port) -> u16 {
        port.get()
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proto {
    Tcp,
    Udp,
}

impl Proto {
    pub const ALL: [Proto; 2] = [Proto::Tcp, Proto::Udp];

    pub const fn name(self) -> &'static str {
        match self {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
        }
    }

    /// The IP protocol number (RFC 5237 registry).
    pub const fn number(self) -> u8 {
        match self {
            Proto::Tcp => 6,
            Proto::Udp => 17,
        }
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub const ALL: [Family; 2] = [Family::Ipv4, Family::Ipv6];

    pub const fn name(self) -> &'static str {
        match self {
            Family::Ipv4 => "ipv4",
            Family::Ipv6 => "ipv6",
        }
    }

    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Family::Ipv4,
            IpAddr::V6(_) => Family::Ipv6,
        }
    }

    pub const fn of_net(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Family::Ipv4,
            IpNet::V6(_) => Family::Ipv6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a packet comes from, by the interface it arrives on.
///
/// `Other` is a `[[local]]` interface, or one that `[public] interfaces` leaves out.
/// Loopback has no scope: nothing is judged or counted there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    Public,
    Mesh,
    Other,
}

impl Scope {
    pub const ALL: [Scope; 3] = [Scope::Public, Scope::Mesh, Scope::Other];

    pub const fn name(self) -> &'static str {
        match self {
            Scope::Public => "public",
            Scope::Mesh => "mesh",
            Scope::Other => "other",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An interface by name, or a prefix of names written `docker*`, as nftables matches
/// `iifname`. Names are at most 15 bytes (IFNAMSIZ less the terminator) and hold no
/// slash, white space, quote or control character, so they are safe in rules and output.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfacePattern(String);

impl IfacePattern {
    /// The error says what is wrong with the text, for a person.
    pub fn new(text: &str) -> Result<Self, String> {
        let stem = text.strip_suffix('*').unwrap_or(text);
        if stem.is_empty() && text != "*" {
            return Err("an interface name can't be empty".into());
        }
        if text == "*" {
            return Err("\"*\" alone would match every interface; name them".into());
        }
        if text.len() > 15 {
            return Err(format!("interface name \"{text}\" is longer than 15 characters"));
        }
        if stem == "." || stem == ".." {
            return Err(format!("\"{text}\" is not an interface name"));
        }
        if let Some(bad) = stem
            .chars()
            .find(|c| c.is_control() || c.is_whitespace() || "/\"'\\*:;{}".contains(*c) || !c.is_ascii())
        {
            return Err(format!("interface name \"{text}\" can't hold {bad:?}"));
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn is_prefix(&self) -> bool {
        self.0.ends_with('*')
    }

    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(stem) => name.starts_with(stem),
            None => self.0 == name,
        }
    }
}

impl TryFrom<String> for IfacePattern {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::new(&text)
    }
}

impl From<IfacePattern> for String {
    fn from(p: IfacePattern) -> String {
        p.0
    }
}

impl fmt::Display for IfacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for IfacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// A moment of wall-clock time; prints as RFC 3339 in UTC, to the millisecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(pub jiff::Timestamp);

impl Stamp {
    pub fn from_unix(seconds: i64) -> Self {
        Self(jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH))
    }

    /// "2026-11-21 08:27:03 UTC": to the second is what a person reads.
    #[must_use]
    pub fn to_the_second(self) -> String {
        let text = self.to_string();
        format!("{} {} UTC", text.get(..10).unwrap_or(&text), text.get(11..19).unwrap_or_default())
    }

    /// Whole seconds since `earlier`; 0 when the clock was set back in between.
    pub fn seconds_since(self, earlier: Stamp) -> u64 {
        u64::try_from(self.0.as_second().saturating_sub(earlier.0.as_second())).unwrap_or(0)
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl Serialize for Stamp {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Stamp {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

/// Who holds a socket, or who made a change, as far as the kernel tells.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Actor {
    pub pid: u32,
    /// The kernel's `comm`: at most 15 bytes, and chosen by the process itself, so it
    /// is cleaned of control characters where it enters.
    pub process: String,
    /// The systemd unit by its control group, or `null` outside one.
    pub unit: Option<String>,
    /// Who logged in and began what led to it (audit's login user), by name or as `uid-1000`; left out
    /// where nobody did, as for services.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl Actor {
    /// The same with printable words of at most so many characters each.
    #[must_use]
    pub fn bounded(mut self, max: usize) -> Self {
        for word in [Some(&mut self.process), self.unit.as_mut(), self.user.as_mut()].into_iter().flatten() {
            *word = printable(word, max);
        }
        self
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {}", self.process, self.pid)?;
        if let Some(unit) = &self.unit {
            write!(f, ", {unit}")?;
        }
        if let Some(user) = &self.user {
            write!(f, ", login {user}")?;
        }
        f.write_str(")")
    }
}

/// So many of these, whose plural takes an s: "1 change".
#[must_use]
pub fn counted(n: u64, word: &str) -> String {
    if n == 1 { format!("1 {word}") } else { format!("{n} {word}s") }
}

/// Replaces control characters and bidi overrides, so that a name chosen by a stranger
/// can neither move a terminal's cursor nor pass for another name. At most `max` chars.
pub fn printable(text: &str, max: usize) -> String {
    text.chars()
        .map(|c| {
            if c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            {
                '\u{fffd}'
            } else {
                c
            }
        })
        .take(max)
        .collect()
}

/// Text that is a credential: a URL with a token in it, a key. Has no printable form.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(text)
    }
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// A key as `wg` prints it, written in place, so that a private one leaves no copies.
pub fn base64(key: &[u8; 32], text: &mut [u8; 44]) {
    for (chunk, four) in key.chunks(3).zip(text.chunks_mut(4)) {
        let b = [chunk[0], chunk.get(1).copied().unwrap_or(0), chunk.get(2).copied().unwrap_or(0)];
        let n = u32::from_be_bytes([0, b[0], b[1], b[2]]);
        for (i, digit) in four.iter_mut().enumerate() {
            *digit = if i <= chunk.len() { BASE64[(n >> (18 - 6 * i)) as usize & 63] } else { b'=' };
        }
    }
}

/// A WireGuard public key. Only public keys have a type here; private ones are dropped
/// inside the decoders that meet them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    /// From the 44 characters of base64 that `wg` prints.
    pub fn from_base64(text: &str) -> Option<Self> {
        let body = text.strip_suffix('=')?.as_bytes();
        if body.len() != 43 {
            return None;
        }
        let mut out = [0u8; 33];
        let (mut acc, mut bits, mut at) = (0u32, 0u8, 0usize);
        for byte in body {
            let value = BASE64.iter().position(|t| t == byte)? as u32;
            acc = (acc << 6) | value;
            bits += 6;
            if bits >= 8 {
                bits -= 8;
                out[at] = (acc >> bits) as u8;
                at += 1;
                acc &= (1 << bits) - 1;
            }
        }
        // 43 characters carry 258 bits; the last two must be 0 in a well-formed key.
        if acc != 0 || at != 32 {
            return None;
        }
        let mut key = [0u8; 32];
        key.copy_from_slice(&out[..32]);
        Some(Self(key))
    }

    /// From the 64 hexadecimal digits of the userspace (UAPI) protocol.
    pub fn from_hex(text: &str) -> Option<Self> {
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        let mut key = [0u8; 32];
        for (i, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
        }
        Some(Self(key))
    }

    pub fn to_hex(self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; 44];
        base64(&self.0, &mut text);
        f.write_str(&String::from_utf8_lossy(&text))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_key_prints_as_it_was_read() {
        let text = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let key = PublicKey::from_base64(text).expect("a key");
        assert_eq!(key.to_string(), text);
        assert_eq!(PublicKey::from_hex(&key.to_hex()), Some(key));
        assert_eq!(PublicKey::from_base64("xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dh="), None);
        assert_eq!(PublicKey::from_base64("short="), None);
    }

    #[test]
    fn interface_patterns_match_like_iifname() {
        let docker = IfacePattern::new("docker*").expect("a pattern");
        assert!(docker.matches("docker0") && docker.matches("docker") && !docker.matches("dock"));
        let eth = IfacePattern::new("eth0").expect("a name");
        assert!(eth.matches("eth0") && !eth.matches("eth01"));
        for bad in ["", "*", "a b", "a/b", "a\"b", "sixteen-is-wrong", "\u{e9}th0"] {
            assert!(IfacePattern::new(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_secret_has_no_printable_form() {
        assert_eq!(format!("{:?}", Secret::new("https://hub/push/token".into())), "Secret(..)");
    }

    #[test]
    fn names_from_strangers_are_made_harmless() {
        assert_eq!(printable("a\x1b[2Jb\u{202e}c", 64), "a\u{fffd}[2Jb\u{fffd}c");
        assert_eq!(printable("abcdef", 3), "abc");
    }
}
