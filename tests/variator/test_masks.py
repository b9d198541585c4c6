"""All ways to say which tokens there are: 4-D masks, packed texts, embeddings alone, positions of the caller's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from peft_variator.tuners.variator.attention_mask import (
    TokenOrder,
    real_tokens,
    single_mask,
    text_starts,
    token_ranks,
    with_those_before,
)
from peft_variator.tuners.variator.forward_context import CallFacts
from peft_variator.tuners.variator.token_groups import MergeRule, StackGroups
from tests.tiny_models import ALL, BERT, CAUSAL, ENCODERS, LLAMA, Case, by_name, outputs_of

from .reference import watch, with_plugin


LOWEST = torch.finfo(torch.float32).min
FORMS = ["2-D", "additive", "keys"]


def additive(allowed: Tensor) -> Tensor:
    """A 4-D mask to be added to the scores, from which tokens attend to which; `(batch, length, length)`."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, LOWEST).unsqueeze(1)


def in_form(form: str, mask: Tensor, causal: bool) -> Tensor:
    if form == "2-D":
        return mask
    length = mask.shape[1]
    allowed = mask.bool().unsqueeze(1).expand(-1, 1 if form == "keys" else length, -1)
    return additive(allowed & torch.ones(length, length).tril().bool() if causal else allowed)


def hidden(model: torch.nn.Module, **inputs: Any) -> Tensor:
    return next(iter(outputs_of(model, inputs).values()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_masks_with_four_dimensions_say_the_same(case: Case, form: str) -> None:
    if form == "keys" and case is LLAMA:
        pytest.skip("without the causal part it would be another model")
    model, ids = with_plugin(case), case.inputs(3, 12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, 9:] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = hidden(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    found = hidden(model, input_ids=ids, attention_mask=in_form(form, mask, case is LLAMA), position_ids=positions)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    arguments = {"input_ids": ids, "attention_mask": in_form(form, mask, case is LLAMA), "position_ids": positions}
    # 7 = 1 + 4 + 1 + 1; 9 = 1 + 4 + 3 + 1; 12 = 1 + 4 + 4 + 2 + 1
    assert [seen.rows for seen in watch(model, lambda: model(**arguments))] == [4 + 4 + 5] * 2


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_texts_packed_with_a_block_mask_are_merged_apart(case: Case) -> None:
    model, lengths = with_plugin(case, keep_last_tokens=0), (7, 9)
    texts = [case.inputs(1, length, seed)["input_ids"] for seed, length in enumerate(lengths)]
    text_of = torch.tensor([0] * 7 + [1] * 9)
    allowed = text_of.unsqueeze(0) == text_of.unsqueeze(1)
    if case is LLAMA:
        allowed &= torch.ones(16, 16).tril().bool()
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    labels = torch.full((1, 16), -100)
    labels[0, [6, 15]] = 50  # the last position of neither text is merged, packed or alone
    extra = {"labels": labels, "use_cache": False} if case is LLAMA else {}
    packed = hidden_states(model, torch.cat(texts, dim=1), positions, additive(allowed.unsqueeze(0)), **extra)
    for text, own in zip(texts, packed.split(lengths, dim=1), strict=True):
        last = {"labels": torch.full_like(text, -100), "use_cache": False} if case is LLAMA else {}
        if case is LLAMA:
            last["labels"][:, -1] = 50
        alone = hidden_states(model, text, torch.arange(text.shape[1]).unsqueeze(0), None, **last)
        torch.testing.assert_close(own, alone, rtol=0, atol=1e-5)


def hidden_states(model: Any, ids: Tensor, positions: Tensor, mask: Tensor | None, **extra: Any) -> Tensor:
    with torch.no_grad():
        arguments = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, **extra}
        return model(**arguments, output_hidden_states=True).hidden_states[-1]


# The base models of the others give something else without ids.
WITH_EMBEDDINGS_ALONE = [case for case in [*ENCODERS, *CAUSAL] if case.name not in ("esm", "gemma3n")]


@pytest.mark.parametrize("case", WITH_EMBEDDINGS_ALONE, ids=by_name)
def test_embeddings_alone(case: Case) -> None:
    model, ids = with_plugin(case), case.inputs(2, 12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    embeddings = model.get_input_embeddings()(ids)
    expected = hidden(model, input_ids=ids, attention_mask=mask)[mask.bool()]
    positions = {}
    if case.model_type in ("roberta", "xlm-roberta", "mpnet"):  # they count from the id of padding
        positions["position_ids"] = torch.arange(12).expand(2, -1) + case.prototype.config.pad_token_id + 1
    found = hidden(model, inputs_embeds=embeddings, attention_mask=mask, **positions)[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [0, 3])
def test_positions_of_the_caller_do_not_move_the_first_token(offset: int) -> None:
    """A causal model may count from any number, and may count padding; the sink is the first real token."""
    model, ids = with_plugin(LLAMA), LLAMA.inputs(2, 12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(12).expand(2, -1) + offset}
    assert [seen.rows for seen in watch(model, lambda: model(**arguments))] == [(1 + 2 + 1) + (1 + 3 + 1)] * 2
    expected = hidden(model, input_ids=ids[:1, 4:])
    torch.testing.assert_close(hidden(model, **arguments)[:1, 4:], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CAUSAL, ids=by_name)
def test_an_empty_cache_of_the_caller_changes_nothing(case: Case) -> None:
    model, ids = with_plugin(case), case.inputs(2, 12)["input_ids"]
    cache = DynamicCache(config=case.prototype.config)
    found = hidden(model, input_ids=ids, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found, hidden(model, input_ids=ids, use_cache=False), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [*ENCODERS, *CAUSAL], ids=by_name)
def test_one_text_with_padding(case: Case) -> None:
    model, ids = with_plugin(case), case.inputs(1, 12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    expected, found = hidden(model, input_ids=ids[:, :7]), hidden(model, input_ids=ids, attention_mask=mask)[:, :7]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [case for case in ALL if case.name in ("bert", "llama", "t5", "vit")], ids=by_name)
def test_hidden_states_and_attentions_are_whole(case: Case) -> None:
    model = with_plugin(case)
    with torch.no_grad():
        output = model(**case.inputs(2, 12), output_hidden_states=True, output_attentions=True)
        base = case.build()(**case.inputs(2, 12), output_hidden_states=True, output_attentions=True)
        plain = model(**case.inputs(2, 12), return_dict=False)
    for name, value in base.items():
        if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            assert [each.shape for each in output[name]] == [each.shape for each in value]
    assert torch.equal(plain[0], next(iter(output.values())))


def test_experts_route_the_vectors_that_are_left() -> None:
    """Their balancing loss counts merged vectors; it cannot be told which of them are padding."""
    case = next(case for case in CAUSAL if case.name == "mixtral")
    model, inputs = with_plugin(case), case.inputs(2, 12)
    labels = inputs["input_ids"].masked_fill(torch.arange(12) < 8, -100)
    output = model(**inputs, labels=labels, output_router_logits=True)
    assert [logits.shape[0] for logits in output.router_logits] == [2 * (1 + 2 + 5)] * 2
    assert torch.isfinite(output.loss)


def test_groups_follow_a_layer_to_its_device() -> None:
    """Arguments may be on another device than a layer, whose inputs accelerate moves."""
    rule = MergeRule(ratio=4)
    facts = CallFacts("encoder", {"input_ids": torch.full((2, 12), 20)})
    call = StackGroups(facts, {"mlp": ("default", rule)})
    call.prepare()
    groups = call.of(rule, torch.empty(2, 12, 8))
    moved = call.of(rule, torch.empty(2, 12, 8, device="meta"))
    assert groups.row_of.device.type == "cpu"
    assert {moved.row_of.device.type, moved.is_merged.device.type} == {"meta"}


def test_real_tokens_ranks_and_text_starts() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    real = real_tokens(mask, (2, 5), 0)
    assert real is not None
    assert real.tolist() == mask.bool().tolist()
    assert token_ranks(mask, real, (2, 5), 0, mask.device)[real].tolist() == [0, 1, 2, 0, 1, 2]
    assert real_tokens(mask[:, 2:4], (2, 2), 0).all()
    assert real_tokens(None, (2, 2), 0) is None
    # With three tokens in a cache, the last two columns are this call's.
    assert token_ranks(mask, None, (2, 2), 3, mask.device).tolist() == [[1, 2], [2, 2]]
    # A mask as long as a static cache goes on behind this call.
    for past in (1, torch.tensor(1)):
        own = real_tokens(mask, (2, 2), past)
        assert own is not None
        assert own.tolist() == [[False, True], [False, True]]
        assert token_ranks(mask, own, (2, 2), past, mask.device).tolist() == [[-1, 0], [0, 1]]
    starts = text_starts({"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, None, None, (2, 5), 0)
    assert starts is not None
    assert starts.tolist() == [[False, False, True, False, False]] * 2
    starts = text_starts({"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)}, None, None, (1, 5), 0)
    assert starts is not None
    assert starts[0, 1:].tolist() == [False, True, False, False]
    going_on = text_starts({"position_ids": torch.arange(5).unsqueeze(0)}, None, None, (2, 5), 0)
    assert going_on is not None
    assert not going_on.any()
    assert text_starts({}, None, None, (2, 5), 0) is None


def order_of(real: Tensor | None, starts: Tensor | None = None, length: int = 6) -> TokenOrder:
    return TokenOrder(real, starts, token_ranks(None, real, (1, length), 0, torch.device("cpu")))


def test_those_before_are_real_ones_of_the_same_text() -> None:
    chosen = torch.tensor([[False, False, False, True, False, True]])
    assert with_those_before(chosen, order_of(None), 1) is chosen
    assert with_those_before(chosen, order_of(None), 2).int().tolist() == [[0, 0, 1, 1, 1, 1]]
    real = torch.tensor([[True, True, False, True, False, True]])
    assert (with_those_before(chosen, order_of(real), 2) & real).int().tolist() == [[0, 1, 0, 1, 0, 1]]
    starts = torch.tensor([[False, False, False, True, False, False]])
    assert with_those_before(chosen, order_of(None, starts), 3).int().tolist() == [[0, 0, 0, 1, 1, 1]]


def test_order_of_tokens_in_texts() -> None:
    real = torch.tensor([[False, True, True, True, False, True]])
    starts = torch.tensor([[False, False, False, True, False, False]])
    order = order_of(real, starts)
    assert order.from_start[real].tolist() == [0, 1, 0, 1]
    assert order.last(1).int().tolist() == [[0, 0, 1, 0, 0, 1]]
    assert order.last(2).int().tolist() == [[0, 1, 1, 1, 0, 1]]


def test_the_widest_of_several_masks_counts() -> None:
    wide, narrow = torch.ones(1, 1, 2, 9), torch.ones(1, 1, 2, 4)
    assert single_mask({"sliding_attention": narrow, "full_attention": wide}) is wide
    assert single_mask({"sliding_attention": narrow, "full_attention": None}) is None
    with pytest.raises(ValueError, match="cannot read an attention mask of type str"):
        single_mask("all")
    with pytest.raises(ValueError, match=r"of type Tensor and shape \(1, 2, 3\)"):
        single_mask(torch.ones(1, 2, 3))


def test_a_bias_in_the_mask_blocks_nobody() -> None:
    """Where every score gets the same, nothing changes."""
    model, ids = with_plugin(BERT), BERT.inputs(2, 12)["input_ids"]
    mask = torch.zeros(2, 1, 12, 12)
    mask[0, ..., 9:] = LOWEST
    biased, older = mask - 0.5 * (mask == 0), mask.clamp(min=-10_000.0)
    real = mask[:, 0, 0] == 0
    expected = hidden(model, input_ids=ids, attention_mask=mask)
    for other in (biased, older):
        found = hidden(model, input_ids=ids, attention_mask=other)
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
