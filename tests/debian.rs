//! The Debian package in a container.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use lab::{Lab, Machine, Need, lacking};

/// The package of the program under test, made once.
pub fn package() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let out = || Path::new(env!("CARGO_TARGET_TMPDIR")).join("package");
    MADE.get_or_init(|| lab::debian_package(&lab::spokeguard().unwrap(), &out()).unwrap()).clone()
}

#[test]
fn the_package_asks_nothing_breaks_nothing_and_leaves_what_it_says() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn, Need::Debian]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::new(&lab);
    machine.forget_packages();
    machine.boot();
    machine.stands_its_package(&package(), None);
    machine.cut_power();
    machine.boots_and_loses_its_package();
    machine.cut_power();
    machine.boots_without_its_package();
}

#[test]
fn the_package_has_a_page_for_every_verb() {
    const FOLDER: &str = "./usr/share/man/man1/";
    if lacking(&[Need::Spokeguard, Need::Debian]) {
        return;
    }
    let program = lab::spokeguard().unwrap();
    let output = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    // As their users are told of them.
    let mut verbs = BTreeSet::new();
    let mut waiting = vec![vec!["spokeguard".to_owned()]];
    while let Some(verb) = waiting.pop() {
        let help = output(Command::new(&program).args(&verb[1..]).arg("--help"));
        let listed =
            help.split("\nCommands:\n").nth(1).unwrap_or_default().split("\n\n").next().unwrap_or_default();
        // What is further in goes on with a line.
        let names =
            listed.lines().filter_map(|line| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')));
        let names = names.filter_map(|line| line.split(' ').next()).filter(|name| *name != "help");
        waiting.extend(names.map(|name| [&verb[..], &[name.to_owned()]].concat()));
        assert!(verbs.insert(format!("{}.1.gz", verb.join("-"))), "{verb:?}");
    }
    assert!(verbs.contains("spokeguard-policy-import-tailscale.1.gz") && verbs.len() > 30, "{verbs:?}");
    let tar = output(Command::new("dpkg-deb").arg("--contents").arg(package()));
    let pages = tar.lines().filter_map(|line| line.split_once(FOLDER).map(|(_, name)| name.to_owned()));
    let pages: BTreeSet<String> = pages.filter(|name| !name.is_empty()).collect();
    let odd: Vec<_> = pages.symmetric_difference(&verbs).collect();
    assert!(odd.is_empty(), "verbs without a page, or pages without a verb: {odd:?}");
}
