//! Compares what connections met with what a scenario expects. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::scenario::{Flow, Verdict};
use super::wire::{Outcome, Seen};
use crate::Failure;

/// Connections of a flow that must be refused, silent or untouched.
const FEW: usize = 3;
/// Connections of a sticky flow.
const STICKY: usize = 20;
/// Connections for each backend, and one backend's worth more: the chance to miss one of N, or one that should not be there, is
/// below N * e^-25.
const FOR_EACH: usize = 25;

/// How many connections a flow takes.
pub(super) fn connections(flow: &Flow) -> usize {
    match &flow.expect {
        Verdict::Dnat { .. } if flow.sticky => STICKY,
        Verdict::Dnat { backends, .. } => FOR_EACH * (backends.len() + 1),
        Verdict::Reject | Verdict::Drop | Verdict::Pass => FEW,
    }
}

/// `None` when the outcomes are what the flow expects, else what they are.
pub(super) fn judge(flow: &Flow, node_ips: &[IpAddr], outcomes: &[Outcome]) -> Option<String> {
    let right = !outcomes.is_empty()
        && match &flow.expect {
            Verdict::Reject => outcomes.iter().all(|outcome| *outcome == Err(Failure::Refused)),
            Verdict::Drop => outcomes.iter().all(|outcome| is_dropped(flow, node_ips, outcome)),
            Verdict::Pass => outcomes.iter().all(|outcome| outcome.as_ref().is_ok_and(|seen| is_untouched(flow, seen))),
            Verdict::Dnat { backends, masquerade } => {
                let forwarded = |outcome: &Outcome| {
                    outcome.as_ref().is_ok_and(|seen| has_right_source(flow, node_ips, *masquerade, seen))
                };
                outcomes.iter().all(forwarded) && reached_as_wanted(flow, backends, &reached(outcomes))
            }
        };
    (!right).then(|| describe(flow, node_ips, outcomes))
}

fn reached(outcomes: &[Outcome]) -> BTreeSet<SocketAddr> {
    outcomes.iter().flatten().map(|seen| seen.reached).collect()
}

fn reached_as_wanted(flow: &Flow, backends: &BTreeSet<SocketAddr>, reached: &BTreeSet<SocketAddr>) -> bool {
    if flow.sticky { reached.len() == 1 && reached.is_subset(backends) } else { reached == backends }
}

/// Nothing comes back. netfilter tells a datagram's sender when it drops it on the sender's own machine.
fn is_dropped(flow: &Flow, node_ips: &[IpAddr], outcome: &Outcome) -> bool {
    let by_own_machine = *outcome == Err(Failure::NotPermitted) && node_ips.contains(&flow.source);
    by_own_machine || *outcome == Err(Failure::Timeout)
}

fn is_untouched(flow: &Flow, seen: &Seen) -> bool {
    seen.reached == flow.target && seen.source == flow.source
}

/// A connection that comes back to its own client is masqueraded always: without it the answer would not find its way.
fn has_right_source(flow: &Flow, node_ips: &[IpAddr], masquerade: bool, seen: &Seen) -> bool {
    if masquerade || seen.reached.ip() == flow.source {
        node_ips.contains(&seen.source)
    } else {
        seen.source == flow.source
    }
}

/// What the outcomes are, the most frequent first: `REJECT (3 times)`.
fn describe(flow: &Flow, node_ips: &[IpAddr], outcomes: &[Outcome]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for outcome in outcomes {
        *counts.entry(describe_one(flow, node_ips, outcome)).or_default() += 1;
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(text, count)| (usize::MAX - count, text.clone()));
    let counts: Vec<String> = counts.into_iter().map(|(text, count)| format!("{text} ({count} times)")).collect();
    if counts.is_empty() { "no connection".to_owned() } else { counts.join(", ") }
}

fn describe_one(flow: &Flow, node_ips: &[IpAddr], outcome: &Outcome) -> String {
    match outcome {
        Err(Failure::Refused) => "REJECT".to_owned(),
        Err(Failure::Timeout) => "DROP".to_owned(),
        Err(other) => other.to_string(),
        Ok(seen) if is_untouched(flow, seen) => "PASS".to_owned(),
        Ok(seen) if seen.source == flow.source => format!("DNAT to {}, source kept", seen.reached),
        Ok(seen) if node_ips.contains(&seen.source) => format!("DNAT to {}, masqueraded", seen.reached),
        Ok(seen) => format!("DNAT to {}, masqueraded as {}, which is not the node's", seen.reached, seen.source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::scenario::Protocol;

    const NODE: &str = "192.168.0.2";
    const CLIENT: &str = "10.0.0.2";
    const TARGET: &str = "172.30.0.1:80";
    const ONE: &str = "10.0.1.1:80";
    const TWO: &str = "10.0.1.2:80";

    fn flow(source: &str, sticky: bool, expect: Verdict) -> Flow {
        let (source, target) = (source.parse().unwrap(), TARGET.parse().unwrap());
        Flow { name: "f".into(), protocol: Protocol::Tcp, source, target, sticky, expect }
    }

    fn dnat(backends: &[&str], masquerade: bool) -> Verdict {
        Verdict::Dnat { backends: backends.iter().map(|b| b.parse().unwrap()).collect(), masquerade }
    }

    fn seen(reached: &str, source: &str) -> Outcome {
        Ok(Seen { reached: reached.parse().unwrap(), source: source.parse().unwrap() })
    }

    fn check(flow: &Flow, outcomes: &[Outcome], expect: Option<&str>) {
        assert_eq!(judge(flow, &[NODE.parse().unwrap()], outcomes).as_deref(), expect);
    }

    #[test]
    fn every_backend_and_none_other() {
        let both = flow(CLIENT, false, dnat(&[ONE, TWO], false));
        check(&both, &[seen(ONE, CLIENT), seen(TWO, CLIENT)], None);
        check(&both, &[seen(ONE, CLIENT)], Some("DNAT to 10.0.1.1:80, source kept (1 times)"));
        let one = flow(CLIENT, false, dnat(&[ONE], false));
        let text = "DNAT to 10.0.1.1:80, source kept (2 times), DNAT to 10.0.1.2:80, source kept (1 times)";
        check(&one, &[seen(ONE, CLIENT), seen(TWO, CLIENT), seen(ONE, CLIENT)], Some(text));
        check(
            &one,
            &[seen(ONE, CLIENT), Err(Failure::Timeout)],
            Some("DNAT to 10.0.1.1:80, source kept (1 times), DROP (1 times)"),
        );
        check(&one, &[], Some("no connection"));
        let sticky = flow(CLIENT, true, dnat(&[ONE, TWO], false));
        check(&sticky, &[seen(TWO, CLIENT), seen(TWO, CLIENT)], None);
        assert!(judge(&sticky, &[], &[seen(ONE, CLIENT), seen(TWO, CLIENT)]).is_some());
    }

    #[test]
    fn the_source_is_the_clients_or_the_nodes() {
        let kept = flow(CLIENT, false, dnat(&[ONE], false));
        check(&kept, &[seen(ONE, NODE)], Some("DNAT to 10.0.1.1:80, masqueraded (1 times)"));
        let masqueraded = flow(CLIENT, false, dnat(&[ONE], true));
        check(&masqueraded, &[seen(ONE, NODE)], None);
        assert!(judge(&masqueraded, &[NODE.parse().unwrap()], &[seen(ONE, "1.1.1.1")]).is_some());
        let itself = flow("10.0.1.1", false, dnat(&[ONE, TWO], false));
        check(&itself, &[seen(ONE, NODE), seen(TWO, "10.0.1.1")], None);
        assert!(judge(&itself, &[NODE.parse().unwrap()], &[seen(ONE, "10.0.1.1"), seen(TWO, "10.0.1.1")]).is_some());
    }

    #[test]
    fn refused_silent_and_untouched_are_told_apart() {
        let outcomes = [Err(Failure::Refused), Err(Failure::Timeout), seen(TARGET, CLIENT)];
        for (index, verdict) in [Verdict::Reject, Verdict::Drop, Verdict::Pass].into_iter().enumerate() {
            let flow = flow(CLIENT, false, verdict.clone());
            for (other, outcome) in outcomes.iter().enumerate() {
                let right = judge(&flow, &[], std::slice::from_ref(outcome)).is_none();
                assert_eq!(right, index == other, "{verdict}: {outcome:?}");
            }
        }
        let (dropped, not_permitted) = (Verdict::Drop, [Err(Failure::NotPermitted)]);
        check(&flow(NODE, false, dropped.clone()), &not_permitted, None);
        check(&flow(CLIENT, false, dropped), &not_permitted, Some("not permitted (1 times)"));
        let pass = flow(CLIENT, false, Verdict::Pass);
        check(&pass, &[seen(TARGET, NODE)], Some("DNAT to 172.30.0.1:80, masqueraded (1 times)"));
        check(&pass, &[Err(Failure::Reset)], Some("reset (1 times)"));
    }
}
