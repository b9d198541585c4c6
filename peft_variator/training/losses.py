"""The losses: pure functions of student, teacher and a mask.

Each gives sums per example and what they are sums of, so that a mean can be taken over any set of examples: a
micro-batch, an accumulated batch on several processes, or an evaluation set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from ..pooling import pool


__all__ = [
    "LossSums",
    "embedding_loss",
    "full_precision",
    "hidden_state_loss",
    "items_per_example",
    "kl_loss",
    "labels_kl_loss",
]


_NUMBERS_AT_A_TIME = 1 << 21
"""Of logits that are compared: 8 MiB in float32, which processors keep near."""


@dataclass(frozen=True)
class LossSums:
    """A loss as sums over the items (tokens, predictions, labels) of each example.

    Args:
        errors: shape `(batch,)`, errors summed over an example's items.
        items: shape `(batch,)`, number of items in each example.
    """

    errors: Tensor
    items: Tensor

    def mean(self) -> Tensor:
        """Mean over all items of all examples, a scalar; 0 where there is no item."""
        return self.errors.sum() / self.items.sum().clamp(min=1)


def full_precision(values: Tensor) -> Tensor:
    """`values` in float32 where they are in half precision, which is too coarse for sums of squares."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _check_alike(student: Tensor, teacher: Tensor, mask: Tensor | None, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"The {what} of student and teacher have shapes {tuple(student.shape)} and {tuple(teacher.shape)}; they "
            "must be alike. Choose a teacher of the same architecture."
        )
    if mask is not None and mask.shape != student.shape[:-1]:
        raise ValueError(
            f"The mask of the {what} has shape {tuple(mask.shape)} and the {what} have shape {tuple(student.shape)}; "
            f"the mask must be {tuple(student.shape[:-1])}."
        )


def _sum_per_example(values: Tensor, mask: Tensor) -> Tensor:
    """Sum `values`, one for each `True` of `mask` (batch, ...) in order, over each example; shape `(batch,)`."""
    example = mask.nonzero()[:, 0]
    return values.new_zeros(mask.shape[0]).index_add(0, example, values)


def items_per_example(mask: Tensor) -> Tensor:
    """Number of items that count in each example.

    Args:
        mask: bool, shape `(batch, ...)`.

    Returns:
        Tensor: integers, shape `(batch,)`.
    """
    return mask.long().sum(tuple(range(1, mask.dim()))) if mask.dim() > 1 else mask.long()


def hidden_state_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None, variance: Tensor
) -> LossSums:
    """Mean squared error of hidden states in units of the teacher's variance, averaged over layers.

    Xiao et al. 2023 (https://arxiv.org/abs/2310.15724, section 3.3) take the plain error of the last layer. Dividing
    by the variance makes layers comparable: 1.0 is the loss of predicting the mean of the teacher's hidden states.

    Args:
        student: one tensor a layer, shape `(batch, length, dim)`.
        teacher: the same of the teacher; its gradients are not taken.
        mask: real tokens, bool of shape `(batch, length)`. Others do not count, whatever they hold. `None` for images:
            all tokens are real and every example is one item (the mean over its tokens).
        variance: shape `(layers,)`, from [`HiddenStateVariance`].

    Returns:
        LossSums: errors, and the number of real tokens (1 without a mask), of each example.

    Raises:
        ValueError: the number of layers or the shapes do not agree.
    """
    if not len(student) == len(teacher) == len(variance):
        raise ValueError(
            f"There are {len(student)} layers of the student, {len(teacher)} of the teacher and {len(variance)} "
            "variances; the numbers must be alike. Choose a teacher of the same architecture."
        )
    layers = zip(student, teacher, variance, strict=True)
    errors = [_squared_error(states, target, mask) / scale for states, target, scale in layers]
    total = torch.stack(errors).mean(0)
    return LossSums(total, torch.ones_like(total, dtype=torch.long) if mask is None else items_per_example(mask))


def _squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error, a mean over `dim`: summed over real tokens, or without mask their mean; shape `(batch,)`."""
    _check_alike(student, teacher, mask, "hidden states")
    if mask is None:
        return (full_precision(student) - full_precision(teacher.detach())).square().flatten(1).mean(1)
    # Real tokens are picked rather than multiplied by 0 and 1: padding may hold NaN, and NaN · 0 is NaN.
    difference = full_precision(student[mask]) - full_precision(teacher.detach()[mask])
    return _sum_per_example(difference.square().mean(-1), mask)


def embedding_loss(student: Tensor, teacher: Tensor, mask: Tensor | None, pooling: str = "mean") -> LossSums:
    """1 − cosine of the embeddings of whole inputs, which is what similarity search sees.

    Args:
        student: last hidden states, shape `(batch, length, dim)`.
        teacher: the same of the teacher; its gradients are not taken.
        mask: real tokens, bool of shape `(batch, length)`; `None`: all of them.
        pooling: a name in `peft_variator.pooling.POOLINGS`.

    Returns:
        LossSums: the distance of each example, and 1, or 0 of an example without a real token.

    Raises:
        ValueError: the shapes do not agree.
    """
    _check_alike(student, teacher, mask, "hidden states")
    if mask is None:
        mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    found = mask.any(1)
    # An example without a real token has the pooling of its padding, and no distance.
    counted = mask | ~found.unsqueeze(1)
    mine, target = (
        pool(full_precision(states).masked_fill(~mask.unsqueeze(-1), 0), counted, pooling)
        for states in (student, teacher.detach())
    )
    distance = 1 - nn.functional.cosine_similarity(mine, target)
    return LossSums(distance.masked_fill(~found, 0), found.long())


def kl_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0, classes: Tensor | None = None
) -> LossSums:
    """KL(teacher ‖ student) of the softmax at a temperature, times its square (Hinton et al. 2015, section 2.1).

    The square keeps the size of the gradients independent of the temperature.

    Args:
        student: logits, shape `(batch, ..., classes)`.
        teacher: the same of the teacher; its gradients are not taken.
        mask: predictions that count, bool of shape `(batch, ...)`.
        temperature: divides both logits.
        classes: classes that exist, bool of the logits' shape; `None`: all of them.

    Returns:
        LossSums: divergences in nats, and the number of predictions that count, of each example.

    Raises:
        ValueError: shapes do not agree, or there is one class only, whose divergence is 0 whatever the logits are.
    """
    _check_alike(student, teacher, mask, "logits")
    if student.shape[-1] < 2:
        raise ValueError(
            f"The logits have shape {tuple(student.shape)}: one class only, as in regression, so their KL is always "
            "0. Set logits_weight=0 and use hidden_weight or task_weight."
        )
    rows = mask.flatten().nonzero().flatten()
    flat = [None if logits is None else logits.flatten(0, -2) for logits in (student, teacher.detach(), classes)]
    return LossSums(_sum_per_example(_Divergence.apply(*flat, temperature, rows), mask), items_per_example(mask))


class _Divergence(torch.autograd.Function):
    """T²·KL(teacher ‖ student) of some rows of logits, shape `(rows,)`, differentiable once in the student's.

    Of a vocabulary's size autograd would keep several tensors in float32, and walk through more. Here a few rows at a
    time are, and what is kept is the gradient, T·(softmax(s / T) − softmax(t / T)), in the student's precision.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, classes: Tensor | None, temperature: float, rows: Tensor
    ) -> Tensor:
        divergence = full_precision(student.new_empty(0)).new_empty(rows.shape)
        gradient = student.new_empty(*rows.shape, student.shape[-1]) if ctx.needs_input_grad[0] else None
        size = max(1, _NUMBERS_AT_A_TIME // student.shape[-1])
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            at = rows[chunk]
            log_student, log_teacher = (full_precision(logits[at]) / temperature for logits in (student, teacher))
            if classes is not None:
                absent = ~classes[at]
                log_student, log_teacher = (
                    logits.masked_fill_(absent, -torch.inf) for logits in (log_student, log_teacher)
                )
            log_student, log_teacher = log_student.log_softmax(-1), log_teacher.log_softmax(-1)
            likely = log_teacher.exp()
            # What has no probability counts for nothing, though its logarithm is infinite.
            difference = log_teacher.sub_(log_student).masked_fill_(likely == 0, 0)
            divergence[chunk] = difference.mul_(likely).sum(-1) * temperature**2
            if gradient is not None:
                gradient[chunk] = log_student.exp_().sub_(likely).mul_(temperature).to(gradient.dtype)
        ctx.save_for_backward(gradient, rows)
        ctx.shape = student.shape
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        scaled = gradient * grad.unsqueeze(-1).to(gradient.dtype)
        return gradient.new_zeros(ctx.shape).index_copy_(0, rows, scaled), None, None, None, None


def labels_kl_loss(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> LossSums:
    """As `kl_loss`, where each label is given or not by itself: the sum over the labels of their own divergences.

    Args:
        student: logits, shape `(batch, ..., labels)`.
        teacher: the same of the teacher; its gradients are not taken.
        mask: predictions that count, bool of shape `(batch, ...)`.
        temperature: divides both logits.

    Returns:
        LossSums: divergences in nats, and the number of predictions that count, of each example.

    Raises:
        ValueError: shapes do not agree.
    """
    _check_alike(student, teacher, mask, "logits")
    mine, target = (full_precision(logits[mask]) / temperature for logits in (student, teacher.detach()))
    given, absent = (
        target.mul(sign).sigmoid() * (logsigmoid(sign * target) - logsigmoid(sign * mine)) for sign in (1, -1)
    )
    return LossSums(_sum_per_example((given + absent).sum(-1) * temperature**2, mask), items_per_example(mask))
