//! More spokes of a plain lab's hub, for what a hub does with several.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::{Answer, HUB_MESH, Lab, Mesh, Node, SPOKE_MESH, SPOKE_MESH_V6, wait_until};

pub struct Spoke {
    pub node: Node,
    pub mesh: IpAddr,
}

impl Lab {
    /// Each gets a wire of its own to the hub, which it calls wg0, and one to the internet.
    pub fn more_spokes(&self, names: &[&str]) -> Result<Vec<Spoke>> {
        ensure!(self.shape.mesh == Mesh::Plain, "these spokes have no tunnel");
        let (prefix, hub, internet) = (self.prefix(), &self.hub.netns, &self.internet.netns);
        let mut wires = String::new();
        for (n, name) in names.iter().enumerate() {
            let index = 100 + 4 * n;
            wires += &format!(
                "netns add {prefix}{name}\n\
                 link add wg0 index {index} netns {prefix}{name} type veth peer name mesh{n} index {} netns {hub}\n\
                 link add eth0 index {} netns {prefix}{name} type veth peer name more{n} index {} netns {internet}\n",
                index + 1,
                index + 2,
                index + 3,
            );
        }
        crate::ip(None, &wires)?;
        let mut spokes = Vec::new();
        for (n, node) in Node::open_all(prefix, names, &self.dir)?.into_iter().enumerate() {
            let number = u8::try_from(n)?;
            let mesh = Ipv4Addr::new(10, 84, 0, 21 + number);
            let public = Ipv4Addr::new(192, 0, 2, 8 * number + 2);
            let gateway = Ipv4Addr::new(192, 0, 2, 8 * number + 1);
            crate::ip(
                Some(hub),
                &format!("addr add {HUB_MESH} peer {mesh}/32 dev mesh{n}\nlink set mesh{n} up\n"),
            )?;
            crate::ip(Some(internet), &format!("addr add {gateway}/29 dev more{n}\nlink set more{n} up\n"))?;
            crate::ip(
                Some(&node.netns),
                &format!(
                    "link set lo up\naddr add {mesh}/24 dev wg0\nlink set wg0 up\n\
                     addr add {public}/29 dev eth0\nlink set eth0 up\nroute add default via {gateway}\n"
                ),
            )?;
            spokes.push(Spoke { node, mesh: mesh.into() });
        }
        for spoke in &spokes {
            wait_until(Duration::from_secs(10), "the hub reaches one more spoke", || {
                let answer = self.hub.connect((spoke.mesh, 9).into(), Duration::from_millis(300));
                (answer == Answer::Refused).then_some(())
            })?;
        }
        Ok(spokes)
    }

    /// The policy of [`Lab::policy`] for one of these.
    pub fn policy_of(&self, spoke: &Spoke) -> String {
        let own = format!("address = [\"{SPOKE_MESH}\", \"{SPOKE_MESH_V6}\"]");
        let name = format!("name = \"{}\"", spoke.node.name);
        self.policy()
            .replace(&own, &format!("address = [\"{}\"]", spoke.mesh))
            .replace("name = \"singapore\"", &name)
    }
}
