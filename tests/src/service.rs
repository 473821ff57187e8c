//! Real programs that the lab's nodes run: sshd, listeners, web servers, Prometheus.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{Node, Outcome, Running, wait_until};

/// A process that listens.
pub struct Listening {
    pub running: Running,
}

/// A real sshd that lets root in with the key beside it.
pub struct Sshd {
    pub running: Running,
    pub config: PathBuf,
    key: PathBuf,
    port: u16,
}

/// A real Prometheus on the node's loopback.
pub struct Prometheus {
    pub running: Running,
    address: SocketAddr,
}

impl Node {
    /// Listens as a process of that name: `tcp/0.0.0.0:5432`, `udp/[::]:53`, `web/[::]:80`, and
    /// `tcp/127.0.0.1:20000+999` for a thousand ports in a row. Returns when all are bound.
    pub fn listen(&self, process: &str, what: &[&str]) -> Result<Listening> {
        let helper = crate::helper()?.display().to_string();
        let words: Vec<&str> =
            [&*helper, "listen", process].into_iter().chain(what.iter().copied()).collect();
        let mut running = self.spawn(&words)?;
        running.wait_for(crate::BOUND, Duration::from_secs(10))?;
        Ok(Listening { running })
    }

    pub fn listen_tcp(&self, address: IpAddr, port: u16) -> Result<Listening> {
        self.listen("listener", &[&format!("tcp/{}", SocketAddr::new(address, port))])
    }

    pub fn listen_udp(&self, address: IpAddr, port: u16) -> Result<Listening> {
        self.listen("listener", &[&format!("udp/{}", SocketAddr::new(address, port))])
    }

    /// A sweep of this node by a process of its own, so slow that a test can do something meanwhile.
    pub fn sweep_slowly(&self, interface: &str, address: IpAddr, run_dir: &Path) -> Result<Running> {
        let helper = crate::helper()?.display().to_string();
        let words = [&*helper, "sweep", interface, &address.to_string(), &run_dir.display().to_string()];
        let mut running = self.spawn(&words)?;
        running.wait_for(crate::SWEEPING, Duration::from_secs(10))?;
        Ok(running)
    }

    /// A web server on 80 and 443, IPv4 and IPv6.
    pub fn web(&self) -> Result<Listening> {
        self.listen("web", &["web/[::]:80", "web/[::]:443"])
    }

    /// A real sshd; `listen` as for its ListenAddress (`0.0.0.0`, `::`, a mesh address), `extra` more lines.
    pub fn sshd(&self, port: u16, listen: &[&str], extra: &str) -> Result<Sshd> {
        let folder = tempfile::Builder::new()
            .prefix(&format!("{}-sshd-", self.name))
            .tempdir_in(&self.dir)
            .context("create a folder for sshd")?
            .keep();
        // The lab's folder removes it; sshd's login process looks at the keys as root, others need not.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).context("close sshd's folder")?;
        for name in ["host_key", "user_key"] {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(folder.join(name));
            let outcome = crate::node::finish(keygen, "", Duration::from_secs(10), "ssh-keygen")?;
            ensure!(outcome.code == Some(0), "ssh-keygen: {}", outcome.all());
        }
        let addresses: String = listen.iter().map(|address| format!("ListenAddress {address}\n")).collect();
        let at = folder.display();
        let config = folder.join("sshd_config");
        fs::write(
            &config,
            format!(
                "Port {port}\n{addresses}HostKey {at}/host_key\nAuthorizedKeysFile {at}/user_key.pub\n\
                 PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\n\
                 PasswordAuthentication no\nUseDNS no\n{extra}\n"
            ),
        )
        .with_context(|| format!("write {}", config.display()))?;
        // sshd starts itself again for every connection and therefore insists on its full path.
        let sshd = crate::need::find("sshd").context("find sshd")?.display().to_string();
        let mut running = self.spawn(&[&sshd, "-D", "-e", "-f", &config.display().to_string()])?;
        running.wait_for("Server listening on", Duration::from_secs(10))?;
        Ok(Sshd { running, config, key: folder.join("user_key"), port })
    }

    /// A real Prometheus that scrapes `targets` every second. Returns when it is ready for questions.
    pub fn prometheus(&self, targets: &[SocketAddr]) -> Result<Prometheus> {
        let folder = tempfile::Builder::new().prefix("prometheus-").tempdir_in(&self.dir)?.keep();
        let targets: Vec<String> = targets.iter().map(|target| format!("\"{target}\"")).collect();
        let config = folder.join("prometheus.yml");
        fs::write(
            &config,
            format!(
                "global: {{ scrape_interval: 1s, scrape_timeout: 900ms }}\nscrape_configs:\n\
                 - job_name: spokeguard\n  static_configs: [ {{ targets: [ {} ] }} ]\n",
                targets.join(", ")
            ),
        )
        .with_context(|| format!("write {}", config.display()))?;
        self.prometheus_by(&config)
    }

    /// A real Prometheus by that configuration; its data go beside it.
    pub fn prometheus_by(&self, config: &Path) -> Result<Prometheus> {
        let folder = config.parent().context("a configuration is in a folder")?;
        let address: SocketAddr = ([127, 0, 0, 1], 9090).into();
        let running = self.spawn(&[
            "prometheus".to_string(),
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", folder.join("data").display()),
            format!("--web.listen-address={address}"),
            "--log.level=warn".to_string(),
        ])?;
        Ok(Prometheus { running: self.answering(running, address)?, address })
    }

    /// A real Alertmanager by that configuration, on the loopback, port 9093.
    pub fn alertmanager(&self, config: &Path) -> Result<Running> {
        let folder = config.parent().context("a configuration is in a folder")?;
        let running = self.spawn(&[
            "prometheus-alertmanager".to_string(),
            format!("--config.file={}", config.display()),
            format!("--storage.path={}", folder.join("alerts").display()),
            "--web.listen-address=127.0.0.1:9093".to_string(),
            // One of its own, without a cluster.
            "--cluster.listen-address=".to_string(),
        ])?;
        self.answering(running, ([127, 0, 0, 1], 9093).into())
    }

    /// Waits until a server of the Prometheus family says that it is ready.
    fn answering(&self, mut running: Running, address: SocketAddr) -> Result<Running> {
        wait_until(Duration::from_secs(20), "a server is ready", || {
            let ended = running.has_ended();
            let ready = self.http_get(address, "/-/ready", &[]).is_ok_and(|answer| answer.status == 200);
            (ready || ended).then_some(())
        })
        .with_context(|| running.log())?;
        ensure!(!running.has_ended(), "it ended at once\n{}", running.log());
        Ok(running)
    }
}

impl Sshd {
    /// Logs in from `from` and runs a command. A connection that fails is ssh's exit code 255.
    pub fn login(&self, from: &Node, to: IpAddr, command: &str) -> Result<Outcome> {
        from.run(&self.words(to, command, 5))
    }

    /// The same, talked to by its pipes while it runs. It ends by itself where nothing came back for a minute.
    pub fn session(&self, from: &Node, to: IpAddr, command: &str) -> Result<Child> {
        let mut ssh = from.command(&self.words(to, command, 60));
        ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start ssh")
    }

    fn words(&self, to: IpAddr, command: &str, patience_s: u32) -> Vec<String> {
        let patience = format!("ConnectTimeout={patience_s}");
        let (key, port, to) = (self.key.display().to_string(), self.port.to_string(), format!("root@{to}"));
        let words = ["ssh", "-F", "none", "-i", &key, "-p", &port, "-o", "BatchMode=yes"];
        let host =
            ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"];
        let alive = ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=6"];
        let rest = ["-o", &patience, &to, command];
        words.into_iter().chain(host).chain(alive).chain(rest).map(str::to_owned).collect()
    }
}

impl Prometheus {
    /// Its own metrics.
    pub fn metrics(&self, node: &Node) -> Result<String> {
        let answer = node.http_get(self.address, "/metrics", &[])?;
        ensure!(answer.status == 200, "Prometheus's own metrics: {}", answer.status);
        Ok(answer.body)
    }

    /// An instant query: labels and value of each series. `node` is the one it runs on.
    pub fn query(&self, node: &Node, expression: &str) -> Result<Vec<(serde_json::Value, f64)>> {
        let path = format!("/api/v1/query?query={}", percent(expression));
        let answer = node.http_get(self.address, &path, &[])?;
        ensure!(answer.status == 200, "query `{expression}`: {} {}", answer.status, answer.body);
        let document: serde_json::Value =
            serde_json::from_str(&answer.body).context("read Prometheus's answer")?;
        let series = document["data"]["result"].as_array().context("Prometheus's answer has no series")?;
        series
            .iter()
            .map(|one| {
                let value = one["value"][1].as_str().and_then(|text| text.parse().ok());
                Ok((one["metric"].clone(), value.with_context(|| format!("no number in {one}"))?))
            })
            .collect()
    }
}

fn percent(text: &str) -> String {
    text.bytes()
        .map(
            |byte| {
                if byte.is_ascii_alphanumeric() { (byte as char).to_string() } else { format!("%{byte:02X}") }
            },
        )
        .collect()
}
