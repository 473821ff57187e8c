//! Break-glass: openings that the kernel ends by itself. They are elements with a timeout in
//! four sets of our table, one for each protocol and family, keyed by the port that the
//! outsider asks for and by where it comes from. Nothing else remembers them: an element
//! that is gone, by its timeout, with the table or with the kernel, never comes back.
//!
//! What makes an element an opening is its comment, our mark; one without it was put there
//! by somebody else, and is drift like a foreign rule.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{NamedSet, Operand, Table, Timed};
use crate::terms::{Family, Port, Proto, Stamp, printable};

/// An opening lasts at least and at most this long, in seconds.
pub const LASTS_MIN_S: u32 = 10;
pub const LASTS_MAX_S: u32 = 86_400;
/// Openings at once, one for each prefix. The sets are read whole at every look.
pub const OPENINGS_MAX: usize = 16;
/// The comment of an element holds 127 bytes in the kernel.
const COMMENT_MAX: usize = 127;
pub const OWNER_MAX: usize = 24;
/// Bytes of the reason: what the mark leaves of the comment.
pub const REASON_MAX: usize = COMMENT_MAX - MARK.len() - 21 - 1 - OWNER_MAX - 1;
const MARK: &str = "spokeguard:open ";
/// The kernel counts the time on its own; the mark's start is believed for as long as it
/// says about the same, and makes the end a steady text.
const CLOCKS_APART_S: i64 = 120;

/// One hole, as the kernel holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    pub proto: Proto,
    pub port: Port,
    pub from: IpNet,
    pub owner: String,
    pub reason: String,
    /// When it was opened, by the clock of that moment.
    pub began: Stamp,
    /// How long it was to last, and what of that is left, in seconds.
    pub lasts_s: u32,
    pub left_s: u32,
}

impl Opening {
    /// When the kernel ends it.
    pub fn ends(&self, now: Stamp) -> Stamp {
        let by_mark = self.began.0.as_second().saturating_add(self.lasts_s.into());
        let by_kernel = now.0.as_second().saturating_add(self.left_s.into());
        Stamp::from_unix(if (by_mark - by_kernel).abs() <= CLOCKS_APART_S { by_mark } else { by_kernel })
    }

    /// The same hole, whenever it was opened and by whom.
    pub fn same_hole(&self, other: &Opening) -> bool {
        (self.proto, self.port, self.from) == (other.proto, other.port, other.from)
    }

    /// The set that it is in, and its key there.
    pub fn element(&self) -> (String, Operand) {
        let from = if self.from.prefix_len() == self.from.max_prefix_len() {
            Operand::Address(self.from.addr())
        } else {
            Operand::Prefix(self.from)
        };
        let key = Operand::Concat(vec![Operand::Number(self.port.get().into()), from]);
        (set_name(self.proto, Family::of_net(&self.from)), key)
    }

    /// The mark. What could end nft's quotes in a listing is replaced, what is too long cut.
    pub fn comment(&self) -> String {
        let began = self.began.0.as_second();
        let mut text = format!("{MARK}{began} {} {}", word(&self.owner), printable(&self.reason, REASON_MAX));
        text = text.replace('"', "'");
        while text.len() > COMMENT_MAX {
            text.pop();
        }
        text
    }

    fn read(proto: Proto, family: Family, key: &Operand, timed: &Timed) -> Option<Opening> {
        let Operand::Concat(parts) = key else { return None };
        let [Operand::Number(port), from] = parts.as_slice() else { return None };
        let from = match from {
            Operand::Address(address) => IpNet::from(*address),
            Operand::Prefix(net) => *net,
            _ => return None,
        };
        let mark = timed.comment.as_deref()?.strip_prefix(MARK)?;
        let mut words = mark.splitn(3, ' ');
        let began: i64 = words.next()?.parse().ok()?;
        let (owner, reason) = (words.next()?, words.next()?);
        let sound = (LASTS_MIN_S..=LASTS_MAX_S).contains(&timed.timeout_s)
            && timed.expires_s <= timed.timeout_s
            && Family::of_net(&from) == family
            && !owner.is_empty()
            && !reason.is_empty();
        sound.then_some(Opening {
            proto,
            port: Port::new(u16::try_from(*port).ok()?)?,
            from,
            owner: printable(owner, OWNER_MAX),
            reason: printable(reason, REASON_MAX),
            began: Stamp::from_unix(began),
            lasts_s: timed.timeout_s,
            left_s: timed.expires_s,
        })
    }
}

/// "tcp/2222 from 192.0.2.0/24".
impl fmt::Display for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} from {}", self.proto, self.port, short(&self.from))
    }
}

/// A prefix that is one address reads better without its length.
fn short(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

/// The name of an owner as one word of the mark.
pub fn word(name: &str) -> String {
    let clean = |c: char| if c.is_ascii_alphanumeric() || "._@-".contains(c) { c } else { '-' };
    let word: String = name.chars().take(OWNER_MAX).map(clean).collect();
    if word.is_empty() { "unknown".to_owned() } else { word }
}

pub fn set_name(proto: Proto, family: Family) -> String {
    format!("break-glass-{proto}-{family}")
}

/// The counter of what openings let in. Of TCP each packet, of UDP the first of a flow.
pub fn counter(family: Family) -> String {
    format!("break-glass-{family}")
}

fn each() -> impl Iterator<Item = (Proto, Family)> {
    Proto::ALL.into_iter().flat_map(|proto| Family::ALL.map(|family| (proto, family)))
}

/// The four sets as they are declared, with nothing in them.
pub fn sets() -> Vec<NamedSet> {
    let set = |(proto, family)| NamedSet {
        name: set_name(proto, family),
        kind: match family {
            Family::Ipv4 => "inet_service . ipv4_addr".to_owned(),
            Family::Ipv6 => "inet_service . ipv6_addr".to_owned(),
        },
        map: false,
        flags: ["interval", "timeout"].map(str::to_owned).to_vec(),
        elements: Vec::new(),
        timed: Vec::new(),
        verdicts: Vec::new(),
        truncated: false,
    };
    each().map(set).collect()
}

/// What is open, in the order of protocol, port and source.
pub fn openings(table: &Table) -> Vec<Opening> {
    let mut all: Vec<Opening> =
        elements(table).filter_map(|(_, _, found)| found).take(table.sets.len() * OPENINGS_MAX).collect();
    all.sort_by_key(|opening| (opening.proto, opening.port, opening.from));
    all
}

/// So many seconds later, as far as the table is still the same.
pub fn count_down(table: &mut Table, passed_s: u32) {
    for (proto, family) in each() {
        let name = set_name(proto, family);
        let sets = table.sets.iter_mut().filter(|set| set.name == name);
        for timed in sets.flat_map(|set| &mut set.timed) {
            timed.expires_s = timed.expires_s.saturating_sub(passed_s);
        }
    }
}

/// Elements of our sets that are no opening of ours: set and key.
pub fn foreign(table: &Table) -> impl Iterator<Item = (&NamedSet, &Operand)> {
    elements(table).filter(|(_, _, opening)| opening.is_none()).map(|(set, key, _)| (set, key))
}

fn elements(table: &Table) -> impl Iterator<Item = (&NamedSet, &Operand, Option<Opening>)> {
    each().flat_map(|(proto, family)| {
        let name = set_name(proto, family);
        let set = table.sets.iter().find(move |set| set.name == name && !set.map);
        set.into_iter().flat_map(move |set| {
            set.elements.iter().enumerate().map(move |(at, key)| {
                let timed = set.timed.get(at);
                (set, key, timed.and_then(|timed| Opening::read(proto, family, key, timed)))
            })
        })
    })
}

/// Whether two prefixes share an address.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// Whether anybody at all is meant.
pub fn is_anyone(net: &IpNet) -> bool {
    net.prefix_len() == 0
}

/// All addresses of both families.
pub fn anyone() -> [IpNet; 2] {
    let all = |address: IpAddr| IpNet::new_assert(address, 0);
    [all(std::net::Ipv4Addr::UNSPECIFIED.into()), all(std::net::Ipv6Addr::UNSPECIFIED.into())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruleset::TableFamily;

    fn opening(port: u16, from: &str) -> Opening {
        Opening {
            proto: Proto::Tcp,
            port: Port::new(port).expect("a port"),
            from: from.parse().expect("a prefix"),
            owner: "alice".into(),
            reason: "mesh is down".into(),
            began: Stamp::from_unix(1_763_726_400),
            lasts_s: 900,
            left_s: 600,
        }
    }

    fn table(openings: &[(Operand, Timed)]) -> Table {
        let mut sets = sets();
        for (key, timed) in openings {
            sets[0].elements.push(key.clone());
            sets[0].timed.push(timed.clone());
        }
        Table {
            family: TableFamily::Inet,
            name: "spokeguard".into(),
            dormant: false,
            chains: vec![],
            counters: Default::default(),
            sets,
        }
    }

    fn timed(opening: &Opening) -> Timed {
        Timed { timeout_s: opening.lasts_s, expires_s: opening.left_s, comment: Some(opening.comment()) }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for from in ["192.0.2.0/24", "192.0.2.7/32", "0.0.0.0/0"] {
            let wanted = opening(2222, from);
            let found = table(&[(wanted.element().1, timed(&wanted))]);
            assert_eq!(openings(&found), [wanted]);
            assert_eq!(foreign(&found).count(), 0);
        }
    }

    #[test]
    fn what_does_not_carry_our_mark_or_never_ends_is_foreign() {
        let good = opening(2222, "192.0.2.0/24");
        let key = good.element().1;
        let with = |edit: fn(&mut Timed)| {
            let mut timed = timed(&good);
            edit(&mut timed);
            table(&[(key.clone(), timed)])
        };
        for edit in [
            (|t| t.comment = None) as fn(&mut Timed),
            |t| t.comment = Some("spokeguard:open soon alice why".into()),
            |t| t.comment = Some("spokeguard:open 1763726400 alice".into()),
            |t| (t.timeout_s, t.expires_s) = (0, 0),
            |t| t.timeout_s = LASTS_MAX_S + 1,
            |t| t.expires_s = t.timeout_s + 1,
        ] {
            let found = with(edit);
            assert_eq!(
                (openings(&found).len(), foreign(&found).count()),
                (0, 1),
                "{:?}",
                found.sets[0].timed
            );
        }
        let range = Operand::Range(Box::new(Operand::Number(1)), Box::new(Operand::Number(9)));
        let wide = Operand::Concat(vec![range, Operand::Prefix(good.from)]);
        assert_eq!(foreign(&table(&[(wide, timed(&good))])).count(), 1, "a range of ports");
        assert_eq!(openings(&with(|_| {})).len(), 1);
    }

    #[test]
    fn the_mark_fits_and_can_not_end_the_quotes_around_it() {
        let mut long = opening(2222, "192.0.2.0/24");
        long.owner = "o\"".repeat(100);
        long.reason = "\u{e9}\"\n".repeat(100);
        let comment = long.comment();
        assert!(comment.len() <= COMMENT_MAX && !comment.contains(['"', '\n']), "{comment}");
        let found = table(&[(long.element().1, timed(&long))]);
        assert_eq!(openings(&found).len(), 1, "a cut mark is still ours");
        let fits =
            Opening { owner: "o".repeat(OWNER_MAX), reason: "r".repeat(REASON_MAX), ..opening(1, "::/0") };
        assert!(fits.comment().ends_with(&fits.reason) && REASON_MAX >= 60, "{}", fits.comment());
    }

    #[test]
    fn the_end_is_the_kernels_and_steady_while_the_clocks_agree() {
        let opening = opening(2222, "192.0.2.0/24");
        let at = |seconds| opening.ends(Stamp::from_unix(seconds)).0.as_second();
        assert_eq!([at(1_763_726_700), at(1_763_726_703)], [1_763_727_300; 2]);
        assert_eq!(at(1_900_000_000), 1_900_000_600, "the clock was set");
    }

    #[test]
    fn what_is_left_is_counted_down_while_nobody_reads_it_again() {
        let wanted = opening(2222, "192.0.2.0/24");
        let mut found = table(&[(wanted.element().1, timed(&wanted))]);
        let left = |table: &Table| openings(table)[0].left_s;
        count_down(&mut found, 7);
        assert_eq!(left(&found), 593);
        count_down(&mut found, 0);
        assert_eq!(left(&found), 593);
        count_down(&mut found, 1000);
        assert_eq!(left(&found), 0);
    }
}
