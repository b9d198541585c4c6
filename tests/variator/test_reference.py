"""The layer inside real models against plain loops over groups, on random lengths, masks, ratios and kept tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_variator import VariatorConfig
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BERT, FIRST_WORD, LLAMA, Case, by_name

from .reference import feed_forward_of, kept_ends, plugin_output, text_groups, watch


CASES = {case.name: case for case in ALL}
LAYOUTS = [CASES[name] for name in ("bert", "distilbert", "albert", "bart", "t5-encoder", "opt", "llama", "gpt2")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def with_random_plugin(case: Case, dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(case.build(), VariatorConfig(init_weights=False, bottleneck_dim=8, **fields)).to(dtype)
    for name, parameter in model.named_parameters():
        if "variator_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def check_text(model: PeftModel, case: Case, mask: Tensor, rules: VariatorConfig, ids: Tensor | None = None) -> None:
    """Compare every feed-forward network of a call with the loops, on the tokens that are no padding."""
    inputs = case.inputs(*mask.shape)
    inputs |= {"attention_mask": mask} | ({} if ids is None else {"input_ids": ids})
    ids, groups = inputs["input_ids"], []
    for row, sequence in zip(ids.tolist(), mask.tolist(), strict=True):
        kept = kept_ends(sequence, rules.keep_first_tokens, rules.keep_last_tokens)
        if case.kind == "causal":
            kept |= kept_ends(sequence, 0, 1)
        kept |= {position for position, token in enumerate(row) if token in rules.keep_token_ids}
        groups.append(text_groups(sequence, kept, rules.compression_ratio))
    with torch.no_grad():
        seen_networks = watch(model, lambda: model(**inputs))
        assert len(seen_networks) >= 2
        for seen in seen_networks:
            assert seen.rows == sum(map(len, groups))
            tokens = seen.inputs.view(*mask.shape, -1)
            expected = plugin_output(seen.layer, feed_forward_of(model, seen), tokens, groups, "default")
            real = mask.bool()
            assert seen.outputs is not None
            outputs = seen.outputs.view(expected.shape)
            tolerance = TOLERANCE[expected.dtype] * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(outputs[real], expected[real], rtol=0, atol=tolerance)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Attention masks with padding on the right, on the left, on both sides, with holes, and none."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 13))
    kind = draw(st.sampled_from(["none", "right", "left", "both", "holes", "alike"]))
    rows = []
    for _ in range(batch):
        first, last = sorted((draw(st.integers(0, length)), draw(st.integers(0, length))))
        first = first if kind in ("left", "both") else 0
        last = last if kind in ("right", "both") else length
        row = [int(first <= position < last) for position in range(length)]
        if kind == "holes":
            row = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        rows.append(row)
    return torch.tensor(rows[:1] * batch if kind == "alike" else rows)


@st.composite
def settings_of_a_plugin(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "compression_ratio": draw(st.integers(2, 16)),
        "scoring": draw(st.sampled_from(["token", "concat"])),
        "keep_first_tokens": draw(st.integers(0, 3)),
        "keep_last_tokens": draw(st.integers(0, 3)),
        "keep_token_ids": draw(st.lists(st.integers(FIRST_WORD, FIRST_WORD + 40), max_size=8)),
        "output_bias": draw(st.booleans()),
    }


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
@settings(max_examples=50, deadline=None)
@given(mask=masks(), fields=settings_of_a_plugin())
def test_any_mask_ratio_and_kept_tokens(case: Case, mask: Tensor, fields: dict[str, Any]) -> None:
    model = with_random_plugin(case, **fields)
    check_text(model, case, mask, model.peft_config["default"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scoring", ["token", "concat"])
@pytest.mark.parametrize("case", LAYOUTS, ids=by_name)
def test_every_layout_of_a_feed_forward_network(case: Case, scoring: str, dtype: torch.dtype) -> None:
    model = with_random_plugin(case, dtype, compression_ratio=3, scoring=scoring, keep_token_ids=[20, 30])
    uneven = torch.tensor([[1] * 11, [1] * 5 + [0] * 6, [0] * 8 + [1] * 3])
    for mask in (torch.ones(2, 11, dtype=torch.long), uneven):
        check_text(model, case, mask, model.peft_config["default"])


@pytest.mark.parametrize("case", LAYOUTS, ids=by_name)
def test_a_sequence_of_padding_alone(case: Case) -> None:
    model = with_random_plugin(case, compression_ratio=3)
    check_text(model, case, torch.tensor([[1] * 7, [0] * 7]), model.peft_config["default"])


@pytest.mark.parametrize("case", LAYOUTS, ids=by_name)
def test_a_batch_of_padding_alone_is_finite(case: Case) -> None:
    model = with_random_plugin(case, compression_ratio=3)
    with torch.no_grad():
        seen = watch(model, lambda: model(**case.inputs(2, 5), attention_mask=torch.zeros(2, 5, dtype=torch.long)))
    assert all(network.rows == 0 and torch.isfinite(network.outputs).all() for network in seen)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("scoring", ["token", "concat"])
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_sequences_shorter_than_a_group(case: Case, scoring: str, length: int) -> None:
    fields = {"scoring": scoring, "keep_first_tokens": 0, "keep_last_tokens": 0}
    model = with_random_plugin(case, compression_ratio=32, **fields)
    if length > 1 or case is BERT:
        check_text(model, case, torch.ones(2, length, dtype=torch.long), model.peft_config["default"])


def test_many_runs_are_packed_and_few_are_not() -> None:
    """Kept words cut a sequence into so many runs that both groupings are met; both give what the loops give."""
    model = with_random_plugin(BERT, compression_ratio=3, keep_token_ids=[FIRST_WORD])
    rules = model.peft_config["default"]
    for every in (2, 3, 7, 20):
        ids = torch.full((2, 21), FIRST_WORD + 1) + torch.arange(21)
        ids[:, ::every] = FIRST_WORD
        check_text(model, BERT, torch.ones(2, 21, dtype=torch.long), rules, ids)


def test_kept_words_differ_between_the_sequences_of_a_batch() -> None:
    model = with_random_plugin(BERT, compression_ratio=3, keep_token_ids=[FIRST_WORD])
    ids = torch.randint(FIRST_WORD + 1, 99, (2, 12))
    ids[0, 4] = ids[1, 7] = FIRST_WORD
    check_text(model, BERT, torch.ones(2, 12, dtype=torch.long), model.peft_config["default"], ids)


def test_ratio_pattern_gives_each_layer_its_own_ratio() -> None:
    pattern = {r"layer\.0\.intermediate": 1, "1.intermediate": 2}
    model = with_random_plugin(BERT, compression_ratio=4, ratio_pattern=pattern)
    seen = watch(model, lambda: model(**BERT.inputs(1, 10)))
    assert [network.rows for network in seen] == [10, 6]


@pytest.mark.parametrize("case", LAYOUTS, ids=by_name)
def test_gradients_of_the_plugin_are_those_of_the_loops(case: Case) -> None:
    model = with_random_plugin(case, compression_ratio=3)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    inputs = case.inputs(2, 8) | {"attention_mask": mask}
    network = next(module for module in model.modules() if isinstance(module, VariatorLayer))
    seen = next(iter(watch(model, lambda: model(**inputs))))
    weight = torch.randn(seen.outputs.view(2, 8, -1).shape) * mask.unsqueeze(-1)
    groups = [text_groups(row, kept_ends(row, 1, 1), 3) for row in mask.tolist()]
    expected = plugin_output(network, feed_forward_of(model, seen), seen.inputs.view(weight.shape), groups, "default")
    (expected * weight).sum().backward()
    by_loops = {name: p.grad.clone() for name, p in network.named_parameters() if "variator_" in name}
    model.zero_grad()

    outputs = []
    end = next((m for m in model.modules() if getattr(m, "start_name", None) == network.name), network)
    handle = end.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(**inputs)
    handle.remove()
    (outputs[0].view(weight.shape) * weight).sum().backward()
    for name, parameter in network.named_parameters():
        if "variator_" in name:
            torch.testing.assert_close(parameter.grad, by_loops[name], rtol=1e-4, atol=1e-4)
