//! Policies as operators write them, put together at random.

use spokeguard::desired::Desired;

use super::packets::PORTS;
use crate::guard::Dice;

const NETS: [&str; 10] = [
    "0.0.0.0/0",
    "::/0",
    "192.0.2.0/24",
    "192.0.2.0/25",
    "192.0.2.130/32",
    "198.51.100.99/32",
    "203.0.113.0/24",
    "2001:db8:1::/48",
    "2001:db8:9::9/128",
    "10.84.0.0/25",
];

/// A policy that holds together, as its text and as what follows from it.
pub fn some(dice: &mut Dice) -> (String, Desired) {
    let today = spokeguard::cli::today(spokeguard::sys::clock::now());
    let mut refusal = String::new();
    for _ in 0..200 {
        let text = text(dice);
        match spokeguard::policy::parse(&text, "policy.toml", today) {
            Ok(loaded) => {
                let desired = Desired::new(loaded.policy, today).expect("no way in is asked for");
                return (text, desired);
            }
            Err(mistakes) => refusal = format!("{mistakes}\n{text}"),
        }
    }
    panic!("none of 200 policies holds together; of the last: {refusal}");
}

fn text(dice: &mut Dice) -> String {
    // Each port is for one purpose at most, but exceptions and local networks may have any.
    let (mut tcp, mut udp) = (PORTS.to_vec(), PORTS.to_vec());
    let ssh = *dice.pick(&[22u16, 22, 2222]);
    let metrics = *dice.pick(&[9984u16, 9984, 19999]);
    tcp.retain(|port| *port != ssh && *port != metrics);
    let take = |dice: &mut Dice, from: &mut Vec<u16>, most: usize| -> Vec<u16> {
        let count = dice.below(most + 1).min(from.len());
        (0..count).map(|_| from.swap_remove(dice.below(from.len()))).collect()
    };
    let nets = |dice: &mut Dice| {
        let mut some = dice.some(&NETS);
        some.truncate(4);
        if some.is_empty() { vec![*dice.pick(&NETS)] } else { some }
    };
    let mesh_only = dice.below(4) != 0;
    let (bind, from) = if mesh_only {
        ("\"mesh\"".to_owned(), (*dice.pick(&["\"hub\"", "\"mesh\"", "[\"10.84.0.0/25\"]"])).to_owned())
    } else {
        let at = dice.some(&["198.51.100.7", "2001:db8:1::7", "0.0.0.0", "::"]);
        let at = if at.is_empty() { vec!["198.51.100.7"] } else { at };
        (format!("{at:?}"), format!("{:?}", nets(dice)))
    };
    let interfaces = *dice.pick(&["", "", "", "", "interfaces = [\"eth*\"]\n", "interfaces = [\"ens3\"]\n"]);
    let mut out = format!(
        "version = 1\n[node]\nname = \"generated\"\n[mesh]\nkind = \"tailscale\"\ninterface = \"wg0\"\n\
         address = [\"10.84.0.16\", \"fd84::16\"]\nprefix = [\"10.84.0.0/24\", \"fd84::/64\"]\n\
         [mesh.hub]\naddress = [\"10.84.0.1\", \"fd84::1\"]\n[public]\ntcp = {:?}\nudp = {:?}\n{interfaces}\
         [ssh]\nport = {ssh}\nbind = {bind}\nfrom = {from}\n[metrics]\nport = {metrics}\n\
         [enforce]\nallow_no_admin_path = true\nmode = \"{}\"\n",
        take(dice, &mut tcp, 4),
        take(dice, &mut udp, 3),
        if dice.below(8) == 0 { "audit" } else { "enforce" },
    );
    for n in 0..dice.below(3) {
        let from = match dice.below(3) {
            0 => "\"hub\"".to_owned(),
            1 => "\"mesh\"".to_owned(),
            _ => "[\"10.84.0.64/26\", \"fd84::1/128\"]".to_owned(),
        };
        let (tcp, udp) = (take(dice, &mut tcp, 2), take(dice, &mut udp, 2));
        if !(tcp.is_empty() && udp.is_empty()) {
            out +=
                &format!("[[mesh.service]]\nname = \"s{n}\"\ntcp = {tcp:?}\nudp = {udp:?}\nfrom = {from}\n");
        }
    }
    if dice.below(3) != 0 {
        let (tcp, udp) = (take(dice, &mut PORTS.to_vec(), 3), take(dice, &mut PORTS.to_vec(), 2));
        let interface = dice.pick(&["docker*", "docker0"]);
        out += &format!(
            "[[local]]\nname = \"containers\"\ninterfaces = [\"{interface}\"]\ntcp = {tcp:?}\nudp = {udp:?}\n"
        );
    }
    for n in 0..dice.below(4) {
        let (tcp, udp) = (take(dice, &mut tcp.clone(), 3), take(dice, &mut udp.clone(), 2));
        if !(tcp.is_empty() && udp.is_empty()) {
            out += &format!(
                "[[exception]]\nname = \"e{n}\"\ntcp = {tcp:?}\nudp = {udp:?}\nfrom = {:?}\nreason = \"chance\"\n\
                 until = \"2099-01-01\"\n",
                nets(dice)
            );
        }
    }
    out
}
