//! The input's element types, and vectors of them.

use liquidgemm_format::activations::VECTOR;

use crate::ptx::float::unpack_f16;
use crate::ptx::integer::{pack_bf16, pack_f16};
use crate::ptx::memory::{
    load_constant_x4_if, load_global_u16, load_once_x4_if, store_global_u16, store_global_x4,
};

/// A 16-bit floating-point type.
pub trait Element {
    /// Returns the two elements of a word, that of the lower half first.
    fn unpack(word: u32) -> [f32; 2];

    /// Returns two values, rounded, as the word of which they are the lower and the upper half.
    fn pack(low: f32, high: f32) -> u32;
}

/// bfloat16.
pub struct Bf16;

/// IEEE half precision.
pub struct F16;

impl Element for Bf16 {
    #[inline(always)]
    fn unpack(word: u32) -> [f32; 2] {
        [f32::from_bits(word << 16), f32::from_bits(word & 0xFFFF_0000)]
    }

    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        pack_bf16(low, high)
    }
}

impl Element for F16 {
    #[inline(always)]
    fn unpack(word: u32) -> [f32; 2] {
        unpack_f16(word)
    }

    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        pack_f16(low, high)
    }
}

/// Returns `of` each index of a vector.
#[inline(always)]
pub fn each(mut of: impl FnMut(usize) -> f32) -> [f32; VECTOR] {
    const { assert!(VECTOR == 8) };
    [of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)]
}

/// The place of a vector in a row: the index of its first element, and how many of its elements exist.
#[derive(Clone, Copy)]
pub struct Vector {
    /// The index of the first element.
    pub first: u32,
    /// The number of elements before the row's end, at most [`VECTOR`].
    pub length: u32,
}

impl Vector {
    /// Returns the vector with this index in a row of `k` elements. It may lie behind the row's end.
    #[inline(always)]
    pub fn new(index: u32, k: u32) -> Self {
        let first = index * VECTOR as u32;
        Self { first, length: k.saturating_sub(first).min(VECTOR as u32) }
    }

    /// Returns whether all elements exist.
    #[inline(always)]
    pub fn is_whole(self) -> bool {
        self.length == VECTOR as u32
    }

    /// Loads the elements from the row at `row`, zeros where none exist.
    ///
    /// # Safety
    /// As many elements as the vector needs are valid in the row.
    /// `row` is 2-byte aligned; if `aligned` is set, 16-byte aligned.
    #[inline(always)]
    pub unsafe fn load(self, row: u64, aligned: bool) -> [u32; 4] {
        let address = row + self.first as u64 * 2;
        let fast = aligned & self.is_whole();
        // SAFETY: the caller guarantees the elements and the alignment.
        unsafe {
            let mut words = load_once_x4_if(fast, address);
            if !fast && self.length > 0 {
                words = load_elements(address, self.length);
            }
            words
        }
    }

    /// Loads the elements of a parameter that no launch writes, zeros where none exist.
    ///
    /// # Safety
    /// As for [`load`](Self::load).
    #[inline(always)]
    pub unsafe fn load_constant(self, row: u64, aligned: bool) -> [u32; 4] {
        let address = row + self.first as u64 * 2;
        let fast = aligned & self.is_whole();
        // SAFETY: the caller guarantees the elements and the alignment.
        unsafe {
            let mut words = load_constant_x4_if(fast, address);
            if !fast && self.length > 0 {
                words = load_elements(address, self.length);
            }
            words
        }
    }

    /// Stores the elements to the row at `row`.
    ///
    /// # Safety
    /// As for [`load`](Self::load).
    #[inline(always)]
    pub unsafe fn store(self, row: u64, aligned: bool, words: [u32; 4]) {
        let address = row + self.first as u64 * 2;
        // SAFETY: the caller guarantees the elements and the alignment.
        unsafe {
            if aligned & self.is_whole() {
                store_global_x4(address, words);
            } else if self.length > 0 {
                seq_macro::seq!(I in 0..8 {
                    if I < self.length {
                        store_global_u16(address + I * 2, words[I / 2] >> (I % 2 * 16));
                    }
                });
            }
        }
    }
}

/// Loads up to [`VECTOR`] elements one by one.
///
/// # Safety
/// `length` elements are valid at `address`, which is 2-byte aligned.
#[inline(always)]
unsafe fn load_elements(address: u64, length: u32) -> [u32; 4] {
    let mut words = [0; 4];
    seq_macro::seq!(I in 0..8 {
        if I < length {
            // SAFETY: the caller guarantees the element.
            words[I / 2] |= unsafe { load_global_u16(address + I * 2) } << (I % 2 * 16);
        }
    });
    words
}

/// Returns the elements of a vector's words.
#[inline(always)]
pub fn unpack<T: Element>(words: [u32; 4]) -> [f32; VECTOR] {
    let [[a, b], [c, d], [e, f], [g, h]] = words.map(T::unpack);
    [a, b, c, d, e, f, g, h]
}

/// Returns the words of a vector of rounded elements.
#[inline(always)]
pub fn pack<T: Element>(values: [f32; VECTOR]) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h] = values;
    [T::pack(a, b), T::pack(c, d), T::pack(e, f), T::pack(g, h)]
}
