"""The plugin files that the paper's authors released for T5, read and converted to adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from ...adapter_card import set_license
from ...files import new_folder
from ...models import KEY_PREFIX
from .config import VariatorConfig


__all__ = ["ConvertedPlugin", "convert_checkpoint"]

_PREFIX = "mux_layer."
_KEY = re.compile(r"mux_layer\.(0|[1-9]\d*)\.(mux_layer|demux_adapter\.(w_in|w_out))\.(weight|bias)")
_NETWORK = "encoder.block.{}.layer.1.DenseReluDense"
_T5_TYPES = ("t5", "mt5", "umt5")

_RESIDUAL_SCALES = {(512, 6): 100.0, (768, 12): 100.0, (1024, 24): 100.0}
"""By width and number of layers, those of t5-small, t5-base and t5-large.

The released files were trained with ModelCenter, whose copies of these models hold everything on the residual stream
divided by 100, the output of a feed-forward network included (OpenBMB/ModelCenter, transfer/hugT5_bmtrainT5.py).
"""


class _Shape(NamedTuple):
    """Sizes of a released plugin."""

    layers: int
    dim: int
    ratio: int
    bottleneck: int

    def of_tensors(self) -> dict[str, tuple[int, ...]]:
        """What each tensor of a layer has to be."""
        _, dim, ratio, bottleneck = self
        return {
            "mux_layer.weight": (ratio, ratio * dim),
            "mux_layer.bias": (ratio,),
            "demux_adapter.w_in.weight": (bottleneck, 2 * dim),
            "demux_adapter.w_in.bias": (bottleneck,),
            "demux_adapter.w_out.weight": (dim, bottleneck),
            "demux_adapter.w_out.bias": (dim,),
        }


@dataclass(frozen=True)
class ConvertedPlugin:
    """What was converted.

    Args:
        output: folder of the adapter.
        base: the T5 that it names as its base, or `None`.
        layers: number of encoder layers.
        hidden_size: d, width of the hidden states.
        compression_ratio: k.
        bottleneck_dim: r, width of the decompressor.
        residual_scale: how many times larger the base's residual stream is than that of the model trained on.
        parameters: number of parameters of the adapter.
        left_out: number of tensors of the file that are none of the plugin's.
    """

    output: str
    base: str | None
    layers: int
    hidden_size: int
    compression_ratio: int
    bottleneck_dim: int
    residual_scale: float
    parameters: int
    left_out: int


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    base: str | None = None,
    residual_scale: float | None = None,
    license: str | None = None,
) -> ConvertedPlugin:
    """Convert a plugin file of the paper's authors (thunlp/Compression-Plugin) to an adapter for T5's encoder.

    The file is a state dict that `torch.save` wrote, with the keys `mux_layer.{layer}.…`; others are left out. The
    released code merges padding with text, and takes only lengths that k divides: there, without padding, the adapter
    computes the same.

    Args:
        checkpoint: the file. It is read as weights only: nothing in it is executed.
        output: folder to make for the adapter.
        base: folder or Hub name of the T5 that it belongs to, which the adapter names, and whose sizes are checked.
        residual_scale: how many times larger the hidden states on the base's residual stream are than those of the
            model that the plugin was trained on. `None`: 100 at the sizes of t5-small, t5-base and t5-large, which
            ModelCenter divides by it, and else 1.
        license: identifier of the license to name in the card.

    Raises:
        FileExistsError: a file or a folder that is not empty is at `output`.
        OSError: a file can't be read or written, or there is no such base.
        ValueError: the file holds no such plugin, or not all of it, or the base is another one; the key is named.
    """
    tensors, left_out = _read(checkpoint)
    shape = _shape_of(tensors)
    if base is not None:
        _check_base(base, shape)
    if residual_scale is None:
        residual_scale = _RESIDUAL_SCALES.get((shape.dim, shape.layers), 1.0)
    if not residual_scale > 0:
        raise ValueError(f"residual_scale={residual_scale!r} has to be a number above 0.")
    state = {}
    for layer in range(shape.layers):
        for part, tensor in _converted(tensors, layer, shape, residual_scale).items():
            state[f"{KEY_PREFIX}{_NETWORK.format(layer)}.{part}"] = tensor
    with new_folder(output) as folder:
        _save(state, shape, base, folder)
        if license is not None:
            set_license(folder, license)
    return ConvertedPlugin(
        output=str(output),
        base=base,
        layers=shape.layers,
        hidden_size=shape.dim,
        compression_ratio=shape.ratio,
        bottleneck_dim=shape.bottleneck,
        residual_scale=residual_scale,
        parameters=sum(tensor.numel() for tensor in state.values()),
        left_out=left_out,
    )


def _read(checkpoint: str | Path) -> tuple[dict[str, Tensor], int]:
    """The plugin's tensors by key in single precision, and how many others the file has."""
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a pickle that is none may raise anything
        raise ValueError(
            f"{str(checkpoint)!r} is no state dict: it is damaged, or holds other things than tensors, which are "
            "never loaded. Name a plugin file as it was released, or one to which torch.save wrote its tensors alone."
        ) from error
    keys = [key for key in found if isinstance(key, str) and key.startswith(_PREFIX)] if _is_mapping(found) else []
    if not keys:
        has = f"keys such as {', '.join(map(repr, list(found)[:3]))}" if _is_mapping(found) else type(found).__name__
        raise ValueError(f"{str(checkpoint)!r} holds no key that starts with {_PREFIX!r}, but {has}.")
    for key in keys:
        if not isinstance(found[key], Tensor) or not found[key].is_floating_point():
            kind = found[key].dtype if isinstance(found[key], Tensor) else type(found[key]).__name__
            raise ValueError(f"{key} is of type {kind}; a plugin's weights are floating-point tensors.")
        if not bool(found[key].isfinite().all()):
            raise ValueError(f"{key} has NaN or infinite values: the file is broken.")
    return {key: found[key].float() for key in keys}, len(found) - len(keys)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _shape_of(tensors: Mapping[str, Tensor]) -> _Shape:
    """The plugin's sizes, which all its tensors agree on."""
    unknown = sorted(key for key in tensors if _KEY.fullmatch(key) is None)
    if unknown:
        raise ValueError(f"{', '.join(unknown[:3])}: no tensor of a released plugin has such a name.")
    layers = 1 + max(int(key.split(".")[1]) for key in tensors)
    first = {
        name: _tensor(tensors, f"{_PREFIX}0.{name}") for name in ("mux_layer.weight", "demux_adapter.w_in.weight")
    }
    for name, tensor in first.items():
        if tensor.dim() != 2:
            raise ValueError(f"{_PREFIX}0.{name} has the shape {tuple(tensor.shape)}; it has to be a matrix.")
    ratio, width = first["mux_layer.weight"].shape
    if ratio < 2 or width % ratio:
        raise ValueError(
            f"{_PREFIX}0.mux_layer.weight has the shape {tuple(first['mux_layer.weight'].shape)}; it has to be "
            "(k, k·d) with a compression ratio k of 2 or more."
        )
    shape = _Shape(layers, width // ratio, ratio, first["demux_adapter.w_in.weight"].shape[0])
    for layer in range(layers):
        for name, wanted in shape.of_tensors().items():
            found = tuple(_tensor(tensors, f"{_PREFIX}{layer}.{name}").shape)
            if found != wanted:
                raise ValueError(
                    f"{_PREFIX}{layer}.{name} has the shape {found}; with d = {shape.dim}, k = {shape.ratio} and a "
                    f"bottleneck of {shape.bottleneck}, as the first layer has them, it has to be {wanted}."
                )
    return shape


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{key} is missing: a plugin has six tensors in each layer, counted from 0.")
    return tensors[key]


def _check_base(base: str, shape: _Shape) -> None:
    config = AutoConfig.from_pretrained(base)
    if config.model_type not in _T5_TYPES:
        raise ValueError(f"The base {base!r} is a {config.model_type!r}; the plugin is one for T5.")
    if (config.d_model, config.num_layers) != (shape.dim, shape.layers):
        raise ValueError(
            f"The base {base!r} has d_model={config.d_model} and num_layers={config.num_layers}, the plugin is for "
            f"d_model={shape.dim} and num_layers={shape.layers}. Name the T5 that it was trained for."
        )


def _converted(tensors: Mapping[str, Tensor], layer: int, shape: _Shape, scale: float) -> dict[str, Tensor]:
    """One layer's tensors by the names of a plugin's parts.

    With y the network's output and x its input, of the normalised hidden states, the released decompressor is
    y + W_out·tanh(W_in·[y; x] + b_in) + b_out. For a base whose y is `scale` times as large, so is what is added.
    """
    score, score_bias, w_in, b_in, w_out, b_out = (tensors[f"{_PREFIX}{layer}.{name}"] for name in shape.of_tensors())
    return {
        "variator_scorer.weight": score,
        "variator_scorer.bias": score_bias,
        "variator_down_output.weight": w_in[:, : shape.dim] / scale,
        "variator_down_output.bias": b_in,
        "variator_down_input.weight": w_in[:, shape.dim :].clone(),
        "variator_up.weight": w_out * scale,
        "variator_up.bias": b_out * scale,
    }


def _save(state: dict[str, Tensor], shape: _Shape, base: str | None, folder: Path) -> None:
    """Write the adapter by way of PEFT, which knows how its files look; any T5 of the same sizes will do."""
    sizes = T5Config(
        vocab_size=2, d_model=shape.dim, num_layers=shape.layers, num_decoder_layers=1, d_ff=1, d_kv=1, num_heads=1
    )
    model = T5ForConditionalGeneration(sizes)
    model.name_or_path = base or ""
    config = VariatorConfig(
        compression_ratio=shape.ratio,
        scoring="concat",
        decompression="bottleneck",
        bottleneck_dim=shape.bottleneck,
        output_bias=True,
        keep_first_tokens=0,
        keep_last_tokens=0,
        trained_ratios=[shape.ratio],
    )
    adapter = get_peft_model(model, config)
    set_peft_model_state_dict(adapter, state)
    adapter.save_pretrained(str(folder), save_embedding_layers=False)  # those of the stand-in
