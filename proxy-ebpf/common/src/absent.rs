//! Which addresses nothing is known of, in a few bits: what asks for them need not be looked up.
//!
//! A set bit says that no frontend, no ClusterIP and no address of the node has a hash of this number, so a map of zeros, which is what a
//! new one is, says nothing and is always right. Who adds a frontend or an address takes the bit back first.

use crate::address::Address;

/// Bits of a family: with 100,000 addresses four of five others are still told apart.
pub const ABSENT_BITS: u32 = 1 << ABSENT_BITS_LOG;
/// Elements of the array that holds them.
pub const ABSENT_WORDS: u32 = ABSENT_BITS / u64::BITS;

const ABSENT_BITS_LOG: u32 = 19;
/// 2^64 divided by the golden ratio (Knuth's multiplicative hash): neighbours lie far from each other.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Element and bit of an address. Whoever chooses addresses that share one costs others a lookup and no more, so this is no secret.
#[inline(always)]
pub fn absent_place<A: Address>(address: &A) -> (u32, u32) {
    let mut hash = 0_u64;
    for index in 0..A::WORDS {
        hash = (hash ^ u64::from(address.word(index))).wrapping_mul(MULTIPLIER);
        hash ^= hash >> 32;
    }
    let place = (hash.wrapping_mul(MULTIPLIER) >> (u64::BITS - ABSENT_BITS_LOG)) as u32;
    (place / u64::BITS, place % u64::BITS)
}

/// Sets all bits of `words` but those of the addresses that are `present`. `words` has [`ABSENT_WORDS`] elements.
pub fn fill_absent<'a, A: Address + 'a>(present: impl Iterator<Item = &'a A>, words: &mut [u64]) {
    words.fill(u64::MAX);
    for (word, bit) in present.map(absent_place) {
        if let Some(word) = words.get_mut(word as usize) {
            *word &= !(1 << bit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{V4, V6};

    #[test]
    fn what_is_present_never_counts_as_absent_and_most_else_does() {
        let v4 = |number: u32| V4((0x0a60_0000 + number).to_be());
        let mut words = [0; ABSENT_WORDS as usize];
        let present: [V4; 10_000] = core::array::from_fn(|number| v4(number as u32));
        fill_absent(present.iter(), &mut words);
        let is_absent = |address: &V4| {
            let (word, bit) = absent_place(address);
            words[word as usize] >> bit & 1 != 0
        };
        assert!(!present.iter().any(is_absent));
        let others = (100_000..200_000).filter(|number| is_absent(&v4(*number))).count();
        assert!(others > 97_000, "{others} of 100000");
    }

    #[test]
    fn every_word_of_an_address_counts() {
        let places: [_; 4] = core::array::from_fn(|word| {
            let mut address = V6::default();
            address.0[word] = 1;
            absent_place(&address)
        });
        for (index, place) in places.iter().enumerate() {
            assert!(place.0 < ABSENT_WORDS && place.1 < u64::BITS);
            assert!(!places[..index].contains(place), "{places:?}");
        }
    }
}
