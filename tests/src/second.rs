//! A second spoke of the same hub, for what one spoke's policy says about the others.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::tunnel::{KeyPair, end, hub_peer};
use crate::{Answer, HUB_MESH, Lab, Mesh, Node, wait_until};

pub const SECOND_MESH: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 84, 0, 17));

pub struct Second {
    pub node: Node,
    pub keys: KeyPair,
}

impl Lab {
    /// Adds it to a lab of kernel WireGuard. The hub forwards between its spokes from then on.
    pub fn second_spoke(&self) -> Result<Second> {
        ensure!(
            self.shape.mesh == Mesh::WireGuard && crate::tunnel::kernel_has_it(),
            "needs the kernel's WireGuard"
        );
        let (prefix, internet) = (self.prefix(), &self.internet.netns);
        crate::ip(
            None,
            &format!(
                "netns add {prefix}second\n\
                 link add eth0 index 90 netns {prefix}second type veth peer name second0 index 91 netns {internet}\n"
            ),
        )?;
        let mut nodes = Node::open_all(prefix, &["second"], &self.dir)?;
        let node = nodes.pop().context("the second spoke was not made")?;
        crate::ip(Some(internet), "addr add 192.0.2.1/24 dev second0\nlink set second0 up\n")?;
        crate::ip(
            Some(&node.netns),
            "link set lo up\naddr add 192.0.2.7/24 dev eth0\nlink set eth0 up\nroute add default via 192.0.2.1\n",
        )?;
        let keys = KeyPair::generate()?;
        self.hub.forward()?;
        self.hub.ok(&[
            "wg",
            "set",
            "wg0",
            "peer",
            &keys.public,
            "allowed-ips",
            &format!("{SECOND_MESH}/32"),
        ])?;
        end(&node, &keys, None, &hub_peer(self), &["10.84.0.17/24"])?;
        wait_until(Duration::from_secs(10), "the second spoke reaches the hub", || {
            let answer = node.connect(SocketAddr::new(HUB_MESH, 9), Duration::from_millis(300));
            (answer == Answer::Refused).then_some(())
        })?;
        Ok(Second { node, keys })
    }
}
