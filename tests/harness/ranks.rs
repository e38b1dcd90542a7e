//! Row-parallel layers for tests: random problems, the ranks that compute them, and what the CPU says.

use cust::memory::{CopyDestination, DeviceBuffer};
use libtest_mimic::Failed;
use liquidgemm::cpu::QuantizeInput;
use liquidgemm::gpu::{
    AllReduce, DeviceSpan, Gpu, LinearInput, LinearOutput, Partials, RowParallelCall, RowParallelLinear,
};
use liquidgemm::{Gate, GateOrder, Group, Half, Linear, Operation, Output};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::{Session, random_bias, random_weights_in_groups, to_device};

/// The byte that outputs and scratch memory hold before a call.
pub const POISON: u8 = 0xA5;

/// A linear layer, its input, and how it is divided among ranks.
pub struct Problem<T> {
    /// Tokens.
    pub m: usize,
    /// The whole layer.
    pub layer: Linear,
    /// The layer's gate, or `None` for plain activations.
    pub gate: Option<(Gate, GateOrder)>,
    /// `[m, k]`, or `[m, 2k]` with a gate.
    pub input: Vec<T>,
    /// Where the shards of the ranks end.
    pub ends: Vec<usize>,
}

impl<T: Half> Problem<T> {
    /// Returns a random problem of this shape for so many ranks.
    ///
    /// Weights, group, bias, smoothing, gate and cuts are random, and some values are not finite.
    ///
    /// # Errors
    /// If the library refuses the layer.
    pub fn random(rng: &mut StdRng, [m, n, k]: [usize; 3], ranks: usize) -> Result<Self, Failed> {
        let group = [Group::K(64), Group::Channel][rng.random_range(0..2)];
        let unit = if group == Group::Channel { 1 } else { 64 };
        // Distinct places to cut at.
        let places = (k - 1) / unit;
        assert!(places >= ranks - 1, "k = {k} is too short for {ranks} ranks");
        let mut ends: Vec<usize> = Vec::new();
        while ends.len() < ranks - 1 {
            let end = rng.random_range(1..=places) * unit;
            if !ends.contains(&end) {
                ends.push(end);
            }
        }
        ends.push(k);
        ends.sort_unstable();
        let mut layer = Linear::new(random_weights_in_groups(rng, n, k, group));
        if rng.random() {
            layer = layer.with_bias(random_bias(rng, n))?;
        }
        if rng.random() {
            layer = layer.with_smoothing((0..k).map(|_| rng.random_range(0.5..2.0f32)).collect())?;
        }
        let gates = [
            None,
            Some((Gate::Silu, GateOrder::Halves)),
            Some((Gate::Silu, GateOrder::Interleaved)),
            Some((Gate::GeluTanh, GateOrder::Halves)),
        ];
        let gate = gates[rng.random_range(0..gates.len())];
        let row = if gate.is_some() { 2 * k } else { k };
        let mut input: Vec<T> = (0..m * row).map(|_| T::round(rng.random_range(-3.0..3.0f32))).collect();
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            // A token of many stays finite.
            if m > 3 {
                let at = rng.random_range(0..input.len());
                input[at] = T::round(value);
            }
        }
        // A token of zeros.
        if m > 1 {
            input[..row].fill(T::round(0.0));
        }
        Ok(Self { m, layer, gate, input, ends })
    }

    /// Returns the operation before the quantization.
    #[must_use]
    pub fn operation<V>(&self) -> Operation<V> {
        self.gate.map_or(Operation::Plain, |(gate, order)| Operation::Gated { gate, order })
    }

    /// Returns the input channels of a rank.
    #[must_use]
    pub fn range(&self, rank: usize) -> std::ops::Range<usize> {
        rank.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[rank]
    }

    /// Returns a rank's part of the input, and the elements of its rows.
    #[must_use]
    pub fn part(&self, rank: usize) -> (Vec<T>, usize) {
        let (k, range) = (self.layer.k(), self.range(rank));
        let whole = self.input.len() / self.m.max(1);
        let part = |row: &[T]| match self.gate {
            None => row[range.clone()].to_vec(),
            Some((_, GateOrder::Halves)) => [&row[range.clone()], &row[k..][range.clone()]].concat(),
            Some((_, GateOrder::Interleaved)) => row[2 * range.start..2 * range.end].to_vec(),
        };
        let rows = self.input.chunks_exact(whole.max(1)).flat_map(part).collect();
        (rows, range.len() * if self.gate.is_some() { 2 } else { 1 })
    }

    /// Returns the CPU's result of the whole layer.
    ///
    /// # Errors
    /// Those of the CPU backend.
    pub fn expected<O: Output>(&self) -> Result<Vec<O>, Failed> {
        let (m, k) = (self.m, self.layer.k());
        let stride = if self.gate.is_some() { 2 * k } else { k };
        let input = QuantizeInput {
            operation: self.operation(),
            input_stride: stride,
            ..QuantizeInput::new(&self.input, m, k)
        };
        Ok(self.layer.forward(&input, None)?)
    }

    /// Returns the CPU's result of a rank's shard alone, with the bias on the first rank.
    ///
    /// # Errors
    /// Those of the CPU backend.
    pub fn expected_of_rank<O: Output>(&self, rank: usize) -> Result<Vec<O>, Failed> {
        let mut shard = self.layer.input_shard(self.range(rank))?;
        if rank > 0 {
            let smoothing = shard.smoothing().map(<[f32]>::to_vec);
            shard = Linear::new(shard.weights().clone());
            if let Some(smoothing) = smoothing {
                shard = shard.with_smoothing(smoothing)?;
            }
        }
        let (rows, stride) = self.part(rank);
        let input = QuantizeInput {
            operation: self.operation(),
            input_stride: stride,
            ..QuantizeInput::new(&rows, self.m, shard.k())
        };
        Ok(shard.forward(&input, None)?)
    }
}

/// A rank's shard and operands on its GPU.
pub struct Rank {
    gpu: &'static Gpu,
    /// The rank's part of the layer.
    pub layer: RowParallelLinear,
    /// The rank's stream and workspace.
    pub session: Session,
    input: LinearInput,
    output: DeviceBuffer<u8>,
    output_stride: usize,
    scratch: DeviceBuffer<u8>,
    /// Keeps the input's memory.
    _input: DeviceBuffer<u16>,
}

impl Rank {
    /// Puts a rank's part of a problem on a GPU. The output's rows have `padding` elements between them.
    ///
    /// # Errors
    /// Those of the library and of the driver.
    pub fn new<T: Half, O: Output>(
        gpu: &'static Gpu,
        problem: &Problem<T>,
        rank: usize,
        partials: Partials,
        padding: usize,
    ) -> Result<Self, Failed> {
        gpu.make_current()?;
        let shard = problem.layer.input_shard(problem.range(rank))?;
        let layer = RowParallelLinear::new(gpu.upload_linear(&shard)?).with_partials(partials);
        let (rows, input_stride) = problem.part(rank);
        let (m, n) = (problem.m, problem.layer.n());
        let rows = to_device(bytemuck::cast_slice::<T, u16>(&rows))?;
        let input = LinearInput {
            operation: problem.operation(),
            input_stride,
            ..LinearInput::new((&rows).into(), T::HALF, m, shard.k())
        };
        let output_stride = n + padding;
        let poisoned = |bytes: usize| to_device(&vec![POISON; bytes]);
        Ok(Self {
            gpu,
            scratch: poisoned(layer.scratch_bytes(m)?)?,
            layer,
            session: Session::new(gpu)?,
            input,
            output: poisoned(m * output_stride * size_of::<O>())?,
            output_stride,
            _input: rows,
        })
    }

    /// Returns the call of this rank.
    pub fn call<'a, O: Output, C: AllReduce>(&'a self, communicator: &'a C) -> RowParallelCall<'a, C> {
        RowParallelCall {
            gpu: self.gpu,
            layer: &self.layer,
            communicator,
            input: self.input,
            output: LinearOutput {
                output: DeviceSpan::from(&self.output),
                output_stride: self.output_stride,
                output_type: O::TYPE,
            },
            scratch: DeviceSpan::from(&self.scratch),
            workspace: &self.session.workspace,
            stream: (&self.session.stream).into(),
        }
    }

    /// Waits for the stream, and returns the output's rows. Fails if anything was written between them.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn result<O: Output>(&self) -> Result<Vec<O>, Failed> {
        self.gpu.make_current()?;
        self.session.stream.synchronize()?;
        let mut bytes = vec![0; self.output.len()];
        if !bytes.is_empty() {
            self.output.copy_to(&mut bytes[..])?;
        }
        let n = self.layer.shard().n();
        let mut result = Vec::with_capacity(self.input.m * n);
        for row in bytes.chunks_exact(self.output_stride * size_of::<O>()) {
            let (row, gap) = row.split_at(n * size_of::<O>());
            result.extend(row.chunks_exact(size_of::<O>()).map(bytemuck::pod_read_unaligned::<O>));
            if gap.iter().any(|&byte| byte != POISON) {
                return Err("wrote between the output's rows".into());
            }
        }
        Ok(result)
    }

    /// Fills the output with poison again.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn poison(&mut self) -> Result<(), Failed> {
        self.gpu.make_current()?;
        let bytes = vec![POISON; self.output.len()];
        crate::refill(&mut self.output, &bytes)
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // The buffers are freed in the current context. An error cannot be handled here.
        let _ = self.gpu.make_current();
    }
}

/// Fails unless both have the same bits.
///
/// # Errors
/// With the number of wrong elements and the first one.
pub fn expect_bits<O: Output>(found: &[O], expected: &[O], case: impl Fn() -> String) -> Result<(), Failed> {
    let bits = |value: &O| bytemuck::bytes_of(value).to_vec();
    let wrong = |(found, expected): &(&O, &O)| bits(found) != bits(expected);
    if found.len() != expected.len() {
        return Err(format!("{} elements instead of {}: {}", found.len(), expected.len(), case()).into());
    }
    let pairs = || found.iter().zip(expected);
    match pairs().position(|pair| wrong(&pair)) {
        None => Ok(()),
        Some(first) => Err(format!(
            "{} wrong of {}, the first at {first}: {:?} instead of {:?}; {}",
            pairs().filter(wrong).count(),
            expected.len(),
            found[first],
            expected[first],
            case()
        )
        .into()),
    }
}
