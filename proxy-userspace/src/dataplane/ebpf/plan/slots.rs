//! What the slots of one list of endpoints hold: as many as an endpoint's weight, or a Maglev table.

use proxy_common::hash::endpoint_hash;
use proxy_common::{Address, Be16, FRONTEND_LEAST_CONNECTIONS, FRONTEND_MAGLEV, SLOT_ID_BITS};

use crate::model::Algorithm;

/// Slots that one weighted list may take. Lists that need more keep the proportions as well as they fit.
const WEIGHTED_SLOTS_MAX: usize = 65_536;

/// Sizes of Maglev tables: primes, so that every step through a table meets all its places. Few, because the flows of a Service move
/// when its table gets another size.
const TABLE_SIZES: [u32; 5] = [1021, 4093, 16_381, 65_521, TABLE_SIZE_MAX];
/// The largest of them: half a mebibyte.
const TABLE_SIZE_MAX: u32 = 131_071;

/// Places of a table for each part, as far as the largest goes: so one endpoint more among a hundred moves at most 1.5% of all flows, of
/// which 1% to itself.
const PLACES_PER_PART: u64 = 700;

/// Seeds of the two hashes that give an endpoint its way through a table.
const OFFSET_SEED: u32 = 1;
const STEP_SEED: u32 = 2;

/// One endpoint of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target<A> {
    /// Its backend id.
    pub(super) id: u32,
    /// Its address.
    pub(super) address: A,
    /// Its port.
    pub(super) port: Be16,
    /// Its weight, at least 1.
    pub(super) weight: u8,
}

/// The slots of `list`.
pub(super) fn slots<A: Address + Ord>(list: &[Target<A>], algorithm: Algorithm) -> Vec<u32> {
    match algorithm {
        Algorithm::Random => weighted(list, |target| target.id),
        Algorithm::LeastConnections => weighted(list, |target| target.id | u32::from(target.weight) << SLOT_ID_BITS),
        Algorithm::Maglev => table(list),
    }
}

/// Each target as often as its part, one behind the other.
fn weighted<A>(list: &[Target<A>], slot: impl Fn(&Target<A>) -> u32) -> Vec<u32> {
    let parts = parts(list);
    let total: u64 = parts.iter().map(|part| u64::from(*part)).sum();
    let room = WEIGHTED_SLOTS_MAX.max(list.len()) as u64;
    let fitting = |part: u32| if total <= room { u64::from(part) } else { (u64::from(part) * room / total).max(1) };
    let mut slots = Vec::new();
    for (target, part) in list.iter().zip(&parts) {
        slots.extend(std::iter::repeat_n(slot(target), fitting(*part) as usize));
    }
    slots
}

/// The weights divided by what all of them can be divided by.
fn parts<A>(list: &[Target<A>]) -> Vec<u32> {
    let divisor = list.iter().fold(0, |divisor, target| common_divisor(divisor, u32::from(target.weight)));
    list.iter().map(|target| u32::from(target.weight) / divisor.max(1)).collect()
}

fn common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

/// The size of the table for a list of so many parts.
fn table_size(parts: u64) -> u32 {
    let fits = |size: &&u32| u64::from(**size) >= parts.saturating_mul(PLACES_PER_PART);
    TABLE_SIZES.iter().find(fits).copied().unwrap_or(TABLE_SIZE_MAX)
}

/// A place in the table that an endpoint would like next.
struct Way {
    at: u32,
    step: u32,
    /// Turns that it has saved up, in parts.
    credit: u32,
}

/// Fills a table: the targets take turns, in the order of their addresses, and each takes the next free place on its own way through
/// the table, which follows from its address and port alone. So nodes that know the same endpoints have the same table, and a table
/// hardly changes when an endpoint comes or goes. A target of less than the greatest weight sits turns out.
fn table<A: Address + Ord>(list: &[Target<A>]) -> Vec<u32> {
    const FREE: u32 = u32::MAX;
    let mut list = list.to_vec();
    list.sort_unstable_by_key(|target| (target.address, target.port.to_host()));
    let parts = parts(&list);
    let Some(most) = parts.iter().copied().max() else { return Vec::new() };
    let size = table_size(parts.iter().map(|part| u64::from(*part)).sum());
    let way = |target: &Target<A>| Way {
        at: endpoint_hash(&target.address, target.port, OFFSET_SEED) % size,
        step: endpoint_hash(&target.address, target.port, STEP_SEED) % (size - 1) + 1,
        credit: 0,
    };
    let mut ways: Vec<Way> = list.iter().map(way).collect();
    let mut table = vec![FREE; size as usize];
    let mut left = size;
    while left > 0 {
        for ((target, part), way) in list.iter().zip(&parts).zip(&mut ways) {
            way.credit += part;
            if way.credit < most || left == 0 {
                continue;
            }
            way.credit -= most;
            if let Some(place) = next_free(&table, way, size, FREE).and_then(|at| table.get_mut(at as usize)) {
                *place = target.id;
                left -= 1;
            }
        }
    }
    table
}

/// The next free place on the way, which goes on behind it. There is one: a step shares no divisor with a prime size.
fn next_free(table: &[u32], way: &mut Way, size: u32, free: u32) -> Option<u32> {
    for _ in 0..size {
        let at = way.at;
        way.at = (at + way.step) % size;
        if table.get(at as usize) == Some(&free) {
            return Some(at);
        }
    }
    None
}

/// The `FRONTEND_*` bits of an algorithm.
pub(super) const fn algorithm_flags(algorithm: Algorithm) -> u32 {
    match algorithm {
        Algorithm::Random => 0,
        Algorithm::Maglev => FRONTEND_MAGLEV,
        Algorithm::LeastConnections => FRONTEND_LEAST_CONNECTIONS,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use proxy_common::select::pick;
    use proxy_common::{SLOT_ID_MASK, V4};

    use super::*;

    fn target(index: u32, weight: u8) -> Target<V4> {
        let [_, _, high, low] = index.to_be_bytes();
        Target { id: index, address: V4::from_octets([10, 244, high, low]), port: Be16::from_host(8080), weight }
    }

    fn targets(count: u32) -> Vec<Target<V4>> {
        (1..=count).map(|index| target(index, 1)).collect()
    }

    fn shares(slots: &[u32]) -> BTreeMap<u32, f64> {
        let mut shares = BTreeMap::new();
        for id in slots {
            *shares.entry(id & SLOT_ID_MASK).or_insert(0.0) += 1.0 / slots.len() as f64;
        }
        shares
    }

    /// Flows, by hash, that go elsewhere in `after` though the endpoint that is new or gone has no part in it.
    fn moved(before: &[u32], after: &[u32], different: u32) -> f64 {
        let flows = 200_000_u32;
        let at = |table: &[u32], flow: u32| table[pick(flow.wrapping_mul(0x9e37_79b1), table.len() as u32) as usize];
        let moves = (0..flows).filter(|flow| {
            let (old, new) = (at(before, *flow), at(after, *flow));
            old != new && old != different && new != different
        });
        moves.count() as f64 / f64::from(flows)
    }

    #[test]
    fn without_weights_each_has_one_slot() {
        assert_eq!(slots(&targets(3), Algorithm::Random), [1, 2, 3]);
        let equal: Vec<_> = (1..=3).map(|index| target(index, 50)).collect();
        assert_eq!(slots(&equal, Algorithm::Random), [1, 2, 3], "what is common to all does not count");
        assert!(slots::<V4>(&[], Algorithm::Random).is_empty());
        assert!(slots::<V4>(&[], Algorithm::Maglev).is_empty());
    }

    #[test]
    fn an_endpoint_has_slots_for_its_weight() {
        let list = [target(1, 4), target(2, 2), target(3, 6)];
        assert_eq!(slots(&list, Algorithm::Random), [1, 1, 2, 3, 3, 3]);
        let slots = slots(&list, Algorithm::LeastConnections);
        assert_eq!((slots.len(), slots[0] & SLOT_ID_MASK, slots[0] >> SLOT_ID_BITS), (6, 1, 4));
    }

    #[test]
    fn a_weighted_list_is_bounded_and_leaves_nobody_out() {
        let list: Vec<_> = (1..=2000).map(|index| target(index, if index % 2 == 0 { 100 } else { 99 })).collect();
        let slots = slots(&list, Algorithm::Random);
        assert!(slots.len() <= WEIGHTED_SLOTS_MAX, "{}", slots.len());
        let shares = shares(&slots);
        assert_eq!(shares.len(), 2000);
        assert!(shares.values().all(|share| (0.0004..0.0006).contains(share)));
    }

    #[test]
    fn tables_have_their_places_for_each_part_as_far_as_they_go() {
        let sizes = [1, 2, 5, 6, 23, 24, 93, 94, 100_000].map(table_size);
        assert_eq!(sizes, [1021, 4093, 4093, 16_381, 16_381, 65_521, 65_521, 131_071, 131_071]);
        for size in TABLE_SIZES {
            assert!((2..).take_while(|divisor| divisor * divisor <= size).all(|divisor| size % divisor != 0), "{size}");
        }
    }

    #[test]
    fn one_more_endpoint_of_a_hundred_moves_hardly_anything_else() {
        let before = slots(&targets(100), Algorithm::Maglev);
        let after = slots(&targets(101), Algorithm::Maglev);
        let part = moved(&before, &after, 101);
        let to_new = shares(&after)[&101];
        println!("{:.3}% of the flows moved, {:.3}% to the new one", (part + to_new) * 100.0, to_new * 100.0);
        assert!(part + to_new <= 0.015, "{part}");
        assert!((0.0094..0.0104).contains(&to_new), "{to_new}");
    }

    #[test]
    fn the_order_of_the_list_and_the_ids_make_no_difference() {
        let list = targets(20);
        let table = slots(&list, Algorithm::Maglev);
        let reversed: Vec<_> = list.iter().rev().map(|target| Target { id: target.id + 100, ..*target }).collect();
        let other: Vec<u32> = slots(&reversed, Algorithm::Maglev).iter().map(|id| id - 100).collect();
        assert_eq!(table, other);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever the endpoints: shares follow the weights, and the loss of one moves little beside its own flows.
        #[test]
        fn shares_follow_weights_and_flows_stay(
            weights in prop::collection::vec(1_u8..=5, 2..120),
            base in 0_u32..60_000,
            lost in any::<prop::sample::Index>(),
        ) {
            let list: Vec<_> = (0_u32..).zip(&weights).map(|(index, weight)| target(base + index, *weight)).collect();
            let before = slots(&list, Algorithm::Maglev);
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for (target, share) in list.iter().zip(shares(&before).values()) {
                let due = f64::from(target.weight) / total;
                prop_assert!((share / due - 1.0).abs() < 0.05, "weight {} of {total}: {share} for {due}", target.weight);
            }
            let lost = lost.index(list.len());
            let gone = list[lost].id;
            let left: Vec<_> = list.iter().filter(|target| target.id != gone).copied().collect();
            let after = slots(&left, Algorithm::Maglev);
            if after.len() == before.len() {
                let part = moved(&before, &after, gone);
                prop_assert!(part < 0.05, "{part}");
            }
        }
    }
}
