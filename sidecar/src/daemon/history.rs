//! When each finding was first seen, kept across restarts in the state directory.

use std::path::Path;

use crate::diff::Finding;
use crate::report::History;

const FILE: &str = "first-seen.json";
/// A bounded history of bounded findings stays far below this; more is not ours.
const MAX_BYTES: u64 = 1 << 20;

/// First-seen moments as a daemon left them; empty where there is no readable file, since
/// "since when" is a comfort and never a reason to fail.
pub fn read(state: &Path) -> Stored {
    use std::io::Read;
    let mut text = String::new();
    let read =
        std::fs::File::open(state.join(FILE)).and_then(|f| f.take(MAX_BYTES).read_to_string(&mut text));
    let history = read.ok().and_then(|_| serde_json::from_str(&text).ok()).unwrap_or_default();
    Stored { history }
}

#[derive(Default)]
pub struct Stored {
    pub history: History,
}

impl Stored {
    /// Fills in `since` where the finding was seen before.
    pub fn date(&self, findings: &mut [Finding]) {
        for finding in findings {
            finding.since = finding.since.or(self.history.since(finding));
        }
    }

    pub fn write(&self, state: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string(&self.history)?;
        Ok(crate::sys::file::replace_private(&state.join(FILE), text.as_bytes())?)
    }
}
