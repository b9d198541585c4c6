"""The transformers quantizer of packed 2:4 models: `from_pretrained` and `save_pretrained` go through it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from .checkpoint import CHECKSUM_METADATA, Checkpoint, CheckpointError, checksum
from .completeness import check_complete
from .config import METHOD, Sparse24Config
from .layout import PackedWeight
from .linear import Sparse24Linear
from .names import KeyNames
from .operations import DecodeWeight, make_converter
from .plan import PlannedWeight, Rules, plan_weights


__all__ = ["Sparse24Quantizer", "register"]


class Sparse24Quantizer(HfQuantizer):
    """Makes the layers whose weights are 2:4 into `Sparse24Linear` before loading, and checks the files first.

    All that can be wrong with a checkpoint is found before anything is loaded, and raised as a `CheckpointError`;
    transformers itself would fill what does not fit with random numbers and log it.
    """

    quantization_config: Sparse24Config
    requires_calibration = False

    def __init__(self, quantization_config: Sparse24Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._converters: list[WeightConverter] = []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("A 2:4 model is loaded from safetensors files; a state_dict can't be checked first.")
        # In a thread of its own, since the meta device, on which transformers builds the model, is the default of this
        # one: every operation on the tensors of the files would have to get past it.
        with ThreadPoolExecutor(max_workers=1) as thread:
            planned = thread.submit(self._plan, model, checkpoint_files, torch.get_default_dtype()).result()
        names = KeyNames(model)
        self._converters = [make_converter(weight, names) for weight in planned if weight.action != "as_is"]
        _replace_layers(model, planned, self.quantization_config)

    def _plan(self, model: PreTrainedModel, files: list[str], dtype: torch.dtype) -> list[PlannedWeight]:
        """Check the files and decide what becomes of their weights."""
        checkpoint = Checkpoint.from_files(files)
        if self.pre_quantized and self.quantization_config.checksums:
            checkpoint.check_checksums()
        planned = plan_weights(model, checkpoint, self._rules(), dtype)
        check_complete(model, checkpoint, (weight.stored for weight in planned))
        return planned

    def _rules(self) -> Rules:
        config = self.quantization_config
        return Rules(
            pack_dense=not self.pre_quantized or config.format == "dense",
            targets=None if config.targets is None else tuple(config.targets),
            ignore=tuple(config.ignore),
        )

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
        self._converters = []
        layers = [module for module in model.modules() if isinstance(module, Sparse24Linear)]
        for layer in layers:
            for part in PackedWeight._fields:
                layer.get_parameter(part).requires_grad_(False)  # loading makes every floating parameter trainable
            layer.offloaded = layer.compressed.is_meta
        self.quantization_config.format = "sparse-24-bitmask"
        if not layers:  # an unstructured checkpoint, which is dense from here on
            self.remove_quantization_config(model)

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


def _replace_layers(model: PreTrainedModel, planned: Iterable[PlannedWeight], config: Sparse24Config) -> None:
    """Put empty packed layers, on the meta device, in the place of the dense ones, under every name they have."""
    layers: dict[nn.Module, Sparse24Linear] = {}
    for weight in planned:
        if weight.action == "dense":
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
        if weight.action == "as_is":
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
    yield from ((saved, checksum(value)) for saved, value in revert_weight_conversion(model, state).items())
