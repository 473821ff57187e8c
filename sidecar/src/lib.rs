//! spokeguard: declares, enforces, observes and reports what a spoke exposes.
//!
//! policy file -> desired -> observed -> findings -> plan -> outcomes -> report.
//! Each arrow is a function of values; only `source`, `apply`, `daemon`, `cli` and `sys`
//! touch the world. `ARCHITECTURE.md` has the map.

pub mod apply;
pub mod audit;
pub mod cli;
pub mod daemon;
pub mod desired;
pub mod diff;
pub mod fleet;
pub mod heartbeat;
pub mod metrics;
pub mod observed;
pub mod policy;
pub mod repair;
pub mod report;
pub mod ruleset;
pub mod source;
#[allow(unsafe_code)]
pub mod sys;
pub mod tailnet;
pub mod terms;
pub mod top;
