//! `fleet` on files: the examples, what rendering does to a directory, keys, bundles.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lab::{Need, lacking};

const FLEET: &str = include_str!("cases/fleet-render/fleet.toml");

/// A directory with an inventory in it.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new(text: &str) -> Self {
        let desk = Self(tempfile::tempdir().unwrap());
        desk.write("fleet.toml", text);
        desk
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), text).unwrap();
    }

    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(lab::spokeguard().unwrap());
        command
            .arg("fleet")
            .args(words.split(' '))
            .current_dir(self.0.path())
            .env_remove("SPOKEGUARD_POLICY");
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, words: &str) -> Output {
        self.command(words).output().unwrap()
    }

    /// Its standard output; the exit code is the one given.
    fn said(&self, words: &str, code: i32) -> String {
        let output = self.run(words);
        let (out, errors) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "fleet {words}\n{out}{errors}");
        if code == 2 { errors } else { out }
    }

    /// Path below the rendered directory, and what is there; a link's target for a link.
    fn rendered(&self) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        let root = self.at("rendered");
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().map(|entry| entry.unwrap().path()) {
                if entry.is_symlink() {
                    let target = fs::read_link(&entry).unwrap().display().to_string();
                    out.insert(entry.strip_prefix(&root).unwrap().display().to_string(), target);
                } else if entry.is_dir() {
                    folders.push(entry);
                } else {
                    let text = fs::read_to_string(&entry).unwrap();
                    out.insert(entry.strip_prefix(&root).unwrap().display().to_string(), text);
                }
            }
        }
        out
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The example fleets, by name.
fn examples() -> Vec<(String, PathBuf)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fleets");
    let list = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let fleets = list.filter(|path| path.is_dir());
    let mut out: Vec<(String, PathBuf)> =
        fleets.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), path)).collect();
    out.sort();
    out
}

#[test]
fn every_example_fleet_is_right_and_so_is_every_policy_that_follows() {
    if lacking(&[Need::Spokeguard]) {
        return;
    }
    let sizes = [("devices", 3), ("edge", 5), ("pilot", 4), ("three", 3), ("vault", 21)];
    let found = examples();
    assert_eq!(found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), sizes.map(|(name, _)| name));
    for ((name, folder), (_, size)) in found.iter().zip(sizes) {
        let desk = Desk::new(&fs::read_to_string(folder.join("fleet.toml")).unwrap());
        desk.said("render", 0);
        let rendered = desk.rendered();
        let policies: Vec<&String> = rendered.keys().filter(|path| path.ends_with("/policy.toml")).collect();
        assert_eq!(policies.len(), size, "{name}");
        for path in policies {
            let check = Command::new(lab::spokeguard().unwrap())
                .args(["policy", "check", "--policy"])
                .arg(desk.at("rendered").join(path))
                .output()
                .unwrap();
            assert!(
                check.status.success() && check.stderr.is_empty(),
                "{name} {path}: {}",
                text(&check.stderr)
            );
        }
        // Nothing of a real fleet but its private addresses.
        let whole = rendered.values().cloned().collect::<String>();
        for real in ["185.218.", "82.22.", "91.99.", "vault1984", "clavitor", "pangolin"] {
            assert!(!whole.contains(real), "{name} has {real}");
        }
        // What is committed is what is rendered.
        if folder.join("rendered").exists() {
            let words = format!("render --check --inventory {}", folder.join("fleet.toml").display());
            desk.said(&words, 0);
        } else {
            assert_eq!(name, "vault");
        }
    }
}

#[test]
fn rendering_again_changes_what_changed_and_nothing_of_others() {
    if lacking(&[Need::Spokeguard]) {
        return;
    }
    let desk = Desk::new(FLEET);
    desk.said("render --check", 1);
    assert!(!desk.at("rendered").exists(), "--check writes nothing");
    desk.said("render", 0);
    let first = desk.rendered();
    desk.said("render --check", 0);
    let inode = |path: &str| fs::metadata(desk.at(path)).unwrap().ino();
    let before = [inode("rendered"), inode("rendered/nodes/zurich/policy.toml")];
    desk.said("render", 0);
    assert_eq!(before, [inode("rendered"), inode("rendered/nodes/zurich/policy.toml")], "nothing to change");

    // Files of others: beside ours, in a folder of their own, a link, and one where a node was.
    desk.write("rendered/notes.txt", "mine");
    desk.write("rendered/nodes/spoke/todo", "mine too");
    symlink("../fleet.toml", desk.at("rendered/nodes/link")).unwrap();
    let larger = FLEET.replace("\"spoke\"", "\"london\"").replace("[443]", "[80, 443]");
    desk.write("fleet.toml", &larger);
    let shown = desk.said("render --check", 1);
    for line in
        ["-tcp = [443]", "+tcp = [80, 443]", "--- nodes/spoke/policy.toml", "+++ nodes/london/policy.toml"]
    {
        assert!(shown.lines().any(|shown| shown == line), "{line}\n{shown}");
    }
    assert!(shown.ends_with("5 to add, 6 to change, 5 to remove: spokeguard fleet render\n"), "{shown}");
    let unchanged = desk.rendered();
    assert_eq!(unchanged.len(), first.len() + 3, "--check changed something");
    // One node alone: nothing is removed, nothing shared is written.
    desk.said("render zurich", 0);
    let one = desk.rendered();
    assert_ne!(one["nodes/zurich/policy.toml"], unchanged["nodes/zurich/policy.toml"]);
    assert_eq!(one["nix/nodes.json"], unchanged["nix/nodes.json"]);
    assert!(one.contains_key("nodes/spoke/policy.toml"));
    let said = desk.said("render", 0);
    assert!(
        said.contains("- nodes/spoke/policy.toml\n") && said.contains("5 added, 2 changed, 5 removed"),
        "{said}"
    );
    let second = desk.rendered();
    for (path, text) in
        [("notes.txt", "mine"), ("nodes/spoke/todo", "mine too"), ("nodes/link", "../fleet.toml")]
    {
        assert_eq!(second.get(path).map(String::as_str), Some(text), "{path}");
    }
    assert!(
        !second.contains_key("nodes/spoke/policy.toml") && second.contains_key("nodes/london/policy.toml")
    );
    assert_eq!(desk.rendered().len(), first.len() + 3);

    // One of others in the way: nothing at all is done.
    desk.write("fleet.toml", &larger.replace("\"london\"", "\"paris\""));
    desk.write("rendered/nodes/paris/policy.toml", "somebody's own");
    let before = desk.rendered();
    let said = desk.said("render", 2);
    assert!(said.contains("not written by us") && said.contains("nodes/paris/policy.toml"), "{said}");
    assert_eq!(desk.rendered(), before);
    assert_eq!(fs::read_dir(desk.0.path()).unwrap().count(), 2, "something is left over");

    // A mistake in the inventory: nothing is done either.
    desk.write("fleet.toml", "version = 1\n");
    desk.said("render", 2);
    assert_eq!(desk.rendered(), before);
}

#[test]
fn a_render_that_is_killed_leaves_the_old_files_or_the_new() {
    if lacking(&[Need::Spokeguard]) {
        return;
    }
    let hub = FLEET.split("[[node]]\nname = \"spoke\"").next().unwrap();
    let mut text = hub.to_owned();
    for i in 2..200u8 {
        // Any 32 bytes are a key.
        let digit = |n: u8| char::from(b'A' + n % 26);
        let key: String =
            [digit(i), digit(i / 26)].iter().chain(['A'; 41].iter()).chain(['='].iter()).collect();
        text +=
            &format!("[[node]]\nname = \"n{i}\"\nmesh_address = \"10.84.0.{i}\"\npublic_key = \"{key}\"\n");
    }
    let desk = Desk::new(&text);
    let start = Instant::now();
    desk.said("render", 0);
    let whole = start.elapsed();
    let old = desk.rendered();
    desk.write("fleet.toml", &text.replace("[443]", "[80, 443]"));
    let (mut killed, mut done) = (0, 0);
    for turn in 0..12u32 {
        let mut child = desk.command("render -q").stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(whole * turn / 10);
        let _ = child.kill();
        killed += u32::from(!child.wait().unwrap().success());
        let now = desk.rendered();
        let is_new = now["nodes/zurich/policy.toml"] != old["nodes/zurich/policy.toml"];
        assert_eq!(now.len(), old.len(), "turn {turn}");
        let mixed = now
            .iter()
            .filter(|(path, text)| path.ends_with("policy.toml") && (old[*path] != **text) != is_new);
        assert_eq!(mixed.count(), 0, "turn {turn}: old and new");
        if is_new {
            // Back, by a render that finds what the killed one left.
            done += 1;
            desk.write("fleet.toml", &text);
            desk.said("render -q", 0);
            assert_eq!(desk.rendered(), old);
            desk.write("fleet.toml", &text.replace("[443]", "[80, 443]"));
        }
    }
    assert!(killed > 0 && done < 12, "{killed} killed, {done} done");
    desk.said("render -q", 0);
    desk.said("render --check -q", 0);
    let left: Vec<_> = fs::read_dir(desk.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn keygen_agrees_with_wg_and_keeps_the_private_half_to_one_file() {
    if lacking(&[Need::Spokeguard, Need::WireGuard]) {
        return;
    }
    let without =
        FLEET.replace("public_key = \"OJmUDn1Un9+kq0TYb5Qm7Uo3ZwjWbjio7hJdhKP3Uiw=\"\n", "# its key: soon\n");
    assert_ne!(without, FLEET);
    let desk = Desk::new(&without);
    fs::set_permissions(desk.at("fleet.toml"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("fleet.toml", desk.at("link.toml")).unwrap();
    let said = desk.said("check", 2);
    assert!(said.contains("fleet keygen spoke"), "{said}");
    // Nowhere to put it: nothing changes.
    desk.said("keygen spoke --private-key none/key", 2);
    assert_eq!(desk.read("fleet.toml"), without);

    let output = desk.run("keygen spoke --private-key key --inventory link.toml");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let private = desk.read("key");
    let public = pubkey(&private);
    assert_eq!(
        desk.read("fleet.toml"),
        without.replace("# its key", &format!("public_key = \"{public}\"\n# its key"))
    );
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(said.contains(&public) && !said.contains(private.trim()), "{said}");
    let mode = |path: &str| fs::symlink_metadata(desk.at(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("key"), mode("fleet.toml")), (0o600, 0o640));
    assert!(desk.at("link.toml").is_symlink());
    desk.said("check", 0);

    // Once there, only on request, and never over a file.
    desk.said("keygen spoke --private-key key2", 2);
    desk.said("keygen spoke --private-key key --replace", 2);
    assert_eq!((desk.read("key"), desk.at("key2").exists()), (private.clone(), false));
    let output = desk.run("keygen spoke --stdout --replace");
    let (other, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!((output.status.code(), other.len()), (Some(0), 45), "{said}");
    assert!(desk.read("fleet.toml").contains(&pubkey(&other)) && !desk.read("fleet.toml").contains(&public));
    assert!(!said.contains(other.trim()), "{said}");

    // A private half that somebody puts into the inventory is refused by every verb.
    desk.write("fleet.toml", &(desk.read("fleet.toml") + &format!("# {other}")));
    for verb in ["check", "render", "bundle spoke", "keygen zurich --stdout --replace"] {
        let said = desk.said(verb, 2);
        assert!(said.contains("private half") && !said.contains(other.trim()), "{verb}: {said}");
    }
    assert!(!desk.at("rendered").exists());
}

fn pubkey(private: &str) -> String {
    let mut wg =
        Command::new("wg").arg("pubkey").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    wg.stdin.take().unwrap().write_all(private.as_bytes()).unwrap();
    text(&wg.wait_with_output().unwrap().stdout).trim().to_owned()
}

#[test]
fn a_bundle_is_the_same_bytes_every_time_and_unpacks_to_what_was_rendered() {
    if lacking(&[Need::Spokeguard]) {
        return;
    }
    let desk = Desk::new(FLEET);
    desk.said("render", 0);
    desk.said("bundle spoke -o one.tar", 0);
    let start = Instant::now();
    // Another second, so that a time in it would show.
    while start.elapsed() < Duration::from_millis(1100) {
        std::thread::sleep(Duration::from_millis(100));
    }
    let piped = desk.run("bundle spoke").stdout;
    assert_eq!(fs::read(desk.at("one.tar")).unwrap(), piped);
    fs::create_dir(desk.at("node")).unwrap();
    let tar = Command::new("tar")
        .args(["xf", "one.tar", "-C", "node"])
        .current_dir(desk.0.path())
        .status()
        .unwrap();
    assert!(tar.success());
    for (inside, rendered) in [
        ("etc/spokeguard/policy.toml", "policy.toml"),
        ("wg-quick/etc/wireguard/wg0.conf", "wireguard.conf"),
        ("networkd/etc/systemd/network/60-wg0.netdev", "wireguard.netdev"),
        ("networkd/etc/systemd/network/60-wg0.network", "wireguard.network"),
        ("nix/wireguard.json", "wireguard.json"),
    ] {
        let inside = desk.read(&format!("node/spoke/{inside}"));
        assert_eq!(inside, desk.read(&format!("rendered/nodes/spoke/{rendered}")), "{rendered}");
    }
    let mode =
        fs::metadata(desk.at("node/spoke/wg-quick/etc/wireguard/wg0.conf")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    // Every file that is told of is there, and the other way round.
    assert!(desk.read("node/spoke/README.txt").contains("10.84.0.1 to 10.84.0.2, tcp 22"));
    // A policy that lets nobody in is not handed over.
    desk.write("fleet.toml", &format!("{FLEET}\n[node.ssh]\nfrom = [\"10.84.0.9/32\"]\n"));
    let said = desk.said("bundle spoke -o two.tar", 2);
    assert!(said.contains("can't administer"), "{said}");
    assert!(!desk.at("two.tar").exists());
}
