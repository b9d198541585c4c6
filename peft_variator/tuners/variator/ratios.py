"""Choosing a plugin's compression ratio at run time: for all callers of a model, or for one thread or task."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ...compat import export_annotation
from ...field_types import whole_number
from .forward_context import RATIO_NOTE, PluginRatios, Selection, selected
from .layer import VariatorLayer, plugin_layers


__all__ = [
    "compression_ratio_of",
    "exported_ratio",
    "layers_of",
    "set_compression_ratio",
    "set_min_tokens",
    "using_ratio",
]

# Modules whose code stands between a user's and this one's.
_BETWEEN = re.compile(r"(peft_variator(?!\.cli\b)|peft|contextlib)\b")


def set_compression_ratio(model: nn.Module, k: int, adapter_name: str | None = None) -> None:
    """Change the compression ratio k at run time, for every module of a plugin, those of `ratio_pattern` included.

    It counts for every call that starts from now on, in all threads; a call that is under way keeps its ratio. See
    [`using_ratio`] for one that counts in this thread or task alone. With `scoring="concat"` the ratio of the
    configuration gives every module the ratio that it was trained for. The saved configuration keeps the ratio that
    the plugin was made with. A ratio that the plugin was not trained for (`trained_ratios`) works and warns once.

    Args:
        model: a model with a Variator plugin, from `get_peft_model` or loaded with transformers' `load_adapter`.
        k: the ratio, from 1 (the exact base model) upwards.
        adapter_name: which plugin; `None`: the active one.

    Raises:
        ValueError: `k` is not a positive integer, the model has no such plugin, or the plugin's scores are tied to
            another ratio (`scoring="concat"`), or it has a `ratio_schedule` without such a row.
    """
    k = whole_number("compression_ratio", k, 1)
    for ratios, name in _ratios_of(_chosen(model, k, adapter_name)):
        ratios.choose(name, k)


def set_min_tokens(model: nn.Module, min_tokens: int, adapter_name: str | None = None) -> None:
    """Have calls of fewer tokens run the base model, bit for bit: what is too small for a plugin to pay.

    A plugin costs a call some time of its own, which a single short text may not win back. Tokens are counted in a
    whole call: batch times length with padding, or patches, or frames, in each tower of a model by itself. So what a
    text gives depends on what it is batched with. It counts for every call that starts from now on, in evaluation
    mode (`model.eval()`) and at the ratio that is set for all callers: inside of [`using_ratio`], in training mode, in
    `DistillationTrainer`, in an exported or traced program and in what `fold_updates` made, calls of any size are
    merged. It is a fact of the machine, and not saved. `LatencyTable.min_tokens` of `peft_variator.runtime` gives a
    number that was measured.

    Args:
        model: a model with a Variator plugin, from `get_peft_model` or loaded with transformers' `load_adapter`.
        min_tokens: the fewest tokens of a call that is merged; 0: any.
        adapter_name: which plugin; `None`: the active one.

    Raises:
        ValueError: `min_tokens` is no integer of at least 0, the model has no such plugin, or its weights were made
            for one ratio (`fold_updates`).
    """
    min_tokens = whole_number("min_tokens", min_tokens, 0)
    chosen = layers_of(model, adapter_name)
    if any(layer.stack is not None and layer.stack.merges_for_good for layer, _ in chosen):
        raise ValueError(
            f"min_tokens={min_tokens}: fold_updates made this model's weights for calls that are merged, of any size. "
            "Set it on the model that it was made from, and call that one."
        )
    for ratios, name in _ratios_of(chosen):
        ratios.require(name, min_tokens)


@contextmanager
def using_ratio(model: nn.Module, k: int, adapter_name: str | None = None) -> Iterator[None]:
    """Use a plugin at a compression ratio inside of a `with` block, in this thread or task alone.

    Covers every call of the model inside the block, `generate` included, whatever `set_compression_ratio` and
    `set_adapter` do elsewhere meanwhile. Blocks nest; of several that are open, the one that was entered last counts,
    and those of generators that run by turns may be left in any order. asyncio tasks and `asyncio.to_thread` that are
    started inside inherit it; threads that are started by other means do not. A block that is left in another thread
    or task than it was entered in ends everywhere, for those that inherited it, too. A plugin that is switched off
    (`disable_adapter`) stays so, and [`set_min_tokens`] does not count inside. Code compiled with
    `torch.compile(fullgraph=True)` raises an error while any block is open.

    Args:
        model: a model with a Variator plugin, from `get_peft_model` or loaded with transformers' `load_adapter`.
        k: the ratio, from 1 (the exact base model) upwards.
        adapter_name: which plugin; `None`: the one that is active when the block is entered.

    Raises:
        ValueError: as [`set_compression_ratio`]; or the plugin is not the active one, and one of the two has modules
            of its own beside the networks (`modules_to_save`, such as a classifier's head), which follow
            `set_adapter` alone.
    """
    k = whole_number("compression_ratio", k, 1)
    chosen = _chosen(model, k, adapter_name)
    if adapter_name is not None:
        _check_modules_beside(model, adapter_name, {name for layer, _ in chosen for name in layer.rules})
    with ExitStack() as stack:
        for ratios, name in _ratios_of(chosen):
            stack.enter_context(selected(ratios, Selection(name, k)))
        yield


def _check_modules_beside(model: nn.Module, adapter_name: str, plugins: set[str]) -> None:
    """Refuse a plugin under whose networks another one's head would run."""
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            held = set(module.modules_to_save)
        elif isinstance(module, TrainableTokensWrapper):
            held = set(module.token_adapter.trainable_tokens_delta)
        else:
            continue
        active = set(module.active_adapters)
        if module.disable_adapters or adapter_name in active or not held & (active & plugins | {adapter_name}):
            continue
        raise ValueError(
            f"using_ratio: the plugin {adapter_name!r} is not the active one, and {path!r} is a module that each of "
            f"{sorted(held)} has of its own (modules_to_save), which a block cannot choose. Choose the plugin with "
            f"set_adapter({adapter_name!r}) instead; a block may then choose its ratio."
        )


def compression_ratio_of(model: nn.Module, adapter_name: str | None = None) -> int:
    """The compression ratio k of a plugin, as it was made or last set for all callers.

    Args:
        model: a model with a Variator plugin.
        adapter_name: which plugin; `None`: the active one.

    Raises:
        ValueError: the model has no such plugin.
    """
    layer, name = layers_of(model, adapter_name)[0]
    return layer.ratios.chosen.get(name, layer.configs[name].compression_ratio)


def exported_ratio(program: ExportedProgram | GraphModule) -> int | None:
    """The compression ratio k that a program was exported with.

    It stands in the metadata of the program's nodes, `node.meta["custom"]["peft_variator.compression_ratio"]`, which
    `torch.export.save` writes.

    Args:
        program: from `torch.export.export` or `torch.export.load`, or its `module()`.

    Returns:
        k; `None`: no plugin was on, or the program was made by torch 2.8, which writes no such notes.
    """
    return export_annotation(program, RATIO_NOTE)


def _chosen(model: nn.Module, k: int, adapter_name: str | None) -> list[tuple[VariatorLayer, str]]:
    """The layers of a plugin, each with the plugin's name, if all of them can take the ratio."""
    chosen = layers_of(model, adapter_name)
    for layer, name in chosen:
        layer.rule_at(name, k)
    for layer, name in chosen[:1]:
        _warn_if_untrained(layer, name, k)
    return chosen


def _ratios_of(chosen: list[tuple[VariatorLayer, str]]) -> Iterable[tuple[PluginRatios, str]]:
    """The ratios that the layers of a plugin share, each once, with the plugin's name."""
    return dict.fromkeys((layer.ratios, name) for layer, name in chosen)


def layers_of(model: nn.Module, adapter_name: str | None) -> list[tuple[VariatorLayer, str]]:
    """The layers of a plugin, each with the plugin's name.

    Args:
        model: a model with a Variator plugin.
        adapter_name: which plugin; `None`: the active one.

    Raises:
        TypeError: it is no model.
        ValueError: it has no such plugin.
    """
    if isinstance(model, ExportedProgram | GraphModule):
        ratio = exported_ratio(model)
        told = "has the one ratio that it was exported with" if ratio is None else f"has k = {ratio} for good"
        kind = TypeError if isinstance(model, ExportedProgram) else ValueError
        raise kind(
            f"This {type(model).__name__} {told}. Choose another ratio with set_compression_ratio on the model that "
            "it was made from, and export that again."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A {type(model).__name__} has no Variator plugin whose ratio could be chosen: name the model that it was "
            "made from. An exported program has one ratio, the one that it was exported with."
        )
    layers = list(plugin_layers(model))
    available = sorted({name for layer in layers for name in layer.rules})
    chosen = [(layer, name) for layer in layers for name in layer.rules if _is_chosen(layer, name, adapter_name)]
    if not chosen:
        missing = "active Variator plugin" if adapter_name is None else f"Variator plugin {adapter_name!r}"
        raise ValueError(f"The model has no {missing}. Its plugins are {available}.")
    return chosen


def _is_chosen(layer: VariatorLayer, name: str, adapter_name: str | None) -> bool:
    return name == adapter_name if adapter_name is not None else name in layer.active_adapters


def _warn_if_untrained(layer: VariatorLayer, name: str, k: int) -> None:
    trained = layer.configs[name].trained_ratios
    if layer.configs[name].ratio_schedule is not None:  # its rows are all that it has
        return
    if k == 1 or trained is None or k in trained or k in layer.ratios.warned.setdefault(name, set()):
        return
    layer.ratios.warned[name].add(k)
    warnings.warn(
        f"compression_ratio={k}: the plugin {name!r} was trained for the ratios {trained}. It works, and may lose "
        "more than at those.",
        UserWarning,
        stacklevel=_level_of_caller(),
    )


def _level_of_caller() -> int:
    """How many frames above the one that asks the user's code is: methods of a PeftModel, say, lie between.

    The command line, which tells warnings of its own package without a place, counts as the user.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _BETWEEN.match(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level
