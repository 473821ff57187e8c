//! What the lab runs inside its namespaces. Not for people; `lab`'s functions start it.

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let text: Vec<&str> = words.iter().map(|word| word.to_str().unwrap_or("")).collect();
    let done = match text.as_slice() {
        ["enter", net, mounts, program, ..] => enter(net, mounts, program, &words[4..]),
        ["keep", netns] => keep(netns),
        ["reap", prefix, dir] => reap(prefix, Path::new(dir)),
        ["listen", name, what @ ..] => listen(name, what),
        ["bind", words @ ..] => try_binds(words),
        #[cfg(feature = "product")]
        ["spokes", count] => {
            count.parse().context("read the number of spokes").and_then(lab::serve_simulated)
        }
        #[cfg(feature = "product")]
        ["sweep", interface, address, run_dir] => sweep(interface, address, Path::new(run_dir)),
        _ => Err(anyhow::anyhow!(
            "usage: enter NET MNT COMMAND.. | keep NETNS | reap PREFIX DIR | listen NAME WHAT.. |\n\
             sweep INTERFACE ADDRESS DIR | bind WHAT.. | spokes COUNT"
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sg-lab-helper: {error:#}");
            ExitCode::from(127)
        }
    }
}

/// Joins a node and becomes the command. Returns only when that failed.
fn enter(net: &str, mounts: &str, program: &str, rest: &[OsString]) -> Result<()> {
    let folder = std::env::current_dir().context("read the current folder")?;
    // Before the mounts change: the path is the machine's. What the product guards by control group is
    // the lab's own, and nothing of the machine's.
    if let Some(group) = std::env::var_os("SPOKEGUARD_CGROUP") {
        let members = Path::new(&group).join("cgroup.procs");
        std::fs::write(&members, "0").with_context(|| format!("join {}", members.display()))?;
    }
    join(net, LinkNameSpaceType::Network)?;
    join(mounts, LinkNameSpaceType::Mount)?;
    // Joining a mount namespace goes to its root.
    std::env::set_current_dir(&folder).with_context(|| format!("return to {}", folder.display()))?;
    Err(Command::new(program).args(rest).exec()).with_context(|| format!("start {program}"))
}

fn join(path: &str, kind: LinkNameSpaceType) -> Result<()> {
    let namespace = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("open {path}"))?;
    move_into_link_name_space(namespace.as_fd(), Some(kind)).with_context(|| format!("enter {path}"))
}

/// Holds the mount namespace that `unshare` made, with folders of the node's own in it.
fn keep(netns: &str) -> Result<()> {
    join(&format!("/run/netns/{netns}"), LinkNameSpaceType::Network)?;
    // A duplicate-address check would hold every IPv6 address back for a second or two. Interfaces that
    // come later, such as the tunnel's, take the value of `default`.
    for interface in std::fs::read_dir("/proc/sys/net/ipv6/conf").context("list /proc/sys/net/ipv6/conf")? {
        let path = interface?.path().join("accept_dad");
        std::fs::write(&path, "0").with_context(|| format!("write {}", path.display()))?;
    }
    mount("bpf", "/sys/fs/bpf", "bpf", MountFlags::empty(), None).context("mount a bpffs on /sys/fs/bpf")?;
    // sshd wants its own empty folder; it and the folder of WireGuard's sockets are usually made at boot.
    for folder in ["/run/wireguard", "/run/sshd"] {
        std::fs::create_dir_all(folder).with_context(|| format!("create {folder}"))?;
        mount("tmpfs", folder, "tmpfs", MountFlags::empty(), Some(c"mode=0755"))
            .with_context(|| format!("mount a tmpfs on {folder}"))?;
    }
    println!("{}", lab::HELD);
    // The lab's reaper ends this process.
    loop {
        std::thread::park();
    }
}

/// Waits for the end of whoever started the lab, in whichever way, and cleans up.
fn reap(prefix: &str, dir: &Path) -> Result<()> {
    ensure!(prefix.starts_with("sg-") && prefix.ends_with('-'), "{prefix} is not a lab's prefix");
    let mut rest = [0u8; 16];
    while std::io::stdin().read(&mut rest).context("wait for the end of the lab")? > 0 {}
    lab::reap(prefix, dir);
    Ok(())
}

/// Sweeps every TCP port at a hundred probes a second.
#[cfg(feature = "product")]
fn sweep(interface: &str, address: &str, run_dir: &Path) -> Result<()> {
    use spokeguard::source::{links, probe};
    let link = links::read()?.into_iter().find(|link| link.name == interface).context("no such interface")?;
    let request = probe::Request {
        link,
        addresses: vec![address.parse().context("read the address")?],
        protos: vec![spokeguard::terms::Proto::Tcp],
        ports: vec![1..=u16::MAX],
        source: None,
        named: Vec::new(),
        plain: false,
        mode: probe::Mode::Verdict,
        rate: Some(100),
        threads: 2,
        care: Vec::new(),
        keeper: None,
        run_dir: run_dir.to_path_buf(),
    };
    let mut said = false;
    probe::sweep(&request, &mut |_| {
        if !std::mem::replace(&mut said, true) {
            println!("{}", lab::SWEEPING);
        }
    })?;
    Ok(())
}

/// Tries each bind and says what came of it, in a line each: the address that the socket then has, or the
/// error's number. `tcp/ADDRESS`, `udp/ADDRESS`; with `/dual` behind it an IPv6 socket takes IPv4 as well.
fn try_binds(words: &[&str]) -> Result<()> {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket, sockopt};
    for word in words {
        let mut parts = word.split('/');
        let (kind, address) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        let address: SocketAddr = address.parse().with_context(|| format!("read {word}"))?;
        let kind = if kind == "udp" { SocketType::DGRAM } else { SocketType::STREAM };
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = socket(family, kind, None)?;
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, parts.next() != Some("dual"))?;
        }
        let said = match bind(&socket, &address) {
            Ok(()) => SocketAddr::try_from(getsockname(&socket)?)?.to_string(),
            Err(error) => format!("errno {}", error.raw_os_error()),
        };
        println!("{said}");
    }
    Ok(())
}

enum Socket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// Listens as a process called NAME: TCP says the name (or a web page, as `web/ADDRESS`), UDP echoes.
/// `tcp/ADDRESS+9` means ten ports in a row.
fn listen(name: &str, what: &[&str]) -> Result<()> {
    let name_of_process = std::ffi::CString::new(name).context("a process name has no zero byte")?;
    rustix::thread::set_name(&name_of_process).context("name this process")?;
    let mut sockets = Vec::new();
    for word in what {
        let (kind, address) = word.split_once('/').with_context(|| format!("{word} is not KIND/ADDRESS"))?;
        let (address, more) = address.split_once('+').unwrap_or((address, "0"));
        let first: SocketAddr = address.parse().with_context(|| format!("read {word}"))?;
        for offset in 0..=more.parse::<u16>().with_context(|| format!("read {word}"))? {
            let mut address = first;
            address.set_port(first.port().checked_add(offset).context("there are 65535 ports")?);
            let socket = match kind {
                "tcp" | "web" => {
                    TcpListener::bind(address).map(|socket| (Socket::Tcp(socket), kind == "web"))
                }
                "udp" => UdpSocket::bind(address).map(|socket| (Socket::Udp(socket), false)),
                "v6only" | "reuseport" | "full" => {
                    special(kind, address).map(|socket| (Socket::Tcp(socket), false))
                }
                _ => bail!("{word}: tcp, web, udp, v6only, reuseport or full"),
            };
            sockets.push(socket.with_context(|| format!("bind {kind} {address}"))?);
        }
    }
    println!("{}", lab::BOUND);
    loop {
        let mut waiting: Vec<PollFd> = sockets
            .iter()
            .map(|(socket, _)| match socket {
                Socket::Tcp(socket) => PollFd::new(socket, PollFlags::IN),
                Socket::Udp(socket) => PollFd::new(socket, PollFlags::IN),
            })
            .collect();
        poll(&mut waiting, None).context("poll the listeners")?;
        let ready: Vec<bool> = waiting.iter().map(|fd| !fd.revents().is_empty()).collect();
        for ((socket, web), _) in sockets.iter().zip(ready).filter(|(_, ready)| *ready) {
            match answer(socket, name, *web) {
                // A peer that has gone away is its own business.
                Err(error) if error.kind() != ErrorKind::Other => {}
                other => other.context("answer")?,
            }
        }
    }
}

/// TCP listeners with an option of their own. `full`: its queue is full and nobody ever accepts.
fn special(kind: &str, address: SocketAddr) -> std::io::Result<TcpListener> {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket, sockopt};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket(family, SocketType::STREAM, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    match kind {
        "v6only" => sockopt::set_ipv6_v6only(&socket, true)?,
        "reuseport" => sockopt::set_socket_reuseport(&socket, true)?,
        _ => {}
    }
    bind(&socket, &address)?;
    listen(&socket, if kind == "full" { 0 } else { 16 })?;
    let listener = TcpListener::from(socket);
    if kind == "full" {
        // A backlog of 0 takes one; the rest of the loop is for kernels that take more.
        for _ in 0..8 {
            match std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
                Ok(stream) => std::mem::forget(stream),
                Err(_) => break,
            }
        }
        // Nobody looks at it again: it must not be among those that are polled.
        std::mem::forget(listener.try_clone()?);
        return TcpListener::bind((address.ip(), 0));
    }
    Ok(listener)
}

fn answer(socket: &Socket, name: &str, web: bool) -> std::io::Result<()> {
    match socket {
        Socket::Tcp(listener) => {
            let (mut stream, _) = listener.accept()?;
            stream.set_write_timeout(Some(Duration::from_millis(200)))?;
            if !web {
                return stream.write_all(format!("{name}\n").as_bytes());
            }
            // Closing with unread bytes would reset the connection under the answer.
            stream.set_read_timeout(Some(Duration::from_millis(200)))?;
            let _ = stream.read(&mut [0u8; 4096])?;
            stream
                .write_all(format!("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n{name}\n").as_bytes())
        }
        Socket::Udp(socket) => {
            let mut datagram = [0u8; 2048];
            let (length, from) = socket.recv_from(&mut datagram)?;
            socket.send_to(&datagram[..length], from).map(|_| ())
        }
    }
}
