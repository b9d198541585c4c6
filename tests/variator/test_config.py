"""Fields of the configuration: what is refused, what is written to JSON, what a tokenizer fills in."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType, get_peft_model
from transformers import PreTrainedTokenizerFast

from peft_variator import VariatorConfig
from tests.tiny_models import ALL, BERT, LLAMA, SEQ2SEQ, Case, by_name
from tests.word_tokenizer import word_tokenizer

from .reference import watch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression_ratio": 0}, r"compression_ratio=0 has to be an integer of at least 1"),
        ({"compression_ratio": 2.0}, r"compression_ratio=2\.0 has to be an integer"),
        ({"compression_ratio": True}, r"compression_ratio=True has to be an integer"),
        ({"compression_ratio": "4"}, r"compression_ratio='4' has to be an integer"),
        ({"ratio_pattern": [4]}, r"ratio_pattern=\[4\] has to be a dict"),
        ({"ratio_pattern": {"mlp": 0}}, r"ratio_pattern\['mlp'\]=0 has to be an integer of at least 1"),
        ({"ratio_pattern": {"mlp": None}}, r"ratio_pattern\['mlp'\]=None has to be an integer"),
        ({"ratio_pattern": {"(": 2}}, r"ratio_pattern.*'\('.*regular expression"),
        ({"ratio_pattern": {3: 2}}, r"ratio_pattern.*3 has to be a string"),
        ({"bottleneck_dim": 0}, r"bottleneck_dim=0 has to be an integer of at least 1"),
        ({"scoring": "mean"}, r"scoring='mean' is not one of 'token', 'concat'"),
        ({"patch_grouping": "square"}, r"patch_grouping='square' is not one of 'window', 'raster'"),
        ({"keep_first_tokens": -1}, r"keep_first_tokens=-1 has to be an integer of at least 0"),
        ({"keep_last_tokens": None}, r"keep_last_tokens=None has to be an integer"),
        ({"keep_token_ids": [3, -1]}, r"keep_token_ids.*-1.*at least 0"),
        ({"keep_token_ids": ["[CLS]"]}, r"keep_token_ids.*'\[CLS\]'.*integer"),
        ({"keep_token_ids": [1, "a"]}, r"keep_token_ids.*'a'.*integer"),
        ({"keep_token_ids": 3}, r"keep_token_ids=3.*list"),
        ({"layers_pattern": "layer"}, r"layers_pattern='layer' has no effect without layers_to_transform"),
        ({"end_module": ""}, r"end_module='' names no module"),
    ],
    ids=str,
)
def test_values_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariatorConfig(**arguments)


def test_defaults() -> None:
    config = VariatorConfig()
    assert (config.compression_ratio, config.decompression, config.scoring) == (4, "neurons", "token")
    assert (config.keep_first_tokens, config.keep_last_tokens, config.keep_token_ids) == (1, 1, [])
    assert config.peft_type == PeftType("VARIATOR")
    assert config.init_weights is True


def test_every_field_explains_itself() -> None:
    own = {field.name for field in fields(VariatorConfig)} - {field.name for field in fields(PeftConfig)}
    for field in fields(VariatorConfig):
        assert field.name not in own or field.metadata["help"].endswith(".")


def test_json_round_trip(tmp_path: Path) -> None:
    config = VariatorConfig(
        target_modules=["mlp", "ffn"],
        exclude_modules=["layers.0.mlp"],
        layers_to_transform=[1, 2],
        layers_pattern="layers",
        ratio_pattern={"layers.1.mlp": 2},
        keep_token_ids=(5, 3, 3),
        stack_module="encoder",
        end_module="output.dense",
    )
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, VariatorConfig)
    left, right = config.to_dict(), again.to_dict()
    assert {name: value for name, value in left.items() if name != "inference_mode"} == {
        name: value for name, value in right.items() if name != "inference_mode"
    }
    assert again.keep_token_ids == [3, 5]
    assert again.target_modules == {"mlp", "ffn"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "VARIATOR"


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    return word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "the", "word"], **special)


def test_from_tokenizer_keeps_special_tokens() -> None:
    bert = tokenizer(cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]")
    config = VariatorConfig.from_tokenizer(bert, compression_ratio=2, scoring="concat")
    assert config.keep_token_ids == [2, 3, 4]
    assert (config.compression_ratio, config.scoring) == (2, "concat")
    assert VariatorConfig.from_tokenizer(tokenizer(bos_token="<s>", eos_token="</s>")).keep_token_ids == [5, 6]
    assert VariatorConfig.from_tokenizer(tokenizer()).keep_token_ids == []


def test_from_tokenizer_takes_no_ids() -> None:
    with pytest.raises(ValueError, match=r"keep_token_ids=\[1\] was passed to from_tokenizer"):
        VariatorConfig.from_tokenizer(tokenizer(), keep_token_ids=[1])


def rows_of(case: Case, length: int = 14, **arguments: Any) -> list[int]:
    model = get_peft_model(case.build(), VariatorConfig(**arguments))
    rows = {}
    for seen in watch(model, lambda: model(**case.inputs(1, length))):
        rows[seen.name] = seen.rows
    return list(rows.values())


@pytest.mark.parametrize("case", [BERT, LLAMA, *SEQ2SEQ], ids=by_name)
def test_layers_to_transform(case: Case) -> None:
    for layer in (0, 1):
        model = get_peft_model(case.build(), VariatorConfig(layers_to_transform=[layer]))
        assert len(model.targeted_module_names) == 1
        assert f".{layer}." in model.targeted_module_names[0]
    assert len(get_peft_model(case.build(), VariatorConfig(layers_to_transform=1)).targeted_module_names) == 1


def test_layers_to_transform_of_a_stack_by_itself() -> None:
    stack = LLAMA.build().model
    assert get_peft_model(stack, VariatorConfig(layers_to_transform=[1])).targeted_module_names == ["layers.1.mlp"]


def test_layers_pattern_and_exclude_modules() -> None:
    config = VariatorConfig(layers_to_transform=[0], layers_pattern="layers")
    assert get_peft_model(LLAMA.build(), config).targeted_module_names == ["model.layers.0.mlp"]
    config = VariatorConfig(exclude_modules=["layers.0.mlp"])
    assert get_peft_model(LLAMA.build(), config).targeted_module_names == ["model.layers.1.mlp"]


def test_no_layer_of_that_number() -> None:
    with pytest.raises(ValueError, match=r"layers_to_transform.*\[7\]"):
        get_peft_model(BERT.build(), VariatorConfig(layers_to_transform=[7]))


def test_targets_by_name() -> None:
    config = VariatorConfig(target_modules=["0.mlp"])
    assert get_peft_model(LLAMA.build(), config).targeted_module_names == ["model.layers.0.mlp"]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({}, 5),  # 0 | 1-4 | 5-8 | 9-12 | 13
        ({"compression_ratio": 2}, 8),
        ({"compression_ratio": 1_000_000}, 3),
        ({"keep_first_tokens": 0, "keep_last_tokens": 0}, 4),
        ({"keep_first_tokens": 3, "keep_last_tokens": 2}, 3 + 3 + 2),
        ({"keep_first_tokens": 100}, 14),
        ({"keep_last_tokens": 100}, 14),
        ({"compress_text_tokens": False}, 14),
    ],
    ids=str,
)
def test_number_of_vectors(arguments: dict[str, Any], rows: int) -> None:
    assert rows_of(BERT, **arguments) == [rows] * 2
    concat = (
        rows_of(BERT, scoring="concat", **arguments) if arguments.get("compression_ratio", 4) < 100 else [rows] * 2
    )
    assert concat == [rows] * 2


def test_ratio_pattern_matches_the_end_of_a_name_or_a_regex() -> None:
    assert rows_of(BERT, ratio_pattern={"0.intermediate": 2}) == [8, 5]
    assert rows_of(BERT, ratio_pattern={r"layer\.\d\.intermediate": 12}) == [3, 3]
    assert rows_of(BERT, compression_ratio=1, ratio_pattern={r"encoder\.layer\.1\.intermediate": 4}) == [14, 5]


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_no_argument_is_needed(case: Case) -> None:
    config = VariatorConfig()
    model = get_peft_model(case.build(), config)
    assert isinstance(model.peft_config["default"].target_modules, str)
    assert len(model.targeted_module_names) >= 1


def test_chunked_feed_forward_is_refused() -> None:
    base = BERT.build()
    base.config.chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match="chunk_size_feed_forward=2.*never see a whole sequence"):
        get_peft_model(base, VariatorConfig())
