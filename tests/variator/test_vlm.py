"""Vision-language models: text tokens, image tokens and the vision tower, each merged or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from peft_variator import VariatorConfig, calibrate
from tests.tiny_models import DECODER, IMAGE_TOKEN, LLAVA, TOWER, VOCABULARY, Case

from .reference import feed_forward_of, plugin_output, watch


PATCHES = 36
TOWER_ROWS = 1 + PATCHES // 4


def with_plugin(**fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(LLAVA.build(), VariatorConfig(init_weights=False, **fields)).eval()


def rows_of(model: PeftModel, arguments: dict[str, Any]) -> tuple[set[int], set[int]]:
    """Rows that the networks of the vision tower and of the language model saw."""
    seen = watch(model, lambda: model(**arguments))
    tower, language = [], []
    for network in seen:
        (tower if "vision_tower" in network.name else language).append(network.rows)
    return set(tower), set(language)


# Text 0-2, image 3-38, text 39-46: 0 | 1 2 | 9 groups of 4 | 39-42, 43-45 | 46
@pytest.mark.parametrize(
    ("text", "images", "rows"),
    [
        (True, True, 1 + 1 + 9 + 2 + 1),
        (True, False, 1 + 1 + PATCHES + 2 + 1),
        (False, True, 3 + 9 + 8),
        (False, False, 3 + PATCHES + 8),
    ],
)
@pytest.mark.parametrize("tower", [True, False])
def test_each_on_or_off(text: bool, images: bool, tower: bool, rows: int) -> None:
    model = with_plugin(compress_text_tokens=text, compress_image_tokens=images, compress_vision_tower=tower)
    seen_tower, seen_language = rows_of(model, LLAVA.inputs(1, 11))
    assert seen_tower == ({TOWER_ROWS} if tower else set())
    # Where only the tower has something to merge, the language model gets no plugin.
    assert seen_language == ({rows} if text or images or not tower else set())


def test_a_plugin_of_the_tower_alone_is_calibrated() -> None:
    config = VariatorConfig(compress_text_tokens=False, compress_image_tokens=False, correction_dim=4)
    model = get_peft_model(LLAVA.build(), config)
    calibrate(model, [LLAVA.inputs(2, 11)])
    names = [name for name, _ in model.named_parameters() if "variator" in name]
    assert names
    assert all("vision_tower" in name for name in names)


def test_nothing_left_to_merge_is_the_base_model() -> None:
    inputs = LLAVA.inputs(2, 11)
    model = with_plugin(compress_text_tokens=False, compress_image_tokens=False, compress_vision_tower=False)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, LLAVA.build()(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [3, 4, 5])
def test_image_and_text_never_share_a_group(ratio: int) -> None:
    fields = {"compression_ratio": ratio, "compress_vision_tower": False, "decompression": "bottleneck"}
    model, inputs = with_plugin(**fields), LLAVA.inputs(1, 11)
    ids = inputs["input_ids"][0].tolist()
    groups: list[list[int]] = []
    for position, token in enumerate(ids):
        kept = position in (0, len(ids) - 1)
        last = groups[-1] if groups else []
        starts = kept or not last or last == [0] or len(last) == ratio
        if starts or (token == IMAGE_TOKEN) != (ids[last[0]] == IMAGE_TOKEN):
            groups.append([])
        groups[-1].append(position)
    with torch.no_grad():
        for seen in watch(model, lambda: model(**inputs)):
            network = feed_forward_of(model, seen)
            expected = plugin_output(seen.layer, network, seen.inputs, [groups], "default")
            atol = 1e-5 * float(expected.abs().max().clamp(min=1))
            torch.testing.assert_close(seen.outputs, expected, rtol=0, atol=atol)


def test_text_alone() -> None:
    model = with_plugin()
    ids = torch.randint(10, 99, (2, 14))
    assert rows_of(model, {"input_ids": ids}) == (set(), {2 * (1 + 3 + 1)})


def test_generation_about_an_image() -> None:
    model, inputs = with_plugin(), LLAVA.inputs(1, 11)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    prompt = inputs["input_ids"].shape[1]
    labels = output.sequences.clone()
    labels[:, :prompt] = -100
    with torch.no_grad():
        arguments = {"input_ids": output.sequences, "pixel_values": inputs["pixel_values"], "labels": labels}
        expected = model(**arguments).logits[:, prompt - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"compress_text_tokens": False}, {"compress_image_tokens": False}], ids=str)
def test_placeholders_are_told_by_their_embeddings(fields: dict[str, bool]) -> None:
    """As the base model does where it gets no input_ids."""
    model, inputs = with_plugin(**fields), LLAVA.inputs(2, 11)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    by_embeddings = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(model(**by_embeddings, inputs_embeds=embeddings).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("fields", [{"compress_text_tokens": False}, {"compress_image_tokens": False}], ids=str)
def test_embeddings_without_placeholders_cannot_be_told_apart(fields: dict[str, bool]) -> None:
    model = with_plugin(**fields)
    with pytest.raises(ValueError, match="cannot tell text from image tokens.* Pass input_ids"):
        model(inputs_embeds=torch.randn(1, 12, 32))


PALIGEMMA = Case(
    "paligemma",
    "paligemma",
    AutoModelForImageTextToText,
    {
        "text_config": DECODER | {"model_type": "gemma"},
        "vision_config": TOWER | {"model_type": "siglip_vision_model", "projection_dim": 32},
        "image_token_id": IMAGE_TOKEN,
        "projection_dim": 32,
        "hidden_size": 32,
        "vocab_size": VOCABULARY,
    },
    "vlm",
)


def test_a_prefix_that_attends_both_ways_does_not_make_an_encoder() -> None:
    """PaliGemma's language model says it is not causal, but what it writes is."""
    torch.manual_seed(1)
    model = get_peft_model(PALIGEMMA.build(), VariatorConfig(init_weights=False)).eval()
    inputs, written = PALIGEMMA.inputs(1, 17), 43
    is_written = torch.arange(inputs["input_ids"].shape[1]) >= written
    inputs |= {"labels": inputs["input_ids"].masked_fill(~is_written, -100), "token_type_ids": is_written.long()[None]}
    with torch.no_grad():
        expected = model(**inputs).logits
        for position in range(written, len(is_written)):
            other = inputs["input_ids"].clone()
            other[:, position] = 50
            found = model(**inputs | {"input_ids": other}).logits
            used = slice(written - 1, position)
            torch.testing.assert_close(found[:, used], expected[:, used], rtol=0, atol=1e-5)
    assert max(rows_of(model, inputs)[1]) < len(is_written), "the prefix is merged"


def test_a_prefix_model_decodes_without_its_plugin() -> None:
    torch.manual_seed(1)
    model = get_peft_model(PALIGEMMA.build(), VariatorConfig(init_weights=False)).eval()
    inputs = PALIGEMMA.inputs(1, 11)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    seen = watch(model, lambda: model.generate(**inputs, **options))
    language = [network.rows for network in seen if "vision_tower" not in network.name]
    assert language[2:] == [1] * 2 * 3
    assert language[0] < inputs["input_ids"].shape[1]
