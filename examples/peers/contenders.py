"""What a plugin is compared with: for each kind of model, every contender by name, made when it is called."""

from __future__ import annotations

import copy
import hashlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_variator import VariatorConfig, calibrate, fold_updates
from peft_variator.files import replacing
from peft_variator.profiling import count_flops, share_weights


sys.path.append(str(Path(__file__).resolve().parents[1] / "real_models"))

from layer_dropping import influence, keep_layers  # noqa: E402
from patch_merging import MergingViT  # noqa: E402
from peers import drop_layers, narrow, quantize  # noqa: E402
from peers import with_plugin as add_plugin  # noqa: E402
from speed import make_inputs  # noqa: E402
from token_merging import MergingEncoder  # noqa: E402
from weights import Loaded  # noqa: E402


__all__ = [
    "RATIO",
    "TRAINED_PLUGIN",
    "Contender",
    "NotThere",
    "as_cheap",
    "contenders",
    "flops",
    "language_contenders",
    "narrow_by_data",
    "picture_contenders",
    "plugin_fields",
    "untrained",
    "with_plugin",
]

SHARES = (0.05, 0.1, 0.2)
# Of a picture's patches, how many go in each block: whole numbers of the 64 at 112 pixels and of the 256 at 224.
PATCH_SHARES = (1 / 32, 3 / 64, 1 / 16, 5 / 64)
LENGTHS = {"text": 128, "vision": 112, "causal": 512}  # of one input whose FLOPs are counted: tokens, or pixels a side
KNOWN = ("bert", "mpnet")  # the architectures that are narrowed, shortened and merged
# The plugin of those that are trained alike, and the ratio at which it is compared: its form is the shipped one's.
TRAINED_PLUGIN, RATIO = "trained alike: plugin", 16
# What stays in float32 where int8 is "in part": in SmolLM2 quantising these is most of what int8 loses.
SENSITIVE = ("down_proj", "lm_head")
Build = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """What is compared: called, it is made.

    Args:
        make: makes the model.
        weights: file with the weights that it has besides the base's, if it has any.
        tokenizer: loads its tokenizer, where that is not the base's.
    """

    make: Build
    weights: Path | None = None
    tokenizer: Build | None = None

    def __call__(self) -> Any:
        return self.make()

    def digest(self) -> str | None:
        """SHA-256 of the weights; `None` where there are none."""
        if self.weights is None or not self.weights.is_file():
            return None
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()


class NotThere(RuntimeError):
    """A contender cannot be made here; the message says why."""


class OnnxModel:
    """An ONNX file in ONNX Runtime, called as the model that it was made from.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def eval(self) -> OnnxModel:
        """Itself."""
        return self

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SimpleNamespace:
        (found,) = self.session.run(None, {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(found))


class _FirstOutput(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return output


def to_onnx(model: nn.Module, path: Path, int8: bool) -> OnnxModel:
    """Export a model, quantised by ONNX Runtime if asked for, and load it.

    Raises:
        NotThere: the packages of the extra `onnx` are missing.
    """
    try:
        from onnxruntime.quantization import quantize_dynamic
    except ImportError as error:
        raise NotThere("pip install 'peft-variator[onnx]' first") from error
    if not path.is_file():
        ids = torch.randint(5, model.config.vocab_size, (2, 16))
        shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        with replacing(path) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, on names that it chose itself
            torch.onnx.export(
                _FirstOutput(model),
                (ids, torch.ones_like(ids)),
                str(temporary),
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_shapes=(shape, shape),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    if int8:
        quantized = path.with_suffix(".int8.onnx")
        if not quantized.is_file():
            with replacing(quantized) as temporary:
                quantize_dynamic(str(path), str(temporary))
        path = quantized
    return OnnxModel(path)


def with_plugin(base: nn.Module, folder: Path, ratio: int, **fields: bool) -> PeftModel:
    """A base, as it is or quantised, with a plugin that is quantised alike; `fields` as for `peers.with_plugin`.

    Raises:
        NotThere: there is no such plugin.
    """
    if not (folder / "adapter_config.json").is_file():
        raise NotThere(f"no plugin in {folder}")
    return add_plugin(base, folder, ratio, **fields)


def _plugin_to_onnx(base: nn.Module, folder: Path, ratio: int, scratch: Path, int8: bool) -> OnnxModel:
    model: Any = with_plugin(share_weights(base), folder, ratio)
    return to_onnx(fold_updates(model.get_base_model()), scratch / f"plugin-{ratio}.onnx", int8)


def ratios(plugin: Path) -> list[int]:
    """The three highest compression ratios that a plugin was trained for."""
    if not (plugin / "adapter_config.json").is_file():
        return [8, 16, 32]
    config = VariatorConfig.from_pretrained(str(plugin))
    return sorted(config.trained_ratios or [config.compression_ratio])[-3:]


def contenders(
    base: Loaded, smaller: Callable[[], Loaded], plugin: Path, trained: Path, scratch: Path
) -> dict[str, Contender]:
    """What a text encoder is compared with, by name.

    "int8 by channel" has a scale for each row of a weight, "int8 attention" leaves the networks as they are.

    Args:
        base: the model.
        smaller: loads the next-smaller model, which has a tokenizer of its own.
        plugin: folder of a plugin; one that was trained on the base in int8 is looked for beside it.
        trained: folder with the weights of contenders that need training.
        scratch: folder for ONNX files.
    """
    model: Any = base.model
    smaller = cache(smaller)  # its model and its tokenizer are asked for apart
    networks = [f"layer.{number}.output.dense" for number in range(model.config.num_hidden_layers)]
    networks.append("intermediate.dense")
    others = {
        "int8 by channel": cache(lambda: quantize(model, by_channel=True)),
        "int8 attention": cache(lambda: quantize(model, networks)),
    }
    found = _in_formats(model, plugin, **others)
    under_int8 = plugin.with_name(f"{plugin.name}-int8")
    found[f"int8 + plugin, updates apart, k = {RATIO}"] = Contender(
        lambda: with_plugin(quantize(model), plugin, RATIO, sum_updates=False), _weights(plugin)
    )
    found[f"int8 + plugin, in float32, k = {RATIO}"] = Contender(
        lambda: with_plugin(quantize(model), plugin, RATIO, in_float32=True), _weights(plugin)
    )
    for ratio in ratios(under_int8) if under_int8.is_dir() else ():
        found[f"int8 + plugin trained on it, k = {ratio}"] = Contender(
            partial(lambda k: with_plugin(quantize(model), under_int8, k), ratio), _weights(under_int8)
        )
    for name, make in untrained(model).items():
        file = trained / f"{name}.safetensors"
        found[name] = Contender(partial(_trained, make, file), file)
    if model.config.model_type in KNOWN:
        folder = trained / TRAINED_PLUGIN.split()[-1] / "plugin"
        found[f"{TRAINED_PLUGIN}, k = {RATIO}"] = Contender(
            lambda: with_plugin(share_weights(model), folder, RATIO), _weights(folder)
        )
    for share in SHARES:
        found[f"token merging, {share:.0%} a layer"] = Contender(partial(_merging, model, share))
    for name, int8 in (("ONNX Runtime", False), ("ONNX Runtime, int8", True)):
        found[name] = Contender(partial(to_onnx, model, scratch / "model.onnx", int8=int8))
        for ratio in ratios(plugin):
            make = partial(_plugin_to_onnx, model, plugin, ratio, scratch, int8)
            found[f"{name} + plugin, k = {ratio}"] = Contender(make, _weights(plugin))
    found["next-smaller model"] = Contender(lambda: smaller().model, tokenizer=lambda: smaller().tokenizer)
    return found


def picture_contenders(model: Any, plugin: Path) -> dict[str, Contender]:
    """What a vision transformer is compared with, by name.

    Args:
        model: the base.
        plugin: folder of a plugin.
    """
    merged = {
        f"patch merging, {share * 64:g} of 64 a layer": Contender(partial(MergingViT, model, share))
        for share in PATCH_SHARES
    }
    return _in_formats(model, plugin) | merged


def language_contenders(model: Any, plugin: Path, texts: Tensor) -> dict[str, Contender]:
    """What the prefill of a causal model is compared with, by name.

    "int8 in part" leaves out what `SENSITIVE` names. Layers are dropped until the FLOPs are about those that the
    plugin leaves at each ratio, where there is a plugin.

    Args:
        model: the base.
        plugin: folder of a plugin.
        texts: token ids by which those layers are chosen, shape `(texts, length)`.
    """
    layers = model.config.num_hidden_layers
    ranks = cache(lambda: influence(model, texts))

    def without_layers(kept: int) -> Any:
        dropped = sorted(range(layers), key=ranks().__getitem__)[: layers - kept]
        return keep_layers(model, [place for place in range(layers) if place not in dropped])

    found = _in_formats(model, plugin, **{"int8 in part": cache(lambda: quantize(model, SENSITIVE))})
    if (plugin / "adapter_config.json").is_file():
        whole = flops(model, "causal")
        one = whole - flops(keep_layers(model, range(layers - 1)), "causal")
        for ratio in ratios(plugin):
            saved = whole - flops(with_plugin(share_weights(model), plugin, ratio), "causal")
            kept = layers - round(saved / one)
            if kept < layers:
                found[f"layers dropped, {kept} of {layers} left"] = Contender(partial(without_layers, kept))
    return found


def _in_formats(model: Any, plugin: Path, **others: Build) -> dict[str, Contender]:
    """The base in each number format, and on each the plugin at each ratio; `others` make further formats."""
    formats: dict[str, Build] = {
        "base": lambda: model,
        "bf16": cache(lambda: copy.deepcopy(model).to(torch.bfloat16)),
        "int8": cache(lambda: quantize(model)),
    } | others
    found = {name: Contender(make) for name, make in formats.items()}
    for name, make in formats.items():
        title = "plugin" if name == "base" else f"{name} + plugin"
        for ratio in ratios(plugin):
            both = partial(lambda make, k: with_plugin(share_weights(make()), plugin, k), make, ratio)
            found[f"{title}, k = {ratio}"] = Contender(both, _weights(plugin))
    return found


def _weights(plugin: Path) -> Path:
    return plugin / "adapter_model.safetensors"


def untrained(model: Any) -> dict[str, Build]:
    """Contenders whose weights are all trained to follow the base, as they start; the plugin's FLOPs come last."""
    if model.config.model_type not in KNOWN:
        return {}
    layers, inner = model.config.num_hidden_layers, model.config.intermediate_size
    return {
        f"{kept} of {layers} layers": partial(drop_layers, model, kept) for kept in (layers * 2 // 3, layers // 2)
    } | {f"networks of {width}": partial(narrow, model, width) for width in (inner // 3, as_cheap(model))}


def plugin_fields(model: Any) -> dict[str, Any]:
    """The form of a plugin that is shipped for `model`: a third of the neurons, and LoRA of rank 16."""
    width = model.config.intermediate_size // 3
    return {
        "decompression": "neurons",
        "correction_dim": width,
        "compensation_rank": 16,
        "compression_ratio": RATIO,
    }


def flops(model: nn.Module, kind: str = "text") -> int:
    """Of one input of the kind's `LENGTHS`; of a causal model its prefill."""
    return count_flops(model, make_inputs(kind, model, 1, LENGTHS[kind]))


@cache
def as_cheap(model: Any) -> int:
    """The inner width at which narrowed networks take the FLOPs that a plugin leaves at k = 16."""
    config, inner = VariatorConfig(**plugin_fields(model)), model.config.intermediate_size
    whole = flops(model)
    saved = whole - flops(get_peft_model(share_weights(model), config).eval())
    return inner - round(saved * (inner - 1) / (whole - flops(narrow(model, 1))))


@torch.no_grad()
def narrow_by_data(model: Any, width: int, batches: Sequence[dict[str, Tensor]]) -> Any:
    """Narrowed networks of the neurons that a plugin of that width copies; the others leave their mean activation."""
    config = VariatorConfig(**plugin_fields(model) | {"correction_dim": width, "compensation_rank": None})
    plugin: Any = get_peft_model(copy.deepcopy(model), config).eval()
    calibrate(plugin, batches)
    neurons = [buffer for name, buffer in plugin.named_buffers() if "variator_neurons" in name]
    means = [torch.zeros(model.config.intermediate_size) for _ in model.encoder.layer]
    real = torch.zeros(0, dtype=torch.bool)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)

    def add(number: int, module: nn.Module, args: Any, output: Tensor) -> None:
        means[number] += output[real].sum(0) / tokens

    hooks = [layer.intermediate.register_forward_hook(partial(add, n)) for n, layer in enumerate(model.encoder.layer)]
    for batch in batches:
        real = batch["attention_mask"].bool()
        model(**batch)
    for hook in hooks:
        hook.remove()
    return narrow(model, width, neurons, means)


def _trained(make: Build, file: Path) -> Any:
    if not file.is_file():
        raise NotThere(f"not trained yet: {file.name}, by `run.py train`")
    model = make()
    model.load_state_dict(load_file(file))
    return model


def _merging(model: Any, share: float) -> MergingEncoder:
    if model.config.model_type not in KNOWN:
        raise NotThere(f"token merging is written for {' and '.join(KNOWN)} alone")
    return MergingEncoder(model, share)
