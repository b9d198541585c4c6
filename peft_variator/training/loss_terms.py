"""The parts of the training loss: what each takes from the outputs, what it is a mean over, and its scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from ..models import has_ctc_head, is_in_table
from .config import DistillationConfig
from .loss_masks import (
    CAUSAL,
    EXAMPLES,
    IGNORED_LABEL,
    Inputs,
    Prediction,
    batch_size,
    has_several_labels,
    predicting_tokens,
    prediction_of,
    stacks_of,
    without_streams,
)
from .losses import (
    LossSums,
    embedding_loss,
    full_precision,
    hidden_state_loss,
    items_per_example,
    kl_loss,
    labels_kl_loss,
)


__all__ = [
    "EmbeddingTerm",
    "HiddenStateVariance",
    "HiddenTerm",
    "LogitsTerm",
    "TaskTerm",
    "Term",
    "build_terms",
    "measure_variances",
]


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

    def states(self, outputs: Mapping[str, Any], mask: Tensor | None) -> list[Tensor]:
        """The hidden states that count, one tensor a layer, shape `(batch, length, dim)`.

        Args:
            outputs: of the model.
            mask: real tokens of the batch, or `None`.

        Raises:
            ValueError: the output has none.
        """
        if outputs.get(self.key) is None:
            raise ValueError(
                f"The model returned no {self.key}, only {', '.join(outputs)}, so hidden states cannot be compared. "
                "Set hidden_weight=0 and embedding_weight=0, or train the part of the model that returns them."
            )
        return [without_streams(states, mask) for states in outputs[self.key][self.start :]]

    def loss(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Inputs) -> LossSums:
        """Error of the student's hidden states in units of the teacher's variance, which has to be measured before."""
        if self.variance is None:
            raise RuntimeError(f"The variance of {self.key} has not been measured: call measure_variances first.")
        mask = self.mask(inputs)
        return hidden_state_loss(self.states(student, mask), self.states(teacher, mask), mask, self.variance)


class EmbeddingTerm:
    """Distance of the embeddings of whole inputs.

    Args:
        weight: weight in the sum of losses.
        key: name of the hidden states in the model's output.
        mask: takes a batch, gives its real tokens in this stack.
        pooling: see [`embedding_loss`].
    """

    def __init__(self, weight: float, key: str, mask: Callable[[Inputs], Tensor | None], pooling: str) -> None:
        self.weight, self.pooling = weight, pooling
        self.stack = HiddenTerm(weight, key, mask, last_only=True)

    def items(self, inputs: Inputs) -> Tensor:
        """1 for each example with a real token."""
        return self.stack.items(inputs).clamp(max=1)

    def loss(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Inputs) -> LossSums:
        """1 − cosine of the embeddings."""
        mask = self.stack.mask(inputs)
        states, targets = (self.stack.states(outputs, mask)[0] for outputs in (student, teacher))
        return embedding_loss(states, targets, mask, self.pooling)


class LogitsTerm:
    """KL divergence of the predictions that count.

    Args:
        weight: weight in the sum of losses.
        prediction: how the logits are read.
        temperature: divides the logits.
        problem: `problem_type` of a classifier's configuration; `None`: read off the labels.
    """

    def __init__(self, weight: float, prediction: Prediction, temperature: float, problem: str | None = None) -> None:
        self.weight, self.prediction, self.temperature, self.problem = weight, prediction, temperature, problem

    def items(self, inputs: Inputs) -> Tensor:
        """Predictions that count in each example."""
        return items_per_example(self.prediction.mask(inputs))

    def loss(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Inputs) -> LossSums:
        """KL(teacher ‖ student)."""
        logits = self.prediction.logits(student)
        mask, classes = self.prediction.mask(inputs), self.prediction.classes(inputs, logits)
        if has_several_labels(self.problem, self.prediction, inputs):
            return labels_kl_loss(logits, self.prediction.logits(teacher), mask, self.temperature)
        return kl_loss(logits, self.prediction.logits(teacher), mask, self.temperature, classes)


class TaskTerm:
    """The model's own loss on the labels.

    transformers' models average it over a micro-batch, some over the number of labels that the Trainer announces and
    others not. Here it is the mean over a micro-batch times the number of labels in it, which adds up exactly.

    Args:
        weight: weight in the sum of losses.
        label_name: name of the labels in a batch.
        shifted: whether label t is predicted at position t - 1, so that the first one does not count.
        mean_loss: takes the output and a batch, gives the model's loss on the batch's labels.
        counting: what the model's loss is a mean over, or that it is a sum.
    """

    def __init__(
        self,
        weight: float,
        label_name: str,
        shifted: bool,
        mean_loss: Callable[[Any, Inputs], Tensor],
        counting: LabelCounting | None = None,
    ) -> None:
        self.weight, self.label_name, self.shifted, self.mean_loss = weight, label_name, shifted, mean_loss
        self.counting = counting or LabelCounting()

    def items(self, inputs: Inputs) -> Tensor:
        """Labels that count in each example; 1 where each example counts alike.

        Raises:
            ValueError: the batch has no labels.
        """
        labels = inputs.get(self.label_name)
        if labels is None:
            raise ValueError(
                f"task_weight={self.weight} needs labels, and the batch has only {', '.join(inputs)}. Add a column "
                f"{self.label_name!r}, or set task_weight=0."
            )
        if self.counting.by_example:
            return torch.ones(len(labels), dtype=torch.long, device=labels.device)
        return items_per_example(predicting_tokens(inputs) if self.shifted else labels != self.counting.ignored)

    def loss(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Inputs) -> LossSums:
        """The mean loss, shared out over the examples by their labels."""
        items = self.items(inputs)
        if not items.any():
            # The mean over no label is 0 / 0, and NaN times 0 labels would still be NaN.
            return LossSums(torch.zeros_like(items, dtype=torch.float), items)
        loss = self.mean_loss(student, inputs)
        return LossSums((loss / len(items) if self.counting.is_sum else loss) * items, items)


@dataclass(frozen=True)
class LabelCounting:
    """What the loss of a model with a head is taken over.

    Args:
        ignored: the label that does not count.
        by_example: whether examples count alike, however many labels they have.
        is_sum: whether it is the sum over examples and not their mean.
    """

    ignored: int = IGNORED_LABEL
    by_example: bool = False
    is_sum: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> LabelCounting:
        """That of a transformers model: segmentation leaves out another label, CTC has a loss an example."""
        config = getattr(model, "config", None)
        if is_in_table(model, modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES):
            names = ("semantic_loss_ignore_index", "loss_ignore_index")
            return cls(next((getattr(config, name) for name in names if hasattr(config, name)), IGNORED_LABEL))
        if has_ctc_head(model):
            return cls(by_example=True, is_sum=getattr(config, "ctc_loss_reduction", "mean") == "sum")
        return cls()


def build_terms(
    model: nn.Module, args: DistillationConfig, label_names: list[str], mean_loss: Callable[[Any, Any], Tensor]
) -> dict[str, Term]:
    """The parts of the loss that have a weight above 0, by the name under which they are logged.

    Args:
        model: the base model itself, not a wrapper.
        args: weights of the parts.
        label_names: names of the labels in a batch; the first is counted.
        mean_loss: takes the model's output and a batch, gives the mean task loss over the batch's labels.

    Raises:
        ValueError: a part has a weight and the model has nothing it could be computed from.
    """
    terms: dict[str, Term] = {}
    if args.hidden_weight:
        for key, mask in stacks_of(model).items():
            term = HiddenTerm(args.hidden_weight, key, mask, last_only=args.hidden_loss == "last")
            terms[key.removesuffix("_states")] = term
    if args.embedding_weight:
        # Of an encoder–decoder the encoder, whose tokens are the input's.
        key, mask = next(iter(stacks_of(model).items()))
        terms["embedding"] = EmbeddingTerm(args.embedding_weight, key, mask, args.embedding_pooling)
    prediction = prediction_of(model)
    if args.logits_weight:
        if prediction is None and has_ctc_head(model):
            raise ValueError(
                f"logits_weight={args.logits_weight}, and {type(model).__name__} has a CTC head, for which there is "
                "no KL here: its labels belong to no frame. Set logits_weight=0 and use hidden_weight or task_weight."
            )
        if prediction is None:
            raise ValueError(
                f"logits_weight={args.logits_weight} needs a model with a known head, and {type(model).__name__} has "
                "none. Load it with one of transformers' AutoModelFor… classes, or set logits_weight=0."
            )
        config = getattr(model, "config", None)
        problem = getattr(config, "problem_type", None) if prediction is EXAMPLES else None
        if problem == "regression":
            raise ValueError(
                f"{type(model).__name__} has problem_type='regression', whose outputs are no logits. Set "
                "logits_weight=0 and use hidden_weight or task_weight."
            )
        terms["logits"] = LogitsTerm(args.logits_weight, prediction, args.temperature, problem)
    if args.task_weight:
        if not label_names:
            raise ValueError(
                f"task_weight={args.task_weight} needs a model that takes labels, and {type(model).__name__} takes "
                "none. Load it with one of transformers' AutoModelFor… classes, or set task_weight=0."
            )
        counting = LabelCounting.of(model)
        terms["task"] = TaskTerm(args.task_weight, label_names[0], prediction is CAUSAL, mean_loss, counting)
    return terms


class HiddenStateVariance:
    """Running variance of a teacher's hidden states around their mean vector over real tokens, one for each layer.

    Measured once, before training: a fixed scale, rather than one of each micro-batch, keeps the loss a plain mean
    over tokens, the same whether a batch is cut into micro-batches, spread over processes, or resumed half-way.

    Batches are merged as in Chan et al. 1983, "Algorithms for computing the sample variance", equation 2.1, which does
    not lose digits where the mean is far from zero.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.means: list[Tensor] = []
        self.deviations: list[Tensor] = []

    def update(self, layers: Sequence[Tensor], mask: Tensor | None) -> None:
        """Take in a batch.

        Args:
            layers: one tensor a layer, shape `(batch, length, dim)`.
            mask: real tokens, bool of shape `(batch, length)`; `None`: all of them.
        """
        tokens = [full_precision(layer.flatten(0, -2) if mask is None else layer[mask]) for layer in layers]
        if not len(tokens[0]):
            return
        if not self.means:
            self.counts = [0] * len(tokens)
            self.means = [torch.zeros_like(rows[0]) for rows in tokens]
            self.deviations = [rows.new_zeros(()) for rows in tokens]
        for layer, rows in enumerate(tokens):  # of which a hierarchical vision model has fewer in its later stages
            count, total = self.counts[layer], self.counts[layer] + len(rows)
            mean = rows.mean(0)
            shift = mean - self.means[layer]
            spread = (rows - mean).square().mean(1).sum()
            self.deviations[layer] += spread + shift.square().mean() * (count * len(rows) / total)
            self.means[layer] += shift * (len(rows) / total)
            self.counts[layer] = total

    def result(self) -> Tensor:
        """The variances, a mean over `dim`, shape `(layers,)`.

        Raises:
            ValueError: no real token was seen, or the hidden states of a layer are all the same.
        """
        if not self.counts:
            raise ValueError(
                "The batches held no real token, so hidden states have no variance. Check the data's masks."
            )
        per_layer = zip(self.deviations, self.counts, strict=True)
        variance = torch.stack([spread / count for spread, count in per_layer])
        if not bool(((variance > 0) & variance.isfinite()).all()):
            raise ValueError(
                f"The teacher's hidden states have variances {variance.tolist()} over {self.counts[0]} tokens; each "
                "has to be finite and above 0 to compare with. Check the data and the teacher's weights, or use more "
                "variance_samples."
            )
        return variance


def measure_variances(
    terms: Sequence[HiddenTerm], sample: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Give every term the scale of the teacher's hidden states.

    Args:
        terms: parts of the loss.
        sample: batches, each with the teacher's outputs on it.

    Raises:
        ValueError: the batches held no real token, or the hidden states of a layer are all the same.
    """
    variances = [HiddenStateVariance() for _ in terms]
    for inputs, outputs in sample:
        for term, variance in zip(terms, variances, strict=True):
            mask = term.mask(inputs)
            variance.update(term.states(outputs, mask), mask)
    for term, variance in zip(terms, variances, strict=True):
        term.variance = variance.result()
