//! One program for all decoders: which of them is said by `SPOKEGUARD_FUZZ`.
#![no_main]

use std::sync::OnceLock;

use lab::foreign::{Decode, decoders};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static DECODE: OnceLock<Decode> = OnceLock::new();
    let decode = DECODE.get_or_init(|| {
        let wanted = std::env::var("SPOKEGUARD_FUZZ").unwrap_or_default();
        let found = decoders().find(|(name, _)| *name == wanted);
        found.unwrap_or_else(|| panic!("SPOKEGUARD_FUZZ names no decoder: {wanted:?}")).1
    });
    decode(bytes);
});
