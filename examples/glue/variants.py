"""How a plugin is made: the main way, and the others that the ablations compare it with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_variator import VariatorConfig


__all__ = ["VARIANTS", "Variant"]


@dataclass(frozen=True)
class Variant:
    """How a plugin is made.

    Args:
        ratios: compression ratios it is trained for and tested at.
        hidden_loss: which hidden states are compared.
        keeps_tokens: whether special tokens and both ends of a text stay out of the groups.
        fields: further fields of the plugin's configuration.
        is_pretrained: whether it has seen plain text before the task.
        task_weight: weight of the task's own loss in the adaptation, beside the teacher's hidden states and logits.
        shipped: name of the plugin in `examples/plugins` that has seen plain text already; `None`: one is made here.
        learning_rate: the peak of the adaptation.
    """

    ratios: tuple[int, ...] = (2, 4, 8)
    hidden_loss: str = "all"
    keeps_tokens: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    is_pretrained: bool = True
    task_weight: float = 1.0
    shipped: str | None = None
    learning_rate: float = 2e-3

    @property
    def stage_one(self) -> Variant:
        """What decides how the plugin is distilled on plain text."""
        return replace(self, task_weight=0.0)

    def config(self, tokenizer: PreTrainedTokenizerBase) -> VariatorConfig:
        """The plugin's configuration."""
        fields = {"compression_ratio": self.ratios[0], "decompression": "bottleneck", **self.fields}
        if self.keeps_tokens:
            return VariatorConfig.from_tokenizer(tokenizer, **fields)
        return VariatorConfig(keep_first_tokens=0, keep_last_tokens=0, **fields)


VARIANTS: dict[str, Variant] = {
    "main": Variant(),
    "no-kept-tokens": Variant(keeps_tokens=False),
    "last-layer-loss": Variant(hidden_loss="last"),
    "no-pretraining": Variant(is_pretrained=False),
    "no-task-loss": Variant(task_weight=0.0),
    # The default form, as it is shipped: copied neurons, with compensation.
    "neurons": Variant(ratios=(4, 8, 16), task_weight=0.0, shipped="all-MiniLM-L6-v2", learning_rate=1e-3),
    "one-ratio": Variant(ratios=(4,)),
    "one-ratio-concat": Variant(ratios=(4,), fields={"scoring": "concat"}),
}
