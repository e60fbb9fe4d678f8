//! Hashes that every node must agree on: of flows, of clients and of endpoints. MurmurHash3's 32-bit mixing (Appleby, 2008).
//!
//! Not for secrets: who knows the endpoints may pick source ports that lead to one of them, as with any published hash.

use crate::address::{Address, Be16};
use crate::map::FlowKey;

/// Seed of flows and clients. Endpoints are hashed under others.
const FLOW_SEED: u32 = 0x7472_616d;

/// Takes one more word in.
#[inline(always)]
const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

/// Makes every bit depend on every other.
#[inline(always)]
const fn finish(hash: u32) -> u32 {
    let hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    let hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[inline(always)]
fn mix_address<A: Address>(mut hash: u32, address: &A) -> u32 {
    let mut index = 0;
    while index < A::WORDS {
        // In network order, so that machines of either byte order agree.
        hash = mix(hash, u32::from_be(address.word(index)));
        index += 1;
    }
    hash
}

/// Hash of a flow's five-tuple, the same on every node.
#[inline(always)]
pub fn flow_hash<A: Address>(key: &FlowKey<A>) -> u32 {
    let hash = mix_address(mix_address(FLOW_SEED, &key.source), &key.destination);
    let ports = u32::from(key.source_port.to_host()) << 16 | u32::from(key.destination_port.to_host());
    finish(mix(mix(hash, ports), u32::from(key.protocol)))
}

/// Hash of a client's address, the same on every node and for all its flows.
#[inline(always)]
pub fn client_hash<A: Address>(client: &A) -> u32 {
    finish(mix_address(FLOW_SEED, client))
}

/// Hash number `seed` of an endpoint, the same on every node.
pub fn endpoint_hash<A: Address>(address: &A, port: Be16, seed: u32) -> u32 {
    finish(mix(mix_address(finish(seed), address), u32::from(port.to_host())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{V4, V6};

    fn key(source_port: u16) -> FlowKey<V4> {
        FlowKey {
            source: V4::from_octets([10, 0, 0, 1]),
            destination: V4::from_octets([10, 96, 0, 1]),
            source_port: Be16::from_host(source_port),
            destination_port: Be16::from_host(80),
            protocol: 6,
            padding: [0; 3],
        }
    }

    /// A change of these numbers moves the flows of every cluster that is upgraded node by node.
    #[test]
    fn hashes_stay_what_they_were() {
        assert_eq!(flow_hash(&key(1024)), FLOW);
        assert_eq!(client_hash(&V4::from_octets([10, 0, 0, 1])), CLIENT);
        assert_eq!(endpoint_hash(&V6::from_octets([0xfd; 16]), Be16::from_host(53), 1), ENDPOINT);
    }

    const FLOW: u32 = 2_487_299_400;
    const CLIENT: u32 = 2_222_713_619;
    const ENDPOINT: u32 = 1_808_613_862;

    #[test]
    fn every_part_of_the_tuple_counts() {
        let base = key(1024);
        let others = [
            FlowKey { source: V4::from_octets([10, 0, 0, 2]), ..base },
            FlowKey { destination: V4::from_octets([10, 96, 0, 2]), ..base },
            key(1025),
            FlowKey { destination_port: Be16::from_host(81), ..base },
            FlowKey { protocol: 17, ..base },
        ];
        for other in others {
            assert_ne!(flow_hash(&other), flow_hash(&base), "{other:?}");
        }
    }

    /// Neighbouring source ports are what a client's connections differ in: each of 64 parts gets its share within a tenth.
    #[test]
    fn neighbouring_ports_spread_evenly() {
        let mut parts = [0_u32; 64];
        for port in 0..=u16::MAX {
            parts[crate::select::pick(flow_hash(&key(port)), 64) as usize] += 1;
        }
        for (part, count) in parts.iter().enumerate() {
            assert!((922..=1126).contains(count), "part {part}: {count}");
        }
    }
}
