"""What a text encoder's sentence embeddings are good for: similarity, classification, retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from texts import read_rows, read_squad
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase


__all__ = ["embed", "probe", "probe_pairs", "retrieval", "similarity"]

MAX_TOKENS = 256
_Embeddings = npt.NDArray[np.float32]
# The files of the tasks of pairs: to train, to test, and where label and texts stand.
PAIRS = {
    "mrpc": ("mrpc/train.tsv", "mrpc/test.tsv", (0, 3, 4)),
    "qqp": ("qqp_10k/train.tsv", "qqp_10k/eval.tsv", (0, 1, 2)),
}


@torch.inference_mode()
def embed(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 32
) -> _Embeddings:
    """Sentence embeddings: the mean over real tokens, of length 1.

    Args:
        model: encoder in evaluation mode.
        tokenizer: its tokenizer.
        texts: cut off after `MAX_TOKENS` tokens; equal ones are computed once.
        batch_size: texts of like length that are computed together.

    Returns:
        Shape `(texts, dim)`.
    """
    distinct = sorted(set(texts), key=len)
    rows: dict[str, _Embeddings] = {}
    for start in range(0, len(distinct), batch_size):
        part = distinct[start : start + batch_size]
        batch = tokenizer(part, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden_states = model(**batch).last_hidden_state.float()
        pooled = normalize((hidden_states * mask).sum(1) / mask.sum(1), dim=-1)
        rows |= dict(zip(part, pooled.numpy(), strict=True))
    return np.stack([rows[text] for text in texts])


def similarity(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, limit: int | None, split: str = "test"
) -> dict[str, Any]:
    """Spearman's correlation, in percent, of cosines with people's scores on STS-B test, or another split of it."""
    rows = read_rows(data / "stsb" / f"sts-{split}.csv", header=False)[:limit]
    left = embed(model, tokenizer, [row[5] for row in rows])
    right = embed(model, tokenizer, [row[6] for row in rows])
    scores = [float(row[4]) for row in rows]
    return {"spearman": 100 * float(spearmanr((left * right).sum(-1), scores).statistic), "pairs": len(rows)}


def probe(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, limit: int | None) -> dict[str, Any]:
    """Accuracy, in percent, of logistic regression on the embeddings of SST-2's sentences.

    Sentences of its whole test set are not trained on: the files share some.
    """
    train, test = (read_rows(data / "sst2" / f"{name}.tsv", header=False) for name in ("train", "test"))
    tested = {row[0] for row in test}
    sets = [
        (embed(model, tokenizer, [row[0] for row in rows]), [row[1] for row in rows])
        for rows in ([row for row in train if row[0] not in tested][:limit], test[:limit])
    ]
    return _accuracy(sets[0], sets[1])


def probe_pairs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, limit: int | None, task: str
) -> dict[str, Any]:
    """Accuracy, in percent, of logistic regression on |u − v| and u · v of a pair's embeddings.

    Args:
        model: encoder in evaluation mode.
        tokenizer: its tokenizer.
        data: the data folder.
        limit: pairs to train on and to test on at most.
        task: one of `PAIRS`.
    """
    *files, (label, left, right) = PAIRS[task]
    sets = []
    for file in files:
        rows = read_rows(data / file, header=True)[:limit]
        u, v = (embed(model, tokenizer, [row[place] for row in rows]) for place in (left, right))
        sets.append((np.concatenate([np.abs(u - v), u * v], axis=1), [row[label] for row in rows]))
    return _accuracy(*sets)


def _accuracy(train: tuple[_Embeddings, list[str]], test: tuple[_Embeddings, list[str]]) -> dict[str, Any]:
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(*train)
    return {"accuracy": 100 * classifier.score(*test), "train": len(train[1]), "test": len(test[1])}


def retrieval(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, limit: int | None) -> dict[str, Any]:
    """How often, in percent, a SQuAD question's own paragraph is nearest, and the mean reciprocal rank.

    The paragraphs are those of all articles that are measured on; `limit` bounds the questions.
    """
    paragraphs = [paragraph for article in read_squad(data)[1] for paragraph in article.paragraphs]
    questions = [(text, place) for place, (_, asked) in enumerate(paragraphs) for text, _ in asked]
    # Spread over all articles rather than the first ones.
    questions = questions[:: max(1, len(questions) // limit)][:limit] if limit else questions
    keys = embed(model, tokenizer, [context for context, _ in paragraphs])
    queries = embed(model, tokenizer, [text for text, _ in questions])
    cosines = queries @ keys.T
    own = cosines[np.arange(len(questions)), [place for _, place in questions]]
    ranks = (cosines > own[:, None]).sum(1) + 1
    return {
        "first": 100 * float((ranks == 1).mean()),
        "reciprocal_rank": 100 * float((1 / ranks).mean()),
        "questions": len(questions),
        "paragraphs": len(paragraphs),
    }
