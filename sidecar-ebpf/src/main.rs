//! The eBPF programs. They count and wake; they decide nothing and change no packet.
//! Kernel types are not read (no BTF, no relocation), so one object fits Linux 6.1 and
//! everything later, with or without BTF.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod count;
#[cfg(target_arch = "bpf")]
mod egress;
#[cfg(target_arch = "bpf")]
mod empty;
#[cfg(target_arch = "bpf")]
mod ingress;
#[cfg(target_arch = "bpf")]
mod listen;
#[cfg(target_arch = "bpf")]
mod object;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod state;

/// For the host there is no program to build: `cargo check --workspace --all-features`
/// still compiles this file.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
