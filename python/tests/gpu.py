"""Tests of the torch ops and modules on an H100: `python -m pytest -q -s python/tests/gpu.py`.

The file's name keeps pytest from collecting it elsewhere. It needs torch with CUDA, and prints what it measures.
"""

import gc
import time

import numpy as np
import pytest
import torch

import liquidgemm as lg
from liquidgemm import torch as lt

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)
    yield
    torch.cuda.synchronize()


def layer(n: int, k: int, bias: bool = False, group=64) -> lt.LiquidLinear:
    return lt.LiquidLinear.from_float(torch.nn.Linear(k, n, bias), group, device=DEVICE)


def on_cpu(linear: lt.LiquidLinear) -> lt.LiquidLinear:
    copy = lt.LiquidLinear(
        linear.in_features, linear.out_features, linear.bias is not None, group=linear.group or "channel"
    )
    copy.load_state_dict({name: value.cpu() for name, value in linear.state_dict().items()})
    return copy


def in_float64(linear: lt.LiquidLinear, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The layer of quantized activations in float64, whose sums are exact, with the roundings of the epilogue."""
    codes, scales = torch.ops.liquidgemm.quantize(x, None)
    weights = linear.to_packed()
    int8 = torch.from_numpy(np.rint(weights.dequantize() / weights.channel_scales[:, None])).to(DEVICE, torch.float64)
    sums = codes[:, : linear.in_features].double() @ int8.t()
    y = (sums.float() * torch.from_numpy(weights.channel_scales).to(DEVICE)) * scales[:, None]
    return (y if linear.bias is None else y + linear.bias).to(dtype)


def test_1000_random_calls_equal_float64_arithmetic():
    rng, calls = np.random.default_rng(5), 0
    while calls < 1000:
        n, k = int(rng.integers(1, 1500)), int(rng.integers(1, 3000))
        group = [64, 128, "channel"][rng.integers(3)]
        linear = layer(n, k, bool(rng.integers(2)), group)
        for _ in range(20):
            m = int(2 ** rng.uniform(0, 10))
            half = [torch.bfloat16, torch.float16][rng.integers(2)]
            dtype = [torch.bfloat16, torch.float16, torch.float32][rng.integers(3)]
            x = torch.randn(m, k, device=DEVICE, dtype=half) * float(2.0 ** rng.integers(-3, 4))
            arguments = (x, linear.packed, linear.bias, linear.smoothing, n, k, linear.group, dtype)
            y = torch.ops.liquidgemm.linear(*arguments)
            assert torch.equal(y, in_float64(linear, x, dtype)), (m, n, k, group, half, dtype)
            calls += 1


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", list(lt.OPERATIONS))
def test_fused_operations_have_the_bits_of_the_cpu(operation, half):
    n, k, m = 300, 1000, 37
    linear = layer(n, k, True)
    copy = on_cpu(linear)
    gated = operation.endswith("mul")
    x = torch.randn(m, k * (2 if gated else 1), dtype=half)
    norm = torch.randn(k, dtype=half) if operation.endswith("norm") else None
    residual = torch.randn(m, k, dtype=half) if norm is not None else None
    results, residuals = [], []
    for module, device in ((linear, DEVICE), (copy, "cpu")):
        move = lambda value: None if value is None else value.to(device).clone()  # noqa: E731
        total = move(residual)
        results.append(
            torch.ops.liquidgemm.fused_linear(
                move(x), module.packed, module.bias, None, n, k, 64, lt.OPERATIONS[operation],
                move(norm), None, 1e-5, False, total,
            ).cpu()
        )
        residuals.append(None if total is None else total.cpu())
    assert torch.equal(*results)
    assert norm is None or torch.equal(*residuals)


@pytest.mark.parametrize("activation", ["silu_mul", "gelu_tanh_mul"])
def test_a_mixture_has_the_bits_of_the_cpu(activation):
    experts, hidden, inner, tokens, top_k = 8, 512, 384, 100, 2
    gate_up, down = torch.randn(experts, 2 * inner, hidden) * 0.05, torch.randn(experts, hidden, inner) * 0.05
    on_gpu = lt.LiquidMoE.from_float(gate_up, down, activation, device=DEVICE)
    on_host = lt.LiquidMoE.from_float(gate_up, down, activation)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    weights, ids = torch.softmax(torch.randn(tokens, experts), 1).topk(top_k)
    assert torch.equal(on_gpu(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)).cpu(), on_host(x, ids, weights))


def test_a_graph_replays_layers_and_a_mixture_with_new_inputs():
    model = torch.nn.Sequential(layer(1024, 512, True), torch.nn.SiLU(), layer(512, 1024)).to(DEVICE)
    mixture = lt.LiquidMoE.from_float(torch.randn(4, 512, 512) * 0.05, torch.randn(4, 512, 256) * 0.05, device=DEVICE)
    for m in (1, 16, 100, 300):
        x = torch.randn(m, 512, device=DEVICE, dtype=torch.bfloat16)
        ids = torch.randint(0, 4, (m, 2), device=DEVICE)
        weights = torch.rand(m, 2, device=DEVICE)

        def run():
            return mixture(model(x), ids, weights)

        lt.prepare(model, [m])
        lt.prepare(mixture, [m])
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for _ in range(3):
            x.normal_()
            ids.random_(0, 4)
            graph.replay()
            replayed = y.clone()
            assert torch.equal(replayed, run())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole_it_has_the_same_bits(mode):
    model = torch.nn.Sequential(layer(1024, 512, True), torch.nn.SiLU(), layer(512, 1024))
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for m in (16, 16, 16, 64, 64):
            x = torch.randn(m, 512, device=DEVICE, dtype=torch.bfloat16)
            # The compiler may fuse SiLU with other roundings than eager mode.
            y, reference = compiled(x).clone().float(), model(x).float()
            assert (y - reference).norm() < 0.02 * reference.norm()
    one = torch.compile(layer(1024, 512, True), fullgraph=True, mode=mode)
    eager = one._orig_mod
    x = torch.randn(16, 512, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(4):
            assert torch.equal(one(x).clone(), eager(x))


def operations():
    n, k = 192, 256
    linear = layer(n, k)
    x = torch.randn(5, k, device=DEVICE, dtype=torch.float16)
    ops, norm = torch.ops.liquidgemm, torch.ones(k, device=DEVICE, dtype=torch.float16)
    codes, scales = ops.quantize(x)
    packed = torch.from_numpy(lt._experts_bytes([linear.to_packed()] * 3)).to(DEVICE)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([[0, 3], [4, -1]], dtype=torch.int32, device=DEVICE)
    common = (linear.packed, None, None, n, k, 64)
    return {
        "linear": (ops.linear, (x, *common)),
        "rms norm": (ops.fused_linear, (x, *common, 1, norm, None, 1e-5, False, x.clone())),
        "quantize": (ops.quantize, (x,)),
        "gemm": (ops.gemm, (codes, scales, linear.packed, None, n, k, 64, torch.bfloat16)),
        "grouped": (ops.grouped_linear, (x, packed, offsets, 3, n, k, 64)),
        "combine": (ops.combine, (x, positions, torch.ones(2, 2, device=DEVICE))),
    }


@pytest.mark.parametrize("name", ["linear", "rms norm", "quantize", "gemm", "grouped", "combine"])
def test_opcheck_passes(name):
    op, arguments = operations()[name]
    torch.library.opcheck(op, arguments)


def test_streams_run_at_the_same_time_with_their_own_workspaces():
    linears = [layer(4096, 4096) for _ in range(4)]
    x = torch.randn(96, 4096, device=DEVICE, dtype=torch.bfloat16)
    expected = [linear(x) for linear in linears]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in linears]
    for _ in range(50):
        results = []
        for linear, stream in zip(linears, streams):
            with torch.cuda.stream(stream):
                results.append(linear(x))
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(results, expected))


def test_wrong_calls_are_exceptions_and_the_next_call_works():
    linear = layer(128, 256)
    x = torch.randn(4, 256, device=DEVICE, dtype=torch.bfloat16)
    for wrong, text in (
        (x.float(), "float32"),
        (x.cpu(), "cpu"),
        (torch.randn(256, 4, device=DEVICE, dtype=torch.bfloat16).t(), "contiguous"),
        (torch.randn(4, 320, device=DEVICE, dtype=torch.bfloat16), "320"),
    ):
        with pytest.raises((lg.InvalidArgumentError, RuntimeError, NotImplementedError), match=text):
            linear(wrong)
    assert torch.isfinite(linear(x)).all()


def test_a_layer_moves_between_devices():
    linear = layer(128, 256, True)
    x = torch.randn(4, 256, device=DEVICE, dtype=torch.bfloat16)
    before = linear(x).cpu()
    assert torch.equal(linear.cpu()(x.cpu()), before)
    assert torch.equal(linear.to(DEVICE)(x).cpu(), before)


def test_10000_calls_leak_no_memory():
    linear = layer(1024, 1024)
    x = torch.randn(16, 1024, device=DEVICE, dtype=torch.bfloat16)

    def used():
        import resource

        gc.collect()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free, torch.cuda.memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for _ in range(200):
        linear(x)
    device, torch_bytes, host = used()
    for _ in range(10_000):
        linear(x)
    after = used()
    print(f"\ndevice {after[0] - device} B, torch {after[1] - torch_bytes} B, host {after[2] - host} KiB")
    assert after[0] <= device and after[1] <= torch_bytes and after[2] - host < 4096


def test_the_overhead_of_a_call_is_printed():
    linear = layer(256, 256)
    x = torch.randn(1, 256, device=DEVICE, dtype=torch.bfloat16)
    arguments = (x, linear.packed, linear.bias, linear.smoothing, 256, 256, 64, None)
    half = torch.nn.Linear(256, 256, False, device=DEVICE, dtype=torch.bfloat16)
    calls = {
        "op": lambda: torch.ops.liquidgemm.linear(*arguments),
        "op, overload": lambda: torch.ops.liquidgemm.linear.default(*arguments),
        "module": lambda: linear(x),
        "nn.Linear in bf16": lambda: half(x),
    }
    for name, call in calls.items():
        times = []
        with torch.inference_mode():
            for _ in range(30):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(100):
                    call()
                times.append((time.perf_counter() - start) / 100)
                torch.cuda.synchronize()
        # The host's time: the launches are shorter, so the queue never fills.
        print(f"\n{name}: median {sorted(times)[15] * 1e6:.2f} us, least {min(times) * 1e6:.2f} us a call")
