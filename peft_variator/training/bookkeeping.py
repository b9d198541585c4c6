"""Adding up the parts of the loss, between two lines of the log and over an evaluation set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from .losses import LossSums


__all__ = ["EvaluationSums", "RunningLosses"]


class RunningLosses:
    """The parts of the training loss since the last line of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def start_step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Take in what a micro-batch adds to the losses of its step, scalars by name."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach()

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean over steps and processes, by name; all processes have to call it. Starts anew."""
        means = {name: accelerator.reduce(total / self._steps, "mean") for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return {f"{name}_loss": float(mean) for name, mean in means.items()}


class EvaluationSums:
    """Errors and items of every example of an evaluation set, so that its losses do not depend on the batches."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self._totals = torch.zeros(2, len(weights), dtype=torch.float64)

    def add(self, terms: Mapping[str, LossSums], accelerator: Accelerator) -> None:
        """Take in a batch; all processes have to call it. Examples that only fill up a last batch are left out."""
        sums = [(terms[name].errors, terms[name].items) for name in self.weights]
        columns = [torch.stack([errors, items.to(errors)], dim=1) for errors, items in sums]
        gathered = accelerator.gather_for_metrics(torch.stack(columns, dim=2))
        self._totals += gathered.double().sum(0).cpu()

    def losses(self) -> dict[str, float]:
        """The mean of every part, and their weighted sum as `loss`."""
        errors, items = self._totals
        means = dict(zip(self.weights, (errors / items.clamp(min=1)).tolist(), strict=True))
        total = sum(weight * means[name] for name, weight in self.weights.items())
        return {"loss": total} | {f"{name}_loss": mean for name, mean in means.items()}
