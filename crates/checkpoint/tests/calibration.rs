//! Tests of quantization with statistics of the inputs: weighted search, GPTQ and smoothing.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{Tensor, bf16_values, f32_tensor, llama, numbers, safetensors_bytes, write_llama};
use liquidgemm::{
    GptqOptions, Group, Hessian, HessianBuilder, InputStatisticsBuilder, PackedWeights, smoothing_vector,
};
use liquidgemm_checkpoint::{
    Calibration, Checkpoint, CheckpointError, Method, Model, OpenOptions, Plan, Problem, QuantizeOptions,
    Smoothing, open, verify,
};
use safetensors::tensor::TensorView;

const TOKENS: usize = 40;
const QUERY: &str = "model.layers.0.self_attn.q_proj";
const UP: &str = "model.layers.0.mlp.up_proj";
const DOWN: &str = "model.layers.0.mlp.down_proj";

/// Inputs whose channels differ in size.
fn inputs(k: usize, seed: u32) -> Vec<f32> {
    numbers(TOKENS * k, seed).iter().enumerate().map(|(i, x)| x * (1 + i % k % 7) as f32).collect()
}

fn hessian(k: usize, seed: u32) -> Hessian {
    let mut builder = HessianBuilder::new(k).unwrap();
    builder.add(&inputs(k, seed), TOKENS).unwrap();
    builder.finish().unwrap()
}

/// Writes a calibration of layer 0, whose query and up projections share their inputs.
fn write_calibration(path: &Path) {
    let mut tensors: Vec<Tensor> = Vec::new();
    for (name, k, seed) in [(QUERY, 192, 1), (DOWN, 256, 2)] {
        let mut builder = InputStatisticsBuilder::new(k).unwrap();
        builder.add(&inputs(k, seed), TOKENS).unwrap();
        let statistics = builder.finish().unwrap();
        tensors.push(f32_tensor(&format!("{name}.mean_square"), &[k], &statistics.second_moments));
        tensors.push(f32_tensor(&format!("{name}.absmax"), &[k], &statistics.largest));
        tensors.push(f32_tensor(&format!("{name}.hessian"), &[k, k], hessian(k, seed).values()));
    }
    let entry = format!(
        r#"{{"version": 1, "tokens": {{"{QUERY}": {TOKENS}, "{DOWN}": {TOKENS}}},
        "layers": {{"{QUERY}": "{QUERY}", "{UP}": "{QUERY}", "{DOWN}": "{DOWN}"}}}}"#
    );
    let metadata = HashMap::from([("liquidgemm-calibration".to_owned(), entry)]);
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// A quantized layer 0 of the small LLaMA.
fn quantized(method: Method, smoothing: Option<Smoothing>) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let (model, file, out) =
        (folder.path().join("model"), folder.path().join("calibration"), folder.path().join("out"));
    write_llama(&model);
    write_calibration(&file);
    let mut options = QuantizeOptions { method, group: Some(Group::K(64)), smoothing, ..Default::default() };
    options.calibration = Some(Arc::new(Calibration::open(&file).unwrap()));
    options.patterns.exclude = vec!["model.layers.1.*".to_owned()];
    let source = open(&model, OpenOptions::default()).unwrap();
    Plan::new(source.as_ref(), &options).unwrap().run(&out, false, &()).unwrap();
    let checkpoint = Checkpoint::open(out).unwrap();
    (folder, checkpoint)
}

fn weights(module: &str) -> Vec<f32> {
    let name = format!("{module}.weight");
    bf16_values(&llama().into_iter().flatten().find(|tensor| tensor.0 == name).unwrap())
}

#[test]
fn search_is_weighted_by_the_second_moments() {
    let (_folder, checkpoint) = quantized(Method::Search, None);
    for (module, n, k, seed) in [(QUERY, 128, 192, 1), (UP, 200, 192, 1), (DOWN, 192, 256, 2)] {
        let mut builder = InputStatisticsBuilder::new(k).unwrap();
        builder.add(&inputs(k, seed), TOKENS).unwrap();
        let moments = builder.finish().unwrap().second_moments;
        let options = liquidgemm::QuantizeOptions { second_moments: Some(&moments), ..Default::default() };
        let expected = PackedWeights::quantize_with(&weights(module), n, k, &options).unwrap();
        assert!(checkpoint.packed(module).unwrap() == expected, "{module}");
        let without = PackedWeights::quantize(&weights(module), n, k, Group::K(64)).unwrap();
        assert!(expected != without, "{module}");
    }
}

#[test]
fn gptq_takes_the_hessian_of_the_inputs() {
    let (_folder, checkpoint) = quantized(Method::Gptq, None);
    for (module, n, k, seed) in [(QUERY, 128, 192, 1), (UP, 200, 192, 1), (DOWN, 192, 256, 2)] {
        let options = GptqOptions { group: Group::K(64), ..GptqOptions::default() };
        let expected =
            PackedWeights::quantize_gptq(&weights(module), n, k, &hessian(k, seed), &options).unwrap();
        assert!(checkpoint.packed(module).unwrap() == expected, "{module}");
    }
}

#[test]
fn modules_with_the_same_inputs_share_a_smoothing_vector_and_keep_their_weights() {
    for method in [Method::Rtn, Method::Search, Method::Gptq] {
        let (folder, checkpoint) = quantized(method, Some(Smoothing::Alpha(0.5)));
        let shared = checkpoint.smoothing(QUERY).unwrap().unwrap();
        assert_eq!(checkpoint.smoothing(UP).unwrap().unwrap(), shared);
        let mut builder = InputStatisticsBuilder::new(192).unwrap();
        builder.add(&inputs(192, 1), TOKENS).unwrap();
        let stacked = [weights(QUERY), weights(UP)].concat();
        let largest = builder.finish().unwrap().largest;
        assert_eq!(shared, smoothing_vector(&largest, &stacked, 328, 192, 0.5).unwrap());
        assert_eq!(checkpoint.linear(QUERY).unwrap().smoothing().unwrap(), shared);
        // Divided by the vector, the packed weights are the original ones again.
        let original = Model::open(folder.path().join("model")).unwrap();
        let verified = verify(&checkpoint, Some(&original), &()).unwrap();
        assert_eq!(verified.problems, Vec::<String>::new());
        for (module, difference) in verified.modules {
            let relative = difference.unwrap().relative;
            // GPTQ raises the weights' error for the outputs'. A wrong vector would give an error near 1.
            assert!((0.01..0.5).contains(&relative), "{method}, {module}: {relative}");
        }
    }
}

#[test]
fn captured_inputs_are_as_good_as_their_statistics() {
    let folder = tempfile::tempdir().unwrap();
    let (model, file, out) =
        (folder.path().join("a"), folder.path().join("inputs"), folder.path().join("out"));
    let weights = numbers(128 * 64, 3);
    fs::write(&model, safetensors_bytes(&[f32_tensor("fc.weight", &[128, 64], &weights)])).unwrap();
    fs::write(&file, safetensors_bytes(&[f32_tensor("fc", &[TOKENS, 64], &inputs(64, 4))])).unwrap();
    let source = open(&model, OpenOptions::default()).unwrap();
    let calibration = Some(Arc::new(Calibration::open(&file).unwrap()));
    let options = QuantizeOptions { method: Method::Gptq, calibration, ..Default::default() };
    Plan::new(source.as_ref(), &options).unwrap().run(&out, false, &()).unwrap();
    let expected =
        PackedWeights::quantize_gptq(&weights, 128, 64, &hessian(64, 4), &GptqOptions::default()).unwrap();
    assert!(Checkpoint::open(&out).unwrap().packed("fc").unwrap() == expected);
}

#[test]
fn options_that_lack_or_waste_statistics_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let (model, file) = (folder.path().join("model"), folder.path().join("calibration"));
    write_llama(&model);
    write_calibration(&file);
    let source = open(&model, OpenOptions::default()).unwrap();
    let calibration = Some(Arc::new(Calibration::open(&file).unwrap()));
    let error = |options: QuantizeOptions| Plan::new(source.as_ref(), &options).map(drop).unwrap_err();
    let base = QuantizeOptions::default;
    // Layer 1 was not calibrated.
    let missing = error(QuantizeOptions { calibration: calibration.clone(), ..base() });
    assert!(missing.to_string().contains("model.layers.1."), "{missing}");
    for options in [
        QuantizeOptions { method: Method::Gptq, ..base() },
        QuantizeOptions { smoothing: Some(Smoothing::Alpha(0.5)), ..base() },
        QuantizeOptions { method: Method::Rtn, calibration: calibration.clone(), ..base() },
        QuantizeOptions {
            smoothing: Some(Smoothing::Alpha(1.5)),
            calibration: calibration.clone(),
            ..base()
        },
        QuantizeOptions { smoothing: Some(Smoothing::Alpha(f32::NAN)), calibration, ..base() },
    ] {
        assert!(matches!(error(options), CheckpointError::Options { .. }));
    }
    // Another shape, and no Hessian.
    let statistics =
        [f32_tensor("fc.mean_square", &[32], &[1.0; 32]), f32_tensor("fc.absmax", &[32], &[1.0; 32])];
    let bytes = safetensors_bytes(&statistics);
    fs::write(&file, bytes).unwrap();
    let outcome = Calibration::open(&file);
    assert!(
        matches!(outcome, Err(CheckpointError::Input { problem: Problem::Tensor { .. }, .. })),
        "{outcome:?}"
    );
}
