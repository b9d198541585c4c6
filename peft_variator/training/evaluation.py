"""How closely a model with an adapter follows itself without it, on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .loss_masks import prediction_of, stacks_of
from .teacher import measured_adapters


__all__ = ["measure_quality"]


class _Comparison:
    """Cosine and relative error of rows, added up over batches."""

    def __init__(self) -> None:
        self.count = self.cosines = self.error = self.norm = 0.0

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Take in rows of shape `(rows, dim)`."""
        student, teacher = student.float(), teacher.float()
        self.count += len(teacher)
        self.cosines += float(torch.cosine_similarity(student, teacher, dim=-1).double().sum())
        self.error += float((student - teacher).double().square().sum())
        self.norm += float(teacher.double().square().sum())

    def results(self) -> dict[str, float]:
        return {"cosine": self.cosines / self.count, "relative_error": (self.error / self.norm) ** 0.5}


@torch.no_grad()
def measure_quality(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Fidelity of the last hidden states of real tokens, and of the predictions that are used.

    Args:
        model: model with an adapter, trainable or not; without it, it is the reference. Left in evaluation mode.
        batches: keyword arguments of its forward, on its device.

    Returns:
        dict[str, float]: `cosine` (mean over tokens) and `relative_error` (‖student − teacher‖ / ‖teacher‖ over all
        tokens), of an encoder–decoder model each with `encoder_` and `decoder_` before it; for language models also
        `agreement`, the share of used predictions whose most likely token is the same.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters, stacks, prediction = measured_adapters(model), stacks_of(base), prediction_of(base)
    model.eval()
    comparisons = {key: _Comparison() for key in stacks}
    same: list[Tensor] = []
    for inputs in batches:
        arguments = {**inputs, "output_hidden_states": True}
        outputs = model(**arguments)
        with adapters.switched_off():
            target = model(**arguments)
        for key, mask_of in stacks.items():
            mask = mask_of(inputs)
            states = [
                states[key][-1].flatten(0, -2) if mask is None else states[key][-1][mask]
                for states in (outputs, target)
            ]
            comparisons[key].add(*states)
        if prediction is not None:
            used = prediction.mask(inputs)
            choices = [prediction.logits(each)[used].argmax(-1) for each in (outputs, target)]
            same.append(choices[0] == choices[1])
    results: dict[str, float] = {}
    for key, comparison in comparisons.items():
        prefix = key.removesuffix("hidden_states")
        results |= {f"{prefix}{name}": value for name, value in comparison.results().items()}
    return results | ({"agreement": float(torch.cat(same).double().mean())} if same else {})
