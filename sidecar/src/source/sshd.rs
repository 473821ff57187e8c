//! What sshd says of itself: `sshd -T` of the very program that listens, with the same
//! options. The listening sockets stay the truth about addresses; this adds what no socket
//! shows, such as password logins.
//!
//! `-T` without a connection says nothing of `Match` blocks.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::observed::{Listener, Sshd};
use crate::terms::{Actor, Port, Proto, printable};

/// `None`: no sshd listens. What another server (dropbear, Tailscale) allows is no business
/// of this facet; that it holds the port, the listeners tell. An sshd that does listen and
/// can't be asked is an error.
pub fn read(listeners: &[Listener], port: Port) -> anyhow::Result<Option<Sshd>> {
    let invocation = match server(listeners, port)? {
        Server::Running(actor) => running(&actor)?,
        Server::Activated => match installed()? {
            Some(program) => Invocation { program, options: Vec::new() },
            None => return Ok(None),
        },
        Server::Absent => return Ok(None),
    };
    let what = format!("{} -T", invocation.program.display());
    let text = run(&invocation, DEADLINE).with_context(|| what.clone())?;
    decode(&text).context(what).map(Some)
}

/// The same of the one that is installed, whether it runs or not; `None`: there is none.
pub fn read_installed() -> anyhow::Result<Option<Sshd>> {
    let Some(program) = installed()? else { return Ok(None) };
    let what = format!("{} -T", program.display());
    let text = run(&Invocation { program, options: Vec::new() }, DEADLINE).with_context(|| what.clone())?;
    decode(&text).context(what).map(Some)
}

const DEADLINE: Duration = Duration::from_secs(5);
const OUTPUT_MAX: usize = 256 * 1024;

enum Server {
    /// This process holds the port, or an sshd holds another one.
    Running(Actor),
    /// systemd holds the port and starts sshd for a connection.
    Activated,
    Absent,
}

fn server(listeners: &[Listener], port: Port) -> anyhow::Result<Server> {
    let tcp = || listeners.iter().filter(|listener| listener.proto == Proto::Tcp);
    let mut on_port = tcp().filter(|listener| listener.port == port).peekable();
    if on_port.peek().is_none() {
        let elsewhere =
            tcp().filter_map(|listener| listener.owner.as_ref()).find(|owner| owner.process == "sshd");
        return Ok(elsewhere.map_or(Server::Absent, |owner| Server::Running(owner.clone())));
    }
    let mut owners: Vec<&Actor> = on_port.filter_map(|listener| listener.owner.as_ref()).collect();
    // An sshd first: a program on another address of the port must not hide it.
    owners.sort_by_key(|owner| (owner.process != "sshd", owner.pid));
    match owners.first() {
        None => {
            bail!("the process that listens on tcp/{port} can't be seen (run as root, with CAP_SYS_PTRACE)")
        }
        Some(owner) if owner.pid == 1 && matches!(owner.process.as_str(), "systemd" | "init") => {
            Ok(Server::Activated)
        }
        Some(owner) if owner.process.contains("sshd") => Ok(Server::Running((*owner).clone())),
        Some(_) => Ok(Server::Absent),
    }
}

struct Invocation {
    program: PathBuf,
    options: Vec<OsString>,
}

/// The program of a running server, and the options that shape its configuration. It is
/// started as root, so only root's own program and process will do.
fn running(actor: &Actor) -> anyhow::Result<Invocation> {
    let folder = PathBuf::from(format!("/proc/{}", actor.pid));
    let exe =
        std::fs::read_link(folder.join("exe")).with_context(|| format!("find the program of {actor}"))?;
    // After an upgrade the running file is gone and the new one is in its place.
    let exe = exe.as_os_str().as_bytes();
    let program = PathBuf::from(OsStr::from_bytes(exe.strip_suffix(b" (deleted)").unwrap_or(exe)));
    ensure!(
        program.file_name() == Some(OsStr::new("sshd")),
        "the ssh port is held by {actor}, which is not OpenSSH's sshd: its settings can't be read"
    );
    let status = std::fs::read_to_string(folder.join("status"))
        .with_context(|| format!("read the user of {actor}"))?;
    ensure!(
        effective_uid(&status) == Some(0),
        "{actor} does not run as root: its options are not to be trusted"
    );
    // Paths of a container's sshd lead elsewhere here.
    let root = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let theirs = root(&folder.join("root")).with_context(|| format!("find the root folder of {actor}"))?;
    ensure!(
        theirs == root(Path::new("/")).context("find our root folder")?,
        "{actor} has another root folder (a container): its settings can't be read from here"
    );
    trusted(&program)?;
    let line = settled(|| std::fs::read(folder.join("cmdline")))
        .with_context(|| format!("read the options of {actor}"))?;
    Ok(Invocation { program, options: options(&line) })
}

/// What is read twice the same: while it starts, sshd writes its title over its options, and a look in
/// between sees parts of both.
fn settled(read: impl Fn() -> io::Result<Vec<u8>>) -> io::Result<Vec<u8>> {
    const LOOKS: u32 = 20;
    let mut seen = read()?;
    for _ in 0..LOOKS {
        std::thread::sleep(Duration::from_millis(1));
        let again = read()?;
        if again == seen {
            break;
        }
        seen = again;
    }
    Ok(seen)
}

/// The sshd that a service manager would start.
fn installed() -> anyhow::Result<Option<PathBuf>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/usr/local/sbin", "/run/current-system/sw/bin"].map(PathBuf::from);
    let found = usual
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join("sshd"))
        .find(|program| program.is_absolute() && program.is_file());
    found.map(|program| trusted(&program).map(|()| program)).transpose()
}

fn trusted(program: &Path) -> anyhow::Result<()> {
    let shown = program.display();
    let meta = std::fs::metadata(program).with_context(|| format!("look at {shown}"))?;
    ensure!(
        meta.is_file() && meta.uid() == 0 && meta.mode() & 0o022 == 0,
        "{shown} is not a file that only root can write: it is not run"
    );
    Ok(())
}

pub(super) fn effective_uid(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

/// The options of a command line that choose the configuration. sshd writes its state over
/// it (`sshd: /usr/sbin/sshd -D -f FILE [listener] 0 of 10-100 startups`), which joins the
/// arguments by blanks; since sshd takes no argument without an option, a value goes on to
/// the next dash.
pub(super) fn options(cmdline: &[u8]) -> Vec<OsString> {
    let words: Vec<&[u8]> = match cmdline.strip_prefix(b"sshd: ") {
        Some(title) => {
            let end = title.windows(11).rposition(|part| part == b" [listener]").unwrap_or(title.len());
            title[..end].split(|byte| *byte == b' ' || *byte == 0).filter(|word| !word.is_empty()).collect()
        }
        None => cmdline.split(|byte| *byte == 0).filter(|word| !word.is_empty()).collect(),
    };
    let mut kept = Vec::new();
    let mut words = words.into_iter().skip(1).peekable();
    while let Some(word) = words.next() {
        let Some(flags) = word.strip_prefix(b"-") else { continue };
        for (at, flag) in flags.iter().enumerate() {
            // The options of sshd(8) that take a value.
            if !b"CEbcfghkopu".contains(flag) {
                if b"46".contains(flag) {
                    kept.push(OsString::from_vec(vec![b'-', *flag]));
                }
                continue;
            }
            let mut value = flags[at + 1..].to_vec();
            while let Some(more) = words.next_if(|next| value.is_empty() || !next.starts_with(b"-")) {
                if !value.is_empty() {
                    value.push(b' ');
                }
                value.extend_from_slice(more);
            }
            if b"cfhop".contains(flag) && !value.is_empty() {
                kept.push(OsString::from_vec(vec![b'-', *flag]));
                kept.push(OsString::from_vec(value));
            }
            break;
        }
    }
    kept
}

/// Standard output of a run that went well. Killed when it takes too long or says too much.
fn run(invocation: &Invocation, limit: Duration) -> anyhow::Result<String> {
    let mut child = Command::new(&invocation.program)
        .arg("-T")
        .args(&invocation.options)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Its own group, so that a signal to ours from a terminal leaves it to us.
        .process_group(0)
        .spawn()
        .context("start it")?;
    let result = watch(&mut child, limit);
    if result.is_err() {
        // Both fail only when it has ended already.
        let _ = child.kill();
        let _ = child.wait();
    }
    let (status, output, errors) = result?;
    if !status.success() {
        let first = String::from_utf8_lossy(&errors);
        let first = first.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
        bail!("{}", printable(first.trim(), 300));
    }
    String::from_utf8(output).context("its output is not text")
}

type Ended = (ExitStatus, Vec<u8>, Vec<u8>);

fn watch(child: &mut Child, limit: Duration) -> anyhow::Result<Ended> {
    let deadline = Instant::now() + limit;
    let mut stdout = child.stdout.take();
    let mut stderr = child.stderr.take();
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    while stdout.is_some() || stderr.is_some() {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "it does not end within {limit:?}");
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut ready = Vec::with_capacity(2);
        ready.extend(stdout.as_ref().map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)));
        ready.extend(stderr.as_ref().map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)));
        match poll(&mut ready, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for its output"),
        }
        let mut seen = ready.iter().map(|pipe| !pipe.revents().is_empty()).collect::<Vec<_>>().into_iter();
        take_from(&mut stdout, &mut seen, &mut output)?;
        take_from(&mut stderr, &mut seen, &mut errors)?;
    }
    // Both pipes are closed; the end follows at once unless it means harm.
    let left = deadline.saturating_duration_since(Instant::now());
    let ended = super::child::ended_within(child, left).context("wait for its end")?;
    let status = ended.with_context(|| format!("it does not end within {limit:?}"))?;
    Ok((status, output, errors))
}

/// Reads once from a pipe that is ready, and forgets one that has ended.
fn take_from<P: Read>(
    pipe: &mut Option<P>,
    seen: &mut impl Iterator<Item = bool>,
    into: &mut Vec<u8>,
) -> anyhow::Result<()> {
    if pipe.is_none() || seen.next() != Some(true) {
        return Ok(());
    }
    let mut buffer = [0; 8192];
    match pipe.as_mut().map(|pipe| pipe.read(&mut buffer)) {
        Some(Ok(length)) if length > 0 => into.extend_from_slice(&buffer[..length]),
        Some(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
        Some(Err(error)) => return Err(error).context("read its output"),
        _ => *pipe = None,
    }
    ensure!(into.len() <= OUTPUT_MAX, "its output is larger than {OUTPUT_MAX} bytes");
    Ok(())
}

/// The lines `key value` of `sshd -T`. What decides must be there.
pub(super) fn decode(text: &str) -> anyhow::Result<Sshd> {
    let find =
        |key: &str| text.lines().find_map(|line| line.split_once(' ').filter(|(name, _)| *name == key));
    let value = |key: &str| {
        find(key).map(|(_, value)| value.trim()).with_context(|| format!("it does not say {key}"))
    };
    let yes = |text: &str| text == "yes";
    let mut listen = Vec::new();
    for line in text.lines() {
        if let Some(address) = line.strip_prefix("listenaddress ") {
            listen.push(parse_address(address.trim()).with_context(|| {
                format!("it listens on {:?}, which is no address", printable(address.trim(), 64))
            })?);
        }
    }
    Ok(Sshd {
        password_authentication: yes(value("passwordauthentication")?),
        // Called challengeresponseauthentication before OpenSSH 8.7.
        // Without PAM, on Linux, there is nobody to ask the questions.
        keyboard_interactive: yes(
            value("kbdinteractiveauthentication").or_else(|_| value("challengeresponseauthentication"))?
        ) && find("usepam").is_some_and(|(_, value)| yes(value.trim())),
        permit_root_login: printable(value("permitrootlogin")?, 64),
        listen,
    })
}

/// `0.0.0.0:22`, `[::]:22` or `[fe80::1%eth0]:22`; may be followed by a routing domain.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let text = text.split_whitespace().next()?;
    match text.split_once('%') {
        None => text.parse().ok(),
        Some((address, rest)) => format!("{address}{}", rest.get(rest.find(']')?..)?).parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::source::listeners;
    use crate::source::owners::Owners;
    use crate::source::{Running, in_namespace, sh, soon};

    const CAPTURE: &str = include_str!("captures/sshd-T.txt");

    fn strings(options: Vec<OsString>) -> Vec<String> {
        options.into_iter().map(|option| option.into_string().expect("text")).collect()
    }

    #[test]
    fn what_sshd_says_becomes_values() {
        let sshd = decode(CAPTURE).expect("a sound capture");
        let listen = ["[::]:22", "0.0.0.0:22"].map(|text| text.parse().expect("an address"));
        assert_eq!(
            sshd,
            Sshd {
                password_authentication: true,
                keyboard_interactive: false,
                permit_root_login: "without-password".into(),
                listen: listen.to_vec(),
            }
        );
        let strict = CAPTURE.replace("passwordauthentication yes", "passwordauthentication no");
        assert!(!decode(&strict).expect("sound").password_authentication);
        let old = CAPTURE.replace("kbdinteractiveauthentication no", "challengeresponseauthentication yes");
        let with_pam = old.replace("usepam no", "usepam yes");
        assert!(decode(&with_pam).expect("sound").keyboard_interactive);
        let without = with_pam.replace("usepam yes", "usepam no");
        assert!(!decode(&without).expect("sound").keyboard_interactive);
        let zone =
            decode(&format!("{CAPTURE}listenaddress [fe80::1%eth0]:2222 rdomain red\n")).expect("sound");
        assert_eq!(zone.listen.last(), Some(&"[fe80::1]:2222".parse().expect("an address")));
    }

    #[test]
    fn an_answer_that_leaves_out_what_decides_is_an_error() {
        for key in ["passwordauthentication ", "kbdinteractiveauthentication ", "permitrootlogin "] {
            let error = decode(&CAPTURE.replace(key, "x ")).expect_err(key);
            assert!(format!("{error:#}").contains("does not say"), "{error:#}");
        }
        assert!(decode(&format!("{CAPTURE}listenaddress somewhere\n")).is_err());
        assert!(decode("").is_err());
    }

    #[test]
    fn options_that_shape_the_configuration_are_kept_and_others_are_not() {
        let check = |cmdline: &str, wanted: &[&str]| {
            assert_eq!(strings(options(cmdline.as_bytes())), wanted, "{cmdline:?}");
        };
        check("/usr/sbin/sshd\0-D\0", &[]);
        check("/usr/sbin/sshd\0-D\0-f\0/etc/ssh/other\0", &["-f", "/etc/ssh/other"]);
        check("/usr/sbin/sshd\0-Df/etc/other\0-e\0-p2222\0-4\0", &["-f", "/etc/other", "-p", "2222", "-4"]);
        check(
            "sshd\0-o\0Port 2222\0-oPermitRootLogin=no\0",
            &["-o", "Port 2222", "-o", "PermitRootLogin=no"],
        );
        check("sshd\0-E\0/var/log/x\0-h\0/k\0-u\x000\0-C\0user=a\0", &["-h", "/k"]);
        check("sshd\0-f\0", &[]);
        check("", &[]);
        // As sshd writes it over its arguments.
        check("sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups\0\0", &[]);
        check(
            "sshd: /usr/sbin/sshd -D -o Port 2222 -f /a b -q [listener] 1 of 10-100 startups",
            &["-o", "Port 2222", "-f", "/a b"],
        );
    }

    fn script(folder: &Path, text: &str) -> Invocation {
        let program = folder.join("sshd");
        std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).expect("written");
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("chmod");
        // Another test may be between fork and exec with the file open for writing.
        soon("the file to be free", || {
            (Command::new(&program)
                .arg("probe")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .map(Running)
                .is_ok())
            .then_some(())
        });
        Invocation { program, options: vec!["-f".into(), "/etc/ssh/other".into()] }
    }

    #[test]
    fn a_run_is_bounded_in_time_and_size_and_its_first_complaint_is_the_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = |text: &str, limit: u64| run(&script(folder.path(), text), Duration::from_millis(limit));
        assert_eq!(run("echo \"$@\"", 5000).expect("ran"), "-T -f /etc/ssh/other\n");
        assert_eq!(
            run("env | grep -v -e PWD -e _= -e SHLVL; exit 0", 5000).expect("ran"),
            "",
            "it has our environment"
        );
        let complaint =
            run("echo; printf 'no \\033hostkeys\\nmore\\n' >&2; exit 1", 5000).expect_err("failed");
        assert_eq!(format!("{complaint:#}"), "no \u{fffd}hostkeys");
        let started = Instant::now();
        let late = run("exec sleep 600", 200).expect_err("too slow");
        assert!(format!("{late:#}").contains("does not end") && started.elapsed() < Duration::from_secs(5));
        let large = run("exec yes", 5000).expect_err("too much");
        assert!(format!("{large:#}").contains("larger"), "{large:#}");
    }

    #[test]
    fn only_a_program_that_root_alone_can_write_is_run() {
        let folder = tempfile::tempdir().expect("a folder");
        let program = script(folder.path(), "").program;
        if std::fs::metadata(&program).expect("a file").uid() == 0 {
            assert!(trusted(&program).is_ok());
        }
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o775)).expect("chmod");
        assert!(trusted(&program).is_err(), "a file that its group can write was taken");
        assert!(trusted(folder.path()).is_err() && trusted(&folder.path().join("absent")).is_err());
        assert_eq!(effective_uid("Name:\tsshd\nUid:\t1000\t0\t0\t0\n"), Some(0));
        assert_eq!(effective_uid("Uid:\t0\t1000\t0\t0\n"), Some(1000));
        assert_eq!(effective_uid("Name: Uid:\n"), None);
    }

    fn listener(process: &str, pid: u32, port: u16) -> Listener {
        Listener {
            proto: Proto::Tcp,
            address: "0.0.0.0".parse().expect("an address"),
            port: Port::new(port).expect("a port"),
            v6only: false,
            device: None,
            inode: 1,
            uid: 0,
            owner: (pid > 0).then(|| Actor { pid, process: process.into(), unit: None, user: None }),
        }
    }

    #[test]
    fn the_server_is_found_by_its_socket() {
        let port = Port::new(22).expect("a port");
        let check = |listeners: &[Listener]| match server(listeners, port) {
            Ok(Server::Running(actor)) => format!("{} {}", actor.process, actor.pid),
            Ok(Server::Activated) => "activated".into(),
            Ok(Server::Absent) => "absent".into(),
            Err(error) => format!("error: {error}"),
        };
        assert_eq!(check(&[]), "absent");
        assert_eq!(check(&[listener("nginx", 9, 80)]), "absent");
        assert_eq!(check(&[listener("systemd", 1, 22)]), "activated");
        assert_eq!(check(&[listener("dropbear", 3, 22), listener("sshd", 8, 22)]), "sshd 8");
        assert_eq!(check(&[listener("nginx", 9, 80), listener("sshd", 8, 2222)]), "sshd 8");
        assert_eq!(check(&[listener("dropbear", 3, 22)]), "absent");
        assert!(check(&[listener("", 0, 22)]).starts_with("error: "));
        let mut udp = listener("sshd", 8, 22);
        udp.proto = Proto::Udp;
        assert_eq!(check(&[udp]), "absent");
    }

    #[test]
    fn a_running_sshd_is_asked_with_its_own_options() {
        let name = "source::sshd::tests::a_running_sshd_is_asked_with_its_own_options";
        if !in_namespace(name, &["sshd", "ssh-keygen"]) {
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().display();
        sh(&format!(
            "ip link set lo up; mkdir -p /run/sshd; ssh-keygen -q -t ed25519 -N '' -f {path}/key
             printf '%s\\n' 'HostKey {path}/key' 'ListenAddress 127.0.0.1' 'UsePAM no' \\
                 'PasswordAuthentication no' > {path}/config"
        ));
        let config = format!("{path}/config");
        let child = Command::new("/usr/sbin/sshd")
            .args(["-D", "-f", &config, "-o", "Port 2022", "-o", "PermitRootLogin no"])
            .spawn()
            .expect("sshd");
        let _sshd = Running(child);
        let mut owners = Owners::new();
        let found = soon("sshd's listener", || {
            let found = listeners::read(&mut owners).expect("listeners");
            found.iter().any(|l| l.owner.as_ref().is_some_and(|o| o.process == "sshd")).then_some(found)
        });
        // By its port, and by its name when the policy names another port.
        for port in [2022, 22] {
            let sshd = read(&found, Port::new(port).expect("a port")).expect("read").expect("an sshd");
            assert!(!sshd.password_authentication, "{sshd:?}");
            assert_eq!(sshd.permit_root_login, "no");
            assert_eq!(sshd.listen, ["127.0.0.1:2022".parse().expect("an address")]);
        }
        std::fs::write(&config, "Nonsense yes\n").expect("written");
        let error =
            format!("{:#}", read(&found, Port::new(2022).expect("a port")).expect_err("a broken file"));
        assert!(error.contains("/usr/sbin/sshd -T") && error.contains("Bad configuration option"), "{error}");
    }

    #[test]
    fn options_are_those_that_stay() {
        let looks = std::cell::RefCell::new(vec!["sshd: new", "sshd: new", "torn", "old"]);
        let next = || {
            let mut looks = looks.borrow_mut();
            Ok(if looks.len() > 1 { looks.pop() } else { looks.last().copied() }.unwrap().as_bytes().to_vec())
        };
        assert_eq!(settled(next).unwrap(), b"sshd: new");
        assert!(settled(|| Err(io::ErrorKind::NotFound.into())).is_err());
    }

    #[test]
    fn another_program_on_the_port_is_not_taken_for_sshd() {
        let mut other = listener("sshd", std::process::id(), 22);
        let error = format!("{:#}", read(&[other.clone()], other.port).expect_err("not an sshd"));
        assert!(error.contains("not OpenSSH's sshd"), "{error}");
        other.owner = Some(Actor { pid: u32::MAX, process: "sshd".into(), unit: None, user: None });
        assert!(read(&[other.clone()], other.port).is_err(), "a process that is gone was asked");
    }
}
