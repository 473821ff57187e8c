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
mod packet;
#[cfg(target_arch = "bpf")]
mod state;

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing in the programs panics; the verifier would refuse this loop if it could
    // be reached.
    loop {}
}

/// MIT, as the whole project; the kernel knows it by this name among the licences that it
/// lends its routing table to.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// For the host there is no program to build: `cargo check --workspace --all-features`
/// still compiles this file.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
