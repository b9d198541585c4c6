"""Token merging for DINOv2, in the style of ToMe: an own minimal restatement, not its authors' code.

Bolya et al. 2023 (https://arxiv.org/abs/2210.09461): between attention and feed-forward network of each block, every
second patch is matched to the most similar one (by the mean of the keys over heads) of the others, and the closest r
pairs become one token each, their mean weighted by how many patches each stands for; attention adds the logarithm of
that (section 3, "proportional attention"). The class token is never merged.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import Dinov2Model


__all__ = ["MergingViT", "merge_patches"]


def merge_patches(states: Tensor, keys: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge the r closest pairs of tokens, as far as there are pairs.

    Args:
        states: `(batch, length, dim)`, the class token first.
        keys: what similarity is measured by, `(batch, length, dim)`.
        sizes: how many patches each token stands for, `(batch, length)`.
        r: how many tokens go.

    Returns:
        States `(batch, length − r, dim)` and sizes `(batch, length − r)`, the class token first.
    """
    r = min(r, (states.shape[1] - 1) // 2)
    if r == 0:
        return states, sizes
    keys = normalize(keys, dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf  # the class token
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    go, stay = order[:, :r], order[:, r:].sort(-1).values
    partner = partner.gather(1, go)

    def rows(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

    weighted = states * sizes[..., None]
    into = partner[..., None].expand(-1, -1, states.shape[-1])
    total = sizes[:, 1::2].scatter_add(1, partner, sizes[:, ::2].gather(1, go))
    merged = weighted[:, 1::2].scatter_add(1, into, rows(weighted[:, ::2], go)) / total[..., None]
    states = torch.cat([rows(states[:, ::2], stay), merged], 1)
    return states, torch.cat([sizes[:, ::2].gather(1, stay), total], 1)


class MergingViT(nn.Module):
    """A DINOv2 that merges patches, over the weights of a model.

    Args:
        model: the model, which is not changed.
        share: of a picture's patches, how many go in each block, rounded.

    Raises:
        ValueError: `share` is below 0 or above 0.5.
    """

    def __init__(self, model: Dinov2Model, share: float) -> None:
        super().__init__()
        if not 0 <= share <= 0.5:
            raise ValueError(f"share={share} has to be between 0 and 0.5: patches go in pairs.")
        self.model, self.share, self.config = model, share, model.config

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """The `last_hidden_state` of the tokens that are left, the class token first, and their `sizes` in patches.

        Args:
            pixel_values: shape `(batch, 3, height, width)`.
        """
        states = self.model.embeddings(pixel_values)
        patches = states.shape[1] - 1
        sizes, r = torch.ones_like(states[..., 0]), round(patches * self.share)
        for layer in self.model.encoder.layer:
            # Without a bias as long as all sizes are 1: what the base computes, bit for bit.
            bias = sizes.log()[:, None, None, :] if sizes.shape[1] <= patches else None
            found, keys = _attend(layer.attention, layer.norm1(states), bias)
            states, sizes = merge_patches(layer.layer_scale1(found) + states, keys, sizes, r)
            states = layer.layer_scale2(layer.mlp(layer.norm2(states))) + states
        return SimpleNamespace(last_hidden_state=self.model.layernorm(states), sizes=sizes)


def _attend(attention: nn.Module, states: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What attention gives, and the mean of its keys over heads."""
    query, key, value = (
        project(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    found = scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
    return attention.o_proj(found), key.mean(1)
