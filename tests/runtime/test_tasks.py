"""Classifying, ranking and prefilling: what the engine gives is what the model gives at the ratio it says."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BartForSequenceClassification,
    BartModel,
    DynamicCache,
    MT5Model,
    T5ForConditionalGeneration,
    T5Model,
)

from peft_variator import using_ratio
from peft_variator.runtime import Engine, FixedRatio, QueueItem, profile_latency
from peft_variator.runtime.policies import length_class
from peft_variator.runtime.queueing import PATIENCE, DeadlineQueue
from tests.tiny_models import BY_NAME, tiny_model

from .models import SENTENCES, TEXT, causal, classifier, encoder, plugin, tokenizer


TOKENIZER, PLAIN = tokenizer(), tokenizer(special=False)
PATIENT = float("inf")


def logits_of(model: Any, ratio: int, *texts: str) -> torch.Tensor:
    inputs = TOKENIZER(*texts, return_tensors="pt", truncation=True, max_length=64)
    with torch.no_grad(), using_ratio(model, ratio):
        return model(**inputs).logits[0]


@pytest.mark.parametrize("ratio", [1, 4])
def test_classify(ratio: int) -> None:
    model = classifier()
    with Engine(model, TOKENIZER, policy=FixedRatio(ratio), slo_ms=PATIENT) as engine:
        result = engine.classify(SENTENCES)
        again = asyncio.run(engine.aclassify(SENTENCES[:2]))
        empty = engine.classify([])
    wanted = torch.stack([logits_of(model, ratio, text) for text in SENTENCES])
    torch.testing.assert_close(result.logits, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.logits, wanted[:2], atol=1e-5, rtol=0)
    assert (result.ratios, empty.logits.shape, empty.ratios) == ([ratio] * 4, (0, 3), [])


@pytest.mark.parametrize("labels", [1, 2])
def test_rerank(labels: int) -> None:
    model = classifier(labels)
    with Engine(model, TOKENIZER, policy=FixedRatio(4), slo_ms=PATIENT) as engine:
        result = engine.rerank("a b c", SENTENCES)
        again = asyncio.run(engine.arerank("a b c", SENTENCES))
        empty = engine.rerank("a", [])
    logits = torch.stack([logits_of(model, 4, "a b c", text) for text in SENTENCES])
    wanted = logits[:, 0] if labels == 1 else logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(result.scores, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.scores, wanted, atol=1e-5, rtol=0)
    assert (result.ratios, empty.scores.shape) == ([4] * 4, (0,))


@pytest.mark.parametrize("pad_id", [7, None])
def test_classifiers_that_look_for_the_last_token(pad_id: int | None) -> None:
    """Their padding has another id than the tokenizer's, or none: batches give what each text gives by itself."""
    torch.manual_seed(0)
    model = plugin(tiny_model("llama-sequence", **TEXT | {"pad_token_id": pad_id}, num_labels=3))
    with Engine(model, TOKENIZER, policy=FixedRatio(4), slo_ms=PATIENT) as engine:
        found = engine.classify(SENTENCES).logits
    inputs = [TOKENIZER(text, return_tensors="pt", return_token_type_ids=False) for text in SENTENCES]
    with torch.no_grad():
        wanted = torch.cat([model(**each).logits for each in inputs])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_wrong_questions_are_refused() -> None:
    with Engine(classifier(), TOKENIZER) as engine:
        for query in (None, ["a"], 3):
            with pytest.raises(TypeError, match=f"query is a {type(query).__name__}; give one text"):
                engine.rerank(query, ["a"])  # type: ignore[arg-type]
        for documents in ("a", None, [1]):
            with pytest.raises(TypeError, match="documents"):
                engine.rerank("a", documents)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="num_labels=3"):
            engine.rerank("a", ["b"])
        with pytest.raises(ValueError, match="causal"):
            engine.prefill(["a"])
    with Engine(encoder(), TOKENIZER) as engine:
        for ask in (engine.classify, lambda texts: engine.rerank("a", texts)):
            with pytest.raises(ValueError, match="head for sequence classification"):
                ask(["a"])


def test_a_classifier_embeds_too() -> None:
    model = classifier()
    with Engine(model, TOKENIZER, policy=FixedRatio(2), pooling="cls", normalize=False) as engine:
        found = engine.embed(SENTENCES).embeddings
        assert engine.classify(["a"]).logits.shape == (1, 3)
    inputs = TOKENIZER(SENTENCES[0], return_tensors="pt")
    with torch.no_grad(), using_ratio(model, 2):
        wanted = model(**inputs, output_hidden_states=True).hidden_states[-1][0, 0]
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)


PROMPTS = ["a b c d e f g h i j k l m n", "o p q", "r s t u v w x"]


@pytest.mark.parametrize("ratio", [1, 4])
def test_prefill(ratio: int) -> None:
    """The cache is the one that the prompt makes by itself at that ratio, so decoding goes on from it."""
    model = causal()
    with Engine(model, PLAIN, policy=FixedRatio(ratio), slo_ms=PATIENT) as engine:
        result = engine.prefill(PROMPTS)
        alone = asyncio.run(engine.aprefill(PROMPTS[1:2]))
    assert result.ratios == [ratio] * 3
    assert result.attention_mask.sum(1).tolist() == result.lengths == [14, 3, 7]
    assert result.past_key_values.get_seq_length() == 14
    for row, prompt in enumerate(PROMPTS):
        ids = PLAIN(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad(), using_ratio(model, ratio):
            single = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        torch.testing.assert_close(result.logits[row], single.logits[0, -1], atol=1e-5, rtol=0)
        for found, wanted in zip(result.past_key_values.layers, single.past_key_values.layers, strict=True):
            own = found.keys[row : row + 1, :, -ids.shape[1] :]
            torch.testing.assert_close(own, wanted.keys, atol=1e-5, rtol=0)
    assert isinstance(alone.past_key_values, DynamicCache)
    torch.testing.assert_close(alone.logits, result.logits[1:2], atol=1e-5, rtol=0)
    decoded = decode(model, alone, steps=4)
    ids = PLAIN(PROMPTS[1], return_tensors="pt")["input_ids"]
    with using_ratio(model, ratio):
        generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert decoded == generated[0, ids.shape[1] :].tolist()


def decode(model: Any, prefilled: Any, steps: int) -> list[int]:
    """Greedy decoding by hand, with nothing but the result."""
    token, found = prefilled.logits.argmax(-1, keepdim=True), []
    for _ in range(steps):
        found.append(int(token))
        with torch.no_grad():
            token = model(input_ids=token, past_key_values=prefilled.past_key_values).logits[:, -1:].argmax(-1)
    return found


def test_prompts_are_not_cut_and_nothing_is_none() -> None:
    with Engine(causal(), PLAIN) as engine:
        with pytest.raises(ValueError, match=r"prompts\[1\] has 65 tokens"):
            engine.prefill(["a", "a " * 65])
        with pytest.raises(ValueError, match="Text 0 has no tokens"):
            engine.prefill([""])
        assert engine.metrics.requests == 0
        empty = engine.prefill([])
        assert (empty.logits.shape, empty.past_key_values.get_seq_length()) == ((0, len(PLAIN)), 0)
        assert engine.prefill(["a " * 64]).lengths == [64]


@pytest.mark.parametrize("name", ["t5-encoder", "siglip-text", "gemma3n", "llama4"])
def test_models_that_tell_little_about_themselves_embed(name: str) -> None:
    """No number of positions, no class of their own, hidden states of another shape, or a head that hides its body."""
    torch.manual_seed(0)
    model = plugin(tiny_model(name), ratio=2)
    with Engine(model, PLAIN, slo_ms=PATIENT) as engine:
        found = engine.embed(SENTENCES).embeddings
        for row, text in enumerate(SENTENCES):
            torch.testing.assert_close(found[row : row + 1], engine.embed([text]).embeddings, atol=1e-5, rtol=0)
    assert found.isfinite().all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize(
    ("kind", "name"), [(T5ForConditionalGeneration, "t5"), (T5Model, "t5"), (BartModel, "bart"), (MT5Model, "mt5")]
)
@pytest.mark.parametrize("with_plugin", [False, True])
def test_encoder_decoders_are_refused(kind: Any, name: str, with_plugin: bool) -> None:
    """With a head or without one: what comes out is the decoder's."""
    model = kind(BY_NAME[name].configure()).eval()
    model = plugin(model) if with_plugin else model
    told = f"{kind.__name__} is an encoder-decoder. Serve its encoder alone"
    with pytest.raises(ValueError, match=told):
        Engine(model, PLAIN)
    with pytest.raises(ValueError, match=told):
        profile_latency(model, [1], [1], [8])


def test_what_an_encoder_decoder_can_be_asked() -> None:
    """A classifier for its classes; an encoder alone for embeddings, though its configuration names a decoder."""
    config = BY_NAME["bart"].configure(num_labels=3, num_hidden_layers=2)
    model = plugin(BartForSequenceClassification(config).eval(), ratio=2)
    tokens = tokenizer()
    tokens.sep_token_id = config.eos_token_id  # the token that such a classifier reads
    with Engine(model, tokens, policy=FixedRatio(2), slo_ms=PATIENT) as engine:
        found = engine.classify(SENTENCES)
        with pytest.raises(ValueError, match="BartForSequenceClassification is an encoder-decoder"):
            engine.embed(SENTENCES)
    assert found.logits.shape == (4, 3)
    alone = plugin(BartModel(config).eval().encoder, ratio=2)
    with Engine(alone, PLAIN, policy=FixedRatio(2), slo_ms=PATIENT) as engine:
        assert engine.embed(SENTENCES).embeddings.shape == (4, 32)


@pytest.mark.parametrize("name", ["lfm2", "llama4"])
def test_caches_of_other_kinds_are_refused(name: str) -> None:
    with Engine(tiny_model(name), PLAIN) as engine:
        with pytest.raises(ValueError, match="caches of other kinds"):
            engine.prefill(["a"])


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_sliding_windows(name: str) -> None:
    """Prompts longer and shorter than the window: the cache is that of the prompt alone, and goes on like it."""
    torch.manual_seed(0)
    model = plugin(tiny_model(name, **TEXT, sliding_window=6), ratio=2)
    prompts = ["a b c d e f g h i j k l", "m n o", "p q r s t u v"]
    with Engine(model, PLAIN, slo_ms=PATIENT) as engine:
        result = engine.prefill(prompts)
    steps = [5, 6, 7]
    mask, found = result.attention_mask, []
    for step in steps:
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        with torch.no_grad(), using_ratio(model, 2):
            outputs = model(
                input_ids=torch.full((3, 1), step),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=result.past_key_values,
            )
        found.append(outputs.logits[:, -1])
    for row, prompt in enumerate(prompts):
        with torch.no_grad(), using_ratio(model, 2):
            outputs = model(**PLAIN(prompt, return_tensors="pt"), use_cache=True, logits_to_keep=1)
            torch.testing.assert_close(result.logits[row], outputs.logits[0, -1], atol=1e-5, rtol=0)
            for step, logits in zip(steps, found, strict=True):
                outputs = model(input_ids=torch.tensor([[step]]), past_key_values=outputs.past_key_values)
                torch.testing.assert_close(logits[row], outputs.logits[0, -1], atol=1e-5, rtol=0)


def test_the_queue_keeps_the_urgent_first_and_the_alike_together() -> None:
    queue: DeadlineQueue[QueueItem] = DeadlineQueue()
    assert (len(queue), list(queue.view())) == (0, [])
    for deadline, limit in [(5, None), (3, 2), (4, None), (9, 2), (1, None)]:
        queue.add(QueueItem(0.0, 1, float(deadline), None, limit))
    assert [item.deadline for item in queue.view()] == [1, 4, 5, 3, 9]
    assert [item.deadline for item in queue.take(2)] == [1, 4]
    assert [item.deadline for item in queue.view()] == [3, 9, 5]
    assert [item.deadline for item in queue.take(10)] == [3, 9]
    assert [item.deadline for item in queue.remove(lambda item: True)] == [5]
    assert (len(queue), list(queue.view())) == (0, [])


def test_the_queue_puts_texts_of_about_one_length_together() -> None:
    """The lane of the most urgent first, the others behind it by deadline; a batch may reach into them."""
    queue: DeadlineQueue[QueueItem] = DeadlineQueue()
    for deadline, length in [(1, 16), (2, 200), (3, 20), (4, 100), (5, 256), (6, 30), (0.5, 250)]:
        queue.add(QueueItem(0.0, length, float(deadline)))
    view = queue.view()
    assert [item.deadline for item in view] == [0.5, 2, 5, 1, 3, 4, 6]
    assert (len(view), view[0].deadline, view[4].deadline, view[-1].deadline) == (7, 0.5, 3, 6)
    assert [item.deadline for item in view[2:5]] == [5, 1, 3]
    with pytest.raises(IndexError):
        view[7]
    assert [item.deadline for item in queue.take(4)] == [0.5, 2, 5, 1]
    assert [item.deadline for item in queue.view()] == [3, 6, 4]
    queue.add(QueueItem(0.0, 16, 2.5, max_ratio=2))
    assert [item.deadline for item in queue.view()] == [2.5, 3, 4, 6]
    assert [item.deadline for item in queue.take(9)] == [2.5]
    assert [item.deadline for item in queue.take(9)] == [3, 6, 4]
    assert len(queue) == 0


def test_what_is_given_up_stands_behind_what_can_be_in_time() -> None:
    queue: DeadlineQueue[QueueItem] = DeadlineQueue()
    for deadline, length, limit in [(1, 8, None), (2, 100, None), (3, 8, 2), (5, 8, None), (6, 100, None), (9, 8, 2)]:
        queue.add(QueueItem(0, length, deadline, max_ratio=limit))
    queue.give_up(0.0, lambda length, waiting: -math.inf)
    assert [item.deadline for item in queue.view()] == [1, 5, 2, 6, 3, 9]
    queue.give_up(3.0, lambda length, waiting: 0.5 if waiting == 6 else math.nan)
    expected = [5, 6, 1, 2, 9, 3]
    assert [item.deadline for item in queue.view()] == expected
    assert [queue.view()[index].deadline for index in range(6)] == expected
    assert (len(queue), sorted(item.deadline for item in queue)) == (6, [1, 2, 3, 5, 6, 9])
    assert [item.deadline for item in queue.take(3)] == [5, 6, 1]
    assert [item.deadline for item in queue.take(3)] == [9, 3]
    assert [item.deadline for item in queue.take(3)] == [2]
    assert len(queue) == 0


def test_what_was_given_up_long_ago_comes_first() -> None:
    queue: DeadlineQueue[QueueItem] = DeadlineQueue()
    for deadline, length in [(1, 8), (2, 100), (3, 8), (5, 8), (6, 100)]:
        queue.add(QueueItem(0, length, deadline))
    for now, expected in [
        (4.0, [5, 6, 1, 2, 3]),
        (2.5 + PATIENCE, [1, 2, 3, 5, 6]),
        (3.5 + PATIENCE, [1, 3, 2, 5, 6]),
    ]:
        queue.give_up(now, lambda length, waiting: 0.5)
        assert [item.deadline for item in queue.view()] == expected
    assert (len(queue), len(queue.take(9)), len(queue)) == (5, 5, 0)


_ITEM = st.builds(
    QueueItem,
    arrival=st.just(0.0),
    length=st.integers(1, 300),
    deadline=st.integers(0, 80).map(float),
    max_ratio=st.sampled_from((None, 4)),
)


@given(
    st.lists(st.tuples(st.lists(_ITEM, max_size=8), st.integers(1, 12)), min_size=1, max_size=12), st.integers(0, 9)
)
def test_giving_up_and_taking_do_what_sorting_all_of_them_does(steps, least):
    """Beside a queue that keeps one list, and sorts it for each batch."""
    queue: DeadlineQueue[QueueItem] = DeadlineQueue()
    plain: list[tuple[bool, QueueItem]] = []
    unique = count(0.0, 1e-4)
    for number, (items, size) in enumerate(steps):
        now = number * 7.0
        for item in items:
            item = replace(item, deadline=item.deadline + next(unique))
            queue.add(item)
            plain.append((False, item))
        queue.give_up(now, lambda length, waiting: least)
        plain = [(_gone(gone, item.deadline, now, least), item) for gone, item in plain]
        if not plain:
            assert not len(queue)
            continue
        first = min(plain, key=lambda each: (each[0], each[1].deadline))
        alike = [each for each in plain if each[1].max_ratio == first[1].max_ratio and each[0] >= first[0]]
        level = length_class(first[1].length)

        def place(each):
            """The first one's class of lengths, then other lengths, then those that were given up."""
            gone, item = each
            return gone, gone == first[0] and length_class(item.length) != level, item.deadline  # noqa: B023

        order = sorted(alike, key=place)
        taken = queue.take(size)
        assert taken == [item for _, item in order[:size]]
        plain = [each for each in plain if each[1] not in taken]
        assert len(queue) == len(plain)


def _gone(gone: bool, deadline: float, now: float, least: float) -> bool:
    """Given up from when it cannot be in time until it is long overdue."""
    return now - PATIENCE <= deadline and (gone or deadline < now + least)
