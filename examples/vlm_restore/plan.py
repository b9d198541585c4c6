"""Which runs the study consists of, the main rows first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


__all__ = ["CONTROL", "METHODS", "RESTORATIONS", "SPLITS", "Run", "plan"]

METHODS = ("magnitude", "wanda", "sparsegpt", "dsnot")
CONTROL = "dense"  # nothing is pruned: what more training alone brings
AMOUNTS = ("2:4", "4:8", "0.5", "0.7")
TOWERS = (("vision",), ("language",), ("vision", "language"))
RESTORATIONS = ("none", "lora", "sparse-lora", "sparse-lora-distilled")
# Sparsity of vision and language, as in the allocation study of He et al. 2024 (arXiv 2404.02424).
SPLITS = ((0.3, 0.7), (0.4, 0.6), (0.5, 0.5), (0.6, 0.4), (0.7, 0.3))
MAIN_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One row.

    Args:
        method: how it is pruned; `CONTROL` for not at all.
        amounts: pairs of modality and amount, a fraction or an n:m pattern as text.
        restoration: what is done after pruning.
        seed: of calibration and training.
    """

    method: str
    amounts: tuple[tuple[str, str], ...]
    restoration: str
    seed: int = 0

    @property
    def name(self) -> str:
        """A name that is fit for a file."""
        amounts = "_".join(f"{tower}-{amount.replace(':', 'of')}" for tower, amount in self.amounts)
        return f"{self.method}_{amounts}_{self.restoration}_seed{self.seed}"

    @property
    def modality_sparsity(self) -> dict[str, float | str]:
        """As `PruningConfig` takes it."""
        return {tower: amount if ":" in amount else float(amount) for tower, amount in self.amounts}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"amounts": dict(self.amounts)}


def _both(amount: str) -> tuple[tuple[str, str], ...]:
    return (("vision", amount), ("language", amount))


def plan() -> list[Run]:
    """Every run, without repetitions."""
    main = [Run("wanda", _both("2:4"), how, seed) for seed in MAIN_SEEDS for how in RESTORATIONS]
    control = [Run(CONTROL, _both("2:4"), "lora", seed) for seed in MAIN_SEEDS]
    methods = [Run(method, _both("2:4"), how) for method in METHODS for how in RESTORATIONS]
    amounts = [
        Run("wanda", tuple((tower, amount) for tower in towers), how)
        for amount in AMOUNTS
        for towers in TOWERS
        for how in RESTORATIONS
    ]
    splits = [
        Run("wanda", (("vision", str(vision)), ("language", str(language))), how)
        for vision, language in SPLITS
        for how in ("none", "sparse-lora-distilled")
    ]
    return list(dict.fromkeys([*main, *control, *methods, *splits, *amounts]))
