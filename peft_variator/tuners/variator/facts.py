"""What the arguments of one forward call of a stack tell about its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


__all__ = ["CallFacts", "StackKind"]

StackKind = Literal["encoder", "causal", "vision"]


@dataclass(frozen=True)
class CallFacts:
    """What is known about a call's tokens before any layer runs.

    Args:
        kind: whether the stack is an encoder, causal, or a vision encoder.
        arguments: the arguments of the call, those of the surrounding models included.
        image_ids: token ids that stand for an image's tokens.
        image_tokens: which tokens stand for an image's, where embeddings take the place of ids; `(batch, length)`.
        shifted_labels: whether `labels` are next-token labels (a language-model head) rather than one a token.
        patch_size: edge of a patch in pixels, of vision encoders.
        pooled_pad_id: the id of padding, where a sequence classifier uses the last token of another id.
        past_length: number of tokens that the key-value cache of a causal stack held before the call, padding
            included. It has to be read before the first layer adds to the cache.
    """

    kind: StackKind
    arguments: Mapping[str, Any]
    image_ids: tuple[int, ...] = ()
    image_tokens: Tensor | None = None
    shifted_labels: bool = True
    patch_size: tuple[int, int] | None = None
    pooled_pad_id: int | None = None
    past_length: int = 0

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

    def token_ids(self, shape: tuple[int, int]) -> Tensor | None:
        """The ids of the tokens, `(batch, length)`; `None` where embeddings take their place."""
        ids = self.arguments.get("input_ids")
        return ids if isinstance(ids, Tensor) and tuple(ids.shape) == shape else None
