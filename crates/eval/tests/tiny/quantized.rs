//! Quantized runs against float runs.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use liquidgemm::{Backend, Group, PackedWeights, QuantizedActivations};
use liquidgemm_eval::evaluate::{self, Score, Task};
use liquidgemm_eval::layers::{A8, FloatLayers, Linear, W4A8};
use liquidgemm_eval::model::{Layers, LinearWeights};
use liquidgemm_eval::{Method, Model, Recipe, Smoothing};
use tempfile::tempdir;

use super::fixture::{TEXT, bert_config, bert_tensors, llama_config, llama_tensors, write_folder};

fn open(encoder: bool) -> Model {
    let folder = tempdir().unwrap();
    if encoder {
        write_folder(folder.path(), &bert_config(), &bert_tensors());
    } else {
        write_folder(folder.path(), &llama_config(true), &llama_tensors(true));
    }
    Model::open(folder.path()).unwrap()
}

fn task(model: &Model) -> Task {
    Task::new(model, &format!("{TEXT}\n{TEXT} a house ."), 16, None).unwrap()
}

fn recipes() -> Vec<Recipe> {
    let mut recipes = Vec::new();
    for method in Method::ALL {
        for smooth in [None, Some(Smoothing::Alpha(0.5)), Some(Smoothing::Auto)] {
            recipes.push(Recipe { method, group: Group::default(), smooth });
        }
    }
    recipes
}

/// Scores recipes, all calibrated with the text itself.
fn scores(model: &Model, recipes: &[Recipe]) -> Vec<Score> {
    let task = task(model);
    let calibration = evaluate::calibrate(model, &task, true, &()).unwrap();
    let backend = Arc::new(Backend::cpu());
    let layers: Vec<_> = recipes
        .iter()
        .map(|recipe| recipe.layers(model, Some(&calibration), &backend, &()).unwrap())
        .collect();
    let layers: Vec<&dyn Layers> = layers.iter().map(|layers| layers as &dyn Layers).collect();
    evaluate::score(model, &task, &layers, &()).unwrap()
}

/// A layer of 70 channels × 130, and 5 inputs for it.
fn layer() -> (LinearWeights, Tensor) {
    let (n, k, m) = (70, 130, 5);
    let wave = |count: usize, step: f32| (0..count).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let tensor = |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let bias = Some(tensor(wave(n, 1.7), &[n]));
    let layer =
        LinearWeights { name: "wave".into(), input: 0, weight: tensor(wave(n * k, 0.37), &[n, k]), bias };
    (layer, tensor(wave(m * k, 0.11), &[m, k]))
}

#[test]
fn w4a8_layers_multiply_what_their_weights_and_activations_represent() {
    let (layer, x) = layer();
    let (n, k) = layer.shape();
    let weights: Vec<f32> = layer.weight.flatten_all().unwrap().to_vec1().unwrap();
    let packed = PackedWeights::quantize(&weights, n, k, Group::default()).unwrap();
    let smoothing: Vec<f32> = (0..k).map(|j| 0.5 + (j % 3) as f32).collect();
    let inputs: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    let quantized = QuantizedActivations::with_smoothing(&inputs, 5, k, &smoothing).unwrap();

    let bias = layer.bias.as_ref();
    let w4a8 = W4A8::new("wave", packed.clone(), bias, Some(smoothing), Arc::new(Backend::cpu())).unwrap();
    let y: Vec<Vec<f32>> = w4a8.forward(&x).unwrap().to_vec2().unwrap();
    let (w, x, bias) = (packed.dequantize(), quantized.dequantize(), bias.unwrap().to_vec1::<f32>().unwrap());
    for (m, y) in y.iter().enumerate() {
        for (channel, y) in y.iter().enumerate() {
            let products = (0..k).map(|j| f64::from(w[channel * k + j]) * f64::from(x[m * k + j]));
            let expected = products.sum::<f64>() + f64::from(bias[channel]);
            assert!((f64::from(*y) - expected).abs() < 1e-4, "{y} is not {expected}");
        }
    }
}

#[test]
fn activations_alone_lose_little_with_and_without_smoothing() {
    let (layer, x) = layer();
    let float: Vec<f32> = FloatLayers(std::slice::from_ref(&layer))
        .apply(0, &x)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    for smoothing in [None, Some((0..130).map(|j| 0.5 + (j % 3) as f32).collect())] {
        let y = A8::new(&layer, smoothing)
            .unwrap()
            .forward(&x)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
        let error = norm(&mut y.iter().zip(&float).map(|(y, float)| y - float));
        let error = error / norm(&mut float.iter().copied());
        assert!(error > 0.0 && error < 0.05, "{error}");
    }
}

#[test]
fn every_recipe_keeps_most_of_the_embedding_and_activations_alone_keep_more() {
    let model = open(true);
    let recipes = recipes();
    let mut cosines = Vec::new();
    for (recipe, score) in recipes.iter().zip(scores(&model, &recipes)) {
        let Score::Embedding { sentences: 2, cosine, least_cosine } = score else { panic!("{score:?}") };
        assert!(cosine > 0.97 && cosine < 1.0 && least_cosine <= cosine, "{recipe}: {score:?}");
        cosines.push(cosine);
    }
    let (a8, w4a8) = cosines.split_at(3);
    assert!(a8.iter().all(|a8| w4a8.iter().all(|w4a8| a8 > w4a8)), "{cosines:?}");
}

#[test]
fn every_recipe_changes_the_perplexity_a_little() {
    let model = open(false);
    let recipes = recipes();
    for (recipe, score) in recipes.iter().zip(scores(&model, &recipes)) {
        let Score::Language { tokens, float_perplexity, perplexity, divergence, .. } = score else {
            panic!("{score:?}")
        };
        // 39 and 2 tokens more in windows of 16, each of which predicts all but its first.
        let all = task(&model).tokens();
        assert_eq!(tokens, all - all.div_ceil(16), "{recipe}");
        assert!(
            perplexity != float_perplexity && divergence > 0.0 && divergence < 0.2,
            "{recipe}: {score:?}"
        );
        assert!((perplexity / float_perplexity - 1.0).abs() < 0.25, "{recipe}: {score:?}");
    }
}

#[test]
fn the_float_layers_score_as_the_float_run() {
    let model = open(false);
    let float = FloatLayers(&model.layers);
    let score = evaluate::score(&model, &task(&model), &[&float], &()).unwrap();
    let [Score::Language { increase_percent, agreement, divergence, .. }] = score[..] else {
        panic!("{score:?}")
    };
    assert_eq!((increase_percent, agreement), (0.0, 1.0));
    // Probabilities are kept in f32.
    assert!(divergence.abs() < 1e-6, "{divergence}");
    let errors = evaluate::layer_errors(&model, task(&model).pieces(), &float, &()).unwrap();
    assert!(errors.iter().all(|error| error.relative_error == 0.0));
}

#[test]
fn layer_errors_are_sorted_and_smaller_with_activations_alone() {
    let model = open(false);
    let backend = Arc::new(Backend::cpu());
    let errors = [Method::A8, Method::Rtn].map(|method| {
        let recipe = Recipe { method, group: Group::default(), smooth: None };
        let layers = recipe.layers(&model, None, &backend, &()).unwrap();
        evaluate::layer_errors(&model, task(&model).pieces(), &layers, &()).unwrap()
    });
    for errors in &errors {
        assert_eq!(errors.len(), model.layers.len());
        assert!(errors.is_sorted_by(|a, b| a.relative_error >= b.relative_error));
    }
    let [a8, rtn] = errors.map(|errors| errors[0].relative_error);
    assert!(a8 > 0.0 && a8 < 0.03 && rtn > 0.03 && rtn < 0.3, "{a8}, {rtn}");
}

#[test]
fn scores_are_the_same_for_any_number_of_threads() {
    let model = open(false);
    let recipes = [Method::Search, Method::Gptq].map(|method| Recipe {
        method,
        group: Group::default(),
        smooth: Some(Smoothing::Alpha(0.5)),
    });
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.scope(|_| pool.install(|| scores(&open(false), &recipes)))
    };
    assert_eq!(run(1), run(3));
    assert_eq!(run(1), scores(&model, &recipes));
}
