"""The model card of a SparseLoRA adapter that restores a pruned model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData


__all__ = ["RestoredFacts", "restored_card"]

PACKAGES = ("peft-variator", "peft", "transformers", "torch")
TAGS = ["peft-variator", "sparse-lora", "pruning", "sparsity"]
NAMES = {
    "task": "task loss (nats a prediction)",
    "logits": "KL from the dense model (nats a prediction)",
    "hidden": "error of the hidden states (share of their variance)",
    "encoder_hidden": "error of the encoder's states (share of their variance)",
    "decoder_hidden": "error of the decoder's states (share of their variance)",
}

TEMPLATE = """---
{metadata}
---

# SparseLoRA adapter for {base}

Low-rank updates under the mask of a pruned model (SparseLoRA, [He et al. 2024](https://arxiv.org/abs/2404.02424)),
made with peft-variator. Merged, they leave every pruned weight at zero.

- Base model: `{base}`
- {modules} modules are adapted; {masked:.2%} of their weights are masked
- Parameters trained: {parameters:,}
- Trained on: `{data}`, {steps} steps; loss: {loss}
- Dense model followed: {teacher}

{table}

Means over {held_out} held-out examples that were not trained on.

## Use

`import peft_variator` comes first: it makes the method known to PEFT, which fails without.

```python
{usage}```

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
                NAMES[part],
                *(f"{self.losses[state][part]:.4f}" if part in self.losses[state] else "" for state in states),
            ]
            for part in self.losses["pruned"]
        ]
        return [["held-out", *states], *rows]

    @property
    def usage(self) -> str:
        """Python code that loads and merges the adapter."""
        return (
            "import peft_variator\n"
            "from peft import PeftModel\n"
            f"from transformers import {self.model_class}\n\n"
            f"model = {self.model_class}.from_pretrained({self.base!r})\n"
            f"model = PeftModel.from_pretrained(model, {self.name!r})\n"
            "model = model.merge_and_unload(safe_merge=True)  # as sparse as the pruned model\n"
            "model.save_pretrained('restored')\n"
        )


def restored_card(facts: RestoredFacts) -> ModelCard:
    """The model card of an adapter, with metadata that the Hub understands."""
    head, *rows = facts.rows()
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    parts = {name.removesuffix("_weight"): weight for name, weight in facts.weights.items() if weight}
    content = TEMPLATE.format(
        metadata=ModelCardData(base_model=facts.base, library_name="peft", tags=TAGS).to_yaml(),
        base=facts.base,
        modules=facts.modules,
        masked=facts.masked,
        parameters=facts.parameters,
        data=facts.data,
        steps=facts.steps,
        loss=" + ".join(f"{weight:g} · {name}" for name, weight in parts.items()),
        teacher="none" if facts.teacher is None else f"`{facts.teacher}`",
        table="\n".join("| " + " | ".join(line) + " |" for line in lines),
        held_out=facts.held_out,
        usage=facts.usage,
        command=facts.command,
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    )
    return ModelCard(content)
