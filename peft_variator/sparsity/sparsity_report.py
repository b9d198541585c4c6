"""How sparse a model is: per module, block and modality, as a table, JSON and a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import Tensor

from ..files import replacing, write_text
from .patterns import Pattern, meets_pattern


__all__ = ["GROUPINGS", "ModuleSparsity", "SparsityReport", "add_up", "count_module"]

GROUPINGS = ("module", "block", "modality")


@dataclass(frozen=True)
class ModuleSparsity:
    """The zeros of one weight.

    Attributes:
        name: of the module (of the tensor, where the module is not known).
        block: name of the block it is in, or its own.
        modality: vision, language, projector, qformer, head, ...
        shape: of the weight as it is stored.
        weights: number of weights.
        zeros: how many of them are zero.
        negative_zeros: how many of those are -0.0, which some 2:4 kernels read as values.
        pattern: the n:m pattern it was checked for.
        pattern_met: whether it has it; None where no pattern was checked.
        target: the sparsity it was pruned to; None where it was not pruned.
    """

    name: str
    block: str
    modality: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    negative_zeros: int = 0
    pattern: str | None = None
    pattern_met: bool | None = None
    target: float | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return self.zeros / self.weights if self.weights else 0.0


def count_module(
    name: str, block: str, modality: str, matrix: Tensor, pattern: Pattern | None, **more: Any
) -> ModuleSparsity:
    """Count the zeros of `matrix` (out_features, in_features) and check it for `pattern`."""
    zero = matrix == 0
    return ModuleSparsity(
        name=name,
        block=block,
        modality=modality,
        weights=matrix.numel(),
        zeros=int(zero.sum()),
        negative_zeros=int((zero & matrix.signbit()).sum()),
        pattern=None if pattern is None else str(pattern),
        pattern_met=None if pattern is None else meets_pattern(matrix, pattern),
        **{"shape": tuple(matrix.shape), **more},
    )


def add_up(name: str, modules: Sequence[ModuleSparsity], block: str, modality: str) -> ModuleSparsity:
    """The zeros of several weights, or of the parts of one, as those of one; its pattern is met if all meet it."""
    patterns = {module.pattern for module in modules}
    checked = [module.pattern_met for module in modules]
    return ModuleSparsity(
        name=name,
        block=block,
        modality=modality,
        shape=(),
        weights=sum(module.weights for module in modules),
        zeros=sum(module.zeros for module in modules),
        negative_zeros=sum(module.negative_zeros for module in modules),
        pattern=patterns.pop() if len(patterns) == 1 else None,
        pattern_met=None if None in checked else all(checked),
    )


@dataclass
class SparsityReport:
    """The zeros of a model's weights. Made by `prune`, `measure_sparsity` and `inspect_checkpoint`.

    Attributes:
        modules: one entry a weight, in the order of the model, or sorted by name for a checkpoint on disk.
        source: what was measured or how it was pruned, plain JSON values.
        masks: module name -> bool mask of the weight's own shape, on the CPU, True where kept; filled by
            `prune` with `keep_dense=True` only. Not part of the JSON.
    """

    modules: list[ModuleSparsity]
    source: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def grouped(self, by: str) -> list[ModuleSparsity]:
        """The modules, or their sums, by "module", "block" or "modality".

        Raises:
            ValueError: `by` is none of these.
        """
        if by not in GROUPINGS:
            raise ValueError(f"by={by!r} is unknown. Choose one of {', '.join(GROUPINGS)}.")
        if by == "module":
            return self.modules
        groups: dict[str, list[ModuleSparsity]] = {}
        for module in self.modules:
            groups.setdefault(module.block if by == "block" else module.modality, []).append(module)
        return [add_up(name, members, members[0].block, members[0].modality) for name, members in groups.items()]

    @property
    def total(self) -> ModuleSparsity:
        """All modules together."""
        return add_up("total", self.modules, "", "")

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in all modules together."""
        return self.total.sparsity

    def table(self, by: str = "block") -> Table:
        """A printable table with one row per "module", "block" or "modality", and the total."""
        table = Table(title=f"Sparsity by {by}", box=box.SIMPLE_HEAD)
        table.add_column(by)
        named = () if by == "modality" else ("modality",)
        for column in (*named, "weights", "zeros", "sparsity", "pattern"):
            table.add_column(column, justify="left" if column in ("modality", "pattern") else "right")
        for row in [*self.grouped(by), self.total]:
            if row.name == "total":
                table.add_section()
            met = {None: "", True: " met", False: " NOT met"}[row.pattern_met]
            table.add_row(
                row.name,
                *(row.modality for _ in named),
                f"{row.weights:,}",
                f"{row.zeros:,}",
                f"{row.sparsity:.2%}",
                f"{row.pattern or 'several'}{met}" if row.pattern_met is not None else "",
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Total, modalities, blocks and modules as plain JSON values."""

        def plain(rows: Iterable[ModuleSparsity]) -> list[dict[str, Any]]:
            return [{**asdict(row), "sparsity": row.sparsity} for row in rows]

        groups = {f"{by}s" if by != "modality" else "modalities": plain(self.grouped(by)) for by in GROUPINGS}
        return {"source": self.source, "total": plain([self.total])[0], **groups}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path`; the file is whole or not there."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load_json(cls, path: str | os.PathLike[str]) -> SparsityReport:
        """Read what `save_json` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [{key: value for key, value in row.items() if key != "sparsity"} for row in data["modules"]]
        return cls([ModuleSparsity(**{**row, "shape": tuple(row["shape"])}) for row in rows], data["source"])

    def plot(self, path: str | os.PathLike[str], by: str = "block") -> None:
        """Draw the sparsity of each "module", "block" or "modality" as bars, coloured by modality, into an image file.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: `by` is unknown.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Plots need matplotlib: pip install 'peft-variator[plots]'.") from error
        rows = self.grouped(by)
        figure = Figure(figsize=(max(6.0, 0.18 * len(rows) + 2.0), 4.0), layout="constrained")
        axes = figure.add_subplot()
        for modality in dict.fromkeys(row.modality for row in rows):
            places = [index for index, row in enumerate(rows) if row.modality == modality]
            axes.bar(places, [100 * rows[index].sparsity for index in places], label=modality)
        axes.set(ylim=(0, 100), ylabel="zeros (%)", title=f"{self.sparsity:.1%} of the weights are zero")
        axes.set_xlabel({"module": "layer and module", "block": "layer", "modality": "modality"}[by])
        axes.set_xticks(range(len(rows)), [_label(row.name) for row in rows], rotation=90, fontsize=7)
        axes.legend(title="modality")
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=150)


def _label(name: str) -> str:
    """What stands below a bar: the number of the layer, and the last part of a module's name."""
    *parents, last = name.split(".")
    numbers = [part for part in parents if part.isdecimal()]
    return " ".join([*numbers[-1:], last])
