"""`generate()` merges the prompt alone, in the prefill alone, whatever the cache and the decoding method."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from peft_variator import VariatorConfig
from tests.tiny_models import CAUSAL, LLAMA, Case, by_name

from .reference import watch


PROMPT, NEW = 14, 6
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}


def with_plugin(case: Case = LLAMA, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(init_weights=False, **fields)).eval()


def left_padded(case: Case) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A batch of two prompts and each prompt by itself."""
    ids = case.inputs(2, PROMPT)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, [ids[:1, 5:], ids[1:]]


def labelled_logits(model: PeftModel, sequence: Tensor, prompt_length: int) -> Tensor:
    """Logits for what follows a prompt when prompt and answer go through the model at once, as in training."""
    labels = sequence.clone()
    labels[:, :prompt_length] = -100
    with torch.no_grad():
        return model(input_ids=sequence, labels=labels).logits[:, prompt_length - 1 : -1]


@pytest.mark.parametrize("case", CAUSAL, ids=by_name)
def test_greedy_decoding_gives_the_logits_of_training(case: Case) -> None:
    model, ids = with_plugin(case), case.inputs(2, PROMPT)["input_ids"]
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, output_logits=True, return_dict_in_generate=True
    )
    expected = labelled_logits(model, output.sequences, PROMPT)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-4)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, output_logits=True)
    assert base.shape == output.sequences.shape


@pytest.mark.parametrize("case", CAUSAL, ids=by_name)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_and_cache_change_nothing(case: Case, cache: str, attention: str) -> None:
    model, (batch, alone) = with_plugin(case), left_padded(case)
    if case.name not in ("gemma2", "gpt-oss", "granite-swa", "vaultgemma"):  # they have no other
        model.get_base_model().set_attn_implementation(attention)
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**batch, **options, cache_implementation=cache)
    logits = torch.stack(together.logits, dim=1)
    for row, prompt in enumerate(alone):
        expected = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        torch.testing.assert_close(logits[row], torch.stack(expected.logits, dim=1)[0], rtol=0, atol=1e-4)
        assert together.sequences[row, PROMPT:].tolist() == expected.sequences[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("case", CAUSAL, ids=by_name)
def test_decoding_one_token_is_the_base_model(case: Case) -> None:
    model, ids = with_plugin(case), case.inputs(2, PROMPT)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        token = ids[:, :1]
        seen = watch(model, lambda: model(input_ids=token, past_key_values=cache))
        assert [network.rows for network in seen] == [2] * len(seen)
        with_one = model(input_ids=token, past_key_values=cache).logits
        with model.disable_adapter():
            model(input_ids=token, past_key_values=copied)
            base = model(input_ids=token, past_key_values=copied).logits
    assert torch.equal(with_one, base)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}], ids=str)
def test_beam_search(options: dict[str, int]) -> None:
    model, (batch, alone) = with_plugin(), left_padded(LLAMA)
    returned = options.get("num_return_sequences", 1)
    together = model.generate(**batch, **GREEDY, **options)[:, PROMPT:]
    for row, prompt in enumerate(alone):
        expected = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **GREEDY, **options)
        own = together[row * returned : (row + 1) * returned]
        assert own.tolist() == expected[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_sampling(task_type: str | None) -> None:
    model, ids = with_plugin(task_type=task_type), LLAMA.inputs(2, PROMPT)["input_ids"]
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "output_logits": True}
    torch.manual_seed(5)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        **(GREEDY | options),
    )
    assert len({tuple(row) for row in output.sequences.tolist()}) > 2
    expected = labelled_logits(model, output.sequences, PROMPT)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep_last", [0, 1, 3])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_assisted_decoding_is_decoding_without_an_assistant(how: str, keep_last: int) -> None:
    model = with_plugin(compression_ratio=4, keep_last_tokens=keep_last)
    ids = LLAMA.inputs(1, PROMPT)["input_ids"]
    ids[:, 8:] = ids[:, :6]  # something to look up
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**inputs, **(GREEDY | {"max_new_tokens": 24}))
    if how == "assistant":
        assistant = LLAMA.build()
        for parameter in assistant.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        helped = model.generate(**inputs, **(GREEDY | {"max_new_tokens": 24}), assistant_model=assistant)
    else:
        helped = model.generate(**inputs, **(GREEDY | {"max_new_tokens": 24}), prompt_lookup_num_tokens=4)
    assert helped.tolist() == expected.tolist()


def test_a_model_with_a_plugin_as_assistant() -> None:
    base, ids = LLAMA.build(), LLAMA.inputs(1, PROMPT)["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = base.generate(**inputs, **GREEDY)
    helped = base.generate(**inputs, **GREEDY, assistant_model=with_plugin().get_base_model())
    assert helped.tolist() == expected.tolist()


@pytest.mark.parametrize("case", [case for case in CAUSAL if case.name in ("llama", "gemma2", "gpt2")], ids=by_name)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [4, 5, 13, 64])
def test_chunked_prefill(case: Case, chunk: int, cache: str) -> None:
    model, (batch, _) = with_plugin(case), left_padded(case)
    options = GREEDY | {"prefill_chunk_size": chunk, "cache_implementation": cache}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**batch, **options)

    logits, past, ids = [], None, batch["input_ids"]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = [*range(chunk, PROMPT, chunk), *range(PROMPT, PROMPT + NEW)]
    with torch.no_grad():
        for start, end in zip([0, *ends], ends, strict=False):
            piece = output.sequences[:, start:end] if end > PROMPT else ids[:, start:end]
            step = model(
                input_ids=piece,
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
                use_cache=True,
            )
            past = step.past_key_values
            logits += [step.logits[:, -1]] if end >= PROMPT else []
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(logits), rtol=0, atol=1e-4)

    model.set_compression_ratio(1)
    exact, plain = model.generate(**batch, **options), model.generate(**batch, **GREEDY)
    assert exact.sequences.tolist() == plain.tolist()


def test_first_tokens_are_kept_once_in_a_chunked_prefill() -> None:
    model, (batch, _) = with_plugin(keep_first_tokens=3, keep_last_tokens=0), left_padded(LLAMA)
    rows = []

    def run() -> None:
        model.generate(**batch, **(GREEDY | {"max_new_tokens": 1, "min_new_tokens": 1}), prefill_chunk_size=7)

    rows = [seen.rows for seen in watch(model, run)]
    # Row 0 has 5 pads. Chunk 1: 2 kept; 3 kept, 4-6 merged but for the last. Chunk 2: 1 kept, 5 merged, last; 6, last.
    assert rows[::2] == [2 + 3 + 1 + 1, 1 + 2 + 1 + 2 + 1]


@pytest.mark.parametrize("padded", [False, True])
def test_a_chat_goes_on_from_its_cache(padded: bool) -> None:
    model, (batch, _) = with_plugin(), left_padded(LLAMA)
    if not padded:
        batch = {"input_ids": LLAMA.inputs(2, PROMPT)["input_ids"]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values)
    turn = LLAMA.inputs(2, 9, seed=7)["input_ids"]
    ids = torch.cat([first.sequences, turn], dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, ids.shape[1] - PROMPT), value=1)
    second = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        **GREEDY,
        output_logits=True,
        return_dict_in_generate=True,
    )
    start = cache.get_seq_length()
    positions = (mask.cumsum(1) - 1)[:, start:]
    with torch.no_grad():
        arguments = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        calls = watch(model, lambda: arguments.update(out=model(input_ids=ids[:, start:], **arguments)))
    # The last new token of the first turn and 8 more in two groups and one, then the last; no attention sink here.
    assert [seen.rows for seen in calls] == [2 * (3 + 1)] * 2
    torch.testing.assert_close(second.logits[0], arguments["out"].logits[:, -1], rtol=0, atol=1e-4)


def test_without_a_cache_every_step_is_a_prefill() -> None:
    model, ids = with_plugin(), LLAMA.inputs(2, PROMPT)["input_ids"]
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, use_cache=False)
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert output.tolist() == ids.tolist()


def test_a_prompt_of_embeddings_alone() -> None:
    model, ids = with_plugin(), LLAMA.inputs(2, PROMPT)["input_ids"]
    mask = torch.ones_like(ids)
    expected = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, PROMPT:]
    embeddings = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_prompts_shorter_than_a_group(length: int) -> None:
    """One or two tokens, kept both, leave the base model."""
    model, ids = with_plugin(), LLAMA.inputs(2, length)["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = model.generate(**inputs, **GREEDY)
    with model.disable_adapter():
        assert output.tolist() == model.generate(**inputs, **GREEDY).tolist()


def test_the_cache_holds_what_the_prompt_alone_gives() -> None:
    """Keys and values of the prompt do not depend on the tokens that are generated after it."""
    model, ids = with_plugin(), LLAMA.inputs(2, PROMPT)["input_ids"]
    with torch.no_grad():
        prompt = model(input_ids=ids, use_cache=True).past_key_values
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, return_dict_in_generate=True)
    for grown, own in zip(output.past_key_values.layers, prompt.layers, strict=True):
        torch.testing.assert_close(grown.keys[:, :, :PROMPT], own.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(grown.values[:, :, :PROMPT], own.values, rtol=0, atol=1e-5)


def test_continuous_batching_runs_the_base_model_and_says_so() -> None:
    """Its sequences hold prompts and single tokens of several requests: merging them would be wrong."""
    prompts = [LLAMA.inputs(1, length)["input_ids"] for length in (17, 6, 11)]
    model = with_plugin().get_base_model()
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = model.generate_batch(
            [prompt[0].tolist() for prompt in prompts], generation_config=config, continuous_batching_config=batching
        )
    assert sum("Continuous batching" in str(warning.message) for warning in caught) == 1
    base = LLAMA.build()
    tokens = [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))]
    expected = [base.generate(input_ids=prompt, **GREEDY)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    assert tokens == expected
