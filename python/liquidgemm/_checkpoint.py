"""Packed checkpoints: the tensors of a module, and the entries of config.json that loading needs.

`docs/checkpoints.md` and the crate `liquidgemm-checkpoint` define the format.
"""

from typing import Any, Dict, Optional

import torch
from torch import Tensor

from ._errors import InvalidArgumentError
from ._numpy import Group, PackedWeights

#: `quant_method` in config.json.
METHOD = "liquidgemm"
#: The version of the format that this package reads.
FORMAT_VERSION = 1
#: The tensors that every packed module has.
NEEDED = ("weight_codes", "weight_pairs", "weight_scales")
#: The tensors of packed modules, and their types. A module need not have the last two.
DTYPES = {
    "weight_codes": torch.uint8,
    "weight_pairs": torch.uint8,
    "weight_scales": torch.float32,
    "smoothing": torch.float32,
    "input_permutation": torch.int32,
}


def check_version(version: Optional[int]) -> None:
    """Fails for a folder of another version."""
    if version != FORMAT_VERSION:
        raise InvalidArgumentError(
            f"the folder has format version {version}; this package reads version {FORMAT_VERSION}, "
            "so quantize the model again, or install the package that wrote the folder"
        )


def group_of(entry: Any) -> Group:
    """Returns the group that config.json names: a multiple of 64, or "channel"."""
    text = str(entry)
    if text == "channel":
        return "channel"
    if not text.isdecimal() or int(text) == 0 or int(text) % 64:
        raise InvalidArgumentError(f"config.json has the group {text!r}; it must be a multiple of 64, or \"channel\"")
    return int(text)


def packed_weights(parts: Dict[str, Tensor], k: int, group: Group) -> PackedWeights:
    """Assembles the weights of a module with `k` input channels from its tensors."""
    return PackedWeights.from_parts(*(parts[name].cpu().contiguous().numpy() for name in NEEDED), k, group)
