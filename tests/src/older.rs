//! Older kernels than this one, for programs that ask which it is.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// What a command is begun with to take this kernel for Linux 6.1, which has neither netfilter programs nor tcx. Only
/// for programs that are linked dynamically; needs a compiler.
pub fn as_linux_6_1(dir: &Path) -> Result<[String; 2]> {
    let (source, library) = (dir.join("uname.c"), dir.join("uname.so"));
    std::fs::write(&source, UNAME).with_context(|| format!("write {}", source.display()))?;
    let mut compiler = Command::new("cc");
    let output = compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output();
    let output = output.context("start cc")?;
    ensure!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
    Ok(["env".to_owned(), format!("LD_PRELOAD={}", library.display())])
}

/// Without a version, in which Debian's kernels have their number once more.
const UNAME: &str = "#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>
int uname(struct utsname *name) {
    long result = syscall(SYS_uname, name);
    strcpy(name->release, \"6.1.0\");
    name->version[0] = 0;
    return result;
}
";
