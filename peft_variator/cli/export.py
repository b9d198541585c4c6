"""`peft-variator export`: a base with its plugin as one ONNX file, checked against the model it was made of."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedModel

from ..field_types import name_some, shown
from ..files import check_new_file, replacing_with
from ..model_files import load_tokenizer
from ..models import head_of, takes_videos
from ..training import load_plugin
from ..tuners.variator import VariatorConfig, fold_updates
from ..tuners.variator.layer import plugin_layers
from ..version import __version__
from .console import Reporter
from .saved_plugin import SavedPlugin, open_plugin


__all__ = ["ExportReport", "export"]

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# A file of ONNX is one protobuf message, which can't be larger.
LARGEST_FILE = 2**31
# Batch and length of what the file is checked on; the first is what it is made with.
SHAPES = ((2, 16), (1, 7), (3, 33))
# Of the largest value of an output: runtimes sum in another order.
TOLERANCE = 1e-3
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Args:
        output: the file.
        base: folder or Hub name of the base.
        adapter: folder or Hub name of the plugin.
        ratio: the compression ratio k that the file has for good.
        inputs: names of the inputs.
        outputs: names of the outputs.
        max_difference: the largest difference between ONNX Runtime and the model in PyTorch.
        bytes: size of the file.
    """

    output: str
    base: str
    adapter: str
    ratio: int
    inputs: list[str]
    outputs: list[str]
    max_difference: float
    bytes: int


class TensorOutputs(nn.Module):
    """A model that gives the named outputs as a plain tuple, and takes its inputs by position."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of their names."""
        found = self.model(**dict(zip(self.inputs, values, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.outputs)


def export(adapter: str, output: Path, ratio: int | None, base: str | None, reporter: Reporter) -> None:
    """Write a base with its plugin as ONNX and tell how far the file is from the model.

    Raises:
        ImportError: a package that writes or runs ONNX is missing.
        OSError: the file can't be written.
        ValueError: the adapter is no plugin, the model is no encoder, or the file does not do what the model does.
    """
    _check_packages()
    reporter.check()
    if output.suffix != ".onnx":
        raise ValueError(f"--output is {str(output)!r}; the name has to end in .onnx, as the file is ONNX.")
    check_new_file(output)
    if ratio is not None and ratio < 1:
        raise ValueError(f"--ratio is {ratio}; a compression ratio is 1 (nothing is merged) or more.")
    saved = open_plugin(adapter, base)
    model, without_pooler = _load_base(saved)
    plugin = load_plugin(model, adapter, is_trainable=False).eval()
    _check_takes_one_text_or_image(saved.base, model, plugin)
    if ratio is not None:
        plugin.set_compression_ratio(ratio)
    processor = _load_processor(saved.base, model)
    beside = _processor_files(processor)
    _check_beside(output, beside)
    origin = saved.base, adapter, ratio or saved.config.compression_ratio
    examples = _examples(model, saved.config, _tells_segments(model, processor))
    report = _write(plugin, output, beside, without_pooler, origin, examples)
    reporter.write_json(json.dumps(asdict(report), indent=2))
    reporter.say(
        f"Wrote {report.output} ({report.bytes / 1e6:,.1f} MB): {report.base} with its plugin at k = {report.ratio}.",
        f"Inputs {', '.join(report.inputs)}; outputs {', '.join(report.outputs)}.",
        f"ONNX Runtime differs from PyTorch by at most {report.max_difference:.1e}, on {len(SHAPES)} batches.",
        "In Python:",
        "  import onnxruntime",
        f"  session = onnxruntime.InferenceSession({report.output!r})",
        f"  session.run(None, inputs)  # NumPy arrays by name: {', '.join(report.inputs)}",
    )


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The export needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. Run: "
            "pip install 'peft-variator[onnx]'"
        )


def _load_base(saved: SavedPlugin) -> tuple[PreTrainedModel, bool]:
    """The base in the class that the plugin was saved from, and whether its pooler has no weights."""
    task_type = saved.config.task_type
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(
            f"The plugin has task_type={str(task_type)!r}; models of {', '.join(TASK_TYPES)} are exported."
        )
    return saved.load_base()


def _check_takes_one_text_or_image(base: str, model: PreTrainedModel, plugin: PeftModel) -> None:
    """Raise for models that generate, and for inputs that `_examples` cannot make."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {layer.stack.kind for layer in plugin_layers(plugin) if layer.stack is not None}
    if (
        model.config.is_encoder_decoder
        or head_of(model) in ("causal", "seq2seq")
        or ("causal" in kinds and "past_key_values" in parameters)
    ):
        raise ValueError(
            f"{base!r} is a {type(model).__name__}, which generates, and only text and vision encoders are exported: "
            "generating would need the key-value cache as inputs and outputs. For a prefill, use torch.compile."
        )
    takes = model.main_input_name
    needed = [name for name, each in parameters.items() if each.default is each.empty and each.kind not in _STARRED]
    is_image = takes == "pixel_values" and not takes_videos(model.config)
    lacks = [name for name in ("image_size", "num_channels") if is_image and not hasattr(model.config, name)]
    if (takes != "input_ids" and not is_image) or lacks or set(needed) - {takes}:
        told = " and ".join(f"its configuration has no {name}" for name in lacks)
        raise ValueError(
            f"{base!r} (architecture {model.config.model_type!r}) is not exported by this command, which makes a file "
            f"for texts or for images of one size: {told or f'it takes {name_some(needed or [takes])}'}. In Python, "
            "torch.onnx.export takes it with its plugin."
        )


def _load_processor(name: str, model: PreTrainedModel) -> Any | None:
    """The base's tokenizer or image processor; `None` if it has none."""
    try:
        if model.main_input_name == "pixel_values":
            return AutoImageProcessor.from_pretrained(name)
        return load_tokenizer(name)
    except (OSError, TypeError, ValueError):  # the second from tokenizers in Python whose vocabulary is missing
        return None


def _tells_segments(model: PreTrainedModel, processor: Any | None) -> bool:
    """Whether the tokenizer says which text of a pair a token is of, and the model makes a difference by it."""
    return (
        "token_type_ids" in getattr(processor, "model_input_names", ())
        and "token_type_ids" in inspect.signature(model.forward).parameters
        and getattr(model.config, "type_vocab_size", 0) > 1
    )


def _processor_files(processor: Any | None) -> dict[str, bytes]:
    """The files of a tokenizer or image processor, by name; none if there is none."""
    if processor is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="peft-variator-processor-") as folder:
        processor.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _check_beside(output: Path, beside: Mapping[str, bytes]) -> None:
    """Raise where the tokenizer or image processor would take the place of another one, which other files need."""
    folder = output.absolute().parent
    others = [file.name for file in folder.glob("*.onnx") if file.name != output.name]
    for name, content in beside.items():
        file = folder / name
        if others and file.is_file() and file.read_bytes() != content:
            raise ValueError(
                f"{str(folder)!r} holds {name_some(others)}, and a {name} that is not this model's. Name a file in "
                "another folder with --output: each has the files beside it that its inputs are made with."
            )


# The file


def _examples(model: PreTrainedModel, config: VariatorConfig, segments: bool) -> list[dict[str, Tensor]]:
    """Inputs to make the file with and to check it on: padded texts with tokens that are not merged, or images.

    Args:
        model: the base.
        config: of the plugin.
        segments: whether texts are pairs, told apart by `token_type_ids`.
    """
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        channels = model.config.num_channels
        return [
            {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)} for batch, _ in SHAPES
        ]
    examples = []
    pad = model.config.pad_token_id
    for batch, length in SHAPES:
        ids = torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)
        # Random ids would be special tokens at places, and more of them than a text has.
        special = torch.tensor([*config.keep_token_ids, *([] if pad is None else [pad])], dtype=torch.long)
        ordinary = next(number for number in range(1, model.config.vocab_size) if number not in special)
        ids = torch.where(torch.isin(ids, special), ordinary, ids)
        if config.keep_token_ids:
            ids[:, 0] = config.keep_token_ids[0]
        real = torch.linspace(length, max(length // 2, 1), batch).long()
        mask = torch.arange(length) < real.unsqueeze(1)
        ids = ids if pad is None else ids.masked_fill(~mask, pad)
        example = {"input_ids": ids, "attention_mask": mask.long()}
        if segments:
            example["token_type_ids"] = (mask & (torch.arange(length) >= length // 3)).long()
        examples.append(example)
    return examples


@torch.no_grad()
def _write(
    plugin: PeftModel,
    output: Path,
    beside: Mapping[str, bytes],
    without_pooler: bool,
    origin: tuple[str, str, int],
    examples: list[dict[str, Tensor]],
) -> ExportReport:
    """Write the file and what belongs beside it, once it has been checked."""
    import onnx

    base, adapter, ratio = origin
    model, config = plugin.get_base_model(), plugin.peft_config[plugin.active_adapter]
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size >= LARGEST_FILE:
        raise ValueError(f"The weights take {size / 1e9:.1f} GB, and an ONNX file holds less than 2.1 GB.")
    found = model(**examples[0], return_dict=True)
    outputs = [
        name
        for name, value in found.items()
        if isinstance(value, Tensor) and not (without_pooler and name == "pooler_output")
    ]
    inputs = list(examples[0])
    free = [{0: "batch"} if name == "pixel_values" else {0: "batch", 1: "length"} for name in inputs]
    with _quiet_exporter():
        program = torch.onnx.export(
            TensorOutputs(fold_updates(model), inputs, outputs),
            tuple(examples[0].values()),
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=(tuple(free),),
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # with dynamo=True there is always one
        proto = program.model_proto
    told = {
        "compression_ratio": str(ratio),
        "adapter": adapter,
        "base": base,
        "max_kept_tokens": str(config.max_kept_tokens),
        "version": __version__,
    }
    onnx.helper.set_model_props(proto, {f"peft_variator.{name}": value for name, value in told.items()})
    with replacing_with(output, beside) as temporary:
        onnx.save_model(proto, str(temporary))
        difference = _check_file(temporary, TensorOutputs(model, inputs, outputs), examples)
    return ExportReport(str(output), base, adapter, ratio, inputs, outputs, difference, output.stat().st_size)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Where the exporter keeps to itself what concerns names that it chose, and packages that it does without."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_file(path: Path, model: TensorOutputs, examples: list[dict[str, Tensor]]) -> float:
    """The largest difference between what ONNX Runtime gives and what the model gives, at real tokens."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for example in examples:
        shape = tuple(next(iter(example.values())).shape)
        try:
            found = session.run(model.outputs, {name: value.numpy() for name, value in example.items()})
        except Exception as error:  # those of ONNX Runtime have no class in common that is public
            raise ValueError(
                f"ONNX Runtime stops at inputs of shape {shape}: {shown(error)}. Nothing was written. Where a text "
                "keeps more tokens than there is room for, raise max_kept_tokens in the plugin's adapter_config.json."
            ) from error
        mask = example.get("attention_mask")
        for name, array, value in zip(model.outputs, found, model(*example.values()), strict=True):
            other = torch.from_numpy(array)
            if mask is not None and value.shape[:2] == mask.shape:
                value, other = value[mask.bool()], other[mask.bool()]
            difference = float((other - value).abs().max())
            if not difference <= TOLERANCE * max(float(value.abs().max()), 1.0):
                raise ValueError(
                    f"The ONNX file gives {name} that differs by {difference:.2g} from the model, for inputs of shape "
                    f"{shape}. Nothing was written. Report the model and the "
                    "versions of torch and onnxscript."
                )
            largest = max(largest, difference)
    return largest
