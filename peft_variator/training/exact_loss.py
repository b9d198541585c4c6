"""A trainer whose losses are means over their own items, whatever the batches are cut into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from .loss_terms import Term
from .losses import LossSums


__all__ = ["ExactLossTrainer"]


# Between the seeds of two epochs, so that a run's order is not another seed's, one epoch later.
EPOCH_STRIDE = 1_000_003


class OrderOfEpoch(Sampler[int]):
    """A sampler by length, whose order follows from a seed and the epoch.

    transformers' own goes on from whatever has been drawn before, which after a resumption is nothing.

    Args:
        sampler: draws the orders.
        seed: of all orders.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + EPOCH_STRIDE * self.epoch)
        return iter(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.epoch = epoch


class ExactLossTrainer(Trainer):
    """Averages every part of the loss over its own items (tokens, predictions, labels), not over micro-batches.

    So a run gives the same whether a batch is cut into micro-batches or spread over processes, and an evaluation the
    same whatever its batches. A subclass sets `terms` and says in `losses` how they are computed.

    Args:
        trainer_arguments: what `Trainer` takes.
    """

    # `compute_loss` divides by the items of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    terms: dict[str, Term]

    def __init__(self, **trainer_arguments: Any) -> None:
        super().__init__(**trainer_arguments)
        self._running = RunningLosses()
        self._evaluation: EvaluationSums | None = None

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """See `Trainer`. The order by length is that of seed and epoch alone, and so the same after a resumption."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return OrderOfEpoch(sampler, seed)
        return sampler

    def losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, LossSums], dict[str, Any]]:
        """The parts of the loss of a batch, by the names in `terms`, and the outputs that the Trainer goes on with."""
        raise NotImplementedError

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and how many items each part of the loss has in all of them.

        Returns:
            The micro-batches, and the items on all processes, float of shape `(parts of the loss,)`.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._running.start_step()
        items = torch.zeros(len(self.terms), device=device)
        for batch in batches:
            items += torch.stack([term.items(batch).sum().to(device) for term in self.terms.values()])
        return batches, self.accelerator.reduce(items, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the parts of the loss; see `Trainer.compute_loss`.

        Args:
            model: the student, wrapped or not; its mode (training or evaluation) decides what is averaged.
            inputs: the batch.
            return_outputs: whether to return the student's outputs too.
            num_items_in_batch: items of each part of the loss in the whole accumulated batch, from
                `get_batch_samples`. Without it, and in evaluation, the mean over this batch is taken.
        """
        is_training = model.training
        losses, outputs = self.losses(model, inputs)
        if is_training and isinstance(num_items_in_batch, Tensor):
            means = self._shares(losses, num_items_in_batch)
            self._running.add(means)
        else:
            means = {name: sums.mean() for name, sums in losses.items()}
        if self._evaluation is not None:
            self._evaluation.add(losses, self.accelerator)
        loss = torch.stack([self.terms[name].weight * mean for name, mean in means.items()]).sum()
        return (loss, outputs) if return_outputs else loss

    def _shares(self, losses: Mapping[str, LossSums], items: Tensor) -> dict[str, Tensor]:
        """What this micro-batch adds to the means over the accumulated batch; scalars by name.

        Data parallelism averages gradients over processes, which the factor makes a sum.
        """
        processes = self.accelerator.num_processes
        return {
            name: sums.errors.sum() * processes / total.clamp(min=1)
            for (name, sums), total in zip(losses.items(), items, strict=True)
        }

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, predictions and labels of an evaluation batch; unlike in `Trainer`, a loss needs no labels."""
        if self.label_names and all(inputs.get(name) is not None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            # Only some configurations have this attribute; the default is that of `Trainer`.
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"])
        predictions = tuple(value for name, value in outputs.items() if name not in [*ignore_keys, "loss"])
        return loss, predictions[0] if len(predictions) == 1 else predictions, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, or predict, with losses that are means over the whole set; see `Trainer.evaluation_loop`."""
        self._evaluation = EvaluationSums({name: term.weight for name, term in self.terms.items()})
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            losses = {f"{metric_key_prefix}_{name}": value for name, value in self._evaluation.losses().items()}
        finally:
            self._evaluation = None
        return output._replace(metrics={**output.metrics, **losses})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; see `Trainer.log`. The parts of the loss are added to the lines of the training loss."""
        if "loss" in logs:
            logs = {**logs, **self._running.drain(self.accelerator)}
        super().log(logs, start_time)


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
