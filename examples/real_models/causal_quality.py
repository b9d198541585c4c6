"""What a language model does after a prompt: continuations and answers, compared with the base's."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from texts import read_squad, wikitext2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["answer_f1", "answers", "continuations"]

CONTINUATION = 64
ANSWER_TOKENS = 24


@torch.inference_mode()
def continuations(
    model: nn.Module,
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    limit: int | None,
    prompt: int,
) -> dict[str, Any]:
    """NLL per token, in nats, of what follows prompts of WikiText-2 test, and the KL from the base.

    The labels are −100 in the prompt, from which a plugin knows that no prediction in there is used.

    Args:
        model: language model in evaluation mode.
        base: the model it is compared with; may be the same.
        tokenizer: their tokenizer.
        data: the data folder.
        limit: prompts at most, spread over the text.
        prompt: tokens of a prompt.

    Returns:
        `nll`, `nll_above_base` (prompt by prompt) and `kl`, means over the `prompts`; the last two with the standard
        error of the mean, `None` for one prompt.
    """
    tokens = tokenizer("\n".join(wikitext2(data, "test")), verbose=False, return_tensors="pt")["input_ids"][0]
    windows = tokens[: len(tokens) // (prompt + CONTINUATION) * (prompt + CONTINUATION)].view(
        -1, prompt + CONTINUATION
    )
    windows = windows[:: max(1, len(windows) // limit)][:limit] if limit else windows
    nll, above, divergence = [], [], []
    for window in windows:
        expected = _expected(base, tuple(window.tolist()), prompt)
        logits = expected if base is model else _continued(model, window[None], prompt)
        nll.append(cross_entropy(logits, window[prompt:]).item())
        above.append(nll[-1] - cross_entropy(expected, window[prompt:]).item())
        logs = logits.log_softmax(-1), expected.log_softmax(-1)
        divergence.append(kl_div(*logs, reduction="batchmean", log_target=True).item())
    return {
        "nll": statistics.fmean(nll),
        "nll_above_base": statistics.fmean(above),
        "nll_above_base_error": _standard_error(above),
        "kl": statistics.fmean(divergence),
        "kl_error": _standard_error(divergence),
        "prompts": len(windows),
    }


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


@lru_cache(maxsize=64)
def _expected(base: nn.Module, tokens: tuple[int, ...], prompt: int) -> Tensor:
    """The base's logits, kept for the next model that is compared with it."""
    return _continued(base, torch.tensor([tokens]), prompt)


def _continued(model: nn.Module, input_ids: Tensor, prompt: int) -> Tensor:
    """Logits of the tokens after the prompt, of shape `(CONTINUATION, vocabulary)`."""
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    outputs = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=labels)
    return outputs.logits[0, prompt - 1 : -1].float()


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    limit: int | None,
) -> dict[str, Any]:
    """F1, in percent, of greedy answers to SQuAD questions with the passage in the prompt; agreement with the base.

    Agreement is the share, in percent, of the base's tokens that come before the first other one. `f1_above_base` is
    the mean over the questions, with its standard error.
    """
    asked = [
        (context, question, given)
        for article in read_squad(data)[1]
        for context, questions in article.paragraphs
        for question, given in questions
    ]
    asked = asked[:: max(1, len(asked) // limit)][:limit] if limit else asked
    scores, above, agreements = [], [], []
    for context, question, given in asked:
        content = f"{context}\n\nAnswer with a few words of the text above. Question: {question}"
        message = [{"role": "user", "content": content}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = _generated(model, inputs)
        expected = tokens if base is model else _generated(base, inputs)
        found, of_base = (
            100 * answer_f1(tokenizer.decode(answer, skip_special_tokens=True), given) for answer in (tokens, expected)
        )
        scores.append(found)
        above.append(found - of_base)
        agreements.append(_agreement(tokens, expected))
    return {
        "f1": statistics.fmean(scores),
        "f1_above_base": statistics.fmean(above),
        "f1_above_base_error": _standard_error(above),
        "agreement": 100 * statistics.fmean(agreements),
        "questions": len(asked),
    }


def _generated(model: PreTrainedModel, inputs: Any) -> list[int]:
    ids = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def _agreement(tokens: Sequence[int], base: Sequence[int]) -> float:
    same = next((place for place, token in enumerate(base) if tokens[place : place + 1] != [token]), len(base))
    return same / len(base)


def answer_f1(answer: str, given: Sequence[str]) -> float:
    """F1 of an answer's words with the best of the given ones, between 0 and 1, as SQuAD's own script counts it."""
    return max(_f1(_words(answer), _words(text)) for text in given)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]", "", text.lower())).split()


def _f1(left: list[str], right: list[str]) -> float:
    if not left or not right:
        return float(left == right)
    return 2 * (Counter(left) & Counter(right)).total() / (len(left) + len(right))
