"""The time that a call of an op takes on the host, in eager mode: the launches are not waited for.

    python python/benchmarks/overhead.py --json overhead.json

One row and a small matrix, so that the GPU is always faster than the host. torch.mm and nn.Linear in bf16 are measured
by turns in the same run. With `--profile` it prints what the Python functions of a call take, by cProfile.
Without a GPU (`--device cpu`) an input without rows is used: the op then does all but the launch.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch

from liquidgemm import torch as lt

TARGET_US = 12.0


def host_us(calls: Dict[str, Callable[[], Any]], synchronize: Callable[[], None], rounds: int, repeat: int) -> Dict[str, List[float]]:
    """Microseconds of the host for a call, one value a round. The calls take turns."""
    times: Dict[str, List[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            us = (time.perf_counter() - start) / repeat * 1e6
            if turn >= 2:
                times[name].append(us)
    synchronize()
    return times


def main() -> int:
    """Measures, and returns 1 if the op takes longer than the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", type=int, default=256, help="output and input channels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=100, help="calls in a round; fewer than the launch queue holds")
    parser.add_argument("--json", metavar="FILE", help="results to write")
    parser.add_argument("--profile", action="store_true", help="print a profile of the op by cProfile")
    options = parser.parse_args()
    device, size = torch.device(options.device), options.size
    cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    rows = 1 if cuda else 0
    layer = lt.LiquidLinear.from_float(torch.nn.Linear(size, size, False), device=device)
    x = torch.randn(rows, size, device=device, dtype=torch.bfloat16)
    half = torch.nn.Linear(size, size, False, device=device, dtype=torch.bfloat16)
    transposed = half.weight.detach().t()
    norm, residual = torch.ones(size, device=device, dtype=torch.bfloat16), torch.zeros_like(x)
    ops, shape = torch.ops.liquidgemm, (size, size, 64)
    codes, scales = ops.quantize(x, None)
    none = x[:0]
    calls: Dict[str, Callable[[], Any]] = {
        "ops.linear without rows: no launch": lambda: ops.linear(none, layer.packed, None, None, *shape),
        "ops.linear": lambda: ops.linear(x, layer.packed, None, None, *shape),
        "ops.linear.default": lambda: ops.linear.default(x, layer.packed, None, None, *shape),
        "LiquidLinear": lambda: layer(x),
        "ops.fused_linear, RMSNorm and residual": lambda: ops.fused_linear(
            x, layer.packed, None, None, *shape, 1, norm, None, 1e-5, False, residual
        ),
        "ops.quantize": lambda: ops.quantize(x, None),
        "ops.gemm": lambda: ops.gemm(codes, scales, layer.packed, None, *shape, torch.bfloat16),
        "torch.mm, bf16": lambda: torch.mm(x, transposed),
        "nn.Linear, bf16": lambda: half(x),
    }
    with torch.inference_mode():
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda: [calls["ops.linear"]() for _ in range(2000)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)
        times = host_us(calls, synchronize, options.rounds, options.calls)
    results = {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "torch": torch.__version__,
        "size": size,
        "target_us": TARGET_US,
        "us": {name: {"median": statistics.median(values), "least": min(values)} for name, values in times.items()},
    }
    print(f"{results['device']}, torch {torch.__version__}, m = {rows}, n = k = {size}: host time of a call, us")
    for name, value in results["us"].items():
        print(f"{name:40} median {value['median']:6.2f}  least {value['least']:6.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    median = results["us"]["ops.linear"]["median"]
    print(f"target: ops.linear ≤ {TARGET_US:g} us: {'reached' if median <= TARGET_US else 'missed'}")
    return 0 if median <= TARGET_US else 1


if __name__ == "__main__":
    sys.exit(main())
