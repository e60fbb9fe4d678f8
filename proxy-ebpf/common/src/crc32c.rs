//! CRC32c, SCTP's checksum (RFC 9260, appendix A), after a change of the ports: without reading the packet again.
//!
//! A CRC is linear: what a changed word adds to it depends on the change and on how many bytes follow, not on the bytes. That
//! takes a thousand instructions whatever the packet's length, and a packet that was corrupt stays so.

/// The polynomial of Castagnoli, bits reversed as the algorithm uses it.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Bits of a packet's length.
const LENGTH_BITS: usize = 16;
/// Groups of four bits in a checksum.
const NIBBLES: usize = 8;

/// What four bits become, by their value, for each group of the checksum.
type Step = [[u32; 16]; NIBBLES];

/// Appending `2^k` zero bytes is a linear map of the checksum; entry `k` is that map. Tables, and no loop over bits: the verifier
/// of BPF walks every instruction on every way that leads here.
static STEPS: [Step; LENGTH_BITS] = steps();

#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler, which refuses a wrong index")]
const fn steps() -> [Step; LENGTH_BITS] {
    let mut steps = [[[0; 16]; NIBBLES]; LENGTH_BITS];
    // The highest bit is the lowest power: this is x^8, one byte.
    let mut power = 1 << (31 - 8);
    let mut step = 0;
    while step < LENGTH_BITS {
        let mut entry = 0;
        while entry < NIBBLES * 16 {
            let (nibble, value) = (entry / 16, entry % 16);
            steps[step][nibble][value] = multiply((value as u32) << (4 * nibble), power);
            entry += 1;
        }
        power = multiply(power, power);
        step += 1;
    }
    steps
}

/// The product of two polynomials modulo the polynomial.
const fn multiply(a: u32, b: u32) -> u32 {
    let (mut shifted, mut product, mut bit) = (b, 0, 32);
    while bit > 0 {
        bit -= 1;
        if a >> bit & 1 != 0 {
            product ^= shifted;
        }
        shifted = if shifted & 1 != 0 { shifted >> 1 ^ POLYNOMIAL } else { shifted >> 1 };
    }
    product
}

/// What the checksum field of an SCTP packet must be XORed with when its first word, the ports, changes by `difference`
/// (old XOR new). Both words are as they are in the packet, read as little-endian numbers. `length` is that of the packet from
/// the SCTP header on, at most 65535.
#[inline(never)]
pub fn first_word_difference(difference: u32, length: u32) -> u32 {
    let mut state = difference;
    for (bit, step) in STEPS.iter().enumerate() {
        // Without a branch, of which every one would double the verifier's ways.
        let taken = (length >> bit & 1).wrapping_neg();
        state ^= (advance(step, state) ^ state) & taken;
    }
    state
}

#[inline(always)]
fn advance(step: &Step, state: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = step;
    nibble(a, state)
        ^ nibble(b, state >> 4)
        ^ nibble(c, state >> 8)
        ^ nibble(d, state >> 12)
        ^ nibble(e, state >> 16)
        ^ nibble(f, state >> 20)
        ^ nibble(g, state >> 24)
        ^ nibble(h, state >> 28)
}

#[inline(always)]
fn nibble(table: &[u32; 16], state: u32) -> u32 {
    table.get((state & 15) as usize).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRC32c by its definition, bit by bit.
    fn full(bytes: &[u8]) -> u32 {
        let mut crc = !0_u32;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 != 0 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            }
        }
        !crc
    }

    #[test]
    fn the_definition_gives_the_known_value() {
        // The check value of CRC-32/ISCSI in the catalogue of parametrised CRC algorithms.
        assert_eq!(full(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_changed_first_word_gives_what_the_whole_packet_would() {
        let mut packet = [0_u8; 9000];
        let mut seed = 1_u32;
        for byte in &mut packet {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (seed >> 24) as u8;
        }
        for length in [12, 13, 16, 32, 1000, 1452, 1500, 4096, 8999, 9000] {
            let before = full(&packet[..length]);
            let old = u32::from_le_bytes(packet[..4].try_into().unwrap());
            for new in [0, old, !old, 0x1234_5678, 0x5000_901f] {
                let mut changed = packet;
                changed[..4].copy_from_slice(&new.to_le_bytes());
                let difference = first_word_difference(old ^ new, length as u32);
                assert_eq!(before ^ difference, full(&changed[..length]), "{length} bytes");
            }
        }
    }
}
