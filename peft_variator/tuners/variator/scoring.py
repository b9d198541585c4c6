"""How the members of a group are weighted: one class a scoring, chosen by `VariatorConfig(scoring=…)`.

To add one, write a subclass of [`Scoring`] here with a `name`, and add it to `SCORINGS`: the configuration takes it
by that name.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...field_types import ENTRIES_LIMIT
from ...triton_support import runs_triton
from .fused import merge_rows
from .linear_maps import FloatLinear
from .merging import Groups, MemberScores, Part


__all__ = ["SCORINGS", "ConcatScoring", "Scoring", "TokenScoring"]


class Scoring:
    """Gives every member of a group a score; their softmax inside the group weights the mean.

    Its weights are one [`FloatLinear`] a plugin, `variator_scorer`.
    """

    name: ClassVar[str]
    serves_any_ratio: ClassVar[bool]
    """Whether the weights serve every compression ratio, or only the one that they were made for."""

    def create(self, dim: int, ratio: int) -> FloatLinear:
        """The weights of a plugin.

        Args:
            dim: d, width of the hidden states.
            ratio: k, the compression ratio of the layer.
        """
        raise NotImplementedError

    def score(self, scorer: FloatLinear, tokens: Tensor) -> MemberScores:
        """A function that gives the scores of the members of a part's groups.

        Args:
            scorer: what `create` made.
            tokens: hidden states, shape `(batch, length, d)`.
        """
        raise NotImplementedError

    def merge(self, scorer: FloatLinear, tokens: Tensor, groups: Groups) -> Tensor:
        """The weighted mean of each group by these scores; see `Groups.merge`."""
        return groups.merge(tokens, self.score(scorer, tokens))


class TokenScoring(Scoring):
    """One score for each token, Linear(d → 1): the weights do not depend on k, so one plugin serves every k."""

    name = "token"
    serves_any_ratio = True

    def create(self, dim: int, ratio: int) -> FloatLinear:
        return FloatLinear(dim, 1, bias=False)

    def score(self, scorer: FloatLinear, tokens: Tensor) -> MemberScores:
        scores = _in_range(tokens, scorer.weight)
        return lambda part: part.scores(scores)

    def merge(self, scorer: FloatLinear, tokens: Tensor, groups: Groups) -> Tensor:
        if groups.merges and runs_triton(tokens):
            return merge_rows(tokens, scorer.weight, groups)
        return super().merge(scorer, tokens, groups)


class ConcatScoring(Scoring):
    """The paper's: Linear(k·d → k) on the concatenated members of a group (Xiao et al. 2023, section 3.2).

    A group that is not full has its missing members at 0.
    """

    name = "concat"
    serves_any_ratio = False

    def create(self, dim: int, ratio: int) -> FloatLinear:
        entries = ratio * ratio * dim
        if entries > ENTRIES_LIMIT:
            raise ValueError(
                f"compression_ratio={ratio} takes {entries:,} numbers in every module with scoring='concat', whose "
                "map grows with its square. Choose a smaller one, or scoring='token', which does not depend on it."
            )
        return FloatLinear(ratio * dim, ratio)

    def score(self, scorer: FloatLinear, tokens: Tensor) -> MemberScores:
        # One map for each place in a group, contiguous: what a product gives must not hang on where its weights lie.
        maps = scorer.weight.unflatten(1, (-1, tokens.shape[-1])).transpose(0, 1).contiguous()

        def score_members(part: Part) -> Tensor:
            members = part.members(tokens)
            logits = scorer.bias.to(members[0].dtype)
            for member, weight in zip(members, maps, strict=False):  # no sequence may be long enough to fill a group
                logits = logits + _in_range(member, weight)
            return logits[..., : len(members)]

        return score_members


SCORINGS: dict[str, Scoring] = {scoring.name: scoring() for scoring in (TokenScoring, ConcatScoring)}
"""All scorings by the name that `VariatorConfig` takes."""


def _in_range(inputs: Tensor, weight: Tensor) -> Tensor:
    """`inputs @ weight.T` in the dtype of the inputs, but in single precision where half could overflow."""
    if not _computes_in_half(inputs):
        return linear(inputs, weight.to(inputs.dtype))
    # A score beyond 65,504 would be inf, and its group NaN.
    with torch.autocast(inputs.device.type, enabled=False):
        return linear(inputs.float(), weight.float())


def _computes_in_half(inputs: Tensor) -> bool:
    kind = inputs.device.type
    return inputs.dtype == torch.float16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    )
