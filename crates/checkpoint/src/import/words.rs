//! Four-bit codes in 32-bit words, as the formats of this folder store them.

use rayon::prelude::*;

/// Codes in a word.
pub(super) const CODES: usize = 8;

/// Returns code `position` of a word. Code 0 is in the lowest four bits.
pub(super) fn code(word: u32, position: usize) -> u8 {
    (word >> (4 * position) & 15) as u8
}

/// Reads little-endian words.
pub(super) fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect()
}

/// Makes a row-major `[rows, columns]` matrix of `element(row, column)`, in parallel.
pub(super) fn matrix<T: Copy + Default + Send>(
    rows: usize,
    columns: usize,
    element: impl Fn(usize, usize) -> T + Sync,
) -> Vec<T> {
    let mut values = vec![T::default(); rows * columns];
    values.par_chunks_mut(columns).enumerate().for_each(|(row, values)| {
        values.iter_mut().enumerate().for_each(|(column, value)| *value = element(row, column));
    });
    values
}
