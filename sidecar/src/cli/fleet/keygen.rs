//! `fleet keygen`: a key pair, of which the inventory gets the public half only.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, ensure};
use clap::Args;
use serde_json::json;
use zeroize::Zeroizing;

use super::{load, one, tree};
use crate::cli::{Global, today};
use crate::fleet::{self, Keys, edit, render};
use crate::policy::MeshKind;
use crate::sys::clock;
use crate::terms::{PublicKey, base64};

#[derive(Args)]
#[command(group = clap::ArgGroup::new("where").required(true))]
pub struct Options {
    /// Whose
    node: String,
    /// Put the private half here, for nobody else to read; must not exist yet
    #[arg(long, value_name = "FILE", group = "where")]
    private_key: Option<PathBuf>,
    /// Print the private half instead, and nothing else, for a pipe
    #[arg(long, group = "where")]
    stdout: bool,
    /// Replace the key that the node has; its tunnel is down until both ends know
    #[arg(long)]
    replace: bool,
}

pub const EXAMPLE: &str = "\
Example:
  spokeguard fleet keygen virginia --stdout |
    ssh root@203.0.113.9 'umask 077; cat > /etc/wireguard/wg0.key'";

pub fn run(global: &Global, file: &Path, options: &Options) -> anyhow::Result<u8> {
    // Where the name leads: a link to the inventory stays one.
    let file = &file.canonicalize().with_context(|| format!("open inventory {}", file.display()))?;
    let folder = file.parent().context("an inventory is in a directory")?;
    let _lock = tree::lock(folder)?;
    let (inventory, text) = load(file, Keys::MayBeMissing)?;
    let node = one(&inventory, &options.node)?;
    let name = &node.name;
    ensure!(
        inventory.mesh.kind == MeshKind::Wireguard,
        "Tailscale makes its own keys: an inventory with kind = \"tailscale\" has none"
    );
    if let Some(key) = node.public_key.filter(|_| !options.replace) {
        return Err(anyhow!("{name} has the public key {key} already: --replace makes another"));
    }
    let (private, public) = pair().context("make a key pair")?;
    let edited =
        edit::set_public_key(&text, name, public).context("put the public key into the inventory")?;
    // It must read as before but for the key.
    fleet::parse(&edited, &file.to_string_lossy(), today(clock::now()), Keys::MayBeMissing)?;
    let put = options.private_key.as_deref().map(|path| keep(path, &private)).transpose()?;
    if let Err(error) = replace(file, &edited) {
        if let Some(path) = put {
            let _ = fs::remove_file(path);
        }
        return Err(error);
    }
    let inventory = file.display();
    let told = format!("{name}: its public key {public} is in {inventory}");
    if options.stdout {
        eprintln!("{told}");
        let mut stdout = std::io::stdout().lock();
        let written =
            stdout.write_all(&*private).and_then(|()| stdout.write_all(b"\n")).and_then(|()| stdout.flush());
        written
            .context("print the private key: the inventory has its public half already, so make another")?;
        return Ok(0);
    }
    let path = put.unwrap_or(Path::new("")).display().to_string();
    let goes = render::private_key_path(&node.policy);
    let text = format!("{told}\nits private half is in {path}: move it to {goes} on the node\n");
    global
        .tell(&text, json!({ "version": 1, "node": name, "public_key": public, "private_key_file": path }))?;
    Ok(0)
}

type Private = Zeroizing<[u8; 44]>;

/// The private half in base64, as `wg genkey` prints it, and the public one.
fn pair() -> anyhow::Result<(Private, PublicKey)> {
    let mut bytes = Zeroizing::new([0u8; 32]);
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    // Clamped, as WireGuard keeps them.
    bytes[0] &= 0xf8;
    bytes[31] = (bytes[31] & 0x7f) | 0x40;
    let secret = x25519_dalek::StaticSecret::from(*bytes);
    let public = PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes());
    let mut private = Private::new([0; 44]);
    base64(&bytes, &mut private);
    Ok((private, public))
}

fn keep<'p>(path: &'p Path, private: &Private) -> anyhow::Result<&'p Path> {
    let what = || format!("write the private key to {}", path.display());
    ensure!(fs::symlink_metadata(path).is_err(), "{} is there already: choose another name", path.display());
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path).with_context(what)?;
    let written =
        file.write_all(&**private).and_then(|()| file.write_all(b"\n")).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written.with_context(what).map(|()| path)
}

/// The old inventory or the new one, never half of it; mode and owner stay.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let what = || format!("write {}", path.display());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.spokeguard-new"));
    // Of one that was killed; the lock is ours.
    let _ = fs::remove_file(&new);
    let write = || {
        let old = fs::metadata(path)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(old.permissions())?;
        // Only root may give files away; for others it is theirs already.
        let _ = fchown(&file, Some(old.uid()), Some(old.gid()));
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    let done: std::io::Result<()> = write();
    if done.is_err() {
        let _ = fs::remove_file(&new);
    }
    done.with_context(what)
}
