//! Somebody else changes our table between our look at it and what we do.

use std::fs;

use lab::{Lab, Need, lacking};

use crate::enforce::Guard;

/// What is done meanwhile, how often a transaction is sent, and whether that is told.
const MEANWHILE: &[(&str, usize, bool)] = &[
    ("nft flush table inet spokeguard", 2, true),
    ("nft delete table inet spokeguard", 2, true),
    ("nft flush ruleset", 2, true),
    (
        "nft delete rule inet spokeguard input handle \
         $(nft -a list chain inet spokeguard input | sed -n 's/.*# handle //p' | tail -n 1)",
        2,
        true,
    ),
    // Under the number of the one that it replaces; and what comes in goes with all that was there.
    (
        "nft replace rule inet spokeguard input handle \
         $(nft -a list chain inet spokeguard input | sed -n 's/.*# handle //p' | tail -n 1) tcp dport 5432 accept",
        1,
        true,
    ),
    ("nft insert rule inet spokeguard input tcp dport 5432 accept", 1, true),
    ("nft add chain inet spokeguard back { type filter hook input priority -300\\; }", 2, true),
    ("nft add table ip bystander", 1, false),
];

#[test]
fn a_table_that_others_change_meanwhile_is_read_again_and_never_half_ours() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let guard = Guard::new(&lab, &lab.spoke);
    let at = |name: &str| guard.dir.join(name);
    let (meanwhile, sent) = (at("meanwhile"), at("sent"));
    let bin = at("bin");
    fs::create_dir_all(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\nPATH=$REST\ncase \"$*\" in *'-f -')\n  echo x >> {0}\n  if test -e {1}; then sh {1} >&2; fi\n;; esac\n\
         exec nft \"$@\"\n",
        sent.display(),
        meanwhile.display()
    );
    fs::write(bin.join("nft"), script).unwrap();
    lab.spoke.sh(&format!("chmod 0755 {}/nft", bin.display())).unwrap();
    let program = lab::spokeguard().unwrap().display().to_string();
    let apply = format!(
        "REST=$PATH PATH={}:$PATH exec {program} apply --confirm-within 60s {}",
        bin.display(),
        guard.flags().join(" ")
    );
    let apply = || {
        let _ = fs::remove_file(&sent);
        let outcome = lab.spoke.run(&["sh", "-c", &apply]).unwrap();
        (outcome, fs::read_to_string(&sent).unwrap_or_default().lines().count())
    };
    let table = || lab.spoke.ok(&["nft", "-s", "list", "table", "inet", "spokeguard"]).unwrap();
    let policies = [8443, 8444].map(|port| {
        format!(
            "{}[[exception]]\nname = \"partners\"\ntcp = [{port}]\nfrom = [\"198.51.100.0/24\"]\nreason = \"r\"\n\
             owner = \"ops\"\nuntil = \"2099-01-31\"\n",
            lab.policy()
        )
    });
    let tables = policies.each_ref().map(|policy| {
        guard.enforce(policy);
        table()
    });
    let mut stands = 1;
    for (change, sends, told) in MEANWHILE {
        stands = 1 - stands;
        guard.write(&policies[stands]);
        fs::write(&meanwhile, format!("rm {}\n{change}\n", meanwhile.display())).unwrap();
        let (outcome, count) = apply();
        assert_eq!((outcome.code, count), (Some(0), *sends), "{change}: {}", outcome.all());
        assert_eq!(table(), tables[stands], "{change}");
        let says = outcome.stderr.contains("was changed by nft (pid ");
        assert_eq!(says, *told, "{change}: {}", outcome.all());
        guard.says(0, &["confirm"]);
    }
    // One that does so each time is told from an nft that fails.
    guard.write(&policies[1 - stands]);
    fs::write(&meanwhile, "nft flush table inet spokeguard\nnft add rule inet spokeguard input counter\n")
        .unwrap();
    let (outcome, count) = apply();
    assert!(outcome.code == Some(2) && count == 5, "{count}: {}", outcome.all());
    assert!(outcome.stderr.contains("others changed it 5 times"), "{}", outcome.all());
    fs::remove_file(&meanwhile).unwrap();
    guard.enforce(&policies[1 - stands]);
    assert_eq!(table(), tables[1 - stands]);
}
