//! Random grouped problems, and checks of every output byte of a grouped GEMM.
//!
//! The expected results come from the CPU's GEMM, expert by expert.

use cust::memory::{CopyDestination, DeviceBuffer};
use libtest_mimic::Failed;
use liquidgemm::gpu::{DeviceExperts, DeviceRowIndex, DeviceSpan, Gpu, GroupedOperands};
use liquidgemm::{
    ActivationsView, GroupedPlan, GroupedProblem, Output, OutputType, PackedWeights, QuantizedActivations,
    cpu,
};
use liquidgemm_format::grouped::{ExpertRows, RowLayout};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::{Session, random_activations, random_bias, random_group, random_weights_in_groups, to_device};

const POISON: u8 = 0xA5;
const GUARD: usize = 4096;

/// Which rows are whose, on the host.
#[derive(Clone, Debug)]
pub enum Index {
    /// `[experts + 1]` offsets.
    Offsets(Vec<i32>),
    /// `[experts]` counts, and the capacity.
    Counts(Vec<i32>, usize),
}

impl Index {
    /// Returns the offsets of experts with these numbers of rows.
    pub fn of_counts(counts: &[usize]) -> Self {
        let mut offsets = vec![0];
        for &count in counts {
            offsets.push(offsets[offsets.len() - 1] + count as i32);
        }
        Self::Offsets(offsets)
    }

    /// Returns the values that the device gets.
    pub fn values(&self) -> &[i32] {
        match self {
            Self::Offsets(values) | Self::Counts(values, _) => values,
        }
    }

    /// Returns the rows of each expert after limiting, as the device must compute them.
    fn limited(&self, rows: usize) -> Vec<ExpertRows> {
        match self {
            Self::Offsets(offsets) => {
                let layout = RowLayout::contiguous(offsets.len() as u32 - 1, rows as u32);
                let pairs = offsets.windows(2).enumerate();
                pairs.map(|(expert, pair)| layout.rows_of(expert as u32, pair[0], pair[1])).collect()
            }
            Self::Counts(counts, capacity) => {
                let layout = RowLayout::masked(counts.len() as u32, *capacity as u32);
                let counts = counts.iter().enumerate();
                counts.map(|(expert, &count)| layout.rows_of(expert as u32, count, 0)).collect()
            }
        }
    }
}

/// For each row, the result of each expert that has the row after limiting. Valid rows have one at the most.
pub type RowResults<T> = Vec<Vec<Vec<T>>>;

/// Experts and activations on host and device.
pub struct GroupedFixture {
    /// The experts on the host.
    pub experts: Vec<PackedWeights>,
    /// The rows of all experts on the host.
    pub activations: QuantizedActivations,
    bias: Vec<f32>,
    /// The experts on the device.
    pub device_experts: DeviceExperts,
    codes: DeviceBuffer<i8>,
    scales: DeviceBuffer<f32>,
    device_bias: DeviceBuffer<f32>,
}

impl GroupedFixture {
    /// Returns random experts `[experts, n, k]` and random activations `[rows, k]`.
    pub fn random(
        gpu: &Gpu,
        rng: &mut StdRng,
        experts: usize,
        [rows, n, k]: [usize; 3],
    ) -> Result<Self, Failed> {
        let group = random_group(rng);
        let experts: Vec<_> = (0..experts).map(|_| random_weights_in_groups(rng, n, k, group)).collect();
        let activations = random_activations(rng, rows, k);
        let bias = random_bias(rng, experts.len() * n);
        Ok(Self {
            device_experts: gpu.upload_experts(&experts)?,
            codes: to_device(activations.data())?,
            scales: to_device(activations.scales())?,
            device_bias: to_device(&bias)?,
            experts,
            activations,
            bias,
        })
    }

    /// Returns the problem of a call with this index.
    pub fn problem(&self, index: &Index) -> GroupedProblem {
        let (n, k) = (self.experts[0].n(), self.experts[0].k());
        match index {
            Index::Offsets(_) => GroupedProblem::contiguous(self.experts.len(), [self.activations.m(), n, k]),
            Index::Counts(_, capacity) => GroupedProblem::masked(self.experts.len(), [*capacity, n, k]),
        }
    }

    /// Returns the operands of a call that writes to `output` and no status.
    pub fn operands(
        &self,
        index: &Index,
        device_index: &DeviceBuffer<i32>,
        output: DeviceSpan,
        output_stride: usize,
        output_type: OutputType,
        with_bias: bool,
    ) -> GroupedOperands {
        let span = DeviceSpan::from(device_index);
        GroupedOperands {
            rows: self.activations.m(),
            index: match index {
                Index::Offsets(_) => DeviceRowIndex::Offsets(span),
                Index::Counts(_, capacity) => DeviceRowIndex::Counts { counts: span, capacity: *capacity },
            },
            expected_rows: None,
            activations: (&self.codes).into(),
            activation_stride: self.activations.stride(),
            token_scales: (&self.scales).into(),
            bias: with_bias.then(|| (&self.device_bias).into()),
            output,
            output_stride,
            output_type,
            status: None,
        }
    }

    /// Returns the results of all rows, and whether the index is valid, so that nothing is limited.
    pub fn expected<T: Output>(
        &self,
        index: &Index,
        with_bias: bool,
    ) -> Result<(RowResults<T>, bool), Failed> {
        let (n, k) = (self.experts[0].n(), self.experts[0].k());
        let (rows, stride) = (self.activations.m(), self.activations.stride());
        let mut expected: RowResults<T> = vec![Vec::new(); rows];
        let mut is_valid = true;
        for (expert, limited) in index.limited(rows).into_iter().enumerate() {
            is_valid &= limited.is_valid;
            let own = limited.begin as usize..limited.end as usize;
            if own.is_empty() {
                continue;
            }
            let codes = &self.activations.data()[own.start * stride..];
            let view =
                ActivationsView::new(codes, stride, &self.activations.scales()[own.clone()], own.len(), k)?;
            let mut out: Vec<T> = vec![bytemuck::Zeroable::zeroed(); own.len() * n];
            let bias = with_bias.then(|| &self.bias[expert * n..][..n]);
            cpu::gemm(&self.experts[expert], view, bias, &mut out)?;
            for (row, out) in own.zip(out.chunks_exact(n)) {
                expected[row].push(out.to_vec());
            }
        }
        Ok((expected, is_valid))
    }

    /// Runs the plan and compares every byte of a poisoned output buffer.
    ///
    /// Each expert's rows must equal the CPU's bits.
    /// Rows of no expert, the `padding` elements behind each row and the guard zones on both sides
    /// must still hold the poison. Elements of a row that several experts have, after limiting, may hold any of their results.
    pub fn check<T: Output>(
        &self,
        gpu: &Gpu,
        session: &Session,
        plan: &GroupedPlan,
        index: &Index,
        with_bias: bool,
        padding: usize,
    ) -> Result<(), Failed> {
        let (n, rows, size) = (self.experts[0].n(), self.activations.m(), size_of::<T>());
        let stride = n + padding;
        let length = ((rows - 1) * stride + n) * size;
        let output = to_device(&vec![POISON; length + 2 * GUARD])?;
        // SAFETY: the span lies inside the buffer, between the guard zones.
        let inside =
            unsafe { DeviceSpan::from_raw(DeviceSpan::from(&output).address() + GUARD as u64, length) };
        let device_index = to_device(index.values())?;
        let status = to_device(&[u32::MAX; 3])?;
        // SAFETY: the span is the middle one of the three words.
        let word = unsafe { DeviceSpan::from_raw(DeviceSpan::from(&status).address() + 4, 4) };
        let operands = GroupedOperands {
            status: Some(word),
            ..self.operands(index, &device_index, inside, stride, T::TYPE, with_bias)
        };
        // SAFETY: all operands stay alive until the stream has been synchronized.
        unsafe { gpu.grouped_gemm_with_plan(&self.device_experts, &operands, plan, &session.stream) }?;
        session.stream.synchronize()?;

        let case = || {
            let index: String = format!("{index:?}").chars().take(400).collect();
            format!("{}, {}, bias {with_bias}, stride {stride}, {plan}, {index}", plan.problem(), T::TYPE)
        };
        let (expected, is_valid) = self.expected::<T>(index, with_bias)?;
        let mut words = [0u32; 3];
        status.copy_to(&mut words[..])?;
        if words != [u32::MAX, u32::from(!is_valid), u32::MAX] {
            return Err(format!("status {words:x?}, valid {is_valid}: {}", case()).into());
        }
        let mut bytes = vec![0; length + 2 * GUARD];
        output.copy_to(&mut bytes[..])?;
        let intact = |bytes: &[u8]| bytes.iter().all(|&byte| byte == POISON);
        if !intact(&bytes[..GUARD]) || !intact(&bytes[GUARD + length..]) {
            return Err(format!("wrote outside the output: {}", case()).into());
        }
        for (row, results) in expected.iter().enumerate() {
            let found = &bytes[GUARD + row * stride * size..];
            let gap = &found[n * size..][..if row + 1 < rows { padding * size } else { 0 }];
            let found = &found[..n * size];
            if !intact(gap) {
                return Err(format!("wrote between rows, after row {row}: {}", case()).into());
            }
            if results.is_empty() {
                if !intact(found) {
                    return Err(format!("wrote row {row}, which belongs to no expert: {}", case()).into());
                }
                continue;
            }
            // Experts that have the same row write it in parts, in any order.
            let results: Vec<&[u8]> = results.iter().map(|result| bytemuck::cast_slice(result)).collect();
            let is_wrong = |&channel: &usize| {
                let at = channel * size..(channel + 1) * size;
                results.iter().all(|result| found[at.clone()] != result[at.clone()])
            };
            if let Some(channel) = (0..n).find(is_wrong) {
                let wrong = (0..n).filter(is_wrong).count();
                let (y, e) = (&found[channel * size..][..size], &results[0][channel * size..][..size]);
                return Err(format!(
                    "row {row}: {wrong} wrong of {n}, first channel {channel}: {y:02x?} instead of {e:02x?}; {}",
                    case()
                )
                .into());
            }
        }
        Ok(())
    }

    /// Calls [`check`](Self::check) with the output type given as a value. Int32 output gets no bias.
    #[expect(clippy::too_many_arguments, reason = "those of `check`, and the type")]
    pub fn check_type(
        &self,
        gpu: &Gpu,
        session: &Session,
        plan: &GroupedPlan,
        index: &Index,
        output_type: OutputType,
        with_bias: bool,
        padding: usize,
    ) -> Result<(), Failed> {
        match output_type {
            OutputType::Bf16 => self.check::<half::bf16>(gpu, session, plan, index, with_bias, padding),
            OutputType::F16 => self.check::<half::f16>(gpu, session, plan, index, with_bias, padding),
            OutputType::F32 => self.check::<f32>(gpu, session, plan, index, with_bias, padding),
            OutputType::I32 => self.check::<i32>(gpu, session, plan, index, false, padding),
        }
    }
}

/// Returns random counts of `experts` experts with `rows` rows in all: some empty, some with most of the rows.
pub fn random_counts(rng: &mut StdRng, experts: usize, rows: usize) -> Vec<usize> {
    let mut counts = vec![0; experts];
    let mut left = rows;
    while left > 0 {
        let most = if rng.random() { left } else { left.min(4) };
        let some = rng.random_range(1..=most);
        counts[rng.random_range(0..experts)] += some;
        left -= some;
    }
    counts
}
