//! What quantizers know of a layer's inputs: their second moments, recorded from a float run or from captured inputs.
//!
//! A calibration file is a safetensors file. For each recorded input of a layer `L` with `k` channels it has
//! - `L.mean_square`, f32 `[k]`: `E[x²]` of each channel,
//! - `L.absmax`, f32 `[k]`: the largest magnitude of each channel,
//! - `L.hessian`, f32 `[k, k]`, if it was asked for: `E[x xᵀ]`.
//!
//! Layers with the same input share one set. [`CalibrationContent`] has the metadata;
//! `liquidgemm quantize` reads these files through `liquidgemm_checkpoint`.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use liquidgemm::NewFile;
use liquidgemm_checkpoint::CalibrationContent;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::Error;
use crate::layers::FloatLayers;
use crate::model::{Layers, LinearWeights};

/// The second moments of a layer's inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// The number of inputs, which are tokens.
    pub tokens: u64,
    /// `E[x²]`, `[k]`.
    pub mean_square: Vec<f32>,
    /// The largest `|x|`, `[k]`.
    pub absmax: Vec<f32>,
    /// `E[x xᵀ]`, row-major `[k, k]`.
    pub hessian: Option<Vec<f32>>,
}

impl Moments {
    fn without_hessian(&self) -> Self {
        let Self { tokens, mean_square, absmax, hessian: _ } = self;
        Self { tokens: *tokens, mean_square: mean_square.clone(), absmax: absmax.clone(), hessian: None }
    }
}

/// The moments of a model's layers, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Calibration {
    layers: BTreeMap<String, Arc<Moments>>,
}

impl Calibration {
    /// Returns the moments of a layer.
    pub fn layer(&self, name: &str) -> Option<&Moments> {
        self.layers.get(name).map(Arc::as_ref)
    }

    /// Returns the layers' names and moments, by name.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &Moments)> {
        self.layers.iter().map(|(name, moments)| (name.as_str(), moments.as_ref()))
    }

    /// Forgets the matrices, and keeps what each channel has.
    pub fn drop_hessians(&mut self) {
        let mut small: Vec<(Arc<Moments>, Arc<Moments>)> = Vec::new();
        for moments in self.layers.values_mut() {
            let known = small
                .iter()
                .find(|(large, _)| Arc::ptr_eq(large, moments))
                .map(|(_, small)| Arc::clone(small));
            let without = known.unwrap_or_else(|| Arc::new(moments.without_hessian()));
            small.push((std::mem::replace(moments, Arc::clone(&without)), without));
        }
    }

    /// Writes the file, or leaves an existing one as it was.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] if it can't be written.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let mut sets: Vec<(&str, &Arc<Moments>)> = Vec::new();
        let mut names: BTreeMap<String, String> = BTreeMap::new();
        for (layer, moments) in &self.layers {
            let set = sets.iter().find(|(_, known)| Arc::ptr_eq(known, moments)).map(|&(name, _)| name);
            if set.is_none() {
                sets.push((layer, moments));
            }
            names.insert(layer.clone(), set.unwrap_or(layer).to_owned());
        }
        let mut tensors = Vec::new();
        for (name, moments) in &sets {
            let k = moments.mean_square.len();
            let mut add = |what: &str, shape: Vec<usize>, values: &'_ [f32]| {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                tensors.push((format!("{name}.{what}"), shape, bytes));
            };
            add("mean_square", vec![k], &moments.mean_square);
            add("absmax", vec![k], &moments.absmax);
            if let Some(hessian) = &moments.hessian {
                add("hessian", vec![k, k], hessian);
            }
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("the shape fits the values");
            (name.as_str(), view)
        });
        let tokens = sets.iter().map(|(name, moments)| ((*name).to_owned(), moments.tokens)).collect();
        let entry = CalibrationContent::new(tokens, names).to_entry();
        let metadata = HashMap::from([(CalibrationContent::KEY.to_owned(), entry)]);
        let file = NewFile::create(path).map_err(Error::File)?;
        safetensors::serialize_to_file(views, Some(metadata), file.unfinished_path())
            .map_err(|error| Error::write(path)(std::io::Error::other(error)))?;
        file.finish().map_err(Error::File)
    }

    /// Reads a calibration file, or a safetensors file of captured inputs.
    ///
    /// Captured inputs are tensors `[tokens, k]` of f32, f16 or bf16, each named after its layer.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidFile`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        let bytes = fs::read(path).map_err(Error::read(path))?;
        let invalid = |reason: String| Error::invalid(path, reason);
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| invalid(error.to_string()))?;
        match header.metadata().as_ref().and_then(|metadata| metadata.get(CalibrationContent::KEY)) {
            Some(entry) => Self::parse(&bytes, entry).map_err(invalid),
            None => Self::of_captured(path, &bytes),
        }
    }

    fn parse(bytes: &[u8], entry: &str) -> Result<Self, String> {
        let CalibrationContent { tokens, layers: names, .. } = CalibrationContent::parse(entry)?;
        let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let tensor = |name: &str, shape: &[usize]| {
            let view = file.tensor(name).map_err(|error| format!("tensor {name}: {error}"))?;
            if view.dtype() != Dtype::F32 || view.shape() != shape {
                return Err(format!(
                    "tensor {name} is {:?} {:?}, expected F32 {shape:?}",
                    view.dtype(),
                    view.shape()
                ));
            }
            let values: Vec<f32> =
                view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
            match values.iter().find(|value| !value.is_finite()) {
                Some(value) => Err(format!("tensor {name} has a value that is not finite: {value}")),
                None => Ok(values),
            }
        };
        let mut sets: BTreeMap<&str, Arc<Moments>> = BTreeMap::new();
        for (name, &tokens) in &tokens {
            let key = |what: &str| format!("{name}.{what}");
            let view = file
                .tensor(&key("mean_square"))
                .map_err(|error| format!("{}: {error}", key("mean_square")))?;
            let &[k] = view.shape() else {
                return Err(format!(
                    "tensor {} has shape {:?}, expected one dimension",
                    key("mean_square"),
                    view.shape()
                ));
            };
            let has_hessian = file.tensor(&key("hessian")).is_ok();
            let moments = Moments {
                tokens,
                mean_square: tensor(&key("mean_square"), &[k])?,
                absmax: tensor(&key("absmax"), &[k])?,
                hessian: has_hessian.then(|| tensor(&key("hessian"), &[k, k])).transpose()?,
            };
            sets.insert(name, Arc::new(moments));
        }
        let layers = names.iter().map(|(layer, set)| {
            let moments =
                sets.get(set.as_str()).ok_or_else(|| format!("layer {layer} has no moments {set}"))?;
            Ok((layer.clone(), Arc::clone(moments)))
        });
        Ok(Self { layers: layers.collect::<Result<_, String>>()? })
    }

    fn of_captured(path: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu)
            .map_err(|error| Error::invalid(path, error))?;
        let mut layers = BTreeMap::new();
        for (name, tensor) in tensors {
            if tensor.dims().len() != 2 || tensor.elem_count() == 0 || !tensor.dtype().is_float() {
                let (shape, dtype) = (tensor.dims(), tensor.dtype());
                let reason = format!(
                    "tensor {name} is {dtype:?} {shape:?}; captured inputs are float [tokens, k] named after layers"
                );
                return Err(Error::invalid(path, reason));
            }
            let mut sums = Sums::new(tensor.dims()[1], true);
            sums.add(&tensor.to_dtype(DType::F32)?)?;
            let moments = sums.finish();
            if moments.absmax.iter().any(|value| !value.is_finite()) {
                return Err(Error::invalid(path, format!("tensor {name} has a value that is not finite")));
            }
            layers.insert(name, Arc::new(moments));
        }
        Ok(Self { layers })
    }
}

/// The running sums of one input.
struct Sums {
    tokens: u64,
    squares: Vec<f64>,
    absmax: Vec<f32>,
    /// `Σ x xᵀ`, `[k, k]`.
    products: Option<Vec<f32>>,
}

impl Sums {
    fn new(k: usize, hessian: bool) -> Self {
        Self {
            tokens: 0,
            squares: vec![0.0; k],
            absmax: vec![0.0; k],
            products: hessian.then(|| vec![0.0; k * k]),
        }
    }

    /// Adds inputs `[tokens, k]`.
    fn add(&mut self, x: &Tensor) -> Result<(), Error> {
        let (tokens, k) = x.dims2()?;
        self.tokens += tokens as u64;
        for row in x.flatten_all()?.to_vec1::<f32>()?.chunks_exact(k) {
            for ((x, square), absmax) in row.iter().zip(&mut self.squares).zip(&mut self.absmax) {
                *square += f64::from(*x).powi(2);
                // NaN must not vanish here, as it would in `max`.
                *absmax = if absmax.is_nan() || x.abs() <= *absmax { *absmax } else { x.abs() };
            }
        }
        if let Some(sums) = &mut self.products {
            let products = x.t()?.matmul(x)?.flatten_all()?.to_vec1::<f32>()?;
            sums.par_iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
        }
        Ok(())
    }

    fn finish(mut self) -> Moments {
        let k = self.squares.len();
        let scale = 1.0 / self.tokens.max(1) as f64;
        Moments {
            tokens: self.tokens,
            mean_square: self.squares.iter().map(|square| (square * scale) as f32).collect(),
            absmax: self.absmax,
            hessian: self.products.take().map(|mut sums| {
                for row in 0..k {
                    for column in 0..=row {
                        // The product is symmetric but for its rounding.
                        let value = (f64::from(sums[row * k + column]) * scale) as f32;
                        sums[row * k + column] = value;
                        sums[column * k + row] = value;
                    }
                }
                sums
            }),
        }
    }
}

/// Float layers that record their inputs.
pub struct Recorder<'a> {
    float: FloatLayers<'a>,
    sums: RefCell<Vec<Option<Sums>>>,
}

impl<'a> Recorder<'a> {
    /// Records second moments, and with `hessian` their full matrix.
    pub fn new(layers: &'a [LinearWeights], hessian: bool) -> Self {
        let sums = layers
            .iter()
            .enumerate()
            .map(|(index, layer)| (layer.input == index).then(|| Sums::new(layer.shape().1, hessian)))
            .collect();
        Self { float: FloatLayers(layers), sums: RefCell::new(sums) }
    }

    /// Returns what was recorded.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if an input was not finite.
    pub fn finish(self) -> Result<Calibration, Error> {
        let layers = self.float.0;
        let sets: Vec<Option<Arc<Moments>>> =
            self.sums.into_inner().into_iter().map(|sums| sums.map(|sums| Arc::new(sums.finish()))).collect();
        let mut calibration = Calibration::default();
        for layer in layers {
            let moments = sets[layer.input].clone().expect("the first layer with an input records it");
            if moments.absmax.iter().any(|value| !value.is_finite()) {
                return Err(Error::NotFinite { what: format!("the input of layer {}", layer.name) });
            }
            calibration.layers.insert(layer.name.clone(), moments);
        }
        Ok(calibration)
    }
}

impl Layers for Recorder<'_> {
    fn apply(&self, layer: usize, x: &Tensor) -> Result<Tensor, Error> {
        if let Some(sums) = &mut self.sums.borrow_mut()[layer] {
            sums.add(x)?;
        }
        self.float.apply(layer, x)
    }
}
