"""A plugin trained on one head of a model is loaded onto another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from training_cases import WIDTHS
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from peft_variator import VariatorConfig
from peft_variator.training import load_plugin
from peft_variator.tuners.variator.layer import plugin_layers
from tests.tiny_models import tiny_model


@pytest.fixture
def saved(plugin_model, tmp_path: Path):
    """Saves a plugin of random weights made on a model; gives the folder."""

    def save(name: str, **fields) -> Path:
        model = plugin_model(name, init_weights=False, **fields)
        folder = tmp_path / f"plugin of {name}"
        model.save_pretrained(folder)
        return folder

    return save


def tensors(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    marked = {
        name: value for name, value in model.named_parameters() if f".{adapter}." in name and "variator_" in name
    }
    return {name.partition("encoder.layer")[2].replace(f".{adapter}", ""): value for name, value in marked.items()}


@pytest.mark.parametrize(
    ("source", "target"), [("bert", "bert-classifier"), ("bert-classifier", "bert"), ("bert", "bert")]
)
@pytest.mark.parametrize("fields", [{}, {"compensation_rank": 2}], ids=["plain", "compensated"])
def test_a_plugin_moves_between_heads(base_model, saved, source: str, target: str, fields: dict[str, int]) -> None:
    folder = saved(source, **fields)
    model = load_plugin(base_model(target), folder)
    wanted = load_file(folder / "adapter_model.safetensors")
    got = tensors(model)
    assert len(got) == len(wanted) > 0
    for name, value in wanted.items():
        assert got[name.partition("encoder.layer")[2]].equal(value)
    assert all(parameter.requires_grad == ("variator_" in name) for name, parameter in model.named_parameters())
    assert model.active_adapters == ["default"]


FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "ratio_schedule": lambda layers: {
        "ratio_schedule": {4: {f"{layers}0.intermediate": 2}, 8: {f"{layers}1.intermediate": 1}}
    },
    "ratio_pattern": lambda layers: {"ratio_pattern": {f"{layers}0.intermediate": 1, "layer.1": 2}},
    "correction_pattern": lambda layers: {
        "correction_pattern": {f"{layers}0.intermediate": 3},
        "bottleneck_dim": None,
    },
    "target_modules": lambda layers: {"target_modules": [f"{layers}0.intermediate"], "end_module": "output.dense"},
}


@pytest.mark.parametrize("joins", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("source", "target", "there", "here"),
    [
        ("bert", "bert-classifier", "encoder.layer.", "bert.encoder.layer."),
        ("bert-classifier", "bert", "bert.encoder.layer.", "encoder.layer."),
    ],
    ids=["to a head", "from a head"],
)
def test_modules_that_the_configuration_names_are_found(
    base_model, saved, source: str, target: str, there: str, here: str, field: str, joins: bool
) -> None:
    """In full, as `allocate` names them; else widths would not fit, or other ratios hold without a word."""
    folder, wanted = saved(source, **FIELDS[field](there)), FIELDS[field](here)
    model = get_peft_model(base_model(target), VariatorConfig()) if joins else base_model(target)
    model = load_plugin(model, folder, "second")
    config = model.peft_config["second"]
    assert type(wanted[field])(getattr(config, field)) == wanted[field]
    weights = load_file(folder / "adapter_model.safetensors")
    for name, value in tensors(model, "second").items():
        (saved_one,) = [each for key, each in weights.items() if key.partition("encoder.layer")[2] == name]
        assert value.equal(saved_one)
    alone = get_peft_model(base_model(target), VariatorConfig(**wanted), "second")
    ratios = [
        {
            layer.name: [layer.rule_at("second", k).ratio for k in config.ratio_schedule or (4,)]
            for layer in plugin_layers(each)
            if "second" in layer.rules
        }
        for each in (model, alone)
    ]
    assert ratios[0] == ratios[1] != {}


@pytest.mark.parametrize(("source", "target"), [("bert", "bert-classifier"), ("bert-classifier", "bert")])
def test_peft_on_another_head_names_what_loads_it(base_model, saved, source: str, target: str) -> None:
    folder = saved(source)
    with pytest.raises(ValueError, match="made for the model with another head") as told:
        PeftModel.from_pretrained(base_model(target), folder)
    assert f"peft_variator.load_plugin(model, '{folder}" in str(told.value)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({f"other.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Load it onto the model that it was made for"):
        PeftModel.from_pretrained(base_model(target), folder)


def test_on_a_model_of_another_method_the_errors_name_what_works(base_model, saved, tmp_path: Path) -> None:
    folder = saved("bert")
    get_peft_model(base_model("bert"), LoraConfig(target_modules=["query"], init_lora_weights=False)).save_pretrained(
        tmp_path / "lora"
    )

    def lora() -> PeftModel:
        return PeftModel.from_pretrained(base_model("bert"), tmp_path / "lora")

    with pytest.raises(ValueError, match=r"is a PeftModel already.*model\.get_base_model\(\).*base\.load_adapter\("):
        PeftModel.from_pretrained(lora(), folder, adapter_name="plugin")
    message = r"VARIATOR, and the model is a PeftModel of LORA.*load_plugin\(model\.get_base_model\(\).*load_adapter"
    with pytest.raises(ValueError, match=message):
        load_plugin(lora(), folder, "plugin")
    base = base_model("bert")
    base.load_adapter(str(tmp_path / "lora"), adapter_name="task")
    ids = torch.arange(5, 25).unsqueeze(0)
    expected = load_plugin(base, folder, "plugin").eval()(ids).last_hidden_state
    for found in (
        load_plugin(lora().get_base_model(), folder, "plugin"),
        PeftModel.from_pretrained(lora().get_base_model(), folder, adapter_name="plugin"),
    ):
        torch.testing.assert_close(found.eval()(ids).last_hidden_state, expected)
    alone = load_plugin(base_model("bert"), folder).eval()(ids).last_hidden_state
    assert not torch.allclose(alone, expected)  # the LoRA stays on


def test_swapped_arguments_are_named(base_model, saved) -> None:
    with pytest.raises(TypeError, match=r"a model of type .* and a path of type BertModel.*Give the model first"):
        load_plugin(str(saved("bert")), base_model("bert"))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_plugin_joins_another_one(base_model, plugin_model, saved, is_trainable: bool) -> None:
    folder = saved("bert")
    model = load_plugin(plugin_model("bert-classifier"), folder, adapter_name="second", is_trainable=is_trainable)
    assert model.active_adapters == ["second"]
    alone = load_plugin(base_model("bert-classifier"), folder)
    ids = torch.arange(5, 25).unsqueeze(0)
    assert model.eval()(ids).logits.equal(alone.eval()(ids).logits)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == (
        {name for name, _ in model.named_parameters() if ".second." in name} if is_trainable else set()
    )


def test_a_task_lora_on_the_base_stays(base_model, saved, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(base_model("bert-classifier"), lora).save_pretrained(tmp_path / "task")
    base = base_model("bert-classifier")
    base.load_adapter(tmp_path / "task", adapter_name="task")
    ids = torch.arange(5, 25).unsqueeze(0)
    with_lora = base.eval()(ids).logits
    model = load_plugin(base, saved("bert"), adapter_name="plugin").eval()
    model.set_compression_ratio(1)
    assert model(ids).logits.equal(with_lora)


def test_a_saved_head_keeps_its_name(base_model, saved, tmp_path: Path) -> None:
    folder = saved("bert-classifier", modules_to_save=["classifier"])
    weights = load_file(folder / "adapter_model.safetensors")
    headless = {name.replace("bert.encoder", "encoder"): value for name, value in weights.items()}
    save_file(headless, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model = load_plugin(base_model("bert-classifier"), folder)
    assert (
        model.get_base_model()
        .classifier.modules_to_save["default"]
        .weight.equal(weights["base_model.model.classifier.weight"])
    )


def test_a_plugin_of_another_architecture_is_refused(base_model, saved) -> None:
    with pytest.raises(ValueError, match=r"belongs to modules such as 'encoder.layer.0.intermediate'.*model nowhere"):
        load_plugin(base_model("t5"), saved("bert"))


def test_a_plugin_of_fewer_layers_is_refused(saved) -> None:
    deeper = tiny_model("bert", **WIDTHS, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks .*encoder.layer.2"):
        load_plugin(deeper, saved("bert"))


def test_a_plugin_that_fits_two_towers_is_refused(tmp_path: Path) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=tower | {"vocab_size": 50, "max_position_embeddings": 20}, vision_config=vision)
    source = get_peft_model(CLIPVisionModel(config.vision_config), VariatorConfig())
    source.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    stripped = {"base_model.model.layers." + name.partition("layers.")[2]: value for name, value in names.items()}
    save_file(stripped, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"in several places: 'text_model.encoder.', 'vision_model.encoder.'"):
        load_plugin(CLIPModel(config), tmp_path)


def test_layers_are_not_moved(base_model, saved) -> None:
    folder = saved("bert", layers_to_transform=[1])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1]
    model = load_plugin(base_model("bert-classifier"), folder)
    assert all("layer.1." in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_model_on_disk_is_refused(base_model, saved) -> None:
    base = base_model("bert")
    base.hf_device_map = {"embeddings": "cpu", "encoder": "disk"}
    with pytest.raises(ValueError, match="partly offloaded to disk"):
        load_plugin(base, saved("bert"))


@pytest.mark.parametrize("embeddings", [True, False], ids=["embeddings saved", "adapter alone"])
@pytest.mark.filterwarnings("error:Could not find a config file")
def test_the_hub_is_not_asked_for_the_base(base_model, plugin_model, tmp_path: Path, embeddings: bool) -> None:
    model = plugin_model("bert", init_weights=False)
    model.peft_config["default"].base_model_name_or_path = "nobody/has-this-model"
    model.save_pretrained(tmp_path / "plugin", save_embedding_layers=embeddings)
    keys = load_file(tmp_path / "plugin" / "adapter_model.safetensors")
    assert any("word_embeddings" in key for key in keys) is embeddings
    assert len(load_plugin(base_model("bert"), tmp_path / "plugin").peft_config) == 1
