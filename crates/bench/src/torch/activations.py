"""Quantization of activations by `torch.compile`, on the shapes of `liquidgemm bench --activations`.

bf16 in; int8 codes and one f32 scale a row out. A job has an `operation`, the number of `rows`, the length `k`
of a result's row, and the number of `copies` of the operands.

Up to `STATIC_ROWS` rows a graph is compiled for exactly these sizes. For more rows, one graph with a dynamic
number of rows serves all, because each compilation takes more than a second.
"""

import replay  # before torch, because it takes stdout for the results
import torch

STATIC_ROWS = 64
EPSILON = 1e-5
# Rows that are compared with the same function without compilation.
CHECKED_ROWS = 64
# The largest difference of codes: compiled code rounds to bf16 less often.
TOLERANCE = 2


def quantize(x):
    most = x.abs().amax(dim=-1, keepdim=True)
    return torch.round(x * (127.0 / most)).to(torch.int8), most / 127.0


def plain(weight, x):
    return quantize(x.float())


def rms_norm(weight, x):
    x = x.float()
    return quantize(x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPSILON) * weight.float())


def residual_rms_norm(weight, x, residual):
    total = (x.float() + residual.float()).to(torch.bfloat16)
    residual.copy_(total)
    return rms_norm(weight, total)


def silu_mul(weight, x):
    gate, up = x.float().chunk(2, dim=-1)
    return quantize(torch.nn.functional.silu(gate) * up)


# The function of each operation, and the elements of its inputs' rows in multiples of k.
OPERATIONS = {
    "Plain": (plain, [1]),
    "RmsNorm": (rms_norm, [1]),
    "ResidualRmsNorm": (residual_rms_norm, [1, 1]),
    "SiluMul": (silu_mul, [2]),
}


def check(function, compiled, weight, inputs):
    """Compares codes and scales of some rows with those of the function without compilation."""
    expected = function(weight, *(x[:CHECKED_ROWS].clone() for x in inputs))
    found = compiled(weight, *inputs)
    codes, scales = (of[:CHECKED_ROWS] for of in found)
    most = (codes.int() - expected[0].int()).abs().max().item()
    if most > TOLERANCE or not torch.allclose(scales, expected[1], rtol=0.02):
        raise ValueError(f"wrong result: codes differ by up to {most}")


def main():
    current, compiled = None, None

    def measure(clock, job):
        nonlocal current, compiled
        function, widths = OPERATIONS[job["operation"]]
        rows, k, copies = job["rows"], job["k"], job["copies"]
        static = rows <= STATIC_ROWS
        key = (job["operation"], k, rows if static else None)
        if current != key:
            # Otherwise torch counts all sizes of a function against its limit of compilations.
            torch.compiler.reset()
            current, compiled = key, torch.compile(function, dynamic=False if static else None)

        def memory(width):
            # Slices of one buffer would differ in their offset, so each copy has memory of its own.
            x = torch.randn(rows, width * k, device="cuda", dtype=torch.bfloat16)
            if not static:
                torch._dynamo.mark_dynamic(x, 0)
            return x

        weight = torch.rand(k, device="cuda", dtype=torch.bfloat16) + 0.5
        operands = [[memory(width) for width in widths] for _ in range(copies)]
        check(function, compiled, weight, operands[0])
        return clock.measure(lambda copy: compiled(weight, *operands[copy]), copies)

    replay.run(measure)


main()
