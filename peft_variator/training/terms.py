"""The parts of the training loss: each knows what it counts in a batch and how far the student is from its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .losses import LossSums, hidden_state_loss, items_per_example, kl_loss
from .masks import IGNORED_LABEL, batch_size, predicting_tokens
from .predictions import Prediction


__all__ = ["HiddenTerm", "LogitsTerm", "TaskTerm", "Term"]

Inputs = Mapping[str, Any]


class Term(Protocol):
    """A part of the loss."""

    weight: float

    def items(self, inputs: Inputs) -> Tensor:
        """Number of items that the loss is a mean over, of each example; shape `(batch,)`."""

    def loss(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Inputs) -> LossSums:
        """The loss of a batch, from the outputs of the student and of the teacher."""


class HiddenTerm:
    """Error of the hidden states of one stack.

    Args:
        weight: weight in the sum of losses.
        key: name of the hidden states in the model's output.
        mask: takes a batch, gives its real tokens in this stack.
        last_only: whether only the last layer counts. Otherwise all do, except the embeddings, which no adapter of a
            layer can change.
    """

    def __init__(
        self, weight: float, key: str, mask: Callable[[Inputs], Tensor | None], last_only: bool = False
    ) -> None:
        self.weight, self.key, self.mask = weight, key, mask
        self.start = -1 if last_only else 1
        self.variance: Tensor | None = None

    def items(self, inputs: Inputs) -> Tensor:
        """Real tokens of each example; 1 where the inputs are images, which count alike."""
        mask = self.mask(inputs)
        return torch.ones(batch_size(inputs), dtype=torch.long) if mask is None else items_per_example(mask)

    def states(self, outputs: Mapping[str, Any]) -> list[Tensor]:
        """The hidden states that count, one tensor a layer, shape `(batch, length, dim)`.

        Raises:
            ValueError: the output has none.
        """
        if outputs.get(self.key) is None:
            raise ValueError(
                f"The model returned no {self.key}, only {', '.join(outputs)}, so hidden states cannot be compared. "
                "Set hidden_weight=0, or train the part of the model that returns them."
            )
        return list(outputs[self.key][self.start :])

    def loss(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Inputs) -> LossSums:
        """Error of the student's hidden states in units of the teacher's variance, which has to be measured before."""
        if self.variance is None:
            raise RuntimeError(f"The variance of {self.key} has not been measured: call measure_variances first.")
        return hidden_state_loss(self.states(student), self.states(teacher), self.mask(inputs), self.variance)


class LogitsTerm:
    """KL divergence of the predictions that count.

    Args:
        weight: weight in the sum of losses.
        prediction: how to read the model's logits.
        temperature: temperature of both softmaxes.
    """

    def __init__(self, weight: float, prediction: Prediction, temperature: float) -> None:
        self.weight, self.prediction, self.temperature = weight, prediction, temperature

    def items(self, inputs: Inputs) -> Tensor:
        """Predictions that count in each example."""
        return items_per_example(self.prediction.mask(inputs))

    def loss(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Inputs) -> LossSums:
        """KL(teacher ‖ student)."""
        logits = self.prediction.logits(student)
        mask, classes = self.prediction.mask(inputs), self.prediction.classes(inputs, logits)
        return kl_loss(logits, self.prediction.logits(teacher), mask, self.temperature, classes)


class TaskTerm:
    """The model's own loss on the labels.

    transformers' models average it over a micro-batch, some over the number of labels that the Trainer announces and
    others not. Here it is the mean over a micro-batch times the number of labels in it, which adds up exactly.

    Args:
        weight: weight in the sum of losses.
        label_name: name of the labels in a batch.
        shifted: whether label t is predicted at position t - 1, so that the first one does not count.
        mean_loss: takes the output and a batch, gives the mean loss over the batch's labels.
    """

    def __init__(
        self, weight: float, label_name: str, shifted: bool, mean_loss: Callable[[Any, Inputs], Tensor]
    ) -> None:
        self.weight, self.label_name, self.shifted, self.mean_loss = weight, label_name, shifted, mean_loss

    def items(self, inputs: Inputs) -> Tensor:
        """Labels other than −100 in each example.

        Raises:
            ValueError: the batch has no labels.
        """
        labels = inputs.get(self.label_name)
        if labels is None:
            raise ValueError(
                f"task_weight={self.weight} needs labels, and the batch has only {', '.join(inputs)}. Add a column "
                f"{self.label_name!r}, or set task_weight=0."
            )
        return items_per_example(predicting_tokens(inputs) if self.shifted else labels != IGNORED_LABEL)

    def loss(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Inputs) -> LossSums:
        """The mean loss, shared out over the examples by their labels."""
        items = self.items(inputs)
        if not items.any():
            # The mean over no label is 0 / 0, and NaN times 0 labels would still be NaN.
            return LossSums(torch.zeros_like(items, dtype=torch.float), items)
        return LossSums(self.mean_loss(student, inputs) * items, items)
