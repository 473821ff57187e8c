//! An nft that hangs from some moment on, under a daemon that runs.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use lab::{Answer, Lab, Need, SPOKE_PUBLIC, lacking, wait_until};

use crate::daemon::{LONG, findings, plain_policy, status};

const TABLE: [&str; 6] = ["nft", "-s", "list", "table", "inet", "spokeguard"];

#[test]
fn with_an_nft_that_hangs_the_table_still_comes_back_and_what_is_not_seen_is_told() {
    if lacking(&[Need::Lab, Need::Spokeguard]) {
        return;
    }
    let lab = Lab::plain();
    let spoke = &lab.spoke;
    let folder = lab.dir.join("hanging");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("policy.toml"), plain_policy(&lab)).unwrap();
    let hangs = folder.join("hangs");
    let script =
        format!("#!/bin/sh\ntest -e {} && exec sleep 1000\nexec /usr/sbin/nft \"$@\"\n", hangs.display());
    fs::write(folder.join("nft"), script).unwrap();
    spoke.sh(&format!("chmod 0755 {}/nft", folder.display())).unwrap();
    let path = format!("PATH={}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display());
    let daemon = spoke.daemon_under(&["env", &path], &folder, &[]).unwrap();
    let is_right = || {
        let status = status(spoke, &daemon);
        let wrong = ["firewall-missing", "firewall-changed"].map(|code| findings(&status, code));
        status["verdict"] != "unknown" && wrong.concat().is_empty()
    };
    // Nothing of a canary, and the last look over.
    let wanted = wait_until(LONG, "our table alone, found right", || {
        spoke.ok(&TABLE).ok().filter(|table| is_right() && !table.contains("canary-"))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    // Nobody listens there: what is let in is refused aloud.
    let stranger = || lab.internet.connect(SocketAddr::new(SPOKE_PUBLIC, 5432), Duration::from_millis(250));
    assert_eq!(stranger(), Answer::Silent);

    fs::write(&hangs, "").unwrap();
    // Whether this is right can't be asked now; that the table is gone can be seen without nft.
    spoke.nft("insert rule inet spokeguard input accept").unwrap();
    spoke.nft("flush ruleset").unwrap();
    wait_until(LONG, "the table is back without nft", || (spoke.ok(&TABLE).ok()? == wanted).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    assert_eq!(stranger(), Answer::Silent);
    if std::env::var_os("SPOKEGUARD_ALL").is_some() {
        // Once its time is over, half a minute.
        wait_until(4 * LONG, "told", || {
            let status = status(spoke, &daemon);
            let blind = status["blind"].as_array()?.iter().find(|blind| blind["facet"] == "nftables")?;
            assert!(blind["reason"].to_string().contains("no answer within"), "{blind}");
            let firewall = findings(&status, "control-unproven");
            let firewall = firewall.iter().find(|finding| finding["subject"] == "control firewall")?;
            assert!(firewall["by"].is_null(), "it hangs by itself: {firewall}");
            (status["verdict"] == "unknown").then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    }

    // It answers again: what was done in between is found, and put right.
    fs::remove_file(&hangs).unwrap();
    spoke.nft("insert rule inet spokeguard input accept").unwrap();
    wait_until(4 * LONG, "all is right again", || {
        (spoke.ok(&TABLE).ok()? == wanted && is_right()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.running.log()));
    assert_eq!(stranger(), Answer::Silent);
}
