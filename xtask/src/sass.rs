//! Reads a kernel's SASS and follows each tensor-core operand back to the packed codes that it came from.
//!
//! Dequantization is worth what it claims only if the machine code keeps to it: two instructions, IMAD and XOR, for four
//! weights. Counting opcodes in a listing can't show that, so this follows the data: from every register operand of an
//! IGMMA or IMMA in a loop, backwards along the control flow and around the loop's back edge, to the masked nibbles. Weights that
//! go through shared memory are followed from the STSM that puts them there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, bail, ensure};

/// The nibbles of a packed word, one a byte.
const NIBBLES: u32 = 0x0f0f_0f0f;
/// The flip that turns u8 into i8.
const FLIP: u32 = 0x8080_8080;
/// LOP3's truth tables.
const AND: u32 = 0xc0;
const XOR: u32 = 0x3c;
/// Moves that may lie between two instructions of interest; a bound against going around a loop of moves for ever.
const MOST_STEPS: usize = 8;

/// One instruction.
#[derive(Debug, PartialEq, Eq)]
struct Instruction {
    address: String,
    /// Executed under a predicate.
    predicated: bool,
    opcode: String,
    operands: Vec<String>,
}

/// A register of a thread (`R`) or of a warp (`UR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Register {
    uniform: bool,
    number: u32,
}

/// A way from an operand back to masked nibbles.
#[derive(Default)]
struct Way {
    /// Instructions that have been looked at.
    seen: BTreeSet<usize>,
    /// Those of them that compute from masked nibbles, the masks with them.
    arithmetic: BTreeSet<usize>,
}

/// A kernel's instructions with their control flow.
pub struct Kernel {
    instructions: Vec<Instruction>,
    predecessors: Vec<Vec<usize>>,
    /// For each loop's first instruction, all that belong to it.
    loops: BTreeMap<usize, BTreeSet<usize>>,
}

/// How a kernel dequantizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A multiply-add and an XOR, and nothing else is accepted.
    MultiplyAddFlip,
    /// A multiplication and a byte-wise subtraction, of however many instructions the assembler makes it.
    MultiplySubtract,
}

/// What dequantization costs in a kernel's loops.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dequantization {
    /// Tensor-core multiplications inside loops.
    pub multiplies: usize,
    /// Registers that they take as operands, or that go to shared memory to become theirs, four weights each.
    pub words: usize,
    /// Instructions between masked nibbles and operands, over all words.
    pub arithmetic: usize,
    /// Instructions that shift and mask the packed codes, over all words.
    pub unpacking: usize,
}

impl Kernel {
    /// Reads what `nvdisasm -c` prints for a module with one kernel.
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

    /// The first instruction whose opcode starts with one of `stems`, as text.
    pub fn find(&self, stems: &[&str]) -> Option<String> {
        let matches = |instruction: &&Instruction| stems.contains(&instruction.stem());
        self.instructions.iter().find(matches).map(Instruction::to_string)
    }

    /// The first instruction of a loop around a `multiply` which shows that the compiler takes something the lanes of a warp
    /// share for their own: a shuffle, or a branch for lanes that have parted. Such a loop keeps its stages and descriptors in
    /// each thread's registers, and takes longer.
    pub fn parted(&self, multiply: &str) -> Option<String> {
        let is_multiply = |index: &usize| self.instructions[*index].stem() == multiply;
        let main_loops = self.loops.values().filter(|body| body.iter().any(is_multiply));
        // The innermost: around it there may be the loop over tiles.
        let body = main_loops.min_by_key(|body| body.len())?;
        let parts = |instruction: &&Instruction| {
            instruction.stem() == "SHFL" || instruction.opcode.starts_with("BRA.DIV")
        };
        body.iter().map(|&index| &self.instructions[index]).find(parts).map(Instruction::to_string)
    }

    /// Follows the weights of every `multiply`, IGMMA or IMMA, in a loop back to their nibbles.
    pub fn dequantization(&self, form: Form, multiply: &str) -> anyhow::Result<Dequantization> {
        let mut result = Dequantization::default();
        for (index, instruction) in self.instructions.iter().enumerate() {
            let multiplies = instruction.stem() == multiply;
            // The epilogue's matrices are stored transposed (MT88).
            if !multiplies && !instruction.opcode.starts_with("STSM.16.M88") {
                continue;
            }
            // The innermost of the loops around it.
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

    /// The cost of `register`, an operand, as the number of instructions between masked nibbles and it; what depends on
    /// the pair alone serves many words and is left out.
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

    /// Whether `register` holds what was computed from masked nibbles; the instructions of the way there join `way`.
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

    /// Adds the natural loop of a jump from `tail` back to `head`; jumps that enter no loop's head are left out.
    fn add_loop(&mut self, head: usize, tail: usize) {
        let mut body = BTreeSet::from([head]);
        let mut pending = vec![tail];
        while let Some(index) = pending.pop() {
            if body.insert(index) {
                pending.extend(&self.predecessors[index]);
            }
        }
        // Reaching the kernel's entry without passing the head: the head is none.
        if head == 0 || !body.contains(&0) {
            self.loops.entry(head).or_default().extend(body);
        }
    }

    /// The instructions that may have written `register` last when `index` executes, on ways inside `body`.
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

    /// Whether an operand is the constant `value`: written out, or in a register that holds nothing else.
    fn is_constant(&self, index: usize, operand: &str, value: u32) -> bool {
        let Some(register) = register(operand) else { return literal(operand) == Some(value) };
        let writers = self.writers(None, index, register);
        !writers.is_empty()
            && writers.iter().all(|&writer| {
                let source = self.instructions[writer].moved();
                source.is_some_and(|source| literal(source) == Some(value))
            })
    }

    /// The other operand of a LOP3 that combines it with the constant `value`.
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

    /// The cost of `register`, an operand: it must be a product with its top bits flipped.
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

    /// The cost of `register`, a product: one of its factors must be masked nibbles.
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

    /// The cost of `register`, masked nibbles: what unpacking took.
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

    /// What unpacking took up to and with the mask at `index`.
    fn masked_at(&self, body: &BTreeSet<usize>, index: usize) -> anyhow::Result<usize> {
        let packed = self.combined(index, AND, NIBBLES).context("expected a mask 0x0f0f0f0f")?;
        let writers = self.writers(Some(body), index, packed);
        let shifts = writers.iter().filter(|&&writer| self.instructions[writer].stem() == "SHF").count();
        Ok(1 + shifts)
    }

    /// The largest cost over all writers of a register. A move costs one and is looked through by `again`.
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
    /// Reads a line such as `/*29a0*/ @!P0 LOP3.LUT R19, R12, 0xf0f0f0f, RZ, 0xc0, !PT ;`.
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

    /// The opcode without its modifiers.
    fn stem(&self) -> &str {
        self.opcode.split('.').next().unwrap_or_default()
    }

    /// Whether the instruction computes its result from its register operands alone.
    fn computes(&self) -> bool {
        ["LOP3", "IMAD", "IADD3", "VIADD", "PRMT", "SHF", "LEA", "MOV"].contains(&self.stem())
    }

    /// Where the instruction may jump to.
    fn branch_label(&self) -> Option<&str> {
        let last = self.operands.last().filter(|_| self.stem() == "BRA")?;
        last.strip_prefix("`(")?.strip_suffix(')')
    }

    /// Whether the next instruction may follow.
    fn falls_through(&self) -> bool {
        let leaves = match self.stem() {
            // With a further operand (`BRA.DIV UR4`, `BRA.U UP0`) the branch has a condition of its own.
            "BRA" => self.operands.len() == 1 && !self.opcode.contains(".ANY"),
            "EXIT" | "RET" | "BRX" | "JMP" | "JMX" => true,
            _ => false,
        };
        !leaves || self.predicated
    }

    /// Whether the instruction writes a register. In doubt it does, which can only make a trace fail.
    fn writes(&self, register: Register) -> bool {
        if ["BAR", "WARPSYNC", "NANOSLEEP", "RET", "BRX", "JMX"].contains(&self.stem()) {
            return false;
        }
        let mut operands = self.operands.iter();
        let Some(mut first) = operands.next() else { return false };
        // Some write a predicate before the register; those that only compare write nothing else.
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

    /// How many registers the instruction writes, from the one that it names.
    fn written_registers(&self) -> u32 {
        let has = |modifier: &str| self.opcode.split('.').any(|part| part == modifier);
        match self.stem() {
            "IGMMA" => {
                // 64×n sums of 32 bits over 128 threads.
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

    /// The source of an instruction that only copies.
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

/// The register that an operand names.
fn register(operand: &str) -> Option<Register> {
    let name = operand.split('.').next()?;
    let (uniform, digits) = match name.strip_prefix("UR") {
        Some(digits) => (true, digits),
        None => (false, name.strip_prefix('R')?),
    };
    Some(Register { uniform, number: digits.parse().ok()? })
}

/// The number that an operand is.
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
