//! Trials of our programs: what they count of frames that nobody but us can send, and what
//! they say of a frame when they are run by hand.

use std::path::Path;

use anyhow::Context as _;
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use sidecar_ebpf::sweep::{COUNTED, MARK};
use sidecar_ebpf::{CANARY_CLASS, IN, OTHER, gate, programs, row_index};

use super::config::scope_number;
use super::{Bpf, guard, root};
use crate::terms::Scope;

/// What the counters have counted of canaries since they were first pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tried {
    pub packets: u64,
    pub bytes: u64,
    /// New connections, whatever was thought of them.
    pub attempts: u64,
}

/// A frame for BPF_PROG_TEST_RUN, from its Ethernet header on, as if it arrived on this
/// device of the caller's network namespace.
#[derive(Clone, Copy, Debug)]
pub struct TestFrame<'a> {
    pub index: u32,
    pub ethernet: bool,
    pub packet: &'a [u8],
}

impl Bpf {
    pub fn tried(&self) -> anyhow::Result<Tried> {
        let row = self.row(row_index(CANARY_CLASS, OTHER))?;
        let sum =
            |pick: fn(&sidecar_ebpf::Cell) -> u64| row.traffic.iter().map(pick).fold(0, u64::wrapping_add);
        Ok(Tried {
            packets: sum(|cell| cell.packets),
            bytes: sum(|cell| cell.bytes),
            attempts: row.attempts.iter().copied().fold(0, u64::wrapping_add),
        })
    }
}

impl TestFrame<'_> {
    /// Has the counter of public interfaces count it so often, as a canary.
    pub fn count(&self, pin_dir: &Path, repeat: u32) -> anyhow::Result<()> {
        let layer = if self.ethernet { 0 } else { 1 };
        let program = programs::COUNTERS[IN][layer][scope_number(Scope::Public)];
        self.run(&root(pin_dir), program, repeat).map(|_| ())
    }

    /// Whether the guard refuses it, which it counts nowhere.
    pub fn is_refused(&self, pin_dir: &Path) -> anyhow::Result<bool> {
        const TC_ACT_SHOT: u32 = 2;
        let program = gate::PROGRAMS[if self.ethernet { 0 } else { 1 }];
        Ok(self.run(&guard::root(pin_dir), program, 1)? == TC_ACT_SHOT)
    }

    fn run(&self, root: &Path, program: &str, repeat: u32) -> anyhow::Result<u32> {
        // struct __sk_buff, as far as something of it is set.
        const INDEX_AT: usize = 40;
        const BLOCK_AT: usize = 48;
        let block = [MARK[0], MARK[1], COUNTED];
        let mut context = [0; BLOCK_AT + 12];
        context[INDEX_AT..INDEX_AT + 4].copy_from_slice(&self.index.to_ne_bytes());
        for (bytes, word) in context[BLOCK_AT..].chunks_exact_mut(4).zip(block) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        let pin = root.join("programs").join(program);
        let classifier =
            SchedClassifier::from_pin(&pin).with_context(|| format!("open of {}", pin.display()))?;
        let options = TestRunOptions {
            data_in: Some(self.packet),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::default()
        };
        Ok(classifier.test_run(options).with_context(|| format!("test run of {program}"))?.return_value)
    }
}
