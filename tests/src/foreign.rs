//! Everything of the product that reads what others wrote, by name: for the fuzzers, and for the test that puts
//! changed captures to each. A decoder may refuse whatever it likes; it may not panic, hang, or ask for
//! memory without bound.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use spokeguard::apply::{replay, sealed, trial::Trial};
use spokeguard::daemon::{eventlog, front, http, socket};
use spokeguard::desired::Desired;
use spokeguard::fleet::{self, exposition::Exposition, history};
use spokeguard::heartbeat::Kept;
use spokeguard::report::History;
use spokeguard::ruleset::{self, Evaluator, Packet, compare, decode, encode, render};
use spokeguard::source::recorded::DECODERS;
pub use spokeguard::source::recorded::Decode;
use spokeguard::terms::{Port, Proto};
use spokeguard::{policy, sys, tailnet};

const MORE: &[(&str, Decode)] = &[
    ("policy", policy),
    ("nft-listing", nft_listing),
    ("http", http),
    ("http-orders", http_orders),
    ("sealed", |bytes| sealed::is_whole(&String::from_utf8_lossy(bytes))),
    ("trial", |bytes| Trial::parse("1", &String::from_utf8_lossy(bytes)).is_some()),
    ("nft-objects", |bytes| {
        replay::kept(bytes, &[1, 2, 3, 4, 5, 7, 9, 13]).is_some_and(|kept| !kept.is_empty())
    }),
    ("event-log", |bytes| {
        serde_json::from_slice::<eventlog::Event>(bytes).is_ok_and(|e| !e.to_line().is_empty())
    }),
    ("first-seen", |bytes| serde_json::from_slice::<History>(bytes).is_ok()),
    ("notices", |bytes| Kept::from_json(bytes).is_ok()),
    ("status", |bytes| serde_json::from_slice::<socket::Status>(bytes).is_ok()),
    ("exposition", |bytes| {
        Exposition::parse(&String::from_utf8_lossy(bytes)).is_ok_and(|e| e.one("verdict").is_some())
    }),
    ("inventory", inventory),
    ("prometheus", prometheus),
    ("tailnet", |bytes| told(tailnet::read(&String::from_utf8_lossy(bytes), "acl.hujson"))),
    ("tailnet-filter", |bytes| tailnet::Filter::from_json(&String::from_utf8_lossy(bytes)).is_ok()),
    ("tailnet-status", |bytes| tailnet::Status::from_json(&String::from_utf8_lossy(bytes)).is_ok()),
];

pub fn decoders() -> impl Iterator<Item = (&'static str, Decode)> {
    DECODERS.iter().chain(MORE).copied()
}

/// What a policy says is what its normal form says.
fn policy(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let today = spokeguard::cli::today(sys::clock::now());
    let loaded = match policy::parse(&text, "policy.toml", today) {
        Ok(loaded) => loaded,
        Err(mistakes) => {
            assert!(!mistakes.to_string().is_empty());
            return false;
        }
    };
    let shown = policy::show(&loaded.policy);
    let again = policy::parse(&shown, "policy.toml", today);
    let again = again.unwrap_or_else(|mistakes| panic!("of its own normal form: {mistakes}\n{shown}"));
    assert_eq!(policy::show(&again.policy), shown);
    if let Ok(desired) = Desired::new(loaded.policy, today)
        && let Some(table) = &desired.table
    {
        render::table(table);
        encode::transaction(table, None);
    }
    true
}

/// `true`: not refused; what is refused says why.
fn told<T>(read: Result<T, policy::Mistakes>) -> bool {
    read.map_err(|mistakes| assert!(!mistakes.to_string().is_empty())).is_ok()
}

fn inventory(bytes: &[u8]) -> bool {
    let today = spokeguard::cli::today(sys::clock::now());
    told(fleet::parse(&String::from_utf8_lossy(bytes), "fleet.toml", today, fleet::Keys::MayBeMissing))
}

fn prometheus(bytes: &[u8]) -> bool {
    let instances = BTreeMap::from([("10.84.0.16:9984".to_string(), "edge-1".to_string())]);
    history::series(&String::from_utf8_lossy(bytes), &instances).is_ok_and(|series| !series.is_empty())
}

/// What nft lists is judged, printed and compared whatever it is.
fn nft_listing(json: &[u8]) -> bool {
    let Ok(found) = decode::ruleset(json) else { return false };
    let evaluator = Evaluator::new(&found);
    let here = |address: std::net::IpAddr| address == std::net::IpAddr::from([198, 51, 100, 7]);
    for (proto, port) in [(Proto::Tcp, 22), (Proto::Udp, 53)] {
        let port = Port::new(port).expect("not 0");
        let packet = |source: std::net::IpAddr, destination| Packet {
            iifname: "eth0".into(),
            source,
            destination,
            proto,
            source_port: port,
            port,
        };
        for packet in [
            packet([203, 0, 113, 9].into(), [198, 51, 100, 7].into()),
            packet([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 7].into()),
        ] {
            evaluator.judge(&packet, &here);
            evaluator.limited(&packet, &here);
        }
    }
    ruleset::published(&found);
    for table in &found.tables {
        render::table(table);
        compare::changes(table, Some(table));
    }
    !found.tables.is_empty()
}

/// A client's bytes, and its end. The answer, if there is one, is HTTP.
fn http(request: &[u8]) -> bool {
    thread_local! {
        static RUNTIME: RefCell<tokio::runtime::Runtime> = RefCell::new(
            tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"),
        );
    }
    RUNTIME.with_borrow(|runtime| {
        runtime.block_on(async {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let face = http::Face::default();
            face.set("# TYPE spokeguard_verdict gauge\nspokeguard_verdict 1\n# EOF\n".into());
            face.set_health(http::Beat { at: Instant::now(), period: Duration::from_secs(60) });
            let (mut client, server) = tokio::io::duplex(1 << 16);
            let talk = async {
                // The server may be done with us before we are.
                let _ = client.write_all(request).await;
                // Nothing here waits for anything else, so this is time enough to answer.
                for _ in 0..32 {
                    tokio::task::yield_now().await;
                }
                let _ = client.shutdown().await;
                let mut answer = Vec::new();
                let _ = client.read_to_end(&mut answer).await;
                answer
            };
            let (answer, ()) = tokio::join!(talk, http::converse(server, face));
            assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."), "{answer:?}");
            answer.starts_with(b"HTTP/1.1 200") || answer.starts_with(b"HTTP/1.0 200")
        })
    })
}

/// Between the daemon and its server.
fn http_orders(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let order = front::Order::from_text(&text);
    let word = front::Word::from_text(&text);
    if let Some(order) = &order {
        assert_eq!(front::Order::from_text(&order.to_text()).as_ref(), Some(order));
    }
    order.is_some() || word.is_some()
}
