"""The adapters that a run trains: switching exactly them off for the teacher, and training nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


__all__ = ["TrainedAdapters"]

AdapterLayer = BaseTunerLayer | AuxiliaryTrainingWrapper


def _containers(layer: AdapterLayer) -> Iterator[nn.ModuleDict | nn.ParameterDict]:
    """What holds a layer's adapter parameters, keyed by adapter name."""
    for name in layer.adapter_layer_names:
        yield attrgetter(name)(layer)


def _trained_names(layer: AdapterLayer) -> set[str]:
    names = set()
    for container in _containers(layer):
        for name, entry in container.items():
            if any(parameter.requires_grad for parameter in _parameters(entry)):
                names.add(name)
    return names


def _parameters(entry: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return list(entry.parameters()) if isinstance(entry, nn.Module) else [entry]


class TrainedAdapters:
    """The adapters of a model that require gradients, layer by layer.

    A layer can hold several adapters, and a model several kinds of them under the same name (a task LoRA loaded by
    transformers and a plugin around it are both called "default"), so neither names nor `PeftModel.disable_adapter`
    can tell which ones to leave out for the teacher: what is trained can.

    Args:
        model: a PEFT model, or a transformers model with adapters.

    Raises:
        ValueError: no adapter of the model is trainable.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
        # `Any`: PEFT's base classes for layers are mix-ins that do not say they are modules.
        self.layers: list[tuple[Any, set[str]]] = [
            (layer, names) for layer in layers if (names := _trained_names(layer))
        ]
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no trainable adapter, so there is no student to train. Add one with "
                "get_peft_model, or load it with is_trainable=True."
            )
        self._parameters = [
            parameter
            for layer, _ in self.layers
            for container in _containers(layer)
            for entry in container.values()
            for parameter in _parameters(entry)
        ]

    def shared_with_teacher(self, model: nn.Module) -> list[str]:
        """Names of trainable parameters that belong to no adapter, and so would change the teacher as well."""
        own = {id(parameter) for parameter in self._parameters}
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in own
        ]

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """While it lasts, the model is its teacher: without the adapters that are trained, and with all others.

        A task LoRA under a plugin stays on, and so does the head that came with it (`modules_to_save`); a head that
        the trained adapter itself brought is replaced by the one it was copied from. `requires_grad` of every
        parameter is afterwards what it was, which `PeftModel.disable_adapter` does not promise.
        """
        flags = [parameter.requires_grad for parameter in self._parameters]
        active = [list(layer.active_adapters) for layer, _ in self.layers]
        try:
            for layer, trained in self.layers:
                remaining = [name for name in layer.active_adapters if name not in trained]
                if remaining:
                    layer.set_adapter(remaining, inference_mode=True)
                else:
                    layer.enable_adapters(False)
            yield
        finally:
            for (layer, _), names in zip(self.layers, active, strict=True):
                if layer.disable_adapters:
                    layer.enable_adapters(True)
                else:
                    layer.set_adapter(names)
            for parameter, flag in zip(self._parameters, flags, strict=True):
                parameter.requires_grad_(flag)

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


def _check_own_dropout(name: str, layer: nn.Module) -> None:
    rates = {key: value for key, value in vars(layer).items() if "dropout" in key and isinstance(value, float)}
    if any(rates.values()):
        raise ValueError(
            f"{name} ({type(layer).__name__}) applies dropout by itself ({rates}), which cannot be switched off "
            "together with gradient checkpointing. Load the model with these rates at 0, or set base_dropout=True."
        )
