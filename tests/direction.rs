//! The dependency direction of the sidecar's modules, read from its sources.
//!
//! policy file -> desired -> observed -> findings -> plan -> outcomes -> report. The modules in [`PURE`] are
//! functions of values: they may use each other only as the table says, and the world not at all.
//! Code under `#[cfg(test)]` is free.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Modules that are values, and what each may use of the others.
const PURE: &[(&str, &[&str])] = &[
    ("terms", &[]),
    ("ruleset", &["terms"]),
    ("policy", &["terms"]),
    ("desired", &["policy", "ruleset", "terms"]),
    ("observed", &["ruleset", "terms"]),
    ("diff", &["desired", "observed", "policy", "ruleset", "terms"]),
    ("repair", &["diff", "desired", "observed", "policy", "ruleset", "terms"]),
    ("tailnet", &["policy", "terms"]),
    ("report", FACES),
    ("top", FACES),
    ("metrics", FACES),
    ("audit", FACES),
    ("heartbeat", FACES),
    ("fleet", FACES),
];

/// The faces of a finished cycle may look at all of it, and at each other.
const FACES: &[&str] = &[
    "terms",
    "ruleset",
    "policy",
    "desired",
    "observed",
    "diff",
    "repair",
    "report",
    "metrics",
    "audit",
    "heartbeat",
    "fleet",
];

/// The only code that touches the world; what it uses is its own affair.
const SHELL: &[&str] = &["sys", "source", "apply", "daemon", "cli"];

/// Single paths that a module may use against the rules, each with its reason. A module's exception holds
/// for the modules inside it.
const EXCEPTIONS: &[(&str, &str)] = &[
    // A counter's packets and bytes are part of a rule as well as something observed.
    ("ruleset", "crate::observed::Amount"),
    ("desired", "crate::observed::Amount"),
    // It reads the file it is named after, and must not hang on one that turns out to be a pipe.
    ("policy::load", "std::fs"),
    ("policy::load", "std::os::unix::fs::OpenOptionsExt"),
    ("policy::load", "libc::O_NONBLOCK"),
    ("policy::load", "libc::O_NOCTTY"),
];

/// Paths that lead to the world: files, processes, sockets, clocks, threads, logs.
const WORLD: &[&str] = &[
    "std::fs",
    "std::process",
    "std::env",
    "std::thread",
    "std::os",
    "std::time::Instant",
    "std::time::SystemTime",
    "std::io::stdin",
    "std::io::stdout",
    "std::io::stderr",
    "tokio",
    "rustix",
    "libc",
    "log",
    "aya",
    "aya_log",
    "rtnetlink",
    "genetlink",
    "netlink_sys",
    "netlink_proto",
    "hyper",
    "hyper_util",
    "sd_notify",
    "caps",
];

/// The same by a type's own name, for those who import the module around it.
const WORLD_NAMES: &[&str] =
    &["TcpStream", "TcpListener", "UdpSocket", "UnixStream", "UnixListener", "UnixDatagram", "SystemTime"];

const PRINTING: &[&str] = &["print", "println", "eprint", "eprintln", "dbg"];

#[test]
fn the_sidecars_modules_depend_in_one_direction() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sidecar/src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    let mut of_tests = BTreeSet::new();
    let mut checked = Vec::new();
    for file in &files {
        let inside = file.strip_prefix(&root).unwrap();
        let module = module_path(inside);
        // lib.rs and main.rs only name the modules.
        let Some(top) = module.first().cloned() else { continue };
        let text = fs::read_to_string(file).unwrap();
        let (found, test_modules) = violations(&module, &text);
        of_tests.extend(test_modules.into_iter().map(|name| [module.clone(), vec![name]].concat()));
        checked.push((module, format!("sidecar/src/{}", inside.display()), found));
        seen.insert(top);
    }
    for (module, shown, found) in checked {
        if !(1..=module.len()).any(|length| of_tests.contains(&module[..length])) {
            wrong.extend(found.into_iter().map(|(line, text)| format!("{shown}:{line}: {text}")));
        }
    }
    for top in &seen {
        if !SHELL.contains(&top.as_str()) && !PURE.iter().any(|(name, _)| name == top) {
            wrong.push(format!(
                "sidecar/src/{top}: a module that the layout in tests/direction.rs does not name"
            ));
        }
    }
    for needed in ["terms", "ruleset", "policy", "desired", "observed", "diff", "repair", "report"] {
        assert!(seen.contains(needed), "no {needed} in {}: is this the right folder?", root.display());
    }
    assert!(wrong.is_empty(), "{} uses against the direction\n{}", wrong.len(), wrong.join("\n"));
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
}

/// `policy/load.rs` -> policy, load; `policy/mod.rs` and `policy.rs` -> policy; `lib.rs` -> nothing.
fn module_path(file: &Path) -> Vec<String> {
    let mut path: Vec<String> =
        file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if path.last().is_some_and(|last| last == "mod") || path == ["lib"] || path == ["main"] {
        path.pop();
    }
    path
}

/// Every use against the rules with its line, and the names of modules in other files that are for tests only.
fn violations(module: &[String], text: &str) -> (Vec<(usize, String)>, Vec<String>) {
    let tokens: TokenStream = text.parse().unwrap_or_else(|error| panic!("{}: {error}", module.join("::")));
    let mut reading = Reading { paths: Vec::new(), test_modules: Vec::new() };
    reading.tokens(tokens, module);
    let Some((name, allowed)) = PURE.iter().find(|(name, _)| *name == module[0]) else {
        return (Vec::new(), reading.test_modules);
    };
    let mut out = Vec::new();
    for (line, path) in reading.paths {
        let shown = path.join("::");
        let leads = |to: &str| shown == to || shown.starts_with(&format!("{to}::"));
        let inside = |who: &str| format!("{}::", module.join("::")).starts_with(&format!("{who}::"));
        if EXCEPTIONS.iter().any(|(who, what)| inside(who) && leads(what)) {
            continue;
        }
        let world = WORLD.iter().any(|what| leads(what))
            || path.iter().any(|part| WORLD_NAMES.contains(&part.as_str()))
            || (path.len() > 1 && path.last().is_some_and(|last| last == "now"))
            || path
                .last()
                .is_some_and(|last| last.strip_suffix('!').is_some_and(|last| PRINTING.contains(&last)));
        if world {
            out.push((line, format!("{name} is a value and must not touch the world: {shown}")));
        } else if path[0] == "crate"
            && let Some(used) = path.get(1)
            && used != name
            && !allowed.contains(&used.as_str())
            && (SHELL.contains(&used.as_str()) || PURE.iter().any(|(other, _)| other == used))
        {
            let may = if allowed.is_empty() { "nothing".to_string() } else { allowed.join(" ") };
            out.push((line, format!("{name} must not use {used} ({shown}); it may use {may}")));
        }
    }
    (out, reading.test_modules)
}

struct Reading {
    /// Line and full path; `self` and `super` are resolved, a macro's name ends in `!`.
    paths: Vec<(usize, Vec<String>)>,
    test_modules: Vec<String>,
}

impl Reading {
    fn tokens(&mut self, tokens: TokenStream, module: &[String]) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            if let Some(after) = self.skip_tests(&tokens, at) {
                at = after;
                continue;
            }
            match &tokens[at] {
                TokenTree::Group(group) => {
                    // `mod name { .. }` is one level deeper for `super`.
                    let inner = match &tokens[..at] {
                        [.., TokenTree::Ident(keyword), TokenTree::Ident(name)]
                            if keyword == "mod" && group.delimiter() == Delimiter::Brace =>
                        {
                            [module, &[name.to_string()]].concat()
                        }
                        _ => module.to_vec(),
                    };
                    self.tokens(group.stream(), &inner);
                    at += 1;
                }
                // A field or method after a dot is not a path.
                TokenTree::Ident(_) if !is(&tokens, at.wrapping_sub(1), '.') => {
                    at = self.path(&tokens, at, &[], module);
                }
                _ => at += 1,
            }
        }
    }

    /// Reads `a::b::c`, `a::{b, c::d}`, `a!` from `at`; gives where it ends.
    fn path(&mut self, tokens: &[TokenTree], mut at: usize, before: &[String], module: &[String]) -> usize {
        let line = tokens[at].span().start().line;
        let mut path = before.to_vec();
        while let Some(TokenTree::Ident(name)) = tokens.get(at) {
            path.push(name.to_string());
            at += 1;
            if !(is(tokens, at, ':') && is(tokens, at + 1, ':')) {
                break;
            }
            match tokens.get(at + 2) {
                Some(TokenTree::Ident(_)) => at += 2,
                Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                    let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                    let mut part = 0;
                    while part < inner.len() {
                        part = match inner[part] {
                            TokenTree::Ident(_) => self.path(&inner, part, &path, module),
                            _ => part + 1,
                        };
                    }
                    return at + 3;
                }
                _ => break,
            }
        }
        if is(tokens, at, '!') && !is(tokens, at + 1, '=') {
            path.last_mut().expect("a path has a name").push('!');
        }
        self.paths.push((line, resolve(path, module)));
        at
    }

    /// Where the item ends that the `#[cfg(test)]` at `at` is about.
    fn skip_tests(&mut self, tokens: &[TokenTree], at: usize) -> Option<usize> {
        if !is(tokens, at, '#') {
            return None;
        }
        // `#![cfg(test)]` at the head of a file is about all of it.
        let inner = is(tokens, at + 1, '!');
        let TokenTree::Group(attribute) = tokens.get(at + 1 + usize::from(inner))? else { return None };
        if !is_cfg_test(attribute.stream()) {
            return None;
        }
        if inner {
            return Some(tokens.len());
        }
        let mut end = at + 2;
        while is(tokens, end, '#') {
            end += 2;
        }
        let words = tokens[end..].iter().filter_map(|token| match token {
            TokenTree::Ident(word) if word != "pub" => Some(word.to_string()),
            _ => None,
        });
        let words: Vec<String> = words.take(2).collect();
        // These end with a semicolon whatever braces they contain; other items with their first block.
        let until_semicolon = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["const", "fn" | "unsafe" | "extern"] => false,
            [first, ..] => ["use", "const", "static", "type", "let"].contains(&first),
            [] => false,
        };
        while let Some(token) = tokens.get(end) {
            end += 1;
            match token {
                TokenTree::Punct(mark) if mark.as_char() == ';' => {
                    if let [.., TokenTree::Ident(keyword), TokenTree::Ident(name), _] = &tokens[..end]
                        && keyword == "mod"
                    {
                        self.test_modules.push(name.to_string());
                    }
                    break;
                }
                TokenTree::Group(group) if group.delimiter() == Delimiter::Brace && !until_semicolon => break,
                _ => {}
            }
        }
        Some(end)
    }
}

fn is(tokens: &[TokenTree], at: usize, mark: char) -> bool {
    matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == mark)
}

/// `cfg(test)` and `cfg(all(test, ..))`, but not `cfg(not(test))`.
fn is_cfg_test(attribute: TokenStream) -> bool {
    let text: String = attribute.to_string().split_whitespace().collect();
    text == "cfg(test)" || text.starts_with("cfg(all(test,")
}

fn resolve(path: Vec<String>, module: &[String]) -> Vec<String> {
    let mut at = match path[0].as_str() {
        "self" | "super" => module.to_vec(),
        _ => return path,
    };
    let mut rest = path.as_slice();
    while let [first, more @ ..] = rest {
        match first.as_str() {
            "self" => {}
            "super" => drop(at.pop()),
            _ => break,
        }
        rest = more;
    }
    [vec!["crate".to_string()], at, rest.to_vec()].concat()
}

fn check(module: &str, text: &str, wanted: &[&str]) {
    let module: Vec<String> = module.split("::").map(str::to_string).collect();
    let found: Vec<String> =
        violations(&module, text).0.into_iter().map(|(line, text)| format!("{line}: {text}")).collect();
    assert_eq!(found, wanted, "{text}");
}

#[test]
fn uses_in_the_right_direction_pass() {
    check("diff", "use crate::{desired::Desired, terms::*}; fn a(o: crate::observed::Snapshot) {}", &[]);
    check("diff::listeners", "use super::Finding; use super::super::terms::Port; use self::x::y;", &[]);
    check("ruleset", "use crate::observed::Amount;", &[]);
    check("policy::load", "use std::fs; fn load() { fs::read(\"x\"); std::fs::read(\"y\"); }", &[]);
    check(
        "terms",
        "// std::fs\n/// tokio\nfn f() { let s = \"crate::source\"; now(); x.now(); f.println }",
        &[],
    );
    check("terms", "use std::net::IpAddr; use std::time::Duration; use std::io;", &[]);
    check("daemon", "use crate::source::nft; use tokio::net; fn f() { println!() }", &[]);
}

#[test]
fn uses_against_the_direction_are_named_with_their_line() {
    let nothing = "terms must not use ruleset (crate::ruleset::Table); it may use nothing";
    check("terms", "\nuse crate::ruleset::Table;", &[&format!("2: {nothing}")]);
    check("terms", "use super::ruleset::Table;", &[&format!("1: {nothing}")]);
    check("terms::port", "use super::super::{\n  ruleset::{Table},\n};", &[&format!("2: {nothing}")]);
    check("terms", "mod inner { use super::super::ruleset::Table; }", &[&format!("1: {nothing}")]);
    check("terms", "fn f() { vec![crate::ruleset::Table] }", &[&format!("1: {nothing}")]);
    let amount = "1: ruleset must not use observed (crate::observed::Snapshot); it may use terms";
    check("ruleset", "use crate::observed::{Amount, Snapshot};", &[amount]);
    check(
        "report",
        "use crate::daemon::Daemon;",
        &[&format!("1: report must not use daemon (crate::daemon::Daemon); it may use {}", FACES.join(" "))],
    );
}

#[test]
fn touching_the_world_is_named_in_every_spelling() {
    check("policy", "use std::fs;", &["1: policy is a value and must not touch the world: std::fs"]);
    for (text, path) in [
        ("use std::fs;", "std::fs"),
        ("use std::{collections::BTreeMap, process::Command};", "std::process::Command"),
        ("fn f() { ::std::fs::read(p) }", "std::fs::read"),
        ("use std::net::{IpAddr, TcpStream};", "std::net::TcpStream"),
        ("fn f() { net::UdpSocket::bind(a) }", "net::UdpSocket::bind"),
        ("use std::time::Instant;", "std::time::Instant"),
        ("fn f() { jiff::Timestamp::now() }", "jiff::Timestamp::now"),
        ("fn f() { log::warn!(\"x\") }", "log::warn!"),
        ("fn f() { println!(\"x\") }", "println!"),
        ("#[cfg(not(test))] use tokio::net;", "tokio::net"),
    ] {
        check("diff", text, &[&format!("1: diff is a value and must not touch the world: {path}")]);
    }
}

#[test]
fn tests_are_free_and_what_follows_them_is_not() {
    let wrong = "use crate::source::nft;";
    let found = |line| {
        format!(
            "{line}: diff must not use source (crate::source::nft); it may use desired observed policy ruleset terms"
        )
    };
    check("diff", &format!("#[cfg(test)]\nmod tests {{ {wrong} }}\n{wrong}"), &[&found(3)]);
    check("diff", &format!("#[cfg(test)] {wrong}\n{wrong}"), &[&found(2)]);
    check("diff", &format!("#[cfg(test)] use crate::source::{{nft, bpf}};\n{wrong}"), &[&found(2)]);
    check(
        "diff",
        &format!("#[cfg(all(test, unix))] #[allow(x)] pub const fn f() {{ crate::source::x }}\n{wrong}"),
        &[&found(2)],
    );
    check("diff", &format!("#![cfg(test)] {wrong}"), &[]);
    let (_, modules) = violations(&["diff".to_string()], "#[cfg(test)]\nmod tests;\nmod real;");
    assert_eq!(modules, ["tests"]);
}
