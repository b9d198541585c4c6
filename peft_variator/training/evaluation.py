"""How closely a model with an adapter follows itself without it: on held-out data, and at each ratio of a plugin."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..pooling import pool
from ..tuners.variator.forward_context import next_token_labels
from .loss_masks import CAUSAL, EXAMPLES, Prediction, has_several_labels, prediction_of, stacks_of, without_streams
from .teacher import measured_adapters


__all__ = ["measure_quality", "measure_ratios"]


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
        tokens), of an encoder–decoder model each with `encoder_` and `decoder_` before it; for models with a head also
        `agreement`, the share of used predictions that are the same: the most likely class or token, or where an
        example has any number of labels each of them, given or not. For heads that give a number, `score_error`: how
        far it is from the base's, in its own units.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters, stacks, prediction = measured_adapters(model), stacks_of(base), prediction_of(base)
    model.eval()
    comparisons = {key: _Comparison() for key in stacks}
    answers: dict[str, list[Tensor]] = defaultdict(list)
    for inputs in batches:
        arguments = {**inputs, "output_hidden_states": True}
        outputs = model(**arguments)
        with adapters.switched_off():
            target = model(**arguments)
        for key, mask_of in stacks.items():
            mask = mask_of(inputs)
            last = [without_streams(each[key][-1], mask) for each in (outputs, target)]
            states = [each.flatten(0, -2) if mask is None else each[mask] for each in last]
            comparisons[key].add(*states)
        if prediction is not None:
            used = prediction.mask(inputs)
            logits, wanted = (prediction.logits(each)[used].float() for each in (outputs, target))
            for name, values in _compare_answers(base, prediction, inputs, logits, wanted).items():
                answers[name].append(values)
    results: dict[str, float] = {}
    for key, comparison in comparisons.items():
        prefix = key.removesuffix("hidden_states")
        results |= {f"{prefix}{name}": value for name, value in comparison.results().items()}
    return results | {name: float(torch.cat(parts).double().mean()) for name, parts in answers.items()}


@torch.inference_mode()
def measure_ratios(
    plugin: PeftModel,
    batches: Sequence[Mapping[str, Any]],
    ratios: Sequence[int],
    *,
    on_batch: Callable[[], object] | None = None,
) -> dict[int, dict[str, float]]:
    """Quality of a plugin at each ratio, beside that of its base.

    The base is the plugin at k = 1, which is exact, with the heads that were saved with the plugin.

    Args:
        plugin: the base with a Variator plugin, in evaluation mode.
        batches: keyword arguments of its forward, on its device.
        ratios: compression ratios k.
        on_batch: called after each batch.

    Returns:
        dict[int, dict[str, float]]: for each ratio, and for 1, the base: `cosine`, the mean over tokens of that of the
        last hidden states to the base's (of an encoder–decoder `encoder_cosine` and `decoder_cosine`);
        `embedding_cosine` of their means over each text, for models without a head; `agreement`, the share of
        predictions that are the base's, or `score_error`, as of `measure_quality`; `nll` of a token in nats, where the
        batches have labels.

    Raises:
        ValueError: the base gives values that are not finite.
    """
    base = plugin.get_base_model()
    stacks, prediction = stacks_of(base), prediction_of(base)
    values: dict[int, dict[str, list[Tensor]]] = {k: defaultdict(list) for k in dict.fromkeys([1, *ratios])}
    for batch in batches:
        reference: Any = None
        for ratio, found in values.items():
            with plugin.using_ratio(ratio):
                outputs = plugin(**batch, output_hidden_states=True)
            reference = outputs if ratio == 1 else reference
            for key, mask_of in stacks.items():
                ours, theirs = (each[key][-1].float() for each in (outputs, reference))
                prefix, mask = key.removesuffix("hidden_states"), mask_of(batch)
                cosines = torch.cosine_similarity(ours, theirs, dim=-1)
                found[f"{prefix}cosine"].append(cosines.flatten() if mask is None else cosines[mask])
                if prediction is None and mask is not None:
                    ours, theirs = (pool(states, mask, "mean") for states in (ours, theirs))
                    found["embedding_cosine"].append(torch.cosine_similarity(ours, theirs, dim=-1))
            if prediction is not None:
                for name, values_of in _compare_predictions(base, prediction, batch, outputs, reference).items():
                    found[name].append(values_of)
        if on_batch is not None:
            on_batch()
    if not all(bool(each.isfinite().all()) for parts in values[1].values() for each in parts):
        raise ValueError(
            "The base model gives values that are not finite on these examples, so nothing can be held against them. "
            "Look for NaN in its weights, or run it in float32."
        )
    return {
        ratio: {name: float(torch.cat(parts).double().mean()) for name, parts in found.items()}
        for ratio, found in values.items()
    }


def _compare_answers(
    base: nn.Module, prediction: Prediction, batch: Mapping[str, Any], logits: Tensor, wanted: Tensor
) -> dict[str, Tensor]:
    """For each used prediction whether it is the base's, or how far from it, of logits `(predictions, classes)`."""
    problem = getattr(getattr(base, "config", None), "problem_type", None) if prediction is EXAMPLES else None
    if logits.shape[-1] == 1 or problem == "regression":
        return {"score_error": (logits - wanted).abs().mean(-1)}
    if has_several_labels(problem, prediction, batch):
        return {"agreement": ((logits > 0) == (wanted > 0)).float().mean(-1)}
    return {"agreement": (logits.argmax(-1) == wanted.argmax(-1)).float()}


def _compare_predictions(
    base: nn.Module, prediction: Prediction, batch: Mapping[str, Any], outputs: Any, reference: Any
) -> dict[str, Tensor]:
    """For each used prediction whether it is the base's, and how unlikely its label is."""
    used = prediction.mask(batch)
    logits, wanted = (prediction.logits(each)[used].float() for each in (outputs, reference))
    found = _compare_answers(base, prediction, batch, logits, wanted)
    has_classes = "labels" in batch and not batch["labels"].is_floating_point()
    if has_classes and "agreement" in found:
        labels: Any = batch["labels"]
        if prediction is CAUSAL:
            labels = next_token_labels(batch, (labels.shape[0], labels.shape[1]))
        found["nll"] = nn.functional.cross_entropy(logits, labels[used], reduction="none")
    return found
