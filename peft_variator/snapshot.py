"""Putting a model back to what it was before an adapter went onto it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


__all__ = ["ModelSnapshot", "undone_on_error"]

_CONTAINERS = (dict, OrderedDict, list, set)


class ModelSnapshot:
    """The modules, parameters, hooks and attributes of a model, and which parameters train, at one moment.

    References and no values: what is written into a tensor is not undone.

    Args:
        model: the model.
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
