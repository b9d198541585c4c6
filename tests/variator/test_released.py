"""Plugin files that the paper's authors released: converted, they compute what the released code does."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, T5EncoderModel

from peft_variator import VariatorConfig
from peft_variator.tuners.variator.released import convert_checkpoint
from tests.tiny_models import tiny_model

from .released import FIXTURE, Plugin, as_in_modelcenter, random_plugin, released_output, tiny_t5


def saved(plugin: Any, folder: Path) -> Path:
    torch.save(plugin, folder / "plugin.pkl")
    return folder / "plugin.pkl"


def output_of(model: torch.nn.Module, adapter: Path, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        model = PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).eval()
        return model(input_ids=input_ids).last_hidden_state


def test_the_fixture(tmp_path: Path) -> None:
    expected = load_file(FIXTURE / "outputs.safetensors")
    report = convert_checkpoint(FIXTURE / "plugin.pkl", tmp_path / "adapter", base=str(FIXTURE / "base"))
    assert (report.layers, report.hidden_size, report.compression_ratio, report.bottleneck_dim) == (2, 16, 4, 6)
    base = T5EncoderModel.from_pretrained(FIXTURE / "base")
    found = output_of(base, tmp_path / "adapter", expected["input_ids"])
    torch.testing.assert_close(found, expected["last_hidden_state"], rtol=1e-4, atol=1e-5)
    # A wrong order, bias or group would show: the plugin's part is large.
    assert not torch.allclose(base(expected["input_ids"]).last_hidden_state, expected["last_hidden_state"], atol=0.1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("ratio", "groups"), [(2, 1), (3, 5), (8, 2)])
def test_other_sizes(ratio: int, groups: int, gated: bool, tmp_path: Path) -> None:
    torch.manual_seed(ratio)
    model, plugin = tiny_t5(layers=3, gated=gated), random_plugin(16, 3, ratio, 5)
    input_ids = torch.randint(2, 60, (3, ratio * groups))
    convert_checkpoint(saved(OrderedDict(plugin), tmp_path), tmp_path / "adapter")
    expected = released_output(model, plugin, input_ids)
    torch.testing.assert_close(output_of(model, tmp_path / "adapter", input_ids), expected, rtol=1e-4, atol=1e-4)


def test_a_plugin_that_was_trained_on_a_smaller_residual_stream(tmp_path: Path) -> None:
    """ModelCenter's T5 gives a hundredth of every vector that transformers' has on the residual stream."""
    torch.manual_seed(0)
    model, plugin = tiny_t5(), random_plugin(16, 2, 4, 6)
    for key in plugin:
        if "w_out" in key:
            plugin[key] *= 0.01  # of the size of what it corrects
    input_ids = torch.randint(2, 60, (2, 16))
    smaller = as_in_modelcenter(model)
    torch.testing.assert_close(smaller(input_ids).last_hidden_state, model(input_ids).last_hidden_state)
    expected = released_output(smaller, plugin, input_ids)
    file = saved(plugin, tmp_path)
    convert_checkpoint(file, tmp_path / "adapter", residual_scale=100)
    torch.testing.assert_close(output_of(model, tmp_path / "adapter", input_ids), expected, rtol=1e-4, atol=1e-4)
    convert_checkpoint(file, tmp_path / "other", residual_scale=1)
    assert not torch.allclose(output_of(model, tmp_path / "other", input_ids), expected, atol=0.1)


@pytest.mark.parametrize(("dim", "layers", "scale"), [(512, 6, 100), (768, 12, 100), (768, 6, 1), (16, 12, 1)])
def test_the_sizes_that_were_released_are_known_as_modelcenter_s(
    dim: int, layers: int, scale: float, tmp_path: Path
) -> None:
    plugin = random_plugin(dim, layers, ratio=2, bottleneck=1)
    report = convert_checkpoint(saved(plugin, tmp_path), tmp_path / "adapter")
    assert report.residual_scale == scale


def test_the_config_and_the_whole_model(tmp_path: Path) -> None:
    plugin = random_plugin(16, 2, 4, 6) | {"t5.encoder.layers.0.ffn.ffn.w_out.weight": torch.zeros(2, 2)}
    report = convert_checkpoint(saved(plugin, tmp_path), tmp_path / "adapter")
    assert report.left_out == 1
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.scoring, config.decompression, config.output_bias) == ("concat", "bottleneck", True)
    assert (config.keep_first_tokens, config.keep_last_tokens, config.keep_token_ids) == (0, 0, [])
    assert (config.compression_ratio, config.trained_ratios, config.bottleneck_dim) == (4, [4], 6)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    whole = tiny_model("t5", d_model=16, d_ff=24, num_heads=2, vocab_size=60).eval()
    model = PeftModel.from_pretrained(whole, str(tmp_path / "adapter"))
    assert model.generate(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]]), max_new_tokens=3).shape[0] == 1


BROKEN: dict[str, tuple[Callable[[Plugin], Any], str]] = {
    "missing": (lambda p: p.pop("mux_layer.1.demux_adapter.w_out.bias"), "mux_layer.1.demux_adapter.w_out.bias"),
    "first layer": (lambda p: [p.pop(k) for k in list(p) if ".0." in k], "mux_layer.0.mux_layer.weight"),
    "unknown": (lambda p: p.update({"mux_layer.0.gate.weight": torch.ones(2)}), "mux_layer.0.gate.weight"),
    "shape": (lambda p: p.update({"mux_layer.1.mux_layer.bias": torch.ones(3)}), "mux_layer.1.mux_layer.bias"),
    "other ratio": (
        lambda p: p.update({"mux_layer.1.mux_layer.weight": torch.ones(2, 32)}),
        "mux_layer.1.mux_layer.weight",
    ),
    "vector": (lambda p: p.update({"mux_layer.0.mux_layer.weight": torch.ones(4)}), "mux_layer.0.mux_layer.weight"),
    "ratio of one": (
        lambda p: p.update({"mux_layer.0.mux_layer.weight": torch.ones(1, 16)}),
        "mux_layer.0.mux_layer.weight",
    ),
    "integers": (
        lambda p: p.update({"mux_layer.0.mux_layer.bias": torch.ones(4, dtype=torch.long)}),
        "mux_layer.0.mux_layer.bias",
    ),
    "no tensor": (lambda p: p.update({"mux_layer.0.mux_layer.bias": 3}), "mux_layer.0.mux_layer.bias"),
    "not finite": (
        lambda p: p["mux_layer.1.demux_adapter.w_in.weight"].fill_(torch.nan),
        "mux_layer.1.demux_adapter.w_in.weight",
    ),
}


@pytest.mark.parametrize(("damage", "key"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_in_a_file_is_named(damage: Callable[[Plugin], Any], key: str, tmp_path: Path) -> None:
    plugin = random_plugin(16, 2, 4, 6)
    damage(plugin)
    file = saved(plugin, tmp_path)
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        convert_checkpoint(file, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["plugin.pkl"]


class Anything:
    """What torch.load does not load as weights."""


@pytest.mark.parametrize("content", [{"mux_layer.0.x": Anything()}, [1, 2], {"weight": torch.ones(1)}, {}])
def test_files_without_a_plugin(content: Any, tmp_path: Path) -> None:
    file = saved(content, tmp_path)
    with pytest.raises(ValueError, match=r"plugin\.pkl"):
        convert_checkpoint(file, tmp_path / "adapter")


@pytest.mark.parametrize("content", [b"", b"some text", b"\x80\x02", b"PK\x03\x04 cut off"])
def test_files_that_are_none_of_torch_s(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plugin.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"plugin\.pkl"):
        convert_checkpoint(tmp_path / "plugin.pkl", tmp_path / "adapter")


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    whole = (FIXTURE / "plugin.pkl").read_bytes()
    (tmp_path / "plugin.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"plugin\.pkl"):
        convert_checkpoint(tmp_path / "plugin.pkl", tmp_path / "adapter")


def test_the_base_has_to_be_a_t5_of_these_sizes(tmp_path: Path) -> None:
    file = saved(random_plugin(16, 2, 4, 6), tmp_path)
    tiny_t5(layers=3).config.save_pretrained(tmp_path / "deeper")
    BertConfig().save_pretrained(tmp_path / "bert")
    for base, named in (("deeper", "num_layers=3"), ("bert", "bert")):
        with pytest.raises(ValueError, match=named):
            convert_checkpoint(file, tmp_path / "adapter", base=str(tmp_path / base))
    for scale in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="residual_scale"):
            convert_checkpoint(file, tmp_path / "adapter", residual_scale=scale)
    assert not (tmp_path / "adapter").exists()


def test_a_bias_belongs_to_the_bottleneck() -> None:
    assert VariatorConfig(output_bias=True).decompression == "bottleneck"
    assert VariatorConfig(decompression="bottleneck").output_bias is False
    with pytest.raises(ValueError, match="output_bias=True"):
        VariatorConfig(decompression="neurons", output_bias=True)
