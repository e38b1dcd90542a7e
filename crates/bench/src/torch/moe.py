"""Torch's fp8 grouped GEMM on the layers and routings of `liquidgemm bench --moe`.

`torch._scaled_grouped_mm`: e4m3 operands, one scale a row and one a channel, bf16 output, fast accumulation.
A job has the expert's size `n`, `k`, the number of `experts` and of `rows`, and `routings`: the offsets of the
experts' rows, one more than experts. Jobs of one layer follow one another and share its weights.
"""

import bisect

import replay  # before torch, because it takes stdout for the results
import torch

# Relative error of a row against a float product of the same operands, which only rounding may cause.
TOLERANCE = 0.03


class Layer:
    """The weights of all experts, `[experts, n, k]`, with a scale a channel."""

    def __init__(self, job):
        experts, n, k = self.shape = self.shape_of(job)
        self.weights = torch.empty(experts, n, k, device="cuda", dtype=torch.float8_e4m3fn)
        for expert in range(experts):
            self.weights[expert].copy_(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
        self.scales = torch.rand(experts, n, device="cuda") + 0.5

    @staticmethod
    def shape_of(job):
        return job["experts"], job["n"], job["k"]


class Problem:
    """The operands of one job."""

    def __init__(self, layer, job):
        rows, k = job["rows"], job["k"]
        self.layer, self.routings = layer, job["routings"]
        self.activations = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        self.scales = torch.rand(rows, device="cuda") + 0.5
        # Torch takes the ends of the experts' rows.
        self.ends = [torch.tensor(r[1:], device="cuda", dtype=torch.int32) for r in self.routings]

    def launch(self, routing):
        return torch._scaled_grouped_mm(
            self.activations,
            self.layer.weights.transpose(-2, -1),
            self.scales,
            self.layer.scales,
            offs=self.ends[routing],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def check(self):
        """Compares rows with a float product."""
        output, rows = self.launch(0), self.activations.shape[0]
        for row in {0, rows // 2, rows - 1}:
            expert = bisect.bisect_right(self.routings[0], row) - 1
            product = self.layer.weights[expert].float() @ self.activations[row].float()
            expected = product * self.layer.scales[expert] * self.scales[row]
            error = ((output[row].float() - expected).norm() / expected.norm()).item()
            if not error < TOLERANCE:
                raise ValueError(f"row {row} is wrong: relative error {error:.3f}")


def main():
    layer = None

    def measure(clock, job):
        nonlocal layer
        if layer is None or layer.shape != Layer.shape_of(job):
            # The memory of the layer before must be free first.
            layer = None
            torch.cuda.empty_cache()
            layer = Layer(job)
        problem = Problem(layer, job)
        problem.check()
        return clock.measure(problem.launch, len(problem.routings))

    replay.run(measure)


main()
