//! All unsafe code, in small blocks that each say why they hold. Everything above calls
//! safe functions.

pub mod attempt;
pub mod bpf;
pub mod clock;
pub mod descriptors;
pub mod file;
pub mod filter;
pub mod foreign;
pub mod memory;
pub mod netns;
pub mod probe;
pub mod sockets;
pub mod xtables;
