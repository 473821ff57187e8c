//! What is in a program that others wrote: the bill of materials (CycloneDX 1.5) and the texts of their licences.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::package::Papers;
use super::{Arch, CARGO, RUSTC, Source, said};

/// One library that is linked into the program or into the eBPF objects in it.
struct Part {
    reference: String,
    name: String,
    version: String,
    license: String,
    /// SHA-256 of the archive it came in; none of what is built from this tree or comes with the compiler.
    checksum: Option<String>,
    needs: BTreeSet<String>,
    /// Every licence file beside its source.
    texts: Vec<String>,
}

pub fn papers(source: &Source, arch: Arch) -> Result<Papers> {
    let mut command = Command::new(CARGO);
    super::clean(&mut command);
    command.current_dir(&source.tree).env("RUSTC", RUSTC).args([
        "metadata",
        "--format-version",
        "1",
        "--locked",
    ]);
    command.args(["--filter-platform", arch.triple(), "--features", "sidecar-ebpf/program"]);
    let metadata: Value = serde_json::from_str(&said(&mut command)?).context("what cargo knows")?;
    let lock = fs::read_to_string(source.tree.join("Cargo.lock")).context("read Cargo.lock")?;
    let mut parts = parts(&metadata, &checksums(&lock))?;
    parts.extend(with_the_compiler(arch)?);
    let epoch = format!("@{}", source.epoch);
    let at = said(Command::new("date").args(["-u", "-d", &epoch, "+%Y-%m-%dT%H:%M:%SZ"]))?;
    Ok(Papers { bill: bill(&parts, at.trim(), arch)?, licences: licences(&parts) })
}

/// What is linked in, the program itself first. Macros run in the compiler and are in nothing.
fn parts(metadata: &Value, checksums: &BTreeMap<(String, String), String>) -> Result<Vec<Part>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages: BTreeMap<String, Value> =
        list(&metadata["packages"]).into_iter().map(|package| (text(&package["id"]), package)).collect();
    let nodes: BTreeMap<String, Value> =
        list(&metadata["resolve"]["nodes"]).into_iter().map(|node| (text(&node["id"]), node)).collect();
    let macros = |id: &str| {
        let kinds = packages.get(id).map(|package| list(&package["targets"])).unwrap_or_default();
        kinds.iter().any(|target| list(&target["kind"]).iter().any(|kind| kind == "proc-macro"))
    };
    let root = packages.iter().find(|(_, package)| package["name"] == "spokeguard");
    let root = root.context("cargo knows no package spokeguard")?.0.clone();
    let reference = |id: &str| {
        let package = &packages[id];
        format!("pkg:cargo/{}@{}", text(&package["name"]), text(&package["version"]))
    };
    let mut waiting = vec![root.clone()];
    let mut seen = BTreeMap::new();
    while let Some(id) = waiting.pop() {
        if seen.contains_key(&id) {
            continue;
        }
        let node = nodes.get(&id).with_context(|| format!("cargo resolved no {id}"))?;
        let needs: Vec<String> = list(&node["deps"])
            .iter()
            .filter(|dep| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()))
            .map(|dep| text(&dep["pkg"]))
            .filter(|id| !macros(id))
            .collect();
        waiting.extend(needs.iter().cloned());
        let package = &packages[&id];
        let (name, version) = (text(&package["name"]), text(&package["version"]));
        // Some still write the older form of a choice.
        let license = text(&package["license"]).replace('/', " OR ");
        ensure!(!license.is_empty(), "{name} {version} names no licence");
        let outside = !package["source"].is_null();
        let checksum = checksums.get(&(name.clone(), version.clone())).cloned();
        ensure!(checksum.is_some() || !outside, "Cargo.lock has no checksum of {name} {version}");
        let folder = text(&package["manifest_path"]);
        let folder = Path::new(&folder).parent().unwrap_or(Path::new("/")).to_path_buf();
        let part = Part {
            reference: reference(&id),
            name,
            version,
            license,
            checksum,
            needs: needs.iter().map(|id| reference(id)).collect(),
            texts: if outside { texts(&folder)? } else { Vec::new() },
        };
        seen.insert(id, part);
    }
    let first = seen.remove(&root).context("the program is a part of itself")?;
    let mut rest: Vec<Part> = seen.into_values().collect();
    rest.sort_by(|one, other| one.reference.cmp(&other.reference));
    rest.insert(0, first);
    Ok(rest)
}

/// The C library and Rust's own, which a static program has in it too.
fn with_the_compiler(arch: Arch) -> Result<Vec<Part>> {
    let package = match arch.name() == std::env::consts::ARCH {
        true => "libc6-dev".to_owned(),
        false => format!("libc6-dev-{}-cross", arch.debian()),
    };
    let libc = said(Command::new("dpkg-query").args(["-W", "-f", "${Version}\n", &package]))?;
    let libc = libc.lines().next().unwrap_or_default();
    let rust = said(Command::new(RUSTC).arg("--version"))?;
    let rust = rust.split(' ').nth(1).context("the compiler's version")?;
    let part = |reference: String, name: &str, version: &str, license: &str, text: String| Part {
        reference,
        name: name.to_owned(),
        version: version.to_owned(),
        license: license.to_owned(),
        checksum: None,
        needs: BTreeSet::new(),
        texts: vec![text],
    };
    Ok(vec![
        part(
            format!("pkg:deb/debian/{package}@{libc}"),
            "glibc",
            libc,
            "LGPL-2.1-or-later",
            format!(
                "Linked statically from Debian's package {package}, version {libc}. Its source is Debian's source\n\
                 package of that version; this program's is all here, so it can be linked anew with another one.\n\
                 Its copyright and licence: /usr/share/doc/libc6/copyright on every Debian.\n"
            ),
        ),
        part(
            format!("pkg:generic/rust-std@{rust}"),
            "rust-std",
            rust,
            "MIT OR Apache-2.0",
            "The standard library of Rust, by the Rust Project's developers.\n".to_owned(),
        ),
    ])
}

/// Every checksum in Cargo.lock by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let mut out = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let value = |key: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \""));
            line.and_then(|rest| rest.strip_suffix('"')).map(str::to_owned)
        };
        if let (Some(name), Some(version), Some(sum)) = (value("name"), value("version"), value("checksum")) {
            out.insert((name, version), sum);
        }
    }
    out
}

fn texts(folder: &Path) -> Result<Vec<String>> {
    const BEGINNINGS: [&str; 4] = ["LICENSE", "LICENCE", "COPYING", "NOTICE"];
    let mut out = Vec::new();
    for name in super::files(folder)? {
        let path = folder.join(&name);
        let upper = name.to_uppercase();
        if path.is_file() && BEGINNINGS.iter().any(|beginning| upper.starts_with(beginning)) {
            let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            out.push(String::from_utf8_lossy(&bytes).replace('\r', ""));
        }
    }
    Ok(out)
}

/// Whether bills keep to their definition, by its authors' own library.
pub fn assert_valid(bills: &[PathBuf]) -> Result<()> {
    const SCRIPT: &str = "
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
for name in sys.argv[1:]:
    wrong = JsonStrictValidator(SchemaVersion.V1_5).validate_str(open(name).read())
    if wrong:
        sys.exit(f'{name}: {wrong}')
";
    ensure!(!bills.is_empty(), "there is no bill of materials");
    said(Command::new(crate::setup::python()).args(["-c", SCRIPT]).args(bills)).map(|_| ())
}

fn bill(parts: &[Part], at: &str, arch: Arch) -> Result<String> {
    let (program, rest) = parts.split_first().context("there is no program")?;
    let components: Vec<Value> = rest
        .iter()
        .map(|part| {
            let mut component = json!({
                "type": "library", "bom-ref": part.reference, "name": part.name, "version": part.version,
                "purl": part.reference, "scope": "required", "licenses": [{ "expression": part.license }],
            });
            if let Some(sum) = &part.checksum {
                component["hashes"] = json!([{ "alg": "SHA-256", "content": sum }]);
            }
            component
        })
        .collect();
    let needs: Vec<Value> =
        parts.iter().map(|part| json!({ "ref": part.reference, "dependsOn": part.needs })).collect();
    let document = json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {
            "timestamp": at,
            "component": {
                "type": "application", "bom-ref": program.reference, "name": program.name,
                "version": program.version, "purl": program.reference,
                "licenses": [{ "expression": program.license }],
                "properties": [{ "name": "architecture", "value": arch.name() }],
            },
        },
        "components": components,
        "dependencies": needs,
    });
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

/// Each text once, below all whose it is.
fn licences(parts: &[Part]) -> String {
    let mut owners: BTreeMap<String, (Vec<String>, &str)> = BTreeMap::new();
    let mut out = String::from(
        "spokeguard is made of its own code (MIT OR Apache-2.0) and of these libraries, each under one of the\n\
         licences that it names. Their texts, as they came, follow.\n\n",
    );
    for part in &parts[1.min(parts.len())..] {
        out += &format!("{} {}: {}\n", part.name, part.version, part.license);
        for text in &part.texts {
            // The same words broken into other lines are the same text.
            let words: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
            owners.entry(words).or_insert((Vec::new(), text)).0.push(part.name.clone());
        }
    }
    for (names, text) in owners.values() {
        let rule = "=".repeat(78);
        out += &format!("\n{rule}\n{}\n{rule}\n{}\n", names.join(", "), text.trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata() -> Value {
        let package = |name: &str, license: &str, outside: bool, kind: &str| {
            json!({ "id": name, "name": name, "version": "1.0.0", "license": license,
                    "source": outside.then_some("registry"), "manifest_path": "/nowhere/Cargo.toml",
                    "targets": [{ "kind": [kind] }] })
        };
        let dep = |name: &str, kind: Option<&str>| json!({ "pkg": name, "dep_kinds": [{ "kind": kind }] });
        json!({
            "packages": [
                package("spokeguard", "MIT OR Apache-2.0", false, "bin"),
                package("inner", "MIT/Apache-2.0", false, "lib"),
                package("macros", "MIT", false, "proc-macro"),
                package("tested", "MIT", false, "lib"),
            ],
            "resolve": { "nodes": [
                { "id": "spokeguard", "deps": [dep("inner", None), dep("macros", None), dep("tested", Some("dev"))] },
                { "id": "inner", "deps": [] }, { "id": "macros", "deps": [] }, { "id": "tested", "deps": [] },
            ] },
        })
    }

    #[test]
    fn only_what_is_linked_in_is_billed() {
        let parts = parts(&metadata(), &BTreeMap::new()).unwrap();
        let names: Vec<&str> = parts.iter().map(|part| &*part.name).collect();
        assert_eq!(names, ["spokeguard", "inner"]);
        let document: Value =
            serde_json::from_str(&bill(&parts, "2026-01-01T00:00:00Z", Arch::Aarch64).unwrap()).unwrap();
        assert_eq!(document["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(document["dependencies"][0]["dependsOn"], json!(["pkg:cargo/inner@1.0.0"]));
        assert_eq!(document["components"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn what_comes_from_outside_has_a_checksum_and_a_licence() {
        for (key, value, why) in [
            ("source", json!("registry"), "Cargo.lock has no checksum of inner 1.0.0"),
            ("license", Value::Null, "inner 1.0.0 names no licence"),
        ] {
            let mut metadata = metadata();
            metadata["packages"][1][key] = value;
            assert_eq!(parts(&metadata, &BTreeMap::new()).err().unwrap().to_string(), why);
        }
        let lock = "[[package]]\nname = \"a\"\nversion = \"1\"\n\n[[package]]\nname = \"b\"\nversion = \"2\"\nchecksum = \"c\"\n";
        assert_eq!(checksums(lock), BTreeMap::from([(("b".into(), "2".into()), "c".into())]));
    }

    #[test]
    fn a_text_is_there_once_for_all_whose_it_is() {
        let part = |name: &str, text: &str| Part {
            reference: String::new(),
            name: name.to_owned(),
            version: "1".to_owned(),
            license: "MIT".to_owned(),
            checksum: None,
            needs: BTreeSet::new(),
            texts: vec![text.to_owned()],
        };
        let text = licences(&[
            part("program", "Mine"),
            part("a", "Do what\nyou want"),
            part("b", "Do what you\nwant"),
        ]);
        assert!(text.contains("\na, b\n") && text.matches("Do").count() == 1, "{text}");
        assert!(!text.contains("Mine"), "{text}");
    }
}
