"""`peft-variator shrink`: a plugin's file in a few bits a number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from rich.filesize import decimal
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import new_folder
from ..training import load_plugin
from ..tuners.variator import shrink_plugin
from .console import Reporter, next_commands
from .publishing import Publishing
from .saved_plugin import open_plugin


__all__ = ["ShrinkReport", "in_half_precision", "shrink"]


@dataclass(frozen=True)
class ShrinkReport:
    """What was made smaller.

    Args:
        output: the folder.
        adapter: folder or Hub name of the plugin.
        base: folder or Hub name of its base.
        bits: bits of each number of the copied neurons.
        bytes_before: size of the plugin's weights.
        bytes_after: size of what was written.
    """

    output: str
    adapter: str
    base: str
    bits: int
    bytes_before: int
    bytes_after: int


def shrink(
    adapter: str, output: Path, bits: int, base: str | None, publishing: Publishing, reporter: Reporter
) -> None:
    """Write a plugin whose copied neurons are rounded differences from the base's; see [`shrink_plugin`].

    Raises:
        OSError: there is no such plugin or base, or the folder can't be written.
        ValueError: the adapter is no plugin, or one whose copies are not whole.
    """
    reporter.check()
    publishing.check()
    saved = open_plugin(adapter, base)
    model, _ = saved.load_base()
    plugin = load_plugin(model, adapter, is_trainable=False)
    before = sum(value.nbytes for value in load_peft_weights(adapter, device="cpu").values())
    shrink_plugin(plugin, bits)
    with new_folder(output) as made:
        plugin.save_pretrained(str(made))
        file = made / SAFETENSORS_WEIGHTS_NAME
        save_file(in_half_precision(load_file(file)), file, metadata={"format": "pt"})
        after = file.stat().st_size
        publishing.set_license(made)
    report = ShrinkReport(str(output), adapter, saved.base, bits, before, after)
    reporter.write_json(json.dumps(asdict(report), indent=2))
    reporter.say(
        f"Wrote {report.output}: {decimal(after)}, where {adapter} has {decimal(before)}. The copied neurons have "
        f"{bits} bits a number, all else is in half precision.",
        "It is loaded like any plugin, onto the same base. What it gives differs a little, so measure it anew:",
        *next_commands(["evaluate", output, "--data", "my_texts.txt", *([] if base is None else ["--base", base])]),
    )
    publishing.push(output, reporter)


def in_half_precision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for a small file: single precision as half, where it has room, and numbers of neurons in 32 bits."""
    return {key: _narrowed(value).contiguous() for key, value in tensors.items()}


def _narrowed(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int64:
        return tensor.int() if not tensor.numel() or int(tensor.abs().max()) < 2**31 else tensor
    if tensor.dtype == torch.float32:
        half = tensor.half()
        return half if bool(half.isfinite().all()) else tensor
    return tensor
