//! A control group with so much memory and no more, and no swap.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{Lab, reaper};

/// One of ours is removed with the lab, once nobody is in it.
pub struct MemoryGroup {
    path: PathBuf,
    /// Version 1 names its files otherwise.
    first: bool,
}

impl MemoryGroup {
    pub fn new(lab: &Lab, bytes: u64) -> Result<Self> {
        let path = reaper::memory_group(lab.prefix()).context("control groups don't bound memory here")?;
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        let group = Self { first: path.join("memory.limit_in_bytes").is_file(), path };
        let limits: &[(&str, u64)] = if group.first {
            &[("memory.limit_in_bytes", bytes), ("memory.memsw.limit_in_bytes", bytes)]
        } else {
            &[("memory.max", bytes), ("memory.swap.max", 0)]
        };
        for (file, value) in limits {
            let file = group.path.join(file);
            // Without swap accounting there is no such file; then there had better be no swap.
            if file.is_file() {
                fs::write(&file, value.to_string()).with_context(|| format!("write {}", file.display()))?;
            }
        }
        Ok(group)
    }

    /// One of version 2 that somebody else made and bounds, such as a unit's.
    pub fn of(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), first: false }
    }

    /// Words in front of a command that make it join.
    pub fn wrapper(&self) -> [String; 4] {
        let join = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", self.path.display());
        ["sh".into(), "-c".into(), join, "sh".into()]
    }

    /// Leaves it only so many bytes more than it has now.
    pub fn tighten(&self, spare: u64) -> Result<()> {
        let (now, limits): (_, &[&str]) = match self.first {
            true => ("memory.usage_in_bytes", &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]),
            false => ("memory.current", &["memory.max"]),
        };
        let most = self.number(now)? + spare;
        for file in limits.iter().map(|name| self.file(name)).filter(|file| file.is_file()) {
            fs::write(&file, most.to_string()).with_context(|| format!("write {}", file.display()))?;
        }
        Ok(())
    }

    /// The most that was in use at once, in bytes, what the kernel could have taken back included.
    pub fn peak(&self) -> Result<u64> {
        self.number(if self.first { "memory.max_usage_in_bytes" } else { "memory.peak" })
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn killed(&self) -> Result<u64> {
        self.event(if self.first { "memory.oom_control" } else { "memory.events" }, "oom_kill")
    }

    /// How often it came to its limit and the kernel took files back, or tried to; of version 2 only.
    pub fn limited(&self) -> Result<u64> {
        self.event("memory.events", "max")
    }

    fn event(&self, file: &str, name: &str) -> Result<u64> {
        let path = self.path.join(file);
        let text = read(&path)?;
        let count = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        count
            .and_then(|count| count.trim().parse().ok())
            .with_context(|| format!("no {name} in {}: {text}", path.display()))
    }

    /// One of the lines of memory.stat.
    pub fn stat(&self, name: &str) -> Result<u64> {
        let text = read(&self.path.join("memory.stat"))?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).with_context(|| format!("no {name} in memory.stat"))
    }

    /// One of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn number(&self, file: &str) -> Result<u64> {
        let path = self.path.join(file);
        read(&path)?.trim().parse().with_context(|| format!("read {}", path.display()))
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}
