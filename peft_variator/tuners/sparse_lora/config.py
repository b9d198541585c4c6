"""Configuration of SparseLoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ...adapter_card import CardContent, hub_id, pipeline_tag, usage_of_config
from ...field_types import check_regex, shown
from ...saved_config import SavedConfig


__all__ = ["SparseLoraConfig"]


@dataclass
class SparseLoraConfig(SavedConfig):
    """LoRA under the mask of a pruned weight: y = x·((W + s·B·A) ⊙ M)ᵀ (He et al. 2024, arXiv 2404.02424).

    Fields that `LoraConfig` has too mean the same here. Not to be confused with MIT's SparseLoRA (arXiv 2506.16500),
    which skips computation while it fine-tunes a dense model.

    Raises:
        ValueError: a field has a value that is not allowed; the message names it and what is.
    """

    method = "SPARSE_LOW_RANK"

    r: int = field(default=8, metadata={"help": "Rank of the update."})
    target_modules: set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (suffixes) of the modules to adapt, a regex that matches them, or 'all-linear'. None means "
            "'all-linear', as in the paper: pruning takes weights from every linear layer of a block, so every one of "
            "them needs its update. Convolutions must be named."
        },
    )
    exclude_modules: set[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) or a regex of modules that are not adapted."}
    )
    lora_alpha: float = field(default=8, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Only 0 is possible: the update is summed into the weight and has no input."}
    )
    bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "Biases to train: none, all, or those of the adapted modules ('lora_only')."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole, e.g. a new classification head."}
    )
    init_lora_weights: bool | Literal["gaussian"] = field(
        default=True,
        metadata={
            "help": "True: A Kaiming-uniform and B zero, so that training starts at the pruned model; 'gaussian': A "
            "normal with deviation 1/r and B zero; False: both random, which only tests need."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt, all if None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that layers_to_transform indexes, e.g. 'layers'."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> rank that differs from r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> alpha that differs from lora_alpha."}
    )
    mask: Literal["weight", "stored"] = field(
        default="weight",
        metadata={
            "help": "Where M comes from. 'weight': the base is pruned, M is where its weight is not 0, and nothing is "
            "stored. 'stored': the base is still dense, `attach_masks` gives M, which is kept and saved with the "
            "adapter at one bit a weight; a disabled adapter is then the dense teacher."
        },
    )
    recompute: bool = field(
        default=True,
        metadata={
            "help": "Rebuild the effective weight in the backward and keep nothing of its size for autograd. False "
            "keeps it: faster where memory allows."
        },
    )
    base_fingerprint: str | None = field(
        default=None,
        metadata={
            "help": "Which of a few fixed places of the adapted weights are not 0; filled in when an adapter with "
            "mask='weight' is made, so that it is not loaded on a base that was pruned in another way."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_use = False  # by an adapter whose base it has the fingerprint of

    def check(self) -> None:
        """Check every field; see [`SavedConfig.check`]."""
        super().check()
        self._check_values()
        self._check_layers()

    def card(self, class_name: str | None) -> CardContent:
        """What the card of an adapter with this configuration says; see [`SavedConfig.card`]."""
        base = self.base_model_name_or_path
        body = _CARD.format(
            base=hub_id(base) or "a pruned model",
            rank=self.r,
            alpha=self.lora_alpha,
            mask="stored with the adapter; the base is dense"
            if self.mask == "stored"
            else "where the base's weights are not 0",
        )
        lines = ["model = model.merge_and_unload(safe_merge=True)  # as sparse as the masks"]
        return CardContent(
            body=body + usage_of_config(self, class_name, lines),
            base=base,
            tags=["peft-variator", "sparse-lora", "pruning", "sparsity"],
            pipeline_tag=pipeline_tag(class_name, self.task_type),
        )

    def _check_values(self) -> None:
        ranks = {f"rank_pattern[{name!r}]": rank for name, rank in self.rank_pattern.items()}
        for name, rank in {"r": self.r, **ranks}.items():
            if rank < 1:
                raise ValueError(f"The rank {name}={rank!r} must be an integer of at least 1.")
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                if not key.strip():
                    raise ValueError(f"{name} has the key {key!r}, which names no module.")
                check_regex(f"{name}, as a key,", key, "(.*\\.)?({})$")
        if self.base_fingerprint is not None and not re.fullmatch("([0-9a-f]{16})+", self.base_fingerprint):
            raise ValueError(
                f"base_fingerprint={shown(self.base_fingerprint)} is none that this package wrote: it has 16 "
                "hexadecimal digits a weight. Leave it out; it is filled in."
            )
        if self.lora_dropout != 0:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r} is not possible with SparseLoRA: LoRA drops elements of the "
                "input of its own branch, but here the update is summed into the weight before the mask is applied: "
                "there is no such branch. Leave it at 0 and use weight decay or the model's own dropout."
            )

    def _check_layers(self) -> None:
        """As in PEFT's LoRA: layer indices need module names to look for them in."""
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str. Pass a list of names.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


_CARD = """# SparseLoRA adapter for {base}

Low-rank updates under the mask of a pruned model (SparseLoRA, [He et al. 2024](https://arxiv.org/abs/2404.02424)),
made with peft-variator. Merged, they leave every pruned weight at zero.

- Rank: {rank}; the update is scaled by {alpha:g} / rank
- Mask: {mask}

"""
