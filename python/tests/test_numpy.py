"""The numpy interface on the CPU backend, with an installed package."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import liquidgemm as lg

N, K, M = 70, 192, 9


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def exact(x: lg.QuantizedActivations, weights: lg.PackedWeights) -> np.ndarray:
    """The int32 sums, computed in int64 by numpy."""
    int8 = np.rint(weights.dequantize() / weights.channel_scales[:, None]).astype(np.int64)
    return x.codes.astype(np.int64) @ int8.T


@pytest.mark.parametrize("group", [64, 128, "channel"])
def test_products_are_exact_sums_times_scales_and_near_the_float_product(rng, group):
    weights, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((N, K), (M, K)))
    packed, quantized = lg.PackedWeights.quantize(weights, group), lg.quantize(x)
    sums = lg.matmul(quantized, packed, dtype=np.int32)
    assert (sums == exact(quantized, packed)).all()
    bias = rng.standard_normal(N, dtype=np.float32)
    y = lg.matmul(quantized, packed, bias)
    scaled = sums.astype(np.float32) * packed.channel_scales * quantized.scales[:, None] + bias
    assert y.dtype == np.float32 and (y == scaled).all()
    assert (lg.matmul(quantized, packed, bias, np.float16) == scaled.astype(np.float16)).all()
    reference = x.astype(np.float64) @ weights.T.astype(np.float64) + bias
    assert np.linalg.norm(y - reference) < 0.2 * np.linalg.norm(reference)


@pytest.mark.parametrize("group", [64, 128, "channel"])
def test_saved_packed_and_device_forms_represent_the_same_weights(rng, group, tmp_path: Path):
    weights = lg.PackedWeights.quantize(rng.standard_normal((N, K), dtype=np.float32), group)
    weights.save(tmp_path / "weights.safetensors")
    codes, pairs = weights.unpack()
    assert codes.max() <= 15 and (15 * pairs[..., 0].astype(int) + pairs[..., 1] <= 255).all()
    others = [
        lg.PackedWeights.load(str(tmp_path / "weights.safetensors")),
        lg.PackedWeights.pack(codes, pairs, weights.channel_scales, group),
        lg.PackedWeights.from_parts(weights.packed_codes, weights.packed_pairs, weights.channel_scales, K, group),
        lg.PackedWeights.from_device_bytes(weights.device_bytes(), N, K, group),
        lg.PackedWeights.join_channels([weights.channel_shard(0, 30), weights.channel_shard(30, N)]),
    ]
    for other in others:
        assert other.shape == (N, K) and other.group == group
        assert (other.dequantize() == weights.dequantize()).all()
        assert (other.device_bytes() == weights.device_bytes()).all()


def int4(rng, groups):
    return rng.integers(0, 16, (N, K), np.uint8), rng.uniform(0.5, 1, (N, groups)).astype(np.float32)


def test_int4_weights_with_one_scale_a_channel_are_taken_over_exactly(rng):
    codes, scales = int4(rng, 1)
    zeros = rng.integers(0, 17, (N, 1)).astype(np.float32)
    for given, values in ((None, codes - np.float32(8)), (zeros, codes - zeros)):
        weights, kind, error = lg.PackedWeights.from_int4(codes, scales, given, "channel")
        assert (kind, error) == ("exact", 0) and weights.group == "channel"
        assert (weights.dequantize() == values * scales).all()


def test_int4_groups_whose_scales_are_multiples_are_exact_and_others_snapped_or_requantized(rng):
    codes, scales = int4(rng, 2)
    multiples = np.rint(scales * 16) / 16
    multiples[:, 0] = 1
    expected = (codes - np.float32(8)) * np.repeat(multiples, 128, 1)[:, :K]
    for group in (128, 64):
        taken = lg.PackedWeights.from_int4(codes, multiples, group=group, source_group=128)
        assert (taken.kind, taken.error) == ("exact", 0) and (taken.weights.dequantize() == expected).all()
    values = (codes - np.float32(8)) * np.repeat(scales, 128, 1)[:, :K]
    for group, kind, limit in ((128, "snapped", 0.03), ("channel", "requantized", 0.2)):
        taken = lg.PackedWeights.from_int4(codes, scales, group=group, source_group=128)
        error = np.linalg.norm(taken.weights.dequantize() - values) / np.linalg.norm(values)
        assert taken.kind == kind and taken.weights.group == group
        assert 0 < taken.error < limit and abs(taken.error - error) < 1e-6


def test_shards_along_k_add_up_to_the_whole_sums(rng):
    weights = lg.PackedWeights.quantize(rng.standard_normal((N, K), dtype=np.float32))
    x = lg.quantize(rng.standard_normal((M, K), dtype=np.float32))
    parts = [
        lg.matmul(
            lg.QuantizedActivations(np.ascontiguousarray(x.codes[:, a:b]), x.scales),
            weights.input_shard(a, b),
            dtype=np.int32,
        )
        for a, b in ((0, 64), (64, K))
    ]
    assert (sum(parts) == lg.matmul(x, weights, dtype=np.int32)).all()


def test_norms_and_gates_come_before_quantization(rng):
    x = rng.standard_normal((M, 2 * K)).astype(np.float16)
    gates, ups = x[:, :K].astype(np.float64), x[:, K:].astype(np.float64)
    silu = lg.quantize(x, operation="silu_mul").dequantize()
    assert np.abs(silu - gates / (1 + np.exp(-gates)) * ups).max() < 0.05

    x = np.ascontiguousarray(x[:, :K])
    weight, residual = np.full(K, 2, np.float16), rng.standard_normal((M, K)).astype(np.float16)
    total = (residual.astype(np.float32) + x.astype(np.float32)).astype(np.float16)
    normed = lg.quantize(x, operation="rms_norm", norm_weight=weight, residual=residual).dequantize()
    assert (residual == total).all()
    values = total.astype(np.float64)
    expected = 2 * values / np.sqrt((values**2).mean(1, keepdims=True) + 1e-5)
    assert np.abs(normed - expected).max() < 0.05


def test_experts_get_the_bits_of_their_own_products_and_combine_adds_them(rng):
    experts = [lg.PackedWeights.quantize(rng.standard_normal((N, K), dtype=np.float32)) for _ in range(3)]
    x = lg.quantize(rng.standard_normal((M, K), dtype=np.float32))
    offsets = np.array([0, 4, 4, M], np.int32)
    rows = lg.grouped_matmul(x, experts, offsets, dtype=np.float16)
    for expert, (a, b) in enumerate(zip(offsets, offsets[1:])):
        part = lg.QuantizedActivations(x.codes[a:b], x.scales[a:b])
        assert (rows[a:b] == lg.matmul(part, experts[expert], dtype=np.float16)).all()
    positions = np.array([[0, 8], [3, -1]], np.int32)
    combined = lg.combine(rows, positions, np.array([[0.5, 2], [1, 1]], np.float32))
    wide = rows.astype(np.float32)
    assert (combined[0] == (0.5 * wide[0] + 2 * wide[8]).astype(np.float16)).all()
    assert (combined[1] == rows[3]).all()


def test_smoothing_cancels_between_weights_and_activations(rng):
    weights, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((N, K), (M, K)))
    smoothing = np.exp2(rng.integers(-1, 2, K)).astype(np.float32)
    packed = lg.PackedWeights.quantize(lg.smooth_weights(weights, smoothing))
    y = lg.matmul(lg.quantize(x, smoothing=smoothing), packed)
    reference = x @ weights.T
    assert np.linalg.norm(y - reference) < 0.3 * np.linalg.norm(reference)


def wrong_calls():
    packed = lg.PackedWeights.quantize(np.ones((N, K), np.float32))
    x = lg.quantize(np.ones((M, K), np.float32))

    def from_int4(**changed):
        right = {"codes": np.zeros((N, K), np.uint8), "scales": np.ones((N, 3), np.float32)}
        return lg.PackedWeights.from_int4(**{**right, **changed})

    return {
        "a list": (lambda: lg.quantize([[1.0]]), lg.InvalidArgumentError, "numpy array"),
        "float64": (lambda: lg.quantize(np.ones((M, K))), lg.InvalidArgumentError, "float64"),
        "three dimensions": (lambda: lg.quantize(np.ones((1, M, K), np.float32)), ValueError, "2 dimensions"),
        "not contiguous": (lambda: lg.quantize(np.ones((K, M), np.float32).T), ValueError, "contiguous"),
        "not finite": (lambda: lg.quantize(np.full((M, K), np.nan, np.float32)), ValueError, "finite"),
        "group": (lambda: lg.PackedWeights.quantize(np.ones((N, K), np.float32), 65), ValueError, "65"),
        "group text": (lambda: lg.PackedWeights.quantize(np.ones((N, K), np.float32), "row"), ValueError, "row"),
        "another k": (
            lambda: lg.matmul(x, lg.PackedWeights.quantize(np.ones((N, 64), np.float32))), ValueError, "k = 64",
        ),
        "bias shape": (lambda: lg.matmul(x, packed, np.ones(N + 1, np.float32)), ValueError, "71"),
        "bias with sums": (lambda: lg.matmul(x, packed, np.ones(N, np.float32), np.int32), ValueError, "bias"),
        "no file": (lambda: lg.PackedWeights.load("/no/such/file"), lg.FileError, "/no/such/file"),
        "no folder": (lambda: packed.save("/no/such/folder/file"), OSError, "/no/such/folder"),
        "code 16": (
            lambda: lg.PackedWeights.pack(
                np.full((1, 64), 16, np.uint8), np.array([[[1, 128]]], np.uint8), np.ones(1, np.float32)
            ),
            ValueError,
            "16",
        ),
        "int4 codes": (lambda: from_int4(codes=np.full((N, K), 16, np.uint8)), ValueError, "k = 0 is 16"),
        "signed codes": (lambda: from_int4(codes=np.zeros((N, K), np.int8)), ValueError, "int8"),
        "int4 scales": (lambda: from_int4(scales=np.ones((N, 2), np.float32)), ValueError, r"\[70, 3\]"),
        "int4 scale": (lambda: from_int4(scales=np.full((N, 3), np.inf, np.float32)), ValueError, "scale 0 is inf"),
        "int4 zeros": (lambda: from_int4(zeros=np.full((N, 3), np.nan, np.float32)), ValueError, "zero 0 is NaN"),
        "int4 group": (lambda: from_int4(group=63, source_group=64), ValueError, "63"),
        "source group": (lambda: from_int4(source_group=0), ValueError, "0"),
        "cut": (lambda: packed.input_shard(0, 63), ValueError, "63"),
    }


@pytest.mark.parametrize("name", list(wrong_calls()))
def test_wrong_calls_are_exceptions_that_say_what_was_wrong(name):
    call, kind, text = wrong_calls()[name]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert isinstance(caught.value, lg.LiquidGemmError)


def test_threads_get_their_own_errors_and_right_results(rng):
    packed = lg.PackedWeights.quantize(rng.standard_normal((N, K), dtype=np.float32))
    x = lg.quantize(rng.standard_normal((M, K), dtype=np.float32))
    expected, failures = lg.matmul(x, packed), []

    def work(index: int) -> None:
        for _ in range(20):
            try:
                lg.PackedWeights.load(f"/no/such/file{index}")
            except lg.FileError as error:
                if f"/no/such/file{index}:" not in str(error):
                    failures.append(str(error))
            if not (lg.matmul(x, packed) == expected).all():
                failures.append("other bits")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_freed_weights_give_their_memory_back():
    import resource

    weights = np.ones((512, 4096), np.float32)
    for _ in range(3):
        lg.PackedWeights.quantize(weights)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60):
        lg.PackedWeights.quantize(weights)
    # Each takes more than 1 MB, and 60 would take 65 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_the_package_is_typed_documented_and_free_of_torch():
    assert (Path(lg.__file__).parent / "py.typed").is_file()
    for name in lg.__all__:
        value = getattr(lg, name)
        assert name == "__version__" or value.__doc__, name
    for name, value in vars(lg.PackedWeights).items():
        if callable(value) and not name.startswith("_"):
            assert value.__doc__, name
    code = "import sys, liquidgemm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_readme_example_runs():
    import importlib.metadata as metadata

    text = metadata.metadata("liquidgemm").get_payload() or metadata.metadata("liquidgemm")["Description"]
    code = text.split("```python\n")[1].split("```")[0]
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)
        try:
            exec(compile(code, "README.md", "exec"), {})
        finally:
            os.chdir(here)


def test_the_kernels_have_a_hash():
    assert len(lg.kernels_hash()) == 64 and set(lg.kernels_hash()) <= set("0123456789abcdef")
