//! A small internet on one machine: network namespaces joined by veth and a WireGuard tunnel.
//!
//! ```text
//!   internet  198.51.100.99 2001:db8:1::99 ---- eth0 198.51.100.7 2001:db8:1::7    spoke --- docker0 --- container
//!             203.0.113.1   2001:db8:2::1  ---- eth0 203.0.113.47 2001:db8:2::47   hub
//!   hub wg0 10.84.0.1 fd84::1  ======= tunnel through internet =======  wg0 10.84.0.16 fd84::16 spoke
//! ```
//!
//! Every lab has names of its own (`sg-PID-N-...`), so labs run side by side, and nothing touches the
//! machine's own network. A node is a network namespace *and* a mount namespace: wireguard-go's socket
//! folder is not per network namespace, and a bpffs per node keeps pins apart. `/sys` stays the machine's
//! (`ip netns exec` would hide cgroup and bpffs, which the product needs).
//!
//! A reaper process owns the cleaning up: it waits for the end of its standard input and then ends
//! everything that runs in the lab's namespaces. Dropping the lab, a panic, Ctrl-C and kill -9 are all
//! the same to it.

mod flood;
#[cfg(feature = "product")]
pub mod foreign;
pub mod machine;
mod memory;
mod need;
mod node;
mod older;
mod product;
mod reaper;
mod second;
mod service;
#[cfg(feature = "product")]
mod simulated;
mod spokes;
mod tailscaled;
mod tunnel;
pub mod wire;

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub use machine::{Machine, debian_package};
pub use memory::MemoryGroup;
pub use need::{Need, firewalld, lacking, missing, python};
pub use node::{Answer, HTTP_PATIENCE, Http, Node, Outcome, Running, Scan, states, times, wait_until};
pub use older::as_linux_6_1;
pub use product::{Daemon, spokeguard};
pub use reaper::reap;
pub use rustix::process::Signal;
pub use second::{SECOND_MESH, Second};
pub use service::{Listening, Prometheus, Sshd};
#[cfg(feature = "product")]
pub use simulated::{Simulated, serve_simulated, simulated_address};
pub use spokes::Spoke;
pub use tailscaled::Tailscaled;
pub use tunnel::Keys;

/// What the helper says when it is ready, as keeper, listener and sweeper. Nothing that an error could contain.
pub const HELD: &str = "the node is held";
pub const BOUND: &str = "every socket is bound";
pub const SWEEPING: &str = "the sweep has begun";

pub const OUTSIDER: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 99));
pub const OUTSIDER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x99));
pub const SPOKE_PUBLIC: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
pub const SPOKE_PUBLIC_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x7));
pub const HUB_PUBLIC: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 47));
pub const HUB_PUBLIC_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x47));
pub const HUB_MESH: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 84, 0, 1));
pub const HUB_MESH_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd84, 0, 0, 0, 0, 0, 0, 1));
pub const SPOKE_MESH: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 84, 0, 16));
pub const SPOKE_MESH_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd84, 0, 0, 0, 0, 0, 0, 0x16));
pub const CONTAINER: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 17, 0, 2));
pub const CONTAINER_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x17, 0, 0, 0, 0, 0, 2));
pub const TUNNEL_PORT: u16 = 51820;

/// How hub and spoke are joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mesh {
    /// A real WireGuard tunnel through `internet`: the kernel's if it has one, wireguard-go otherwise.
    WireGuard,
    /// A veth pair that is called wg0 at both ends: same addresses, no cryptography, much quicker.
    Plain,
}

/// What a lab consists of.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub mesh: Mesh,
    /// A container's namespace behind the spoke's bridge docker0.
    pub container: bool,
}

/// Field order is drop order: the tunnel's ends and the nodes' keepers only after the reaper is done.
pub struct Lab {
    reaper: Reaper,
    pub internet: Node,
    pub hub: Node,
    pub spoke: Node,
    pub container: Option<Node>,
    pub keys: Keys,
    /// For nodes whose policy says that their mesh is Tailscale's; says what a plain lab is.
    pub tailscaled: Tailscaled,
    pub shape: Shape,
    /// Files of this lab; removed with it.
    pub dir: PathBuf,
    _tunnel: Vec<Running>,
}

impl Lab {
    /// internet, hub and spoke with a real tunnel. Panics when it cannot be built: ask [`lacking`] first.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Lab {
        Lab::shaped(Shape { mesh: Mesh::WireGuard, container: false })
    }

    /// The same without WireGuard; about twice as quick.
    pub fn plain() -> Lab {
        Lab::shaped(Shape { mesh: Mesh::Plain, container: false })
    }

    pub fn shaped(shape: Shape) -> Lab {
        Lab::build(shape).unwrap_or_else(|error| panic!("build a lab of namespaces: {error:#}"))
    }

    pub fn build(shape: Shape) -> Result<Lab> {
        Lab::build_around(shape, None)
    }

    /// A plain one whose spoke is the machine itself, whatever its first process is going to be. Nothing of it must
    /// be in use: what the lab makes there is called eth0 and wg0.
    pub fn around_this_machine() -> Result<Lab> {
        Lab::build_around(Shape { mesh: Mesh::Plain, container: false }, Some("spoke"))
    }

    fn build_around(shape: Shape, this_machine: Option<&str>) -> Result<Lab> {
        static SWEPT: Once = Once::new();
        SWEPT.call_once(reaper::sweep);
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("sg-{}-{}-", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(prefix.trim_end_matches('-'));
        // Keys lie in there.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("create {}", dir.display()))?;
        let reaper = Reaper::start(&prefix, &dir)?;

        let mut names = vec!["internet", "hub", "spoke"];
        if shape.container {
            names.push("ctr");
        }
        ip(None, &wiring(&prefix, &names, shape, this_machine))?;
        let mut nodes = Node::open_all(&prefix, &names, &dir)?;
        std::thread::scope(|scope| {
            let steps: Vec<_> = nodes
                .iter()
                .map(|node| scope.spawn(|| ip(Some(&node.netns), &addressing(&node.name, shape))))
                .collect();
            steps.into_iter().try_for_each(|step| step.join().expect("an addressing thread panicked"))
        })?;
        let container = if shape.container { nodes.pop() } else { None };
        let (spoke, hub, internet) = match (nodes.pop(), nodes.pop(), nodes.pop()) {
            (Some(spoke), Some(hub), Some(internet)) => (spoke, hub, internet),
            _ => bail!("the lab has fewer nodes than it named"),
        };
        internet.forward()?;
        if shape.container {
            spoke.forward()?;
        }
        let keys = Keys::generate()?;
        let tailscaled =
            Tailscaled::start(&dir, &[SPOKE_MESH.to_string().as_str(), &SPOKE_MESH_V6.to_string()])?;
        let mut lab = Lab {
            reaper,
            internet,
            hub,
            spoke,
            container,
            keys,
            tailscaled,
            shape,
            dir,
            _tunnel: Vec::new(),
        };
        if shape.mesh == Mesh::WireGuard {
            lab._tunnel = tunnel::raise(&lab)?;
        }
        lab.await_reach()?;
        Ok(lab)
    }

    /// A closed port that answers proves the way there and back without any process at the far end.
    fn await_reach(&self) -> Result<()> {
        let mut ways = vec![
            (&self.internet, SPOKE_PUBLIC),
            (&self.internet, SPOKE_PUBLIC_V6),
            (&self.internet, HUB_PUBLIC),
            (&self.internet, HUB_PUBLIC_V6),
            (&self.hub, SPOKE_MESH),
            (&self.hub, SPOKE_MESH_V6),
        ];
        if self.container.is_some() {
            ways.extend([(&self.spoke, CONTAINER), (&self.spoke, CONTAINER_V6)]);
        }
        for (from, to) in ways {
            let closed = SocketAddr::new(to, 9);
            wait_until(Duration::from_secs(10), &format!("{} reaches {to}", from.name), || {
                (from.connect(closed, Duration::from_millis(300)) == Answer::Refused).then_some(())
            })?;
        }
        Ok(())
    }

    /// The names of this lab's namespaces all start with this.
    pub fn prefix(&self) -> &str {
        &self.reaper.prefix
    }

    /// Every node, for tests that want to say something about all of them.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        [&self.internet, &self.hub, &self.spoke].into_iter().chain(&self.container)
    }

    /// Publishes a port of the container the way Docker does: DNAT for whatever is addressed to the host.
    pub fn publish(&self, host_port: u16, container_port: u16) -> Result<()> {
        self.publish_by("tcp", host_port, container_port)
    }

    /// The same for datagrams.
    pub fn publish_udp(&self, host_port: u16, container_port: u16) -> Result<()> {
        self.publish_by("udp", host_port, container_port)
    }

    fn publish_by(&self, proto: &str, host_port: u16, container_port: u16) -> Result<()> {
        ensure!(self.container.is_some(), "this lab has no container whose port could be published");
        self.spoke.nft(&format!(
            "add table ip docker_like
             add chain ip docker_like prerouting {{ type nat hook prerouting priority dstnat; }}
             add chain ip docker_like postrouting {{ type nat hook postrouting priority srcnat; }}
             add rule ip docker_like prerouting fib daddr type local {proto} dport {host_port} dnat to {CONTAINER}:{container_port}
             add rule ip docker_like postrouting ip saddr 172.17.0.0/16 oifname != \"docker0\" masquerade
             add table ip6 docker_like
             add chain ip6 docker_like prerouting {{ type nat hook prerouting priority dstnat; }}
             add rule ip6 docker_like prerouting fib daddr type local {proto} dport {host_port} dnat to [{CONTAINER_V6}]:{container_port}
            "
        ))
    }

    /// The policy of an ordinary spoke: 80 and 443 public, sshd on the mesh for the hub, keepalive 25 s.
    pub fn policy(&self) -> String {
        format!(
            r#"version = 1
[node]
name = "singapore"
role = "spoke"
[mesh]
kind = "wireguard"
interface = "wg0"
address = ["{SPOKE_MESH}", "{SPOKE_MESH_V6}"]
prefix = ["10.84.0.0/24", "fd84::/64"]
keepalive = "25s"
[mesh.hub]
address = "{HUB_MESH}"
public_key = "{}"
endpoint = "{HUB_PUBLIC}:{TUNNEL_PORT}"
[public]
tcp = [80, 443]
[ssh]
port = 22
bind = "mesh"
from = "hub"
"#,
            self.keys.hub.public
        )
    }

    /// The same for a mesh without cryptography.
    pub fn plain_policy(&self) -> String {
        let policy = self.policy().replace("kind = \"wireguard\"", "kind = \"tailscale\"");
        policy.replace("keepalive = \"25s\"\n", "")
    }

    /// Writes a file into the lab's folder and says where it is.
    pub fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

/// Namespaces and the wires between them, made in place: nothing appears in the machine's own namespace, unless it is
/// to be one of the nodes.
fn wiring(prefix: &str, names: &[&str], shape: Shape, this_machine: Option<&str>) -> String {
    let namespace = |name: &&str| match this_machine {
        Some(this) if this == *name => format!("netns attach {prefix}{name} 1\n"),
        _ => format!("netns add {prefix}{name}\n"),
    };
    let mut batch: String = names.iter().map(namespace).collect();
    // Each end gets an index of its own: where two ends had the same one, the kernel would take them for
    // ordinary links, whose coming up it looks at no more than once a second.
    let mut index = 10;
    let mut wire = |a: &str, a_interface: &str, b: &str, b_interface: &str| {
        batch += &format!(
            "link add {a_interface} index {index} netns {prefix}{a} type veth \
             peer name {b_interface} index {} netns {prefix}{b}\n",
            index + 1
        );
        index += 2;
    };
    wire("spoke", "eth0", "internet", "spoke0");
    wire("hub", "eth0", "internet", "hub0");
    if shape.mesh == Mesh::Plain {
        wire("spoke", "wg0", "hub", "wg0");
    }
    if shape.container {
        wire("spoke", "veth0", "ctr", "eth0");
    }
    batch
}

fn addressing(node: &str, shape: Shape) -> String {
    let mut batch = String::from("link set lo up\n");
    let mut up = |interface: &str, addresses: &[&str]| {
        for address in addresses {
            batch += &format!("addr add {address} dev {interface}\n");
        }
        batch += &format!("link set {interface} up\n");
    };
    match node {
        "internet" => {
            up("spoke0", &["198.51.100.99/24", "2001:db8:1::99/64"]);
            up("hub0", &["203.0.113.1/24", "2001:db8:2::1/64"]);
        }
        "hub" => up("eth0", &["203.0.113.47/24", "2001:db8:2::47/64"]),
        "spoke" => up("eth0", &["198.51.100.7/24", "2001:db8:1::7/64"]),
        _ => up("eth0", &["172.17.0.2/16", "fd00:17::2/64"]),
    }
    if shape.mesh == Mesh::Plain && matches!(node, "hub" | "spoke") {
        up("wg0", tunnel::addresses(node));
    }
    batch += match node {
        "hub" => "route add default via 203.0.113.1\nroute add ::/0 via 2001:db8:2::1\n",
        "spoke" => "route add default via 198.51.100.99\nroute add ::/0 via 2001:db8:1::99\n",
        "ctr" => "route add default via 172.17.0.1\nroute add ::/0 via fd00:17::1\n",
        _ => "",
    };
    if shape.container && node == "spoke" {
        batch += "link add docker0 type bridge\nlink set veth0 master docker0 up\n\
                  addr add 172.17.0.1/16 dev docker0\naddr add fd00:17::1/64 dev docker0\n\
                  link set docker0 up\n";
    }
    batch
}

/// One `ip` for many commands: each start of the program costs more than what it does.
fn ip(netns: Option<&str>, batch: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start ip")?;
    child.stdin.take().context("ip has no standard input")?.write_all(batch.as_bytes())?;
    let output = child.wait_with_output().context("wait for ip")?;
    ensure!(
        output.status.success(),
        "ip in {}: {}\n{batch}",
        netns.unwrap_or("the machine's own namespace"),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

struct Reaper {
    child: Child,
    prefix: String,
}

impl Reaper {
    fn start(prefix: &str, dir: &Path) -> Result<Reaper> {
        use std::os::unix::process::CommandExt;
        let child = Command::new(helper()?)
            .arg("reap")
            .arg(prefix)
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // A group of its own: Ctrl-C reaches the tests and not what cleans up after them.
            .process_group(0)
            .spawn()
            .context("start the lab's reaper")?;
        Ok(Reaper { child, prefix: prefix.to_string() })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        let started = Instant::now();
        drop(self.child.stdin.take());
        if let Err(error) = self.child.wait() {
            eprintln!("lab {}: wait for the reaper: {error}", self.prefix);
        }
        if started.elapsed() > Duration::from_secs(2) {
            eprintln!("lab {}: cleaning up took {:?}", self.prefix, started.elapsed());
        }
    }
}

/// The helper program stands beside the test, demo or bench program, or one folder up from a test.
pub fn helper() -> Result<PathBuf> {
    let me = std::env::current_exe().context("find this program")?;
    let folders = me.ancestors().skip(1).take(2);
    folders.map(|folder| folder.join("sg-lab-helper")).find(|path| path.is_file()).with_context(|| {
        format!("no sg-lab-helper near {}: cargo build -p spokeguard-tests --bins", me.display())
    })
}

/// Somebody who goes on until he is told to stop, and what is done meanwhile; both come to something. A panic of the
/// work stops him, too.
pub fn meanwhile<T, U: Send>(
    somebody: impl FnOnce(&AtomicBool) -> U + Send,
    work: impl FnOnce() -> T,
) -> (T, U) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| somebody(&stop));
        let done = catch_unwind(AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        let came = other.join().expect("who goes on meanwhile has panicked");
        (done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), came)
    })
}

/// Packets that found the queue of their processor full, of all processors and since this kernel started: the second
/// word of each line of softnet_stat.
pub fn packets_lost() -> u64 {
    let text = fs::read_to_string("/proc/net/softnet_stat").unwrap();
    let words = text.lines().filter_map(|line| line.split_whitespace().nth(1));
    words.map(|word| u64::from_str_radix(word, 16).unwrap()).sum()
}
