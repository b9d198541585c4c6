"""Calibration data: checking what the user hands in, and making batches from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from peft_variator.sparsity.calls import Batch


__all__ = ["check_batches"]


def _check_tensor(number: int, key: str, value: Tensor) -> None:
    if value.numel() == 0:
        raise ValueError(f"Calibration batch {number} is empty: {key} has shape {tuple(value.shape)}.")
    if value.is_floating_point() and value.isnan().any():
        raise ValueError(f"Calibration batch {number} holds NaN in {key}. Check how the data was prepared.")


def check_batches(calibration: Iterable[Batch] | None) -> list[Batch]:
    """The calibration batches as a list.

    Raises:
        ValueError: there are none, or one is empty or holds NaN.
        TypeError: one is neither a mapping nor a tensor.
    """
    batches = [] if calibration is None else list(calibration)
    if not batches:
        what = "missing" if calibration is None else "empty"
        raise ValueError(
            f"The calibration set is {what}. Pass calibration=, an iterable of at least one batch; only uniform "
            "magnitude pruning works without."
        )
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Mapping, Tensor)):
            raise TypeError(
                f"Calibration batch {number} is a {type(batch).__name__}. A batch is a dict of what the model's "
                "forward takes (as a tokenizer or processor returns it), or one tensor."
            )
        named = batch.items() if isinstance(batch, Mapping) else [("the tensor", batch)]
        for key, value in named:
            if isinstance(value, Tensor):
                _check_tensor(number, repr(key), value)
    return batches
