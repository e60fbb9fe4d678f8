//! How one of many is picked: the same arithmetic in the kernel and in tests.

/// Maps a random 32-bit number to `0..count` without a division; 0 for a count of 0.
#[inline(always)]
pub const fn pick(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// Port number `attempt` of a probe sequence that starts at `random` and stays in `min..=max`.
#[inline(always)]
pub const fn probe_port(random: u32, attempt: u32, min: u16, max: u16) -> u16 {
    let size = (max as u32).saturating_sub(min as u32) + 1;
    // 7919 is prime and larger than no range in use divides evenly: consecutive attempts land far apart.
    let offset = pick(random, size) + attempt * 7919;
    min + (offset % size) as u16
}

/// Whether a UDP port, host byte order, is a tunnel's by convention. Packets to it are unpacked by network cards and switches, whoever they
/// are for, so no masqueraded flow gets it. L2TP 1701, GTP 2152, IPsec 4500, VXLAN 4789, its generic form 4790 and Linux's older 8472,
/// GUE 6080, Geneve 6081, MPLS 6635 (IANA's registry), WireGuard's usual 51820.
#[inline(always)]
pub const fn is_tunnel_port(port: u16) -> bool {
    matches!(port, 1701 | 2152 | 4500 | 4789 | 4790 | 6080 | 6081 | 6635 | 8472 | 51820)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnels_keep_their_ports() {
        assert!(is_tunnel_port(4789) && is_tunnel_port(1701) && is_tunnel_port(51820));
        assert!(!is_tunnel_port(4788) && !is_tunnel_port(0));
    }

    #[test]
    fn picks_stay_in_range_and_reach_both_ends() {
        assert_eq!(pick(0, 5), 0);
        assert_eq!(pick(u32::MAX, 5), 4);
        assert_eq!(pick(u32::MAX, 0), 0);
    }

    #[test]
    fn probes_stay_in_range_and_differ() {
        for random in [0, 1, u32::MAX / 2, u32::MAX] {
            let ports: [u16; 8] = core::array::from_fn(|attempt| probe_port(random, attempt as u32, 1024, 29999));
            for (index, port) in ports.iter().enumerate() {
                assert!((1024..=29999).contains(port));
                assert!(!ports[..index].contains(port));
            }
        }
        assert_eq!(probe_port(77, 3, 5, 5), 5);
    }
}
