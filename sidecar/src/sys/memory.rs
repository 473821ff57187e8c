//! This process's own memory: how much there is, giving it back, and wiping secrets.

use std::io;
use std::sync::atomic::{Ordering, compiler_fence};

/// Bytes of physical memory that this process holds, shared pages included.
pub fn resident_bytes() -> io::Result<u64> {
    rollup("Rss:")
}

/// The same of another process of ours.
pub fn resident_bytes_of(pid: u32) -> io::Result<u64> {
    rollup_of(&pid.to_string(), "Rss:")
}

/// Bytes of it that no file backs: the heap, stacks and written data.
pub fn anonymous_bytes() -> io::Result<u64> {
    rollup("Anonymous:")
}

fn rollup(field: &str) -> io::Result<u64> {
    rollup_of("self", field)
}

fn rollup_of(process: &str, field: &str) -> io::Result<u64> {
    // Not statm: since Linux 6.2 its numbers may be off by megabytes on large machines.
    let text = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    rollup_field(&text, field).ok_or_else(|| io::Error::other(format!("smaps_rollup has no {field}")))
}

fn rollup_field(text: &str, field: &str) -> Option<u64> {
    let mut words = text.lines().find(|line| line.starts_with(field))?.split_whitespace().skip(1);
    let kib: u64 = words.next()?.parse().ok()?;
    (words.next() == Some("kB")).then_some(kib.checked_mul(1024)?)
}

/// Gives free heap pages back to the kernel, after work that needed many at once.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointer and locks the heap itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of the program's own code and constants that only starting up has used: reading a
/// policy, parsing arguments. They stay in the page cache, and what is needed again comes
/// back page by page. Says how many bytes it let go of.
pub fn drop_start_up_code() -> io::Result<u64> {
    Ok(OwnCode::find()?.let_go())
}

/// Where this process's code and constants are mapped: for one that can read no file any more
/// when it has started up.
pub struct OwnCode(Vec<std::ops::Range<usize>>);

impl OwnCode {
    pub fn find() -> io::Result<Self> {
        Ok(Self(clean_mappings(&std::fs::read_to_string("/proc/self/smaps")?)))
    }

    /// See [`drop_start_up_code`].
    pub fn let_go(&self) -> u64 {
        let mut dropped = 0;
        for range in &self.0 {
            let (start, length) = (range.start as *mut libc::c_void, range.len());
            // SAFETY: the range is one mapping of this process as the kernel listed it; it is
            // backed by a file, nothing may write to it and no page of it was ever written, so
            // that what is dropped reads the same when it is next touched. Nothing here maps
            // files but the loader of the program and its libraries, which stay.
            if unsafe { libc::madvise(start, length, libc::MADV_DONTNEED) } == 0 {
                dropped += length as u64;
            }
        }
        dropped
    }
}

/// The mappings of files that are read or run only, private, and without a page of our own:
/// relocated constants have been written once, and what was written would be lost.
fn clean_mappings(smaps: &str) -> Vec<std::ops::Range<usize>> {
    let mut found = Vec::new();
    let mut candidate = None;
    for line in smaps.lines() {
        if let Some((range, rest)) = header(line) {
            candidate = rest.then_some(range);
        } else if let Some(size) = line.strip_prefix("Anonymous:") {
            // Written pages of a private mapping are anonymous, or have been and are swapped out.
            candidate = candidate.filter(|_| size.trim() == "0 kB");
        } else if let Some(size) = line.strip_prefix("Swap:") {
            found.extend(candidate.take().filter(|_| size.trim() == "0 kB"));
        }
    }
    found
}

/// `55d0-55e0 r-xp 00001000 fe:00 1234 /usr/bin/spokeguard`: the range, and whether it is a
/// file's and can't be written.
fn header(line: &str) -> Option<(std::ops::Range<usize>, bool)> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
    let mode = words.next()?;
    let file = words.nth(3).is_some_and(|path| path.starts_with('/') && !path.ends_with(']'));
    Some((range, file && matches!(mode, "r-xp" | "r--p")))
}

/// One heap for all threads: glibc would otherwise keep one for each, half empty. To be
/// called before the first thread is started.
pub fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two integers; an unknown option only returns 0.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Where memory runs out the kernel ends this child of ours, not us: a listing that it could not
/// make is told and made again, while a daemon that is gone watches nothing. Takes no privilege;
/// where it fails, the child is as likely a choice as we are.
pub fn sacrifice(child: u32) {
    let _ = std::fs::write(format!("/proc/{child}/oom_score_adj"), "1000");
}

/// Overwrites bytes that held a key, in a way that the compiler may not leave out.
pub fn wipe(bytes: &mut [u8]) {
    for byte in bytes.iter_mut() {
        // SAFETY: `byte` is a valid, exclusive reference.
        unsafe { std::ptr::write_volatile(byte, 0) };
    }
    compiler_fence(Ordering::SeqCst);
}

/// A buffer that is wiped when it goes. It never grows, since that would leave copies.
pub struct Wiped(Box<[u8]>);

impl Wiped {
    pub fn new(size: usize) -> Self {
        Self(vec![0; size].into_boxed_slice())
    }
}

impl Drop for Wiped {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

impl std::ops::Deref for Wiped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::DerefMut for Wiped {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollup_is_read_in_bytes_and_only_in_its_own_unit() {
        let text =
            "5581 [rollup]\nRss:                2048 kB\nPss_Anon: 3 kB\nAnonymous:           112 kB\n";
        assert_eq!(rollup_field(text, "Rss:"), Some(2048 * 1024));
        assert_eq!(rollup_field(text, "Anonymous:"), Some(112 * 1024));
        assert_eq!(rollup_field(text, "Swap:"), None);
        assert_eq!(rollup_field("Rss: 2 MB", "Rss:"), None);
        assert_eq!(rollup_field("Rss: 99999999999999999999 kB", "Rss:"), None);
    }

    #[test]
    fn our_own_memory_grows_with_what_we_touch() {
        limit_arenas();
        let before = anonymous_bytes().expect("smaps_rollup");
        let block = std::hint::black_box(vec![1u8; 128 << 20]);
        let with = anonymous_bytes().expect("smaps_rollup");
        // Other tests of this process free some of theirs meanwhile.
        assert!(with >= before + (64 << 20), "{before} then {with}");
        assert!(resident_bytes().expect("smaps_rollup") >= with);
        drop(block);
        trim();
    }

    #[test]
    fn only_clean_mappings_of_files_are_let_go() {
        let swapped = |head: &str, anonymous: u32, swap: u32| {
            format!("{head}\nSize:  64 kB\nRss:  64 kB\nAnonymous:  {anonymous} kB\nSwap:  {swap} kB\n")
        };
        let map = |head: &str, anonymous: u32| swapped(head, anonymous, 0);
        let smaps = [
            map("1000-2000 r-xp 00001000 fe:00 12  /usr/bin/spokeguard", 0),
            map("2000-3000 r--p 00002000 fe:00 12  /usr/bin/spokeguard", 4),
            map("3000-4000 rw-p 00003000 fe:00 12  /usr/bin/spokeguard", 0),
            map("4000-5000 r--p 00000000 00:00 0 ", 0),
            map("5000-6000 r-xp 00000000 00:00 0  [vdso]", 0),
            map("6000-7000 r--p 00000000 fe:00 13  /usr/lib/libc.so.6", 0),
            swapped("9000-a000 r--p 00002000 fe:00 12  /usr/bin/spokeguard", 0, 4),
            map("7000-8000 r--s 00000000 fe:00 14  /etc/shared", 0),
        ]
        .concat();
        assert_eq!(clean_mappings(&smaps), [0x1000..0x2000, 0x6000..0x7000]);
        assert_eq!(clean_mappings("1000-2000 r-xp"), []);
    }

    #[test]
    fn code_that_was_let_go_still_runs() {
        let before = resident_bytes().expect("smaps_rollup");
        assert!(drop_start_up_code().expect("smaps") > 1 << 20);
        assert!(resident_bytes().expect("smaps_rollup") < before);
    }

    #[test]
    fn a_wiped_buffer_holds_nothing() {
        let mut key = *b"secret";
        wipe(&mut key);
        assert_eq!(key, [0; 6]);
    }
}
