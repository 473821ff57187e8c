//! Long lists of addresses go into the kernel ahead of the rules that ask for them: what takes nft 50 ms for ten
//! thousand prefixes takes this one batch 10. Such a set is called by what is in it (`desired::table`), so that it
//! changes nothing for the rules that are there, and the transaction that follows finds it as it should be.
//!
//! Only sets that are not there are made, and what goes wrong is left to that transaction, which then says it all.
//! Where that one fails they are taken out again.

use std::io;

use super::replay::{
    self, BATCH_BEGIN, BATCH_END, BATCH_MAX, Builder, NEWTABLE, NLM_F_ACK, NLM_F_CREATE, SET_FLAGS, SET_ID,
    SET_NAME,
};
use crate::desired::TABLE;
use crate::ruleset::lists::{self, Border};
use crate::ruleset::{NamedSet, Table, TableFamily};
use crate::source::nft;
use crate::source::nft_events::TABLE_NAME;
use crate::source::nft_lists::{
    ADDRESSES, ELEMENT, ELEMENT_FLAGS, ELEMENTS, INTERVAL, INTERVAL_END, KEY, KEY_TYPE, VALUE,
};
use crate::terms::Family;

const NEWSET: u8 = 9;
const DELTABLE: u8 = 2;
const DELSET: u8 = 11;
const NEWSETELEM: u8 = 12;
/// NFTA_SET_{KEY_LEN, USERDATA}.
const SET_KEY_LENGTH: u16 = 5;
const SET_USERDATA: u16 = 13;
/// What nft notes for itself: NFTNL_UDATA_SET_KEYBYTEORDER, its length, BYTEORDER_BIG_ENDIAN.
const KEY_BYTE_ORDER: [u8; 2] = [0, 4];
const BIG_ENDIAN: u32 = 2;
const NESTED: u16 = 0x8000;
/// An attribute ends before 64 KiB; an element takes 40 bytes at most.
const BORDERS_AT_ONCE: usize = 1500;

/// Lists that are in the kernel ahead of the rules that ask for them.
pub(super) struct Ahead {
    names: Vec<String>,
    /// Of the rules, once they were there; `None`: it could not be read.
    pub(super) generation: Option<u32>,
    /// There was no table before.
    alone: bool,
}

/// Puts the long lists of `desired` that `found` lacks into the kernel, and into `found`. `None`: nothing was done.
pub(super) fn put(desired: &Table, found: &mut Option<Table>) -> Option<Ahead> {
    let there = found.as_ref().map_or(&[][..], |table| &table.sets);
    let sets: Vec<&NamedSet> = (desired.sets.iter())
        .filter(|set| !set.elements.is_empty() && !there.iter().any(|there| there.name == set.name))
        .collect();
    let encoded: Vec<(&NamedSet, Family, Vec<Border>)> = (sets.into_iter())
        .filter_map(|set| lists::borders(set).map(|(family, borders)| (set, family, borders)))
        .collect();
    if encoded.is_empty() {
        return None;
    }
    nft::committing();
    let sent = replay::open().and_then(|socket| replay::send(&socket, &batch(&encoded)?));
    if let Err(error) = sent {
        log::debug!("nft puts the lists of addresses in: {error}");
        return None;
    }
    let ahead = Ahead {
        names: encoded.iter().map(|(set, ..)| set.name.clone()).collect(),
        generation: super::generation(),
        alone: found.is_none(),
    };
    found.get_or_insert_with(bare).sets.extend(encoded.into_iter().map(|(set, ..)| set.clone()));
    Some(ahead)
}

impl Ahead {
    /// Takes them out again, and the table where they are all that it holds. Only where the rules are still of
    /// this generation; and the kernel keeps lists that rules ask for by now.
    pub(super) fn take_back(&self, now: Option<u32>) -> io::Result<()> {
        let now = now.ok_or_else(|| io::Error::other("the generation of the rules can't be read"))?;
        nft::committing();
        replay::send(&replay::open()?, &self.removal(now))
    }

    fn removal(&self, now: u32) -> Vec<u8> {
        let table = || (TABLE_NAME, [TABLE.as_bytes(), b"\0"].concat());
        let mut out = Builder(Vec::new());
        out.begin_at(now);
        if self.alone && self.generation == Some(now) {
            out.message(DELTABLE, NLM_F_ACK, &[table()]);
        } else {
            for (at, name) in (1..).zip(&self.names) {
                let ack = if at == self.names.len() { NLM_F_ACK } else { 0 };
                let name = (SET_NAME, [name.as_bytes(), b"\0"].concat());
                out.message(DELSET, ack, &[table(), name]);
            }
        }
        out.marker(BATCH_END);
        out.0
    }
}

/// Our table with nothing in it.
pub(super) fn bare() -> Table {
    Table {
        family: TableFamily::Inet,
        name: TABLE.to_owned(),
        dormant: false,
        chains: Vec::new(),
        counters: Default::default(),
        sets: Vec::new(),
    }
}

fn batch(sets: &[(&NamedSet, Family, Vec<Border>)]) -> io::Result<Vec<u8>> {
    let table = (TABLE_NAME, [TABLE.as_bytes(), b"\0"].concat());
    let mut out = Builder(Vec::new());
    out.marker(BATCH_BEGIN);
    out.message(NEWTABLE, NLM_F_CREATE, std::slice::from_ref(&table));
    for (id, (set, family, borders)) in (1u32..).zip(sets) {
        let (key_type, length) = match family {
            Family::Ipv4 => (ADDRESSES[0], 4u32),
            Family::Ipv6 => (ADDRESSES[1], 16),
        };
        let name = (SET_NAME, [set.name.as_bytes(), b"\0"].concat());
        let declared = [
            table.clone(),
            name.clone(),
            (SET_FLAGS, INTERVAL.to_be_bytes().to_vec()),
            (KEY_TYPE, key_type.to_be_bytes().to_vec()),
            (SET_KEY_LENGTH, length.to_be_bytes().to_vec()),
            (SET_ID, id.to_be_bytes().to_vec()),
            (SET_USERDATA, [&KEY_BYTE_ORDER[..], &BIG_ENDIAN.to_ne_bytes()].concat()),
        ];
        out.message(NEWSET, NLM_F_CREATE, &declared);
        let pieces = borders.chunks(BORDERS_AT_ONCE);
        let last = pieces.len();
        for (at, piece) in (1..).zip(pieces) {
            let list = piece.iter().fold(Vec::new(), |list, border| element(list, *border, length as usize));
            let ack = if id as usize == sets.len() && at == last { NLM_F_ACK } else { 0 };
            let elements = [table.clone(), name.clone(), (ELEMENTS | NESTED, list)];
            out.message(NEWSETELEM, NLM_F_CREATE | ack, &elements);
        }
    }
    out.marker(BATCH_END);
    if out.0.len() > BATCH_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(out.0)
}

fn element(mut list: Vec<u8>, border: Border, length: usize) -> Vec<u8> {
    let flags: &[u8] = if border.begins { &[] } else { &INTERVAL_END.to_be_bytes() };
    let address = border.key.to_be_bytes();
    let key = &address[address.len() - length..];
    let of_flags = if flags.is_empty() { 0 } else { 4 + flags.len() };
    // All of them are far below 64 KiB.
    let mut attribute = |kind: u16, length: usize, value: &[u8]| {
        list.extend_from_slice(&((4 + length) as u16).to_ne_bytes());
        list.extend_from_slice(&kind.to_ne_bytes());
        list.extend_from_slice(value);
    };
    attribute(ELEMENT | NESTED, of_flags + 8 + length, &[]);
    if !flags.is_empty() {
        attribute(ELEMENT_FLAGS, flags.len(), flags);
    }
    attribute(KEY | NESTED, 4 + length, &[]);
    attribute(VALUE, length, key);
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::Operand;
    use crate::source::nft_events::{Messages, attribute};

    fn list(name: &str, kind: &str, elements: Vec<Operand>) -> NamedSet {
        NamedSet {
            name: name.into(),
            kind: kind.into(),
            map: false,
            flags: vec!["interval".into()],
            elements,
            timed: vec![],
            verdicts: vec![],
            truncated: false,
        }
    }

    fn encoded(set: &NamedSet) -> (&NamedSet, Family, Vec<Border>) {
        let (family, borders) = lists::borders(set).expect("a list");
        (set, family, borders)
    }

    fn prefix(text: &str) -> Operand {
        Operand::Prefix(text.parse().expect("a prefix"))
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn elements_are_written_as_nft_writes_them() {
        let set = list("s", "ipv4_addr", vec![prefix("16.0.0.0/24")]);
        let batch = batch(&[encoded(&set)]).expect("fits");
        let kinds: Vec<u16> = Messages(&batch).map(|message| message.kind).collect();
        assert_eq!(kinds, [BATCH_BEGIN, 0xa00, 0xa09, 0xa0c, BATCH_END]);
        let elements = Messages(&batch).nth(3).and_then(|message| message.nftables()).expect("elements");
        let list = attribute(elements.2, ELEMENTS).expect("a list");
        let hex: String = list.iter().map(|byte| format!("{byte:02x}")).collect();
        // Of nft 1.0.6, but for numbers that it gives elements and nobody reads.
        let nft = [
            "1800018008000300000000010c0001800800010000000000",
            "100001800c0001800800010010000000",
            "1800018008000300000000010c0001800800010010000100",
        ];
        assert_eq!(hex, nft.concat());
    }

    #[test]
    fn a_table_goes_with_its_lists_only_while_they_are_all_that_changed() {
        let kinds = |alone: bool, now: u32| {
            let ahead = Ahead { names: vec!["a".into(), "b".into()], generation: Some(7), alone };
            let batch = ahead.removal(now);
            let generation = Messages(&batch).next().map(|begin| begin.body[8..].to_vec());
            assert_eq!(generation, Some(now.to_be_bytes().to_vec()));
            let messages: Vec<_> =
                Messages(&batch).map(|message| (message.kind, message.flags & NLM_F_ACK)).collect();
            messages[1..messages.len() - 1].to_vec()
        };
        assert_eq!(kinds(true, 7), [(0xa02, NLM_F_ACK)]);
        let lists = [(0xa0b, 0), (0xa0b, NLM_F_ACK)];
        assert_eq!((kinds(true, 8), kinds(false, 7)), (lists.to_vec(), lists.to_vec()));
    }

    #[test]
    fn a_long_list_is_cut_into_messages_and_only_the_last_is_answered() {
        let addresses = |n: u32| Operand::Address(std::net::Ipv6Addr::from(u128::from(2 * n) << 64).into());
        let long = list("a", "ipv6_addr", (1..=4000).map(addresses).collect());
        let short = list("b", "ipv4_addr", vec![prefix("0.0.0.0/0")]);
        let batch = batch(&[encoded(&long), encoded(&short)]).expect("fits");
        let messages: Vec<_> = Messages(&batch).collect();
        let elements: Vec<_> = messages.iter().filter(|message| message.kind == 0xa0c).collect();
        assert_eq!(elements.len(), 8001usize.div_ceil(BORDERS_AT_ONCE) + 1);
        let acknowledged: Vec<_> =
            messages.iter().enumerate().filter(|(_, m)| m.flags & NLM_F_ACK != 0).map(|(at, _)| at).collect();
        assert_eq!(acknowledged, [messages.len() - 2]);
        assert!(elements.iter().all(|message| message.body.len() < 1 << 16));
    }
}
