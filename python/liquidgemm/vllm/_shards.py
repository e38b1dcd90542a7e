"""Gathers the matrices of a layer as a checkpoint is read, cuts them for tensor parallelism, and stacks them.

Packed tensors can't be cut by slicing: 64 channels lie together. So a whole matrix is assembled, and the library cuts
it: between any two output channels, and between groups of input channels. Each matrix of a stacked layer is cut for itself.
Knows nothing of vLLM.
"""

from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._checkpoint import DTYPES, NEEDED, packed_weights
from .._errors import InvalidArgumentError
from .._numpy import Group, PackedWeights
from ..torch import LiquidLinear


class Matrix(NamedTuple):
    """A matrix of a layer, or a rank's part of it, and the vectors of its input channels."""

    weights: PackedWeights
    smoothing: Optional[Tensor]
    permutation: Optional[Tensor]


def channel_range(name: str, n: int, size: int, rank: int, ranks: int) -> Tuple[int, int]:
    """Returns the output channels of a matrix `[n, k]` of which `rank` has `size`.

    If there are fewer pieces than ranks, as with few heads of keys and values, neighbouring ranks have the same piece.
    """
    if size > 0 and n % size == 0 and ranks % (n // size) == 0:
        first = rank // (ranks // (n // size)) * size
        return first, first + size
    raise InvalidArgumentError(
        f"{name}: the folder has {n} output channels, which {ranks} ranks with {size} each do not fit; "
        "check that the folder is of this model, and try another tensor parallel size"
    )


def cut_inputs(name: str, weights: PackedWeights, size: int, rank: int) -> PackedWeights:
    """Returns the input channels of a rank, of which each has `size`."""
    if size == weights.k:
        return weights
    if weights.group != "channel" and size % weights.group and weights.k % size == 0:
        raise InvalidArgumentError(
            f"{name}: {weights.k // size} ranks have {size} input channels each, which is not a multiple of the group "
            f"{weights.group}; use a smaller tensor parallel size, or quantize the model with another `--group`"
        )
    try:
        return weights.input_shard(rank * size, (rank + 1) * size)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{name}: {error}") from error


#: Takes the key of a matrix and the whole matrix, and returns the rank's parts of it by their places in the layer.
Cut = Callable[[Hashable, PackedWeights], Dict[Any, PackedWeights]]


class Arrivals:
    """What has arrived of a layer. A matrix is cut as soon as its codes, pairs and scales are there."""

    def __init__(self, name: str, k_of: Callable[[Hashable], int], group: Group, cut: Cut) -> None:
        """Takes the layer's name, and the input channels of a matrix by its key."""
        self.name, self._k_of, self._group, self._cut = name, k_of, group, cut
        self._parts: Dict[Hashable, Dict[str, Tensor]] = {}
        self._vectors: Dict[Hashable, Dict[str, Tensor]] = {}
        self._cuts: Dict[Any, Tuple[Hashable, PackedWeights]] = {}

    def add(self, key: Hashable, part: str, tensor: Tensor) -> None:
        """Takes a tensor of the matrix `key`, and copies it: loaders reuse their memory."""
        if tensor.dtype is not DTYPES[part]:
            raise InvalidArgumentError(f"{self.name}: {part} has the type {tensor.dtype}; it must be {DTYPES[part]}")
        tensor = tensor.detach().to("cpu", copy=True)
        k = self._k_of(key)
        if part not in NEEDED:
            if tensor.shape != (k,):
                raise InvalidArgumentError(f"{self.name}: {part} is {list(tensor.shape)}; it must be [{k}]")
            self._vectors.setdefault(key, {})[part] = tensor
            return
        parts = self._parts.setdefault(key, {})
        parts[part] = tensor
        if len(parts) < len(NEEDED):
            return
        del self._parts[key]
        try:
            weights = packed_weights(parts, k, self._group)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{self.name}: {error}") from error
        for place, shard in self._cut(key, weights).items():
            self._cuts[place] = key, shard

    def take(self, places: Sequence[Any]) -> List[Matrix]:
        """Returns the matrices of these places, and forgets them. Fails if one has not arrived."""
        for place in places:
            if place not in self._cuts:
                raise InvalidArgumentError(
                    f"{self.name}: not all of {', '.join(NEEDED)} have arrived (matrix {place!r}); "
                    "the folder is incomplete (see `liquidgemm verify`), or vLLM did not read it (as with load_format=dummy)"
                )
        matrices = []
        for place in places:
            key, weights = self._cuts.pop(place)
            vectors = self._vectors.get(key, {})
            matrices.append(Matrix(weights, vectors.get("smoothing"), vectors.get("input_permutation")))
        self._vectors.clear()
        return matrices


def cut_vectors(name: str, matrix: Matrix, size: int, rank: int) -> Matrix:
    """Returns the matrix with the part of its vectors that belongs to a rank with `size` input channels."""
    smoothing, permutation = matrix.smoothing, matrix.permutation
    if permutation is not None and permutation.numel() != size:
        raise InvalidArgumentError(
            f"{name}: its input channels are permuted, so they can't be cut between ranks; use a tensor parallel size "
            "of 1, or quantize the model without activation order"
        )
    if smoothing is not None and smoothing.numel() != size:
        smoothing = smoothing[rank * size : (rank + 1) * size].clone()
    return Matrix(matrix.weights, smoothing, permutation)


def _same(first: Optional[Tensor], second: Optional[Tensor]) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def stack(matrices: Sequence[Matrix], device: Any, bias: Optional[Tensor] = None) -> List[LiquidLinear]:
    """Makes one layer of matrices with the same vectors of input channels, and otherwise one for each run of them."""
    runs: List[List[Matrix]] = []
    for matrix in matrices:
        if runs and all(_same(*pair) for pair in zip(runs[-1][0][1:], matrix[1:])):
            runs[-1].append(matrix)
        else:
            runs.append([matrix])
    layers, first = [], 0
    for run in runs:
        weights = [matrix.weights for matrix in run]
        joined = weights[0] if len(weights) == 1 else PackedWeights.join_channels(weights)
        part = None if bias is None else bias[first : first + joined.n]
        layer = LiquidLinear.from_packed(joined, part, run[0].smoothing, device)
        if run[0].permutation is not None:
            layer.input_permutation = run[0].permutation.to(layer.packed.device)
        layers.append(layer)
        first += joined.n
    return layers


def forward(layers: Sequence[LiquidLinear], x: Tensor, with_bias: bool) -> Tensor:
    """Returns the outputs of stacked layers, side by side, with or without their biases."""
    x = x.contiguous()
    outputs = []
    for layer in layers:
        rows = x if layer.input_permutation is None else x.index_select(-1, layer.input_permutation)
        bias = layer.bias if with_bias else None
        sizes = (layer.out_features, layer.in_features, layer.group)
        outputs.append(torch.ops.liquidgemm.linear(rows, layer.packed, bias, layer.smoothing, *sizes))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
