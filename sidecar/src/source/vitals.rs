//! What a beat says of the host: figures of the kernel, and small files of others. Files may lie
//! on a share that hangs, so all of this is for a thread of its own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::heartbeat::host::{self, CpuTimes};
use crate::heartbeat::kuma::Monitor;
use crate::heartbeat::ntfy::Topic;
use crate::heartbeat::payload::tenths;
use crate::heartbeat::{Payload, UrlError, app, certificate, status_file};
use crate::policy::Heartbeat;
use crate::report::Report;
use crate::source::ping::Ping;
use crate::sys::clock;
use crate::terms::Secret;

const PROFILE: &str = "/nix/var/nix/profiles/system";
const URL_BYTES_MAX: usize = 4096;
const PING: Duration = Duration::from_secs(1);

/// What to measure, and what is known from before.
pub struct Wanted {
    pub heartbeat: Heartbeat,
    pub report: Report,
    pub before: Option<CpuTimes>,
    /// When the certificate on port 443 ends, in Unix time.
    pub certificate_ends: Option<i64>,
    pub ping: Option<Arc<Ping>>,
}

#[derive(Default)]
pub struct Measured {
    pub payload: Payload,
    /// What could not be had, a sentence each.
    pub gaps: Vec<String>,
    pub ping_ms: Option<f64>,
    pub times: Option<CpuTimes>,
    /// The text of `certificate_file`, which is taken apart elsewhere.
    pub chain: Option<String>,
    pub monitor: Option<Monitor>,
    pub topic: Option<Topic>,
}

/// Measures all of it, and writes the status file.
pub fn measure(wanted: &Wanted) -> Measured {
    let Heartbeat {
        kuma_url_file,
        ntfy_url_file,
        status_file,
        app_file,
        certificate_file,
        database_file,
        ..
    } = &wanted.heartbeat;
    let mut out = Measured {
        times: kernel("/proc/stat").and_then(|text| CpuTimes::parse(&text)),
        ..Measured::default()
    };
    out.monitor = url(kuma_url_file, "kuma_url_file", Monitor::parse, &mut out.gaps);
    out.topic = url(ntfy_url_file, "ntfy_url_file", Topic::parse, &mut out.gaps);
    out.ping_ms =
        wanted.ping.as_ref().and_then(|ping| ping.round_trip_ms(PING)).map(|ms| (ms * 100.0).round() / 100.0);
    let now = clock::now();
    let payload = Payload {
        node: wanted.report.node.clone(),
        ram_mb: kernel("/proc/meminfo").and_then(|text| host::ram_mb(&text)),
        disk_pct: root_in_use(),
        cpu_pct: out.times.zip(wanted.before).and_then(|(now, before)| now.busy_pct_since(before)),
        db_size_mb: database_file.as_ref().and_then(|path| size_mb(path, &mut out.gaps)),
        cert_days_remaining: wanted.certificate_ends.map(|end| certificate::days(end, now.0.as_second())),
        nix_gen: fs::read_link(PROFILE).ok().and_then(|link| host::nix_gen(link.to_str()?)),
        uptime_s: kernel("/proc/uptime").and_then(|text| host::uptime_s(&text)),
        ..Payload::default()
    };
    out.payload = match app_file {
        Some(path) => payload.with(application(path, &mut out.gaps)),
        None => payload,
    };
    if let Some(path) = certificate_file {
        match text(path, certificate::BYTES_MAX) {
            Ok((text, _)) => out.chain = String::from_utf8(text).ok(),
            Err(error) => out.gaps.push(format!("certificate_file {}: {error}", path.display())),
        }
    }
    if let Some(path) = status_file {
        let status = status_file::render(&wanted.report, &out.payload, now);
        if let Err(error) = replace(path, status.as_bytes()) {
            let advice = if error.kind() == io::ErrorKind::ReadOnlyFilesystem {
                "; where systemd made it so, let the unit write there with ReadWritePaths="
            } else {
                ""
            };
            out.gaps.push(format!("status_file {}: {error}{advice}", path.display()));
        }
    }
    out
}

/// A small file of the kernel's, which has no end that could be waited for in vain.
fn kernel(path: &str) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(64 * 1024).read_to_string(&mut text).ok()?;
    Some(text)
}

fn root_in_use() -> Option<f64> {
    let root = rustix::fs::statvfs("/").ok()?;
    host::disk_pct(root.f_blocks, root.f_bfree, root.f_bavail)
}

fn size_mb(path: &Path, gaps: &mut Vec<String>) -> Option<f64> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Some(tenths(meta.len() as f64 / f64::from(1 << 20))),
        Ok(_) => {
            gaps.push(format!("database_file {}: not a file", path.display()));
            None
        }
        Err(error) => {
            gaps.push(format!("database_file {}: {error}", path.display()));
            None
        }
    }
}

fn application(path: &Path, gaps: &mut Vec<String>) -> app::App {
    let (bytes, age) = match text(path, app::BYTES_MAX + 1) {
        Ok(found) => found,
        Err(error) => {
            gaps.push(format!("app_file {}: {error}", path.display()));
            return app::App::default();
        }
    };
    if let Some(gap) = app::stale(age) {
        gaps.push(gap);
        return app::App::default();
    }
    let (app, wrong) = app::decode(&bytes);
    gaps.extend(wrong);
    app
}

/// The beginning of a regular file, and how old it is. `None`: it is from the future.
fn text(path: &Path, bytes_max: usize) -> io::Result<(Vec<u8>, Option<Duration>)> {
    // What is a pipe or a terminal must not be waited for.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("not a file"));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max as u64).read_to_end(&mut bytes)?;
    // A clock that is a little ahead of ours, on a share, is no future.
    let slack = Duration::from_secs(60);
    let age = meta
        .modified()
        .and_then(|at| (SystemTime::now() + slack).duration_since(at).map_err(io::Error::other));
    Ok((bytes, age.ok().map(|age| age.saturating_sub(slack))))
}

/// Reads a URL from the file that the policy names, or from the credential of that name.
fn url<T>(
    path: &Option<PathBuf>,
    key: &str,
    parse: fn(&str) -> Result<T, UrlError>,
    gaps: &mut Vec<String>,
) -> Option<T> {
    let path = path.as_ref()?;
    let read = credential(path).and_then(|path| text(&path, URL_BYTES_MAX));
    let parsed = match read {
        // Not a word of what is in there is told.
        Ok((bytes, _)) => match String::from_utf8(bytes).map(Secret::new) {
            Ok(text) => parse(text.expose()).map_err(|error| error.to_string()),
            Err(_) => Err("it is no text".to_owned()),
        },
        Err(error) => Err(error.to_string()),
    };
    parsed.map_err(|error| gaps.push(format!("{key} {}: {error}", path.display()))).ok()
}

/// Where the service manager put it: for a bare name always, and for a path that is not there.
fn credential(path: &Path) -> io::Result<PathBuf> {
    let given = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let passed = given.zip(path.file_name()).map(|(folder, name)| folder.join(name));
    match passed {
        Some(passed) if !path.is_absolute() || (!path.exists() && passed.exists()) => Ok(passed),
        None if !path.is_absolute() => Err(io::Error::other(
            "no credential of this name: put it into /etc/credstore and restart, or write a path",
        )),
        _ => Ok(path.to_owned()),
    }
}

/// As a whole: who polls finds the old one or the new. The folder is made by nobody here: a share
/// that is not mounted is not written around.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other("not the path of a file"));
    };
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(".new");
    let temporary = folder.join(temporary);
    // Others may write to that folder: nothing that they left there is opened.
    let _ = fs::remove_file(&temporary);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
        // For those who poll, whatever our mask is.
        let mode = rustix::fs::Mode::from_raw_mode(0o644);
        if file.metadata()?.mode() & 0o777 != 0o644 {
            rustix::fs::fchmod(&file, mode)?;
        }
        file.write_all(content)?;
        file.sync_data()?;
        fs::rename(&temporary, path)
    })();
    written.inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Where this host's own port 443 is to be asked for its certificate: one of these sockets'
/// addresses, loopback for those on every address.
pub fn own_https(listening: impl Iterator<Item = IpAddr>) -> Option<IpAddr> {
    listening
        .map(|address| match address {
            IpAddr::V4(four) if four.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
            IpAddr::V6(six) if six.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
            address => address,
        })
        .min()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::heartbeat::tests::report;

    fn wanted(heartbeat: Heartbeat) -> Wanted {
        Wanted { heartbeat, report: report(&[]), before: None, certificate_ends: None, ping: None }
    }

    #[test]
    fn the_host_is_measured_and_what_is_not_known_is_left_out() {
        let first = measure(&wanted(Heartbeat::default()));
        let Payload { node, ram_mb, disk_pct, cpu_pct, uptime_s, .. } = &first.payload;
        assert_eq!((node.as_str(), *cpu_pct), ("oslo", None), "nothing to compare with yet");
        assert!(ram_mb.is_some_and(|mb| mb > 1) && uptime_s.is_some_and(|s| s > 0));
        assert!(disk_pct.is_some_and(|pct| (0.0..=100.0).contains(&pct)));
        assert!(first.gaps.is_empty() && first.times.is_some(), "{:?}", first.gaps);
        assert_eq!((first.payload.req_1h, first.payload.cert_days_remaining), (None, None));
        let now = clock::now().0.as_second();
        let again = measure(&Wanted {
            certificate_ends: Some(now + 10 * 86_400 + 900),
            ..wanted(Heartbeat::default())
        });
        assert_eq!(again.payload.cert_days_remaining, Some(10));
    }

    #[test]
    fn files_that_are_odd_cost_their_fields_and_are_told() {
        let dir = tempfile::tempdir().expect("a folder");
        let at = |name: &str| dir.path().join(name);
        let heartbeat = Heartbeat {
            app_file: Some(at("app.json")),
            database_file: Some(at("vault.db")),
            certificate_file: Some(at("chain.pem")),
            kuma_url_file: Some(at("kuma-url")),
            ntfy_url_file: Some("no-such-credential".into()),
            status_file: Some(at("missing/_status.json")),
            ..Heartbeat::default()
        };
        let nothing = measure(&wanted(heartbeat.clone()));
        assert_eq!(nothing.gaps.len(), 6, "{:?}", nothing.gaps);
        assert!(!at("missing").exists(), "a share that is not mounted");
        fs::write(at("app.json"), r#"{"req_1h": 12}"#).expect("write");
        fs::write(at("vault.db"), vec![0; 3 << 20]).expect("write");
        fs::write(at("chain.pem"), "-----BEGIN").expect("write");
        fs::write(at("kuma-url"), "https://kuma.example.org/api/push/s3cr3t\n").expect("write");
        let heartbeat = Heartbeat { status_file: Some(at("_status.json")), ..heartbeat };
        let all = measure(&wanted(heartbeat.clone()));
        assert_eq!((all.payload.req_1h, all.payload.db_size_mb), (Some(12), Some(3.0)));
        assert!(all.monitor.is_some() && all.chain.as_deref() == Some("-----BEGIN"));
        assert!(
            matches!(&all.gaps[..], [one] if one.starts_with("ntfy_url_file no-such-credential")),
            "{:?}",
            all.gaps
        );
        let status = fs::read_to_string(at("_status.json")).expect("a status");
        assert!(status.contains("\"req_1h\": 12"), "{status}");
        assert_eq!(fs::metadata(at("_status.json")).expect("there").permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 5, "nothing is left beside it");
        // A pipe that nobody writes to, and a file of last week.
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .expect("a pipe");
        let old = File::options().write(true).open(at("app.json")).expect("open");
        old.set_modified(SystemTime::now() - Duration::from_secs(7 * 86_400)).expect("set");
        let odd = measure(&wanted(Heartbeat { certificate_file: Some(at("pipe")), ..heartbeat.clone() }));
        assert_eq!((odd.payload.req_1h, odd.chain), (None, None));
        assert!(odd.gaps.iter().any(|gap| gap == "app_file is 10080 min old"), "{:?}", odd.gaps);
        assert!(odd.gaps.iter().any(|gap| gap.ends_with("pipe: not a file")), "{:?}", odd.gaps);
        old.set_modified(SystemTime::now() + Duration::from_secs(3600)).expect("set");
        let future = measure(&wanted(heartbeat));
        assert!(
            future.gaps.iter().any(|gap| gap == "app_file was written in the future"),
            "{:?}",
            future.gaps
        );
    }

    #[test]
    fn a_link_that_somebody_laid_for_the_status_file_is_not_followed() {
        let dir = tempfile::tempdir().expect("a folder");
        let (prey, bait) = (dir.path().join("prey"), dir.path().join("._status.json.new"));
        fs::write(&prey, "mine").expect("write");
        std::os::unix::fs::symlink(&prey, &bait).expect("a link");
        replace(&dir.path().join("_status.json"), b"{}").expect("written");
        assert_eq!(fs::read_to_string(&prey).expect("there"), "mine");
        assert_eq!(fs::read_to_string(dir.path().join("_status.json")).expect("there"), "{}");
    }
}
