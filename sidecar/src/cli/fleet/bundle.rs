//! `fleet bundle`: all that one node needs in one file, checked before it is handed over.

use std::fs::{self, OpenOptions};
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::Args;
use serde_json::json;

use super::{load_inventory, notes, one};
use crate::cli::{Format, Global, install, today};
use crate::fleet::bundle::{self, Bundle, Entry};
use crate::sys::clock;

#[derive(Args)]
pub struct Options {
    /// Whose
    node: String,
    /// Where to; without it the bundle goes to stdout
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub const CONTENTS: &str = "\
A tar archive with the directory NODE, whose README.txt tells where each file
goes; with --format cloud-init, user data for a first boot. The same inventory
gives the same bytes. Refused if the policy has a mistake or lets nobody in, or
if anything is secret; the private key is never in it.

Examples:
  spokeguard fleet bundle virginia -o virginia.tar
  spokeguard fleet bundle virginia | ssh root@HOST tar -x -C /root
  spokeguard fleet bundle virginia --format cloud-init > user-data";

pub fn run(global: &Global, file: &Path, options: &Options) -> anyhow::Result<u8> {
    let inventory = load_inventory(file)?;
    notes(&inventory)?;
    let node = one(&inventory, &options.node)?;
    let bundle = bundle::bundle(&inventory, node, &install::drop_ins(), today(clock::now()))?;
    let bytes = match global.format {
        Format::CloudInit => bundle::cloud_init(&bundle).into_bytes(),
        _ => archive(&bundle).context("pack the bundle")?,
    };
    let Bundle { name, entries, admin } = &bundle;
    let way_in = bundle::way_in(admin.as_ref());
    let Some(output) = &options.output else {
        let stdout = std::io::stdout();
        ensure!(
            global.format == Format::CloudInit || !stdout.is_terminal(),
            "an archive is nothing for a terminal: write -o FILE"
        );
        eprintln!("{name}: checked; way in: {way_in}");
        let mut stdout = stdout.lock();
        stdout.write_all(&bytes).and_then(|()| stdout.flush()).context("write the bundle")?;
        return Ok(0);
    };
    write(output, &bytes)?;
    let text =
        format!("{}: {} files for {name}, checked\nway in: {way_in}\n", output.display(), entries.len());
    let files: Vec<&String> = entries.iter().map(|entry| &entry.path).collect();
    let json = json!({ "version": 1, "node": name, "output": output, "way_in": way_in, "files": files });
    global.tell(&text, json)?;
    Ok(0)
}

/// The same bytes for the same bundle: sorted, of root, at the beginning of time.
fn archive(bundle: &Bundle) -> std::io::Result<Vec<u8>> {
    let mut out = tar::Builder::new(Vec::new());
    for Entry { path, mode, text, .. } in &bundle.entries {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(*mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_username("root")?;
        header.set_groupname("root")?;
        header.set_mtime(0);
        header.set_size(text.len() as u64);
        out.append_data(&mut header, format!("{}/{path}", bundle.name), text.as_bytes())?;
    }
    out.into_inner()
}

/// The old file or the new one, never half of it.
fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let name = path.file_name().with_context(|| format!("{}: not the name of a file", path.display()))?;
    let new = path.with_file_name(format!(".{}.spokeguard-{}", name.to_string_lossy(), std::process::id()));
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o644).open(&new);
    let written = file.and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let done = written.and_then(|()| fs::rename(&new, path));
    if done.is_err() {
        let _ = fs::remove_file(&new);
    }
    done.with_context(|| format!("write {}", path.display()))
}
