//! Floating-point formats of checkpoints, decoded to f32 exactly.

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;

/// Elements that one task decodes.
const CHUNK: usize = 1 << 15;

/// Returns whether elements of this type are weights that can be decoded to f32 without rounding.
pub(crate) fn is_weight_type(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F8_E4M3)
}

/// Decodes little-endian elements of one of the [weight types](is_weight_type).
///
/// # Panics
/// For another type, or if the lengths differ.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    let width = dtype.bitsize() / 8;
    assert_eq!(bytes.len(), values.len() * width, "bytes of {} values", values.len());
    let one: fn(&[u8]) -> f32 = match dtype {
        Dtype::F32 => |bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        Dtype::F16 => |bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        Dtype::BF16 => |bytes| bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        Dtype::F8_E4M3 => |bytes| F8_E4M3[bytes[0] as usize],
        other => panic!("{other:?} is no type of weights"),
    };
    values.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * width)).for_each(|(values, bytes)| {
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(width)) {
            *value = one(bytes);
        }
    });
}

/// The values of the 256 codes of e4m3 without infinities ("fn" in OCP's specification of 8-bit floating point).
static F8_E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = f8_e4m3(code as u8);
        code += 1;
    }
    values
};

/// One sign bit, four bits of exponent with the bias 7, three bits of mantissa. S.1111.111 is NaN.
const fn f8_e4m3(code: u8) -> f32 {
    let sign = ((code & 0x80) as u32) << 24;
    let (exponent, mantissa) = ((code >> 3 & 15) as u32, (code & 7) as u32);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN.to_bits(),
        // Subnormal: mantissa · 2⁻⁹.
        (0, _) => (mantissa as f32 / 512.0).to_bits(),
        _ => (exponent + 120) << 23 | mantissa << 20,
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_the_values_of_its_specification() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7E, 448.0),
            (0xB8, -1.0),
            (0xFE, -448.0),
        ] {
            assert_eq!(f8_e4m3(code), value, "{code:#x}");
        }
        assert!(f8_e4m3(0x7F).is_nan() && f8_e4m3(0xFF).is_nan());
        assert!(f8_e4m3(0x80).is_sign_negative());
        // Positive codes ascend, and so do the magnitudes of negative ones.
        for code in 1..0x7Fu8 {
            assert!(f8_e4m3(code) > f8_e4m3(code - 1));
            assert_eq!(f8_e4m3(code | 0x80), -f8_e4m3(code));
        }
    }

    #[test]
    fn every_type_is_decoded_exactly_across_tasks() {
        let numbers: Vec<f32> = (0..CHUNK + 3).map(|i| (i % 17) as f32 * 0.25 - 2.0).collect();
        let encode = |one: &dyn Fn(f32) -> Vec<u8>| numbers.iter().flat_map(|&x| one(x)).collect::<Vec<u8>>();
        for (dtype, bytes) in [
            (Dtype::F32, encode(&|x| x.to_le_bytes().to_vec())),
            (Dtype::F16, encode(&|x| f16::from_f32(x).to_le_bytes().to_vec())),
            (Dtype::BF16, encode(&|x| bf16::from_f32(x).to_le_bytes().to_vec())),
            (Dtype::F8_E4M3, encode(&|x| vec![F8_E4M3.iter().position(|&y| y == x).unwrap() as u8])),
        ] {
            let mut values = vec![f32::NAN; numbers.len()];
            decode(dtype, &bytes, &mut values);
            assert_eq!(values, numbers, "{dtype:?}");
        }
    }
}
