"""Saved adapters: what one may bring into a model, checked before anything of it is taken over."""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .adapter_card import write_card
from .compat import (
    adapter_folder_of_save,
    before_upload,
    check_load_maps,
    key_mapping_while_loading,
    mark_without_adapters,
    needs_generation,
)
from .field_types import name_some
from .models import KEY_PREFIX as _PREFIX
from .saved_config import NamedConfigs, SavedConfig


__all__ = [
    "AdapterStateError",
    "ExactlyLoadedLayer",
    "ModelSnapshot",
    "TidyTuner",
    "check_adapter_state",
    "modules_in_layers",
    "modules_saved_whole",
    "read_keys",
    "undone_on_error",
]

# What holds the number of a neuron as well as int64 does, in less room.
_NARROWER = (torch.int32, torch.int16)
# Modules that PEFT saves whole for a task, whatever the config says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class AdapterStateError(ValueError, RuntimeError):
    """The tensors of a saved adapter are not those of the adapter in the model. (For sizes torch has RuntimeError.)"""


_CONTAINERS = (dict, OrderedDict, list, set, NamedConfigs)


class ModelSnapshot:
    """The modules, parameters, hooks and attributes of a model, and which parameters train, at one moment.

    References and no values: what is written into a tensor is not undone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module, dict(vars(module))) for module in model.modules()]
        # Copies beside the live objects, which are filled again on restoring: handles of hooks refer to them.
        self._contents = [
            (value, copy.copy(value))
            for _, attributes in self._attributes
            for value in attributes.values()
            if type(value) in _CONTAINERS
        ]
        self._trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back."""
        for live, contents in self._contents:
            _refill(live, contents)
        for module, attributes in self._attributes:
            _refill(vars(module), attributes)
        for parameter, requires_grad in self._trains:
            parameter.requires_grad_(requires_grad)


def _refill(live: Any, contents: Any) -> None:
    live.clear()
    if isinstance(live, list):
        live.extend(contents)
    else:
        live.update(contents)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[ModelSnapshot]:
    """Leave nothing behind in `model` of what fails inside."""
    before = ModelSnapshot(model)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


class TidyTuner(BaseTuner):
    """A tuner that leaves nothing behind of an adapter that could not be put in or loaded.

    Its configs are `SavedConfig`s.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.before_loading: dict[str, ModelSnapshot] = {}  # of adapters from files whose tensors are still to come
        super().__init__(model, *args, **kwargs)
        self.peft_config = model.peft_config = NamedConfigs(self.peft_config)  # type: ignore[assignment]  # as PEFT

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """What PEFT saves of an adapter: the moment at which `push_to_hub` has asked for it.

        It is also the last one before the tensors of an adapter that is in the folder are written over. Its config
        goes, so that what a process leaves that is killed before it wrote the new one can't be loaded.
        """
        if isinstance(model, PeftModel):
            before_upload(model, _renew_card)
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        folder = adapter_folder_of_save(adapter_name)
        if folder is not None:
            Path(folder, ADAPTER_CONFIG_NAME).unlink(missing_ok=True)
        return found

    @contextmanager
    def injecting(self, adapter_name: str) -> Iterator[None]:
        """Around all of `inject_adapter`.

        Raises:
            ValueError: the adapter cannot have this name.
        """
        has_adapters = hasattr(self.model, "peft_config")
        try:
            _check_adapter_name(adapter_name)
            with undone_on_error(self.model) as before:
                config = self.peft_config[adapter_name]
                config.check()
                _refuse_untrainable(self.model, config)
                key_mapping = key_mapping_while_loading() if config.was_saved else None
                if key_mapping is not None:
                    _check_file(self.model, config, key_mapping)
                if needs_generation() and not hasattr(self.model, "prepare_inputs_for_generation"):
                    raise ValueError(
                        f"task_type={str(config.task_type)!r} is for models that generate text, and a "
                        f"{type(self.model).__name__} does not. Leave it out, or name the model's own task."
                    )
                yield
                _warn_about_nothing(self, self.peft_config[adapter_name])
        except BaseException:
            if not has_adapters:
                mark_without_adapters(self.model)
            raise
        check_load_maps(self.model, adapter_name, _refuse_incomplete)
        if self.peft_config[adapter_name].was_saved:
            self.before_loading[adapter_name] = before

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT calls this around a forward and then drops the argument: every sample would get the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: adapters of a {type(self).__name__} cannot be mixed in "
                "one batch. Call set_adapter and then the model, once for each of them."
            )
        yield

    @staticmethod
    @contextmanager
    def loading(model: nn.Module, adapter_name: str, config: SavedConfig) -> Iterator[None]:
        """Around the checks of a state dict that is to be loaded: if it came with the adapter, both are refused."""
        tuner = model.base_model if isinstance(model, PeftModel) else None
        if not isinstance(tuner, TidyTuner):
            yield
            return
        before = tuner.before_loading.pop(adapter_name, None)
        attributes = dict(vars(model))  # asking what the adapter has sets one; see `_get_adapter_state_dict`
        try:
            if before is not None:
                _check_download(config)
            yield
        except BaseException:
            for name in vars(model).keys() - attributes.keys():
                del vars(model)[name]
            if before is not None:
                before.restore()
                tuner.peft_config.pop(adapter_name)
            raise


class ExactlyLoadedLayer(BaseTunerLayer):
    """A layer whose loaded tensors keep their numbers.

    PEFT moves tensors to the base layer's device and dtype when an adapter is put in, and with `low_cpu_mem_usage`
    once more when they have been loaded, which would round them on a base in half precision. So what a layer gives as
    `_get_base_layer_device_and_dtype` has a dtype only while `is_new`.
    """

    is_new = False

    @contextmanager
    def as_new(self) -> Iterator[None]:
        """Around putting an adapter in."""
        self.is_new = True
        try:
            yield
        finally:
            self.is_new = False


def _warn_about_nothing(tuner: BaseTuner, config: SavedConfig) -> None:
    """Warn about layers that no adapted module is in, and about modules to save that the model does not have."""
    layers, adapted = config.layers_to_transform, tuner.targeted_module_names
    wanted = layers if isinstance(layers, list) else []
    empty = [layer for layer in wanted if not modules_in_layers(config, adapted, layer)]
    if empty:
        warnings.warn(
            f"layers_to_transform={layers!r}: no adapted module is in the layers {empty}. Indices count from 0.",
            stacklevel=2,
        )
    by_task = _HEADS.get(config.task_type or "", ())
    names = [name for name, _ in tuner.model.named_modules()]
    unknown = [
        wanted
        for wanted in config.modules_to_save or ()
        if wanted not in by_task and not any(name.endswith(wanted) for name in names)
    ]
    if unknown:
        warnings.warn(
            f"modules_to_save={config.modules_to_save!r}: no module of the model ends in {name_some(unknown)}, so "
            "nothing is trained or saved for it.",
            stacklevel=2,
        )


def modules_in_layers(config: SavedConfig, names: Collection[str], layers: list[int] | int | None) -> set[str]:
    """Those of the modules that lie in layers by PEFT's reading of `layers_pattern`, whatever else the config says.

    Args:
        config: the configuration.
        names: full names of modules.
        layers: as `layers_to_transform`, which PEFT does not look at for full names and regular expressions.
    """
    by_layer = copy.copy(config)
    by_layer.target_modules = {name.rpartition(".")[2] for name in names}
    by_layer.exclude_modules = by_layer.modules_to_save = None
    by_layer.layers_to_transform = layers
    # Behind a name of its own: PEFT looks for a layer's number behind two, and takes a name without a dot anyway.
    return {name for name in names if check_target_module_exists(by_layer, f"model.{name}")}


def _file_of(config: SavedConfig) -> Path | None:
    """Where the tensors of a saved adapter are on this machine; `None`: nowhere yet."""
    if config.source is None:
        return None
    if config.download is None:
        return Path(config.source, SAFETENSORS_WEIGHTS_NAME)
    repo, places = config.download
    name = "/".join(filter(None, (places["subfolder"].strip("/"), SAFETENSORS_WEIGHTS_NAME)))
    found = try_to_load_from_cache(repo, name, places.get("cache_dir"), places.get("revision"))
    return Path(found) if isinstance(found, str) else None


def read_keys(file: Path) -> set[str]:
    """The names of the tensors in an adapter's file.

    Raises:
        AdapterStateError: it is not there, or can't be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise AdapterStateError(
            f"The adapter in {file.parent}: {file.name} can't be read: {error}. It is missing or damaged; copy it "
            "again, or save the adapter again with save_pretrained."
        ) from error


def _check_file(model: nn.Module, config: SavedConfig, key_mapping: Mapping[str, str]) -> None:
    """Check what PEFT looks at in an adapter's file before it shows the tensors to a tuner: keys and whole modules."""
    file = _file_of(config)
    if file is None or (not file.exists() and file.with_name(WEIGHTS_NAME).exists()):
        return
    keys = read_keys(file)
    where = f"The adapter in {file.parent}"
    foreign = [key for key in keys if not key.startswith("base_model.")]
    if key_mapping and foreign:
        raise AdapterStateError(
            f"{where} brings tensors that have no place in this model: {name_some(foreign)}. Load it onto the model "
            "that it was made for, or save it again with save_pretrained."
        )
    keys = {_renamed(key, key_mapping) for key in keys}
    whole = modules_saved_whole(config)
    for name, module in model.named_modules():
        if not name.endswith(whole):
            continue
        saved = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        if any(isinstance(inner, BaseTunerLayer) for inner in saved.modules()):
            continue  # its tensors have other names in the model than in the file
        missing = [f"{name}.{key}" for key in saved.state_dict() if f"{_PREFIX}{name}.{key}" not in keys]
        if missing:
            raise _incomplete(where, missing)


def _renamed(key: str, key_mapping: Mapping[str, str]) -> str:
    prefix = _PREFIX if key.startswith(_PREFIX) else "base_model."
    inner = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        renamed, count = re.subn(pattern, replacement, inner)
        if count:
            return prefix + renamed
    return key


def _check_download(config: SavedConfig) -> None:
    """Compare an adapter's file in the Hub's cache with the name that the Hub gave it, the SHA-256 of its content."""
    file = _file_of(config) if config.download is not None else None
    blob = None if file is None else file.resolve()
    if blob is None or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    if hashlib.sha256(blob.read_bytes()).hexdigest() != blob.name:
        raise AdapterStateError(
            f"The adapter in {config.source}: {SAFETENSORS_WEIGHTS_NAME} is not what the Hub has; it was damaged "
            f"while it was downloaded, or since. Remove {blob} and load it again."
        )


def _renew_card(model: PeftModel, folder: str) -> None:
    """Write the card of the adapter in a folder, which transformers has replaced by a template."""
    config = model.peft_config.get("default")
    if isinstance(config, SavedConfig):
        write_card(folder, config.card(None if config.task_type else type(model.get_base_model()).__name__))


def modules_saved_whole(config: SavedConfig) -> tuple[str, ...]:
    """What the names of modules end in that PEFT trains and saves whole: those named, and heads of the task."""
    return (*(config.modules_to_save or ()), *_HEADS.get(config.task_type or "", ()))


def _refuse_untrainable(model: nn.Module, config: SavedConfig) -> None:
    whole = modules_saved_whole(config)
    for name, module in model.named_modules():
        if name.endswith(whole) and not all(each.is_floating_point() for each in module.parameters()):
            raise ValueError(
                f"modules_to_save, or task_type={str(config.task_type)!r}, would train {name!r}, which is packed or "
                "quantised and can't be trained. Leave it out, or make it dense first: pack the model with "
                f"ignore=[{name!r}]."
            )


def _check_adapter_name(adapter_name: str) -> None:
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not possible: it becomes a part of parameter names, so it has to be a "
            "text of at least one character without a dot. Choose another name."
        )


def check_adapter_state(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], source: str | None = None
) -> bool:
    """Check that a state dict holds the tensors of an adapter, all of them and nothing else.

    Args:
        model: the model that has the adapter.
        adapter_name: the adapter.
        state_dict: what is to be loaded, as PEFT hands it to a tuner: names of modules that are saved whole have the
            adapter's name in them, those of the adapter itself do not.
        source: where it comes from, for messages.

    Returns:
        Whether it is the state of the whole model, base weights included, as some trainers keep it.

    Raises:
        AdapterStateError: a tensor is missing, or has no place in the adapter (a weight of the base model, say), or
            has another shape or kind of number, or is not finite. The message has its key.
    """
    where = f"The adapter in {source}" if source else f"The state of adapter {adapter_name!r}"
    of_model = model.state_dict()
    has_prefix = any(key.startswith(_PREFIX) for key in of_model)  # else PEFT takes keys with it and without
    foreign = [key for key in state_dict if has_prefix and not key.startswith(_PREFIX)]
    found = {key.removeprefix(_PREFIX): value for key, value in state_dict.items() if key not in foreign}
    everything = {key.removeprefix(_PREFIX): value for key, value in of_model.items()}
    whole = bool(everything) and everything.keys() <= found.keys()
    expected = everything if whole else _expected_tensors(model, adapter_name)
    surplus = foreign + [
        key for key in found if key not in expected and not _is_embedding(model, key, found, everything, where)
    ]
    overwritten = [key for key in surplus if key in everything]
    missing = [key for key in expected if key not in found]
    # By the names in the file, where those of modules that are saved whole do not have the adapter's in them.
    named = {key: key if whole else _as_saved(key, adapter_name) for key in (*surplus, *expected)}
    missing_names = [named[key] for key in missing]
    if surplus:
        surplus_names = [named[key] for key in overwritten or surplus]
        what = "are weights of the base model" if overwritten else "have no place in this model"
        hint = f" It lacks {name_some(missing_names)}." if missing else ""
        advice = "Load it onto the model that it was made for, or save it again with save_pretrained."
        if source and not foreign and _differ_by_a_prefix(surplus, missing):
            loading = f"peft_variator.load_plugin(model, {source!r})"
            advice = f"It was made for the model with another head, or none; {loading} loads it."
            if missing[0].startswith(_PREFIX):
                advice = (
                    "The model is a PeftModel already, and the adapter was made for its base: put it on "
                    "model.get_base_model() in place of model, under a name of its own, which leaves the adapter that "
                    "is there on; or have base.load_adapter(FOLDER, adapter_name=NAME) load that one first."
                )
        raise AdapterStateError(
            f"{where} brings tensors that are none of the adapter's and {what}: {name_some(surplus_names)}."
            f"{hint} {advice}"
        )
    if missing:
        raise _incomplete(where, missing_names)
    for key, wanted in expected.items():
        _check_tensor(named[key], found[key], wanted, where)
    return whole


def _differ_by_a_prefix(names: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two lists of names are the same but for one prefix, as of a model and of its body alone."""
    short, long = sorted((sorted(names), sorted(others)), key=lambda each: sum(map(len, each)))
    if not short or not long[0].endswith(f".{short[0]}"):
        return False
    prefix = long[0].removesuffix(short[0])
    return [f"{prefix}{name}" for name in short] == long


def _as_saved(key: str, adapter_name: str) -> str:
    """The name in an adapter's file of a tensor in the model."""
    return key.replace(f".modules_to_save.{adapter_name}.", ".")


def _incomplete(where: str, missing: list[str]) -> AdapterStateError:
    return AdapterStateError(
        f"{where} lacks {name_some(missing)}. The file is incomplete, its keys were renamed, or the adapter was made "
        "for another model. Save it again with save_pretrained."
    )


def _refuse_incomplete(model: Any, adapter_name: str, missing: list[str]) -> None:
    """Refuse a state dict that lacks tensors of a module that is saved whole, which PEFT finds out first."""
    config = model.peft_config[adapter_name]
    where = f"The adapter in {config.source}" if config.source else f"The state of adapter {adapter_name!r}"
    with TidyTuner.loading(model, adapter_name, config):
        raise _incomplete(where, [key.removeprefix(_PREFIX) for key in missing])


def _expected_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What PEFT would save of the adapter, by the names that it gives a tuner when it loads."""
    saved = get_peft_model_state_dict(
        model, state_dict=model.state_dict(), adapter_name=adapter_name, save_embedding_layers=False
    )
    renamed = {
        f"{name}.{key}": f"{name}.{loaded}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key, loaded in module.adapter_state_dict_load_map(adapter_name).items()
    }
    return {renamed.get(key, key).removeprefix(_PREFIX): value for key, value in saved.items()}


def _check_tensor(key: str, found: Tensor, wanted: Tensor, where: str) -> None:
    if found.shape != wanted.shape:
        raise AdapterStateError(
            f"{where} does not fit this model: size mismatch for {key}: {tuple(found.shape)} in the file, "
            f"{tuple(wanted.shape)} in the model. Load it onto the model, and with the config, that it was made with."
        )
    same_kind = found.dtype == wanted.dtype or (wanted.dtype == torch.int64 and found.dtype in _NARROWER)
    if wanted.is_floating_point():  # of eight bits it would be a quantized tensor, which needs a scale
        same_kind = found.is_floating_point() and found.dtype.itemsize > 1
    if not same_kind:
        raise AdapterStateError(
            f"{where} has {key} as {found.dtype}, where {wanted.dtype} is expected. Save it again with "
            "save_pretrained; quantized adapters cannot be loaded."
        )
    if found.is_floating_point() and not found.is_meta and not bool(found.isfinite().all()):
        raise AdapterStateError(f"{where} has NaN or infinite values in {key}: the adapter is broken. Train it again.")


def _is_embedding(
    model: nn.Module, key: str, found: Mapping[str, Tensor], everything: Mapping[str, Tensor], where: str
) -> bool:
    """Whether the tensor is one of the embeddings that PEFT saves with an adapter, and may be taken over.

    It saves those of a vocabulary that was resized, and copies of those that are adapted or tied to what is.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if key not in everything or not hasattr(base, "get_input_embeddings"):
        return False
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is embedding for embedding in embeddings)]
    if not any(key.startswith(f"{name}.") for name in names):
        return False
    _check_tensor(key, found[key], everything[key], where)
    return _same_values(found[key], everything[key]) or _was_resized(base)


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Equal up to a cast to the coarser of the two dtypes."""
    dtype = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(other.device, dtype), other.to(dtype))


def _was_resized(base: Any) -> bool:
    """Whether the vocabulary differs from that of the checkpoint the model was loaded from."""
    if not base.name_or_path:
        return False
    try:
        saved = type(base.config).from_pretrained(base.name_or_path)
    except (OSError, ValueError):
        return False
    return bool(saved.get_text_config().vocab_size != base.config.get_text_config().vocab_size)
