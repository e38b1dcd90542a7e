//! Calibration: what is recorded, and its files.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use liquidgemm_eval::evaluate::{self, Task};
use liquidgemm_eval::{Calibration, Model};
use tempfile::tempdir;

use super::fixture::{TEXT, bert_config, bert_tensors, write_folder};

fn calibrate(hessian: bool) -> Calibration {
    let folder = tempdir().unwrap();
    write_folder(folder.path(), &bert_config(), &bert_tensors());
    let model = Model::open(folder.path()).unwrap();
    let task = Task::new(&model, TEXT, 16, None).unwrap();
    evaluate::calibrate(&model, &task, hessian, &()).unwrap()
}

/// Four inputs of three channels.
const INPUTS: [[f32; 3]; 4] = [[1.0, -2.0, 0.5], [0.0, 4.0, -1.5], [-3.0, 1.0, 2.0], [2.0, 0.0, 1.0]];

#[test]
fn moments_are_means_over_all_tokens_and_the_diagonal_of_the_hessian() {
    let calibration = calibrate(true);
    assert_eq!(calibration.layers().count(), 12);
    let tokens = TEXT.split(' ').count() as u64;
    for (name, moments) in calibration.layers() {
        let k = moments.mean_square.len();
        let hessian = moments.hessian.as_ref().unwrap();
        assert_eq!((moments.tokens, hessian.len(), moments.absmax.len()), (tokens, k * k, k), "{name}");
        for j in 0..k {
            let (square, diagonal) = (moments.mean_square[j], hessian[j * k + j]);
            assert!((square - diagonal).abs() <= 1e-5 * square, "{name}: {square}, {diagonal}");
            assert!(moments.absmax[j].powi(2) >= square && square > 0.0, "{name}");
            assert!((0..k).all(|i| hessian[i * k + j] == hessian[j * k + i]), "{name}");
        }
    }
}

#[test]
fn layers_with_the_same_input_have_the_same_moments() {
    let calibration = calibrate(false);
    let layer = |part: &str| calibration.layer(&format!("encoder.layer.1.{part}")).unwrap();
    assert_eq!(layer("attention.self.query"), layer("attention.self.value"));
    assert_ne!(layer("attention.self.query"), layer("attention.output.dense"));
    assert!(layer("attention.self.query").hessian.is_none());
}

#[test]
fn files_bring_everything_back() {
    let folder = tempdir().unwrap();
    for hessian in [false, true] {
        let (file, calibration) = (folder.path().join("moments.safetensors"), calibrate(hessian));
        calibration.save(&file).unwrap();
        assert_eq!(Calibration::load(&file).unwrap(), calibration);
        // Saving what was read writes the same bytes.
        let again = folder.path().join("again.safetensors");
        Calibration::load(&file).unwrap().save(&again).unwrap();
        assert!(std::fs::read(&file).unwrap() == std::fs::read(&again).unwrap());
    }
    let mut files = std::fs::read_dir(folder.path()).unwrap();
    assert_eq!(files.by_ref().count(), 2, "a temporary file was left behind");
}

#[test]
fn dropping_hessians_leaves_what_a_run_without_them_records() {
    let mut calibration = calibrate(true);
    calibration.drop_hessians();
    assert_eq!(calibration, calibrate(false));
}

#[test]
fn captured_inputs_give_their_moments() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("captured.safetensors");
    let inputs = Tensor::from_vec(INPUTS.concat(), (4, 3), &Device::Cpu).unwrap();
    let half = inputs.to_dtype(candle_core::DType::BF16).unwrap();
    candle_core::safetensors::save(&HashMap::from([("one", inputs), ("two", half)]), &file).unwrap();
    let calibration = Calibration::load(&file).unwrap();
    let moments = calibration.layer("one").unwrap();
    assert_eq!(moments, calibration.layer("two").unwrap());
    assert_eq!((moments.tokens, &moments.absmax[..]), (4, &[3.0, 4.0, 2.0][..]));
    assert_eq!(moments.mean_square, [3.5, 5.25, 1.875]);
    assert_eq!(moments.hessian.as_ref().unwrap()[..3], [3.5, -1.25, -0.875]);
}

#[test]
fn bad_files_are_named_with_what_is_wrong() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("file.safetensors");
    let save = |tensor: Tensor| {
        candle_core::safetensors::save(&HashMap::from([("layer", tensor)]), &file).unwrap();
    };
    let error = || Calibration::load(&file).unwrap_err().to_string();
    assert!(error().contains("cannot read") && error().contains("file.safetensors"));
    std::fs::write(&file, b"no safetensors").unwrap();
    assert!(error().contains("file.safetensors: "), "{}", error());
    save(Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap());
    assert!(error().contains("tensor layer is F32 [3]"), "{}", error());
    save(Tensor::new(&[[1.0f32, f32::NAN]], &Device::Cpu).unwrap());
    assert!(error().contains("not finite"), "{}", error());
    // A calibration file that was cut off.
    calibrate(false).save(&file).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 4]).unwrap();
    assert!(error().contains("file.safetensors: "), "{}", error());
}
