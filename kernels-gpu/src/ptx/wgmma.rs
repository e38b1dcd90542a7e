//! `wgmma` m64nNk32 on int8: the A operand from registers or shared memory, B from shared memory.
//!
//! The int32 accumulators are types, one for each n, because the assembly must name every register.

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

/// Closes the group of the wgmmas issued since the last group.
///
/// # Safety
/// All threads of the warpgroup call it.
#[inline(always)]
pub unsafe fn commit() {
    // SAFETY: the instruction accesses no memory.
    unsafe { asm!("wgmma.commit_group.sync.aligned;", options(nostack)) }
}

/// Waits until at most `PENDING` groups are unfinished.
///
/// # Safety
/// All threads of the warpgroup call it.
#[inline(always)]
pub unsafe fn wait<const PENDING: u32>() {
    // SAFETY: the instruction accesses no memory.
    unsafe { asm!("wgmma.wait_group.sync.aligned {};", const PENDING, options(nostack)) }
}

/// Returns the lower half of the descriptor of a K-major tile with 128-byte swizzle.
///
/// The upper half is a constant of the layout, [`DESCRIPTOR_UPPER`].
/// Adding [`DESCRIPTOR_K32`] advances the descriptor by 32 bytes along K.
#[inline(always)]
pub fn descriptor(address: u32) -> u32 {
    const LEADING: u32 = 1 << 16;
    LEADING | (address & 0x3_FFFF) >> 4
}

/// Upper half of a descriptor: 128-byte swizzle, and 1,024 bytes from eight rows to the next eight.
const DESCRIPTOR_UPPER: u32 = 1 << 30 | 1024 >> 4;

/// Returns the difference between the descriptors of two tiles that lie `bytes` apart.
#[inline(always)]
pub const fn descriptor_step(bytes: u32) -> u32 {
    bytes >> 4
}

/// The difference between the descriptors of one k32 of a tile and the next.
pub const DESCRIPTOR_K32: u32 = descriptor_step(32);

/// A thread's part of a 64-channel × [`TOKENS`](Self::TOKENS) int32 accumulator.
///
/// For each eight tokens it has an accumulator fragment of four sums.
/// With warp `w`, `g = lane/4` and `c = lane%4`,
/// fragment `j` of a thread has the sums of channels `16w+g` and `16w+g+8`:
/// `[(g, 8j+2c), (g, 8j+2c+1), (g+8, 8j+2c), (g+8, 8j+2c+1)]`.
///
/// Only constants may index the registers: one rolled loop over them would send them all to local memory.
/// So all code that iterates over them uses [`visit`](Self::visit), which is unrolled here.
pub trait Accumulator {
    /// Tokens of the tile: the instruction's n.
    const TOKENS: u32;

    /// Returns an accumulator of zeros.
    fn zero() -> Self;

    /// Returns an accumulator with arbitrary contents, for products that replace it.
    ///
    /// Zeros would have to be written.
    fn arbitrary() -> Self;

    /// Issues `self += A · B`, or without `accumulate` `self = A · B`.
    ///
    /// A is 64×32 from the warpgroup's registers, B is the tile of `descriptor`.
    ///
    /// # Safety
    /// All threads of the warpgroup call it after [`fence`].
    /// They touch neither `self` nor the registers of `a` until [`wait`] says that the group is done.
    /// `descriptor` describes a tile in the thread block's shared memory.
    unsafe fn multiply_accumulate(&mut self, a: [u32; 4], descriptor: u32, accumulate: bool);

    /// Issues the products of up to four A operands with consecutive k32 of the tile, from `descriptor` on.
    ///
    /// `accumulate` applies to the first product; the others are added to it.
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
                // SAFETY: the caller guarantees all of them.
                unsafe { self.multiply_accumulate(a[I], descriptor + I * DESCRIPTOR_K32, accumulate) };
            }
        });
    }

    /// As [`multiply_accumulate`](Self::multiply_accumulate), with A in shared memory.
    ///
    /// `a` is the descriptor of A, a tile with the same layout as B.
    ///
    /// # Safety
    /// As for [`multiply_accumulate`](Self::multiply_accumulate).
    /// Both descriptors describe tiles in the thread block's shared memory.
    unsafe fn multiply_accumulate_shared(&mut self, a: u32, descriptor: u32, accumulate: bool);

    /// Calls `visitor` with each accumulator fragment, `j` ascending.
    fn visit(&mut self, visitor: &mut impl FragmentVisitor);
}

/// Returns the accumulator of the tile's first `N::TOKENS` tokens.
///
/// # Safety
/// `N` has no more tokens than `A`.
#[inline(always)]
pub unsafe fn first_tokens<N: Accumulator, A: Accumulator>(accumulator: &mut A) -> &mut N {
    // SAFETY: every accumulator is an array of fragments and nothing else, the first tokens first,
    // and the caller guarantees that this one has as many as `N`.
    unsafe { &mut *core::ptr::from_mut(accumulator).cast() }
}

/// A tile's number of tokens, as a type.
pub struct Tokens<const COUNT: u32>;

/// A number of tokens that has an accumulator.
pub trait HasAccumulator {
    /// The accumulator of a tile with this many tokens.
    type Accumulator: Accumulator;
}

/// An operation on every fragment of an accumulator, for [`Accumulator::visit`].
pub trait FragmentVisitor {
    /// Visits fragment `j`: `sums` are those of tokens `8·j ..`, in the order that [`Accumulator`] describes.
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]);
}

/// Returns the sums as 32-bit words.
///
/// `map` would leave a loop with a drop guard in every kernel until late in the compilation.
#[inline(always)]
pub fn words([a, b, c, d]: [i32; 4]) -> [u32; 4] {
    [a as u32, b as u32, c as u32, d as u32]
}

/// Adds sums of the same fragment that were computed elsewhere.
#[inline(always)]
pub fn add_sums(block: &mut [i32; 4], other: [i32; 4]) {
    block[0] = block[0].wrapping_add(other[0]);
    block[1] = block[1].wrapping_add(other[1]);
    block[2] = block[2].wrapping_add(other[2]);
    block[3] = block[3].wrapping_add(other[3]);
}

/// Returns the arbitrary contents of four registers.
#[inline(always)]
fn arbitrary_block() -> [i32; 4] {
    let (a, b, c, d): (i32, i32, i32, i32);
    // SAFETY: the assembly is only a comment, and any register contents are valid numbers.
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

// For int8 the instruction's n is 8, 16, 24, 32, or a multiple of 16 up to 256.
macro_rules! accumulator {
    ($name:ident, $tokens:tt, $blocks:tt) => {
        #[doc = concat!("64 channels × ", $tokens, " tokens.")]
        #[repr(transparent)]
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
                    // SAFETY: the caller guarantees the warpgroup and the descriptor.
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
                    // SAFETY: the caller guarantees the warpgroup and the descriptors.
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
            fn visit(&mut self, visitor: &mut impl FragmentVisitor) {
                seq!(J in 0..$blocks {
                    #( visitor.fragment(J, &mut self.0[J]); )*
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
