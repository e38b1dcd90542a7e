//! The forward passes again, in plain loops of f64, written from the papers' formulas.

use std::f64::consts::PI;

use super::fixture::{BLOCKS, EPSILON, HEADS, HIDDEN, KV_HEADS, ROPE_BASE, Tensors};

type Rows = Vec<Vec<f64>>;

fn values(tensors: &Tensors, name: &str) -> Vec<f64> {
    tensors[name].1.iter().map(|&value| f64::from(value)).collect()
}

fn row(tensors: &Tensors, name: &str, index: usize) -> Vec<f64> {
    let columns = tensors[name].0[1];
    values(tensors, name)[index * columns..][..columns].to_vec()
}

fn linear(tensors: &Tensors, name: &str, x: &Rows) -> Rows {
    let weight = values(tensors, &format!("{name}.weight"));
    let (n, k) = (tensors[&format!("{name}.weight")].0[0], tensors[&format!("{name}.weight")].0[1]);
    let bias_name = format!("{name}.bias");
    let bias = if tensors.contains_key(&bias_name) { values(tensors, &bias_name) } else { vec![0.0; n] };
    let mut y = Vec::new();
    for x in x {
        let mut out = bias.clone();
        for channel in 0..n {
            for j in 0..k {
                out[channel] += weight[channel * k + j] * x[j];
            }
        }
        y.push(out);
    }
    y
}

fn add(x: &Rows, y: &Rows) -> Rows {
    x.iter().zip(y).map(|(x, y)| x.iter().zip(y).map(|(x, y)| x + y).collect()).collect()
}

fn attend(q: &Rows, k: &Rows, v: &Rows, kv_heads: usize, causal: bool) -> Rows {
    let d = HIDDEN / HEADS;
    let mut out = vec![vec![0.0; HIDDEN]; q.len()];
    for head in 0..HEADS {
        let shared = head / (HEADS / kv_heads);
        for i in 0..q.len() {
            let visible = if causal { i + 1 } else { q.len() };
            let mut weights = Vec::new();
            for key in k.iter().take(visible) {
                let mut dot = 0.0;
                for c in 0..d {
                    dot += q[i][head * d + c] * key[shared * d + c];
                }
                weights.push((dot / (d as f64).sqrt()).exp());
            }
            let sum: f64 = weights.iter().sum();
            for (j, weight) in weights.iter().enumerate() {
                for c in 0..d {
                    out[i][head * d + c] += weight / sum * v[j][shared * d + c];
                }
            }
        }
    }
    out
}

fn layer_norm(tensors: &Tensors, name: &str, x: &Rows) -> Rows {
    let weight = values(tensors, &format!("{name}.LayerNorm.weight"));
    let bias = values(tensors, &format!("{name}.LayerNorm.bias"));
    let one = |x: &Vec<f64>| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / x.len() as f64;
        let deviation = (variance + EPSILON).sqrt();
        (0..x.len()).map(|j| (x[j] - mean) / deviation * weight[j] + bias[j]).collect()
    };
    x.iter().map(one).collect()
}

/// `x · Φ(x)`, with Φ by Simpson's rule.
fn gelu(x: f64) -> f64 {
    let steps = 2000;
    let h = x / f64::from(steps);
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * PI).sqrt();
    let mut integral = density(0.0) + density(x);
    for i in 1..steps {
        integral += density(f64::from(i) * h) * if i % 2 == 1 { 4.0 } else { 2.0 };
    }
    x * (0.5 + integral * h / 3.0)
}

/// Returns the embedding of a sentence by the BERT.
pub fn bert(tensors: &Tensors, tokens: &[u32]) -> Vec<f64> {
    let mut x = Rows::new();
    for (position, &token) in tokens.iter().enumerate() {
        let word = row(tensors, "embeddings.word_embeddings.weight", token as usize);
        let position = row(tensors, "embeddings.position_embeddings.weight", position);
        let kind = row(tensors, "embeddings.token_type_embeddings.weight", 0);
        x.push((0..HIDDEN).map(|j| word[j] + position[j] + kind[j]).collect());
    }
    x = layer_norm(tensors, "embeddings", &x);
    for block in (0..BLOCKS).map(|index| format!("encoder.layer.{index}")) {
        let part = |name: &str| format!("{block}.{name}");
        let [q, k, v] = ["query", "key", "value"]
            .map(|name| linear(tensors, &part(&format!("attention.self.{name}")), &x));
        let attended = linear(tensors, &part("attention.output.dense"), &attend(&q, &k, &v, HEADS, false));
        x = layer_norm(tensors, &part("attention.output"), &add(&x, &attended));
        let inner = linear(tensors, &part("intermediate.dense"), &x);
        let inner = inner.iter().map(|row| row.iter().map(|&x| gelu(x)).collect()).collect();
        x = layer_norm(tensors, &part("output"), &add(&x, &linear(tensors, &part("output.dense"), &inner)));
    }
    let mean: Vec<f64> = (0..HIDDEN).map(|j| x.iter().map(|x| x[j]).sum::<f64>() / x.len() as f64).collect();
    let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
    mean.iter().map(|x| x / length).collect()
}

fn rms_norm(tensors: &Tensors, name: &str, x: &Rows) -> Rows {
    let weight = values(tensors, &format!("{name}.weight"));
    let one = |x: &Vec<f64>| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(&weight).map(|(x, weight)| x / (mean + EPSILON).sqrt() * weight).collect()
    };
    x.iter().map(one).collect()
}

/// Turns pairs of channels: as complex numbers, by `e^(i · position · base^(−2j/d))`.
fn turn(x: &Rows) -> Rows {
    let d = HIDDEN / HEADS;
    let one = |(position, x): (usize, &Vec<f64>)| {
        let mut out = x.clone();
        for head in 0..x.len() / d {
            for j in 0..d / 2 {
                let angle = position as f64 / ROPE_BASE.powf(2.0 * j as f64 / d as f64);
                let (first, second) = (head * d + j, head * d + j + d / 2);
                out[first] = x[first] * angle.cos() - x[second] * angle.sin();
                out[second] = x[first] * angle.sin() + x[second] * angle.cos();
            }
        }
        out
    };
    x.iter().enumerate().map(one).collect()
}

/// Returns the logits of the LLaMA or the Qwen2, `[tokens][vocabulary]`.
pub fn llama(tensors: &Tensors, tokens: &[u32]) -> Rows {
    let mut x: Rows =
        tokens.iter().map(|&token| row(tensors, "model.embed_tokens.weight", token as usize)).collect();
    for block in (0..BLOCKS).map(|index| format!("model.layers.{index}")) {
        let part = |name: &str| format!("{block}.{name}");
        let normed = rms_norm(tensors, &part("input_layernorm"), &x);
        let [q, k, v] =
            ["q", "k", "v"].map(|name| linear(tensors, &part(&format!("self_attn.{name}_proj")), &normed));
        let attended = attend(&turn(&q), &turn(&k), &v, KV_HEADS, true);
        x = add(&x, &linear(tensors, &part("self_attn.o_proj"), &attended));
        let normed = rms_norm(tensors, &part("post_attention_layernorm"), &x);
        let [gate, up] =
            ["gate", "up"].map(|name| linear(tensors, &part(&format!("mlp.{name}_proj")), &normed));
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let inner =
            gate.iter().zip(&up).map(|(gate, up)| gate.iter().zip(up).map(|(&g, u)| silu(g) * u).collect());
        x = add(&x, &linear(tensors, &part("mlp.down_proj"), &inner.collect()));
    }
    let x = rms_norm(tensors, "model.norm", &x);
    let head = if tensors.contains_key("lm_head.weight") { "lm_head" } else { "model.embed_tokens" };
    linear(tensors, head, &x)
}
