//! What stands before everything that a probe meets: a program of native XDP, which the driver runs on frames from
//! the wire alone. It is asked by itself what it would do.

use std::os::fd::{AsFd as _, OwnedFd};

use sidecar_ebpf::sweep::{Frame, Order};

use super::frame;
use crate::observed::{Fate, Gate};
use crate::sys::foreign::{Context, by_id, run};

pub struct Front {
    program: OwnedFd,
    index: u32,
}

const ABORTED: u32 = 0;
const DROP: u32 = 1;
const TX: u32 = 3;

impl Front {
    /// `None` where the program can't be had: that takes CAP_SYS_ADMIN.
    pub fn of(index: u32, program: u32) -> Option<Self> {
        let found = by_id(program).inspect_err(|error| log::debug!("XDP program {program}: {error}"));
        Some(Self { program: found.ok()?, index })
    }

    /// What becomes of a frame there; `None`: it goes on. What is redirected goes on as far as anybody can tell,
    /// as where to is between the program and its maps.
    pub fn meets(&self, order: &Order, frame: &Frame) -> Option<Fate> {
        let bytes = frame.bytes.get(..frame::length(order))?;
        let mut out = [0; 256];
        match run(self.program.as_fd(), Context::Frame, self.index, bytes, &mut out).ok()? {
            ABORTED | DROP => Some(Fate::Held(Gate::Xdp)),
            TX => Some(sent_back(order, &out)),
            _ => None,
        }
    }
}

/// A program that guards against floods answers SYNs by itself.
fn sent_back(order: &Order, frame: &[u8]) -> Fate {
    let header = if order.is_ipv4() { 20 } else { 40 };
    match frame.get(14 + header + 13).filter(|_| order.proto == 6).map(|flags| flags & 0x16) {
        Some(0x12) => Fate::Answered,
        Some(0x14) => Fate::Reset,
        _ => Fate::Held(Gate::Xdp),
    }
}
