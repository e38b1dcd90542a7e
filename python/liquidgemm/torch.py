"""Linear layers and mixtures of experts for torch, on CUDA and on CPU tensors, with the same bits.

The ops are registered with `torch.library`, with fake kernels, so `torch.compile(fullgraph=True)` and CUDA graphs work.
On CUDA tensors torch calls the C library's kernels directly; wrong ones are a `RuntimeError`, wrong CPU tensors an
`InvalidArgumentError`.
Outputs are allocated by torch, launches go to the current stream, and weights lie in tensors.
The ops have no gradients: they are for inference.

| op | what it does |
|---|---|
| `torch.ops.liquidgemm.linear` | quantizes bf16 or f16 activations, and multiplies |
| `torch.ops.liquidgemm.fused_linear` | the same after RMSNorm, LayerNorm, SiLU · mul or GELU · mul |
| `torch.ops.liquidgemm.quantize`, `gemm` | the two halves, for activations that several layers share |
| `torch.ops.liquidgemm.grouped_linear` | the rows of many experts in one launch |
| `torch.ops.liquidgemm.combine` | the weighted sum of the experts' rows of each token |

A CUDA graph: call each layer once on the device before the capture (it compiles kernels and makes workspaces),
or `prepare` it. Graphs that were captured on the same stream share a workspace, so don't replay them at the same time.

Weights are read while the launch ahead on the stream still runs. Code that writes a `packed` tensor with a kernel
of its own synchronizes the stream before the next call; `load_state_dict`, `from_float` and `from_packed` do.
"""

import ctypes
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from . import _abi
from ._abi import Handle, PerThread, checked, constants
from ._checkpoint import NEEDED
from ._errors import InvalidArgumentError
from ._numpy import Group, PackedWeights, group_code

__all__ = ["LiquidLinear", "LiquidMoE", "prepare", "replace_linears"]

_TYPES = {
    torch.bfloat16: constants["TYPE_BF16"],
    torch.float16: constants["TYPE_F16"],
    torch.float32: constants["TYPE_F32"],
    torch.int32: constants["TYPE_I32"],
}
_HALVES = (torch.bfloat16, torch.float16)
_PLAIN = constants["OPERATION_PLAIN"]
_NORMS = (constants["OPERATION_RMS_NORM"], constants["OPERATION_LAYER_NORM"])
_GATED = (constants["OPERATION_SILU_MUL"], constants["OPERATION_GELU_TANH_MUL"])
#: The numbers of the operations, for `fused_linear` and `grouped_linear`.
OPERATIONS = {
    "plain": _PLAIN,
    "rms_norm": _NORMS[0],
    "layer_norm": _NORMS[1],
    "silu_mul": _GATED[0],
    "gelu_tanh_mul": _GATED[1],
}

_weights_device_size = checked("lg_weights_device_size")
_experts_device_size = checked("lg_experts_device_size")
_weights_from_device_bytes = checked("lg_weights_from_device_bytes")
_experts_new = checked("lg_experts_new")
_experts_device_bytes = checked("lg_experts_device_bytes")
_cpu_quantize = checked("lg_cpu_quantize")
_cpu_gemm = checked("lg_cpu_gemm")
_cpu_grouped_gemm = checked("lg_cpu_grouped_gemm")
_cpu_combine = checked("lg_cpu_combine")
_gpu_open = checked("lg_gpu_open")
_gpu_get_info = checked("lg_gpu_get_info")
_gpu_workspace_new = checked("lg_gpu_workspace_new")
_gpu_prepare = checked("lg_gpu_prepare")
_gpu_prepare_quantize = checked("lg_gpu_prepare_quantize")
_gpu_prepare_grouped = checked("lg_gpu_prepare_grouped")
_torch_attach = checked("lg_torch_attach")
_torch_add_stream = checked("lg_torch_add_stream")

#: Structures that each thread fills again and again. A call does not hold what they point to.
_filled = PerThread(
    input="lg_input", output="lg_output", quantized="lg_quantized", grouped="lg_grouped"
)


def _size(function: Callable[..., None], *arguments: int) -> int:
    size = ctypes.c_size_t()
    function(*arguments, ctypes.byref(size))
    return size.value


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Device:
    """A GPU, and the workspaces of its streams."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.gpu = Handle(_gpu_open, "lg_gpu_free", index)
        self._handles: List[Handle] = []
        #: The address of each stream's workspace.
        self.workspaces: Dict[int, int] = {}
        # A workspace can't be made while a stream is captured, so one is kept for a stream that is captured first.
        self._spare: Optional[Handle] = None
        self._lock = threading.Lock()

    def _new(self) -> Handle:
        return Handle(_gpu_workspace_new, "lg_gpu_workspace_free", self.gpu.address, None, 0)

    def workspace(self, stream: int) -> int:
        """Returns the workspace of a stream."""
        return self.workspaces.get(stream) or self._make(stream)

    def _make(self, stream: int) -> int:
        with self._lock:
            if stream not in self.workspaces:
                if not torch.cuda.is_current_stream_capturing():
                    made = self._new()
                    self._spare = self._spare or self._new()
                elif self._spare is not None:
                    made, self._spare = self._spare, None
                else:
                    raise RuntimeError(
                        "this stream is captured and has no workspace yet; "
                        "call the layer once, or liquidgemm.torch.prepare, before the capture"
                    )
                _torch_add_stream(self.index, stream, self.gpu.address, made.address)
                self._handles.append(made)
                self.workspaces[stream] = made.address
            return self.workspaces[stream]


_devices: Dict[int, _Device] = {}
_devices_lock = threading.Lock()
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)


def _device(index: int) -> _Device:
    found = _devices.get(index)
    if found is None:
        with _devices_lock:
            if index not in _devices:
                _devices[index] = _Device(index)
            found = _devices[index]
    return found


# --- Kernels that torch calls without Python ---


def _first_call(index: int, stream: Optional[int], message: int, message_bytes: int) -> int:
    """Makes what the launches on a stream share. If it can't, it writes why."""
    try:
        _device(index).workspace(stream or 0)
    except Exception as error:  # the caller throws it, as a RuntimeError
        text = str(error).encode()[: message_bytes - 1] + b"\0"
        ctypes.memmove(message, text, len(text))
        return 1
    return 0


_first_call_address = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(_first_call)

#: The version of torch's stable interface whose rules the kernels follow, as torch writes it: 2.10.
_STABLE_VERSION = 2 << 56 | 10 << 48
#: What the structure of torch's functions calls those that have no plain name.
_CPP_NAMES = {
    "operator_delete": "_ZdlPv",
    "torch_check_fail": "_ZN3c106detail14torchCheckFailEPKcS2_jS2_",
}
_KINDS = {"bf": "bfloat", "f": "float", "i": "int", "u": "uint"}
#: What torch keeps the address of.
_FILE = ctypes.create_string_buffer(__file__.encode())


def _register_kernels(names: Sequence[str], key: str) -> None:
    """Registers the C library's kernels of these ops for a dispatch key, through torch's stable C interface."""
    folder = Path(torch.__file__).parent / "lib"
    libraries = [ctypes.CDLL(None)]
    libraries += [ctypes.CDLL(str(folder / name)) for name in ("libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")]

    def function(name: str) -> Any:
        for library in libraries:
            found = getattr(library, _CPP_NAMES.get(name, name), None)
            if found is not None:
                return found
        raise ImportError(f"torch {torch.__version__} has no {name}; liquidgemm.torch needs torch 2.10 or later")

    functions = _abi.structure("lg_torch_functions")
    for field, _ in functions._fields_:
        if field.startswith("dtype_"):
            kind = field[6:].rstrip("0123456789")
            setattr(functions, field, function(f"aoti_torch_dtype_{_KINDS[kind]}{field[6 + len(kind):]}")())
        elif field == "make_stream":
            functions.make_stream = ctypes.cast(_first_call_address, ctypes.c_void_p)
        elif field != "struct_size":
            setattr(functions, field, ctypes.cast(function(field), ctypes.c_void_p))
    _torch_attach(ctypes.addressof(functions))
    library = ctypes.c_void_p()
    register = function("torch_library_impl")
    register.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64)
    failed = function("aoti_torch_library_init_impl")(b"liquidgemm", key.encode(), _FILE, 0, ctypes.byref(library))
    for name in names:
        kernel = ctypes.cast(_abi.function(f"lg_torch_{name}"), ctypes.c_void_p)
        failed = failed or register(library, name.encode(), kernel, _STABLE_VERSION)
    if failed:
        raise ImportError("torch refuses the kernels of liquidgemm.torch; stderr has its message")


# --- Checks, which the fake kernels share ---


def _refuse(message: str) -> None:
    raise InvalidArgumentError(message)


def _check(what: str, tensor: Tensor, dtype: torch.dtype, like: Tensor, size: Optional[int] = None) -> None:
    """Checks a parameter: its type, its device, its elements, and that they lie behind one another."""
    if tensor.dtype is not dtype:
        _refuse(f"{what} has the type {tensor.dtype}; it must be {dtype}")
    if tensor.device != like.device:
        _refuse(f"{what} is on {tensor.device}, but the input is on {like.device}; move one of them")
    if size is not None and tensor.numel() != size:
        _refuse(f"{what} has {tensor.numel()} elements; it must have {size}")
    if not tensor.is_contiguous():
        _refuse(f"{what} is not contiguous; call .contiguous()")


def _check_input(x: Tensor) -> None:
    if x.dtype in _HALVES and x.is_contiguous() and x.dim():
        return
    if x.dtype not in _HALVES:
        _refuse(f"the input has the type {x.dtype}; use torch.bfloat16 or torch.float16")
    if x.dim() == 0:
        _refuse("the input has no dimensions; it must be [..., k]")
    if not x.is_contiguous():
        _refuse(f"the input, {list(x.shape)}, is not contiguous; call .contiguous()")


def _check_output(dtype: Optional[torch.dtype], x: Tensor) -> torch.dtype:
    dtype = x.dtype if dtype is None else dtype
    if dtype not in _TYPES:
        _refuse(f"the output's type is {dtype}; use one of {', '.join(map(str, _TYPES))}")
    return dtype


def _check_linear(
    x: Tensor,
    packed: Tensor,
    bias: Optional[Tensor],
    smoothing: Optional[Tensor],
    n: int,
    k: int,
    group: int,
    dtype: Optional[torch.dtype],
) -> torch.dtype:
    """Checks the operands of a linear layer, and returns the output's type."""
    _check("packed", packed, torch.uint8, x)
    if packed.numel() != _packed_size(n, k, group):
        _refuse(
            f"packed has {packed.numel()} bytes, but weights [{n}, {k}] with groups of {group} have "
            f"{_packed_size(n, k, group)}"
        )
    if bias is not None:
        _check("bias", bias, torch.float32, x, n)
    if smoothing is not None:
        _check("smoothing", smoothing, torch.float32, x, k)
    return _check_output(dtype, x)


_sizes: Dict[Tuple[int, int, int], int] = {}


def _packed_size(n: int, k: int, group: int) -> int:
    key = (n, k, group)
    size = _sizes.get(key)
    if size is None:
        size = _sizes[key] = _size(_weights_device_size, n, k, group)
    return size


def _check_columns(x: Tensor, k: int, operation: int = 0) -> None:
    """Fails unless the input's rows have what a layer with `k` input channels takes."""
    columns = 2 * k if operation in _GATED else k
    if x.shape[-1] != columns:
        _refuse(f"the input, {list(x.shape)}, has {x.shape[-1]} columns; with k = {k} it must have {columns}")


def _check_operation(
    x: Tensor, operation: int, norm_weight: Optional[Tensor], norm_bias: Optional[Tensor], residual: Optional[Tensor]
) -> None:
    if operation not in OPERATIONS.values():
        _refuse(f"operation is {operation}; use liquidgemm.torch.OPERATIONS")
    if operation in _NORMS:
        if norm_weight is None:
            _refuse("a norm needs norm_weight")
        for what, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if value is not None:
                _check(what, value, x.dtype, x, x.shape[-1])
    elif norm_weight is not None or norm_bias is not None or residual is not None:
        _refuse("norm_weight, norm_bias and residual go with a norm; leave them out")
    if residual is not None:
        _check("residual", residual, x.dtype, x, x.numel())


def _new_output(x: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    shape = (*x.shape[:-1], n)
    return x.new_empty(shape) if dtype is x.dtype else x.new_empty(shape, dtype=dtype)


# --- The CPU backend ---


class _Kept:
    """What is kept with a tensor. Copies and pickled tensors get an empty one, because addresses can't be copied."""

    __slots__ = ("key", "value")

    def __init__(self, key: Any = None, value: Any = None) -> None:
        self.key, self.value = key, value

    def __reduce__(self) -> Any:
        return (_Kept, ())


def _cached(tensor: Tensor, key: Any, make: Callable[[], Any]) -> Any:
    """Keeps what is made of a tensor's contents with the tensor, until they change."""
    if tensor.is_inference():
        # Such tensors don't count their changes.
        return make()
    key = (key, tensor._version, tensor.data_ptr())
    found = getattr(tensor, "_liquidgemm", None)
    if found is None or found.key != key:
        found = _Kept(key, make())
        tensor._liquidgemm = found
    return found.value


def _host_weights(packed: Tensor, n: int, k: int, group: int) -> Handle:
    def make() -> Handle:
        arguments = (packed.data_ptr(), packed.numel(), n, k, group)
        return Handle(_weights_from_device_bytes, "lg_weights_free", *arguments)

    return _cached(packed, (n, k, group), make)


def _fill_input(
    x: Tensor,
    m: int,
    k: int,
    operation: int = _PLAIN,
    norm_weight: Optional[Tensor] = None,
    norm_bias: Optional[Tensor] = None,
    epsilon: float = 0.0,
    interleaved: bool = False,
    residual: Optional[Tensor] = None,
    gather: Optional[Tensor] = None,
) -> None:
    """Describes the input in this thread's structure. Fields that the operation does not use are left as they are."""
    fields = _filled.input
    fields.m = m
    fields.k = k
    fields.operation = operation
    fields.input_type = _TYPES[x.dtype]
    fields.input = x.data_ptr()
    fields.residual = None if residual is None else residual.data_ptr()
    fields.smoothing = None
    fields.gather = None
    if gather is not None:
        fields.gather = gather.data_ptr()
        fields.gather_input_rows = x.shape[0]
    if operation != _PLAIN:
        fields.norm_weight = None if norm_weight is None else norm_weight.data_ptr()
        fields.norm_bias = None if norm_bias is None else norm_bias.data_ptr()
        fields.epsilon = epsilon
        fields.gate_order = int(interleaved)


def _fill_output(output: Tensor) -> None:
    fields = _filled.output
    fields.output = output.data_ptr()
    fields.output_type = _TYPES[output.dtype]


def _fill_quantized(codes: Tensor, scales: Tensor, m: int, k: int, stride: int) -> None:
    fields = _filled.quantized
    fields.m, fields.k, fields.codes, fields.code_stride = m, k, codes.data_ptr(), stride
    fields.scales = scales.data_ptr()


def _quantized_like(x: Tensor, m: int, k: int) -> Tuple[Tensor, Tensor]:
    """Allocates codes whose rows are 64 bytes apart, which the GPU reads fast, and scales."""
    codes = torch.empty((m, _round_up(k, 64)), dtype=torch.int8, device=x.device)
    return codes, torch.empty(m, dtype=torch.float32, device=x.device)


def _run_quantize(smoothing: Optional[Tensor], codes: Tensor, scales: Tensor, m: int, k: int) -> None:
    """Quantizes what `_fill_input` has described."""
    _fill_quantized(codes, scales, m, k, codes.stride(0))
    if smoothing is not None:
        _filled.input.smoothing = smoothing.data_ptr()
    _cpu_quantize(_filled.input_address, _filled.quantized_address)


def _cpu_linear(
    x: Tensor, packed: Tensor, bias: Optional[Tensor], smoothing: Optional[Tensor], output: Tensor, k: int, group: int
) -> None:
    """Quantizes what `_fill_input` has described, and multiplies."""
    m, n = _filled.input.m, output.shape[-1]
    codes, scales = _quantized_like(x, m, k)
    _run_quantize(smoothing, codes, scales, m, k)
    _fill_output(output)
    weights = _host_weights(packed, n, k, group)
    bias_address = None if bias is None else bias.data_ptr()
    _cpu_gemm(weights.address, _filled.quantized_address, bias_address, _filled.output_address)


# --- The ops ---

_library = torch.library.Library("liquidgemm", "DEF")
_names: List[str] = []


def _op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines an op with its implementation for CPU tensors, and its fake kernel. The C library has the CUDA kernel."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(name, implementation, "CPU")
        _names.append(name)
        torch.library.register_fake(f"liquidgemm::{name}", fake, lib=_library)
        return implementation

    return register


def _linear_fake(x, packed, bias, smoothing, n, k, group, dtype=None):  # type: ignore[no-untyped-def]
    _check_input(x)
    _check_columns(x, k)
    dtype = _check_linear(x, packed, bias, smoothing, n, k, group, dtype)
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


@_op(
    "linear(Tensor x, Tensor packed, Tensor? bias, Tensor? smoothing, int n, int k, int group, "
    "ScalarType? dtype=None) -> Tensor",
    _linear_fake,
)
def _linear(
    x: Tensor,
    packed: Tensor,
    bias: Optional[Tensor],
    smoothing: Optional[Tensor],
    n: int,
    k: int,
    group: int,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    _check_input(x)
    _check_columns(x, k)
    dtype = _check_linear(x, packed, bias, smoothing, n, k, group, dtype)
    output = _new_output(x, n, dtype)
    m = output.numel() // n
    if m:
        _fill_input(x, m, k)
        _cpu_linear(x, packed, bias, smoothing, output, k, group)
    return output


def _fused_fake(  # type: ignore[no-untyped-def]
    x,
    packed,
    bias,
    smoothing,
    n,
    k,
    group,
    operation,
    norm_weight=None,
    norm_bias=None,
    epsilon=1e-5,
    interleaved=False,
    residual=None,
    dtype=None,
):
    _check_input(x)
    _check_operation(x, operation, norm_weight, norm_bias, residual)
    _check_columns(x, k, operation)
    dtype = _check_linear(x, packed, bias, smoothing, n, k, group, dtype)
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


@_op(
    "fused_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? smoothing, int n, int k, int group, int operation, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float epsilon=1e-05, bool interleaved=False, "
    "Tensor(a!)? residual=None, ScalarType? dtype=None) -> Tensor",
    _fused_fake,
)
def _fused_linear(
    x: Tensor,
    packed: Tensor,
    bias: Optional[Tensor],
    smoothing: Optional[Tensor],
    n: int,
    k: int,
    group: int,
    operation: int,
    norm_weight: Optional[Tensor] = None,
    norm_bias: Optional[Tensor] = None,
    epsilon: float = 1e-5,
    interleaved: bool = False,
    residual: Optional[Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    _check_input(x)
    _check_operation(x, operation, norm_weight, norm_bias, residual)
    _check_columns(x, k, operation)
    dtype = _check_linear(x, packed, bias, smoothing, n, k, group, dtype)
    output = _new_output(x, n, dtype)
    m = output.numel() // n
    if m:
        _fill_input(x, m, k, operation, norm_weight, norm_bias, epsilon, interleaved, residual)
        _cpu_linear(x, packed, bias, smoothing, output, k, group)
    return output


def _quantize_fake(x, smoothing=None):  # type: ignore[no-untyped-def]
    _check_input(x)
    m, k = x.numel() // x.shape[-1], x.shape[-1]
    codes = x.new_empty((m, (k + 63) // 64 * 64), dtype=torch.int8)
    return codes, x.new_empty((m,), dtype=torch.float32)


@_op("quantize(Tensor x, Tensor? smoothing=None) -> (Tensor, Tensor)", _quantize_fake)
def _quantize(x: Tensor, smoothing: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """Returns int8 codes `[m, k rounded up to 64]`, with zeros behind each row, and f32 scales `[m]`."""
    _check_input(x)
    k = x.shape[-1]
    if smoothing is not None:
        _check("smoothing", smoothing, torch.float32, x, k)
    m = x.numel() // k if k else 0
    codes, scales = _quantized_like(x, m, k)
    if codes.shape[1] != k:
        codes[:, k:].zero_()
    if m:
        _fill_input(x, m, k)
        _run_quantize(smoothing, codes, scales, m, k)
    return codes, scales


def _gemm_fake(codes, scales, packed, bias, n, k, group, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty((codes.shape[0], n), dtype=dtype)


@_op(
    "gemm(Tensor codes, Tensor scales, Tensor packed, Tensor? bias, int n, int k, int group, ScalarType dtype) -> Tensor",
    _gemm_fake,
)
def _gemm(
    codes: Tensor,
    scales: Tensor,
    packed: Tensor,
    bias: Optional[Tensor],
    n: int,
    k: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """Multiplies what `quantize` returned, and returns `[m, n]`."""
    _check("codes", codes, torch.int8, codes)
    if codes.dim() != 2 or codes.shape[1] != _round_up(k, 64):
        _refuse(f"codes are {list(codes.shape)}; they must be [m, {_round_up(k, 64)}], as quantize returns them")
    m = codes.shape[0]
    _check("scales", scales, torch.float32, codes, m)
    _check("packed", packed, torch.uint8, codes, _packed_size(n, k, group))
    if bias is not None:
        _check("bias", bias, torch.float32, codes, n)
    if dtype not in _TYPES:
        _refuse(f"the output's type is {dtype}; use one of {', '.join(map(str, _TYPES))}")
    output = torch.empty((m, n), dtype=dtype, device=codes.device)
    if m:
        _fill_quantized(codes, scales, m, k, codes.stride(0))
        _fill_output(output)
        bias_address = None if bias is None else bias.data_ptr()
        weights = _host_weights(packed, n, k, group)
        _cpu_gemm(weights.address, _filled.quantized_address, bias_address, _filled.output_address)
    return output


def _host_experts(packed: Tensor, experts: int, n: int, k: int, group: int) -> Handle:
    def make() -> Handle:
        weights = [
            Handle(_weights_from_device_bytes, "lg_weights_free", part.data_ptr(), part.numel(), n, k, group)
            for part in _expert_bytes(packed, experts, n, k, group)
        ]
        addresses = (ctypes.c_void_p * experts)(*(weight.address for weight in weights))
        return Handle(_experts_new, "lg_experts_free", ctypes.addressof(addresses), experts)

    return _cached(packed, (experts, n, k, group), make)


def _expert_bytes(packed: Tensor, experts: int, n: int, k: int, group: int) -> List[Tensor]:
    """Returns the device bytes of each expert. Of all together the strips come first, and then all scales."""
    one = _packed_size(n, k, group)
    scales = packed[packed.numel() - experts * n * 4 :].view(experts, n * 4)
    # Without its scales an expert is padded to 256 bytes, and the experts together are padded once.
    strips = _strip_bytes(n, k, group)
    padding = packed.new_zeros(one - n * 4 - strips)
    return [torch.cat((packed[e * strips : (e + 1) * strips], padding, scales[e])) for e in range(experts)]


def _strip_bytes(n: int, k: int, group: int) -> int:
    """Returns the bytes of one expert's strips: the sizes of 256 experts and of one differ by 255 of them and scales."""
    # 256 times any size is a multiple of 256, so these two have no padding.
    two, one = (_size(_experts_device_size, count * 256, n, k, group) for count in (2, 1))
    return (two - one) // 256 - n * 4


def _grouped_fake(  # type: ignore[no-untyped-def]
    x, packed, offsets, experts, n, k, group, operation=0, bias=None, gather=None, dtype=None
):
    _check_input(x)
    _check_columns(x, k, operation)
    rows = x.shape[0] if gather is None else gather.shape[0]
    return x.new_empty((rows, n), dtype=_check_output(dtype, x))


@_op(
    "grouped_linear(Tensor x, Tensor packed, Tensor offsets, int experts, int n, int k, int group, int operation=0, "
    "Tensor? bias=None, Tensor? gather=None, ScalarType? dtype=None) -> Tensor",
    _grouped_fake,
)
def _grouped_linear(
    x: Tensor,
    packed: Tensor,
    offsets: Tensor,
    experts: int,
    n: int,
    k: int,
    group: int,
    operation: int = 0,
    bias: Optional[Tensor] = None,
    gather: Optional[Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """Quantizes rows `[rows, k]`, after an operation, and multiplies those of each expert with its weights.

    Row r of the product is made from row `gather[r]` of x. Rows `offsets[e]` up to `offsets[e + 1]` are of expert e.
    Rows of no expert are undefined.
    """
    _check_input(x)
    if x.dim() != 2:
        _refuse(f"the input is {list(x.shape)}; it must be [rows, k]")
    if operation != _PLAIN and operation not in _GATED:
        _refuse("a grouped linear takes no norm; apply it before the rows are sorted")
    _check_columns(x, k, operation)
    rows = x.shape[0] if gather is None else gather.shape[0]
    _check("packed", packed, torch.uint8, x, _size(_experts_device_size, experts, n, k, group))
    _check("offsets", offsets, torch.int32, x, experts + 1)
    if bias is not None:
        _check("bias", bias, torch.float32, x, experts * n)
    if gather is not None:
        _check("gather", gather, torch.int32, x, rows)
    output = torch.empty((rows, n), dtype=_check_output(dtype, x), device=x.device)
    if rows == 0:
        return output
    codes, scales = _quantized_like(x, rows, k)
    _fill_input(x, rows, k, operation, gather=gather)
    _run_quantize(None, codes, scales, rows, k)
    _fill_output(output)
    fields = _filled.grouped
    fields.offsets = offsets.data_ptr()
    fields.bias = None if bias is None else bias.data_ptr()
    parts = (_filled.grouped_address, _filled.quantized_address, _filled.output_address)
    _cpu_grouped_gemm(_host_experts(packed, experts, n, k, group).address, *parts)
    return output


def _combine_fake(rows, positions, weights):  # type: ignore[no-untyped-def]
    return rows.new_empty((positions.shape[0], rows.shape[1]))


@_op("combine(Tensor rows, Tensor positions, Tensor weights) -> Tensor", _combine_fake)
def _combine(rows: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Returns `Σⱼ weights[t, j] · rows[positions[t, j]]` for each token t, j ascending, `[tokens, n]`."""
    _check_input(rows)
    if rows.dim() != 2 or positions.dim() != 2 or positions.shape != weights.shape:
        _refuse("rows are [rows, n], positions and weights [tokens, top_k]")
    _check("positions", positions, torch.int32, rows)
    _check("weights", weights, torch.float32, rows)
    (tokens, top_k), n = positions.shape, rows.shape[1]
    output = torch.empty((tokens, n), dtype=rows.dtype, device=rows.device)
    arguments = _abi.structure(
        "lg_combine",
        tokens=tokens,
        top_k=top_k,
        row_count=rows.shape[0],
        n=n,
        element_type=_TYPES[rows.dtype],
        rows=rows.data_ptr(),
        positions=positions.data_ptr(),
        weights=weights.data_ptr(),
        output=output.data_ptr(),
    )
    if tokens == 0:
        return output
    _cpu_combine(ctypes.addressof(arguments))
    return output


if torch.version.cuda is not None:
    _register_kernels(_names, "CUDA")

# --- Modules ---


def _bytes_tensor(data: Any, device: Any) -> Tensor:
    """Makes a tensor of numpy bytes, which launches on any stream may read afterwards."""
    tensor = torch.from_numpy(data).to(device)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return tensor


def _keep_types(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Makes `module.half()` and its kin leave the tensors' types as they are. They still move between devices."""

    def keep(tensor: Tensor) -> Tensor:
        converted = convert(tensor)
        return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

    return keep


class LiquidLinear(nn.Module):
    """A linear layer with 4-bit weights, for bf16 or f16 inputs `[..., in_features]`. It takes the place of `nn.Linear`.

    Make it with `from_float` or `from_packed`. The state has the tensors `weight_codes` (uint8),
    `weight_pairs` (uint8) and `weight_scales` (float32) in place of `weight`, as packed checkpoints have,
    and `bias`, `smoothing` and `input_permutation` where the layer has them. Its types never change.
    """

    in_features: int
    out_features: int
    group: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        group: Group = 64,
        smoothing: bool = False,
        input_permutation: bool = False,
        device: Any = None,
    ) -> None:
        """Makes a layer whose weights are not set yet: load its state before the first call."""
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group_code(group)
        size = _packed_size(out_features, in_features, self.group)

        def vector(exists: bool, length: int, value: float = 0.0) -> Optional[Tensor]:
            return torch.full((length,), value, dtype=torch.float32, device=device) if exists else None

        self.register_buffer("packed", torch.zeros(size, dtype=torch.uint8, device=device))
        self.register_buffer("bias", vector(bias, out_features))
        self.register_buffer("smoothing", vector(smoothing, in_features, 1.0))
        order = torch.arange(in_features, dtype=torch.int32, device=device) if input_permutation else None
        self.register_buffer("input_permutation", order)

    @classmethod
    def from_packed(
        cls,
        weights: PackedWeights,
        bias: Optional[Tensor] = None,
        smoothing: Optional[Tensor] = None,
        device: Any = None,
    ) -> "LiquidLinear":
        """Makes a layer of packed weights `[n, k]`, a bias `[n]` and a smoothing vector `[k]`."""
        n, k = weights.shape
        layer = cls(k, n, bias is not None, group=weights.group, smoothing=smoothing is not None, device="meta")
        layer.packed = _bytes_tensor(weights.device_bytes(), device)
        for name, value, length in (("bias", bias, n), ("smoothing", smoothing, k)):
            if value is not None:
                if value.shape != (length,):
                    _refuse(f"{name} is {list(value.shape)}; it must be [{length}]")
                setattr(layer, name, value.detach().to(layer.packed.device, torch.float32).contiguous())
        return layer

    @classmethod
    def from_float(
        cls, linear: nn.Linear, group: Group = 64, smoothing: Optional[Tensor] = None, device: Any = None
    ) -> "LiquidLinear":
        """Quantizes an `nn.Linear`. The layer lies on its device, or on `device`.

        With `smoothing` `[in_features]` the weights are multiplied by it, and activations are divided by it.
        """
        weight = linear.weight.detach()
        values = weight.to("cpu", torch.float32)
        if smoothing is not None:
            values = values * smoothing.detach().to("cpu", torch.float32)
        packed = PackedWeights.quantize(values.contiguous().numpy(), group)
        return cls.from_packed(packed, linear.bias, smoothing, weight.device if device is None else device)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `[..., out_features]` of the input's type."""
        if self.input_permutation is not None:
            x = x.index_select(-1, self.input_permutation)
        return torch.ops.liquidgemm.linear(
            x, self.packed, self.bias, self.smoothing, self.out_features, self.in_features, self.group
        )

    def to_packed(self) -> PackedWeights:
        """Returns the weights in host memory."""
        shape = (self.out_features, self.in_features)
        return PackedWeights.from_device_bytes(self.packed.cpu().numpy(), *shape, self.group or "channel")

    def prepare(self, m: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> None:
        """Compiles everything that calls with these numbers of rows need, so that a CUDA graph can capture them."""
        prepare(self, m, dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        group = self.group or "channel"
        return f"in_features={self.in_features}, out_features={self.out_features}, group={group}"

    def _apply(self, fn: Any, recurse: bool = True) -> "LiquidLinear":
        return super()._apply(_keep_types(self, fn), recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = destination.pop(prefix + "packed")
        if packed.is_meta:
            return
        weights = self.to_packed()
        for name, part in _parts_of(weights).items():
            destination[prefix + name] = torch.from_numpy(part).to(packed.device)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        state_dict = dict(state_dict)
        parts = {name: state_dict.pop(prefix + name, None) for name in NEEDED}
        missing = [prefix + name for name, part in parts.items() if part is None]
        if not missing:
            try:
                codes, pairs, scales = (part.detach().cpu().contiguous().numpy() for part in parts.values())
                weights = PackedWeights.from_parts(codes, pairs, scales, self.in_features, self.group or "channel")
                if weights.shape != (self.out_features, self.in_features):
                    _refuse(f"the weights are {list(weights.shape)}, not {[self.out_features, self.in_features]}")
                device = "cpu" if self.packed.is_meta else self.packed.device
                self.packed = _bytes_tensor(weights.device_bytes(), device)
            except InvalidArgumentError as error:
                error_msgs.append(f"{prefix}weight_codes: {error}")
        state_dict[prefix + "packed"] = self.packed
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys.extend(missing)
        for name in (*NEEDED, "packed"):
            if prefix + name in unexpected_keys:
                unexpected_keys.remove(prefix + name)


def _parts_of(weights: PackedWeights) -> Dict[str, Any]:
    return dict(zip(NEEDED, (weights.packed_codes, weights.packed_pairs, weights.channel_scales)))


class LiquidMoE(nn.Module):
    """The experts of a mixture with 4-bit weights: `down(activation(gate) · up)` of each token's experts.

    The router is not part of it. The host never reads the routing, so a CUDA graph serves every routing.
    """

    def __init__(
        self,
        gate_up: Sequence[PackedWeights],
        down: Sequence[PackedWeights],
        activation: str = "silu_mul",
        device: Any = None,
    ) -> None:
        """Makes a mixture of packed weights: `gate_up` `[2 · inner, hidden]`, gates first, and `down` `[hidden, inner]`."""
        super().__init__()
        if activation not in ("silu_mul", "gelu_tanh_mul"):
            _refuse(f"activation is {activation!r}; use \"silu_mul\" or \"gelu_tanh_mul\"")
        if not gate_up or len(gate_up) != len(down):
            _refuse(f"there are {len(gate_up)} gate_up and {len(down)} down; give one of each for every expert")
        inner, hidden = down[0].k, down[0].n
        if gate_up[0].shape != (2 * inner, hidden):
            _refuse(f"gate_up is {list(gate_up[0].shape)}; with this down it must be {[2 * inner, hidden]}")
        self.experts, self.hidden, self.inner = len(gate_up), hidden, inner
        self.operation = OPERATIONS[activation]
        self.groups = tuple(group_code(weights[0].group) for weights in (gate_up, down))
        self.register_buffer("gate_up", _bytes_tensor(_experts_bytes(gate_up), device))
        self.register_buffer("down", _bytes_tensor(_experts_bytes(down), device))

    @classmethod
    def from_float(
        cls, gate_up: Tensor, down: Tensor, activation: str = "silu_mul", group: Group = 64, device: Any = None
    ) -> "LiquidMoE":
        """Quantizes `gate_up` `[experts, 2 · inner, hidden]` and `down` `[experts, hidden, inner]`."""

        def packed(weights: Tensor) -> List[PackedWeights]:
            return [PackedWeights.quantize(w.detach().to("cpu", torch.float32).contiguous().numpy(), group) for w in weights]

        return cls(packed(gate_up), packed(down), activation, gate_up.device if device is None else device)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Returns `[tokens, hidden]` for `x` `[tokens, hidden]`, and `expert_ids` and `weights` `[tokens, top_k]`."""
        if x.dim() != 2 or expert_ids.dim() != 2 or expert_ids.shape != weights.shape or len(x) != len(expert_ids):
            _refuse(
                f"x is {list(x.shape)}, expert_ids {list(expert_ids.shape)} and weights {list(weights.shape)}; "
                "they must be [tokens, hidden] and twice [tokens, top_k]"
            )
        tokens, top_k = expert_ids.shape
        sorted_ids, order = torch.sort(expert_ids.reshape(-1), stable=True)
        bounds = torch.arange(self.experts + 1, device=x.device, dtype=sorted_ids.dtype)
        offsets = torch.searchsorted(sorted_ids, bounds, out_int32=True)
        positions = torch.empty_like(order, dtype=torch.int32)
        positions.scatter_(0, order, torch.arange(tokens * top_k, device=x.device, dtype=torch.int32))
        gather = torch.div(order, top_k, rounding_mode="floor").to(torch.int32)
        ops = torch.ops.liquidgemm
        hidden, inner, (first, second) = self.hidden, self.inner, self.groups
        gates = ops.grouped_linear(x, self.gate_up, offsets, self.experts, 2 * inner, hidden, first, 0, None, gather)
        rows = ops.grouped_linear(gates, self.down, offsets, self.experts, hidden, inner, second, self.operation)
        return ops.combine(rows, positions.view(tokens, top_k), weights.to(torch.float32).contiguous())

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"experts={self.experts}, hidden={self.hidden}, inner={self.inner}"

    def _apply(self, fn: Any, recurse: bool = True) -> "LiquidMoE":
        return super()._apply(_keep_types(self, fn), recurse)


def _experts_bytes(experts: Sequence[PackedWeights]) -> Any:
    import numpy as np

    addresses = (ctypes.c_void_p * len(experts))(*(expert._handle.address for expert in experts))
    handle = Handle(_experts_new, "lg_experts_free", ctypes.addressof(addresses), len(experts))
    first = experts[0]
    size = _size(_experts_device_size, len(experts), first.n, first.k, group_code(first.group))
    data = np.empty(size, np.uint8)
    _experts_device_bytes(handle.address, data.ctypes.data, size)
    return data


def prepare(module: nn.Module, m: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> None:
    """Compiles everything that calls of a module's layers with these numbers of rows need, and makes workspaces.

    CUDA graphs can then capture them, and no call in traffic compiles anything. On the CPU there is nothing to do.
    """
    if dtype not in _HALVES:
        _refuse(f"dtype is {dtype}; use torch.bfloat16 or torch.float16")
    for layer in module.modules():
        packed = getattr(layer, "packed", None) if isinstance(layer, LiquidLinear) else getattr(layer, "down", None)
        if not isinstance(layer, (LiquidLinear, LiquidMoE)) or packed is None or not packed.is_cuda:
            continue
        device = _device(packed.device.index)
        gpu = device.gpu.address
        device.workspace(_raw_stream(packed.device.index))
        if isinstance(layer, LiquidLinear):
            _gpu_prepare_quantize(gpu, _PLAIN, _TYPES[dtype], layer.in_features)
            for rows in m:
                _gpu_prepare(gpu, layer.out_features, layer.in_features, rows, rows)
        else:
            _gpu_prepare_grouped(gpu)
            _gpu_prepare_quantize(gpu, _PLAIN, _TYPES[dtype], layer.hidden)
            _gpu_prepare_quantize(gpu, layer.operation, _TYPES[dtype], layer.inner)


def replace_linears(
    model: nn.Module,
    group: Group = 64,
    skip: Sequence[str] = ("lm_head",),
    device: Any = None,
) -> List[str]:
    """Replaces every `nn.Linear` in a model, in place, and returns their names.

    Layers whose name, or the last part of it, is in `skip` stay as they are.
    """
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name and name not in skip and name.rsplit(".", 1)[-1] not in skip
    ]
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        setattr(parent, last, LiquidLinear.from_float(getattr(parent, last), group, device=device))
    return names
