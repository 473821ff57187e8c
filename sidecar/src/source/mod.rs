//! The world as values: one file per source. Each decodes purely (bytes to values, tested
//! on captures) and reads thinly. A source that can't look says why; it never guesses.

pub mod bpf;
pub mod files;
pub mod links;
pub mod listeners;
pub mod nft;
pub mod nft_events;
pub mod owners;
pub mod sshd;
pub mod wireguard;
