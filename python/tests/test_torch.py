"""The torch ops and modules on CPU tensors. `gpu.py` has the tests on a GPU. Without torch there is nothing to test."""

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import liquidgemm as lg  # noqa: E402
from liquidgemm import torch as lt  # noqa: E402

N, K = 70, 192


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


def layer(bias: bool = True, group=64, k: int = K, n: int = N) -> lt.LiquidLinear:
    return lt.LiquidLinear.from_float(torch.nn.Linear(k, n, bias), group)


def halves(*shape, dtype=torch.float16):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("group", [64, 128, "channel"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_has_the_bits_of_the_numpy_interface(group, bias):
    linear, x = layer(bias, group), halves(2, 5, K)
    y = linear(x)
    assert y.shape == (2, 5, N) and y.dtype == x.dtype
    quantized = lg.quantize(x.view(10, K).numpy())
    vector = linear.bias.numpy() if bias else None
    expected = lg.matmul(quantized, linear.to_packed(), vector, np.float16)
    assert (y.view(10, N).numpy() == expected).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_is_near_the_float_layer(dtype):
    linear = torch.nn.Linear(512, 256)
    x = halves(33, 512, dtype=dtype)
    y = lt.LiquidLinear.from_float(linear)(x).float()
    reference = linear(x.float())
    assert (y - reference).norm() < 0.15 * reference.norm()


def test_smoothing_is_part_of_the_layer():
    linear = torch.nn.Linear(512, 256)
    x = halves(33, 512)
    smoothed = lt.LiquidLinear.from_float(linear, smoothing=torch.linspace(0.5, 2, 512))
    reference = linear(x.float())
    assert (smoothed(x).float() - reference).norm() < 0.15 * reference.norm()


def test_a_state_survives_saving_and_loading_under_the_names_of_packed_checkpoints():
    first, second = layer(), lt.LiquidLinear(K, N, True)
    state = first.state_dict()
    assert list(state) == ["bias", "weight_codes", "weight_pairs", "weight_scales"] or set(state) == {
        "bias", "weight_codes", "weight_pairs", "weight_scales",
    }
    assert state["weight_codes"].shape == (2, 3, 2048) and state["weight_pairs"].shape == (2, 3, 128)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    x = halves(4, K)
    assert torch.equal(first(x), second(x))

    with pytest.raises(RuntimeError, match="weight_pairs"):
        second.load_state_dict({name: value for name, value in state.items() if name != "weight_pairs"})
    with pytest.raises(RuntimeError, match="codes"):
        lt.LiquidLinear(K + 64, N, True).load_state_dict(state)


def test_new_contents_of_the_weights_are_used():
    first, second, x = layer(False), layer(False), halves(4, K)
    before = first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x)) and not torch.equal(first(x), before)
    third = layer(False)
    first.packed.copy_(third.packed)
    assert torch.equal(first(x), third(x))


def test_a_layer_that_was_called_can_be_copied_and_pickled():
    linear, x = layer(), halves(3, K)
    y = linear(x)
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(linear), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), y)
        # The copy has weights of its own.
        other.packed.copy_(layer().packed)
        assert not torch.equal(other(x), y) and torch.equal(linear(x), y)


def test_changes_of_the_model_type_leave_the_layer_as_it_is():
    linear, x = layer(), halves(4, K)
    before = linear(x)
    model = torch.nn.Sequential(linear).half().bfloat16()
    assert linear.bias.dtype is torch.float32 and torch.equal(model(x), before)


def test_replaced_linears_compute_and_others_stay():
    model = torch.nn.Sequential()
    model.add_module("up", torch.nn.Linear(128, 256))
    model.add_module("act", torch.nn.ReLU())
    model.add_module("down", torch.nn.Linear(256, 128))
    model.add_module("lm_head", torch.nn.Linear(128, 64))
    x = halves(8, 128)
    reference = model[:3](x.float())
    assert lt.replace_linears(model) == ["up", "down"]
    assert type(model.lm_head) is torch.nn.Linear
    assert (model[:3](x).float() - reference).norm() < 0.25 * reference.norm()


def operations():
    plain = layer(False)
    x, residual, weight = halves(5, K), halves(5, K), torch.ones(K, dtype=torch.float16)
    common = (plain.packed, None, None, N, K, 64)
    ops = torch.ops.liquidgemm
    codes, scales = ops.quantize(x)
    moe_packed = torch.from_numpy(lt._experts_bytes([layer(False).to_packed() for _ in range(3)]))
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    positions = torch.tensor([[0, 3], [4, -1]], dtype=torch.int32)
    return {
        "linear": (ops.linear, (x, *common), {}),
        "linear with bias": (ops.linear, (x, plain.packed, torch.ones(N), torch.ones(K), N, K, 64, torch.float32), {}),
        "linear of nothing": (ops.linear, (x[:0], *common), {}),
        "rms norm": (ops.fused_linear, (x, *common, lt.OPERATIONS["rms_norm"], weight, None, 1e-5, False, residual), {}),
        "layer norm": (ops.fused_linear, (x, *common, lt.OPERATIONS["layer_norm"], weight, weight), {}),
        "silu": (ops.fused_linear, (halves(5, 2 * K), *common, lt.OPERATIONS["silu_mul"]), {}),
        "quantize": (ops.quantize, (x, torch.ones(K)), {}),
        "gemm": (ops.gemm, (codes, scales, plain.packed, None, N, K, 64, torch.bfloat16), {}),
        "grouped": (ops.grouped_linear, (x, moe_packed, offsets, 3, N, K, 64), {}),
        "combine": (ops.combine, (x, positions, torch.ones(2, 2)), {}),
    }


@pytest.mark.parametrize("name", list(operations()))
def test_opcheck_passes(name):
    op, arguments, keywords = operations()[name]
    torch.library.opcheck(op, arguments, keywords)


def test_fused_operations_are_the_operation_and_then_the_layer():
    plain, x = layer(False), halves(5, 2 * K)
    gates, ups = x[:, :K].float(), x[:, K:].float()
    y = torch.ops.liquidgemm.fused_linear(x, plain.packed, None, None, N, K, 64, lt.OPERATIONS["silu_mul"])
    reference = plain((torch.nn.functional.silu(gates) * ups).half())
    assert (y.float() - reference.float()).norm() < 0.02 * reference.float().norm()


def test_compiled_whole_it_has_the_same_bits():
    linear, x = layer(), halves(5, K)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(x), linear(x))


@pytest.mark.parametrize("activation", ["silu_mul", "gelu_tanh_mul"])
def test_a_mixture_is_near_its_float_experts(activation):
    experts, hidden, inner, tokens, top_k = 4, 128, 192, 20, 2
    gate_up, down = torch.randn(experts, 2 * inner, hidden) * 0.1, torch.randn(experts, hidden, inner) * 0.1
    mixture = lt.LiquidMoE.from_float(gate_up, down, activation)
    x = halves(tokens, hidden)
    weights, ids = torch.softmax(torch.randn(tokens, experts), 1).topk(top_k)
    y = mixture(x, ids, weights)
    act = torch.nn.functional.silu if activation == "silu_mul" else (
        lambda value: torch.nn.functional.gelu(value, approximate="tanh")
    )
    reference = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token]):
            gates, ups = (gate_up[expert] @ x[token].float()).chunk(2)
            reference[token] += weight * (down[expert] @ (act(gates) * ups))
    assert y.shape == x.shape and (y.float() - reference).norm() < 0.25 * reference.norm()


def wrong_calls():
    linear = layer()
    return {
        "float32": (lambda: linear(torch.ones(2, K)), "float32"),
        "another k": (lambda: linear(halves(2, K + 64)), "256"),
        "not contiguous": (lambda: linear(halves(K, 2).t()), "contiguous"),
        "another device": (lambda: linear(torch.empty(2, K, dtype=torch.float16, device="meta")), "meta"),
        "output type": (
            lambda: torch.ops.liquidgemm.linear(halves(2, K), linear.packed, None, None, N, K, 64, torch.int8), "int8",
        ),
        "bias type": (
            lambda: torch.ops.liquidgemm.linear(halves(2, K), linear.packed, halves(N), None, N, K, 64), "bias",
        ),
        "residual without a norm": (
            lambda: torch.ops.liquidgemm.fused_linear(
                halves(2, K), linear.packed, None, None, N, K, 64, 0, residual=halves(2, K)
            ),
            "norm",
        ),
        "no norm weight": (
            lambda: torch.ops.liquidgemm.fused_linear(halves(2, K), linear.packed, None, None, N, K, 64, 1), "norm_weight",
        ),
    }


@pytest.mark.parametrize("name", list(wrong_calls()))
def test_wrong_calls_are_exceptions_that_say_what_was_wrong(name):
    call, text = wrong_calls()[name]
    with pytest.raises((lg.InvalidArgumentError, RuntimeError), match=text):
        call()
