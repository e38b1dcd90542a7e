//! Compares the GPU's grouped GEMM and its combine with the CPU's, bit for bit:
//! tile shapes, clusters, layouts of rows, output types, and rows that change between replays of a graph.
//!
//! `harness/grouped.rs` makes the problems and checks the outputs.

use cust::memory::{CopyDestination, DeviceBuffer};
use half::{bf16, f16};
use libtest_mimic::Failed;
use liquidgemm::gpu::{CombineOperands, DeviceRowIndex, DeviceSpan, Gpu, GroupedOperands};
use liquidgemm::{GROUPED_SHAPES, GroupedPlan, OutputType, cpu};
use liquidgemm_gpu_tests::graph::Graph;
use liquidgemm_gpu_tests::grouped::{GroupedFixture, Index, random_counts};
use liquidgemm_gpu_tests::{Session, Test, expect_values, refill, rng, run, to_device};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

const TESTS: [Test; 15] = [
    ("small_problems_equal_the_cpu_for_every_tile", small_problems_equal_the_cpu_for_every_tile),
    ("every_row_count_equals_the_cpu_for_every_tile", every_row_count_equals_the_cpu_for_every_tile),
    ("every_output_type_equals_the_cpu_for_every_tile", every_output_type_equals_the_cpu_for_every_tile),
    ("clusters_with_many_tiles_equal_the_cpu", clusters_with_many_tiles_equal_the_cpu),
    ("many_experts_equal_the_cpu", many_experts_equal_the_cpu),
    ("all_rows_on_one_expert_equal_the_cpu", all_rows_on_one_expert_equal_the_cpu),
    ("masked_rows_equal_the_cpu", masked_rows_equal_the_cpu),
    (
        "counts_above_the_capacity_are_limited_and_reported",
        counts_above_the_capacity_are_limited_and_reported,
    ),
    (
        "bad_offsets_write_nothing_outside_and_are_reported",
        bad_offsets_write_nothing_outside_and_are_reported,
    ),
    ("the_longest_k_equals_the_cpu", the_longest_k_equals_the_cpu),
    (
        "random_problems_with_the_library_s_plan_equal_the_cpu",
        random_problems_with_the_library_s_plan_equal_the_cpu,
    ),
    ("a_captured_gemm_replays_with_offsets_that_changed", a_captured_gemm_replays_with_offsets_that_changed),
    ("a_combine_equals_the_cpu", a_combine_equals_the_cpu),
    (
        "a_combine_sees_what_the_grouped_gemm_before_it_wrote",
        a_combine_sees_what_the_grouped_gemm_before_it_wrote,
    ),
    ("calls_that_do_not_fit_are_refused", calls_that_do_not_fit_are_refused),
];

fn main() {
    run(&TESTS).exit();
}

fn small_problems_equal_the_cpu_for_every_tile(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(101);
    let session = Session::new(gpu)?;
    for shape in GROUPED_SHAPES {
        for (experts, [rows, n, k]) in [
            (1, [1, 1, 1]),
            (1, [40, 200, 1000]),
            (2, [3, 5, 64]),
            (3, [9, 64, 128]),
            (8, [17, 129, 100]),
            (8, [300, 300, 448]),
        ] {
            let fixture = GroupedFixture::random(gpu, &mut rng, experts, [rows, n, k])?;
            for (cluster_size, clusters) in [(1, 4), (2, 2), (1, 1), (2, 5)] {
                let index = Index::of_counts(&random_counts(&mut rng, experts, rows));
                let plan = GroupedPlan::with_config(fixture.problem(&index), shape, cluster_size, clusters)?;
                fixture.check_type(gpu, &session, &plan, &index, OutputType::I32, false, 0)?;
                fixture.check_type(gpu, &session, &plan, &index, OutputType::Bf16, true, 0)?;
            }
        }
    }
    Ok(())
}

/// Gives one of three experts every number of rows up to one tile and a little more.
///
/// So every n of the instructions runs with every number of missing rows, and every box is loaded.
fn every_row_count_equals_the_cpu_for_every_tile(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(102);
    let session = Session::new(gpu)?;
    for shape in GROUPED_SHAPES {
        let most = shape.tokens as usize + 9;
        for cluster_size in [1, 2] {
            let (n, k) = (rng.random_range(129..400), rng.random_range(1..700));
            let fixture = GroupedFixture::random(gpu, &mut rng, 3, [most + 8, n, k])?;
            for count in 1..=most {
                let index = Index::of_counts(&[count % 5, count, count % 3]);
                let plan = GroupedPlan::with_config(fixture.problem(&index), shape, cluster_size, 3)?;
                let output_type = if count % 2 == 0 { OutputType::I32 } else { OutputType::Bf16 };
                let padding = n.next_multiple_of(8) - n;
                fixture.check_type(gpu, &session, &plan, &index, output_type, true, padding)?;
            }
        }
    }
    Ok(())
}

fn every_output_type_equals_the_cpu_for_every_tile(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(103);
    let session = Session::new(gpu)?;
    for shape in GROUPED_SHAPES {
        for [rows, n, k] in [[600, 264, 448], [77, 1000, 1024]] {
            let fixture = GroupedFixture::random(gpu, &mut rng, 4, [rows, n, k])?;
            let index = Index::of_counts(&random_counts(&mut rng, 4, rows));
            for cluster_size in [1, 2] {
                let plan = GroupedPlan::with_config(fixture.problem(&index), shape, cluster_size, 7)?;
                for output_type in OutputType::ALL {
                    for bias in [false, true] {
                        // Rows that are aligned to 16 bytes, and rows that are not.
                        for padding in [0, 8, 3] {
                            fixture.check_type(gpu, &session, &plan, &index, output_type, bias, padding)?;
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// Few k-iterations a tile, so that the end of one tile overlaps the start of the next.
fn clusters_with_many_tiles_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(104);
    let session = Session::new(gpu)?;
    for shape in GROUPED_SHAPES {
        for k in [64, 448, 1500] {
            let tokens = shape.tokens as usize;
            let counts = [tokens, 3, 0, 2 * tokens + 5, 1, tokens / 2, tokens + 1, 9];
            let fixture =
                GroupedFixture::random(gpu, &mut rng, counts.len(), [counts.iter().sum(), 1024, k])?;
            let index = Index::of_counts(&counts);
            for cluster_size in [1, 2] {
                for clusters in [1, 2, 5, gpu.multiprocessors() / cluster_size] {
                    let plan =
                        GroupedPlan::with_config(fixture.problem(&index), shape, cluster_size, clusters)?;
                    for output_type in [OutputType::Bf16, OutputType::F32] {
                        fixture.check_type(gpu, &session, &plan, &index, output_type, rng.random(), 0)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn many_experts_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(105);
    let session = Session::new(gpu)?;
    // Around the 32 experts that a warp counts at a time, and the most that there can be.
    for experts in [31, 32, 33, 64, 128, 320, 511, 512] {
        let (n, k) = (rng.random_range(1..300), rng.random_range(1..400));
        for rows in [1, 8, 200, 3000] {
            let fixture = GroupedFixture::random(gpu, &mut rng, experts, [rows, n, k])?;
            for shape in GROUPED_SHAPES {
                let index = Index::of_counts(&random_counts(&mut rng, experts, rows));
                let cluster_size = rng.random_range(1..=2);
                let clusters = gpu.multiprocessors() / cluster_size;
                let plan = GroupedPlan::with_config(fixture.problem(&index), shape, cluster_size, clusters)?;
                fixture.check_type(gpu, &session, &plan, &index, OutputType::I32, false, 0)?;
            }
        }
    }
    Ok(())
}

fn all_rows_on_one_expert_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(106);
    let session = Session::new(gpu)?;
    let (experts, rows, n, k) = (40, 530, 520, 640);
    let fixture = GroupedFixture::random(gpu, &mut rng, experts, [rows, n, k])?;
    for shape in GROUPED_SHAPES {
        for expert in [0, 17, experts - 1] {
            let mut counts = vec![0; experts];
            counts[expert] = rows;
            // Some rows before and behind the expert's own belong to nobody.
            let Index::Offsets(mut offsets) = Index::of_counts(&counts) else { unreachable!() };
            for offset in &mut offsets {
                *offset = (*offset).clamp(2, rows as i32 - 3);
            }
            let index = Index::Offsets(offsets);
            for cluster_size in [1, 2] {
                let clusters = gpu.multiprocessors() / cluster_size;
                let plan = GroupedPlan::with_config(fixture.problem(&index), shape, cluster_size, clusters)?;
                fixture.check_type(gpu, &session, &plan, &index, OutputType::Bf16, true, 0)?;
            }
        }
        // No expert has a row.
        let index = Index::Offsets(vec![5; experts + 1]);
        let plan = GroupedPlan::with_config(fixture.problem(&index), shape, 1, 132)?;
        fixture.check_type(gpu, &session, &plan, &index, OutputType::Bf16, true, 0)?;
    }
    Ok(())
}

fn masked_rows_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(107);
    let session = Session::new(gpu)?;
    for (experts, capacity) in [(1, 1), (3, 7), (8, 64), (33, 40), (5, 300), (512, 4)] {
        let (n, k) = (rng.random_range(1..400), rng.random_range(1..600));
        let fixture = GroupedFixture::random(gpu, &mut rng, experts, [experts * capacity, n, k])?;
        for shape in GROUPED_SHAPES {
            let mut counts: Vec<i32> = (0..experts).map(|_| rng.random_range(0..=capacity as i32)).collect();
            counts[rng.random_range(0..experts)] = capacity as i32;
            let index = Index::Counts(counts, capacity);
            let cluster_size = rng.random_range(1..=2);
            let plan = GroupedPlan::with_config(fixture.problem(&index), shape, cluster_size, 9)?;
            fixture.check_type(gpu, &session, &plan, &index, OutputType::Bf16, true, 0)?;
            fixture.check_type(gpu, &session, &plan, &index, OutputType::I32, false, 0)?;
        }
    }
    Ok(())
}

fn counts_above_the_capacity_are_limited_and_reported(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(108);
    let session = Session::new(gpu)?;
    let (experts, capacity) = (6, 20);
    let fixture = GroupedFixture::random(gpu, &mut rng, experts, [experts * capacity, 200, 300])?;
    for shape in GROUPED_SHAPES {
        for bad in [capacity as i32 + 1, i32::MAX, -1, i32::MIN] {
            for place in [0, 3, experts - 1] {
                let mut counts = vec![7, 20, 0, 13, 1, 20];
                counts[place] = bad;
                let index = Index::Counts(counts, capacity);
                let plan = GroupedPlan::with_config(fixture.problem(&index), shape, 2, 5)?;
                fixture.check_type(gpu, &session, &plan, &index, OutputType::Bf16, false, 0)?;
            }
        }
    }
    Ok(())
}

fn bad_offsets_write_nothing_outside_and_are_reported(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(109);
    let session = Session::new(gpu)?;
    let (experts, rows) = (40, 150);
    let fixture = GroupedFixture::random(gpu, &mut rng, experts, [rows, 200, 300])?;
    for shape in GROUPED_SHAPES {
        for round in 0..12 {
            let Index::Offsets(mut offsets) = Index::of_counts(&random_counts(&mut rng, experts, rows))
            else {
                unreachable!()
            };
            for _ in 0..=round {
                let place = rng.random_range(0..=experts);
                offsets[place] = match round % 3 {
                    0 => rng.random_range(-5..rows as i32 + 200),
                    1 => rng.random(),
                    _ => *[i32::MIN, -1, i32::MAX, rows as i32 + 1].choose(&mut rng).unwrap_or(&-1),
                };
            }
            let index = Index::Offsets(offsets);
            let plan = GroupedPlan::with_config(fixture.problem(&index), shape, 1 + round % 2, 40)?;
            fixture.check_type(gpu, &session, &plan, &index, OutputType::Bf16, false, 0)?;
        }
    }
    Ok(())
}

fn the_longest_k_equals_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(110);
    let session = Session::new(gpu)?;
    let fixture = GroupedFixture::random(gpu, &mut rng, 2, [70, 130, 131_072])?;
    for shape in GROUPED_SHAPES {
        let index = Index::of_counts(&[69, 1]);
        let plan = GroupedPlan::with_config(fixture.problem(&index), shape, 2, 2)?;
        fixture.check_type(gpu, &session, &plan, &index, OutputType::I32, false, 0)?;
    }
    Ok(())
}

/// Calls the library without a plan, as most callers do.
fn random_problems_with_the_library_s_plan_equal_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(111);
    let session = Session::new(gpu)?;
    for round in 0..40 {
        let experts = *[1, 2, 8, 16, 128].choose(&mut rng).unwrap_or(&8);
        let pick = |rng: &mut StdRng, of: &[usize]| *of.choose(rng).unwrap_or(&64);
        let mean = pick(&mut rng, &[1, 3, 16, 40, 70, 130, 200, 256]);
        let (n, k) = (pick(&mut rng, &[1, 64, 200, 256, 1024]), pick(&mut rng, &[1, 65, 128, 512, 1000]));
        if experts * mean * n * k > 2_000_000_000 {
            continue;
        }
        let rows = experts * mean;
        let fixture = GroupedFixture::random(gpu, &mut rng, experts, [rows, n, k])?;
        let index = Index::of_counts(&random_counts(&mut rng, experts, rows));
        let plan = gpu.grouped_plan(fixture.problem(&index), rows)?;
        let output_type = OutputType::ALL[round % OutputType::ALL.len()];
        fixture.check_type(gpu, &session, &plan, &index, output_type, rng.random(), 0)?;
        // The call without a plan takes the same one.
        let output = to_device(&vec![0xA5u8; rows * n * 4])?;
        let device_index = to_device(index.values())?;
        let operands = fixture.operands(&index, &device_index, (&output).into(), n, OutputType::F32, false);
        // SAFETY: all operands stay alive until the stream has been synchronized.
        unsafe { gpu.grouped_gemm(&fixture.device_experts, &operands, &session.stream) }?;
        session.stream.synchronize()?;
        let (expected, _) = fixture.expected::<f32>(&index, false)?;
        let expected: Vec<f32> = expected.into_iter().flatten().flatten().collect();
        expect_values(&output, &expected, || fixture.problem(&index).to_string())?;
    }
    Ok(())
}

fn a_captured_gemm_replays_with_offsets_that_changed(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(112);
    let session = Session::new(gpu)?;
    gpu.prepare_grouped()?;
    for (experts, [rows, n, k]) in [(64, [64, 256, 512]), (8, [900, 384, 300]), (4, [1500, 256, 256])] {
        let fixture = GroupedFixture::random(gpu, &mut rng, experts, [rows, n, k])?;
        let mut index = Index::of_counts(&random_counts(&mut rng, experts, rows));
        let mut device_index = to_device(index.values())?;
        let output = to_device(&vec![0xA5u8; rows * n * 4])?;
        let operands = fixture.operands(&index, &device_index, (&output).into(), n, OutputType::F32, true);
        let graph = Graph::capture(&session.stream, || {
            // Twice, so that the second launch begins while the first one still runs.
            for _ in 0..2 {
                // SAFETY: the operands outlive the graph.
                unsafe { gpu.grouped_gemm(&fixture.device_experts, &operands, &session.stream) }?;
            }
            Ok(())
        })?;
        for replay in 0..6 {
            index = Index::of_counts(&random_counts(&mut rng, experts, rows));
            refill(&mut device_index, index.values())?;
            // SAFETY: all memory that the graph uses is alive.
            unsafe { graph.replay(&session.stream) }?;
            let (expected, _) = fixture.expected::<f32>(&index, true)?;
            let expected: Vec<f32> = expected.into_iter().flatten().flatten().collect();
            expect_values(&output, &expected, || format!("replay {replay}: {}", fixture.problem(&index)))?;
        }
    }
    Ok(())
}

/// Rows, choices and output of a combine on the device.
struct Choices {
    positions: Vec<i32>,
    weights: Vec<f32>,
    device_positions: DeviceBuffer<i32>,
    device_weights: DeviceBuffer<f32>,
}

impl Choices {
    /// Returns random choices among `rows` rows; some are outside.
    fn random(rng: &mut StdRng, tokens: usize, top_k: usize, rows: usize) -> Result<Self, Failed> {
        let outside = [-1, -1, i32::MIN, rows as i32, i32::MAX];
        let positions: Vec<i32> = (0..tokens * top_k)
            .map(|_| {
                if rows == 0 || rng.random_range(0..8) == 0 {
                    outside[rng.random_range(0..outside.len())]
                } else {
                    rng.random_range(0..rows as i32)
                }
            })
            .collect();
        let weights: Vec<f32> = (0..tokens * top_k).map(|_| rng.random_range(-2.0..2.0f32)).collect();
        Ok(Self {
            device_positions: to_device(&positions)?,
            device_weights: to_device(&weights)?,
            positions,
            weights,
        })
    }
}

fn a_combine_equals_the_cpu(gpu: &'static Gpu) -> Result<(), Failed> {
    combine_equals_the_cpu::<bf16>(gpu, bf16::from_f32)?;
    combine_equals_the_cpu::<f16>(gpu, f16::from_f32)
}

fn combine_equals_the_cpu<T: cpu::Combined>(gpu: &Gpu, of: fn(f32) -> T) -> Result<(), Failed> {
    const POISON: u8 = 0xA5;
    let mut rng = rng(113);
    let session = Session::new(gpu)?;
    for top_k in [1, 2, 3, 4, 5, 8, 9] {
        for (tokens, n) in [(1, 1), (3, 8), (2, 1000), (5, 1024), (4, 1027), (17, 2048), (2, 7168)] {
            for padding in [0, 8, 3] {
                let row_count = rng.random_range(1..40);
                let stride = n + padding;
                let rows: Vec<T> =
                    (0..row_count * n).map(|_| of(rng.random_range(-100.0..100.0f32))).collect();
                let mut padded = vec![of(f32::NAN); row_count * stride];
                for (to, row) in padded.chunks_exact_mut(stride).zip(rows.chunks_exact(n)) {
                    to[..n].copy_from_slice(row);
                }
                let device_rows = to_device(bytemuck::cast_slice::<T, u16>(&padded))?;
                let choices = Choices::random(&mut rng, tokens, top_k, row_count)?;
                let output = to_device(&vec![POISON; tokens * stride * 2])?;
                let operands = CombineOperands {
                    tokens,
                    top_k,
                    row_count,
                    n,
                    element_type: T::TYPE,
                    rows: (&device_rows).into(),
                    rows_stride: stride,
                    positions: (&choices.device_positions).into(),
                    weights: (&choices.device_weights).into(),
                    output: (&output).into(),
                    output_stride: stride,
                };
                // SAFETY: all operands stay alive until the stream has been synchronized.
                unsafe { gpu.combine(&operands, &session.stream) }?;
                session.stream.synchronize()?;
                let mut expected = vec![of(0.0); tokens * n];
                cpu::combine(&rows, &choices.positions, &choices.weights, [n, top_k], &mut expected)?;
                let mut bytes = vec![0; tokens * stride * 2];
                output.copy_to(&mut bytes[..])?;
                for (token, expected) in expected.chunks_exact(n).enumerate() {
                    let (found, gap) = bytes[token * stride * 2..][..stride * 2].split_at(n * 2);
                    if found != bytemuck::cast_slice::<T, u8>(expected) {
                        return Err(format!(
                            "token {token} of {tokens}, n = {n}, {top_k} choices, {}",
                            T::TYPE
                        )
                        .into());
                    }
                    if gap.iter().any(|&byte| byte != POISON) {
                        return Err(format!("wrote between rows, after token {token}, n = {n}").into());
                    }
                }
            }
        }
    }
    Ok(())
}

fn a_combine_sees_what_the_grouped_gemm_before_it_wrote(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(114);
    let session = Session::new(gpu)?;
    gpu.prepare_grouped()?;
    let (experts, top_k) = (16, 4);
    for [tokens, n, k] in [[5, 512, 256], [300, 1000, 512]] {
        let rows = tokens * top_k;
        let fixture = GroupedFixture::random(gpu, &mut rng, experts, [rows, n, k])?;
        let choices = Choices::random(&mut rng, tokens, top_k, rows)?;
        let between = to_device(&vec![0u16; rows * n])?;
        let output = to_device(&vec![0xA5; tokens * n * 2])?;
        for _ in 0..5 {
            let index = Index::of_counts(&random_counts(&mut rng, experts, rows));
            let device_index = to_device(index.values())?;
            let operands =
                fixture.operands(&index, &device_index, (&between).into(), n, OutputType::Bf16, false);
            let combine = CombineOperands {
                tokens,
                top_k,
                row_count: rows,
                n,
                element_type: OutputType::Bf16,
                rows: (&between).into(),
                rows_stride: n,
                positions: (&choices.device_positions).into(),
                weights: (&choices.device_weights).into(),
                output: (&output).into(),
                output_stride: n,
            };
            // SAFETY: all operands stay alive until the stream has been synchronized.
            unsafe {
                gpu.grouped_gemm(&fixture.device_experts, &operands, &session.stream)?;
                gpu.combine(&combine, &session.stream)?;
            }
            session.stream.synchronize()?;
            let (expected, _) = fixture.expected::<bf16>(&index, false)?;
            let expected: Vec<bf16> = expected.into_iter().flatten().flatten().collect();
            let mut sums = vec![bf16::ZERO; tokens * n];
            cpu::combine(&expected, &choices.positions, &choices.weights, [n, top_k], &mut sums)?;
            expect_values(&output, &sums, || format!("{tokens} tokens, n = {n}"))?;
        }
    }
    Ok(())
}

fn calls_that_do_not_fit_are_refused(gpu: &'static Gpu) -> Result<(), Failed> {
    let mut rng = rng(115);
    let session = Session::new(gpu)?;
    let (experts, rows, n, k) = (3, 12, 64, 128);
    let fixture = GroupedFixture::random(gpu, &mut rng, experts, [rows, n, k])?;
    let index = Index::of_counts(&[4, 4, 4]);
    let device_index = to_device(index.values())?;
    let output = to_device(&vec![0xA5u8; rows * n * 4])?;
    let good = fixture.operands(&index, &device_index, (&output).into(), n, OutputType::F32, true);
    let short = |span: DeviceSpan, bytes: usize| {
        // SAFETY: the span is a part of the other one.
        unsafe { DeviceSpan::from_raw(span.address(), span.bytes() - bytes) }
    };
    let odd = |span: DeviceSpan| {
        // SAFETY: the calls are refused before they use the span.
        unsafe { DeviceSpan::from_raw(span.address() + 1, span.bytes()) }
    };
    let span = DeviceSpan::from(&device_index);
    let bad: [(&str, GroupedOperands); 12] = [
        ("short index", GroupedOperands { index: DeviceRowIndex::Offsets(short(span, 4)), ..good }),
        ("odd index", GroupedOperands { index: DeviceRowIndex::Offsets(odd(span)), ..good }),
        (
            "rows that are not experts · capacity",
            GroupedOperands { index: DeviceRowIndex::Counts { counts: span, capacity: 5 }, ..good },
        ),
        ("more rows", GroupedOperands { rows: rows + 1, ..good }),
        ("short output", GroupedOperands { output: short(good.output, 1), ..good }),
        ("short activations", GroupedOperands { activations: short(good.activations, 1), ..good }),
        ("short scales", GroupedOperands { token_scales: short(good.token_scales, 1), ..good }),
        ("short bias", GroupedOperands { bias: good.bias.map(|bias| short(bias, 1)), ..good }),
        ("short stride", GroupedOperands { activation_stride: k - 16, ..good }),
        ("short output stride", GroupedOperands { output_stride: n - 1, ..good }),
        ("a bias with int32", GroupedOperands { output_type: OutputType::I32, ..good }),
        ("short status", GroupedOperands { status: Some(short(span, span.bytes() - 2)), ..good }),
    ];
    for (name, operands) in bad {
        // SAFETY: the call is refused.
        if unsafe { gpu.grouped_gemm(&fixture.device_experts, &operands, &session.stream) }.is_ok() {
            return Err(format!("{name} is not refused").into());
        }
    }
    let other = Index::of_counts(&[rows]);
    let plan = GroupedPlan::new(
        GroupedFixture::random(gpu, &mut rng, 1, [rows, n, k])?.problem(&other),
        rows,
        gpu.figures(),
    )?;
    // SAFETY: the call is refused.
    if unsafe { gpu.grouped_gemm_with_plan(&fixture.device_experts, &good, &plan, &session.stream) }.is_ok() {
        return Err("the plan of another problem is not refused".into());
    }
    session.stream.synchronize()?;
    let mut bytes = vec![0u8; rows * n * 4];
    output.copy_to(&mut bytes[..])?;
    if bytes.iter().any(|&byte| byte != 0xA5) {
        return Err("a refused call wrote to its output".into());
    }
    // And the good ones are not refused.
    // SAFETY: all operands stay alive until the stream has been synchronized.
    unsafe { gpu.grouped_gemm(&fixture.device_experts, &good, &session.stream) }?;
    session.stream.synchronize()?;
    Ok(())
}
