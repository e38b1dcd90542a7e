"""Decode steps and prefill of LLaMA models on one GPU: our linear layers against bf16 and fp8, all with torch.

    python python/benchmarks/system.py --json system.json --markdown docs/benchmarks/system.md
    python python/benchmarks/system.py --from system.json --markdown docs/benchmarks/system.md

Needs torch and the wheel, on an H100. Weights are random. All variants have the same attention (torch SDPA, grouped-query),
the same bf16 KV cache, rotary embedding and bf16 head:

- bf16: cuBLAS; norm and SiLU · mul by torch.compile.
- fp8: `torch._scaled_mm` with a scale a row and a scale a channel; torch.compile fuses the quantization with norm and SiLU · mul.
- int4: this library; its kernels quantize after RMSNorm with the residual, and after SiLU · mul.

Every measurement is the replay of a CUDA graph. The variants of a table's row take turns, and the medians are reported.
A section that fails prints its traceback, and the others still run; then the exit status is 1.
"""

import argparse
import copy
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
CONTEXT = 1024
PREFILL = 2048
BATCHES = (1, 16, 64, 128, 256)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
VARIANTS = ("bf16", "fp8", "int4")
# Output rows that are quantized. The weights are made of their strips of 64 rows, in random order.
DISTINCT_ROWS, STRIP = 512, 64
# Bytes of the GPU that a model may use in the largest batch, and what is left to the allocator and the libraries.
GPU_BYTES, RESERVE = int(79.1 * 2**30), int(1.5 * 2**30)
# Relative error of a layer's output against float arithmetic with the same weights.
TOLERANCE = {"bf16": 0.03, "fp8": 0.12, "int4": 0.05}

#: The least ratio of times per layer, (model, batch): (bf16 / int4, fp8 / int4).
TARGETS = {
    ("llama3-8b", 1): (2.1, 1.7),
    ("llama3-8b", 16): (2.1, 1.7),
    ("llama3-8b", 64): (1.6, 1.35),
    ("llama2-70b", 1): (2.8, 1.8),
    ("llama2-70b", 16): (2.8, 1.8),
    ("llama2-70b", 64): (2.5, 1.7),
    ("llama2-70b", 256): (1.8, 1.5),
}
PREFILL_TARGET = 1.6


@dataclass(frozen=True)
class Model:
    """The shapes of a model."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    head_size: int = 128

    def linears(self) -> Dict[str, Tuple[int, int]]:
        """Output and input channels of a layer's products: Q, K and V are stacked, and so are gate and up."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_size, self.hidden),
            "o": (self.hidden, self.heads * self.head_size),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the bf16 cache of one layer."""
        return tokens * self.kv_heads * self.head_size * 2 * 2

    def layer_bytes(self, variant: str) -> int:
        """Bytes of one layer's weights."""
        total = 2 * self.hidden * 2
        for n, k in self.linears().values():
            total += {"bf16": 2 * n * k, "fp8": n * k + 4 * n, "int4": n * k * 17 // 32 + 4 * n}[variant]
        return total

    def kept_bytes(self) -> int:
        """Bytes of the embedding, the head and the last norm, bf16."""
        return (2 * self.vocabulary + 1) * self.hidden * 2

    def activation_bytes(self, rows: int) -> int:
        """Bytes of what a step holds at the same time, at most: the widest product with its input, and the head's."""
        qkv = self.linears()["qkv"][0]
        return rows * 2 * (8 * self.hidden + 2 * qkv + 5 * self.inner + 2 * self.vocabulary)

    def largest_batch(self, variant: str, usable: int) -> int:
        """Sequences of `CONTEXT` tokens that fit beside the weights. 0 if the weights don't fit."""
        left = usable - self.layers * self.layer_bytes(variant) - self.kept_bytes()
        each = self.layers * self.kv_bytes(CONTEXT) + self.activation_bytes(1)
        return max(0, left // each)


MODELS = (
    Model("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
    Model("llama2-70b", 80, 8192, 64, 8, 28672, 32000),
    Model("llama2-7b", 32, 4096, 32, 32, 11008, 32000),
)
TINY = (Model("tiny", 3, 256, 4, 2, 512, 512, 64),)


# --- What torch.compile fuses ---


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """Adds x to the residual, in place, and returns the RMSNorm of the sum."""
    total = (x.float() + residual.float()).to(residual.dtype)
    residual.copy_(total)
    x = total.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight.float()).to(residual.dtype)


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def to_fp8(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Returns codes and the scale of each row, `[rows, 1]`."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (x / scale).clamp(-448.0, 448.0).to(FP8), scale


def add_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    total = (x.float() + residual.float()).to(residual.dtype)
    residual.copy_(total)
    x = total.float()
    return to_fp8(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight.float())


def silu_mul_fp8(x: Tensor) -> Tuple[Tensor, Tensor]:
    gate, up = x.float().chunk(2, dim=-1)
    return to_fp8(F.silu(gate) * up)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, k_slot: Tensor, v_slot: Tensor, heads: int) -> Tensor:
    """Rotates Q and K, writes K and V to their slots of the cache, `[rows, kv_heads, head_size]`, and returns Q."""
    rows, kv_heads, size = k_slot.shape
    q, k, v = qkv.view(rows, heads + 2 * kv_heads, size).split((heads, kv_heads, kv_heads), dim=1)

    def rotated(x: Tensor) -> Tensor:
        low, high = x.float().chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(qkv.dtype)

    k_slot.copy_(rotated(k))
    v_slot.copy_(v)
    return rotated(q)


class Compiled:
    """The functions above, compiled for exactly the shapes of each call."""

    NAMES = ("add_norm", "silu_mul", "to_fp8", "add_norm_fp8", "silu_mul_fp8", "rope")

    def __init__(self, enabled: bool) -> None:
        for name in self.NAMES:
            function = globals()[name]
            setattr(self, name, torch.compile(function, dynamic=False, fullgraph=True) if enabled else function)


class Bench:
    """The device, the compiled functions, and the stream of all measurements."""

    def __init__(self, device: str, compiled: bool) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.compiled = Compiled(compiled and self.cuda)
        self.stream = torch.cuda.Stream() if self.cuda else None

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives unused memory back."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def capture(self, run: Callable[[], Any]) -> Callable[[], None]:
        """Runs once, which compiles, and returns a function that replays the launches."""
        if not self.cuda:
            run()
            return run
        with torch.cuda.stream(self.stream):
            run()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                kept = run()

        def replay() -> None:
            graph.replay()

        replay.kept = (graph, kept)  # type: ignore[attr-defined]
        return replay

    def medians_us(self, replays: Dict[str, Callable[[], None]], rounds: int) -> Dict[str, float]:
        """Replays by turns, and returns the median of each in microseconds."""
        times: Dict[str, List[float]] = {name: [] for name in replays}
        if not self.cuda:
            for _ in range(rounds):
                for name, replay in replays.items():
                    start = time.perf_counter()
                    replay()
                    times[name].append((time.perf_counter() - start) * 1e6)
            return {name: statistics.median(values) for name, values in times.items()}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            for turn in range(rounds + 2):
                for name, replay in replays.items():
                    start.record()
                    replay()
                    end.record()
                    end.synchronize()
                    if turn >= 2:
                        times[name].append(start.elapsed_time(end) * 1e3)
        return {name: statistics.median(values) for name, values in times.items()}


# --- Weights ---


class Weight:
    """One product's weights, in the three variants: strips of 64 rows in random order, of a few that are quantized."""

    def __init__(self, bench: Bench, n: int, k: int, variants: Tuple[str, ...], generator: torch.Generator) -> None:
        self.n, self.k = n, k
        small = torch.randn(DISTINCT_ROWS, k, generator=generator) / k**0.5
        strips = torch.randint(0, DISTINCT_ROWS // STRIP, (n // STRIP,), generator=generator)
        self.rows = ((strips * STRIP).view(-1, 1) + torch.arange(STRIP)).view(-1).to(bench.device)
        self.small = small.to(bench.device)
        self.tensors: Dict[str, Tuple[Tensor, ...]] = {}
        if "bf16" in variants:
            self.tensors["bf16"] = (self.small.to(BF16).index_select(0, self.rows),)
        if "fp8" in variants:
            codes, scales = to_fp8(self.small)
            codes = codes.view(torch.uint8).index_select(0, self.rows).view(FP8)
            self.tensors["fp8"] = (codes, scales.index_select(0, self.rows).view(1, n).contiguous())
        if "int4" in variants:
            from liquidgemm import PackedWeights

            packed = PackedWeights.quantize(small.numpy())
            self.dequantized = torch.from_numpy(packed.dequantize()).to(bench.device)
            parts = (part[strips.numpy()] for part in (packed.packed_codes, packed.packed_pairs))
            scales = packed.channel_scales.reshape(-1, STRIP)[strips.numpy()].reshape(-1)
            whole = PackedWeights.from_parts(*parts, scales, k)
            self.tensors["int4"] = (torch.from_numpy(whole.device_bytes()).to(bench.device),)
        bench.synchronize()

    def copy(self, variant: str) -> Tuple[Tensor, ...]:
        """Returns the same values at other addresses."""
        return tuple(tensor.clone() for tensor in self.tensors[variant])


class Layers:
    """Layers of one variant. All have the same values, and memory of their own."""

    def __init__(self, bench: Bench, model: Model, weights: Dict[str, Weight], variant: str, count: int) -> None:
        self.bench, self.model, self.variant = bench, model, variant
        self.weights: List[Dict[str, Tuple[Tensor, ...]]] = []
        self.norms: List[Tuple[Tensor, Tensor]] = []
        for layer in range(count):
            self.weights.append({name: w.copy(variant) if layer else w.tensors[variant] for name, w in weights.items()})
            norm = torch.linspace(0.8, 1.2, model.hidden, device=bench.device).to(BF16)
            self.norms.append((norm, norm.clone()))
        bench.synchronize()

    def product(self, layer: int, name: str, codes: Tensor, scales: Optional[Tensor] = None) -> Tensor:
        """The GEMM alone, of what `quantized` returned."""
        weight = self.weights[layer][name]
        if self.variant == "bf16":
            return F.linear(codes, weight[0])
        if self.variant == "fp8":
            if not self.bench.cuda:
                return ((codes.float() * scales) @ (weight[0].float() * weight[1].view(-1, 1)).t()).to(BF16)
            return torch._scaled_mm(codes, weight[0].t(), scales, weight[1], out_dtype=BF16, use_fast_accum=True)
        n, k = self.model.linears()[name]
        return torch.ops.liquidgemm.gemm(codes, scales, weight[0], None, n, k, 64, BF16)

    def first(self, count: int) -> "Layers":
        """Returns the first layers."""
        few = copy.copy(self)
        few.weights, few.norms = self.weights[:count], self.norms[:count]
        return few

    def products(self, inputs: Dict[str, Tuple[Tensor, ...]]) -> Tensor:
        """All GEMMs of all layers, of what `quantized` returned for each."""
        for layer in range(len(self.weights)):
            for name, quantized in inputs.items():
                y = self.product(layer, name, *quantized)
        return y

    def quantized(self, x: Tensor) -> Tuple[Tensor, ...]:
        if self.variant == "bf16":
            return (x,)
        return self.bench.compiled.to_fp8(x) if self.variant == "fp8" else torch.ops.liquidgemm.quantize(x, None)

    def normed(self, layer: int, name: str, x: Tensor, residual: Tensor) -> Tensor:
        """Adds x to the residual, and returns the product of the sum's norm."""
        norm, compiled = self.norms[layer][name == "gate_up"], self.bench.compiled
        if self.variant == "bf16":
            return self.product(layer, name, compiled.add_norm(x, residual, norm))
        if self.variant == "fp8":
            return self.product(layer, name, *compiled.add_norm_fp8(x, residual, norm))
        return self._fused(layer, name, x, "rms_norm", norm, residual)

    def plain(self, layer: int, name: str, x: Tensor) -> Tensor:
        if self.variant == "int4":
            n, k = self.model.linears()[name]
            return torch.ops.liquidgemm.linear(x, self.weights[layer][name][0], None, None, n, k, 64)
        return self.product(layer, name, *self.quantized(x))

    def gated(self, layer: int, name: str, x: Tensor) -> Tensor:
        """The product of `silu(gate) · up`."""
        if self.variant == "bf16":
            return self.product(layer, name, self.bench.compiled.silu_mul(x))
        if self.variant == "fp8":
            return self.product(layer, name, *self.bench.compiled.silu_mul_fp8(x))
        return self._fused(layer, name, x, "silu_mul", None, None)

    def _fused(
        self, layer: int, name: str, x: Tensor, operation: str, norm: Optional[Tensor], residual: Optional[Tensor]
    ) -> Tensor:
        from liquidgemm.torch import OPERATIONS

        n, k = self.model.linears()[name]
        weight = self.weights[layer][name][0]
        return torch.ops.liquidgemm.fused_linear(
            x, weight, None, None, n, k, 64, OPERATIONS[operation], norm, None, EPSILON, False, residual
        )


class State:
    """The cache and the inputs of `rows` tokens: one of each sequence, or, in prefill, all of one sequence."""

    def __init__(self, bench: Bench, model: Model, layers: int, batch: int, context: int, prefill: bool = False) -> None:
        self.model, self.batch, self.prefill = model, batch, prefill
        self.rows = context if prefill else batch
        shape = (batch, model.kv_heads, context, model.head_size)

        def half(*size: int) -> Tensor:
            return torch.empty(size, dtype=BF16, device=bench.device).normal_()

        self.caches = [(half(*shape), half(*shape)) for _ in range(layers)]
        # The slots that this step writes: all tokens, or each sequence's last one.
        select = (lambda c: c[0].transpose(0, 1)) if prefill else (lambda c: c[:, :, context - 1])
        self.slots = [(select(k), select(v)) for k, v in self.caches]
        positions = torch.arange(context, dtype=torch.float32)[None if prefill else context - 1 :]
        angles = positions.view(-1, 1) / 10000.0 ** (torch.arange(0, 1, 2 / model.head_size))
        self.cos, self.sin = (f(angles).view(-1, 1, model.head_size // 2).to(bench.device) for f in (torch.cos, torch.sin))
        self.embedded = half(self.rows, model.hidden)
        self.residual = torch.zeros_like(self.embedded)
        bench.synchronize()

    def attention(self, layer: int, q: Tensor) -> Tensor:
        """Returns `[rows, heads · head_size]` for q `[rows, heads, head_size]`."""
        k, v = self.caches[layer]
        grouped = self.model.heads != self.model.kv_heads
        if self.prefill:
            q = q.transpose(0, 1).unsqueeze(0)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return y.transpose(1, 2).reshape(self.rows, -1)
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=grouped).reshape(self.rows, -1)


def step(layers: Layers, state: State, head: Optional[Tuple[Tensor, Tensor]] = None) -> Tensor:
    """A step through all layers, and through the last norm and the head if they are given."""
    compiled = layers.bench.compiled
    x = state.embedded
    state.residual.zero_()
    for layer in range(len(layers.weights)):
        qkv = layers.normed(layer, "qkv", x, state.residual)
        q = compiled.rope(qkv, state.cos, state.sin, *state.slots[layer], state.model.heads)
        o = layers.plain(layer, "o", state.attention(layer, q))
        gate_up = layers.normed(layer, "gate_up", o, state.residual)
        x = layers.gated(layer, "down", gate_up)
    if head is not None:
        x = F.linear(compiled.add_norm(x, state.residual, head[0]), head[1]).argmax(-1)
    return x


def float_layer(weights: Dict[str, Weight], state: State, norms: Tuple[Tensor, Tensor], int4: bool) -> Tensor:
    """One layer in float32, with the weights that the codes represent or the ones before quantization."""

    def product(name: str, x: Tensor) -> Tensor:
        weight = weights[name]
        return (x @ (weight.dequantized if int4 else weight.small).t()).index_select(1, weight.rows)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight.float()

    model, x = state.model, state.embedded.float()
    slots = [tensor.clone() for tensor in state.slots[0]]
    qkv = product("qkv", norm(x, norms[0]))
    q = rope(qkv, state.cos, state.sin, *slots, model.heads)
    caches = [cache.float() for cache in state.caches[0]]
    for cache, slot in zip(caches, slots):
        cache[:, :, -1] = slot.float()
    k, v = (cache.repeat_interleave(model.heads // model.kv_heads, dim=1) for cache in caches)
    scores = torch.einsum("bhd,bhtd->bht", q, k) / model.head_size**0.5
    attention = torch.einsum("bht,bhtd->bhd", scores.softmax(-1), v)
    x = x + product("o", attention.reshape(state.rows, -1))
    gate, up = product("gate_up", norm(x, norms[1])).chunk(2, dim=-1)
    return x + product("down", F.silu(gate) * up)


# --- Sections ---


class Run:
    """What is measured, the results, and the failures."""

    def __init__(self, options: argparse.Namespace) -> None:
        import liquidgemm

        self.options = options
        self.models = TINY if options.tiny else tuple(m for m in MODELS if m.name in options.models)
        self.batches = (1, 3) if options.tiny else options.batches
        self.context = 32 if options.tiny else CONTEXT
        self.prefill = 40 if options.tiny else PREFILL
        self.began = time.monotonic()
        self.bench = Bench(options.device, not options.eager)
        self.usable = 0
        self.results: Dict[str, Any] = {
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "kernels": liquidgemm.kernels_hash(),
            "context": self.context,
            "prefill_tokens": self.prefill,
            "device": "CPU",
            "checks": [],
            "decode": [],
            "prefill": [],
            "steps": [],
            "failures": [],
        }
        if self.bench.cuda:
            self.results["device"] = torch.cuda.get_device_name(self.bench.device)
            self.results["cuda"] = torch.version.cuda
            driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            self.results["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.split("\n")[0]
            self.usable = min(torch.cuda.mem_get_info(self.bench.device)[0], GPU_BYTES) - RESERVE
        else:
            self.usable = 2**30
        self.results["usable_bytes"] = self.usable

    def section(self, name: str, run: Callable[[], None]) -> None:
        """Runs a section if there is time for it. A failure does not end the others."""
        seconds = time.monotonic() - self.began
        if seconds > self.options.budget_s:
            self.results["failures"].append({"section": name, "error": f"not run within {self.options.budget_s} s"})
            return
        print(f"[{seconds:6.1f} s] {name}", flush=True)
        # A capture collects garbage, which is quick if the objects of torch and its compiler are left out.
        gc.collect()
        gc.freeze()
        try:
            run()
        except Exception as error:  # whatever it is, the other sections are still worth measuring
            traceback.print_exc()
            self.results["failures"].append({"section": name, "error": f"{type(error).__name__}: {error}"[:500]})
        self.bench.free()
        self.save()

    def save(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self.began, 1)
        text = json.dumps(self.results, indent=1) + "\n"
        target = Path(self.options.json)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        partial.write_text(text, "utf-8")
        partial.replace(target)

    def all(self) -> int:
        """Runs everything, and returns the exit status."""
        if self.bench.cuda and not self.options.eager:
            self.section("compile in parallel", self.compile)
        for model in self.models:
            self.measure(model)
        self.save()
        failures = self.results["failures"]
        for failure in failures:
            print(f"FAILED {failure['section']}: {failure['error']}", file=sys.stderr)
        return 1 if failures else 0

    # Compilation is most of the time, so processes fill the compiler's cache first.

    def shapes(self) -> List[Tuple[str, int, bool]]:
        """The models and rows that are compiled for, and whether it is prefill."""
        found = []
        for model in self.models:
            batches = set(self.batches)
            for variant in VARIANTS:
                batches.add(model.largest_batch(variant, self.usable))
            found += [(model.name, rows, False) for rows in sorted(batches - {0})] + [(model.name, self.prefill, True)]
        return found

    def compile(self) -> None:
        shapes = self.shapes()
        count = min(len(shapes), max(1, (os.cpu_count() or 2) - 2))
        processes = []
        for part in range(count):
            text = json.dumps(shapes[part::count])
            command = [sys.executable, __file__, "--compile-only", text, "--device", self.options.device]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + 100
        codes = []
        for process in processes:
            try:
                codes.append(process.wait(max(1.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        if any(codes):
            print(f"{sum(map(bool, codes))} compiling processes failed; this process compiles what is missing", flush=True)

    def measure(self, model: Model) -> None:
        generator = torch.Generator().manual_seed(1)
        weights: Dict[str, Weight] = {}

        def make() -> None:
            for name, (n, k) in model.linears().items():
                weights[name] = Weight(self.bench, n, k, VARIANTS, generator)

        self.section(f"{model.name}: weights", make)
        if len(weights) != len(model.linears()):
            return
        self.section(f"{model.name}: check", lambda: self.check(model, weights))
        count = 2 if self.options.tiny else (16 if model.hidden <= 4096 else 6)
        layers: Dict[str, Layers] = {}

        def build() -> None:
            for variant in VARIANTS:
                layers[variant] = Layers(self.bench, model, weights, variant, count)

        self.section(f"{model.name}: {count} layers", build)
        if len(layers) == len(VARIANTS):
            for batch in self.batches:
                self.section(f"{model.name}: decode, batch {batch}", lambda: self.decode(model, layers, batch))
            self.section(f"{model.name}: prefill", lambda: self.prefill_step(model, layers))
        layers.clear()
        # Each variant then has the GPU for itself, so the others' weights go to the host.
        for weight in weights.values():
            weight.tensors = {v: tuple(t.cpu() for t in tensors) for v, tensors in weight.tensors.items()}
            weight.rows = weight.small = weight.dequantized = None
        self.bench.free()
        for variant in VARIANTS:
            self.section(f"{model.name}: all layers, {variant}", lambda: self.steps(model, weights, variant))

    def check(self, model: Model, weights: Dict[str, Weight]) -> None:
        """Compares one layer of each variant with float arithmetic."""
        wrong = []
        for variant in VARIANTS:
            torch.manual_seed(7)
            state = State(self.bench, model, 1, self.batches[min(1, len(self.batches) - 1)], self.context)
            layers = Layers(self.bench, model, weights, variant, 1)
            x = step(layers, state)
            found = x.float() + state.residual.float()
            state.residual.zero_()
            row = {"model": model.name, "variant": variant, "tolerance": TOLERANCE[variant]}
            for what, int4 in (("same_weights", variant == "int4"), ("float_weights", False)):
                expected = float_layer(weights, state, layers.norms[0], int4)
                # Relative to what the layer adds to its input.
                added = (expected - state.embedded.float()).norm()
                row[what] = ((found - expected).norm() / added).item()
            print(f"  {variant}: relative error {row['same_weights']:.4f}, with unquantized weights {row['float_weights']:.4f}")
            self.results["checks"].append(row)
            if not row["same_weights"] < TOLERANCE[variant]:
                wrong.append(f"{variant} {row['same_weights']:.4f}")
        if wrong:
            raise ValueError(f"wrong results, relative errors: {', '.join(wrong)}")

    def decode(self, model: Model, layers: Dict[str, Layers], batch: int) -> None:
        """Times steps through a few layers, and the parts of one."""
        bench = self.bench
        count = len(layers["bf16"].weights)
        if bench.cuda:
            # At most what is free, without the memory of the graphs.
            free = torch.cuda.mem_get_info()[0] - 3 * 2**30
            count = min(count, int(free // model.kv_bytes(batch * self.context)))
        state = State(bench, model, count, batch, self.context)
        replays: Dict[str, Callable[[], None]] = {}
        for variant in VARIANTS:
            few = layers[variant].first(count)
            inputs = {}
            for name, (_, k) in model.linears().items():
                inputs[name] = few.quantized(torch.empty(batch, k, dtype=BF16, device=bench.device).normal_())
            bench.synchronize()
            replays[variant] = bench.capture(functools.partial(step, few, state))
            replays[f"{variant} gemms"] = bench.capture(functools.partial(few.products, inputs))
        q = torch.empty(batch, model.heads, model.head_size, dtype=BF16, device=bench.device).normal_()
        bench.synchronize()
        replays["attention"] = bench.capture(lambda: [state.attention(layer, q) for layer in range(count)][-1])
        times = bench.medians_us(replays, self.options.rounds)
        row = {"model": model.name, "batch": batch, "layers": count}
        row.update({name.replace(" ", "_"): us / count for name, us in times.items()})
        self.results["decode"].append(row)
        print("  " + ", ".join(f"{name} {us / count:.1f}" for name, us in times.items()) + " us a layer", flush=True)

    def prefill_step(self, model: Model, layers: Dict[str, Layers]) -> None:
        count = min(4, len(layers["bf16"].weights))
        state = State(self.bench, model, count, 1, self.prefill, prefill=True)
        replays: Dict[str, Callable[[], None]] = {}
        for variant in VARIANTS:
            replays[variant] = self.bench.capture(functools.partial(step, layers[variant].first(count), state))
        times = self.bench.medians_us(replays, self.options.rounds)
        row: Dict[str, Any] = {"model": model.name, "tokens": self.prefill, "layers": count}
        row.update({name: us / count for name, us in times.items()})
        self.results["prefill"].append(row)
        print("  " + ", ".join(f"{name} {us / count:.1f}" for name, us in times.items()) + " us a layer", flush=True)

    def steps(self, model: Model, weights: Dict[str, Weight], variant: str) -> None:
        """Times whole steps, with all layers and the head, at all batches that fit and at the largest."""
        bench = self.bench
        largest = model.largest_batch(variant, self.usable)
        base = {"model": model.name, "variant": variant, "layer_bytes": model.layer_bytes(variant), "largest": largest}
        if largest == 0:
            need = model.layers * model.layer_bytes(variant) + model.kept_bytes()
            self.results["steps"].append({**base, "batch": 0, "note": f"the weights take {need / 1e9:.1f} GB"})
            print(f"  does not fit: {need / 1e9:.1f} GB", flush=True)
            return
        if self.options.tiny:
            largest = max(self.batches)
        on_device = {}
        for name, weight in weights.items():
            on_device[name] = copy.copy(weight)
            on_device[name].tensors = {variant: tuple(t.to(bench.device) for t in weight.tensors[variant])}
        layers = Layers(bench, model, on_device, variant, model.layers)
        # The embedding is read by a gather of a few rows, so it only takes memory.
        embedding, matrix = (
            torch.empty(model.vocabulary, model.hidden, dtype=BF16, device=bench.device).normal_(0, 0.02) for _ in range(2)
        )
        head = (layers.norms[0][0], matrix)
        for batch in sorted({*(b for b in self.batches if b <= largest), largest}):
            row: Dict[str, Any] = {**base, "batch": batch}
            computed = batch
            while True:
                try:
                    state = State(bench, model, model.layers, batch, self.context)
                    replay = bench.capture(lambda: step(layers, state, head))
                    break
                except torch.cuda.OutOfMemoryError:
                    if batch in self.batches or batch < computed * 0.9:
                        raise
                    state = replay = None  # noqa: F841: their memory is needed
                    bench.free()
                    batch -= max(1, computed // 50)
                    row["batch"] = batch
                    print(f"  batch {computed} does not fit; trying {batch}", flush=True)
            row["allocated_bytes"] = torch.cuda.memory_reserved() if bench.cuda else 0
            row["step_us"] = bench.medians_us({"step": replay}, max(5, self.options.rounds // 3))["step"]
            row["tokens_per_s"] = batch / row["step_us"] * 1e6
            row["is_largest"] = computed == largest
            self.results["steps"].append(row)
            print(f"  batch {batch}: {row['step_us'] / 1e3:.2f} ms, {row['tokens_per_s']:.0f} tokens/s", flush=True)
            state = replay = None
            bench.free()
        del embedding


def compile_only(options: argparse.Namespace) -> int:
    """Calls every compiled function with inputs of some shapes, which fills the compiler's cache."""
    bench = Bench(options.device, True)
    for name, rows, prefill in json.loads(options.compile_only):
        model = next(model for model in MODELS if model.name == name)
        # The cache's strides depend on the context, not on the batch.
        state = State(bench, model, 1, 1 if prefill else rows, PREFILL if prefill else CONTEXT, prefill)

        def half(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=BF16, device=bench.device).normal_()

        c, hidden, norm = bench.compiled, state.embedded, half(model.hidden)
        qkv = half(rows, model.linears()["qkv"][0])
        c.rope(qkv, state.cos, state.sin, *state.slots[0], model.heads)
        c.add_norm(hidden, state.residual, norm)
        c.add_norm_fp8(hidden, state.residual, norm)
        c.to_fp8(half(rows, model.heads * model.head_size))
        gate_up = half(rows, 2 * model.inner)
        c.silu_mul(gate_up)
        c.silu_mul_fp8(gate_up)
        # The inputs of the products alone.
        for _, k in model.linears().values():
            if not prefill and rows in BATCHES:
                c.to_fp8(half(rows, k))
        bench.synchronize()
    return 0


# --- The page ---


def _ratio(value: float, least: Optional[float]) -> str:
    if least is None:
        return f"{value:.2f}"
    return f"{value:.2f} (≥ {least:g}: {'reached' if value >= least else 'missed'})"


def _table(columns: List[str], rows: List[List[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(results: Dict[str, Any]) -> str:
    """Returns the Markdown page of results."""
    driver = f", driver {results['driver']}" if "driver" in results else ""
    parts = [
        "# Whole decode steps against bf16 and fp8\n",
        f"One {results['device']}{driver}, {results['date']}, kernels `{results['kernels'][:8]}…`, torch {results['torch']}, CUDA graphs, random weights, context {results['context']:,}, bf16 KV cache. "
        "`python/benchmarks/system.py` measures this and writes this page (`--from` makes it from the JSON file again).\n\n"
        "- **bf16**: cuBLAS; norm and SiLU · mul by torch.compile.\n"
        "- **fp8**: `torch._scaled_mm`, e4m3 with a scale a row and a scale a channel; torch.compile fuses the quantization with norm and SiLU · mul.\n"
        "- **int4**: this library, groups of 64; its kernels quantize after RMSNorm with the residual, and after SiLU · mul.\n\n"
        "Q, K and V are one product, and so are gate and up. Attention (torch SDPA, grouped-query), rotary embedding, cache and bf16 head are the same in all. "
        "The three take turns in the same run, a graph replay each; medians. Targets are in brackets.\n",
        "## Decode, microseconds a layer\n",
        "The four products alone are in brackets.\n",
    ]
    rows = []
    for r in results["decode"]:
        least = TARGETS.get((r["model"], r["batch"]), (None, None))
        rows.append(
            [r["model"], str(r["batch"])]
            + [f"{r[v]:.1f} ({r[v + '_gemms']:.1f})" for v in VARIANTS]
            + [f"{r['attention']:.1f}", _ratio(r["bf16"] / r["int4"], least[0]), _ratio(r["fp8"] / r["int4"], least[1])]
        )
    parts.append(_table(["model", "batch", *VARIANTS, "attention", "bf16 / int4", "fp8 / int4"], rows))
    parts += [f"## Prefill of {results['prefill_tokens']:,} tokens, microseconds a layer\n"]
    rows = [
        [r["model"], *(f"{r[v]:.0f}" for v in VARIANTS), _ratio(r["bf16"] / r["int4"], PREFILL_TARGET), f"{r['fp8'] / r['int4']:.2f}"]
        for r in results["prefill"]
    ]
    parts.append(_table(["model", *VARIANTS, "bf16 / int4", "fp8 / int4"], rows))
    steps = {(r["model"], r["batch"], r["variant"]): r for r in results["steps"] if "step_us" in r and not r["is_largest"]}
    largest = {(r["model"], r["variant"]): r for r in results["steps"] if r.get("is_largest")}
    for r in largest.values():
        # The largest batch may be one of the table's.
        steps.setdefault((r["model"], r["batch"], r["variant"]), r)
    models = list(dict.fromkeys(r["model"] for r in results["steps"]))
    batches = sorted({r["batch"] for r in results["decode"]})
    parts += ["## Whole steps: all layers and the head, milliseconds\n", "A dash: it does not fit the GPU.\n"]
    rows = []
    for model in models:
        for batch in batches:
            found = [steps.get((model, batch, v)) for v in VARIANTS]
            if any(found):
                times = [f"{r['step_us'] / 1e3:.2f}" if r else "–" for r in found]
                ratios = [f"{r['step_us'] / found[2]['step_us']:.2f}" if r and found[2] else "–" for r in found[:2]]
                rows.append([model, str(batch), *times, *ratios])
    parts.append(_table(["model", "batch", *VARIANTS, "bf16 / int4", "fp8 / int4"], rows))
    parts += [
        "## The largest batch\n",
        f"Sequences of {results['context']:,} tokens, from weights, embedding, head, cache and activations in {results['usable_bytes'] / 2**30:.1f} GiB; "
        "all of it was allocated, and the step was timed.\n",
    ]
    rows = []
    for model in models:
        for v in VARIANTS:
            r = largest.get((model, v))
            if r:
                weight = f"{r['layer_bytes'] / 1e6:.0f} MB"
                rows.append([model, v, weight, str(r["batch"]), f"{r['step_us'] / 1e3:.2f}", f"{r['tokens_per_s']:,.0f}"])
        for r in results["steps"]:
            if r["model"] == model and "note" in r:
                rows.append([model, r["variant"], f"{r['layer_bytes'] / 1e6:.0f} MB", f"does not fit: {r['note']}", "–", "–"])
    parts.append(_table(["model", "variant", "weights a layer", "largest batch", "step (ms)", "tokens/s"], rows))
    parts += [
        "## Check before the measurements\n",
        "The relative error of what one layer adds to its input, in a decode step, against float32 arithmetic with the variant's own weights (int4: those that the codes represent) "
        "and with the weights before quantization. The weights are normally distributed, which 4 bits represent worse than a trained model's.\n",
    ]
    rows = [[r["model"], r["variant"], f"{r['same_weights']:.4f} (< {r['tolerance']:g})", f"{r['float_weights']:.4f}"] for r in results["checks"]]
    parts.append(_table(["model", "variant", "own weights", "float weights"], rows))
    if results["failures"]:
        parts.append("## Not measured\n")
        parts.append("".join(f"- {f['section']}: {f['error']}\n" for f in results["failures"]))
    return "\n".join(parts)


def main() -> int:
    """Measures, or writes the page of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="system.json", metavar="FILE", help="results to write (default: %(default)s)")
    parser.add_argument("--markdown", metavar="FILE", help="page to write")
    parser.add_argument("--from", dest="source", metavar="FILE", help="write the page of these results; measure nothing")
    parser.add_argument("--models", nargs="+", default=[m.name for m in MODELS], choices=[m.name for m in MODELS])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=15, help="timed replays of each graph (default: %(default)s)")
    parser.add_argument("--budget-s", type=float, default=225, help="start no section after this time (default: %(default)s)")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program itself")
    parser.add_argument("--eager", action="store_true", help="compile nothing, to try the program itself")
    parser.add_argument("--compile-only", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.source:
        results, status = json.loads(Path(options.source).read_text("utf-8")), 0
    else:
        if options.device.startswith("cuda"):
            if not torch.cuda.is_available():
                parser.error(f"torch {torch.__version__} finds no usable CUDA device; use --device cpu --tiny to try the program")
            torch.cuda.set_device(options.device)
            # The compiling processes and this one must find the same cache.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "liquidgemm-system"))
            torch._dynamo.config.recompile_limit = 1000
            torch._dynamo.config.accumulated_recompile_limit = 10000
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        with torch.inference_mode():
            if options.compile_only:
                return compile_only(options)
            import liquidgemm.torch  # noqa: F401: registers the ops

            run = Run(options)
            status = run.all()
            results = run.results
    if options.markdown:
        target = Path(options.markdown)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(results), "utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
