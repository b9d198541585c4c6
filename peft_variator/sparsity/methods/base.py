"""What a pruning method is, and the one list of them.

The command line names every method and its options in its help, which has no time to import torch: files of methods
import it inside the functions that need it, as `patterns` and `statistics` do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints

from ..patterns import Target, apply_mask, select
from ..statistics import Statistics


if TYPE_CHECKING:
    from torch import Tensor


__all__ = [
    "METHODS",
    "MethodOption",
    "PruningMethod",
    "ScoredMethod",
    "make_method",
    "method_options",
    "option",
    "register_method",
]


def option(default: Any, help: str, *, at_least: float | None = None) -> Any:
    """A field of a method: an option with a default, one sentence of help, and the least value that makes sense."""
    return field(default=default, metadata={"help": help, "at_least": at_least})


@dataclass
class PruningMethod(ABC):
    """A pruning method: a dataclass whose fields are its options, each made by `option`.

    To add one, write a subclass under `@register_method` and `@dataclass` in a file of this package, and import the
    file in its `__init__`. `PruningConfig` and the command line take the name and the options from here.

    Raises:
        ValueError: an option has a value of another type, or one below its least.
    """

    name: ClassVar[str]
    """What `PruningConfig.method` calls it."""
    statistics: ClassVar[type[Statistics] | None] = None
    """What it needs to know of a layer's inputs; `None`: it looks at nothing but the weight."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check every option, as when the method was made.

        Raises:
            ValueError: an option has a value of another type, or one below its least.
        """
        from ...field_types import check_field_types

        check_field_types(self)
        for item in fields(self):
            value, least = getattr(self, item.name), item.metadata["at_least"]
            if least is not None and not value >= least:
                raise ValueError(
                    f"{item.name}={value!r} is too small. At least {least}: {item.metadata['help'].removesuffix('.')}."
                )

    @abstractmethod
    def solve(self, weight: Tensor, statistics: Any, target: Target) -> tuple[Tensor, Tensor]:
        """Choose what stays.

        Args:
            weight: (out_features, in_features). Not to be written to.
            statistics: of the layer's inputs, an instance of the class's `statistics`.
            target: fraction removed, or an n:m pattern.

        Returns:
            The mask, bool (out_features, in_features), True where kept, and the new weight, +0.0 outside of it.
        """


@dataclass
class ScoredMethod(PruningMethod):
    """A method that keeps the weights with the largest scores, and their values."""

    per_row: ClassVar[bool] = True
    """Whether a weight is compared with those of its own output only, or with the whole matrix."""

    @abstractmethod
    def score(self, weight: Tensor, statistics: Any) -> Tensor:
        """The scores of the weights, (out_features, in_features) as `weight`, in float32 or better."""

    def solve(self, weight: Tensor, statistics: Any, target: Target) -> tuple[Tensor, Tensor]:
        mask = select(self.score(weight.detach(), statistics), target, per_row=self.per_row)
        return mask, apply_mask(weight, mask)


METHODS: dict[str, type[PruningMethod]] = {}
"""Every pruning method by name."""

Class = TypeVar("Class", bound=type[PruningMethod])


def register_method(cls: Class) -> Class:
    """Add a class to `METHODS`.

    Raises:
        ValueError: another method has its name.
    """
    if METHODS.setdefault(cls.name, cls) is not cls:
        raise ValueError(f"name={cls.name!r}: there is a pruning method of this name, {METHODS[cls.name]}.")
    return cls


def make_method(name: str, options: Mapping[str, Any]) -> PruningMethod:
    """A method with some of its options.

    Raises:
        ValueError: there is no such method, it has no such option, or an option has a wrong value.
    """
    if name not in METHODS:
        from ...field_types import shown

        raise ValueError(f"method={shown(name)} is unknown. Choose one of {', '.join(METHODS)}.")
    own = [item.name for item in fields(METHODS[name])]
    for option_name, value in options.items():
        if option_name not in own:
            raise ValueError(
                f"{option_name}={value!r} is no option of method={name!r}, which has {', '.join(own) or 'none'}."
            )
    return METHODS[name](**options)


@dataclass(frozen=True)
class MethodOption:
    """An option as `PruningConfig` and the command line show it.

    Args:
        kind: its type.
        default: its default.
        help: one sentence, after the names of the methods that have it.
        at_least: the least value, or `None`.
    """

    kind: Any
    default: Any
    help: str
    at_least: float | None


def method_options() -> dict[str, MethodOption]:
    """The options of all methods by name; one that several methods share comes once.

    Raises:
        ValueError: two methods have options of one name that differ.
    """
    found: dict[str, MethodOption] = {}
    owners: dict[str, list[str]] = {}
    for method in METHODS.values():
        hints = get_type_hints(method)
        for item in fields(method):
            known = MethodOption(hints[item.name], item.default, item.metadata["help"], item.metadata["at_least"])
            if found.setdefault(item.name, known) != known:
                raise ValueError(
                    f"The option {item.name!r} of {method.name!r} is another one in {owners[item.name]}: rename it."
                )
            owners.setdefault(item.name, []).append(method.name)
    return {
        name: replace(known, help=f"{', '.join(owners[name])}: {known.help[:1].lower()}{known.help[1:]}")
        for name, known in found.items()
    }
