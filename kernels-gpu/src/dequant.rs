//! A consumer thread's share of a brick, and its way from packed codes to operands of the tensor cores.
//!
//! The arithmetic is `liquidgemm_format::dequant`'s; this file supplies its two instructions and knows which
//! word feeds which register.

use liquidgemm_format::brick::CODE_BYTES;
use liquidgemm_format::dequant::dequantize_word;
use liquidgemm_format::stream::WeightStream;
use liquidgemm_format::tile::STRIP_SPAN_CODE_BYTES;

use crate::ptx::integer::{multiply_add_flip, permute_bytes};
use crate::ptx::memory::{load_shared, load_shared_x4};

/// How codes become weights.
pub trait Dequantization {
    /// Four int8 weights from four codes, one a byte, of a channel: its scale, and the second byte of its pair in all
    /// four bytes.
    fn four_weights(codes: u32, scale: u32, second: u32) -> u32;
}

/// `(q · s + a) XOR 0x80`.
#[derive(Clone, Copy)]
pub struct LiquidQuant;

impl Dequantization for LiquidQuant {
    #[inline(always)]
    fn four_weights(codes: u32, scale: u32, second: u32) -> u32 {
        multiply_add_flip(codes, scale, second)
    }
}

/// 32 codes of two channels in a brick, and the channels' pairs.
#[derive(Clone, Copy)]
pub struct BrickShare {
    words: [u32; 4],
    pairs: u32,
}

/// Where a thread's share of a strip's first brick lies in every span.
#[derive(Clone, Copy)]
pub struct SharePlace {
    codes: u32,
    pairs: u32,
}

impl SharePlace {
    /// The place of thread `thread` of a warpgroup.
    #[inline(always)]
    pub fn of_thread(thread: u32) -> Self {
        let (warp, group) = (thread / 32, thread % 32 / 4);
        Self { codes: thread * 16, pairs: STRIP_SPAN_CODE_BYTES + (warp * 8 + group) * 4 }
    }

    /// The place in a span `bytes` further on.
    #[inline(always)]
    pub fn moved(self, bytes: u32) -> Self {
        Self { codes: self.codes + bytes, pairs: self.pairs + bytes }
    }

    /// The place in the first or the second brick of the span.
    #[inline(always)]
    pub fn in_brick(self, brick: u32, stream: WeightStream) -> Self {
        Self {
            codes: self.codes + brick * CODE_BYTES as u32,
            pairs: self.pairs + brick * stream.second_pairs,
        }
    }
}

impl BrickShare {
    /// Loads the share from a strip's span in shared memory.
    ///
    /// # Safety
    /// A strip's codes and pairs lie at `span`, 16-byte aligned.
    #[inline(always)]
    pub unsafe fn load(span: u32, place: SharePlace) -> Self {
        // SAFETY: the place lies inside the span.
        unsafe { Self::load_from(span + place.codes, span + place.pairs) }
    }

    /// Loads the share of the span's second brick.
    ///
    /// # Safety
    /// As for [`load`](Self::load); `place` is that of the first brick, and `stream` that of the weights.
    #[inline(always)]
    pub unsafe fn load_second(span: u32, place: SharePlace, stream: WeightStream) -> Self {
        // SAFETY: as above.
        unsafe { Self::load(span, place.in_brick(1, stream)) }
    }

    /// Loads the share from where its codes and its channels' pairs lie in shared memory.
    ///
    /// # Safety
    /// 16 bytes of codes, aligned, and 4 bytes of pairs lie there.
    #[inline(always)]
    pub unsafe fn load_from(codes: u32, pairs: u32) -> Self {
        // SAFETY: the caller vouches for the addresses.
        unsafe { Self { words: load_shared_x4(codes), pairs: load_shared(pairs) } }
    }

    /// The A operand of the brick's k32 MMA `MMA`, 0 or 1, for wgmma.
    #[inline(always)]
    pub fn operand<D: Dequantization, const MMA: usize>(self) -> [u32; 4] {
        self.operand_by::<MMA>(D::four_weights)
    }

    /// The A operand of the brick's k32 MMA `MMA`, 0 or 1, by a multiply-add of the caller's choice.
    #[inline(always)]
    pub fn operand_by<const MMA: usize>(
        self,
        four_weights: impl Fn(u32, u32, u32) -> u32 + Copy,
    ) -> [u32; 4] {
        // Bytes of `pairs`: s and a of channel g, s and a of channel g + 8. Selector digit 4 is a zero byte.
        let (upper_s, upper_a) = (permute_bytes::<0x4440>(self.pairs), permute_bytes::<0x1111>(self.pairs));
        let (lower_s, lower_a) = (permute_bytes::<0x4442>(self.pairs), permute_bytes::<0x3333>(self.pairs));
        let [upper_low, upper_high] = dequantize_word(self.words[2 * MMA], upper_s, upper_a, four_weights);
        let [lower_low, lower_high] =
            dequantize_word(self.words[2 * MMA + 1], lower_s, lower_a, four_weights);
        [upper_low, lower_low, upper_high, lower_high]
    }
}
