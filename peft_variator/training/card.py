"""The model card of a trained plugin."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData


__all__ = ["PluginFacts", "RatioFacts", "plugin_card"]

TEMPLATE = """---
{metadata}
---

# Variator plugin for {base}

A compression plugin (Variator, [Xiao et al. 2023](https://arxiv.org/abs/2310.15724)) made with
peft-variator. It merges k neighbouring tokens before every feed-forward
network of the base model and expands them after it, which saves computation at some cost in quality.

- Base model: `{base}`
- Compression ratio k: {ratios}
- Parameters added: {parameters:,}
- Trained on: `{data}`, {steps} steps

{table}

FLOPs saved are those of one batch of the held-out data, counted with torch's `FlopCounterMode`. Quality is fidelity
to the base model on {held_out} held-out examples: the mean cosine of the last hidden states of real tokens, their
relative error ‖plugin − base‖ / ‖base‖{agreement}. "Before" is the plugin as training found it.

## Use

`import peft_variator` comes first: it makes the method known to PEFT, which fails with `KeyError: 'VARIATOR'` without.

```python
import peft_variator
from peft import PeftModel
from transformers import {model_class}

model = {model_class}.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {name!r}).eval()
{switch}```

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


def plugin_card(facts: PluginFacts) -> ModelCard:
    """The model card of a plugin, with metadata that the Hub understands."""
    head, *rows = facts.rows()
    lines = [head, ["---:"] * len(head), *rows]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    agreement = ", and the share of predictions that agree" if "agreement" in facts.ratios[0].after else ""
    content = TEMPLATE.format(
        metadata=ModelCardData(base_model=facts.base, library_name="peft", tags=TAGS).to_yaml(),
        base=facts.base,
        ratios=", ".join(str(each.ratio) for each in facts.ratios),
        parameters=facts.parameters,
        data=facts.data,
        steps=facts.steps,
        table="\n".join("| " + " | ".join(line) + " |" for line in lines),
        held_out=facts.held_out,
        agreement=agreement,
        model_class=facts.model_class,
        name=facts.name,
        switch=_switch(facts),
        command=facts.command,
        versions=versions,
    )
    return ModelCard(content)


PACKAGES = ("peft-variator", "peft", "transformers", "torch")
TAGS = ["peft-variator", "variator", "compression", "distillation"]


def _switch(facts: PluginFacts) -> str:
    if len(facts.ratios) < 2:
        return ""
    return f"model.set_compression_ratio({facts.ratios[-1].ratio})  # any of the ratios above\n"
