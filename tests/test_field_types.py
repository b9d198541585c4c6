"""Configurations refuse values of other types than their fields', and name the field."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from peft_variator import SparseLoraConfig, VariatorConfig
from peft_variator.sparsity import PruningConfig, prune
from peft_variator.training import DistillationConfig
from tests.tiny_models import BERT


VALID: dict[type, dict[str, Any]] = {
    VariatorConfig: {},
    SparseLoraConfig: {},
    PruningConfig: {"sparsity": 0.5},
    DistillationConfig: {},
}
_INHERITED = {item.name for item in fields(TrainingArguments)}
OWN_FIELDS = {
    kind: sorted(item.name for item in fields(kind) if item.init and item.name not in {"peft_type", *_INHERITED})
    for kind in VALID
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (VariatorConfig, "compress_text_tokens", "false"),
        (VariatorConfig, "compress_text_tokens", 0),
        (VariatorConfig, "compression_ratio", 2**31),
        (VariatorConfig, "compression_ratio", True),
        (VariatorConfig, "bottleneck_dim", np.float32(8)),
        (VariatorConfig, "ratio_pattern", {"layer.0": 1.5}),
        (VariatorConfig, "ratio_pattern", {0: 1}),
        (VariatorConfig, "modules_to_save", "none"),
        (VariatorConfig, "target_modules", [1]),
        (VariatorConfig, "correction_dim", "x"),
        (VariatorConfig, "keep_token_ids", [10**5000]),
        (VariatorConfig, "inference_mode", "no"),
        (VariatorConfig, "correction_dim", 2**31),
        (VariatorConfig, "correction_dim", np.uint64(2**63)),
        (VariatorConfig, "correction_pattern", {"layer.0": 2**63}),
        (VariatorConfig, "peft_type", "LORA"),
        (VariatorConfig, "max_kept_tokens", 2**31 - 1),
        (SparseLoraConfig, "rank_pattern", {"": 2}),
        (SparseLoraConfig, "lora_alpha", 1e308),
        (VariatorConfig, "target_modules", "("),
        (VariatorConfig, "target_modules", [""]),
        (VariatorConfig, "modules_to_save", ["("]),
        (VariatorConfig, "layers_to_transform", []),
        (VariatorConfig, "layers_to_transform", [0, -1]),
        (VariatorConfig, "ratio_pattern", {"": 1}),
        (VariatorConfig, "ratio_pattern", {"(?i)layer": 1}),
        (SparseLoraConfig, "rank_pattern", {"(": 2}),
        (SparseLoraConfig, "exclude_modules", "*"),
        (SparseLoraConfig, "base_fingerprint", "no digits"),
        (PruningConfig, "target_modules", "["),
        (PruningConfig, "modalities", []),
        (PruningConfig, "max_block_sparsity", 2.0),
        (SparseLoraConfig, "use_rslora", "False"),
        (SparseLoraConfig, "rank_pattern", [1.5]),
        (SparseLoraConfig, "r", 2**31),
        (SparseLoraConfig, "lora_alpha", float("nan")),
        (SparseLoraConfig, "lora_alpha", 10**400),
        (SparseLoraConfig, "lora_alpha", np.float64(8)),
        (SparseLoraConfig, "init_lora_weights", 1),
        (SparseLoraConfig, "recompute", np.bool_(True)),
        (PruningConfig, "keep_dense", "no"),
        (PruningConfig, "max_block_sparsity", "x"),
        (PruningConfig, "damping", float("inf")),
        (PruningConfig, "modalities", "vision"),
        (PruningConfig, "modality_modules", {"vision": "encoder"}),
        (DistillationConfig, "base_dropout", "false"),
        (DistillationConfig, "hidden_weight", "x"),
        (DistillationConfig, "hidden_weight", True),
        (DistillationConfig, "ratios", [2.5]),
        (DistillationConfig, "variance_samples", 2**31),
        (DistillationConfig, "gradient_checkpointing", "false"),
        (DistillationConfig, "learning_rate", "2e-3"),
        (DistillationConfig, "max_steps", True),
        (DistillationConfig, "seed", 2**32),
        (DistillationConfig, "save_strategy", "sometimes"),
        (DistillationConfig, "lr_scheduler_type", "cosines"),
        (DistillationConfig, "accelerator_config", 3),
        (VariatorConfig, "task_type", "CLASSIFY"),
        (SparseLoraConfig, "auto_mapping", {"base_model_class": 1}),
    ],
)
def test_wrong_types_are_refused_by_name(kind: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        kind(**{**VALID[kind], name: value})


def test_numpy_integers_and_tuples_become_what_json_holds() -> None:
    config = VariatorConfig(
        compression_ratio=np.int64(2),
        ratio_pattern={"layer.0": np.int32(1)},
        layers_to_transform=(np.int64(0), 1),
        modules_to_save=("classifier",),
        keep_token_ids={np.int64(3), 1},
    )
    values = (config.compression_ratio, config.ratio_pattern, config.layers_to_transform, config.modules_to_save)
    assert json.loads(json.dumps(values)) == [2, {"layer.0": 1}, [0, 1], ["classifier"]]
    assert [type(token_id) for token_id in config.keep_token_ids] == [int, int]


def test_what_a_pattern_means() -> None:
    config = VariatorConfig(ratio_pattern={"layer.0": 1, r"(o)utput\.\1": 2})
    names = ("encoder.layer.0.mlp", "encoder.layer.10.mlp", "encoder.output.o", "encoder.output.x")
    assert [config.ratio_of(name) for name in names] == [1, 4, 2, 4]


def test_a_saved_config_without_its_version_was_saved(tmp_path) -> None:
    VariatorConfig(bottleneck_dim=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key != "peft_version"}
    file.write_text(json.dumps(kept))
    assert VariatorConfig.from_pretrained(tmp_path).was_saved


def test_what_training_arguments_take_passes(tmp_path) -> None:
    args = DistillationConfig(
        output_dir=tmp_path, seed=2**31, max_grad_norm=float("inf"), per_device_train_batch_size=np.int64(4)
    )
    again = replace(args, learning_rate=1, save_strategy=SaveStrategy.NO)
    values = (again.output_dir, again.seed, again.max_grad_norm, again.learning_rate, again.save_strategy)
    assert values == (str(tmp_path), 2**31, float("inf"), 1, "no")
    assert type(again.per_device_train_batch_size) is int


def test_a_saved_adapter_with_a_wrong_type_is_refused(tmp_path) -> None:
    SparseLoraConfig(r=4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_rslora": "False"}))
    with pytest.raises(ValueError, match="use_rslora"):
        SparseLoraConfig.from_pretrained(tmp_path)


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.sampled_from([2**31, 10**400, np.int64(3), np.float64(0.5), np.bool_(True), object(), int, 1j]),
    st.sampled_from(
        [Path("x"), Decimal(2), Fraction(1, 2), SaveStrategy.NO, np.array([1]), torch.tensor(2), range(2)]
    ),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=3),
    ),
    max_leaves=4,
)


def as_list(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


@pytest.mark.parametrize("kind", list(VALID), ids=lambda kind: kind.__name__)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_is_taken_or_refused_by_name(kind: type, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(OWN_FIELDS[kind]))
    value = data.draw(_VALUES)
    config, message = None, name
    try:
        config = kind(**{**VALID[kind], name: value})
    except (ValueError, TypeError) as error:
        message = str(error)
    assert name in message
    if config is not None and kind is not DistillationConfig:  # what was taken is in the file what it is here
        fields_read = json.loads(json.dumps({key: as_list(taken) for key, taken in config.to_dict().items()}))
        assert {key: as_list(taken) for key, taken in kind(**fields_read).to_dict().items()} == {
            key: as_list(taken) for key, taken in config.to_dict().items()
        }


@pytest.mark.parametrize("value", [None, False, ""])
def test_fsdp_may_be_a_bool_though_it_is_annotated_as_a_string(tmp_path, value) -> None:
    assert not DistillationConfig(output_dir=str(tmp_path), fsdp=value).fsdp


@pytest.mark.parametrize("kind", [VariatorConfig, SparseLoraConfig])
def test_a_field_that_was_set_later_is_checked_before_the_config_is_used(kind: type, tmp_path) -> None:
    config = kind()
    config.modules_to_save = "none"
    for use in (lambda: config.save_pretrained(tmp_path), lambda: get_peft_model(BERT.build(), config)):
        with pytest.raises(ValueError, match="modules_to_save='none'"):
            use()
    assert not list(tmp_path.iterdir())


def test_pruning_options_that_were_set_later_are_checked() -> None:
    config = PruningConfig(sparsity=0.5)
    config.max_block_sparsity = "x"
    with pytest.raises(ValueError, match="max_block_sparsity='x'"):
        prune(torch.nn.Linear(4, 4), config)


@pytest.mark.parametrize("method", ["LORA", "nothing", 3, ["VARIATOR"]])
def test_the_file_of_another_method_is_refused_by_name(method: Any, tmp_path) -> None:
    VariatorConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": method}))
    with pytest.raises(ValueError, match="adapter_config.json: peft_type="):
        VariatorConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SparseLoraConfig(r=2**31 - 1, target_modules=["query"]), "r"),
        (SparseLoraConfig(rank_pattern={"query": 10**9}, target_modules=["query"]), r"rank_pattern\['query'\]"),
        (VariatorConfig(bottleneck_dim=2**31 - 1), "bottleneck_dim"),
        (VariatorConfig(decompression="bottleneck", correction_dim=10**9), "correction_dim"),
        (VariatorConfig(correction_dim=2**31 - 1), "correction_dim"),
        (VariatorConfig(correction_rank=2**31 - 1), "correction_rank"),
        (VariatorConfig(compensation_rank=10**8), "compensation_rank"),
        (VariatorConfig(scoring="concat", compression_ratio=2**31 - 1), "compression_ratio"),
    ],
)
def test_absurd_widths_are_refused_before_memory_is_taken(config: Any, field: str) -> None:
    base = BERT.build()
    before = sorted(base.state_dict())
    with pytest.raises(ValueError, match=f"{field}.*=\\d+"):
        get_peft_model(base, config)
    assert sorted(base.state_dict()) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_grad_norm", np.array([])),
        ("accelerator_config", object()),
        ("accelerator_config", {"no_such_key": 1}),
        ("parallelism_config", 3),
        ("lr_scheduler_kwargs", [1]),
        ("optim", "x" * 5000),
    ],
)
def test_errors_of_training_arguments_name_the_field(name: str, value: Any, tmp_path) -> None:
    with pytest.raises(ValueError, match=name) as error:
        DistillationConfig(output_dir=str(tmp_path), **{name: value})
    assert len(str(error.value)) < 2000
