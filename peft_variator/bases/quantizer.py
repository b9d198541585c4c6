"""The transformers quantizer of packed 2:4 models: `from_pretrained`, `load_base` and saving go through it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from ..compat import before_upload
from ..files import new_folder
from ..model_files import CheckpointError, read_model_config
from ..models import blaming_config, build_empty
from .checkpoint import (
    CHECKSUM_METADATA,
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    checksum,
    read_index,
)
from .config import (
    METHOD,
    Sparse24Config,
    names_dtype,
    pop_quantization,
    read_quantization,
    write_notice,
)
from .file_checks import FileChecks
from .linear import Sparse24Linear, Unpacked
from .loading_plan import KeyNames, PlannedWeight, check_complete, check_sizes, plan_weights
from .packing import PackedWeight


__all__ = ["DecodeWeight", "Sparse24Quantizer", "load_base", "register", "save_base"]


_HUB_ARGUMENTS = (
    "revision",
    "code_revision",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "trust_remote_code",
)


def load_base(
    path: str | os.PathLike[str],
    auto_class: Any = AutoModelForCausalLM,
    *,
    unpacked: Unpacked = "forward",
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a 2:4 model: one that this package packed, or one published as `sparse-24-bitmask`, as `sparse-bitmask`, in
    8 bits with scales over either, or dense with its zeros. Layers that are 2:4 stay or become packed.

    Args:
        path: directory, or repository on the Hub.
        auto_class: the class whose `from_pretrained` loads it.
        unpacked: when the dense weights exist, see `Sparse24Linear`.
        kwargs: for `from_pretrained`; `dtype` is the one that 8-bit weights are decompressed to.

    Raises:
        CheckpointError: the files are damaged or incomplete, or not 2:4 where they have to be.
        ValueError: the model is quantized in a way that can't be read.
    """
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    local = Path(path).is_dir() and not kwargs.get("subfolder")
    config = read_model_config(path, **hub)
    fields = config.to_dict()
    if local and not (kwargs.get("dtype") or kwargs.get("torch_dtype")) and not names_dtype(fields):
        kwargs["dtype"] = Checkpoint.from_directory(path).dtype
    entry = pop_quantization(fields)
    if entry is None:
        kwargs["quantization_config"] = Sparse24Config(unpacked=unpacked)
    else:
        published = read_quantization(entry)
        published.unpacked = unpacked
        config.quantization_config = published.to_dict()
        vars(config).pop("compression_config", None)
    if local and not Path(path, WEIGHTS_NAME).exists() and Path(path, INDEX_NAME).exists():
        read_index(Path(path, INDEX_NAME))  # transformers would read it first
    with blaming_config(auto_class, config, path):
        try:
            return auto_class.from_pretrained(path, config=config, **kwargs)
        except RuntimeError:  # transformers names what does not fit in a warning alone
            if local:
                check_sizes(build_empty(auto_class, config, path), Checkpoint.from_directory(path))
            raise


def save_base(model: PreTrainedModel, output: str | os.PathLike[str], **kwargs: Any) -> None:
    """`model.save_pretrained`, into a new folder that appears under its name when all of it is written.

    `save_pretrained` itself writes one file after the other into the folder with its final name. A process that is
    killed meanwhile leaves a folder that no one can load; here it leaves one called `.NAME.partial-…`.

    Args:
        model: a packed model, or any other.
        output: the folder to make.
        kwargs: for `save_pretrained`.

    Raises:
        FileExistsError: `output` exists and is not empty.
        ValueError: a `state_dict` is given for a packed model, of which transformers would save its own.
    """
    packed = isinstance(getattr(model.config, "quantization_config", None), Sparse24Config)
    if packed and kwargs.get("state_dict") is not None:
        raise ValueError(
            "save_base: of a packed model its own weights are saved, not those of a state_dict. Load them into the "
            "model first: model.load_state_dict(state_dict)."
        )
    with new_folder(os.fspath(output)) as folder:
        model.save_pretrained(folder, **kwargs)
        if packed:
            write_notice(folder)


class Sparse24Quantizer(HfQuantizer):
    """Makes the layers whose weights are 2:4 into `Sparse24Linear` before loading, and checks the files first.

    All that can be wrong with a checkpoint is found before anyone gets the model, and raised as a `CheckpointError`;
    transformers itself would fill what does not fit with random numbers and log it. What headers and sizes tell is
    checked first. Checksums and bitmasks, for which every byte is read, are checked in threads beside the loading, of
    files that are not known to have passed: see `FileChecks`.
    """

    quantization_config: Sparse24Config
    requires_calibration = False

    def __init__(self, quantization_config: Sparse24Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._converters: list[WeightConverter] = []
        self._checks: FileChecks | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("A 2:4 model is loaded from safetensors files; a state_dict can't be checked first.")
        # In a thread of its own, since the meta device, on which transformers builds the model, is the default of this
        # one: every operation on the tensors of the files would have to get past it.
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(self._prepare, model, checkpoint_files, torch.get_default_dtype()).result()

    def _prepare(self, model: PreTrainedModel, files: list[str], dtype: torch.dtype) -> None:
        """Check the files, or begin to, decide what becomes of their weights, and make the model ready for it."""
        checkpoint = Checkpoint.from_files(files)
        checksums = self.pre_quantized and self.quantization_config.checksums
        self._checks = FileChecks(checkpoint, checksums)
        try:
            self._plan(model, checkpoint, checksums, dtype)
        except BaseException:
            self._checks.stop()
            raise

    def _plan(self, model: PreTrainedModel, checkpoint: Checkpoint, checksums: bool, dtype: torch.dtype) -> None:
        rules = self.quantization_config.rules(self.pre_quantized)
        names = KeyNames(model)
        try:
            planned = plan_weights(model, checkpoint, rules, dtype, bitmasks=False, names=names)
            check_complete(model, checkpoint, (weight.stored for weight in planned), names=names)
        except CheckpointError:
            if checksums:
                checkpoint.check_checksums()  # a damaged size is told as the damage that it is
            raise
        self._converters = [make_converter(weight, names) for weight in planned if weight.action != "keep"]
        _replace_layers(model, planned, self.quantization_config)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """A converter for each weight that is not stored as the model has it."""
        return self._converters

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Parts of a weight are decoded in the dtype they are stored in."""
        # a renaming has no operations
        if any(isinstance(op, DecodeWeight) for op in getattr(converter, "operations", ())):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self._checks is not None:
            checks, self._checks = self._checks, None
            checks.finish()
        self._converters = []
        layers = [module for module in model.modules() if isinstance(module, Sparse24Linear)]
        for layer in layers:
            for part in PackedWeight._fields:
                layer.get_parameter(part).requires_grad_(False)  # loading makes every floating parameter trainable
            layer.offloaded = layer.compressed.is_meta
        self.quantization_config.format = "sparse-24-bitmask"
        if not layers:  # an unstructured checkpoint, which is dense from here on
            self.remove_quantization_config(model)
        before_upload(model, _write_notice_of)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Checksums for the files that `save_pretrained` is about to write, and the config that goes with them."""
        if getattr(model, "_hf_peft_config_loaded", False):  # what is saved is an adapter
            return None, {}
        config = self.quantization_config
        config.targets, config.checksums = ["Linear"], True
        config.ignore = sorted(_saved_name(model, f"{name}.weight").rpartition(".")[0] for name in _dense(model))
        checksums = dict(_checksums(model))
        return None, {CHECKSUM_METADATA: json.dumps(checksums, sort_keys=True)}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, Sparse24Linear):
                model.set_submodule(name, module.to_dense().to(dtype))
        return model

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained above packed layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The product with a packed weight is one operator."""
        return True


def register() -> None:
    """Make transformers know `quant_method: sparse24`. Does nothing the second time."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(Sparse24Config)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(Sparse24Quantizer)


def _write_notice_of(model: PreTrainedModel, folder: str) -> None:
    """Put the notice of a packed model into the card that `push_to_hub` has made of a template."""
    if isinstance(getattr(model.config, "quantization_config", None), Sparse24Config):
        write_notice(Path(folder))


def _replace_layers(model: PreTrainedModel, planned: Iterable[PlannedWeight], config: Sparse24Config) -> None:
    """Put empty packed layers, on the meta device, in the place of the dense ones, under every name they have."""
    layers: dict[nn.Module, Sparse24Linear] = {}
    for weight in planned:
        if not weight.becomes_packed:
            continue
        dense = model.get_submodule(weight.module)
        layer = Sparse24Linear(
            dense.in_features,
            dense.out_features,
            bias=False,
            device="meta",
            dtype=weight.dtype,
            unpacked=config.unpacked,
        )
        if weight.action == "keep":
            # some write (2, 1) and some (2,)
            shape = torch.empty(weight.stored.parts["shape"].shape, dtype=torch.int64, device="meta")
            layer.shape = nn.Parameter(shape, requires_grad=False)
        layer.bias = dense.bias
        layers[dense] = layer.train(dense.training)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            model.set_submodule(name, layers[module])


def _dense(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _saved_name(model: PreTrainedModel, name: str) -> str:
    """What `save_pretrained` calls the parameter `name`, or the first part of it where loading fused several."""
    return next(iter(revert_weight_conversion(model, {name: model.get_parameter_or_buffer(name)})))


def _checksums(model: PreTrainedModel) -> Iterable[tuple[str, str]]:
    """Names and checksums of all tensors that `save_pretrained` writes, tied ones under each of their names."""
    state = model.state_dict()
    offloaded = [name for name, tensor in state.items() if tensor.is_meta]
    for name in offloaded:
        del state[name]
        tensor = load_offloaded_parameter(model, name)  # one at a time
        yield from (
            (saved, checksum(value)) for saved, value in revert_weight_conversion(model, {name: tensor}).items()
        )
    saved = revert_weight_conversion(model, state)
    # Under the model's own names, too, which a file has with `save_original_format=False`.
    yield from ((name, checksum(value)) for name, value in {**state, **saved}.items())


class DecodeWeight(ConversionOps):
    """Turns the parts of one stored weight into those that the model has.

    Args:
        weight: the weight and what becomes of it, `"pack"` or `"unpack"`.
        part_of_pattern: the patterns of the converter, each the name of one part.
    """

    supports_many_to_many = True

    def __init__(self, weight: PlannedWeight, part_of_pattern: dict[str, str]) -> None:
        self.weight, self.part_of_pattern = weight, part_of_pattern

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Tensors by pattern -> tensors by full name in the model."""
        parts = {self.part_of_pattern[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        stored, dtype = self.weight.stored, self.weight.dtype
        if self.weight.action == "unpack":
            return {full_layer_name: stored.codec.decode_dense(parts, dtype, stored.prefix)}
        packed = stored.codec.decode_packed(parts, dtype, stored.prefix)
        module = full_layer_name.rpartition(".")[0]
        return {f"{module}.{part}": tensor for part, tensor in packed._asdict().items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """What is saved is what the model has."""
        return _KeepNames()


class _KeepNames(ConversionOps):
    """Leaves every tensor as it is, under the name it has in the model."""

    supports_many_to_many = True

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Tensors by pattern, which is their name, anchored or not, -> tensors by name."""
        return {pattern.removeprefix("^"): tensors[0] for pattern, tensors in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """Itself."""
        return self


def make_converter(weight: PlannedWeight, names: KeyNames) -> WeightConverter:
    """The converter for one weight, for the names that its parts, and no other tensors, have after renaming."""
    patterns = {"^" + names.renamed(part.name).replace(".", r"\."): kind for kind, part in weight.stored.parts.items()}
    dense = names.renamed(weight.stored.name)
    targets = [dense]
    if weight.action == "pack":
        targets = [f"{dense.rpartition('.')[0]}.{part}" for part in ("compressed", "bitmask", "shape")]
    return WeightConverter(list(patterns), targets, [DecodeWeight(weight, patterns)])
