"""`peft-variator pack`, `unpack` and `merge`, which rewrite a checkpoint on disk, tensor by tensor; and
`convert-checkpoint`: a plugin file of the paper's authors in, an adapter out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TypeVar

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from transformers import AutoConfig, PreTrainedModel

from ..bases import MergeReport, merge_checkpoint, pack_checkpoint, unpack_checkpoint
from ..bases.convert import ConversionReport
from ..hub import open_files
from ..model_files import check_model_name
from ..models import is_pooler, model_class
from ..tuners.variator.released import convert_checkpoint
from .console import Reporter, next_commands
from .publishing import Publishing


__all__ = ["convert_released", "merge", "pack", "unpack"]

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
    run = partial(pack_checkpoint, source, output, target, ignore, license=publishing.license)
    _convert("Packing", run, lambda report: [_NOTICE, *_describe_conversion(report, True)], publishing, reporter)


def unpack(source: Path, output: Path, reporter: Reporter) -> None:
    """Make a packed model on disk dense; see [`unpack_checkpoint`]."""
    run = partial(unpack_checkpoint, source, output)
    _convert("Unpacking", run, lambda report: _describe_conversion(report, False), Publishing(), reporter)


def merge(
    base: Path, adapter: Path, output: Path, packed: bool | None, publishing: Publishing, reporter: Reporter
) -> None:
    """Merge a SparseLoRA adapter on disk into its base on disk; see [`merge_checkpoint`]."""
    run = partial(merge_checkpoint, base, adapter, output, packed, license=publishing.license)
    _convert("Merging", run, _describe_merge, publishing, reporter)


def _convert(
    label: str,
    convert: Callable[..., Report],
    describe: Callable[[Report], list[str]],
    publishing: Publishing,
    reporter: Reporter,
) -> None:
    """Run a conversion under a progress bar, tell what came of it, and publish that."""
    reporter.check()
    publishing.check()
    with reporter.progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task(label, total=None)
        report = convert(on_progress=lambda done, total: progress.update(task, completed=done, total=total))
    reporter.write_json(json.dumps(asdict(report), indent=2, default=str))
    reporter.say(*describe(report))
    publishing.push(report.output, reporter)


def _describe_conversion(report: ConversionReport, is_packed: bool) -> list[str]:
    """What became of how many weights, and what to do next."""
    converted = f"Converted {report.converted} weights: {_describe_sizes(report)}"
    return [converted, *_next_steps(report.output, is_packed=is_packed)]


def _describe_sizes(report: ConversionReport) -> str:
    """How large the tensors were and are, and where they are."""
    ratio = report.bytes_after / max(report.bytes_before, 1)
    sizes = f"{decimal(report.bytes_before)} → {decimal(report.bytes_after)}"
    return f"{sizes} ({ratio:.1%}). Saved to {report.output}."


def _next_steps(output: Path, *, is_packed: bool) -> list[str]:
    """How to look at it and load it; without the package, transformers would draw packed weights at random."""
    cls = model_class(AutoConfig.from_pretrained(output))
    name = "AutoModel" if cls is None else cls.__name__
    first = ["  import peft_variator"] if is_packed else []
    without = ", add_pooling_layer=False" if _lacks_pooler(cls, output) else ""
    load = [f"  from transformers import {name}", f"  model = {name}.from_pretrained({str(output)!r}{without})"]
    return [*next_commands(["inspect", output]), "In Python:", *first, *load]


def _lacks_pooler(cls: type[PreTrainedModel] | None, folder: Path) -> bool:
    """Whether a model was saved without the pooler that its class makes unless it is told not to."""
    if cls is None or "add_pooling_layer" not in signature(cls.__init__).parameters:
        return False
    return not any(map(is_pooler, open_files(str(folder)).weights("*.safetensors")))


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


def convert_released(
    checkpoint: Path,
    output: Path,
    base: str | None,
    residual_scale: float | None,
    publishing: Publishing,
    reporter: Reporter,
) -> None:
    """Convert a released plugin file and tell; see [`convert_checkpoint`]."""
    reporter.check()
    publishing.check()
    if not checkpoint.is_file():
        raise FileNotFoundError(f"There is no file {str(checkpoint)!r}. Name a plugin file, saved by torch.")
    if base is not None:
        check_model_name(base)
    report = convert_checkpoint(checkpoint, output, base, residual_scale, publishing.license)
    reporter.write_json(json.dumps(asdict(report), indent=2))
    reporter.say(
        f"Wrote {report.output}: a plugin of {report.parameters:,} parameters for the encoder of a T5 with "
        f"{report.layers} layers of width {report.hidden_size}, at k = {report.compression_ratio}."
    )
    if report.residual_scale != 1:
        reporter.say(
            f"It was trained on a T5 whose residual stream is divided by {report.residual_scale:g}, as ModelCenter's; "
            f"its corrections are {report.residual_scale:g} times as large now. Else give --residual-scale 1."
        )
    else:
        reporter.say("It is taken to be trained on the weights as transformers has them (--residual-scale 1).")
    if report.left_out:
        reporter.warn(
            f"{report.left_out} other tensors of the file were left out. If they are a T5 that was trained further, "
            "the plugin belongs to that one."
        )
    name = "YOUR_T5" if report.base is None else report.base
    reporter.say(
        "Next, in Python:",
        "  import peft_variator",
        "  from peft import PeftModel",
        "  from transformers import T5ForConditionalGeneration",
        f"  base = T5ForConditionalGeneration.from_pretrained({name!r})",
        f"  model = PeftModel.from_pretrained(base, {report.output!r})",
    )
    publishing.push(output, reporter)
