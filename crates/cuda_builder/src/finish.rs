//! Turns the compiler's PTX into finished kernels. All functions are pure functions on text.
//!
//! rustc has no attribute for launch bounds, cluster shapes or aligned parameters.
//! `cuda_std_macros` leaves notes about them in the PTX, and this file turns the notes into directives.
//! Each note must apply exactly once.
//!
//! Every entry then gets a module of its own, so that the driver compiles only the kernels that are launched.
//! Calls and local memory are errors, because no kernel may have either.
//! This file's text is part of the sources' hash (`hash.rs`).

use std::collections::BTreeSet;

/// The start of a note from `cuda_std_macros`.
const NOTE: &str = "//@";

/// One kernel's finished PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The entry's name.
    pub entry: String,
    /// The whole module: directives, module-level variables, and the one entry.
    pub text: String,
}

/// PTX that cannot be finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FinishError {
    /// A malformed note.
    #[error("the note `{note}` is malformed: {reason}")]
    MalformedNote {
        /// The note's line.
        note: String,
        /// The reason.
        reason: &'static str,
    },
    /// A note about a kernel that the PTX does not contain.
    #[error("the note `{note}` names no kernel of this PTX: is `#[kernel]` on a generic or unused function?")]
    UnknownKernel {
        /// The note's line.
        note: String,
    },
    /// Two notes, or a note and the compiler, set the same directive.
    #[error("the note `{note}` sets a directive that is already set: remove one of the two")]
    RepeatedNote {
        /// The note's line.
        note: String,
    },
    /// A note about a parameter that is missing or not an array of bytes.
    #[error("the note `{note}` needs one parameter `.param .align N .b8 {parameter}[..]`")]
    NoSuchParameter {
        /// The note's line.
        note: String,
        /// The parameter's symbol.
        parameter: String,
    },
    /// The `.target` directive is missing, repeated, or names another architecture.
    #[error("the PTX has the target directives {found:?}: expected exactly one, `.target {expected}`")]
    Target {
        /// The expected target, without a suffix.
        expected: String,
        /// The directives in the PTX.
        found: Vec<String>,
    },
    /// A function that is not a kernel.
    #[error(
        "the PTX has a function that is not a kernel: `{signature}`. Kernels must not call functions: \
         leave no bounds check, division or panic in them, and mark helpers #[inline(always)]"
    )]
    Function {
        /// The function's first line.
        signature: String,
    },
    /// A kernel uses local memory: an array or a spilled register that lives in device memory.
    #[error(
        "kernel {entry} uses local memory: `{line}`. Index arrays by constants only, and pass no reference to one \
         to code that is not inlined"
    )]
    LocalMemory {
        /// The kernel.
        entry: String,
        /// The line.
        line: String,
    },
    /// The text is not a PTX module.
    #[error("cannot read the PTX from line {line} on: {reason}")]
    Syntax {
        /// The line, counted from 1.
        line: usize,
        /// The reason.
        reason: &'static str,
    },
    /// The PTX has no kernel.
    #[error("the PTX has no kernel: the device crate needs a function marked `#[kernel]`")]
    NoKernel,
}

/// Finishes the compiler's PTX for `target` (such as `sm_90a`) and returns one module per kernel,
/// sorted by name.
///
/// # Errors
/// [`FinishError`] if a note cannot be applied exactly once,
/// or if the PTX holds something that no kernel may have.
pub fn finish(text: &str, target: &str) -> Result<Vec<Kernel>, FinishError> {
    let mut module = Module::parse(text)?;
    module.set_target(target)?;
    let mut seen = BTreeSet::new();
    for note in &module.notes {
        if !seen.insert(note.subject()) {
            return Err(FinishError::RepeatedNote { note: note.line.clone() });
        }
        let entry = module.entries.iter_mut().find(|entry| entry.name == note.entry);
        entry.ok_or_else(|| FinishError::UnknownKernel { note: note.line.clone() })?.apply(note)?;
    }
    if module.entries.is_empty() {
        return Err(FinishError::NoKernel);
    }
    let preamble = module.preamble.join("\n");
    module.entries.sort_by(|a, b| a.name.cmp(&b.name));
    module
        .entries
        .into_iter()
        .map(|entry| {
            entry.refuse_local_memory()?;
            let body = short_registers(&stable_labels(&compact(&entry.body)));
            let text = format!("{preamble}\n\n{}\n{body}\n", entry.head.trim_end());
            Ok(Kernel { entry: entry.name, text })
        })
        .collect()
}

/// A parsed PTX module.
#[derive(Default)]
struct Module {
    /// Directives and variables, in their original order.
    preamble: Vec<String>,
    notes: Vec<Note>,
    entries: Vec<Entry>,
}

/// A kernel in the PTX.
struct Entry {
    name: String,
    /// Linkage, name, parameters, and performance directives.
    head: String,
    /// The body, including its braces.
    body: String,
}

impl Module {
    fn parse(text: &str) -> Result<Self, FinishError> {
        let mut module = Self::default();
        let mut lines = text.lines().enumerate();
        while let Some((index, line)) = lines.next() {
            let code = code_of(line);
            if line.trim().starts_with(NOTE) {
                module.notes.push(Note::parse(line.trim())?);
                continue;
            } else if code.is_empty() {
                continue;
            } else if [".version", ".target", ".address_size"].iter().any(|name| code.starts_with(name)) {
                module.preamble.push(code.to_owned());
                continue;
            }
            // This is a function or a variable. It ends at its closing brace or semicolon.
            let is_function = has_word(code, ".entry") || has_word(code, ".func");
            let mut item = vec![line];
            let mut depth = depth_change(code);
            let mut opened = code.contains('{');
            let closed = |depth: i32, opened: bool, code: &str| {
                depth == 0 && if is_function { opened || code.ends_with(';') } else { code.ends_with(';') }
            };
            let mut last = code;
            while !closed(depth, opened, last) {
                let reason = "a function or variable is not closed";
                let (_, line) = lines.next().ok_or(FinishError::Syntax { line: index + 1, reason })?;
                last = code_of(line);
                depth += depth_change(last);
                opened |= last.contains('{');
                item.push(line);
            }
            let item = item.join("\n");
            if has_word(code, ".func") {
                return Err(FinishError::Function { signature: code.to_owned() });
            } else if has_word(code, ".entry") {
                module.entries.push(Entry::parse(&item, index + 1)?);
            } else {
                module.preamble.push(item);
            }
        }
        Ok(module)
    }

    /// Replaces rustc's target, which has no suffix, by the target that the instructions need.
    fn set_target(&mut self, target: &str) -> Result<(), FinishError> {
        let expected = target.trim_end_matches(|suffix: char| suffix.is_ascii_lowercase());
        let is_target = |line: &&mut String| line.starts_with(".target");
        let mut found: Vec<&mut String> = self.preamble.iter_mut().filter(is_target).collect();
        let accepted = [format!(".target {expected}"), format!(".target {target}")];
        if found.len() != 1 || !accepted.contains(found[0]) {
            let found = found.into_iter().map(|line| line.clone()).collect();
            return Err(FinishError::Target { expected: expected.to_owned(), found });
        }
        *found[0] = format!(".target {target}");
        Ok(())
    }
}

impl Entry {
    /// Parses an entry that begins at line `line` of the module.
    fn parse(item: &str, line: usize) -> Result<Self, FinishError> {
        let error = |reason| FinishError::Syntax { line, reason };
        let (head, body) = item.split_once('{').ok_or(error("an entry has no body"))?;
        let (_, rest) = head.split_once(".entry").ok_or(error("an entry has no name"))?;
        let name =
            rest.trim_start().split(|c: char| c == '(' || c.is_whitespace()).next().unwrap_or_default();
        if name.is_empty() {
            return Err(error("an entry has no name"));
        }
        Ok(Self { name: name.to_owned(), head: head.trim_end().to_owned(), body: format!("{{{body}") })
    }

    /// Applies a note: adds its directives or sets its alignment.
    fn apply(&mut self, note: &Note) -> Result<(), FinishError> {
        match note.kind {
            NoteKind::LaunchBounds { max_threads, min_blocks } => {
                self.direct(note, ".maxntid", &format!("{max_threads}, 1, 1"))?;
                if min_blocks > 0 {
                    self.direct(note, ".minnctapersm", &min_blocks.to_string())?;
                }
                Ok(())
            }
            NoteKind::Cluster { blocks } => {
                self.direct(note, ".reqnctapercluster", &format!("{blocks}, 1, 1"))
            }
            NoteKind::AlignParameter { index, alignment } => self.align(note, index, alignment),
        }
    }

    /// Adds a performance directive after the parameters.
    fn direct(&mut self, note: &Note, directive: &str, value: &str) -> Result<(), FinishError> {
        if has_word(&self.head, directive) {
            return Err(FinishError::RepeatedNote { note: note.line.clone() });
        }
        self.head = format!("{}\n{directive} {value}", self.head);
        Ok(())
    }

    /// Sets the alignment of a parameter that is an array of bytes.
    fn align(&mut self, note: &Note, index: u32, alignment: u32) -> Result<(), FinishError> {
        let parameter = format!("{}_param_{index}", self.name);
        let error = || FinishError::NoSuchParameter { note: note.line.clone(), parameter: parameter.clone() };
        let symbol = format!(" {parameter}[");
        let mut matched = 0;
        let mut lines = Vec::new();
        for line in self.head.lines() {
            if !line.contains(&symbol) {
                lines.push(line.to_owned());
                continue;
            }
            matched += 1;
            let (before, after) = line.split_once(".align ").ok_or_else(error)?;
            let (_, after) =
                after.split_once(' ').filter(|(_, rest)| rest.starts_with(".b8 ")).ok_or_else(error)?;
            lines.push(format!("{before}.align {alignment} {after}"));
        }
        if matched != 1 {
            return Err(error());
        }
        self.head = lines.join("\n");
        Ok(())
    }

    fn refuse_local_memory(&self) -> Result<(), FinishError> {
        match self.body.lines().find(|line| code_of(line).contains(".local")) {
            Some(line) => {
                Err(FinishError::LocalMemory { entry: self.name.clone(), line: line.trim().to_owned() })
            }
            None => Ok(()),
        }
    }
}

/// A note from `cuda_std_macros`.
struct Note {
    line: String,
    entry: String,
    kind: NoteKind,
}

enum NoteKind {
    LaunchBounds { max_threads: u32, min_blocks: u32 },
    Cluster { blocks: u32 },
    AlignParameter { index: u32, alignment: u32 },
}

impl Note {
    fn parse(line: &str) -> Result<Self, FinishError> {
        let error = |reason| FinishError::MalformedNote { note: line.to_owned(), reason };
        let words: Vec<&str> = line.trim_start_matches(NOTE).split_whitespace().collect();
        let [name, entry, values @ ..] = words.as_slice() else {
            return Err(error("expected a kind, a kernel's name and numbers"));
        };
        let values: Result<Vec<u32>, _> = values.iter().map(|value| value.parse()).collect();
        let kind = match (*name, values.map_err(|_| error("expected integers after the name"))?.as_slice()) {
            ("launch_bounds", &[max_threads, min_blocks]) => {
                if !(1..=1024).contains(&max_threads) {
                    return Err(error("a thread block has 1 to 1024 threads"));
                }
                NoteKind::LaunchBounds { max_threads, min_blocks }
            }
            ("cluster", &[blocks]) => {
                if !(1..=16).contains(&blocks) {
                    return Err(error("a cluster has 1 to 16 thread blocks"));
                }
                NoteKind::Cluster { blocks }
            }
            ("align_parameter", &[index, alignment]) => {
                if !alignment.is_power_of_two() {
                    return Err(error("an alignment is a power of two"));
                }
                NoteKind::AlignParameter { index, alignment }
            }
            ("launch_bounds" | "cluster" | "align_parameter", _) => {
                return Err(error("wrong number of values"));
            }
            _ => return Err(error("unknown kind")),
        };
        Ok(Self { line: line.to_owned(), entry: (*entry).to_owned(), kind })
    }

    /// Returns a key of the directive that the note sets. No two notes may have the same.
    fn subject(&self) -> (&str, u8, u32) {
        match self.kind {
            NoteKind::LaunchBounds { .. } => (&self.entry, 0, 0),
            NoteKind::Cluster { .. } => (&self.entry, 1, 0),
            NoteKind::AlignParameter { index, .. } => (&self.entry, 2, index),
        }
    }
}

/// Returns a line without its comment.
fn code_of(line: &str) -> &str {
    line.split("//").next().unwrap_or_default().trim()
}

/// Returns the line's change in nesting depth, by braces and parentheses.
fn depth_change(code: &str) -> i32 {
    let count = |wanted: &[char]| code.chars().filter(|c| wanted.contains(c)).count() as i32;
    count(&['{', '(']) - count(&['}', ')'])
}

/// Returns whether `text` contains `word`, delimited by white space or opening parentheses.
fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| c.is_whitespace() || c == '(').any(|part| part == word)
}

/// Removes text that the assembler ignores, to keep the embedded PTX small.
///
/// Removes comment lines (the compiler puts two around every inline assembly), indentation, repeated spaces,
/// and spaces behind commas.
fn compact(body: &str) -> String {
    let lines = body.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ").replace(", ", ",");
    lines.map(words).collect::<Vec<_>>().join("\n")
}

/// Removes the function's number from labels such as `$L__BB7_12`, because it depends on the other kernels.
fn stable_labels(body: &str) -> String {
    const LABEL: &str = "$L__BB";
    let mut parts = body.split(LABEL);
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        result.push_str(LABEL);
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
        result.push_str(if rest.starts_with('_') { rest } else { part });
    }
    result
}

/// Removes the `%` from the names of virtual registers, because register names are most of the text.
///
/// Changes only registers that the kernel declares, as in `.reg .b32 %r<9>;`.
/// Special registers keep their `%`.
fn short_registers(body: &str) -> String {
    let declared: BTreeSet<&str> = body
        .lines()
        .filter(|line| line.starts_with(".reg "))
        .filter_map(|line| line.split_once('%')?.1.split_once('<'))
        .map(|(name, _)| name)
        .collect();
    let mut parts = body.split('%');
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let name = part.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default();
        let numbered = part[name.len()..].starts_with(|c: char| c.is_ascii_digit() || c == '<');
        if !(numbered && declared.contains(name)) {
            result.push('%');
        }
        result.push_str(part);
    }
    result
}

#[cfg(test)]
mod tests;
