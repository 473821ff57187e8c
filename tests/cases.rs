//! `cases/NAME/` is a test: one run of the program, compared with what it said when somebody looked at it.
//!
//! ```text
//!   args         one argument per line
//!   code         the exit code that is wanted
//!   expect.txt   what it prints: standard output, and after a line `--- stderr` its errors, if any
//!   policy.toml  and any other file that the arguments name; the run's folder is a copy of the case's
//!   spoke.sh     optional: makes it a run inside a lab's spoke, after this script
//! ```
//!
//! `UPDATE_EXPECT=1` writes `expect.txt` and `code` anew. Read the difference before you believe it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, Need, lacking};

#[test]
fn every_case_says_what_it_said_before() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let found = folders(&root).unwrap();
    assert!(!found.is_empty(), "no cases in {}", root.display());
    if lacking(&[Need::Spokeguard]) {
        return;
    }
    let program = lab::spokeguard().unwrap();
    let update = std::env::var_os("UPDATE_EXPECT").is_some();
    let failures = failures(&found, &program, update);
    assert!(
        failures.is_empty(),
        "{} of {} cases differ\n{}",
        failures.len(),
        found.len(),
        failures.join("\n")
    );
}

#[test]
fn every_example_is_a_policy_that_is_right() {
    if lacking(&[Need::Spokeguard]) {
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut examples: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    examples.retain(|path| path.extension().is_some_and(|end| end == "toml"));
    assert!(examples.len() >= 4, "{examples:?}");
    for path in examples {
        let check = Command::new(lab::spokeguard().unwrap())
            .args(["policy", "check", "--policy"])
            .arg(&path)
            .output();
        let check = check.unwrap();
        let errors = String::from_utf8_lossy(&check.stderr);
        assert!(check.status.success() && errors.is_empty(), "{}: {errors}", path.display());
    }
}

/// All failures, not the first: a changed word often changes many cases, and one look should show them.
fn failures(cases: &[PathBuf], program: &Path, update: bool) -> Vec<String> {
    let judged = cases.iter().map(|case| (case, judge(case, program, update)));
    judged.filter_map(|(case, result)| Some(format!("== {}\n{:#}", case.display(), result.err()?))).collect()
}

fn folders(root: &Path) -> Result<Vec<PathBuf>> {
    if !root.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(root).with_context(|| format!("list {}", root.display()))?;
    let mut out: Vec<PathBuf> =
        entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>().context("list the cases")?;
    out.retain(|path| path.is_dir());
    out.sort();
    Ok(out)
}

fn judge(case: &Path, program: &Path, update: bool) -> Result<()> {
    let read = |name: &str| fs::read_to_string(case.join(name)).with_context(|| format!("read {name}"));
    let arguments = read("args")?;
    let arguments: Vec<&str> = arguments.lines().collect();
    let folder = tempfile::tempdir().context("create the run's folder")?;
    for entry in fs::read_dir(case).context("list the case")? {
        let path = entry?.path();
        let name = path.file_name().context("a file has a name")?;
        fs::copy(&path, folder.path().join(name)).with_context(|| format!("copy {}", path.display()))?;
    }
    let (code, said) = run(case, program, &arguments, folder.path())?;
    // The run's folder is another one every time; nothing else may be.
    let said = said.replace(&folder.path().display().to_string(), "$DIR");
    if update {
        fs::write(case.join("expect.txt"), &said).context("write expect.txt")?;
        fs::write(case.join("code"), format!("{code}\n")).context("write code")?;
        return Ok(());
    }
    let wanted_code: i32 = read("code")?.trim().parse().context("read the number in code")?;
    let wanted = read("expect.txt")?;
    ensure!(
        code == wanted_code && said == wanted,
        "exit {code}, wanted {wanted_code}\n{}",
        difference(&wanted, &said)
    );
    Ok(())
}

fn run(case: &Path, program: &Path, arguments: &[&str], folder: &Path) -> Result<(i32, String)> {
    let script = case.join("spoke.sh");
    // Built only for the cases that ask, and kept until the run is over.
    let lab = if script.exists() {
        if lacking(&[Need::Lab]) {
            bail!("a case with spoke.sh needs a lab");
        }
        let lab = Lab::plain();
        lab.spoke.sh(&fs::read_to_string(&script).context("read spoke.sh")?)?;
        Some(lab)
    } else {
        None
    };
    let mut command = match &lab {
        Some(lab) => {
            let mut words = vec![program.as_os_str().to_os_string()];
            words.extend(arguments.iter().map(|word| word.into()));
            lab.spoke.command(&words)
        }
        None => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
    };
    command.current_dir(folder).env("NO_COLOR", "1").env("COLUMNS", "100").env_remove("SPOKEGUARD_POLICY");
    let (out, errors) = (folder.join(".stdout"), folder.join(".stderr"));
    command.stdin(std::process::Stdio::null());
    command.stdout(fs::File::create(&out)?).stderr(fs::File::create(&errors)?);
    let mut child = command.spawn().with_context(|| format!("start {}", program.display()))?;
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("still running after 20 s");
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let mut said = fs::read_to_string(out)?;
    let errors = fs::read_to_string(errors)?;
    if !errors.is_empty() {
        said += &format!("--- stderr\n{errors}");
    }
    Ok((status.code().context("ended by a signal")?, said))
}

/// The common beginning and end say nothing; the lines between are shown whole.
fn difference(wanted: &str, found: &str) -> String {
    let (wanted, found): (Vec<_>, Vec<_>) = (wanted.lines().collect(), found.lines().collect());
    let same = wanted.iter().zip(&found).take_while(|(a, b)| a == b).count();
    let rest =
        (wanted[same..].iter().rev()).zip(found[same..].iter().rev()).take_while(|(a, b)| a == b).count();
    let mut out = format!("from line {}:\n", same + 1);
    out.extend(wanted[same..wanted.len() - rest].iter().map(|line| format!("- {line}\n")));
    out.extend(found[same..found.len() - rest].iter().map(|line| format!("+ {line}\n")));
    out
}

/// The runner with a shell in the program's place: it must see a wrong word, a wrong code and a missing file.
#[test]
fn a_case_fails_for_its_words_and_for_its_code() {
    let root = tempfile::tempdir().unwrap();
    let case = |name: &str, script: &str, expect: &str, code: &str| {
        let folder = root.path().join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("args"), format!("-c\n{script}")).unwrap();
        fs::write(folder.join("expect.txt"), expect).unwrap();
        fs::write(folder.join("code"), code).unwrap();
        folder
    };
    case(
        "a-good",
        "cat args | head -1; echo problem in $PWD/args >&2; exit 2",
        "-c\n--- stderr\nproblem in $DIR/args\n",
        "2",
    );
    case("b-word", "echo found", "wanted\n", "0\n");
    case("c-code", "exit 1", "", "0");
    fs::remove_file(case("d-file", "true", "", "0").join("expect.txt")).unwrap();
    fs::write(root.path().join("README"), "not a case").unwrap();
    let found = folders(root.path()).unwrap();
    assert_eq!(found.len(), 4);
    let failed = failures(&found, Path::new("/bin/sh"), false);
    assert_eq!(failed.len(), 3, "{failed:?}");
    for (failure, part) in failed.iter().zip(["- wanted\n+ found\n", "exit 1, wanted 0", "read expect.txt"]) {
        assert!(failure.contains(part), "{failure}");
    }
    assert!(failures(&found, Path::new("/bin/sh"), true).is_empty());
    assert!(failures(&found, Path::new("/bin/sh"), false).is_empty());
    assert_eq!(fs::read_to_string(root.path().join("b-word/expect.txt")).unwrap(), "found\n");
}
