"""How the vLLM plugin gathers, cuts and stacks matrices, without vLLM. Without torch there is nothing to test."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import liquidgemm as lg  # noqa: E402
from liquidgemm._checkpoint import check_version, group_of  # noqa: E402
from liquidgemm.torch import LiquidLinear  # noqa: E402
from liquidgemm.vllm import _shards  # noqa: E402

N, K = 192, 256


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


def packed(n=N, k=K, group=64):
    return lg.PackedWeights.quantize(torch.randn(n, k).numpy(), group)


def tensors_of(weights):
    return {
        "weight_codes": torch.from_numpy(weights.packed_codes),
        "weight_pairs": torch.from_numpy(weights.packed_pairs),
        "weight_scales": torch.from_numpy(weights.channel_scales),
    }


@pytest.mark.parametrize("n, size, ranks", [(512, 512, 1), (512, 128, 4), (128, 64, 8), (64, 64, 4), (70, 35, 2)])
def test_the_ranges_of_the_ranks_cover_the_channels_in_order(n, size, ranks):
    ranges = [_shards.channel_range("layer", n, size, rank, ranks) for rank in range(ranks)]
    pieces = n // size
    assert [first for first, _ in ranges] == [rank // (ranks // pieces) * size for rank in range(ranks)]
    assert {end - first for first, end in ranges} == {size} and ranges[-1][1] == n


@pytest.mark.parametrize("n, size, ranks", [(100, 64, 2), (192, 64, 2), (64, 128, 1), (64, 0, 1)])
def test_channels_that_do_not_fit_the_ranks_name_the_layer(n, size, ranks):
    with pytest.raises(lg.InvalidArgumentError, match=r"model\.mlp: the folder has"):
        _shards.channel_range("model.mlp", n, size, 0, ranks)


@pytest.mark.parametrize("group, ranks", [(64, 2), (64, 4), (128, 2), ("channel", 2), ("channel", 8)])
def test_inputs_are_cut_at_the_group_boundaries(group, ranks):
    weights = packed(group=group)
    size = K // ranks
    shards = [_shards.cut_inputs("layer", weights, size, rank).dequantize() for rank in range(ranks)]
    assert (np.concatenate(shards, 1) == weights.dequantize()).all()


@pytest.mark.parametrize("group, ranks", [(128, 4), (64, 8)])
def test_cuts_inside_of_a_group_say_what_to_do(group, ranks):
    with pytest.raises(lg.InvalidArgumentError, match="layer: .* smaller tensor parallel size"):
        _shards.cut_inputs("layer", packed(group=group), K // ranks, 1)


def arrivals(cut=None):
    return _shards.Arrivals("model.layer", lambda key: K, 64, cut or (lambda key, weights: {key: weights}))


def test_tensors_may_arrive_in_any_order_and_in_memory_that_is_used_again():
    weights = packed()
    gathered = arrivals()
    vector = torch.rand(K) + 0.5
    for part, tensor in reversed([*tensors_of(weights).items(), ("smoothing", vector.clone())]):
        reused = tensor.clone()
        gathered.add("q", part, reused)
        reused.zero_()
    (matrix,) = gathered.take(["q"])
    assert (matrix.weights.dequantize() == weights.dequantize()).all()
    assert torch.equal(matrix.smoothing, vector) and matrix.permutation is None
    with pytest.raises(lg.InvalidArgumentError, match=r"model\.layer: not all of weight_codes, .*'q'"):
        gathered.take(["q"])


@pytest.mark.parametrize(
    "part, tensor, text",
    [
        ("weight_codes", torch.zeros(3, 4, 2048, dtype=torch.int8), "int8"),
        ("smoothing", torch.ones(K + 1), r"\[256\]"),
        ("weight_scales", torch.ones(N + 64), "codes"),
    ],
)
def test_tensors_that_do_not_fit_name_the_layer(part, tensor, text):
    gathered = arrivals()
    with pytest.raises(lg.InvalidArgumentError, match=r"model\.layer: .*" + text):
        gathered.add(0, part, tensor)
        for other, value in tensors_of(packed()).items():
            if other != part:
                gathered.add(0, other, value)


def test_matrices_with_the_same_vectors_are_one_layer_and_others_are_layers_side_by_side():
    x = torch.randn(4, K).half()
    order = torch.randperm(K).to(torch.int32)
    weights = [packed(n) for n in (70, 64, 128)]
    smoothing = torch.rand(K) + 0.5
    matrices = [_shards.Matrix(weights[0], smoothing, None), _shards.Matrix(weights[1], smoothing.clone(), None)]
    matrices.append(_shards.Matrix(weights[2], None, order))
    bias = torch.randn(70 + 64 + 128).half()
    layers = _shards.stack(matrices, "cpu", bias)
    assert [layer.out_features for layer in layers] == [134, 128]
    expected, first = [], 0
    for matrix in matrices:
        part = bias[first : first + matrix.weights.n]
        layer = LiquidLinear.from_packed(matrix.weights, part, matrix.smoothing)
        expected.append(layer(x if matrix.permutation is None else x[:, order.long()]))
        first += matrix.weights.n
    assert torch.equal(_shards.forward(layers, x, True), torch.cat(expected, -1))
    unbiased = [LiquidLinear.from_packed(m.weights, None, m.smoothing) for m in matrices[:2]]
    expected = torch.cat([layer(x) for layer in unbiased], -1)
    assert torch.equal(_shards.forward(layers, x, False)[:, :134], expected)
    columns = torch.randn(K, 4).half()
    assert torch.equal(_shards.forward(layers, columns.T, True), _shards.forward(layers, columns.T.contiguous(), True))


def test_vectors_are_cut_with_the_inputs_and_permuted_inputs_are_not_cut():
    smoothing = torch.rand(K)
    matrix = _shards.Matrix(packed(k=K // 2), smoothing, None)
    assert torch.equal(_shards.cut_vectors("layer", matrix, K // 2, 1).smoothing, smoothing[K // 2 :])
    permuted = _shards.Matrix(packed(), None, torch.arange(K, dtype=torch.int32))
    assert _shards.cut_vectors("layer", permuted, K, 0).permutation is permuted.permutation
    with pytest.raises(lg.InvalidArgumentError, match="layer: .*tensor parallel size of 1"):
        _shards.cut_vectors("layer", permuted, K // 2, 0)


def test_entries_of_the_configuration_are_checked():
    assert group_of("64") == 64 and group_of(128) == 128 and group_of("channel") == "channel"
    for wrong in ("63", "0", "", None, "-64"):
        with pytest.raises(lg.InvalidArgumentError, match="multiple of 64"):
            group_of(wrong)
    with pytest.raises(lg.InvalidArgumentError, match="version 2"):
        check_version(2)
