"""What to prune, how much, and by which method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from ..field_types import check_field_types, check_regex, shown
from .methods import METHODS, PruningMethod, make_method, method_options
from .patterns import Pattern, Target


__all__ = ["ALLOCATIONS", "SCORE_ORDERS", "PruningConfig", "check_sparsity"]

ALLOCATIONS = ("uniform", "modality", "ecoflap")
SCORE_ORDERS = ("zeroth", "first")


def check_sparsity(name: str, value: float) -> float:
    """`value` if it is a fraction in [0, 1); raises ValueError that calls it `name` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name}={value!r} is outside [0, 1): it is the fraction of weights removed, 0.5 for half of them. At 1 "
            "nothing would be left of the layer."
        )
    return float(value)


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={shown(value)} is unknown. Choose one of {', '.join(allowed)}.")


Class = TypeVar("Class", bound=type)


def _with_method_options(cls: Class) -> Class:
    """Give a class that becomes a dataclass a field for every option of the registered methods."""
    for name, option in method_options().items():
        cls.__annotations__[name] = option.kind
        setattr(cls, name, field(default=option.default, metadata={"help": option.help}))
    return cls


@dataclass
@_with_method_options
class PruningConfig:
    """How `prune` prunes. Give one of `sparsity`, `pattern` and `modality_sparsity`.

    The options of the registered methods are fields, too: `PruningConfig(method="sparsegpt", damping=0.1)` is
    `PruningConfig(method=SparseGPT(damping=0.1))`.

    Raises:
        ValueError: a field is outside what its help allows, or two fields contradict each other.
    """

    method: str | PruningMethod = field(
        default="wanda", metadata={"help": f"{', '.join(METHODS)}; or one of their classes with its options."}
    )
    sparsity: float | None = field(
        default=None,
        metadata={"help": "Fraction of weights removed from the pruned modules, in [0, 1): `0.5` removes half."},
    )
    pattern: str | None = field(
        default=None, metadata={"help": "n:m pattern, n weights kept of every m along the inputs: `2:4`, `4:8`."}
    )
    modality_sparsity: dict[str, float | str] | None = field(
        default=None,
        metadata={
            "help": "How much of each modality is removed, a fraction or a pattern: "
            '`{"vision": 0.4, "language": "2:4"}`. Modalities that are not named stay dense.'
        },
    )
    modalities: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "Modalities that are pruned with `sparsity` or `pattern`. Default: all but the projector, the "
            "Q-Former and the head."
        },
    )
    modality_modules: dict[str, list[str]] | None = field(
        default=None,
        metadata={"help": 'Names modalities by modules, before what is found: `{"vision": ["encoder.image"]}`.'},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to prune: a list of names or of their last parts, or a regex for the whole name. "
            "Default: every Linear and Conv1D in a block stack; all of them in a model without stacks."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that are not pruned, written as `target_modules` are."}
    )
    allocation: str = field(
        default="uniform",
        metadata={
            "help": "uniform: the same everywhere. modality: by `modality_sparsity`. ecoflap: `sparsity` over all "
            "pruned modules together, less of it in the blocks that the loss depends on more (arXiv 2310.02998)."
        },
    )
    propagate: bool = field(
        default=True,
        metadata={
            "help": "Measure each block on the outputs of the pruned blocks before it; False: of the dense ones."
        },
    )
    keep_dense: bool = field(
        default=False, metadata={"help": "Leave the weights as they are and give the masks in the report."}
    )
    score_order: str = field(
        default="zeroth",
        metadata={"help": "ECoFLaP: zeroth (loss differences, forward passes only) or first (gradients)."},
    )
    score_batches: int = field(default=8, metadata={"help": "ECoFLaP: calibration batches the scores are taken on."})
    perturbation: float = field(
        default=1e-3, metadata={"help": "ECoFLaP, zeroth: standard deviation of the noise on the weights."}
    )
    max_block_sparsity: float = field(
        default=0.8, metadata={"help": "ECoFLaP: no block loses more than this fraction of its weights."}
    )
    seed: int = field(default=0, metadata={"help": "ECoFLaP, zeroth: seed of the noise."})

    if TYPE_CHECKING:  # of the fields that come from methods a type checker knows nothing

        def __init__(self, method: str | PruningMethod = "wanda", **fields: Any) -> None: ...

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check every field, as when the config was made: fields may have been set since.

        Raises:
            ValueError: a field is outside what its help allows, or two fields contradict each other.
        """
        check_field_types(self)
        self._check_method()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                check_regex(name, getattr(self, name))
        for name in ("modalities", "modality_sparsity"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} names nothing that could be pruned. Leave it out, or name "
                    "modalities."
                )
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        _check_choice("score_order", self.score_order, SCORE_ORDERS)
        self._check_amount()
        self._check_allocation()
        if self.score_batches < 1:
            raise ValueError(f"score_batches={self.score_batches!r} is too small: at least one batch is needed.")
        if not self.perturbation > 0:
            raise ValueError(
                f"perturbation={self.perturbation!r} must be above 0: it scales the noise on the weights."
            )

    def _check_method(self) -> None:
        """The method is known, and the options of every method are what they may be."""
        if isinstance(self.method, str):
            for name in [self.method, *METHODS]:
                self._from_fields(name)
            return
        self.method.check()
        for name, option in method_options().items():
            if name in self.__dataclass_fields__ and getattr(self, name) != option.default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} beside method={self.method!r}: give a method's options in one "
                    "place, where the method is made."
                )

    def _from_fields(self, name: str) -> PruningMethod:
        """A method with the options that are fields here; one that was registered late keeps its defaults."""
        options = fields(METHODS[name]) if name in METHODS else ()
        given = {item.name: getattr(self, item.name) for item in options if item.name in self.__dataclass_fields__}
        return make_method(name, given)

    @property
    def pruning_method(self) -> PruningMethod:
        """The method with its options."""
        return self._from_fields(self.method) if isinstance(self.method, str) else self.method

    def _check_amount(self) -> None:
        """One amount is given, and it makes sense."""
        given = [name for name in ("sparsity", "pattern", "modality_sparsity") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "PruningConfig takes exactly one of sparsity, pattern and modality_sparsity, but got "
                f"{given or 'none'}. A pattern fixes the sparsity (2:4 removes 0.5), and modality_sparsity takes "
                "patterns as values too."
            )
        if self.sparsity is not None:
            self.sparsity = check_sparsity("sparsity", self.sparsity)
        if self.pattern is not None:
            Pattern.parse(self.pattern)
        for modality in self.modality_sparsity or {}:
            self.modality_target(modality)

    def _check_allocation(self) -> None:
        if self.modality_sparsity is not None and self.allocation == "uniform":
            self.allocation = "modality"
        if (self.allocation == "modality") != (self.modality_sparsity is not None):
            raise ValueError(
                f"allocation={self.allocation!r} and modality_sparsity={self.modality_sparsity!r} do not go together: "
                "allocation='modality' takes modality_sparsity, the others take sparsity or pattern."
            )
        if self.modalities is not None and self.modality_sparsity is not None:
            raise ValueError(
                f"modalities={list(self.modalities)!r} beside modality_sparsity: the keys of modality_sparsity say "
                "what is pruned. Leave modalities out."
            )
        check_sparsity("max_block_sparsity", self.max_block_sparsity)
        if self.allocation != "ecoflap":
            return
        if self.sparsity is None:
            raise ValueError(
                "allocation='ecoflap' gives every block another sparsity and needs sparsity, not pattern."
            )
        if self.sparsity > self.max_block_sparsity:
            raise ValueError(
                f"sparsity={self.sparsity} cannot be reached with max_block_sparsity={self.max_block_sparsity}: every "
                "block would have to lose more. Raise max_block_sparsity."
            )

    def modality_target(self, modality: str) -> Target:
        """What the modules of a modality are pruned to; 0.0 for one that stays dense.

        Raises:
            ValueError: the value is neither a fraction in [0, 1) nor an n:m pattern.
        """
        if self.modality_sparsity is None:
            return Pattern.parse(self.pattern) if self.pattern is not None else float(self.sparsity or 0.0)
        value = self.modality_sparsity.get(modality, 0.0)
        if isinstance(value, str):
            return Pattern.parse(value)
        return check_sparsity(f"modality_sparsity[{modality!r}]", value)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        method = self.pruning_method
        values.update(asdict(method), method=method.name)
        return {**values, "modalities": None if self.modalities is None else list(self.modalities)}
