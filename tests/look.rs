//! `check` on a real host: what is wrong is found, what is right is not called wrong, and what could not
//! be looked at is never called fine.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lab::{Lab, Mesh, Need, Outcome, Shape, Sshd, lacking, wait_until};
use serde_json::Value;
use spokeguard::source::probe::Means;

use crate::enforce::{Guard, without_nft};

/// What a check said: exit code, document, and the findings that nobody accepted.
#[derive(Debug)]
struct Seen {
    code: i32,
    document: Value,
}

impl Seen {
    fn of(outcome: &Outcome) -> Seen {
        let document = outcome.json().unwrap();
        follows_the_contract(&document);
        let code = outcome.code.unwrap_or_else(|| panic!("ended by a signal: {}", outcome.all()));
        let wanted = match document["verdict"].as_str().unwrap() {
            "ok" => 0,
            "drift" => 1,
            _ => 2,
        };
        assert_eq!(code, wanted, "{}", outcome.all());
        Seen { code, document }
    }

    fn findings(&self) -> &[Value] {
        self.document["findings"].as_array().unwrap()
    }

    /// "code subject" of every finding.
    fn list(&self) -> BTreeSet<String> {
        let text = |finding: &Value| {
            format!("{} {}", finding["code"].as_str().unwrap(), finding["subject"].as_str().unwrap())
        };
        self.findings().iter().map(text).collect()
    }

    #[track_caller]
    fn one(&self, code: &str, subject: &str) -> &Value {
        let found = self.findings().iter().find(|f| f["code"] == code && f["subject"] == subject);
        found.unwrap_or_else(|| panic!("no {code} {subject} in {:?}", self.list()))
    }
}

/// The shape that scripts rely on.
fn follows_the_contract(document: &Value) {
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let set = |words: &[&str]| words.iter().map(|word| word.to_string()).collect::<BTreeSet<_>>();
    assert_eq!(keys(document), set(&["version", "node", "verdict", "at", "findings", "blind"]));
    assert_eq!(document["version"], 1);
    let is_time = |value: &Value| {
        value.as_str().is_some_and(|t| t.len() >= 20 && t.ends_with('Z') && &t[10..11] == "T")
    };
    assert!(is_time(&document["at"]), "{}", document["at"]);
    for finding in document["findings"].as_array().unwrap() {
        let wanted = ["code", "severity", "subject", "wanted", "found", "by", "since", "accepted", "next"];
        assert_eq!(keys(finding), set(&wanted), "{finding}");
        assert!(
            ["critical", "high", "medium", "low", "info"].contains(&finding["severity"].as_str().unwrap())
        );
        for text in ["code", "subject", "wanted", "found", "next"] {
            assert!(finding[text].as_str().is_some_and(|text| !text.is_empty()), "{text} of {finding}");
        }
        assert!(finding["since"].is_null() || is_time(&finding["since"]), "{finding}");
        assert!(finding["accepted"].is_boolean());
        if !finding["by"].is_null() {
            // With whoever logged in and ran the tests, if somebody did.
            let mut said = keys(&finding["by"]);
            said.retain(|key| key != "user");
            assert_eq!(said, set(&["pid", "process", "unit"]));
            assert!(finding["by"]["pid"].as_u64().is_some_and(|pid| pid > 1));
        }
    }
    for blind in document["blind"].as_array().unwrap() {
        assert_eq!(keys(blind), set(&["facet", "reason"]));
        assert!(blind["reason"].as_str().is_some_and(|text| !text.is_empty()));
    }
}

fn check(guard: &Guard) -> Seen {
    // What probes add, and cost, is for tests/proof.rs.
    Seen::of(&guard.run(&["check", "--no-probe", "--format", "json"]))
}

/// The mesh of a plain lab is a cable called wg0: a kind of mesh that assigns its own keys, and no WireGuard.
fn plain_policy(lab: &Lab) -> String {
    lab.policy().replace("kind = \"wireguard\"", "kind = \"tailscale\"").replace("keepalive = \"25s\"\n", "")
}

const KEYS_ONLY: &str = "KbdInteractiveAuthentication no";

fn sshd(lab: &Lab, listen: &[&str]) -> Sshd {
    lab.spoke.sshd(22, listen, KEYS_ONLY).unwrap()
}

fn set(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(|word| word.to_string()).collect()
}

#[track_caller]
fn is_right(guard: &Guard, when: &str) {
    let seen = check(guard);
    assert_eq!((seen.code, seen.list()), (0, set(&[])), "{when}: {:#}", seen.document);
    assert_eq!(seen.document["verdict"], "ok");
}

#[test]
fn each_drift_is_found_and_nothing_else() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let guard = Guard::new(&lab, &lab.spoke);
    let policy = plain_policy(&lab);
    let sshd = sshd(&lab, &["10.84.0.16", "fd84::16"]);
    let _web = lab.spoke.web().unwrap();
    let _private =
        lab.spoke.listen("redis", &["tcp/127.0.0.1:6379", "tcp/[::1]:6379", "udp/127.0.0.1:323"]).unwrap();
    guard.enforce(&policy);
    is_right(&guard, "at first");
    assert_eq!(check(&guard).document["node"], "singapore");
    let text = guard.says(0, &["check"]);
    assert!(text.starts_with("singapore: as the policy says") && text.contains("No findings."), "{text}");
    assert_eq!(guard.says(0, &["check", "--quiet"]), "");

    let leaks = ["mesh-leak 10.84.0.16", "mesh-leak fd84::16"];
    let drifts: &[(&str, &str, &[&str])] = &[
        (
            "nft add rule inet spokeguard allowed-public tcp dport 2222 accept",
            "",
            &["firewall-changed table inet spokeguard"],
        ),
        (
            "nft 'table inet other { chain i { type filter hook input priority 5; tcp dport 80 drop; }; }'",
            "nft delete table inet other",
            &["firewall-blocked http tcp/80 ipv4", "firewall-blocked http tcp/80 ipv6"],
        ),
        (
            "nft 'table ip other { chain i { type filter hook input priority 5; iifname wg0 tcp dport 22 reject; }; }'",
            "nft delete table ip other",
            &["firewall-blocked ssh tcp/22 ipv4"],
        ),
        (
            // What others do elsewhere is none of our business.
            "nft 'table inet other { chain i { type filter hook input priority 5; tcp dport 8080 drop; iifname wg9 drop; }; chain o { type filter hook output priority 5; tcp dport 80 drop; }; }'",
            "nft delete table inet other",
            &[],
        ),
        (
            "ip addr del fd84::16/64 dev wg0",
            "ip addr add fd84::16/64 dev wg0",
            &["mesh-address address fd84::16"],
        ),
        // The kernel takes IPv6 addresses away from what is down.
        (
            "ip link set wg0 down",
            "ip link set wg0 up; ip addr replace fd84::16/64 dev wg0",
            &["mesh-address address fd84::16", "mesh-missing interface wg0"],
        ),
        ("chmod 0644 $DIR/secret", "chmod 0600 $DIR/secret", &["file-mode file $DIR/secret"]),
        ("chmod 0400 $DIR/secret", "chmod 0600 $DIR/secret", &[]),
        ("rm $DIR/secret", "(umask 077; : > $DIR/secret)", &["file-mode file $DIR/secret"]),
    ];
    let dir = lab.dir.display().to_string();
    let here = |text: &str| text.replace("$DIR", &dir);
    lab.spoke.sh(&here("(umask 077; : > $DIR/secret)")).unwrap();
    guard.enforce(&(policy.clone() + &here("[[file]]\npath = \"$DIR/secret\"\nmode = \"0600\"\n")));
    is_right(&guard, "with a file");
    for (breaks, mends, wanted) in drifts {
        lab.spoke.sh(&here(breaks)).unwrap();
        let seen = check(&guard);
        let wanted: BTreeSet<String> = wanted.iter().map(|line| here(line)).collect();
        assert_eq!(seen.list(), wanted, "{breaks}: {:#}", seen.document);
        assert_eq!(seen.code, i32::from(!wanted.is_empty()), "{breaks}");
        lab.spoke.sh(&here(mends)).unwrap();
        if mends.is_empty() {
            guard.says(0, &["apply"]);
            guard.says(0, &["confirm"]);
        }
        is_right(&guard, mends);
    }

    // Listeners: on one family, on the other, on both; held by our table.
    for (what, subject) in [
        ("tcp/0.0.0.0:5432", "tcp/0.0.0.0:5432"),
        ("tcp/[::]:5432", "tcp/[::]:5432"),
        ("udp/[::]:161", "udp/[::]:161"),
        ("tcp/198.51.100.7:5432", "tcp/198.51.100.7:5432"),
        ("tcp/[2001:db8:1::7]:5432", "tcp/[2001:db8:1::7]:5432"),
        ("tcp/0.0.0.0:9984", "tcp/0.0.0.0:9984"),
    ] {
        let listener = lab.spoke.listen("postgres", &[what]).unwrap();
        let seen = check(&guard);
        assert_eq!(seen.list(), BTreeSet::from([format!("listener-wide {subject}")]), "{:#}", seen.document);
        let finding = seen.one("listener-wide", subject);
        assert_eq!(finding["severity"], "low", "{finding}");
        assert_eq!(finding["by"]["pid"], listener.running.pid(), "{finding}");
        assert_eq!(finding["by"]["process"], "postgres", "{finding}");
        drop(listener);
    }
    is_right(&guard, "without listeners");

    // A published port, held.
    lab.publish(8080, 8000).unwrap();
    let published =
        ["dnat-exposed tcp/8080 -> 172.17.0.2:8000", "dnat-exposed tcp/8080 -> [fd00:17::2]:8000"];
    let seen = check(&guard);
    assert_eq!(seen.list(), set(&published), "{:#}", seen.document);
    assert_eq!(seen.one("dnat-exposed", "tcp/8080 -> 172.17.0.2:8000")["severity"], "low");

    // The same without our table: nothing holds any of it.
    let _db = lab
        .spoke
        .listen("postgres", &["tcp/0.0.0.0:5432", "tcp/[2001:db8:1::7]:5433", "udp/[::]:161"])
        .unwrap();
    guard.says(0, &["release"]);
    let seen = check(&guard);
    let mut wanted = set(&[
        "firewall-missing table inet spokeguard",
        "guard-missing tc guard",
        "listener-exposed tcp/0.0.0.0:5432",
        "listener-exposed tcp/[2001:db8:1::7]:5433",
        "listener-exposed udp/[::]:161",
    ]);
    wanted.extend(set(&published));
    wanted.extend(set(&leaks));
    assert_eq!(seen.list(), wanted, "{:#}", seen.document);
    for code in ["listener-exposed", "dnat-exposed", "firewall-missing"] {
        let severities = seen.findings().iter().filter(|f| f["code"] == code).map(|f| f["severity"].as_str());
        assert!(severities.clone().all(|severity| severity == Some("critical")), "{code}");
    }
    let text = guard.says(1, &["check"]);
    assert!(text.starts_with("singapore: differs from the policy"), "{text}");
    assert!(text.contains("listener-exposed  tcp/0.0.0.0:5432") && text.contains("postgres (pid "), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    drop(sshd);
}

#[test]
fn sshd_is_found_wherever_it_is_and_missed_where_it_is_not() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    guard.enforce(&plain_policy(&lab));
    // Where no sshd runs, its configuration is the machine's own and says what it says.
    let reach = |seen: Seen| -> BTreeSet<String> {
        seen.list().into_iter().filter(|line| !line.starts_with("ssh-password")).collect()
    };
    let unreachable = ["ssh-unreachable tcp/10.84.0.16:22", "ssh-unreachable tcp/[fd84::16]:22"];
    assert_eq!(reach(check(&guard)), set(&unreachable));
    {
        let _half = sshd(&lab, &["10.84.0.16"]);
        assert_eq!(check(&guard).list(), set(&unreachable[1..]));
    }
    {
        let wide = sshd(&lab, &["0.0.0.0", "::"]);
        let seen = check(&guard);
        assert_eq!(seen.list(), set(&["ssh-bind tcp/0.0.0.0:22", "ssh-bind tcp/[::]:22"]));
        let finding = seen.one("ssh-bind", "tcp/0.0.0.0:22");
        assert_eq!(
            (&finding["severity"], &finding["by"]["pid"]),
            (&"medium".into(), &wide.running.pid().into())
        );
        // Nothing holds it any more.
        lab.spoke.nft("delete table inet spokeguard").unwrap();
        assert_eq!(check(&guard).one("ssh-bind", "tcp/[::]:22")["severity"], "high");
        guard.says(0, &["apply"]);
        guard.says(0, &["confirm"]);
    }
    let sshd = sshd(&lab, &["10.84.0.16", "fd84::16"]);
    is_right(&guard, "sshd on the mesh");
    // Its file says something else now, and the next reload will follow it.
    let config = std::fs::read_to_string(&sshd.config).unwrap();
    std::fs::write(&sshd.config, config.replace("PasswordAuthentication no", "PasswordAuthentication yes"))
        .unwrap();
    let seen = check(&guard);
    assert_eq!(seen.list(), set(&["ssh-password sshd"]));
    assert!(
        seen.one("ssh-password", "sshd")["found"].as_str().unwrap().contains("PasswordAuthentication yes")
    );
    // A file that sshd itself can't read is no proof of anything.
    std::fs::write(&sshd.config, "NoSuchKeyword yes\n").unwrap();
    let seen = check(&guard);
    assert_eq!(seen.code, 2, "{:#}", seen.document);
    assert_eq!(seen.document["blind"][0]["facet"], "sshd", "{:#}", seen.document);
}

#[test]
fn exceptions_are_listed_and_change_nothing_until_they_are_over() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let _sshd = sshd(&lab, &["10.84.0.16", "fd84::16"]);
    let _emergency = lab.spoke.listen("sshd", &["tcp/[::]:2222"]).unwrap();
    let with = |until: &str| {
        let exception = "[[exception]]\nname = \"emergency-ssh\"\ntcp = [2222]\nfrom = [\"0.0.0.0/0\", \"::/0\"]\n\
                         reason = \"way in when the mesh is down\"\nowner = \"ops\"\n";
        format!("{}{exception}until = \"{until}\"\n", plain_policy(&lab))
    };
    guard.enforce(&with("2099-01-31"));
    let seen = check(&guard);
    assert_eq!(
        (seen.code, seen.list()),
        (0, set(&["exception-open exception emergency-ssh"])),
        "{:#}",
        seen.document
    );
    assert_eq!(seen.document["verdict"], "ok");
    assert_eq!(seen.one("exception-open", "exception emergency-ssh")["accepted"], true);
    let text = guard.says(0, &["check"]);
    assert!(text.contains("ACCEPTED RISKS") && text.contains("way in when the mesh is down"), "{text}");
    guard.enforce(&with("2020-01-31"));
    let seen = check(&guard);
    assert_eq!(
        seen.list(),
        set(&["exception-expired exception emergency-ssh", "listener-wide tcp/[::]:2222"]),
        "{:#}",
        seen.document
    );
    assert_eq!(
        (seen.code, &seen.one("exception-expired", "exception emergency-ssh")["accepted"]),
        (1, &false.into())
    );
}

#[test]
fn the_tunnel_is_compared_with_the_policy() {
    if lacking(&[Need::Lab, Need::WireGuard, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::new();
    let guard = Guard::new(&lab, &lab.spoke);
    let policy = lab.policy();
    let _sshd = sshd(&lab, &["10.84.0.16", "fd84::16"]);
    guard.enforce(&policy);
    is_right(&guard, "with a real tunnel");
    let hub = &lab.keys.hub.public;
    let other = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
    let drifts: &[(String, String, &[&str])] = &[
        (
            format!("wg set wg0 peer {hub} persistent-keepalive 0"),
            format!("wg set wg0 peer {hub} persistent-keepalive 25"),
            &["mesh-keepalive peer hub"],
        ),
        (
            format!("wg set wg0 peer {hub} endpoint 203.0.113.48:51820"),
            format!("wg set wg0 peer {hub} endpoint 203.0.113.47:51820"),
            &["mesh-endpoint peer hub"],
        ),
        (
            format!("wg set wg0 peer {other} allowed-ips 10.84.0.77/32"),
            format!("wg set wg0 peer {other} remove"),
            &["mesh-peer peer "],
        ),
        (
            format!("wg set wg0 peer {hub} allowed-ips 10.84.0.2/32"),
            format!("wg set wg0 peer {hub} allowed-ips 10.84.0.0/24,fd84::/64"),
            &["mesh-peer peer hub"],
        ),
    ];
    for (breaks, mends, wanted) in drifts {
        lab.spoke.sh(breaks).unwrap();
        let seen = check(&guard);
        let list = seen.list();
        assert_eq!(list.len(), wanted.len(), "{breaks}: {:#}", seen.document);
        assert!(
            list.iter().zip(*wanted).all(|(found, start)| found.starts_with(start)),
            "{breaks}: {list:?}"
        );
        assert_eq!(seen.code, 1);
        lab.spoke.sh(mends).unwrap();
        is_right(&guard, mends);
    }
    // The hub's peer is gone; what is known of its handshakes went with it.
    lab.spoke.sh(&format!("wg set wg0 peer {hub} remove")).unwrap();
    let seen = check(&guard);
    assert_eq!(seen.list(), set(&["mesh-peer peer hub"]), "{:#}", seen.document);
    lab.spoke
        .sh(&format!("wg set wg0 peer {hub} endpoint 203.0.113.47:51820 persistent-keepalive 25"))
        .unwrap();
    let seen = check(&guard);
    assert!(seen.list().contains("mesh-peer peer hub"), "no allowed IPs: {:?}", seen.list());
    lab.spoke.sh(&format!("wg set wg0 peer {hub} allowed-ips 10.84.0.0/24,fd84::/64")).unwrap();
    wait_until(Duration::from_secs(15), "a handshake", || (check(&guard).code == 0).then_some(())).unwrap();
    // A peer that never answered: another key at the same endpoint.
    guard.enforce(&policy.replace(hub, other));
    lab.spoke
        .sh(&format!(
            "wg set wg0 peer {hub} remove
             wg set wg0 peer {other} endpoint 203.0.113.47:51820 persistent-keepalive 25 allowed-ips 10.84.0.0/24,fd84::/64"
        ))
        .unwrap();
    let seen = check(&guard);
    assert_eq!(seen.list(), set(&["mesh-handshake peer hub"]), "{:#}", seen.document);
    assert!(seen.one("mesh-handshake", "peer hub")["found"].as_str().unwrap().contains("never"));
    // No private key, in no form, in nothing that is printed.
    let all = guard.run(&["check", "--format", "json"]).all() + &guard.run(&["check"]).all();
    assert!(all.contains("wg0") || !all.is_empty());
    for private in [&lab.keys.spoke.private, &lab.keys.hub.private] {
        assert!(!all.contains(private.trim()));
    }
}

#[test]
fn a_mesh_interface_that_is_no_tunnel_or_is_gone_is_missing() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let _sshd = sshd(&lab, &["10.84.0.16", "fd84::16"]);
    guard.enforce(&lab.policy());
    // A cable called wg0: no kernel and no program that calls it WireGuard can be asked about its peers.
    let seen = check(&guard);
    let unasked = (2, set(&["control-unproven control keepalive"]));
    let known = (1, set(&["mesh-missing interface wg0"]));
    assert!([unasked, known.clone()].contains(&(seen.code, seen.list())), "{:#}", seen.document);
    lab.spoke.sh("ip link del wg0").unwrap();
    let seen = check(&guard);
    assert_eq!((seen.code, seen.list()), known, "{:#}", seen.document);
    let found = &seen.one("mesh-missing", "interface wg0")["found"];
    assert_eq!(found, "there is no such interface");
}

#[test]
fn what_it_cannot_see_is_never_called_fine() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let _sshd = sshd(&lab, &["10.84.0.16", "fd84::16"]);
    let _db = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    guard.enforce(&plain_policy(&lab));
    assert_eq!(check(&guard).list(), set(&["listener-wide tcp/0.0.0.0:5432"]));
    let program = lab::spokeguard().unwrap().display().to_string();
    let command = format!("{program} check --format json {}", guard.flags().join(" "));
    let look = |script: &str| Seen::of(&lab.spoke.run(&["sh", "-c", script]).unwrap());
    let blind = |seen: &Seen| -> BTreeMap<String, String> {
        let list = seen.document["blind"].as_array().unwrap().iter();
        list.map(|b| (b["facet"].as_str().unwrap().to_string(), b["reason"].as_str().unwrap().to_string()))
            .collect()
    };

    let seen = look(&without_nft(&command));
    assert_eq!(seen.document["verdict"], "unknown");
    // A kernel without programs for netfilter (before 6.4) has its probes stopped by a table, which nft makes.
    let older = !Means::of_this_kernel().programs;
    let facets = if older { &["audit", "nftables"][..] } else { &["nftables"] };
    assert_eq!(blind(&seen).keys().collect::<Vec<_>>(), facets, "{:#}", seen.document);
    assert!(blind(&seen).values().all(|why| why.contains("install nftables")), "{:?}", blind(&seen));
    seen.one("control-unproven", "control firewall");
    // The rest is still reported: it listens, and nobody can say who gets there.
    let wide = seen.one("listener-wide", "tcp/0.0.0.0:5432");
    assert_eq!((&wide["severity"], &wide["by"]["process"]), (&"medium".into(), &"postgres".into()), "{wide}");

    let seen = look(&format!("exec setpriv --bounding-set=-all --inh-caps=-all {command}"));
    assert_eq!(seen.document["verdict"], "unknown");
    let gaps = blind(&seen);
    assert!(gaps["nftables"].contains("CAP_NET_ADMIN"), "{gaps:?}");
    seen.one("control-unproven", "control firewall");
    seen.one("listener-wide", "tcp/0.0.0.0:5432");

    // An ordinary user sees least of all, and is told so in words.
    let seen = look(&as_nobody(&lab, &guard, "", "--format json"));
    assert_eq!(seen.document["verdict"], "unknown");
    assert!(blind(&seen)["nftables"].contains("CAP_NET_ADMIN"), "{:#}", seen.document);
    seen.one("control-unproven", "control firewall");
    let wide = seen.one("listener-wide", "tcp/0.0.0.0:5432");
    assert!(wide["by"].is_null(), "whose it is can't be known: {wide}");
    let text = lab.spoke.run(&["sh", "-c", &as_nobody(&lab, &guard, "", "")]).unwrap();
    assert!(text.code == Some(2) && text.stdout.contains("COULD NOT TELL"), "{}", text.all());
}

/// A check as an ordinary user, with these capabilities and no other.
fn as_nobody(lab: &Lab, guard: &Guard, capabilities: &str, options: &str) -> String {
    // Where the program was built, others may have no business.
    let program = lab.dir.join("program");
    if !program.exists() {
        std::fs::copy(lab::spokeguard().unwrap(), &program).unwrap();
    }
    lab.spoke.sh(&format!("chmod -R a+rX {}", lab.dir.display())).unwrap();
    format!(
        "exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all{capabilities} --ambient-caps=-all{capabilities} \
         {} check {options} {}",
        program.display(),
        guard.flags().join(" ")
    )
}

#[test]
fn without_the_right_to_ebpf_the_counters_are_unproven_and_the_rest_is_known() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let _sshd = sshd(&lab, &["10.84.0.16", "fd84::16"]);
    let policy = plain_policy(&lab);
    // A daemon pins the counters, and its table outlives it.
    let mut daemon = lab.spoke.daemon(&policy).unwrap();
    daemon.kill_9().unwrap();
    guard.write(&policy);
    is_right(&guard, "with counters");
    // The pins are root's, and the rules can be read: one control is unproven and the other is not.
    let script = as_nobody(&lab, &guard, ",+net_admin", "--format json");
    let seen = Seen::of(&lab.spoke.run(&["sh", "-c", &script]).unwrap());
    let unproven: Vec<String> =
        seen.list().into_iter().filter(|line| line.starts_with("control-unproven")).collect();
    assert_eq!(
        unproven,
        ["control-unproven control binds", "control-unproven control counters"],
        "{:#}",
        seen.document
    );
    assert_eq!(seen.code, 2);
    let facets: BTreeSet<&str> =
        seen.document["blind"].as_array().unwrap().iter().map(|gap| gap["facet"].as_str().unwrap()).collect();
    assert!(facets.contains("counters") && !facets.contains("nftables"), "{:#}", seen.document);
}

#[test]
fn ten_thousand_rules_and_ten_thousand_listeners_are_all_read() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let _sshd = sshd(&lab, &["10.84.0.16", "fd84::16"]);
    guard.enforce(&plain_policy(&lab));
    // Few enough for each process that an ordinary limit of open files does.
    let listeners: Vec<_> = (0..20)
        .map(|n| lab.spoke.listen("many", &[&format!("tcp/0.0.0.0:{}+499", 20_000 + 500 * n)]).unwrap())
        .collect();
    let rules: String = (0..10_000)
        .map(|n| format!("ip saddr 192.0.{}.{} tcp dport {} drop\n", n / 250, n % 250, 1 + n))
        .collect();
    lab.spoke
        .nft(&format!("table inet many {{\nchain i {{\ntype filter hook input priority 5\n{rules}}}\n}}"))
        .unwrap();
    let started = Instant::now();
    let words: Vec<String> = [lab::spokeguard().unwrap().display().to_string()]
        .into_iter()
        .chain(["check", "--no-probe", "--format", "json"].map(String::from))
        .chain(guard.flags())
        .collect();
    let seen = Seen::of(&lab.spoke.run_within(Duration::from_secs(120), &words).unwrap());
    eprintln!("check took {:?}", started.elapsed());
    assert_eq!(seen.code, 1);
    let wide =
        seen.findings().iter().filter(|f| f["code"] == "listener-wide" && f["by"]["process"] == "many");
    assert_eq!(wide.count(), 10_000);
    assert_eq!(seen.list().len(), 10_000, "each of them once, and nothing else");
    // The last of the rules counts as much as the first.
    lab.spoke.nft("add rule inet many i tcp dport 443 drop").unwrap();
    drop(listeners);
    assert_eq!(
        check(&guard).list(),
        set(&["firewall-blocked https tcp/443 ipv4", "firewall-blocked https tcp/443 ipv6"])
    );
}
