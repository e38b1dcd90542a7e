"""Packed weights, quantized activations and products on numpy arrays, on the CPU.

bfloat16 arrays are those of the package `ml_dtypes`, which is not needed otherwise.
"""

import ctypes
import os
from typing import Any, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from . import _abi
from ._abi import Handle, checked, constants, structure
from ._errors import InvalidArgumentError

#: How many weights of a channel share a pair: a positive multiple of 64, or "channel" for all of them.
Group = Union[int, str]

_INPUT_TYPES = {
    "float32": constants["TYPE_F32"],
    "float16": constants["TYPE_F16"],
    "bfloat16": constants["TYPE_BF16"],
}
_OUTPUT_TYPES = {**_INPUT_TYPES, "int32": constants["TYPE_I32"]}
_OPERATIONS = {
    "plain": constants["OPERATION_PLAIN"],
    "rms_norm": constants["OPERATION_RMS_NORM"],
    "layer_norm": constants["OPERATION_LAYER_NORM"],
    "silu_mul": constants["OPERATION_SILU_MUL"],
    "gelu_tanh_mul": constants["OPERATION_GELU_TANH_MUL"],
}

_IMPORT_KINDS = {
    constants["IMPORT_EXACT"]: "exact",
    constants["IMPORT_SNAPPED"]: "snapped",
    constants["IMPORT_REQUANTIZED"]: "requantized",
}

_quantize_weights = checked("lg_weights_quantize")
_pack = checked("lg_weights_pack")
_from_int4 = checked("lg_weights_from_int4")
_from_parts = checked("lg_weights_from_parts")
_from_device_bytes = checked("lg_weights_from_device_bytes")
_load = checked("lg_weights_load")
_save = checked("lg_weights_save")
_join_channels = checked("lg_weights_join_channels")
_channel_shard = checked("lg_weights_channel_shard")
_input_shard = checked("lg_weights_input_shard")
_get_info = checked("lg_weights_get_info")
_unpack = checked("lg_weights_unpack")
_dequantize = checked("lg_weights_dequantize")
_device_bytes = checked("lg_weights_device_bytes")
_smooth = checked("lg_smooth_weights")
_quantize = checked("lg_cpu_quantize")
_gemm = checked("lg_cpu_gemm")
_experts = checked("lg_experts_new")
_grouped_gemm = checked("lg_cpu_grouped_gemm")
_combine = checked("lg_cpu_combine")


def group_code(group: Group) -> int:
    """Returns the number by which the C library knows a group."""
    if group == "channel":
        return constants["GROUP_CHANNEL"]
    if isinstance(group, bool) or not isinstance(group, (int, np.integer)) or group <= 0:
        raise InvalidArgumentError(f"a group is a positive multiple of 64, or \"channel\", not {group!r}")
    return int(group)


def _type_code(what: str, dtype: Any, types: dict) -> int:
    name = np.dtype(dtype).name
    if name not in types:
        raise InvalidArgumentError(f"{what} has the type {name}; use one of {', '.join(types)}")
    return types[name]


def _array(what: str, value: Any, dimensions: int, types: Optional[dict] = None, dtype: Any = None) -> np.ndarray:
    """Checks an array that the C library reads: its dimensions, its type, and that its elements lie in C order."""
    if not isinstance(value, np.ndarray):
        raise InvalidArgumentError(f"{what} is a {type(value).__name__}; use a numpy array")
    if value.ndim != dimensions:
        raise InvalidArgumentError(f"{what} has the shape {list(value.shape)}; it must have {dimensions} dimensions")
    if types is not None:
        _type_code(what, value.dtype, types)
    elif value.dtype != dtype:
        raise InvalidArgumentError(f"{what} has the type {value.dtype}; it must be {np.dtype(dtype)}")
    if not value.flags.c_contiguous:
        raise InvalidArgumentError(f"{what} is not contiguous; pass numpy.ascontiguousarray({what})")
    return value


def _vector(what: str, value: Optional[np.ndarray], shape: Tuple[int, ...], dtype: Any) -> Optional[int]:
    """Checks an optional parameter, and returns its address."""
    if value is None:
        return None
    _array(what, value, len(shape), dtype=dtype)
    if value.shape != shape:
        raise InvalidArgumentError(f"{what} has the shape {list(value.shape)}; it must be {list(shape)}")
    return value.ctypes.data


class PackedWeights:
    """4-bit weights `[n, k]` in the packed layout of the library, in host memory.

    Make them with `quantize`, `from_int4`, `pack`, `from_parts` or `load`. They never change.
    """

    __slots__ = ("_handle", "_info")

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._info = structure("lg_weights_info")
        _get_info(handle.address, ctypes.byref(self._info))

    @classmethod
    def _make(cls, create: Any, *arguments: Any) -> "PackedWeights":
        return cls(Handle(create, "lg_weights_free", *arguments))

    @classmethod
    def quantize(cls, weights: np.ndarray, group: Group = 64) -> "PackedWeights":
        """Quantizes float32, float16 or bfloat16 weights `[n, k]`.

        Each channel gets one f32 scale, each group of a channel a pair of bytes, each weight a code of 4 bits.
        All weights must be finite.
        """
        weights = _array("weights", weights, 2, _INPUT_TYPES)
        n, k = weights.shape
        code = _type_code("weights", weights.dtype, _INPUT_TYPES)
        return cls._make(_quantize_weights, weights.ctypes.data, code, n, k, group_code(group))

    @classmethod
    def pack(
        cls, codes: np.ndarray, pairs: np.ndarray, channel_scales: np.ndarray, group: Group = 64
    ) -> "PackedWeights":
        """Packs codes and pairs that another program chose. `from_int4` takes codes with scales of groups.

        `codes` is uint8 `[n, k]` with values 0 to 15, `pairs` is uint8 `[n, groups, 2]` with `(s, a)` of each group,
        `s ≥ 1` and `15·s + a ≤ 255`, and `channel_scales` is float32 `[n]`.
        A code q represents the weight `channel_scale · (q · s + a − 128)`.
        """
        codes = _array("codes", codes, 2, dtype=np.uint8)
        n, k = codes.shape
        size = group_code(group)
        groups = -(-k // size) if size else 1
        return cls._make(
            _pack,
            codes.ctypes.data,
            _vector("pairs", pairs, (n, groups, 2), np.uint8),
            _vector("channel_scales", channel_scales, (n,), np.float32),
            n,
            k,
            size,
        )

    @classmethod
    def from_int4(
        cls,
        codes: np.ndarray,
        scales: np.ndarray,
        zeros: Optional[np.ndarray] = None,
        group: Group = 64,
        source_group: Optional[Group] = None,
    ) -> "Int4Import":
        """Packs weights that another quantizer has quantized to four bits, such as GPTQ, AWQ or compressed-tensors.

        `codes` is uint8 `[n, k]` with values 0 to 15 (signed codes plus 8), `scales` is float32 `[n, groups]`, and `zeros`,
        8 if they are left out, float32 `[n, groups]`. A code q represents the weight `(q − zero) · scale` of its group.
        `group` is that of the result. The source has the same, unless `source_group` says another: "channel", or any number of
        weights from 1 on that share a scale. The last group of a channel may be shorter.

        The result is exact where the packed format has the weights: always with one scale a channel and integer zeros, and
        also where the scales of a channel are multiples of one number by integers from 1 to 17 that keep `15·s + a ≤ 255`.
        Otherwise the scales become the nearest that the format has, or the weights are quantized again, whichever has the
        smaller error. They are always quantized again if `group` neither is nor divides `source_group`, or if a scale is
        negative.
        """
        codes = _array("codes", codes, 2, dtype=np.uint8)
        n, k = codes.shape
        packed_size = group_code(group)
        size = packed_size if source_group is None else group_code(source_group)
        groups = -(-k // size) if size else 1
        kind, error = ctypes.c_uint32(), ctypes.c_double()
        weights = cls._make(
            _from_int4,
            codes.ctypes.data,
            _vector("scales", scales, (n, groups), np.float32),
            _vector("zeros", zeros, (n, groups), np.float32),
            n,
            k,
            size,
            packed_size,
            ctypes.byref(kind),
            ctypes.byref(error),
        )
        return Int4Import(weights, _IMPORT_KINDS[kind.value], error.value)

    @classmethod
    def from_parts(
        cls, codes: np.ndarray, pairs: np.ndarray, channel_scales: np.ndarray, k: int, group: Group = 64
    ) -> "PackedWeights":
        """Assembles weights from `packed_codes`, `packed_pairs` and `channel_scales`, as files have them."""
        codes, pairs = _array("codes", codes, 3, dtype=np.uint8), _array("pairs", pairs, 3, dtype=np.uint8)
        channel_scales = _array("channel_scales", channel_scales, 1, dtype=np.float32)
        (n,) = channel_scales.shape
        addresses = (codes.ctypes.data, codes.nbytes, pairs.ctypes.data, pairs.nbytes, channel_scales.ctypes.data)
        return cls._make(_from_parts, *addresses, n, k, group_code(group))

    @classmethod
    def from_device_bytes(cls, data: np.ndarray, n: int, k: int, group: Group = 64) -> "PackedWeights":
        """Takes weights back from what `device_bytes` returned."""
        data = _array("data", data, 1, dtype=np.uint8)
        return cls._make(_from_device_bytes, data.ctypes.data, data.nbytes, n, k, group_code(group))

    @classmethod
    def load(cls, path: "Union[str, os.PathLike[str]]") -> "PackedWeights":
        """Loads weights from a file that `save`, or `liquidgemm` from Rust, wrote."""
        return cls._make(_load, os.fsencode(path))

    @classmethod
    def join_channels(cls, parts: "Sequence[PackedWeights]") -> "PackedWeights":
        """Stacks the channels of several weights with the same k and group, such as Q, K and V."""
        addresses = (ctypes.c_void_p * len(parts))(*(part._handle.address for part in parts))
        return cls._make(_join_channels, ctypes.addressof(addresses), len(parts))

    def save(self, path: "Union[str, os.PathLike[str]]") -> None:
        """Saves the weights as a `.safetensors` file, which replaces an existing one once it is complete."""
        _save(self._handle.address, os.fsencode(path))

    def channel_shard(self, first: int, end: int) -> "PackedWeights":
        """Returns the output channels from `first` up to `end`: a shard for column parallelism."""
        return self._make(_channel_shard, self._handle.address, first, end)

    def input_shard(self, first: int, end: int) -> "PackedWeights":
        """Returns the input channels from `first` up to `end`, at group boundaries: a shard for row parallelism."""
        return self._make(_input_shard, self._handle.address, first, end)

    @property
    def n(self) -> int:
        """Output channels."""
        return self._info.n

    @property
    def k(self) -> int:
        """Elements per channel."""
        return self._info.k

    @property
    def shape(self) -> Tuple[int, int]:
        """`(n, k)`."""
        return self.n, self.k

    @property
    def group(self) -> Group:
        """How many weights of a channel share a pair."""
        return self._info.group or "channel"

    @property
    def nbytes(self) -> int:
        """Bytes of codes, pairs and channel scales."""
        return self._info.code_bytes + self._info.pair_bytes + 4 * self.n

    def _part(self, function: str, kind: Any, shape: Tuple[int, ...]) -> np.ndarray:
        address = _abi.function(function)(self._handle.address)
        view = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), shape)
        return view.copy()

    @property
    def packed_codes(self) -> np.ndarray:
        """A copy of the packed codes, uint8 `[strips, k_blocks, 2048]`."""
        return self._part("lg_weights_codes", ctypes.c_uint8, (self._info.strips, self._info.k_blocks, 2048))

    @property
    def packed_pairs(self) -> np.ndarray:
        """A copy of the packed pairs, uint8 `[strips, groups, 128]`."""
        return self._part("lg_weights_pairs", ctypes.c_uint8, (self._info.strips, self._info.groups, 128))

    @property
    def channel_scales(self) -> np.ndarray:
        """A copy of the channel scales, float32 `[n]`."""
        return self._part("lg_weights_channel_scales", ctypes.c_float, (self.n,))

    def unpack(self) -> Tuple[np.ndarray, np.ndarray]:
        """Returns the codes, uint8 `[n, k]`, and the pairs, uint8 `[n, groups, 2]`: the inverse of `pack`."""
        codes = np.empty((self.n, self.k), np.uint8)
        pairs = np.empty((self.n, self._info.groups, 2), np.uint8)
        _unpack(self._handle.address, codes.ctypes.data, pairs.ctypes.data)
        return codes, pairs

    def dequantize(self) -> np.ndarray:
        """Returns the weights that the codes represent, float32 `[n, k]`."""
        values = np.empty((self.n, self.k), np.float32)
        _dequantize(self._handle.address, values.ctypes.data)
        return values

    def device_bytes(self) -> np.ndarray:
        """Returns the weights as they lie in GPU memory, uint8. `liquidgemm.torch` takes such bytes as a tensor."""
        data = np.empty(self._info.device_bytes, np.uint8)
        _device_bytes(self._handle.address, data.ctypes.data, data.nbytes)
        return data

    def __repr__(self) -> str:
        return f"PackedWeights(n={self.n}, k={self.k}, group={self.group!r})"


class Int4Import(NamedTuple):
    """What `PackedWeights.from_int4` returns."""

    #: The packed weights.
    weights: PackedWeights
    #: "exact", or "snapped" if the codes are kept and the scales approximated, or "requantized".
    kind: str
    #: `‖packed − source‖ / ‖source‖` of the weights.
    error: float


class QuantizedActivations:
    """int8 activations `[m, k]` with one float32 scale per row. `codes · scales[:, None]` are the values."""

    __slots__ = ("codes", "scales")

    #: int8 `[m, k]`.
    codes: np.ndarray
    #: float32 `[m]`.
    scales: np.ndarray

    def __init__(self, codes: np.ndarray, scales: np.ndarray) -> None:
        self.codes = _array("codes", codes, 2, dtype=np.int8)
        _vector("scales", scales, (codes.shape[0],), np.float32)
        self.scales = scales

    def dequantize(self) -> np.ndarray:
        """Returns the values that the codes represent, float32 `[m, k]`."""
        return self.codes.astype(np.float32) * self.scales[:, None]

    def _structure(self) -> ctypes.Structure:
        m, k = self.codes.shape
        return structure("lg_quantized", m=m, k=k, codes=self.codes.ctypes.data, scales=self.scales.ctypes.data)

    def __repr__(self) -> str:
        return f"QuantizedActivations(m={self.codes.shape[0]}, k={self.codes.shape[1]})"


def quantize(
    x: np.ndarray,
    *,
    operation: str = "plain",
    norm_weight: Optional[np.ndarray] = None,
    norm_bias: Optional[np.ndarray] = None,
    epsilon: float = 1e-5,
    residual: Optional[np.ndarray] = None,
    smoothing: Optional[np.ndarray] = None,
    interleaved: bool = False,
) -> QuantizedActivations:
    """Quantizes activations `[m, k]` to int8 with one scale per row, after an operation.

    `operation` is "plain", "rms_norm", "layer_norm", "silu_mul" or "gelu_tanh_mul". The last two take `[m, 2k]`:
    k gates and then k ups in each row, or in turn if `interleaved`.
    Norms take `norm_weight` `[k]` and `residual` `[m, k]`, to which `x` is added in place before the norm.
    float32 activations take "plain" only; float16 and bfloat16 take all. `smoothing`, float32 `[k]`, divides values.
    """
    x = _array("x", x, 2, _INPUT_TYPES)
    if operation not in _OPERATIONS:
        raise InvalidArgumentError(f"operation is {operation!r}; use one of {', '.join(_OPERATIONS)}")
    m, k = x.shape
    if operation in ("silu_mul", "gelu_tanh_mul"):
        if k % 2:
            raise InvalidArgumentError(f"x has {k} columns; a gated operation needs gates and ups, an even number")
        k //= 2
    if operation in ("rms_norm", "layer_norm") and norm_weight is None:
        raise InvalidArgumentError(f"{operation} needs norm_weight, [k]")
    if residual is not None and not residual.flags.writeable:
        raise InvalidArgumentError("residual is read-only, but x is added to it in place")
    result = QuantizedActivations(np.empty((m, k), np.int8), np.empty(m, np.float32))
    source = structure(
        "lg_input",
        m=m,
        k=k,
        operation=_OPERATIONS[operation],
        input_type=_type_code("x", x.dtype, _INPUT_TYPES),
        input=x.ctypes.data,
        residual=_vector("residual", residual, (m, k), x.dtype),
        norm_weight=_vector("norm_weight", norm_weight, (k,), x.dtype),
        norm_bias=_vector("norm_bias", norm_bias, (k,), x.dtype),
        epsilon=epsilon,
        gate_order=constants["GATE_INTERLEAVED" if interleaved else "GATE_HALVES"],
        smoothing=_vector("smoothing", smoothing, (k,), np.float32),
    )
    _quantize(ctypes.byref(source), ctypes.byref(result._structure()))
    return result


def kernels_hash() -> str:
    """Returns the hash of the sources that the package's GPU kernels were built from. Figures are of such kernels."""
    return _abi.function("lg_kernels_hash")().decode()


def matmul(
    x: QuantizedActivations, weights: PackedWeights, bias: Optional[np.ndarray] = None, dtype: Any = np.float32
) -> np.ndarray:
    """Computes `x[m, k] · weights[n, k]ᵀ + bias[n]`, and returns `[m, n]` of `dtype`.

    `dtype` is float32, float16, bfloat16, or int32 for the exact sums without scales.
    """
    code = _type_code("the output", dtype, _OUTPUT_TYPES)
    output = np.empty((x.codes.shape[0], weights.n), dtype)
    target = structure("lg_output", output=output.ctypes.data, output_type=code)
    bias = _vector("bias", bias, (weights.n,), np.float32)
    _gemm(weights._handle.address, ctypes.byref(x._structure()), bias, ctypes.byref(target))
    return output


def grouped_matmul(
    x: QuantizedActivations,
    experts: Sequence[PackedWeights],
    offsets: np.ndarray,
    bias: Optional[np.ndarray] = None,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Multiplies the rows of each expert with its weights: rows `offsets[e]` up to `offsets[e + 1]` with expert e.

    `offsets` is int32 `[experts + 1]`, `bias` float32 `[experts, n]`. Rows of no expert are zero in the result.
    """
    addresses = (ctypes.c_void_p * len(experts))(*(expert._handle.address for expert in experts))
    handle = Handle(_experts, "lg_experts_free", ctypes.addressof(addresses), len(experts))
    n, count = experts[0].n, len(experts)
    output = np.zeros((x.codes.shape[0], n), dtype)
    target = structure(
        "lg_output", output=output.ctypes.data, output_type=_type_code("the output", dtype, _OUTPUT_TYPES)
    )
    grouped = structure(
        "lg_grouped",
        offsets=_vector("offsets", offsets, (count + 1,), np.int32),
        bias=_vector("bias", bias, (count, n), np.float32),
    )
    _grouped_gemm(handle.address, ctypes.byref(grouped), ctypes.byref(x._structure()), ctypes.byref(target))
    return output


def combine(rows: np.ndarray, positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns `Σⱼ weights[t, j] · rows[positions[t, j]]` for each token t, j ascending, `[tokens, n]`.

    `rows` is float16 or bfloat16, `positions` int32 and `weights` float32 `[tokens, top_k]`.
    Positions outside the rows, such as −1, are skipped.
    """
    types = {name: code for name, code in _INPUT_TYPES.items() if name != "float32"}
    rows = _array("rows", rows, 2, types)
    positions = _array("positions", positions, 2, dtype=np.int32)
    tokens, top_k = positions.shape
    output = np.empty((tokens, rows.shape[1]), rows.dtype)
    arguments = structure(
        "lg_combine",
        tokens=tokens,
        top_k=top_k,
        row_count=rows.shape[0],
        n=rows.shape[1],
        element_type=_type_code("rows", rows.dtype, types),
        rows=rows.ctypes.data,
        positions=positions.ctypes.data,
        weights=_vector("weights", weights, (tokens, top_k), np.float32),
        output=output.ctypes.data,
    )
    _combine(ctypes.byref(arguments))
    return output


def smooth_weights(weights: np.ndarray, smoothing: np.ndarray) -> np.ndarray:
    """Multiplies column j of float32 weights `[n, k]` by `smoothing[j]`: the offline half of smoothing."""
    weights = _array("weights", weights, 2, dtype=np.float32)
    n, k = weights.shape
    output = np.empty_like(weights)
    _smooth(weights.ctypes.data, n, k, _vector("smoothing", smoothing, (k,), np.float32), output.ctypes.data)
    return output
