"""Token merging for BERT and MPNet, in the style of ToMe: an own minimal restatement, not its authors' code.

Bolya et al. 2023 (https://arxiv.org/abs/2210.09461): between attention and feed-forward network of each block, tokens
at even places are matched to the most similar ones (by the mean of their keys over heads) at odd places, and the
closest pairs become one token, their mean weighted by how many tokens each stands for; attention adds the logarithm
of that. MPNet looks at how far two tokens are apart: a merged one is where the token at the odd place was.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import BertModel, MPNetModel


__all__ = ["MergingEncoder", "match"]


def match(keys: Tensor, sizes: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are merged.

    Args:
        keys: what similarity is measured by, shape `(batch, length, dim)`.
        sizes: how many tokens each stands for, 0 for padding, shape `(batch, length)`.
        share: of each text's tokens, how many go, at most a half.

    Returns:
        Of the tokens at even places, numbers of those that stay `(batch, stay)` and of those that go `(batch, go)`,
        and for the latter the number of their partner among those at odd places `(batch, go)`.
    """
    keys = normalize(keys, dim=-1)
    real = sizes > 0
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    best, partner = scores.masked_fill(~real[:, None, 1::2], -torch.inf).max(-1)
    mergeable = real[:, ::2] & best.isfinite()
    mergeable[:, 0] = False  # [CLS]
    rank = best.masked_fill(~mergeable, -torch.inf).argsort(-1, descending=True).argsort(-1)
    chosen = mergeable & (rank < (real.sum(1, keepdim=True) * share).long())
    # Padding goes before real tokens that were not chosen: it weighs nothing wherever it goes.
    order = (chosen.long() * 2 + (~real[:, ::2]).long()).argsort(dim=-1, descending=True, stable=True)
    go = int(keys.shape[1] * share)
    return order[:, go:].sort(-1).values, order[:, :go], partner.gather(1, order[:, :go])


class MergingEncoder(nn.Module):
    """A BERT or MPNet encoder that merges tokens, over the weights of a model.

    Args:
        model: the model, which is not changed.
        share: of the tokens that are left, how many go in each block.
    """

    def __init__(self, model: BertModel | MPNetModel, share: float) -> None:
        super().__init__()
        if not 0 <= share <= 0.5:
            raise ValueError(f"share={share} has to be between 0 and 0.5: tokens go in pairs.")
        self.model, self.share, self.config = model, share, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SimpleNamespace:
        """The `last_hidden_state` of every token: that of the token that it became a part of.

        Args:
            input_ids: shape `(batch, length)`.
            attention_mask: 1 for real tokens, in the same shape.
        """
        states = self.model.embeddings(input_ids=input_ids)
        sizes = attention_mask.to(states.dtype)
        origin = torch.arange(input_ids.shape[1]).expand(input_ids.shape)  # where each token is now
        positions = origin  # of the tokens that are left
        for layer in self.model.encoder.layer:
            states, keys = _attend(layer, states, sizes, self._distances(positions))
            stay, go, partner = match(keys, sizes, self.share)
            states, sizes, positions, origin = _merge(states, sizes, positions, origin, stay, go, partner)
            states = layer.output(layer.intermediate(states), states)
        return SimpleNamespace(last_hidden_state=states.gather(1, origin[..., None].expand(-1, -1, states.shape[-1])))

    def _distances(self, positions: Tensor) -> Tensor | float:
        """What attention adds for how far tokens are apart, shape `(batch, heads, length, length)`; 0 for BERT."""
        encoder = self.model.encoder
        if not isinstance(self.model, MPNetModel):
            return 0.0
        buckets = encoder.relative_position_bucket(positions[:, None, :] - positions[:, :, None])
        found: Tensor = encoder.relative_attention_bias(buckets).permute(0, 3, 1, 2)
        return found


def _attend(layer: nn.Module, states: Tensor, sizes: Tensor, distances: Tensor | float) -> tuple[Tensor, Tensor]:
    mpnet = hasattr(layer.attention, "attn")
    attention = layer.attention.attn if mpnet else layer.attention.self
    maps = (attention.q, attention.k, attention.v) if mpnet else (attention.query, attention.key, attention.value)
    heads = attention.num_attention_heads
    query, key, value = (part(states).unflatten(-1, (heads, -1)).transpose(1, 2) for part in maps)
    bias = sizes.clamp(min=0).log()[:, None, None, :] + distances  # −inf for padding
    found = scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
    after = layer.attention.LayerNorm(attention.o(found) + states) if mpnet else layer.attention.output(found, states)
    return after, key.mean(1)


def _merge(
    states: Tensor, sizes: Tensor, positions: Tensor, origin: Tensor, stay: Tensor, go: Tensor, partner: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def rows(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

    even, odd, even_sizes, odd_sizes = states[:, ::2], states[:, 1::2], sizes[:, ::2], sizes[:, 1::2]
    gone_sizes = even_sizes.gather(1, go)
    total = odd_sizes.scatter_add(1, partner, gone_sizes)
    into = partner[..., None].expand(-1, -1, states.shape[-1])
    summed = (odd * odd_sizes[..., None]).scatter_add(1, into, rows(even, go) * gone_sizes[..., None])
    odd = torch.where(total[..., None] > 0, summed / total[..., None].clamp(min=1), odd)
    # New places: those that stay, then those at odd places.
    place = torch.zeros(sizes.shape, dtype=torch.long)
    batch = torch.arange(len(place))[:, None]
    place[batch, 2 * stay] = torch.arange(stay.shape[1])
    place[:, 1::2] = torch.arange(odd.shape[1]) + stay.shape[1]
    place[batch, 2 * go] = partner + stay.shape[1]
    states = torch.cat([rows(even, stay), odd], 1)
    sizes = torch.cat([even_sizes.gather(1, stay), total], 1)
    positions = torch.cat([positions[:, ::2].gather(1, stay), positions[:, 1::2]], 1)
    # Padding last: which tokens of a text are at even places must not hang on it.
    order = (sizes == 0).long().argsort(dim=-1, stable=True)
    moved = order.argsort(-1).gather(1, place).gather(1, origin)
    return rows(states, order), sizes.gather(1, order), positions.gather(1, order), moved
