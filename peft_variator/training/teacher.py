"""The two kinds of teacher: the student without what is trained, and a model of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from .adapters import TrainedAdapters


__all__ = ["InPlaceTeacher", "SeparateTeacher", "Teacher"]


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

    Calling it leaves the student in evaluation mode.

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
        student.eval()
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
