"""Measuring a base and its plugin, at several ratios, alternately in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .flops import count_flops
from .inputs import without_padding
from .memory import peak_memory
from .report import Measurement
from .timing import Candidate, time_alternately


__all__ = ["compare"]


@contextmanager
def _at_ratio(plugin: PeftModel, ratio: int) -> Iterator[None]:
    plugin.set_compression_ratio(ratio)
    yield


def _candidates(
    base: nn.Module, plugin: PeftModel, inputs: Mapping[str, Any], ratios: Sequence[int], with_disabled: bool
) -> dict[nn.Module, list[Candidate]]:
    """What is measured, by the module that runs it."""
    run = partial(plugin, **inputs)
    switched = [Candidate(f"k = {ratio}", run, partial(_at_ratio, plugin, ratio)) for ratio in ratios]
    if with_disabled:
        switched.append(Candidate("plugin off", run, plugin.disable_adapter))
    return {base: [Candidate("base", partial(base, **inputs))], plugin: switched}


@torch.no_grad()
def compare(
    base: nn.Module,
    plugin: PeftModel,
    inputs: Mapping[str, Any],
    ratios: Sequence[int],
    *,
    rounds: int,
    device: torch.device,
    min_seconds: float = 0.2,
    with_disabled: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """FLOPs, peak memory and time of a base and of a plugin on a second copy of its modules.

    The base is a model that no plugin was ever put into (see `share_weights`), so it is charged for no wrapper.
    Switching the ratio is not part of the measured time. FLOPs and memory are measured first, then all are timed in
    turn.

    Args:
        base: the untouched model.
        plugin: a model with the same weights and a Variator plugin, which has `set_compression_ratio`.
        inputs: keyword arguments of one forward, on `device`.
        ratios: compression ratios k.
        rounds: samples of each, at least 2.
        device: where the models are.
        min_seconds: seconds that a sample takes at least.
        with_disabled: measure the plugin switched off too, to see what its wrappers cost.
        on_step: called once for the FLOPs and memory of each setting and once for each timed sample.

    Returns:
        The base's figures, then those of each ratio, then those of the plugin switched off.

    Raises:
        ValueError: no ratio, one that is given twice or that the plugin refuses, or fewer than 2 rounds.
    """
    if not ratios:
        raise ValueError("ratios is empty; name at least one compression ratio, e.g. 4.")
    groups = _candidates(base, plugin, inputs, ratios, with_disabled)
    facts: dict[str, tuple[int, int | None, int]] = {}
    for model, candidates in groups.items():
        for candidate in candidates:
            with candidate.setting():
                flops = count_flops(model, inputs)
                unpacked = count_flops(model, without_padding(inputs)) if _is_padded(inputs) else None
                facts[candidate.name] = flops, unpacked, peak_memory(candidate.run, device)
            on_step()
    everything = [candidate for candidates in groups.values() for candidate in candidates]
    samples = time_alternately(everything, rounds, device=device, min_seconds=min_seconds, on_sample=on_step)
    return [Measurement(name, *facts[name], seconds) for name, seconds in samples.items()]


def _is_padded(inputs: Mapping[str, Any]) -> bool:
    return "attention_mask" in inputs and not bool(inputs["attention_mask"].all())
