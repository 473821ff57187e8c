//! Sets of addresses, by which what two texts let in is compared exactly.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use super::Family;

/// Addresses of both families, as ranges that neither touch nor overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Addresses {
    ipv4: Vec<(u128, u128)>,
    ipv6: Vec<(u128, u128)>,
}

impl Addresses {
    pub fn is_empty(&self) -> bool {
        self.ipv4.is_empty() && self.ipv6.is_empty()
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        let number = number(address);
        self.of(Family::of(address)).iter().any(|(first, last)| (*first..=*last).contains(&number))
    }

    /// From `first` to `last`, both included; nothing where they are of two families or the
    /// wrong way round.
    pub fn range(first: IpAddr, last: IpAddr) -> Self {
        let mut out = Self::default();
        if Family::of(first) == Family::of(last) && first <= last {
            out.of_mut(Family::of(first)).push((number(first), number(last)));
        }
        out
    }

    pub fn union(&self, other: &Self) -> Self {
        Self { ipv4: merged(&self.ipv4, &other.ipv4), ipv6: merged(&self.ipv6, &other.ipv6) }
    }

    /// What is in `self` and not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        Self { ipv4: less(&self.ipv4, &other.ipv4), ipv6: less(&self.ipv6, &other.ipv6) }
    }

    /// What is in both.
    pub fn within(&self, other: &Self) -> Self {
        self.without(&self.without(other))
    }

    pub fn touches(&self, other: &Self) -> bool {
        self.without(other) != *self
    }

    /// Only what is of these families.
    pub fn only(mut self, families: &[Family]) -> Self {
        for family in Family::ALL.into_iter().filter(|family| !families.contains(family)) {
            self.of_mut(family).clear();
        }
        self
    }

    /// The fewest prefixes that hold exactly these addresses, IPv4 first.
    pub fn prefixes(&self) -> Vec<IpNet> {
        let low = |n: &u128| Ipv4Addr::from(u32::try_from(*n).unwrap_or(u32::MAX));
        let ipv4 = self.ipv4.iter().flat_map(|(first, last)| Ipv4Subnets::new(low(first), low(last), 0));
        let ipv6 = self
            .ipv6
            .iter()
            .flat_map(|(first, last)| Ipv6Subnets::new(Ipv6Addr::from(*first), Ipv6Addr::from(*last), 0));
        ipv4.map(IpNet::V4).chain(ipv6.map(IpNet::V6)).collect()
    }

    fn of(&self, family: Family) -> &Vec<(u128, u128)> {
        match family {
            Family::Ipv4 => &self.ipv4,
            Family::Ipv6 => &self.ipv6,
        }
    }

    fn of_mut(&mut self, family: Family) -> &mut Vec<(u128, u128)> {
        match family {
            Family::Ipv4 => &mut self.ipv4,
            Family::Ipv6 => &mut self.ipv6,
        }
    }
}

impl From<IpNet> for Addresses {
    fn from(net: IpNet) -> Self {
        Self::range(net.network(), net.broadcast())
    }
}

impl<T: Into<Addresses>> FromIterator<T> for Addresses {
    fn from_iter<I: IntoIterator<Item = T>>(all: I) -> Self {
        all.into_iter().fold(Self::default(), |sum, one| sum.union(&one.into()))
    }
}

impl From<IpAddr> for Addresses {
    fn from(address: IpAddr) -> Self {
        Self::range(address, address)
    }
}

/// At most four prefixes, and how many more there are.
impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.prefixes();
        let host = |net: &IpNet| match net.prefix_len() == net.max_prefix_len() {
            true => net.addr().to_string(),
            false => net.to_string(),
        };
        let shown: Vec<String> = all.iter().take(4).map(host).collect();
        match all.len() {
            0 => f.write_str("nobody"),
            n if n > 4 => write!(f, "{} and {} more", shown.join(", "), n - 4),
            _ => f.write_str(&shown.join(", ")),
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

fn merged(one: &[(u128, u128)], two: &[(u128, u128)]) -> Vec<(u128, u128)> {
    let mut all: Vec<(u128, u128)> = one.iter().chain(two).copied().collect();
    all.sort_unstable();
    let mut out: Vec<(u128, u128)> = Vec::with_capacity(all.len());
    for (first, last) in all {
        match out.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => out.push((first, last)),
        }
    }
    out
}

fn less(from: &[(u128, u128)], taken: &[(u128, u128)]) -> Vec<(u128, u128)> {
    let mut out = Vec::new();
    for &(mut first, last) in from {
        let mut gone = false;
        for &(a, b) in taken {
            if a > last || b < first {
                continue;
            }
            if a > first {
                out.push((first, a - 1));
            }
            if b >= last {
                gone = true;
                break;
            }
            first = b + 1;
        }
        if !gone {
            out.push((first, last));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> Addresses {
        text.split_whitespace().map(|net| net.parse::<IpNet>().expect("a prefix")).collect()
    }

    #[test]
    fn sets_add_subtract_and_print_as_the_fewest_prefixes() {
        assert_eq!(set("10.0.0.0/25 10.0.0.128/25").to_string(), "10.0.0.0/24");
        assert_eq!(set("10.0.0.0/30").without(&set("10.0.0.1/32")).to_string(), "10.0.0.0, 10.0.0.2/31");
        assert!(set("10.0.0.0/8").without(&set("0.0.0.0/0")).is_empty());
        assert_eq!(set("::/0").without(&set("0.0.0.0/0")), set("::/0"));
        assert_eq!(set("10.0.0.0/8 ::/0").within(&set("10.1.0.0/16 fd00::/8")), set("10.1.0.0/16 fd00::/8"));
        let all = set("::/0");
        assert_eq!(all.union(&set("fd00::/8")), all);
        assert!(
            set("10.0.0.0/8").touches(&set("10.1.0.0/16")) && !set("10.0.0.0/8").touches(&set("11.0.0.0/8"))
        );
        assert_eq!(set("10.0.0.0/8 fd00::/8").only(&[Family::Ipv6]), set("fd00::/8"));
        assert!(
            set("10.0.0.0/8").contains([10, 1, 2, 3].into()) && !set("::/0").contains([10, 1, 2, 3].into())
        );
    }
}
