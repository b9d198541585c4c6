"""Which compression ratio an optimizer step trains."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..tuners.variator import VariatorLayer
from .adapters import TrainedAdapters


__all__ = ["TrainedRatios", "average_over_ratios", "note_trained_ratios", "sample_ratio"]


def sample_ratio(ratios: Sequence[int], seed: int, step: int) -> int:
    """Draw the ratio of a step.

    It depends on nothing but the arguments, so all processes, all micro-batches of the step and a run that was resumed
    at the step draw the same one.

    Args:
        ratios: compression ratios to draw from, each equally likely.
        seed: seed of the run.
        step: number of optimizer steps done before this one.
    """
    return random.Random(f"compression ratio, seed {seed}, step {step}").choice(ratios)


def average_over_ratios(by_ratio: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of several ratios as one: the mean under each name, and those of ratio 4 under `NAME_k4`."""
    names = next(iter(by_ratio.values()))
    means = {name: sum(metrics[name] for metrics in by_ratio.values()) / len(by_ratio) for name in names}
    return means | {f"{name}_k{ratio}": metrics[name] for ratio, metrics in by_ratio.items() for name in metrics}


def note_trained_ratios(adapters: TrainedAdapters, ratios: Sequence[int] | None) -> None:
    """Have the configurations of the trained plugins say which ratios they are trained for.

    Args:
        adapters: the adapters that are trained.
        ratios: the ratios to train for; `None`: the one that each plugin has.
    """
    for layer, names in adapters.layers:
        for name in names if isinstance(layer, VariatorLayer) else ():
            config = layer.configs[name]
            own = layer.ratios.chosen.get(name, config.compression_ratio)
            config.trained_ratios = sorted(set(ratios or [own]) - {1}) or None


class TrainedRatios:
    """The ratios of the Variator plugin that a run trains.

    Args:
        adapters: the adapters that are trained.
        ratios: the ratios to train for.

    Raises:
        ValueError: no Variator plugin is trained, or its scores are tied to another ratio (`scoring="concat"`).
    """

    def __init__(self, adapters: TrainedAdapters, ratios: Sequence[int]) -> None:
        self.choices = tuple(ratios)
        self._plugins = [
            (layer, name) for layer, names in adapters.layers if isinstance(layer, VariatorLayer) for name in names
        ]
        if not self._plugins:
            raise ValueError(
                f"ratios={list(ratios)} is for Variator plugins, and the model trains none. Set ratios=None."
            )
        for layer, name in self._plugins:
            for ratio in ratios:
                layer.rule_at(name, ratio)  # raises for one that it can't serve

    def set(self, ratio: int) -> None:
        """Let every module of the plugin compress by `ratio`."""
        for layer, name in self._plugins:
            layer.ratios.choose(name, ratio)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give every module the ratio back that it had before."""
        before = [layer.ratios.chosen.get(name) for layer, name in self._plugins]
        try:
            yield
        finally:
            for (layer, name), ratio in zip(self._plugins, before, strict=True):
                layer.ratios.choose(name, ratio)
