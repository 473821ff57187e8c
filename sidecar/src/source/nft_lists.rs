//! What is in named sets of addresses, by netlink. Of ten thousand prefixes nft makes half a megabyte of JSON in
//! 40 ms, which takes as long to read; the kernel says them in 3 ms. So nft lists without them (`-t`), and they are
//! filled in here: [`find`], list, [`Lists::fill`], all within one generation of the rules.

use anyhow::Context as _;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{Netlink, NetlinkError, array_at, attribute, attributes, text};
use super::nft_events::NFPROTO_INET;
use super::nft_unlisted::family_of;
use crate::ruleset::decode::OBJECTS_MAX;
use crate::ruleset::lists::{self, BORDERS_MAX, Border};
use crate::ruleset::{Ruleset, TableFamily};

/// NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_{GETSET, GETSETELEM}.
const GET_SETS: u16 = 10 << 8 | 10;
const GET_ELEMENTS: u16 = 10 << 8 | 13;
/// NFTA_SET_{TABLE, NAME, FLAGS, KEY_TYPE}.
const TABLE: u16 = 1;
const NAME: u16 = 2;
const FLAGS: u16 = 3;
pub(crate) const KEY_TYPE: u16 = 4;
/// NFT_SET_{ANONYMOUS, CONSTANT, INTERVAL}.
const ANONYMOUS: u32 = 1;
const CONSTANT: u32 = 2;
pub(crate) const INTERVAL: u32 = 4;
/// nft's numbers for ipv4_addr and ipv6_addr.
pub(crate) const ADDRESSES: [u32; 2] = [7, 8];
/// NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_LIST_ELEM, NFTA_SET_ELEM_{KEY, FLAGS, KEY_END}, NFTA_DATA_VALUE.
pub(crate) const ELEMENTS: u16 = 3;
pub(crate) const ELEMENT: u16 = 1;
pub(crate) const KEY: u16 = 1;
pub(crate) const ELEMENT_FLAGS: u16 = 3;
const KEY_END: u16 = 10;
pub(crate) const VALUE: u16 = 1;
/// NFT_SET_ELEM_INTERVAL_END.
pub(crate) const INTERVAL_END: u32 = 1;

/// A named set that the kernel has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    family: TableFamily,
    /// NFPROTO_*, which is the same.
    number: u8,
    table: String,
    set: String,
    /// Nothing but addresses.
    plain: bool,
}

/// The named sets of addresses, where everything else that a terse listing leaves out is empty.
pub struct Lists {
    socket: Netlink,
    plain: Vec<Place>,
}

/// Looks for sets of addresses, in one table of the family inet or in all tables. `None`: there are none, or others
/// that only nft can list.
pub fn find(table: Option<&str>) -> anyhow::Result<Option<Lists>> {
    let mut socket = Netlink::open(NETLINK_NETFILTER)?;
    let (plain, others): (Vec<Place>, Vec<Place>) =
        places(&mut socket, table)?.into_iter().partition(|set| set.plain);
    let fillable = !plain.is_empty() && are_empty(&mut socket, &others)?;
    Ok(fillable.then_some(Lists { socket, plain }))
}

/// Whether all that this table of the family inet has in its named sets are lists of addresses. Also where there is
/// no such table.
pub fn are_all(table: &str) -> anyhow::Result<bool> {
    let mut socket = Netlink::open(NETLINK_NETFILTER)?;
    let mut others = places(&mut socket, Some(table))?;
    others.retain(|set| !set.plain);
    are_empty(&mut socket, &others)
}

fn places(socket: &mut Netlink, table: Option<&str>) -> anyhow::Result<Vec<Place>> {
    let ask = table.map_or_else(|| request(0, &[]), |table| request(NFPROTO_INET, &[(TABLE, table)]));
    match socket.dump(GET_SETS, &ask, place) {
        Err(error) if error.refusal() == Some(libc::ENOENT) => Ok(Vec::new()),
        sets => sets.context("read the sets of nftables"),
    }
}

fn are_empty(socket: &mut Netlink, sets: &[Place]) -> anyhow::Result<bool> {
    for set in sets {
        if !elements(socket, set, 0, |_| Ok(()))?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Lists {
    /// Puts into a terse listing what it left out. `false`: it holds what can't be filled in here.
    pub fn fill(&mut self, ruleset: &mut Ruleset) -> anyhow::Result<bool> {
        if lists::lacks_values(ruleset) {
            return Ok(false);
        }
        for table in &mut ruleset.tables {
            // An nft that knows no `-t` for JSON has listed them.
            for set in table.sets.iter_mut().filter(|set| set.elements.is_empty()) {
                let of = |place: &&Place| {
                    (place.family, &place.table, &place.set) == (table.family, &table.name, &set.name)
                };
                let Some(place) = self.plain.iter().find(of) else { continue };
                // Declared in words that we don't read, such as `typeof`.
                let Some(family) = lists::family(set) else { return Ok(false) };
                let found = elements(&mut self.socket, place, BORDERS_MAX, border)?;
                let interval = set.flags.iter().any(|flag| flag == "interval");
                let borders: Option<Vec<Border>> = found.into_iter().collect();
                match borders.and_then(|borders| lists::elements(family, interval, borders)) {
                    Some(elements) => set.elements = elements,
                    None => return Ok(false),
                }
            }
        }
        Ok(true)
    }
}

/// What `each` makes of the keys in a set of a table of the family inet, of which there are `max`; more are an error.
/// nft itself takes a hundred megabytes to list 65,536 elements.
pub(super) fn keys<T>(
    table: &str,
    set: &str,
    max: usize,
    each: impl Fn(&[u8]) -> Result<T, NetlinkError>,
) -> anyhow::Result<Vec<T>> {
    let mut socket = Netlink::open(NETLINK_NETFILTER)?;
    let place = Place {
        family: TableFamily::Inet,
        number: NFPROTO_INET,
        table: table.to_owned(),
        set: set.to_owned(),
        plain: false,
    };
    let found = elements(&mut socket, &place, max, |element| {
        let key = key(element)?.ok_or(NetlinkError::Malformed("an element without its key"))?;
        each(key)
    })?;
    anyhow::ensure!(found.len() <= max, "set {set} of table {table} has more than {max} elements");
    Ok(found)
}

/// What `each` makes of the elements of a set; of more than `max`, some that are more than `max`.
fn elements<T>(
    socket: &mut Netlink,
    place: &Place,
    max: usize,
    each: impl Fn(&[u8]) -> Result<T, NetlinkError>,
) -> anyhow::Result<Vec<T>> {
    let ask = request(place.number, &[(TABLE, &place.table), (NAME, &place.set)]);
    let found = socket.dump(GET_ELEMENTS, &ask, |payload, out| {
        if out.len() > max {
            return Ok(());
        }
        decode(payload, |element| {
            out.push(each(element)?);
            Ok(())
        })
    });
    found.with_context(|| format!("read what is in set {}", crate::terms::printable(&place.set, 64)))
}

/// struct nfgenmsg (family, version, resource id) and attributes of text.
fn request(family: u8, attributes: &[(u16, &str)]) -> Vec<u8> {
    let mut out = vec![family, 0, 0, 0];
    for (kind, name) in attributes {
        // Names are shorter than 256 bytes in the kernel.
        out.extend(attribute(*kind, &[name.as_bytes(), b"\0"].concat()));
    }
    out
}

/// One set; anonymous ones are part of a rule.
fn place(payload: &[u8], out: &mut Vec<Place>) -> Result<(), NetlinkError> {
    let (Some(&number), Some(body)) = (payload.first(), payload.get(4..)) else {
        return Err(NetlinkError::Truncated("a set"));
    };
    let Some(family) = family_of(number) else { return Ok(()) };
    let (mut table, mut set, mut flags, mut key) = (None, None, 0, None);
    for attribute in attributes(body) {
        let (kind, value) = attribute?;
        match kind {
            TABLE => table = Some(text(value)),
            NAME => set = Some(text(value)),
            FLAGS => flags = be32(value)?,
            KEY_TYPE => key = Some(be32(value)?),
            _ => {}
        }
    }
    if flags & ANONYMOUS != 0 {
        return Ok(());
    }
    let (Some(table), Some(set)) = (table, set) else {
        return Err(NetlinkError::Malformed("a set without its name"));
    };
    if out.len() >= OBJECTS_MAX {
        return Err(NetlinkError::Malformed("too many sets"));
    }
    let plain = flags & !(CONSTANT | INTERVAL) == 0 && key.is_some_and(|key| ADDRESSES.contains(&key));
    out.push(Place { family, number, table, set, plain });
    Ok(())
}

/// The elements in one message.
pub(super) fn decode(
    payload: &[u8],
    mut each: impl FnMut(&[u8]) -> Result<(), NetlinkError>,
) -> Result<(), NetlinkError> {
    let body = payload.get(4..).ok_or(NetlinkError::Truncated("elements of a set"))?;
    for attribute in attributes(body) {
        let (ELEMENTS, list) = attribute? else { continue };
        for element in attributes(list) {
            if let (ELEMENT, element) = element? {
                each(element)?;
            }
        }
    }
    Ok(())
}

/// The key of an element.
pub(super) fn key(element: &[u8]) -> Result<Option<&[u8]>, NetlinkError> {
    let mut key = None;
    for attribute in attributes(element) {
        let (KEY, data) = attribute? else { continue };
        for value in attributes(data) {
            if let (VALUE, value) = value? {
                key = Some(value);
            }
        }
    }
    Ok(key)
}

/// `None` for an element that is no border.
fn border(element: &[u8]) -> Result<Option<Border>, NetlinkError> {
    let mut flags = 0;
    for attribute in attributes(element) {
        match attribute? {
            (ELEMENT_FLAGS, value) => flags = be32(value)?,
            (KEY_END, _) => return Ok(None),
            _ => {}
        }
    }
    // Others, such as "whatever else" (NFT_SET_ELEM_CATCHALL), say more than an address.
    Ok(key(element)?
        .and_then(bits)
        .filter(|_| flags & !INTERVAL_END == 0)
        .map(|key| Border { key, begins: flags & INTERVAL_END == 0 }))
}

fn bits(address: &[u8]) -> Option<u128> {
    match address.len() {
        4 => array_at(address, 0).map(u32::from_be_bytes).map(u128::from),
        16 => array_at(address, 0).map(u128::from_be_bytes),
        _ => None,
    }
}

fn be32(value: &[u8]) -> Result<u32, NetlinkError> {
    array_at(value, 0).map(u32::from_be_bytes).ok_or(NetlinkError::Malformed("a short number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::render;
    use crate::terms::Family;

    fn key(address: &[u8]) -> Vec<u8> {
        attribute(KEY | 0x8000, &attribute(VALUE, address))
    }

    fn end() -> Vec<u8> {
        attribute(ELEMENT_FLAGS, &INTERVAL_END.to_be_bytes())
    }

    fn message(elements: &[Vec<u8>]) -> Vec<u8> {
        let list: Vec<u8> =
            elements.iter().flat_map(|element| attribute(ELEMENT | 0x8000, element)).collect();
        [vec![1, 0, 0, 0], attribute(1, b"t\0"), attribute(2, b"s\0"), attribute(ELEMENTS | 0x8000, &list)]
            .concat()
    }

    fn borders(payload: &[u8]) -> Result<Vec<Option<Border>>, NetlinkError> {
        let mut out = Vec::new();
        decode(payload, |element| {
            out.push(border(element)?);
            Ok(())
        })
        .map(|()| out)
    }

    #[test]
    fn elements_are_the_borders_of_intervals() {
        // The kernel's order, which is not that of addresses, and a comment that somebody gave one.
        let comment = attribute(6, b"\0\x02x\0");
        let elements = [
            [end(), key(&[10, 0, 1, 0])].concat(),
            [key(&[10, 0, 0, 0]), comment].concat(),
            [end(), key(&[0; 4])].concat(),
            key(&[192, 0, 2, 1]),
        ];
        let found: Option<Vec<Border>> = borders(&message(&elements)).expect("sound").into_iter().collect();
        let listed = lists::elements(Family::Ipv4, true, found.expect("borders")).expect("a list");
        let listed: Vec<String> = listed.iter().map(render::operand).collect();
        assert_eq!(listed, ["10.0.0.0/24", "192.0.2.1-255.255.255.255"]);
    }

    #[test]
    fn addresses_of_both_families_are_read_and_nothing_of_another_length() {
        let keys = [key(&[10, 0, 0, 1]), key(&[0; 16]), key(&[0, 0, 0, 0, 0, 0, 0, 1])];
        let begins = |key| Some(Border { key, begins: true });
        assert_eq!(borders(&message(&keys)).expect("sound"), [begins(0x0a00_0001), begins(0), None]);
    }

    #[test]
    fn what_says_more_than_an_address_is_none() {
        let strange = [
            attribute(ELEMENT_FLAGS, &2u32.to_be_bytes()),
            [key(&[10, 0, 0, 0]), attribute(ELEMENT_FLAGS, &2u32.to_be_bytes())].concat(),
            [key(&[10, 0, 0, 0]), attribute(KEY_END | 0x8000, &attribute(VALUE, &[10, 0, 0, 9]))].concat(),
            key(&[0, 22, 0, 0, 10, 0, 0, 1]),
        ];
        assert_eq!(borders(&message(&strange)).expect("sound"), [None; 4]);
    }

    #[test]
    fn a_message_that_was_cut_anywhere_is_refused_or_says_less_and_never_more() {
        let whole = message(&[key(&[10, 0, 0, 0]), [end(), key(&[10, 0, 1, 0])].concat()]);
        let all = borders(&whole).expect("sound");
        assert_eq!(all.len(), 2);
        for cut in 0..whole.len() {
            assert!(
                borders(&whole[..cut]).is_err() || borders(&whole[..cut]).is_ok_and(|some| some.is_empty()),
                "{cut}"
            );
        }
    }

    #[test]
    fn only_sets_of_nothing_but_addresses_are_plain() {
        let set = |flags: u32, key: u32| {
            let attributes = [
                attribute(TABLE, b"t\0"),
                attribute(NAME, b"s\0"),
                attribute(FLAGS, &flags.to_be_bytes()),
                attribute(KEY_TYPE, &key.to_be_bytes()),
            ];
            let mut out = Vec::new();
            place(&[vec![1, 0, 0, 0], attributes.concat()].concat(), &mut out).expect("sound");
            out.into_iter().map(|place| place.plain).collect::<Vec<_>>()
        };
        assert_eq!(
            (set(INTERVAL, 7), set(0, 8), set(INTERVAL | CONSTANT, 7)),
            (vec![true], vec![true], vec![true])
        );
        // A map, a timeout, a port; a set within a rule.
        assert_eq!((set(8, 7), set(0x14, 7), set(INTERVAL, 13)), (vec![false], vec![false], vec![false]));
        assert_eq!(set(ANONYMOUS | INTERVAL, 7), Vec::<bool>::new());
        let nameless = [vec![1, 0, 0, 0], attribute(FLAGS, &[0, 0, 0, 0])].concat();
        assert!(place(&nameless, &mut Vec::new()).is_err() && place(&[1], &mut Vec::new()).is_err());
    }
}
