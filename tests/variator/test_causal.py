"""A position whose own prediction is used is never merged with a later one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from peft_variator import VariatorConfig
from tests.tiny_models import CAUSAL, LLAMA, LLAVA, TASK_HEADS, TEXT, XLM, Case, by_name, tiny_model

from .reference import watch, with_plugin


TOKEN_CLASSES, SEQUENCE_CLASSES = (
    next(case for case in TASK_HEADS if case.name == f"llama-{kind}") for kind in ("token", "sequence")
)
LENGTH = 16
# Which positions have a label: an answer, two answers of a conversation, single words, an answer before more prompt.
LABELLED = {
    "answer": range(10, 16),
    "conversation": [5, 6, 7, 12, 13],
    "words": [3, 9, 15],
    "context-behind": range(4, 7),
    "first": [1],
    "none": [],
}


BERT_DECODER = Case("bert-decoder", "bert", AutoModelForCausalLM, TEXT | {"is_decoder": True}, "causal")


# Their labels are not shifted: the prediction at a label's own position is the one that is trained.
UNSHIFTED = [
    Case(f"{name}-causal", name, AutoModelForMaskedLM, XLM | {"causal": True}, "causal")
    for name in ("flaubert", "xlm")
]


def labels_at(ids: Tensor, positions: Any) -> Tensor:
    labels = torch.full_like(ids, -100)
    labels[:, list(positions)] = ids[:, list(positions)]
    return labels


def changed_later(inputs: dict[str, Any], step: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same call with one token changed, for every token."""
    for position in range(1, inputs["input_ids"].shape[1], step):
        ids = inputs["input_ids"].clone()
        ids[:, position] = (ids[:, position] - 10 + 31) % 80 + 10
        yield position, inputs | {"input_ids": ids}


def assert_no_leak(model: torch.nn.Module, inputs: dict[str, Any], used: Tensor, step: int = 1) -> None:
    """No used prediction may change with a later token. `used`: shape `(batch, length)`."""
    with torch.no_grad():
        expected = model(**inputs).logits
        for position, other in changed_later(inputs, step):
            earlier = used.clone()
            earlier[:, position:] = False
            torch.testing.assert_close(model(**other).logits[earlier], expected[earlier], rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", LABELLED)
@pytest.mark.parametrize("case", [*CAUSAL, BERT_DECODER], ids=by_name)
def test_predictions_that_have_a_label(case: Case, where: str) -> None:
    model = with_plugin(case, keep_last_tokens=0)
    inputs = case.inputs(2, LENGTH)
    labels = labels_at(inputs["input_ids"], LABELLED[where])
    used = torch.zeros(2, LENGTH, dtype=torch.bool)
    used[:, :-1] = labels[:, 1:] != -100
    assert_no_leak(model, inputs | {"labels": labels}, used, step=2)


@pytest.mark.parametrize("where", LABELLED)
@pytest.mark.parametrize("case", UNSHIFTED, ids=by_name)
def test_predictions_of_encoders_that_are_configured_to_be_causal(case: Case, where: str) -> None:
    model, inputs = with_plugin(case, keep_last_tokens=0), case.inputs(2, LENGTH)
    labels = labels_at(inputs["input_ids"], LABELLED[where])
    assert_no_leak(model, inputs | {"labels": labels}, labels != -100, step=2)


def test_the_check_finds_a_leak() -> None:
    model, inputs = with_plugin(LLAMA), LLAMA.inputs(2, LENGTH)
    with pytest.raises(AssertionError, match="not close"):
        assert_no_leak(model, inputs, torch.ones(2, LENGTH, dtype=torch.bool))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CAUSAL, ids=by_name)
def test_predictions_that_have_a_label_in_a_padded_batch(case: Case, side: str) -> None:
    model, inputs = with_plugin(case), case.inputs(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, 5) if side == "left" else slice(11, 16)] = 0
    labels = labels_at(inputs["input_ids"], [8, 9, 14]).masked_fill(mask == 0, -100)
    used = torch.zeros(2, LENGTH, dtype=torch.bool)
    used[:, :-1] = labels[:, 1:] != -100
    assert_no_leak(model, inputs | {"labels": labels, "attention_mask": mask}, used, step=3)


@pytest.mark.parametrize("keep", [3, torch.tensor([2, 7, 15])], ids=["last", "chosen"])
def test_predictions_asked_for_by_logits_to_keep(keep: int | Tensor) -> None:
    model, inputs = with_plugin(LLAMA), LLAMA.inputs(2, LENGTH) | {"logits_to_keep": keep}
    positions = torch.arange(LENGTH)[-3:] if isinstance(keep, int) else keep
    with torch.no_grad():
        expected = model(**inputs).logits
        for position, other in changed_later(inputs):
            earlier = positions < position
            torch.testing.assert_close(model(**other).logits[:, earlier], expected[:, earlier], rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_last", [0, 1, 2, 5])
def test_the_end_of_a_prompt_is_kept_before_every_answer(keep_last: int) -> None:
    """As in generation, where the prompt ends there."""
    model, inputs = with_plugin(LLAMA, keep_last_tokens=keep_last), LLAMA.inputs(1, LENGTH)
    rows = {0: 1 + 2 + 6, 1: 1 + 2 + 6, 2: 1 + 2 + 1 + 6, 5: 1 + 1 + 4 + 6}[keep_last]
    # Labels at 10-15: 0 | 1-8 | 9-14 used | 15, of which 10 - keep_last to 9 end the prompt.
    rows += 1
    labels = labels_at(inputs["input_ids"], range(10, 16))
    assert [seen.rows for seen in watch(model, lambda: model(**inputs, labels=labels))] == [rows] * 2
    prompt = inputs["input_ids"][:, :10]
    alone = [seen.rows for seen in watch(model, lambda: model(input_ids=prompt))]
    assert alone == [rows - 6] * 2


@pytest.mark.parametrize("shift", [True, False])
def test_labels_shifted_by_the_caller(shift: bool) -> None:
    """Sequence parallelism shifts labels before it splits them and passes them as `shift_labels`."""
    model, inputs = with_plugin(LLAMA), LLAMA.inputs(2, LENGTH)
    shifted = torch.full((2, LENGTH), -100)
    shifted[:, 6:9] = inputs["input_ids"][:, 7:10]
    inputs |= {"shift_labels": shifted} | ({"labels": inputs["input_ids"]} if shift else {})
    if not shift:
        inputs["labels"] = torch.full_like(shifted, -100)
    assert_no_leak(model, inputs, shifted != -100)


def test_last_position_of_a_plain_call() -> None:
    """Its last real token is the one whose prediction is used, whatever follows it as padding."""
    model, inputs = with_plugin(LLAMA, keep_last_tokens=0), LLAMA.inputs(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 11:] = 0
    used = torch.zeros(2, LENGTH, dtype=torch.bool)
    used[0, 10] = used[1, 15] = True
    assert_no_leak(model, inputs | {"attention_mask": mask}, used)
    assert [seen.rows for seen in watch(model, lambda: model(**inputs))] == [2 * (1 + 4 + 1)] * 2


@pytest.mark.parametrize("wrapper", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("embedded", [False, True])
def test_labels_reach_the_plugin_however_the_model_is_called(wrapper: str | None, embedded: bool) -> None:
    model, inputs = with_plugin(LLAMA, task_type=wrapper), LLAMA.inputs(2, LENGTH)
    labels = labels_at(inputs["input_ids"], LABELLED["conversation"])
    if embedded:
        arguments = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), "labels": labels}
    else:
        arguments = inputs | {"labels": labels}
    # 0 | 1-3 | 4 5 6 used | 7-10 | 11 12 used | 13 14 | 15 last
    assert [seen.rows for seen in watch(model, lambda: model(**arguments))] == [2 * (1 + 1 + 3 + 1 + 2 + 1 + 1)] * 2


def test_packed_sequences_are_merged_apart() -> None:
    """Position ids that start anew tell two texts in one row; each gives what it gives alone."""
    model = with_plugin(LLAMA, keep_last_tokens=0)
    texts = [LLAMA.inputs(1, length, seed)["input_ids"] for seed, length in enumerate((7, 9))]
    ids = torch.cat(texts, dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(9)]).unsqueeze(0)
    labels = labels_at(ids, [6, 15])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).logits[0]
        alone = [model(input_ids=text, labels=labels_at(text, [-1])).logits[0] for text in texts]
    torch.testing.assert_close(packed[:6], alone[0][:6], rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[7:15], alone[1][:8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CAUSAL, ids=by_name)
def test_full_sequence_loss_merges_nothing_and_warns_once(case: Case) -> None:
    model, base, inputs = with_plugin(case), case.build(), case.inputs(2, LENGTH)
    inputs["labels"] = inputs["input_ids"]
    with pytest.warns(UserWarning, match="nothing to merge"):
        loss = model(**inputs).loss
    torch.testing.assert_close(loss, base(**inputs).loss, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [seen.rows for seen in watch(model, lambda: model(**inputs))] == [2 * LENGTH] * 2


def test_full_sequence_loss_of_a_padded_batch_warns_too() -> None:
    model, inputs = with_plugin(LLAMA), LLAMA.inputs(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 9:] = 0
    inputs |= {"attention_mask": mask, "labels": inputs["input_ids"].masked_fill(mask == 0, -100)}
    with pytest.warns(UserWarning, match="nothing to merge"):
        model(**inputs)


@pytest.mark.parametrize("how", ["disabled", "ratio 1", "prompt"])
def test_no_warning_where_nothing_is_wrong(how: str) -> None:
    model, inputs = with_plugin(LLAMA), LLAMA.inputs(2, LENGTH)
    inputs["labels"] = labels_at(inputs["input_ids"], range(8, 16) if how == "prompt" else range(16))
    if how == "ratio 1":
        model.set_compression_ratio(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if how == "disabled":
            with model.disable_adapter():
                model.train()(**inputs)
        else:
            model.train()(**inputs)


def test_training_without_labels_warns() -> None:
    model = with_plugin(LLAMA).train()
    with pytest.warns(UserWarning, match="trained without `labels`"):
        model(**LLAMA.inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**LLAMA.inputs())


@pytest.mark.parametrize("labelled", ["all", "some"])
def test_token_classification(labelled: str) -> None:
    """Label j belongs to position j, not to the one before."""
    model, inputs = with_plugin(TOKEN_CLASSES, keep_last_tokens=0), TOKEN_CLASSES.inputs(2, LENGTH)
    labels = torch.zeros(2, LENGTH, dtype=torch.long)
    if labelled == "some":
        labels[:, [1, 2, 3, 7, 8, 12]] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_no_leak(model, inputs | {"labels": labels}, labels != -100)


def test_sequence_classification_uses_the_last_real_token() -> None:
    model = with_plugin(SEQUENCE_CLASSES)
    inputs = SEQUENCE_CLASSES.inputs(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 11:] = 0
    inputs["input_ids"][0, 11:] = 0
    padded = inputs | {"attention_mask": mask}
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"][:1, :11]).logits
        for labels in ({}, {"labels": torch.tensor([0, 1])}):
            torch.testing.assert_close(model(**padded, **labels).logits[:1], expected, rtol=0, atol=1e-5)


def test_sequence_classification_finds_the_last_token_without_a_mask() -> None:
    model = with_plugin(SEQUENCE_CLASSES)
    pad_id, ids = model.config.pad_token_id, SEQUENCE_CLASSES.inputs(1, LENGTH)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for count in (1, 6):
            padded = torch.cat([ids, ids.new_full((1, count), pad_id)], dim=1)
            torch.testing.assert_close(model(input_ids=padded).logits, expected, rtol=0, atol=1e-5)


def test_several_labels_of_a_sequence_are_no_labels_of_tokens() -> None:
    base = tiny_model("llama-sequence", num_labels=LENGTH, problem_type="multi_label_classification")
    model = get_peft_model(base, VariatorConfig(init_weights=False)).eval()
    ids = SEQUENCE_CLASSES.inputs(2, LENGTH)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, labels=torch.ones(2, LENGTH)).logits, expected)


def test_answer_about_an_image() -> None:
    model, inputs = with_plugin(LLAVA, compress_vision_tower=False), LLAVA.inputs(1, 12)
    length = inputs["input_ids"].shape[1]
    labels = labels_at(inputs["input_ids"], range(length - 5, length))
    used = torch.zeros(1, length, dtype=torch.bool)
    used[:, :-1] = labels[:, 1:] != -100
    last = inputs | {"labels": labels}
    with torch.no_grad():
        expected = model(**last).logits
        for position in range(length - 5, length):
            ids = last["input_ids"].clone()
            ids[:, position] = 55
            earlier = used.clone()
            earlier[:, position:] = False
            other = model(**(last | {"input_ids": ids})).logits
            torch.testing.assert_close(other[earlier], expected[earlier], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("where", ["call", "config"])
def test_the_loss_that_balances_the_load_is_refused(name: str, where: str) -> None:
    """Its mask is that of the tokens, and routers see merged rows."""
    case = next(case for case in CAUSAL if case.name == name)
    model = get_peft_model(case.build(), VariatorConfig())
    inputs = case.inputs(2, 13)
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"]), "labels": inputs["input_ids"]}
    asked = {"output_router_logits": True} if where == "call" else {}
    model.get_base_model().config.output_router_logits = where == "config"
    with pytest.raises(ValueError, match="with an attention_mask: .* Set output_router_logits to False"):
        model(**inputs, **asked)
    model.set_compression_ratio(1)
    assert model(**inputs, **asked).aux_loss > 0
