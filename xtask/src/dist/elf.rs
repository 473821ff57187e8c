//! Whether a program is static, by its own headers: a flag that got lost on its way to the linker shows only there.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{ARCHES, Arch};

const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;

pub fn assert_static(path: &Path, arch: Arch) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    check(&bytes, arch).with_context(|| format!("{} is not what it should be", path.display()))
}

/// What a program is for.
pub fn arch(path: &Path) -> Result<Arch> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let found = machine(&bytes).with_context(|| path.display().to_string())?;
    let known = ARCHES.into_iter().find(|arch| number_of(*arch) == found);
    known.with_context(|| format!("{} is for machine {found}, which is none of ours", path.display()))
}

fn number_of(arch: Arch) -> u64 {
    match arch {
        Arch::X86_64 => 62,
        Arch::Aarch64 => 183,
    }
}

fn machine(bytes: &[u8]) -> Result<u64> {
    ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "no 64-bit little-endian ELF file");
    number(bytes, 18, 2)
}

fn check(bytes: &[u8], arch: Arch) -> Result<()> {
    let (found, machine) = (machine(bytes)?, number_of(arch));
    ensure!(found == machine, "for machine {found}, not {machine} ({})", arch.name());
    let (table, size, count) = (number(bytes, 32, 8)?, number(bytes, 54, 2)?, number(bytes, 56, 2)?);
    ensure!(count > 0, "no segments");
    for index in 0..count {
        let header = table + index * size;
        let kind = number(bytes, header, 4)? as u32;
        ensure!(kind != PT_INTERP, "linked dynamically: it asks for a loader");
        if kind == PT_DYNAMIC {
            let (start, length) = (number(bytes, header + 8, 8)?, number(bytes, header + 32, 8)?);
            for entry in (start..start + length).step_by(16) {
                let tag = number(bytes, entry, 8)?;
                ensure!(tag != DT_NEEDED, "linked dynamically: it asks for a library");
                if tag == DT_NULL {
                    break;
                }
            }
        }
    }
    Ok(())
}

fn number(bytes: &[u8], at: u64, length: usize) -> Result<u64> {
    let at = usize::try_from(at).context("an offset")?;
    let field = at.checked_add(length).and_then(|end| bytes.get(at..end));
    let field = field.with_context(|| format!("ends before byte {at}"))?;
    Ok(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head and one segment, which for the dynamic one has a tag behind it.
    fn program(machine: u8, kind: u8, tag: u8) -> Vec<u8> {
        let mut bytes = vec![0u8; 64 + 56 + 32];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (bytes[18], bytes[32], bytes[54], bytes[56]) = (machine, 64, 56, 1);
        (bytes[64], bytes[64 + 8], bytes[64 + 32], bytes[120]) = (kind, 120, 32, tag);
        bytes
    }

    #[test]
    fn a_loader_a_library_or_another_machine_is_refused() {
        let says = |bytes: &[u8], arch| check(bytes, arch).err().map_or(String::new(), |e| e.to_string());
        assert_eq!(says(&program(62, 1, 0), Arch::X86_64), "");
        assert_eq!(says(&program(183, 2, 0), Arch::Aarch64), "");
        // What follows the end of the list is no entry of it.
        let mut ended = program(62, 2, 0);
        ended[136] = 1;
        assert_eq!(says(&ended, Arch::X86_64), "");
        assert!(says(&program(62, 3, 0), Arch::X86_64).contains("loader"));
        assert!(says(&program(62, 2, 1), Arch::X86_64).contains("library"));
        assert!(says(&program(62, 1, 0), Arch::Aarch64).contains("machine 62, not 183"));
        assert!(says(b"#!/bin/sh\n", Arch::X86_64).contains("no 64-bit"));
        assert!(says(&program(62, 1, 0)[..66], Arch::X86_64).contains("ends before"));
    }

    #[test]
    fn a_test_program_is_linked_dynamically_and_for_this_machine() {
        let program = std::env::current_exe().unwrap();
        let here = Arch::named(std::env::consts::ARCH).unwrap();
        assert_eq!(arch(&program).unwrap(), here);
        let error = assert_static(&program, here);
        assert!(format!("{:#}", error.unwrap_err()).contains("linked dynamically"));
    }
}
