"""The C library: its structures, constants and functions, as its header declares them.

The header is the only list of them. It is read once, when the package is imported.
"""

import ctypes
import os
import re
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple, Type

from ._errors import error_of

_FOLDER = Path(__file__).parent

_SCALARS = {
    "size_t": ctypes.c_size_t,
    "uintptr_t": ctypes.c_size_t,
    "uint64_t": ctypes.c_uint64,
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
}


def _header() -> str:
    text = (_FOLDER / "liquidgemm.h").read_text("utf-8")
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)


class _Header:
    """What the header declares."""

    def __init__(self, text: str) -> None:
        self.constants: Dict[str, int] = {}
        for name, value in re.findall(r"^#define (LG_\w+) (\d+)$", text, flags=re.M):
            self.constants[name] = int(value)
        self._types: Dict[str, Any] = dict(_SCALARS)
        for base, name in re.findall(r"^typedef (\w+) (\w+);", text, flags=re.M):
            if base in self._types:
                self._types[name] = self._types[base]
        for name in re.findall(r"^typedef void \*(\w+);", text, flags=re.M):
            self._types[name] = ctypes.c_void_p
        self.structures: Dict[str, Type[ctypes.Structure]] = {}
        for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, flags=re.S):
            fields = [self._declaration(line) for line in body.split(";") if line.strip()]
            self.structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        self.functions: List[Tuple[str, Any, List[Any]]] = []
        for result, name, parameters in re.findall(r"^([\w *]+?)(lg_\w+)\(([^)]*)\);", text, flags=re.M):
            types = [] if parameters.strip() == "void" else [self._declaration(p)[1] for p in parameters.split(",")]
            self.functions.append((name, self._result(result.strip()), types))

    def _declaration(self, text: str) -> Tuple[str, Any]:
        base, pointer, name = re.fullmatch(
            r"\s*(?:const\s+)?(?:struct\s+)?(\w+)\s*((?:\*\s*(?:const\s+)?)*)(\w+)\s*", text
        ).groups()
        # All pointers are addresses. Structures and handles are passed by reference.
        return name, ctypes.c_void_p if pointer else self._types[base]

    def _result(self, text: str) -> Any:
        if text == "void":
            return None
        if "*" in text:
            return ctypes.c_char_p if "char" in text else ctypes.c_void_p
        return self._types[text.split()[-1]]


def _open() -> Tuple[ctypes.CDLL, _Header]:
    path = os.environ.get("LIQUIDGEMM_LIBRARY") or str(_FOLDER / "libliquidgemm_c.so")
    library = ctypes.CDLL(path)
    header = _Header(_header())
    for name, result, parameters in header.functions:
        function = getattr(library, name)
        function.restype, function.argtypes = result, parameters
    found, expected = library.lg_abi_version(), header.constants["LG_ABI_VERSION"]
    if found != expected:
        raise ImportError(f"{path} has interface {found}, but this package needs {expected}; install both again")
    return library, header


_library, _declared = _open()

#: The constants of the header, without `LG_`.
constants = {name[3:]: value for name, value in _declared.constants.items()}


def structure(name: str, **fields: Any) -> ctypes.Structure:
    """Returns a structure of the header with its size and these fields set, and zeros elsewhere."""
    kind = _declared.structures[name]
    return kind(struct_size=ctypes.sizeof(kind), **fields)


def function(name: str) -> Callable[..., Any]:
    """Returns a function of the library that returns no status."""
    return getattr(_library, name)


def last_error(status: int) -> Exception:
    """Returns the exception of a status that the last call of this thread returned."""
    return error_of(status, _library.lg_last_error_message().decode())


def checked(name: str) -> Callable[..., None]:
    """Returns a function of the library whose failures are exceptions."""
    call = getattr(_library, name)

    def checked_call(*arguments: Any) -> None:
        status = call(*arguments)
        if status:
            raise last_error(status)

    return checked_call


class Handle:
    """An object of the library. It is freed when Python frees this."""

    __slots__ = ("address", "_free")

    def __init__(self, create: Callable[..., None], free: str, *arguments: Any) -> None:
        self.address = None
        out = ctypes.c_void_p()
        create(*arguments, ctypes.byref(out))
        self._free = function(free)
        self.address = out.value

    def __del__(self) -> None:
        if self.address is not None:
            self._free(self.address)
            self.address = None

    def __reduce__(self) -> Any:
        raise TypeError("an object of the C library can't be copied or pickled")


class PerThread(threading.local):
    """Structures that a thread fills again and again."""

    def __init__(self, **names: str) -> None:
        for attribute, name in names.items():
            filled = structure(name)
            setattr(self, attribute, filled)
            setattr(self, f"{attribute}_address", ctypes.addressof(filled))
