//! Fuzz targets of the readers of safetensors folders, packed checkpoints and imported models: damaged files are errors,
//! or they are read, and nothing panics. `gguf.rs` has the target of GGUF.
//!
//! By default each runs for some seconds.
//! `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000` makes it run for ten minutes.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{Tensor, bf16_tensor, f32_tensor, i32_tensor, safetensors_bytes};
use liquidgemm_checkpoint::{
    Axis, Calibration, Checkpoint, Method, Model, OpenOptions, Plan, QuantizeOptions, Smoothing, open, verify,
};
use serde_json::{Value, json};

/// Changes of a file: position, kind, byte.
type Changes = Vec<(u16, u8, u8)>;

/// Applies changes, most of them to the first `header` bytes.
fn damage(bytes: &[u8], header: usize, changes: &[(u16, u8, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for &(position, change, byte) in changes {
        let at = position as usize % bytes.len().min(header).max(1);
        match change % 6 {
            0 if at < bytes.len() => bytes[at] = byte,
            1 if at < bytes.len() => bytes[at] ^= 1 << (byte % 8),
            2 => {
                // Keep the length that the header states, so that its contents are reached.
                bytes.insert(at, byte);
                bytes.pop();
            }
            3 => bytes.truncate(bytes.len().saturating_sub(byte as usize)),
            // A digit, a quote or a bracket, as in the header.
            _ if at < bytes.len() => bytes[at] = b"0123456789\"{}[],:"[byte as usize % 17],
            _ => {}
        }
    }
    bytes
}

/// Opens and plans a model, and reads every tensor that can be read.
fn read_model(path: &Path) {
    let Ok(source) = open(path, OpenOptions::default()) else { return };
    Plan::new(source.as_ref(), &QuantizeOptions::default()).map(drop).ok();
    for (index, tensor) in source.tensors().iter().enumerate() {
        let mut bytes = vec![0; tensor.rows() * tensor.kept_row_bytes()];
        // Imported weights may not fit the type that they are kept in.
        source.read_kept(index, 0..tensor.rows(), &mut bytes).ok();
        if tensor.is_readable {
            let mut values = vec![0.0; tensor.rows() * tensor.columns()];
            source.read_rows(index, 0..tensor.rows(), &mut values).ok();
        }
        source.import(index).map(drop).ok();
    }
}

#[test]
fn fuzz_folders() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path();
    let shards: [Vec<Tensor>; 2] = [
        vec![
            ("a.weight".to_owned(), safetensors::Dtype::F8_E4M3, vec![65, 66], vec![0x31; 65 * 66]),
            f32_tensor("a.weight_scale_inv", &[1, 1], &[0.5]),
        ],
        vec![bf16_tensor("b.weight", &[3, 70], 1), bf16_tensor("b.bias", &[3], 2)],
    ];
    let shard = safetensors_bytes(&shards[0]);
    fs::write(model.join("2.safetensors"), safetensors_bytes(&shards[1])).unwrap();
    let index = json!({"weight_map": {"a.weight": "1.safetensors", "b.weight": "2.safetensors"}}).to_string();
    let config = json!({"model_type": "x", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}});
    let config = config.to_string();
    bolero::check!().with_type::<(u8, Changes)>().cloned().for_each(|(which, changes)| {
        let mut files = [shard.clone(), index.clone().into_bytes(), config.clone().into_bytes()];
        let which = which as usize % files.len();
        files[which] = damage(&files[which], 400, &changes);
        for (name, bytes) in
            ["1.safetensors", "model.safetensors.index.json", "config.json"].iter().zip(&files)
        {
            fs::write(model.join(name), bytes).unwrap();
        }
        read_model(model);
    });
}

#[test]
fn fuzz_packed_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("a.safetensors"), folder.path().join("out"));
    let tensors = [bf16_tensor("a.weight", &[130, 140], 1), bf16_tensor("a.bias", &[130], 2)];
    fs::write(&file, safetensors_bytes(&tensors)).unwrap();
    let source = open(&file, OpenOptions::default()).unwrap();
    Plan::new(source.as_ref(), &QuantizeOptions::default()).unwrap().run(&out, false, &()).unwrap();
    let shard = fs::read(out.join("model.safetensors")).unwrap();
    // The same without metadata, as another program saves it.
    let saved: Vec<Tensor> = safetensors::SafeTensors::deserialize(&shard)
        .unwrap()
        .iter()
        .map(|(name, tensor)| {
            (name.to_owned(), tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec())
        })
        .collect();
    let saved = safetensors_bytes(&saved);
    let mut config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    config["quantization_config"]["smoothing"] =
        json!({"folded": [{"modules": ["a"], "into": "b"}, {"modules": ["b"], "into": "a"}]});
    let config = config.to_string().into_bytes();
    let folded =
        safetensors_bytes(&[f32_tensor("a", &[140], &[2.0; 140]), f32_tensor("b", &[130], &[2.0; 130])]);
    bolero::check!().with_type::<(u8, bool, Changes)>().cloned().for_each(|(which, is_saved, changes)| {
        let files = [
            ("model.safetensors", if is_saved { &saved } else { &shard }, 900),
            ("config.json", &config, 900),
            ("liquidgemm_folded_smoothing", &folded, 200),
        ];
        for (index, (name, bytes, header)) in files.into_iter().enumerate() {
            let changes = if which as usize % files.len() == index { &changes[..] } else { &[] };
            fs::write(out.join(name), damage(bytes, header, changes)).unwrap();
        }
        let Ok(checkpoint) = Checkpoint::open(&out) else { return };
        verify(&checkpoint, None, &()).unwrap();
        verify(&checkpoint, Some(&Model::open(&file).unwrap()), &()).map(drop).ok();
        for module in checkpoint.modules() {
            checkpoint.packed(module.name).map(drop).ok();
            checkpoint.linear(module.name).map(drop).ok();
            checkpoint.packed_shard(module.name, Axis::N, 1, 2).map(drop).ok();
            checkpoint.packed_shard(module.name, Axis::K, 0, 2).map(drop).ok();
        }
    });
}

#[test]
fn fuzz_calibrations() {
    let folder = tempfile::tempdir().unwrap();
    let (model, file, out) =
        (folder.path().join("a.safetensors"), folder.path().join("inputs"), folder.path().join("out"));
    fs::write(&model, safetensors_bytes(&[bf16_tensor("a.weight", &[64, 64], 1)])).unwrap();
    let captured = safetensors_bytes(&[f32_tensor("a", &[3, 64], &[0.5; 192])]);
    let tensors = [
        f32_tensor("s.mean_square", &[64], &[1.0; 64]),
        f32_tensor("s.absmax", &[64], &[2.0; 64]),
        f32_tensor("s.hessian", &[64, 64], &(0..4096).map(|i| f32::from(i % 65 == 0)).collect::<Vec<_>>()),
    ];
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let entry = r#"{"version": 1, "tokens": {"s": 3}, "layers": {"a": "s"}}"#.to_owned();
    let metadata = std::collections::HashMap::from([("liquidgemm-calibration".to_owned(), entry)]);
    let statistics = safetensors::serialize(views, Some(metadata)).unwrap();
    bolero::check!().with_type::<(u8, Changes)>().cloned().for_each(|(kind, changes)| {
        let bytes = if kind % 2 == 0 { &captured } else { &statistics };
        fs::write(&file, damage(bytes, 500, &changes)).unwrap();
        let Ok(calibration) = Calibration::open(&file) else { return };
        let method = if kind & 2 == 0 { Method::Search } else { Method::Gptq };
        let smoothing = (kind & 4 == 0).then_some(Smoothing::Auto);
        let calibration = Some(Arc::new(calibration));
        let options = QuantizeOptions { method, smoothing, calibration, ..Default::default() };
        let source = open(&model, OpenOptions::default()).unwrap();
        if let Ok(plan) = Plan::new(source.as_ref(), &options) {
            plan.run(&out, true, &()).map(drop).ok();
        }
    });
}

/// Damages a model of one importer, and reads what is left.
fn fuzz_imported(tensors: &[Tensor], config: &serde_json::Value) {
    let bytes = safetensors_bytes(tensors);
    let config = json!({"quantization_config": config}).to_string();
    let folder = tempfile::tempdir().unwrap();
    bolero::check!().with_type::<(bool, Changes)>().cloned().for_each(|(is_config, changes)| {
        let of = |is_this: bool| if is_this { &changes[..] } else { &[] };
        let (config, bytes) =
            (damage(config.as_bytes(), 200, of(is_config)), damage(&bytes, 600, of(!is_config)));
        fs::write(folder.path().join("config.json"), config).unwrap();
        fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        read_model(folder.path());
    });
}

/// Words with all kinds of bits.
fn words(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761)).collect()
}

#[test]
fn fuzz_gptq() {
    let tensors = [
        i32_tensor("a.qweight", &[16, 64], &words(16 * 64)),
        i32_tensor("a.qzeros", &[2, 8], &words(16)),
        f32_tensor("a.scales", &[2, 64], &[0.5; 128]),
        i32_tensor("a.g_idx", &[128], &(0..128).map(|i| i % 2).collect::<Vec<_>>()),
    ];
    fuzz_imported(&tensors, &json!({"quant_method": "gptq", "bits": 4}));
}

#[test]
fn fuzz_awq() {
    let tensors = [
        i32_tensor("a.qweight", &[128, 8], &words(128 * 8)),
        i32_tensor("a.qzeros", &[2, 8], &words(16)),
        f32_tensor("a.scales", &[2, 64], &[0.5; 128]),
    ];
    fuzz_imported(&tensors, &json!({"quant_method": "awq", "bits": 4}));
}

#[test]
fn fuzz_compressed_tensors() {
    let shape = [64i64, 128].iter().flat_map(|side| side.to_le_bytes()).collect();
    let tensors = [
        i32_tensor("a.weight_packed", &[64, 16], &words(64 * 16)),
        f32_tensor("a.weight_scale", &[64, 2], &[0.5; 128]),
        ("a.weight_shape".to_owned(), safetensors::Dtype::I64, vec![2], shape),
        i32_tensor("a.weight_zero_point", &[8, 2], &words(16)),
    ];
    let config = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
    });
    fuzz_imported(&tensors, &config);
}

#[test]
fn fuzz_qqq() {
    let tensors = [
        i32_tensor("a.B", &[8, 128], &words(8 * 128)),
        f32_tensor("a.s_channel", &[1, 64], &[0.5; 64]),
        f32_tensor("a.s_group", &[2, 64], &[3.0; 128]),
    ];
    fuzz_imported(&tensors, &json!({"quant_method": "qqq", "wbits": 4}));
}

#[test]
fn fuzz_qserve() {
    let bytes = |count: usize| words(count).iter().map(|word| (word >> 24) as u8).collect::<Vec<u8>>();
    // Module a has groups, module b has none.
    let tensors = [
        ("a.qweight".to_owned(), safetensors::Dtype::I8, vec![32, 64], bytes(32 * 64)),
        f32_tensor("a.s1_scales", &[32], &[0.5; 32]),
        ("a.s2_scales".to_owned(), safetensors::Dtype::I8, vec![2, 32], vec![4; 64]),
        ("a.s2_zeros".to_owned(), safetensors::Dtype::I8, vec![2, 32], vec![225; 64]),
        ("b.qweight".to_owned(), safetensors::Dtype::U8, vec![32, 32], bytes(32 * 32)),
        f32_tensor("b.s1_scales", &[32], &[0.5; 32]),
        f32_tensor("b.s1_szeros", &[32], &[3.5; 32]),
    ];
    fuzz_imported(&tensors, &json!({"quant_method": "qoq", "wbits": 4}));
}
