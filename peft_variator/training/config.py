"""Arguments of the distillation trainer."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import SchedulerType, TrainingArguments

from ..field_types import check_choice, check_field_types, shown, whole_number
from ..pooling import check_pooling


__all__ = ["DistillationConfig"]

HIDDEN_LOSSES = ("last", "all")
LOSS_AT_A_RATIO = re.compile(r"loss_k\d+$")
"""What a metric is called that is a loss at one of several ratios."""


@dataclass
class DistillationConfig(TrainingArguments):
    """`TrainingArguments` with the weights of the losses that tie a student to its dense teacher.

    The loss is `hidden_weight` · hidden-state loss + `logits_weight` · KL + `task_weight` · task loss
    + `embedding_weight` · embedding loss. Every part is a mean over real tokens (predictions, labels,
    examples) of the whole accumulated batch on all processes, so it does not depend on how that batch was cut up.
    Three defaults differ from `TrainingArguments`: `learning_rate` 2e-3, `lr_scheduler_type` "cosine" and
    `warmup_steps` 0.1 (a tenth of the steps), which suit adapters that start from zero; everything
    else keeps its meaning and its default.

    Raises:
        ValueError: a weight is negative, all weights are zero, or another field has a value that is not allowed.
    """

    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate; 2e-3 suits fresh plugins."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule after the warm-up."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warm-up: a number of steps, or below 1 a fraction of all steps."}
    )
    hidden_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the hidden-state loss: the mean squared error to the teacher's hidden states divided "
            "by their variance over real tokens, so that 1.0 is what predicting their mean would give."
        },
    )
    logits_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(teacher ‖ student) over the logits of used predictions, in nats."}
    )
    task_weight: float = field(default=0.0, metadata={"help": "Weight of the model's own loss on the labels."})
    embedding_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the embedding loss: 1 − cosine to the teacher's embedding of the whole input."},
    )
    embedding_pooling: str = field(
        default="mean",
        metadata={
            "help": "What the embedding is made of: `mean` of the last hidden states over real tokens, `cls` (or "
            "`first`), the first real token, or `lasttoken`, `max`, `mean_sqrt_len_tokens`, `weightedmean` as in "
            "sentence-transformers."
        },
    )
    hidden_loss: str = field(
        default="all",
        metadata={
            "help": "`all` compares the output of every layer, each by its own variance, and averages; `last` "
            "compares the last hidden states only, as in the paper."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both softmaxes in the KL, which is multiplied by its square."}
    )
    ratios: list[int] | None = field(
        default=None,
        metadata={
            "help": "Compression ratios for one Variator plugin that serves many: one is drawn for every optimizer "
            "step, from `seed` and the step alone. `None` trains at the ratio the plugin has."
        },
    )
    base_dropout: bool = field(
        default=False,
        metadata={
            "help": "Whether the frozen base keeps its dropout in the student. `False` turns it off (the adapter's "
            "own dropout stays): the teacher has none, and noise that no adapter can undo only hides the error."
        },
    )
    variance_samples: int = field(
        default=64,
        metadata={"help": "Number of training examples from which the variances of the hidden states are measured."},
    )
    fit_samples: int = field(
        default=256,
        metadata={
            "help": "Number of training examples on which the correction of a new plugin is fitted by least squares "
            "before the first step; 0 leaves it as it is, the base model's neurons."
        },
    )

    def __post_init__(self) -> None:
        self.check()
        changed = self._changed_fields()
        # `TrainingArguments` take what does not end in "loss" for something to maximise.
        if self.greater_is_better is None and LOSS_AT_A_RATIO.search(self.metric_for_best_model or ""):
            self.greater_is_better: bool | None = False
        try:
            super().__post_init__()
        except ImportError:
            raise
        # what TrainingArguments raise, and whether they say where, is up to each field
        except Exception as error:
            if any(name in str(error) for name in changed):
                raise
            given = ", ".join(f"{name}={shown(value)}" for name, value in changed.items())
            raise ValueError(f"TrainingArguments do not take these together: {given}. {shown(error)}") from error

    def check(self) -> None:
        """Check every field, as when the arguments were made: fields may have been set since.

        Raises:
            ValueError: a field has a value that is not allowed; the message names it and what is.
        """
        check_field_types(self, inherited_from=TrainingArguments)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, [schedule.value for schedule in SchedulerType])
        self._check_weights()
        check_choice("hidden_loss", self.hidden_loss, HIDDEN_LOSSES)
        check_pooling(self.embedding_pooling, "embedding_pooling")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} has to be a number greater than 0.")
        whole_number("variance_samples", self.variance_samples, 1)
        whole_number("fit_samples", self.fit_samples, 0)
        self._check_ratios()
        if self.neftune_noise_alpha is not None and not self.base_dropout:
            raise ValueError(
                f"neftune_noise_alpha={self.neftune_noise_alpha!r} is noise on the base's embeddings, which are in "
                "evaluation mode with base_dropout=False and would have none. Leave it out, or set base_dropout=True."
            )

    def _changed_fields(self) -> dict[str, Any]:
        """The fields that were passed, as far as their values tell."""
        defaults = {
            item.name: item.default if item.default_factory is MISSING else item.default_factory()
            for item in fields(self)
            if item.init
        }
        values = {name: getattr(self, name) for name in defaults}
        return {name: value for name, value in values.items() if shown(value) != shown(defaults[name])}

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Number of warm-up steps; at least one step follows them, as the first one has a rate of 0."""
        return max(0, min(super().get_warmup_steps(num_training_steps), num_training_steps - 1))

    def _check_weights(self) -> None:
        names = ("hidden_weight", "logits_weight", "task_weight", "embedding_weight")
        for name in names:
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name}={value!r} has to be a number, 0 or greater.")
        if not any(getattr(self, name) for name in names):
            raise ValueError(f"{', '.join(names)} are all 0, so there is nothing to train for. Set one above 0.")

    def _check_ratios(self) -> None:
        if self.ratios is None:
            return
        if not self.ratios:
            raise ValueError("ratios=[] holds nothing to draw from. Name ratios of 2 or more, or leave it None.")
        for ratio in self.ratios:
            if ratio < 2:
                raise ValueError(
                    f"ratios={self.ratios!r} holds {ratio!r}; every ratio has to be an integer of at least 2 (at 1 "
                    "the plugin is not used, so there is nothing to train)."
                )
