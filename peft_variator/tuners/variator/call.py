"""One forward call of a stack: which of its tokens are real, which may be merged, and the groups that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .group import group_runs, pack, share_blocks, share_patches
from .grouping import Grouping
from .masks import last_tokens, places, real_tokens, single_mask, text_starts, with_those_before


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
        choices: the plugin and its rule of every module that merges in this call, by the module's name. Later changes
            do not touch them, so that a layer that is computed again in the backward does the same again.
        image_ids: token ids that stand for an image's tokens.
        image_tokens: which tokens stand for an image's, where embeddings take the place of ids; `(batch, length)`.
        shifted_labels: whether `labels` are next-token labels (a language-model head) rather than one a token.
        patch_size: edge of a patch in pixels, of vision encoders.
        past_length: number of tokens that the key-value cache of a causal stack held before the call, padding
            included. It has to be read before the first layer adds to the cache.
    """

    kind: StackKind
    arguments: Mapping[str, Any]
    choices: Mapping[str, tuple[str, MergeRule]]
    image_ids: tuple[int, ...] = ()
    image_tokens: Tensor | None = None
    shifted_labels: bool = True
    patch_size: tuple[int, int] | None = None
    past_length: int = 0
    pending: dict[str, Any] = field(default_factory=dict)
    _groupings: dict[tuple[MergeRule, torch.device], Grouping] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor | None:
        """The argument that tells how many tokens the text in this call has, and the device of the call's masks."""
        if self.kind == "vision":
            return None
        for name, dims in (("input_ids", 2), ("inputs_embeds", 3), ("attention_mask", 2)):
            tokens = self.arguments.get(name)
            if isinstance(tokens, Tensor) and tokens.dim() == dims:
                return tokens
        return None

    @property
    def shape(self) -> tuple[int, int] | None:
        """`(batch, length)` of the text in this call; `None` where only the hidden states tell."""
        tokens = self.tokens
        return None if tokens is None else (tokens.shape[0], tokens.shape[1])

    def prepare(self) -> None:
        """Make the groupings of all modules, if the arguments suffice, so that no layer has to.

        Raises:
            ValueError: a mask cannot be read, or text cannot be told from images.
        """
        if self.tokens is not None:
            for rule in {rule for _, rule in self.choices.values()}:
                self._grouping_on(self.tokens.device, rule, None)

    def grouping(self, rule: MergeRule, hidden_states: Tensor) -> Grouping:
        """The groups for one module.

        Args:
            rule: what that module merges.
            hidden_states: its input, shape `(batch, length, dim)` or `(batch * length, dim)`.

        Raises:
            ValueError: the hidden states do not have the length that the call's arguments tell, or nothing tells it.
        """
        grouping = self._grouping_on(hidden_states.device, rule, hidden_states)
        if grouping.row_of.numel() * hidden_states.shape[-1] != hidden_states.numel():
            raise ValueError(
                f"A Variator plugin got hidden states of shape {tuple(hidden_states.shape)}, but the call it belongs "
                f"to has {grouping.row_of.numel()} tokens. The feed-forward network has to see the whole sequence: "
                "set `chunk_size_feed_forward=0`, and call it only through the model."
            )
        return grouping

    def _grouping_on(self, device: torch.device, rule: MergeRule, hidden_states: Tensor | None) -> Grouping:
        """The grouping on the device of a layer, which need not be that of the arguments."""
        if (rule, device) not in self._groupings:
            tokens = self.tokens
            if tokens is None:
                assert hidden_states is not None  # `prepare` asks only where the arguments suffice
                grouping = self._group(rule, _shape_of(hidden_states), device)
            else:
                grouping = self._group(rule, (tokens.shape[0], tokens.shape[1]), tokens.device)
            self._groupings[rule, device] = _on(device, grouping)
        return self._groupings[rule, device]

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
        mask = single_mask(self.arguments.get("attention_mask"))
        real = real_tokens(mask, shape, self.past_length)
        positions = self.arguments.get("position_ids") if self.kind == "causal" else None
        starts = text_starts(mask, positions, real, shape, self.past_length)
        place = places(mask, real, shape, self.past_length, device)
        if starts is not None:
            place = place - torch.where(starts, place, 0).cummax(1).values
        may_merge = self._may_merge(rule, real, place >= rule.keep_first, shape, device)
        breaks = self._breaks(rule, starts, shape)
        if real is None and breaks is None and shape[0] and bool((may_merge == may_merge[:1]).all()):
            runs = [(len(list(run)), flag) for flag, run in groupby(may_merge[0].tolist())]
            grouping = share_blocks(runs, rule.ratio, shape[0], device)
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
        slots = min(rule.ratio, length)
        return pack(group_runs(starts_run, may, slots), token_of, slots, batch * length)

    def _may_merge(
        self, rule: MergeRule, real: Tensor | None, is_later: Tensor, shape: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Which tokens may share a row, shape `(batch, length)`. `is_later`: those behind `keep_first_tokens`."""
        may_merge = is_later & ~last_tokens(real, rule.keep_last, shape, device)
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
            # The last token of a prompt is the first whose prediction is used: `keep_last_tokens` count from there.
            may_merge &= ~with_those_before(self.used_predictions(real, shape, device), real, rule.keep_last)
        return may_merge if real is None else may_merge & real

    def _breaks(self, rule: MergeRule, starts: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """Tokens that start a packed text or a stretch of text or image; `None` where there are none."""
        breaks = starts
        if self.image_ids and rule.text and rule.images:
            is_image = self._is_image(shape, must_differ=False)
            edges = pad(is_image[:, 1:] != is_image[:, :-1], (1, 0))
            breaks = edges if breaks is None else breaks | edges
        return breaks if breaks is not None and bool(breaks.any()) else None

    def _token_ids(self, shape: tuple[int, int]) -> Tensor | None:
        ids = self.arguments.get("input_ids")
        return ids if isinstance(ids, Tensor) and tuple(ids.shape) == shape else None

    def _is_image(self, shape: tuple[int, int], must_differ: bool = True) -> Tensor:
        """Which tokens belong to an image, shape `(batch, length)`."""
        ids = self._token_ids(shape)
        if ids is not None:
            return torch.isin(ids, torch.tensor(self.image_ids, device=ids.device))
        is_image = self.image_tokens
        if is_image is None or tuple(is_image.shape) != shape or (must_differ and not bool(is_image.any())):
            raise ValueError(
                "A Variator plugin cannot tell text from image tokens: the call has no input_ids, and its "
                "inputs_embeds have no placeholders of an image. Pass input_ids, or set compress_text_tokens and "
                "compress_image_tokens to False."
            )
        return is_image

    def used_predictions(self, real: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Positions of a causal model whose own prediction is used, shape `(batch, length)`.

        They come from the labels in training (position j - 1 where label j is not -100), else from `logits_to_keep`,
        which generation sets; a plain call uses the prediction of the last real token only.
        """
        used = torch.zeros(shape, dtype=torch.bool, device=device)
        labels, kept_logits = self.labels(shape), self.arguments.get("logits_to_keep")
        if labels is not None:
            return labels != -100
        if isinstance(kept_logits, Tensor):
            used[:, kept_logits] = True
        elif kept_logits:
            used[:, -kept_logits:] = True
        return used | last_tokens(real, 1, shape, device)

    def labels(self, shape: tuple[int, int]) -> Tensor | None:
        """What each position is trained to predict, -100 for nothing, `(batch, length)`; `None` without labels."""
        shifted, labels = self.arguments.get("shift_labels"), self.arguments.get("labels")
        if isinstance(shifted, Tensor) and tuple(shifted.shape) == shape:
            return shifted
        if not isinstance(labels, Tensor) or tuple(labels.shape) != shape:
            return None
        return pad(labels[:, 1:], (0, 1), value=-100) if self.shifted_labels else labels

    def uses_every_prediction(self) -> bool:
        """Whether labels leave no token of the call to merge: all real ones but the last of a sequence have one."""
        shape = self.shape
        labels = None if shape is None else self.labels(shape)
        if shape is None or labels is None:
            return False
        real = real_tokens(single_mask(self.arguments.get("attention_mask")), shape, self.past_length)
        is_free = (labels == -100) & ~last_tokens(real, 1, shape, labels.device)
        return not bool((is_free if real is None else is_free & real).any())


def _shape_of(hidden_states: Tensor) -> tuple[int, int]:
    if hidden_states.dim() != 3:
        raise ValueError(
            f"A Variator plugin cannot tell which of the hidden states of shape {tuple(hidden_states.shape)} belong "
            "to one sequence: the call has no input_ids, inputs_embeds or attention_mask of shape (batch, length). "
            "Pass one of them to the model, or name the module that takes them in stack_module."
        )
    return hidden_states.shape[0], hidden_states.shape[1]


def _on(device: torch.device, grouping: Grouping) -> Grouping:
    """The grouping with its index tensors on a device."""
    moved: dict[str, Any] = {
        name: value.to(device)
        for name, value in vars(grouping).items()
        if isinstance(value, Tensor) and value.device != device
    }
    return replace(grouping, **moved) if moved else grouping
