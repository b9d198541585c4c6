"""How much to merge where: ratios and widths of a plugin's modules for a share of the model's FLOPs.

Layers differ in what merging costs them by up to nine times, so ratios belong to layers (the idea of DiffRate, Chen et
al. 2023, https://arxiv.org/abs/2305.17997). Here they are chosen by what each module alone, merged by a plugin that is
not trained, changes in the model's output, under a budget of FLOPs that is met by dynamic programming.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from ..compat import in_process_group
from ..field_types import shown, whole_number
from ..models import evaluating, on_device
from ..training.loss_masks import decoder_tokens
from ..tuners.variator import VariatorConfig, calibrate
from ..tuners.variator.forward_context import parameter_names
from ..tuners.variator.layer import VariatorLayer, plugin_layers
from ..tuners.variator.neuron_selection import needs_calibration, sum_over_processes
from .flops import count_flops
from .inputs import count_positions


__all__ = ["allocate"]

T = TypeVar("T")

TOLERANCE = 0.02  # of the whole model's FLOPs, to either side
ATTEMPTS = 4  # to find ratios that save together what is asked for, within the tolerance
UNITS = 2000  # that the FLOPs are counted in when modules share a budget
WIDTHS = {"narrow": 0.5, "default": 1.0, "wide": 2.0}  # plugins that are tried, by the factor of their width
SCALES = tuple(2 ** (step / 4) for step in range(-6, 5))  # of all widths, to meet a budget that ratios alone miss


def allocate(
    base: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    flops_saved: float | Mapping[int, float] = 0.45,
    *,
    length: int | None = None,
    candidates: Sequence[int] = (1, 2, 4, 8, 16),
    **fields: Any,
) -> VariatorConfig:
    """Find out which ratio and which width each feed-forward network should have, for a share of FLOPs to save.

    Every module is merged alone, at each of the `candidates`, by a plugin that is not trained; what that changes in
    the model's output on the batches is the module's sensitivity. Then ratios and widths are chosen that together
    change least and save the share that was asked for.

    Args:
        base: the model, without a plugin. It is left as it was.
        batches: arguments of the model's call, by name, as for [`peft_variator.calibrate`]; a few are enough. Of
            several processes each passes its own, and all get the same configuration.
        flops_saved: share of the model's forward FLOPs to save, between 0 and 1; or several, by the compression ratio
            that is to mean each of them, as in `{2: 0.30, 4: 0.45, 8: 0.55}`.
        length: tokens of the text whose FLOPs count; `None`: the longest of the batches. Images have their own.
        candidates: ratios that a module may have; 1 leaves it alone.
        fields: any field of `VariatorConfig`. `compression_ratio` names the row that a single share makes (4).

    Returns:
        A configuration with a `ratio_schedule` and, with `decompression="neurons"`, a `correction_pattern`.

    Raises:
        ValueError: a share is not between 0 and 1 or cannot be reached, which names the largest that can, or is missed
            by what modules save together; a candidate is no ratio; there are no batches; or the model has a plugin
            already.
        TypeError: a batch is not a mapping, or has arrays of NumPy in place of tensors.
    """
    targets = _checked_targets(flops_saved, fields)
    ratios = sorted({1, *_checked_candidates(candidates)})
    if any(True for _ in plugin_layers(base)):
        raise ValueError("allocate: the model has a Variator plugin already. Call unload() first.")
    if fields.get("layer_spans") is not None:
        raise ValueError(
            f"allocate: layer_spans={fields['layer_spans']!r} merges around whole layers, and what is allocated is "
            "how much feed-forward networks merge. Leave it out, or make a VariatorConfig with it yourself."
        )
    examples, inputs = _in_every_process(partial(_read, base, batches, length))
    inputs = _of_first_process(inputs)
    with evaluating(base), _trainable_as_before(base):
        total = count_flops(base, inputs)
        modules = _measure(base, examples, inputs, total, ratios, fields)
        return _solve_and_check(base, modules, examples, targets, inputs, total, fields)


def _read(
    base: nn.Module, batches: Iterable[Mapping[str, Any]], length: int | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The batches on the model's device, and the inputs whose FLOPs count."""
    device = next(base.parameters()).device
    examples = [_without_labels(base, on_device(batch, device)) for batch in batches]
    if not examples:
        raise ValueError("allocate: there are no batches to measure on.")
    return examples, _inputs_of_length(base, examples, length)


def _in_every_process(make: Callable[[], T]) -> T:
    """What each process makes by itself; an error in one of them is one in all, which would wait for it for ever."""
    if not in_process_group():
        return make()
    own: Exception | None = None
    try:
        made = make()
    except (TypeError, ValueError) as error:
        own = error
    told: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, None if own is None else str(own))
    if own is not None:
        raise own
    for rank, other in enumerate(told):
        if other is not None:
            raise ValueError(f"{other} That was in process {rank}; each passes batches of its own.")
    return made


@contextmanager
def _trainable_as_before(base: nn.Module) -> Iterator[None]:
    """Give parameters back whether they are trained, which `get_peft_model` takes from them."""
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@dataclass
class _Module:
    """What is known of one feed-forward network.

    Args:
        name: full name of the module where it starts.
        width: of its correction; 0 where that has no neurons.
        neurons: how many there are to choose from.
        errors: what merging it alone changes in the model's output, relative to the output's size, by ratio.
        savings: share of the whole model's FLOPs that is saved, by ratio.
        costs: share of the whole model's FLOPs that one more neuron costs, by ratio.
        exponent: of the width in the error, which falls as width**-exponent.
    """

    name: str
    width: int
    neurons: int
    errors: dict[int, float] = field(default_factory=lambda: {1: 0.0})
    savings: dict[int, float] = field(default_factory=lambda: {1: 0.0})
    costs: dict[int, float] = field(default_factory=dict)
    exponent: float = 0.0

    def width_at(self, factor: float) -> int:
        """The width times a factor, as far as there are neurons."""
        return min(self.neurons, max(1, round(self.width * factor))) if self.width else 0

    def error(self, ratio: int, width: int) -> float:
        """What merging changes at a width."""
        return self.errors[ratio] * ((width / self.width) ** -self.exponent if self.width else 1)

    def saving(self, ratio: int, width: int) -> float:
        """What merging saves at a width."""
        return 0.0 if ratio == 1 else self.savings[ratio] - self.costs.get(ratio, 0.0) * (width - self.width)


def _checked_targets(flops_saved: float | Mapping[int, float], fields: dict[str, Any]) -> dict[int, float]:
    """The share of each row; `fields` gets the row that is used at first."""
    for name in ("ratio_schedule", "correction_pattern", "ratio_pattern"):
        if name in fields:
            raise ValueError(f"allocate: {name} is what it finds out, so it cannot be passed.")
    if isinstance(flops_saved, Mapping):
        targets = dict(flops_saved)
        if not targets:
            raise ValueError("allocate: flops_saved={} has no row.")
        own = fields.setdefault("compression_ratio", 4 if 4 in targets else min(targets))
        if own not in targets:
            raise ValueError(f"allocate: compression_ratio={own!r} is none of the rows of flops_saved, {[*targets]}.")
    else:
        targets = {fields.setdefault("compression_ratio", 4): flops_saved}
    for k, share in targets.items():
        whole_number("allocate: compression_ratio, which names a row,", k, 2)
        if isinstance(share, bool) or not isinstance(share, int | float):
            advice = " Convert it with .item() first." if isinstance(share, np.generic) else ""
            raise ValueError(
                f"allocate: flops_saved={shown(share)} has to be a number between 0 and 1, the share of the FLOPs to "
                f"save; it is of type {type(share).__name__}.{advice}"
            )
        if not 0 < share < 1:
            raise ValueError(f"allocate: flops_saved={share!r} is a share of the FLOPs, so it lies between 0 and 1.")
        if share <= TOLERANCE:
            raise ValueError(
                f"allocate: flops_saved={share!r} is met to within {TOLERANCE}, so to save nothing would do. Ask for "
                "more."
            )
    if len(targets) > 1 and fields.get("scoring") == "concat":
        raise ValueError(
            f"allocate: scoring='concat' is tied to one ratio, and flops_saved has the rows {[*targets]}. Name one "
            "share, or take scoring='token', which serves all of them."
        )
    return targets


def _checked_candidates(candidates: Sequence[int]) -> Sequence[int]:
    if isinstance(candidates, str) or not isinstance(candidates, Iterable):
        raise TypeError(f"allocate: candidates={candidates!r} has to be a list of ratios, as in (1, 2, 4, 8).")
    candidates = list(candidates)
    for ratio in candidates:
        whole_number("allocate: one of candidates,", ratio, 1)
    if max(candidates, default=1) == 1:
        raise ValueError(f"allocate: candidates={candidates!r} merge nothing.")
    return candidates


def _without_labels(base: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as it is used: where every token has a label, a causal model merges nothing."""
    config: Any = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return batch
    return {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}


def _inputs_of_length(base: nn.Module, examples: list[dict[str, Any]], length: int | None) -> dict[str, Any]:
    """One example of the length whose FLOPs count, without padding."""
    first = _first_example(examples)
    ids = first.get("input_ids")
    if not isinstance(ids, Tensor) or any("pixel" in name or "features" in name for name in first):
        if length is not None:
            raise ValueError(f"allocate: length={length} is for text; the inputs of this model have their own size.")
        return first
    if ids.dim() != 2:
        raise ValueError(
            f"allocate: input_ids have the shape {tuple(ids.shape)}, where (batch, length) is meant. Measure the "
            "model's body, as in allocate(model.base_model, …), whose layers are the same."
        )
    if length is not None:
        whole_number("allocate: length", length, 2)
    else:
        length = max(batch["input_ids"].shape[1] for batch in examples)
    if length < 2:
        raise ValueError(f"allocate: length={length} leaves nothing to merge; it has to be at least 2.")
    config = getattr(base, "config", None)
    positions = count_positions(config) if isinstance(config, PreTrainedConfig) else None
    if positions is not None and length > positions:
        raise ValueError(f"allocate: length={length}, and the model has {positions} positions. Choose at most that.")
    mask = first.get("attention_mask")
    tokens = ids[0][mask[0].ne(0)] if isinstance(mask, Tensor) and mask.dim() == 2 else ids[0]
    # The tokens at the ends stay there; those between are repeated.
    inner = tokens[1:-1] if len(tokens) > 2 else tokens
    inner = inner.repeat(-(-(length - 2) // len(inner)))[: length - 2]
    text = torch.cat([tokens[:1], inner, tokens[-1:]]).unsqueeze(0)
    inputs = {name: v for name, v in first.items() if "decoder" in name or name == "labels"} | {"input_ids": text}
    if "logits_to_keep" in parameter_names(base):
        inputs["logits_to_keep"] = 1  # as `generate` asks for
    return inputs


def _first_example(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """The first example that is not padding alone."""
    for batch in examples:
        mask, row = batch.get("attention_mask"), 0
        if isinstance(mask, Tensor) and mask.dim() == 2:
            rows = mask.ne(0).any(dim=1).nonzero().flatten().tolist()
            if not rows:
                continue
            row = rows[0]
        return {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    raise ValueError("allocate: the batches hold padding alone; attention_mask is 0 everywhere.")


def _of_first_process(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the first process has, where there are several: they count the same FLOPs."""
    if not in_process_group():
        return inputs
    shared = [{name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}]
    torch.distributed.broadcast_object_list(shared, src=0)
    devices = {value.device for value in inputs.values() if isinstance(value, Tensor)}
    return on_device(shared[0], next(iter(devices)))


def _trial(base: nn.Module, config: VariatorConfig) -> PeftModel:
    """A plugin to try. That networks take the bottleneck is told when its user makes one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* take the bottleneck", category=UserWarning)
        return get_peft_model(base, config)


def _measure(
    base: nn.Module,
    batches: list[dict[str, Any]],
    inputs: dict[str, Any],
    total: int,
    ratios: list[int],
    fields: dict[str, Any],
) -> list[_Module]:
    """Sensitivities and savings of all modules."""
    with torch.no_grad():
        targets = [_output_of(base(**batch)) for batch in batches]
    widest = max(ratios)
    # Made at the widest ratio, so that no module is left out when neurons are chosen.
    plugin: dict[str, Any] = {**fields, "compression_ratio": widest}
    model: Any = _trial(base, VariatorConfig(**plugin))
    try:
        modules = _modules_of(model)
        names = ["default"]
        if any(module.width for module in modules.values()):
            for name in ("narrow", "wide"):
                plugin["correction_pattern"] = {
                    module.name: module.width_at(WIDTHS[name]) for module in modules.values() if module.width
                }
                model.add_adapter(name, VariatorConfig(**plugin))
                names.append(name)
        for name in names:
            model.set_adapter(name)
            if needs_calibration(model):
                calibrate(model, batches)
        trials = [(name, each) for name in names for each in modules]
        for adapter, name in tqdm(trials, desc="Measuring modules", disable=None):
            model.set_adapter(adapter)
            for ratio in ratios[1:] if adapter == "default" else [widest]:
                with _alone(model, name, ratio):
                    error = _error(model, batches, targets)
                    if adapter == "default":
                        modules[name].errors[ratio] = error
                    elif modules[name].width:
                        _fit_width(modules[name], widest, WIDTHS[adapter], error)
        _measure_savings(model, modules, inputs, total, ratios)
    finally:
        model.unload()
    return list(modules.values())


def _modules_of(model: PeftModel) -> dict[str, _Module]:
    found = {}
    for layer in plugin_layers(model):
        network, width = layer.network(), 0
        if layer.decompressions["default"] == "neurons" and network is not None:
            width = layer.modules_of("default")["variator_neurons"].get_buffer("index").numel()
        found[layer.name] = _Module(layer.name, width, 0 if network is None else network.width)
    return found


@contextmanager
def _alone(model: PeftModel, name: str, ratio: int) -> Iterator[None]:
    """Merge in one module and in no other one."""
    layers = list(plugin_layers(model))
    before = [dict(layer.rules) for layer in layers]
    try:
        for layer in layers:
            own = ratio if layer.name == name else 1
            layer.rules = {plugin: rule._replace(ratio=own) for plugin, rule in layer.rules.items()}
        yield
    finally:
        for layer, rules in zip(layers, before, strict=True):
            layer.rules = rules


def _output_of(outputs: Any) -> Tensor:
    """The tensor that a model's call is about: hidden states or logits."""
    found = next(value for value in outputs.values() if isinstance(value, Tensor) and value.dim() > 1)
    return found.float()


@torch.no_grad()
def _error(model: nn.Module, batches: list[dict[str, Any]], targets: list[Tensor]) -> float:
    """Squared change of the output over its variance, of all processes; padding does not count."""
    sums = torch.zeros(2, dtype=torch.float64, device=targets[0].device)
    for batch, target in zip(batches, targets, strict=True):
        output, mask = _output_of(model(**batch)), batch.get("attention_mask")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            mask = decoder_tokens(batch)  # of the decoder is what comes out
        real = torch.ones(1, dtype=torch.bool, device=target.device)
        if isinstance(mask, Tensor) and target.dim() == 3 and mask.shape == target.shape[:2]:
            real = mask.ne(0).unsqueeze(-1).to(target.device)
        parts = output - target, target - target.mean(dim=-1, keepdim=True)
        sums += torch.stack([torch.where(real, part, 0).double().square().sum() for part in parts])
    sum_over_processes([sums])
    changed, size = sums.tolist()
    if not math.isfinite(changed + size):
        raise ValueError(
            "allocate: the model's output has values that are not finite on these batches, so nothing can be "
            "compared. Look for NaN in its weights, or run it in float32."
        )
    return changed / max(size, 1e-12)


def _fit_width(module: _Module, ratio: int, factor: float, error: float) -> None:
    """Let the error fall with the width as it was measured, at half and at twice the width in the mean."""
    width = module.width_at(factor)
    if width != module.width and error > 0 and module.errors[ratio] > 0:
        slope = -np.log(error / module.errors[ratio]) / np.log(width / module.width)
        module.exponent += max(0.0, float(slope)) / (len(WIDTHS) - 1)


def _measure_savings(
    model: PeftModel, modules: dict[str, _Module], inputs: dict[str, Any], total: int, ratios: list[int]
) -> None:
    """FLOPs that each module saves; modules of one shape in one stack save the same."""
    known: dict[Any, tuple[dict[int, float], dict[int, float]]] = {}
    layers: dict[str, VariatorLayer] = {layer.name: layer for layer in plugin_layers(model)}
    for name, module in modules.items():
        layer = layers[name]
        shape = (id(layer.stack), layer.in_features, module.neurons, module.width, _count(layer.base_layer))
        if shape not in known:
            savings, costs, narrow = {1: 0.0}, {}, module.width_at(WIDTHS["narrow"])
            for ratio in ratios[1:]:
                model.set_adapter("default")
                with _alone(model, name, ratio):
                    savings[ratio] = 1 - count_flops(model, inputs) / total
                if narrow != module.width:
                    model.set_adapter("narrow")
                    with _alone(model, name, ratio):
                        saving = 1 - count_flops(model, inputs) / total
                    costs[ratio] = (saving - savings[ratio]) / (module.width - narrow)
            known[shape] = savings, costs
        module.savings, module.costs = known[shape]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


Rows = dict[int, dict[str, int]]


def _solve_and_check(
    base: nn.Module,
    modules: list[_Module],
    batches: list[dict[str, Any]],
    targets: dict[int, float],
    inputs: dict[str, Any],
    total: int,
    fields: dict[str, Any],
) -> VariatorConfig:
    """A configuration whose rows save what is asked for, which is counted.

    Modules do not always save together what each saves alone: of those that merge the first one's probe tells the
    outliers of all, and outliers that lie apart split more groups than those that lie side by side. So a row that
    misses its share aims as far beside it and is solved again.
    """
    aims, saved = dict(targets), dict(targets)
    for attempt in range(ATTEMPTS):
        found = _solve(modules, aims)
        if found is None:
            if attempt == 0:
                raise _unreachable(modules, targets)
            break
        config = _config_of(modules, *found, fields)
        saved = _saved_by(base, config, batches, targets, inputs, total)
        missed = {k: share - saved[k] for k, share in targets.items() if abs(saved[k] - share) > TOLERANCE}
        if not missed:
            return config
        aims = {k: aim + missed.get(k, 0.0) for k, aim in aims.items()}
    k = max(targets, key=lambda row: abs(saved[row] - targets[row]))
    longer = ""
    if isinstance(inputs.get("input_ids"), Tensor):
        longer = (
            ", or have the FLOPs of a longer text count (length=…), in which tokens that are not merged weigh less"
        )
    raise ValueError(
        f"allocate: row {k} saves {saved[k]:.3f} of the FLOPs in place of {targets[k]}, and no ratios were found that "
        "come nearer: what modules save together differs from what each saves alone. Ask for another share"
        f"{longer}."
    )


def _solve(modules: list[_Module], targets: dict[int, float]) -> tuple[Rows, dict[str, int]] | None:
    """Ratios by row and widths, with the least error in all rows together; `None`: nothing saves these shares."""
    best: tuple[float, Rows, dict[str, int]] | None = None
    shares = sorted(targets.values())
    main = next(k for k, share in targets.items() if share == shares[len(shares) // 2])
    has_widths = any(module.width for module in modules)
    for scale in SCALES if has_widths else (1.0,):
        choices = [{module.width_at(factor * scale) for factor in WIDTHS.values()} for module in modules]
        chosen = _choose(modules, choices, targets[main])
        if chosen is None:
            continue
        widths = [width for _, width in chosen]
        rows = {k: _choose(modules, [{width} for width in widths], share) for k, share in targets.items()}
        error, found = 0.0, {}
        for k, row in rows.items():
            if row is None:
                break
            found[k] = {module.name: ratio for module, (ratio, _) in zip(modules, row, strict=True)}
            error += sum(module.error(*choice) for module, choice in zip(modules, row, strict=True))
        if len(found) == len(targets) and (best is None or error < best[0]):
            best = error, found, {module.name: width for module, width in zip(modules, widths, strict=True)}
    return None if best is None else best[1:]


def _unreachable(modules: list[_Module], targets: dict[int, float]) -> ValueError:
    narrow = min(WIDTHS.values()) * min(SCALES)
    largest = sum(max(module.saving(r, module.width_at(narrow)) for r in module.savings) for module in modules)
    wanted = max(targets.values())
    if wanted <= largest:
        return ValueError(
            f"allocate: no ratios of these candidates save {dict(targets)} to within {TOLERANCE:.0%} on one set of "
            "widths: they lie too far apart in a model of so few modules. Pass more candidates, or other shares."
        )
    return ValueError(
        f"allocate: flops_saved={wanted} cannot be reached: the largest share that these candidates can save of this "
        f"model's FLOPs at this length is {largest:.2f}."
    )


def _choose(modules: list[_Module], widths: list[set[int]], share: float) -> list[tuple[int, int]] | None:
    """Ratio and width of each module that together save a share with the least error; `None`: they can't."""
    # Least error by units saved; the first half is for what costs more than it saves.
    best = np.full(2 * UNITS + 1, np.inf)
    best[UNITS] = 0.0
    taken: list[np.ndarray] = []
    options = [list(product(module.savings, sorted(each))) for module, each in zip(modules, widths, strict=True)]
    for module, each in zip(modules, options, strict=True):
        after, choice = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.int64)
        for index, (ratio, width) in enumerate(each):
            shifted = _shifted(best, round(module.saving(ratio, width) * UNITS)) + module.error(ratio, width)
            choice[shifted < after] = index
            after = np.minimum(after, shifted)
        best = after
        taken.append(choice)
    at = _cheapest(best, share)
    if at is None:
        return None
    chosen = []
    for module, each, choice in zip(reversed(modules), reversed(options), reversed(taken), strict=True):
        ratio, width = each[choice[at]]
        chosen.append((ratio, width))
        at -= round(module.saving(ratio, width) * UNITS)
    return chosen[::-1]


def _cheapest(errors: np.ndarray, share: float) -> int | None:
    """Where the error is least among what saves a share, to within half of what is tolerated or nearly all of it."""
    for tolerance in (0.5 * TOLERANCE, 0.9 * TOLERANCE):
        low, high = (UNITS + round((share + side) * UNITS) for side in (-tolerance, tolerance))
        window = errors[low : high + 1]
        if len(window) and np.isfinite(window).any():
            return low + int(window.argmin())
    return None


def _shifted(values: np.ndarray, by: int) -> np.ndarray:
    out = np.full_like(values, np.inf)
    if by >= 0:
        out[by:] = values[: len(values) - by]
    else:
        out[:by] = values[-by:]
    return out


def _config_of(modules: list[_Module], rows: Rows, widths: dict[str, int], fields: dict[str, Any]) -> VariatorConfig:
    pattern = {
        module.name: widths[module.name]
        for module in modules
        if module.width and any(row[module.name] > 1 for row in rows.values())
    }
    extra: dict[str, Any] = {"correction_pattern": pattern} if pattern else {}
    return VariatorConfig(ratio_schedule=rows, **extra, **fields)


def _saved_by(
    base: nn.Module,
    config: VariatorConfig,
    batches: list[dict[str, Any]],
    targets: dict[int, float],
    inputs: dict[str, Any],
    total: int,
) -> dict[int, float]:
    """The share that each row really saves."""
    model: Any = _trial(base, config)
    try:
        if config.keep_outliers is not None:  # which neurons are copied changes no FLOPs
            calibrate(model, batches)
        saved = {}
        for k in targets:
            model.set_compression_ratio(k)
            saved[k] = 1 - count_flops(model, inputs) / total
        return saved
    finally:
        model.unload()
