//! The dimensions of a matrix product, as plans and errors name them.

use std::fmt;

/// The dimensions of `Y[m, n] = X[m, k] · W[n, k]ᵀ`.
///
/// Any values can be stored; [`Plan::new`](crate::Plan::new) and the GEMM calls check them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Tokens: rows of the activations and of the output.
    pub m: usize,
    /// Output channels: rows of the weights, columns of the output.
    pub n: usize,
    /// Input channels: columns of the activations and of the weights.
    pub k: usize,
}

impl Problem {
    /// Creates a problem with these dimensions.
    #[must_use]
    pub const fn new(m: usize, n: usize, k: usize) -> Self {
        Self { m, n, k }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "m = {}, n = {}, k = {}", self.m, self.n, self.k)
    }
}
