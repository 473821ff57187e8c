//! The named counters of our table, by netlink: a scrape asks for them, and starting nft
//! for each would cost more than everything else the daemon does when idle.

use std::collections::BTreeMap;

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{Netlink, NetlinkError, attributes, text};
use crate::desired::TABLE;
use crate::observed::Amount;
use crate::terms::printable;

/// NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETOBJ.
const GET_OBJECTS: u16 = 10 << 8 | 19;
const FAMILY_INET: u8 = 1;
/// NFTA_OBJ_{TABLE, NAME, TYPE, DATA}, NFT_OBJECT_COUNTER, NFTA_COUNTER_{BYTES, PACKETS}.
const OBJECT_TABLE: u16 = 1;
const OBJECT_NAME: u16 = 2;
const OBJECT_TYPE: u16 = 3;
const OBJECT_DATA: u16 = 4;
const TYPE_COUNTER: u32 = 1;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;

/// What our table's named counters have counted; empty where there is no table.
pub fn read() -> anyhow::Result<BTreeMap<String, Amount>> {
    let mut socket = Netlink::open(NETLINK_NETFILTER)?;
    // struct nfgenmsg: family, version, resource id.
    let header = [FAMILY_INET, 0, 0, 0];
    Ok(socket.dump(GET_OBJECTS, &header, decode)?.into_iter().collect())
}

/// One object; those of other tables and other kinds are passed over.
pub(super) fn decode(payload: &[u8], out: &mut Vec<(String, Amount)>) -> Result<(), NetlinkError> {
    let body = payload.get(4..).ok_or(NetlinkError::Truncated("an nftables object"))?;
    let (mut ours, mut counter) = (false, false);
    let (mut name, mut packets, mut bytes) = (None, None, None);
    for attribute in attributes(body) {
        let (kind, value) = attribute?;
        match kind {
            OBJECT_TABLE => ours = text(value) == TABLE,
            OBJECT_NAME => name = Some(printable(&text(value), 128)),
            OBJECT_TYPE => {
                counter = value.first_chunk().copied().map(u32::from_be_bytes) == Some(TYPE_COUNTER)
            }
            OBJECT_DATA => {
                for field in attributes(value) {
                    let (kind, value) = field?;
                    let number = value.first_chunk().copied().map(u64::from_be_bytes);
                    match kind {
                        COUNTER_BYTES => bytes = number,
                        COUNTER_PACKETS => packets = number,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if payload[0] != FAMILY_INET || !ours || !counter {
        return Ok(());
    }
    let whole =
        name.zip(packets.zip(bytes)).map(|(name, (packets, bytes))| (name, Amount { packets, bytes }));
    out.push(whole.ok_or(NetlinkError::Malformed("a counter without its amounts"))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::netlink::attribute;
    use super::*;

    fn object(table: &str, kind: u32, packets: u64) -> Vec<u8> {
        let data = [
            attribute(COUNTER_BYTES, &99u64.to_be_bytes()),
            attribute(COUNTER_PACKETS, &packets.to_be_bytes()),
        ]
        .concat();
        [
            vec![FAMILY_INET, 0, 0, 0],
            attribute(OBJECT_TABLE, format!("{table}\0").as_bytes()),
            attribute(OBJECT_NAME, b"drop-mesh-ipv4\0"),
            attribute(OBJECT_TYPE, &kind.to_be_bytes()),
            attribute(OBJECT_DATA, &data),
        ]
        .concat()
    }

    #[test]
    fn our_counters_are_read_and_nobody_elses() {
        let mut out = Vec::new();
        decode(&object("spokeguard", TYPE_COUNTER, 1 << 40), &mut out).expect("sound");
        decode(&object("other", TYPE_COUNTER, 5), &mut out).expect("sound");
        decode(&object("spokeguard", 2, 5), &mut out).expect("a quota");
        assert_eq!(out, [("drop-mesh-ipv4".to_owned(), Amount { packets: 1 << 40, bytes: 99 })]);
    }

    #[test]
    fn an_object_cut_short_is_an_error_and_never_a_smaller_number() {
        let whole = object("spokeguard", TYPE_COUNTER, 7);
        for length in 0..whole.len() {
            let mut out = Vec::new();
            let cut = decode(&whole[..length], &mut out);
            assert!(cut.is_err() || out.is_empty(), "{length} of {} bytes passed as {out:?}", whole.len());
        }
    }
}
