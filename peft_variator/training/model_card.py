"""The model cards of a trained plugin, and of a SparseLoRA adapter that restores a pruned model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCard

from ..adapter_card import CardContent, loading_code, make_card, measured, pipeline_tag, usage
from ..markdown import make_table
from ..version import __version__


__all__ = ["PluginFacts", "RatioFacts", "RestoredFacts", "plugin_card", "restored_card"]

PACKAGES = ("peft", "transformers", "torch")

PLUGIN_TAGS = ["peft-variator", "variator", "compression", "distillation"]

PLUGIN_TEMPLATE = """# Variator plugin for {base}

A compression plugin (Variator, [Xiao et al. 2023](https://arxiv.org/abs/2310.15724)) made with
peft-variator. It merges k neighbouring tokens before {merged_around} of the base model and expands them after it,
which saves computation at some cost in quality.

- Base model: `{base}`
- Compression ratio k: {ratios}
- Parameters added: {parameters:,}
- Trained on: `{data}`, {steps} steps

{table}

FLOPs saved are those of one batch of the held-out data, counted with torch's `FlopCounterMode`. Quality is fidelity
to the base model on {held_out} held-out examples: the mean cosine of the last hidden states of real tokens, their
relative error ‖plugin − base‖ / ‖base‖{agreement}. "Before" is the plugin as training found it.
{verdict}
{usage}
## Reproduce

```
{command}
```

With {versions}.
"""


@dataclass(frozen=True)
class RatioFacts:
    """What is known about a plugin at one compression ratio.

    Args:
        ratio: the compression ratio k.
        flops_base: floating-point operations of the base model on a batch.
        flops_plugin: the same with the plugin.
        before: fidelity to the base before training, by name.
        after: the same after training.
    """

    ratio: int
    flops_base: int
    flops_plugin: int
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def flops_saved(self) -> float:
        """Share of the base model's operations that the plugin saves, 0 to 1."""
        return 1 - self.flops_plugin / self.flops_base

    @property
    def pays(self) -> bool:
        """Whether the plugin saves operations at all."""
        return self.flops_plugin < self.flops_base


@dataclass(frozen=True)
class PluginFacts:
    """What a model card says.

    Args:
        base: the base model, as `from_pretrained` takes it.
        model_class: name of transformers' class that it was loaded with.
        name: where the plugin is.
        data: what it was trained on.
        steps: number of optimizer steps.
        held_out: number of held-out examples.
        parameters: number of parameters added.
        command: the command that made it.
        ratios: what is known about each ratio.
        merged_around: what it merges around, in words.
    """

    base: str
    model_class: str
    name: str
    data: str
    steps: int
    held_out: int
    parameters: int
    command: str
    ratios: Sequence[RatioFacts]
    merged_around: str = "every feed-forward network"

    def rows(self) -> list[list[str]]:
        """A table, its head first: for each ratio the FLOPs saved, and each measure before and after training."""
        measures = list(self.ratios[0].after)
        head = ["k", "FLOPs saved", *(f"{name.replace('_', ' ')}, before → after" for name in measures)]
        rows = [
            [str(facts.ratio), f"{facts.flops_saved:.1%}"]
            + [f"{facts.before[name]:.4f} → {facts.after[name]:.4f}" for name in measures]
            for facts in self.ratios
        ]
        return [head, *rows]

    @property
    def verdict(self) -> str | None:
        """At which ratios the plugin costs more than it saves, `None` if it pays at all of them."""
        losing = [facts for facts in self.ratios if not facts.pays]
        if not losing:
            return None
        each = ", ".join(f"{-facts.flops_saved:.1%} more at k = {facts.ratio}" for facts in losing)
        return (
            f"The plugin does not pay at k = {', '.join(str(facts.ratio) for facts in losing)}: it takes as many "
            f"operations as the base model or more ({each}). Choose a larger k, a narrower correction or longer texts."
        )


def plugin_card(facts: PluginFacts, license: str | None = None) -> ModelCard:
    """The model card of a plugin, with metadata that the Hub understands."""
    head, *rows = facts.rows()
    switch = [f"model.set_compression_ratio({facts.ratios[-1].ratio})  # any of the ratios above"]
    switch = switch if len(facts.ratios) > 1 else []
    after = facts.ratios[0].after
    agreement = ", and the share of predictions that agree" if "agreement" in after else ""
    agreement += ", and how far scores are from the base's" if "score_error" in after else ""
    body = PLUGIN_TEMPLATE.format(
        base=facts.base,
        merged_around=facts.merged_around,
        ratios=", ".join(str(each.ratio) for each in facts.ratios),
        parameters=facts.parameters,
        data=facts.data,
        steps=facts.steps,
        table=make_table(head, rows, text_columns=0),
        held_out=facts.held_out,
        agreement=agreement,
        verdict="" if facts.verdict is None else f"\n**{facts.verdict}**\n",
        usage=usage(loading_code(facts.base, facts.model_class, facts.name, ["model.eval()", *switch])),
        command=facts.command,
        versions=_versions(),
    )
    task = pipeline_tag(facts.model_class)
    return make_card(
        CardContent(
            body=body,
            base=facts.base,
            tags=PLUGIN_TAGS,
            pipeline_tag=task,
            license=license,
            name=f"Variator plugin for {facts.base}",
            results=[
                measured(measure, value, each.ratio, task)
                for each in facts.ratios
                for measure, value in each.after.items()
            ],
        )
    )


RESTORED_TAGS = ["peft-variator", "sparse-lora", "pruning", "sparsity"]
LOSS_NAMES = {
    "task": "task loss (nats a prediction)",
    "logits": "KL from the dense model (nats a prediction)",
    "hidden": "error of the hidden states (share of their variance)",
    "encoder_hidden": "error of the encoder's states (share of their variance)",
    "decoder_hidden": "error of the decoder's states (share of their variance)",
}

RESTORED_TEMPLATE = """# SparseLoRA adapter for {base}

Low-rank updates under the mask of a pruned model (SparseLoRA, [He et al. 2024](https://arxiv.org/abs/2404.02424)),
made with peft-variator. Merged, they leave every pruned weight at zero.

- Base model: `{base}`
- {modules} modules are adapted; {masked:.2%} of their weights are masked
- Parameters trained: {parameters:,}
- Trained on: `{data}`, {steps} steps; loss: {loss}
- Dense model followed: {teacher}

{table}

Means over {held_out} held-out examples that were not trained on.

{usage}
## Reproduce

```
{command}
```

With {versions}.
"""


@dataclass(frozen=True)
class RestoredFacts:
    """What a model card says.

    Args:
        base: the model under the adapter, as `from_pretrained` takes it.
        model_class: name of transformers' class that it was loaded with.
        name: where the adapter is.
        data: what it was trained on.
        teacher: the dense model that was followed, if any.
        weights: weights of the parts of the loss, by field of `DistillationConfig`.
        steps: number of optimizer steps.
        held_out: number of held-out examples.
        parameters: number of parameters trained.
        modules: number of modules with an adapter.
        masked: share of their weights that are masked, 0 to 1.
        command: the command that made it.
        losses: held-out losses by part, of the "dense" (may be empty), the "pruned" and the "restored" model.
    """

    base: str
    model_class: str
    name: str
    data: str
    teacher: str | None
    weights: Mapping[str, float]
    steps: int
    held_out: int
    parameters: int
    modules: int
    masked: float
    command: str
    losses: Mapping[str, Mapping[str, float]]

    def rows(self) -> list[list[str]]:
        """A table, its head first: each part of the loss of the dense, the pruned and the restored model."""
        states = ("dense", "pruned", "restored")
        rows = [
            [
                LOSS_NAMES[part],
                *(f"{self.losses[state][part]:.4f}" if part in self.losses[state] else "" for state in states),
            ]
            for part in self.losses["pruned"]
        ]
        return [["held-out", *states], *rows]

    @property
    def code(self) -> list[str]:
        """Lines of Python that load and merge the adapter."""
        merging = ["model = model.merge_and_unload(safe_merge=True)  # as sparse as the pruned model"]
        return loading_code(self.base, self.model_class, self.name, [*merging, "model.save_pretrained('restored')"])


def restored_card(facts: RestoredFacts, license: str | None = None) -> ModelCard:
    """The model card of an adapter, with metadata that the Hub understands."""
    head, *rows = facts.rows()
    parts = {name.removesuffix("_weight"): weight for name, weight in facts.weights.items() if weight}
    body = RESTORED_TEMPLATE.format(
        base=facts.base,
        modules=facts.modules,
        masked=facts.masked,
        parameters=facts.parameters,
        data=facts.data,
        steps=facts.steps,
        loss=" + ".join(f"{weight:g} · {name}" for name, weight in parts.items()),
        teacher="none" if facts.teacher is None else f"`{facts.teacher}`",
        table=make_table(head, rows),
        held_out=facts.held_out,
        usage=usage(facts.code),
        command=facts.command,
        versions=_versions(),
    )
    task = pipeline_tag(facts.model_class)
    return make_card(
        CardContent(
            body=body,
            base=facts.base,
            tags=RESTORED_TAGS,
            pipeline_tag=task,
            license=license,
            name=f"SparseLoRA adapter for {facts.base}",
            results=[
                measured(part, value, task=task, name=LOSS_NAMES[part])
                for part, value in facts.losses["restored"].items()
            ],
        )
    )


def _versions() -> str:
    """What the adapter was made with."""
    others = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return ", ".join((f"peft-variator {__version__}", *others))
