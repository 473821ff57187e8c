//! Controls are proven by what they refuse, count and repair, and not by being there: each is
//! defeated while it reads back well.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use aya_obj::generated::bpf_insn;
use lab::{Answer, Daemon, Lab, Need, Node, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, lacking, wait_until};
use serde_json::Value;
use spokeguard::diff::canary::{Outcome, counters, firewall, guard};
use spokeguard::observed::Flight;
use spokeguard::policy::Mode;
use spokeguard::source::bpf::guard::Guard;
use spokeguard::source::links;
use spokeguard::source::probe::Means;
use spokeguard::source::probe::canary::{Target, Trial, fly};
use spokeguard::sys::probe::{Direction, Kind, Rank, attach_tcx, load};
use spokeguard::terms::Port;

use crate::daemon::{Events, LONG, SHORT, UNGUARDED, findings, plain_policy, status};
use crate::guard::unguard;
use crate::metrics::{fresh, sum};

const CONTROLS: [&str; 5] = ["firewall", "guard", "counters", "repair", "binds"];

fn enforced(lab: &Lab) -> [f64; 5] {
    let body = fresh(&lab.hub);
    CONTROLS.map(|control| sum(&body, "control_enforced", &[("control", control)]))
}

fn await_enforced(lab: &Lab, daemon: &Daemon, wanted: [f64; 5]) {
    let what = format!("{CONTROLS:?} are {wanted:?}");
    wait_until(LONG, &what, || (enforced(lab) == wanted).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}, but {:?}\n{}", enforced(lab), daemon.running.log()));
}

/// A program that says this of every packet, first of all on the way in by eth0.
pub fn stranger_program(lab: &Lab, verdict: i32) -> OwnedFd {
    let code = [
        // r0 = verdict; exit
        bpf_insn { code: 0xb7, imm: verdict, ..blank() },
        bpf_insn { code: 0x95, ..blank() },
    ];
    lab.spoke
        .inside(|| {
            let program = load(Kind::Classifier, &code, &mut [])?;
            let index = eth0()?.index;
            Ok(attach_tcx(program.as_fd(), index, Direction::In, Rank::First)?)
        })
        .unwrap()
}

fn blank() -> bpf_insn {
    bpf_insn { code: 0, _bitfield_align_1: [], _bitfield_1: Default::default(), off: 0, imm: 0 }
}

const PASS: i32 = 0;
pub const SHOT: i32 = 2;

fn eth0() -> anyhow::Result<spokeguard::observed::Link> {
    links::read()?.into_iter().find(|link| link.name == "eth0").ok_or_else(|| anyhow::anyhow!("no eth0"))
}

fn flown(lab: &Lab, means: Means) -> Vec<Flight> {
    let port = |number| Port::new(number).unwrap();
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let trial = |link| Trial {
        targets: vec![Target {
            link,
            addresses: vec![SPOKE_PUBLIC, SPOKE_PUBLIC_V6],
            tcp: port(29_999),
            udp: port(29_999),
            named: Vec::new(),
        }],
        table: true,
        guard: true,
        counters: true,
        pins: pins.clone(),
        run_dir: lab.dir.join("run"),
    };
    let mut flights = Vec::new();
    lab.spoke.inside(|| fly(means, &trial(eth0()?), &mut flights)).unwrap();
    flights
}

/// Packets that the guard and our table have counted as refused.
fn refused(lab: &Lab) -> (u64, u64) {
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let guard = lab.spoke.inside(|| Guard::open(&pins)?.expect("a guard").refused()).unwrap();
    (guard.iter().flat_map(|counts| counts.values()).sum(), dropped(&lab.spoke))
}

/// Packets that our table has counted.
pub fn dropped(node: &Node) -> u64 {
    let listed = node.ok(&["nft", "-j", "list", "counters", "table", "inet", "spokeguard"]).unwrap();
    let document: Value = serde_json::from_str(&listed).unwrap();
    let packets = |object: &Value| object["counter"]["packets"].as_u64();
    document["nftables"].as_array().unwrap().iter().filter_map(packets).sum()
}

fn is_failed(outcome: &Outcome, how: &str) {
    assert!(matches!(outcome, Outcome::Failed(why) if why.contains(how)), "{how}: {outcome:?}");
}

fn is_untried(outcome: &Outcome, why: &str) {
    assert!(matches!(outcome, Outcome::Untried(text) if text.contains(why)), "{why}: {outcome:?}");
}

/// Firewall, guard, counters.
fn judged(flights: &[Flight]) -> [Outcome; 3] {
    [firewall(flights, Mode::Enforce), guard(flights), counters(flights)]
}

#[test]
fn canaries_are_refused_counted_and_repaired_and_leave_no_trace() {
    if lacking(&[Need::Lab, Need::Cgroup2, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let mut daemon = lab.spoke.daemon(&plain_policy(&lab)).unwrap();
    // At start, before anybody is told that we are ready; the others once the rules are confirmed.
    assert_eq!(enforced(&lab)[0], 1.0, "{}", daemon.running.log());
    await_enforced(&lab, &daemon, [1.0; 5]);
    assert!(daemon.running.stop().unwrap().success());
    let events = Events::mark(&daemon);
    // The first look of the next one finds nothing that it did not know.
    let daemon = lab.spoke.daemon_in(daemon.folder(), &[]).unwrap();
    assert_eq!(enforced(&lab), [1.0; 5], "{}", daemon.running.log());
    // They are in no number that an operator reads.
    wait_until(LONG, "the first audit", || fresh(&lab.hub).contains("audit_age").then_some(())).unwrap();
    let body = fresh(&lab.hub);
    for name in ["dropped_packets_total", "repairs_total", "drift_events_total", "refused_binds_total"] {
        assert_eq!(sum(&body, name, &[]), 0.0, "{name}\n{body}");
    }
    assert_eq!(sum(&body, "connection_attempts_total", &[("verdict", "denied")]), 0.0, "{body}");
    let told = status(&lab.spoke, &daemon);
    let quiet = |told: &Value| {
        findings(told, "control-unproven").is_empty() && findings(told, "firewall-changed").is_empty()
    };
    assert!(quiet(&told), "{told}");
    let events = events.all();
    assert!(events.iter().all(|event| event["kind"] != "repaired"), "{events:?}");
    let chains = lab.spoke.ok(&["nft", "list", "chains", "inet"]).unwrap();
    assert!(!chains.contains("canary"), "{chains}");

    // Where nothing can stand before ours they are run by hand, and who is before them is not seen.
    if !Means::of_this_kernel().tcx {
        return;
    }
    // A program of somebody else that lets every packet in, before ours: all of ours is attached,
    // and none of it is reached. The table is.
    let before = fresh(&lab.hub);
    let stranger = stranger_program(&lab, PASS);
    lab.spoke.ok(&["ip", "address", "add", "198.51.100.8/24", "dev", "eth0"]).unwrap();
    await_enforced(&lab, &daemon, [1.0, 0.0, 0.0, 1.0, 1.0]);
    let told = wait_until(LONG, "both are told", || {
        let told = status(&lab.spoke, &daemon);
        (findings(&told, "control-unproven").len() == 2).then_some(told)
    });
    let told = told.unwrap();
    let unproven = findings(&told, "control-unproven");
    let found = |subject: &str| {
        let mine = unproven.iter().find(|finding| finding["subject"] == subject);
        mine.unwrap_or_else(|| panic!("{unproven:?}"))["found"].as_str().unwrap().to_owned()
    };
    assert!(found("control guard").starts_with("configured but does not refuse: "), "{told}");
    assert!(found("control counters").starts_with("attached but does not count: "), "{told}");
    assert_eq!(told["verdict"], "drift", "{told}");
    assert_eq!(findings(&told, "guard-missing"), [Value::Null; 0], "reading back sees nothing");
    drop(stranger);
    await_enforced(&lab, &daemon, [1.0; 5]);
    let after = fresh(&lab.hub);
    assert_eq!(
        sum(&after, "dropped_packets_total", &[]) - sum(&before, "dropped_packets_total", &[]),
        0.0,
        "also of canaries that failed"
    );
}

#[test]
fn a_control_that_reads_back_well_is_defeated_and_found_out() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let mut daemon = lab.spoke.daemon(&(plain_policy(&lab) + UNGUARDED)).unwrap();
    // What is in the kernel holds alone, and nobody puts it right.
    assert!(daemon.running.stop().unwrap().success());
    let (newer, older) = (Means::of_this_kernel(), Means { programs: false, tcx: false });
    let _listener = lab.spoke.listen("old", &["tcp/0.0.0.0:29999"]).unwrap();
    let proven = [Outcome::Proven, Outcome::Proven, Outcome::Proven];
    for means in [newer, older] {
        let flights = flown(&lab, means);
        assert_eq!(judged(&flights), proven, "{means:?}: {flights:#?}");
        assert_eq!(flights.len(), 6, "SYN, past the guard, datagram; of two families");
        assert_eq!(refused(&lab), (0, 0), "{means:?}: strangers alone are counted");
    }
    // They would be.
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 29_999), SHORT), Answer::Silent);
    let (guard, table) = refused(&lab);
    assert!(guard > 0 && table == 0, "{guard} {table}");

    in_front_of_ours(&lab);

    // In prerouting, in front of our table alone.
    lab.spoke
        .nft(
            "add table inet stranger
             add chain inet stranger early { type filter hook prerouting priority -300; }
             add rule inet stranger early iifname eth0 meta l4proto { tcp, udp } drop",
        )
        .unwrap();
    for means in [newer, older] {
        let [table, layer, counts] = judged(&flown(&lab, means));
        is_untried(&table, "before it got to our table");
        assert_eq!((layer, counts), (Outcome::Proven, Outcome::Proven), "{means:?}");
    }
    lab.spoke.nft("delete table inet stranger").unwrap();

    // Our table lets in, with and without another that refuses behind it.
    lab.spoke.nft("flush chain inet spokeguard public").unwrap();
    lab.spoke
        .nft(
            "add table inet late
             add chain inet late input { type filter hook input priority 100; }
             add rule inet late input iifname eth0 meta l4proto { tcp, udp } drop",
        )
        .unwrap();
    for late in [true, false] {
        for means in [newer, older] {
            let flights = flown(&lab, means);
            let [table, layer, counts] = judged(&flights);
            is_failed(&table, "got past our table");
            assert_eq!((layer, counts), (Outcome::Proven, Outcome::Proven), "{late} {means:?}");
            // Which is what it is for in audit mode.
            assert_eq!(firewall(&flights, Mode::Audit), Outcome::Proven, "{late} {means:?}: {flights:#?}");
        }
        if late {
            lab.spoke.nft("delete table inet late").unwrap();
        }
    }

    // The guard off the interface, and a port that its rules let in.
    let pins = lab.spoke.path("/sys/fs/bpf/spokeguard");
    let state = lab.spoke.inside(|| {
        let mut guard = Guard::open(&pins)?.expect("a guard");
        let now = spokeguard::desired::guard::Boot(spokeguard::sys::clock::since_boot_ns() + 60_000_000_000);
        let from = ["0.0.0.0/0", "::/0"].map(|net| net.parse().unwrap()).to_vec();
        let port = Port::new(29_999).unwrap();
        guard.set_timed(port, &[spokeguard::desired::guard::Timed { port, from, until: now }])
    });
    state.unwrap();
    for means in [newer, older] {
        let [_, layer, counts] = judged(&flown(&lab, means));
        is_failed(&layer, "got past the guard");
        assert_eq!(counts, Outcome::Proven, "{means:?}");
    }
    unguard(&lab.spoke);
    is_failed(&judged(&flown(&lab, newer))[1], "none is on this interface");

    // With nothing left that refuses them, they still came to no socket.
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 29_999), LONG), Answer::Open);
    let waiting = lab.spoke.ok(&["ss", "-Htan", "state", "syn-recv", "state", "established"]).unwrap();
    assert_eq!(waiting, "");
}

/// Somebody in front of ours: who lets in leads around ours, who refuses proves nothing.
fn in_front_of_ours(lab: &Lab) {
    let newer = Means::of_this_kernel();
    if !newer.tcx {
        return;
    }
    let stranger = stranger_program(lab, PASS);
    let [table, layer, counts] = judged(&flown(lab, newer));
    assert_eq!(table, Outcome::Proven);
    is_failed(&layer, "a way on which the guard is not asked");
    is_failed(&counts, "they counted 0");
    drop(stranger);
    let stranger = stranger_program(lab, SHOT);
    let [table, layer, counts] = judged(&flown(lab, newer));
    is_untried(&table, "before it got to our table");
    is_untried(&layer, "before it got to the guard");
    is_untried(&counts, "before it got to the counters");
    drop(stranger);
}

#[test]
fn a_daemon_whose_repairs_fail_says_so_before_it_has_to_repair() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let mut daemon = lab.spoke.daemon(&plain_policy(&lab)).unwrap();
    let folder = daemon.folder().to_path_buf();
    assert!(daemon.running.stop().unwrap().success());
    // An nft that lists and adds, and takes no transaction.
    let bin = lab.dir.join("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(
        bin.join("nft"),
        "#!/bin/sh\ncase \"$*\" in *-f\\ -*) echo no room >&2; exit 1;; esac\nPATH=$REST exec nft \"$@\"\n",
    )
    .unwrap();
    let script = format!("chmod 755 {0}/nft; export REST=$PATH PATH={0}:$PATH; exec \"$@\"", bin.display());
    let daemon = lab.spoke.daemon_under(&["sh", "-c", &script, "sh"], &folder, &[]).unwrap();
    let told = wait_until(Duration::from_secs(40), "told", || {
        let told = findings(&status(&lab.spoke, &daemon), "control-unproven");
        told.into_iter().find(|finding| finding["subject"] == "control repair")
    });
    let finding = told.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    assert!(finding["found"].as_str().unwrap().starts_with("running but does not repair: "), "{finding}");
    assert_eq!(enforced(&lab)[3], 0.0);
    // What it changed for the trial it takes back by itself.
    let chains = lab.spoke.ok(&["nft", "list", "chains", "inet"]).unwrap();
    assert!(!chains.contains("canary"), "{chains}");
}
