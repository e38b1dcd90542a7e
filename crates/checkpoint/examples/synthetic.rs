//! Quantizes a synthetic LLaMA-2-70B checkpoint, and reports time and the largest memory in use.
//!
//! ```text
//! cargo run --release -p liquidgemm-checkpoint --example synthetic -- FOLDER [LAYERS] [METHOD]
//! ```
//!
//! LAYERS is the number of layers, 80 by default. Each takes 1.7 GB in bf16 and 0.5 GB packed. METHOD is rtn or search.
//! The weights are pseudo-random, so that quantizing them takes its usual time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use liquidgemm_checkpoint::{Checkpoint, Method, OpenOptions, Plan, Progress, QuantizeOptions, open};
use serde_json::{Map, json};

/// Linear layers of LLaMA-2-70B: name, n, k.
const LAYER: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 8192, 8192),
    ("self_attn.k_proj", 1024, 8192),
    ("self_attn.v_proj", 1024, 8192),
    ("self_attn.o_proj", 8192, 8192),
    ("mlp.gate_proj", 28672, 8192),
    ("mlp.up_proj", 28672, 8192),
    ("mlp.down_proj", 8192, 28672),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("give a folder to work in")?);
    let layers: usize = arguments.next().map_or(Ok(80), |text| text.parse())?;
    let method: Method = arguments.next().map_or(Ok(Method::default()), |text| text.parse())?;
    let (model, output) = (folder.join("model"), folder.join("packed"));
    if !model.exists() {
        make(&model, layers)?;
    }
    let start = Instant::now();
    let source = open(&model, OpenOptions::default())?;
    let plan = Plan::new(source.as_ref(), &QuantizeOptions { method, ..Default::default() })?;
    let summary = plan.run(&output, true, &Lines)?;
    println!(
        "{} modules, {:.2} GB -> {:.2} GB in {:.0} s; largest memory in use {}",
        summary.packed,
        summary.bytes_before as f64 / 1e9,
        summary.bytes_after as f64 / 1e9,
        start.elapsed().as_secs_f64(),
        largest_memory(),
    );
    assert_eq!(Checkpoint::open(&output)?.modules().count(), LAYER.len() * layers);
    Ok(())
}

/// Prints a line for each tensor.
struct Lines;

impl Progress for Lines {
    fn item(&self, name: &str) {
        eprintln!("{name}");
    }
}

/// Writes a checkpoint with one shard a layer.
fn make(folder: &Path, layers: usize) -> Result<(), Box<dyn std::error::Error>> {
    fs::create_dir_all(folder)?;
    let mut places = BTreeMap::new();
    for layer in 0..layers {
        let name = format!("model-{:05}-of-{layers:05}.safetensors", layer + 1);
        let mut header = Map::new();
        let mut end = 0;
        for (module, n, k) in LAYER {
            let tensor = format!("model.layers.{layer}.{module}.weight");
            let begin = end;
            end += n * k * 2;
            header.insert(
                tensor.clone(),
                json!({"dtype": "BF16", "shape": [n, k], "data_offsets": [begin, end]}),
            );
            places.insert(tensor, name.clone());
        }
        let header = serde_json::to_vec(&header)?;
        let mut file = BufWriter::with_capacity(1 << 20, File::create(folder.join(&name))?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        write_numbers(&mut file, end / 2, layer as u64)?;
        file.flush()?;
    }
    fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": places}).to_string())?;
    fs::write(folder.join("config.json"), json!({"model_type": "llama"}).to_string())?;
    Ok(())
}

/// Writes bf16 numbers with random signs and mantissas, from 2⁻⁹ to 2⁻⁵.
fn write_numbers(file: &mut impl Write, count: usize, seed: u64) -> std::io::Result<()> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut buffer = Vec::with_capacity(1 << 20);
    for _ in 0..count / 4 {
        // Xorshift, with four numbers a step.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let bits = state & 0x81FF_81FF_81FF_81FF | 0x3B00_3B00_3B00_3B00;
        buffer.extend(bits.to_le_bytes());
        if buffer.len() == 1 << 20 {
            file.write_all(&buffer)?;
            buffer.clear();
        }
    }
    file.write_all(&buffer)
}

/// Returns the largest resident memory of this process, as Linux reports it.
fn largest_memory() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or_else(|| "unknown on this system".to_owned(), |line| line.trim().to_owned())
}
