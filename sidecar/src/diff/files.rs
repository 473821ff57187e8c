//! Files with secrets in them: nobody may read or change them beyond what the policy says.

use super::{Assessment, Code, Finding, Severity};
use crate::desired::Desired;
use crate::observed::{Facet, Snapshot};

pub(super) fn compare(desired: &Desired, snapshot: &Snapshot, out: &mut Assessment) {
    let Some(seen) = snapshot.files.seen() else { return };
    for rule in &desired.policy.files {
        let path = rule.path.display();
        let Some(file) = seen.iter().find(|file| file.path == rule.path) else {
            out.doubt(Facet::Files, format!("the mode of {path}: it was not looked at"));
            continue;
        };
        let wanted = format!("mode {:04o} or stricter", rule.mode);
        let (severity, found, next) = match file.mode {
            None => (
                Severity::Low,
                "there is no such file".to_owned(),
                "Put the file there, or take it out of the policy.".to_owned(),
            ),
            Some(mode) => {
                let beyond = mode & 0o7777 & !rule.mode;
                if beyond == 0 {
                    continue;
                }
                let everyone = beyond & 0o007 != 0;
                let whom = if everyone { "everyone" } else { "more than its owner" };
                (
                    if everyone { Severity::Medium } else { Severity::Low },
                    format!("mode {:04o}, owned by uid {}: too open, to {whom}", mode & 0o7777, file.uid),
                    format!(
                        "Run `chmod {:04o}` on it; renew the secret if others had an account here.",
                        mode & rule.mode
                    ),
                )
            }
        };
        out.add(Finding::new(Code::FileMode, severity, format!("file {path}"), wanted, found, next));
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use crate::diff::stage::Stage;
    use crate::observed::{FileMode, Reading};
    use crate::policy::FileRule;

    fn with(mode: Option<u32>) -> Stage {
        let path = std::path::PathBuf::from("/etc/vault/production.env");
        let mut stage = Stage::spoke();
        stage.policy.files = vec![FileRule { path: path.clone(), mode: 0o640 }];
        stage.snapshot.files = Reading::Seen(vec![FileMode { path, mode, uid: 0 }]);
        stage
    }

    #[test]
    fn a_mode_beyond_the_policy_is_reported_and_a_stricter_one_is_not() {
        assert_eq!(with(Some(0o100_640)).codes(), [""; 0]);
        assert_eq!(with(Some(0o400)).codes(), [""; 0]);
        expect![[r#"
            medium file-mode file /etc/vault/production.env
                wanted mode 0640 or stricter
                found mode 0644, owned by uid 0: too open, to everyone
        "#]]
        .assert_eq(&with(Some(0o100_644)).show());
        assert_eq!(with(Some(0o660)).codes(), ["low file-mode file /etc/vault/production.env"]);
        assert_eq!(with(Some(0o4600)).codes(), ["low file-mode file /etc/vault/production.env"]);
        assert_eq!(with(None).codes(), ["low file-mode file /etc/vault/production.env"]);
    }

    #[test]
    fn a_file_that_was_not_looked_at_is_a_doubt() {
        let mut stage = with(None);
        stage.snapshot.files = Reading::Seen(Vec::new());
        expect![[r#"
            doubt files: the mode of /etc/vault/production.env: it was not looked at
        "#]]
        .assert_eq(&stage.show());
    }
}
