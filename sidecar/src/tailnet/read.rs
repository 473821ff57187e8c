//! HuJSON (comments and trailing commas) to [`Access`], or every mistake in it at once.

use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;
use jsonc_parser::ast::{Array, Object, ObjectProp, Value};
use jsonc_parser::common::Ranged as _;
use jsonc_parser::{CollectOptions, ParseOptions, parse_to_ast};

use super::{Access, Aim, Reach, Rule, Selector, SetEntry, Target, Test};
use crate::policy::{MISTAKES_MAX, Mistakes, Source};

/// A larger file is refused before it is parsed.
pub const BYTES_MAX: u64 = 4 << 20;
/// Each `src` with each `dst` is one; Tailscale's own limits are far below.
const RULES_MAX: usize = 20_000;

/// Sections that say nothing about packets between nodes, or that are read elsewhere.
const SILENT: [&str; 12] = [
    "tagowners",
    "autoapprovers",
    "nodeattrs",
    "derpmap",
    "disableipv4",
    "onecgnatroute",
    "randomizeclientport",
    "postures",
    "sshtests",
    "attrconfig",
    "$schema",
    "ssh",
];

/// `file` is only a name to show.
pub fn read(text: &str, file: &str) -> Result<Access, Mistakes> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let source = Source::new(text);
    let strict = ParseOptions {
        allow_comments: true,
        allow_trailing_commas: true,
        allow_loose_object_property_names: false,
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    let mut reader = Reader { source: &source, mistakes: Vec::new(), pairs: 0 };
    let mut access = Access::default();
    match parse_to_ast(text, &CollectOptions::default(), &strict) {
        Err(error) => {
            let at = error.range();
            let what = format!("this is no HuJSON: {}", error.kind().to_string().to_lowercase());
            reader.complain(
                at.start..at.end.max(at.start),
                what,
                "correct it as the Tailscale console would",
            );
        }
        Ok(parsed) => match &parsed.value {
            Some(Value::Object(root)) => reader.sections(root, &mut access),
            Some(other) => reader.complain(place(other), "the file is no object", "begin with {"),
            None => reader.complain(0..0, "the file is empty", "give the policy file as the console has it"),
        },
    }
    if reader.mistakes.is_empty() {
        reader.names(&access);
    }
    let mut found = reader.mistakes;
    if found.is_empty() {
        return Ok(access);
    }
    found.sort_by_key(|(at, ..)| at.start);
    let more = found.len().saturating_sub(MISTAKES_MAX);
    let shown = found.into_iter().take(MISTAKES_MAX);
    Err(Mistakes {
        file: file.to_owned(),
        list: shown.map(|(at, what, help)| source.mistake(at, &what, &help)).collect(),
        more,
    })
}

struct Reader<'s, 't> {
    source: &'s Source<'t>,
    mistakes: Vec<(Range<usize>, String, String)>,
    pairs: usize,
}

impl Reader<'_, '_> {
    fn complain(&mut self, at: Range<usize>, what: impl Into<String>, help: impl Into<String>) {
        self.mistakes.push((at, what.into(), help.into()));
    }

    fn line(&self, at: usize) -> u32 {
        self.source.place(at).0
    }

    fn sections(&mut self, root: &Object<'_>, access: &mut Access) {
        for (key, section) in self.properties(root) {
            let line = self.line(section.range.start);
            match (key.as_str(), &section.value) {
                ("acls", Value::Array(list)) => self.rules(list, false, access),
                ("grants", Value::Array(list)) => self.rules(list, true, access),
                ("tests", Value::Array(list)) => self.tests(list, access),
                ("groups", Value::Object(all)) => {
                    for (_, group) in self.properties(all) {
                        let members = self.strings(&group.value, "members");
                        access.groups.insert(
                            group.name.as_str().to_owned(),
                            members.into_iter().map(|(_, name)| name).collect(),
                        );
                    }
                }
                ("hosts", Value::Object(all)) => {
                    for (_, host) in self.properties(all) {
                        let at = place(&host.value);
                        let text = host.value.as_string_lit().map(|text| text.value.as_ref());
                        match text.and_then(net) {
                            Some(net) => drop(access.hosts.insert(host.name.as_str().to_owned(), net)),
                            None => {
                                self.complain(at, "a host is an address or a prefix", "write \"100.64.0.7\"")
                            }
                        }
                    }
                }
                ("ipsets", Value::Object(all)) => {
                    for (_, set) in self.properties(all) {
                        let entries = self.strings(&set.value, "entries");
                        let entries = entries.into_iter().filter_map(|(at, text)| self.set_entry(at, &text));
                        let entries = entries.collect();
                        access.ipsets.insert(set.name.as_str().to_owned(), entries);
                    }
                }
                ("defaultsrcposture", value) => {
                    if !self.strings(value, "postures").is_empty() {
                        access.default_posture = Some(line);
                    }
                }
                ("ssh", Value::Array(list)) if !list.elements.is_empty() => access.notes.push((
                    line,
                    "`ssh` is served inside tailscaled, which no rule of ours reaches: not mirrored".into(),
                )),
                ("acls" | "grants" | "tests", other) => {
                    self.complain(place(other), "not a list", "write [ ... ]")
                }
                ("groups" | "hosts" | "ipsets", other) => {
                    self.complain(place(other), "not an object", "write { \"name\": ... }");
                }
                (known, _) if SILENT.contains(&known) => {}
                _ => {
                    let name = crate::terms::printable(section.name.as_str(), 60);
                    access
                        .notes
                        .push((line, format!("section \"{name}\" is not understood, and not mirrored")));
                }
            }
        }
    }

    /// By their names in lower case, as Go decodes them; the second of two is a mistake.
    fn properties<'a, 'v>(&mut self, object: &'a Object<'v>) -> Vec<(String, &'a ObjectProp<'v>)> {
        let mut seen = std::collections::BTreeMap::new();
        let mut out = Vec::new();
        for property in &object.properties {
            let name = property.name.as_str();
            let at = property.range.start..property.range.start + name.len() + 2;
            if let Some(first) = seen.insert(name.to_owned(), property.range.start) {
                let line = self.line(first);
                let what = format!("\"{name}\" is here twice: also on line {line}");
                self.complain(at, what, "keep one: of two, JSON silently takes the last");
            }
            out.push((name.to_ascii_lowercase(), property));
        }
        out
    }

    fn rules(&mut self, list: &Array<'_>, grants: bool, access: &mut Access) {
        for element in &list.elements {
            let Value::Object(object) = element else {
                self.complain(
                    place(element),
                    "a rule is an object",
                    "write { \"src\": [...], \"dst\": [...] }",
                );
                continue;
            };
            if let Some(rule) = self.rule(object, grants) {
                self.pairs += rule.src.len().max(1) * rule.dst.len().max(1);
                if self.pairs > RULES_MAX {
                    let what = format!("more than {RULES_MAX} pairs of source and destination");
                    return self.complain(place(element), what, "use groups and tags");
                }
                access.rules.push(rule);
            }
        }
    }

    fn rule(&mut self, object: &Object<'_>, grant: bool) -> Option<Rule> {
        let line = self.line(object.range.start);
        let mut rule = Rule { line, src: Vec::new(), dst: Vec::new(), condition: None };
        let (mut src, mut dst, mut ip, mut app, mut proto) = (None, None, None, false, None);
        for (key, property) in self.properties(object) {
            let value = &property.value;
            match key.as_str() {
                "action" if !grant => match value.as_string_lit().map(|text| text.value.as_ref()) {
                    Some("accept") => {}
                    _ => self.complain(place(value), "the only action is \"accept\"", "write \"accept\""),
                },
                "src" | "users" => src = Some(self.strings(value, "sources")),
                "dst" | "ports" => dst = Some(self.strings(value, "destinations")),
                "proto" if !grant => proto = Some(self.protocol(value)),
                "ip" if grant => ip = Some(self.strings(value, "protocols and ports")),
                "app" if grant => app = true,
                "srcposture" => {
                    if !self.strings(value, "postures").is_empty() {
                        rule.condition = Some("hangs on a device posture, which no host can see".into());
                    }
                }
                "via" if grant => {
                    if !self.strings(value, "tags").is_empty() {
                        rule.condition =
                            Some("says which router to go by (`via`), which is no access here".into());
                    }
                }
                _ => {
                    let name = crate::terms::printable(property.name.as_str(), 60);
                    rule.condition = Some(format!("has the key \"{name}\", which is not understood"));
                }
            }
        }
        let whole = object.range.start..object.range.start + 1;
        let (Some(src), Some(dst)) = (src, dst) else {
            self.complain(whole, "the rule has no `src` or no `dst`", "write both");
            return None;
        };
        rule.src = src.into_iter().filter_map(|(at, text)| self.selector(at, &text)).collect();
        if grant {
            if ip.is_none() && !app {
                self.complain(whole, "the grant has neither `ip` nor `app`", "write ip = [\"tcp:443\"]");
            }
            let reaches: Vec<Reach> = ip
                .unwrap_or_default()
                .into_iter()
                .filter_map(|(at, text)| self.grant_reach(at, &text))
                .collect();
            for (at, text) in dst {
                let Some(to) = self.selector(at, &text) else { continue };
                rule.dst.extend(reaches.iter().map(|reach| Target { to: to.clone(), reach: reach.clone() }));
            }
        } else {
            let (tcp, udp) = proto.unwrap_or((true, true));
            for (at, text) in dst {
                if let Some((to, ports)) = self.target(at, &text) {
                    rule.dst.push(Target { to, reach: Reach { tcp, udp, ports } });
                }
            }
        }
        Some(rule)
    }

    fn tests(&mut self, list: &Array<'_>, access: &mut Access) {
        for element in &list.elements {
            let Value::Object(object) = element else {
                self.complain(
                    place(element),
                    "a test is an object",
                    "write { \"src\": ..., \"accept\": [...] }",
                );
                continue;
            };
            let (mut src, mut proto, mut aims) = (None, (true, false), Vec::new());
            for (key, property) in self.properties(object) {
                let value = &property.value;
                match (key.as_str(), value) {
                    ("src" | "user", Value::StringLit(text)) => {
                        src = self.selector(place(value), &text.value);
                    }
                    ("proto", _) => proto = self.protocol(value),
                    ("accept" | "allow" | "deny", _) => {
                        let accept = key != "deny";
                        let list = self.strings(value, "destinations");
                        aims.extend(list.into_iter().map(|(at, text)| (accept, at, text)));
                    }
                    _ => {}
                }
            }
            let Some(src) = src else {
                let at = object.range.start..object.range.start + 1;
                self.complain(at, "the test has no `src`", "write whose access it is about");
                continue;
            };
            let mut test = Test { src, aims: Vec::new() };
            for (accept, at, text) in aims {
                let line = self.line(at.start);
                if let Some((to, ports)) = self.target(at, &text) {
                    let reach = Reach { tcp: proto.0, udp: proto.1, ports };
                    test.aims.push(Aim { line, accept, to, reach });
                }
            }
            access.tests.push(test);
        }
    }

    /// A string, or a list of them, each with its place.
    fn strings(&mut self, value: &Value<'_>, of: &str) -> Vec<(Range<usize>, String)> {
        let list: Vec<&Value<'_>> = match value {
            Value::Array(list) => list.elements.iter().collect(),
            Value::NullKeyword(_) => Vec::new(),
            other => {
                self.complain(place(other), format!("not a list of {of}"), "write [\"...\"]");
                return Vec::new();
            }
        };
        let mut out = Vec::new();
        for value in list {
            match value {
                Value::StringLit(text) => out.push((place(value), text.value.to_string())),
                other => {
                    self.complain(place(other), format!("a list of {of} holds text only"), "write \"...\"")
                }
            }
        }
        out
    }

    fn selector(&mut self, at: Range<usize>, text: &str) -> Option<Selector> {
        let text = text.trim();
        let own = |text: &str| text.to_owned();
        Some(match text.split_once(':').map(|(kind, _)| kind) {
            _ if text == "*" => Selector::Any,
            Some("tag") => Selector::Tag(own(text)),
            Some("group") => Selector::Group(own(text)),
            Some("autogroup") => Selector::Auto(own(text)),
            Some("ipset") => Selector::IpSet(own(text)),
            Some("svc") => Selector::Service(own(text)),
            Some("user") => Selector::User(own(&text[5..])),
            Some("host") => Selector::Host(own(&text[5..])),
            _ if text.contains('@') => Selector::User(own(text)),
            _ => {
                if let Some(net) = net(text) {
                    return Some(Selector::Net(net));
                }
                let ends = text.split_once('-').map(|(a, b)| (a.parse::<IpAddr>(), b.parse::<IpAddr>()));
                match ends {
                    Some((Ok(first), Ok(last))) => Selector::Range(first, last),
                    _ if text.is_empty() || text.contains([':', '/']) => {
                        let what = format!("\"{}\" names nobody", crate::terms::printable(text, 60));
                        self.complain(
                            at,
                            what,
                            "write *, an address, a prefix, a host, a user, tag:, group: or autogroup:",
                        );
                        return None;
                    }
                    _ => Selector::Host(own(text)),
                }
            }
        })
    }

    /// `tag:server:22,443`, `fd7a::1:22`, `[fd7a::1]:22`: split at the last colon.
    fn target(
        &mut self,
        at: Range<usize>,
        text: &str,
    ) -> Option<(Selector, Vec<std::ops::RangeInclusive<u16>>)> {
        let Some((to, ports)) = text.rsplit_once(':').filter(|(to, _)| !to.is_empty()) else {
            self.complain(at, "the destination has no ports", "write \"tag:server:22\" or \"tag:server:*\"");
            return None;
        };
        let to = to.strip_prefix('[').and_then(|to| to.strip_suffix(']')).unwrap_or(to);
        let to = self.selector(at.clone(), to)?;
        match self::ports(ports) {
            Some(ports) => Some((to, ports)),
            None => {
                let what = format!("\"{}\" are no ports", crate::terms::printable(ports, 60));
                self.complain(at, what, "write 22, 80,443, 1000-2000 or *");
                None
            }
        }
    }

    /// `*`, `443`, `80-90`, `tcp:443`, `udp:*`, `icmp:*`.
    fn grant_reach(&mut self, at: Range<usize>, text: &str) -> Option<Reach> {
        let (proto, ports) = text.split_once(':').unwrap_or(("", text));
        let (tcp, udp) = if proto.is_empty() { (true, true) } else { protocol(proto) };
        match self::ports(ports) {
            Some(ports) => Some(Reach { tcp, udp, ports }),
            None => {
                let what = format!("\"{}\" is no protocol with ports", crate::terms::printable(text, 60));
                self.complain(at, what, "write \"tcp:443\", \"udp:53\", \"80-90\" or \"*\"");
                None
            }
        }
    }

    fn protocol(&mut self, value: &Value<'_>) -> (bool, bool) {
        match value {
            Value::StringLit(text) if text.value.is_empty() => (true, true),
            Value::StringLit(text) => protocol(&text.value),
            Value::NumberLit(number) => protocol(number.value),
            other => {
                self.complain(place(other), "no protocol", "write \"tcp\", \"udp\" or a number");
                (false, false)
            }
        }
    }

    fn set_entry(&mut self, at: Range<usize>, text: &str) -> Option<SetEntry> {
        let (add, of) = match text.split_once(' ') {
            Some(("add", of)) => (true, of),
            Some(("remove", of)) => (false, of),
            _ => (true, text),
        };
        Some(SetEntry { add, of: self.selector(at, of)? })
    }

    /// Names that the file uses and nowhere defines: a typing error would silently be nobody.
    fn names(&mut self, access: &Access) {
        let sources = access.rules.iter().flat_map(|rule| &rule.src);
        let targets = access.rules.iter().flat_map(|rule| rule.dst.iter().map(|target| &target.to));
        let tested = access
            .tests
            .iter()
            .flat_map(|test| std::iter::once(&test.src).chain(test.aims.iter().map(|aim| &aim.to)));
        let in_sets = access.ipsets.values().flatten().map(|entry| &entry.of);
        let mut missing: Vec<(String, &str)> = Vec::new();
        for selector in sources.chain(targets).chain(tested).chain(in_sets) {
            match selector {
                // With an @ it is one of the identity provider's.
                Selector::Group(name) if !access.groups.contains_key(name) && !name.contains('@') => {
                    missing.push((name.clone(), "groups"))
                }
                Selector::Host(name) if !access.hosts.contains_key(name) => {
                    missing.push((name.clone(), "hosts"))
                }
                Selector::IpSet(name) if !access.ipsets.contains_key(name) => {
                    missing.push((name.clone(), "ipsets"));
                }
                _ => {}
            }
        }
        missing.sort();
        missing.dedup();
        for (name, section) in missing {
            let at =
                self.source.text().find(&format!("\"{name}")).map_or(0..0, |at| at + 1..at + 1 + name.len());
            let what = format!("\"{}\" is not in `{section}`", crate::terms::printable(&name, 60));
            self.complain(at, what, "define it there, or correct the name");
        }
    }
}

fn place(value: &Value<'_>) -> Range<usize> {
    let range = value.range();
    range.start..range.end
}

fn net(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>().ok().map(|net| net.trunc()).or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// Whether TCP and UDP are meant, by name or IANA number.
fn protocol(name: &str) -> (bool, bool) {
    match name.to_ascii_lowercase().as_str() {
        "tcp" | "6" => (true, false),
        "udp" | "17" => (false, true),
        "*" => (true, true),
        _ => (false, false),
    }
}

fn ports(text: &str) -> Option<Vec<std::ops::RangeInclusive<u16>>> {
    if text.trim() == "*" {
        return Some(vec![0..=u16::MAX]);
    }
    let number = |text: &str| text.trim().parse::<u16>().ok();
    text.split(',')
        .map(|part| match part.split_once('-') {
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(first..=last)
            }
            None => number(part).map(|port| port..=port),
        })
        .collect()
}
