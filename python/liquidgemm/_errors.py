"""The exceptions of the package. Each says what was wrong, which value, and what to do."""

from typing import Dict, Type


class LiquidGemmError(Exception):
    """Any error of the library."""


class InvalidArgumentError(LiquidGemmError, ValueError):
    """A shape, a type, a value, an alignment or a buffer's size is wrong."""


class FileError(LiquidGemmError, OSError):
    """A file cannot be read or written, or does not contain packed weights."""


class NoGpuError(LiquidGemmError, RuntimeError):
    """There is no driver or no GPU that the library can use."""


class OutOfMemoryError(LiquidGemmError, MemoryError):
    """The GPU's memory ran out."""


class DriverError(LiquidGemmError, RuntimeError):
    """The NVIDIA driver returned an error."""


class InternalError(LiquidGemmError, RuntimeError):
    """The library has a defect. Please report the message."""


# By the numbers of `lg_status`.
_BY_STATUS: Dict[int, Type[LiquidGemmError]] = {
    1: InvalidArgumentError,
    2: FileError,
    3: NoGpuError,
    4: OutOfMemoryError,
    5: DriverError,
}


def error_of(status: int, message: str) -> LiquidGemmError:
    """Returns the exception of a status."""
    return _BY_STATUS.get(status, InternalError)(message)
