"""Which tokens one module merges, and how many into one."""

from __future__ import annotations

from dataclasses import dataclass

from .config import VariatorConfig


__all__ = ["MergeRule", "rule_of"]


@dataclass(frozen=True)
class MergeRule:
    """The fields of a `VariatorConfig` that decide which tokens are merged, for one module.

    Args:
        ratio: the compression ratio k.
        keep_first: number of tokens at the start of a sequence that are not merged.
        keep_last: number of tokens at the end of a sequence that are not merged.
        keep_ids: token ids that are not merged.
        windows: whether image patches are grouped in windows rather than in reading order.
        text: whether text tokens are merged.
        images: whether image tokens among the text are merged.
    """

    ratio: int
    keep_first: int = 1
    keep_last: int = 1
    keep_ids: tuple[int, ...] = ()
    windows: bool = True
    text: bool = True
    images: bool = True


def rule_of(config: VariatorConfig, module_name: str) -> MergeRule:
    """What a configuration says about one module, by the module's full name in the base model."""
    return MergeRule(
        ratio=config.ratio_of(module_name),
        keep_first=config.keep_first_tokens,
        keep_last=config.keep_last_tokens,
        keep_ids=tuple(config.keep_token_ids),
        windows=config.patch_grouping == "window",
        text=config.compress_text_tokens,
        images=config.compress_image_tokens,
    )
