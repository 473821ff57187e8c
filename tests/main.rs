//! Every integration test, in one program: linking it once is most of what building tests costs.

mod cases;
mod direction;
mod enforce;
mod look;
mod netns;
