"""The results as a table for the terminal and as Markdown."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from results import Results, Row
from rich import box
from rich.table import Table

from peft_variator import markdown
from peft_variator.profiling import was_busy


__all__ = ["make_card", "make_markdown", "make_notes", "make_table"]

BASE = "sentence-transformers/all-MiniLM-L6-v2"

CARD = """---
{metadata}
---

# Variator plugin for {base}

One compression plugin ([Xiao et al. 2023](https://arxiv.org/abs/2310.15724)) for the ratios k = 4, 16 and 32, made by
the quickstart of peft-variator from Python's own documentation. It is a demonstration: train longer, on text like
yours.

{table}

## Use

`import peft_variator` comes first: it makes the method known to PEFT, which fails with `KeyError: 'VARIATOR'` without.

```python
import peft_variator
from peft import PeftModel
from transformers import AutoModel

model = AutoModel.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "outputs/quickstart/plugin")
model.set_compression_ratio(4)  # 1 is the base itself; 32, unless set
```
"""

STSB = "STS-B"
HEADERS = ["speed-up", "FLOPs saved", "cosine to base", "relative error", "same neighbour"]


def make_table(results: Results) -> Table:
    """One line a ratio, with quartiles where there are any."""
    title = "all-MiniLM-L6-v2 with one plugin and without, on text that it was not trained on"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("")
    for header in _headers(results):
        table.add_column(header.replace(" ", "\n", 1), justify="right")
    for row in results.rows:
        table.add_row(row.name, *(cell.replace(" ", "\n", 1) for cell in _cells(row)))
    return table


def make_markdown(results: Results) -> str:
    """The same table, with what it was measured on."""
    table = markdown.make_table(["", *_headers(results)], [[row.name, *_cells(row)] for row in results.rows])
    return "\n".join([table, "", *(f"- {note}" for note in make_notes(results))])


def _headers(results: Results) -> list[str]:
    return HEADERS if results.stsb is None else [*HEADERS, STSB]


def _cells(row: Row) -> list[str]:
    speedup, quality = row.speedup, row.quality
    cosines = quality.cosine_spread
    return [
        f"{speedup.median:.2f}× ({speedup.low:.2f}–{speedup.high:.2f})",
        f"{row.flops_saved:.1%}",
        f"{quality.cosine:.4f} ({cosines.low:.4f}–{cosines.high:.4f})",
        f"{quality.relative_error:.1%}",
        f"{quality.agreement:.1%} (±{quality.agreement_error:.1%})",
        *([] if row.stsb is None else [f"{row.stsb:.2f}"]),
    ]


def make_card(results: Results) -> ModelCard:
    """The model card of the plugin: how to load it, and what it was measured to do."""
    data = ModelCardData(base_model=BASE, library_name="peft", tags=["peft-variator", "variator", "compression"])
    return ModelCard(CARD.format(metadata=data.to_yaml(), base=BASE, table=make_markdown(results)))


def make_notes(results: Results) -> list[str]:
    """What the figures are, and what they were measured on."""
    settings, seconds, parameters = results.settings, results.seconds, results.parameters
    return [
        f"Speed-up: medians (quartiles) of {settings['rounds']} rounds, all in turn, "
        f"{settings['timed_batch']} sequences of {settings['max_tokens']} tokens, no padding, float32 unless named.",
        f"Cosine: mean (quartiles) over {results.text['held_out_paragraphs']} held-out paragraphs; same neighbour: "
        "share of them whose nearest other paragraph is the base's (± standard error).",
        *([] if results.stsb is None else [_about_stsb(results)]),
        f"Plugin: {parameters['plugin']:,} parameters beside {parameters['base']:,} of the base; "
        f"{settings['steps']} steps of {settings['batch_size']} texts, seed {settings['seed']}, "
        f"products in {'bfloat16' if settings['bf16'] else 'float32'}, "
        f"{seconds['training']:.0f} s of training in a run of {seconds['total']:.0f} s.",
        *_machine_notes(results.environment),
        f"Command: {results.command}",
    ]


def _about_stsb(results: Results) -> str:
    pairs = results.text["stsb_pairs"]
    return f"STS-B: Spearman's correlation with people's scores of {pairs} pairs, in percent; base {results.stsb:.2f}."


def _machine_notes(environment: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {environment[name]}" for name in ("peft-variator", "peft", "torch", "transformers"))
    notes = [
        f"{environment['cpu']}, {environment['cores']} cores, threads: {environment['threads']}; "
        f"{environment['date']}.",
        f"Python {environment['python']}, {versions}.",
    ]
    if was_busy(environment):
        notes.append("Other programs ran beside it: its times and speed-ups are not to be trusted.")
    return notes
