//! A thread's A fragment, from packed codes in shared memory to wgmma operands in registers.
//!
//! `liquidgemm_format::dequant` has the arithmetic and `liquidgemm_format::brick` the layout;
//! the host uses both too.
//! This file supplies the two instructions and selects the word that feeds each operand register.

use liquidgemm_format::brick::CODE_BYTES;
use liquidgemm_format::dequant::dequantize_word;
use liquidgemm_format::stream::WeightStream;
use liquidgemm_format::tile::STRIP_K_TILE_CODE_BYTES;

use crate::ptx::integer::{multiply_add_flip, permute_bytes};
use crate::ptx::memory::{load_shared, load_shared_x4};

/// A way to turn 4-bit codes into int8 weights.
pub trait Dequantization {
    /// Returns four int8 weights of one channel from four codes, each in a byte of its own.
    ///
    /// `scale` is the first byte of the channel's pair in the low byte of the word.
    /// `second` is the pair's second byte in all four bytes.
    fn four_weights(codes: u32, scale: u32, second: u32) -> u32;
}

/// LiquidQuant's dequantization, `(q · s + a) XOR 0x80`.
#[derive(Clone, Copy)]
pub struct LiquidQuant;

impl Dequantization for LiquidQuant {
    #[inline(always)]
    fn four_weights(codes: u32, scale: u32, second: u32) -> u32 {
        multiply_add_flip(codes, scale, second)
    }
}

/// An A fragment, a thread's part of a brick: 32 codes of two channels, and the channels' pairs.
#[derive(Clone, Copy)]
pub struct AFragment {
    words: [u32; 4],
    pairs: u32,
}

/// Offsets of a thread's A fragment in a strip's K-tile, or its addresses in the K-tile of stage 0.
#[derive(Clone, Copy)]
pub struct FragmentAddress {
    codes: u32,
    pairs: u32,
}

impl FragmentAddress {
    /// Returns the offsets in a K-tile's first brick for thread `thread` of a warpgroup.
    #[inline(always)]
    pub fn of_thread(thread: u32) -> Self {
        let (warp, group) = (thread / 32, thread % 32 / 4);
        Self { codes: thread * 16, pairs: STRIP_K_TILE_CODE_BYTES + (warp * 8 + group) * 4 }
    }

    /// Returns the place `bytes` further on.
    #[inline(always)]
    pub fn moved(self, bytes: u32) -> Self {
        Self { codes: self.codes + bytes, pairs: self.pairs + bytes }
    }

    /// Returns the place in the K-tile's first brick (`brick` 0) or second (1), from the place in the first.
    #[inline(always)]
    pub fn in_brick(self, brick: u32, stream: WeightStream) -> Self {
        Self {
            codes: self.codes + brick * CODE_BYTES as u32,
            pairs: self.pairs + brick * stream.second_pairs,
        }
    }
}

impl AFragment {
    /// Loads the A fragment at `place` in the K-tile at `k_tile` in shared memory.
    ///
    /// # Safety
    /// A strip's codes and pairs lie at `k_tile`, 16-byte aligned.
    #[inline(always)]
    pub unsafe fn load(k_tile: u32, place: FragmentAddress) -> Self {
        // SAFETY: the place lies inside the K-tile.
        unsafe { Self::load_from(k_tile + place.codes, k_tile + place.pairs) }
    }

    /// Loads the A fragment of the K-tile's second brick.
    ///
    /// # Safety
    /// As for [`load`](Self::load); `place` is the place in the first brick,
    /// and `stream` is the layout of the weights.
    #[inline(always)]
    pub unsafe fn load_second(k_tile: u32, place: FragmentAddress, stream: WeightStream) -> Self {
        // SAFETY: as the caller guarantees for `load`; the second brick lies in the same K-tile.
        unsafe { Self::load(k_tile, place.in_brick(1, stream)) }
    }

    /// Loads an A fragment from the shared-memory addresses of its codes and of its channels' pairs.
    ///
    /// # Safety
    /// 16 bytes of codes, 16-byte aligned, and 4 bytes of pairs, 4-byte aligned, lie there.
    #[inline(always)]
    pub unsafe fn load_from(codes: u32, pairs: u32) -> Self {
        // SAFETY: the caller guarantees that the addresses are valid.
        unsafe { Self { words: load_shared_x4(codes), pairs: load_shared(pairs) } }
    }

    /// Returns the A operand for MMA number `MMA` (0 or 1) of the brick's two k32 MMAs.
    #[inline(always)]
    pub fn operand<D: Dequantization, const MMA: usize>(self) -> [u32; 4] {
        self.operand_by::<MMA>(D::four_weights)
    }

    /// As [`operand`](Self::operand), with a function in place of a [`Dequantization`].
    #[inline(always)]
    pub fn operand_by<const MMA: usize>(
        self,
        four_weights: impl Fn(u32, u32, u32) -> u32 + Copy,
    ) -> [u32; 4] {
        // Bytes of `pairs`: s and a of channel g, then s and a of channel g + 8.
        // Selector digit 4 is a zero byte.
        let (upper_s, upper_a) = (permute_bytes::<0x4440>(self.pairs), permute_bytes::<0x1111>(self.pairs));
        let (lower_s, lower_a) = (permute_bytes::<0x4442>(self.pairs), permute_bytes::<0x3333>(self.pairs));
        let [upper_low, upper_high] = dequantize_word(self.words[2 * MMA], upper_s, upper_a, four_weights);
        let [lower_low, lower_high] =
            dequantize_word(self.words[2 * MMA + 1], lower_s, lower_a, four_weights);
        [upper_low, lower_low, upper_high, lower_high]
    }
}
