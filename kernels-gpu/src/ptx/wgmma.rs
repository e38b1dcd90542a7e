//! `wgmma` m64nNk32 on int8: the A operand from registers or shared memory, B from shared memory, int32 accumulators.

use core::arch::asm;
use seq_macro::seq;

/// Orders this warpgroup's register accesses before the wgmmas that follow.
///
/// # Safety
/// All threads of the warpgroup call it.
#[inline(always)]
pub unsafe fn fence() {
    // SAFETY: a fence.
    unsafe { asm!("wgmma.fence.sync.aligned;", options(nostack)) }
}

/// Closes the group of the wgmmas issued since the last one.
///
/// # Safety
/// All threads of the warpgroup call it.
#[inline(always)]
pub unsafe fn commit() {
    // SAFETY: touches no memory.
    unsafe { asm!("wgmma.commit_group.sync.aligned;", options(nostack)) }
}

/// Waits until at most `PENDING` groups are unfinished.
///
/// # Safety
/// All threads of the warpgroup call it.
#[inline(always)]
pub unsafe fn wait<const PENDING: u32>() {
    // SAFETY: touches no memory.
    unsafe { asm!("wgmma.wait_group.sync.aligned {};", const PENDING, options(nostack)) }
}

/// The lower half of the descriptor of a K-major tile with 128-byte swizzle; the upper half is a constant of the
/// layout, [`DESCRIPTOR_UPPER`].
///
/// Adding [`DESCRIPTOR_K32`] moves on by 32 bytes along K.
#[inline(always)]
pub fn descriptor(address: u32) -> u32 {
    const LEADING: u32 = 1 << 16;
    LEADING | (address & 0x3_FFFF) >> 4
}

/// 128-byte swizzle, and 1,024 bytes from eight rows to the next eight.
const DESCRIPTOR_UPPER: u32 = 1 << 30 | 1024 >> 4;

/// What to add to a descriptor for a tile that lies `bytes` further on.
#[inline(always)]
pub const fn descriptor_step(bytes: u32) -> u32 {
    bytes >> 4
}

/// From one k32 of a tile to the next, in a descriptor.
pub const DESCRIPTOR_K32: u32 = descriptor_step(32);

/// A thread's share of a 64-channel × [`TOKENS`](Self::TOKENS) int32 accumulator tile.
///
/// Thread `t` of the warpgroup (warp `w`, `g = lane/4`, `c = lane%4`) holds for each eight tokens `j` the four
/// sums of channels `16w+g` and `16w+g+8`: `[(g, 8j+2c), (g, 8j+2c+1), (g+8, 8j+2c), (g+8, 8j+2c+1)]`.
///
/// The registers may only be named by constants: one rolled loop over them would send them all to local
/// memory. So whatever walks them does it through [`visit`](Self::visit), unrolled here.
pub trait Accumulator {
    /// Tokens of the tile: the instruction's n.
    const TOKENS: u32;

    /// All zeros.
    fn zero() -> Self;

    /// Whatever its registers happen to hold, for products that replace it: zeros would have to be written.
    fn arbitrary() -> Self;

    /// Issues `self += A · B`, A being 64×32 from the warpgroup's registers, or without `accumulate` `self = A · B`.
    ///
    /// # Safety
    /// All threads of the warpgroup call it after [`fence`], and touch neither `self` nor `a`'s registers until
    /// [`wait`] says that the group is done. `descriptor` describes a tile in the block's shared memory.
    unsafe fn multiply_accumulate(&mut self, a: [u32; 4], descriptor: u32, accumulate: bool);

    /// Issues the products of up to four such operands, each with the next k32 of the tile from `descriptor` on. `accumulate` is the
    /// first one's; the others are added to it.
    ///
    /// # Safety
    /// As for [`multiply_accumulate`](Self::multiply_accumulate).
    #[inline(always)]
    unsafe fn multiply_accumulate_along<const COUNT: usize>(
        &mut self,
        a: [[u32; 4]; COUNT],
        descriptor: u32,
        accumulate: bool,
    ) {
        seq!(I in 0..4 {
            if I < COUNT {
                let accumulate = I > 0 || accumulate;
                // SAFETY: the caller vouches for all of them.
                unsafe { self.multiply_accumulate(a[I], descriptor + I * DESCRIPTOR_K32, accumulate) };
            }
        });
    }

    /// As [`multiply_accumulate`](Self::multiply_accumulate), A being a tile in shared memory too, of the same layout.
    ///
    /// # Safety
    /// As there; both descriptors describe tiles in the block's shared memory.
    unsafe fn multiply_accumulate_shared(&mut self, a: u32, descriptor: u32, accumulate: bool);

    /// Hands each block of four sums, `j` ascending, to `visitor`.
    fn visit(&mut self, visitor: &mut impl BlockVisitor);
}

/// A tile's number of tokens, as a type.
pub struct Tokens<const COUNT: u32>;

/// A number of tokens that has an accumulator.
pub trait HasAccumulator {
    /// The accumulator of a tile with so many tokens.
    type Accumulator: Accumulator;
}

/// What [`Accumulator::visit`] calls for every eight tokens.
pub trait BlockVisitor {
    /// `block` holds the four sums of tokens `8·j …`; see [`Accumulator`].
    fn block(&mut self, j: u32, block: &mut [i32; 4]);
}

/// Adds sums of the same block that were computed elsewhere.
#[inline(always)]
pub fn add_sums(block: &mut [i32; 4], other: [i32; 4]) {
    block[0] = block[0].wrapping_add(other[0]);
    block[1] = block[1].wrapping_add(other[1]);
    block[2] = block[2].wrapping_add(other[2]);
    block[3] = block[3].wrapping_add(other[3]);
}

/// Whatever four registers happen to hold.
#[inline(always)]
fn arbitrary_block() -> [i32; 4] {
    let (a, b, c, d): (i32, i32, i32, i32);
    // SAFETY: a comment does nothing; whatever the registers hold is a valid number.
    unsafe {
        asm!(
            "// {} {} {} {}",
            out(reg32) a,
            out(reg32) b,
            out(reg32) c,
            out(reg32) d,
            options(nomem, nostack, preserves_flags)
        );
    }
    [a, b, c, d]
}

// The integer instruction's n is 8, 16, 24, 32, or a multiple of 16 up to 256.
macro_rules! accumulator {
    ($name:ident, $tokens:tt, $blocks:tt) => {
        #[doc = concat!("64 channels × ", $tokens, " tokens.")]
        pub struct $name([[i32; 4]; $blocks]);

        impl HasAccumulator for Tokens<$tokens> {
            type Accumulator = $name;
        }

        impl Accumulator for $name {
            const TOKENS: u32 = $tokens;

            #[inline(always)]
            fn zero() -> Self {
                Self([[0; 4]; $blocks])
            }

            #[inline(always)]
            fn arbitrary() -> Self {
                let mut registers = [[0; 4]; $blocks];
                seq!(J in 0..$blocks {
                    #( registers[J] = arbitrary_block(); )*
                });
                Self(registers)
            }

            #[inline(always)]
            unsafe fn multiply_accumulate(&mut self, a: [u32; 4], descriptor: u32, accumulate: bool) {
                let [x0, x1, x2, x3] = a;
                seq!(J in 1..$blocks {
                    // SAFETY: the caller vouches for the warpgroup and the descriptor.
                    unsafe {
                        asm!(
                            "{{",
                            ".reg .pred accumulate;",
                            ".reg .b64 tile;",
                            "setp.ne.b32 accumulate, {accumulate}, 0;",
                            "mov.b64 tile, {{{lower}, {upper}}};",
                            concat!(
                                "wgmma.mma_async.sync.aligned.m64n", $tokens, "k32.s32.s8.s8 {{{a0}, {b0}, {c0}, {d0}",
                                #( ", {a", J, "}, {b", J, "}, {c", J, "}, {d", J, "}", )*
                                "}}, {{{x0}, {x1}, {x2}, {x3}}}, tile, accumulate;"
                            ),
                            "}}",
                            a0 = inout(reg32) self.0[0][0],
                            b0 = inout(reg32) self.0[0][1],
                            c0 = inout(reg32) self.0[0][2],
                            d0 = inout(reg32) self.0[0][3],
                            #(
                                a~J = inout(reg32) self.0[J][0],
                                b~J = inout(reg32) self.0[J][1],
                                c~J = inout(reg32) self.0[J][2],
                                d~J = inout(reg32) self.0[J][3],
                            )*
                            x0 = in(reg32) x0,
                            x1 = in(reg32) x1,
                            x2 = in(reg32) x2,
                            x3 = in(reg32) x3,
                            accumulate = in(reg32) u32::from(accumulate),
                            lower = in(reg32) descriptor,
                            upper = const DESCRIPTOR_UPPER,
                            options(nostack)
                        );
                    }
                });
            }

            #[inline(always)]
            unsafe fn multiply_accumulate_shared(&mut self, a: u32, descriptor: u32, accumulate: bool) {
                seq!(J in 1..$blocks {
                    // SAFETY: the caller vouches for the warpgroup and the descriptors.
                    unsafe {
                        asm!(
                            "{{",
                            ".reg .pred accumulate;",
                            ".reg .b64 weights, tile;",
                            "setp.ne.b32 accumulate, {accumulate}, 0;",
                            "mov.b64 weights, {{{a}, {upper}}};",
                            "mov.b64 tile, {{{lower}, {upper}}};",
                            concat!(
                                "wgmma.mma_async.sync.aligned.m64n", $tokens, "k32.s32.s8.s8 {{{a0}, {b0}, {c0}, {d0}",
                                #( ", {a", J, "}, {b", J, "}, {c", J, "}, {d", J, "}", )*
                                "}}, weights, tile, accumulate;"
                            ),
                            "}}",
                            a0 = inout(reg32) self.0[0][0],
                            b0 = inout(reg32) self.0[0][1],
                            c0 = inout(reg32) self.0[0][2],
                            d0 = inout(reg32) self.0[0][3],
                            #(
                                a~J = inout(reg32) self.0[J][0],
                                b~J = inout(reg32) self.0[J][1],
                                c~J = inout(reg32) self.0[J][2],
                                d~J = inout(reg32) self.0[J][3],
                            )*
                            a = in(reg32) a,
                            accumulate = in(reg32) u32::from(accumulate),
                            lower = in(reg32) descriptor,
                            upper = const DESCRIPTOR_UPPER,
                            options(nostack)
                        );
                    }
                });
            }

            #[inline(always)]
            fn visit(&mut self, visitor: &mut impl BlockVisitor) {
                seq!(J in 0..$blocks {
                    #( visitor.block(J, &mut self.0[J]); )*
                });
            }
        }
    };
}

accumulator!(Accumulator8, 8, 1);
accumulator!(Accumulator16, 16, 2);
accumulator!(Accumulator24, 24, 3);
accumulator!(Accumulator32, 32, 4);
accumulator!(Accumulator48, 48, 6);
accumulator!(Accumulator64, 64, 8);
accumulator!(Accumulator80, 80, 10);
accumulator!(Accumulator96, 96, 12);
accumulator!(Accumulator112, 112, 14);
accumulator!(Accumulator128, 128, 16);
accumulator!(Accumulator144, 144, 18);
accumulator!(Accumulator160, 160, 20);
accumulator!(Accumulator176, 176, 22);
accumulator!(Accumulator192, 192, 24);
accumulator!(Accumulator208, 208, 26);
accumulator!(Accumulator224, 224, 28);
accumulator!(Accumulator240, 240, 30);
accumulator!(Accumulator256, 256, 32);
