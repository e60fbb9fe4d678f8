//! Addresses and prefixes: strict text forms, and which addresses an endpoint may have.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::cursor::{At, Errors};

const IP_RULE: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
const CIDR_RULE: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";

/// Checks an address. `None` comes with an error; any IPv6 spelling is fine.
pub(super) fn ip(at: &At<'_>, errors: &mut Errors) -> Option<IpAddr> {
    let parsed: Option<IpAddr> = at.text().parse().ok();
    match parsed {
        Some(IpAddr::V6(address)) if address.to_ipv4_mapped().is_some() => {
            errors.invalid(at, "must not be an IPv4-mapped IPv6 address");
            None
        }
        Some(address) => Some(address),
        None if without_leading_zeros(at.text()).is_some() => {
            errors.invalid(at, "must not have leading 0s");
            None
        }
        None => {
            errors.invalid(at, IP_RULE);
            None
        }
    }
}

/// As [`ip`], and the text must be the canonical one (RFC 5952 for IPv6).
pub(super) fn canonical_ip(at: &At<'_>, errors: &mut Errors) -> Option<IpAddr> {
    let address = ip(at, errors)?;
    let canonical = address.to_string();
    if canonical == at.text() {
        return Some(address);
    }
    errors.invalid(at, format!("must be in canonical form ({})", crate::field::quote(&canonical)));
    None
}

fn without_leading_zeros(text: &str) -> Option<IpAddr> {
    let part = |part: &str| {
        let trimmed = part.trim_start_matches('0');
        if trimmed.is_empty() && !part.is_empty() { "0".to_owned() } else { trimmed.to_owned() }
    };
    let parts: Vec<String> = text.split('.').map(part).collect();
    parts.join(".").parse::<std::net::Ipv4Addr>().ok().map(IpAddr::V4)
}

/// Checks a prefix without host bits; other spellings of IPv6 are fine.
pub(super) fn cidr(at: &At<'_>, errors: &mut Errors) -> Option<IpNet> {
    let text = at.text().trim();
    let Ok(prefix) = text.parse::<IpNet>() else {
        let sloppy = text.split_once('/').and_then(|(ip, bits)| {
            let ip: IpAddr = ip.parse().ok().or_else(|| without_leading_zeros(ip))?;
            IpNet::new(ip, bits.parse().ok()?).ok()
        });
        let rule = if sloppy.is_some() { "must not have leading 0s in IP or prefix length" } else { CIDR_RULE };
        errors.invalid(at, rule);
        return None;
    };
    if matches!(prefix.addr(), IpAddr::V6(address) if address.to_ipv4_mapped().is_some()) {
        errors.invalid(at, "must not have an IPv4-mapped IPv6 address");
        return None;
    }
    if prefix.trunc() != prefix {
        errors.invalid(at, "must not have bits set beyond the prefix length");
        return None;
    }
    Some(prefix)
}

/// As [`cidr`], and the text must be the canonical one.
pub(super) fn canonical_cidr(at: &At<'_>, errors: &mut Errors) -> Option<IpNet> {
    let prefix = cidr(at, errors)?;
    let canonical = prefix.to_string();
    if canonical == at.text() {
        return Some(prefix);
    }
    errors.invalid(at, format!("must be in canonical form ({})", crate::field::quote(&canonical)));
    None
}

/// Whether a list holds at most one value of each family.
pub(super) fn one_per_family(families: impl Iterator<Item = bool>) -> bool {
    let (v4, v6): (Vec<bool>, Vec<bool>) = families.partition(|is_ipv4| *is_ipv4);
    v4.len() <= 1 && v6.len() <= 1
}

/// An endpoint's address must be reachable from other machines.
pub(super) fn endpoint(at: &At<'_>, address: IpAddr, errors: &mut Errors) {
    let (link_local, link_local_multicast) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.octets().starts_with(&[224, 0, 0])),
        IpAddr::V6(v6) => (v6.is_unicast_link_local(), is_link_local_multicast(v6)),
    };
    let rules = [
        (address.is_unspecified(), format!("may not be unspecified ({})", at.text())),
        (address.is_loopback(), "may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned()),
        (link_local, "may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned()),
        (link_local_multicast, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_owned()),
    ];
    for (_, rule) in rules.into_iter().filter(|(broken, _)| *broken) {
        errors.invalid(at, rule);
    }
}

fn is_link_local_multicast(address: Ipv6Addr) -> bool {
    let [first, second, ..] = address.octets();
    first == 0xff && second & 0x0f == 0x02
}
