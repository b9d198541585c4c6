import re

import pytest
from peft import LoraConfig, PeftConfig, PeftType

from peft_variator import SparseLoraConfig
from peft_variator.tuners.sparse_lora import SparseLoraModel

from .cases import build


def test_name_and_prefix_do_not_contain_loras() -> None:
    assert SparseLoraConfig().peft_type == PeftType("SPARSE_LOW_RANK")
    assert SparseLoraModel.prefix == "sparse_low_rank_"
    assert "lora_" not in SparseLoraModel.prefix


@pytest.mark.parametrize(
    "name",
    [
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    ],
)
def test_defaults_are_those_of_lora(name: str) -> None:
    assert getattr(SparseLoraConfig(), name) == getattr(LoraConfig(), name)


def test_every_field_of_its_own_has_a_help() -> None:
    inherited = PeftConfig.__dataclass_fields__
    for name, entry in SparseLoraConfig.__dataclass_fields__.items():
        assert name in inherited or entry.metadata["help"]


def test_round_trip_through_json(tmp_path) -> None:
    config = SparseLoraConfig(
        r=4,
        target_modules=["query", "value"],
        exclude_modules=["pooler"],
        rank_pattern={"query": 2},
        alpha_pattern={"value": 3},
        mask="stored",
        recompute=False,
        init_lora_weights="gaussian",
        use_rslora=True,
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert isinstance(PeftConfig.from_pretrained(tmp_path), SparseLoraConfig)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha=nan has to be a finite number"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern['q_proj']='8' has to be a number"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 is not possible with SparseLoRA: LoRA drops elements of the input"),
        ({"mask": "bits"}, "mask='bits' has to be one of ['weight', 'stored']"),
        ({"bias": "some"}, "bias='some' has to be one of ['none', 'all', 'lora_only']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has to be True or False or one of ['gaussian']"),
        ({"r": 0}, "The rank r=0 must be an integer of at least 1"),
        ({"r": 2.5}, "r=2.5 has to be an integer"),
        ({"r": True}, "r=True has to be an integer"),
        ({"rank_pattern": {"query": -1}}, "The rank rank_pattern['query']=-1 must be an integer of at least 1"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used when"),
        ({"target_modules": ".*q", "layers_pattern": "layer"}, "`layers_pattern` cannot be used when"),
        ({"target_modules": ["q"], "layers_pattern": "layer"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_impossible_values_are_named(fields, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseLoraConfig(**fields)


def test_default_targets_are_all_linear_layers_but_not_the_output_embedding() -> None:
    model = build("llama")
    config = SparseLoraConfig()
    SparseLoraModel(model, config, "default")
    names = {name.rpartition(".")[2] for name in config.target_modules}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
