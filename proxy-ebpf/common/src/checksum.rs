//! Internet checksum arithmetic (RFC 1071, RFC 1624), in the byte order of memory on both sides.

use crate::address::Address;

/// Folds a sum of 16- or 32-bit words to 16 bits with end-around carry.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// What has to be added to a sum when `old` becomes `new`: `~old + new`, not folded.
#[inline(always)]
pub const fn word_difference(old: u32, new: u32) -> u64 {
    (!old) as u64 + new as u64
}

/// [`word_difference`] over all words of an address.
#[inline(always)]
pub fn address_difference<A: Address>(old: &A, new: &A) -> u64 {
    let mut sum = 0;
    let mut index = 0;
    while index < A::WORDS {
        sum += word_difference(old.word(index), new.word(index));
        index += 1;
    }
    sum
}

/// `difference` as the 32-bit value that `bpf_l4_csum_replace` takes with a size of 0.
#[inline(always)]
pub const fn as_csum_diff(difference: u64) -> u64 {
    let sum = (difference & 0xffff_ffff) + (difference >> 32);
    (sum & 0xffff_ffff) + (sum >> 32)
}

/// A header checksum after a change: RFC 1624 equation 3.
#[inline(always)]
pub const fn update(checksum: u16, difference: u64) -> u16 {
    !fold((!checksum) as u64 + difference)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::V4;

    /// Checksum of a header by the definition in RFC 1071.
    fn full(words: &[u16]) -> u16 {
        !fold(words.iter().map(|word| u64::from(*word)).sum())
    }

    #[test]
    fn incremental_equals_full() {
        let mut header = [0x4500, 0x003c, 0x1c46, 0x4000, 0x4006, 0, 0xac10, 0x0a63, 0xac10, 0x0a0c];
        let before = full(&header);
        let old = V4(u32::from(header[8]) | u32::from(header[9]) << 16);
        let new = V4(0x0100_000a);
        header[8] = new.0 as u16;
        header[9] = (new.0 >> 16) as u16;
        assert_eq!(update(before, address_difference(&old, &new)), full(&header));
    }

    #[test]
    fn incremental_equals_full_for_every_word() {
        for (old, new) in [(0, 0), (0, 0xffff_ffff), (0xffff_ffff, 0), (0x1234_5678, 0x8765_4321), (1, 2)] {
            let sum = |word: u32| full(&[0x1111, word as u16, (word >> 16) as u16]);
            let updated = update(sum(old), word_difference(old, new));
            // 0x0000 and 0xffff are the same number in one's complement.
            assert!(updated == sum(new) || (updated ^ sum(new)) == 0xffff, "{old:x} -> {new:x}");
        }
    }
}
