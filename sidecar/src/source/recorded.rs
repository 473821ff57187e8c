//! Every decoder of this room by name, from bytes alone: what the kernel, other processes or the network said,
//! as it was recorded. For the fuzzers and for whoever wants to know what a capture holds; nothing is read.

use std::net::IpAddr;

use sidecar_ebpf::sweep::{Order, ends};

use super::netlink::{NetlinkError, replay};
use super::probe::keeper::Unfinished;
use super::scan::packets::Flow;
use super::{
    bpf, evidence, flows, legacy, links, listeners, nft_counters, nft_events, nft_lists, nft_unlisted,
    outside,
};
use super::{owners, probe, sshd, tailscale, wireguard};
use crate::observed::Backend;
use crate::ruleset::{decode, render, xt};
use crate::terms::{Family, Proto};

/// Takes bytes from anyone. `true`: they made sense.
pub type Decode = fn(&[u8]) -> bool;

/// Replies of netlink are datagrams one after the other, with their headers and the end of the dump.
pub const DECODERS: &[(&str, Decode)] = &[
    ("listeners-tcp", |bytes| whole(bytes, |payload, out| listeners::decode(payload, Proto::Tcp, out))),
    ("listeners-udp", |bytes| whole(bytes, |payload, out| listeners::decode(payload, Proto::Udp, out))),
    ("links", |bytes| whole(bytes, links::decode_link)),
    ("addresses", |bytes| whole(bytes, links::decode_address)),
    ("conntrack", |bytes| whole(bytes, |payload, out| flows::flow(payload).map(|flow| out.extend(flow)))),
    ("streams", |bytes| whole(bytes, |payload, out| flows::socket(payload).map(|stream| out.push(stream)))),
    ("connections", |bytes| whole(bytes, evidence::decode)),
    ("device", |bytes| whole(bytes, probe::route::decode_device)),
    ("neighbours", |bytes| whole(bytes, probe::route::decode_neighbour)),
    ("route", |bytes| whole(bytes, probe::route::decode_route)),
    ("xtables", xtables),
    ("counters", |bytes| whole(bytes, nft_counters::decode)),
    ("nft-events", nft_events),
    ("wireguard-family", |bytes| whole(bytes, wireguard::decode_family)),
    ("wireguard", wireguard_kernel),
    ("wireguard-uapi", wireguard_uapi),
    ("iptables-legacy", iptables_legacy),
    ("tc", |bytes| bpf::clsact::decode(bytes, &mut Vec::new()).is_ok_and(|done| done)),
    ("proc-stat", |bytes| owners::decode_stat(bytes).is_some()),
    ("proc-cgroup", |bytes| owners::decode_unit(&String::from_utf8_lossy(bytes)).is_some()),
    ("proc-login", |bytes| owners::decode_login(bytes).is_some()),
    ("proc-fd", |bytes| owners::decode_socket(bytes).is_some()),
    ("sshd-config", |bytes| sshd::decode(&String::from_utf8_lossy(bytes)).is_ok()),
    ("sshd-command", sshd_command),
    ("tailscaled", |bytes| tailscale::decode(bytes, bytes).is_ok()),
    ("scan-answers", scan_answers),
    ("audit-tables", audit_tables),
    ("btf", |bytes| probe::btf::offsets(bytes).is_ok()),
    ("audit-errand", |bytes| serde_json::from_slice::<outside::Errand>(bytes).is_ok()),
    ("audit-answer", |bytes| serde_json::from_slice::<outside::Answer>(bytes).is_ok()),
    ("audit-unfinished", |bytes| serde_json::from_slice::<Unfinished>(bytes).is_ok()),
    ("listen-events", |bytes| bpf::events::decode(bytes).is_some()),
    ("bind-events", |bytes| bpf::bind::decode_wake(bytes).is_some()),
];

fn whole<T>(reply: &[u8], decode: impl FnMut(&[u8], &mut Vec<T>) -> Result<(), NetlinkError>) -> bool {
    replay(reply, decode).is_ok()
}

/// With a listing as nft would print it, so that what is in the parts is read as well.
fn xtables(reply: &[u8]) -> bool {
    let Ok(rules) = replay(reply, nft_unlisted::decode) else { return false };
    let mut unlisted = nft_unlisted::nothing();
    let mut listing = Vec::new();
    for rule in rules {
        let kind = |part: &xt::Part| if part.target { "target" } else { "match" };
        let each = rule
            .held
            .parts
            .iter()
            .map(|part| serde_json::json!({"xt": {"type": kind(part), "name": part.name}}));
        listing.push(serde_json::json!({"rule": {
            "family": render::family(rule.family), "table": rule.table, "chain": rule.chain, "handle": rule.handle,
            "expr": each.collect::<Vec<_>>(),
        }}));
        unlisted.add(rule.family, rule.table, rule.chain, rule.handle, rule.held);
    }
    let listing = serde_json::json!({"nftables": listing}).to_string();
    decode::ruleset_with(listing.as_bytes(), unlisted).is_ok()
}

fn nft_events(datagram: &[u8]) -> bool {
    let mut batch = nft_events::Batch::default();
    batch.take(datagram);
    std::iter::from_fn(|| batch.finished()).count() > 0
}

fn wireguard_kernel(reply: &[u8]) -> bool {
    let Ok(parts) = replay(reply, wireguard::decode_part) else { return false };
    !wireguard::merge("wg0", Backend::Kernel, parts).peers.is_empty()
}

fn wireguard_uapi(answer: &[u8]) -> bool {
    let mut uapi = wireguard::Uapi::default();
    let lines = answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let sound = lines.map(|line| uapi.line(line)).all(|line| line.is_ok()) && uapi.finish().is_ok();
    wireguard::merge("wg0", Backend::Userspace, vec![uapi.part]);
    sound
}

/// struct ipt_getinfo, then struct ipt_get_entries.
fn iptables_legacy(bytes: &[u8]) -> bool {
    const INFO: usize = 84;
    let (info, entries) = bytes.split_at(bytes.len().min(INFO));
    let read = |family| legacy::decode(family, "filter", info, entries).is_some();
    // Both, whatever the first says.
    Family::ALL.map(read).contains(&true)
}

fn sshd_command(bytes: &[u8]) -> bool {
    sshd::effective_uid(&String::from_utf8_lossy(bytes));
    !sshd::options(bytes).is_empty()
}

/// From its IP header on, to a scan that any packet may be an answer of.
fn scan_answers(packet: &[u8]) -> bool {
    let ends: [[IpAddr; 2]; 2] = [
        [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()],
        [[0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 2].into()],
    ];
    let flows = ends.into_iter().flat_map(|[source, target]| {
        Proto::ALL.map(|proto| Flow { proto, source, target, source_ports: vec![40_000, 40_001] })
    });
    // All of them, whatever the first says.
    flows.filter(|flow| flow.hear(packet, |_, _| 0).is_some()).count() > 0
}

fn audit_tables(reply: &[u8]) -> bool {
    let key = |payload: &[u8], out: &mut Vec<Vec<u8>>| {
        nft_lists::decode(payload, |element| {
            out.extend(nft_lists::key(element)?.map(<[u8]>::to_vec));
            Ok(())
        })
    };
    let Ok(keys) = replay(reply, key) else { return false };
    let order = |proto| [0, 1].map(|family| Order { head: 7, proto, family, ..Order::default() });
    let all = [ends::LOCAL, ends::FORWARD, ends::RESET, ends::UNREACHABLE, ends::ANSWERED];
    let kinds =
        all.into_iter().flat_map(|end| [6, 17].into_iter().flat_map(order).map(move |order| (end, order)));
    let read = kinds.flat_map(|(end, order)| {
        keys.iter().filter_map(move |key| probe::tables::decode(&order, probe::tables::Says::Ends(end), key))
    });
    read.count() > 0
}
