"""Models of several towers: each that can takes a plugin, and the others stay as they are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText

from peft_variator import VariatorConfig
from tests.tiny_models import DECODER, FIRST_WORD, IMAGE_TOKEN, TOWER, VISION, VOCABULARY, Case, outputs_of


LLAMA_TEXT = DECODER | {"model_type": "llama"}
IDEFICS = {"text_config": LLAMA_TEXT, "vision_config": TOWER, "image_token_id": IMAGE_TOKEN, "scale_factor": 2}
# Their towers of images take rows of patches of all images, which no plugin groups yet.
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
QWEN_TEXT = DECODER | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
QWEN = {"text_config": QWEN_TEXT, "image_token_id": IMAGE_TOKEN, "video_token_id": 6}
QWEN |= {"vision_start_token_id": 7, "vision_end_token_id": 8}
# Fields of the configuration, the number of tokens an image has in the text, and the towers with a plugin.
COMPOSITES: dict[str, tuple[dict[str, Any], int, set[str]]] = {
    "smolvlm": (IDEFICS, 9, {"vision_model", "text_model"}),
    "idefics3": (IDEFICS, 9, {"vision_model", "text_model"}),
    "internvl": (
        {
            "text_config": DECODER | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": [24, 24], "patch_size": [4, 4]},
            "image_token_id": IMAGE_TOKEN,
            "downsample_ratio": 0.5,
        },
        9,
        {"vision_tower", "language_model"},
    ),
    "paligemma": (
        {
            "text_config": DECODER | {"model_type": "gemma2", "sliding_window": 8},
            "vision_config": TOWER | {"model_type": "siglip_vision_model", "projection_dim": 32},
            "image_token_id": IMAGE_TOKEN,
            "projection_dim": 32,
            "hidden_size": 32,
            "vocab_size": VOCABULARY,
        },
        36,
        {"vision_tower", "language_model"},
    ),
    "qwen2_vl": (QWEN | {"vision_config": QWEN_TOWER | {"embed_dim": 32, "mlp_ratio": 2}}, 9, {"language_model"}),
    "qwen2_5_vl": (
        QWEN
        | {
            "vision_config": QWEN_TOWER
            | {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        },
        9,
        {"language_model"},
    ),
    "qwen3_vl": (
        QWEN
        | {
            "vision_config": QWEN_TOWER
            | {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 36}
            | {"deepstack_visual_indexes": [0]}
        },
        9,
        {"language_model"},
    ),
}


def inputs_of(name: str, image_tokens: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(FIRST_WORD, VOCABULARY, (2, 11))
    ids = torch.cat([ids[:, :3], torch.full((2, image_tokens), IMAGE_TOKEN), ids[:, 3:]], dim=1)
    pixels = torch.randn(2, 3, 24, 24)
    if name in ("smolvlm", "idefics3"):
        pixels = pixels.unsqueeze(1)  # a text may have several
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if name.startswith("qwen"):
        patches = {"pixel_values": torch.randn(2 * 36, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 6, 6]] * 2)}
        inputs |= patches | {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()}
    return inputs


def padded(inputs: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The same texts with three tokens of padding."""
    width = (3, 0) if side == "left" else (0, 3)
    texts = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: pad(value, width) if name in texts else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_tower_that_can_takes_a_plugin(name: str) -> None:
    fields, image_tokens, towers = COMPOSITES[name]
    case, inputs = Case(name, name, AutoModelForImageTextToText, fields, "vlm"), inputs_of(name, image_tokens)
    expected = outputs_of(case.build().requires_grad_(False), inputs)["logits"]
    model = get_peft_model(case.build(), VariatorConfig(init_weights=False)).eval()
    found = {tower for tower in towers for target in model.targeted_module_names if f"{tower}." in target}
    assert found == towers
    assert len(model.targeted_module_names) == 2 * len(towers)
    assert not torch.allclose(outputs_of(model, inputs)["logits"], expected, atol=1e-3)
    model.set_compression_ratio(1)
    assert torch.equal(outputs_of(model, inputs)["logits"], expected)
    text = get_peft_model(case.build(), VariatorConfig(compress_vision_tower=False))
    assert len(text.targeted_module_names) == 2


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl"])
def test_a_tower_that_takes_none_is_named(name: str) -> None:
    case = Case(name, name, AutoModelForImageTextToText, COMPOSITES[name][0], "vlm")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(case.build(), VariatorConfig())
        get_peft_model(case.build(), VariatorConfig(compress_vision_tower=False))
    found = [str(each.message) for each in caught if "visual" in str(each.message)]
    assert len(found) == (name == "qwen2_vl")
    assert all("language_model" in message and "'qwen2_vl_vision'" in message for message in found)


@pytest.mark.parametrize("name", COMPOSITES)
def test_generation_from_an_image(name: str) -> None:
    """The first prediction of a prefill is that of a plain call."""
    fields, image_tokens, _ = COMPOSITES[name]
    case, inputs = Case(name, name, AutoModelForImageTextToText, fields, "vlm"), inputs_of(name, image_tokens)
    model = get_peft_model(case.build(), VariatorConfig(init_weights=False)).eval()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    first = outputs_of(model, inputs)["logits"][:, -1]
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 4
    torch.testing.assert_close(output.logits[0], first, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_padding_changes_nothing(name: str, side: str) -> None:
    fields, image_tokens, _ = COMPOSITES[name]
    case, inputs = Case(name, name, AutoModelForImageTextToText, fields, "vlm"), inputs_of(name, image_tokens)
    model = get_peft_model(case.build(), VariatorConfig(init_weights=False)).eval()
    with_padding = outputs_of(model, padded(inputs, side))["logits"]
    found = with_padding[:, 3:] if side == "left" else with_padding[:, :-3]
    torch.testing.assert_close(found, outputs_of(model, inputs)["logits"], rtol=0, atol=1e-4)
