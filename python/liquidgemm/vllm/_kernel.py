"""The linear kernel for compressed-tensors checkpoints with int4 weights and int8 activations, scaled for each token.

vLLM asks the kernels of a list in turn whether they can run a layer. It tells them the types of the weights and of the
model, but not that of the activations: signed int4 is what its scheme for W4A8 has, and no scheme with 16-bit activations.
"""

import logging
from typing import Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from .._errors import InvalidArgumentError
from .._numpy import Group, PackedWeights
from ._shards import Matrix, forward, stack


def register_kernel() -> None:
    """Adds the kernel to vLLM's list for CUDA, where vLLM has a function for that."""
    try:
        from vllm.model_executor.kernels.linear import register_linear_kernel
    except ImportError:
        logging.getLogger(__name__).warning(
            "this version of vLLM has no register_linear_kernel, so liquidgemm does not run compressed-tensors checkpoints; "
            "convert them with `liquidgemm quantize`"
        )
        return
    register_linear_kernel(LiquidGemmLinearKernel, PlatformEnum.CUDA, "mp")


def _group(config: MPLinearLayerConfig) -> Group:
    """Returns the group. vLLM gives a rank's input channels, all of them, for one scale a channel."""
    return "channel" if config.group_size in (-1, config.partition_weight_shape[0]) else config.group_size


class LiquidGemmLinearKernel(MPLinearKernel):
    """Packs the rank's weights after loading, and multiplies by them."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Hopper."""
        return 90

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> Tuple[bool, Optional[str]]:
        """Returns whether the kernels run a layer, or why not."""
        group = _group(c)
        if not current_platform.is_cuda() or not current_platform.is_device_capability(90):
            return False, "LiquidGEMM runs on CUDA devices of compute capability 9.0 (Hopper)"
        if c.weight_type != scalar_types.int4 or c.zero_points:
            return False, f"LiquidGEMM takes int4 weights without zero points, not {c.weight_type}"
        if c.act_type not in (torch.bfloat16, torch.float16) or c.out_type not in (None, c.act_type):
            return False, f"LiquidGEMM takes and returns bfloat16 or float16, not {c.act_type} and {c.out_type}"
        if group != "channel" and (group <= 0 or group % 64):
            return False, f"LiquidGEMM takes groups of multiples of 64, not {group}; `liquidgemm quantize` converts others"
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Packs the weights, and frees those that were loaded."""
        codes, scales, _ = self._get_weight_params(layer)
        device = codes.device
        # vLLM has signed codes. A code beyond four bits stays beyond them.
        unsigned = codes.data.cpu().contiguous().numpy().view(np.uint8) + np.uint8(8)
        host_scales = scales.data.float().cpu().contiguous().numpy()
        try:
            weights = PackedWeights.from_int4(unsigned, host_scales, group=_group(self.config)).weights
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{getattr(layer, 'prefix', 'a linear layer')}: {error}") from error
        layer.liquidgemm = nn.ModuleList(stack([Matrix(weights, None, None)], device, getattr(layer, "bias", None)))
        # The parameter has two names in the layer, so it stays, without contents.
        codes.data = codes.data.new_empty(0)
        scales.data = scales.data.new_empty(0)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """Returns the outputs, of the input's type. vLLM passes the layer's own bias, or none."""
        return forward(layer.liquidgemm, x, bias is not None)
