//! Traces each weight operand of the tensor cores in a kernel's SASS back to its packed codes.
//!
//! In the machine code, the library's dequantization must take two instructions for four weights: IMAD and XOR.
//! Counting opcodes cannot show that, so this file follows the data.
//! It starts at every register operand of an IGMMA or IMMA in a loop.
//! From there it goes backwards along the control flow, and around the loop's back edge,
//! to the masked nibbles.
//! Weights that go through shared memory are traced from the STSM that stores them.
//!
//! It reads listings of nvdisasm, which `cuda_tools.rs` runs.
//! `ptx.rs` compares the counts with what is expected.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, bail, ensure};

/// The mask that leaves one nibble in each byte of a packed word.
const NIBBLES: u32 = 0x0f0f_0f0f;
/// The XOR mask that turns four u8 into four i8 by flipping their top bits.
const FLIP: u32 = 0x8080_8080;
/// LOP3's truth tables of `a & b` and `a ^ b`.
const AND: u32 = 0xc0;
const XOR: u32 = 0x3c;
/// The most moves between two traced instructions. Ends the trace in a loop that only moves registers.
const MOST_STEPS: usize = 8;

/// One instruction.
#[derive(Debug, PartialEq, Eq)]
struct Instruction {
    address: String,
    /// Whether it executes under a predicate.
    predicated: bool,
    opcode: String,
    operands: Vec<String>,
}

/// A thread's register (`R`) or a warp's uniform register (`UR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Register {
    uniform: bool,
    number: u32,
}

/// The instructions on the paths from an operand back to masked nibbles.
#[derive(Default)]
struct Way {
    /// The instructions visited so far.
    seen: BTreeSet<usize>,
    /// The visited instructions whose results depend on masked nibbles, including the masks themselves.
    arithmetic: BTreeSet<usize>,
}

/// A kernel's instructions and their control flow.
pub struct Kernel {
    instructions: Vec<Instruction>,
    predecessors: Vec<Vec<usize>>,
    /// The instructions of each loop, by the loop's first instruction.
    loops: BTreeMap<usize, BTreeSet<usize>>,
}

/// How a kernel dequantizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One multiply-add and one XOR. Anything else is an error.
    MultiplyAddFlip,
    /// A multiplication and a byte-wise subtraction,
    /// which the assembler may expand to any number of instructions.
    MultiplySubtract,
}

/// The cost of dequantization in a kernel's loops.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dequantization {
    /// Tensor-core instructions in loops.
    pub multiplies: usize,
    /// Registers of four weights each that they read, directly or through shared memory.
    pub words: usize,
    /// Instructions between masked nibbles and operands, summed over all words.
    pub arithmetic: usize,
    /// Instructions that shift and mask the packed codes, summed over all words.
    pub unpacking: usize,
}

impl Kernel {
    /// Parses the output of `nvdisasm -c` for a module with one kernel.
    ///
    /// # Errors
    /// Returns one for a line that it cannot read, for an unknown label,
    /// and for a listing without instructions.
    pub fn parse(listing: &str) -> anyhow::Result<Self> {
        let mut instructions = Vec::new();
        let mut labels = BTreeMap::new();
        for line in listing.lines() {
            let line = line.trim();
            if let Some(label) = line.strip_suffix(':') {
                labels.insert(label.to_owned(), instructions.len());
            } else if line.starts_with("/*") {
                instructions
                    .push(Instruction::parse(line).with_context(|| format!("cannot read SASS `{line}`"))?);
            }
        }
        ensure!(!instructions.is_empty(), "the listing has no instructions");

        let mut predecessors = vec![Vec::new(); instructions.len()];
        let mut back_edges = Vec::new();
        for (index, instruction) in instructions.iter().enumerate() {
            if instruction.falls_through() && index + 1 < instructions.len() {
                predecessors[index + 1].push(index);
            }
            if let Some(label) = instruction.branch_label() {
                let target = *labels.get(label).with_context(|| format!("no label {label}"))?;
                if let Some(before) = predecessors.get_mut(target) {
                    before.push(index);
                }
                if target <= index {
                    back_edges.push((target, index));
                }
            }
        }
        let mut kernel = Self { instructions, predecessors, loops: BTreeMap::new() };
        for (head, tail) in back_edges {
            kernel.add_loop(head, tail);
        }
        Ok(kernel)
    }

    /// Returns the first instruction whose opcode without modifiers is one of `stems`, as text.
    pub fn find(&self, stems: &[&str]) -> Option<String> {
        let matches = |instruction: &&Instruction| stems.contains(&instruction.stem());
        self.instructions.iter().find(matches).map(Instruction::to_string)
    }

    /// Returns a sign that the main loop was compiled for divergent lanes:
    /// the first shuffle or `BRA.DIV`, as text.
    ///
    /// The main loop is the innermost loop with a `multiply`.
    /// There, a shuffle or `BRA.DIV` shows that the compiler does not know a value to be uniform in the warp.
    /// Such a loop keeps its stage and its descriptors in thread registers instead of uniform ones.
    /// That makes it slower.
    pub fn parted(&self, multiply: &str) -> Option<String> {
        let is_multiply = |index: &usize| self.instructions[*index].stem() == multiply;
        let main_loops = self.loops.values().filter(|body| body.iter().any(is_multiply));
        // Take the innermost loop, because the loop over tiles may surround it.
        let body = main_loops.min_by_key(|body| body.len())?;
        let parts = |instruction: &&Instruction| {
            instruction.stem() == "SHFL" || instruction.opcode.starts_with("BRA.DIV")
        };
        body.iter().map(|&index| &self.instructions[index]).find(parts).map(Instruction::to_string)
    }

    /// Traces the weights of every `multiply` (IGMMA or IMMA) in a loop back to their nibbles.
    ///
    /// # Errors
    /// Returns one for a weight operand that is not made in the given form.
    pub fn dequantization(&self, form: Form, multiply: &str) -> anyhow::Result<Dequantization> {
        let mut result = Dequantization::default();
        for (index, instruction) in self.instructions.iter().enumerate() {
            let multiplies = instruction.stem() == multiply;
            // Weights are stored as `STSM.16.M88`. The epilogue's transposed stores are `STSM.16.MT88`.
            if !multiplies && !instruction.opcode.starts_with("STSM.16.M88") {
                continue;
            }
            // Trace within the innermost loop around the instruction.
            let around = self.loops.values().filter(|body| body.contains(&index));
            let Some(body) = around.min_by_key(|body| body.len()) else { continue };
            result.multiplies += usize::from(multiplies);
            let Some(first) = instruction.operands.get(1).and_then(|operand| register(operand)) else {
                continue;
            };
            for number in first.number..first.number + 4 {
                let operand = Register { number, ..first };
                let (arithmetic, unpacking) = match form {
                    Form::MultiplyAddFlip => self.flipped(body, index, operand, 0),
                    Form::MultiplySubtract => self.subtracted(body, index, operand),
                }
                .with_context(|| format!("operand R{number} of `{instruction}`"))?;
                result.words += 1;
                result.arithmetic += arithmetic;
                result.unpacking += unpacking;
            }
        }
        Ok(result)
    }

    /// Returns the cost of the operand in `register` as `(arithmetic, unpacking)` instructions.
    ///
    /// Counts only instructions that depend on the nibbles:
    /// those that depend on the pair alone serve many words.
    fn subtracted(
        &self,
        body: &BTreeSet<usize>,
        index: usize,
        register: Register,
    ) -> anyhow::Result<(usize, usize)> {
        let mut way = Way::default();
        ensure!(
            self.depends_on_nibbles(body, index, register, &mut way),
            "expected masked nibbles behind it"
        );
        let masks = way.arithmetic.iter().filter(|&&at| self.combined(at, AND, NIBBLES).is_some());
        let (masks, mut unpacking) = (masks.copied().collect::<Vec<_>>(), 0);
        for mask in &masks {
            unpacking += self.masked_at(body, *mask)?;
        }
        Ok((way.arithmetic.len() - masks.len(), unpacking))
    }

    /// Returns whether the value of `register` depends on masked nibbles.
    /// Adds the instructions on the path to `way`.
    fn depends_on_nibbles(
        &self,
        body: &BTreeSet<usize>,
        index: usize,
        register: Register,
        way: &mut Way,
    ) -> bool {
        let mut depends = false;
        for writer in self.writers(Some(body), index, register) {
            if !way.seen.insert(writer) {
                depends |= way.arithmetic.contains(&writer);
                continue;
            }
            let instruction = &self.instructions[writer];
            let mut found = self.combined(writer, AND, NIBBLES).is_some();
            if !found && instruction.computes() {
                for source in
                    instruction.operands.iter().skip(1).filter_map(|operand| self::register(operand))
                {
                    found |= self.depends_on_nibbles(body, writer, source, way);
                }
            }
            if found {
                way.arithmetic.insert(writer);
                depends = true;
            }
        }
        depends
    }

    /// Adds the natural loop of a jump from `tail` back to `head`, if `head` is a loop head.
    fn add_loop(&mut self, head: usize, tail: usize) {
        let mut body = BTreeSet::from([head]);
        let mut pending = vec![tail];
        while let Some(index) = pending.pop() {
            if body.insert(index) {
                pending.extend(&self.predecessors[index]);
            }
        }
        // If the kernel's entry was reached without passing `head`, then `head` is no loop head.
        if head == 0 || !body.contains(&0) {
            self.loops.entry(head).or_default().extend(body);
        }
    }

    /// Returns the instructions that may have written `register` last before `index` executes,
    /// on paths inside `body`.
    fn writers(&self, body: Option<&BTreeSet<usize>>, index: usize, register: Register) -> BTreeSet<usize> {
        let mut writers = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut pending = self.predecessors[index].clone();
        while let Some(index) = pending.pop() {
            if body.is_some_and(|body| !body.contains(&index)) || !seen.insert(index) {
                continue;
            }
            let instruction = &self.instructions[index];
            if instruction.writes(register) {
                writers.insert(index);
                if !instruction.predicated {
                    continue;
                }
            }
            pending.extend(&self.predecessors[index]);
        }
        writers
    }

    /// Returns whether an operand is the constant `value`: a literal, or a register that always holds it.
    fn is_constant(&self, index: usize, operand: &str, value: u32) -> bool {
        let Some(register) = register(operand) else { return literal(operand) == Some(value) };
        let writers = self.writers(None, index, register);
        !writers.is_empty()
            && writers.iter().all(|&writer| {
                let source = self.instructions[writer].moved();
                source.is_some_and(|source| literal(source) == Some(value))
            })
    }

    /// Returns the operand that a LOP3 with this truth table combines with the constant `value`.
    fn combined(&self, index: usize, table: u32, value: u32) -> Option<Register> {
        let instruction = &self.instructions[index];
        let [_, a, b, rest @ ..] = instruction.operands.as_slice() else { return None };
        if instruction.opcode != "LOP3.LUT" || rest.get(1).and_then(|text| literal(text)) != Some(table) {
            return None;
        }
        if self.is_constant(index, b, value) {
            register(a)
        } else if self.is_constant(index, a, value) {
            register(b)
        } else {
            None
        }
    }

    /// Returns the cost of an operand in `register`, which must be a product with its top bits flipped.
    fn flipped(
        &self,
        body: &BTreeSet<usize>,
        index: usize,
        register: Register,
        steps: usize,
    ) -> anyhow::Result<(usize, usize)> {
        self.each_writer(body, index, register, steps, Self::flipped, |writer| {
            let source = self.combined(writer, XOR, FLIP).context("expected an XOR with 0x80808080")?;
            let (arithmetic, unpacking) = self.multiplied(body, writer, source, 0)?;
            Ok((arithmetic + 1, unpacking))
        })
    }

    /// Returns the cost of a product in `register`. One of its factors must be masked nibbles.
    fn multiplied(
        &self,
        body: &BTreeSet<usize>,
        index: usize,
        register: Register,
        steps: usize,
    ) -> anyhow::Result<(usize, usize)> {
        self.each_writer(body, index, register, steps, Self::multiplied, |writer| {
            let instruction = &self.instructions[writer];
            let [_, a, b, _] = instruction.operands.as_slice() else { bail!("expected an IMAD") };
            ensure!(instruction.opcode == "IMAD", "expected an IMAD");
            let factors = [a, b].into_iter().filter_map(|operand| self::register(operand));
            let mut nibbles = factors.filter_map(|factor| self.masked(body, writer, factor, 0).ok());
            let (arithmetic, unpacking) = nibbles.next().context("expected masked nibbles as a factor")?;
            Ok((arithmetic + 1, unpacking))
        })
    }

    /// Returns the cost of masked nibbles in `register`, which is unpacking only.
    fn masked(
        &self,
        body: &BTreeSet<usize>,
        index: usize,
        register: Register,
        steps: usize,
    ) -> anyhow::Result<(usize, usize)> {
        self.each_writer(body, index, register, steps, Self::masked, |writer| {
            Ok((0, self.masked_at(body, writer)?))
        })
    }

    /// Returns the number of unpacking instructions up to the mask at `index`, which is included.
    fn masked_at(&self, body: &BTreeSet<usize>, index: usize) -> anyhow::Result<usize> {
        let packed = self.combined(index, AND, NIBBLES).context("expected a mask 0x0f0f0f0f")?;
        let writers = self.writers(Some(body), index, packed);
        let shifts = writers.iter().filter(|&&writer| self.instructions[writer].stem() == "SHF").count();
        Ok(1 + shifts)
    }

    /// Returns the largest cost over all writers of a register.
    /// A move costs one, and `again` continues at its source.
    fn each_writer(
        &self,
        body: &BTreeSet<usize>,
        index: usize,
        written: Register,
        steps: usize,
        again: impl Fn(&Self, &BTreeSet<usize>, usize, Register, usize) -> anyhow::Result<(usize, usize)>,
        cost: impl Fn(usize) -> anyhow::Result<(usize, usize)>,
    ) -> anyhow::Result<(usize, usize)> {
        let writers = self.writers(Some(body), index, written);
        ensure!(!writers.is_empty() && steps < MOST_STEPS, "no writer of R{} in the loop", written.number);
        let mut largest = (0, 0);
        for writer in writers {
            let instruction = &self.instructions[writer];
            let found = match instruction.moved().and_then(register) {
                Some(source) => {
                    let (arithmetic, unpacking) = again(self, body, writer, source, steps + 1)?;
                    (arithmetic + 1, unpacking)
                }
                None => cost(writer).with_context(|| format!("written by `{instruction}`"))?,
            };
            largest = largest.max(found);
        }
        Ok(largest)
    }
}

impl Instruction {
    /// Parses a line such as `/*29a0*/ @!P0 LOP3.LUT R19, R12, 0xf0f0f0f, RZ, 0xc0, !PT ;`.
    fn parse(line: &str) -> Option<Self> {
        let (address, rest) = line.strip_prefix("/*")?.split_once("*/")?;
        let mut rest = rest.split(';').next()?.trim();
        let predicated = rest.starts_with('@');
        if predicated {
            rest = rest.split_once(char::is_whitespace)?.1.trim_start();
        }
        let (opcode, operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let operands = operands.split(',').map(|operand| operand.trim().to_owned());
        Some(Self {
            address: address.to_owned(),
            predicated,
            opcode: opcode.to_owned(),
            operands: operands.filter(|operand| !operand.is_empty()).collect(),
        })
    }

    /// Returns the opcode without its modifiers.
    fn stem(&self) -> &str {
        self.opcode.split('.').next().unwrap_or_default()
    }

    /// Returns whether the result depends on the register operands alone.
    fn computes(&self) -> bool {
        ["LOP3", "IMAD", "IADD3", "VIADD", "PRMT", "SHF", "LEA", "MOV"].contains(&self.stem())
    }

    /// Returns the label that the instruction may jump to.
    fn branch_label(&self) -> Option<&str> {
        let last = self.operands.last().filter(|_| self.stem() == "BRA")?;
        last.strip_prefix("`(")?.strip_suffix(')')
    }

    /// Returns whether execution may continue at the next instruction.
    fn falls_through(&self) -> bool {
        let leaves = match self.stem() {
            // A branch with a further operand (`BRA.DIV UR4`, `BRA.U UP0`) is conditional.
            "BRA" => self.operands.len() == 1 && !self.opcode.contains(".ANY"),
            "EXIT" | "RET" | "BRX" | "JMP" | "JMX" => true,
            _ => false,
        };
        !leaves || self.predicated
    }

    /// Returns whether the instruction writes a register.
    ///
    /// Unknown instructions count as writers. A writer too many can only make a trace fail.
    fn writes(&self, register: Register) -> bool {
        if ["BAR", "WARPSYNC", "NANOSLEEP", "RET", "BRX", "JMX"].contains(&self.stem()) {
            return false;
        }
        let mut operands = self.operands.iter();
        let Some(mut first) = operands.next() else { return false };
        // Some instructions write a predicate and then a register. Comparisons write predicates only.
        if first.starts_with(['P', '!']) || first.starts_with("UP") {
            let writes_more =
                ["LOP3", "ULOP3", "SHFL", "ATOM", "ATOMG", "ATOMS", "MATCH"].contains(&self.stem());
            let Some(second) = operands.next().filter(|_| writes_more) else { return false };
            first = second;
        }
        let Some(start) = self::register(first) else { return false };
        (start.number..start.number + self.written_registers()).contains(&register.number)
            && start.uniform == register.uniform
    }

    /// Returns the number of consecutive registers that the instruction writes, from the named one on.
    fn written_registers(&self) -> u32 {
        let has = |modifier: &str| self.opcode.split('.').any(|part| part == modifier);
        match self.stem() {
            "IGMMA" => {
                // 64 × n sums of 32 bits over 128 threads.
                let shape = self.opcode.split('.').find_map(|part| part.strip_prefix("64x"));
                let n = shape.and_then(|rest| rest.split('x').next()).and_then(|n| n.parse::<u32>().ok());
                n.map_or(1, |n| n / 2)
            }
            "IMMA" => 4,
            "CS2R" if !has("32") => 2,
            "LDSM" if has("4") => 4,
            "LDSM" if has("2") => 2,
            _ if has("128") => 4,
            _ if has("64") || has("WIDE") => 2,
            _ => 1,
        }
    }

    /// Returns the source operand of a move.
    fn moved(&self) -> Option<&str> {
        match (self.opcode.as_str(), self.operands.as_slice()) {
            ("MOV" | "UMOV", [_, source, ..]) => Some(source),
            ("IMAD.MOV.U32" | "IMAD.MOV", [_, a, b, source]) if a == "RZ" && b == "RZ" => Some(source),
            _ => None,
        }
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} (at 0x{})", self.opcode, self.operands.join(", "), self.address)
    }
}

/// Returns the register that an operand names.
fn register(operand: &str) -> Option<Register> {
    let name = operand.split('.').next()?;
    let (uniform, digits) = match name.strip_prefix("UR") {
        Some(digits) => (true, digits),
        None => (false, name.strip_prefix('R')?),
    };
    Some(Register { uniform, number: digits.parse().ok()? })
}

/// Returns the value of a literal operand.
fn literal(operand: &str) -> Option<u32> {
    let (negative, digits) = match operand.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, operand),
    };
    let value = u32::from_str_radix(digits.strip_prefix("0x")?, 16).ok()?;
    Some(if negative { value.wrapping_neg() } else { value })
}

#[cfg(test)]
mod tests;
