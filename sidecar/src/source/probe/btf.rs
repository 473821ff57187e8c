//! Where the kernel keeps what the netfilter programs read of a packet: offsets in
//! `struct sk_buff`, from the kernel's own type information. Pure but for one file.

use anyhow::{Context as _, bail};

use super::super::netlink::{u16_at, u32_at};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    pub head: u32,
    pub network_header: u32,
    /// 0: this kernel keeps it elsewhere.
    pub sk: u32,
}

pub const PATH: &str = "/sys/kernel/btf/vmlinux";

pub fn read() -> anyhow::Result<Offsets> {
    let bytes = std::fs::read(PATH).with_context(|| format!("read the kernel's types from {PATH}"))?;
    offsets(&bytes).with_context(|| format!("find struct sk_buff in {PATH}"))
}

/// From linux/btf.h.
const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
/// Unnamed structs inside a struct; sk_buff has three.
const DEPTH_MAX: u8 = 8;
/// Fields looked at for one; sk_buff has some hundred. Structs that hold themselves have no end of them.
const FIELDS_MAX: u32 = 1 << 16;

struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins; type 0 is void.
    starts: Vec<u32>,
}

pub(in crate::source) fn offsets(bytes: &[u8]) -> anyhow::Result<Offsets> {
    let field = |at| u32_at(bytes, at).context("cut off");
    if u16_at(bytes, 0) != Some(MAGIC) {
        bail!("not BTF of this byte order");
    }
    let section = |from: u32, length: u32| {
        let start = (field(4).unwrap_or(0) as usize).checked_add(from as usize)?;
        bytes.get(start..start.checked_add(length as usize)?)
    };
    let types = section(field(8)?, field(12)?).context("cut off")?;
    let strings = section(field(16)?, field(20)?).context("cut off")?;
    let mut all = Types { types, strings, starts: vec![0] };
    let mut sk_buff = None;
    let mut at = 0;
    while at < types.len() {
        let (Some(name), Some(info)) = (u32_at(types, at), u32_at(types, at + 4)) else { bail!("cut off") };
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        if kind == STRUCT && count > 0 && all.name(name) == b"sk_buff" {
            sk_buff = Some(at);
        }
        all.starts.push(at as u32);
        at += 12
            + match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                STRUCT | UNION | 15 | 19 => count * 12,
                6 | 13 => count * 8,
                0..=19 => 0,
                _ => bail!("a kind of type that this program doesn't know: {kind}"),
            };
    }
    let sk_buff = sk_buff.context("no such type")?;
    let find = |name: &str| all.field(sk_buff, name.as_bytes()).with_context(|| format!("no field {name}"));
    let sk = all.field(sk_buff, b"sk").unwrap_or(0);
    Ok(Offsets { head: find("head")?, network_header: find("network_header")?, sk })
}

impl Types<'_> {
    fn name(&self, at: u32) -> &[u8] {
        let rest = self.strings.get(at as usize..).unwrap_or(&[]);
        rest.split(|byte| *byte == 0).next().unwrap_or(rest)
    }

    /// Byte offset of a field, also inside unnamed structs and unions.
    fn field(&self, at: usize, wanted: &[u8]) -> Option<u32> {
        self.member(at, wanted, DEPTH_MAX, &mut FIELDS_MAX.clone())
    }

    fn member(&self, at: usize, wanted: &[u8], depth: u8, left: &mut u32) -> Option<u32> {
        let info = u32_at(self.types, at + 4)?;
        if !matches!(info >> 24 & 0x1f, STRUCT | UNION) || depth == 0 {
            return None;
        }
        for number in 0..(info & 0xffff) as usize {
            *left = left.checked_sub(1)?;
            let entry = at + 12 + number * 12;
            let name = self.name(u32_at(self.types, entry)?);
            // With bit fields, the upper byte is the width.
            let bits = u32_at(self.types, entry + 8)? & if info >> 31 != 0 { 0xff_ffff } else { u32::MAX };
            if name == wanted {
                return Some(bits / 8);
            }
            if name.is_empty() {
                let inner = *self.starts.get(u32_at(self.types, entry + 4)? as usize)? as usize;
                if let Some(offset) = self.member(inner, wanted, depth - 1, left) {
                    return (bits / 8).checked_add(offset);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One struct sk_buff { union { u32 other; }; struct { u16 network_header; } (at 4); u64 head (at 8) }.
    fn small() -> Vec<u8> {
        // "other" stands behind "\0sk_buff\0".
        encoded(&[0, UNION << 24 | 1, 4, 9, 1, 0])
    }

    /// `union`: the words of type 2.
    fn encoded(union: &[u32]) -> Vec<u8> {
        let strings = b"\0sk_buff\0other\0network_header\0head\0u\0";
        let name = |wanted: &str| {
            let whole = format!("\0{wanted}\0");
            let at = strings.windows(whole.len()).position(|window| window == whole.as_bytes());
            at.expect("a string") as u32 + 1
        };
        let int = |bytes: u32| vec![name("u"), 1 << 24, bytes, bytes * 8];
        let types: Vec<u32> = [
            int(4),
            union.to_vec(),
            vec![0, STRUCT << 24 | 1, 4, name("network_header"), 1, 16],
            vec![name("sk_buff"), STRUCT << 24 | 3, 16, 0, 2, 0, 0, 3, 32, name("head"), 1, 64],
        ]
        .concat();
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&MAGIC.to_ne_bytes());
        bytes.extend_from_slice(&[1, 0]);
        for word in [24, 0, types.len() as u32 * 4, types.len() as u32 * 4, strings.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        types.iter().for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
        bytes.extend_from_slice(strings);
        bytes
    }

    #[test]
    fn fields_are_found_inside_unnamed_structs() {
        assert_eq!(offsets(&small()).expect("offsets"), Offsets { head: 8, network_header: 6, sk: 0 });
    }

    #[test]
    fn nothing_that_is_cut_off_or_changed_makes_it_panic_or_loop() {
        let whole = small();
        for length in 0..whole.len() {
            let _ = offsets(&whole[..length]);
        }
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                let _ = offsets(&changed);
            }
        }
        assert!(offsets(&[]).is_err());
    }

    #[test]
    fn types_that_hold_themselves_have_an_end() {
        let itself = [0u32, 2, 0].repeat(40);
        let union = [&[0, UNION << 24 | 40, 4][..], &itself].concat();
        assert!(offsets(&encoded(&union)).is_err(), "what is behind it was not come to");
    }

    #[test]
    fn this_kernel_has_them() {
        // A kernel without BTF runs no netfilter programs either.
        let Ok(found) = read() else { return };
        assert!(
            found.head % 8 == 0 && found.network_header % 2 == 0 && found.head < 512 && found.sk > 0,
            "{found:?}"
        );
    }
}
