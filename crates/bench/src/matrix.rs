//! The size of a weight matrix, written `NxK`: N output channels of K elements each.
//! The command line, the result files and the pages all use this notation.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, ensure};

/// The size of a weight matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Matrix {
    /// Output channels.
    pub n: usize,
    /// Elements per channel.
    pub k: usize,
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.n, self.k)
    }
}

impl FromStr for Matrix {
    type Err = anyhow::Error;

    /// Parses `4096x11008`; `×` and `X` are accepted as well.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (n, k) = text
            .split_once(['x', 'X', '×'])
            .with_context(|| format!("{text:?} is not a matrix size; write NxK, such as 4096x11008"))?;
        let number = |name, part: &str| {
            let value: usize =
                part.trim().parse().with_context(|| format!("{name} of {text:?} is not a number"))?;
            ensure!(value > 0, "{name} of {text:?} must be at least 1");
            Ok(value)
        };
        Ok(Self { n: number("n", n)?, k: number("k", k)? })
    }
}

/// The distinct matrices, in the order of their first occurrence.
pub(super) fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}
