"""Which tokens of a call share a row: from what the call tells and the rule of a module to groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import ModelOutput

from .attention_mask import (
    CUMULATIVE_LENGTHS,
    TokenOrder,
    check_borders,
    count_before,
    real_tokens,
    shifted,
    single_mask,
    text_starts,
    token_ranks,
    with_those_before,
)
from .config import VariatorConfig
from .forward_context import CallFacts, used_predictions
from .merging import Block, BoundedGroups, Groups, PackedGroups, SharedGroups
from .outliers import Share, choose_outliers, count_outliers, share_of


__all__ = ["MergeRule", "StackGroups", "rule_of"]

# More pieces than this are cheaper to gather than to walk through one by one.
MAX_BLOCKS = 8
# As many token ids are compared one by one, which needs no copy of them on the device.
MAX_COMPARISONS = 16


class MergeRule(NamedTuple):
    """The fields of a `VariatorConfig` that decide which tokens are merged, for one module.

    Args:
        ratio: the compression ratio k.
        keep_first: number of tokens at the start of a text that are not merged.
        keep_last: number of tokens at the end of a text that are not merged.
        keep_ids: token ids that are not merged.
        windows: whether image patches are grouped in windows rather than in reading order.
        text: whether text tokens are merged.
        images: whether image tokens among the text are merged.
        max_kept: K, for which number of tokens a sequence that are not merged there is room in compiled code.
        outliers: share of a text's tokens that a probe keeps from being merged.
        min_tokens: how many tokens a call needs, padding included, to have any merged.
    """

    ratio: int
    keep_first: int = 1
    keep_last: int = 1
    keep_ids: tuple[int, ...] = ()
    windows: bool = True
    text: bool = True
    images: bool = True
    max_kept: int = 4
    outliers: Share | None = None
    min_tokens: int = 0


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
        max_kept=config.max_kept_tokens,
        outliers=None if config.keep_outliers is None else share_of(config.keep_outliers),
    )


class StackGroups:
    """The groups of one forward call of a stack, computed once for each rule and shared by all layers.

    Args:
        facts: what the call tells about its tokens.
        choices: the plugin and its rule of every module that merges in this call, by the module's name. Later changes
            do not touch them, so that a layer that is computed again in the backward does the same again.
        has_mask: whether the stack was called with a mask.
    """

    def __init__(self, facts: CallFacts, choices: Mapping[str, tuple[str, MergeRule]], has_mask: bool = False) -> None:
        self.facts, self.has_mask = facts, has_mask
        self.tokens = None if facts.shape is None else math.prod(facts.shape)
        """How many tokens the call has, padding included; `None`: no module has told yet."""
        self.choices = {name: choice for name, choice in choices.items() if self._has_enough(choice[1])}
        self.pending: dict[str, Any] = {}
        """What the start of a network leaves for its end, by the name of the module where it starts."""
        self.rows_inside: list[tuple[Tensor, Callable[[], Tensor]]] | None = []
        """Hidden states inside of spans, which hold a vector for a group, each with what makes those of tokens; `None`
        once the stack is done: its output keeps the call for the backward, and would be kept by it in turn."""
        self._groups: dict[tuple[MergeRule, str | None, torch.device], Groups] = {}
        self._outlier_scores: dict[str, Tensor] = {}
        """What tells the outliers of a call, by plugin: found out by the first of its layers that runs."""

    def prepare(self) -> None:
        """Make the groups of all modules, if the arguments suffice, so that no layer has to.

        Raises:
            ValueError: a mask or a border cannot be read, or text cannot be told from images.
        """
        if self.facts.tokens is not None:
            device = self.facts.tokens.device
            shape = self._shape_of(None)
            check_borders(self.facts.arguments, shape, read_values=not _shapes_must_not_depend_on_values(device))
            for _, rule in self.choices.values():
                if rule.outliers is None:  # they are told by hidden states
                    self._on(device, rule, None, shape)

    def _has_enough(self, rule: MergeRule) -> bool:
        return self.tokens is None or rule.min_tokens == 0 or self.tokens >= rule.min_tokens

    def choice_of(self, name: str, vectors: Tensor) -> tuple[str, MergeRule] | None:
        """The plugin of a module and its rule; `None`: nothing is merged there in this call.

        Args:
            name: of the module where a network or a span starts, or around whose maps the updates of its plugin are.
            vectors: what comes to it or to a map, shape `(…, dim)`: the first that the call reaches are its tokens.
        """
        choice = self.choices.get(name)
        if choice is None or choice[1].min_tokens == 0:
            return choice
        if self.tokens is None:  # of patches and frames no argument tells how many there are
            self.tokens = math.prod(vectors.shape[:-1])
        return choice if self._has_enough(choice[1]) else None

    def note_rows(self, rows: Tensor, of_tokens: Callable[[], Tensor]) -> None:
        """Note hidden states of groups, which the model may hand out, and what makes those of tokens of them."""
        if self.rows_inside is not None:
            self.rows_inside.append((rows, of_tokens))

    def end(self, output: Any) -> Any:
        """The output of the stack, in which all hidden states are those of tokens.

        Args:
            output: a tensor, or a `ModelOutput` or tuple that may hold hidden states of layers inside of spans.
        """
        inside, self.rows_inside = self.rows_inside, None
        return _with_tokens(output, inside) if inside else output

    def merges_nothing(self) -> bool:
        """Whether no module found tokens to merge, as far as groups are made."""
        return not any(groups.merges for groups in self._groups.values())

    def of(
        self,
        rule: MergeRule,
        hidden_states: Tensor,
        plugin: str = "",
        probe: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Groups:
        """The groups for one module.

        Args:
            rule: what that module merges.
            hidden_states: its input, shape `(batch, length, dim)` or `(batch * length, dim)`.
            plugin: name of its plugin.
            probe: gives for a plugin each of the hidden states a score that tells outliers. It is asked of the first
                module of the plugin that the call reaches, if the rule keeps any.

        Raises:
            ValueError: the hidden states do not have the shape that the call's arguments tell, or nothing tells it.
        """
        shape = self._shape_of(hidden_states)
        if rule.outliers is None:
            groups = self._on(hidden_states.device, rule, None, shape)
            _check_shape(hidden_states, shape, groups.row_of.shape[0])
            return groups
        _check_shape(hidden_states, shape, shape[0] * shape[1])
        if plugin not in self._outlier_scores:
            assert probe is not None  # of a layer whose rule keeps outliers
            self._outlier_scores[plugin] = probe(plugin, hidden_states).view(shape)
        return self._on(hidden_states.device, rule, plugin, shape)

    def _shape_of(self, hidden_states: Tensor | None) -> tuple[int, int]:
        """`(batch, length)` of the tokens, by the arguments of the call or else by hidden states."""
        shape = self.facts.shape
        if shape is None:
            assert hidden_states is not None  # `prepare` asks only where the arguments suffice
            return _shape_of(hidden_states)
        return shape

    def _on(self, device: torch.device, rule: MergeRule, plugin: str | None, shape: tuple[int, int]) -> Groups:
        """The groups on the device of a layer, which need not be that of the arguments; outliers by a probe."""
        if (rule, plugin, device) not in self._groups:
            tokens = self.facts.tokens
            at = device if tokens is None else tokens.device
            if plugin is None:
                groups = _GROUPINGS[self.facts.kind](self.facts, rule, shape, at)
            else:
                groups = group_text(self.facts, rule, shape, at, self._outlier_scores[plugin].to(at))
            self._groups[rule, plugin, device] = _moved(groups, device)
        return self._groups[rule, plugin, device]


def _with_tokens(output: Any, inside: list[tuple[Tensor, Callable[[], Tensor]]]) -> Any:
    """An output of the model with hidden states of tokens in place of those of groups."""
    if isinstance(output, Tensor):
        return next((of_tokens() for rows, of_tokens in inside if rows is output), output)
    if isinstance(output, ModelOutput):
        for key, value in list(output.items()):
            output[key] = _with_tokens(value, inside)
        return output
    return tuple(_with_tokens(each, inside) for each in output) if isinstance(output, tuple) else output


def _check_shape(hidden_states: Tensor, shape: tuple[int, int], tokens: int) -> None:
    """Raise if hidden states are not those of `tokens` tokens of shape `(batch, length)`."""
    fits = tokens * hidden_states.shape[-1] == hidden_states.numel()
    # Several rows of hidden states are the sequences; one row may hold all of them, one after the other.
    if fits and hidden_states.dim() == 3 and hidden_states.shape[0] != 1:
        fits = tuple(hidden_states.shape[:2]) == shape
    if not fits:
        raise ValueError(
            f"A Variator plugin got hidden states of shape {tuple(hidden_states.shape)}, but the call it belongs "
            f"to has tokens of shape (batch, length) = {shape}. A feed-forward network has to see whole "
            "sequences, batch first: set chunk_size_feed_forward=0 where the model has it. A model that pads or "
            "turns its hidden states inside, as Longformer and XLNet do, cannot take a plugin."
        )


def _shape_of(hidden_states: Tensor) -> tuple[int, int]:
    if hidden_states.dim() != 3:
        raise ValueError(
            f"A Variator plugin cannot tell which of the hidden states of shape {tuple(hidden_states.shape)} belong "
            "to one sequence: the call has no input_ids, inputs_embeds or attention_mask of shape (batch, length). "
            "Pass one of them to the model, or name the module that takes them in stack_module."
        )
    return hidden_states.shape[0], hidden_states.shape[1]


def _moved(groups: Groups, device: torch.device) -> Groups:
    """The groups with their index tensors on a device."""
    moved: dict[str, Any] = {
        name: _to(value, device)
        for name, value in vars(groups).items()
        if isinstance(value, Tensor) and value.device != device
    }
    return replace(groups, **moved) if moved else groups


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device; one to a GPU does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# Text


class MergeFlags(NamedTuple):
    """What decides the groups of a text, each of shape `(batch, length)`.

    Args:
        may_merge: which tokens may share a row.
        real: which tokens are no padding, or are used though they are; `None`: all.
        breaks: which tokens must not share a row with the one before them; `None`: no more than `may_merge` says.
    """

    may_merge: Tensor
    real: Tensor | None
    breaks: Tensor | None


def group_text(
    facts: CallFacts,
    rule: MergeRule,
    shape: tuple[int, int],
    device: torch.device,
    outlier_scores: Tensor | None = None,
) -> Groups:
    """The groups of the tokens of a text: shared by all sequences where they look alike, else packed.

    `outlier_scores` has one for each token, shape `(batch, length)`, where the rule keeps outliers.
    """
    if _shapes_must_not_depend_on_values(device):
        # The last place, where it is read, needs a row beside those that the rule keeps.
        room = rule._replace(max_kept=rule.max_kept + 1) if facts.reads_last_place else rule
        return bound(merge_flags(facts, rule, shape, device, outlier_scores), room, _number_of_texts(facts))
    if outlier_scores is None and not _depends_on_values(facts, rule):
        device = torch.device("cpu")
    return arrange(merge_flags(facts, rule, shape, device, outlier_scores), rule.ratio)


def _shapes_must_not_depend_on_values(device: torch.device) -> bool:
    """Whether this call is being compiled, exported, traced or captured."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _depends_on_values(facts: CallFacts, rule: MergeRule) -> bool:
    """Whether the groups depend on more than the shape of the call."""
    positions_alone = {"input_ids", "inputs_embeds", "past_key_values", "output_router_logits", "logits_to_keep"}
    return not (
        facts.arguments.keys() <= positions_alone
        and not rule.keep_ids
        and not facts.image_ids
        and facts.pooled_pad_id is None
        and isinstance(facts.past_length, int)
        and not isinstance(facts.arguments.get("logits_to_keep"), Tensor)
    )


def merge_flags(
    facts: CallFacts,
    rule: MergeRule,
    shape: tuple[int, int],
    device: torch.device,
    outlier_scores: Tensor | None = None,
) -> MergeFlags:
    """What decides the groups of a text; see [`group_text`] for the arguments. Looks at no value on the host."""
    mask = single_mask(facts.arguments.get("attention_mask"))
    real = real_tokens(mask, shape, facts.past_length)
    # transformers' causal models take positions that jump for another text where no mask and no cache is given.
    jumps = facts.kind == "causal" and mask is None and isinstance(facts.past_length, int) and facts.past_length == 0
    starts = text_starts(facts.arguments, mask, real, shape, facts.past_length, gaps=jumps)
    order = TokenOrder(real, starts, token_ranks(mask, real, shape, facts.past_length, device))
    may_merge = (order.from_start >= rule.keep_first) & ~order.last(rule.keep_last)
    ids = facts.token_ids(shape)
    if rule.keep_ids and ids is not None:
        may_merge = may_merge & ~_is_any(ids, rule.keep_ids)
    breaks = starts
    if facts.image_ids and rule.text != rule.images:
        is_image = _is_image(facts, shape)
        may_merge = may_merge & (is_image if rule.images else ~is_image)
    elif not rule.text:
        may_merge = may_merge & torch.zeros_like(may_merge)
    elif facts.image_ids:
        is_image = _is_image(facts, shape, must_differ=False)
        edges = is_image != shifted(is_image, False)
        breaks = edges if breaks is None else breaks | edges
    if facts.kind == "causal":
        # The last token of a prompt is the first whose prediction is used: `keep_last_tokens` count from there.
        may_merge = may_merge & ~with_those_before(
            used_predictions(facts, order, shape, device), order, rule.keep_last
        )
    may_merge = may_merge if real is None else may_merge & real
    if facts.reads_last_place:
        may_merge = may_merge & ~_is_last_place(shape, may_merge.device)
    if rule.outliers is not None and outlier_scores is not None:
        may_merge = may_merge & ~choose_outliers(outlier_scores, may_merge, real, starts, rule.outliers)
    if facts.reads_last_place and real is not None:
        # Only now: where a text ends, and how many outliers it has, is told by its own tokens.
        real = real | _is_last_place(shape, real.device)
    return MergeFlags(may_merge, real, breaks)


def _is_last_place(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Which place is the last of a row, shape `(length,)`."""
    return torch.arange(shape[1], device=device) == shape[1] - 1


def _is_any(ids: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Which ids are among the wanted ones."""
    if len(wanted) > MAX_COMPARISONS:
        return torch.isin(ids, torch.tensor(wanted, device=ids.device))
    found = ids == wanted[0]
    for token_id in wanted[1:]:
        found = found | (ids == token_id)
    return found


def _is_image(facts: CallFacts, shape: tuple[int, int], must_differ: bool = True) -> Tensor:
    """Which tokens belong to an image, shape `(batch, length)`."""
    ids = facts.token_ids(shape)
    if ids is not None:
        return _is_any(ids, facts.image_ids)
    is_image = facts.image_tokens
    if is_image is None or tuple(is_image.shape) != shape or (must_differ and not bool(is_image.any())):
        raise ValueError(
            "A Variator plugin cannot tell text from image tokens: the call has no input_ids, and its "
            "inputs_embeds have no placeholders of an image. Pass input_ids, or set compress_text_tokens and "
            "compress_image_tokens to False."
        )
    return is_image


def arrange(flags: MergeFlags, ratio: int) -> Groups:
    """The groups that flags decide, worked out on the host from one copy of them."""
    (may_merge, real, breaks), device = _on_host(flags), flags.may_merge.device
    batch, length = may_merge.shape
    if real is not None and real.all():
        real = None
    if breaks is not None and not breaks[:, 1:].any():
        breaks = None
    if real is None and breaks is None and may_merge.size and (may_merge == may_merge[:1]).all():
        blocks, position = [], 0
        for may, run in groupby(may_merge[0].tolist()):
            tokens = len(list(run))
            blocks += text_blocks(position, tokens, ratio) if may else [Block(position, (tokens, 1))]
            position += tokens
        if len(blocks) <= MAX_BLOCKS:
            return SharedGroups.of(blocks, batch, device)
    token_of = np.arange(batch * length) if real is None else np.flatnonzero(real)
    may, sequence = may_merge.ravel()[token_of], token_of // max(length, 1)
    starts_run = ~may if breaks is None else ~may | breaks.ravel()[token_of]
    # What follows a token that is not merged, or lies in another sequence, starts anew.
    starts_run[1:] |= ~may[:-1] | (sequence[1:] != sequence[:-1])
    starts_run[:1] = True
    slots = max(min(ratio, length), 1)
    position_of = np.arange(token_of.size)
    run_start = np.maximum.accumulate(np.where(starts_run, position_of, 0))
    group_of = np.cumsum(starts_run | ((position_of - run_start) % slots == 0)) - 1
    return packed_groups(group_of, token_of, slots, batch * length, device)


def _on_host(flags: MergeFlags) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """The flags as arrays, by one copy from their device."""
    told = [flag for flag in flags if flag is not None]
    if flags.may_merge.device.type == "cpu":
        copied = [flag.numpy() for flag in told]
    else:
        copied = list(torch.stack(told).cpu().numpy())
    found = iter(copied)
    may_merge, real, breaks = (None if flag is None else next(found) for flag in flags)
    assert may_merge is not None  # never left out of the flags
    return may_merge, real, breaks


def text_blocks(start: int, length: int, ratio: int) -> list[Block]:
    """Blocks of a run of `length` tokens that may be merged: full groups, then what is left over as a smaller one."""
    full, rest = divmod(length, ratio)
    blocks = [Block(start, (full, ratio))] if full else []
    return [*blocks, Block(start + full * ratio, (1, rest))] if rest else blocks


def packed_groups(
    group_of: NDArray[np.int64], token_of: NDArray[np.int64], ratio: int, num_tokens: int, device: torch.device
) -> PackedGroups:
    """The groups of packed tokens, from the number of each one's group, which count from 0 without gaps.

    `group_of` and `token_of`, its number in the flattened batch, are `(tokens,)`; `num_tokens` counts padding in.
    """
    sizes = np.bincount(group_of)
    is_merged = sizes > 1
    num_merged = int(is_merged.sum())
    # Merged groups are numbered before single tokens, so that the former are one slice of the rows.
    row = np.where(is_merged, np.cumsum(is_merged) - 1, num_merged + np.cumsum(~is_merged) - 1)[group_of]
    order = np.argsort(row, kind="stable")
    merged, singles = np.split(order, [int(sizes[is_merged].sum())])
    # Slots: the place of each token among the members of its row.
    rows, tokens = row[merged], token_of[merged]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    slot = np.arange(rows.size) - np.repeat(starts, np.diff(starts, append=rows.size))
    members = np.repeat(tokens[starts][:, None], ratio, axis=1)
    members[rows, slot] = tokens
    is_member = np.zeros((num_merged, ratio), dtype=bool)
    is_member[rows, slot] = True
    row_of = np.full(num_tokens, sizes.size, dtype=np.int64)
    row_of[token_of] = row
    return PackedGroups(
        num_rows=int(sizes.size),
        row_of=_tensor(row_of, device),
        is_merged=_tensor((row_of < num_merged)[:, None], device),
        all_real=num_tokens == token_of.size,
        member_of=_tensor(members, device),
        is_member=_tensor(is_member, device),
        singles=_tensor(token_of[singles], device),
        others=_tensor(np.flatnonzero(row_of >= num_merged), device),
        merged=_tensor(tokens, device),
    )


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    return _to(torch.from_numpy(array), device)


# Sound


def group_frames(facts: CallFacts, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Groups:
    """The groups of the frames of sound: like words of a text, but without ids and without any that are special."""
    return group_text(facts, rule._replace(keep_first=0, keep_last=0, keep_ids=(), text=True), shape, device)


# Text in compiled code


def _number_of_texts(facts: CallFacts) -> int:
    """How many texts a row holds at most, as far as shapes tell."""
    lengths = [facts.arguments[name] for name in CUMULATIVE_LENGTHS if name in facts.arguments]
    return max(lengths[0].shape[0] - 1, 1) if lengths else 1


def bound(flags: MergeFlags, rule: MergeRule, texts: int) -> BoundedGroups:
    """The groups that flags decide, in a layout whose shapes depend on the shape of the flags alone.

    Each of up to K tokens that are not merged has a row and may split a group in two, and each border between texts
    splits one more: ⌈length / k⌉ + 2K + 1 rows, and 2K + 1 for every further text. Further tokens at the ends of a
    text that the rule keeps split nothing more, so beside the first of either end each has a row. An input that needs
    more stops with an index out of range. Each outlier has a row, takes one token from the groups and may split one in
    two, which is 2 − 2/k rows more.

    Args:
        flags: what decides the groups.
        rule: what the module merges.
        texts: how many texts a row holds at most.
    """
    may_merge, real, breaks = flags
    length, ratio = may_merge.shape[1], rule.ratio
    at_ends = max(rule.keep_first - 1, 0) + max(rule.keep_last - 1, 0)
    rows = (length + ratio - 1) // ratio + (2 * rule.max_kept + 1 + at_ends) * texts
    if rule.outliers is not None:
        outliers = count_outliers(length, rule.outliers) + texts - 1  # of each text by itself they are rounded up
        rows = rows + (outliers * (2 * ratio - 2) + ratio - 1) // ratio
    present = torch.ones_like(may_merge) if real is None else real
    alone = present & ~may_merge
    # Numbers that grow wherever a run ends: at a token by itself, behind it, and where texts or images start.
    ends = alone if breaks is None else alone | (present & breaks)
    behind = alone.long().cumsum(1) - alone.long()
    run = ends.long().cumsum(1) + behind
    rank = present.long().cumsum(1) - 1
    before, _ = count_before(run, present.long(), 2 * length + 1)
    slot = (rank - before) % ratio
    row = (present & (slot == 0)).long().cumsum(1) - 1
    return BoundedGroups.of(row, slot, real, rows, ratio)


# Images


def group_patches(facts: CallFacts, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Groups:
    """The groups of a vision encoder's tokens; patches follow a prefix of other tokens."""
    mask = facts.arguments.get("pixel_attention_mask")
    if isinstance(mask, Tensor) and tuple(mask.shape) == shape:
        # Of images of several shapes, each a row of patches and padding.
        return group_frames(CallFacts("encoder", {"attention_mask": mask}), rule, shape, device)
    batch, length = shape
    real = facts.arguments.get("patch_attention_mask")
    if isinstance(real, Tensor) and real.dim() == 3 and (real.shape[0], real[0].numel()) == shape:
        # Of images of several shapes, each filled up to the largest height and width.
        compiles = _shapes_must_not_depend_on_values(device)
        if compiles or not bool(real.all()):
            if rule.windows:
                return group_padded_windows(real.bool(), rule.ratio, device)
            return group_frames(CallFacts("encoder", {"attention_mask": real.flatten(1)}), rule, shape, device)
    grid = _patch_grid(facts, length)
    prefix = rule.keep_first if grid is None else length - grid[0] * grid[1]
    if grid is not None and rule.windows:
        return group_windows(prefix, grid, rule.ratio, batch, device)
    first = [Block(0, (min(prefix, length), 1))] if prefix else []
    return SharedGroups.of([*first, *text_blocks(prefix, max(length - prefix, 0), rule.ratio)], batch, device)


def group_windows(
    prefix: int, grid: tuple[int, int], ratio: int, batch: int, device: torch.device
) -> SharedGroups | PackedGroups:
    """The groups of image patches in windows; windows at the right and lower edge may be cut off.

    `grid` is the patches as (height, width); `prefix` tokens before them (class token, registers) are never merged.
    """
    (height, width), (tall, wide) = grid, window_of(ratio)
    if height % tall == 0 and width % wide == 0:
        blocks = [Block(0, (prefix, 1))] if prefix else []
        blocks.append(Block(prefix, (height // tall, tall, width // wide, wide)))
        return SharedGroups.of(blocks, batch, device)
    if _shapes_must_not_depend_on_values(device):
        return bound_windows(prefix, grid, ratio, batch, device)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    windows = (rows // tall * -(-width // wide) + columns // wide).ravel() + prefix
    group_of = np.concatenate([np.arange(prefix), windows])
    offsets = np.arange(batch)[:, None] * (group_of.max() + 1)
    tokens = np.arange(group_of.size * batch)
    return packed_groups((group_of + offsets).ravel(), tokens, ratio, tokens.size, device)


def bound_windows(prefix: int, grid: tuple[int, int], ratio: int, batch: int, device: torch.device) -> BoundedGroups:
    """The groups of [`group_windows`] by operations that compilers follow; there is exactly a row for each of them."""
    (height, width), (tall, wide) = grid, window_of(ratio)
    y, x = torch.arange(height, device=device).view(-1, 1), torch.arange(width, device=device)
    windows_across = (width + wide - 1) // wide
    rows = prefix + (height + tall - 1) // tall * windows_across
    row = (y // tall * windows_across + x // wide).flatten() + prefix
    # Places in a window count on from patch to patch, in one that is cut off at the right too.
    slot = (y % tall * (width - x // wide * wide).clamp(max=wide) + x % wide).flatten()
    first = torch.arange(prefix, device=device)
    row, slot = torch.cat([first, row]), torch.cat([torch.zeros_like(first), slot])
    return BoundedGroups.of(row.expand(batch, -1), slot.expand(batch, -1), None, rows, ratio)


def group_padded_windows(real: Tensor, ratio: int, device: torch.device) -> PackedGroups:
    """The groups of the real patches in windows, so that an image has those that it has without padding.

    `real` tells which patches are no padding, bool of shape `(batch, height, width)`.
    """
    (batch, height, width), (tall, wide) = real.shape, window_of(ratio)
    down, across = (height + tall - 1) // tall, (width + wide - 1) // wide
    if not _shapes_must_not_depend_on_values(device):
        rows, columns = np.arange(height)[:, None], np.arange(width)
        windows = (rows // tall * across + columns // wide).ravel()
        token_of = np.flatnonzero(real.cpu().numpy())
        sequence, patch = np.divmod(token_of, windows.size)
        # Windows of padding alone are no groups.
        _, group_of = np.unique(sequence * (down * across) + windows[patch], return_inverse=True)
        return packed_groups(group_of, token_of, ratio, real.numel(), device)
    y, x = torch.arange(height, device=device).view(-1, 1), torch.arange(width, device=device)
    row = (y // tall * across + x // wide).flatten().expand(batch, -1)
    # Places in a window count its real patches, which need not be the first.
    filled = pad(real.long(), (0, across * wide - width, 0, down * tall - height))
    filled = filled.view(batch, down, tall, across, wide).transpose(2, 3)
    slot = (filled.flatten(3).cumsum(3).view_as(filled) - filled).transpose(2, 3)
    slot = slot.reshape(batch, down * tall, across * wide)[:, :height, :width].flatten(1)
    return BoundedGroups.of(row, slot, real.flatten(1), down * across, ratio)


def window_of(ratio: int) -> tuple[int, int]:
    """The most nearly square window of `ratio` patches, as `(height, width)` with `height <= width`."""
    height = max(divisor for divisor in range(1, int(ratio**0.5) + 1) if ratio % divisor == 0)
    return height, ratio // height


def _patch_grid(facts: CallFacts, length: int) -> tuple[int, int] | None:
    """Patches of the image, `(height, width)`; `None` where the image's own size does not tell."""
    pixels = facts.arguments.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or facts.patch_size is None:
        return None
    height, width = pixels.shape[-2] // facts.patch_size[0], pixels.shape[-1] // facts.patch_size[1]
    return (height, width) if height * width <= length else None


_GROUPINGS = {"encoder": group_text, "causal": group_text, "vision": group_patches, "audio": group_frames}
