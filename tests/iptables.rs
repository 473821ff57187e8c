//! Hosts whose firewall is written by iptables-nft, which nft prints in part only: `check` says of them what
//! nmap sees from outside, and is not in doubt where a rule can be read.

use std::collections::BTreeSet;
use std::net::IpAddr;

use lab::{CONTAINER, Lab, Mesh, Need, Outcome, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, Shape, lacking};
use serde_json::Value;

use crate::enforce::Guard;

const PORTS: &str = "80,443,5432,6379,8080,9090";

/// What nmap calls open.
type Ports = BTreeSet<(IpAddr, u16)>;

struct Host<'a> {
    lab: &'a Lab,
    guard: Guard<'a>,
}

impl Host<'_> {
    /// What sockets and rules say: the probe would decide where they leave a doubt.
    fn check_without_probe(&self) -> (Outcome, Value) {
        let outcome = self.guard.run(&["check", "--no-probe", "--format", "json"]);
        let document = outcome.json().unwrap();
        (outcome, document)
    }

    fn check(&self) -> (Outcome, Value) {
        let outcome = self.guard.run(&["check", "--format", "json"]);
        let document = outcome.json().unwrap();
        (outcome, document)
    }

    /// Subjects of the findings with this code.
    fn found(document: &Value, code: &str) -> BTreeSet<String> {
        let findings = document["findings"].as_array().unwrap().iter().filter(|f| f["code"] == code);
        findings.map(|f| f["subject"].as_str().unwrap().to_owned()).collect()
    }

    fn open(&self) -> Ports {
        let each = |to: IpAddr| {
            let open = self.lab.internet.nmap_open(to, PORTS).unwrap();
            open.into_iter().map(move |port| (to, port))
        };
        [SPOKE_PUBLIC, SPOKE_PUBLIC_V6].into_iter().flat_map(each).collect()
    }

    /// What is open by nmap is what `check` says is open, on either family, and nothing is in doubt.
    /// Returns the document.
    #[track_caller]
    fn is_told_as_it_is(&self, host: &str) -> Value {
        let (outcome, document) = self.check();
        assert_ne!(outcome.code, Some(2), "{host}: {document:#}");
        assert_eq!(document["blind"], serde_json::json!([]), "{host}");
        let open = self.open();
        let family = |to: IpAddr| if to.is_ipv4() { "ipv4" } else { "ipv6" };
        // The two that the policy wants: blocked is what nmap does not reach.
        let each = |to| [(to, "http", 80), (to, "https", 443)];
        let blocked: BTreeSet<String> = [SPOKE_PUBLIC, SPOKE_PUBLIC_V6]
            .into_iter()
            .flat_map(each)
            .filter(|(to, _, port)| !open.contains(&(*to, *port)))
            .map(|(to, name, port)| format!("{name} tcp/{port} {}", family(to)))
            .collect();
        assert_eq!(Self::found(&document, "firewall-blocked"), blocked, "{host}: {document:#}");
        // The two that it does not, each on one family.
        let exposed: BTreeSet<String> =
            [("tcp/0.0.0.0:5432", SPOKE_PUBLIC, 5432), ("tcp/[::]:6379", SPOKE_PUBLIC_V6, 6379)]
                .into_iter()
                .filter(|(_, to, port)| open.contains(&(*to, *port)))
                .map(|(subject, ..)| subject.to_owned())
                .collect();
        assert_eq!(Self::found(&document, "listener-exposed"), exposed, "{host}: {document:#}");
        // What is published to the container, and let through to it.
        let published = document["findings"].as_array().unwrap().iter().any(|f| {
            f["code"] == "dnat-exposed"
                && f["subject"] == format!("tcp/8080 -> {CONTAINER}:8000")
                && f["severity"] == "critical"
        });
        assert_eq!(published, open.contains(&(SPOKE_PUBLIC, 8080)), "{host}: {document:#}");
        document
    }

    /// Loads what iptables-save would print, into empty tables.
    #[track_caller]
    fn load(&self, v4: &str, v6: &str) {
        self.lab.spoke.nft("flush ruleset").unwrap();
        for (program, rules) in [("iptables-nft-restore", v4), ("ip6tables-nft-restore", v6)] {
            if !rules.is_empty() {
                let file = self.lab.file("rules", rules).unwrap();
                self.lab.spoke.sh(&format!("{program} < {}", file.display())).unwrap();
            }
        }
    }
}

/// ufw keeps its rules below /etc; the node gets a copy of its own.
const UFW: &str = "
    for folder in ufw default; do
        cp -r /etc/$folder $DIR/$folder
        mount --bind $DIR/$folder /etc/$folder
    done
    sed -i 's/^IPV6=.*/IPV6=yes/' /etc/default/ufw
    ufw default deny incoming
    ufw allow 80/tcp
    ufw limit 443/tcp
    ufw allow in on wg0
    ufw --force enable";

/// As Docker 24 writes it, with one port published.
const DOCKER: &str = "*raw
:PREROUTING ACCEPT [0:0]
-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 8000 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:8000
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 8000 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
";

/// fail2ban's chains, kube-proxy's marks, Tailscale's, and knocks on a port.
const MIXED: &str = "*mangle
:PREROUTING ACCEPT [0:0]
-A PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j CONNMARK --restore-mark --nfmask 0xff0000 --ctmask 0xff0000
-A PREROUTING -p tcp -m tcp --dport 5432 -j MARK --set-xmark 0x8000/0x8000
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.0.0.1:6443
-A KUBE-SERVICES -m addrtype ! --dst-type LOCAL -j RETURN
COMMIT
*filter
:INPUT DROP [0:0]
:f2b-sshd - [0:0]
:ts-input - [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -j ts-input
-A INPUT -p tcp -m multiport --dports 22,2222 -j f2b-sshd
-A INPUT -j KUBE-FIREWALL
-A INPUT -i lo -j ACCEPT
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -i wg0 -j ACCEPT
-A INPUT -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A INPUT -p tcp -m multiport --dports 80,5000:6000 -m conntrack --ctstate NEW -j ACCEPT
-A INPUT -p tcp -m conntrack --ctstate NEW --ctorigdstport 443 --ctdir ORIGINAL -j REJECT --reject-with tcp-reset
-A INPUT -m limit --limit 3/min -j LOG --log-prefix \"dropped: \"
-A f2b-sshd -s 192.0.2.13/32 -j REJECT --reject-with icmp-port-unreachable
-A f2b-sshd -j RETURN
-A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP
-A ts-input -i tailscale0 -j ACCEPT
-A KUBE-FIREWALL -m comment --comment \"marked for dropping\" -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
";

/// As NixOS writes it, with 443 forgotten.
const NIXOS: &str = "*mangle
:PREROUTING ACCEPT [0:0]
:nixos-fw-rpfilter - [0:0]
-A PREROUTING -j nixos-fw-rpfilter
-A nixos-fw-rpfilter -m rpfilter --validmark --loose -j RETURN
-A nixos-fw-rpfilter -j DROP
COMMIT
*filter
:INPUT ACCEPT [0:0]
:nixos-fw - [0:0]
:nixos-fw-accept - [0:0]
:nixos-fw-log-refuse - [0:0]
:nixos-fw-refuse - [0:0]
-A INPUT -j nixos-fw
-A nixos-fw -i lo -j nixos-fw-accept
-A nixos-fw -i wg0 -j nixos-fw-accept
-A nixos-fw -m conntrack --ctstate RELATED,ESTABLISHED -j nixos-fw-accept
-A nixos-fw -p tcp -m tcp --dport 80 -j nixos-fw-accept
-A nixos-fw -p tcp -m tcp --dport 6379 -j nixos-fw-accept
-A nixos-fw -j nixos-fw-log-refuse
-A nixos-fw-accept -j ACCEPT
-A nixos-fw-log-refuse -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j LOG --log-prefix \"refused connection: \" --log-level 6
-A nixos-fw-log-refuse -m pkttype ! --pkt-type unicast -j nixos-fw-refuse
-A nixos-fw-log-refuse -j nixos-fw-refuse
-A nixos-fw-refuse -j DROP
COMMIT
";

#[test]
fn hosts_of_iptables_are_told_as_nmap_sees_them() {
    if lacking(&[Need::Lab, Need::Sshd, Need::Nmap, Need::Iptables, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::shaped(Shape { mesh: Mesh::Plain, container: true });
    let host = Host { guard: Guard::new(&lab, &lab.spoke), lab: &lab };
    let policy = lab.policy().replace("kind = \"wireguard\"", "kind = \"tailscale\"");
    host.guard.write(&(policy.replace("keepalive = \"25s\"\n", "") + "[enforce]\nfirewall = false\n"));
    let _sshd = lab.spoke.sshd(22, &["10.84.0.16", "fd84::16"], "KbdInteractiveAuthentication no").unwrap();
    let _web = lab.spoke.web().unwrap();
    let _inner = lab.spoke.listen("postgres", &["tcp/0.0.0.0:5432", "tcp/[::]:6379"]).unwrap();
    let _published =
        lab.container.as_ref().unwrap().listen("app", &[&format!("web/{CONTAINER}:8000")]).unwrap();

    let document = host.is_told_as_it_is("no firewall");
    assert_eq!(Host::found(&document, "listener-exposed").len(), 2);

    lab.spoke.sh(&UFW.replace("$DIR", &lab.dir.display().to_string())).unwrap();
    let document = host.is_told_as_it_is("ufw");
    assert_eq!(Host::found(&document, "firewall-blocked").len(), 0, "{document:#}");
    assert_eq!(Host::found(&document, "listener-wide").len(), 2, "{document:#}");
    lab.spoke
        .sh("ufw delete limit 443/tcp; ufw reject 443/tcp; ufw allow proto tcp to any port 5000:6000")
        .unwrap();
    let document = host.is_told_as_it_is("ufw that rejects 443");
    assert_eq!(Host::found(&document, "firewall-blocked").len(), 2, "{document:#}");
    assert_eq!(Host::found(&document, "listener-exposed"), BTreeSet::from(["tcp/0.0.0.0:5432".into()]));
    lab.spoke.sh("ufw --force disable").unwrap();

    host.load(DOCKER, "");
    let document = host.is_told_as_it_is("Docker");
    let published = Host::found(&document, "dnat-exposed");
    assert_eq!(published, BTreeSet::from(["tcp/8080 -> 172.17.0.2:8000".into()]), "{document:#}");
    // The same, with nobody to let it through.
    host.load(
        &DOCKER.replace("172.17.0.2/32 ! -i docker0 -o docker0", "172.17.0.3/32 ! -i docker0 -o docker0"),
        "",
    );
    let document = host.is_told_as_it_is("Docker whose filter does not let through");
    assert!(Host::found(&document, "firewall-blocked").is_empty());

    host.load(MIXED, "");
    let document = host.is_told_as_it_is("fail2ban, kube-proxy and Tailscale");
    assert_eq!(Host::found(&document, "firewall-blocked"), BTreeSet::from(["https tcp/443 ipv4".into()]));
    assert_eq!(Host::found(&document, "listener-exposed"), BTreeSet::from(["tcp/[::]:6379".into()]));

    let neighbours = "-A nixos-fw -p ipv6-icmp -m icmp6 --icmpv6-type 137 -j DROP\n-A nixos-fw -p ipv6-icmp -j nixos-fw-accept\n";
    let last = "-A nixos-fw -j nixos-fw-log-refuse\n";
    host.load(NIXOS, &NIXOS.replace(last, &(neighbours.to_owned() + last)));
    let document = host.is_told_as_it_is("NixOS");
    assert_eq!(Host::found(&document, "firewall-blocked").len(), 2);

    // A match that is not understood leaves a doubt, with its name.
    host.load("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 80 -m string --string x --algo bm -j DROP\nCOMMIT\n", "");
    let (outcome, document) = host.check_without_probe();
    assert_eq!(outcome.code, Some(2), "{document:#}");
    let text = document["blind"].to_string();
    assert!(text.contains("iptables' `-m string`") && text.contains("80"), "{text}");

    // Rules that nftables knows nothing of: a policy is read, a rule is a doubt. Newer kernels may lack them.
    host.load("", "");
    if lab.spoke.run(&["ip6tables-legacy", "-S"]).unwrap().code != Some(0) {
        eprintln!("skipped: this kernel has no iptables-legacy");
        return;
    }
    lab.spoke.sh("iptables-legacy -P INPUT DROP; iptables-legacy -P INPUT ACCEPT; ip6tables-legacy -P FORWARD DROP").unwrap();
    host.is_told_as_it_is("tables of iptables-legacy without rules");
    lab.spoke.sh("ip6tables-legacy -A INPUT -p tcp --dport 80 -j DROP").unwrap();
    let (outcome, document) = host.check_without_probe();
    assert_eq!(outcome.code, Some(2), "{document:#}");
    let text = document["blind"].to_string();
    assert!(text.contains("iptables-legacy in filter INPUT") && text.contains("ipv6"), "{text}");
    assert!(!text.contains("ipv4"), "{text}");
}
