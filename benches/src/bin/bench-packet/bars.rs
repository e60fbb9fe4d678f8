//! What rows have to reach, in nanoseconds.

/// Rows with a bar: half of what other data planes need for the same work on the reference machine, and less.
const BARS: [(&str, f64); 23] = [
    ("DNAT: not a service: pass, data", 40.0),
    ("XDP NAT, both ways: not a service: pass, data", 18.0),
    ("IPv4 DNAT, established, 1 flow", 120.0),
    ("IPv4 DNAT, established, 1 flow, each packet asks for its route", 120.0),
    ("IPv4 DNAT, established, 64k flows", 300.0),
    ("IPv4 DNAT, established, 64k flows, each packet asks for its route", 300.0),
    ("IPv4 DNAT, reply, 1 flow", 120.0),
    ("IPv4 DNAT, new flow each, both entries written", 900.0),
    ("IPv4 XDP NAT, both ways, established, 1 flow", 130.0),
    ("IPv4 XDP NAT, both ways, established, 1 flow, each packet asks for its route", 130.0),
    ("IPv4 XDP NAT, both ways, established, 64k flows", 380.0),
    ("IPv4 XDP NAT, both ways, established, 64k flows, each packet asks for its route", 380.0),
    ("IPv4 XDP NAT, both ways, reply, 1 flow", 120.0),
    ("IPv4 XDP NAT, both ways, new flow each, both entries written", 1200.0),
    ("IPv4 XDP DSR (IPIP), established, 1 flow", 65.0),
    ("IPv4 XDP DSR (IPIP), established, 64k flows", 200.0),
    ("IPv4 XDP DSR (IPIP), established, 1M flows", 300.0),
    ("IPv4 XDP DSR (IPIP), new flow each, entry written", 780.0),
    ("IPv4 XDP DSR (IPIP), new flow each, flood: none is remembered", 75.0),
    ("connect4 to a VIP, new UDP socket", 300.0),
    ("connect4 to a VIP, reused UDP socket", 80.0),
    ("connect4, not a service", 40.0),
    ("sendmsg4 to a VIP", 80.0),
];

/// Nanoseconds of the empty XDP program on the machine that the bars were set on.
const EMPTY_XDP: f64 = 6.3;
/// The row that says how fast this machine is.
pub(crate) const PACE_ROW: &str = "empty XDP program";
/// A machine within this factor of that one is not told apart from it: runs differ as much.
const PACE_RANGE: std::ops::Range<f64> = 0.9..1.1;

/// How many times as long this machine takes as that which the bars were set on; `None` where they are about the same.
pub(crate) fn pace(empty_xdp: f64) -> Option<f64> {
    let pace = empty_xdp / EMPTY_XDP;
    (!PACE_RANGE.contains(&pace)).then_some(pace)
}

/// How much more a row among many services may take than with one.
pub(crate) const RATIO_MAX: f64 = 1.05;

/// The bar of a row; `None` where it has none.
pub(crate) fn bar(name: &str) -> Option<f64> {
    BARS.iter().find(|(row, _)| *row == name).map(|(_, bar)| *bar)
}

/// Whether a value meets its bar, in a word.
pub(crate) fn verdict(value: f64, bar: f64) -> &'static str {
    if value <= bar { "met" } else { "MISSED" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_machine_has_a_pace() {
        assert_eq!((pace(6.3), pace(6.8), pace(12.6)), (None, None, Some(2.0)));
    }

    #[test]
    fn a_bar_is_met_up_to_its_value() {
        assert_eq!(bar("sendmsg4 to a VIP"), Some(80.0));
        assert_eq!(bar("sendmsg4"), None);
        assert_eq!((verdict(80.0, 80.0), verdict(80.1, 80.0)), ("met", "MISSED"));
    }
}
