//! The main loop of a warp, which multiplies one K-tile of its m16 tiles and all tokens at a time.
//!
//! It reads the rings of `weights.rs` and `activations.rs`, and refills their stages.

use cuda_std::warp;
use liquidgemm_format::dequant::multiply_add_flip;
use liquidgemm_format::skinny::{GROUP_TOKENS, M16_CODE_BYTES, M16_PAIR_BYTES};
use liquidgemm_format::tile::K_TILE;
use seq_macro::seq;

use super::Sums;
use super::activations::ActivationRing;
use super::weights::WeightRing;
use crate::dequant::AFragment;
use crate::ptx::{copy, matrix, mbarrier, mma};

/// Multiplies the next K-tile of both rings.
///
/// Before that it starts the loads into the stages that were multiplied last.
///
/// # Safety
/// The whole warp calls it; the loads of the K-tile have been started in both rings.
#[inline(always)]
pub(super) unsafe fn multiply_k_tile<
    const M16_TILES: usize,
    const GROUPS: usize,
    const STAGES: u32,
    const PENDING: u32,
>(
    sums: &mut Sums<M16_TILES, GROUPS>,
    weights: &mut WeightRing<'_, M16_TILES, GROUPS>,
    activations: &mut ActivationRing<GROUPS, STAGES>,
) {
    let (shape, place) = (activations.shape, weights.place);
    let lane = place.lane;
    let stage = activations.full.stage();
    // Lane 8·i + t gives the address of 16 bytes of token t: piece i of a brick's four.
    // The swizzle XORs the piece's index with t.
    let row = place.activations(shape)
        + stage * shape.activation_stage_bytes()
        + lane % 8 * K_TILE
        + (lane / 8 ^ lane % 8) * 16;
    seq!(BRICK in 0..2 {
        // SAFETY: after the warp's barrier no lane still reads the stages before,
        // and all lanes see one another's copies.
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
                    tokens[GROUP] = matrix::load_x4((row + GROUP * GROUP_TOKENS * K_TILE) ^ BRICK * 64);
                }
            });
            let codes = weights.full + lane * 16;
            let pairs = weights.full + shape.pairs_offset() + lane / 4 * 4;
            seq!(M16_TILE in 0..8 {
                if M16_TILE < M16_TILES {
                    let index = BRICK % shape.stage_bricks * M16_TILES as u32 + M16_TILE;
                    let share = AFragment::load_from(
                        codes + index * M16_CODE_BYTES,
                        pairs + index * M16_PAIR_BYTES,
                    );
                    let first = share.operand_by::<0>(multiply_add_flip);
                    let second = share.operand_by::<1>(multiply_add_flip);
                    seq!(GROUP in 0..4 {
                        if GROUP < GROUPS {
                            let [b0, b1, b2, b3] = tokens[GROUP];
                            mma::multiply_accumulate(&mut sums[M16_TILE][GROUP], first, [b0, b1]);
                            mma::multiply_accumulate(&mut sums[M16_TILE][GROUP], second, [b2, b3]);
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
