"""`peft-variator pack`, `unpack` and `merge`: a checkpoint on disk is rewritten, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from transformers import AutoConfig

from ..bases import MergeReport, merge_checkpoint, pack_checkpoint, unpack_checkpoint
from ..bases.convert import ConversionReport, OnProgress
from ..models import model_class
from .console import Reporter, next_commands
from .publishing import Publishing


__all__ = ["merge", "pack", "unpack"]

_NOTICE = "Import peft_variator before you load the packed model: transformers alone fills it with random numbers."

Report = TypeVar("Report", bound=ConversionReport)


def pack(
    source: Path,
    output: Path,
    target: Sequence[str] | None,
    ignore: Sequence[str],
    publishing: Publishing,
    reporter: Reporter,
) -> None:
    """Pack the 2:4 layers of a model on disk; see [`pack_checkpoint`]."""
    publishing.check()
    report = _run(
        "Packing", lambda on_progress: pack_checkpoint(source, output, target, ignore, on_progress), reporter
    )
    reporter.say(_NOTICE, f"Converted {report.converted} weights: {_describe_sizes(report)}")
    reporter.say(*_next_steps(report.output, is_packed=True))
    publishing.set_license(output)
    publishing.push(output, reporter)


def unpack(source: Path, output: Path, reporter: Reporter) -> None:
    """Make a packed model on disk dense; see [`unpack_checkpoint`]."""
    report = _run("Unpacking", lambda on_progress: unpack_checkpoint(source, output, on_progress), reporter)
    reporter.say(f"Converted {report.converted} weights: {_describe_sizes(report)}")
    reporter.say(*_next_steps(report.output, is_packed=False))


def merge(
    base: Path, adapter: Path, output: Path, packed: bool | None, publishing: Publishing, reporter: Reporter
) -> None:
    """Merge a SparseLoRA adapter on disk into its base on disk; see [`merge_checkpoint`]."""
    publishing.check()
    report = _run(
        "Merging", lambda on_progress: merge_checkpoint(base, adapter, output, packed, on_progress), reporter
    )
    reporter.say(*_describe_merge(report))
    publishing.set_license(output)
    publishing.push(output, reporter)


def _run(label: str, convert: Callable[[OnProgress], Report], reporter: Reporter) -> Report:
    """Run a conversion under a progress bar, and write its figures where `--json` says."""
    reporter.check()
    with reporter.progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task(label, total=None)
        report = convert(lambda done, total: progress.update(task, completed=done, total=total))
    reporter.write_json(json.dumps(asdict(report), indent=2, default=str))
    return report


def _describe_sizes(report: ConversionReport) -> str:
    """How large the tensors were and are, and where they are."""
    ratio = report.bytes_after / max(report.bytes_before, 1)
    return (
        f"{report.bytes_before / 1e6:,.1f} → {report.bytes_after / 1e6:,.1f} MB ({ratio:.1%}). Saved to "
        f"{report.output}."
    )


def _next_steps(output: Path, *, is_packed: bool) -> list[str]:
    """How to look at it and load it; without the package, transformers would draw packed weights at random."""
    cls = model_class(AutoConfig.from_pretrained(output))
    name = "AutoModel" if cls is None else cls.__name__
    first = ["  import peft_variator"] if is_packed else []
    load = [f"  from transformers import {name}", f"  model = {name}.from_pretrained({str(output)!r})"]
    return [*next_commands(["inspect", output]), "In Python:", *first, *load]


def _describe_merge(report: MergeReport) -> list[str]:
    """What was done, and what to do next."""
    others = f" and replaced {report.replaced} other tensors" if report.replaced else ""
    form = f"{report.packed} packed layers" if report.packed else "dense"
    sizes = _describe_sizes(report)
    lines = [f"Merged {report.merged} weights under their masks{others}; the result is {form}: {sizes}"]
    if report.unmasked:
        lines.append(
            f"Nothing was masked in {len(report.unmasked)} of them, the first being {report.unmasked[0]}: the base "
            "does not prune it, so the whole update went in, as with plain LoRA. Is this the pruned base?"
        )
    notice = [_NOTICE] if report.packed else []
    return [*notice, *lines, *_next_steps(report.output, is_packed=bool(report.packed))]
