"""A fingerprint of the weight that a stored mask was made for."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch


__all__ = ["base_fingerprint", "fingerprint", "matches_fingerprint", "same_base"]

_PROJECTIONS = 8
_ROWS_AT_ONCE = 1024  # bounds the float64 copy of a large weight


def fingerprint(weight: torch.Tensor) -> torch.Tensor:
    """What identifies a weight, also after a cast to another floating dtype.

    A hash would change with every cast. These are sums that rounding hardly moves and another weight does: the
    resolution of the dtype, the Frobenius norm, and eight projections uᵀWv on fixed random signs.

    Args:
        weight: floating point (rows, columns).

    Returns:
        int64 (10,): bits of float64 numbers, so that casting a model's floating tensors leaves them alone.
    """
    weight = weight.detach()
    if weight.device.type == "mps":
        weight = weight.cpu()  # no float64 there
    left = _signs(weight.shape[0], seed=0).to(weight.device)
    right = _signs(weight.shape[1], seed=1).to(weight.device)
    sums = torch.zeros(1 + _PROJECTIONS, dtype=torch.float64, device=weight.device)
    for rows, signs in zip(weight.split(_ROWS_AT_ONCE), left.split(_ROWS_AT_ONCE), strict=True):
        rows = rows.double()
        sums[0] += rows.square().sum()
        sums[1:] += (rows @ right).mul_(signs).sum(dim=0)
    sums[0].sqrt_()
    resolution = sums.new_tensor([torch.finfo(weight.dtype).eps])
    return torch.cat([resolution, sums]).view(torch.int64)


def matches_fingerprint(stored: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `weight` (rows, columns) is the one `stored` was taken from, up to a cast to another dtype.

    In the same dtype a relative difference of 1e-9 is told apart; across dtypes, one of about twice the resolution of
    the coarser dtype (1.6 % of the norm for bfloat16).
    """
    expected = stored.cpu().view(torch.float64)
    found = fingerprint(weight).cpu().view(torch.float64)
    resolution = max(expected[0].item(), found[0].item())
    if not 0 < resolution <= torch.finfo(torch.bfloat16).eps:
        return False  # no dtype of a weight is coarser: the numbers are none that `fingerprint` gave
    tolerance = 1e-9 if expected[0] == found[0] else 2 * resolution
    return bool(((expected[1:] - found[1:]).abs() <= tolerance * expected[1]).all())


@lru_cache(maxsize=64)
def _signs(count: int, seed: int) -> torch.Tensor:
    """float64 (count, 8) of ±1, the same on every machine: NumPy never changes the stream of RandomState."""
    return torch.from_numpy(np.random.RandomState(seed).choice([-1.0, 1.0], size=(count, _PROJECTIONS)))


def base_fingerprint(masks: Iterable[torch.Tensor | None]) -> str | None:
    """What identifies the masks of several weights: whether each of a few fixed places of every weight is kept.

    A hash would change with every cast: some weights vanish in float16, one in a hundred in int8. The mask and not the
    weight is asked, as a packed weight may keep a place where it is 0.

    Args:
        masks: M of each module, bool (out, in), in the order of the modules; taken one after the other.

    Returns:
        16 hexadecimal digits a mask, or None if one of the masks is None.
    """
    digits = []
    for mask in masks:
        if mask is None:
            return None
        places = _places(mask.numel())
        rows, columns = torch.from_numpy(np.stack(np.divmod(places, mask.shape[1]))).to(mask.device)
        digits.append(np.packbits(mask[rows, columns].cpu().numpy()).tobytes().hex())
    return "".join(digits)


def same_base(one: str, other: str) -> bool:
    """Whether two texts from `base_fingerprint` are of one base: at most 3 % of the places, and two, may differ."""
    if len(one) != len(other):
        return False
    differing = (int(one, 16) ^ int(other, 16)).bit_count()
    return differing <= 0.03 * 4 * len(one) + 2


@lru_cache(maxsize=64)
def _places(count: int) -> np.ndarray:
    """Indices of 64 weights of `count`, the same on every machine."""
    return np.random.RandomState(0).randint(0, max(count, 1), size=64, dtype=np.int64)
