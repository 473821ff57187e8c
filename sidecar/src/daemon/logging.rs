//! The log: one line per change on stderr, with syslog's level prefix under journald.

use std::io::Write;

struct Lines {
    journald: bool,
}

/// Starts logging to stderr. `quiet` keeps warnings and errors only; SPOKEGUARD_LOG=debug
/// adds detail.
pub fn start(quiet: bool) {
    let level = match std::env::var("SPOKEGUARD_LOG").as_deref() {
        Ok("debug") => log::LevelFilter::Debug,
        Ok("trace") => log::LevelFilter::Trace,
        _ if quiet => log::LevelFilter::Warn,
        _ => log::LevelFilter::Info,
    };
    // journald reads `<N>` as the priority of a line, and sets this for its clients.
    let lines = Lines { journald: std::env::var_os("JOURNAL_STREAM").is_some() };
    if log::set_boxed_logger(Box::new(lines)).is_ok() {
        log::set_max_level(level);
    }
}

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let (priority, word) = match record.level() {
            log::Level::Error => (3, "error: "),
            log::Level::Warn => (4, "warning: "),
            log::Level::Info => (6, ""),
            log::Level::Debug | log::Level::Trace => (7, "debug: "),
        };
        let text = record.args().to_string();
        let line = if self.journald { format!("<{priority}>{text}\n") } else { format!("{word}{text}\n") };
        // A log that can't be written must not stop the daemon.
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}
