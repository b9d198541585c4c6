"""A SparseLoRA adapter in its folder, and what it changes in the files of a base: nothing is loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from ..bitmask import unpack_mask
from ..field_types import name_some, shown
from ..model_files import ADAPTER_CONFIG_NAME, CheckpointError, read_fields
from ..models import KEY_PREFIX
from ..tuners.sparse_lora import SparseLoraConfig, SparseLoraLayer, WeightLayout
from ..tuners.sparse_lora.fingerprints import matches_fingerprint
from ..tuners.sparse_lora.functional import merge_update, sum_updates
from .checkpoint import Checkpoint, StoredTensor
from .compressed_tensors import StoredWeight, find_stored_weights
from .convert import ModelFolder
from .loading_plan import KeyNames
from .packing import LayoutError, pack


__all__ = ["AdapterFile"]

_HEAD_HINT = (
    "If the adapter was made for the base with a new head, save the base once with that head, and merge into what was "
    "saved."
)


@dataclass(frozen=True)
class AdapterFile:
    """A folder with adapter_config.json and adapter_model.safetensors.

    The last four fields are filled by `locate`. Their keys are names of weights in the files of the base.

    Args:
        path: the folder.
        config: its config.
        tensors: name in the file, without the prefix that PEFT puts before all of them -> tensor.
        weights: all weights of layers in the base, and what else the adapter changes.
        modules: weight -> name in the adapter of the layer whose update it gets.
        layers: weight -> that layer, without values.
        replaced: weight, or another parameter (a bias, or one of `modules_to_save`) -> its new value.
    """

    path: Path
    config: SparseLoraConfig
    tensors: dict[str, StoredTensor]
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    layers: dict[str, SparseLoraLayer] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> AdapterFile:
        """Read an adapter's config and the header of its tensors.

        Raises:
            CheckpointError: a file is missing or damaged, or the adapter is none of SparseLoRA.
        """
        folder = Path(path)
        _check_method(folder)
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise CheckpointError(
                f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. Save the adapter with save_pretrained, which writes it."
            )
        stored = Checkpoint.from_files([folder / SAFETENSORS_WEIGHTS_NAME]).tensors
        tensors = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in stored.items()}
        return cls(folder, SparseLoraConfig.from_pretrained(str(folder)), tensors)

    @property
    def file(self) -> Path:
        """The file with its tensors."""
        return self.path / SAFETENSORS_WEIGHTS_NAME

    @property
    def files(self) -> list[Path]:
        """Both of its files."""
        return [self.path / ADAPTER_CONFIG_NAME, self.file]

    @property
    def architecture(self) -> str | None:
        """The class of the model that it was trained on, where it is known."""
        return (self.config.auto_mapping or {}).get("base_model_class")

    def locate(self, base: ModelFolder) -> AdapterFile:
        """The same adapter with the weights of a base that it changes.

        Raises:
            CheckpointError: the base lacks one or has it in another shape, stores it together with others, or would
                have to be untied; or the adapter does not fit the model. The message names the tensor.
        """
        model = base.skeleton(self.architecture)  # its names are those of the adapter; the base may have others
        names, tied = KeyNames(model), dict(model.all_tied_weights_keys)
        layers, new_values = self._place(model)
        self._check_untied(layers, tied)
        updates = {f"{module}.weight": module for module in layers}
        weights = find_stored_weights(base.checkpoint.tensors)
        located = replace(self, weights=weights, modules={}, layers={}, replaced={})
        shared = {*tied, *tied.values(), *updates}
        changed = {name: new for name, new in new_values.items() if name not in shared}
        copies = {tied.get(name, name): new for name, new in new_values.items() if name in shared}
        missing = {*updates, *changed, *copies}
        for name, weight in {**weights, **_other_tensors(base, weights)}.items():
            parameter = names.parameter(name)
            parameter = tied.get(parameter, parameter) if parameter is not None else None
            if parameter not in missing and parameter not in updates:
                continue
            missing.discard(parameter)
            if parameter in copies:
                _check_copy(copies[parameter], weight)
            if parameter in updates:
                located.modules[name], weights[name] = updates[parameter], weight
                located.layers[name] = layers[updates[parameter]]
            elif parameter in changed:
                located.replaced[name], weights[name] = changed[parameter], weight
        _check_all_found(base, self, missing)
        located._check_shapes()
        order = {module: index for index, module in enumerate(layers)}  # that of the model, which base_fingerprint has
        return replace(located, modules=dict(sorted(located.modules.items(), key=lambda item: order[item[1]])))

    def tensor(self, name: str, part: str) -> StoredTensor:
        """The part `"A"` (rank, in_features), `"B"` (out_features, rank), `"mask"` or `"source"` of an update."""
        return self.tensors[f"{self.modules[name]}.sparse_low_rank_{part}"]

    def layout(self, name: str) -> WeightLayout:
        """How the layer of a weight keeps it."""
        return self.layers[name].layout

    @property
    def stores_masks(self) -> bool:
        """Whether it brings its masks along, and does not read them from the base."""
        return self.config.mask == "stored"

    def stored_mask(self, name: str) -> Tensor | None:
        """M of a weight, bool (out_features, in_features), where the adapter stores it.

        Raises:
            CheckpointError: the adapter was saved before it had masks.
        """
        if not self.stores_masks:
            return None
        mask = self.tensor(name, "mask")
        if not self.tensor(name, "source").read().any():
            raise CheckpointError(
                f"{mask}: the adapter was made with mask='stored' and saved before it had masks. Call "
                "attach_masks(model, masks) and save it again."
            )
        return unpack_mask(mask.read(), self.tensor(name, "A").shape[1])

    def stores_two_four(self, name: str) -> bool:
        """Whether the stored mask prunes in a 2:4 pattern; a mask that keeps everything prunes nothing.

        Raises:
            CheckpointError: the mask prunes in another pattern; the message names tensor, row and columns.
        """
        kept = self.stored_mask(name)
        if kept is None or kept.all():
            return False
        mask = self.tensor(name, "mask")
        try:
            pack(kept.to(torch.bfloat16), mask.name)
        except LayoutError as error:
            raise CheckpointError(
                f"{mask.file}: as a mask, {error} Only 2:4 can be packed: merge to the dense form, or attach 2:4 "
                "masks."
            ) from error
        return True

    def merge(self, name: str, weight: Tensor, kept: Tensor) -> Tensor:
        """(W + s·B·A) ⊙ M, summed in float32 or better and rounded once; its zeros are those of M, and +0.0.

        Args:
            name: the weight.
            weight: W, (out_features, in_features).
            kept: the places of W that are not pruned, bool; a stored mask counts instead of it.

        Raises:
            CheckpointError: the stored mask was made for another weight, or the result is not finite.
        """
        stored, module = self.stored_mask(name), self.modules[name]
        if stored is not None and not matches_fingerprint(self.tensor(name, "source").read(), weight):
            raise CheckpointError(
                f"{self.tensor(name, 'mask')}: the mask was made for another base: the weight of {module} is not the "
                "one it came from. Merge into the dense model that was pruned."
            )
        a, b, scale = self.tensor(name, "A"), self.tensor(name, "B"), self.layers[name].scaling["default"]
        update = sum_updates([a.read()], [b.read()], [scale], weight.dtype)
        merged = merge_update(weight, update, kept if stored is None else stored)
        if not (update.isfinite().all() and merged.isfinite().all()):
            raise CheckpointError(f"{a}: the merged weight of {module} is not finite. The adapter seems to be broken.")
        return merged

    def _place(self, model: PreTrainedModel) -> tuple[dict[str, SparseLoraLayer], dict[str, StoredTensor]]:
        """The layers that are adapted, and the new values of other parameters, by name in `model`, which is changed.

        PEFT itself places the adapter, so that its reading of the config counts.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
        try:
            peft_model = PeftModel(model, copy.deepcopy(self.config), low_cpu_mem_usage=True)
        except ValueError as error:
            raise CheckpointError(f"{self.path} does not fit {type(model).__name__}: {error} {_HEAD_HINT}") from error
        state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        _check_expected(self, type(model).__name__, {name.removeprefix(KEY_PREFIX): state[name] for name in state})
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLoraLayer)}
        updates = tuple(f"{name}.sparse_low_rank_" for name in layers)
        # with bias="all", PEFT saves the biases of these modules three times
        copies = {f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
        copies = {prefix + part for prefix in copies for part in ("original_module.", "modules_to_save.")}
        others = {name: new for name, new in self.tensors.items() if not name.startswith((*updates, *copies))}
        new_values = {_parameter(name, layers): stored for name, stored in others.items()}
        _check_replaced(self, type(model).__name__, new_values, shapes)
        return layers, new_values

    def _check_untied(self, layers: Iterable[str], tied: Mapping[str, str]) -> None:
        for module in layers:
            if f"{module}.weight" in {*tied, *tied.values()}:
                raise CheckpointError(
                    f"{self.file}: it has an update for {module}, which shares its weight with another layer of the "
                    "base: merging would change both. Save the base with tie_word_embeddings=False and train above "
                    "that."
                )

    def _check_shapes(self) -> None:
        for name, module in self.modules.items():
            weight = self.weights[name]
            size, expected = weight.size(), (self.tensor(name, "B").shape[0], self.tensor(name, "A").shape[1])
            # only the shape is looked at
            if (
                len(size) < 2
                or min(size) < 0
                or self.layout(name).flatten(torch.empty(size, device="meta")).shape != expected
            ):
                raise CheckpointError(
                    f"{weight.main}: it stores a weight of shape {size}, but the adapter's {module} is {expected} as "
                    "(out_features, in_features). Base and adapter belong to different models."
                )
        for name, new in self.replaced.items():
            weight = self.weights[name]
            if weight.size() != new.shape:
                raise CheckpointError(f"{weight.main}: it has shape {weight.size()}, but {new} has {new.shape}.")


def _check_method(folder: Path) -> None:
    """Raise unless the config is that of a SparseLoRA adapter."""
    path = folder / ADAPTER_CONFIG_NAME
    fields = read_fields(path) if path.is_file() else {}
    if "peft_type" not in fields:
        why = "it has no peft_type" if path.is_file() else "it is missing"
        raise CheckpointError(
            f"{path} can't be read as the config of an adapter: {why}. Name the folder of a SparseLoRA adapter."
        )
    method = fields["peft_type"]
    if method == "VARIATOR":
        raise CheckpointError(
            f"{path}: peft_type='VARIATOR'. A compression plugin merges hidden vectors and no weights, so there is "
            "nothing to put into the base. Load it above the base with PeftModel.from_pretrained."
        )
    if method != SparseLoraConfig.method:
        raise CheckpointError(
            f"{path}: peft_type={shown(method)}, but only SparseLoRA adapters ({SparseLoraConfig.method!r}) are "
            "merged on files: another update fills the zeros of the base. Train with SparseLoraConfig; or, where a "
            "dense model is what you want, load a dense base and call PEFT's merge_and_unload()."
        )


def _check_expected(adapter: AdapterFile, model_name: str, expected: Mapping[str, Tensor]) -> None:
    """Check that every tensor is there which the config asks for, in its shape."""
    missing = [name for name in expected if name not in adapter.tensors]
    if missing:
        raise CheckpointError(
            f"{adapter.file}: {name_some(missing)} missing, which an adapter of this config has above {model_name}. "
            "The file is incomplete, or the adapter was made for another model."
        )
    for name, wanted in expected.items():
        found = adapter.tensors[name]
        same_kind = found.dtype.is_floating_point if wanted.is_floating_point() else found.dtype == wanted.dtype
        if found.shape != tuple(wanted.shape) or not same_kind:
            raise CheckpointError(
                f"{found} is {found.dtype} {found.shape}, but above {model_name} it is {wanted.dtype} "
                f"{tuple(wanted.shape)}. The adapter was made for another model, or with another config."
            )


def _check_replaced(
    adapter: AdapterFile,
    model_name: str,
    replaced: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that every other tensor is a new value of a parameter of the model."""
    unknown = [stored.name for name, stored in replaced.items() if name not in shapes]
    if unknown:
        made_for = "" if adapter.architecture is None else f", {adapter.architecture}"
        raise CheckpointError(
            f"{adapter.file}: {name_some(unknown)} has no place in {model_name}. The adapter was made for another "
            f"model{made_for}. {_HEAD_HINT}"
        )
    for name, stored in replaced.items():
        if stored.shape != shapes[name]:
            raise CheckpointError(
                f"{stored} has shape {stored.shape}, but {name} of {model_name} has {shapes[name]}. Save the base "
                "once with the vocabulary and labels of the adapter, and merge into what was adapted."
            )


def _parameter(name: str, layers: Mapping[str, SparseLoraLayer]) -> str:
    """The parameter that a tensor of the file is a new value for: a bias is saved as that of the base layer."""
    module, _, part = name.rpartition(".base_layer.")
    return f"{module}.{part}" if module in layers else name


def _check_copy(new: StoredTensor, weight: StoredWeight) -> None:
    """PEFT saves embeddings that are adapted, or tied to something that is, with the adapter: as they were."""
    if new.shape != weight.size() or not torch.equal(new.read(), weight.read_dense(new.dtype)):
        raise CheckpointError(
            f"{new}: it replaces {weight.main}, which shares its values with another parameter of the base or gets an "
            "update besides. If it was trained, save the base once with tie_word_embeddings=False, train above that, "
            "and merge into it; else the adapter was made for another base."
        )


def _other_tensors(base: ModelFolder, weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Tensors that are no matrices of layers: biases, kernels of convolutions and so on."""
    taken = {part.name for weight in weights.values() for part in weight.parts.values()}
    tensors = base.checkpoint.tensors
    return {name: StoredWeight.of_dense(tensors[name]) for name in tensors if name not in taken}


def _check_all_found(base: ModelFolder, adapter: AdapterFile, missing: Iterable[str]) -> None:
    for name in sorted(missing):
        raise CheckpointError(
            f"{base.path} has no tensor for {name}, which the adapter in {adapter.path} changes: it is missing, or "
            "stored together with others. If the model loads, load it with the adapter and merge in memory, with "
            "merge_and_unload()."
        )
