//! Dequantization of 4-bit codes to int8 weights: `(q · s + a) XOR 0x80`.
//! Two 32-bit operations dequantize four codes.
//!
//! The CPU backend and the kernels (`kernels-gpu/src/dequant.rs`) share this arithmetic.
//! They execute the multiply-add and the XOR differently, so [`dequantize_word`] takes those as a function.
//! The format's invariant, [`is_valid_pair`], ensures that no byte carries into its neighbour.

/// Returns whether the format allows the pair `(s, a)`: `s ≥ 1` and `15 · s + a ≤ 255`.
/// No code can then overflow its byte.
pub const fn is_valid_pair(s: u8, a: u8) -> bool {
    s >= 1 && 15 * s as u32 + a as u32 <= 255
}

/// Returns the int8 weight of code `q` (0 … 15) with its group's pair `(s, a)`.
///
/// The result is exact for every valid pair. For other pairs the byte wraps.
#[inline(always)]
pub const fn dequantize(q: u8, s: u8, a: u8) -> i8 {
    (q.wrapping_mul(s).wrapping_add(a) ^ 0x80) as i8
}

/// Returns the offset `a` in each of a word's four bytes.
#[inline(always)]
pub const fn broadcast(a: u8) -> u32 {
    a as u32 * 0x0101_0101
}

/// Returns the eight int8 weights of one packed word: `[low nibbles, high nibbles]`, four weights per result.
///
/// `s` is the group's scale, `a4` is its offset in all four bytes (see [`broadcast`]).
/// `multiply_add_flip(nibbles, s, a4)` must compute `(nibbles · s + a4) XOR 0x80808080`.
/// The host passes the function [`multiply_add_flip`].
/// The device passes one integer multiply-add and one XOR in inline assembly.
#[inline(always)]
pub fn dequantize_word(
    word: u32,
    s: u32,
    a4: u32,
    multiply_add_flip: impl Fn(u32, u32, u32) -> u32,
) -> [u32; 2] {
    let low = word & 0x0F0F_0F0F;
    let high = (word >> 4) & 0x0F0F_0F0F;
    [multiply_add_flip(low, s, a4), multiply_add_flip(high, s, a4)]
}

/// Computes `(nibbles · s + a4) XOR 0x80808080` in plain Rust.
#[inline(always)]
pub const fn multiply_add_flip(nibbles: u32, s: u32, a4: u32) -> u32 {
    nibbles.wrapping_mul(s).wrapping_add(a4) ^ 0x8080_8080
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every pair that the invariant allows.
    fn valid_pairs() -> impl Iterator<Item = (u8, u8)> {
        (0..=255u8).flat_map(|s| (0..=255u8).map(move |a| (s, a))).filter(|&(s, a)| is_valid_pair(s, a))
    }

    #[test]
    fn the_invariant_admits_exactly_the_pairs_whose_largest_code_fits_a_byte() {
        for s in 0..=255u32 {
            for a in 0..=255u32 {
                let fits = (0..16).all(|q| q * s + a < 256);
                assert_eq!(is_valid_pair(s as u8, a as u8), fits && s != 0, "s = {s}, a = {a}");
            }
        }
    }

    #[test]
    fn dequantization_is_exact_for_every_valid_code_and_pair() {
        for (s, a) in valid_pairs() {
            for q in 0..16u8 {
                let exact = q as i32 * s as i32 + a as i32 - 128;
                assert_eq!(dequantize(q, s, a) as i32, exact, "q = {q}, s = {s}, a = {a}");
            }
        }
    }

    #[test]
    fn the_packed_form_equals_the_scalar_form_and_no_byte_carries() {
        for (s, a) in valid_pairs() {
            // Neighbouring codes at both extremes would show a carry in either direction.
            for q in 0..16u32 {
                for neighbour in [0u32, 15] {
                    for place in 0..8 {
                        let fill = neighbour * 0x1111_1111;
                        let word = fill & !(15 << (4 * place)) | q << (4 * place);
                        let packed = dequantize_word(word, s as u32, broadcast(a), multiply_add_flip);
                        for (half, result) in packed.into_iter().enumerate() {
                            for (byte, value) in result.to_le_bytes().into_iter().enumerate() {
                                let code = (word >> (8 * byte + 4 * half)) & 15;
                                assert_eq!(value as i8, dequantize(code as u8, s, a));
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_packed_multiply_add_never_leaves_32_bits() {
        for (s, a) in valid_pairs() {
            let widest = 0x0F0F_0F0Fu64 * s as u64 + broadcast(a) as u64;
            assert!(widest <= u32::MAX as u64, "s = {s}, a = {a}");
        }
    }

    proptest! {
        #[test]
        fn random_words_dequantize_like_their_codes_one_by_one(word: u32, s in 1u8..=17, a_seed: u8) {
            let a = (a_seed as u32 % (256 - 15 * s as u32)) as u8;
            prop_assert!(is_valid_pair(s, a));
            let packed = dequantize_word(word, s as u32, broadcast(a), multiply_add_flip);
            for (half, result) in packed.into_iter().enumerate() {
                for (byte, value) in result.to_le_bytes().into_iter().enumerate() {
                    let code = (word >> (8 * byte + 4 * half)) & 15;
                    prop_assert_eq!(value as i8, dequantize(code as u8, s, a));
                }
            }
        }
    }
}
