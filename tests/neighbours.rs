//! Other firewalls beside ours, in a container.

use lab::{Lab, Machine, Need, lacking};

#[test]
fn other_firewalls_come_reload_and_go_and_nothing_opens() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Sshd, Need::Nspawn, Need::Iptables, Need::Firewalld]) {
        return;
    }
    let lab = Lab::plain();
    let mut machine = Machine::confirmed(&lab);
    machine.stands_other_firewalls();
}
