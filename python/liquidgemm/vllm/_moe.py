"""Mixtures of experts of vLLM with packed weights, as one `LiquidMoE` a layer."""

from typing import Any, Callable, Dict, Hashable, Optional

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from .._errors import InvalidArgumentError
from .._numpy import Group, PackedWeights
from ..torch import LiquidMoE
from ._linear import check_platform, placeholders
from ._shards import Arrivals, channel_range, cut_inputs

#: The activations that the kernels apply, by vLLM's names.
_ACTIVATIONS = {"silu": "silu_mul", "gelu_tanh": "gelu_tanh_mul"}


class LiquidGemmMoEMethod(FusedMoEMethodBase):
    """Gathers the packed matrices of a layer's experts, and runs them."""

    def __init__(self, moe: Any, group: Group, name: str) -> None:
        super().__init__(moe)
        self.group, self.name = group, name

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers parameters that take whole tensors of the checkpoint, whatever the rank."""
        name, moe = self.name, self.moe
        check_platform(name)
        self._check(layer)
        inner, ranks = intermediate_size_per_partition, moe.tp_size

        def inputs(key: Any) -> int:
            return inner * ranks if key[1] == "w2" else hidden_size

        def cut(key: Any, weights: PackedWeights) -> Dict[Any, PackedWeights]:
            expert, matrix = key
            what = f"{name}, expert {expert}, {matrix}"
            if matrix == "w2":
                return {key: cut_inputs(what, weights, inner, moe.tp_rank)}
            begin, end = channel_range(what, weights.n, inner, moe.tp_rank, ranks)
            return {key: weights if ranks == 1 else weights.channel_shard(begin, end)}

        layer.liquidgemm_arrivals = Arrivals(name, inputs, self.group, cut)
        layer.liquidgemm_experts = num_experts
        layer.liquidgemm = None

        def loader(part: str) -> Callable[..., Optional[bool]]:
            def load(
                param: nn.Parameter,
                loaded_weight: Tensor,
                weight_name: str,
                shard_id: Hashable,
                expert_id: int,
                return_success: bool = False,
            ) -> Optional[bool]:
                if part in ("smoothing", "input_permutation"):
                    raise InvalidArgumentError(
                        f"{name}: its experts have the tensor {part}, which the grouped kernels do not take; "
                        "quantize the model without smoothing and activation order, or with `--exclude` for the experts"
                    )
                layer.liquidgemm_arrivals.add((expert_id, shard_id), part, loaded_weight)
                return True if return_success else None

            return load

        for prefix in ("w13_", "w2_"):
            placeholders(layer, prefix, loader)

    def _check(self, layer: nn.Module) -> None:
        """Fails for mixtures that `LiquidMoE` does not compute."""
        moe = self.moe
        wrong = {
            f"the activation {layer.activation.value}": layer.activation.value not in _ACTIVATIONS,
            "biases": moe.has_bias,
            "expert parallelism (start vLLM without it; tensor parallelism cuts each expert)": moe.use_ep,
            "router weights on the input": layer.apply_router_weight_on_input,
            "a limit of the activation": any(
                getattr(layer, limit, None) is not None for limit in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
            ),
            "padded intermediate sizes": moe.tp_shard_with_padding,
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise InvalidArgumentError(
                    f"{self.name} has {what}, which the plugin does not support; "
                    "quantize the model with `--exclude` for its experts to keep them as they are"
                )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Stacks the rank's matrices and moves them to its device."""
        if layer.liquidgemm is not None:
            raise InvalidArgumentError(f"{self.name}: its weights are packed already; start the engine again")
        experts = range(layer.liquidgemm_experts)
        places = [(expert, matrix) for expert in experts for matrix in ("w1", "w3", "w2")]
        weights = [matrix.weights for matrix in layer.liquidgemm_arrivals.take(places)]
        gate_up = [PackedWeights.join_channels(pair) for pair in zip(weights[0::3], weights[1::3])]
        activation = _ACTIVATIONS[layer.activation.value]
        layer.liquidgemm = LiquidMoE(gate_up, weights[2::3], activation, layer.w13_weight_codes.device)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: vLLM's own kernels do not run the experts."""
        return None

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Optional[Tensor],
    ) -> Tensor:
        """Returns the weighted sums of the experts' outputs, `[tokens, hidden]`. vLLM runs shared experts itself."""
        return layer.liquidgemm(x.contiguous(), topk_ids, topk_weights)
