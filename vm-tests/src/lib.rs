//! Real kernels: Debian's, booted under QEMU's software emulation with a small root of our own.
//!
//! ```text
//!   packages (apt, never installed) -> root.cpio ---+
//!   kernel's package -> vmlinuz, modules.cpio ------+--> initrd -> qemu -> steps over a virtio port
//!   our programs, the scenario's name --------------+
//! ```
//!
//! Everything is kept in `target/vm` under names that say what it was made of. A machine that says nothing, ends
//! early or takes too long has failed.

pub mod cpio;
pub mod disk;
mod foreign;
pub mod image;
pub mod machine;
pub mod packages;
pub mod payload;
pub mod scenario;
pub mod step;

use std::path::{Path, PathBuf};

/// The workspace.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// cargo's folder of the workspace.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |named| root().join(named))
}
