"""The parts of the vLLM plugin that need neither vLLM nor torch: names, and what it expects of vLLM.

`test_vllm_shards.py` has the tests with torch, `test_vllm_layers.py` those in an installed vLLM.
With the variable `LIQUIDGEMM_VLLM_SOURCES`, a folder that has vLLM's `vllm/` (an unpacked wheel), the signatures of all
that the plugin uses or overrides are compared with the sources.
"""

import ast
import functools
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import liquidgemm as lg
import liquidgemm.vllm
from liquidgemm.vllm import _names


def test_importing_the_package_imports_neither_vllm_nor_torch():
    code = "import sys, liquidgemm, liquidgemm.vllm; sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_wheel_names_the_plugin():
    try:
        points = metadata.distribution("liquidgemm").entry_points
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, only on the path")
    (point,) = [point for point in points if point.group == "vllm.general_plugins"]
    assert point.load() is liquidgemm.vllm.register


def test_a_vllm_that_does_not_fit_gets_a_warning_and_goes_on():
    code = (
        "import sys, types, liquidgemm.vllm; sys.modules['vllm'] = types.ModuleType('vllm'); liquidgemm.vllm.register()"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0 and "does not fit this version of vLLM" in result.stderr


STACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def test_layers_are_packed_if_all_of_their_modules_are():
    modules = _names.PackedModules([f"model.0.{part}_proj" for part in "qkvo"] + ["model.1.qkv_proj", "m.experts.0.up"])
    assert modules.has_layer("model.0.qkv_proj", STACKED) and modules.has_layer("model.0.o_proj", STACKED)
    assert modules.has_layer("model.1.qkv_proj", STACKED) and not modules.has_layer("model.2.qkv_proj", STACKED)
    assert modules.has_modules_in("m.experts") and not modules.has_modules_in("m.expert")
    modules.rename(lambda names: ["language_" + name for name in names])
    assert modules.has_layer("language_model.0.qkv_proj", STACKED) and not modules.has_layer("model.0.o_proj", STACKED)
    with pytest.raises(lg.InvalidArgumentError, match="h.qkv_proj: h.q_proj is quantized, but h.k_proj is not.*--exclude"):
        _names.PackedModules(["h.q_proj"]).has_layer("h.qkv_proj", STACKED)


# --- Signatures in vLLM's sources ---

LAYERS = "model_executor/layers"
QUANTIZATION = f"{LAYERS}/quantization"
#: What the plugin calls or is called by: file, name, and the parameters in their order.
SIGNATURES = [
    (f"{QUANTIZATION}/__init__.py", "register_quantization_config", "quantization"),
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig.__init__", "self"),
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig.get_name", "self"),
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig.get_supported_act_dtypes", "self"),
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig.get_min_capability", "cls"),
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig.get_config_filenames", ""),
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig.from_config", "cls config"),
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig.get_quant_method", "self layer prefix"),
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig.apply_vllm_mapper", "self hf_to_vllm_mapper"),
    (f"{QUANTIZATION}/base_config.py", "QuantizeMethodBase.process_weights_after_loading", "self layer"),
    ("model_executor/models/utils.py", "WeightsMapper.apply_list", "self values"),
    (
        f"{LAYERS}/linear.py", "LinearMethodBase.create_weights",
        "self layer input_size_per_partition output_partition_sizes input_size output_size params_dtype "
        "**extra_weight_attrs",
    ),
    (f"{LAYERS}/linear.py", "LinearMethodBase.apply", "self layer x bias"),
    (f"{LAYERS}/linear.py", "UnquantizedLinearMethod.__init__", "self"),
    (
        f"{LAYERS}/fused_moe/fused_moe_method_base.py", "FusedMoEMethodBase.create_weights",
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype **extra_weight_attrs",
    ),
    (f"{LAYERS}/fused_moe/fused_moe_method_base.py", "FusedMoEMethodBase.__init__", "self moe"),
    (f"{LAYERS}/fused_moe/fused_moe_method_base.py", "FusedMoEMethodBase.get_fused_moe_quant_config", "self layer"),
    (
        f"{LAYERS}/fused_moe/fused_moe_method_base.py", "FusedMoEMethodBase.apply",
        "self layer x topk_weights topk_ids shared_experts shared_experts_input",
    ),
    (
        f"{LAYERS}/fused_moe/routed_experts.py", "RoutedExperts.weight_loader",
        "self param loaded_weight weight_name shard_id expert_id return_success",
    ),
    (
        "model_executor/kernels/linear/__init__.py", "register_linear_kernel", "kernel_class platform kernel_type",
    ),
    ("model_executor/kernels/linear/mixed_precision/MPLinearKernel.py", "MPLinearKernel.get_min_capability", "cls"),
    ("model_executor/kernels/linear/mixed_precision/MPLinearKernel.py", "MPLinearKernel.can_implement", "cls c"),
    (
        "model_executor/kernels/linear/mixed_precision/MPLinearKernel.py",
        "MPLinearKernel.process_weights_after_loading", "self layer",
    ),
    (
        "model_executor/kernels/linear/mixed_precision/MPLinearKernel.py", "MPLinearKernel.apply_weights",
        "self layer x bias",
    ),
    (
        "model_executor/kernels/linear/mixed_precision/MPLinearKernel.py", "MPLinearKernel._get_weight_params", "self layer",
    ),
    ("platforms/interface.py", "Platform.is_cuda", "self"),
    ("platforms/interface.py", "Platform.is_device_capability", "cls capability device_id"),
    ("platforms/interface.py", "Platform.get_device_capability", "cls device_id"),
]
#: Fields and attributes that the plugin reads: file, class, names.
FIELDS = [
    (f"{QUANTIZATION}/base_config.py", "QuantizationConfig", "packed_modules_mapping"),
    (f"{LAYERS}/linear.py", "LinearBase", "prefix tp_rank tp_size"),
    (f"{LAYERS}/linear.py", "MergedColumnParallelLinear", "output_sizes"),
    (f"{LAYERS}/linear.py", "QKVParallelLinear", "total_num_heads total_num_kv_heads head_size v_head_size"),
    (f"{LAYERS}/vocab_parallel_embedding.py", "VocabParallelEmbedding", ""),
    (
        f"{LAYERS}/fused_moe/routed_experts.py", "RoutedExperts",
        "moe_config activation apply_router_weight_on_input swiglu_limit swiglu_alpha swiglu_beta",
    ),
    (f"{LAYERS}/fused_moe/config.py", "FusedMoEConfig", "has_bias use_ep tp_size tp_rank tp_shard_with_padding"),
    (f"{LAYERS}/fused_moe/activation.py", "MoEActivation", "SILU GELU_TANH"),
    (
        "model_executor/kernels/linear/mixed_precision/MPLinearKernel.py", "MPLinearLayerConfig",
        "partition_weight_shape weight_type act_type group_size zero_points out_type",
    ),
    ("platforms/interface.py", "PlatformEnum", "CUDA"),
    ("scalar_type.py", "scalar_types", "int4"),
]


def sources():
    folder = os.environ.get("LIQUIDGEMM_VLLM_SOURCES")
    if not folder:
        pytest.skip("LIQUIDGEMM_VLLM_SOURCES names no folder with vLLM's sources")
    return Path(folder) / "vllm"


@functools.lru_cache(maxsize=None)
def tree(path):
    return ast.parse(path.read_text("utf-8"))


def definition(path, name):
    """Returns the syntax tree of a class or function. Of several definitions, as of overloads, the last is taken."""
    node = tree(sources() / path)
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = [child for child in node.body if isinstance(child, kinds) and child.name == part][-1]
    return node


def names_of(arguments):
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


@pytest.mark.parametrize("path, name, parameters", SIGNATURES, ids=[entry[1] for entry in SIGNATURES])
def test_signatures_are_those_of_the_sources(path, name, parameters):
    assert names_of(definition(path, name).args) == parameters.split()


@pytest.mark.parametrize("path, name, fields", FIELDS, ids=[entry[1] for entry in FIELDS])
def test_fields_are_those_of_the_sources(path, name, fields):
    found = set()
    for node in ast.walk(definition(path, name)):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            for leaf in ast.walk(target) if target is not None else ():
                if isinstance(leaf, (ast.Attribute, ast.Name)):
                    found.add(leaf.attr if isinstance(leaf, ast.Attribute) else leaf.id)
    assert set(fields.split()) <= found


PLUGIN = ["_config", "_linear", "_moe", "_kernel"]


@pytest.mark.parametrize("module", PLUGIN)
def test_the_plugin_overrides_with_the_signatures_of_the_sources(module):
    """The plugin's files are read, not imported: that needs vLLM."""
    overridden = {}
    for _, name, parameters in SIGNATURES:
        base, _, method = name.rpartition(".")
        if base:
            overridden.setdefault(base, {})[method] = parameters.split()
    folder = Path(liquidgemm.vllm.__file__).parent
    checked = 0
    for node in tree(folder / f"{module}.py").body:
        if not isinstance(node, ast.ClassDef):
            continue
        for base in (getattr(base, "id", "") for base in node.bases):
            for method in node.body:
                expected = {**overridden.get("QuantizeMethodBase", {}), **overridden.get(base, {})}
                known = isinstance(method, ast.FunctionDef) and method.name != "__init__" and method.name in expected
                if known:
                    assert names_of(method.args) == expected[method.name], method.name
                    checked += 1
    assert checked >= 3


def imported_names():
    folder = Path(liquidgemm.vllm.__file__).parent
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield node.module, alias.name


def test_every_name_that_the_plugin_imports_is_in_the_sources():
    names = sorted(set(imported_names()))
    assert len(names) > 10
    for module, name in names:
        base = sources().parent / module.replace(".", "/")
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        found = set()
        for node in ast.walk(tree(file)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found.update(alias.asname or alias.name for alias in node.names)
            elif isinstance(node, (ast.Name, ast.Constant)):
                # `vllm.platforms` makes its platform on the first use, by its name.
                found.add(node.id if isinstance(node, ast.Name) else node.value)
        assert name in found, f"{module}.{name}"
