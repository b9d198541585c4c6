"""What is compared: the base, one plugin at several ratios, and what makes an encoder faster without training."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_variator import quantize_plugin


__all__ = ["Contender", "Kind", "make_contenders", "to_int8"]

Kind = Literal["base", "plugin", "untrained", "bf16", "bf16 + plugin", "int8", "int8 + plugin"]


@dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Args:
        name: `"k = 4"`.
        kind: what it is.
        model: what is called.
        ratio: compression ratio of its plugin; `None`: it has none.
    """

    name: str
    kind: Kind
    model: nn.Module
    ratio: int | None = None

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Where the plugin has its ratio; it keeps it."""
        if isinstance(self.model, PeftModel):
            self.model.set_compression_ratio(self.ratio)
        yield


def make_contenders(base: PreTrainedModel, plugin: PeftModel, ratios: Sequence[int], chosen: int) -> list[Contender]:
    """The base, the plugin at each ratio, then bfloat16 and int8, each alone and with the plugin over it.

    Args:
        base: the untouched model.
        plugin: the same weights with a trained plugin.
        ratios: compression ratios.
        chosen: the ratio of the plugin over bfloat16 and int8.
    """
    with tempfile.TemporaryDirectory() as folder:
        plugin.save_pretrained(folder)
        over_bf16 = PeftModel.from_pretrained(_to_bf16(base), folder)
        over_int8 = PeftModel.from_pretrained(to_int8(base), folder)
    quantize_plugin(over_int8)
    return [
        Contender("base", "base", base),
        *(Contender(f"k = {ratio}", "plugin", plugin, ratio) for ratio in ratios),
        Contender("bf16", "bf16", _to_bf16(base)),
        Contender(f"bf16, k = {chosen}", "bf16 + plugin", over_bf16.eval(), chosen),
        Contender("int8", "int8", to_int8(base)),
        Contender(f"int8, k = {chosen}", "int8 + plugin", over_int8.eval(), chosen),
    ]


def _to_bf16(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).to(torch.bfloat16)


def to_int8(model: nn.Module) -> nn.Module:
    """A copy whose Linear layers are int8, with the activations quantised as they come."""
    with warnings.catch_warnings():
        # torch points to another library for this, which is not needed here.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
