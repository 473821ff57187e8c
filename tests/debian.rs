//! The Debian package in a container.

use std::path::{Path, PathBuf};
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
