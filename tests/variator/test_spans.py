"""Plugins around whole layers (`layer_spans`), held against a loop over groups."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_variator import VariatorConfig, allocate, using_ratio
from peft_variator.profiling import count_flops
from peft_variator.training.evaluation import measure_quality
from peft_variator.tuners.variator.spans import SPANNED
from tests.tiny_models import ALL, BERT, Case, by_name, outputs_of

from .reference import (
    _scores,
    assert_same,
    assert_the_plugin_alone_learns,
    first,
    layers_of,
    window_groups,
    with_plugin,
)


LAYERS = 5


def _deep(name: str, **fields: Any) -> Case:
    case = next(case for case in ALL if case.name == name)
    config = case.config
    if "vision_config" in config:
        config = config | {"vision_config": config["vision_config"] | {"num_hidden_layers": LAYERS}}
    elif "encoder_layers" in config:
        config = config | {"encoder_layers": LAYERS}
    else:
        config = config | {"num_hidden_layers": LAYERS}
    return replace(case, config=config | fields)


WHISPER, VIT, LLAVA = _deep("whisper"), _deep("vit"), _deep("llava")
IMAGES = [_deep(name) for name in ("dinov2", "dinov2-registers", "clip-vision", "siglip-vision", "ijepa", "vit-msn")]
CASES = [WHISPER, VIT, *IMAGES]
KEEP = {"keep_first_tokens": 0, "keep_last_tokens": 0}


def stack_of(case: Case, model: Any) -> nn.ModuleList:
    """The layers of the encoder."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = base.get_encoder() if case is WHISPER else base
    return next(module for module in inner.modules() if isinstance(module, nn.ModuleList) and len(module) == LAYERS)


def groups_of(case: Case, model: Any, length: int, ratio: int) -> list[list[int]]:
    """Positions of each group."""
    if case is WHISPER:
        return [list(range(start, min(start + ratio, length))) for start in range(0, length, ratio)]
    side = int(length**0.5)
    prefix = length - side * side
    wide = {2: 2, 4: 2, 6: 3}[ratio]
    return window_groups(prefix, side, side, ratio // wide, wide)


def reference(case: Case, model: PeftModel, inputs: dict[str, Tensor], spans: list[list[int]], ratio: int) -> Tensor:
    """The first output of the base, whose layers are fed means of groups by hooks."""
    base = case.build().eval()
    blocks, plugins, open_spans = stack_of(case, base), layers_of(model), {}
    for (start, last), plugin in zip(spans, plugins, strict=True):

        def merge(_: nn.Module, args: tuple[Any, ...], plugin: Any = plugin, start: int = start) -> tuple[Any, ...]:
            tokens = args[0]
            groups = groups_of(case, base, tokens.shape[1], ratio)
            rows = torch.zeros(tokens.shape[0], len(groups), tokens.shape[2])
            for text in range(len(tokens)):
                for row, group in enumerate(groups):
                    members = [tokens[text, position] for position in group]
                    weights = torch.softmax(_scores(plugin.variator_scorer["default"], members), dim=0)
                    rows[text, row] = sum(weight * member for weight, member in zip(weights, members, strict=True))
            open_spans[start] = tokens, rows, groups
            return (rows, *args[1:])

        def expand(_: nn.Module, args: Any, output: Tensor, plugin: Any = plugin, start: int = start) -> Tensor:
            tokens, rows, groups = open_spans[start]
            down, up = plugin.variator_down_output["default"], plugin.variator_up["default"]
            result = tokens.clone()
            for text in range(len(tokens)):
                for row, group in enumerate(groups):
                    added = output[text, row] - rows[text, row]
                    for position in group:
                        inner = down(added) + plugin.variator_down_input["default"](tokens[text, position])
                        correction = up(inner.tanh()) if len(group) > 1 else 0
                        result[text, position] = tokens[text, position] + added + correction
            return result

        blocks[start].register_forward_pre_hook(merge)
        blocks[last].register_forward_hook(expand)
    return first(base, inputs)


@pytest.mark.parametrize("spans", [[[1, 3]], [[0, 4]], [[2, 2]], [[0, 1], [3, 4]]], ids=str)
@pytest.mark.parametrize(("case", "ratio"), [(WHISPER, 4), (WHISPER, 3), (VIT, 4), (VIT, 6), (IMAGES[0], 2)])
def test_against_a_loop_over_groups(case: Case, ratio: int, spans: list[list[int]]) -> None:
    model, inputs = with_plugin(case, layer_spans=spans, compression_ratio=ratio, **KEEP), case.inputs()
    assert [layer.is_span for layer in layers_of(model)] == [True] * len(spans)
    expected = reference(case, model, inputs, spans, ratio)
    torch.testing.assert_close(first(model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_the_base_bit_for_bit_at_one_disabled_and_unloaded(case: Case) -> None:
    # Frozen as PEFT freezes it: the order in which torch's own attention sums may depend on that.
    inputs, expected = case.inputs(), outputs_of(case.build().eval().requires_grad_(False), case.inputs())
    model = with_plugin(case, layer_spans=[[1, 3]], compression_ratio=4, compensation_rank=2)
    assert not torch.equal(first(model, inputs), next(iter(expected.values())))
    with using_ratio(model, 1):
        assert_equal(outputs_of(model, inputs), expected)
    with model.disable_adapter():
        assert_equal(outputs_of(model, inputs), expected)
    assert_equal(outputs_of(model.unload(), inputs), expected)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("spans", [[[1, 3]], [[0, 4]], [[2, 2]], [[0, 1], [2, 4]]], ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_hidden_states_are_those_of_tokens_everywhere(case: Case, spans: list[list[int]]) -> None:
    """Inside of a span they are a token's residual and what was added to its group."""
    model = with_plugin(case, layer_spans=spans, compression_ratio=4, **KEEP)
    inputs, base = case.inputs(), case.build().eval()
    key = "encoder_hidden_states" if case is WHISPER else "hidden_states"
    seen: list[Tensor] = []
    for layer in stack_of(case, model):  # what comes out of layers, and so into the next
        layer.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True)[key]
        expected = base(**inputs, output_hidden_states=True)[key]
    assert [state.shape for state in found] == [state.shape for state in expected]
    start, last = spans[0]
    for number in range(start + 1):
        assert torch.equal(found[number], expected[number])
    tokens = found[start]
    groups = groups_of(case, base, tokens.shape[1], 4)
    for number in range(start + 1, last + 1):
        for group in groups:
            added = (found[number] - tokens)[:, group]
            torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=1e-4, atol=1e-4)
    as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
    states = next(part for part in as_tuple if isinstance(part, tuple) and len(part) == LAYERS + 1)
    if case is not WHISPER:
        assert all(torch.equal(one, other) for one, other in zip(states, found, strict=True))


def test_a_vision_language_model_takes_states_of_patches_from_inside_of_a_span() -> None:
    model = with_plugin(LLAVA, layer_spans=[[1, 4]], compression_ratio=4)  # LLaVA reads the one before the last
    base, inputs = LLAVA.build().eval(), LLAVA.inputs()
    assert [layer.name for layer in layers_of(model)] == ["model.vision_tower.encoder.layers.1"]
    assert first(model, inputs).shape == first(base, inputs).shape
    model.set_compression_ratio(1)
    assert torch.equal(first(model, inputs), first(base, inputs))


@pytest.mark.parametrize("case", [WHISPER, VIT], ids=by_name)
def test_saved_loaded_copied_and_pickled(case: Case, tmp_path: Path) -> None:
    model = with_plugin(case, layer_spans=[[1, 3]], compression_ratio=4, compensation_rank=2)
    inputs = case.inputs()
    expected = first(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.build(), str(tmp_path)).eval()
    assert_same(first(loaded, inputs), expected)
    assert loaded.peft_config["default"].layer_spans == [[1, 3]]
    assert_same(first(copy.deepcopy(loaded), inputs), expected)
    assert_same(first(pickle.loads(pickle.dumps(loaded)), inputs), expected)  # as a pool of processes does
    loaded.load_adapter(str(tmp_path), "second")
    loaded.set_adapter("second")
    loaded.delete_adapter("default")
    assert_same(first(loaded, inputs), expected)


@pytest.mark.parametrize("case", [WHISPER, VIT], ids=by_name)
def test_the_plugin_alone_learns_with_its_compensation_in_all_layers(case: Case) -> None:
    model = with_plugin(case, layer_spans=[[1, 3]], compression_ratio=4, compensation_rank=2).train()
    assert_the_plugin_alone_learns(model, case)
    names = {name.partition(".variator_")[0] for name, _ in model.named_parameters() if "compensation" in name}
    numbers = {part for name in names for part in name.split(".") if part.isdigit()}
    assert numbers == {"1", "2", "3"}


@pytest.mark.parametrize("case", [WHISPER, VIT], ids=by_name)
def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = with_plugin(case, layer_spans=[[1, 3]], compression_ratio=4, compensation_rank=2).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        next(iter(model(**case.inputs()).values())).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [WHISPER, VIT], ids=by_name)
def test_a_call_that_trains_keeps_nothing_alive(case: Case) -> None:
    model = with_plugin(case, layer_spans=[[1, 3]], compression_ratio=4).train()
    seen: list[weakref.ref[Tensor]] = []
    for layer in stack_of(case, model):
        layer.register_forward_hook(lambda _, args, output: seen.append(weakref.ref(output)))
    for _ in range(2):
        next(iter(model(**case.inputs()).values())).sum().backward()
    gc.collect()
    assert seen
    assert not any(each() is not None for each in seen)


@pytest.mark.parametrize("case", [VIT, IMAGES[0]], ids=by_name)
def test_compiled_and_exported(case: Case) -> None:
    model, inputs = with_plugin(case, layer_spans=[[1, 3]], compression_ratio=4, compensation_rank=2), case.inputs()
    with torch.no_grad():
        expected = first(model, inputs)
        compiled = torch.compile(model, fullgraph=True)(**inputs)
        exported = torch.export.export(model, (), inputs).module()(**inputs)
    torch.testing.assert_close(next(iter(compiled.values())), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(next(iter(exported.values())), expected, rtol=1e-4, atol=1e-4)


def test_attention_costs_less_too() -> None:
    inputs = VIT.inputs()
    layers = count_flops(with_plugin(VIT, layer_spans=[[0, 4]], bottleneck_dim=1), inputs)
    networks = count_flops(with_plugin(VIT, bottleneck_dim=1), inputs)
    assert layers < 0.5 * count_flops(VIT.build().eval(), inputs) < networks


def test_threads_at_different_ratios() -> None:
    model, inputs = with_plugin(WHISPER, layer_spans=[[1, 3]], compression_ratio=4), WHISPER.inputs()
    expected = {}
    for k in (1, 2, 4):
        with using_ratio(model, k):
            expected[k] = first(model, inputs)
    wrong: list[int] = []

    def run(k: int) -> None:
        for _ in range(5):
            with using_ratio(model, k):
                if not torch.equal(first(model, inputs), expected[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in (1, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_quality_is_measured() -> None:
    model = with_plugin(VIT, layer_spans=[[1, 3]], compression_ratio=4)
    assert 0 < measure_quality(model, [VIT.inputs()])["cosine"] < 1


@pytest.mark.parametrize(
    "spans",
    [[], [[1]], [[1, 2, 3]], [[3, 1]], [[-1, 2]], [[0, 2], [2, 3]], [[2, 3], [0, 1]], [[0, 1.5]], [["0", "1"]], 3],
    ids=str,
)
def test_what_are_no_spans_is_refused(spans: Any) -> None:
    with pytest.raises(ValueError, match="layer_spans"):
        VariatorConfig(layer_spans=spans)


@pytest.mark.parametrize(
    "fields",
    [
        {"decompression": "neurons"},
        {"end_module": "fc2"},
        {"stack_module": "encoder"},
        {"layers_to_transform": [1]},
        {"keep_outliers": 0.1},
        {"ratio_schedule": {4: {"layers.1": 2}}},
    ],
    ids=str,
)
def test_fields_that_describe_networks_are_refused_beside_spans(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        VariatorConfig(layer_spans=[[0, 1]], **fields)


def test_spans_take_tuples_and_the_bottleneck() -> None:
    config = VariatorConfig(layer_spans=[(0, 1), (3, 3)], correction_dim=16)
    assert config.layer_spans == [[0, 1], [3, 3]]
    assert (config.decompression, config.bottleneck_dim) == ("bottleneck", 16)


@pytest.mark.parametrize("case", [case for case in ALL if case.core and case.model_type not in SPANNED], ids=by_name)
def test_models_whose_layers_take_more_are_refused_before_anything_changes(case: Case) -> None:
    if any(
        getattr(module, "config", None) and module.config.model_type in SPANNED for module in case.build().modules()
    ):
        pytest.skip("a part of it can have spans")
    model = case.build()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="layer_spans"):
        get_peft_model(model, VariatorConfig(layer_spans=[[0, 0]]))
    assert [name for name, _ in model.named_modules()] == before


def test_layers_that_there_are_not_and_other_targets() -> None:
    with pytest.raises(ValueError, match="5 layers, 0 to 4"):
        get_peft_model(VIT.build(), VariatorConfig(layer_spans=[[3, 5]]))
    with pytest.raises(ValueError, match="starts"):
        get_peft_model(VIT.build(), VariatorConfig(layer_spans=[[1, 2]], target_modules=["layers.2"]))
    with pytest.raises(ValueError, match="BertModel"):
        get_peft_model(BERT.build(), VariatorConfig(layer_spans=[[1, 1]], target_modules=r"encoder\.layer\.1"))
    with pytest.raises(ValueError, match="layer_spans"):
        allocate(VIT.build(), [VIT.inputs()], layer_spans=[[1, 2]])


@pytest.mark.parametrize(("there", "added"), [([[1, 3]], None), (None, [[1, 3]]), ([[1, 3]], [[0, 1]])])
def test_plugins_around_other_modules_are_refused_beside_one_another(
    there: list[list[int]] | None, added: list[list[int]] | None
) -> None:
    """One would be inside of another, and merge for it in part."""
    model, inputs = with_plugin(VIT, layer_spans=there, compression_ratio=4), VIT.inputs()
    expected, names = first(model, inputs), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="beside one another"):
        model.add_adapter("second", VariatorConfig(layer_spans=added))
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(first(model, inputs), expected)
    model.add_adapter("third", VariatorConfig(layer_spans=there, compression_ratio=2))


def test_a_mask_beside_the_hidden_states_is_refused() -> None:
    model = with_plugin(VIT, layer_spans=[[1, 3]], compression_ratio=4)
    layer = layers_of(model)[0]
    layer.register_forward_pre_hook(lambda _, args: (args[0], torch.ones(2, 37)))
    with pytest.raises(ValueError, match="beside the hidden states"):
        model(**VIT.inputs())
