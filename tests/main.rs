//! Every integration test, in one program: linking it once is most of what building tests costs.

mod audit_local;
mod cases;
mod direction;
mod netns;
