"""`peft-variator convert-checkpoint`: a plugin file of the paper's authors in, an adapter out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..models import check_model_name
from ..tuners.variator.released import convert_checkpoint
from .console import Reporter
from .publishing import Publishing


__all__ = ["convert"]


def convert(
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
    if base is not None:
        check_model_name(base)
    report = convert_checkpoint(checkpoint, output, base, residual_scale)
    publishing.set_license(output)
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
