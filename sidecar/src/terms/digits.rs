//! Addresses and prefixes as text at the end of other text. `Display` says the same, in a fifth of the speed: lists
//! of ten thousand prefixes are written several times for each change.

use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;

/// `192.0.2.7`, `2001:db8::7`.
pub fn push_address(out: &mut String, address: IpAddr) {
    match address {
        IpAddr::V4(address) => {
            for (at, octet) in address.octets().into_iter().enumerate() {
                if at > 0 {
                    out.push('.');
                }
                push_small(out, octet);
            }
        }
        IpAddr::V6(address) => drop(write!(out, "{address}")),
    }
}

/// `192.0.2.0/24`, host bits and all.
pub fn push_net(out: &mut String, net: &IpNet) {
    push_address(out, net.addr());
    out.push('/');
    push_small(out, net.prefix_len());
}

fn push_small(out: &mut String, number: u8) {
    let digit = |number: u8| char::from(b'0' + number % 10);
    if number >= 100 {
        out.push(digit(number / 100));
    }
    if number >= 10 {
        out.push(digit(number / 10));
    }
    out.push(digit(number));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_as_by_display() {
        let octets = (0..=255u8).map(|n| format!("{n}.0.{}.{}/{}", 255 - n, n / 3, n % 33));
        let others =
            ["0.0.0.0/0", "192.0.2.7/32", "2001:db8::7/128", "::/0", "fe80::/10", "::ffff:1.2.3.4/100"];
        let mut seen = 0;
        for text in octets.chain(others.map(str::to_owned)) {
            let net: IpNet = text.parse().expect("a prefix");
            let (mut with, mut without) = ("at ".to_owned(), String::new());
            push_net(&mut with, &net);
            push_address(&mut without, net.addr());
            assert_eq!(with, format!("at {net}"));
            assert_eq!(without, net.addr().to_string());
            seen += 1;
        }
        assert_eq!(seen, 262);
    }
}
