//! Private keys where only public ones may be. Found by what they are, not by what they are
//! called: a private half that stands in a comment is as known as any other.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::terms::PublicKey;

const PUBLIC_OF: [u8; 32] = x25519_dalek::X25519_BASEPOINT_BYTES;
/// Words that only come with a secret behind them.
const WORDS: [&str; 3] = ["tskey-", "PRIVATE KEY-----", "PrivateKey"];

/// Something that must not be in this text, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    pub at: Range<usize>,
    pub what: &'static str,
}

/// The secrets in a text. `known` are the public keys that may stand in it.
pub fn find(text: &str, known: &BTreeSet<PublicKey>) -> Vec<Secret> {
    let mut out = Vec::new();
    for (at, key) in keys(text) {
        let what = if halves(&key, known) {
            "this is the private half of a key in the same file"
        } else if !known.contains(&key) {
            "this looks like a private or preshared key"
        } else {
            continue;
        };
        out.push(Secret { at, what });
    }
    for word in WORDS {
        let found = text.match_indices(word).filter(|(at, _)| !is_path(text, at + word.len()));
        out.extend(
            found.map(|(at, _)| Secret { at: at..at + word.len(), what: "this looks like a private key" }),
        );
    }
    out.sort_by_key(|secret| secret.at.start);
    out
}

/// `PrivateKeyFile=` names a place, not a key.
fn is_path(text: &str, after: usize) -> bool {
    text.get(after..).is_some_and(|rest| rest.starts_with("File"))
}

/// Whether it makes one of these public keys. Only numbers that are private keys as WireGuard
/// writes them (1 of 32) are tried, since each try costs some 50 us.
fn halves(key: &PublicKey, known: &BTreeSet<PublicKey>) -> bool {
    let clamped = key.0[0] & 7 == 0 && key.0[31] & 0xc0 == 0x40;
    clamped && known.contains(&PublicKey(x25519_dalek::x25519(key.0, PUBLIC_OF)))
}

/// Everything that is 32 bytes in base64.
fn keys(text: &str) -> impl Iterator<Item = (Range<usize>, PublicKey)> + '_ {
    let bytes = text.as_bytes();
    let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/';
    let ends = (43..bytes.len()).filter(move |end| bytes[*end] == b'=');
    ends.filter_map(move |end| {
        let from = end - 43;
        let whole = from == 0 || !is_digit(bytes[from - 1]);
        let token = text.get(from..=end).filter(|_| whole)?;
        Some((from..end + 1, PublicKey::from_base64(token)?))
    })
}
