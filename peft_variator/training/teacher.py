"""The adapters that a run trains, and the two kinds of teacher: the student without them, and a model of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models import KEY_PREFIX


__all__ = [
    "InPlaceTeacher",
    "SeparateTeacher",
    "SwitchableAdapters",
    "Teacher",
    "TrainedAdapters",
    "measured_adapters",
]

AdapterLayer = BaseTunerLayer | AuxiliaryTrainingWrapper


def _containers(layer: AdapterLayer) -> Iterator[nn.ModuleDict | nn.ParameterDict]:
    """What holds a layer's adapter parameters, keyed by adapter name."""
    for name in layer.adapter_layer_names:
        yield attrgetter(name)(layer)


def _parameters(entry: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return list(entry.parameters()) if isinstance(entry, nn.Module) else [entry]


def _adapter_parameters(layer: AdapterLayer) -> list[nn.Parameter]:
    """Parameters of all adapters of a layer, trained or not."""
    return [p for container in _containers(layer) for entry in container.values() for p in _parameters(entry)]


def _trained_names(layer: AdapterLayer) -> set[str]:
    """Names of a layer's adapters that require gradients."""
    entries = [(name, entry) for container in _containers(layer) for name, entry in container.items()]
    return {name for name, entry in entries if any(parameter.requires_grad for parameter in _parameters(entry))}


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Layers with adapters, by name; those inside of a wrapper of PEFT's are handled by it."""
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) and not (wrapped and name.startswith(wrapped)):
            if isinstance(module, AuxiliaryTrainingWrapper):
                wrapped += (f"{name}.",)
            yield name, module


def _is_own(model: nn.Module, name: str, layer: AdapterLayer) -> bool:
    """Whether a layer belongs to the adapters of a `PeftModel` itself, rather than to one that its base came with."""
    if not isinstance(model, PeftModel):
        return True
    if isinstance(layer, BaseTunerLayer):
        tuner: Any = model.base_model
        return isinstance(layer, tuner.tuner_layer_cls)
    # Not every method has these fields.
    field = "trainable_token_indices" if isinstance(layer, TrainableTokensWrapper) else "modules_to_save"
    wanted = [getattr(model.peft_config[adapter], field, None) for adapter in model.active_adapters]
    if isinstance(layer, TrainableTokensWrapper):
        return any(wanted)
    return any(f".{name}".endswith(f".{module}") for modules in wanted for module in modules or ())


class SwitchableAdapters:
    """Some of the adapters of a model, layer by layer, which can be switched off together.

    Args:
        layers: layers with adapters, each with the names of those that are meant.
    """

    def __init__(self, layers: list[tuple[Any, set[str]]]) -> None:
        # `Any`: PEFT's base classes for layers are mix-ins that do not say they are modules.
        self.layers = layers
        self._parameters = [parameter for layer, _ in layers for parameter in _adapter_parameters(layer)]

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """While it lasts, the model is its teacher: without these adapters, and with all others.

        A task LoRA under a plugin stays on, and so does the head that came with it (`modules_to_save`); a head that
        the adapter itself brought is replaced by the one it was copied from. `requires_grad` of every
        parameter is afterwards what it was, which `PeftModel.disable_adapter` does not promise.
        """
        flags = [parameter.requires_grad for parameter in self._parameters]
        active = [list(layer.active_adapters) for layer, _ in self.layers]
        try:
            for layer, names in self.layers:
                remaining = [name for name in layer.active_adapters if name not in names]
                if remaining:
                    layer.set_adapter(remaining, inference_mode=True)
                else:
                    layer.enable_adapters(False)
            yield
        finally:
            for (layer, _), before in zip(self.layers, active, strict=True):
                if layer.disable_adapters:
                    layer.enable_adapters(True)
                else:
                    layer.set_adapter(before)
            for parameter, flag in zip(self._parameters, flags, strict=True):
                parameter.requires_grad_(flag)


class TrainedAdapters(SwitchableAdapters):
    """The adapters of a model that require gradients, layer by layer.

    A layer can hold several adapters, and a model several kinds of them under the same name (a task LoRA loaded by
    transformers and a plugin around it are both called "default"), so neither names nor `PeftModel.disable_adapter`
    can tell which ones to leave out for the teacher: what is trained can. Adapters that the base of a `PeftModel` came
    with are frozen, with a warning if they were trainable: PEFT leaves heads (`modules_to_save`) trainable even where
    an adapter is loaded for inference.

    Args:
        model: a PEFT model, or a transformers model with adapters.

    Raises:
        ValueError: no adapter of the model is trainable.
    """

    def __init__(self, model: nn.Module) -> None:
        layers: list[tuple[Any, set[str]]] = []
        frozen: list[str] = []
        for name, layer in _adapter_layers(model):
            names = _trained_names(layer)
            if names and _is_own(model, name, layer):
                layers.append((layer, names))
            elif names:
                frozen.append(name)
                for parameter in _adapter_parameters(layer):
                    parameter.requires_grad_(False)
        if frozen:
            warnings.warn(
                f"{len(frozen)} layers with trainable adapters that the base model came with are frozen now, the "
                f"first is {frozen[0]!r}: only the adapter of the PeftModel itself is trained.",
                stacklevel=2,
            )
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no trainable adapter, so there is no student to train. Add one with "
                "get_peft_model, or load it with is_trainable=True."
            )
        super().__init__(layers)

    def shared_with_teacher(self, model: nn.Module) -> list[str]:
        """Names of trainable parameters that belong to no adapter, and so would change the teacher as well."""
        own = {id(parameter) for parameter in self._parameters}
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in own
        ]

    def load(self, model: nn.Module, checkpoint: str) -> None:
        """Give the trained adapters the weights that a checkpoint of the Trainer holds.

        Args:
            model: the model that the adapters belong to.
            checkpoint: folder that `model.save_pretrained` wrote: "default" lies in it, others in folders of their
                names; of a transformers model with adapters the one that is active.

        Raises:
            FileNotFoundError: an adapter is not in the checkpoint.
        """
        for name in sorted({name for _, names in self.layers for name in names}):
            folder = Path(checkpoint, name) if isinstance(model, PeftModel) and name != "default" else Path(checkpoint)
            if not any(Path(folder, file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
                raise FileNotFoundError(
                    f"The checkpoint {checkpoint!r} holds no adapter {name!r}; the model has the weights of the last "
                    "step. Load the best ones from where they were saved."
                )
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, torch_device="cpu")
            else:
                weights = load_peft_weights(str(folder), device="cpu")
                own = {key.removeprefix(KEY_PREFIX): value for key, value in weights.items()}
                set_peft_model_state_dict(model, own, adapter_name=name)

    def train_alone(self, model: nn.Module) -> None:
        """Put the trained adapters into training mode and the rest of the model into evaluation mode.

        Gradient checkpointing only works in training mode, so checkpointed layers keep it, unlike what is in them.

        Args:
            model: the model that the adapters belong to.

        Raises:
            ValueError: a checkpointed layer applies dropout by itself, which its mode then cannot switch off.
        """
        model.eval()
        for name, module in model.named_modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                _check_own_dropout(name, module)
                module.training = True
        for layer, names in self.layers:
            layer.training = True
            for child in layer.children():
                if isinstance(child, nn.ModuleDict):
                    for adapter in names & set(child):
                        child[adapter].train()


def measured_adapters(model: nn.Module) -> SwitchableAdapters:
    """The adapters that a model is compared with and without: those that are trained, else those that are active.

    Args:
        model: a PEFT model, or a transformers model with adapters.

    Raises:
        ValueError: the model has no active adapter.
    """
    layers: list[tuple[Any, set[str]]] = [
        (layer, _trained_names(layer)) for name, layer in _adapter_layers(model) if _is_own(model, name, layer)
    ]
    if not any(names for _, names in layers):
        layers = [
            (layer, {name for container in _containers(layer) for name in container} & set(layer.active_adapters))
            for layer, _ in layers
        ]
    layers = [(layer, names) for layer, names in layers if names]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no active adapter, so there is nothing to compare it with. Load one, or "
            "choose one by set_adapter."
        )
    return SwitchableAdapters(layers)


def _check_own_dropout(name: str, layer: nn.Module) -> None:
    rates = {key: value for key, value in vars(layer).items() if "dropout" in key and isinstance(value, float)}
    if any(rates.values()):
        raise ValueError(
            f"{name} ({type(layer).__name__}) applies dropout by itself ({rates}), which cannot be switched off "
            "together with gradient checkpointing. Load the model with these rates at 0, or set base_dropout=True."
        )


class Teacher(Protocol):
    """What the student is compared with."""

    def outputs(self, student: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The teacher's outputs on a batch, without gradients and without dropout.

        Args:
            student: the student as it is called in training, wrapped for data parallelism or not.
            inputs: keyword arguments of the forward.
        """


class InPlaceTeacher:
    """The student with the trained adapters switched off; it takes no memory of its own.

    The modules that are left have to be in evaluation mode: as `train_alone` leaves them, or after `student.eval()`.

    Args:
        student: the model that is trained, not wrapped.
        adapters: its trained adapters.

    Raises:
        ValueError: the student trains parameters outside of adapters, so that the teacher would change with it.
    """

    def __init__(self, student: nn.Module, adapters: TrainedAdapters) -> None:
        self.adapters = adapters
        shared = adapters.shared_with_teacher(student)
        if shared:
            raise ValueError(
                f"{len(shared)} trainable parameters belong to no adapter (the first is {shared[0]!r}), so the "
                "teacher, which is the same model, would change while it is followed. Freeze them (bias='none'), name "
                "their modules in modules_to_save, or pass a teacher_model."
            )

    def outputs(self, student: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The outputs of the student without the trained adapters; see [`Teacher`]."""
        with torch.no_grad(), self.adapters.switched_off():
            return student(**inputs)


class SeparateTeacher:
    """A model of its own, such as the dense version of a pruned base.

    Args:
        model: the teacher; it is put into evaluation mode and gets no gradients.
        student: the model that is trained.

    Raises:
        ValueError: the two share parameters, so freezing the teacher would freeze the student.
    """

    def __init__(self, model: nn.Module, student: nn.Module) -> None:
        own = {id(parameter) for parameter in model.parameters()}
        if any(parameter.requires_grad and id(parameter) in own for parameter in student.parameters()):
            raise ValueError(
                "teacher_model shares trainable parameters with the student. Pass another model, or "
                "teacher_model=None to follow the student without its adapters."
            )
        self.model = model.requires_grad_(False).eval()

    def outputs(self, student: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The outputs of the teacher model; see [`Teacher`]."""
        with torch.no_grad():
            return self.model(**inputs)
