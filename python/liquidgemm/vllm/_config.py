"""The quantization config: which method each layer of a packed checkpoint has."""

from typing import Any, Dict, List, Optional

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from .._checkpoint import METHOD, check_version, group_of
from .._errors import InvalidArgumentError
from .._numpy import Group
from ._linear import LiquidGemmLinearMethod
from ._moe import LiquidGemmMoEMethod
from ._names import PackedModules


class LiquidGemmConfig(QuantizationConfig):
    """`quantization_config` of a packed checkpoint's config.json."""

    def __init__(self, group: Group, packed: PackedModules) -> None:
        super().__init__()
        self.group, self.packed = group, packed

    def __repr__(self) -> str:
        return f"LiquidGemmConfig(group={self.group!r}, modules={len(self.packed.names)})"

    def get_name(self) -> str:
        """The name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> List[torch.dtype]:
        """The types of activations."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Hopper."""
        return 90

    @staticmethod
    def get_config_filenames() -> List[str]:
        """None: config.json has all."""
        return []

    @classmethod
    def from_config(cls, config: Dict[str, Any]) -> "LiquidGemmConfig":
        """Reads what `liquidgemm quantize` wrote."""
        check_version(config.get("format_version"))
        modules = config.get("quantized_modules")
        if not isinstance(modules, list):
            raise InvalidArgumentError(
                "config.json has no list quantized_modules; load a folder that `liquidgemm quantize` wrote"
            )
        return cls(group_of(config.get("group")), PackedModules(modules))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Gives the modules the names that the model has in vLLM."""
        self.packed.rename(hf_to_vllm_mapper.apply_list)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Optional[QuantizeMethodBase]:
        """Returns the method of a layer, or None if it is no linear layer, or an embedding or experts that are kept."""
        if isinstance(layer, LinearBase):
            if self.packed.has_layer(prefix, self.packed_modules_mapping):
                return LiquidGemmLinearMethod(self.group)
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts) and self.packed.has_modules_in(prefix):
            return LiquidGemmMoEMethod(layer.moe_config, self.group, prefix)
        if isinstance(layer, VocabParallelEmbedding) and self.packed.has_layer(prefix, {}):
            raise InvalidArgumentError(
                f"{prefix} is quantized, which the plugin can't load; quantize the model with `--exclude {prefix}`"
            )
        return None
