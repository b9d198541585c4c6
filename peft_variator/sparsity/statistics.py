"""What a pruning method knows of a layer's inputs, summed up token by token so that no activations are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol


if TYPE_CHECKING:  # torch is imported where it is needed: the command line's help lists the methods without it
    import torch
    from torch import Tensor


__all__ = ["GramStatistics", "InputStatistics", "Statistics"]


class Statistics(Protocol):
    """Sums over the input tokens of one layer."""

    tokens: int

    def __init__(self, width: int, device: torch.device) -> None: ...

    def add(self, inputs: Tensor) -> None:
        """Count in the rows of `inputs` (tokens, width), of any floating dtype."""

    def check(self, name: str) -> None:
        """Raise ValueError if module `name` saw no token, or values that are not finite."""


def _check(name: str, tokens: int, sums: Tensor) -> None:
    if tokens == 0:
        raise ValueError(
            f"The calibration data never reached {name!r}, so nothing says which of its weights matter. Add batches "
            "that use it, or leave it out with exclude_modules."
        )
    if not sums.isfinite().all():
        raise ValueError(
            f"The inputs of {name!r} on the calibration data hold NaN or infinite values. Check the batches, and the "
            "model's dtype: float16 overflows on many models that were trained in bfloat16."
        )


class InputStatistics:
    """Norm, mean and variance of each input feature, summed in float64 (what Wanda and DSnoT need)."""

    def __init__(self, width: int, device: torch.device) -> None:
        import torch

        self.tokens = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._square_sum = torch.zeros_like(self._sum)

    def add(self, inputs: Tensor) -> None:
        """Count in the rows of `inputs` (tokens, width), of any floating dtype."""
        rows = inputs.to(self._sum.device, self._sum.dtype)
        self.tokens += len(rows)
        self._sum += rows.sum(dim=0)
        self._square_sum += rows.square().sum(dim=0)

    def check(self, name: str) -> None:
        """Raise ValueError if module `name` saw no token, or values that are not finite."""
        _check(name, self.tokens, self._square_sum)

    @property
    def norm(self) -> Tensor:
        """The l2 norm of each feature over all tokens, float64 (width,)."""
        return self._square_sum.sqrt()

    @property
    def mean(self) -> Tensor:
        """The mean of each feature, float64 (width,)."""
        return self._sum / self.tokens

    @property
    def variance(self) -> Tensor:
        """The population variance of each feature, float64 (width,)."""
        return (self._square_sum / self.tokens - self.mean.square()).clamp_min(0)


class GramStatistics:
    """The Gram matrix X^T X of the inputs in float32 (what SparseGPT needs): half its Hessian, arXiv 2301.00774."""

    def __init__(self, width: int, device: torch.device) -> None:
        import torch

        self.tokens = 0
        self.gram = torch.zeros(width, width, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Count in the rows of `inputs` (tokens, width), of any floating dtype."""
        rows = inputs.to(self.gram.device, self.gram.dtype)
        self.tokens += len(rows)
        self.gram.addmm_(rows.T, rows)

    def check(self, name: str) -> None:
        """Raise ValueError if module `name` saw no token, or values that are not finite."""
        _check(name, self.tokens, self.gram)
