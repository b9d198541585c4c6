"""What a plugin keeps of its base: sentence embeddings of held-out text, compared with the base's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import evaluate
import torch
from peft import PeftModel
from text import ScoredPair
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from peft_variator import metrics
from peft_variator.profiling import Spread


__all__ = ["MAX_TOKENS", "Quality", "compare_embeddings", "correlate", "embed", "embed_at_ratios"]

MAX_TOKENS = 128


@dataclass(frozen=True)
class Quality:
    """How closely the embeddings of a compressed model follow those of its base.

    Args:
        cosine: mean over texts of the cosine similarity to the base's embedding of the same text.
        cosine_spread: quartiles of that similarity over the texts.
        relative_error: ‖embeddings − base's‖ / ‖base's‖, Frobenius norms over all texts.
        agreement: share of texts whose nearest other text is the same as with the base's embeddings.
        agreement_error: binomial standard error of `agreement`.
    """

    cosine: float
    cosine_spread: Spread
    relative_error: float
    agreement: float
    agreement_error: float


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Sentence embeddings as the model was trained to give them: the mean over real tokens, of length 1.

    Args:
        model: encoder, in evaluation mode.
        tokenizer: its tokenizer.
        texts: cut off after `MAX_TOKENS` tokens.
        batch_size: texts in a batch.

    Returns:
        Shape `(texts, dim)`.
    """
    batches = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        mask = batch["attention_mask"].unsqueeze(-1)
        sums = (model(**batch).last_hidden_state.float() * mask).sum(1)
        batches.append(normalize(sums / mask.sum(1), dim=-1))
    return torch.cat(batches)


def embed_at_ratios(
    plugin: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], ratios: Sequence[int]
) -> dict[int, Tensor]:
    """`embed` at each compression ratio; the plugin keeps the last one."""
    embeddings = {}
    for ratio in ratios:
        plugin.set_compression_ratio(ratio)
        embeddings[ratio] = embed(plugin.eval(), tokenizer, texts)
    return embeddings


def correlate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[ScoredPair]) -> float:
    """Spearman's correlation, in percent, of the cosines of pairs of texts with the scores that people gave them."""
    # Texts of like length share a batch, so that little of it is padding.
    texts = sorted({text for pair in pairs for text in (pair.left, pair.right)}, key=len)
    rows = dict(zip(texts, embed(model, tokenizer, texts), strict=True))
    cosines = torch.stack([rows[pair.left] @ rows[pair.right] for pair in pairs])
    scores = torch.tensor([pair.score for pair in pairs])
    return 100 * float(torch.corrcoef(torch.stack([_ranks(cosines), _ranks(scores)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Place of each value in ascending order; equal values share the mean of their places."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts - 1) / 2)[places].double()


def compare_embeddings(embeddings: Tensor, base: Tensor) -> Quality:
    """Fidelity and retrieval of `embeddings` beside those of the base, both of shape `(texts, dim)` and length 1."""
    pair = {"predictions": embeddings.numpy(), "references": base.numpy()}
    fidelity = evaluate.load(metrics.path("fidelity"), "hidden").compute(**pair)
    agreement = evaluate.load(metrics.path("nearest_neighbour")).compute(**pair)["agreement"]
    return Quality(
        cosine=fidelity["cosine"],
        cosine_spread=Spread.of((embeddings * base).sum(-1).tolist()),
        relative_error=fidelity["relative_error"],
        agreement=agreement,
        agreement_error=math.sqrt(agreement * (1 - agreement) / len(base)),
    )
