"""The plugin in the layers of an installed vLLM, on the CPU. Without vLLM there is nothing to test.

No engine runs: the layers of a decoder block are made for each rank, read a checkpoint, and multiply.
"""

from types import SimpleNamespace
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
linear = pytest.importorskip("vllm.model_executor.layers.linear")

from vllm.model_executor import parameter  # noqa: E402
from vllm.model_executor.layers import quantization  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel  # noqa: E402
from vllm.model_executor.models.utils import AutoWeightsLoader  # noqa: E402

import liquidgemm as lg  # noqa: E402
import liquidgemm.vllm  # noqa: E402
from liquidgemm.torch import LiquidLinear, LiquidMoE  # noqa: E402

HIDDEN, INNER, HEAD, HEADS, KV_HEADS = 256, 512, 64, 4, 2
SIZES = {
    "q_proj": (HEADS * HEAD, HIDDEN),
    "k_proj": (KV_HEADS * HEAD, HIDDEN),
    "v_proj": (KV_HEADS * HEAD, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


@pytest.fixture(autouse=True)
def half():
    torch.manual_seed(5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    yield
    torch.set_default_dtype(before)


def config(names, **others):
    liquidgemm.vllm.register()
    cls = quantization.get_quantization_config("liquidgemm")
    made = cls.from_config({"format_version": 1, "group": "64", "quantized_modules": names, **others})
    made.packed_modules_mapping.update(LlamaForCausalLM.packed_modules_mapping)
    return made


def on_rank(rank, ranks):
    return [
        mock.patch.object(module, f"get_tensor_model_parallel_{what}", lambda value=value: value)
        for module in (linear, parameter)
        for what, value in (("rank", rank), ("world_size", ranks))
    ]


class Block(torch.nn.Module):
    """The linear layers of a decoder block, on one rank."""

    def __init__(self, quant_config, bias, rank, ranks):
        super().__init__()
        patches = on_rank(rank, ranks)
        for patch in patches:
            patch.start()
        try:
            keywords = {"bias": bias, "quant_config": quant_config}
            self.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix="qkv_proj", **keywords)
            self.o_proj = linear.RowParallelLinear(HEADS * HEAD, HIDDEN, prefix="o_proj", **keywords)
            self.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [INNER] * 2, prefix="gate_up_proj", **keywords)
            self.down_proj = linear.RowParallelLinear(INNER, HIDDEN, prefix="down_proj", **keywords)
        finally:
            for patch in patches:
                patch.stop()


def floats(bias):
    """Returns layers with biases that float16, the type of the model, has."""
    layers = {name: torch.nn.Linear(k, n, bias, dtype=torch.float32) for name, (n, k) in SIZES.items()}
    for layer in layers.values() if bias else ():
        layer.bias.data = layer.bias.data.half().float()
    return layers


def checkpoint(layers):
    """Returns the tensors of layers, shuffled: nothing depends on their order."""
    tensors = [(f".{name}.{key}", value) for name, layer in layers.items() for key, value in layer.state_dict().items()]
    return [tensors[i] for i in torch.randperm(len(tensors))]


def load(layers, bias, rank, ranks):
    block = Block(config([*layers]), bias, rank, ranks)
    mapper = LlamaModel.hf_to_vllm_mapper
    renamed = ((name.removeprefix("."), value) for name, value in mapper.apply(checkpoint(layers)))
    AutoWeightsLoader(block).load_weights(renamed)
    for layer in block.children():
        layer.quant_method.process_weights_after_loading(layer)
    return block


def output(layer, x):
    return layer.quant_method.apply(layer, x, layer.bias)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [False, True])
def test_column_parallel_layers_have_the_bits_of_the_whole_matrices_for_any_number_of_ranks(ranks, bias, smoothing):
    vector = torch.linspace(0.5, 2, HIDDEN, dtype=torch.float32) if smoothing else None
    layers = {
        name: LiquidLinear.from_float(layer, smoothing=vector if SIZES[name][1] == HIDDEN else None)
        for name, layer in floats(bias).items()
    }
    x = torch.randn(5, HIDDEN)
    blocks = [load(layers, bias, rank, ranks) for rank in range(ranks)]
    found = [output(block.gate_up_proj, x).chunk(2, -1) for block in blocks]
    halves = [torch.cat(parts, -1) for parts in zip(*found)]
    assert torch.equal(halves[0], layers["gate_proj"](x)) and torch.equal(halves[1], layers["up_proj"](x))

    heads = [output(block.qkv_proj, x).view(5, -1, HEAD) for block in blocks]
    own, kv = HEADS // ranks, max(1, KV_HEADS // ranks)
    copies = max(1, ranks // KV_HEADS)
    for name, parts in {
        "q_proj": [head[:, :own] for head in heads],
        "k_proj": [head[:, own : own + kv] for head in heads[::copies]],
        "v_proj": [head[:, own + kv :] for head in heads[::copies]],
    }.items():
        assert torch.equal(torch.cat(parts, 1).flatten(1), layers[name](x)), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_row_parallel_layers_add_up_to_the_whole_matrix(ranks):
    smoothing = torch.linspace(0.5, 2, INNER, dtype=torch.float32)
    layers = {
        name: LiquidLinear.from_float(layer, smoothing=smoothing if name == "down_proj" else None)
        for name, layer in floats(False).items()
    }
    x = torch.randn(5, INNER)
    reference = layers["down_proj"](x)
    parts = x.chunk(ranks, -1)
    found = [output(load(layers, False, rank, ranks).down_proj, parts[rank]) for rank in range(ranks)]
    if ranks == 1:
        assert torch.equal(found[0], reference)
    total = sum(part.float() for part in found)
    # Each rank quantizes its own part of the rows.
    assert (total - reference.float()).norm() < 0.02 * reference.float().norm()


def test_matrices_that_are_stored_as_one_are_cut_each_for_itself():
    whole = {name: LiquidLinear.from_float(layer) for name, layer in floats(False).items()}
    joined = lg.PackedWeights.join_channels([whole[name].to_packed() for name in ("q_proj", "k_proj", "v_proj")])
    tensors = LiquidLinear.from_packed(joined).state_dict()
    x = torch.randn(3, HIDDEN)
    found = []
    for rank in range(2):
        block = Block(config(["qkv_proj"]), False, rank, 2)
        for name, tensor in tensors.items():
            parameter_ = getattr(block.qkv_proj, name)
            parameter_.weight_loader(parameter_, tensor)
        block.qkv_proj.quant_method.process_weights_after_loading(block.qkv_proj)
        found.append(output(block.qkv_proj, x))
    separate = [output(load(whole, False, rank, 2).qkv_proj, x) for rank in range(2)]
    assert all(torch.equal(*pair) for pair in zip(found, separate))


def test_layers_that_are_kept_are_unquantized_and_half_packed_ones_are_refused():
    block = Block(config(["o_proj"]), False, 0, 1)
    assert type(block.qkv_proj.quant_method) is linear.UnquantizedLinearMethod
    assert type(block.o_proj.quant_method).__name__ == "LiquidGemmLinearMethod"
    with pytest.raises(lg.InvalidArgumentError, match="qkv_proj: q_proj is quantized, but k_proj is not"):
        Block(config(["q_proj"]), False, 0, 1)


def test_missing_tensors_and_new_weights_are_refused():
    block = Block(config(list(SIZES)), False, 0, 1)
    with pytest.raises(lg.InvalidArgumentError, match="o_proj: not all of"):
        block.o_proj.quant_method.process_weights_after_loading(block.o_proj)
    loaded = load({name: LiquidLinear.from_float(layer) for name, layer in floats(False).items()}, False, 0, 1)
    with pytest.raises(lg.InvalidArgumentError, match="start the engine again"):
        loaded.o_proj.quant_method.process_weights_after_loading(loaded.o_proj)


def moe_layer(quant_config, rank, ranks, experts, **others):
    """Returns a layer of experts with what the plugin and the loading of weights read of it."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.layer_name = "mlp.experts"
    layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name = "gate_proj", "down_proj", "up_proj"
    layer.is_fused_checkpoint_transposed = False
    layer.lora_base_layer_prefix = ""
    layer.activation = MoEActivation.SILU
    layer.apply_router_weight_on_input = False
    layer.swiglu_limit = None
    layer.expert_map_manager = SimpleNamespace(num_fused_shared_experts=0)
    fields = {
        "has_bias": False, "use_ep": False, "tp_shard_with_padding": False, "tp_size": ranks, "tp_rank": rank,
        "num_experts": experts, "num_logical_experts": experts, "is_act_and_mul": True, **others,
    }
    layer.moe_config = SimpleNamespace(**fields)
    layer.quant_method = quant_config.get_quant_method(layer, layer.layer_name)
    layer.quant_method.create_weights(layer, experts, HIDDEN, INNER // ranks, torch.float16)
    return layer


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_are_those_of_the_mixture(ranks):
    experts, tokens = 3, 7
    layers = {
        f"mlp.experts.{expert}.{name}": LiquidLinear.from_float(layer)
        for expert in range(experts)
        for name, layer in floats(False).items()
        if name in ("gate_proj", "up_proj", "down_proj")
    }
    packed = {name: layer.to_packed() for name, layer in layers.items()}
    gate_up = [
        lg.PackedWeights.join_channels([packed[f"mlp.experts.{e}.{name}"] for name in ("gate_proj", "up_proj")])
        for e in range(experts)
    ]
    mixture = LiquidMoE(gate_up, [packed[f"mlp.experts.{e}.down_proj"] for e in range(experts)])
    x = torch.randn(tokens, HIDDEN)
    weights, ids = torch.softmax(torch.randn(tokens, experts), 1).topk(2)
    reference = mixture(x, ids, weights)
    total = torch.zeros(tokens, HIDDEN, dtype=torch.float32)
    for rank in range(ranks):
        layer = moe_layer(config(list(layers)), rank, ranks, experts)
        loaded = set(layer.load_weights((name.removeprefix(".mlp.experts."), t) for name, t in checkpoint(layers)))
        assert "w13_weight_codes" in loaded
        layer.quant_method.process_weights_after_loading(layer)
        found = layer.quant_method.apply(layer, x, weights, ids.to(torch.int32), None, None)
        total += found.float()
    if ranks == 1:
        assert torch.equal(found, reference)
    assert (total - reference.float()).norm() < 0.02 * reference.float().norm()


@pytest.mark.parametrize("field, text", [("has_bias", "biases"), ("use_ep", "expert parallelism")])
def test_mixtures_that_the_kernels_do_not_compute_are_refused(field, text):
    with pytest.raises(lg.InvalidArgumentError, match=f"mlp.experts has {text}"):
        moe_layer(config(["mlp.experts.0.up_proj"]), 0, 1, 1, **{field: True})


def test_the_kernel_takes_int4_layers_of_compressed_tensors_and_no_others():
    from vllm.model_executor.kernels import linear as kernels
    from vllm.platforms import PlatformEnum
    from vllm.scalar_type import scalar_types

    from liquidgemm.vllm import _kernel

    liquidgemm.vllm.register()
    liquidgemm.vllm.register()
    assert kernels._POSSIBLE_KERNELS[PlatformEnum.CUDA].count(_kernel.LiquidGemmLinearKernel) == 1

    def case(**others):
        fields = {
            "full_weight_shape": (HIDDEN, 128), "partition_weight_shape": (HIDDEN, 128), "weight_type": scalar_types.int4,
            "act_type": torch.float16, "group_size": 64, "zero_points": False, **others,
        }
        return kernels.MPLinearLayerConfig(**fields)

    hopper = SimpleNamespace(is_cuda=lambda: True, is_device_capability=lambda capability: capability == 90)
    with mock.patch.object(_kernel, "current_platform", hopper):
        can = _kernel.LiquidGemmLinearKernel.can_implement
        assert can(case())[0] and can(case(group_size=HIDDEN))[0] and can(case(group_size=-1))[0]
        for wrong in (
            {"group_size": 32}, {"weight_type": scalar_types.uint4b8}, {"act_type": torch.float8_e4m3fn},
            {"zero_points": True},
        ):
            possible, reason = can(case(**wrong))
            assert not possible and reason
        codes = torch.randint(-8, 8, (128, HIDDEN), dtype=torch.int8)
        for groups, group_size in ((1, HIDDEN), (2, 128)):
            scales = torch.rand(128, groups) * 0.01 + 0.005
            layer = torch.nn.Module()
            layer.register_parameter("weight_packed", torch.nn.Parameter(codes.clone(), requires_grad=False))
            layer.register_parameter("weight", layer.weight_packed)
            layer.register_parameter("weight_scale", torch.nn.Parameter(scales, requires_grad=False))
            layer.register_parameter("bias", torch.nn.Parameter(torch.randn(128)))
            kernel = _kernel.LiquidGemmLinearKernel(case(group_size=group_size), "weight_packed", "weight_scale")
            kernel.process_weights_after_loading(layer)
            assert layer.weight.numel() == 0
            x = torch.randn(4, HIDDEN)
            values = codes * scales.float().repeat_interleave(HIDDEN // groups, 1)
            reference = x.float() @ values.T + layer.bias.float()
            found = kernel.apply_weights(layer, x, layer.bias).float()
            assert (found - reference).norm() < (0.01 if groups == 1 else 0.05) * reference.norm()
        for wrong in (8, -9):
            codes[5, 3] = wrong
            layer.weight_packed.data, layer.weight_scale.data = codes.clone(), scales.clone()
            with pytest.raises(lg.InvalidArgumentError, match="a linear layer: the code of channel 5 at k = 3"):
                kernel.process_weights_after_loading(layer)
