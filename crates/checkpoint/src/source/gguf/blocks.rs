//! The block formats of GGML, dequantized to f32 with ggml's own formulas (`ggml-quants.c`).
//!
//! Blocks of 32 elements have a scale d, and some an offset m. Blocks of 256 (`_K`) have six-bit or eight-bit scales for
//! parts of the block besides.

use half::{bf16, f16};
use rayon::prelude::*;

/// Blocks that one task dequantizes.
const BLOCKS_PER_TASK: usize = 256;

/// Makes the enum of block types from one list: GGML's number, elements and bytes of a block.
macro_rules! block_types {
    ($($name:ident = $id:literal, $elements:literal elements, $bytes:literal bytes;)*) => {
        /// A type of GGML that can be read.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum BlockType { $($name,)* }

        impl BlockType {
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)*];

            /// Returns the type with this number in GGUF files.
            pub(crate) fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$name),)* _ => None }
            }

            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Returns the elements of a block.
            pub(crate) fn elements(self) -> usize {
                match self { $(Self::$name => $elements,)* }
            }

            /// Returns the bytes of a block.
            pub(crate) fn bytes(self) -> usize {
                match self { $(Self::$name => $bytes,)* }
            }
        }
    };
}

block_types! {
    F32 = 0, 1 elements, 4 bytes;
    F16 = 1, 1 elements, 2 bytes;
    Q4_0 = 2, 32 elements, 18 bytes;
    Q4_1 = 3, 32 elements, 20 bytes;
    Q5_0 = 6, 32 elements, 22 bytes;
    Q5_1 = 7, 32 elements, 24 bytes;
    Q8_0 = 8, 32 elements, 34 bytes;
    Q4_K = 12, 256 elements, 144 bytes;
    Q5_K = 13, 256 elements, 176 bytes;
    Q6_K = 14, 256 elements, 210 bytes;
    BF16 = 30, 1 elements, 2 bytes;
}

/// Dequantizes whole blocks.
///
/// # Panics
/// If `bytes` and `values` are not the same number of blocks.
pub(crate) fn dequantize(block: BlockType, bytes: &[u8], values: &mut [f32]) {
    let (elements, size) = (block.elements(), block.bytes());
    assert!(values.len().is_multiple_of(elements), "{} values of {}", values.len(), block.name());
    assert_eq!(bytes.len(), values.len() / elements * size, "bytes of {} values", values.len());
    let one: fn(&[u8], &mut [f32]) = match block {
        BlockType::F32 => |b, v| v[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        BlockType::F16 => |b, v| v[0] = f16_at(b, 0),
        BlockType::BF16 => |b, v| v[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        BlockType::Q4_0 => |b, v| nibbles(&b[2..], v, |q, _| (q as i32 - 8) as f32 * f16_at(b, 0)),
        BlockType::Q4_1 => |b, v| nibbles(&b[4..], v, |q, _| q as f32 * f16_at(b, 0) + f16_at(b, 2)),
        BlockType::Q5_0 => {
            |b, v| nibbles(&b[6..], v, |q, i| (fifth(b, 2, q, i) as i32 - 16) as f32 * f16_at(b, 0))
        }
        BlockType::Q5_1 => {
            |b, v| nibbles(&b[8..], v, |q, i| fifth(b, 4, q, i) as f32 * f16_at(b, 0) + f16_at(b, 2))
        }
        BlockType::Q8_0 => |b, v| {
            let d = f16_at(b, 0);
            for (value, &q) in v.iter_mut().zip(&b[2..]) {
                *value = q as i8 as f32 * d;
            }
        },
        BlockType::Q4_K => |b, v| k_nibbles(b, None, &b[16..], v),
        BlockType::Q5_K => |b, v| k_nibbles(b, Some(&b[16..48]), &b[48..], v),
        BlockType::Q6_K => q6_k,
    };
    let values = values.par_chunks_mut(BLOCKS_PER_TASK * elements);
    values.zip(bytes.par_chunks(BLOCKS_PER_TASK * size)).for_each(|(values, bytes)| {
        for (values, bytes) in values.chunks_exact_mut(elements).zip(bytes.chunks_exact(size)) {
            one(bytes, values);
        }
    });
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Calls `value(code, element)` for the codes of 32 elements: low nibbles are the first 16, high nibbles the last.
fn nibbles(codes: &[u8], values: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    for (i, &byte) in codes[..16].iter().enumerate() {
        values[i] = value(byte & 15, i);
        values[i + 16] = value(byte >> 4, i + 16);
    }
}

/// Adds the fifth bit of a code, which lies in the 32-bit word at `at`.
fn fifth(bytes: &[u8], at: usize, code: u8, element: usize) -> u8 {
    code | (bytes[at + element / 8] >> (element % 8) & 1) << 4
}

/// The six-bit scale and offset of part `part` of 8, from the 12 bytes of Q4_K and Q5_K.
fn k_scale(scales: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        (scales[part] & 63, scales[part + 4] & 63)
    } else {
        let low = scales[part + 4];
        (low & 15 | scales[part - 4] >> 6 << 4, low >> 4 | scales[part] >> 6 << 4)
    }
}

/// Q4_K and Q5_K: d and dmin, 12 bytes of scales, perhaps 32 bytes of fifth bits, 128 bytes of codes.
fn k_nibbles(block: &[u8], fifth_bits: Option<&[u8]>, codes: &[u8], values: &mut [f32]) {
    let (d, min) = (f16_at(block, 0), f16_at(block, 2));
    for (part, values) in values.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = k_scale(&block[4..16], part);
        let (scale, offset) = (d * scale as f32, min * offset as f32);
        let codes = &codes[part / 2 * 32..][..32];
        for (i, value) in values.iter_mut().enumerate() {
            let nibble = if part % 2 == 0 { codes[i] & 15 } else { codes[i] >> 4 };
            let fifth = fifth_bits.map_or(0, |bits| (bits[i] >> part & 1) << 4);
            *value = scale * (nibble | fifth) as f32 - offset;
        }
    }
}

/// Q6_K: 128 bytes of low bits, 64 of high ones, 16 scales, d.
fn q6_k(block: &[u8], values: &mut [f32]) {
    let d = f16_at(block, 208);
    for (half, values) in values.chunks_exact_mut(128).enumerate() {
        let low = &block[half * 64..][..64];
        let high = &block[128 + half * 32..][..32];
        let scales = &block[192 + half * 8..][..8];
        for (i, value) in values.iter_mut().enumerate() {
            let (quarter, lane) = (i / 32, i % 32);
            let byte = low[quarter % 2 * 32 + lane];
            let nibble = if quarter < 2 { byte & 15 } else { byte >> 4 };
            let code = nibble | (high[lane] >> (2 * quarter) & 3) << 4;
            *value = d * scales[i / 16] as i8 as f32 * (code as i32 - 32) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_with_a_scale_only_have_the_values_of_their_definition() {
        let d = f16::from_f32(0.5).to_le_bytes();
        let mut values = [0.0; 32];
        // The codes of element i and i + 16 share a byte.
        let codes: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        dequantize(BlockType::Q4_0, &[&d[..], &codes].concat(), &mut values);
        for (i, value) in values.iter().enumerate() {
            let code = if i < 16 { i as i32 } else { 31 - i as i32 };
            assert_eq!(*value, (code - 8) as f32 * 0.5, "{i}");
        }
        // Bit i of the word is the fifth bit of element i.
        let fifth = 0x0001_8001u32.to_le_bytes();
        dequantize(BlockType::Q5_0, &[&d[..], &fifth, &codes].concat(), &mut values);
        for (i, value) in values.iter().enumerate() {
            let code =
                if i < 16 { i as i32 } else { 31 - i as i32 } + if [0, 15, 16].contains(&i) { 16 } else { 0 };
            assert_eq!(*value, (code - 16) as f32 * 0.5, "{i}");
        }
        let bytes: Vec<u8> = (0..32u8).map(|i| i.wrapping_sub(16)).collect();
        dequantize(BlockType::Q8_0, &[&d[..], &bytes].concat(), &mut values);
        assert!(values.iter().enumerate().all(|(i, &value)| value == (i as f32 - 16.0) * 0.5));
    }

    #[test]
    fn every_type_agrees_with_ggmls_reference_on_the_recorded_block() {
        for case in REFERENCE {
            let block = BlockType::ALL.iter().find(|block| block.name() == case.0).unwrap();
            let bytes: Vec<u8> = (0..block.bytes()).map(|i| (i * 37 + 11) as u8).collect();
            let mut bytes = bytes;
            // Make the scales ordinary numbers.
            for &at in case.1 {
                bytes[at..at + 2].copy_from_slice(&f16::from_f32(0.0625 * (at + 1) as f32).to_le_bytes());
            }
            let mut values = vec![0.0; block.elements()];
            dequantize(*block, &bytes, &mut values);
            let sum: f64 = values.iter().map(|&value| value as f64).sum();
            let weighted: f64 =
                values.iter().enumerate().map(|(i, &value)| value as f64 * (i + 1) as f64).sum();
            assert_eq!((sum, weighted), (case.2, case.3), "{}", case.0);
        }
    }

    /// Type, places of f16 scales, sum of the values and sum of value · (index + 1).
    /// Computed by `gguf.quants.dequantize` of the PyPI package gguf 0.19.0 for byte i = 37 i + 11.
    type Reference = (&'static str, &'static [usize], f64, f64);
    const REFERENCE: &[Reference] = &[
        ("Q4_0", &[0], -1.3125, -32.375),
        ("Q4_1", &[0, 2], 21.3125, 347.9375),
        ("Q5_0", &[0], 0.9375, 7.0),
        ("Q5_1", &[0, 2], 37.5625, 592.8125),
        ("Q8_0", &[0], -11.0, -505.0),
        ("Q4_K", &[0, 2], 2082.5, 324642.5),
        ("Q5_K", &[0, 2], 5943.5, 853055.5),
        ("Q6_K", &[208], 60244.25, 10246486.25),
    ];
}
