//! A [`Policy`] as the file that says it in full: every key written out, defaults too.

use std::fmt::{Display, Write};
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Bind, Heartbeat, MeshKind, Mode, Policy, Role, Sources};
use crate::terms::{Port, push_net};

/// Normalised TOML. Reading it gives an equal policy.
pub fn show(policy: &Policy) -> String {
    let mut out = Lines(String::new());
    let Policy { node, mesh, public, ssh, services, locals, exceptions, files, enforce, metrics, heartbeat } =
        policy;
    out.key("version", 1);
    out.table("[node]");
    out.text("name", &node.name);
    out.text(
        "role",
        match node.role {
            Role::Spoke => "spoke",
            Role::Hub => "hub",
            Role::Device => "device",
        },
    );
    out.table("[mesh]");
    out.text(
        "kind",
        match mesh.kind {
            MeshKind::Wireguard => "wireguard",
            MeshKind::Tailscale => "tailscale",
        },
    );
    out.text("interface", &mesh.interface);
    if !mesh.address.is_empty() {
        out.texts("address", &mesh.address);
    }
    out.nets("prefix", &mesh.prefix);
    match mesh.keepalive {
        Some(every) => out.text("keepalive", humantime::format_duration(every)),
        None => out.text("keepalive", "off"),
    }
    out.text("handshake_max_age", humantime::format_duration(mesh.handshake_max_age));
    if let Some(port) = mesh.listen_port {
        out.key("listen_port", port);
    }
    if !mesh.tags.is_empty() {
        out.texts("tags", &mesh.tags);
    }
    if mesh.tailscale_ssh {
        out.key("tailscale_ssh", true);
    }
    if let Some(hub) = &mesh.hub {
        out.table("[mesh.hub]");
        out.texts("address", &hub.address);
        if let Some(key) = hub.public_key {
            out.text("public_key", key);
        }
        if let Some(endpoint) = hub.endpoint {
            out.text("endpoint", endpoint);
        }
    }
    out.table("[public]");
    out.ports(&public.tcp, &public.udp);
    if let Some(interfaces) = &public.interfaces {
        out.texts("interfaces", interfaces);
    }
    out.table("[ssh]");
    out.key("port", ssh.port);
    match &ssh.bind {
        Bind::Mesh => out.text("bind", "mesh"),
        Bind::Addresses(list) => out.texts::<IpAddr>("bind", list),
    }
    out.key("rebind", ssh.rebind);
    out.from(&ssh.from);
    for service in services {
        out.table("[[mesh.service]]");
        out.text("name", &service.name);
        out.ports(&service.tcp, &service.udp);
        out.from(&service.from);
    }
    for local in locals {
        out.table("[[local]]");
        out.text("name", &local.name);
        out.texts("interfaces", &local.interfaces);
        out.ports(&local.tcp, &local.udp);
    }
    for exception in exceptions {
        out.table("[[exception]]");
        out.text("name", &exception.name);
        out.ports(&exception.tcp, &exception.udp);
        out.nets("from", &exception.from);
        out.text("reason", &exception.reason);
        if let Some(owner) = &exception.owner {
            out.text("owner", owner);
        }
        out.text("until", exception.until);
    }
    for file in files {
        out.table("[[file]]");
        out.text("path", file.path.display());
        out.text("mode", format_args!("{:04o}", file.mode));
    }
    out.table("[enforce]");
    out.text(
        "mode",
        match enforce.mode {
            Mode::Enforce => "enforce",
            Mode::Audit => "audit",
        },
    );
    out.key("firewall", enforce.firewall);
    out.key("binds", enforce.binds);
    out.key("keepalive", enforce.keepalive);
    out.text("confirm_within", humantime::format_duration(enforce.confirm_within));
    out.key("allow_no_admin_path", enforce.allow_no_admin_path);
    out.table("[metrics]");
    out.key("port", metrics.port);
    out.table("[heartbeat]");
    let Heartbeat {
        kuma_url_file,
        ntfy_url_file,
        every,
        status_file,
        app_file,
        certificate_file,
        certificate_name,
        database_file,
    } = heartbeat;
    out.text("every", humantime::format_duration(*every));
    for (key, path) in [
        ("kuma_url_file", kuma_url_file),
        ("ntfy_url_file", ntfy_url_file),
        ("status_file", status_file),
        ("app_file", app_file),
        ("certificate_file", certificate_file),
        ("database_file", database_file),
    ] {
        if let Some(path) = path {
            out.text(key, path.display());
        }
    }
    if let Some(name) = certificate_name {
        out.text("certificate_name", name);
    }
    out.0
}

struct Lines(String);

impl Lines {
    fn table(&mut self, header: &str) {
        let _ = writeln!(self.0, "\n{header}");
    }

    fn key(&mut self, key: &str, value: impl Display) {
        let _ = writeln!(self.0, "{key} = {value}");
    }

    fn text(&mut self, key: &str, value: impl Display) {
        self.key(key, quoted(value));
    }

    fn texts<T: Display>(&mut self, key: &str, values: &[T]) {
        self.key(key, format_args!("[{}]", values.iter().map(quoted).collect::<Vec<_>>().join(", ")));
    }

    /// As `texts` says them, without a string of its own for each.
    fn nets(&mut self, key: &str, list: &[IpNet]) {
        let _ = write!(self.0, "{key} = [");
        for (at, net) in list.iter().enumerate() {
            self.0.push_str(if at == 0 { "\"" } else { ", \"" });
            push_net(&mut self.0, net);
            self.0.push('"');
        }
        self.0.push_str("]\n");
    }

    fn ports(&mut self, tcp: &[Port], udp: &[Port]) {
        for (key, ports) in [("tcp", tcp), ("udp", udp)] {
            self.key(key, format_args!("{ports:?}"));
        }
    }

    fn from(&mut self, from: &Sources) {
        match from {
            Sources::Hub => self.text("from", "hub"),
            Sources::Mesh => self.text("from", "mesh"),
            Sources::Prefixes(list) => self.nets("from", list),
        }
    }
}

fn quoted(value: impl Display) -> String {
    let text = value.to_string();
    // As it is said below, for most there is: addresses, prefixes, names.
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b" .:/_-*+=@,".contains(&byte)) {
        return format!("\"{text}\"");
    }
    toml::Value::String(text).to_string()
}

/// Tells two policies apart, in metrics and between a daemon and who talks to it: the
/// [`sum`] of the normal form.
pub fn fingerprint(policy: &Policy) -> String {
    sum(&show(policy))
}

/// FNV-1a, 64 bits, as 16 hexadecimal digits. Tells texts apart and protects nothing.
pub fn sum(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
