"""One forward call of a stack: which of its tokens are real, which may be merged, and the groups that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from .grouping import Grouping, group_runs, pack, share_blocks, share_patches


__all__ = ["MergeRule", "StackCall", "StackKind"]

StackKind = Literal["encoder", "causal", "vision"]


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


@dataclass
class StackCall:
    """What one forward call of a stack tells about its tokens. Groupings are computed once and shared by all layers.

    Args:
        kind: whether the stack is an encoder, causal, or a vision encoder.
        arguments: the arguments of the call, those of the surrounding models included.
        image_ids: token ids that stand for an image's tokens.
        shifted_labels: whether `labels` are next-token labels (a language-model head) rather than one a token.
        patch_size: edge of a patch in pixels, of vision encoders.
    """

    kind: StackKind
    arguments: Mapping[str, Any]
    image_ids: tuple[int, ...] = ()
    shifted_labels: bool = True
    patch_size: tuple[int, int] | None = None
    pending: dict[str, Any] = field(default_factory=dict)
    _groupings: dict[MergeRule, Grouping] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int] | None:
        """`(batch, length)` of the text in this call; `None` where only the hidden states tell."""
        for name in ("input_ids", "inputs_embeds", "attention_mask"):
            tokens = self.arguments.get(name)
            if isinstance(tokens, Tensor) and tokens.dim() >= 2 and self.kind != "vision":
                return tokens.shape[0], tokens.shape[1]
        return None

    def grouping(self, rule: MergeRule, hidden_states: Tensor) -> Grouping:
        """The groups for one module.

        Args:
            rule: what that module merges.
            hidden_states: its input, shape `(batch, length, dim)` or `(batch * length, dim)`.

        Raises:
            ValueError: the hidden states do not have the length that the call's arguments tell, or nothing tells it.
        """
        if rule not in self._groupings:
            self._groupings[rule] = self._group(rule, self.shape or _shape_of(hidden_states), hidden_states.device)
        grouping = self._groupings[rule]
        if grouping.row_of.numel() * hidden_states.shape[-1] != hidden_states.numel():
            raise ValueError(
                f"A Variator plugin got hidden states of shape {tuple(hidden_states.shape)}, but the call it belongs "
                f"to has {grouping.row_of.numel()} tokens. The feed-forward network has to see the whole sequence: "
                "set `chunk_size_feed_forward=0`, and call it only through the model."
            )
        return grouping

    def _group(self, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Grouping:
        if self.kind == "vision":
            return self._group_patches(rule, shape, device)
        return self._group_text(rule, shape, device)

    def _group_patches(self, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Grouping:
        batch, length = shape
        grid = self._patch_grid(length)
        prefix = rule.keep_first if grid is None else length - grid[0] * grid[1]
        if grid is not None and rule.windows:
            return share_patches(prefix, grid, rule.ratio, batch, device)
        runs = [(count, may_merge) for count, may_merge in ((prefix, False), (length - prefix, True)) if count > 0]
        grouping = share_blocks(runs, rule.ratio, batch, device)
        assert grouping is not None  # two runs never are too many
        return grouping

    def _patch_grid(self, length: int) -> tuple[int, int] | None:
        """Patches of the image, `(height, width)`; `None` where the image's own size does not tell."""
        pixels = self.arguments.get("pixel_values")
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or self.patch_size is None:
            return None
        height, width = pixels.shape[-2] // self.patch_size[0], pixels.shape[-1] // self.patch_size[1]
        return (height, width) if height * width <= length else None

    def _group_text(self, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Grouping:
        real = self._real(shape)
        may_merge, breaks = self._may_merge(rule, real, shape, device), self._breaks(rule, shape, device)
        pattern = may_merge if breaks is None else may_merge.long() + 2 * breaks
        if real is None and bool((pattern == pattern[:1]).all()):
            runs = [(len(list(run)), flag) for flag, run in groupby(may_merge[0].tolist())]
            grouping = share_blocks(runs, rule.ratio, shape[0], device) if breaks is None else None
            if grouping is not None:
                return grouping
        starts_run = ~may_merge if breaks is None else breaks | ~may_merge
        return self._pack(rule, starts_run, may_merge, real)

    @staticmethod
    def _pack(rule: MergeRule, breaks: Tensor, may_merge: Tensor, real: Tensor | None) -> Grouping:
        batch, length = may_merge.shape
        flat_merge, flat_breaks = may_merge.flatten(), breaks.flatten()
        token_of = (
            torch.arange(batch * length, device=breaks.device) if real is None else real.flatten().nonzero().squeeze(1)
        )
        may, row = flat_merge[token_of], token_of // length
        starts_run = flat_breaks[token_of]
        # What follows a token that is not merged, or lies in another sequence, starts anew.
        starts_run[1:] |= ~may[:-1] | (row[1:] != row[:-1])
        starts_run[:1] = True
        return pack(group_runs(starts_run, may, rule.ratio), token_of, rule.ratio, batch * length)

    @property
    def past_length(self) -> int:
        """Number of tokens that the key-value cache of a causal stack holds before this call, padding included."""
        cache = self.arguments.get("past_key_values")
        return 0 if cache is None or self.kind != "causal" else int(cache.get_seq_length())

    def _real(self, shape: tuple[int, int]) -> Tensor | None:
        """Which tokens of this call are no padding, shape `(batch, length)`; `None` where all are real."""
        mask = self.arguments.get("attention_mask")
        if isinstance(mask, Mapping):
            # Models with several kinds of attention take one 4-D mask each; their diagonals agree.
            mask = next((value for value in mask.values() if value is not None), None)
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            raise ValueError(
                f"A Variator plugin cannot read an attention mask of type {type(mask).__name__}"
                f"{f' and shape {tuple(mask.shape)}' if isinstance(mask, Tensor) else ''}. Pass a 2-D mask of shape "
                "(batch, length), or a 4-D one."
            )
        if mask.dim() == 4:
            mask = _mask_diagonal(mask, self.past_length, shape[1])
        real = mask[:, -shape[1] :].bool()
        return None if bool(real.all()) else real.expand(shape)

    def _positions(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """The place of each token among the real ones of its sequence, cached tokens counted in; `(batch, length)`."""
        positions = self._position_ids(shape)
        if positions is not None:
            return positions
        mask = self.arguments.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return (torch.arange(shape[1], device=device) + self.past_length).expand(shape)
        return (mask.long().cumsum(1) - 1)[:, -shape[1] :].expand(shape)

    def _position_ids(self, shape: tuple[int, int]) -> Tensor | None:
        """Position ids of causal models, which start at 0 in every sequence; encoders have offsets of their own."""
        positions = self.arguments.get("position_ids")
        if self.kind != "causal" or not isinstance(positions, Tensor) or positions.dim() != 2:
            return None
        return positions.expand(shape)

    def _may_merge(self, rule: MergeRule, real: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Which tokens may share a row, shape `(batch, length)`."""
        may_merge = self._positions(shape, device) >= rule.keep_first
        may_merge &= ~_last(real, max(rule.keep_last, 0), shape, device)
        ids = self._token_ids(shape)
        if rule.keep_ids and ids is not None:
            may_merge &= ~torch.isin(ids, torch.tensor(rule.keep_ids, device=ids.device))
        if self.image_ids and not (rule.text and rule.images):
            is_image = self._is_image(shape)
            if not rule.text:
                may_merge &= is_image
            if not rule.images:
                may_merge &= ~is_image
        elif not rule.text:
            may_merge &= False
        if self.kind == "causal":
            may_merge &= ~self.used_predictions(real, shape, device)
        return may_merge if real is None else may_merge & real

    def _breaks(self, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Tensor | None:
        """Tokens that start a packed sequence or a stretch of text or image; `None` where there are none."""
        breaks = torch.zeros(shape, dtype=torch.bool, device=device)
        positions = self._position_ids(shape)
        if positions is not None:
            breaks[:, 1:] |= positions[:, 1:] <= positions[:, :-1]
        if self.image_ids and rule.text and rule.images and self._token_ids(shape) is not None:
            is_image = self._is_image(shape)
            breaks[:, 1:] |= is_image[:, 1:] != is_image[:, :-1]
        return breaks if bool(breaks.any()) else None

    def _token_ids(self, shape: tuple[int, int]) -> Tensor | None:
        ids = self.arguments.get("input_ids")
        return ids if isinstance(ids, Tensor) and tuple(ids.shape) == shape else None

    def _is_image(self, shape: tuple[int, int]) -> Tensor:
        ids = self._token_ids(shape)
        if ids is None:
            raise ValueError(
                "compress_text_tokens and compress_image_tokens differ, but this call has no input_ids that tell text "
                "from image tokens. Pass input_ids, or set both fields to the same value."
            )
        return torch.isin(ids, torch.tensor(self.image_ids, device=ids.device))

    def used_predictions(self, real: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Positions of a causal model whose own prediction is used, shape `(batch, length)`.

        They come from `labels` in training (position j - 1 where label j is not -100), else from `logits_to_keep`,
        which generation sets; a plain call uses the prediction of the last real token only.
        """
        used = torch.zeros(shape, dtype=torch.bool, device=device)
        labels, kept_logits = self.arguments.get("labels"), self.arguments.get("logits_to_keep")
        if isinstance(labels, Tensor) and tuple(labels.shape) == shape:
            if self.shifted_labels:
                used[:, :-1] = labels[:, 1:] != -100
            else:
                used |= labels != -100
            return used
        if isinstance(kept_logits, Tensor):
            used[:, kept_logits] = True
        elif kept_logits:
            used[:, -kept_logits:] = True
        return used | _last(real, 1, shape, device)


def _shape_of(hidden_states: Tensor) -> tuple[int, int]:
    if hidden_states.dim() != 3:
        raise ValueError(
            f"A Variator plugin cannot tell which of the hidden states of shape {tuple(hidden_states.shape)} belong "
            "to one sequence: the call has no input_ids, inputs_embeds or attention_mask of shape (batch, length). "
            "Pass one of them to the model, or name the module that takes them in stack_module."
        )
    return hidden_states.shape[0], hidden_states.shape[1]


def _last(real: Tensor | None, count: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The last `count` real tokens of each sequence, shape `(batch, length)`."""
    if real is None:
        return (torch.arange(shape[1], device=device) >= shape[1] - count).expand(shape)
    return real & (real.flip(1).long().cumsum(1).flip(1) <= count)


def _mask_diagonal(mask: Tensor, past_length: int, length: int) -> Tensor:
    """Which tokens are real according to a 4-D mask: those that attend to themselves.

    Args:
        mask: shape `(batch, 1, length, past + length or more)`, boolean, or 0 where attention is allowed.
        past_length: number of cached tokens.
        length: number of tokens in this call.
    """
    own = mask[:, 0, :, past_length : past_length + length].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0
