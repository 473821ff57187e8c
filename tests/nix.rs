//! The NixOS module, evaluated by Nix without NixOS: against the small lib and the stubs in
//! nix-module/tests, and once more (`--ignored`) against nixpkgs' own lib where `SPOKEGUARD_NIXPKGS_LIB` says where
//! that is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use lab::{Need, lacking};
use serde_json::{Value, json};

const SPOKES: usize = 20;
const CONTRIB: [&str; 3] = ["spokeguard", "spokeguard-boot", "spokeguard-shut"];
/// Where systemd puts the URL of Uptime Kuma, which NixOS passes on without it ever being in the store.
const KUMA_URL: &str = "/run/credentials/spokeguard.service/kuma-url";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Runs the evaluator without a store, so that nothing is built or fetched.
fn nix(arguments: &[&str]) -> Output {
    Command::new("nix-instantiate")
        .args(["--store", "dummy://"])
        .args(arguments)
        .current_dir(root().join("nix-module"))
        .env("NIX_CONFIG", "build-users-group =")
        .output()
        .unwrap()
}

/// What an attribute of nix-module/tests/evaluate.nix comes to.
fn evaluate(attribute: &str, lib: Option<&str>) -> Result<Value, String> {
    let mut words = vec!["--eval", "--strict", "--json", "tests/evaluate.nix", "-A", attribute];
    let import = lib.map(|lib| format!("import {lib}"));
    if let Some(import) = &import {
        words.extend(["--arg", "lib", import]);
    }
    let output = nix(&words);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        return Err(errors);
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("{error}: {errors}"))
}

fn fleet() -> &'static Value {
    static FLEET: OnceLock<Value> = OnceLock::new();
    FLEET.get_or_init(|| evaluate("fleet", None).unwrap())
}

fn cases() -> &'static Value {
    static CASES: OnceLock<Value> = OnceLock::new();
    CASES.get_or_init(|| evaluate("cases", None).unwrap())
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().unwrap().iter()
}

/// The policy as the module's generator would write it.
fn toml_of(policy: &Value) -> String {
    toml::to_string(policy).unwrap()
}

/// What the program says about a policy: its text, or its complaint.
fn spokeguard(verb: &str, policy: &str) -> Result<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.toml");
    fs::write(&file, policy).unwrap();
    let output = Command::new(lab::spokeguard().unwrap())
        .args(["policy", verb, "--policy"])
        .arg(&file)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(said) } else { Err(format!("{errors}\n{policy}")) }
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

#[test]
fn every_file_is_nix_and_the_scripts_in_it_are_python() {
    if lacking(&[Need::Nix]) {
        return;
    }
    let mut files = vec![root().join("flake.nix")];
    let mut folders = vec![root().join("nix-module")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "nix") {
                files.push(path);
            }
        }
    }
    assert!(files.len() > 12, "{files:?}");
    for file in &files {
        let parsed = nix(&["--parse", file.to_str().unwrap()]);
        assert!(parsed.status.success(), "{}", String::from_utf8_lossy(&parsed.stderr));
        let text = fs::read_to_string(file).unwrap();
        let untidy = |line: &&str| line.contains('\t') || line.ends_with(' ') || line.chars().count() > 110;
        let found: Vec<&str> = text.lines().filter(untidy).collect();
        assert!(found.is_empty(), "{}: tabs, trailing blanks or long lines: {found:#?}", file.display());
    }

    // Each node of the VM test is a right host, and its script a program.
    let test = evaluate("vmTest", None).unwrap();
    for (name, node) in entries(&test["nodes"]) {
        assert_eq!(node["errors"], json!([]), "{name}");
    }
    // nixpkgs' test keys come with a line's end.
    assert_eq!(test["nodes"]["hub"]["wireguard"]["wg0"]["peers"][0]["publicKey"], "B");
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script.py");
    fs::write(&script, test["testScript"].as_str().unwrap()).unwrap();
    let read = "import ast, sys; print(len(ast.parse(open(sys.argv[1]).read()).body))";
    let python = Command::new("python3").args(["-c", read]).arg(&script).output().unwrap();
    assert!(python.status.success(), "{}", String::from_utf8_lossy(&python.stderr));
    assert!(String::from_utf8_lossy(&python.stdout).trim().parse::<usize>().unwrap() > 10);
}

#[test]
fn twenty_spokes_and_their_hub_come_from_one_list() {
    if lacking(&[Need::Nix, Need::Spokeguard]) {
        return;
    }
    let fleet = fleet();
    assert_eq!(fleet.as_object().unwrap().len(), SPOKES + 1);
    let (mut addresses, mut keys) = (BTreeSet::new(), BTreeSet::new());
    for (name, host) in entries(fleet) {
        assert_eq!((&host["errors"], &host["warnings"]), (&json!([]), &json!([])), "{name}");
        let policy = &host["policy"];
        let said = spokeguard("check", &toml_of(policy)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(said.ends_with(&format!(": right, for {name}\n")), "{said}");

        let address = policy["mesh"]["address"][0].as_str().unwrap();
        assert!(addresses.insert(address), "{name}: {address} is another's, too");
        assert_eq!(host["wireguard"]["wg0"]["ips"], json!([format!("{address}/32")]), "{name}");
        assert_eq!(host["openssh"]["listenAddresses"], json!([{ "addr": address, "port": 22 }]), "{name}");
        assert_eq!(host["openssh"]["openFirewall"], false, "{name}");
        assert_eq!(host["openssh"]["settings"]["PasswordAuthentication"], false, "{name}");
        assert_eq!(host["firewall"]["allowedTCPPorts"], json!([80, 443]), "{name}");
        assert_eq!(host["nftables"]["enable"], true, "{name}");
        let services = &host["services"];
        let peers = host["wireguard"]["wg0"]["peers"].as_array().unwrap();
        if name == "zurich" {
            assert_eq!(host["firewall"]["allowedUDPPorts"], json!([51820]));
            assert_eq!(host["prometheus"]["listenAddress"], "127.0.0.1");
            assert_eq!(host["firewall"]["interfaces"]["wg0"]["allowedTCPPorts"], json!([22, 3001, 9984]));
            assert_eq!(
                (
                    peers.len(),
                    host["prometheus"]["scrapeConfigs"][0]["static_configs"].as_array().unwrap().len()
                ),
                (20, 20)
            );
            for peer in peers {
                let key = peer["publicKey"].as_str().unwrap();
                assert!(keys.insert(key), "{key} is another's, too");
                assert_eq!(peer["persistentKeepalive"], 25);
                let spoke = &fleet[peer["name"].as_str().unwrap()];
                assert_eq!(peer["allowedIPs"], spoke["wireguard"]["wg0"]["ips"]);
            }
            continue;
        }
        assert_eq!(host["firewall"]["allowedUDPPorts"], json!([]), "{name}");
        assert_eq!(host["firewall"]["interfaces"]["wg0"]["allowedTCPPorts"], json!([22, 9984]), "{name}");
        assert_eq!(peers.len(), 1, "{name}");
        assert_eq!(peers[0]["persistentKeepalive"], 25, "{name}");
        assert_eq!(peers[0]["endpoint"], "203.0.113.47:51820", "{name}");
        // The token's URL goes by file, from systemd to the daemon.
        let credentials = json!([format!("kuma-url:/etc/vault/kuma-{name}.url"), "ntfy-url"]);
        assert_eq!(services["spokeguard"]["serviceConfig"]["LoadCredential"], credentials);
        assert_eq!(policy["heartbeat"]["kuma_url_file"], KUMA_URL);
        let domain = format!("{name}.vault.example");
        assert_eq!(services["vault"]["environment"]["VAULT_DOMAIN"], domain);
        // Two generations, weekly.
        assert_eq!(host["gc"], json!({ "automatic": true, "dates": ["weekly"] }), "{name}");
        for loader in ["grub", "systemd-boot", "generic-extlinux-compatible"] {
            assert_eq!(host["loader"][loader]["configurationLimit"], 2, "{name}: {loader}");
        }
        let collect = services["nix-gc"]["serviceConfig"]["ExecStartPre"][0].as_str().unwrap();
        assert!(collect.ends_with("--delete-generations +2"), "{collect}");
    }
    assert_eq!((addresses.len(), keys.len()), (SPOKES + 1, SPOKES));
}

/// The inventory of the same fleet, in whose words other hosts get it: its variables make the same hosts as
/// the list in Nix, and the policies and tunnels of these are what `fleet render` writes.
#[test]
fn the_list_of_nodes_and_the_inventory_are_one_fleet() {
    if lacking(&[Need::Nix, Need::Spokeguard]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let render = Command::new(lab::spokeguard().unwrap())
        .args(["fleet", "render", "--inventory"])
        .arg(root().join("examples/fleets/vault/fleet.toml"))
        .arg("--out")
        .arg(folder.path())
        .output()
        .unwrap();
    assert!(render.status.success(), "{}", String::from_utf8_lossy(&render.stderr));
    let nodes = folder.path().join("nix/nodes.json");
    let expression = format!("(import ./tests/evaluate.nix {{ }}).rendered {}", nodes.display());
    let output = nix(&["--eval", "--strict", "--json", "-E", &expression]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rendered: Value = serde_json::from_slice(&output.stdout).unwrap();
    let names = |fleet: &Value| entries(fleet).map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&rendered), names(fleet()));

    for (name, host) in entries(fleet()) {
        for (what, ours) in entries(host) {
            assert_eq!(&rendered[name][what], ours, "{name}: {what} of nodes.json, and of nodes.nix");
        }
        let read =
            |file: &str| fs::read_to_string(folder.path().join("nodes").join(name).join(file)).unwrap();
        let mut policy = host["policy"].clone();
        // A push URL is a secret of its own node: the inventory has none, and NixOS says where systemd puts it.
        let url = policy["heartbeat"].as_object_mut().unwrap().remove("kuma_url_file");
        assert_eq!(url, (name != "zurich").then(|| json!(KUMA_URL)), "{name}");
        let ours = spokeguard("show", &toml_of(&policy)).unwrap();
        assert_eq!(ours, spokeguard("show", &read("policy.toml")).unwrap(), "{name}");

        let tunnels: Value = serde_json::from_str(&read("wireguard.json")).unwrap();
        let mut wanted = tunnels["interfaces"]["wg0"].clone();
        let mut tunnel = without_null(&host["wireguard"]["wg0"]);
        // The mesh's route comes with the peers here, and with the address there.
        let alone = |ips: &Value| texts(ips).iter().map(|ip| ip.replace("/24", "/32")).collect::<Vec<_>>();
        wanted["ips"] = json!(alone(&wanted["ips"]));
        // A spoke's module knows where its hub is, and not how it is called.
        if name != "zurich" {
            assert_eq!(tunnel["peers"][0]["name"], "hub");
            tunnel["peers"][0]["name"] = json!("zurich");
        }
        assert_eq!(tunnel, wanted, "{name}");
    }
}

fn without_null(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let said = map.iter().filter(|(_, value)| !value.is_null());
            said.map(|(key, value)| (key.clone(), without_null(value))).collect()
        }
        Value::Array(list) => list.iter().map(without_null).collect(),
        other => other.clone(),
    }
}

#[test]
fn contradictions_are_errors_and_what_is_unwise_is_said() {
    if lacking(&[Need::Nix, Need::Spokeguard]) {
        return;
    }
    let (mut right, mut wrong) = (0, 0);
    for (name, case) in entries(cases()) {
        let seen = &case["seen"];
        assert_eq!(seen["errors"], case["errors"], "{name}");
        assert_eq!(seen["warnings"], case["warnings"], "{name}");
        if !texts(&case["errors"]).is_empty() {
            wrong += 1;
            continue;
        }
        right += 1;
        // What passes here passes the program, too; but for what it alone knows.
        let refused = match name.as_str() {
            "keys-of-later-versions" => Some("unknown key `later`"),
            "nobody" => Some("`from` is empty"),
            _ => None,
        };
        match (spokeguard("check", &toml_of(&seen["policy"])), refused) {
            (Ok(_), None) => {}
            (Err(error), Some(why)) => assert!(error.contains(why), "{name}: {error}"),
            (checked, _) => panic!("{name}: {checked:?}"),
        }
    }
    assert!(right >= 40 && wrong >= 33, "{right} right, {wrong} wrong");
}

#[test]
fn what_has_the_wrong_type_stops_the_evaluation() {
    if lacking(&[Need::Nix]) {
        return;
    }
    const KEY: &str = "services.spokeguard.settings";
    let broken = [
        ("port-zero", "public.tcp.", "is not of type"),
        ("port-too-high", "metrics.port'", "is not of type"),
        ("port-as-text", "ssh.port'", "is not of type"),
        ("role", "node.role'", "is not of type"),
        ("keepalive", "mesh.keepalive'", "is not of type"),
        ("version", "version'", "is not of type"),
        ("bool", "enforce.binds'", "is not of type"),
        ("until", "exception.", "is not of type"),
        ("exception-key", "exception.", "does not exist"),
    ];
    for (name, key, why) in broken {
        let error = evaluate(&format!("broken.{name}"), None).unwrap_err();
        assert!(error.contains(&format!("option `{KEY}.{key}")) && error.contains(why), "{name}: {error}");
    }
    let error = evaluate("broken.url-of-a-path", None).unwrap_err();
    assert!(error.contains("option `services.spokeguard.kumaUrlFile' is not of type"), "{error}");
    let error = evaluate("broken.option", None).unwrap_err();
    assert!(error.contains("The option `services.spokeguard.polcy' does not exist"), "{error}");
}

#[test]
fn the_host_is_set_up_as_the_policy_says() {
    if lacking(&[Need::Nix]) {
        return;
    }
    let seen = |case: &str| &cases()[case]["seen"];
    // Peers that others declare, of the mesh and of nothing else.
    assert_eq!(seen("peers-of-others")["wireguard"]["wg0"]["peers"][0]["persistentKeepalive"], 25);
    assert_eq!(seen("wg-quick")["wgQuick"]["wg0"]["peers"][0]["persistentKeepalive"], 25);
    assert_eq!(seen("wg-quick")["wgQuick"]["wg1"]["peers"][0]["persistentKeepalive"], Value::Null);

    let both = seen("both-families");
    let listen = json!([{ "addr": "10.84.0.16", "port": 22 }, { "addr": "[fd84::16]", "port": 22 }]);
    assert_eq!(both["openssh"]["listenAddresses"], listen);
    assert_eq!(both["wireguard"]["wg0"]["ips"], json!(["10.84.0.16/32", "fd84::16/128"]));

    let firewall = &seen("by-interface")["firewall"];
    assert_eq!((&firewall["allowedTCPPorts"], &firewall["allowedUDPPorts"]), (&json!([]), &json!([])));
    let on = |name: &str, proto: &str| &firewall["interfaces"][name][proto];
    assert_eq!(on("eth0", "allowedTCPPorts"), &json!([80, 443]));
    assert_eq!(on("wg0", "allowedTCPPorts"), &json!([22, 9984, 19999]));
    for local in ["vmbr0", "docker*"] {
        assert_eq!(
            (on(local, "allowedTCPPorts"), on(local, "allowedUDPPorts")),
            (&json!([53]), &json!([53]))
        );
    }

    let rules = "ip saddr 198.51.100.0/24 tcp dport { 2222 } accept comment \"spokeguard: emergency-ssh\"\n\
                 ip6 saddr 2001:db8::/32 tcp dport { 2222 } accept comment \"spokeguard: emergency-ssh\"\n";
    assert_eq!(seen("exception")["firewall"]["extraInputRules"], rules);
    assert_eq!(seen("exception")["firewall"]["allowedTCPPorts"], json!([80, 443]));

    let outside = seen("ssh-from-outside");
    assert_eq!(outside["openssh"]["listenAddresses"][1], json!({ "addr": "203.0.113.5", "port": 22 }));
    let rules = outside["firewall"]["extraInputRules"].as_str().unwrap();
    let rule = "ip saddr 198.51.100.0/24 tcp dport { 22 } accept comment \"spokeguard: ssh\"\n";
    assert!(rules.contains(rule), "{rules}");

    for host in ["iptables", "iptables-by-backend"] {
        let iptables = &seen(host)["firewall"];
        assert_eq!(iptables["allowedTCPPorts"], json!([80, 443, 2222]), "{host}");
        assert_eq!(iptables["interfaces"]["docker+"]["allowedUDPPorts"], json!([53]), "{host}");
        assert_eq!(iptables["extraInputRules"], "", "{host}");
    }

    let sockets = seen("sockets");
    assert_eq!(sockets["sockets"]["sshd"]["socketConfig"]["FreeBind"], true);
    assert_eq!(sockets["services"]["sshd"], Value::Null);
    let sshd = &seen("plain")["services"]["sshd"];
    // As the drop-in elsewhere, but for what NixOS's sshd has no need of.
    let drop_in = unit_file(include_str!("../contrib/systemd/ssh.service.d/spokeguard.conf"));
    assert_eq!(drop_in.len(), 5, "{drop_in:#?}");
    for ((section, key), values) in drop_in {
        let given = match (section.as_str(), key.as_str()) {
            ("Unit", "After") => texts(&sshd["after"]).contains(&&*values[0]).then(|| values[0].clone()),
            (_, "RestartPreventExitStatus") => continue,
            (section, key) => {
                let value = &sshd[format!("{}Config", section.to_lowercase())][key];
                Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
            }
        };
        assert_eq!(given, Some(values.concat()), "{key}: {sshd:#}");
    }
    // A rebuild that makes the tunnel makes it before it restarts sshd. networkd's has no unit.
    assert_eq!(sshd["wants"], json!(["wireguard-wg0.service"]));
    assert!(texts(&sshd["after"]).contains(&"wireguard-wg0.service"), "{sshd}");
    for without in ["networkd", "wg-quick", "tailscale"] {
        let sshd = seen(without)["services"]["sshd"].to_string();
        assert!(sshd.contains("spokeguard-boot") && !sshd.contains("wireguard"), "{without}: {sshd}");
    }
    assert_eq!(seen("without-nix")["gc"]["automatic"], false);
    let before = texts(&seen("collected")["services"]["nix-gc"]["serviceConfig"]["ExecStartPre"]).len();
    assert_eq!(before, 2);
    assert_eq!(seen("old-state-version")["nftables"]["flushRuleset"], false);

    let urls = seen("urls");
    let credentials = json!(["kuma-url:/run/secrets/kuma", "ntfy-url:/run/secrets/ntfy"]);
    assert_eq!(urls["services"]["spokeguard"]["serviceConfig"]["LoadCredential"], credentials);
    assert!(!urls["policy"].to_string().contains("/run/secrets"), "{}", urls["policy"]);

    let paths = &seen("status-file")["services"]["spokeguard"]["serviceConfig"]["ReadWritePaths"];
    assert_eq!(paths, "-/sys/fs/bpf/spokeguard -/proc/sys/net -/srv/share");

    let alone = seen("unmanaged");
    assert_eq!(alone["openssh"]["listenAddresses"], json!([{ "addr": "10.84.0.16", "port": null }]));
    assert_eq!(seen("own-sshd")["openssh"]["enable"], false);
    assert_eq!((&alone["nftables"]["enable"], &alone["firewall"]["interfaces"]), (&json!(false), &json!({})));

    // What is said is passed on, also where it says "none".
    assert_eq!(seen("looking-on")["policy"]["mesh"]["keepalive"], "off");
    assert_eq!(seen("nobody")["policy"]["ssh"]["from"], json!([]));

    // The build asks the program about the very file that is put in place.
    let policy = &seen("plain")["etc"]["spokeguard/policy.toml"];
    let script = "spokeguard policy check --policy /nix/store/stub-spokeguard-policy.toml\n\
                  cp /nix/store/stub-spokeguard-policy.toml $out\n";
    assert_eq!(policy["script"], script);
    let trigger = &seen("plain")["services"]["spokeguard"]["reloadTriggers"];
    assert_eq!(trigger, &json!(["/nix/store/stub-spokeguard-policy-checked.toml"]));
}

#[test]
fn a_policy_file_means_the_same_to_the_module_and_to_the_program() {
    if lacking(&[Need::Nix, Need::Spokeguard]) {
        return;
    }
    for entry in fs::read_dir(root().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|end| end != "toml") {
            continue;
        }
        let expression = format!("((import ./tests/evaluate.nix {{ }}).file {}).policy", path.display());
        let output = nix(&["--eval", "--strict", "--json", "-E", &expression]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let policy: Value = serde_json::from_slice(&output.stdout).unwrap();
        let original = spokeguard("show", &fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(spokeguard("show", &toml_of(&policy)).unwrap(), original, "{}", path.display());
    }
}

/// A key that no table has makes the program tell those that it has.
const NONSENSE: &str = r#"
version = 1
nonsense = 1
node = { nonsense = 1 }
public = { nonsense = 1 }
ssh = { nonsense = 1 }
local = [{ nonsense = 1 }]
exception = [{ nonsense = 1 }]
file = [{ nonsense = 1 }]
enforce = { nonsense = 1 }
metrics = { nonsense = 1 }
heartbeat = { nonsense = 1 }
[mesh]
nonsense = 1
hub = { nonsense = 1 }
service = [{ nonsense = 1 }]
"#;

#[test]
fn every_key_of_the_policy_is_an_option() {
    if lacking(&[Need::Nix, Need::Spokeguard]) {
        return;
    }
    let complaint = spokeguard("check", NONSENSE).unwrap_err();
    let words = complaint.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut known = BTreeSet::new();
    for told in words.split("= help: ").filter(|help| help.contains(" knows ")) {
        let (table, keys) = told.split_once(" knows ").unwrap();
        let path = match (table, table.trim_matches(['[', ']'])) {
            ("the top of the file", _) => String::new(),
            (list, name) if list.starts_with("[[") => format!("{name}.*."),
            (_, name) => format!("{name}."),
        };
        // The next complaint follows the last key without a comma.
        let keys = keys.split(", ").map(|key| key.split(' ').next().unwrap_or_default());
        known.extend(keys.map(|key| format!("{path}{key}")));
    }
    let options = evaluate("options.settings", None).unwrap();
    let options: BTreeSet<&str> =
        options.as_array().unwrap().iter().map(|option| option["name"].as_str().unwrap()).collect();
    let tables = |key: &str| options.iter().any(|option| option.starts_with(&format!("{key}.")));
    let lacking: Vec<&String> =
        known.iter().filter(|key| !options.contains(key.as_str()) && !tables(key)).collect();
    assert!(known.len() > 55 && lacking.is_empty(), "{} keys; no option for {lacking:?}", known.len());
}

/// Section and key of a unit, and all its values.
type Unit = BTreeMap<(String, String), Vec<String>>;

/// The same words whoever wrote them: programs by their names, lists in order.
fn normal(key: &str, value: &str) -> String {
    let value = value.replace("/nix/store/stub-spokeguard-shut.nft", "/usr/lib/spokeguard/shut.nft");
    if key.starts_with("Exec") {
        let (program, rest) = value.split_once(' ').unwrap_or((&value, ""));
        let mark: String = program.chars().take_while(|c| "-+!@:".contains(*c)).collect();
        let name = program.rsplit('/').next().unwrap_or_default().trim_start_matches(['-', '+']);
        return format!("{mark}{name} {rest}");
    }
    match value.as_str() {
        "yes" => "true".to_owned(),
        "no" => "false".to_owned(),
        _ if ["After", "Before", "Wants", "Conflicts", "WantedBy"].contains(&key) => {
            value.split_whitespace().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(" ")
        }
        _ => value,
    }
}

fn unit_file(text: &str) -> Unit {
    let (mut unit, mut section) = (Unit::new(), String::new());
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        match line.split_once('=') {
            Some((key, value)) => {
                unit.entry((section.clone(), key.to_owned())).or_default().push(normal(key, value));
            }
            None => section = line.trim_matches(['[', ']']).to_owned(),
        }
    }
    unit
}

fn unit_of_nix(service: &Value) -> Unit {
    let mut unit = Unit::new();
    let mut put = |section: &str, key: &str, value: &Value| {
        let one =
            |value: &Value| normal(key, &value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        let values = value.as_array().map_or_else(|| vec![one(value)], |list| list.iter().map(one).collect());
        if !values.is_empty() {
            unit.insert((section.to_owned(), key.to_owned()), values);
        }
    };
    let words = |key: &str| json!(texts(&service[key]).join(" "));
    for (key, name) in [
        ("documentation", "Documentation"),
        ("after", "After"),
        ("before", "Before"),
        ("wants", "Wants"),
        ("conflicts", "Conflicts"),
    ] {
        if service[key] != json!([]) {
            put("Unit", name, &words(key));
        }
    }
    put("Unit", "Description", &service["description"]);
    if service["wantedBy"] != json!([]) {
        put("Install", "WantedBy", &words("wantedBy"));
    }
    entries(&service["unitConfig"]).for_each(|(key, value)| put("Unit", key, value));
    entries(&service["serviceConfig"]).for_each(|(key, value)| put("Service", key, value));
    unit
}

/// Every unit of `contrib/systemd` as a host has it, with nothing added, left out or said otherwise.
fn has_the_units_of_other_hosts(name: &str, host: &Value) {
    let contrib = CONTRIB.map(|unit| {
        let file = root().join(format!("contrib/systemd/{unit}.service"));
        (unit, unit_file(&fs::read_to_string(file).unwrap()))
    });
    for (unit, mut wanted) in contrib {
        assert!(wanted.len() > 20, "{wanted:#?}");
        let service = |key: &str| ("Service".to_owned(), key.to_owned());
        if unit == "spokeguard" {
            // What the host alone can say: the files of its URLs, and the folder that it may write to.
            let given = texts(&host["services"][unit]["serviceConfig"]["LoadCredential"]);
            for credential in wanted.get_mut(&service("LoadCredential")).unwrap() {
                let its_file = given.iter().find(|given| given.starts_with(&format!("{credential}:/")));
                *credential = its_file.map_or_else(|| credential.clone(), ToString::to_string);
            }
            if let Some(file) = host["policy"]["heartbeat"]["status_file"].as_str() {
                let folder = Path::new(file).parent().unwrap();
                wanted.get_mut(&service("ReadWritePaths")).unwrap()[0] += &format!(" -{}", folder.display());
            }
        }
        // NixOS makes that folder itself.
        wanted.remove(&service("ConfigurationDirectory"));
        // Each rebuild starts sysinit.target again: not over what the daemon has put in force.
        if unit == "spokeguard-boot" {
            let conditions = wanted.get_mut(&("Unit".to_owned(), "ConditionPathExists".to_owned())).unwrap();
            conditions.insert(0, "!/run/spokeguard".to_owned());
        }
        assert_eq!(unit_of_nix(&host["services"][unit]), wanted, "{name}: {unit}");
    }
    // Nothing of it is done again by a rebuild, and the daemon is replaced without a gap.
    assert_eq!(host["services"]["spokeguard-boot"]["restartIfChanged"], false, "{name}");
    assert_eq!(host["services"]["spokeguard-shut"]["restartIfChanged"], false, "{name}");
    assert_eq!(host["services"]["spokeguard"]["stopIfChanged"], false, "{name}");
}

#[test]
fn the_units_are_those_of_other_hosts() {
    if lacking(&[Need::Nix]) {
        return;
    }
    let cases = entries(cases()).map(|(name, case)| (name, &case["seen"]));
    let hosts: Vec<_> = entries(fleet()).chain(cases).collect();
    assert!(hosts.len() > SPOKES + 30, "{}", hosts.len());
    for (name, host) in hosts {
        has_the_units_of_other_hosts(name, host);
    }
}

#[test]
fn the_rules_that_shut_a_host_let_its_own_tunnel_in() {
    if lacking(&[Need::Nix, Need::Lab]) {
        return;
    }
    let expression = "(import ./tests/evaluate.nix { }).shut";
    let output = nix(&["--eval", "--strict", "--json", "-E", expression]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rules: String = serde_json::from_slice(&output.stdout).unwrap();
    assert!(rules.contains("\t\tiifname \"mesh7\" accept\n"), "{rules}");
    assert!(rules.contains("udp dport { 41641, 51820, 4500 } accept"), "{rules}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shut.nft");
    fs::write(&file, rules).unwrap();
    let nft = Command::new("unshare").args(["--net", "nft", "-c", "-f"]).arg(&file).output().unwrap();
    assert!(nft.status.success(), "{}", String::from_utf8_lossy(&nft.stderr));
}

#[test]
fn the_flake_gives_what_its_users_expect() {
    if lacking(&[Need::Nix]) {
        return;
    }
    let flake = evaluate("flake", None).unwrap();
    let outputs = ["checks", "devShells", "formatter", "nixosModules", "overlays", "packages"];
    assert_eq!(flake["outputs"], json!(outputs));
    assert_eq!(flake["formatter"], json!(["aarch64-linux", "x86_64-linux"]));
    assert_eq!((&flake["overlay"], &flake["vm"]), (&json!(true), &json!("spokeguard")));
    assert_eq!(flake["used"], "/nix/store/stub-spokeguard");
    let package = &flake["package"];
    assert_eq!(
        (&package["pname"], &package["version"]),
        (&json!("spokeguard"), &json!(env!("CARGO_PKG_VERSION")))
    );
    assert_eq!(package["meta"]["mainProgram"], "spokeguard");
    // The compiler is the one that the workspace asks for.
    let manifest: toml::Value =
        toml::from_str(&fs::read_to_string(root().join("Cargo.toml")).unwrap()).unwrap();
    let version = manifest["workspace"]["package"]["rust-version"].as_str().unwrap();
    let text = fs::read_to_string(root().join("flake.nix")).unwrap();
    assert!(text.contains(&format!("stable.\"{version}.0\"")), "rust-version is {version}");
    // Both folders of crates are configured by this name, and no other is found.
    assert_eq!(package["cargoDeps"], "/nix/store/arm64-cargo-vendor-dir");
    // A linker whose LLVM is older than the compiler's can't read what it writes.
    let inputs = texts(&package["nativeBuildInputs"]);
    assert!(inputs.contains(&"/nix/store/arm64-bpf-linker-llvmPackages_22"), "{package}");
    let shell = texts(&flake["shell"]);
    assert!(shell.contains(&"/nix/store/stub-bpf-linker-llvmPackages_22"), "{shell:?}");
    let compiler = Command::new("rustc").arg("-vV").output().unwrap();
    let compiler = String::from_utf8_lossy(&compiler.stdout);
    if compiler.contains(&format!("release: {version}.")) {
        assert!(
            compiler.contains("LLVM version: 22."),
            "flake.nix takes bpf-linker with LLVM 22: {compiler}"
        );
    }
}

/// A host's own program does not run on a machine of another kind that builds the host.
#[test]
fn a_build_for_another_kind_of_machine_checks_the_policy_or_says_that_it_does_not() {
    if lacking(&[Need::Nix]) {
        return;
    }
    let cross = evaluate("cross", None).unwrap();
    let checked = |policy: &Value, by: &str| {
        assert_eq!(policy["name"], "spokeguard-policy-checked.toml");
        assert!(policy["script"].as_str().unwrap().starts_with("spokeguard policy check --policy "));
        assert_eq!(policy["nativeBuildInputs"], json!([by]));
    };
    checked(&cases()["plain"]["seen"]["etc"]["spokeguard/policy.toml"], "/nix/store/stub-spokeguard");
    for name in ["overlay", "flake", "package"] {
        let host = &cross[name];
        assert_eq!((&host["errors"], &host["warnings"]), (&json!([]), &json!([])), "{name}");
        checked(&host["policy"], "/nix/store/stub-spokeguard");
        assert_eq!(host["run"], "/nix/store/arm64-spokeguard/bin/spokeguard run", "{name}");
    }
    // Nothing is left out in silence.
    let warning = "services.spokeguard: the policy is not checked by the build, whose machine has no spokeguard \
                   to run: set checkPackage to one for that machine, or checkPolicy = false";
    for (name, warnings) in [("unchecked", json!([warning])), ("unasked", json!([]))] {
        let host = &cross[name];
        assert_eq!((&host["errors"], &host["warnings"]), (&json!([]), &warnings), "{name}");
        assert_eq!(host["policy"]["name"], "spokeguard-policy.toml", "{name}");
    }
    let written = cross["written"].as_str().unwrap();
    for words in ["man --dir man", "completions $shell"] {
        assert!(written.contains(&format!("/nix/store/stub-spokeguard/bin/spokeguard {words}")), "{written}");
    }
    assert!(!written.contains("$out/bin"), "{written}");
}

#[test]
fn the_package_takes_objects_that_were_built_before() {
    if lacking(&[Need::Nix]) {
        return;
    }
    let given = evaluate("given", None).unwrap();
    let wanted = json!({
        "cargoDeps": "/nix/store/stub-vendor",
        "env": { "SPOKEGUARD_EBPF_OBJECTS": "/objects" },
        "nativeBuildInputs": ["/nix/store/stub-installShellFiles"],
    });
    assert_eq!(given, wanted);
    let error = evaluate("neither", None).unwrap_err();
    assert!(error.contains("give a Rust toolchain with rust-src (toolchain) or the eBPF objects"), "{error}");
}

const BEGIN: &str = "<!-- options: written by UPDATE_EXPECT=1 cargo xtask test -->\n";
const END: &str = "<!-- end of options -->\n";

#[test]
fn the_table_of_options_is_that_of_the_module() {
    if lacking(&[Need::Nix]) {
        return;
    }
    let options = evaluate("options", None).unwrap();
    let mut table = String::new();
    for (kind, title) in [("own", "services.spokeguard."), ("settings", "services.spokeguard.settings.")] {
        table += &format!("\n| `{title}` | default | |\n|---|---|---|\n");
        for option in options[kind].as_array().unwrap() {
            let text =
                |key: &str| option[key].as_str().unwrap_or_default().replace('|', "\\|").replace('\n', " ");
            let default = text("default");
            let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
            table += &format!("| `{}` | {default} | {} |\n", text("name"), text("description"));
        }
    }
    assert!(table.lines().count() > 60, "{table}");
    let file = root().join("nix-module/README.md");
    let readme = fs::read_to_string(&file).unwrap();
    let (before, rest) = readme.split_once(BEGIN).expect("the table's first mark");
    let (there, after) = rest.split_once(END).expect("the table's last mark");
    let wanted = format!("{table}\n");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&file, format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap();
        return;
    }
    assert!(there == wanted, "the options have changed: UPDATE_EXPECT=1 writes the table anew");
}

/// nixpkgs is on no machine by promise, not even after `cargo xtask setup`, whose tests run this where its lib is
/// named and say otherwise that they did not.
#[test]
#[ignore = "wants nixpkgs' own lib: SPOKEGUARD_NIXPKGS_LIB=DIR says where that is"]
fn the_small_lib_gives_what_nixpkgs_gives() {
    if lacking(&[Need::Nix]) {
        return;
    }
    let lib = std::env::var_os("SPOKEGUARD_NIXPKGS_LIB").expect("SPOKEGUARD_NIXPKGS_LIB names nixpkgs' lib");
    for attribute in ["fleet", "cases", "vmTest", "options", "shut", "flake", "cross", "given"] {
        let ours = evaluate(attribute, None).unwrap();
        let theirs = evaluate(attribute, Some(lib.to_str().unwrap())).unwrap();
        assert!(ours == theirs, "{attribute} differs");
    }
}
