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

    /// Whether [`multiply_accumulate_along`](Self::multiply_accumulate_along) closes its group itself,
    /// so that no [`commit`] follows.
    const COMMITS: bool = false;

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

/// Two accumulators, the second one of the tokens behind those of the first.
///
/// It is for tiles with more tokens than the largest n of an instruction.
pub struct Pair<A, B>(A, B);

impl<A: Accumulator, B: Accumulator> Pair<A, B> {
    /// The difference between the descriptors of the second accumulator's tokens and of the first one's.
    const STEP: u32 = descriptor_step(A::TOKENS * ROW_BYTES);
}

/// Bytes of a token in a tile with 128-byte swizzle.
const ROW_BYTES: u32 = 128;

impl HasAccumulator for Tokens<320> {
    type Accumulator = Pair<Accumulator160, Accumulator160>;
}

impl<A: Accumulator, B: Accumulator> Accumulator for Pair<A, B> {
    const TOKENS: u32 = A::TOKENS + B::TOKENS;

    #[inline(always)]
    fn zero() -> Self {
        Self(A::zero(), B::zero())
    }

    #[inline(always)]
    fn arbitrary() -> Self {
        Self(A::arbitrary(), B::arbitrary())
    }

    #[inline(always)]
    unsafe fn multiply_accumulate(&mut self, a: [u32; 4], descriptor: u32, accumulate: bool) {
        // SAFETY: the caller guarantees the same.
        unsafe {
            self.0.multiply_accumulate(a, descriptor, accumulate);
            self.1.multiply_accumulate(a, descriptor + Self::STEP, accumulate);
        }
    }

    #[inline(always)]
    unsafe fn multiply_accumulate_shared(&mut self, a: u32, descriptor: u32, accumulate: bool) {
        // SAFETY: the caller guarantees the same.
        unsafe {
            self.0.multiply_accumulate_shared(a, descriptor, accumulate);
            self.1.multiply_accumulate_shared(a, descriptor + Self::STEP, accumulate);
        }
    }

    #[inline(always)]
    fn visit(&mut self, visitor: &mut impl FragmentVisitor) {
        self.0.visit(visitor);
        self.1.visit(&mut Behind { visitor, fragments: A::TOKENS / 8 });
    }
}

/// A visitor of fragments that lie behind `fragments` others.
struct Behind<'a, V> {
    visitor: &'a mut V,
    fragments: u32,
}

impl<V: FragmentVisitor> FragmentVisitor for Behind<'_, V> {
    #[inline(always)]
    fn fragment(&mut self, j: u32, sums: &mut [i32; 4]) {
        self.visitor.fragment(self.fragments + j, sums);
    }
}

/// An accumulator that can be multiplied for its first tokens only.
pub trait Fitting: Accumulator {
    /// As [`multiply_accumulate_along`](Accumulator::multiply_accumulate_along) and [`commit`],
    /// by instructions with the smallest n that has room for `rows` tokens.
    ///
    /// `COUNT` is 2 for accumulators of 32 tokens, whose consumers share K, and otherwise 4.
    ///
    /// # Safety
    /// As for [`multiply_accumulate`](Accumulator::multiply_accumulate).
    /// `rows` is at most [`TOKENS`](Accumulator::TOKENS), and the same for all threads.
    unsafe fn multiply_accumulate_fitting<const COUNT: usize>(
        &mut self,
        rows: u32,
        a: [[u32; 4]; COUNT],
        descriptor: u32,
        accumulate: bool,
    );
}

/// The text of one wgmma with n = `$n` on the first `$blocks` fragments of the accumulator.
///
/// Its A operand is the registers named `$a` with a digit.
/// With `second` it is on the fragments of a pair's second accumulator.
macro_rules! fitting_instruction {
    (second $n:tt, $blocks:tt, $a:literal, $tile:literal, $accumulate:literal) => {
        seq!(J in 1..$blocks {
            concat!(
                "wgmma.mma_async.sync.aligned.m64n", $n, "k32.s32.s8.s8 {{{e0}, {f0}, {g0}, {h0}",
                #( ", {e", J, "}, {f", J, "}, {g", J, "}, {h", J, "}", )*
                "}}, {{{", $a, "0}, {", $a, "1}, {", $a, "2}, {", $a, "3}}}, ", $tile, ", ", $accumulate, ";"
            )
        })
    };
    ($n:tt, $blocks:tt, $a:literal, $tile:literal, $accumulate:literal) => {
        seq!(J in 1..$blocks {
            concat!(
                "wgmma.mma_async.sync.aligned.m64n", $n, "k32.s32.s8.s8 {{{a0}, {b0}, {c0}, {d0}",
                #( ", {a", J, "}, {b", J, "}, {c", J, "}, {d", J, "}", )*
                "}}, {{{", $a, "0}, {", $a, "1}, {", $a, "2}, {", $a, "3}}}, ", $tile, ", ", $accumulate, ";"
            )
        })
    };
}

/// Returns whether the n of instructions descend from `tokens`, each a multiple of 16,
/// each with its number of fragments and the next smaller n.
const fn descends(tokens: u32, instructions: &[(u32, u32, u32)]) -> bool {
    let (mut expected, mut index) = (tokens, 0);
    while index < instructions.len() {
        let (n, fragments, smaller) = instructions[index];
        if n != expected || !n.is_multiple_of(16) || fragments * 8 != n || smaller >= n {
            return false;
        }
        expected = smaller;
        index += 1;
    }
    expected == 0
}

/// Implements [`Fitting`] for the accumulator of `$tokens` tokens, with two or four A operands.
///
/// `$n` are the n of the instructions, descending, each with its fragments and the next smaller n.
/// The branches are part of the assembly, so that all instructions name the same registers,
/// and each branch closes its own group: behind the branches, `ptxas` would add an empty group,
/// and every wait would be for one group too many.
///
/// Tiles of up to 96 tokens mostly wait for memory, so few n suffice.
/// Not every list is possible: `ptxas` serializes the instructions of some, which `cargo xtask ptx --check` finds.
macro_rules! fitting {
    ($name:ident, $fragments:tt, $count:tt: $(($n:tt, $blocks:tt, $smaller:tt)),*) => {
        const _: () = assert!(descends($name::TOKENS, &[$(($n, $blocks, $smaller)),*]));

        impl Fitting for $name {
            // The labels lie in a scope of their own in the PTX, so every copy of the assembly has its own.
            #[allow(named_asm_labels)]
            #[inline(always)]
            unsafe fn multiply_accumulate_fitting<const COUNT: usize>(
                &mut self,
                rows: u32,
                a: [[u32; 4]; COUNT],
                descriptor: u32,
                accumulate: bool,
            ) {
                let a = |index: usize| if index < COUNT { a[index] } else { a[0] };
                let a = [a(0), a(1), a(2), a(3)];
                let tile = |index: u32| descriptor + index * DESCRIPTOR_K32;
                fitting!(@assembly self, $fragments, $count, rows, a, tile, accumulate, $(($n, $blocks, $smaller)),*);
            }
        }
    };
    (@assembly $self:ident, $fragments:tt, 4, $rows:ident, $a:ident, $tile:ident, $accumulate:ident, $(($n:tt, $blocks:tt, $smaller:tt)),*) => {
        seq!(J in 1..$fragments {
            // SAFETY: the caller guarantees the warpgroup and the descriptor.
            unsafe {
                asm!(
                    "{{",
                    ".reg .pred accumulate, always, fits;",
                    ".reg .b64 tile0, tile1, tile2, tile3;",
                    "setp.ne.b32 accumulate, {accumulate}, 0;",
                    "setp.eq.b32 always, 0, 0;",
                    "mov.b64 tile0, {{{lower0}, {upper}}};",
                    "mov.b64 tile1, {{{lower1}, {upper}}};",
                    "mov.b64 tile2, {{{lower2}, {upper}}};",
                    "mov.b64 tile3, {{{lower3}, {upper}}};",
                    $(
                        concat!("setp.le.u32 fits, {rows}, ", $smaller, ";"),
                        concat!("@fits bra.uni below_", $n, ";"),
                        fitting_instruction!($n, $blocks, "w", "tile0", "accumulate"),
                        fitting_instruction!($n, $blocks, "x", "tile1", "always"),
                        fitting_instruction!($n, $blocks, "y", "tile2", "always"),
                        fitting_instruction!($n, $blocks, "z", "tile3", "always"),
                        "wgmma.commit_group.sync.aligned;",
                        "bra.uni done;",
                        concat!("below_", $n, ":"),
                    )*
                    "done:",
                    "}}",
                    a0 = inout(reg32) $self.0[0][0],
                    b0 = inout(reg32) $self.0[0][1],
                    c0 = inout(reg32) $self.0[0][2],
                    d0 = inout(reg32) $self.0[0][3],
                    #(
                        a~J = inout(reg32) $self.0[J][0],
                        b~J = inout(reg32) $self.0[J][1],
                        c~J = inout(reg32) $self.0[J][2],
                        d~J = inout(reg32) $self.0[J][3],
                    )*
                    w0 = in(reg32) $a[0][0], w1 = in(reg32) $a[0][1], w2 = in(reg32) $a[0][2], w3 = in(reg32) $a[0][3],
                    x0 = in(reg32) $a[1][0], x1 = in(reg32) $a[1][1], x2 = in(reg32) $a[1][2], x3 = in(reg32) $a[1][3],
                    y0 = in(reg32) $a[2][0], y1 = in(reg32) $a[2][1], y2 = in(reg32) $a[2][2], y3 = in(reg32) $a[2][3],
                    z0 = in(reg32) $a[3][0], z1 = in(reg32) $a[3][1], z2 = in(reg32) $a[3][2], z3 = in(reg32) $a[3][3],
                    accumulate = in(reg32) u32::from($accumulate),
                    rows = in(reg32) $rows,
                    lower0 = in(reg32) $tile(0),
                    lower1 = in(reg32) $tile(1),
                    lower2 = in(reg32) $tile(2),
                    lower3 = in(reg32) $tile(3),
                    upper = const DESCRIPTOR_UPPER,
                    options(nostack)
                );
            }
        });
    };
    (@assembly $self:ident, $fragments:tt, 2, $rows:ident, $a:ident, $tile:ident, $accumulate:ident, $(($n:tt, $blocks:tt, $smaller:tt)),*) => {
        seq!(J in 1..$fragments {
            // SAFETY: the caller guarantees the warpgroup and the descriptor.
            unsafe {
                asm!(
                    "{{",
                    ".reg .pred accumulate, always, fits;",
                    ".reg .b64 tile0, tile1;",
                    "setp.ne.b32 accumulate, {accumulate}, 0;",
                    "setp.eq.b32 always, 0, 0;",
                    "mov.b64 tile0, {{{lower0}, {upper}}};",
                    "mov.b64 tile1, {{{lower1}, {upper}}};",
                    $(
                        concat!("setp.le.u32 fits, {rows}, ", $smaller, ";"),
                        concat!("@fits bra.uni below_", $n, ";"),
                        fitting_instruction!($n, $blocks, "w", "tile0", "accumulate"),
                        fitting_instruction!($n, $blocks, "x", "tile1", "always"),
                        "wgmma.commit_group.sync.aligned;",
                        "bra.uni done;",
                        concat!("below_", $n, ":"),
                    )*
                    "done:",
                    "}}",
                    a0 = inout(reg32) $self.0[0][0],
                    b0 = inout(reg32) $self.0[0][1],
                    c0 = inout(reg32) $self.0[0][2],
                    d0 = inout(reg32) $self.0[0][3],
                    #(
                        a~J = inout(reg32) $self.0[J][0],
                        b~J = inout(reg32) $self.0[J][1],
                        c~J = inout(reg32) $self.0[J][2],
                        d~J = inout(reg32) $self.0[J][3],
                    )*
                    w0 = in(reg32) $a[0][0], w1 = in(reg32) $a[0][1], w2 = in(reg32) $a[0][2], w3 = in(reg32) $a[0][3],
                    x0 = in(reg32) $a[1][0], x1 = in(reg32) $a[1][1], x2 = in(reg32) $a[1][2], x3 = in(reg32) $a[1][3],
                    accumulate = in(reg32) u32::from($accumulate),
                    rows = in(reg32) $rows,
                    lower0 = in(reg32) $tile(0),
                    lower1 = in(reg32) $tile(1),
                    upper = const DESCRIPTOR_UPPER,
                    options(nostack)
                );
            }
        });
    };
}

fitting!(Accumulator32, 4, 2: (32, 4, 16), (16, 2, 0));
fitting!(Accumulator64, 8, 4: (64, 8, 32), (32, 4, 0));
fitting!(Accumulator96, 12, 4: (96, 12, 32), (32, 4, 0));
fitting!(Accumulator160, 20, 4: (160, 20, 128), (128, 16, 96), (96, 12, 32), (32, 4, 0));
fitting!(Accumulator256, 32, 4: (256, 32, 240), (240, 30, 224), (224, 28, 208), (208, 26, 192), (192, 24, 176), (176, 22, 160), (160, 20, 144), (144, 18, 128), (128, 16, 96), (96, 12, 64), (64, 8, 32), (32, 4, 0));

/// Implements [`Fitting`] for the pair of two accumulators of 160 tokens, with four A operands.
///
/// In parentheses are the tokens that a branch has room for, the n of the instructions on the second accumulator,
/// its fragments, and the next fewer tokens. Behind the semicolon are the branches
/// for the first accumulator alone, as in `fitting!`.
macro_rules! fitting_pair {
    ($(($tokens:tt, $n:tt, $blocks_behind:tt, $smaller:tt)),*; $(($alone:tt, $blocks:tt, $smaller_alone:tt)),*) => {
        const _: () = assert!(descends(160, &[$(($alone, $blocks, $smaller_alone)),*]));
        $(const _: () = assert!($tokens == 160 + $n && $blocks_behind * 8 == $n && $smaller < $tokens && $smaller >= 160);)*

        impl Fitting for Pair<Accumulator160, Accumulator160> {
            #[allow(named_asm_labels)]
            #[inline(always)]
            unsafe fn multiply_accumulate_fitting<const COUNT: usize>(
                &mut self,
                rows: u32,
                a: [[u32; 4]; COUNT],
                descriptor: u32,
                accumulate: bool,
            ) {
                let a = |index: usize| if index < COUNT { a[index] } else { a[0] };
                let a = [a(0), a(1), a(2), a(3)];
                let tile = |index: u32| descriptor + index * DESCRIPTOR_K32;
                let Self(first, second) = self;
                seq!(J in 1..20 {
                    // SAFETY: the caller guarantees the warpgroup and the descriptor.
                    unsafe {
                        asm!(
                            "{{",
                            ".reg .pred accumulate, always, fits;",
                            ".reg .b64 tile0, tile1, tile2, tile3, behind0, behind1, behind2, behind3;",
                            "setp.ne.b32 accumulate, {accumulate}, 0;",
                            "setp.eq.b32 always, 0, 0;",
                            "mov.b64 tile0, {{{lower0}, {upper}}};",
                            "mov.b64 tile1, {{{lower1}, {upper}}};",
                            "mov.b64 tile2, {{{lower2}, {upper}}};",
                            "mov.b64 tile3, {{{lower3}, {upper}}};",
                            "add.s64 behind0, tile0, {step};",
                            "add.s64 behind1, tile1, {step};",
                            "add.s64 behind2, tile2, {step};",
                            "add.s64 behind3, tile3, {step};",
                            $(
                                concat!("setp.le.u32 fits, {rows}, ", $smaller, ";"),
                                concat!("@fits bra.uni below_", $tokens, ";"),
                                fitting_instruction!(160, 20, "w", "tile0", "accumulate"),
                                fitting_instruction!(second $n, $blocks_behind, "w", "behind0", "accumulate"),
                                fitting_instruction!(160, 20, "x", "tile1", "always"),
                                fitting_instruction!(second $n, $blocks_behind, "x", "behind1", "always"),
                                fitting_instruction!(160, 20, "y", "tile2", "always"),
                                fitting_instruction!(second $n, $blocks_behind, "y", "behind2", "always"),
                                fitting_instruction!(160, 20, "z", "tile3", "always"),
                                fitting_instruction!(second $n, $blocks_behind, "z", "behind3", "always"),
                                "wgmma.commit_group.sync.aligned;",
                                "bra.uni done;",
                                concat!("below_", $tokens, ":"),
                            )*
                            $(
                                concat!("setp.le.u32 fits, {rows}, ", $smaller_alone, ";"),
                                concat!("@fits bra.uni below_", $alone, ";"),
                                fitting_instruction!($alone, $blocks, "w", "tile0", "accumulate"),
                                fitting_instruction!($alone, $blocks, "x", "tile1", "always"),
                                fitting_instruction!($alone, $blocks, "y", "tile2", "always"),
                                fitting_instruction!($alone, $blocks, "z", "tile3", "always"),
                                "wgmma.commit_group.sync.aligned;",
                                "bra.uni done;",
                                concat!("below_", $alone, ":"),
                            )*
                            "done:",
                            "}}",
                            a0 = inout(reg32) first.0[0][0],
                            b0 = inout(reg32) first.0[0][1],
                            c0 = inout(reg32) first.0[0][2],
                            d0 = inout(reg32) first.0[0][3],
                            e0 = inout(reg32) second.0[0][0],
                            f0 = inout(reg32) second.0[0][1],
                            g0 = inout(reg32) second.0[0][2],
                            h0 = inout(reg32) second.0[0][3],
                            #(
                                a~J = inout(reg32) first.0[J][0],
                                b~J = inout(reg32) first.0[J][1],
                                c~J = inout(reg32) first.0[J][2],
                                d~J = inout(reg32) first.0[J][3],
                                e~J = inout(reg32) second.0[J][0],
                                f~J = inout(reg32) second.0[J][1],
                                g~J = inout(reg32) second.0[J][2],
                                h~J = inout(reg32) second.0[J][3],
                            )*
                            w0 = in(reg32) a[0][0], w1 = in(reg32) a[0][1], w2 = in(reg32) a[0][2], w3 = in(reg32) a[0][3],
                            x0 = in(reg32) a[1][0], x1 = in(reg32) a[1][1], x2 = in(reg32) a[1][2], x3 = in(reg32) a[1][3],
                            y0 = in(reg32) a[2][0], y1 = in(reg32) a[2][1], y2 = in(reg32) a[2][2], y3 = in(reg32) a[2][3],
                            z0 = in(reg32) a[3][0], z1 = in(reg32) a[3][1], z2 = in(reg32) a[3][2], z3 = in(reg32) a[3][3],
                            accumulate = in(reg32) u32::from(accumulate),
                            rows = in(reg32) rows,
                            lower0 = in(reg32) tile(0),
                            lower1 = in(reg32) tile(1),
                            lower2 = in(reg32) tile(2),
                            lower3 = in(reg32) tile(3),
                            upper = const DESCRIPTOR_UPPER,
                            step = const Self::STEP,
                            options(nostack)
                        );
                    }
                });
            }
        }
    };
}

fitting_pair!(
    (320, 160, 20, 304), (304, 144, 18, 288), (288, 128, 16, 272), (272, 112, 14, 256),
    (256, 96, 12, 240), (240, 80, 10, 224), (224, 64, 8, 192), (192, 32, 4, 160);
    (160, 20, 128), (128, 16, 96), (96, 12, 64), (64, 8, 32), (32, 4, 0)
);
