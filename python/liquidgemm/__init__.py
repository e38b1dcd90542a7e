"""Matrix products with 4-bit weights and 8-bit activations, on numpy arrays and the CPU.

`liquidgemm.torch` has the same for torch, on CUDA and on CPU tensors, with the same bits.

>>> import numpy as np
>>> import liquidgemm as lg
>>> weights = np.sin(np.arange(3 * 128, dtype=np.float32)).reshape(3, 128)
>>> packed = lg.PackedWeights.quantize(weights)
>>> lg.matmul(lg.quantize(weights), packed).shape
(3, 3)
"""

from ._errors import (
    DriverError,
    FileError,
    InternalError,
    InvalidArgumentError,
    LiquidGemmError,
    NoGpuError,
    OutOfMemoryError,
)
from ._numpy import (
    Int4Import,
    PackedWeights,
    QuantizedActivations,
    combine,
    grouped_matmul,
    kernels_hash,
    matmul,
    quantize,
    smooth_weights,
)
from ._version import __version__

__all__ = [
    "DriverError",
    "FileError",
    "Int4Import",
    "InternalError",
    "InvalidArgumentError",
    "LiquidGemmError",
    "NoGpuError",
    "OutOfMemoryError",
    "PackedWeights",
    "QuantizedActivations",
    "__version__",
    "combine",
    "grouped_matmul",
    "kernels_hash",
    "matmul",
    "quantize",
    "smooth_weights",
]
