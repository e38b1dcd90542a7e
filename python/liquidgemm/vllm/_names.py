"""Which of vLLM's layers are packed. A layer of vLLM may be several modules of the checkpoint, such as Q, K and V."""

from typing import Callable, Dict, Iterable, List

from .._errors import InvalidArgumentError


class PackedModules:
    """The modules that config.json lists as quantized."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._set = set(self.names)

    def rename(self, rename: Callable[[List[str]], List[str]]) -> None:
        """Gives the modules the names that a model has in vLLM."""
        self.names = rename(self.names)
        self._set = set(self.names)

    def has_layer(self, layer: str, stacked: Dict[str, List[str]]) -> bool:
        """Returns whether a linear layer is packed.

        `stacked` has the parts of each stacked layer, by the last parts of their names. All or none must be packed.
        """
        if layer in self._set:
            return True
        parent, dot, last = layer.rpartition(".")
        modules = [parent + dot + part for part in stacked.get(last, [])]
        packed = [module for module in modules if module in self._set]
        if packed and len(packed) < len(modules):
            kept = next(module for module in modules if module not in self._set)
            raise InvalidArgumentError(
                f"{layer}: {packed[0]} is quantized, but {kept} is not, and vLLM stacks them; "
                f"quantize the model with both, or with `--exclude` for {' and '.join(modules)}"
            )
        return bool(packed)

    def has_modules_in(self, layer: str) -> bool:
        """Returns whether modules inside of a layer are packed, such as the experts of a mixture."""
        return any(name.startswith(layer + ".") for name in self.names)
