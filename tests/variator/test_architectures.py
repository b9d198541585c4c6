"""The tables of architectures: which take a plugin, which are refused and why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from peft_variator import VariatorConfig
from peft_variator.tuners.variator.architectures import FEED_FORWARDS, REFUSED
from tests.tiny_models import BART, BERT, DECODER, T5, TEXT, VISION


STAGES = {"image_size": 32, "depths": [1, 1], "num_heads": [2, 2], "hidden_sizes": [8, 16]}
REFUSED_MODELS: dict[str, tuple[dict[str, Any], str, str]] = {
    "swin": (STAGES | {"embed_dim": 8, "window_size": 2}, "width.*window", "mlp"),
    "swinv2": (STAGES | {"embed_dim": 8, "window_size": 2}, "width.*window", "mlp"),
    "hiera": ({"embed_dim": 8, "depths": [1, 1, 1, 1]}, "width.*window", "mlp"),
    "segformer": (
        STAGES | {"num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]},
        "width",
        "mlp",
    ),
    "convnext": (STAGES | {"num_stages": 2}, "width", "pwconv1"),
    "convnextv2": (STAGES | {"num_stages": 2}, "width", "pwconv1"),
    "sam_vision_model": (VISION | {"global_attn_indexes": [1], "window_size": 2, "mlp_dim": 48}, "window", "mlp"),
    "sam": ({"vision_config": VISION | {"global_attn_indexes": [1], "mlp_dim": 48}}, "window", "nowhere"),
    "git": (TEXT | {"vision_config": VISION}, "image's tokens.*inside", "encoder.layer.0.intermediate"),
    "xlnet": (
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "sequence first",
        "ff.layer_1",
    ),
    "longformer": (TEXT | {"attention_window": 4}, "pads", "intermediate"),
    "led": (BART | {"attention_window": 4, "max_encoder_position_embeddings": 128}, "pads", "fc1"),
    "big_bird": (TEXT | {"attention_type": "block_sparse"}, "pads.*original_full", "intermediate"),
    "doge": (DECODER | {"is_moe": True, "num_experts": 4}, "router mixes", "mlp"),
    "nystromformer": (TEXT, "means over stretches", "intermediate"),
    "pegasus_x": (BART, "pads", "fc1"),
    "switch_transformers": (T5 | {"num_experts": 4}, "limited number of a batch's tokens", "mlp"),
}


def build(model_type: str, fields: dict[str, Any]) -> PreTrainedModel:
    return AutoModel.from_config(AutoConfig.for_model(model_type, **fields))


def assert_untouched(model: nn.Module, before: list[tuple[str, type]]) -> None:
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all("forward" not in vars(module) for module in model.modules())
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("model_type", REFUSED_MODELS)
def test_what_cannot_take_a_plugin_is_refused_with_the_reason(model_type: str, named: bool) -> None:
    fields, reason, start = REFUSED_MODELS[model_type]
    with torch.device("meta"):
        model = build(model_type, fields)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=f"'{model_type}'.*{reason}"):
        get_peft_model(model, VariatorConfig(target_modules=[start] if named else None))
    assert_untouched(model, before)


def test_a_refused_part_is_left_out_of_a_model_of_several() -> None:
    swin = AutoConfig.for_model("swin", **REFUSED_MODELS["swin"][0])
    bert = AutoConfig.for_model("bert", **TEXT)
    base = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(swin, bert))
    with pytest.raises(ValueError, match="'swin'.*window"):
        get_peft_model(base, VariatorConfig())


def test_a_refused_seq2seq_model_is_named_by_its_head_s_architecture() -> None:
    fields, reason, _ = REFUSED_MODELS["led"]
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("led", **fields))
    with pytest.raises(ValueError, match=f"'led'.*{reason}"):
        get_peft_model(model, VariatorConfig())


@pytest.mark.parametrize("spelled", ["all-linear", "All-Linear"])
def test_all_linear_maps_are_refused(spelled: str) -> None:
    with pytest.raises(ValueError, match=f"target_modules='{spelled}'.*end_module"):
        get_peft_model(BERT.build(), VariatorConfig(target_modules=spelled))


def test_the_tables_name_architectures_of_transformers_once() -> None:
    assert not FEED_FORWARDS.keys() & REFUSED.keys()
    assert (FEED_FORWARDS.keys() | REFUSED.keys()) <= CONFIG_MAPPING_NAMES.keys()


def test_the_pages_list_what_the_tables_have() -> None:
    path = Path(__file__).parents[2] / "docs" / "architectures.py"
    spec = importlib.util.spec_from_file_location("architectures_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page, text in module.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"run `python docs/architectures.py`: {page.name}"
        assert "`bert`" in text
