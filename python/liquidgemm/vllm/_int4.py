"""Takes symmetric int4 codes with group scales, as compressed-tensors stores them, to packed weights.

The packed format represents `q · S` of a group, q from −8 to 7, if `S = s · s1` with an integer s from 1 to 16 and one
`s1` for the channel (then `a = 128 − 8·s`). With one scale a channel, `s = 1` and `s1 = S` always do. Otherwise `s1` is
chosen for each channel so that its scales lie near multiples, and each scale becomes the nearest one.
If requantizing the weights gives a smaller error, that is taken. `liquidgemm quantize` has the same rule.
"""

import numpy as np

from .._errors import InvalidArgumentError
from .._numpy import Group, PackedWeights

#: The quotients of a channel's largest scale and `s1` that are tried.
_QUOTIENTS = np.arange(8.0, 16.01, 0.25)
_MOST_S = 16


def pack_int4(codes: np.ndarray, scales: np.ndarray, group: Group) -> PackedWeights:
    """Packs codes `[n, k]`, int8 from −8 to 7, and scales `[n, groups]`, float32, of `group` weights each."""
    n, k = codes.shape
    count = 1 if group == "channel" else -(-k // int(group))
    if scales.shape != (n, count):
        raise InvalidArgumentError(f"the scales are {list(scales.shape)}; for codes {[n, k]} they must be {[n, count]}")
    if codes.min() < -8 or codes.max() > 7:
        raise InvalidArgumentError(f"the codes are from {codes.min()} to {codes.max()}; int4 is from -8 to 7")
    if not np.isfinite(scales).all() or scales.min() < 0:
        raise InvalidArgumentError("a scale is negative, infinite or not a number")
    unsigned = (codes + 8).astype(np.uint8)
    if group == "channel":
        pairs = np.broadcast_to(np.array([1, 120], np.uint8), (n, 1, 2)).copy()
        return PackedWeights.pack(unsigned, pairs, np.ascontiguousarray(scales[:, 0]), group)
    size = int(group)
    starts = np.arange(0, k, size)
    values = codes * np.repeat(scales, size, axis=1)[:, :k]
    # The errors of a group's weights are those of its scale times its codes.
    energy = np.add.reduceat(np.square(codes.astype(np.float32)), starts, axis=1)
    largest = scales.max(1, keepdims=True)
    best_error = np.full(n, np.inf)
    best_scale, best_s = np.zeros(n, np.float32), np.ones((n, count), np.uint8)
    for quotient in _QUOTIENTS:
        first = (largest / quotient).astype(np.float32)
        s = np.clip(np.rint(scales / np.where(first > 0, first, 1)), 1, _MOST_S)
        error = (np.square(s * first - scales) * energy).sum(1)
        better = error < best_error
        best_error[better], best_scale[better], best_s[better] = error[better], first[better, 0], s[better]
    pairs = np.stack((best_s, 128 - 8 * best_s), axis=2).astype(np.uint8)
    snapped = PackedWeights.pack(unsigned, pairs, best_scale, group)
    again = PackedWeights.quantize(values.astype(np.float32), group)
    return min(snapped, again, key=lambda weights: float(np.square(weights.dequantize() - values).sum()))
