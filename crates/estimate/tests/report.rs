//! The report: what must grow with what, the layout of its JSON, and the page.

use std::collections::BTreeSet;

use liquidgemm_estimate::gpus::{GPUS, Gpu};
use liquidgemm_estimate::measurements::{Measurements, Source};
use liquidgemm_estimate::report::{Report, Settings, report};
use liquidgemm_estimate::scheme::Scheme;
use liquidgemm_estimate::{models, page, table};
use serde_json::Value;

fn estimate(model: &str, gpu: &str, settings: &Settings, measurements: &Measurements) -> Report {
    report(&models::find(model).unwrap(), Gpu::find(gpu).unwrap(), settings, measurements).unwrap()
}

fn predicted(model: &str, gpu: &str, settings: &Settings) -> Report {
    estimate(model, gpu, settings, &Measurements::default())
}

#[test]
fn memory_grows_with_batch_and_length_and_falls_with_bits_and_gpus() {
    for model in models::built_in() {
        let base = predicted(&model.name, "h200", &Settings::default());
        for scheme in &base.schemes {
            assert!(scheme.points.is_sorted_by(|a, b| a.memory_gb < b.memory_gb), "{}", model.name);
            assert!(scheme.points.iter().all(|point| point.fits == (point.batch <= scheme.largest_batch)));
            assert!(scheme.points.iter().all(|point| {
                point.fits == (point.memory_gb <= base.gpu.memory_gb * base.settings.memory_fraction)
            }));
        }
        let weights: Vec<f64> = base.schemes.iter().map(|scheme| scheme.weights_gb).collect();
        let [w4a8, w8a8, fp8, w4a16, bf16] = weights[..] else { panic!("there are five formats") };
        assert!(w4a16 < w4a8 && w4a8 < fp8 && fp8 <= w8a8 && w8a8 < bf16, "{}: {weights:?}", model.name);
        // Quantized weights are nearly all of a model, so W4A8 takes a little more than a quarter of bf16.
        assert!((0.25..0.45).contains(&(w4a8 / bf16)), "{}: {}", model.name, w4a8 / bf16);
        for more in [
            predicted(&model.name, "h200", &Settings { input: 4096, ..Settings::default() }),
            predicted(&model.name, "h200", &Settings { output: 4096, ..Settings::default() }),
            predicted(&model.name, "h100-sxm", &Settings::default()),
            predicted(&model.name, "h200", &Settings { memory_fraction: 0.7, ..Settings::default() }),
        ] {
            for (base, more) in base.schemes.iter().zip(&more.schemes) {
                assert!(more.largest_batch <= base.largest_batch, "{}", model.name);
                assert!(more.cache_gb_per_sequence >= base.cache_gb_per_sequence, "{}", model.name);
            }
        }
        let divided = predicted(&model.name, "h200", &Settings { gpus: 2, ..Settings::default() });
        let narrow = predicted(&model.name, "h200", &Settings { cache_bits: 8, ..Settings::default() });
        for (place, base) in base.schemes.iter().enumerate() {
            assert!(divided.schemes[place].weights_gb < 0.6 * base.weights_gb, "{}", model.name);
            assert!(divided.schemes[place].largest_batch >= base.largest_batch, "{}", model.name);
            assert!(
                (narrow.schemes[place].cache_gb_per_sequence * 2.0 / base.cache_gb_per_sequence - 1.0).abs()
                    < 1e-9
            );
            assert!(narrow.schemes[place].largest_batch >= base.largest_batch, "{}", model.name);
        }
    }
}

#[test]
fn speed_grows_with_batch_and_gpu_and_falls_with_context() {
    for model in ["LLaMA-2-7B", "LLaMA-3-70B", "Mixtral-8x7B", "DeepSeek-V3"] {
        let base = predicted(model, "h100-sxm", &Settings::default());
        for scheme in &base.schemes {
            // The planner's estimates are not entirely monotone: tiles come in steps.
            let slack = if scheme.scheme == Scheme::W4A8 { 0.97 } else { 1.0 };
            for pair in scheme.points.windows(2) {
                let [a, b] = [&pair[0], &pair[1]];
                assert!(b.tokens_per_second > slack * a.tokens_per_second, "{model} {:?}", scheme.scheme);
                assert!(
                    b.step.us > slack * a.step.us && b.prefill_ms > a.prefill_ms,
                    "{model} {:?}",
                    scheme.scheme
                );
            }
        }
        for (slower, why) in [
            (predicted(model, "h100-sxm", &Settings { input: 8192, ..Settings::default() }), "context"),
            (predicted(model, "h100-pcie", &Settings::default()), "PCIe"),
        ] {
            for (fast, slow) in base.schemes.iter().zip(&slower.schemes) {
                for (fast, slow) in fast.points.iter().zip(&slow.points) {
                    assert!(slow.tokens_per_second < fast.tokens_per_second, "{model}: {why}");
                }
            }
        }
        let faster = predicted(model, "h200", &Settings::default());
        for (slow, fast) in base.schemes.iter().zip(&faster.schemes) {
            for (slow, fast) in slow.points.iter().zip(&fast.points) {
                assert!(fast.tokens_per_second >= slow.tokens_per_second, "{model}: H200");
            }
        }
    }
}

#[test]
fn tensor_throughput_limits_w4a8_on_an_h20() {
    let settings = Settings { batches: vec![1024], ..Settings::default() };
    let of = |gpu| predicted("LLaMA-3-8B", gpu, &settings).schemes[0].points[0].step.products_us;
    assert!(of("h20") > 2.0 * of("h100-sxm"), "{} {}", of("h20"), of("h100-sxm"));
}

#[test]
fn cost_is_price_times_time_and_break_even_follows_from_speed() {
    let priced =
        predicted("LLaMA-3-8B", "h100-sxm", &Settings { price: Some(3.0), gpus: 2, ..Settings::default() });
    let free = predicted("LLaMA-3-8B", "h100-sxm", &Settings { gpus: 2, ..Settings::default() });
    for (priced, free) in priced.schemes.iter().zip(&free.schemes) {
        for (priced, free) in priced.points.iter().zip(&free.points) {
            let hours = 2.0 * 1e6 / free.tokens_per_second / 3600.0;
            assert!((priced.cost_per_million.unwrap() / (3.0 * hours) - 1.0).abs() < 1e-12);
            assert!(free.cost_per_million.is_none());
        }
    }
    for one in &priced.break_even {
        let ratio = one.best_ratio.unwrap();
        assert!((one.break_even_price.unwrap() / (3.0 * ratio) - 1.0).abs() < 1e-12);
        let place = Scheme::ALL.iter().position(|scheme| *scheme == one.scheme).unwrap();
        let slower: Vec<usize> = priced.schemes[0]
            .points
            .iter()
            .zip(&priced.schemes[place].points)
            .filter(|(ours, other)| other.fits && other.tokens_per_second >= ours.tokens_per_second)
            .map(|(ours, _)| ours.batch)
            .collect();
        assert_eq!(one.overtaken_at_batch, slower.first().copied());
    }
}

#[test]
fn times_of_the_record_replace_predictions_on_its_gpu_only() {
    let measurements = Measurements::committed().unwrap();
    let settings = Settings { batches: vec![64, 100], ..Settings::default() };
    let measured = estimate("LLaMA-2-7B", "h100-sxm", &settings, &measurements);
    let sources = |report: &Report, scheme: usize, point: usize| -> Vec<Source> {
        report.schemes[scheme].points[point].step.layers.iter().map(|time| time.source).collect()
    };
    // The four layers of a block are in the record; the output embedding is not.
    for scheme in 0..5 {
        assert_eq!(sources(&measured, scheme, 0)[..4], [Source::Measured; 4], "{scheme}");
        assert_eq!(sources(&measured, scheme, 1)[..4], [Source::Interpolated; 4], "{scheme}");
        assert_eq!(sources(&measured, scheme, 0)[4], Source::Predicted);
    }
    let record: Value = serde_json::from_str(include_str!("../../../docs/benchmarks/h100.json")).unwrap();
    let point = record["points"].as_array().unwrap().iter().find(|point| {
        (point["m"].as_u64(), point["n"].as_u64(), point["k"].as_u64()) == (Some(64), Some(12288), Some(4096))
    });
    let time = &measured.schemes[0].points[0].step.layers[0];
    assert_eq!(time.us, point.unwrap()["ours"]["us"].as_f64().unwrap());
    assert_eq!(time.error, Some(time.predicted_us / time.us - 1.0));
    let elsewhere = estimate("LLaMA-2-7B", "h200", &settings, &measurements);
    assert!(
        (0..5).all(|scheme| sources(&elsewhere, scheme, 0).iter().all(|source| *source == Source::Predicted))
    );
    let mixture =
        estimate("Mixtral-8x7B", "h100-sxm", &Settings { batches: vec![128], ..settings }, &measurements);
    let experts: Vec<_> =
        mixture.schemes[0].points[0].step.layers.iter().filter(|time| time.layer.experts.is_some()).collect();
    assert_eq!(experts.len(), 2);
    assert!(experts.iter().all(|time| time.source == Source::Measured));
}

#[test]
fn records_from_files_replace_the_committed_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.json");
    let text = include_str!("../../../docs/benchmarks/h100.json");
    std::fs::write(&path, text).unwrap();
    let loaded = Measurements::load(&[&path]).unwrap();
    assert!(loaded.checks().len() > 400 && loaded.files.len() == 1);
    for (wrong, part) in [
        (text.replace("NVIDIA H100 80GB HBM3", "Other"), "no GPU in the list"),
        (text[..1000].to_owned(), "does not hold"),
        (text.replacen("\"us\": ", "\"us\": -", 1), "impossible time"),
    ] {
        std::fs::write(&path, wrong).unwrap();
        let error = Measurements::load(&[&path]).expect_err("must be refused");
        assert!(format!("{error:#}").contains(part), "{error:#}");
    }
    assert!(Measurements::load(&[folder.path().join("missing.json")]).is_err());
}

/// Collects the paths of all keys, with `[]` for the elements of a list.
fn paths(value: &Value, path: &str, all: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| paths(value, &format!("{path}.{key}"), all)),
        Value::Array(list) => list.iter().for_each(|value| paths(value, &format!("{path}[]"), all)),
        _ => {
            all.insert(path.to_owned());
        }
    }
}

#[test]
fn keys_of_the_json_are_those_of_its_schema() {
    let settings = Settings { batches: vec![64], price: Some(2.0), ..Settings::default() };
    let report = estimate("Mixtral-8x7B", "h100-sxm", &settings, &Measurements::committed().unwrap());
    let mut all = BTreeSet::new();
    paths(&serde_json::to_value(&report).unwrap(), "", &mut all);
    let found: Vec<&str> = all.iter().map(String::as_str).collect();
    let schema: Vec<&str> = include_str!("schema.txt").lines().collect();
    assert_eq!(found, schema, "a changed layout needs a new SCHEMA_VERSION and schema.txt");
}

#[test]
fn page_refers_to_nothing_outside_and_shows_every_format() {
    let measurements = Measurements::committed().unwrap();
    for (gpu, price) in GPUS.iter().zip([None, Some(0.0), Some(2.5)].into_iter().cycle()) {
        let settings = Settings { price, ..Settings::default() };
        let report = estimate("LLaMA-3-70B", gpu.key, &settings, &measurements);
        let html = page::html(&report).unwrap();
        for part in
            ["http", "src=", "href", "url(", "@import", "<script", "<link", "<iframe", "<object", "srcset"]
        {
            assert!(!html.contains(part), "{part} is in the page");
        }
        for part in [
            "prefers-color-scheme: dark",
            "width=device-width",
            "<svg",
            "Tokens per second",
            "Memory",
            gpu.name,
        ] {
            assert!(html.contains(part), "{part} is not in the page");
        }
        for (open, close) in [("<svg", "</svg>"), ("<table", "</table>"), ("<figure", "</figure>")] {
            assert_eq!(html.matches(open).count(), 3, "{open}");
            assert_eq!(html.matches(open).count(), html.matches(close).count(), "{open}");
        }
        assert_eq!(html.matches("<polyline").count(), 15);
        assert!(!html.contains("NaN") && !html.contains("inf"));
        assert!(html.len() < 150_000);
        let text = table::text(&report);
        assert!(
            Scheme::ALL.iter().all(|scheme| text.contains(scheme.name()) && html.contains(scheme.name()))
        );
        assert!(!text.contains("NaN") && !text.contains("inf "));
    }
}
