//! The host's own figures, out of the kernel's texts.

use super::payload::tenths;

/// Memory in use in MiB, from /proc/meminfo.
pub fn ram_mb(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(kib("MemTotal")?.checked_sub(kib("MemAvailable")?)? / 1024)
}

/// Clock ticks of all processors since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTimes {
    busy: u64,
    all: u64,
}

impl CpuTimes {
    /// From /proc/stat.
    pub fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        // user nice system idle iowait irq softirq steal; guests are in user already.
        let all = ticks.get(..8).or(ticks.get(..4))?.iter().try_fold(0u64, |sum, n| sum.checked_add(*n))?;
        let idle = ticks.get(3)?.checked_add(ticks.get(4).copied().unwrap_or_default())?;
        Some(Self { busy: all.checked_sub(idle)?, all })
    }

    /// Percent that was busy since an earlier moment.
    pub fn busy_pct_since(self, earlier: Self) -> Option<f64> {
        let all = self.all.checked_sub(earlier.all).filter(|ticks| *ticks > 0)?;
        let busy = self.busy.saturating_sub(earlier.busy).min(all);
        Some(tenths(busy as f64 * 100.0 / all as f64))
    }
}

/// Whole seconds, from /proc/uptime.
pub fn uptime_s(uptime: &str) -> Option<u64> {
    uptime.split(['.', ' ']).next()?.parse().ok()
}

/// The number in what the profile points to: `system-42-link`.
pub fn nix_gen(link: &str) -> Option<u64> {
    link.rsplit('/').next()?.strip_prefix("system-")?.strip_suffix("-link")?.parse().ok()
}

/// Percent in use of a file system, as `df` counts: what is kept for root counts for nobody.
pub fn disk_pct(blocks: u64, free: u64, available: u64) -> Option<f64> {
    let used = blocks.checked_sub(free)?;
    let all = used.checked_add(available).filter(|all| *all > 0)?;
    Some(tenths(used as f64 * 100.0 / all as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_read() {
        let meminfo = "MemTotal:         512000 kB\nMemFree:   1000 kB\nMemAvailable:   256000 kB\n";
        assert_eq!(ram_mb(meminfo), Some(250));
        let before = CpuTimes::parse("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 1 1 1\n").expect("times");
        let after = CpuTimes::parse("cpu  150 0 150 1400 100 0 0 0 9 9\n").expect("times");
        assert_eq!(after.busy_pct_since(before), Some(12.5));
        assert_eq!(uptime_s("350735.47 234388.90\n"), Some(350_735));
        assert_eq!(nix_gen("system-42-link"), Some(42));
        assert_eq!(nix_gen("/nix/var/nix/profiles/system-7-link"), Some(7));
        assert_eq!(disk_pct(1000, 400, 300), Some(66.7));
    }

    #[test]
    fn what_makes_no_sense_is_unknown() {
        for text in
            ["", "MemTotal: 5 kB", "MemTotal: 5 kB\nMemAvailable: 6 kB", "MemTotal: x\nMemAvailable: y"]
        {
            assert_eq!(ram_mb(text), None, "{text}");
        }
        for text in ["", "cpu", "cpu  1 2", "cpu  a b c d", "cpu  18446744073709551615 1 1 1"] {
            assert_eq!(CpuTimes::parse(text), None, "{text}");
        }
        let times = CpuTimes { busy: 5, all: 10 };
        assert_eq!(times.busy_pct_since(times), None);
        assert_eq!(times.busy_pct_since(CpuTimes { busy: 0, all: 11 }), None, "counters that fell");
        assert_eq!(uptime_s("soon"), None);
        for link in ["system", "system--link", "system-x-link", "per-user-3-link", "system-3"] {
            assert_eq!(nix_gen(link), None, "{link}");
        }
        assert_eq!((disk_pct(0, 0, 0), disk_pct(1, 2, 3)), (None, None));
    }
}
