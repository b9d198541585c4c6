"""The plainest version of a Variator plugin: loops over sequences, groups and members. Independent of the package."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_variator import VariatorConfig
from peft_variator.tuners.variator.layer import FeedForwardEnd, VariatorLayer
from tests.tiny_models import Case, outputs_of


FeedForward = Callable[[Tensor], Tensor]


def text_groups(real: Sequence[bool], kept: Collection[int], ratio: int) -> list[list[int]]:
    """Groups of one sequence, each a list of positions.

    Args:
        real: which positions hold a token.
        kept: positions that are never merged.
        ratio: the compression ratio k.
    """
    groups: list[list[int]] = []
    open_group: list[int] = []
    for position, is_real in enumerate(real):
        if not is_real:
            continue
        if position in kept:
            open_group = []
            groups.append([position])
            continue
        if not open_group or len(open_group) == ratio:
            open_group = []
            groups.append(open_group)
        open_group.append(position)
    return groups


def kept_ends(real: Sequence[bool], first: int, last: int) -> set[int]:
    """Positions of the first and the last real tokens of one sequence."""
    positions = [position for position, is_real in enumerate(real) if is_real]
    return set(positions[:first]) | set(positions[len(positions) - min(last, len(positions)) :])


def window_groups(prefix: int, height: int, width: int, tall: int, wide: int) -> list[list[int]]:
    """Groups of one image whose patches are merged in windows."""
    groups = [[position] for position in range(prefix)]
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            groups.append(
                [
                    prefix + row * width + column
                    for row in range(top, min(top + tall, height))
                    for column in range(left, min(left + wide, width))
                ]
            )
    return groups


def plugin_output(
    layer: VariatorLayer, feed_forward: FeedForward, tokens: Tensor, groups: list[list[list[int]]], adapter: str
) -> Tensor:
    """What a feed-forward network with a plugin gives: one loop turn for every group.

    Args:
        layer: holds the plugin's weights.
        feed_forward: the base model's network, on a vector of shape `(dim,)`.
        tokens: shape `(batch, length, dim)`.
        groups: positions of each group of each sequence.
        adapter: name of the plugin.
    """
    output = torch.zeros_like(tokens)
    for index, sequence in enumerate(groups):
        for group in sequence:
            members = [tokens[index, position] for position in group]
            if len(members) == 1:
                output[index, group[0]] = feed_forward(members[0])
                continue
            weights = torch.softmax(_scores(layer.variator_scorer[adapter], members), dim=0)
            merged = sum(weight * member for weight, member in zip(weights, members, strict=True))
            result = feed_forward(merged)
            for position, member in zip(group, members, strict=True):
                inner = layer.variator_down_output[adapter](result) + layer.variator_down_input[adapter](member)
                output[index, position] = result + layer.variator_up[adapter](torch.tanh(inner))
    return output


def _scores(scorer: nn.Linear, members: list[Tensor]) -> Tensor:
    if scorer.out_features == 1 and scorer.in_features == members[0].numel():
        return torch.cat([scorer(member) for member in members])
    missing = scorer.in_features // members[0].numel() - len(members)
    padded = torch.cat(members + [torch.zeros_like(members[0])] * missing)
    return scorer(padded)[: len(members)]


@dataclass
class Seen:
    """What one feed-forward network saw and gave in a call."""

    name: str
    layer: VariatorLayer
    inputs: Tensor
    outputs: Tensor | None = None
    rows: int = 0


def watch(model: nn.Module, call: Callable[[], Any]) -> list[Seen]:
    """Run `call` and note input, output and number of vectors of every feed-forward network with a plugin."""
    seen: list[Seen] = []
    ends = {module.start_name: module for module in model.modules() if isinstance(module, FeedForwardEnd)}
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, VariatorLayer):
            continue

        def before(layer: VariatorLayer, args: tuple[Any, ...], name: str = name) -> None:
            seen.append(Seen(name, layer, args[0].detach().clone()))

        def count(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[-1].rows += args[0].numel() // args[0].shape[-1]

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output  # of experts, with what routers say
            seen[-1].outputs = output.detach().clone()

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.base_layer.register_forward_pre_hook(count))
        handles.append(ends.get(module.name, module).register_forward_hook(after))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def layers_of(model: nn.Module) -> list[VariatorLayer]:
    """The layers of a model that have plugins."""
    return [module for module in model.modules() if isinstance(module, VariatorLayer)]


def with_plugin(case: Case, **fields: Any) -> PeftModel:
    """The model of a case with a plugin of random weights, in evaluation mode."""
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(init_weights=False, **fields)).eval()


def first(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of a model."""
    with torch.no_grad():
        return next(iter(outputs_of(model, inputs).values()))


def feed_forward_of(model: PeftModel, seen: Seen) -> FeedForward:
    """The base model's network behind a plugin, for the architectures whose network is one module or two."""
    ends = {module.start_name: module for module in model.modules() if isinstance(module, FeedForwardEnd)}
    end = ends.get(seen.layer.name)
    parent = model.get_base_model().get_submodule(seen.layer.name.rpartition(".")[0])

    def run(vector: Tensor) -> Tensor:
        hidden = seen.layer.base_layer(vector.view(1, 1, -1))
        if end is None:
            return hidden.flatten()
        if hasattr(parent, "activation_fn"):  # the activation is the block's, between two linear maps
            hidden = parent.activation_fn(hidden)
        elif hasattr(parent, "activation"):
            hidden = parent.activation(hidden)
        return end.base_layer(hidden).flatten()

    return run


def assert_the_plugin_alone_learns(model: nn.Module, case: Case) -> None:
    """Train for three steps: every parameter of the plugin moves, and none of the base model's."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for seed in range(3):
        next(iter(model(**case.inputs(2, 12, seed)).values())).pow(2).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("variator_" not in name), name


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Outputs of two models with the same float32 weights: on some processors the last bit of a product depends on
    where in memory a weight lies, and the layers after it add to that (3e-6 was seen in a LLaVA). A weight that was
    not loaded moves an output by far more than this allows."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
