//! The fleet as one page that needs nothing but itself: no script, no request, no font from
//! elsewhere. Every word of a node is escaped, and the page forbids what an escape that was
//! forgotten could do.

use std::fmt::Write;

use rustls::SupportedCipherSuite;
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;

use super::history::{SLOTS, Trend, Trends};
use super::view::{Heard, Judged, Overview, State, age, plural};
use super::vitals::Vitals;
use crate::terms::{PublicKey, Stamp, printable};

const STYLE: &str = include_str!("page.css");
/// Nodes whose troubles are told one by one, above the table of all.
const WORST_MAX: usize = 50;

/// A column: what it is called, and which findings and facets it is about.
struct Rule {
    name: &'static str,
    codes: &'static [&'static str],
    facets: &'static [&'static str],
}

/// A finding belongs to the first whose words its code begins with.
const RULES: [Rule; 8] = [
    Rule { name: "Firewall", codes: &["firewall-", "guard-", "sealed-"], facets: &["nftables"] },
    Rule { name: "Ports", codes: &["listener-", "dnat-", "bind-"], facets: &["listeners"] },
    Rule { name: "SSH", codes: &["ssh-"], facets: &["sshd"] },
    Rule { name: "Tunnel", codes: &["mesh-", "tailscale-"], facets: &["wireguard", "links", "tailscale"] },
    Rule { name: "Files", codes: &["file-"], facets: &["files"] },
    Rule { name: "Exceptions", codes: &["exception-", "break-glass-"], facets: &[] },
    Rule { name: "Policy", codes: &["policy-"], facets: &[] },
    Rule { name: "Proof", codes: &[""], facets: &["counters", "binds"] },
];

/// The whole page.
pub fn render(overview: &Overview, trends: &Trends) -> String {
    let mut out = String::with_capacity(64 * 1024 + overview.looks.len() * 2048);
    let fleet = escaped(&overview.fleet);
    // Writing to a String can't fail.
    let _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{}'; \
         base-uri 'none'; form-action 'none'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<meta name=\"referrer\" content=\"no-referrer\">\n\
         <title>{fleet}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n",
        sum(STYLE)
    );
    let _ = write!(out, "<header>\n<h1>{fleet}</h1>\n<p class=\"dim\">{}</p>\n", moment(overview.at));
    if let Some(skew) = overview.own_skew {
        let _ = writeln!(
            out,
            "<p class=\"blind\">This hub's clock differs from most nodes' by {} s.</p>",
            skew.abs()
        );
    }
    out.push_str("<ul class=\"counts\">\n");
    for state in State::ALL {
        let _ = writeln!(out, "<li class=\"{0}\">{1} {0}</li>", state.name(), overview.count(state));
    }
    out.push_str("</ul>\n</header>\n<main>\n");
    worst(overview, &mut out);
    table(overview, trends, &mut out);
    out.push_str("</main>\n");
    let _ = write!(
        out,
        "<footer>\n<p>\u{2713} as the policy says \u{b7} \u{2713} 2: with two accepted risks \u{b7} a number: so many \
         differences \u{b7} ? could not be read \u{b7} \u{2013} not told \u{b7} traffic: in blue, out grey</p>\n<p>Timeline and traffic from {} to {}, from {}. Made by spokeguard {}.</p>\n\
         </footer>\n</body>\n</html>\n",
        moment(Stamp::from_unix(trends.from)),
        moment(Stamp::from_unix(trends.to)),
        escaped(&trends.source),
        env!("CARGO_PKG_VERSION"),
    );
    out
}

fn worst(overview: &Overview, out: &mut String) {
    let troubled: Vec<&Judged> = overview.looks.iter().filter(|j| j.state != State::Fine).collect();
    if troubled.is_empty() {
        out.push_str("<h2>Every node is as its policy says</h2>\n");
        return;
    }
    out.push_str("<h2>What needs somebody</h2>\n");
    for judged in troubled.iter().take(WORST_MAX) {
        let (name, state) = (escaped(&judged.look.place.name), judged.state.name());
        let _ = write!(
            out,
            "<div class=\"worst {state}\"><div class=\"body\"><strong>{name}</strong> \
             <span class=\"{state}\">{state}</span>\n<ul class=\"why\">"
        );
        for reason in &judged.reasons {
            let _ = write!(out, "<li>{}</li>", escaped(reason));
        }
        out.push_str("</ul></div></div>\n");
    }
    if troubled.len() > WORST_MAX {
        let _ = writeln!(out, "<p>and {} more, below.</p>", troubled.len() - WORST_MAX);
    }
}

fn table(overview: &Overview, trends: &Trends, out: &mut String) {
    out.push_str("<h2>Nodes by rules</h2>\n<table>\n<thead><tr><th>Node</th><th>State</th>");
    for rule in &RULES {
        let _ = write!(out, "<th class=\"rule\">{}</th>", rule.name);
    }
    out.push_str("<th class=\"rule\">Handshake</th><th>Timeline</th><th>Traffic of strangers</th></tr></thead>\n<tbody>\n");
    for judged in &overview.looks {
        let place = &judged.look.place;
        let (name, state) = (escaped(&place.name), judged.state.name());
        let region = place.region.as_deref().map(|r| format!(" <span class=\"dim\">{}</span>", escaped(r)));
        let region = region.unwrap_or_default();
        let _ = write!(
            out,
            "<tr><td class=\"name\">{name}{region}</td>\
             <td class=\"stands\"><span class=\"state {state}\">{state}</span></td>"
        );
        let vitals = judged.look.vitals().filter(|vitals| vitals.node == place.name);
        let stale = matches!(&judged.look.heard, Heard::Said(said) if said.stale.is_some());
        for (at, rule) in RULES.iter().enumerate() {
            let (class, mark, title) =
                vitals.map_or(("untold", "\u{2013}".into(), String::new()), |vitals| {
                    let other = place.policy.as_ref().is_some_and(|policy| *policy != vitals.policy);
                    cell(at, vitals, other, stale)
                });
            let (title, rule) = (escaped(&title), rule.name);
            let _ = write!(
                out,
                "<td class=\"rule\" data-rule=\"{rule}\" title=\"{title}\"><span class=\"{class}\">{mark}</span></td>"
            );
        }
        let handshake = vitals.and_then(|v| v.handshake_age).map_or("\u{2013}".to_owned(), age);
        let _ = write!(out, "<td class=\"rule\" data-rule=\"Handshake\">{handshake}</td>");
        let none = Trend::default();
        let trend = trends.nodes.get(&place.name).unwrap_or(&none);
        let _ = writeln!(
            out,
            "<td class=\"wide\">{}</td><td class=\"wide\">{}</td></tr>",
            timeline(trend),
            spark(trend)
        );
    }
    out.push_str("</tbody>\n</table>\n");
}

/// Class, mark and explanation of a node's cell in a column.
fn cell(column: usize, vitals: &Vitals, other_policy: bool, stale: bool) -> (&'static str, String, String) {
    let rule = &RULES[column];
    let belongs = |code: &str| RULES.iter().position(|rule| rule.codes.iter().any(|c| code.starts_with(c)));
    let found = vitals.differences().filter(|found| belongs(&found.code) == Some(column));
    let mut texts: Vec<String> = Vec::new();
    let mut count = 0u64;
    for found in found {
        count = count.saturating_add(found.count);
        texts.push(format!("{} {}", found.severity, found.code));
    }
    if rule.name == "Policy" && other_policy {
        count = count.saturating_add(1);
        texts.push("another policy than the inventory's".to_owned());
    }
    if rule.name == "Proof" && vitals.exposed.is_some_and(|exposed| exposed > 0) {
        let exposed = vitals.exposed.unwrap_or(0);
        count = count.max(exposed);
        texts.push(format!("{exposed} {} reached from outside", plural(exposed, "port")));
    }
    let blind: Vec<&String> = vitals.blind.iter().filter(|f| rule.facets.contains(&f.as_str())).collect();
    texts.extend(blind.iter().map(|facet| format!("could not read {facet}")));
    if rule.name == "Exceptions" && vitals.accepted > 0 {
        texts.push(format!("{} accepted", vitals.accepted));
    }
    let unproven = rule.name == "Proof" && vitals.exposed.is_none();
    match (count > 0, stale || !blind.is_empty() || unproven) {
        (true, _) => ("differs", count.to_string(), texts.join(", ")),
        (false, true) => ("unseen", "?".to_owned(), texts.join(", ")),
        (false, false) if rule.name == "Exceptions" && vitals.accepted > 0 => {
            ("held", format!("\u{2713} {}", vitals.accepted), texts.join(", "))
        }
        (false, false) => ("held", "\u{2713}".to_owned(), texts.join(", ")),
    }
}

fn timeline(trend: &Trend) -> String {
    let mut out = format!(
        "<svg class=\"line\" viewBox=\"0 0 {SLOTS} 8\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{}\">",
        told(trend)
    );
    let class = |state: &Option<State>| state.map_or("none", State::name);
    let mut at = 0;
    for run in trend.states.chunk_by(|a, b| a == b) {
        let (width, class) = (run.len(), run.first().map_or("none", class));
        let _ = write!(out, "<rect class=\"{class}\" x=\"{at}\" y=\"0\" width=\"{width}\" height=\"8\"/>");
        at += width;
    }
    out + "</svg>"
}

/// "drifting in 3 of 96 spans, silent in 1"
fn told(trend: &Trend) -> String {
    let known = trend.states.iter().flatten().count();
    let count = |state| trend.states.iter().flatten().filter(|s| **s == state).count();
    let bad: Vec<String> = [State::Drifting, State::Silent, State::Blind]
        .into_iter()
        .filter(|state| count(*state) > 0)
        .map(|state| format!("{} in {}", state.name(), count(state)))
        .collect();
    match (known, bad.is_empty()) {
        (0, _) => "not known".to_owned(),
        (_, true) => format!("fine in all of {known} known spans"),
        (_, false) => format!("{} of {known} known spans", bad.join(", ")),
    }
}

fn spark(trend: &Trend) -> String {
    let rates = trend.inward.iter().chain(&trend.outward).flatten();
    let Some(most) = rates.copied().reduce(f64::max) else {
        return "<span class=\"dim\">traffic not known</span>".to_owned();
    };
    let path = |row: &[Option<f64>]| {
        let mut path = String::new();
        let mut pen_up = true;
        for (at, rate) in row.iter().enumerate() {
            let Some(rate) = rate else {
                pen_up = true;
                continue;
            };
            let height = 23.0 - 22.0 * (rate / most.max(1.0)).min(1.0);
            // A point alone is drawn as a short line.
            let tail = if pen_up { "h.5" } else { "" };
            let _ = write!(path, "{}{at} {height:.1}{tail}", if pen_up { 'M' } else { 'L' });
            pen_up = false;
        }
        path
    };
    format!(
        "<svg class=\"spark\" viewBox=\"0 0 {SLOTS} 24\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"traffic, at most {0}\"><path class=\"out\" d=\"{1}\"/><path class=\"in\" d=\"{2}\"/></svg>\
         <span class=\"dim\">at most {0}</span>",
        rate(most),
        path(&trend.outward),
        path(&trend.inward),
    )
}

fn rate(bytes: f64) -> String {
    const UNITS: [&str; 4] = ["B/s", "kB/s", "MB/s", "GB/s"];
    let power = (0..UNITS.len() - 1).find(|power| bytes < 1000f64.powi(*power as i32 + 1)).unwrap_or(3);
    let number = bytes / 1000f64.powi(power as i32);
    let digits = usize::from(power > 0 && number < 100.0);
    format!("{number:.digits$} {}", UNITS[power])
}

/// As text between tags or in a quoted attribute.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in printable(text, 500).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

fn moment(at: Stamp) -> String {
    let text = at.to_string();
    format!("{} {} UTC", text.get(..10).unwrap_or(&text), text.get(11..16).unwrap_or_default())
}

/// SHA-256 in base64, by which a browser knows the one style that it may use.
fn sum(text: &str) -> String {
    let mut bytes = [0u8; 32];
    if let SupportedCipherSuite::Tls13(suite) = TLS13_AES_128_GCM_SHA256 {
        let hash = suite.common.hash_provider.hash(text.as_bytes());
        bytes.iter_mut().zip(hash.as_ref()).for_each(|(to, from)| *to = *from);
    }
    // 32 bytes in base64 is what this type writes, be they a key or not.
    PublicKey(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::view::tests::{look, said};
    use super::super::vitals::tests::vitals;
    use super::*;

    fn page(looks: Vec<super::super::view::Look>) -> String {
        let overview = Overview::new("fleet <b>", Stamp::from_unix(1_700_000_000), looks);
        render(&overview, &Trends::new(1_699_913_600, 1_700_000_000, "nowhere"))
    }

    #[test]
    fn words_of_strangers_are_text_and_nothing_else() {
        let poison = "spokeguard_findings{code=\"</style><script>alert(1)</script>\",severity=\"\\\" onload=x '\"} 1\n\
                      spokeguard_blind{facet=\"<img src=x>\"} 1\n";
        let silent = look("a<i>", Heard::Silent("banner <svg onload=alert(1)>\x1b[2J".into()));
        let page = page(vec![look("oslo", said(vitals("oslo", 1, poison))), silent]);
        for bad in ["<script", "<img", "<i>", "<b>", "<svg onload", "\" onload", "\x1b"] {
            assert!(!page.contains(bad), "{bad} in {page}");
        }
        assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{page}");
        assert_eq!(page.matches("</style>").count(), 1);
    }

    #[test]
    fn it_asks_nobody_for_anything() {
        let page = page(vec![look("oslo", said(vitals("oslo", 0, "")))]);
        for far in ["http://", "https://", "src=", "href=", "url(", "@import", "<script", " style="] {
            assert!(!page.contains(far), "{far}");
        }
        let policy = page.split("Content-Security-Policy\" content=\"").nth(1).unwrap();
        assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
        assert!(page.contains("width=device-width"));
    }

    #[test]
    fn the_sum_is_sha_256() {
        assert_eq!(sum("abc"), "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=");
    }

    #[test]
    fn every_rule_has_a_cell_of_its_own() {
        let more = "spokeguard_findings{code=\"ssh-bind\",severity=\"high\"} 2\n\
                    spokeguard_findings{code=\"listener-wide\",severity=\"info\"} 2\n\
                    spokeguard_findings{code=\"something-new\",severity=\"low\"} 3\n\
                    spokeguard_blind{facet=\"files\"} 1\n";
        let vitals = vitals("oslo", 1, more);
        let marks: Vec<String> = (0..RULES.len()).map(|at| cell(at, &vitals, true, false).1).collect();
        assert_eq!(marks, ["✓", "✓", "2", "✓", "?", "✓", "1", "3"]);
        // What a stuck daemon said once says nothing of now.
        let stale: Vec<String> = (0..RULES.len()).map(|at| cell(at, &vitals, false, true).1).collect();
        assert_eq!(stale, ["?", "?", "2", "?", "?", "?", "?", "3"]);
    }

    #[test]
    fn lines_are_drawn_where_something_is_known() {
        let mut trend = Trend::default();
        assert_eq!(timeline(&trend).matches("<rect").count(), 1);
        assert!(spark(&trend).contains("not known"));
        trend.states[3] = Some(State::Silent);
        trend.inward[3] = Some(1500.0);
        trend.inward[4] = Some(750.0);
        trend.inward[9] = Some(0.0);
        let line = timeline(&trend);
        assert!(line.contains("<rect class=\"silent\" x=\"3\" y=\"0\" width=\"1\""), "{line}");
        assert!(line.contains("silent in 1 of 1 known spans"), "{line}");
        let spark = spark(&trend);
        assert!(spark.contains("d=\"M3 1.0h.5L4 12.0M9 23.0h.5\""), "{spark}");
        assert!(spark.contains("at most 1.5 kB/s"), "{spark}");
        assert_eq!([0.0, 999.0, 1e6, 2.5e12].map(rate), ["0 B/s", "999 B/s", "1.0 MB/s", "2500 GB/s"]);
    }
}
