//! Three opinions on every port: who listens, what the rules say, and what a probe from outside met. Told
//! once where they agree, and all three where they do not.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::{
    Answer, CONTAINER, Lab, Mesh, Need, Outcome, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, lacking, wait_until,
};
use serde_json::Value;

use crate::daemon::{LONG, SHORT, UNGUARDED, findings, plain_policy, status};
use crate::enforce::Guard;
use crate::metrics::{fresh, sum};

fn list(document: &Value) -> BTreeSet<String> {
    let all = document["findings"].as_array().unwrap().iter();
    all.map(|f| format!("{} {}", f["code"].as_str().unwrap(), f["subject"].as_str().unwrap())).collect()
}

fn facets(document: &Value) -> BTreeSet<&str> {
    document["blind"].as_array().unwrap().iter().map(|blind| blind["facet"].as_str().unwrap()).collect()
}

/// Exit code and document of a check.
fn check(guard: &Guard, more: &[&str]) -> (i32, Value) {
    let outcome: Outcome = guard.run(&[&["check", "--format", "json"], more].concat());
    (outcome.code.unwrap(), outcome.json().unwrap())
}

fn with(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(|word| word.to_string()).collect()
}

/// Policy routing that swallows what strangers send to port 80.
fn blackhole(family: &str) -> String {
    format!(
        "ip {family} rule add pref 1000 lookup local
         ip {family} rule del pref 0
         ip {family} rule add pref 10 iif eth0 ipproto tcp dport 80 blackhole"
    )
}

#[test]
fn check_puts_three_opinions_side_by_side() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let guard = Guard::new(&lab, &lab.spoke);
    let plain = plain_policy(&lab);
    let policy = plain.clone() + UNGUARDED;
    let _sshd = lab.spoke.sshd(22, &["10.84.0.16", "fd84::16"], "KbdInteractiveAuthentication no").unwrap();
    let _web = lab.spoke.web().unwrap();
    let _database = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432"]).unwrap();
    let _inside = lab.container.as_ref().unwrap().listen("app", &["tcp/0.0.0.0:8000"]).unwrap();
    // They agree that the rules hold what listens too widely, and that the web is open.
    guard.enforce(&policy);
    let (code, document) = check(&guard, &[]);
    assert_eq!((code, list(&document)), (1, with(&["listener-wide tcp/0.0.0.0:5432"])), "{document:#}");

    // Something takes packets away of which no socket and no rule of a firewall tells.
    lab.spoke.sh(&blackhole("-4")).unwrap();
    let web = SocketAddr::new(SPOKE_PUBLIC, 80);
    assert_eq!(lab.internet.connect(web, SHORT), Answer::Silent);
    let (code, document) = check(&guard, &[]);
    let shut = format!("proof-disagrees tcp/{web}");
    assert_eq!(
        (code, list(&document)),
        (1, with(&[&shut, "listener-wide tcp/0.0.0.0:5432"])),
        "{document:#}"
    );
    let found = &findings(&document, "proof-disagrees")[0];
    assert_eq!((&found["severity"], &found["by"]["process"]), (&"high".into(), &"web".into()), "{found:#}");
    let text = found["found"].as_str().unwrap();
    for opinion in
        ["sockets: web listens on [::]:80; ", "rules: let it in; ", "probe: is dropped through eth0"]
    {
        assert!(text.contains(opinion), "{opinion:?} in {text}");
    }
    let (code, document) = check(&guard, &["--no-probe"]);
    assert_eq!((code, list(&document)), (1, with(&["listener-wide tcp/0.0.0.0:5432"])), "nobody asked");
    assert!(guard.says(1, &["check", "--no-probe"]).contains("Not probed from outside (--no-probe)"));
    lab.spoke.sh("ip -4 rule del pref 10").unwrap();

    // Without rules of ours it is open, and that is told once: the probe agrees.
    guard.says(0, &["release"]);
    guard.write(&plain.replace("[ssh]", "[enforce]\nfirewall = false\nbinds = false\n[ssh]"));
    let about = |document: &Value, port: &str| -> BTreeSet<String> {
        list(document).into_iter().filter(|line| line.contains(port)).collect()
    };
    let (_, document) = check(&guard, &[]);
    assert_eq!(about(&document, ":5432"), with(&["listener-exposed tcp/0.0.0.0:5432"]), "{document:#}");
    assert!(findings(&document, "audit-exposed").is_empty(), "{document:#}");

    // A redirect whose target nobody can read off the rules: the probe finds where it leads.
    lab.spoke
        .nft(&format!(
            "table ip t {{ map m {{ type inet_service : ipv4_addr . inet_service; elements = {{ 8080 : \
             {CONTAINER} . 8000 }}; }};
             chain n {{ type nat hook prerouting priority dstnat; dnat to tcp dport map @m; }}; }}"
        ))
        .unwrap();
    let hidden = SocketAddr::new(SPOKE_PUBLIC, 8080);
    assert_eq!(lab.internet.connect(hidden, SHORT), Answer::Open, "the map leads to the container");
    let (_, document) = check(&guard, &["--no-probe"]);
    let any_port = "dnat-exposed tcp/1-65535 -> somewhere that nft does not print";
    assert!(list(&document).contains(any_port), "{document:#}");
    let (code, document) = check(&guard, &[]);
    // By docker0 as well: no [[local]] says that it is not public.
    let told = [format!("audit-exposed tcp/{hidden}"), "audit-exposed tcp/172.17.0.1:8080".to_owned()];
    assert_eq!(about(&document, ":8080"), told.into(), "{document:#}");
    let all = findings(&document, "audit-exposed");
    let found = all.iter().find(|f| f["subject"] == format!("tcp/{hidden}")).unwrap();
    assert!(
        found["found"].as_str().unwrap().contains(&format!("probe: is sent on to {CONTAINER}:8000")),
        "{found:#}"
    );
    assert_eq!(code, 1);
    assert!(findings(&document, "dnat-exposed").is_empty(), "told once: {document:#}");
    lab.spoke.nft("delete table ip t").unwrap();

    // A match of which the rules say nothing that we understand: the probe decides as well.
    lab.spoke
        .nft("table inet t { chain i { type filter hook input priority -200; tcp dport 443 meta cpu >= 0 accept; \
              tcp dport 443 drop; }; }")
        .unwrap();
    let (code, document) = check(&guard, &["--no-probe"]);
    assert!(code == 2 && facets(&document).contains("nftables"), "{document:#}");
    let (code, document) = check(&guard, &[]);
    assert!(code == 1 && !facets(&document).contains("nftables"), "{document:#}");
    assert!(about(&document, "443").is_empty(), "{document:#}");

    // Who may not probe says so, and does not call it fine.
    let words: Vec<String> =
        ["setpriv", "--bounding-set=-bpf,-sys_admin,-perfmon", "--inh-caps=-bpf,-sys_admin,-perfmon"]
            .into_iter()
            .map(String::from)
            .chain([lab::spokeguard().unwrap().display().to_string()])
            .chain(["check", "--format", "json"].map(String::from))
            .chain(guard.flags())
            .collect();
    let outcome = lab.spoke.run(&words).unwrap();
    let document = outcome.json().unwrap();
    assert_eq!(outcome.code, Some(2), "{}", outcome.all());
    let blind = document["blind"].as_array().unwrap().iter().find(|blind| blind["facet"] == "audit");
    let reason = blind.unwrap_or_else(|| panic!("{document:#}"))["reason"].as_str().unwrap();
    assert!(reason.contains("CAP_") && reason.contains("what the rules say, unproven"), "{reason}");

    // Nowhere a stranger could come from: nothing to ask, which is no blindness.
    lab.spoke.sh("ip link set eth0 down").unwrap();
    let (_, document) = check(&guard, &[]);
    assert!(!facets(&document).contains("audit"), "{document:#}");
}

#[test]
fn the_daemon_asks_from_outside_when_something_changes_and_not_all_the_time() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let _web = lab.spoke.web().unwrap();
    let policy = plain_policy(&lab).replace("[ssh]", "[enforce]\nfirewall = false\nbinds = false\n[ssh]");
    let daemon = lab.spoke.daemon(&policy).unwrap();
    let now = || status(&lab.spoke, &daemon);
    let exposed =
        |family: &str| sum(&fresh(&lab.hub), "audit_exposed_ports", &[("family", family), ("proto", "tcp")]);
    let log = || daemon.running.log();
    let until = |what: &str, done: &dyn Fn() -> bool| {
        wait_until(3 * LONG, what, || done().then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", log()));
    };

    until("the first audit", &|| !now()["daemon"]["audit"].is_null());
    let first = now()["daemon"]["audit"].clone();
    assert!(first["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{first}");
    until("its metrics", &|| fresh(&lab.hub).contains("spokeguard_audit_age_seconds"));
    // Without rules of ours the web and our metrics answer on the mesh address as well.
    let leaks = (3.0, 3.0);
    assert_eq!((exposed("ipv4"), exposed("ipv6")), leaks);
    assert!(findings(&now(), "audit-exposed").is_empty(), "which mesh-leak tells: {:#}", now());
    assert!(sum(&fresh(&lab.hub), "audit_age_seconds", &[]) < 20.0);
    assert_eq!(sum(&fresh(&lab.hub), "blind", &[("facet", "audit")]), 0.0, "with what the daemon may do");

    // Nothing changes: it looks at every tick of its own, and no more often than that. Whoever begins to listen
    // anywhere on this machine wakes it as well, and other tests do: so it is to be quiet once for as long as this.
    let looks = || now()["daemon"]["cycle"].as_u64().unwrap();
    wait_until(6 * LONG, "5 s of nothing, with two looks at most", || {
        let from = looks();
        crate::daemon::over(Duration::from_secs(5));
        (looks() <= from + 2).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", log()));
    assert_eq!(now()["daemon"]["audit"], first, "and no whole audit");

    // A new listener is a new exposure, as the metric says too.
    let _database = lab.spoke.listen("postgres", &["tcp/[::]:5432"]).unwrap();
    until("the finding", &|| !findings(&now(), "listener-exposed").is_empty());
    until("the metric", &|| (exposed("ipv4"), exposed("ipv6")) == (5.0, 5.0));
    assert!(findings(&now(), "audit-exposed").is_empty(), "told once");

    // Another one is put in front of it by rules.
    lab.spoke
        .nft("table ip t { chain n { type nat hook prerouting priority dstnat; tcp dport 6000 redirect to :5432; }; }")
        .unwrap();
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 6000), SHORT), Answer::Open);
    until("the redirect in the metric", &|| exposed("ipv4") == 7.0);
    assert_eq!(exposed("ipv6"), 5.0);
    let disagree = || sum(&fresh(&lab.hub), "audit_disagreements", &[]);
    assert_eq!(disagree(), 0.0);

    // And what no rule shows, which announces itself by no event, is found by the next audit of any kind.
    lab.spoke.sh(&[blackhole("-4"), blackhole("-6")].join("\n")).unwrap();
    assert_eq!(lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 80), SHORT), Answer::Silent);
    let _another = lab.spoke.listen("another", &["tcp/0.0.0.0:5433"]).unwrap();
    until("it is shut", &|| {
        let shut: BTreeSet<String> = list(&now());
        [SPOKE_PUBLIC, SPOKE_PUBLIC_V6].iter().all(|address: &IpAddr| {
            shut.contains(&format!("proof-disagrees tcp/{}", SocketAddr::new(*address, 80)))
        })
    });
    assert!(disagree() >= 2.0);
}
