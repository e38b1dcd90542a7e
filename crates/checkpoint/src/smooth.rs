//! Smoothing of a model: which modules share a vector, where it is folded into the layer before, and how it is made.
//!
//! The inputs of some modules are divided by a vector, and their weights' columns are multiplied by it. In models of a known
//! family the division is folded into what writes the inputs: a norm's weight, or the rows of a linear layer. Elsewhere the output stores the
//! vector.
//!
//! A folded norm weight is rounded to its type first. The vector is then the quotient of the old and the new weight, so that rounding
//! costs nothing.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use liquidgemm::{Group, smoothing_auto_of_sample, smoothing_vector};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::calibration::Calibration;
use crate::error::{Result, weights_error};
use crate::plan::{Fate, Layer};
use crate::quantize::blocks;
use crate::source::Source;
use crate::structure::{Link, Structure};

/// The exponent of smoothing vectors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Smoothing {
    /// This exponent, from 0 to 1.
    Alpha(f32),
    /// For each input the exponent with the smallest expected error, of 0.1, 0.2, … 0.9, or no smoothing.
    Auto,
}

impl fmt::Display for Smoothing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Smoothing::Alpha(alpha) => alpha.fmt(f),
            Smoothing::Auto => f.pad("auto"),
        }
    }
}

impl FromStr for Smoothing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Smoothing::Auto);
        }
        let alpha = text.parse().ok().filter(|alpha| (0.0..=1.0).contains(alpha));
        let alpha = alpha.ok_or_else(|| format!("{text:?} is neither a number from 0 to 1 nor \"auto\""))?;
        Ok(Smoothing::Alpha(alpha))
    }
}

/// A vector that is folded, as the output's configuration lists it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct FoldedVector {
    /// The modules whose columns are multiplied by the vector. The first one names it.
    pub(crate) modules: Vec<String>,
    /// The module, or the norm, whose weight and bias are divided by it.
    pub(crate) into: String,
}

/// Modules with the same inputs.
struct Site {
    /// Indices of the plan's layers.
    layers: Vec<usize>,
    /// The index of the layer that the vector is folded into.
    producer: Option<usize>,
    is_norm: bool,
}

/// All smoothing of a plan.
#[derive(Default)]
pub(crate) struct Sites {
    sites: Vec<Site>,
    /// From a layer to the site whose inputs it reads.
    readers: HashMap<usize, usize>,
    /// From a weight or a bias to the site whose vector divides it.
    divided: HashMap<usize, usize>,
    vectors: Mutex<HashMap<usize, Arc<Vec<f32>>>>,
}

impl Sites {
    /// Groups the packed layers by their inputs, and decides where each vector is folded into.
    pub(crate) fn new(source: &dyn Source, layers: &[Layer], calibration: &Calibration) -> Self {
        let mut sites = Self::default();
        let packed: HashMap<&str, usize> = layers
            .iter()
            .enumerate()
            .filter(|(index, _)| !source.tensors()[*index].is_imported)
            .filter_map(|(index, layer)| Some((layer.packed_module()?, index)))
            .collect();
        if let Ok(structure) = Structure::of(source) {
            for link in structure.links() {
                let Some(consumers) = link
                    .consumers
                    .iter()
                    .map(|name| packed.get(name.as_str()).copied())
                    .collect::<Option<Vec<_>>>()
                else {
                    continue;
                };
                let k = layers[consumers[0]].shape[1];
                if consumers.iter().any(|&layer| layers[layer].shape[1] != k) {
                    continue;
                }
                let producer = producer(source, layers, &structure, &link, &packed, k);
                let number = sites.sites.len();
                sites.readers.extend(consumers.iter().map(|&layer| (layer, number)));
                if let Some(weight) = producer {
                    sites.divided.insert(weight, number);
                    let bias = structure.tensor(&format!("{}.bias", link.producer));
                    sites.divided.extend(bias.map(|bias| (bias, number)));
                }
                sites.sites.push(Site { layers: consumers, producer, is_norm: link.is_norm });
            }
        }
        // Elsewhere the calibration says which inputs are the same.
        let mut sets: BTreeMap<(Option<&str>, usize), Vec<usize>> = BTreeMap::new();
        for (module, &layer) in &packed {
            if !sites.readers.contains_key(&layer) {
                sets.entry((calibration.set(module), layers[layer].shape[1])).or_default().push(layer);
            }
        }
        for mut layers in sets.into_values() {
            layers.sort_unstable();
            sites.readers.extend(layers.iter().map(|&layer| (layer, sites.sites.len())));
            sites.sites.push(Site { layers, producer: None, is_norm: false });
        }
        sites
    }

    /// Returns the site whose inputs a layer reads.
    pub(crate) fn of_reader(&self, layer: usize) -> Option<usize> {
        self.readers.get(&layer).copied()
    }

    /// Returns the site whose vector divides a tensor: a norm's weight, the rows of a linear layer, or a bias.
    pub(crate) fn of_divided(&self, layer: usize) -> Option<usize> {
        self.divided.get(&layer).copied()
    }

    /// Returns whether the output stores the vector of the inputs that a layer reads.
    pub(crate) fn is_stored(&self, layer: usize) -> bool {
        self.of_reader(layer).is_some_and(|site| self.sites[site].producer.is_none())
    }

    /// Returns the numbers of the sites whose vectors are folded, and what the configuration says of them.
    pub(crate) fn folded(&self, layers: &[Layer]) -> Vec<(usize, FoldedVector)> {
        let name = |layer: usize| {
            let name = &layers[layer].name;
            name.strip_suffix(".weight").unwrap_or(name).to_owned()
        };
        let folded = self.sites.iter().enumerate().filter_map(|(number, site)| {
            let modules = site.layers.iter().map(|&layer| name(layer)).collect();
            Some((number, FoldedVector { modules, into: name(site.producer?) }))
        });
        folded.collect()
    }

    /// Returns the vector of a site. It is made when it is first needed.
    pub(crate) fn vector(&self, site: usize, making: &Making<'_>) -> Result<Arc<Vec<f32>>> {
        let vectors = || self.vectors.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vector) = vectors().get(&site).cloned() {
            return Ok(vector);
        }
        let vector = Arc::new(self.make(&self.sites[site], making)?);
        vectors().insert(site, Arc::clone(&vector));
        Ok(vector)
    }

    fn make(&self, site: &Site, making: &Making<'_>) -> Result<Vec<f32>> {
        let &Making { source, layers, calibration, smoothing, block_bytes } = making;
        let first = &layers[site.layers[0]];
        let (module, k) = (first.packed_module().unwrap_or(&first.name), first.shape[1]);
        let Fate::Packed { group, .. } = first.fate else { unreachable!("the layers of a site are packed") };
        let weights = Weights::read(source, site, layers, k, block_bytes, smoothing == Smoothing::Auto)?;
        let statistics = calibration.statistics(module, k)?;
        let vector = weights.vector(&statistics, k, smoothing, group).map_err(weights_error(module))?;
        match site.producer.filter(|_| site.is_norm) {
            None => Ok(vector),
            Some(norm) => {
                let mut weight = vec![0.0; k];
                source.read_rows(norm, 0..1, &mut weight)?;
                let dtype = source.tensors()[norm].kept;
                Ok(weight
                    .iter()
                    .zip(vector)
                    .map(|(&weight, factor)| representable(weight, factor, dtype))
                    .collect())
            }
        }
    }
}

/// What vectors are made from.
#[derive(Clone, Copy)]
pub(crate) struct Making<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) layers: &'a [Layer],
    pub(crate) calibration: &'a Calibration,
    pub(crate) smoothing: Smoothing,
    pub(crate) block_bytes: usize,
}

/// Returns the index of the weight that a link's vector can be folded into.
fn producer(
    source: &dyn Source,
    layers: &[Layer],
    structure: &Structure<'_>,
    link: &Link,
    packed: &HashMap<&str, usize>,
    k: usize,
) -> Option<usize> {
    let can_change = |tensor: usize| {
        let info = &source.tensors()[tensor];
        let is_kept = matches!(layers[tensor].fate, Fate::Kept(_));
        is_kept && info.is_readable && is_float(info.kept) && info.shape == [k]
    };
    if let Some(bias) = structure.tensor(&format!("{}.bias", link.producer))
        && !can_change(bias)
    {
        return None;
    }
    if link.is_norm {
        return structure.tensor(&format!("{}.weight", link.producer)).filter(|&norm| can_change(norm));
    }
    packed.get(link.producer.as_str()).copied().filter(|&layer| layers[layer].shape[0] == k)
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// The weights of a site, as far as vectors depend on them.
struct Weights {
    /// The largest magnitude in each column, `[k]`.
    largest: Vec<f32>,
    /// Evenly spaced channels, `[·, k]`.
    sample: Vec<f32>,
}

impl Weights {
    fn read(
        source: &dyn Source,
        site: &Site,
        layers: &[Layer],
        k: usize,
        block_bytes: usize,
        with_sample: bool,
    ) -> Result<Self> {
        let all: usize = site.layers.iter().map(|&layer| layers[layer].shape[0]).sum();
        let sampled = if with_sample { all.min(liquidgemm::SMOOTHING_SAMPLE) } else { 0 };
        let mut read = Self { largest: vec![0.0; k], sample: Vec::with_capacity(sampled * k) };
        let mut number = 0;
        for &layer in &site.layers {
            for rows in blocks(layers[layer].shape[0], k * size_of::<f32>(), block_bytes, 1) {
                let mut weights = vec![0f32; rows.len() * k];
                source.read_rows(layer, rows, &mut weights)?;
                for row in weights.chunks_exact(k) {
                    // NaN stays NaN, and the vector's check finds it.
                    read.largest.iter_mut().zip(row).for_each(|(largest, weight)| {
                        if weight.is_nan() || weight.abs() > *largest {
                            *largest = weight.abs();
                        }
                    });
                    if read.sample.len() < sampled * k && number == read.sample.len() / k * all / sampled {
                        read.sample.extend_from_slice(row);
                    }
                    number += 1;
                }
            }
        }
        Ok(read)
    }

    fn vector(
        &self,
        statistics: &liquidgemm::InputStatistics,
        k: usize,
        smoothing: Smoothing,
        group: Group,
    ) -> Result<Vec<f32>, liquidgemm::Error> {
        match smoothing {
            Smoothing::Alpha(alpha) => smoothing_vector(&statistics.largest, &self.largest, 1, k, alpha),
            Smoothing::Auto => smoothing_auto_of_sample(statistics, &self.largest, &self.sample, group)
                .map(|(vector, _)| vector),
        }
    }
}

/// Returns the factor nearest to `factor` by which a weight can be divided in its type. 1 if there is none.
fn representable(weight: f32, factor: f32, dtype: Dtype) -> f32 {
    let divided = rounded(weight / factor, dtype);
    let factor = (f64::from(weight) / f64::from(divided)) as f32;
    if factor.is_normal() && factor > 0.0 { factor } else { 1.0 }
}

/// Rounds a number to a type.
fn rounded(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Encodes numbers in a type of floats, little-endian.
///
/// # Panics
/// For any other type.
pub(crate) fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        other => panic!("{other:?} is no type of floats that are written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_norm_weight_divided_by_a_representable_factor_is_exact_in_its_type() {
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            for i in 1..200 {
                let weight = rounded((i as f32 * 0.37).sin() * 3.0, dtype);
                let wanted = 0.02 + i as f32 * 0.11;
                let factor = representable(weight, wanted, dtype);
                let divided = rounded(weight / factor, dtype);
                assert!((divided * factor / weight - 1.0).abs() < 3e-7, "{dtype:?} {weight} {factor}");
                assert!((factor / wanted - 1.0).abs() < 0.005, "{factor} {wanted}");
            }
            assert_eq!(representable(0.0, 7.0, dtype), 1.0);
            assert_eq!(representable(1e-30, 1e30, dtype), 1.0);
        }
    }

    #[test]
    fn exponents_are_parsed_as_they_are_written() {
        for text in ["0.5", "0", "1", "auto"] {
            assert_eq!(text.parse::<Smoothing>().unwrap().to_string(), text);
        }
        for text in ["1.5", "-0.1", "NaN", "", "Auto"] {
            assert!(text.parse::<Smoothing>().is_err(), "{text}");
        }
    }
}
