//! What a quantization will do: which tensors are packed, which are kept, and what each shard of the output holds.

use std::collections::BTreeMap;

use liquidgemm::Group;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{CheckpointError, Result, weights_error};
use crate::format::{CONFIG_KEY, METHOD, Matrix, Part, ROTATION_KEY, SMOOTHING_KEY, VERSION, digits};
use crate::method::{Method, QuantizeOptions};
use crate::select::{Kept, Selection};
use crate::shard_writer::{OutputTensor, check_names};
use crate::smooth::{Making, Sites};
use crate::source::{Source, SourceTensor};

/// A plan to quantize a model.
pub struct Plan<'a> {
    pub(crate) source: &'a dyn Source,
    pub(crate) options: QuantizeOptions,
    layers: Vec<Layer>,
    pub(crate) sites: Sites,
}

/// What becomes of one tensor of the source.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Index of the tensor in the source.
    pub tensor: usize,
    /// The tensor's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its type in the source.
    pub stored: String,
    /// Its bytes in the source, with scales that belong to it.
    pub bytes_before: u64,
    /// Its bytes in the output.
    pub bytes_after: u64,
    /// What becomes of it.
    pub fate: Fate,
    /// Whether it is divided by the smoothing vector of the layers behind it.
    pub is_divided: bool,
}

impl Layer {
    /// Returns the module if it is packed.
    pub(crate) fn packed_module(&self) -> Option<&str> {
        match &self.fate {
            Fate::Packed { module, .. } => Some(module),
            _ => None,
        }
    }
}

/// What becomes of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is packed: the module, and the group.
    Packed {
        /// The module, the tensor's name without `.weight`.
        module: String,
        /// The group.
        group: Group,
    },
    /// It is kept, for this reason.
    Kept(Kept),
    /// It holds the scales of a weight that is packed, and is not needed any more.
    Dropped,
}

impl<'a> Plan<'a> {
    /// Plans to quantize `source`. Reads no weights.
    ///
    /// # Errors
    /// - [`CheckpointError::Options`](crate::CheckpointError::Options) if the options contradict one another, or the calibration
    ///   lacks a module.
    /// - [`CheckpointError::Pattern`](crate::CheckpointError::Pattern) for a pattern that is not valid or fits no module.
    /// - [`CheckpointError::Input`](crate::CheckpointError::Input) if two tensors of the output would have the same name.
    /// - [`CheckpointError::Weights`](crate::CheckpointError::Weights) if a matrix cannot be packed.
    pub fn new(source: &'a dyn Source, options: &QuantizeOptions) -> Result<Self> {
        options.check()?;
        if source.rotation().is_some() && options.smoothing.is_some() {
            // The calibration has seen the largest inputs of the model as it was.
            let reason = "a rotated model can't be smoothed by a calibration of the original; choose --rotate or --smooth";
            return Err(CheckpointError::Options { reason: reason.to_owned() });
        }
        let selection = Selection::new(source, &options.patterns)?;
        // The scales of a weight count as the weight's bytes.
        let mut scale_bytes = vec![0; source.tensors().len()];
        for tensor in source.tensors() {
            if let Some(weight) = tensor.scales_of {
                scale_bytes[weight] += tensor.stored_bytes;
            }
        }
        let mut layers = Vec::new();
        for (index, tensor) in source.tensors().iter().enumerate() {
            let (n, k) = (tensor.rows(), tensor.columns());
            let group = options.group.or(tensor.imported_group).unwrap_or_default();
            let matrix = Matrix { n, k, group };
            let bytes_before = tensor.stored_bytes + scale_bytes[index];
            let mut bytes_after = (n as u64).saturating_mul(tensor.kept_row_bytes() as u64);
            let fate = match selection.decide(tensor) {
                Err(kept) => Fate::Kept(kept),
                Ok(module) => {
                    matrix.check().map_err(weights_error(module))?;
                    let vectors = u64::from(tensor.permuted) + u64::from(is_smoothed(options, tensor));
                    let extra = 4 * k as u64 * vectors;
                    if matrix.bytes() + extra >= bytes_before && !tensor.is_imported {
                        Fate::Kept(Kept::NotSmaller)
                    } else {
                        if let Some(calibration) =
                            options.calibration.as_ref().filter(|_| !tensor.is_imported)
                        {
                            calibration.check(module, k, options.method == Method::Gptq)?;
                        }
                        bytes_after = matrix.bytes() + extra;
                        Fate::Packed { module: module.to_owned(), group }
                    }
                }
            };
            layers.push(Layer {
                tensor: index,
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                stored: tensor.stored.clone(),
                bytes_before: if tensor.scales_of.is_some() { 0 } else { bytes_before },
                bytes_after,
                fate,
                is_divided: false,
            });
        }
        let packed: Vec<bool> =
            layers.iter().map(|layer| matches!(layer.fate, Fate::Packed { .. })).collect();
        for (layer, tensor) in layers.iter_mut().zip(source.tensors()) {
            if tensor.scales_of.is_some_and(|weight| packed[weight]) {
                layer.fate = Fate::Dropped;
                layer.bytes_after = 0;
            }
        }
        let sites = match options.smoothing.and(options.calibration.as_ref()) {
            Some(calibration) => Sites::new(source, &layers, calibration),
            None => Sites::default(),
        };
        for (index, layer) in layers.iter_mut().enumerate() {
            layer.is_divided = sites.of_divided(index).is_some();
            if sites.of_reader(index).is_some() && !sites.is_stored(index) {
                layer.bytes_after -= 4 * layer.shape[1] as u64;
            }
        }
        let plan = Self { source, options: options.clone(), layers, sites };
        let outputs = plan.outputs();
        let names = outputs.iter().zip(source.shards());
        let names =
            names.flat_map(|(tensors, shard)| tensors.iter().map(move |t| (t.name.as_str(), shard.as_str())));
        check_names(names, source.path())?;
        Ok(plan)
    }

    /// Returns what becomes of each tensor, in the order of the source.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Returns the names of the output's shards.
    pub fn shards(&self) -> &[String] {
        self.source.shards()
    }

    /// Returns what smoothing vectors are made from, if there are any.
    pub(crate) fn making(&self, block_bytes: usize) -> Option<Making<'_>> {
        let (smoothing, calibration) = self.options.smoothing.zip(self.options.calibration.as_deref())?;
        Some(Making { source: self.source, layers: &self.layers, calibration, smoothing, block_bytes })
    }

    /// Returns the layers of a shard.
    pub(crate) fn layers_of(&self, shard: usize) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(move |layer| self.source.tensors()[layer.tensor].shard == shard)
    }

    /// Returns the tensors of a shard.
    pub(crate) fn tensors_of(&self, shard: usize) -> Vec<OutputTensor> {
        let mut tensors = Vec::new();
        for layer in self.layers_of(shard) {
            let source = &self.source.tensors()[layer.tensor];
            match &layer.fate {
                Fate::Dropped => {}
                Fate::Kept(_) => tensors.push(OutputTensor {
                    name: layer.name.clone(),
                    dtype: source.kept,
                    shape: layer.shape.clone(),
                }),
                Fate::Packed { module, group } => {
                    let matrix = matrix_of(layer, *group);
                    for part in Part::ALL {
                        let is_present = match part {
                            Part::Codes | Part::Pairs | Part::Scales => true,
                            Part::Smoothing => self.sites.is_stored(layer.tensor),
                            Part::InputPermutation => source.permuted,
                        };
                        if is_present {
                            let (name, dtype, shape) = (part.name(module), part.dtype(), matrix.shape(part));
                            tensors.push(OutputTensor { name, dtype, shape });
                        }
                    }
                }
            }
        }
        tensors
    }

    /// Returns the matrices of a shard by module.
    pub(crate) fn matrices_of(&self, shard: usize) -> BTreeMap<String, Matrix> {
        self.layers_of(shard)
            .filter_map(|layer| match &layer.fate {
                Fate::Packed { module, group } => Some((module.clone(), matrix_of(layer, *group))),
                _ => None,
            })
            .collect()
    }

    /// Returns the tensors of every shard.
    fn outputs(&self) -> Vec<Vec<OutputTensor>> {
        (0..self.shards().len()).map(|shard| self.tensors_of(shard)).collect()
    }

    /// Returns the output's `config.json`.
    pub(crate) fn config(&self) -> Map<String, Value> {
        let packed = self.layers.iter().filter_map(Layer::packed_module);
        // The group of all modules, unless another quantizer has chosen several.
        let mut groups = self.layers.iter().filter_map(|layer| match layer.fate {
            Fate::Packed { group, .. } => Some(group),
            _ => None,
        });
        let first = groups.next();
        let group = first.filter(|&first| groups.all(|group| group == first)).or(self.options.group);
        let kept =
            self.layers.iter().filter(|layer| matches!(&layer.fate, Fate::Kept(kept) if kept.is_linear()));
        let kept = kept.filter_map(|layer| layer.name.strip_suffix(".weight"));
        let mut own = json!({
            "quant_method": METHOD,
            "format_version": VERSION,
            "quantizer_version": env!("CARGO_PKG_VERSION"),
            "bits": 4,
            "activation_bits": 8,
            "method": self.options.method.to_string(),
            "group": group.unwrap_or_default().to_string(),
            "quantized_modules": packed.collect::<Vec<_>>(),
            "modules_to_not_convert": kept.collect::<Vec<_>>(),
        });
        if let Some(smoothing) = self.options.smoothing {
            let folded: Vec<_> =
                self.sites.folded(&self.layers).into_iter().map(|(_, folded)| folded).collect();
            own[SMOOTHING_KEY] = json!({"exponent": smoothing.to_string(), "folded": folded});
        }
        if let Some(block) = self.source.rotation() {
            own[ROTATION_KEY] = json!({"block": block});
        }
        let mut config = self.source.config().clone();
        if let Some(before) = config.get(CONFIG_KEY) {
            // Kept fp8 tensors still follow the configuration that they came with.
            own["source_quantization_config"] = before.clone();
        }
        config.insert(CONFIG_KEY.into(), own);
        config
    }

    /// Returns the output's index, if it has several shards.
    pub(crate) fn index(&self) -> Option<Value> {
        let shards = self.shards();
        if shards.len() < 2 {
            return None;
        }
        let outputs = self.outputs();
        let total: u64 = outputs.iter().flatten().map(OutputTensor::bytes).sum();
        let places = outputs.iter().zip(shards).flat_map(|(tensors, shard)| {
            tensors.iter().map(move |tensor| (tensor.name.clone(), json!(shard)))
        });
        Some(json!({"metadata": {"total_size": total}, "weight_map": places.collect::<Map<_, _>>()}))
    }

    /// Returns a text that differs between plans whose outputs could differ.
    pub(crate) fn fingerprint(&self) -> String {
        let mut hash = Xxh3::new();
        hash.update(env!("CARGO_PKG_VERSION").as_bytes());
        hash.update(self.source.fingerprint().as_bytes());
        hash.update(self.options.fingerprint().as_bytes());
        for (tensors, shard) in self.outputs().iter().zip(self.shards()) {
            hash.update(format!("{shard} {tensors:?}").as_bytes());
        }
        digits(&hash)
    }
}

/// Returns whether a packed tensor gets a smoothing vector. Imported codes are taken as they are.
fn is_smoothed(options: &QuantizeOptions, tensor: &SourceTensor) -> bool {
    options.smoothing.is_some() && !tensor.is_imported
}

/// Returns the sizes of a layer that is packed.
pub(crate) fn matrix_of(layer: &Layer, group: Group) -> Matrix {
    Matrix { n: layer.shape[0], k: layer.shape[1], group }
}
