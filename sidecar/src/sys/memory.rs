//! This process's own memory: how much there is, giving it back, and wiping secrets.

use std::io;
use std::sync::atomic::{Ordering, compiler_fence};

/// Bytes of physical memory that this process holds, shared pages included.
pub fn resident_bytes() -> io::Result<u64> {
    rollup("Rss:")
}

/// Bytes of it that no file backs: the heap, stacks and written data.
pub fn anonymous_bytes() -> io::Result<u64> {
    rollup("Anonymous:")
}

fn rollup(field: &str) -> io::Result<u64> {
    // Not statm: since Linux 6.2 its numbers may be off by megabytes on large machines.
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
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

/// One heap for all threads: glibc would otherwise keep one for each, half empty. To be
/// called before the first thread is started.
pub fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two integers; an unknown option only returns 0.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
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
    fn a_wiped_buffer_holds_nothing() {
        let mut key = *b"secret";
        wipe(&mut key);
        assert_eq!(key, [0; 6]);
    }
}
