//! The sealed rules: the last confirmed policy as one file for `nft -f`, for a boot that
//! has none of our code. It names no interface by number, so it loads before there are
//! any; loading it again changes nothing and keeps what counters counted.
//!
//! An [[exception]] is in it with its end, which the kernel itself judges by the clock: an
//! emergency way in is there when the daemon does not come up, and closes on its last day
//! (UTC) though nobody is left to close it.

use crate::desired::Desired;
use crate::policy;
use crate::ruleset::render;

/// Its name in the state directory.
pub const FILE: &str = "sealed.nft";

/// The file; `None` where the policy wants no table. The same policy gives the same file,
/// whatever the day.
pub fn text(desired: &Desired) -> Option<String> {
    text_as(desired, &policy::fingerprint(&desired.policy))
}

/// The same where the policy's fingerprint is known.
pub(super) fn text_as(desired: &Desired, fingerprint: &str) -> Option<String> {
    let table = render::table(&desired.sealed()?);
    Some(format!(
        "# The last confirmed rules of spokeguard, for `nft -f`; needs nothing else of it.\n\
         # Written anew with every confirmation: changes belong into the policy.\n\
         # node {}\n# policy {fingerprint}\n# sum {}\n{table}",
        crate::terms::printable(&desired.policy.node.name, 64),
        policy::sum(&table)
    ))
}

/// Whether the file is whole: its sum is that of its rules.
pub fn is_whole(text: &str) -> bool {
    let mut rest = text;
    let mut sum = None;
    while let Some((line, after)) = rest.split_once('\n').filter(|(line, _)| line.starts_with('#')) {
        sum = line.strip_prefix("# sum ").or(sum);
        rest = after;
    }
    sum == Some(policy::sum(rest).as_str())
}

/// The fingerprint of the policy that a whole file is of.
pub fn policy(text: &str) -> Option<&str> {
    let mut head = text.lines().take_while(|line| line.starts_with('#'));
    head.find_map(|line| line.strip_prefix("# policy "))
}
