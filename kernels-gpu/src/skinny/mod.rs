//! The W4A8 GEMM for few tokens: blocks own channels over the whole K, warps share K, and each warp feeds itself.
//!
//! What counts here is how soon a block is done once the launch before it has ended. So there are no producers, no barriers
//! between warps before the end, and no partial sums in global memory: a warp keeps rings of its own full, of weights
//! by its lanes' asynchronous copies and of activations by the copy engine, and multiplies with `mma`, whose A operand is
//! just its share of a brick. The weights are asked for before the launch ahead has ended, the activations after. The
//! warps' sums meet in shared memory at the end of a pass. The host twin is `host/src/gpu/skinny.rs`; shapes, shares and the
//! layout of shared memory are `liquidgemm_format::skinny`'s.

use cuda_std::{TensorMap, shared, thread, warp};
use liquidgemm_format::arguments::{SkinnyArguments, output_type};
use liquidgemm_format::brick::CODE_BYTES;
use liquidgemm_format::dequant::multiply_add_flip;
use liquidgemm_format::ring::RingCursor;
use liquidgemm_format::skinny::{
    GROUP_TOKENS, STEP_BRICKS, STEP_K, STRIP_UNITS, SUMS_BYTES, SUMS_TOKEN_BYTES, SkinnyShape, UNIT_CHANNELS,
    UNIT_CODE_BYTES, UNIT_PAIR_BYTES, WARPS,
};
use liquidgemm_format::tile::{SPAN_BRICKS, STRIP_SPAN_CODE_BYTES};
use seq_macro::seq;

use crate::dequant::BrickShare;
use crate::epilogue::{NO_BIAS, element};
use crate::ptx::integer::{add_bias, pack_bf16, pack_f16, scale};
use crate::ptx::memory::{
    load_shared_f32, load_shared_x4, store_global, store_global_u16, store_global_x2, store_global_x4,
    store_shared, store_shared_f32,
};
use crate::ptx::{copy, grid, matrix, mbarrier, mma, tma};

/// A warp's sums of a pass, for each unit and each group of 8 tokens in `mma`'s order.
type Sums<const UNITS: usize, const GROUPS: usize> = [[[i32; 4]; GROUPS]; UNITS];

/// The shape of so many units and groups of 8 tokens.
const fn shape(units: usize, groups: usize) -> SkinnyShape {
    match SkinnyShape::find(units as u32, groups as u32 * GROUP_TOKENS) {
        Some(shape) => shape,
        None => panic!("no such shape"),
    }
}

/// The kernel's body, for passes of `UNITS` units and `GROUPS` groups of 8 tokens. The ring of
/// activations has `STAGES` stages; `PENDING` groups of copies may be pending where a step begins, two fewer than the ring
/// of weights has stages.
///
/// # Safety
/// The arguments describe memory as their documentation says; `activations` is a map of int8 `[m, k]` with boxes of
/// a step's K × m tokens and 128-byte swizzle.
#[inline(always)]
pub unsafe fn skinny<const UNITS: usize, const GROUPS: usize, const STAGES: u32, const PENDING: u32>(
    activations: *const TensorMap,
    arguments: &SkinnyArguments,
) {
    // As early as can be: a launch takes longer to begin than its first weights delay this one's.
    grid::admit_next();
    // SAFETY: the map is a parameter.
    unsafe { tma::prefetch_map(activations) };
    let shape = const { shape(UNITS, GROUPS) };
    let place = Place::of_thread();
    let (first_unit, end_unit) = arguments.shares.of_block(thread::block_idx_x());
    let steps = arguments.weights.stream.spans;
    // SAFETY: the caller vouches for the arguments; the warp is whole.
    unsafe {
        let mut weights = WeightRing::<UNITS, GROUPS>::new(arguments, place, [first_unit, end_unit]);
        for _ in 0..shape.weight_stages() {
            weights.fill();
        }
        place.init_barriers(shape);
        // Activations, scales and output belong to the launch before this one until it has ended.
        grid::await_previous();
        let mut activations =
            ActivationRing::<GROUPS, STAGES>::new(activations, arguments, shape, place, steps);
        let mut pass = first_unit;
        while pass < end_unit {
            let units = arguments.shares.pass.min(end_unit - pass);
            activations.begin_pass();
            let scales = Scales::fetch(arguments, shape, pass);
            let mut sums: Sums<UNITS, GROUPS> = [[[0; 4]; GROUPS]; UNITS];
            let mut step = place.warp;
            while step < steps {
                multiply_step::<UNITS, GROUPS, STAGES, PENDING>(&mut sums, &mut weights, &mut activations);
                step += WARPS;
            }
            scales.park(shape, place);
            finish::<UNITS, GROUPS>(&sums, arguments, place, pass, units);
            pass += units;
        }
    }
}

/// Where a thread stands, and its block's shared memory.
#[derive(Clone, Copy)]
struct Place {
    shared: u32,
    warp: u32,
    lane: u32,
}

impl Place {
    #[inline(always)]
    fn of_thread() -> Self {
        let thread = thread::thread_idx_x();
        Self {
            shared: shared::dynamic_shared_mem(),
            warp: warp::broadcast(thread / warp::WARP_SIZE),
            lane: thread % warp::WARP_SIZE,
        }
    }

    #[inline(always)]
    fn thread(self) -> u32 {
        self.warp * warp::WARP_SIZE + self.lane
    }

    /// The warp's ring of activations.
    #[inline(always)]
    fn activations(self, shape: SkinnyShape) -> u32 {
        self.shared + self.warp * shape.activation_ring_bytes()
    }

    /// The warp's ring of weights.
    #[inline(always)]
    fn weights(self, shape: SkinnyShape) -> u32 {
        self.shared + shape.weights_offset() + self.warp * shape.weight_ring_bytes()
    }

    /// The full barrier of a stage of the warp's ring of activations.
    #[inline(always)]
    fn barrier(self, shape: SkinnyShape, stage: u32) -> u32 {
        self.shared + shape.barriers_offset() + (self.warp * shape.activation_stages + stage) * 8
    }

    /// Makes the warp's barriers.
    ///
    /// # Safety
    /// The whole warp calls it, once.
    #[inline(always)]
    unsafe fn init_barriers(self, shape: SkinnyShape) {
        // One lane makes all of them: by a lane each it would be a loop over the lanes.
        if self.lane == 0 {
            let mut stage = 0;
            while stage < shape.activation_stages {
                // SAFETY: the barrier is made before the warp's; no other warp uses it.
                unsafe { mbarrier::init(self.barrier(shape, stage), 1) };
                stage += 1;
            }
            // SAFETY: this thread made the barriers.
            unsafe { mbarrier::fence_init() };
        }
        warp::sync_warp();
    }
}

/// A warp's ring of weights, and what it will ask for next. The sequence of steps runs on from pass to pass.
struct WeightRing<'a, const UNITS: usize, const GROUPS: usize> {
    arguments: &'a SkinnyArguments,
    place: Place,
    end_unit: u32,
    /// Whether a step was multiplied already.
    is_running: bool,
    /// Where the stage to fill next lies, which is also the stage that was multiplied last.
    fill: u32,
    /// Where the stage to multiply next lies.
    full: u32,
    /// The pass of the stage to ask for next: its first unit, and how many there are; 0 after the last.
    first_unit: u32,
    units: u32,
    /// That stage's first brick along K.
    brick: u32,
    /// The address of that brick in the pass's first strip.
    source: u64,
    /// Offsets from there: of what this lane copies of each unit's codes in the first brick, and of what it copies of the pairs.
    codes: [u32; UNITS],
    pairs: i32,
}

impl<'a, const UNITS: usize, const GROUPS: usize> WeightRing<'a, UNITS, GROUPS> {
    const SHAPE: SkinnyShape = shape(UNITS, GROUPS);

    #[inline(always)]
    fn new(arguments: &'a SkinnyArguments, place: Place, [first_unit, end_unit]: [u32; 2]) -> Self {
        let start = place.weights(Self::SHAPE);
        let mut ring = Self {
            arguments,
            place,
            end_unit,
            is_running: false,
            fill: start,
            full: start,
            first_unit,
            units: 0,
            brick: 0,
            source: 0,
            codes: [0; UNITS],
            pairs: 0,
        };
        ring.begin_pass();
        ring
    }

    /// Turns to the pass that begins with `first_unit`.
    #[inline(always)]
    fn begin_pass(&mut self) {
        let weights = &self.arguments.weights;
        let stream = weights.stream;
        let strip_bytes = stream.strip_bytes;
        let strip = self.first_unit / STRIP_UNITS;
        let offset = |unit: u32| {
            let unit = self.first_unit + unit;
            (unit / STRIP_UNITS - strip) * strip_bytes + unit % STRIP_UNITS * UNIT_CODE_BYTES
        };
        let lane = self.place.lane;
        seq!(UNIT in 0..8 {
            if UNIT < UNITS {
                self.codes[UNIT] = offset(UNIT) + lane * 16;
            }
        });
        self.brick = self.place.warp * STEP_BRICKS;
        // A warp may be left without a step.
        self.units = if self.place.warp < stream.spans {
            self.arguments.shares.pass.min(self.end_unit - self.first_unit)
        } else {
            0
        };
        let first = stream.channel_pairs + self.place.warp * stream.span_bytes;
        self.source = weights.strips + strip as u64 * strip_bytes as u64 + first as u64;
        // Two lanes for each unit of each brick.
        let (unit, brick) = (self.first_unit + lane / 2 % UNITS as u32, lane / 2 / UNITS as u32);
        let in_strip = if stream.channel_pairs > 0 {
            0u32.wrapping_sub(first)
        } else {
            STRIP_SPAN_CODE_BYTES + brick * stream.second_pairs
        };
        self.pairs = ((unit / STRIP_UNITS - strip) * strip_bytes
            + unit % STRIP_UNITS * UNIT_PAIR_BYTES
            + lane % 2 * 16)
            .wrapping_add(in_strip)
            .cast_signed();
    }

    /// At the beginning of a step: asks for the step that takes the place of the one before, as one group of copies. The
    /// first time there is none, and the group is empty.
    ///
    /// # Safety
    /// As for [`fill`](Self::fill).
    #[inline(always)]
    unsafe fn refill(&mut self) {
        if self.is_running {
            // SAFETY: the caller vouches for the stage.
            unsafe { self.fill() };
        } else {
            self.is_running = true;
            copy::end_group();
        }
    }

    /// Asks for the next step, as one group of copies; past the last step the group is empty.
    ///
    /// # Safety
    /// All lanes are done with what the stage held.
    #[inline(always)]
    unsafe fn fill(&mut self) {
        let shape = Self::SHAPE;
        let lane = self.place.lane;
        let stream = self.arguments.weights.stream;
        let units = self.units;
        // SAFETY: the stage has room for all of it; the units and the bricks exist.
        unsafe {
            let to = self.fill + lane * 16;
            seq!(UNIT in 0..8 {
                if UNIT < UNITS {
                    copy::copy_16_if(
                        UNIT < units,
                        to + UNIT * UNIT_CODE_BYTES,
                        self.source + self.codes[UNIT] as u64,
                    );
                }
            });
            if shape.stage_bricks == 2 {
                seq!(UNIT in 0..8 {
                    if UNIT < UNITS {
                        copy::copy_16_if(
                            UNIT < units,
                            to + (UNIT + UNITS as u32) * UNIT_CODE_BYTES,
                            self.source + self.codes[UNIT] as u64 + CODE_BYTES as u64,
                        );
                    }
                });
            }
            let (unit, brick) = (lane / 2 % UNITS as u32, lane / 2 / UNITS as u32);
            let has_pairs = brick < shape.stage_bricks && unit < units;
            let pairs = self.source.wrapping_add_signed(self.pairs as i64);
            copy::copy_16_if(has_pairs, to + shape.pairs_offset(), pairs);
        }
        copy::end_group();
        self.fill = self.next(self.fill);
        // The warp's next step, or the rest of this one.
        const { assert!(STEP_BRICKS == SPAN_BRICKS) };
        let next_step = WARPS * stream.span_bytes;
        let (bricks, bytes, pairs) = if shape.stage_bricks == STEP_BRICKS {
            (WARPS * STEP_BRICKS, next_step, 0)
        } else if self.brick.is_multiple_of(STEP_BRICKS) {
            (1, CODE_BYTES as u32, stream.second_pairs.cast_signed() - CODE_BYTES as i32)
        } else {
            let pairs = CODE_BYTES as i32 - stream.second_pairs.cast_signed();
            ((WARPS - 1) * STEP_BRICKS + 1, next_step - CODE_BYTES as u32, pairs)
        };
        self.brick += bricks;
        self.source += bytes as u64;
        self.pairs += if stream.channel_pairs > 0 { -bytes.cast_signed() } else { pairs };
        let is_over = self.brick >= stream.spans * STEP_BRICKS;
        if is_over && self.units > 0 {
            self.first_unit += self.units;
            self.begin_pass();
        }
    }

    /// The stage behind the one at `stage`.
    #[inline(always)]
    fn next(&self, stage: u32) -> u32 {
        let next = stage + Self::SHAPE.weight_stage_bytes();
        let start = self.place.weights(Self::SHAPE);
        if next == start + Self::SHAPE.weight_ring_bytes() { start } else { next }
    }
}

/// A warp's ring of activations.
struct ActivationRing<const GROUPS: usize, const STAGES: u32> {
    map: *const TensorMap,
    /// Tokens of a stage that are loaded: all there are. What lies behind them reaches no result.
    tokens: u32,
    shape: SkinnyShape,
    place: Place,
    steps: u32,
    /// The step to ask for next, and the stage that it goes to.
    step: u32,
    fill: RingCursor<STAGES>,
    /// The stage to multiply next.
    full: RingCursor<STAGES>,
}

impl<const GROUPS: usize, const STAGES: u32> ActivationRing<GROUPS, STAGES> {
    #[inline(always)]
    fn new(
        map: *const TensorMap,
        arguments: &SkinnyArguments,
        shape: SkinnyShape,
        place: Place,
        steps: u32,
    ) -> Self {
        let start = RingCursor::start();
        Self { map, tokens: arguments.m, shape, place, steps, step: steps, fill: start, full: start }
    }

    /// Asks for a pass's first steps, all but one stage of them.
    ///
    /// # Safety
    /// The ring is empty, and its memory free for the copy engine.
    #[inline(always)]
    unsafe fn begin_pass(&mut self) {
        self.step = self.place.warp;
        for _ in 0..STAGES - 1 {
            // SAFETY: the caller vouches for the ring.
            unsafe { self.fill() };
        }
    }

    /// Asks for the next step of the pass, if there is one.
    ///
    /// # Safety
    /// All lanes are done with what the stage held.
    #[inline(always)]
    unsafe fn fill(&mut self) {
        if self.step < self.steps {
            let stage = self.fill.stage();
            let barrier = self.place.barrier(self.shape, stage);
            let to = self.place.activations(self.shape) + stage * self.shape.activation_stage_bytes();
            // SAFETY: the stage holds the box; the warp is whole.
            unsafe {
                mbarrier::arrive_expect(barrier, self.tokens * STEP_K);
                tma::load_2d(to, self.map, self.step * STEP_K, 0, barrier);
            }
            self.fill = self.fill.next();
            self.step += WARPS;
        }
    }
}

/// Multiplies the next step of both rings, after asking for what takes the place of the last one.
///
/// # Safety
/// The whole warp calls it; both rings have the step or will have.
#[inline(always)]
unsafe fn multiply_step<const UNITS: usize, const GROUPS: usize, const STAGES: u32, const PENDING: u32>(
    sums: &mut Sums<UNITS, GROUPS>,
    weights: &mut WeightRing<'_, UNITS, GROUPS>,
    activations: &mut ActivationRing<GROUPS, STAGES>,
) {
    let (shape, place) = (activations.shape, weights.place);
    let lane = place.lane;
    let stage = activations.full.stage();
    // Lane 8·i + t gives the address of 16 bytes of token t: piece i of a brick's four, which swizzle has exchanged.
    let row = place.activations(shape)
        + stage * shape.activation_stage_bytes()
        + lane % 8 * STEP_K
        + (lane / 8 ^ lane % 8) * 16;
    seq!(BRICK in 0..2 {
        // SAFETY: after the warp's barrier all lanes are done with the stages before, and see one another's copies.
        unsafe {
            if BRICK % shape.stage_bricks == 0 {
                copy::await_groups::<PENDING>();
                warp::sync_warp();
                weights.refill();
            }
            if BRICK == 0 {
                activations.fill();
                mbarrier::wait(place.barrier(shape, stage), activations.full.full_parity());
                activations.full = activations.full.next();
            }
            let mut tokens = [[0; 4]; GROUPS];
            seq!(GROUP in 0..4 {
                if GROUP < GROUPS {
                    tokens[GROUP] = matrix::load_x4((row + GROUP * GROUP_TOKENS * STEP_K) ^ BRICK * 64);
                }
            });
            let codes = weights.full + lane * 16;
            let pairs = weights.full + shape.pairs_offset() + lane / 4 * 4;
            seq!(UNIT in 0..8 {
                if UNIT < UNITS {
                    let index = BRICK % shape.stage_bricks * UNITS as u32 + UNIT;
                    let share = BrickShare::load_from(
                        codes + index * UNIT_CODE_BYTES,
                        pairs + index * UNIT_PAIR_BYTES,
                    );
                    let first = share.operand_by::<0>(multiply_add_flip);
                    let second = share.operand_by::<1>(multiply_add_flip);
                    seq!(GROUP in 0..4 {
                        if GROUP < GROUPS {
                            let [b0, b1, b2, b3] = tokens[GROUP];
                            mma::multiply_accumulate(&mut sums[UNIT][GROUP], first, [b0, b1]);
                            mma::multiply_accumulate(&mut sums[UNIT][GROUP], second, [b2, b3]);
                        }
                    });
                }
            });
            if (BRICK + 1) % shape.stage_bricks == 0 {
                weights.full = weights.next(weights.full);
            }
        }
    });
}

/// One thread's part of a pass's scales and bias, on its way from global to shared memory: asked for before the steps, so
/// that it arrives during them.
#[derive(Clone, Copy)]
struct Scales {
    token: f32,
    channel: f32,
    bias: f32,
}

impl Scales {
    /// Asks for the scales of the pass that begins with `first_unit`.
    ///
    /// # Safety
    /// The arguments describe valid memory.
    #[inline(always)]
    unsafe fn fetch(arguments: &SkinnyArguments, shape: SkinnyShape, first_unit: u32) -> Self {
        let thread = thread::thread_idx_x();
        let channel = first_unit * UNIT_CHANNELS + thread;
        let n = if thread < shape.channels() { arguments.n } else { 0 };
        let m = if thread < shape.tokens { arguments.m } else { 0 };
        // SAFETY: the arrays have m, n and n elements.
        unsafe {
            Self {
                token: element(arguments.token_scales, thread, m, 0.0),
                channel: element(arguments.weights.channel_scales, channel, n, 0.0),
                bias: element(arguments.bias, channel, n, NO_BIAS),
            }
        }
    }

    /// Puts them where the block can read them after a barrier.
    ///
    /// # Safety
    /// No thread still reads those of another pass.
    #[inline(always)]
    unsafe fn park(self, shape: SkinnyShape, place: Place) {
        let thread = place.thread();
        // SAFETY: there is a place for each token and channel.
        unsafe {
            if thread < shape.tokens {
                store_shared_f32(place.shared + shape.token_scales_offset() + thread * 4, self.token);
            }
            if thread < shape.channels() {
                let channel = place.shared + shape.channels_offset() + thread * 8;
                store_shared_f32(channel, self.channel);
                store_shared_f32(channel + 4, self.bias);
            }
        }
    }
}

/// Adds up the sums of the block's warps, scales and stores them, for a pass of `units` from `first_unit` on.
///
/// # Safety
/// The whole block calls it; the rings of activations are empty, and the scales are parked.
#[inline(always)]
unsafe fn finish<const UNITS: usize, const GROUPS: usize>(
    sums: &Sums<UNITS, GROUPS>,
    arguments: &SkinnyArguments,
    place: Place,
    first_unit: u32,
    units: u32,
) {
    let shape = const { shape(UNITS, GROUPS) };
    // In `mma`'s order a lane has row g, then g + 8, at tokens 2·c and 2·c + 1.
    let own = place.activations(shape) + place.lane % 4 * 2 * SUMS_TOKEN_BYTES + place.lane / 4 * 4;
    // All lanes are done with the ring.
    warp::sync_warp();
    seq!(ROUND in 0..8 {
        if ROUND * shape.sum_units() < shape.units {
            // SAFETY: the ring has room for this many units; a barrier lies between all writes and reads.
            unsafe {
                seq!(UNIT in 0..8 {
                    if UNIT < UNITS && UNIT / shape.sum_units() == ROUND {
                        seq!(GROUP in 0..4 {
                            if GROUP < GROUPS {
                                let block = UNIT % shape.sum_units() * GROUPS as u32 + GROUP;
                                let to = own + block * SUMS_BYTES;
                                let [upper, upper_next, lower, lower_next] = sums[UNIT][GROUP];
                                store_shared(to, upper.cast_unsigned());
                                store_shared(to + SUMS_TOKEN_BYTES, upper_next.cast_unsigned());
                                store_shared(to + 8 * 4, lower.cast_unsigned());
                                store_shared(to + 8 * 4 + SUMS_TOKEN_BYTES, lower_next.cast_unsigned());
                            }
                        });
                    }
                });
                thread::sync_threads();
                let done = ROUND * shape.sum_units();
                let first_unit = first_unit + done;
                let units = units.saturating_sub(done).min(shape.sum_units());
                let mut block = place.warp;
                while block < units * GROUPS as u32 {
                    finish_block::<GROUPS>(arguments, shape, place, [first_unit, done], block);
                    block += WARPS;
                }
                // The copy engine may write here next.
                mbarrier::fence_async();
            }
            thread::sync_threads();
        }
    });
}

/// Adds up, scales and stores 16 channels × 8 tokens: a lane has four channels of a token.
///
/// # Safety
/// The whole warp calls it; the sums of all warps are there.
#[inline(always)]
unsafe fn finish_block<const GROUPS: usize>(
    arguments: &SkinnyArguments,
    shape: SkinnyShape,
    place: Place,
    [first_unit, units_done]: [u32; 2],
    block: u32,
) {
    let (unit, group) = (block / GROUPS as u32, block % GROUPS as u32);
    // Tokens t and t + 4 side by side: their rows lie in different banks.
    let row = place.lane / 8 + place.lane / 4 % 2 * 4;
    let quad = place.lane % 4;
    let token = group * GROUP_TOKENS + row;
    let from = place.shared + block * SUMS_BYTES + row * SUMS_TOKEN_BYTES + quad * 16;
    const { assert!(WARPS == 8) };
    let mut sums = [0u32; 4];
    seq!(WARP in 0..8 {
        // SAFETY: each warp's sums lie in its ring.
        let more = unsafe { load_shared_x4(from + WARP * shape.activation_ring_bytes()) };
        seq!(I in 0..4 { sums[I] = sums[I].wrapping_add(more[I]); });
    });
    if token >= arguments.m {
        return;
    }
    let channel = (first_unit + unit) * UNIT_CHANNELS + quad * 4;
    let index = token as u64 * arguments.output_stride as u64 + channel as u64;
    let channels =
        place.shared + shape.channels_offset() + ((units_done + unit) * UNIT_CHANNELS + quad * 4) * 8;
    let results = Results { channel, n: arguments.n };
    // SAFETY: the scales are parked; the output has the element at `index`, and so many more as the row goes on.
    unsafe {
        if arguments.output_type == output_type::I32 {
            results.store_words(arguments.output + index * 4, sums);
            return;
        }
        let token_scale = load_shared_f32(place.shared + shape.token_scales_offset() + token * 4);
        let [scale0, bias0, scale1, bias1] = load_shared_x4(channels).map(f32::from_bits);
        let [scale2, bias2, scale3, bias3] = load_shared_x4(channels + 16).map(f32::from_bits);
        let value = |sum: u32, channel_scale: f32, bias: f32| {
            add_bias(scale(sum.cast_signed(), channel_scale, token_scale), bias)
        };
        let values = [
            value(sums[0], scale0, bias0),
            value(sums[1], scale1, bias1),
            value(sums[2], scale2, bias2),
            value(sums[3], scale3, bias3),
        ];
        let [a, b, c, d] = values;
        match arguments.output_type {
            output_type::BF16 => {
                results.store_halves(arguments.output + index * 2, [pack_bf16(a, b), pack_bf16(c, d)]);
            }
            output_type::F16 => {
                results.store_halves(arguments.output + index * 2, [pack_f16(a, b), pack_f16(c, d)]);
            }
            _ => results.store_words(arguments.output + index * 4, values.map(f32::to_bits)),
        }
    }
}

/// Where four neighbouring results of a token belong in its row.
#[derive(Clone, Copy)]
struct Results {
    channel: u32,
    n: u32,
}

impl Results {
    /// Stores four elements of 4 bytes, as far as the row goes.
    ///
    /// # Safety
    /// The row goes on at `address`.
    #[inline(always)]
    unsafe fn store_words(self, address: u64, words: [u32; 4]) {
        // SAFETY: only what lies in the row is stored, and 16 bytes at once only where they are aligned.
        unsafe {
            if self.channel + 4 <= self.n && address.is_multiple_of(16) {
                store_global_x4(address, words);
            } else {
                seq!(I in 0..4 {
                    if self.channel + I < self.n {
                        store_global(address + I * 4, words[I]);
                    }
                });
            }
        }
    }

    /// Stores four elements of 2 bytes, as far as the row goes.
    ///
    /// # Safety
    /// The row goes on at `address`.
    #[inline(always)]
    unsafe fn store_halves(self, address: u64, pairs: [u32; 2]) {
        // SAFETY: only what lies in the row is stored, and 8 bytes at once only where they are aligned.
        unsafe {
            if self.channel + 4 <= self.n && address.is_multiple_of(8) {
                store_global_x2(address, pairs);
            } else {
                let halves = [pairs[0], pairs[0] >> 16, pairs[1], pairs[1] >> 16];
                seq!(I in 0..4 {
                    if self.channel + I < self.n {
                        store_global_u16(address + I * 2, halves[I]);
                    }
                });
            }
        }
    }
}
