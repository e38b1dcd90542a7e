"""Linear layers of vLLM with packed weights: column parallel, row parallel, stacked and replicated."""

from typing import Any, Callable, Dict, Hashable, List, Optional

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.platforms import current_platform

from .._checkpoint import DTYPES
from .._errors import InvalidArgumentError, NoGpuError
from .._numpy import Group, PackedWeights
from ._shards import Arrivals, channel_range, cut_inputs, cut_vectors, forward, stack

#: The places of the matrices that models name by letters.
_LETTERS = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}


def check_platform(name: str) -> None:
    """Fails on a GPU that the kernels do not run on."""
    if current_platform.is_cuda() and not current_platform.is_device_capability(90):
        raise NoGpuError(
            f"{name}: the kernels run on GPUs of compute capability 9.0 (H100, H200, GH200); this one has "
            f"{current_platform.get_device_capability()}"
        )


def placeholders(layer: nn.Module, prefix: str, loader: Callable[[str], Callable[..., Any]]) -> None:
    """Registers an empty parameter for each tensor of a packed module. Its loader takes what arrives for it."""
    for part, dtype in DTYPES.items():
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = loader(part)
        layer.register_parameter(prefix + part, parameter)


class LiquidGemmLinearMethod(LinearMethodBase):
    """Gathers the packed matrices of a layer, and multiplies by them."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: List[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers parameters that take whole tensors of the checkpoint, whatever the rank."""
        name = layer.prefix
        check_platform(name)
        if params_dtype not in (torch.bfloat16, torch.float16):
            raise InvalidArgumentError(f"{name}: it has the type {params_dtype}; use dtype bfloat16 or float16")

        def cut(key: Hashable, weights: PackedWeights) -> Dict[Any, PackedWeights]:
            places = _places(key, len(output_partition_sizes))
            spans = [weights.n] if len(places) == 1 else _stored_sizes(name, layer, places, weights.n)
            shards, first = {}, 0
            for place, n in zip(places, spans):
                begin, end = channel_range(name, n, output_partition_sizes[place], layer.tp_rank, layer.tp_size)
                shard = weights
                if (first + begin, first + end) != (0, weights.n):
                    shard = weights.channel_shard(first + begin, first + end)
                shards[place] = cut_inputs(name, shard, input_size_per_partition, layer.tp_rank)
                first += n
            return shards

        layer.liquidgemm_inputs = input_size_per_partition
        layer.liquidgemm_places = range(len(output_partition_sizes))
        layer.liquidgemm_arrivals = Arrivals(name, lambda _: input_size, self.group, cut)
        layer.liquidgemm = None

        def loader(part: str) -> Callable[..., None]:
            def load(param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Hashable = None) -> None:
                layer.liquidgemm_arrivals.add(loaded_shard_id, part, loaded_weight)

            return load

        placeholders(layer, "", loader)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Stacks the rank's matrices and moves them to its device."""
        if layer.liquidgemm is not None:
            raise InvalidArgumentError(
                f"{layer.prefix}: its weights are packed already; to load others, start the engine again"
            )
        matrices = layer.liquidgemm_arrivals.take(layer.liquidgemm_places)
        rank, size = layer.tp_rank, layer.liquidgemm_inputs
        matrices = [cut_vectors(layer.prefix, matrix, size, rank) for matrix in matrices]
        bias = getattr(layer, "bias", None)
        layer.liquidgemm = nn.ModuleList(stack(matrices, layer.weight_codes.device, bias))

    def apply(self, layer: nn.Module, x: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        """Returns the rank's outputs, or its part of their sums, of the input's type.

        vLLM passes the layer's own bias, or none.
        """
        return forward(layer.liquidgemm, x, bias is not None)


def _places(key: Hashable, count: int) -> List[int]:
    """Returns the places in a layer of `count` matrices of what was stored under a shard id."""
    if key is None:
        return list(range(count))
    if isinstance(key, tuple):
        return list(key)
    return [_LETTERS[key] if isinstance(key, str) else key]


def _stored_sizes(name: str, layer: nn.Module, places: List[int], n: int) -> List[int]:
    """Returns the output channels of matrices that a checkpoint stores as one."""
    if hasattr(layer, "total_num_kv_heads"):
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        sizes = [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
    else:
        sizes = list(getattr(layer, "output_sizes", []))
    if max(places) < len(sizes) and sum(sizes[place] for place in places) == n:
        return [sizes[place] for place in places]
    raise InvalidArgumentError(
        f"{name}: the folder has one matrix with {n} output channels for its {len(places)} matrices, but they have {sizes}; "
        "check that the folder is of this model"
    )
