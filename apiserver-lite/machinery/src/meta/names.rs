//! Generated names: a base and five characters from an alphabet without vowels, so that no words appear.

/// The characters of a suffix (apimachinery `util/rand`): no vowels, no characters that look alike.
pub const NAME_SUFFIX_ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// Characters of a suffix.
pub const NAME_SUFFIX_LENGTH: usize = 5;

/// Bytes of a whole generated name; a longer base is cut.
pub const GENERATED_NAME_BYTES_MAX: usize = 63;

/// A suffix of [`NAME_SUFFIX_LENGTH`] characters; `random` gives one fresh 32-bit value per call.
pub fn name_suffix(mut random: impl FnMut() -> u32) -> String {
    let alphabet_length = NAME_SUFFIX_ALPHABET.len();
    let pick = |value: u32| {
        // Multiply-shift maps a uniform value onto the alphabet; the product fits, the alphabet is tiny.
        let index = (u64::from(value) * alphabet_length as u64) >> 32;
        usize::try_from(index).ok().and_then(|index| NAME_SUFFIX_ALPHABET.get(index).copied())
    };
    (0..NAME_SUFFIX_LENGTH).filter_map(|_| pick(random())).map(char::from).collect()
}

/// `base` (cut to leave room) plus a suffix. Existing names are not known here: the caller retries on a clash.
pub fn generate_name(base: &str, random: impl FnMut() -> u32) -> String {
    let mut end = base.len().min(GENERATED_NAME_BYTES_MAX - NAME_SUFFIX_LENGTH);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{}", base.get(..end).unwrap_or_default(), name_suffix(random))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffix_covers_the_alphabet_and_nothing_else() {
        assert_eq!(name_suffix(|| 0), "bbbbb");
        assert_eq!(name_suffix(|| u32::MAX), "99999");
        let mut state = 1u32;
        let text = name_suffix(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        });
        assert_eq!(text.len(), 5);
        assert!(text.bytes().all(|byte| NAME_SUFFIX_ALPHABET.contains(&byte)));
    }

    #[test]
    fn long_bases_are_cut() {
        assert_eq!(generate_name("web-", || 0), "web-bbbbb");
        assert_eq!(generate_name(&"x".repeat(80), || 0).len(), GENERATED_NAME_BYTES_MAX);
        assert_eq!(generate_name(&"é".repeat(40), || 0).len(), GENERATED_NAME_BYTES_MAX);
    }
}
