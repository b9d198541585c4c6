"""What is saved is the plugin and nothing else, and every way of loading it gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_variator import VariatorConfig, set_compression_ratio
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BERT, LLAMA, SEQ2SEQ, TASK_HEADS, Case, by_name, outputs_of


TENSORS = {"variator_scorer.weight", "variator_down_input.weight", "variator_down_output.weight"} | {
    "variator_down_output.bias",
    "variator_up.weight",
}
BERT_CLASSES = next(case for case in TASK_HEADS if case.name == "bert-sequence")
LLAMA_TOKENS = next(case for case in TASK_HEADS if case.name == "llama-token")


def with_plugin(case: Case, base: nn.Module | None = None, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    base = case.build() if base is None else base
    return get_peft_model(base, VariatorConfig(init_weights=False, **fields)).eval()


def assert_same(left: nn.Module, right: nn.Module, case: Case, atol: float = 0) -> None:
    expected = outputs_of(right, case.inputs())
    for name, value in outputs_of(left, case.inputs()).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, equal_nan=True)


def plugin_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): value
        for name, value in model.state_dict().items()
        if "variator_" in name
    }


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_round_trip(case: Case, tmp_path: Path) -> None:
    model = with_plugin(case, decompression="bottleneck")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    layers = [name for name, module in model.named_modules() if isinstance(module, VariatorLayer)]
    assert saved.keys() == {f"{layer}.{tensor}" for layer in layers for tensor in TENSORS}
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(case.build(), tmp_path).eval()
    # In AIMv2 the last bits depend on whether the plugin can be trained; frozen, both are the same.
    assert_same(loaded, model.requires_grad_(False) if case.name == "aimv2" else model, case)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = get_peft_model_state_dict(loaded)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], value) for name, value in saved.items())


# A method of that name loads something else into Wav2Vec2, weights of a language.
@pytest.mark.parametrize("case", [case for case in ALL if case.model_type != "wav2vec2"], ids=by_name)
def test_transformers_load_adapter(case: Case, tmp_path: Path) -> None:
    model, base = with_plugin(case), case.build().requires_grad_(False)
    model.save_pretrained(tmp_path)
    info = base.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    loaded = plugin_tensors(base)
    assert loaded
    assert all(torch.equal(loaded[name], value) for name, value in plugin_tensors(model).items())
    # Tensors that are read from a file start at other addresses, for which other kernels may be taken.
    assert_same(base.eval(), model, case, atol=1e-5)
    set_compression_ratio(base, 1)
    assert_same(base, case.build().requires_grad_(False), case)
    set_compression_ratio(base, 4, "default")
    assert_same(base, model, case, atol=1e-5)
    base.disable_adapters()
    assert_same(base, case.build().requires_grad_(False), case)


def test_transformers_save_and_add_adapter(tmp_path: Path) -> None:
    base = LLAMA.build()
    base.add_adapter(VariatorConfig(init_weights=False), adapter_name="plugin")
    expected = outputs_of(base, LLAMA.inputs())["logits"]
    base.save_pretrained(tmp_path)
    again = LLAMA.build()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(outputs_of(again, LLAMA.inputs())["logits"], expected, rtol=0, atol=1e-5)
    base.delete_adapter("plugin")
    assert torch.equal(outputs_of(base, LLAMA.inputs())["logits"], outputs_of(LLAMA.build(), LLAMA.inputs())["logits"])


@pytest.mark.parametrize(
    ("case", "auto", "task_type"),
    [
        (BERT, AutoPeftModel, None),
        (LLAMA, AutoPeftModelForCausalLM, None),
        (LLAMA, AutoPeftModelForCausalLM, "CAUSAL_LM"),
        (SEQ2SEQ[0], AutoPeftModelForSeq2SeqLM, None),
        (SEQ2SEQ[0], AutoPeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
        (BERT_CLASSES, AutoPeftModelForSequenceClassification, "SEQ_CLS"),
        (LLAMA_TOKENS, AutoPeftModelForTokenClassification, "TOKEN_CLS"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_auto_classes(case: Case, auto: Any, task_type: str | None, tmp_path: Path) -> None:
    case.build().save_pretrained(tmp_path / "base")
    base = type(case.build()).from_pretrained(tmp_path / "base").eval()
    model = with_plugin(case, base, task_type=task_type)
    model.save_pretrained(tmp_path / "plugin")
    loaded = auto.from_pretrained(tmp_path / "plugin").eval()
    assert isinstance(loaded.get_base_model(), type(base))
    assert_same(loaded, model, case)


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_low_cpu_memory_usage(case: Case, tmp_path: Path) -> None:
    model = with_plugin(case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.build(), tmp_path, low_cpu_mem_usage=True).eval()
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())
    assert_same(loaded, model, case)
    loaded.load_adapter(str(tmp_path), adapter_name="second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert_same(loaded.eval(), model, case)


@pytest.mark.parametrize("scoring", ["token", "concat"])
def test_all_fields_come_back(scoring: str, tmp_path: Path) -> None:
    fields = {
        "compression_ratio": 3,
        "ratio_pattern": {r"layer\.0\.intermediate": 2},
        "bottleneck_dim": 8,
        "scoring": scoring,
        "keep_first_tokens": 2,
        "keep_last_tokens": 0,
        "keep_token_ids": [20, 30],
    }
    model = with_plugin(BERT, **fields)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BERT.build(), tmp_path).eval()
    assert_same(loaded, model, BERT)
    assert {name: getattr(loaded.peft_config["default"], name) for name in fields} == fields
    on_disk = json.loads((tmp_path / "adapter_config.json").read_text())
    assert on_disk["peft_type"] == "VARIATOR"
    assert isinstance(PeftConfig.from_pretrained(tmp_path), VariatorConfig)


def test_the_ratio_of_run_time_is_not_saved(tmp_path: Path) -> None:
    model = with_plugin(BERT)
    model.set_compression_ratio(2)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).compression_ratio == 4


def test_a_trained_head_is_saved_with_the_plugin(tmp_path: Path) -> None:
    model = with_plugin(BERT_CLASSES, modules_to_save=["classifier"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    heads = {name for name in saved if "variator_" not in name}
    assert heads == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert_same(PeftModel.from_pretrained(BERT_CLASSES.build(), tmp_path).eval(), model, BERT_CLASSES)


def test_a_plugin_of_the_bare_model_fits_a_model_with_a_head(tmp_path: Path) -> None:
    """A plugin is trained on plain text once and used under any head: names are matched by their ends."""
    config = with_plugin(BERT).peft_config["default"]
    classes = with_plugin(BERT_CLASSES)
    again = get_peft_model(BERT_CLASSES.build(), VariatorConfig.from_peft_type(**config.to_dict()))
    assert again.targeted_module_names == classes.targeted_module_names


def test_several_plugins_in_one_directory(tmp_path: Path) -> None:
    model = with_plugin(BERT)
    model.add_adapter("other", VariatorConfig(compression_ratio=2, init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BERT.build(), tmp_path)
    loaded.load_adapter(str(tmp_path / "other"), adapter_name="other")
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert_same(loaded.eval(), model, BERT)


def test_half_precision_is_kept(tmp_path: Path) -> None:
    model = with_plugin(BERT, BERT.build().to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BERT.build().to(torch.bfloat16), tmp_path).eval()
    assert_same(loaded, model, BERT)
    saved: dict[str, Tensor] = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}


def test_size_of_a_plugin() -> None:
    """Per network: d scores, 2·d·r + r for the way down and d·r for the way up, with d = 32 and r = 64."""
    trainable, total = with_plugin(BERT, decompression="bottleneck").get_nb_trainable_parameters()
    assert trainable == 2 * (32 + 3 * 32 * 64 + 64)
    assert total == trainable + sum(parameter.numel() for parameter in BERT.build().parameters())
