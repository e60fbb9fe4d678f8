//! Reads addresses as the API server stores them, and knows which may never be a target or a frontend.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use crate::model::IpFamily;

/// Parses an address. Old objects may hold IPv4 octets with leading zeros, which mean decimal numbers; an IPv4-mapped IPv6
/// address is an IPv4 address (both as Kubernetes reads them).
pub(super) fn parse_ip(text: &str) -> Option<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(address) => Some(address.to_canonical()),
        Err(_) => parse_padded_v4(text).map(IpAddr::V4),
    }
}

/// Parses a network; whitespace around it is allowed, host bits are cleared. `None` for anything else.
pub(super) fn parse_net(text: &str) -> Option<IpNet> {
    let text = text.trim();
    if let Ok(net) = text.parse::<IpNet>() {
        return Some(net.trunc());
    }
    let (address, length) = text.split_once('/')?;
    let net = Ipv4Net::new(parse_padded_v4(address)?, length.parse().ok()?).ok()?;
    Some(IpNet::V4(net.trunc()))
}

fn parse_padded_v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next().filter(|part| (1..=16).contains(&part.len()))?;
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    }
    let all_digits = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    (all_digits && parts.next().is_none()).then(|| Ipv4Addr::from(octets))
}

/// The address of an endpoint: of the slice's family, and one that a packet may be sent to. An EndpointSlice that anybody may
/// write must not turn a Service into a door to the node's loopback or to link-local services.
pub(super) fn parse_endpoint(text: &str, family: IpFamily) -> Option<IpAddr> {
    let is_v6_text = text.contains(':');
    let address = parse_ip(text)?;
    let same_family = IpFamily::of(address) == family && is_v6_text == (family == IpFamily::V6);
    (same_family && is_global_unicast(address) && !is_link_local(address)).then_some(address)
}

/// The address of a frontend that comes with a Service: unicast, not loopback, not unspecified.
pub(super) fn parse_frontend(text: &str) -> Option<IpAddr> {
    parse_ip(text).filter(|address| is_global_unicast(*address))
}

/// Whether the address is unicast beyond this host.
fn is_global_unicast(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast)
}

/// Whether the address is only meaningful on one link.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses_as_kubernetes_does() {
        let cases = [
            ("10.0.0.1", Some("10.0.0.1")),
            ("010.000.0.01", Some("10.0.0.1")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("10.0.0", None),
            ("10.0.0.256", None),
            ("10.0.0.1.5", None),
            ("+1.0.0.1", None),
            ("0x10.0.0.1", None),
            ("10..0.1", None),
            (" 10.0.0.1", None),
            ("", None),
        ];
        for (text, expect) in cases {
            assert_eq!(parse_ip(text), expect.map(|e| e.parse().unwrap()), "{text:?}");
        }
    }

    #[test]
    fn networks_are_trimmed_and_masked() {
        assert_eq!(parse_net("\t10.1.2.3/8 "), Some("10.0.0.0/8".parse().unwrap()));
        assert_eq!(parse_net("010.1.2.3/16"), Some("10.1.0.0/16".parse().unwrap()));
        assert_eq!(parse_net("2001:db8::5/64"), Some("2001:db8::/64".parse().unwrap()));
        for bad in ["10.0.0.1", "10.0.0.0/33", "", "nonsense/8"] {
            assert_eq!(parse_net(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn an_endpoint_is_never_special_and_never_of_the_other_family() {
        for ok in ["10.0.0.1", "192.168.255.255", "8.8.8.8"] {
            assert!(parse_endpoint(ok, IpFamily::V4).is_some(), "{ok}");
            assert!(parse_endpoint(ok, IpFamily::V6).is_none(), "{ok} in an IPv6 slice");
        }
        for bad in
            ["127.0.0.1", "127.9.9.9", "169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::ffff:10.0.0.1"]
        {
            assert!(parse_endpoint(bad, IpFamily::V4).is_none(), "{bad}");
        }
        assert!(parse_endpoint("2001:db8::1", IpFamily::V6).is_some());
        for bad in ["::1", "::", "fe80::1", "ff02::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "example.com"] {
            assert!(parse_endpoint(bad, IpFamily::V6).is_none(), "{bad}");
        }
    }
}
