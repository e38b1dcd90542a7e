//! How weights are quantized.

use std::fmt;
use std::str::FromStr;

use liquidgemm::{Group, PackedWeights};

use crate::select::Patterns;

/// A method that chooses codes and pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Method {
    /// Round to nearest, as in the LiquidGEMM paper.
    Rtn,
    /// Searches each group's pair for the smallest squared error.
    #[default]
    Search,
}

impl Method {
    /// The names of all methods.
    pub const NAMES: [&str; 2] = ["rtn", "search"];

    /// Quantizes rows of a matrix.
    pub(crate) fn quantize(
        self,
        weights: &[f32],
        n: usize,
        k: usize,
        group: Group,
    ) -> Result<PackedWeights, liquidgemm::Error> {
        let method = match self {
            Method::Rtn => liquidgemm::Method::Rtn,
            Method::Search => liquidgemm::Method::Search,
        };
        let options = liquidgemm::QuantizeOptions { method, group, ..Default::default() };
        PackedWeights::quantize_with(weights, n, k, &options)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Method::Rtn => "rtn",
            Method::Search => "search",
        })
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "rtn" => Ok(Method::Rtn),
            "search" => Ok(Method::Search),
            other => Err(format!("{other:?} is no method; the methods are {}", Self::NAMES.join(", "))),
        }
    }
}

/// What to quantize, and how.
#[derive(Clone, Debug, Default)]
pub struct QuantizeOptions {
    /// The method.
    pub method: Method,
    /// The group. Without one, 64, or the group of a model that another quantizer has quantized.
    pub group: Option<Group>,
    /// Patterns that overrule the default choice of layers.
    pub patterns: Patterns,
}

impl QuantizeOptions {
    /// Returns a text that differs between options whose results could differ.
    /// The choice of layers is not part of it, because a plan lists the layers.
    pub(crate) fn fingerprint(&self) -> String {
        format!("{} {:?}", self.method, self.group)
    }
}
