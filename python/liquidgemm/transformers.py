"""Loads packed checkpoints, folders that `liquidgemm quantize` wrote, with transformers.

>>> import liquidgemm.transformers  # registers the quantization method "liquidgemm"
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("folder", dtype="bfloat16")  # doctest: +SKIP

Each quantized linear layer becomes a `liquidgemm.torch.LiquidLinear`. `save_pretrained` writes a folder that
`from_pretrained` loads again. It has no checksums: `liquidgemm verify` checks its structure and ranges, and says so.
Written for transformers 5, and tested with 5.17.
"""

from typing import Any, Dict, List, Optional, Set, Tuple

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._checkpoint import DTYPES, FORMAT_VERSION, METHOD, NEEDED, check_version, group_of, packed_weights
from ._errors import InvalidArgumentError
from .torch import LiquidLinear

__all__ = ["LiquidGemmConfig", "LiquidGemmQuantizer"]


@register_quantization_config(METHOD)
class LiquidGemmConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint's config.json."""

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        group: str = "64",
        quantized_modules: Optional[List[str]] = None,
        modules_to_not_convert: Optional[List[str]] = None,
        **others: Any,
    ) -> None:
        """Takes the entries of the configuration. Those that loading does not need are kept for saving."""
        others.pop("quant_method", None)
        self.quant_method = METHOD
        self.format_version = format_version
        self.group = str(group)
        self.quantized_modules = quantized_modules
        self.modules_to_not_convert = modules_to_not_convert
        for name, value in others.items():
            setattr(self, name, value)


class _Loading(nn.Module):
    """The place of a layer while its tensors are loaded."""

    def __init__(self, shapes: Dict[str, Tuple[int, ...]], linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=DTYPES[name], device="meta"))
        self.bias = linear.bias

    def finished(self, name: str, group: Any) -> LiquidLinear:
        """Makes the layer of the loaded tensors."""
        if self.weight_codes.is_meta:
            raise InvalidArgumentError(f"{name} is not on a device; load without offloading to the disk")
        weights = packed_weights({part: getattr(self, part) for part in NEEDED}, self.in_features, group)
        if weights.n != self.out_features:
            raise InvalidArgumentError(f"{name} has {weights.n} output channels; the model has {self.out_features}")
        layer = LiquidLinear.from_packed(
            weights, self.bias, getattr(self, "smoothing", None), self.weight_codes.device
        )
        permutation = getattr(self, "input_permutation", None)
        if permutation is not None:
            layer.input_permutation = permutation.to(layer.packed.device)
        return layer


@register_quantizer(METHOD)
class LiquidGemmQuantizer(HfQuantizer):
    """Puts `LiquidLinear` in the place of the quantized layers."""

    requires_calibration = True
    quantization_config: LiquidGemmConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Fails for a folder of another version."""
        check_version(self.quantization_config.format_version)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The layers take bf16 and f16."""
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        shapes = _shapes(checkpoint_files or [])
        listed: Set[str] = set(self.quantization_config.quantized_modules or shapes)
        if listed != set(shapes):
            wrong = sorted(listed.symmetric_difference(shapes))[0]
            raise InvalidArgumentError(f"config.json and the shards do not agree whether {wrong!r} is quantized")
        for name, parts in shapes.items():
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise InvalidArgumentError(f"{name} is a {type(linear).__name__}; only nn.Linear can be quantized")
            _replace(model, name, _Loading(parts, linear))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        group = group_of(self.quantization_config.group)
        for name, module in list(model.named_modules()):
            if isinstance(module, _Loading):
                _replace(model, name, module.finished(name, group))
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The ops have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The ops have fake kernels."""
        return True


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _shapes(files: List[str]) -> Dict[str, Dict[str, Tuple[int, ...]]]:
    """Returns the shapes of the packed tensors of each module, which may lie in several shards."""
    found: Dict[str, Dict[str, Tuple[int, ...]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                module, _, part = key.rpartition(".")
                if part in DTYPES:
                    found.setdefault(module, {})[part] = tuple(tensors.get_slice(key).get_shape())
    for module, parts in found.items():
        missing = [part for part in NEEDED if part not in parts]
        if missing:
            raise InvalidArgumentError(f"{module} has no {missing[0]}")
    return found
