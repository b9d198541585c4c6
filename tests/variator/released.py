"""What the paper's released code computes, stated anew from reading it, and a fixture that is made of this statement.

Facts from thunlp/Compression-Plugin at commit b1216c0, `variator/model/muxT5.py` and `AdapterLayer.py`, and from
OpenBMB/ModelCenter, `transfer/hugT5_bmtrainT5.py`, whose T5 the plugins were trained on. No code of theirs is here.

    python -m tests.variator.released  # writes tests/fixtures/released
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

from tests.tiny_models import tiny_model


FIXTURE = Path(__file__).parents[1] / "fixtures" / "released"
MODELCENTER_SCALE = 100.0

Plugin = dict[str, Tensor]


def random_plugin(dim: int, layers: int, ratio: int, bottleneck: int, dtype: torch.dtype = torch.float32) -> Plugin:
    """A state dict with the keys and shapes of a released plugin file, from torch's global generator."""
    plugin = {}
    for layer in range(layers):
        shapes = {
            "mux_layer.weight": (ratio, ratio * dim),
            "mux_layer.bias": (ratio,),
            "demux_adapter.w_in.weight": (bottleneck, 2 * dim),
            "demux_adapter.w_in.bias": (bottleneck,),
            "demux_adapter.w_out.weight": (dim, bottleneck),
            "demux_adapter.w_out.bias": (dim,),
        }
        plugin |= {f"mux_layer.{layer}.{name}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return plugin


def tiny_t5(dim: int = 16, layers: int = 2, gated: bool = False) -> T5EncoderModel:
    """An encoder with random weights."""
    sizes = {"vocab_size": 60, "d_model": dim, "d_ff": 24, "num_heads": 2, "num_layers": layers}
    form = {"feed_forward_proj": "gated-gelu" if gated else "relu", "initializer_factor": 0.3}
    return tiny_model("t5-encoder", **sizes, **form).eval()


def as_in_modelcenter(model: T5EncoderModel, scale: float = MODELCENTER_SCALE) -> T5EncoderModel:
    """The same encoder with its residual stream divided by `scale`, as ModelCenter stores T5.

    The norms divide by the size of what they get, so their outputs stay, given that what they add to it is as small.
    """
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        smaller.shared.weight /= scale
        for block in smaller.encoder.block:
            block.layer[0].SelfAttention.o.weight /= scale
            block.layer[1].DenseReluDense.wi.weight /= scale**0.5  # behind a ReLU: half of the scale on either side
            block.layer[1].DenseReluDense.wo.weight /= scale**0.5
    for norm in (norm for module in smaller.modules() for name, norm in module.named_children() if "norm" in name):
        norm.variance_epsilon /= scale**2
    return smaller


def released_output(model: T5EncoderModel, plugin: Plugin, input_ids: Tensor) -> Tensor:
    """The encoder's last hidden states with a plugin, computed as the released code does, group by group.

    Args:
        model: the base.
        plugin: a released plugin.
        input_ids: shape `(batch, length)`, nothing of it padding, `length` a multiple of k.
    """
    handles = []
    for layer, block in enumerate(model.encoder.block):
        weights = {key.removeprefix(f"mux_layer.{layer}."): value.float() for key, value in plugin.items()}
        handles.append(_in_place_of(block.layer[1].DenseReluDense, weights))
    try:
        with torch.no_grad():
            return model(input_ids=input_ids).last_hidden_state
    finally:
        for network, forward in handles:
            network.forward = forward


def _in_place_of(network: torch.nn.Module, weights: Plugin) -> tuple[torch.nn.Module, object]:
    """Have a feed-forward network, which gets normalised vectors, merge them, run, and correct its output."""
    forward = network.forward
    ratio = len(weights["mux_layer.bias"])

    def run(inputs: Tensor) -> Tensor:
        outputs = torch.empty_like(inputs)
        for number, text in enumerate(inputs):
            for start in range(0, len(text), ratio):
                group = text[start : start + ratio]
                scores = weights["mux_layer.weight"] @ torch.cat(list(group)) + weights["mux_layer.bias"]
                shared = forward((scores.softmax(0) @ group).view(1, 1, -1)).flatten()
                for place, vector in enumerate(group, start):
                    seen = torch.cat([shared, vector])  # the network's output comes first
                    inner = (weights["demux_adapter.w_in.weight"] @ seen + weights["demux_adapter.w_in.bias"]).tanh()
                    added = weights["demux_adapter.w_out.weight"] @ inner + weights["demux_adapter.w_out.bias"]
                    outputs[number, place] = shared + added
        return outputs

    network.forward = run
    return network, forward


def write_fixture(folder: Path = FIXTURE) -> None:
    """Write a base, a plugin file as it would be released, and what the two compute."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    base, plugin = tiny_t5(), random_plugin(dim=16, layers=2, ratio=4, bottleneck=6, dtype=torch.half)
    input_ids = torch.randint(2, 60, (2, 12))
    base.save_pretrained(folder / "base")
    torch.save(plugin, folder / "plugin.pkl")
    outputs = {"input_ids": input_ids, "last_hidden_state": released_output(base, plugin, input_ids)}
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    write_fixture()
