//! Scans other hosts.
