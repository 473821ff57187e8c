//! `spokeguard top` in a real terminal, under real traffic: what must show and what must not,
//! and that the terminal is given back however it ends.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lab::{
    Answer, Daemon, Lab, Need, Node, OUTSIDER, SPOKE_PUBLIC, SPOKE_PUBLIC_V6, lacking, spokeguard, wait_until,
};
use serde_json::Value;

use crate::daemon::{LONG, plain_policy};

/// A shell in a terminal of its own.
pub struct Terminal<'a> {
    node: &'a Node,
    socket: String,
}

impl<'a> Terminal<'a> {
    pub fn open(lab: &Lab, node: &'a Node, shell: &str) -> Self {
        let socket = lab.dir.join("tmux.sock").display().to_string();
        let terminal = Self { node, socket };
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", shell]);
        terminal
    }

    pub fn tmux(&self, words: &[&str]) -> String {
        self.node.ok(&[&["tmux", "-S", &self.socket], words].concat()).unwrap()
    }

    pub fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    pub fn type_line(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]);
        self.tmux(&["send-keys", "Enter"]);
    }

    pub fn await_screen(&self, what: &str, is: impl Fn(&str) -> bool) -> String {
        wait_until(LONG, what, || Some(self.screen()).filter(|screen| is(screen)))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.screen()))
    }
}

fn top(lab: &Lab, daemon: &Daemon, more: &[&str]) -> Value {
    let outcome =
        lab.spoke.spokeguard(&daemon.arguments(&[&["top", "--format", "json"], more].concat())).unwrap();
    assert_eq!(outcome.code, Some(0), "{}", outcome.all());
    outcome.json().unwrap()
}

/// Tells that the terminal is as a shell wants it.
pub const SANE: &str = "stty -a | grep -qw -e -icanon && echo TERMINAL=raw || echo TERMINAL=sane";

#[test]
fn top_shows_who_is_refused_and_gives_the_terminal_back() {
    if lacking(&[Need::Lab, Need::Spokeguard, Need::Tmux]) {
        return;
    }
    let lab = Lab::plain();
    let nobody = lab.dir.join("nobody-runs-here").display().to_string();
    let without = lab.spoke.spokeguard(&["top", "--once", "--run-dir", &nobody]).unwrap();
    assert_eq!(without.code, Some(2), "{}", without.all());
    assert!(without.stderr.contains("no daemon answers on "), "{}", without.all());

    let _web = lab.spoke.listen("web", &["web/[::]:80"]).unwrap();
    let daemon = lab.spoke.daemon(&plain_policy(&lab)).unwrap();
    let terminal = Terminal::open(&lab, &lab.spoke, "sh");
    let command: Vec<PathBuf> = vec![spokeguard().unwrap()];
    let command =
        format!("{} {}", command[0].display(), daemon.arguments(&["top", "--every", "500ms"]).join(" "));
    terminal.type_line("PS1='ready> '; clear; echo kept before");
    terminal.await_screen("a shell", |screen| screen.contains("\nready>"));
    terminal.type_line(&format!("clear; echo kept before; {command}; {SANE}"));
    let quiet = terminal.await_screen("a first view", |screen| screen.contains("q quits"));
    assert!(quiet.contains("singapore: ") && quiet.contains("none yet"), "{quiet}");
    assert!(!quiet.contains("kept before"), "a screen of its own:\n{quiet}");

    // A stranger's tries: some that are refused in both families, and one that is welcome.
    let knock =
        |address, port| lab.internet.connect(SocketAddr::new(address, port), Duration::from_millis(200));
    for _ in 0..3 {
        assert_eq!(knock(SPOKE_PUBLIC, 3389), Answer::Silent);
    }
    assert_eq!(knock(SPOKE_PUBLIC_V6, 22), Answer::Silent);
    assert_eq!(knock(SPOKE_PUBLIC, 80), Answer::Open);
    // By UDP as well; and an answer to what this host asked is none.
    lab.internet.flood_udp(SocketAddr::new(SPOKE_PUBLIC, 161), 3).unwrap();
    lab.internet.flood_udp(SocketAddr::new(SPOKE_PUBLIC_V6, 161), 2).unwrap();
    let _resolver = lab.internet.listen_udp(OUTSIDER, 5353).unwrap();
    for _ in 0..9 {
        let answer = lab.spoke.ask_udp(SocketAddr::new(OUTSIDER, 5353), LONG).unwrap();
        assert!(answer.is_some(), "the one who is asked answers");
    }
    let view = terminal.await_screen("the stranger", |screen| {
        row(screen, "198.51.100.99").is_some()
            && row(screen, "2001:db8:1::99").is_some()
            && row(screen, "  161/udp ").is_some_and(|row| row.split_whitespace().nth(2) == Some("5"))
    });
    for (port, tries) in [(" 3389/tcp ms-wbt-s", "3"), ("  161/udp snmp ", "5"), ("   22/tcp ssh ", "1")] {
        let refused = row(&view, port).unwrap_or_else(|| panic!("{port}: {view}"));
        assert_eq!(refused.split_whitespace().nth(2), Some(tries), "{view}");
    }
    let refused = view.lines().filter(|line| line.contains("/udp ") && !line.starts_with("  ")).count();
    assert_eq!(refused, 0, "no port that answers came to: {view}");
    let listed = row(&view, "   80/");
    assert!(listed.is_none(), "the public port is not refused: {listed:?}\n{view}");
    let stranger = view.split("198.51.100.99").nth(1).unwrap();
    assert_eq!(stranger.split_whitespace().next(), Some("7"), "refused or not, it is a stranger\n{view}");
    assert!(view.contains("DROPPED packets: ") && view.contains("public-tcp "), "{view}");
    assert!(view.lines().count() <= 24 && view.lines().all(|line| line.chars().count() <= 80), "{view}");

    // Probes of our own are no strangers.
    let audit = lab.spoke.spokeguard(&daemon.arguments(&["audit"])).unwrap();
    assert!(matches!(audit.code, Some(0 | 1)), "{}", audit.all());

    // Who flushed our table is told, first of all.
    lab.spoke.ok(&["nft", "flush", "table", "inet", "spokeguard"]).unwrap();
    let view = terminal.await_screen("who did it", |screen| screen.contains(" by nft (pid "));
    let strangers = view.matches("198.51.100.").count() + view.matches("2001:db8:").count();
    assert_eq!(strangers, 2, "the lab's outsider, in two families, and no probe:\n{view}");

    terminal.tmux(&["resize-window", "-x", "60", "-y", "14"]);
    let small = terminal.await_screen("a smaller view", |screen| {
        screen.lines().count() <= 14
            && screen.lines().all(|line| line.chars().count() <= 60)
            && screen.contains("q quits")
    });
    assert!(small.contains("TRAFFIC") && small.contains("public"), "{small}");
    terminal.tmux(&["resize-window", "-x", "80", "-y", "24"]);
    terminal.tmux(&["send-keys", "q"]);
    let after = terminal.await_screen("the shell again", |screen| screen.contains("TERMINAL="));
    assert!(
        after.contains("kept before") && after.contains("TERMINAL=sane") && !after.contains("TRAFFIC"),
        "{after}"
    );

    // The same when it is told to end. NO_COLOR leaves colours out.
    for signal in ["INT", "TERM"] {
        let pid = lab.dir.join(signal);
        terminal.type_line(&format!(
            "clear; NO_COLOR=1 sh -c 'echo $$ > {}; exec {command}'; {SANE}",
            pid.display()
        ));
        terminal.await_screen("a view without colours", |screen| screen.contains("q quits"));
        let escapes = terminal.tmux(&["capture-pane", "-p", "-e"]);
        assert!(
            !escapes.contains("\x1b[36") && !escapes.contains("\x1b[1m") && !escapes.contains("\x1b[32"),
            "{escapes:?}"
        );
        let pid = std::fs::read_to_string(pid).unwrap();
        lab.spoke.ok(&["kill", "-s", signal, pid.trim()]).unwrap();
        let after = terminal.await_screen("the shell again", |screen| screen.contains("TERMINAL="));
        assert!(after.contains("TERMINAL=sane") && !after.contains("TRAFFIC"), "SIG{signal}: {after}");
    }

    // Without a terminal: one view, as text and as JSON.
    let once = lab.spoke.spokeguard(&daemon.arguments(&["top", "--every", "200ms"])).unwrap();
    assert_eq!(once.code, Some(0), "{}", once.all());
    assert!(once.stdout.contains("TRAFFIC") && !once.stdout.contains('\x1b'), "{}", once.stdout);
    let json = std::thread::scope(|scope| {
        let view = scope.spawn(|| top(&lab, &daemon, &["--every", "3s"]));
        // It may not listen yet when the first one comes.
        wait_until(LONG, "the view is taken", || {
            knock(SPOKE_PUBLIC, 5900);
            view.is_finished().then_some(())
        })
        .unwrap();
        view.join().unwrap()
    });
    assert_eq!((&json["version"], &json["node"]), (&1.into(), &"singapore".into()), "{json}");
    let refused = json["refused"].as_array().unwrap();
    assert!(
        refused.len() == 1
            && refused[0]["port"] == 5900
            && refused[0]["proto"] == "tcp"
            && refused[0]["tries"].as_u64() >= Some(1),
        "{json}"
    );
    let stranger = &json["strangers"][0];
    assert_eq!(
        (&stranger["address"], &stranger["last_port"]),
        (&"198.51.100.99".into(), &5900.into()),
        "{json}"
    );
    assert_eq!(stranger["tries"], stranger["refused"], "{json}");
    let public = json["scopes"].as_array().unwrap().iter().find(|scope| scope["name"] == "public").unwrap();
    assert!(public["in"]["packets"].as_f64().unwrap() > 0.0, "{json}");
    assert!(json["drift"][0]["text"].as_str().unwrap().contains("by nft"), "{json}");

    // Datagrams of a flood are counted, or told as too many, and answers are not among them.
    let json = std::thread::scope(|scope| {
        let view = scope.spawn(|| top(&lab, &daemon, &["--every", "2s"]));
        wait_until(LONG, "the view is taken", || {
            lab.internet.flood_udp(SocketAddr::new(SPOKE_PUBLIC, 1900), 2000).unwrap();
            lab.spoke.ask_udp(SocketAddr::new(OUTSIDER, 5353), LONG).unwrap();
            view.is_finished().then_some(())
        })
        .unwrap();
        view.join().unwrap()
    });
    let refused = json["refused"].as_array().unwrap();
    assert!(refused.len() == 1 && refused[0]["port"] == 1900 && refused[0]["proto"] == "udp", "{json}");
    assert!(refused[0]["tries"].as_u64() > Some(100), "{json}");

    // A flood from addresses that nobody has: bounded, and nobody is called busy for it.
    let stop = AtomicBool::new(false);
    let json = std::thread::scope(|scope| {
        let flood = scope.spawn(|| lab.internet.flood_syn(SPOKE_PUBLIC, &[23, 445], &stop));
        let json = top(&lab, &daemon, &["--every", "2s"]);
        stop.store(true, Ordering::Relaxed);
        assert!(flood.join().unwrap().unwrap() > 1000);
        json
    });
    let (refused, strangers) = (json["refused"].as_array().unwrap(), json["strangers"].as_array().unwrap());
    let tries: u64 = refused.iter().map(|port| port["tries"].as_u64().unwrap()).sum();
    assert!(refused.len() == 2 && tries + json["missed"].as_u64().unwrap() > 1000, "{json}");
    assert!(strangers.len() <= 20 && strangers.iter().all(|one| one["tries"].as_u64() < Some(9)), "{json}");
}

fn row<'a>(screen: &'a str, what: &str) -> Option<&'a str> {
    screen.lines().find(|line| line.contains(what))
}
