//! The loop: wake, look, decide, repair, report.

pub mod eventlog;
pub mod http;
pub mod notify;
pub mod socket;
