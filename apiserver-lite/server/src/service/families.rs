//! `ipFamilies` and `ipFamilyPolicy` of a Service: what is filled in and what is refused, given the families of the cluster.
//!
//! The rules and texts follow `initIPFamilyFields` of Kubernetes 1.36.

use std::net::IpAddr;

use apiserver_machinery::field::FieldError;
use serde_json::{Value, json};

use super::fields::{self, HEADLESS};
use super::pool::Family;

const POLICY: &str = "spec.ipFamilyPolicy";
const SINGLE: &str = "SingleStack";
const PREFER: &str = "PreferDualStack";
const REQUIRE: &str = "RequireDualStack";

/// Fills in both fields of a Service that is created (`old` of `None`) or updated. `cluster` holds the families that have a range, the
/// default one first.
pub(crate) fn init(service: &mut Value, old: Option<&Value>, cluster: &[Family]) -> Result<(), Vec<FieldError>> {
    if fields::is_external_name(service) || old.is_some_and(|old| is_unchanged_preference(service, old)) {
        return Ok(());
    }
    if fields::text(service, "ipFamilyPolicy").is_empty() {
        let policy = default_policy(service, old);
        fields::set(service, "ipFamilyPolicy", policy);
    }
    check_shape(service)?;
    check_reduction(service, old)?;
    infer_families(service, cluster)?;
    if is_headless_without_selector(service) {
        complete_headless(service, cluster);
        return Ok(());
    }
    check_cluster(service, cluster)?;
    complete(service, cluster);
    Ok(())
}

/// The families of the Service in order.
pub(crate) fn families(service: &Value) -> Vec<Family> {
    fields::texts(service, "ipFamilies").iter().filter_map(|text| Family::parse(text)).collect()
}

fn set_families(service: &mut Value, families: &[Family]) {
    let texts: Vec<&str> = families.iter().map(|family| family.as_str()).collect();
    fields::set(service, "ipFamilies", json!(texts));
}

fn policy(service: &Value) -> String {
    fields::text(service, "ipFamilyPolicy").to_owned()
}

fn is_headless_without_selector(service: &Value) -> bool {
    fields::text(service, "clusterIP") == HEADLESS && fields::is_selectorless(service)
}

/// A Service that prefers two families is not changed when the cluster gains or loses one.
pub(crate) fn is_unchanged_preference(new: &Value, old: &Value) -> bool {
    fields::kind(new) == fields::kind(old)
        && !fields::is_external_name(new)
        && policy(new) == PREFER
        && matches!(policy(old).as_str(), PREFER | "")
        && fields::texts(new, "clusterIPs") == fields::texts(old, "clusterIPs")
        && fields::texts(new, "ipFamilies") == fields::texts(old, "ipFamilies")
}

fn default_policy(service: &Value, old: Option<&Value>) -> String {
    match old.map(policy).filter(|policy| !policy.is_empty()) {
        Some(policy) => policy,
        None if is_headless_without_selector(service) => REQUIRE.to_owned(),
        None => SINGLE.to_owned(),
    }
}

/// Refuses what the later steps could not make sense of.
fn check_shape(service: &Value) -> Result<(), Vec<FieldError>> {
    let mut errors = Vec::new();
    let ips = fields::texts(service, "clusterIPs");
    for (index, ip) in ips.iter().enumerate() {
        let path = format!("spec.clusterIPs[{index}]");
        if !(index == 0 && ip == HEADLESS) && ip.parse::<IpAddr>().is_err() {
            let detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            errors.push(FieldError::invalid(path, ip.as_str(), detail));
        }
    }
    if ips.len() > 1 && ips.first().is_some_and(|ip| ip == HEADLESS) {
        errors.push(FieldError::invalid("spec.clusterIPs", ips.clone(), "'None' must be the first and only value"));
    }
    if ips.len() > 2 {
        errors.push(FieldError::invalid("spec.clusterIPs", ips.clone(), "may only hold up to 2 values"));
    }
    let first = fields::text(service, "clusterIP");
    if first.is_empty() && !ips.is_empty() {
        errors.push(FieldError::invalid(
            "spec.clusterIPs",
            ips.clone(),
            "must be empty when `clusterIP` is not specified",
        ));
    } else if !ips.is_empty() && ips.first().is_none_or(|ip| ip != first) {
        errors.push(FieldError::invalid("spec.clusterIPs", ips.clone(), "first value must match `clusterIP`"));
    }
    check_names(service, &mut errors);
    check_pairs(service, &ips, &mut errors);
    finish(errors)
}

fn check_names(service: &Value, errors: &mut Vec<FieldError>) {
    let names = fields::texts(service, "ipFamilies");
    for (index, name) in names.iter().enumerate() {
        let path = format!("spec.ipFamilies[{index}]");
        if Family::parse(name).is_none() {
            errors.push(FieldError::not_supported(path, name.as_str(), &["IPv4", "IPv6"]));
        } else if names.iter().take(index).any(|earlier| earlier == name) {
            errors.push(FieldError::duplicate(path, name.as_str()));
        }
    }
    let policy = policy(service);
    if !matches!(policy.as_str(), SINGLE | PREFER | REQUIRE) {
        errors.push(FieldError::not_supported(POLICY, policy, &[PREFER, REQUIRE, SINGLE]));
    }
}

fn check_pairs(service: &Value, ips: &[String], errors: &mut Vec<FieldError>) {
    let parsed: Vec<Family> = ips.iter().filter_map(|ip| ip.parse().ok().map(Family::of)).collect();
    if parsed.len() == 2 && parsed.first() == parsed.last() {
        let detail = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid("spec.clusterIPs", ips.to_vec(), detail));
    }
    for (index, (ip, named)) in parsed.iter().zip(families(service)).enumerate() {
        if *ip != named && ips.first().is_none_or(|ip| ip != HEADLESS) {
            let detail = format!("expected an {named} value as indicated by `ipFamilies[{index}]`");
            let value = ips.get(index).cloned().unwrap_or_default();
            errors.push(FieldError::invalid(format!("spec.clusterIPs[{index}]"), value, detail));
        }
    }
}

/// Giving a family up has to be said through the policy.
fn check_reduction(service: &mut Value, old: Option<&Value>) -> Result<(), Vec<FieldError>> {
    let mut errors = Vec::new();
    let policy = policy(service);
    for (key, what, many) in [
        ("clusterIPs", "the secondary cluster IP", "cluster IPs"),
        ("ipFamilies", "the secondary IP family", "IP families"),
    ] {
        let now = fields::texts(service, key);
        let before = old.map(|old| fields::texts(old, key));
        if policy == SINGLE && now.len() > 1 && before.as_ref() == Some(&now) {
            fields::set(service, key, json!([now.first()]));
        } else if policy == SINGLE && now.len() == 2 {
            let detail = format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {many} are specified");
            errors.push(FieldError::invalid(POLICY, policy.as_str(), detail));
        } else if policy != SINGLE && before.is_some_and(|before| is_reduced(&now, &before)) {
            let detail = format!("must be 'SingleStack' to release {what}");
            errors.push(FieldError::invalid(POLICY, policy.as_str(), detail));
        }
    }
    finish(errors)
}

fn is_reduced(now: &[String], before: &[String]) -> bool {
    // An empty list is completed again later and takes nothing away.
    now.len() == 1 && before.len() == 2 && now.first() == before.first()
}

/// Names the families of the requested addresses.
fn infer_families(service: &mut Value, cluster: &[Family]) -> Result<(), Vec<FieldError>> {
    let ips = fields::texts(service, "clusterIPs");
    let mut named = families(service);
    let mut errors = Vec::new();
    for (index, ip) in ips.iter().enumerate().skip(named.len()) {
        let Ok(ip) = ip.parse::<IpAddr>() else { break };
        let family = Family::of(ip);
        if cluster.contains(&family) {
            named.push(family);
        } else {
            let detail = format!("{family} is not configured on this cluster");
            errors.push(FieldError::invalid(format!("spec.clusterIPs[{index}]"), ips.clone(), detail));
        }
    }
    set_families(service, &named);
    finish(errors)
}

/// A headless Service without selector may have families that the cluster has not.
fn complete_headless(service: &mut Value, cluster: &[Family]) {
    let mut named = families(service);
    if named.is_empty() {
        named.extend(cluster.first());
    }
    if let ([only], true) = (named.as_slice(), policy(service) != SINGLE) {
        named = vec![*only, only.other()];
    }
    set_families(service, &named);
}

fn check_cluster(service: &Value, cluster: &[Family]) -> Result<(), Vec<FieldError>> {
    let mut errors = Vec::new();
    if policy(service) == REQUIRE && cluster.len() < 2 {
        let detail = "this cluster is not configured for dual-stack services";
        errors.push(FieldError::invalid(POLICY, REQUIRE, detail));
    }
    for (index, family) in families(service).into_iter().enumerate() {
        if !cluster.contains(&family) {
            let path = format!("spec.ipFamilies[{index}]");
            errors.push(FieldError::invalid(path, family.as_str(), "not configured on this cluster"));
        }
    }
    finish(errors)
}

fn complete(service: &mut Value, cluster: &[Family]) {
    let mut named = families(service);
    if named.is_empty() {
        named.extend(cluster.first());
    }
    if let ([only], true) = (named.as_slice(), policy(service) != SINGLE && cluster.len() == 2) {
        named = vec![*only, only.other()];
    }
    set_families(service, &named);
}

fn finish(errors: Vec<FieldError>) -> Result<(), Vec<FieldError>> {
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::needless_pass_by_value, reason = "the tables below build values in place")]

    use super::*;

    const DUAL: [Family; 2] = [Family::V4, Family::V6];

    fn check(spec: Value, old: Option<Value>, cluster: &[Family], wanted: &[&str], policy: &str) {
        let mut service = json!({"spec": spec});
        let old = old.map(|spec| json!({"spec": spec}));
        init(&mut service, old.as_ref(), cluster).unwrap();
        assert_eq!(fields::texts(&service, "ipFamilies"), wanted, "{service}");
        assert_eq!(fields::text(&service, "ipFamilyPolicy"), policy, "{service}");
    }

    fn refused(spec: Value, cluster: &[Family]) -> String {
        init(&mut json!({"spec": spec}), None, cluster)
            .unwrap_err()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("; ")
    }

    #[test]
    fn defaults() {
        check(json!({}), None, &DUAL, &["IPv4"], SINGLE);
        check(json!({"ipFamilyPolicy": PREFER}), None, &DUAL, &["IPv4", "IPv6"], PREFER);
        check(json!({"ipFamilyPolicy": PREFER}), None, &DUAL[..1], &["IPv4"], PREFER);
        check(json!({"ipFamilyPolicy": REQUIRE, "ipFamilies": ["IPv6"]}), None, &DUAL, &["IPv6", "IPv4"], REQUIRE);
        check(json!({"clusterIP": "None", "clusterIPs": ["None"]}), None, &DUAL[..1], &["IPv4", "IPv6"], REQUIRE);
        let headless = json!({"clusterIP": "None", "clusterIPs": ["None"], "selector": {"a": "b"}});
        check(headless, None, &DUAL, &["IPv4"], SINGLE);
        check(json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1"]}), None, &DUAL, &["IPv6"], SINGLE);
        check(json!({"type": "ExternalName"}), None, &DUAL, &[], "");
    }

    #[test]
    fn updates() {
        let two = json!({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": PREFER});
        let mut single = two.clone();
        single["ipFamilyPolicy"] = json!(SINGLE);
        check(single, Some(two.clone()), &DUAL, &["IPv4"], SINGLE);
        let mut dropped = json!({"spec": two});
        let old = dropped.clone();
        dropped["spec"]["clusterIPs"] = json!(["10.0.0.1"]);
        let errors = init(&mut dropped, Some(&old), &DUAL).unwrap_err();
        assert!(
            errors[0].to_string().ends_with("must be 'SingleStack' to release the secondary cluster IP"),
            "{}",
            errors[0]
        );
    }

    #[test]
    fn refusals() {
        let require = refused(json!({"ipFamilyPolicy": REQUIRE}), &DUAL[..1]);
        assert!(require.contains("this cluster is not configured for dual-stack services"), "{require}");
        let family = refused(json!({"ipFamilies": ["IPv6"]}), &DUAL[..1]);
        assert_eq!(family, "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster");
        let two = refused(json!({"ipFamilies": ["IPv4", "IPv6"]}), &DUAL);
        assert!(two.contains("when multiple IP families are specified"), "{two}");
        assert!(refused(json!({"ipFamilyPolicy": "Both"}), &DUAL).contains("Unsupported value: \"Both\""));
        assert!(refused(json!({"clusterIP": "x", "clusterIPs": ["x"]}), &DUAL).contains("must be a valid IP address"));
    }
}
