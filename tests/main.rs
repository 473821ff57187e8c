//! Every integration test, in one program: linking it once is most of what building tests costs.

mod audit_faults;
mod audit_local;
mod audit_matrix;
mod audit_remote;
mod binds;
mod cases;
mod confirm;
mod counters;
mod daemon;
mod decoders;
mod direction;
mod enforce;
mod exact;
mod glass;
mod guard;
mod iptables;
mod killed;
mod look;
mod metrics;
mod netns;
mod predict;
mod privileges;
mod proof;
mod systemd;
mod verdicts;
mod weather;
